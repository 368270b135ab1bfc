"""
Images from a checkpoint of train.py: a grid to look at, or a folder of PNGs for any FID tool.

    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 64 --grid samples.png
    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 5000 --out_dir samples/
    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 64 --sampler ddpm --steps 1000 --grid slow.png
    torchrun --standalone --nproc_per_node=8 -- sample.py --ckpt out/cifar10-pu-0.1/ckpt.pt --n 50000 --out_dir samples/
    python sample.py --ckpt out/cifar10-pu-0.1/ckpt.pt --save_diffusers cleaned/     # the model itself, for other libraries

The same seed, --n and --batch_size give the same images, on one GPU or on many.
"""
import argparse
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from diffusion import GaussianDiffusion
from images import empty_png_folder, save_grid, save_png, to_uint8
from pretrained import load_checkpoint, save_pretrained
from runtime import compiled, default_dtype, device_flags, find_device, positive, ranks, read_checkpoint, seed
from unet import UNet


def sampling_flags(parser, n: int):
    """Adds the flags that open_model and draw read, for n images unless told otherwise."""
    flag = parser.add_argument
    flag("--n", type=positive, default=n, help=f"number of images (default: {n})")
    flag("--steps", type=positive, default=20, help="network evaluations an image, 1 to 1000 (default: 20)")
    flag("--sampler", default="dpm++", choices=["ddpm", "ddim", "dpm++"], help="ddpm wants 1000 steps, ddim 50, dpm++ 20 (default: dpm++)")
    flag("--seed", type=seed, default=0, help="of all noise (default: 0)")
    flag("--batch_size", type=positive, default=250, help="images at a time (default: 250)")
    device_flags(parser)
    flag("--compile", action="store_true", help="torch.compile the network, which takes a minute or so: for many images or steps")


def open_model(ckpt: dict, args, device: torch.device) -> tuple:
    """-> the network of a checkpoint and its diffusion, on the device. Raises OSError where they are not ours, ValueError
    where args.steps are too many."""
    model, diffusion = load_checkpoint(ckpt)
    model, diffusion = model.to(device, memory_format=torch.channels_last), diffusion.to(device)
    if args.steps > diffusion.T:
        raise ValueError(f"--steps {args.steps} is more than the {diffusion.T} timesteps of the diffusion")
    return model, diffusion


def draw(args, model: UNet, diffusion: GaussianDiffusion, out_dir: Path = None) -> torch.Tensor:
    """-> args.n images [N, C, H, W] uint8, on the CPU; each also goes to a PNG in out_dir, if given. Ranks share the work,
    and only the first gets the images; the others get None."""
    device, (rank, world), config = diffusion.signal.device, ranks(), model.config
    dtype = args.dtype or default_dtype(device)
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    size = (config.image_channels, config.image_size, config.image_size)
    generator, batches = torch.Generator(device).manual_seed(args.seed), {}
    with torch.no_grad(), autocast:
        if args.compile:
            x, t = (torch.zeros(min(args.n, args.batch_size), *shape, device=device) for shape in [size, ()])
            model = compiled(model, lambda fast: fast(x, t.long()))
        for first in range(0, args.n, args.batch_size):
            n = min(args.batch_size, args.n - first)
            mine = first // args.batch_size % world == rank
            # another rank's batch is drawn by a network that costs nothing: this takes the same noise from the generator
            x = diffusion.sample(model if mine else lambda x, t: x, (n, *size), args.steps, args.sampler,
                                 generator=generator, progress=mine and sys.stderr.isatty())
            if not mine:
                continue
            batches[first] = to_uint8(x).cpu()
            for i, image in enumerate(batches[first] if out_dir else [], start=first):
                save_png(image, out_dir / f"{i:05d}.png")
            if sys.stderr.isatty():
                print(f"{first + n} of {args.n} images", file=sys.stderr)
    if world > 1:
        everyone = [None] * world if rank == 0 else None
        dist.gather_object(batches, everyone)
        batches = {first: batch for part in everyone or [] for first, batch in part.items()}
    return torch.cat([batches[first] for first in sorted(batches)]) if rank == 0 else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python sample.py --ckpt CKPT [--flag value ...]")
    flag = parser.add_argument
    flag("--ckpt", type=Path, required=True, help="the ckpt.pt that train.py wrote; its averaged weights are used")
    flag("--grid", type=Path, help="PNG to write all images to, side by side (default: samples.png, unless another result is asked for)")
    flag("--out_dir", type=Path, help="folder to write 00000.png, 00001.png, ... to")
    flag("--save_diffusers", type=Path, help="folder to write the model to, in the diffusers format; samples only if --grid or --out_dir is given too")
    sampling_flags(parser, n=64)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\nsample.py: interrupted"))
    if not (args.grid or args.out_dir or args.save_diffusers):
        args.grid = Path("samples.png")

    try:
        ckpt = read_checkpoint(args.ckpt)
        if args.out_dir:
            empty_png_folder(args.out_dir, "--out_dir")    # before the ranks meet, so that none has written yet
        device = find_device(args.device)
        model, diffusion = open_model(ckpt, args, device)
        rank, world = ranks()
        if args.grid and rank == 0:
            if args.grid.suffix.lower() != ".png":    # such as the checkpoint's own name
                parser.error(f"--grid {args.grid} must end in .png")
            new = not args.grid.exists()
            args.grid.parent.mkdir(parents=True, exist_ok=True)
            args.grid.open("ab").close()    # better to fail now than after the sampling
            if new:
                args.grid.unlink(missing_ok=True)
        if args.save_diffusers and rank == 0:
            if args.save_diffusers.is_dir() and any(args.save_diffusers.iterdir()):
                parser.error(f"--save_diffusers {args.save_diffusers} is not empty: name another folder")
            save_pretrained(model, diffusion, args.save_diffusers)
            print(f"the model, in the diffusers format: {args.save_diffusers}")
    except ValueError as e:
        parser.error(e)
    except OSError as e:
        sys.exit(f"sample.py: error: {e}")

    try:
        if args.grid or args.out_dir:
            images = draw(args, model, diffusion, args.out_dir)
            if rank == 0:
                if args.grid:
                    save_grid(images, args.grid)
                print(f"{args.n} images by {args.steps} steps of {args.sampler}: {', '.join(str(p) for p in [args.grid, args.out_dir] if p)}")
    except OSError as e:
        sys.exit(f"sample.py: error: {e}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
