"""
The positive-unlabeled (PU) risk: learn normal images without one that is labeled normal.

Takahashi et al., Positive-Unlabeled Diffusion Models for Preventing Sensitive Data Generation,
ICLR 2025 (arXiv:2503.03789). U is a set of unlabeled images, S one of labeled sensitive images, and
l(x) the loss of the network on image x, an estimate of the negative ELBO:

    p(normal | x) = exp(-l(x))              the label model of an autoencoding binary classifier.
                                            A normal image costs -log p(normal | x) = l(x), and
                                            a sensitive one -log(1 - exp(-l(x))).
    p_U = prior p_S + (1 - prior) p_N       U mixes sensitive images, like those of S, and normal
                                            ones. Therefore
    (1 - prior) E_N[l] = E_U[l] - prior E_S[l]      needs no image that is labeled normal:

    risk = prior E_S[-log(1 - exp(-l))] + (1 - prior) E_N[l]
         = prior E_S[-log(1 - exp(-l))] + correction(E_U[l] - prior E_S[l])

l is a sum over pixels, far above 1 for most images. There the first term is nearly 0, and the
difference does the work. It estimates a loss, which is never negative. A network that raises l on
S alone can make the estimate negative all the same, so it is corrected:

    abs     |difference|, as published (Hammoudeh & Lowd 2020, arXiv:2002.10261)
    nn      max(0, difference), but where that is 0, minimise -difference instead of the risk
            (non-negative PU learning, Kiryo et al. 2017, arXiv:1703.00593, algorithm 1)
    none    no correction: unbiased, and free to diverge

The difference of a small micro-batch is noisier, and more often negative by chance, than that of
the whole batch. So with micro-batches, each with a risk of its own, the correction acts more often.

Nothing bounds l on sensitive images: it may grow and grow, and the noise of the difference with it.
But the identity above holds for any function of l, so also for min(l, cap). An image above the cap
has no gradient, be it of U or of S, and the difference now estimates (1 - prior) E_N[min(l, cap)].
"""
import math

import torch

LOG2 = math.log(2)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-x)) without cancellation, for x >= 0 of any shape.

    Value and gradient are finite everywhere: an x below 1e-30 counts as 1e-30.
    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    x = x.clamp(min=1e-30)
    small = (-torch.expm1(-x)).log()
    large = torch.log1p(-torch.exp(-x.clamp(min=LOG2)))    # unclamped, 0 has a gradient of nan
    return torch.where(x < LOG2, small, large)


def pu_loss(loss_u: torch.Tensor, loss_s: torch.Tensor, prior: float, correction: str = "abs",
            negative: torch.Tensor = None) -> torch.Tensor:
    """The PU risk of Takahashi et al. -> scalar.

    loss_u [B_u], loss_s [B_s]: the losses of unlabeled and of labeled sensitive images
    prior: the fraction of sensitive images in U, in (0, 1)
    correction: "abs", "nn" or "none"
    negative: bool scalar: is the difference negative? None: these images decide. For images that
        are spread over several ranks, pass the sign of the difference over all of them.
    Raises ValueError for an unknown correction or a prior outside (0, 1).
    """
    if not 0 < prior < 1:
        raise ValueError(f"prior must lie strictly between 0 and 1, not {prior}")
    sensitive = prior * -log1mexp(loss_s).mean()
    difference = loss_u.mean() - prior * loss_s.mean()    # estimates (1 - prior) E_N[l]
    if negative is None:
        negative = difference < 0
    if correction == "abs":
        return sensitive + torch.where(negative, -difference, difference)
    if correction == "nn":
        return torch.where(negative, -difference, sensitive + difference)
    if correction == "none":
        return sensitive + difference
    raise ValueError(f"unknown correction {correction!r}: choose abs, nn or none")


def cap_loss(loss: torch.Tensor, t: torch.Tensor, typical: torch.Tensor, limit: float,
             T: int) -> torch.Tensor:
    """min(l, cap) -> [B], for U and S alike. The cap is limit times the mean of l on U near t.

    loss [B], t [B] in [0, T); typical [K]: that mean for each of K equal ranges of [0, T)
    """
    return loss.minimum(limit * typical[t * len(typical) // T])


def supervised_loss(loss_u: torch.Tensor, loss_s: torch.Tensor, share_s: float) -> torch.Tensor:
    """The baseline that takes all of U for normal: the mean cost over U and S -> scalar.

    loss_u [B_u], loss_s [B_s]: as above; share_s: |S| / (|U| + |S|), in [0, 1]
    """
    return (1 - share_s) * loss_u.mean() + share_s * -log1mexp(loss_s).mean()
