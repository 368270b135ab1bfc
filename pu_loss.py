"""
The positive-unlabeled risk: train on normal images without having any that are labeled normal.

Takahashi et al., Positive-Unlabeled Diffusion Models for Preventing Sensitive Data Generation, ICLR 2025
(arXiv:2503.03789). From a vector of per-image losses l on unlabeled images and one on sensitive images:

    p(normal | x) = exp(-l(x))                           the label model of an autoencoding binary classifier, so
    normal costs l,  sensitive costs -log(1 - exp(-l))   are the two negative log likelihoods.
    p_U = prior p_S + (1 - prior) p_N                    U mixes sensitive and normal images, therefore
    (1 - prior) E_N[l] = E_U[l] - prior E_S[l]           is known without a single labeled normal image, and so is
    risk = prior E_S[-log(1 - exp(-l))] + (1 - prior) E_N[l]
         = prior E_S[-log(1 - exp(-l))] + correction(E_U[l] - prior E_S[l])

The difference estimates something that cannot be negative, but a network that memorises S makes it so. Corrections:
abs, |difference|, the published choice (Hammoudeh & Lowd 2020, arXiv:2002.10261); nn, non-negative (Kiryo et al.
2017, arXiv:1703.00593, algorithm 1): where the difference is negative, the step descends on minus the difference
alone; none: unbiased, and free to diverge.
"""
import math

import torch

LOG2 = math.log(2)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(-x)) for x >= 0, any shape, without cancellation (Maechler 2012, "Accurately computing
    log(1 - exp(-|a|))"). Value and gradient are finite everywhere: x below 1e-30 counts as 1e-30."""
    x = x.clamp(min=1e-30)
    return torch.where(x < LOG2, (-torch.expm1(-x)).log(), torch.log1p(-torch.exp(-x.clamp(min=LOG2))))


def pu_loss(loss_u: torch.Tensor, loss_s: torch.Tensor, prior: float, correction: str = "abs",
            whole: torch.Tensor = None) -> torch.Tensor:
    """The risk of Takahashi et al. loss_u [B_u], loss_s [B_s]: per-image losses of unlabeled and of labeled sensitive
    images; prior: the fraction of sensitive images in U, in (0, 1); correction: "abs", "nn" or "none".
    whole: where these images are one of several equal parts of a batch, E_U[l] - prior E_S[l] of the whole batch. Its
    sign decides for every part, and the mean of the parts' risks, and of their gradients, is that of the whole.
    -> scalar. Raises ValueError for an unknown correction or a prior outside (0, 1)."""
    if not 0 < prior < 1:
        raise ValueError(f"prior must lie strictly between 0 and 1, not {prior}")
    sensitive = prior * -log1mexp(loss_s).mean()
    normal = loss_u.mean() - prior * loss_s.mean()    # estimates (1 - prior) E_N[l]
    whole = normal if whole is None else whole
    if correction == "abs":
        return sensitive + torch.where(whole < 0, -normal, normal)
    if correction == "nn":
        return torch.where(whole < 0, -normal, sensitive + normal)
    if correction == "none":
        return sensitive + normal
    raise ValueError(f"unknown correction {correction!r}: choose abs, nn or none")


def supervised_loss(loss_u: torch.Tensor, loss_s: torch.Tensor, share: float) -> torch.Tensor:
    """The baseline that takes all of U for normal: the mean over the union of U and S of the two label costs.
    loss_u [B_u], loss_s [B_s]; share: the fraction of that union which is S, in [0, 1] -> scalar."""
    return (1 - share) * loss_u.mean() + share * -log1mexp(loss_s).mean()


def unsupervised_loss(loss_u: torch.Tensor, loss_s: torch.Tensor = None) -> torch.Tensor:
    """The baseline that ignores S: the ordinary diffusion loss, E_U[l]. loss_u [B_u] -> scalar."""
    return loss_u.mean()
