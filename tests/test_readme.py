"""The code in README.md, executed."""
import re

import torch
import torch.nn as nn
from conftest import MINI, ROOT

from diffusion import GaussianDiffusion
from pu_loss import log1mexp, pu_loss
from unet import UNet, UNetConfig

RISK, CLASSES = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_whole_idea_is_the_pu_risk():
    torch.manual_seed(0)
    names = dict(torch=torch, log1mexp=log1mexp, prior=0.3, diffusion=GaussianDiffusion(),
                 model=lambda x_t, t: x_t / 2, batch_u=torch.rand(5, 1, 2, 2),
                 batch_s=torch.rand(3, 1, 2, 2))
    exec(RISK, names)
    assert torch.equal(names["risk"], pu_loss(names["loss_u"], names["loss_s"], 0.3))


def test_a_condition_reaches_the_network():
    """Images of class 0 are black, and those of class 1 white: a network that sees the class draws
    each, after a short training."""
    torch.manual_seed(0)
    names = dict(UNet=UNet, nn=nn)
    exec(CLASSES, names)
    model = names["ClassUNet"](UNetConfig(1, 4, **dict(MINI, patch=1)), n_classes=2)
    diffusion = GaussianDiffusion("lognormal", "v")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        labels = torch.randint(2, (32,))
        x_0 = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
        loss = diffusion.per_image_loss(model, x_0, labels=labels)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    labels = torch.tensor([0, 1]).repeat(10)
    drawn = diffusion.sample(model.eval(), (20, 1, 4, 4), labels=labels).mean((1, 2, 3))
    assert (drawn[labels == 0] < -0.5).all() and (drawn[labels == 1] > 0.5).all()
