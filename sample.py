"""
Images from a checkpoint of train.py: a grid to look at, or a folder of PNGs for any FID tool.

    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 64 --grid samples.png
    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 5000 --out_dir samples/
    python sample.py --ckpt out/cifar10-pu-0.09091-init_from/ckpt.pt --save_diffusers cleaned/
    torchrun --standalone --nproc_per_node=8 -- sample.py --ckpt out/big/ckpt.pt --out_dir samples/

The same --seed, --n and --batch_size give the same images, on one GPU or on many. --save_diffusers
writes the network itself, in the diffusers format.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import files
import runtime
from diffusion import SAMPLERS
from images import empty_png_folder, save_grid, save_png, to_uint8
from pretrained import load_checkpoint, save_pretrained


def sampling_flags(parser: argparse.ArgumentParser, n: int):
    """Adds the flags that draw reads. n: the default number of images."""
    parser.add_argument("--n", type=runtime.positive, default=n, help=f"images (default: {n})")
    parser.add_argument("--steps", type=runtime.positive, default=20,
                        help="network calls (default: 20)")
    parser.add_argument("--sampler", default="dpm++", choices=SAMPLERS,
                        help="ddpm needs 1000 steps, ddim 50, dpm++ 20 (default: dpm++)")
    parser.add_argument("--seed", type=runtime.int64, default=0, help="of all noise (default: 0)")
    parser.add_argument("--batch_size", type=runtime.positive, default=250, help="(default: 250)")
    parser.add_argument("--compile", action="store_true", help="torch.compile, for many images")
    runtime.device_flags(parser)


def open_model(ckpt: dict, device: torch.device) -> tuple:
    """-> the network of a checkpoint, with its averaged weights, and its diffusion, on the device.
    Raises OSError where the network is not the one in unet.py."""
    model, diffusion = load_checkpoint(ckpt)
    return model.to(device, memory_format=torch.channels_last), diffusion.to(device)


@torch.no_grad()
def draw(args, model, diffusion, out_dir: Path = None) -> torch.Tensor:
    """Samples args.n images, which also go to out_dir as PNGs, if it is given. Ranks take turns to
    sample a batch. -> all images [N, C, H, W] uint8 on the CPU, on every rank"""
    device, config = next(model.parameters()).device, model.config
    shape = (args.n, config.image_channels, config.image_size, config.image_size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    rank, world = runtime.ranks()
    with runtime.set_precision(args, device):
        if args.compile:
            x = torch.zeros_like(images[:args.batch_size], dtype=torch.float32)
            t = torch.zeros(len(x), dtype=torch.long, device=device)
            model = runtime.compiled(model, lambda fast: fast(x, t))
        for number, batch in enumerate(images.split(args.batch_size)):
            mine = number % world == rank
            # the batch of another rank costs nothing here, but takes its noise from the generator
            network = model if mine else lambda x, t: x
            x = diffusion.sample(network, batch.shape, args.steps, args.sampler,
                                 generator=generator, progress=mine and sys.stderr.isatty())
            if mine:
                batch.copy_(to_uint8(x))
            if mine and out_dir:
                for i, image in enumerate(batch.cpu(), start=number * args.batch_size):
                    save_png(image, out_dir / f"{i:05d}.png", sync=False)
    if world > 1:
        dist.all_reduce(images)    # each image is zero on all ranks but one
    return images.cpu()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python sample.py --ckpt CKPT [--flag value ...]")
    parser.add_argument("--ckpt", type=Path, required=True, help="the ckpt.pt of a training run")
    parser.add_argument("--grid", type=runtime.png,
                        help="PNG of all images (default: samples.png, if nothing else is asked)")
    parser.add_argument("--out_dir", type=Path, help="folder for 00000.png, 00001.png, ...")
    parser.add_argument("--save_diffusers", type=Path, help="folder for the model itself")
    sampling_flags(parser, n=64)
    args = parser.parse_args()
    with runtime.exit_status(parser):
        if not (args.grid or args.out_dir or args.save_diffusers):
            args.grid = Path("samples.png")
        ckpt = files.read_checkpoint(args.ckpt)
        if args.out_dir:
            empty_png_folder(args.out_dir, "--out_dir")    # before any rank writes
        device = runtime.find_device(args.device)
        rank, world = runtime.ranks()
        model, diffusion = open_model(ckpt, device)
        if args.save_diffusers and rank == 0:
            if any(args.save_diffusers.glob("*")):
                raise ValueError(f"--save_diffusers {args.save_diffusers} is not empty")
            save_pretrained(model, diffusion, args.save_diffusers)
            runtime.say(f"{args.save_diffusers}: the model, in the diffusers format")
        if args.grid:
            args.grid.parent.mkdir(parents=True, exist_ok=True)    # fails now, not after sampling
        if args.grid or args.out_dir:
            images = draw(args, model, diffusion, args.out_dir)
            if args.grid and rank == 0:
                save_grid(images, args.grid)
            places = " and ".join(str(path) for path in (args.grid, args.out_dir) if path)
            runtime.say(f"{args.n} images, by {args.sampler}: {places}")
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
