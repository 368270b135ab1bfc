"""The diffusion against closed forms. For data from N(mean, std^2), the best noise predictor and
the distribution of every sampler's output are known exactly."""
import math

import pytest
import torch

from diffusion import GaussianDiffusion


class GaussianOracle:
    """The exact E[eps | x_t] for pixels that are independent N(mean, std^2)."""

    def __init__(self, diffusion, mean, std):
        self.alpha_bar, self.mean, self.std = torch.tensor(diffusion.alpha_bar), mean, std

    def __call__(self, x, t):
        ab = self.alpha_bar[t].view(-1, *[1] * (x.ndim - 1)).double()
        x_t, variance = x.double(), ab * self.std ** 2 + 1 - ab
        return ((1 - ab).sqrt() * (x_t - ab.sqrt() * self.mean) / variance).float()


diffusion = GaussianDiffusion()


def test_linear_schedule():
    ab = torch.tensor(diffusion.alpha_bar, dtype=torch.float64)
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    expected = [math.prod(1 - b for b in betas[:t + 1]) for t in (0, 1, 500, 999)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ab[[0, 1, 500, 999]], expected, rtol=1e-12, atol=0)
    assert (ab.diff() < 0).all()


def test_cosine_schedule():
    ab = GaussianDiffusion(1000, "cosine").alpha_bar

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 500, 900):                          # before beta is capped at 0.999
        assert ab[t] == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert ab[999] == pytest.approx(ab[998] * 0.001, rel=1e-9)


def test_lognormal_schedule():
    """Over all timesteps, the log SNR is distributed as N(-0.5, 2^2)."""
    ab = torch.tensor(GaussianDiffusion(1000, "lognormal").alpha_bar)
    log_snr = (ab / (1 - ab)).log()
    assert (ab.diff() < 0).all() and 0 < ab[-1] < 0.001
    assert log_snr.mean() == pytest.approx(-0.5, abs=1e-3)
    assert log_snr.std() == pytest.approx(2, abs=0.01)
    assert ((log_snr + 0.5).abs() < 2).float().mean() == pytest.approx(0.6827, abs=0.001)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="'square'.*linear, cosine or lognormal"):
        GaussianDiffusion(1000, "square")
    with pytest.raises(ValueError, match="'x'.*eps or v"):
        GaussianDiffusion(1000, "linear", "x")


def test_tables_move_with_the_module():
    moved = GaussianDiffusion().to("meta")
    assert moved.signal.device.type == moved.noise.device.type == "meta"
    assert not list(moved.parameters()) and not moved.state_dict()


@pytest.mark.parametrize("t", [0, 300, 999])
def test_q_sample_moments(t):
    """x_t ~ N(sqrt(alpha_bar) x_0, 1 - alpha_bar), to 4 standard errors."""
    n, generator = 100_000, torch.Generator().manual_seed(0)
    x_0 = torch.tensor([-1.0, 0.3]).expand(n, 2)
    eps = torch.randn(n, 2, generator=generator)
    x_t = diffusion.q_sample(x_0, torch.full((n,), t), eps).double()
    ab = diffusion.alpha_bar[t]
    variance = 1 - ab
    assert ((x_t.mean(0) - ab ** 0.5 * x_0[0]).abs() < 4 * (variance / n) ** 0.5).all()
    assert ((x_t.var(0) - variance).abs() < 4 * variance * (2 / n) ** 0.5).all()


def test_q_sample_takes_a_timestep_for_each_image():
    x_0, eps, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 999])
    x_t = diffusion.q_sample(x_0, t, eps)
    for i in range(3):
        ab = diffusion.alpha_bar[t[i]]
        torch.testing.assert_close(x_t[i], ab ** 0.5 * x_0[i] + (1 - ab) ** 0.5 * eps[i])


def test_per_image_loss_sums_over_pixels():
    x_0, eps, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.arange(5)
    loss = diffusion.per_image_loss(lambda x, t: torch.full_like(x, 0.5), x_0, t, eps)
    torch.testing.assert_close(loss, torch.stack([((e - 0.5) ** 2).sum() for e in eps]))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "lognormal"])
def test_the_losses_of_v_and_eps_differ_by_a_factor(schedule):
    """eps = noise x_t + signal v, so an error in eps is signal times the error in v."""
    by_eps, by_v = GaussianDiffusion(1000, schedule), GaussianDiffusion(1000, schedule, "v")
    x_0, eps = torch.rand(4, 2, 3, 3) * 2 - 1, torch.randn(4, 2, 3, 3)
    t = torch.tensor([0, 250, 500, 750])
    ab = torch.tensor(by_v.alpha_bar)[t].view(-1, 1, 1, 1)
    signal, noise = ab.sqrt(), (1 - ab).sqrt()
    output = torch.randn(4, 2, 3, 3)
    loss = by_v.per_image_loss(lambda x_t, t: output, x_0, t, eps)
    v = signal * eps - noise * x_0
    torch.testing.assert_close(loss, ((v - output) ** 2).flatten(1).sum(1))
    same = by_eps.per_image_loss(lambda x_t, t: noise * x_t + signal * output, x_0, t, eps)
    torch.testing.assert_close(same, ab.flatten() * loss, rtol=1e-4, atol=1e-6)


def test_samples_are_the_same_by_v_and_by_eps():
    """A prediction of eps equals the prediction v = (eps - noise x_t) / signal."""
    alpha_bar = torch.tensor(diffusion.alpha_bar)

    def v(x, t):
        ab = alpha_bar[t].view(-1, 1)
        return (oracle(x, t) - (1 - ab).sqrt() * x) / ab.sqrt()

    by_v = GaussianDiffusion(prediction="v")
    a = diffusion.sample(oracle, (10, 1), generator=torch.Generator().manual_seed(0))
    b = by_v.sample(v, (10, 1), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_per_image_loss_draws_t_and_eps():
    """For a network that predicts zero, l is chi-squared. All timesteps are equally likely."""
    torch.manual_seed(0)
    seen = []

    def zero(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    loss = diffusion.per_image_loss(zero, torch.zeros(20_000, 1, 4, 4))
    assert abs(loss.mean() - 16) < 4 * (32 / 20_000) ** 0.5
    t = seen[0].double()
    assert 0 <= t.min() < 5 and 995 <= t.max() < 1000
    assert abs(t.mean() - 499.5) < 4 * (1000 / 12 ** 0.5) / 20_000 ** 0.5


def test_per_image_loss_is_float32_under_autocast():
    """bfloat16 represents neither the difference 1 + 2^-8 nor the sum of its 784 squares."""
    conv = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.constant_(conv.bias, -1.0)
    x_0, t = torch.zeros(2, 1, 28, 28), torch.tensor([0, 9])
    eps = torch.full((2, 1, 28, 28), 2 ** -8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion.per_image_loss(lambda x, t: conv(x), x_0, t, eps)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 784 * (1 + 2 ** -8) ** 2))


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 999, 1000])
def test_timesteps_go_from_noise_to_image(steps):
    for spacing in ["uniform", "log_snr"]:
        times = diffusion.timesteps(steps, spacing)
        assert len(times) == steps + 1 and times[0] == 999 and times[-1] == -1
        assert all(a > b for a, b in zip(times, times[1:]))
    if steps == 1000:
        assert diffusion.timesteps(1000, "uniform") == list(range(999, -2, -1))
        assert diffusion.timesteps(1000, "log_snr") == list(range(999, -2, -1))


# A Gaussian well inside [-1, 1], so that clipping x_0 changes nothing that matters.
MEAN, STD = 0.1, 0.2
oracle = GaussianOracle(diffusion, MEAN, STD)


def exact_variance(steps, eta):
    """Returns the variance of samples. A step is linear, x_next = a x_t + b + sigma z, so
    v_next = a^2 v_t + sigma^2."""
    v, timesteps = 1.0, diffusion.timesteps(steps, "uniform")
    for t, t_next in zip(timesteps, timesteps[1:]):
        ab_t = diffusion.alpha_bar[t]
        ab_next = diffusion.alpha_bar[t_next] if t_next >= 0 else 1.0
        gain_eps = (1 - ab_t) ** 0.5 / (ab_t * STD ** 2 + 1 - ab_t)    # d eps / d x_t
        gain_x_0 = (1 - (1 - ab_t) ** 0.5 * gain_eps) / ab_t ** 0.5    # d x_0 / d x_t
        sigma2 = eta ** 2 * (1 - ab_next) / (1 - ab_t) * (1 - ab_t / ab_next)
        gain = ab_next ** 0.5 * gain_x_0 + (1 - ab_next - sigma2) ** 0.5 * gain_eps
        v = gain ** 2 * v + sigma2
    return v


def sample(n, steps, sampler, eta, seed):
    """Samples n pixels from the Gaussian. Returns [n, 1] float64."""
    generator = torch.Generator().manual_seed(seed)
    return diffusion.sample(oracle, (n, 1), steps, sampler, eta, generator).double()


@pytest.mark.parametrize("sampler, steps, eta", [
    ("ddpm", 1000, None), ("ddim", 1000, None),
    ("dpm++", 20, 0.0), ("dpm++", 20, 0.5), ("dpm++", 20, None)])
def test_samplers_reproduce_a_gaussian(sampler, steps, eta):
    n = 4000
    x = sample(n, steps, sampler, eta, seed=0)
    assert abs(x.mean() - MEAN) < 4 * STD / n ** 0.5
    # what discretisation costs on top of the sampling error: 4 % of the variance
    assert abs(x.var() / STD ** 2 - 1) < 4 * (2 / n) ** 0.5 + 0.04


@pytest.mark.parametrize("sampler, steps, eta", [
    ("ddim", 10, 0.0), ("ddim", 50, 0.5), ("ddpm", 20, 1.0), ("ddpm", 1000, 1.0)])
def test_samplers_have_exactly_the_variance_of_their_recursion(sampler, steps, eta):
    n = 20_000 if steps < 1000 else 4000
    x = sample(n, steps, sampler, eta, seed=1)
    assert abs(x.var() / exact_variance(steps, eta) - 1) < 4 * (2 / n) ** 0.5


def test_dpm_solver_at_20_steps_beats_ddim_at_20():
    answer = sample(1000, 1000, "ddim", eta=0.0, seed=2)
    solver = sample(1000, 20, "dpm++", eta=0.0, seed=2)
    ddim = sample(1000, 20, "ddim", eta=0.0, seed=2)
    assert (solver - answer).abs().mean() < 0.2 * (ddim - answer).abs().mean()


@pytest.mark.parametrize("eta", [0, 1])
def test_dpm_solver_formula_on_uneven_steps(eta):
    """The sampler equals the paper's formulas for DPM-Solver++(2M) and SDE-DPM-Solver++(2M), with
    the paper's symbols, on steps whose ratio r = last h / h is far from 1."""
    uneven, timesteps = GaussianDiffusion(), [999, 700, 650, 200, 20, -1]
    uneven.timesteps = lambda steps, spacing: timesteps
    got = uneven.sample(oracle, (100, 1), 5, "dpm++", eta, torch.Generator().manual_seed(4))

    alpha = [ab ** 0.5 for ab in diffusion.alpha_bar]
    sigma = [(1 - ab) ** 0.5 for ab in diffusion.alpha_bar]
    lambda_ = [math.log(a / s) for a, s in zip(alpha, sigma)]

    def predict_x_0(x, t):
        eps = oracle(x, torch.full((100,), t)).double()
        return ((x - sigma[t] * eps) / alpha[t]).clamp(-1, 1)

    noise = torch.Generator().manual_seed(4)
    x, last_x_0, last_h = torch.randn(100, 1, generator=noise).double(), None, None
    for t, t_next in zip(timesteps[:-1], timesteps[1:-1]):
        x_0 = predict_x_0(x, t)
        h, D = lambda_[t_next] - lambda_[t], x_0
        if last_x_0 is not None:
            r = last_h / h
            D = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * last_x_0
        last_x_0, last_h = x_0, h
        x = (sigma[t_next] / sigma[t] * math.exp(-eta * h) * x
             - alpha[t_next] * math.expm1(-(1 + eta) * h) * D)
        if eta:
            z = torch.randn(100, 1, generator=noise)
            x = x + sigma[t_next] * (-math.expm1(-2 * h)) ** 0.5 * z
    expected = predict_x_0(x, 20)    # the last step goes to x_0 itself
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_ddpm_is_ddim_at_eta_1():
    assert torch.equal(sample(10, 30, "ddpm", 1.0, seed=3), sample(10, 30, "ddim", 1.0, seed=3))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_generator_is_all_the_randomness(sampler):
    a, b, c = (sample(4, 10, sampler, None, seed) for seed in [0, 0, 1])
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_images_stay_in_range_whatever_the_network_outputs(sampler):
    def wild(x, t):
        return 50 * torch.sin(37 * x)

    generator = torch.Generator().manual_seed(0)
    x = diffusion.sample(wild, (16, 1, 4, 4), 10, sampler, generator=generator)
    assert x.shape == (16, 1, 4, 4) and x.abs().max() <= 1


def test_bad_wishes_are_refused():
    with pytest.raises(ValueError, match="'euler'.*ddpm, ddim, dpm"):
        diffusion.sample(oracle, (1, 1), 10, "euler")
    with pytest.raises(ValueError, match="eta must be 0 to 1, not 2"):
        diffusion.sample(oracle, (1, 1), 10, "ddim", eta=2)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps must be 1 to 1000, not {steps}"):
            diffusion.sample(oracle, (1, 1), steps)
