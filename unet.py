"""
The network: a U-Net that sees a noisy image x_t and its timestep t, and predicts eps or v.

    model = UNet(preset("tiny", image_channels=1, image_size=28))
    output = model(x_t, t)    # [B, C, H, W], [B] -> [B, C, H, W]

It is the network of DDPM (Ho et al. 2020, arXiv:2006.11239): residual blocks with GroupNorm and
SiLU, self-attention at some levels and always in the middle, strided convolutions on the way down,
nearest-neighbour upsampling on the way up, and skip connections from the way down to the way up.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


@dataclass
class UNetConfig:
    image_channels: int = 3
    image_size: int = 32                     # height and width in pixels
    channels: tuple = (128, 128, 256, 512)   # one number per level; each new level halves H and W
    blocks: int = 2                          # residual blocks per level, one more on the way up
    attention: tuple = (2,)                  # the levels with self-attention, counted from 0
    groups: int = 32                         # of GroupNorm; must divide every number of channels
    patch: int = 1                           # folds patch x patch pixels into channels


PRESETS = {
    # 28x28 digits on a laptop: 14x14 inside
    "tiny": dict(channels=(32, 64), blocks=1, attention=(1,), groups=8, patch=2),
    # 32x32 photographs on a laptop: 16x16 inside, 2.8 M parameters
    "small": dict(channels=(32, 64, 128), blocks=1, attention=(1, 2), groups=8, patch=2),
    # section 5 of the paper: 61.5 M parameters for RGB
    "paper": dict(channels=(128, 128, 256, 512), attention=(2,), groups=32),
}


def preset(name: str, image_channels: int, image_size: int) -> UNetConfig:
    """The config of a named network. Raises KeyError for an unknown name."""
    return UNetConfig(image_channels, image_size, **PRESETS[name])


def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t [B] -> [B, dim]: the sines, then the cosines, of t at dim/2 frequencies from 1 to 1/10000
    (10000^(-i / (dim/2 - 1)), as in DDPM's code)."""
    half = dim // 2
    exponents = -math.log(10000) * torch.arange(half, device=t.device) / (half - 1)
    angles = t[:, None].float() * exponents.exp()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def zero_init(layer):
    """Makes a layer output zero at first, so that what it is added to starts unchanged."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Computes in float32 even under autocast: on CPUs, bfloat16 is several times slower here."""
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class ResBlock(nn.Module):
    """[B, c_in, H, W] -> [B, c_out, H, W]"""
    def __init__(self, c_in, c_out, time_dim, config):
        super().__init__()
        self.norm1 = GroupNorm(config.groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2 = GroupNorm(config.groups, c_out, eps=1e-6)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H*W positions, added to its input: [B, C, H, W] -> the same."""
    def __init__(self, c, config):
        super().__init__()
        self.norm = GroupNorm(config.groups, c, eps=1e-6)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = zero_init(nn.Linear(c, c))

    def forward(self, x):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        # one head, whose axis the fused kernels expect
        q, k, v = rearrange(self.qkv(h), "b n (three c) -> three b 1 n c", three=3)
        if x.device.type == "cpu" and h.shape[1] <= 1024:    # the fused kernel is slower
            h = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        h = self.out(h.squeeze(1))                      # [B, H*W, C]
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """[B, C, H, W] -> [B, C, H/2, W/2], with a border right and below only, as in DDPM."""
    def __init__(self, c):
        super().__init__(c, c, 3, stride=2)

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """[B, C, H, W] -> [B, C, 2H, 2W]"""
    def __init__(self, c):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The layers at one resolution, called by UNet.forward: a ResBlock for each of c_ins, attention
    after each if wanted, and what changes the resolution (None at the end of the way down)."""
    def __init__(self, c_ins, c_out, time_dim, attention, resample, config):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_in, c_out, time_dim, config) for c_in in c_ins)
        self.attentions = nn.ModuleList(
            Attention(c_out, config) if attention else nn.Identity() for _ in c_ins)
        self.resample = resample


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        """Raises ValueError where config.groups does not divide all of config.channels."""
        super().__init__()
        self.config = config
        levels = list(enumerate(config.channels))
        # images are padded until every level can halve them
        self.pad = -config.image_size % (config.patch * 2 ** (len(levels) - 1))
        c_image = config.image_channels * config.patch ** 2
        c = config.channels[0]
        time_dim = 4 * c

        self.time = nn.Sequential(nn.Linear(c, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.conv_in = nn.Conv2d(c_image, c, 3, padding=1)

        self.down = nn.ModuleList()
        skip_channels = [c]
        for i, c_out in levels:
            c_ins = [c] + [c_out] * (config.blocks - 1)
            last = i == len(levels) - 1
            resample = None if last else Downsample(c_out)
            self.down.append(Level(c_ins, c_out, time_dim, i in config.attention, resample, config))
            skip_channels += [c_out] * (config.blocks if last else config.blocks + 1)
            c = c_out

        self.mid1 = ResBlock(c, c, time_dim, config)
        self.mid_attention = Attention(c, config)
        self.mid2 = ResBlock(c, c, time_dim, config)

        self.up = nn.ModuleList()
        for i, c_out in reversed(levels):
            c_ins = [c_in + skip_channels.pop() for c_in in [c] + [c_out] * config.blocks]
            resample = Upsample(c_out) if i > 0 else nn.Identity()
            self.up.append(Level(c_ins, c_out, time_dim, i in config.attention, resample, config))
            c = c_out

        self.norm_out = GroupNorm(config.groups, c, eps=1e-6)
        self.conv_out = zero_init(nn.Conv2d(c, c_image, 3, padding=1))

    def embed(self, t: torch.Tensor) -> torch.Tensor:
        """t [B] -> [B, 4 * channels[0]]: what all blocks are told. Add a condition here."""
        return self.time(timestep_embedding(t, self.config.channels[0]))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, **condition) -> torch.Tensor:
        """x_t [B, C, H, W], t [B] in [0, T) -> eps or v, as the network was trained, like x_t.
        condition: more arguments of embed."""
        patch, first, last = self.config.patch, self.pad // 2, self.pad - self.pad // 2
        emb = F.silu(self.embed(t, **condition))
        h = F.pad(x_t, (first, last, first, last))
        h = rearrange(h, "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch)
        h = self.conv_in(h)                             # [B, channels[0], H', W']

        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions):
                h = attention(block(h, emb))
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)

        h = self.mid2(self.mid_attention(self.mid1(h, emb)), emb)

        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions):
                h = attention(block(torch.cat([h, skips.pop()], dim=1), emb))
            h = level.resample(h)

        h = self.conv_out(F.silu(self.norm_out(h)))
        h = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=patch, q=patch)
        return F.pad(h, (-first, -last, -first, -last))    # cuts the border off
