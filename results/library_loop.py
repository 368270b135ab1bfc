"""
The PU risk in a plain loop of diffusers, trained for so many minutes (pip install diffusers).

    python results/library_loop.py --minutes 23 --out_dir samples/
    python evaluate.py --images samples/ --dataset mnist

It is what a user of that library writes: its U-Net with channels (32, 64, 64) on digits padded to
32x32, its noise schedule and sampler, a DataLoader, half of each batch from S, the PU risk from the
first step, no compilation. For the same minutes of train.py, see results/README.md.
"""
import argparse
import sys
import time
from itertools import chain, repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load, split  # noqa: E402
from images import empty_png_folder, save_png, to_float, to_uint8  # noqa: E402
from pu_loss import pu_loss  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--minutes", type=float, required=True, help="of training")
parser.add_argument("--steps", type=int, default=1000, help="that take about so long, for the "
                    "learning rate's cosine (default: 1000)")
parser.add_argument("--n", type=int, default=5000, help="images to sample (default: 5000)")
parser.add_argument("--out_dir", type=Path, required=True, help="folder for PNGs")
args = parser.parse_args()
empty_png_folder(args.out_dir, "--out_dir")
torch.manual_seed(0)

data = load("mnist")
u, s, _ = split("mnist", data, prior=0.5)
batches_u, batches_s = (
    chain.from_iterable(repeat(DataLoader(
        F.pad(data.train[index], [2] * 4), 64, shuffle=True, drop_last=True,
        collate_fn=lambda batch: to_float(torch.stack(batch)))))
    for index in (u, s))

model = UNet2DModel(
    sample_size=32, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
ema = EMAModel(model.parameters(), decay=0.999, use_ema_warmup=True)
noise = DDPMScheduler()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)

start, step = time.time(), 0
while time.time() - start < 60 * args.minutes and step < args.steps:
    x_0 = torch.cat([next(batches_u), next(batches_s)])
    t, eps = torch.randint(1000, (len(x_0),)), torch.randn_like(x_0)
    loss = (model(noise.add_noise(x_0, eps, t), t).sample - eps).square().sum(dim=(1, 2, 3))
    risk = pu_loss(*loss.split(64), prior=0.5)
    optimizer.zero_grad()
    risk.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    ema.step(model.parameters())
    step += 1
    if step % 10 == 0:
        l_u, l_s = (some.mean().item() for some in loss.split(64))
        print(f"step {step}, {time.time() - start:.0f} s: risk {risk:.1f}, l_U {l_u:.1f}, "
              f"l_S {l_s:.1f}", flush=True)

ema.copy_to(model.parameters())
sampler = DPMSolverMultistepScheduler()
for first in range(0, args.n, 100):
    x = torch.randn(min(100, args.n - first), 1, 32, 32)
    sampler.set_timesteps(20)
    for t in sampler.timesteps:
        with torch.no_grad():
            x = sampler.step(model(x, t).sample, t, x).prev_sample
    for i, image in enumerate(to_uint8(x[..., 2:-2, 2:-2])):
        save_png(image, args.out_dir / f"{first + i:05d}.png", sync=False)
print(f"{args.n} images after {step} steps: {args.out_dir}")
