"""
How fast is it? Images per second in training and in sampling, against what the machine could do.

    python bench.py                                                # the tiny network on digits
    python bench.py --model paper --image_size 32 --channels 3     # the paper's network, for a GPU
    python bench.py --against diffusers                            # beside another library

A training step is that of train.py at prior 0.5, without the cap and the log. --against diffusers
(pip install diffusers) also times that library's U-Net of the same architecture, not compiled.
"""
import argparse
import copy
import json
from statistics import median

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import runtime
from diffusion import GaussianDiffusion
from images import to_float
from pretrained import DiffusersUNet
from pu_loss import pu_loss
from unet import PRESETS, UNet, preset

parser = runtime.make_parser(__doc__, "python bench.py [--flag value ...]")
add = parser.add_argument
add("--model", default="tiny", choices=PRESETS, help="(default: tiny)")
add("--image_size", type=int, default=28, help="pixels (default: 28)")
add("--channels", type=int, default=1, choices=[1, 3], help="(default: 1)")
add("--batch_size", type=int, default=128, help="images (default: 128)")
add("--steps", type=int, default=20, help="of the sampler (default: 20)")
add("--repeats", type=int, default=7, help="rounds of timing (default: 7)")
add("--compile", action=argparse.BooleanOptionalAction, help="(default: on cuda only)")
add("--against", choices=["diffusers"], help="also time this library")
runtime.device_flags(parser)
args = parser.parse_args()
runtime.require_positive(args, "image_size", "batch_size", "steps", "repeats")
device = runtime.find_device(args.device)
runtime.set_precision(args, device)
diffusion, batch_size = GaussianDiffusion().to(device), args.batch_size
n_s = 3 * batch_size // 8    # images of S per step, as in train.py at prior 0.5
n_u = batch_size - n_s

def tasks(network, shape: tuple, compile: bool) -> tuple:
    """-> two functions: one trains on a batch of images of this shape, one samples a batch."""
    network = network.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), fused=device.type in ("cuda", "cpu"))
    images = torch.randint(256, (10000, *shape), dtype=torch.uint8).to(device)

    def draw():
        x_0 = to_float(images[torch.randint(len(images), (batch_size,), device=device)])
        t, eps = torch.randint(1000, (n_u,), device=device), torch.randn(n_u, *shape, device=device)
        return x_0, torch.cat([t, t[:n_s]]), torch.cat([eps, eps[:n_s]])    # S shares them with U

    def per_image_loss(x_0, t, eps):
        x_0, eps = (x.contiguous(memory_format=torch.channels_last) for x in (x_0, eps))
        with runtime.autocast(args, device):
            return diffusion.per_image_loss(network, x_0, t, eps)

    def train():
        loss_u, loss_s = loss_fn(*draw()).split([n_u, n_s])
        pu_loss(loss_u, loss_s, prior=0.5).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(network.parameters()), 0.001)

    def sample():
        with runtime.autocast(args, device):
            diffusion.sample(sampled, (batch_size, *shape), args.steps)

    loss_fn, sampled = per_image_loss, ema
    if compile:
        x_0, t, eps = draw()
        loss_fn = runtime.compiled(per_image_loss, lambda fast: fast(x_0, t, eps).sum().backward())
        with torch.no_grad(), runtime.autocast(args, device):
            sampled = runtime.compiled(ema, lambda fast: fast(x_0, t))
        args.compile = loss_fn is not per_image_loss and sampled is not ema    # did it work?
    return train, sample

# our network: the FLOPs of an image, and the memory that a training step takes
shape = (args.channels, args.image_size, args.image_size)
config = preset(args.model, *shape[:2])
model = UNet(config).to(device)
with FlopCounterMode(display=False) as counter:
    diffusion.per_image_loss(model, torch.zeros(batch_size, *shape, device=device)).sum().backward()
flops = counter.get_total_flops() / batch_size    # per image
train, sample = tasks(model, shape, args.compile)
if device.type == "cuda":
    torch.cuda.reset_peak_memory_stats()    # without what counting and compiling took
    train()    # makes the optimizer's state
    train()
memory = torch.cuda.max_memory_allocated() or None    # 0 elsewhere
size = 1024 if device.type == "cpu" else 8192
a = torch.randn(size, size, device=device, dtype=getattr(torch, args.dtype))
timed = {"matmul": lambda: a @ a, "train": train, "sample": sample}

# the other library's; it folds no pixels into channels, so it gets images that are folded already
if args.against:
    from diffusers import UNet2DModel

    channels = args.channels * config.patch ** 2
    side = (args.image_size + model.pad) // config.patch
    down = ["AttnDownBlock2D" if level in config.attention else "DownBlock2D"
            for level in range(len(config.channels))]
    rival = DiffusersUNet(UNet2DModel(
        in_channels=channels, out_channels=channels, block_out_channels=config.channels,
        layers_per_block=config.blocks, norm_num_groups=config.groups, norm_eps=1e-6,
        down_block_types=down, up_block_types=[x.replace("Down", "Up") for x in reversed(down)],
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1), {})
    timed["rival_train"], timed["rival_sample"] = tasks(rival, (channels, side, side), False)

# time all in turns, so that a noisy machine is noisy for all
threads = torch.get_num_threads()
calls = 1 if device.type == "cpu" else 10    # a GPU works on a call while the next is prepared
rounds = [{name: Timer("f()", globals={"f": f}, num_threads=threads).timeit(calls).mean
           for name, f in timed.items()} for _ in range(args.repeats)]
seconds = {name: median(row[name] for row in rounds) for name in timed}
speed, peak = batch_size / seconds["train"], 2 * size ** 3 / seconds["matmul"]
results = dict(
    model=args.model, shape=shape, batch_size=batch_size, device=str(device), dtype=args.dtype,
    compile=args.compile, threads=threads, steps=args.steps, train_images_per_second=speed,
    step_seconds=seconds["train"], sample_images_per_second=batch_size / seconds["sample"],
    train_flops_per_image=flops, matmul_flops=peak, share_of_peak=flops * speed / peak,
    memory_bytes=memory)
for name in ["train", "sample"] if args.against else []:
    results[f"{name}_ratio"] = median(row[f"rival_{name}"] / row[name] for row in rounds)
for name, value in results.items():
    runtime.say(f"{name:28}{f'{value:,.4g}' if isinstance(value, float) else value}")
runtime.say(json.dumps(results))
