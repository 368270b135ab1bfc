"""The diffusion against closed forms. For data from N(mean, std^2), the best prediction and the
distribution of every sampler's output are known exactly."""
import math
import statistics

import pytest
import torch

from diffusion import GaussianDiffusion

MEAN, STD = 0.1, 0.2    # a Gaussian well inside [-1, 1], so that clipping x_0 changes little


class Oracle:
    """The exact E[eps | x_t], or E[v | x_t], for pixels that are independent N(mean, STD^2)."""

    def __init__(self, diffusion):
        self.alpha_bar, self.prediction = torch.tensor(diffusion.alpha_bar), diffusion.prediction

    def __call__(self, x, t, mean=MEAN):
        alpha_bar = self.alpha_bar.double()[t].view(-1, *[1] * (x.ndim - 1))
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        error = (x.double() - signal * mean) / (alpha_bar * STD ** 2 + 1 - alpha_bar)
        eps, x_0 = noise * error, mean + signal * STD ** 2 * error
        return (eps if self.prediction == "eps" else signal * eps - noise * x_0).float()


diffusion = GaussianDiffusion()
oracle = Oracle(diffusion)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sample(n, steps, sampler, eta, seed):
    """Samples n pixels from the Gaussian. Returns [n, 1] float64."""
    return diffusion.sample(oracle, (n, 1), steps, sampler, eta, seeded(seed)).double()


def test_linear_schedule():
    betas = [1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)]
    for t in [0, 1, 500, 999]:
        product = math.prod(1 - beta for beta in betas[:t + 1])
        assert diffusion.alpha_bar[t] == pytest.approx(product, rel=1e-12)


def test_lognormal_schedule():
    """Over all timesteps, the log SNR is distributed as N(-0.5, 2^2)."""
    normal = statistics.NormalDist(-0.5, 2)
    for t, alpha_bar in enumerate(GaussianDiffusion("lognormal").alpha_bar):
        share_above = 1 - normal.cdf(math.log(alpha_bar / (1 - alpha_bar)))
        assert share_above == pytest.approx((t + 0.5) / 1000, rel=1e-9)


@pytest.mark.parametrize("sampler, steps", [
    ("ddpm", 1000), ("ddim", 1000), ("dpm++", 20), ("dpm++", 1000)])
def test_with_zero_terminal_snr_a_network_for_v_draws_the_gaussian(sampler, steps):
    """arXiv:2305.08891, algorithm 1: sqrt(alpha_bar), shifted and scaled to end at exactly 0."""
    signal = torch.tensor(diffusion.alpha_bar).double().sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    zero_snr = GaussianDiffusion(signal.square(), "v")
    x = zero_snr.sample(Oracle(zero_snr), (4000, 1), steps, sampler, generator=seeded(0))
    assert abs(x.mean() - MEAN) < 4 * STD / 4000 ** 0.5
    assert abs(x.var() / STD ** 2 - 1) < 4 * (2 / 4000) ** 0.5 + 0.04


def test_tables_move_with_the_module():
    moved = GaussianDiffusion().to("meta")
    assert moved.signal.device.type == moved.noise.device.type == "meta"
    assert not list(moved.parameters()) and not moved.state_dict()


def test_per_image_loss_sums_over_pixels_what_the_condition_decides():
    x_0, eps, t = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3), torch.arange(5)
    labels = torch.tensor([0.5, 0.5, -1.0, 0.0, 2.0]).view(5, 1, 1, 1)
    loss = diffusion.per_image_loss(lambda x, t, labels: labels.expand_as(x), x_0, t, eps,
                                    labels=labels)
    torch.testing.assert_close(loss, torch.stack([((e - y) ** 2).sum()
                                                  for e, y in zip(eps, labels)]))


@pytest.mark.parametrize("schedule", ["linear", "lognormal"])
def test_the_losses_of_v_and_eps_differ_by_a_factor(schedule):
    """eps = noise x_t + signal v, so an error in eps is signal times the error in v."""
    by_eps, by_v = GaussianDiffusion(schedule), GaussianDiffusion(schedule, "v")
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


def test_per_image_loss_is_float32_whatever_the_network_outputs():
    """bfloat16 represents neither the difference 1 + 2^-8 nor the sum of its 784 squares."""
    x_0, t = torch.zeros(2, 1, 28, 28), torch.tensor([0, 9])
    eps = torch.full_like(x_0, 2 ** -8).bfloat16()
    loss = diffusion.per_image_loss(lambda x, t: -torch.ones_like(x).bfloat16(), x_0, t, eps)
    torch.testing.assert_close(loss, torch.full((2,), 784 * (1 + 2 ** -8) ** 2))


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 999, 1000])
def test_timesteps_go_from_noise_to_image(steps):
    for spacing in ["uniform", "log_snr"]:
        times = diffusion.timesteps(steps, spacing)
        assert len(times) == steps + 1 and times[0] == 999 and times[-1] == -1
        assert all(a > b for a, b in zip(times, times[1:]))


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


@pytest.mark.parametrize("sampler, steps, eta", [
    ("ddim", 10, 0.0), ("ddim", 50, 0.5), ("ddpm", 20, 1.0), ("ddpm", 1000, 1.0)])
def test_samplers_have_exactly_the_variance_of_their_recursion(sampler, steps, eta):
    n = 20_000 if steps < 1000 else 4000
    x = sample(n, steps, sampler, eta, seed=1)
    assert abs(x.var() / exact_variance(steps, eta) - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("eta", [0.0, 0.5, None])
def test_the_condition_decides_which_gaussian_is_drawn(eta):
    n, mean = 4000, torch.tensor([[-0.1], [MEAN]]).repeat(2000, 1)
    x = diffusion.sample(oracle, (n, 1), 20, "dpm++", eta, seeded(0), mean=mean).double() - mean
    assert all(abs(group.mean()) < 4 * STD / 2000 ** 0.5 for group in (x[::2], x[1::2]))
    # what discretisation costs on top of the sampling error: 4 % of the variance
    assert abs(x.var() / STD ** 2 - 1) < 4 * (2 / n) ** 0.5 + 0.04


@pytest.mark.parametrize("eta", [0, 1])
def test_dpm_solver_formula_on_uneven_steps(eta):
    """The sampler equals the paper's formulas for DPM-Solver++(2M) and SDE-DPM-Solver++(2M), with
    the paper's symbols, on steps whose ratio r = last h / h is far from 1."""
    uneven, timesteps = GaussianDiffusion(), [999, 700, 650, 200, 20, -1]
    uneven.timesteps = lambda steps, spacing: timesteps
    got = uneven.sample(oracle, (100, 1), 5, "dpm++", eta, seeded(4))

    alpha = [ab ** 0.5 for ab in diffusion.alpha_bar]
    sigma = [(1 - ab) ** 0.5 for ab in diffusion.alpha_bar]
    lambda_ = [math.log(a / s) for a, s in zip(alpha, sigma)]

    def predict_x_0(x, t):
        eps = oracle(x, torch.full((100,), t)).double()
        return ((x - sigma[t] * eps) / alpha[t]).clamp(-1, 1)

    noise = seeded(4)
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


def test_samples_are_the_same_by_v_and_by_eps_and_by_two_names_of_a_sampler():
    by_v = GaussianDiffusion(prediction="v")
    x = by_v.sample(Oracle(by_v), (10, 1), generator=seeded(0)).double()
    torch.testing.assert_close(x, sample(10, 20, "dpm++", 1.0, seed=0), rtol=0, atol=1e-4)
    assert torch.equal(sample(10, 30, "ddpm", None, seed=3), sample(10, 30, "ddim", 1.0, seed=3))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_generator_is_all_the_randomness_and_images_stay_in_range(sampler):
    def wild(x, t):
        return 50 * torch.sin(37 * x)

    a, b, c = (diffusion.sample(wild, (16, 1, 4, 4), 10, sampler, generator=seeded(seed))
               for seed in [0, 0, 1])
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (16, 1, 4, 4) and a.abs().max() <= 1


def test_what_does_not_exist_is_refused():
    for schedule, prediction in [("square", "eps"), ("linear", "x")]:
        with pytest.raises(ValueError, match="unknown"):
            GaussianDiffusion(schedule, prediction)
    for wish in [dict(sampler="euler"), dict(eta=2), dict(steps=0), dict(steps=1001)]:
        with pytest.raises(ValueError):
            diffusion.sample(oracle, (1, 1), **wish)
