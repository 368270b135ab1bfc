"""
The Gaussian diffusion: how images become noise, and how a network learns the way back.

    diffusion = GaussianDiffusion("linear", "eps").to(device)
    loss = diffusion.per_image_loss(model, x_0)                 # [B, C, H, W] in [-1, 1] -> [B]
    x_0 = diffusion.sample(model, (64, 1, 28, 28), steps=20)    # -> [64, 1, 28, 28] in [-1, 1]

Sources: DDPM (Ho et al. 2020, arXiv:2006.11239), DDIM (Song et al. 2021, arXiv:2010.02502),
DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), predicting v (Salimans & Ho 2022,
arXiv:2202.00512), lognormal noise levels (EDM, Karras et al. 2022, arXiv:2206.00364).
"""
import math
import sys

import torch
import torch.nn as nn

SAMPLERS = {"ddpm": 1.0, "ddim": 0.0, "dpm++": 1.0}    # default eta: the scale of fresh noise


def noise_schedule(name: str, T: int = 1000) -> torch.Tensor:
    """-> alpha_bar [T], float64, falling from nearly 1 to nearly 0.
    "linear": betas from 1e-4 to 0.02 (DDPM, section 4). "lognormal": log SNR ~ N(-0.5, 2^2); EDM
    uses N(2.4, 2.4^2), which is less noisy (table 1). Raises ValueError for another name."""
    if name == "linear":
        return (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
    if name == "lognormal":
        share = (torch.arange(T, dtype=torch.float64) + 0.5) / T
        return torch.sigmoid(-0.5 - 2 * torch.special.ndtri(share))    # ndtri: normal quantiles
    raise ValueError(f"unknown schedule {name!r}: choose linear or lognormal")


class GaussianDiffusion(nn.Module):
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), t = 0 ... T-1, and its reverse.
    A module without parameters, so that .to(device) moves its tables."""

    def __init__(self, schedule="linear", prediction: str = "eps"):
        """schedule: a name that noise_schedule knows, or alpha_bar itself [T], falling below 1.
        prediction: what the network outputs, "eps" or "v", which is
        sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho, section 4). Where x_t is
        nearly all noise, v is about -x_0, but eps is about x_t: to be right about x_0, a network
        for eps must copy its input very precisely.
        Raises ValueError for another schedule or prediction."""
        super().__init__()
        if prediction not in ("eps", "v"):
            raise ValueError(f"unknown prediction {prediction!r}: choose eps or v")
        if isinstance(schedule, str):
            alpha_bar = noise_schedule(schedule)
        else:    # zero terminal SNR (arXiv:2305.08891) ends at 0, which would be a divisor
            alpha_bar = torch.as_tensor(schedule, dtype=torch.float64).cpu().clamp(min=2 ** -40)
        self.T, self.prediction = len(alpha_bar), prediction
        self.alpha_bar = alpha_bar.tolist()    # float64, for the sampler
        self.register_buffer("signal", alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - alpha_bar).sqrt().float(), persistent=False)

    def signal_and_noise(self, t: torch.Tensor, x: torch.Tensor) -> tuple:
        """t [B], x [B, ...] -> sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), both [B, 1, ...]."""
        shape = [-1] + [1] * (x.ndim - 1)
        return self.signal[t].view(shape), self.noise[t].view(shape)

    def q_sample(self, x_0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """x_0 [B, ...], t [B] in [0, T), eps ~ N(0, I) like x_0 -> x_t like x_0 (DDPM, eq. 4)."""
        signal, noise = self.signal_and_noise(t, x_0)
        return signal * x_0 + noise * eps

    def per_image_loss(self, model, x_0: torch.Tensor, t=None, eps=None,
                       **condition) -> torch.Tensor:
        """l(x_0) = ||eps - model(x_t, t)||^2, the sum over pixels: one sample of the simplified
        negative ELBO (DDPM, eq. 14, which has the mean over images). For networks that predict v,
        ||v - model(x_t, t)||^2, which is the error of the eps it implies, divided by alpha_bar_t.
        x_0 [B, ...] in [-1, 1] -> [B], float32 even under autocast. Where they are not given,
        t [B] is drawn uniformly from [0, T), and eps, like x_0, from N(0, I).
        condition: more arguments of the network, such as labels=[B]."""
        if t is None:
            t = torch.randint(self.T, (len(x_0),), device=x_0.device)
        if eps is None:
            eps = torch.randn_like(x_0)
        output = model(self.q_sample(x_0, t, eps), t, **condition).float()
        target = eps.float()
        if self.prediction == "v":
            signal, noise = self.signal_and_noise(t, x_0)
            target = signal * eps - noise * x_0
        return (target - output).square().flatten(1).sum(1)

    def timesteps(self, steps: int, spacing: str) -> list:
        """The timesteps that a sampler visits: T-1, ..., -1, where -1 stands for the clean image.
        spacing: "uniform" in t (DDIM), or "log_snr", uniform in log(signal / noise), but no
        timestep is used twice (DPM-Solver, arXiv:2206.00927, section 3.4)."""
        if spacing == "uniform":
            return [round(self.T * (1 - i / steps)) - 1 for i in range(steps + 1)]
        half_log_snr = (self.signal / self.noise).log().cpu()
        grid = torch.linspace(half_log_snr[-1], half_log_snr[0], steps)
        nearest = (half_log_snr - grid[:, None]).abs().argmin(1).tolist()
        timesteps = [self.T - 1]
        for i in range(1, steps):
            below = min(nearest[i], timesteps[-1] - 1)
            timesteps.append(max(below, steps - 1 - i))    # one for each step that is left
        return timesteps + [-1]

    @torch.no_grad()
    def sample(self, model, shape: tuple, steps: int = 20, sampler: str = "dpm++",
               eta: float = None, generator=None, progress: bool = False,
               **condition) -> torch.Tensor:
        """Noise -> images of the given shape [N, C, H, W], in [-1, 1], in `steps` network calls.

        "ddim": DDIM, eq. 12; deterministic at eta = 0, its default. "ddpm": ancestral sampling
        (DDPM, algorithm 2, posterior variance), which is DDIM at eta = 1. "dpm++": DDIM's step, but
        x_0 is extrapolated from the last two predictions: SDE-DPM-Solver++(2M) at eta = 1, its
        default, since fresh noise repairs a network's errors; DPM-Solver++(2M) at eta = 0.
        All clip predictions of x_0 to [-1, 1]. eta: the scale of the fresh noise in each step.

        generator: a torch.Generator, the source of all noise. progress: counts steps on stderr.
        condition: more arguments of the network, such as labels=[N].
        Raises ValueError for another sampler, steps outside 1 ... T, or eta outside [0, 1]."""
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be 1 to {self.T}, not {steps}")
        if eta is None:
            eta = SAMPLERS[sampler]
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be 0 to 1, not {eta}")
        device = self.signal.device
        timesteps = self.timesteps(steps, "log_snr" if sampler == "dpm++" else "uniform")
        last_x_0 = last_h = None

        x = torch.randn(shape, generator=generator, device=device)
        for i, (t, t_next) in enumerate(zip(timesteps[:-1], timesteps[1:])):    # x_t -> x_{t_next}
            alpha_bar_t = self.alpha_bar[t]
            alpha_bar_next = self.alpha_bar[t_next] if t_next >= 0 else 1.0
            signal, noise = alpha_bar_t ** 0.5, (1 - alpha_bar_t) ** 0.5
            output = model(x, torch.full((shape[0],), t, device=device), **condition).float()
            if self.prediction == "v":
                x_0 = signal * x - noise * output
            else:
                x_0 = (x - noise * output) / signal
            x_0 = x_0.clamp(-1, 1)

            if sampler == "dpm++" and t_next >= 0:    # there is no noise at -1: h would be infinite
                ratio = alpha_bar_next * (1 - alpha_bar_t) / ((1 - alpha_bar_next) * alpha_bar_t)
                h = 0.5 * math.log(ratio)    # the step in log(signal / noise)
                predicted = x_0
                if last_x_0 is not None:
                    x_0 = predicted + h / (2 * last_h) * (predicted - last_x_0)
                last_x_0, last_h = predicted, h

            eps = (x - signal * x_0) / noise    # the noise in x_t, if x_0 is right
            beta = 1 - alpha_bar_t / alpha_bar_next
            sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar_t) * beta) ** 0.5
            x = alpha_bar_next ** 0.5 * x_0 + max(0, 1 - alpha_bar_next - sigma ** 2) ** 0.5 * eps
            if sigma > 0:
                x = x + sigma * torch.randn(shape, generator=generator, device=device)
            if progress:
                end = "" if t_next >= 0 else "\n"
                print(f"\r{sampler} step {i + 1}/{steps}", end=end, file=sys.stderr, flush=True)
        return x
