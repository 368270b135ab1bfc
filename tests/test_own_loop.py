"""The code in README.md that puts the PU risk into a loop of diffusers, with small networks."""
import re

import pytest
import torch
from conftest import ROOT

diffusers = pytest.importorskip("diffusers")

SECTION = (ROOT / "README.md").read_text().split("## The PU risk in your own loop\n")[1]
CODE = re.search("```python\n(.*?)```", SECTION.split("\n## ")[0], re.DOTALL)[1]


@pytest.fixture
def hub(monkeypatch):
    """A hub of small random networks, whatever their names."""
    torch.manual_seed(0)
    common = dict(layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4)
    models = [
        diffusers.UNet2DModel(**common, sample_size=8, down_block_types=["DownBlock2D"] * 2,
                              up_block_types=["UpBlock2D"] * 2),
        diffusers.UNet2DConditionModel(
            **common, sample_size=4, attention_head_dim=4, cross_attention_dim=6,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"]),
        diffusers.DDPMScheduler()]
    for model in models:
        monkeypatch.setattr(type(model), "from_pretrained", lambda *_, made=model, **__: made)


def by_hand(model, images, n_u, prior, **condition):
    """The PU risk of a batch, U first, with the random numbers that come next."""
    x_0 = images.double()
    t = torch.randint(1000, (len(x_0),))
    eps = torch.randn(images.shape).double()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - beta).cumprod(0)[t].view(-1, 1, 1, 1)
    x_t = kept.sqrt() * x_0 + (1 - kept).sqrt() * eps
    with torch.no_grad():
        prediction = model(x_t.float(), t, **condition).sample
    loss = (prediction - eps).square().flatten(1).sum(1)
    loss_u, loss_s = loss[:n_u], loss[n_u:]
    sensitive = -prior * torch.log(1 - torch.exp(-loss_s)).mean()
    return sensitive + (loss_u.mean() - prior * loss_s.mean()).abs()


def check_step(model, expected, step):
    """The risk of a step must be as expected, and reach every weight."""
    before = [p.detach().clone() for p in model.parameters()]
    risk = step()
    assert risk.isfinite() and risk.item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    n_moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert n_moved > 0.9 * len(before)


def test_a_step_on_images(hub):
    exec(CODE, own := {})
    batch_u, batch_s = torch.rand(6, 3, 8, 8) * 2 - 1, torch.rand(2, 3, 8, 8) * 2 - 1
    torch.manual_seed(1)
    expected = by_hand(own["model"], torch.cat([batch_u, batch_s]), 6, 0.3)
    torch.manual_seed(1)
    check_step(own["model"], expected, lambda: own["pu_step"](batch_u, batch_s, 0.3))


def test_a_step_on_latents_and_prompts(hub):
    exec(CODE, own := {})
    own["model"] = diffusers.UNet2DConditionModel.from_pretrained("")
    own["optimizer"] = torch.optim.AdamW(own["model"].parameters(), lr=1e-5)
    latents, text = torch.randn(4, 4, 4, 4), torch.randn(4, 5, 6)
    torch.manual_seed(2)
    expected = by_hand(own["model"], latents, 3, 0.2, encoder_hidden_states=text)
    torch.manual_seed(2)
    check_step(own["model"], expected, lambda: own["pu_step"](
        *latents.split([3, 1]), 0.2, encoder_hidden_states=text))
