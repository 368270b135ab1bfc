"""The U-Net: shapes, sizes, what it computes at the start, and what it refuses."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from unet import (
    Attention,
    Downsample,
    GroupNorm,
    ResBlock,
    UNet,
    UNetConfig,
    Upsample,
    preset,
    timestep_embedding,
)

SMALL = UNetConfig(
    image_channels=2, image_size=8, channels=(8, 16), blocks=1, attention=(1,), groups=4)


def n_params(model):
    return sum(p.numel() for p in model.parameters())


def trained(config):
    """Returns a network with random weights in all layers, those that start at zero as well."""
    torch.manual_seed(0)
    model = UNet(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("config", [
    SMALL,
    preset("tiny", 1, 28),
    preset("tiny", 3, 32),
    preset("tiny", 1, 30),                              # padded to 32
    replace(SMALL, patch=2, blocks=2, channels=(8,), attention=()),
    replace(SMALL, channels=(8, 16, 24, 8), attention=(0, 2), head_dim=4, dropout=0.1),
])
def test_output_is_shaped_like_the_image(config):
    x = torch.randn(3, config.image_channels, config.image_size, config.image_size)
    assert trained(config)(x, torch.tensor([0, 500, 999])).shape == x.shape


def test_paper_preset_pads_mnist_to_32():
    config = preset("paper", 1, 28)
    assert (config.pad, config.image_size) == (2, 28)
    small = replace(config, channels=(8, 8, 8, 8), groups=4)
    assert trained(small)(torch.randn(2, 1, 28, 28), torch.tensor([1, 2])).shape == (2, 1, 28, 28)


def test_parameter_counts():
    with torch.device("meta"):
        assert n_params(UNet(preset("paper", 3, 32))) == 61_529_091    # "61.5 M", section 5
        assert 650_000 < n_params(UNet(preset("tiny", 1, 28))) < 2_000_000


def test_predicts_zero_at_first():
    model = UNet(SMALL)
    out = model(torch.randn(2, 2, 8, 8), torch.tensor([3, 7]))
    assert torch.equal(out, torch.zeros(2, 2, 8, 8))


def test_every_parameter_is_used():
    model = trained(SMALL)
    model(torch.randn(4, 2, 8, 8), torch.tensor([0, 10, 100, 999])).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_an_image_does_not_see_the_rest_of_its_batch():
    model, x, t = trained(SMALL), torch.randn(4, 2, 8, 8), torch.tensor([0, 10, 100, 999])
    torch.testing.assert_close(model(x, t)[1:2], model(x[1:2], t[1:2]), rtol=1e-4, atol=1e-4)


def test_depends_on_the_timestep():
    model, x = trained(SMALL), torch.randn(1, 2, 8, 8).expand(2, -1, -1, -1)
    out = model(x, torch.tensor([10, 11]))
    assert (out[0] - out[1]).abs().max() > 1e-4


@pytest.mark.parametrize("pad", [0, 2])
def test_patch_and_pad_keep_pixels_in_their_place(pad):
    """The network returns its image if all weights are zero but those of the centre of each
    kernel from channel i to channel i."""
    model = UNet(replace(SMALL, patch=2, pad=pad, channels=(8,), attention=(), groups=8))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        eye = torch.eye(8)[:, :, None, None]
        model.conv_in.weight[:, :, 1:2, 1:2] = eye
        model.up[0].blocks[-1].skip.weight[:, 8:] = eye    # the last skip: conv_in
        model.conv_out.weight[:, :, 1:2, 1:2] = eye
    model.norm_out, x = torch.nn.Identity(), torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(model(x, torch.tensor([0, 1])), F.silu(x))


def test_downsample_pads_right_and_below_and_upsample_repeats():
    down, up = Downsample(1), Upsample(1)
    with torch.no_grad():
        for layer, tap in [(down, 0), (up, 1)]:
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[0, 0, tap, tap] = 1
    x = torch.randn(1, 1, 6, 4)
    assert torch.equal(down(x), x[:, :, ::2, ::2])    # the first tap sees pixel (0, 0) first
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("c_out", [8, 12])
def test_res_block_formula(c_out):
    torch.manual_seed(0)
    block = ResBlock(8, c_out, 16, SMALL)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    h = block.conv1(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, eps=1e-6)))
    h = h + (emb @ block.time.weight.T + block.time.bias).view(2, c_out, 1, 1)
    h = block.conv2(F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, eps=1e-6)))
    torch.testing.assert_close(block(x, emb), h + (x if c_out == 8 else block.skip(x)))


def test_the_time_reaches_the_blocks_through_two_layers_and_a_silu():
    model, t, embeddings = trained(SMALL), torch.tensor([5, 700]), []
    model.mid1.register_forward_hook(lambda module, args, out: embeddings.append(args[1]))
    model(torch.randn(2, 2, 8, 8), t)
    first, second = model.time[0], model.time[2]
    expected = F.silu(second(F.silu(first(timestep_embedding(t, 8)))))
    torch.testing.assert_close(embeddings[0], expected)


def test_dropout_acts_in_training_only():
    model, x, t = trained(replace(SMALL, dropout=0.5)), torch.randn(1, 2, 8, 8), torch.tensor([5])
    assert torch.equal(model(x, t), model(x, t))
    model.train()
    assert not torch.equal(model(x, t), model(x, t))


@pytest.mark.parametrize("head_dim, heads, size", [
    (0, 1, (3, 5)), (4, 3, (3, 5)), (4, 3, (33, 32))])    # the last is for the fused kernel
def test_attention_is_softmax_of_scaled_products(head_dim, heads, size):
    torch.manual_seed(0)
    layer = Attention(12, replace(SMALL, head_dim=head_dim))
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 12, *size)
    h = layer.norm(x).flatten(2).transpose(1, 2)                        # [B, H*W, C]
    heads_out = []
    for q, k, v in zip(*[part.chunk(heads, dim=-1) for part in layer.qkv(h).chunk(3, dim=-1)]):
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        heads_out.append(weights @ v)
    expected = x + layer.out(torch.cat(heads_out, -1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_under_autocast_group_norm_rounds_nothing_but_its_result():
    torch.manual_seed(0)
    norm, x = GroupNorm(2, 4, eps=1e-6), (100 + torch.randn(2, 4, 5, 5)).bfloat16()
    torch.nn.init.normal_(norm.weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    expected = F.group_norm(x.float(), 2, norm.weight, norm.bias, eps=1e-6).bfloat16()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


def test_timestep_embedding_closed_form():
    emb = timestep_embedding(torch.tensor([0, 1, 999]), 8).double()
    t, f = torch.tensor([0.0, 1.0, 999.0]).double(), [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4]
    for i in range(4):
        torch.testing.assert_close(emb[:, i], (t * f[i]).sin(), rtol=0, atol=1e-4)
        torch.testing.assert_close(emb[:, 4 + i], (t * f[i]).cos(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, words", [
    (dict(image_size=9), "image size 9 cannot be halved evenly by 2 levels with patch 1: "
                         "it must be a multiple of 2"),
    (dict(image_size=10, patch=2), "multiple of 4"),
    (dict(blocks=0), "a level needs a block"),
    (dict(channels=(2, 16), groups=2), "an even number of channels, at least 4"),
    (dict(groups=3), "groups = 3 does not divide 8 channels"),
    (dict(attention=(2,)), "attention at level 2, but the levels are 0 to 1"),
    (dict(head_dim=5), "head_dim = 5 does not divide 16 channels"),
])
def test_configs_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        UNet(replace(SMALL, **change))


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="huge.*tiny, paper"):
        preset("huge", 1, 28)


def test_odd_image_sizes_are_refused_by_every_preset():
    for name in ["tiny", "paper"]:
        with pytest.raises(ValueError, match="image size 27"):
            UNet(preset(name, 1, 27))
