"""
The Gaussian diffusion: how images become noise, the loss of a network that predicts that noise, and the way back.

    diffusion = GaussianDiffusion(T=1000, schedule="linear").to(device)
    loss = diffusion.per_image_loss(model, x_0)                 # [B, C, H, W] in [-1, 1] -> [B]
    x_0 = diffusion.sample(model, (64, 1, 28, 28), steps=20)    # -> [64, 1, 28, 28] in [-1, 1]

DDPM (Ho et al. 2020, arXiv:2006.11239), DDIM (Song et al. 2021, arXiv:2010.02502), DPM-Solver++ (Lu et al. 2022,
arXiv:2211.01095), cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672), v (Salimans & Ho 2022, arXiv:2202.00512),
noise levels (EDM, Karras et al. 2022, arXiv:2206.00364).
"""
import math
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


class GaussianDiffusion(nn.Module):
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) for t = 0 ... T-1. A module without parameters,
    so that .to(device) takes the tables along."""

    def __init__(self, T: int = 1000, schedule: str = "linear", prediction: str = "eps"):
        """schedule: "linear", betas from 1e-4 to 0.02 (DDPM, section 4), "cosine" (Nichol & Dhariwal, eq. 17), or
        "lognormal", as are the noise levels that EDM trains on (Karras et al., table 1: log SNR ~ N(1, 2.4^2)), at more noise: N(-0.5, 2^2).
        prediction: what networks output, "eps" or "v" = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho,
        section 4), the part of eps that x_t does not tell. Where x_t is nearly all noise, a network for eps copies its
        input, to many digits if x_0 is to be right; one for v says what it thinks of x_0. Raises ValueError for any other."""
        super().__init__()
        if schedule == "linear":
            beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
        elif schedule == "cosine":
            f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        elif schedule == "lognormal":
            quantiles = torch.special.ndtri((torch.arange(T, dtype=torch.float64) + 0.5) / T)
            alpha_bar = torch.sigmoid(-0.5 - 2 * quantiles)
            beta = 1 - alpha_bar / F.pad(alpha_bar[:-1], (1, 0), value=1)
        else:
            raise ValueError(f"unknown schedule {schedule!r}: choose linear, cosine or lognormal")
        if prediction not in ("eps", "v"):
            raise ValueError(f"unknown prediction {prediction!r}: choose eps or v")
        alpha_bar = (1 - beta).cumprod(0)
        self.T, self.schedule, self.prediction = T, schedule, prediction
        self.alpha_bar = alpha_bar.tolist()    # float64, for the sampler
        self.register_buffer("signal", alpha_bar.sqrt().float(), persistent=False)        # sqrt(alpha_bar_t)
        self.register_buffer("noise", (1 - alpha_bar).sqrt().float(), persistent=False)   # sqrt(1 - alpha_bar_t)

    def q_sample(self, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_0 [B, ...], t [B] in [0, T), eps like x_0, standard normal -> x_t like x_0 (DDPM, eq. 4)."""
        signal, noise = self.at(t, x_0)
        return signal * x_0 + noise * eps

    def at(self, t: torch.Tensor, x: torch.Tensor) -> tuple:
        """t [B], x [B, ...] -> sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), [B, 1, ...] to go with x."""
        shape = [-1] + [1] * (x.ndim - 1)
        return self.signal[t].view(shape), self.noise[t].view(shape)

    def per_image_loss(self, model, x_0: torch.Tensor, t=None, eps=None) -> torch.Tensor:
        """l(x_0) = ||eps - model(x_t, t)||^2, summed over pixels: one sample of the simplified negative ELBO (DDPM, eq. 14,
        before its mean over images); or ||v - model(x_t, t)||^2, which is the same term divided by alpha_bar_t.
        x_0 [B, ...] in [-1, 1] -> [B], float32 even under autocast.
        t [B] and eps (like x_0) are drawn uniform and standard normal where they are not given."""
        if t is None:
            t = torch.randint(self.T, (len(x_0),), device=x_0.device)
        if eps is None:
            eps = torch.randn_like(x_0)
        target, out = eps.float(), model(self.q_sample(x_0, t, eps), t).float()
        if self.prediction == "v":
            signal, noise = self.at(t, x_0)
            target = signal * eps - noise * x_0
        return (target - out).square().flatten(1).sum(1)

    def times(self, steps: int, spacing: str) -> list:
        """The timesteps a sampler visits: T-1, ..., -1, where -1 stands for the clean image. "uniform": equally
        spaced in t (DDIM). "log_snr": equally spaced in log(signal / noise) (DPM-Solver, section 3.4)."""
        if spacing == "uniform":
            return [round(self.T * (1 - i / steps)) - 1 for i in range(steps + 1)]
        log_snr = (self.signal / self.noise).log().cpu()
        grid = torch.linspace(log_snr[-1], log_snr[0], steps)
        times = [self.T - 1]
        for i, t in enumerate((log_snr - grid[:, None]).abs().argmin(1).tolist()[1:], start=1):
            times.append(max(min(t, times[-1] - 1), steps - 1 - i))    # nearest, but no timestep twice
        return times + [-1]

    @torch.no_grad()
    def sample(self, model, shape: tuple, steps: int = 20, sampler: str = "dpm++", eta: float = None,
               generator: torch.Generator = None, progress: bool = False) -> torch.Tensor:
        """Noise -> images of the given shape [N, C, H, W], in [-1, 1], in `steps` calls of the model.

        "ddim": DDIM, eq. 12; deterministic at eta = 0, its default. "ddpm": ancestral sampling (DDPM, algorithm 2, with
        the posterior variance), which is DDIM at eta = 1. "dpm++": the same two with the predicted x_0 extrapolated from
        the last two predictions: SDE-DPM-Solver++(2M) at eta = 1, its default, because fresh noise mends what an
        imperfect network got wrong; DPM-Solver++(2M) at eta = 0. Predictions of x_0 are clipped to [-1, 1].

        generator: source of all noise, on the device of the tables. progress: count the steps on stderr.
        Raises ValueError for an unknown sampler, steps outside 1 ... T, or eta outside [0, 1]."""
        if sampler not in ("ddpm", "ddim", "dpm++"):
            raise ValueError(f"unknown sampler {sampler!r}: choose ddpm, ddim or dpm++")
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be 1 to {self.T}, not {steps}")
        if eta is None:
            eta = {"ddpm": 1.0, "ddim": 0.0, "dpm++": 1.0}[sampler]
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 to 1, not {eta}")
        device = self.signal.device
        x = torch.randn(shape, generator=generator, device=device)
        times = self.times(steps, "log_snr" if sampler == "dpm++" else "uniform")
        x_0_last = h_last = None

        for i, (t, s) in enumerate(zip(times[:-1], times[1:])):    # one step: from x_t to x_s, s < t
            ab_t = self.alpha_bar[t]
            ab_s = self.alpha_bar[s] if s >= 0 else 1.0
            out = model(x, torch.full((shape[0],), t, device=device)).float()
            if self.prediction == "v":
                x_0 = ab_t ** 0.5 * x - (1 - ab_t) ** 0.5 * out
            else:
                x_0 = (x - (1 - ab_t) ** 0.5 * out) / ab_t ** 0.5
            x_0 = x_0.clamp(-1, 1)

            if sampler == "dpm++" and s >= 0:    # the last step, to alpha_bar = 1, is of first order
                h = 0.5 * math.log(ab_s * (1 - ab_t) / ((1 - ab_s) * ab_t))    # step in log(signal / noise)
                D = x_0 if x_0_last is None else x_0 + h / (2 * h_last) * (x_0 - x_0_last)
                x_0_last, h_last, x_0 = x_0, h, D

            eps = (x - ab_t ** 0.5 * x_0) / (1 - ab_t) ** 0.5    # what the noise is if x_0 is right
            sigma = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)) ** 0.5
            x = ab_s ** 0.5 * x_0 + (1 - ab_s - sigma ** 2) ** 0.5 * eps
            if sigma > 0:
                x = x + sigma * torch.randn(shape, generator=generator, device=device)
            if progress:
                print(f"\r{sampler} step {i + 1}/{steps}", end="" if s >= 0 else "\n", file=sys.stderr, flush=True)
        return x
