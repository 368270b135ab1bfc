"""
Images from a checkpoint of train.py: a grid to look at, or a folder of PNGs for any FID tool.

    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 64 --grid samples.png
    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 5000 --out_dir samples/
    python sample.py --ckpt out/cifar10-pu-0.09091-init_from/ckpt.pt --save_diffusers cleaned/

The same --seed, --n, --batch_size and --dtype give the same images. On several GPUs, start one
process each, with --device cuda:1, another --seed and another folder. --save_diffusers writes a
network that came from the diffusers library back into its format.
"""
import argparse
import sys
from pathlib import Path

import torch

import runtime
from diffusion import SAMPLERS
from images import grid, save_png, to_uint8
from pretrained import load_checkpoint, save_diffusers
from runtime import UserError, say


def sampling_flags(parser: argparse.ArgumentParser, n: int):
    """Adds the flags that draw reads. n: the default number of images."""
    add = parser.add_argument
    add("--n", type=int, default=n, help=f"images (default: {n})")
    add("--sampler", default="dpm++", choices=SAMPLERS, help="(default: dpm++)")
    add("--steps", type=int, help="network calls (default: dpm++ 20, ddim 50, ddpm 1000)")
    add("--seed", type=int, default=0, help="of all noise (default: 0)")
    add("--batch_size", type=int, default=250, help="(default: 250)")
    add("--compile", action="store_true", help="torch.compile, for many images")
    runtime.device_flags(parser)


def make_png_folder(folder: Path, flag: str):
    """Makes a folder for PNG files. Raises UserError, which names the flag, if it holds any."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.suffix.lower() == ".png" for path in folder.iterdir()):
        raise UserError(f"{flag} {folder} already holds PNGs, which would mix with these: name an "
                        f"empty folder")


@torch.no_grad()
def draw(args: argparse.Namespace, model, diffusion, device: torch.device,
         out_dir: Path = None) -> torch.Tensor:
    """Samples args.n images, which also go to out_dir as PNGs, if it is given.
    -> [N, C, H, W] uint8 on the CPU. Raises UserError for flags that are out of range."""
    runtime.require_positive(args, "n", "steps", "batch_size")
    args.steps = args.steps or {"dpm++": 20, "ddim": 50, "ddpm": diffusion.T}[args.sampler]
    if args.steps > diffusion.T:
        raise UserError(f"--steps {args.steps} is more than the {diffusion.T} of the diffusion")
    runtime.set_precision(args, device)
    model = model.to(device, memory_format=torch.channels_last)
    diffusion, config = diffusion.to(device), model.config
    shape = (config.image_channels, config.image_size, config.image_size)
    images = torch.zeros(args.n, *shape, dtype=torch.uint8)
    generator = torch.Generator(device).manual_seed(args.seed)
    with runtime.autocast(args, device):
        if args.compile:
            x = torch.zeros(min(args.n, args.batch_size), *shape, device=device)
            t = torch.zeros(len(x), dtype=torch.long, device=device)
            model = runtime.compiled(model, lambda fast: fast(x, t))
        for number, batch in enumerate(images.split(args.batch_size)):
            x = diffusion.sample(model, batch.shape, args.steps, args.sampler,
                                 generator=generator, progress=sys.stderr.isatty())
            batch.copy_(to_uint8(x))
            if out_dir:
                for i, image in enumerate(batch, start=number * args.batch_size):
                    save_png(image, out_dir / f"{i:05d}.png")
    return images


def main():
    parser = runtime.make_parser(__doc__, "python sample.py --ckpt CKPT [--flag value ...]")
    add = parser.add_argument
    add("--ckpt", type=runtime.user_path, required=True, help="the ckpt.pt of a training run")
    add("--grid", type=runtime.user_path,
        help="PNG of all images (default: samples.png, if nothing else is asked)")
    add("--out_dir", type=runtime.user_path, help="folder for 00000.png, 00001.png, ...")
    add("--save_diffusers", type=runtime.user_path, help="folder for the model itself")
    sampling_flags(parser, n=64)
    args = parser.parse_args()
    if not (args.grid or args.out_dir or args.save_diffusers):
        args.grid = Path("samples.png")
    model, diffusion = load_checkpoint(runtime.read_checkpoint(args.ckpt))
    if args.out_dir:
        make_png_folder(args.out_dir, "--out_dir")
    if args.grid:    # fails now, not after sampling
        runtime.check_png(args.grid)
    device = runtime.find_device(args.device)
    if args.save_diffusers:
        save_diffusers(model, args.save_diffusers)
        say(f"{args.save_diffusers}: the model, in the diffusers format")
    if args.grid or args.out_dir:
        images = draw(args, model, diffusion, device, args.out_dir)
        if args.grid:
            save_png(grid(images), args.grid)
        places = " and ".join(str(path) for path in (args.grid, args.out_dir) if path)
        say(f"{args.n} images, by {args.sampler}: {places}")


if __name__ == "__main__":
    main()
