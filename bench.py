"""
How fast is it? Images a second in training and in sampling, against what the machine could do.

    python bench.py                                                # the small network on digits
    python bench.py --model paper --image_size 32 --channels 3     # the paper's network, for a GPU
    python bench.py --against diffusers                            # beside another library

A training step is like that of train.py at prior 0.5, without cap and log. --against diffusers (pip
install diffusers) also times that library's U-Net of the same architecture, batch and precision in
the loop that its users write: a DataLoader, float conversion on the host, nothing compiled. It has
no network like `tiny`, which folds pixels into channels; there it gets one that is common on MNIST,
with channels (32, 64, 64) and images padded to 32x32. The last line printed is JSON.
"""
import argparse
import copy
import json
import statistics
import sys
import time
from itertools import chain, repeat

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from diffusion import GaussianDiffusion
from images import to_float
from pretrained import describe
from pu_loss import pu_loss
from recipe import batch_composition
from runtime import compiled, device_flags, exit_status, find_device, positive, ranks, set_precision
from unet import PRESETS, UNet, preset

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="python bench.py [--flag value ...]")
parser.add_argument("--model", default="tiny", choices=list(PRESETS), help="(default: tiny)")
parser.add_argument("--image_size", type=positive, default=28, help="pixels (default: 28)")
parser.add_argument("--channels", type=int, default=1, choices=[1, 3], help="(default: 1)")
parser.add_argument("--batch_size", type=positive, default=128, help="images (default: 128)")
parser.add_argument("--steps", type=positive, default=20, help="of the sampler (default: 20)")
parser.add_argument("--repeats", type=positive, default=9, help="rounds of timing (default: 9)")
device_flags(parser)
parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="(default: on cuda)")
parser.add_argument("--against", choices=["diffusers"], help="also time this library")
args = parser.parse_args()
with exit_status(parser):
    if args.batch_size < 2:
        raise ValueError("--batch_size must be at least 2: an image of U and one of S")
    if args.steps > 1000:
        raise ValueError(f"--steps {args.steps} is more than the 1000 timesteps of the diffusion")
    device = find_device(args.device)
    if ranks()[1] > 1:
        raise ValueError("bench.py is one process, not for torchrun")
    config = preset(args.model, args.channels, args.image_size)
    model = UNet(config).to(device, memory_format=torch.channels_last)
    if args.against:
        try:
            from diffusers import DPMSolverMultistepScheduler, UNet2DModel
            from diffusers.training_utils import EMAModel
        except ImportError:
            raise OSError("--against diffusers needs that library: pip install diffusers") from None

on_cuda = device.type == "cuda"
autocast = set_precision(args, device)
if on_cuda:
    torch.set_float32_matmul_precision("high")
batch_size, shape = args.batch_size, (args.channels, args.image_size, args.image_size)
torch.manual_seed(0)

# -----------------------------------------------------------------------------
# ours

prior = 0.5
n_u, n_s = batch_composition("pu", batch_size, prior, 50000, 2500)
images = torch.randint(256, (10000, *shape), dtype=torch.uint8).to(device)
diffusion = GaussianDiffusion().to(device)
ema = copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type in ("cuda", "cpu"))

def batch():
    """-> x_0, t and eps, where images of S share t and eps with images of U."""
    x_0 = to_float(images[torch.randint(len(images), (batch_size,), device=device)])
    t, eps = torch.randint(1000, (n_u,), device=device), torch.randn(n_u, *shape, device=device)
    eps = torch.cat([eps, eps[:n_s]]).contiguous(memory_format=torch.channels_last)
    return x_0.contiguous(memory_format=torch.channels_last), torch.cat([t, t[:n_s]]), eps

def loss_fn(x_0, t, eps):
    with autocast:
        loss = diffusion.per_image_loss(model, x_0, t, eps)
    return pu_loss(loss[:n_u], loss[n_u:], prior)

def forward_backward():
    loss_fn(*batch()).backward()

def update(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

def train():
    forward_backward()
    update(model, optimizer)
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.001)

def sample():
    with autocast:
        diffusion.sample(sampling_model, (batch_size, *shape), args.steps)

eager, sampling_model = loss_fn, ema
with exit_status(parser, user_errors=False):
    with FlopCounterMode(display=False) as counter:
        forward_backward()
    flops = counter.get_total_flops() / batch_size    # of an image
    if args.compile:
        x_0, t, eps = batch()
        loss_fn = compiled(eager, lambda fast: fast(x_0, t, eps).backward())
        with torch.no_grad(), autocast:
            sampling_model = compiled(ema, lambda fast: fast(x_0, t))
        args.compile = loss_fn is not eager and sampling_model is not ema
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()    # without what counting and compiling took
    train()    # makes the optimizer's state
    train()
    memory = torch.cuda.max_memory_allocated() if on_cuda else None

size = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
matrix = torch.randn(size, size, device=device, dtype=getattr(torch, args.dtype))
functions = {"matmul": lambda: matrix @ matrix, "train": train, "sample": sample}

# -----------------------------------------------------------------------------
# the other library's

if args.against:
    if config.patch == 1:
        rival_name, pad = "the same architecture", config.pad
        rival = UNet2DModel.from_config(describe(config))
    else:
        rival_name = "channels (32, 64, 64)"
        pad = max(32 - args.image_size, -args.image_size % 4) // 2
        rival = UNet2DModel(
            in_channels=args.channels, out_channels=args.channels, block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    rival = rival.to(device)
    rival_optimizer = torch.optim.AdamW(rival.parameters(), lr=1e-4)
    rival_ema = EMAModel(rival.parameters())
    scheduler = DPMSolverMultistepScheduler()
    loader = DataLoader(
        F.pad(images.cpu(), [pad] * 4), batch_size, shuffle=True, drop_last=True,
        collate_fn=lambda batch: to_float(torch.stack(batch)),
        num_workers=4 if on_cuda else 0, multiprocessing_context="fork" if on_cuda else None,
        pin_memory=on_cuda)
    batches = chain.from_iterable(repeat(loader))

    def rival_train():
        x_0 = next(batches).to(device)
        t, eps = torch.randint(1000, (batch_size,), device=device), torch.randn_like(x_0)
        with autocast:
            output = rival(diffusion.q_sample(x_0, t, eps), t).sample
        F.mse_loss(output.float(), eps).backward()
        update(rival, rival_optimizer)
        rival_ema.step(rival.parameters())

    @torch.no_grad()
    def rival_sample():
        x = torch.randn(batch_size, args.channels, *[args.image_size + 2 * pad] * 2, device=device)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            with autocast:
                eps = rival(x, t.to(device)).sample
            x = scheduler.step(eps.float(), t, x).prev_sample

    functions |= {"rival train": rival_train, "rival sample": rival_sample}

# -----------------------------------------------------------------------------
# time everything in turns, so that a noisy machine is noisy for all

def clock(function) -> float:
    """-> seconds a call, the mean of ten calls or of as many as take half a second."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or (calls < 10 and time.perf_counter() - start < 0.5):
        function()
        calls += 1
    if device.type != "cpu":
        torch.accelerator.synchronize()
    seconds = (time.perf_counter() - start) / calls
    optimizer.zero_grad()
    return seconds

timings = {name: [] for name in functions}
with exit_status(parser, user_errors=False):
    for function in functions.values():    # warm up
        clock(function)
    for i in range(args.repeats):
        for name, function in functions.items():
            timings[name].append(clock(function))
        print(f"\rround {i + 1} of {args.repeats}", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)

# -----------------------------------------------------------------------------
# the results

seconds = {name: statistics.median(values) for name, values in timings.items()}
peak = 2 * size ** 3 / seconds["matmul"]
train_speed, sample_speed = batch_size / seconds["train"], batch_size / seconds["sample"]
results = {
    "model": args.model, "shape": shape, "batch_size": batch_size, "device": str(device),
    "dtype": args.dtype, "compile": args.compile, "threads": torch.get_num_threads(),
    "train_images_per_second": train_speed, "step_seconds": seconds["train"],
    "sample_images_per_second": sample_speed, "steps": args.steps,
    "train_flops_per_image": flops, "matmul_flops": peak,
    "share_of_peak": flops * train_speed / peak, "memory_bytes": memory,
}
where = torch.cuda.get_device_name() if on_cuda else f"{torch.get_num_threads()} threads"
n_params = sum(p.numel() for p in model.parameters())
print(f"{args.model}, {n_params / 1e6:.2f} M parameters, batches of {batch_size} x {shape}")
print(f"{device} ({where}), {args.dtype}, {'compiled' if args.compile else 'not compiled'}; "
      f"medians of {args.repeats} rounds")
print(f"training   {train_speed:8.1f} images/s: {1000 * seconds['train']:.1f} ms a step")
print(f"sampling   {sample_speed:8.1f} images/s in {args.steps} steps")
print(f"peak       {results['share_of_peak']:8.1%} of a matrix multiplication's "
      f"{peak / 1e12:.3g} TFLOP/s; {flops / 1e9:.3g} GFLOP an image")
if on_cuda:
    print(f"memory     {memory / 2 ** 20:8.0f} MiB")
if args.against:
    results["rival"] = rival_name
    print(f"{args.against}, {rival_name}:")
    for name in ["train", "sample"]:
        speed = batch_size / seconds[f"rival {name}"]
        ratio = statistics.median(
            theirs / ours for ours, theirs in zip(timings[name], timings[f"rival {name}"]))
        results |= {f"rival_{name}_images_per_second": speed, f"{name}_ratio": ratio}
        print(f"{name:10} {speed:8.1f} images/s; ours is {ratio:.2f} times as fast")
print(json.dumps(results))
