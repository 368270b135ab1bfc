"""
Images from a checkpoint of train.py: a grid to look at, or a folder of PNGs for any FID tool.

    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 64 --grid samples.png
    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 5000 --out_dir samples/
    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 64 --sampler ddpm --steps 1000 --grid slow.png
    python sample.py --ckpt out/cifar10-pu-0.1/ckpt.pt --save_diffusers cleaned/     # the model itself, for other libraries

The same seed, --n and --batch_size give the same images.
"""
import argparse
import signal
import sys
from pathlib import Path

import torch

from data import save_grid, save_png, to_uint8
from diffusion import GaussianDiffusion
from pretrained import save_pretrained
from unet import UNet, find_device, read_checkpoint

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 usage="python sample.py --ckpt CKPT [--flag value ...]")
flag = parser.add_argument
flag("--ckpt", type=Path, required=True, help="the ckpt.pt that train.py wrote; its averaged weights are used")
flag("--n", type=int, default=64, help="number of images (default: 64)")
flag("--steps", type=int, default=20, help="network evaluations an image, 1 to 1000 (default: 20)")
flag("--sampler", default="dpm++", choices=["ddpm", "ddim", "dpm++"], help="ddpm wants 1000 steps, ddim 50, dpm++ 20 (default: dpm++)")
flag("--seed", type=int, default=0, help="of all noise (default: 0)")
flag("--batch_size", type=int, default=250, help="images at a time (default: 250)")
flag("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
flag("--grid", type=Path, help="PNG to write all images to, side by side (default: samples.png, unless another result is asked for)")
flag("--out_dir", type=Path, help="folder to write 00000.png, 00001.png, ... to")
flag("--save_diffusers", type=Path, help="folder to write the model to, in the diffusers format; samples only if --grid or --out_dir is given too")
args = parser.parse_args()

for name in ["n", "steps", "batch_size"]:
    if getattr(args, name) < 1:
        parser.error(f"--{name} must be a positive number")
if abs(args.seed) >= 2 ** 63:
    parser.error("--seed must fit in 64 bits")
if not (args.grid or args.out_dir or args.save_diffusers):
    args.grid = Path("samples.png")

try:
    device = find_device(args.device)
    ckpt = read_checkpoint(args.ckpt)
    model = UNet.from_checkpoint(ckpt).to(device, memory_format=torch.channels_last)
    diffusion = GaussianDiffusion(1000, ckpt["args"]["schedule"]).to(device)
    if args.steps > diffusion.T:
        parser.error(f"--steps {args.steps} is more than the {diffusion.T} timesteps of the diffusion")
    if args.out_dir:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        if any(args.out_dir.glob("*.png")):
            parser.error(f"--out_dir {args.out_dir} already holds PNGs, which would mix with these: name an empty folder")
    if args.grid:
        if args.grid.suffix.lower() != ".png":    # such as the checkpoint's own name
            parser.error(f"--grid {args.grid} must end in .png")
        new = not args.grid.exists()
        args.grid.parent.mkdir(parents=True, exist_ok=True)
        args.grid.open("ab").close()    # better to fail now than after the sampling
        if new:
            args.grid.unlink()
    if args.save_diffusers:
        if args.save_diffusers.is_dir() and any(args.save_diffusers.iterdir()):
            parser.error(f"--save_diffusers {args.save_diffusers} is not empty: name another folder")
        save_pretrained(model, diffusion.schedule, args.save_diffusers)
        print(f"the model, in the diffusers format: {args.save_diffusers}")
        if not (args.grid or args.out_dir):
            sys.exit()
except ValueError as e:
    parser.error(e)
except OSError as e:
    sys.exit(f"sample.py: error: {e}")

signal.signal(signal.SIGINT, lambda *_: sys.exit("\nsample.py: interrupted"))
generator = torch.Generator(device).manual_seed(args.seed)
batches = []
for first in range(0, args.n, args.batch_size):
    n = min(args.batch_size, args.n - first)
    shape = (n, model.config.image_channels, model.config.image_size, model.config.image_size)
    x = diffusion.sample(model, shape, args.steps, args.sampler, generator=generator, progress=sys.stderr.isatty())
    batches.append(to_uint8(x).cpu())
    if args.out_dir:
        for i, image in enumerate(batches[-1], start=first):
            save_png(image, args.out_dir / f"{i:05d}.png")
    if sys.stderr.isatty():
        print(f"{first + n} of {args.n} images", file=sys.stderr)

if args.grid:
    save_grid(torch.cat(batches), args.grid)
print(f"{args.n} images by {args.steps} steps of {args.sampler}: {', '.join(str(p) for p in [args.grid, args.out_dir] if p)}")
