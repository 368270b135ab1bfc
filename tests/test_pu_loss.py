"""The PU risk: values and gradients against closed forms, and what the risk is for."""
import math

import pytest
import torch

from pu_loss import cap_loss, log1mexp, pu_loss, supervised_loss

# x, log(1 - exp(-x)) and its derivative 1 / (exp(x) - 1), computed with mpmath at 60 digits
LOG1MEXP = [
    (1e-12, -27.631021115929048, 999999999999.5),
    (1e-6, -13.815511057964232, 999999.50000008333),
    (0.1, -2.3521684610440908, 9.5083319447750496),
    (0.7, -0.68634100280838511, 0.9864338636344633),
    (1.0, -0.45867514538708189, 0.58197670686932642),
    (10.0, -4.540096037048921e-5, 4.5401991009687768e-5),
    (50.0, -1.9287498479639178e-22, 1.9287498479639178e-22),
    (1e6, 0.0, 0.0),
]


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_log1mexp_value_and_gradient(dtype, rtol):
    x, value, gradient = torch.tensor(LOG1MEXP, dtype=torch.float64).T
    x = x.to(dtype).requires_grad_()
    y = log1mexp(x)
    y.sum().backward()
    torch.testing.assert_close(y.double(), value, rtol=rtol, atol=1e-44)
    torch.testing.assert_close(x.grad.double(), gradient, rtol=10 * rtol, atol=1e-44)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("prior", [0.1, 0.5, 0.9])
def test_on_a_literal_mixture_the_pu_risk_is_the_risk_with_all_labels(prior, correction):
    """U = N + S: with the right prior, value and gradient equal those of the supervised risk."""
    torch.manual_seed(0)
    theta = torch.tensor([1.5, -0.3], dtype=torch.float64, requires_grad=True)
    n_s = round(120 * prior)
    loss_u = (torch.randn(120, 2, dtype=torch.float64) @ theta).square()
    loss_s, loss_n = loss_u.split([n_s, 120 - n_s])
    expected = (1 - prior) * loss_n.mean() + prior * -log1mexp(loss_s).mean()
    risk = pu_loss(loss_u, loss_s, prior, correction)
    torch.testing.assert_close(risk, expected, rtol=1e-14, atol=0)
    gradient, expected_gradient = (torch.autograd.grad(value, theta, retain_graph=True)[0]
                                   for value in (risk, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


# By hand, for two losses of U, two of S and prior p = 0.5, with g(l) = 1 / (exp(l) - 1):
# d sensitive / d l_s = -p g(l_s) / 2;   d normal / d l_u = 1/2;   d normal / d l_s = -p / 2 = -1/4.
@pytest.mark.parametrize("correction, side, sign, sensitive", [
    ("abs", "normal > 0", +1, 1), ("nn", "normal > 0", +1, 1), ("none", "normal > 0", +1, 1),
    ("abs", "normal < 0", -1, 1), ("nn", "normal < 0", -1, 0), ("none", "normal < 0", +1, 1),
])
def test_value_and_gradient_on_both_sides_of_the_kink(correction, side, sign, sensitive):
    values_u = [4.0, 2.0] if side == "normal > 0" else [0.5, 0.1]
    loss_u = torch.tensor(values_u, dtype=torch.float64, requires_grad=True)
    loss_s = torch.tensor([1.0, 3.0], dtype=torch.float64, requires_grad=True)
    normal = sum(values_u) / 2 - 0.5 * 2.0
    cost_s = 0.5 * -(math.log(1 - math.exp(-1)) + math.log(1 - math.exp(-3))) / 2
    risk = pu_loss(loss_u, loss_s, 0.5, correction)
    risk.backward()
    assert risk.item() == pytest.approx(sensitive * cost_s + sign * normal, rel=1e-12)
    assert loss_u.grad.tolist() == pytest.approx([sign * 0.5, sign * 0.5], rel=1e-12)
    expected = [-sensitive * 0.25 / math.expm1(loss) - sign * 0.25 for loss in (1.0, 3.0)]
    assert loss_s.grad.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
def test_risk_and_gradient_are_finite_for_any_losses(correction):
    loss = torch.cat([torch.tensor([0, 1e-45, 1e-38, math.log(2)]), torch.logspace(-12, 30, 50)])
    for scale_u, scale_s in [(1, 1), (1, 0), (0, 1), (1e-6, 1)]:
        loss_u, loss_s = (loss * scale_u).requires_grad_(), (loss * scale_s).requires_grad_()
        risk = pu_loss(loss_u, loss_s, 0.5, correction)
        risk.backward()
        assert risk.isfinite() and loss_u.grad.isfinite().all() and loss_s.grad.isfinite().all()
        assert (log1mexp(loss_s) <= 0).all()


def test_the_supervised_loss():
    loss_u, loss_s = torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0])
    expected = pytest.approx((3 + 5 + 7 - math.log(1 - math.exp(-1))) / 4)
    assert supervised_loss(loss_u, loss_s, 1 / 4).item() == expected
    # the number of images that are drawn from S does not matter
    assert supervised_loss(loss_u, loss_s.repeat(9), 1 / 4).item() == expected


@pytest.mark.parametrize("correction", ["abs", "nn", "none"])
@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_parts_of_a_batch_average_to_the_whole(correction, shift):
    """Differences of four parts have both signs. With the sign of the whole batch, the means of the
    parts' risks and gradients are those of the whole batch."""
    torch.manual_seed(0)
    theta = torch.tensor([1.5, -0.3], dtype=torch.float64, requires_grad=True)
    u, s = ((torch.randn(16, 2, dtype=torch.float64) @ theta).square() for _ in range(2))
    u = u + 0.5 * s.mean().detach() - u.mean().detach() + 0.1 * shift
    differences = [(a.mean() - 0.5 * b.mean()).item() for a, b in zip(u.split(4), s.split(4))]
    assert min(differences) < 0 < max(differences)
    negative = u.mean() - 0.5 * s.mean() < 0
    assert negative == (shift < 0)

    def mean_of_parts(negative):
        return torch.stack([pu_loss(a, b, 0.5, correction, negative)
                            for a, b in zip(u.split(4), s.split(4))]).mean()

    risk, parts = pu_loss(u, s, 0.5, correction), mean_of_parts(negative)
    torch.testing.assert_close(parts, risk)
    gradient, of_parts = (torch.autograd.grad(value, theta, retain_graph=True)[0]
                          for value in (risk, parts))
    torch.testing.assert_close(of_parts, gradient)
    if correction == "abs":    # with their own signs, they are larger
        assert mean_of_parts(None) > risk + 0.01


def test_the_limit_depends_on_the_timestep_and_stops_the_gradient():
    loss = torch.tensor([5.0, 30.0, 30.0, 100.0], requires_grad=True)
    t = torch.tensor([0, 499, 500, 999])
    capped = cap_loss(loss, t, typical=torch.tensor([10.0, 20.0]), limit=2, T=1000)
    assert capped.tolist() == [5, 20, 30, 40]
    capped.sum().backward()
    assert loss.grad.tolist() == [1, 0, 1, 0]


def test_bad_arguments_are_refused():
    for prior in (0.0, 1.0, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="prior must lie strictly between 0 and 1"):
            pu_loss(torch.ones(2), torch.ones(2), prior)
    with pytest.raises(ValueError, match="'max'.*abs, nn or none"):
        pu_loss(torch.ones(2), torch.ones(2), 0.5, "max")
