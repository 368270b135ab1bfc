"""
The noise predictor: the U-Net of DDPM (Ho et al. 2020, arXiv:2006.11239), from x_t and t to the noise in x_t, or to
whatever else tells it, as the v of diffusion.py does.

    model = UNet(preset("tiny", image_channels=1, image_size=28))
    eps = model(x_t, t)                  # [B, C, H, W], [B] -> [B, C, H, W]

Residual blocks with GroupNorm and SiLU, self-attention at the levels that ask for it and always in the middle,
a strided convolution down, nearest-neighbour upsampling up, and a skip connection from every block on the way down.
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
    channels: tuple = (128, 128, 256, 512)   # one number a level; each level after the first halves the resolution
    blocks: int = 2                          # residual blocks a level on the way down (one more on the way up)
    attention: tuple = (2,)                  # the levels with self-attention, counted from 0
    head_dim: int = 0                        # channels of an attention head; 0: a single head, as in DDPM
    groups: int = 32                         # groups of GroupNorm; must divide every number in channels
    dropout: float = 0.0
    patch: int = 1                           # fold patch x patch pixels into channels: a cheaper network inside
    pad: int = 0                             # pixels of border added before the network and cut off after it
    # DDPM's choices, for which other models in the diffusers format have others
    norm_eps: float = 1e-6                   # added to the variance by GroupNorm
    downsample_padding: int = 0              # of strided convolutions; 0: right and below only
    flip_sin_to_cos: bool = False            # the time embedding: cosines first?
    freq_shift: int = 1                      # its lowest frequency is 10000^-((dim/2 - 1) / (dim/2 - freq_shift))


PRESETS = {
    # for 28x28 digits on a laptop: 14x14 inside
    "tiny": dict(channels=(32, 64), blocks=1, attention=(1,), groups=8, patch=2),
    # section 5 of the paper: 61.5 M parameters for RGB
    "paper": dict(channels=(128, 128, 256, 512), attention=(2,), groups=32),
}


def preset(name: str, image_channels: int, image_size: int) -> UNetConfig:
    """The config of a named network, padded to the next image size that its levels can halve (28 -> 32 for `paper`).
    Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(PRESETS)}")
    config = UNetConfig(image_channels, image_size, **PRESETS[name])
    multiple = config.patch * 2 ** (len(config.channels) - 1)
    if image_size % 2 == 0:
        config.pad = -image_size % multiple // 2
    return config


def timestep_embedding(t, dim, freq_shift=1, flip_sin_to_cos=False):
    """t [B] -> [B, dim]: sines, then cosines, of t at dim/2 frequencies from 1 down to 1/10000 (as in DDPM's code), or
    to a little above that at freq_shift 0; flip_sin_to_cos: cosines first."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2 - freq_shift))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()], dim=1)


def zero_init(module):
    """A layer that outputs zero at first, so that its residual block starts as the identity."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class GroupNorm(nn.GroupNorm):
    """Computes in float32 under autocast, and returns the type of x; a CPU is several times slower at it in bfloat16."""
    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, time_dim, config):
        super().__init__()
        self.norm1 = GroupNorm(config.groups, c_in, eps=config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, c_out)
        self.norm2 = GroupNorm(config.groups, c_out, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over the H*W positions, added to its input."""
    def __init__(self, c, config):
        super().__init__()
        self.heads = c // (config.head_dim or c)
        self.norm = GroupNorm(config.groups, c, eps=config.norm_eps)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = zero_init(nn.Linear(c, c))

    def forward(self, x):
        h = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(self.qkv(h), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads)
        if x.device.type == "cpu" and h.shape[1] <= 1024:    # the fused kernel saves memory, but is slower, in bfloat16 twice as slow
            h = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            h = F.scaled_dot_product_attention(q, k, v)                # [B, heads, H*W, head_dim]
        h = self.out(rearrange(h, "b heads n d -> b n (heads d)"))
        return x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """[B, C, H, W] -> [B, C, H/2, W/2]; without padding, a border right and below only, as DDPM's "SAME" convolution has."""
    def __init__(self, c, padding=0):
        super().__init__(c, c, 3, stride=2, padding=padding)

    def forward(self, x):
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """[B, C, H, W] -> [B, C, 2H, 2W]"""
    def __init__(self, c):
        super().__init__(c, c, 3, padding=1)

    def forward(self, x):
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """All that happens at one resolution: residual blocks, attention behind each if wanted, a change of resolution."""
    def __init__(self, c_ins, c_out, time_dim, attention, resample, config):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(c_in, c_out, time_dim, config) for c_in in c_ins)
        self.attentions = nn.ModuleList(Attention(c_out, config) if attention else nn.Identity() for _ in c_ins)
        self.resample = resample


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        """Raises ValueError where the config does not fit together: an image size that the levels cannot halve
        evenly, groups or heads that do not divide the channels, a level that does not exist."""
        super().__init__()
        check(config)
        self.config = config
        chans, last = config.channels, len(config.channels) - 1
        c_image = config.image_channels * config.patch ** 2
        time_dim = 4 * chans[0]

        self.time = nn.Sequential(nn.Linear(chans[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.conv_in = nn.Conv2d(c_image, chans[0], 3, padding=1)

        self.down, skips, c = nn.ModuleList(), [chans[0]], chans[0]    # skips: the channels of each skip connection
        for i, c_out in enumerate(chans):
            c_ins = [c] + [c_out] * (config.blocks - 1)
            resample = Downsample(c_out, config.downsample_padding) if i < last else None
            self.down.append(Level(c_ins, c_out, time_dim, i in config.attention, resample, config))
            skips += [c_out] * (config.blocks + (i < last))
            c = c_out

        self.mid1 = ResBlock(c, c, time_dim, config)
        self.mid_attention = Attention(c, config)
        self.mid2 = ResBlock(c, c, time_dim, config)

        self.up = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(chans))):
            c_ins = [c_in + skips.pop() for c_in in [c] + [c_out] * config.blocks]
            resample = Upsample(c_out) if i > 0 else None
            self.up.append(Level(c_ins, c_out, time_dim, i in config.attention, resample, config))
            c = c_out

        self.norm_out = GroupNorm(config.groups, c, eps=config.norm_eps)
        self.conv_out = zero_init(nn.Conv2d(c, c_image, 3, padding=1))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W], timesteps t [B] in [0, T) -> the predicted noise eps (or v) [B, C, H, W]."""
        pad, patch = self.config.pad, self.config.patch
        emb = timestep_embedding(t, self.config.channels[0], self.config.freq_shift, self.config.flip_sin_to_cos)
        emb = F.silu(self.time(emb))                                                # [B, 4 * channels[0]]
        x = F.pad(x_t, (pad, pad, pad, pad)) if pad else x_t
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch) if patch > 1 else x

        h = self.conv_in(x)
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
            if level.resample is not None:
                h = level.resample(h)

        eps = self.conv_out(F.silu(self.norm_out(h)))
        eps = rearrange(eps, "b (c p q) h w -> b c (h p) (w q)", p=patch, q=patch) if patch > 1 else eps
        return eps[:, :, pad:-pad, pad:-pad] if pad else eps


def check(config):
    """Raises ValueError with the first thing in the config that does not fit."""
    levels = len(config.channels)
    size = config.image_size + 2 * config.pad
    multiple = config.patch * 2 ** (levels - 1)
    if size % multiple:
        raise ValueError(f"image size {size} cannot be halved evenly by {levels} levels with patch {config.patch}: "
                         f"it must be a multiple of {multiple} (use fewer levels, or pad the images)")
    if config.blocks < 1 or config.channels[0] < 4 or config.channels[0] % 2:
        raise ValueError(f"blocks = {config.blocks}, channels[0] = {config.channels[0]}: a level needs a block, and the "
                         f"time embedding an even number of channels, at least 4")
    for c in config.channels:
        if c % config.groups:
            raise ValueError(f"groups = {config.groups} does not divide {c} channels")
    for level in config.attention:
        if not 0 <= level < levels:
            raise ValueError(f"attention at level {level}, but the levels are 0 to {levels - 1}")
    for c in {config.channels[i] for i in config.attention} | {config.channels[-1]}:
        if config.head_dim and c % config.head_dim:
            raise ValueError(f"head_dim = {config.head_dim} does not divide {c} channels of attention")
