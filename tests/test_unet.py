"""The U-Net: shapes, what each layer computes, and what the network computes at the start."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import unet
from unet import UNet, UNetConfig, preset, timestep_embedding

SMALL = UNetConfig(
    image_channels=2, image_size=8, channels=(8, 16), blocks=1, attention=(1,), groups=4)


def random_network(config):
    """Returns a network with random weights in all layers, those that start at zero as well."""
    torch.manual_seed(0)
    model = UNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("config", [
    preset("tiny", 1, 28),
    preset("small", 3, 31),
    replace(preset("paper", 1, 27), channels=(8, 8, 8, 8), groups=4),
    replace(SMALL, image_size=5, patch=4, blocks=2, channels=(8,), attention=()),
    replace(SMALL, channels=(8, 16, 24, 8), attention=(0, 2)),
])
def test_output_is_shaped_like_the_image_of_any_size(config):
    x = torch.randn(3, config.image_channels, config.image_size, config.image_size)
    assert random_network(config)(x, torch.tensor([0, 500, 999])).shape == x.shape


@pytest.mark.parametrize("channels, patch, size", [(2, 2, 8), (2, 2, 31), (1, 4, 5), (1, 4, 7)])
def test_patches_and_border_keep_pixels_in_their_place(channels, patch, size):
    """The network returns its image if all weights are zero but those of the centre of each
    kernel from channel i to channel i."""
    c = channels * patch ** 2
    model = UNet(UNetConfig(channels, size, channels=(c,), attention=(), groups=c, patch=patch))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        eye = torch.eye(c)[:, :, None, None]
        model.conv_in.weight[:, :, 1:2, 1:2] = eye
        model.up[0].blocks[-1].skip.weight[:, c:] = eye    # the last skip: conv_in
        model.conv_out.weight[:, :, 1:2, 1:2] = eye
    model.norm_out, x = torch.nn.Identity(), torch.randn(2, channels, size, size)
    torch.testing.assert_close(model(x, torch.tensor([0, 1])), F.silu(x))


def test_parameter_counts():
    with torch.device("meta"):
        paper, small, tiny = (
            sum(p.numel() for p in UNet(config).parameters())
            for config in [preset("paper", 3, 32), preset("small", 3, 32), preset("tiny", 1, 28)])
    assert paper == 61_529_091    # "61.5 M", section 5
    assert 650_000 < tiny < 2_000_000 < small < 3_000_000


def test_predicts_zero_at_first():
    output = UNet(SMALL)(torch.randn(2, 2, 8, 8), torch.tensor([3, 7]))
    assert torch.equal(output, torch.zeros(2, 2, 8, 8))
    x = torch.randn(2, 8, 4, 4)    # and each block adds nothing
    assert torch.equal(unet.Attention(8, SMALL)(x), x)
    assert torch.equal(unet.ResBlock(8, 8, 16, SMALL)(x, torch.randn(2, 16)), x)


def test_every_parameter_is_used():
    model = random_network(SMALL)
    model(torch.randn(4, 2, 8, 8), torch.tensor([0, 10, 100, 999])).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_the_output_depends_on_the_timestep_but_not_on_the_rest_of_the_batch():
    model, t = random_network(SMALL), torch.tensor([0, 10, 11, 999])
    x = torch.randn(1, 2, 8, 8).repeat(4, 1, 1, 1)
    output = model(x, t)
    torch.testing.assert_close(output[1:2], model(x[1:2], t[1:2]), rtol=1e-4, atol=1e-4)
    assert (output[1] - output[2]).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(3, 5), (33, 32)])    # the second is for the fused kernel
def test_attention_is_softmax_of_scaled_products(size):
    torch.manual_seed(0)
    layer = unet.Attention(12, SMALL)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 12, *size)
    q, k, v = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)    # [B, H*W, C]
    h = (q @ k.transpose(1, 2) / 12 ** 0.5).softmax(-1) @ v
    expected = x + layer.out(h).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_timestep_embedding_closed_form():
    emb = timestep_embedding(torch.tensor([0, 1, 999]), 8).double()
    t, f = torch.tensor([0.0, 1.0, 999.0]).double(), [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4]
    for i in range(4):
        torch.testing.assert_close(emb[:, i], (t * f[i]).sin(), rtol=0, atol=1e-4)
        torch.testing.assert_close(emb[:, 4 + i], (t * f[i]).cos(), rtol=0, atol=1e-4)


def test_under_autocast_group_norm_rounds_nothing_but_its_result():
    torch.manual_seed(0)
    norm, x = unet.GroupNorm(2, 4, eps=1e-6), (100 + torch.randn(2, 4, 5, 5)).bfloat16()
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    expected = F.group_norm(x.float(), 2, norm.weight, norm.bias, eps=1e-6).bfloat16()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
