"""
How fast is it? Images a second in training and in sampling, and how much of what the machine can do that is.

    python bench.py                                                      # the small network on digits
    python bench.py --model paper --image_size 32 --channels 3           # the paper's, for a GPU
    python bench.py --model paper --image_size 32 --channels 3 --against diffusers    # beside what one would use instead

Steps are those of train.py: half of the batch from U and half from S, augmentation left out. --against diffusers
(pip install diffusers) trains and samples with that library's U-Net of the same architecture, batch and precision in the
loop its users write: a DataLoader, float conversion on the host, no compilation. What its U-Net cannot be, as the small
network with its folded pixels, is set against one that is commonly trained on MNIST: channels (32, 64, 64), padded to
32x32. All contenders take turns, so that a noisy machine is noisy for all. The last line printed is JSON.
"""
import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from diffusion import GaussianDiffusion
from pretrained import describe
from pu_loss import pu_loss
from runtime import compiled, default_dtype, device_flags, find_device, positive, ranks
from unet import PRESETS, UNet, preset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 usage="python bench.py [--flag value ...]")
flag = parser.add_argument
flag("--model", default="tiny", choices=list(PRESETS), help="(default: tiny)")
flag("--image_size", type=positive, default=28, help="pixels (default: 28)")
flag("--channels", type=int, default=1, choices=[1, 3], help="grey or colour (default: 1)")
flag("--batch_size", type=positive, default=128, help="images a step, at least 2 (default: 128)")
flag("--steps", type=positive, default=20, help="network evaluations a sample, by dpm++ (default: 20)")
flag("--repeats", type=positive, default=9, help="turns that every contender gets, of which the median counts (default: 9)")
device_flags(parser)
flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on cuda only)")
flag("--against", choices=["diffusers"], help="also measure the loop that one would write with this library")
args = parser.parse_args()
if args.batch_size < 2:
    parser.error("--batch_size must be at least 2: an image of U and one of S")
if args.steps > 1000:
    parser.error(f"--steps {args.steps} is more than the 1000 timesteps of the diffusion")
try:
    device = find_device(args.device)
    model = UNet(preset(args.model, args.channels, args.image_size)).to(device, memory_format=torch.channels_last)
except ValueError as e:
    parser.error(e)
if ranks()[1] > 1:
    parser.error("bench.py is one process, not for torchrun")
if args.against:
    try:
        from diffusers import DPMSolverMultistepScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel
    except ImportError:
        sys.exit("bench.py: error: --against diffusers needs that library: pip install diffusers")
cuda = device.type == "cuda"
args.dtype = args.dtype or default_dtype(device)
args.compile = cuda if args.compile is None else args.compile
if cuda:
    torch.set_float32_matmul_precision("high")
dtype = getattr(torch, args.dtype)
autocast = torch.autocast(device.type, dtype, enabled=args.dtype != "float32")
torch.manual_seed(0)
B, shape = args.batch_size, (args.channels, args.image_size, args.image_size)

# -----------------------------------------------------------------------------
# ours

images = torch.randint(256, (10000, *shape), dtype=torch.uint8).to(device)
diffusion, ema = GaussianDiffusion().to(device), copy.deepcopy(model).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **({"fused": True} if device.type in ("cuda", "cpu") else {}))
scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

def loss_fn(x_0, t, eps):
    with autocast:
        loss_u, loss_s = diffusion.per_image_loss(model, x_0, t, eps).split([B - B // 2, B // 2])
    return pu_loss(loss_u, loss_s, 0.5)

def batch():
    x_0 = images[torch.randint(len(images), (B,), device=device)].float() / 127.5 - 1
    t, eps = torch.randint(diffusion.T, (B,), device=device), torch.randn(B, *shape, device=device)
    return *(x.contiguous(memory_format=torch.channels_last) for x in (x_0, eps)), t

def forward():
    x_0, eps, t = batch()
    return loss_fn(x_0, t, eps)

def forward_backward():
    scaler.scale(forward()).backward()

def train():
    forward_backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.001)

@torch.no_grad()
def sample():
    with autocast:
        diffusion.sample(fast_ema, (B, *shape), args.steps)

def train_flops() -> int:
    with FlopCounterMode(display=False) as counter:
        forward_backward()
    optimizer.zero_grad()
    return counter.get_total_flops()

flops, fast_ema = train_flops() / B, ema    # of an image, forward and backward
if args.compile:
    x_0, eps, t = batch()
    eager = loss_fn
    loss_fn = compiled(eager, lambda fast: fast(x_0, t, eps).backward())
    optimizer.zero_grad()
    args.compile = loss_fn is not eager
    print(f"compiled and eager loss: {loss_fn(x_0, t, eps).item():.6f} and {eager(x_0, t, eps).item():.6f}")
    with torch.no_grad(), autocast:
        fast_ema = compiled(ema, lambda fast: fast(x_0, t)) if args.compile else ema

if cuda:
    torch.cuda.reset_peak_memory_stats()
train()
train()
if cuda:
    memory = torch.cuda.max_memory_allocated()
else:
    from resource import RUSAGE_SELF, getrusage    # not on Windows
    memory = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

# -----------------------------------------------------------------------------
# the machine's best, and the rival

n = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

def matmul():
    a @ b

contenders = {"matmul": matmul, "forward": forward, "forward+backward": forward_backward, "train": train, "sample": sample}

if args.against:
    if model.config.patch == 1:
        padding, rival_name = model.config.pad, "the same architecture"
        rival = UNet2DModel.from_config(describe(replace(model.config, image_size=args.image_size + 2 * padding, pad=0)))
    else:
        padding, rival_name = max(0, 32 - args.image_size) // 2, "channels (32, 64, 64)"
        rival = UNet2DModel(sample_size=args.image_size + 2 * padding, in_channels=args.channels, out_channels=args.channels,
                            layers_per_block=2, block_out_channels=(32, 64, 64),
                            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
    rival = rival.to(device)
    rival_optimizer = torch.optim.AdamW(rival.parameters(), lr=1e-4)
    rival_ema = EMAModel(rival.parameters())
    rival_scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    scheduler = DPMSolverMultistepScheduler()
    padded = F.pad(images.cpu(), [padding] * 4)

    class Padded(Dataset):
        def __len__(self):
            return len(padded)

        def __getitem__(self, i):
            return padded[i].float() / 127.5 - 1

    def epochs():
        while True:
            yield from DataLoader(Padded(), B, shuffle=True, drop_last=True, num_workers=4 * cuda, pin_memory=cuda)

    batches = epochs()

    def rival_train():
        x_0 = next(batches).to(device)
        t, eps = torch.randint(1000, (B,), device=device), torch.randn_like(x_0)
        with autocast:
            loss = F.mse_loss(rival(diffusion.q_sample(x_0, t, eps), t).sample.float(), eps)
        rival_scaler.scale(loss).backward()
        rival_scaler.unscale_(rival_optimizer)
        torch.nn.utils.clip_grad_norm_(rival.parameters(), 1.0)
        rival_scaler.step(rival_optimizer)
        rival_scaler.update()
        rival_optimizer.zero_grad()
        rival_ema.step(rival.parameters())

    @torch.no_grad()
    def rival_sample():
        x = torch.randn(B, *padded.shape[1:], device=device)
        scheduler.set_timesteps(args.steps)
        for t in scheduler.timesteps:
            with autocast:
                eps = rival(x, t.to(device)).sample
            x = scheduler.step(eps.float(), t, x).prev_sample

    contenders |= {"rival train": rival_train, "rival sample": rival_sample}

# -----------------------------------------------------------------------------
# the race

def clock(function) -> float:
    """-> seconds of one call, of as many as fill half a second"""
    calls, start = 0, time.perf_counter()
    while calls == 0 or (device.type == "cpu" and time.perf_counter() - start < 0.5) or (device.type != "cpu" and calls < 10):
        function()
        calls += 1
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / calls

for function in contenders.values():    # warm up
    function()
    function()
    optimizer.zero_grad()
if device.type != "cpu":
    torch.accelerator.synchronize()
turns = {name: [] for name in contenders}
for i in range(args.repeats):
    for name, function in contenders.items():
        turns[name].append(clock(function))
        optimizer.zero_grad()
    print(f"\rturn {i + 1} of {args.repeats}", end="" if i + 1 < args.repeats else "\n", file=sys.stderr, flush=True)

# -----------------------------------------------------------------------------
# the figures

seconds = {name: statistics.median(values) for name, values in turns.items()}
peak = 2 * n ** 3 / seconds["matmul"]
speed = {name: B / value for name, value in seconds.items()}
figures = dict(model=args.model, shape=shape, batch_size=B, device=str(device), dtype=args.dtype, compile=args.compile, threads=torch.get_num_threads(),
               train_images_per_second=speed["train"], forward_seconds=seconds["forward"], backward_seconds=seconds["forward+backward"] - seconds["forward"],
               step_seconds=seconds["train"], sample_images_per_second=speed["sample"], steps=args.steps, train_flops_per_image=flops,
               matmul_flops=peak, share_of_peak=flops * speed["train"] / peak, memory_bytes=memory)
print(f"{args.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, batches of {B} x {shape}, on {device}"
      f"{f' ({torch.cuda.get_device_name()})' if cuda else f' with {torch.get_num_threads()} threads'}, {args.dtype}, "
      f"{'compiled' if args.compile else 'not compiled'}; medians of {args.repeats} turns")
print(f"training   {speed['train']:8.1f} images/s: {seconds['train'] * 1000:.1f} ms a step, of which forward {seconds['forward'] * 1000:.1f}, "
      f"backward {figures['backward_seconds'] * 1000:.1f}")
print(f"sampling   {speed['sample']:8.1f} images/s in {args.steps} steps")
print(f"peak       {figures['share_of_peak']:8.1%} of a matrix multiplication's {peak / 1e12:.3g} TFLOP/s; {flops / 1e9:.3g} GFLOP an image")
print(f"memory     {memory / 2 ** 20:8.0f} MiB{'' if cuda else ', of the whole process'}")
if args.against:
    ratios = {name: statistics.median(theirs / ours for ours, theirs in zip(turns[name], turns[f"rival {name}"])) for name in ["train", "sample"]}
    figures |= dict(rival=rival_name, rival_train_images_per_second=speed["rival train"], rival_sample_images_per_second=speed["rival sample"],
                    train_ratio=ratios["train"], sample_ratio=ratios["sample"])
    print(f"{args.against}  {speed['rival train']:8.1f} images/s in training, {speed['rival sample']:.1f} in sampling ({rival_name}); "
          f"ours is {ratios['train']:.2f} and {ratios['sample']:.2f} times as fast")
print(json.dumps(figures))
