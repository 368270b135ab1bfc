"""
Train a diffusion model on unlabeled images, some of which must not be generated, and a few images
that are labeled so.

    python train.py --dataset mnist --prior 0.5                        # half of the digits are odd
    python train.py --dataset mnist --prior 0.5 --resume               # go on after an interruption
    python train.py --prior 1/11 --sensitive 4,7                       # other forbidden classes
    python train.py --prior 0.5 --algorithm unsupervised               # without the method
    python train.py --dataset cifar10 --prior 1/11 --recipe paper      # as in the paper
    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32    # clean it
    torchrun --standalone --nproc_per_node=8 train.py --recipe paper   # on 8 GPUs

It runs on a CPU or a GPU. Everything lands in --out_dir: ckpt.pt, log.csv and grids of samples.
The flags, and their defaults, are in recipe.py.
"""
import copy
import math
import os
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from data import DATA_DIR, DATASETS, has_class, load, on_device, parse_classes, split
from diffusion import GaussianDiffusion
from images import join_pngs, save_grid, to_float, to_uint8
from pretrained import load_pretrained
from pu_filter import read_scores
from pu_loss import limited, pu_loss, supervised_loss, unsupervised_loss
from recipe import (
    MAX_PASSES,
    averaging,
    batch_composition,
    fill_in,
    in_words,
    learning_rate,
    parse,
    steps_before_pu,
    train_flags,
)
from runtime import (
    SignalWatch,
    compiled,
    default_dtype,
    exit_status,
    find_device,
    first_rank_first,
    lock_folder,
    mean_over_ranks,
    open_log,
    random_state,
    ranks,
    save_whole,
    say,
    set_random_state,
)
from unet import UNet, UNetConfig, check, preset

# -----------------------------------------------------------------------------
# the flags, the device and its precision

parser = train_flags(__doc__)
with exit_status(parser):
    args, ckpt = parse(parser)
    device = find_device(args.device)
rank, world = ranks()
if rank > 0:    # the first speaks, and writes, for all
    sys.stdout = open(os.devnull, "w")
args.dtype = args.dtype or default_dtype(device)
if args.compile is None:
    args.compile = device.type == "cuda" and find_spec("triton") is not None    # not on Windows
if device.type == "cuda":
    torch.set_float32_matmul_precision("high")    # TF32
autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
torch.manual_seed(args.seed)

# -----------------------------------------------------------------------------
# the model to start from; then the flags that were not given can be filled in

model, known = None, {}
with exit_status(parser):
    if ckpt:
        model = UNet(UNetConfig(**ckpt["config"]))
    elif args.init_from:
        hub_dir = DATA_DIR if args.dataset == "folder" else args.data_dir
        with first_rank_first():
            model, diffusion = load_pretrained(args.init_from, hub_dir)
        known = dict(schedule=diffusion.schedule, prediction=diffusion.prediction)
        if "image_size" in DATASETS[args.dataset]:    # its images are resized to the model's size
            known |= dict(image_size=model.config.image_size, channels=model.config.image_channels)
    fill_in(args, known)

# -----------------------------------------------------------------------------
# the data, how many images a step takes, and how many steps

with exit_status(parser):
    if args.image_size and model is None:    # before images of that size are decoded
        check(preset(args.model, args.channels, args.image_size))
    with first_rank_first():
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
    u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled,
                    args.n_labeled, args.seed)
    n_unlabeled, n_labeled = len(u), len(s)
    loss_prior = args.loss_prior
    if args.algorithm == "oracle":
        u = u[~has_class(data.train_labels[u], parse_classes(args.dataset, args.sensitive))]
    if args.scores:
        args.keep = args.keep or 0.9 * (1 - loss_prior)
        u, s = read_scores(args.scores, data, u, s, args.keep)
        # P(sensitive | kept) by Bayes: S is kept as often as the sensitive images in U
        loss_prior *= (len(s) / n_labeled) / (len(u) / n_unlabeled)
    counts = [len(u), len(s)]
    if ckpt and ckpt["counts"] != counts:
        raise OSError(f"U and S had {ckpt['counts']} images when the run began, now {counts}: "
                      f"{args.scores or args.data_dir} has changed")
    images, u, s = on_device(data.train, u, s, device)    # u and s: numbers of images
    channels, size = images.shape[1:3]

    share_s = len(s) / (len(u) + len(s))    # for the supervised risk
    n_u, n_s = batch_composition(args.algorithm, args.batch_size, loss_prior, *counts)
    if args.scores and len(s) < n_s:
        raise ValueError(f"--scores {args.scores} leave {len(s)} images of S, fewer than the {n_s} "
                         f"a step takes: they would be learned by heart. Use --algorithm "
                         f"unsupervised, or a larger --keep")
    micro_batches = world * args.grad_accum    # a step, over all ranks
    for n in [n_u, n_s, args.batch_size]:
        if n % micro_batches:
            raise ValueError(f"{n} images cannot be divided evenly among {world} ranks with "
                             f"{args.grad_accum} micro-batches each: choose another --batch_size "
                             f"or --grad_accum")

    if args.max_steps is None:
        args.max_steps = math.ceil(args.epochs * n_unlabeled / args.batch_size)
    s_passes = n_s / max(1, len(s))    # over S, a step
    pu_start = ckpt["pu_start"] if ckpt else steps_before_pu(args, s_passes)
    if pu_start >= args.max_steps:
        raise ValueError(f"--pu_start {pu_start} leaves no step for the PU risk: --max_steps is "
                         f"{args.max_steps}")

# -----------------------------------------------------------------------------
# the network, its moving average, the loss, the optimizer

with exit_status(parser):
    if model is None:
        model = UNet(preset(args.model, channels, size))
    config = model.config
    if (config.image_channels, config.image_size) != (channels, size):
        raise ValueError(f"--init_from {args.init_from} is for {config.image_size}x"
                         f"{config.image_size} images of {config.image_channels} channels, "
                         f"{args.dataset} has {size}x{size} of {channels}")
    model = model.to(device, memory_format=torch.channels_last)
ema = copy.deepcopy(model).eval().requires_grad_(False)
net = model
if world > 1:
    net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
diffusion = GaussianDiffusion(1000, args.schedule, args.prediction).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=device.type in ("cuda", "cpu"))
scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

def per_image_loss(x_0, t, eps):
    """x_0, eps [B, C, H, W], t [B] -> [B]"""
    with autocast:
        return diffusion.per_image_loss(net, x_0, t, eps)

eager = per_image_loss    # also after compilation, for batches of another size
if args.compile:
    x = torch.zeros(args.batch_size // micro_batches, channels, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(len(x), dtype=torch.long, device=device)
    per_image_loss = compiled(eager, lambda fast: fast(x, t, x.clone()).sum().backward())
    optimizer.zero_grad()

# -----------------------------------------------------------------------------
# where the run stands

step, seconds = 0, 0.0
sums, n_summed = {}, 0    # of what the last steps found, for the log
typical = None    # mean l on U by timestep, once the network knows U
modules = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
if ckpt:
    for name, module in modules.items():
        module.load_state_dict(ckpt[name])
    step, n_summed, seconds = ckpt["step"], ckpt["n_summed"], ckpt["seconds"]
    if ckpt["typical"] is not None:
        typical = ckpt["typical"].to(device)
    sums = {name: value.to(device) for name, value in ckpt["sums"].items()}
    set_random_state(ckpt["rng"], device)
first_step, start = step, time.time()
ckpt_path, log_path, joined_path = (args.out_dir / name for name in
                                    ["ckpt.pt", "log.csv", "before_after.png"])

with exit_status(parser):
    if rank == 0:
        lock = lock_folder(args.out_dir)
        columns = ["step", "risk", "loss_u", "loss_s", "difference", "corrected", "lr",
                   "images_per_second", "seconds"]
        write_row = open_log(log_path, columns, step)
watch = SignalWatch()

def samples_path(step):
    return args.out_dir / f"samples_{step:06d}.png"

def check_finite():
    """So that no checkpoint is overwritten with a broken one."""
    if not sums["risk"].isfinite() or not all(p.isfinite().all() for p in ema.parameters()):
        there = ckpt_path if ckpt_path.exists() else "no checkpoint: none was written yet"
        sys.exit(f"train.py: error: the risk or the weights are no longer finite at step {step}: "
                 f"try a lower --lr (--resume goes on from {there})")

def save_checkpoint():
    plain_args = {name: str(value) if isinstance(value, Path) else value
                  for name, value in vars(args).items()}
    state = {name: module.state_dict() for name, module in modules.items()}
    state |= dict(config=asdict(config), args=plain_args, loss_prior=loss_prior, pu_start=pu_start,
                  typical=typical, counts=counts, step=step, sums=sums, n_summed=n_summed,
                  rng=random_state(device), seconds=seconds + time.time() - start)
    save_whole(state, ckpt_path, keep=args.out_dir / "ckpt_prev.pt")

def due(interval):
    """Is this step one of every `interval`, or the last of one part?"""
    return step % interval == 0 or step in (pu_start, args.max_steps)

def save_samples():
    """A grid at this step; at the end also beside the one from before the PU risk"""
    generator = torch.Generator(device).manual_seed(args.seed)    # training keeps its own numbers
    with autocast:
        samples = diffusion.sample(ema, (64, channels, size, size), generator=generator)
    save_grid(to_uint8(samples), samples_path(step))
    if step == args.max_steps and pu_start and samples_path(pu_start).exists():
        join_pngs([samples_path(pu_start), samples_path(step)], joined_path)

# -----------------------------------------------------------------------------
# one step

def draw_batch(sizes):
    """The batch of one step, which all ranks draw alike: images of U, then of S, as many as sizes
    says -> {name: [B, ...]}. Image i of S has the timestep and the noise of image i of U, which
    makes the difference of their losses less noisy."""
    index = torch.cat([numbers[torch.randint(max(1, len(numbers)), (n,), device=numbers.device)]
                       for numbers, n in zip([u, s], sizes)])
    batch = dict(index=index)
    if args.hflip:
        batch["mirrored"] = torch.rand(sum(sizes), 1, 1, 1, device=device) < 0.5
    # the first n of timesteps one golden ratio apart are spread evenly, for any n: for U and for S
    n_u, n_s = sizes
    spread = torch.rand(1, device=device) + 0.6180339887 * torch.arange(n_u, device=device)
    t = (diffusion.T * (spread % 1)).long()
    eps = torch.randn(n_u, channels, size, size, device=device)
    return batch | dict(t=torch.cat([t, t[:n_s]]), eps=torch.cat([eps, eps[:n_s]]))

def read_images(index):
    """Their numbers [B] -> x_0 [B, C, H, W] in [-1, 1], on the device"""
    return to_float(images[index].to(device)).contiguous(memory_format=torch.channels_last)

def typical_losses():
    """What images of U cost the network now -> [20], the mean l by twentieths of the timesteps."""
    generator = torch.Generator(device).manual_seed(args.seed)    # training keeps its own numbers
    t = torch.arange(200, device=device) * diffusion.T // 200
    total = torch.zeros(200, device=device)
    with torch.no_grad():
        for _ in range(20):    # 4,000 images
            chosen = torch.randint(len(u), (200,), generator=generator, device=device)
            x_0 = read_images(u[chosen.to(u.device)])
            eps = torch.randn(x_0.shape, generator=generator, device=device)
            total += eager(x_0, t, eps)
    return total.view(20, 10).mean(1) / 20

def accumulate_gradients(batch, sizes, negative=None):
    """Sends this rank's micro-batches of a batch forward and backward.

    negative: bool scalar, is E_U[l] - prior E_S[l] of the whole batch negative? None: see here,
        which works where each rank has one micro-batch
    -> {name: mean over the micro-batches} for the log
    """
    means = {}
    n_u = sizes[0]
    for first in range(rank, micro_batches, world):
        micro_batch = {name: torch.cat([x[first:n_u:micro_batches], x[n_u + first::micro_batches]])
                       for name, x in batch.items()}
        x_0, t = read_images(micro_batch["index"]), micro_batch["t"]
        if args.hflip:
            x_0 = torch.where(micro_batch["mirrored"], x_0.flip(3), x_0)
        eps = micro_batch["eps"].contiguous(memory_format=torch.channels_last)
        net.require_backward_grad_sync = first + world >= micro_batches    # for DDP: after the last
        loss = per_image_loss(x_0, t, eps)    # [B]
        capped = loss if typical is None else limited(loss, t, typical, args.limit)
        split_sizes = [n // micro_batches for n in sizes]
        loss_u, loss_s = capped.split(split_sizes)

        found = {}
        if len(loss_s) == 0:
            risk = unsupervised_loss(loss_u)
        elif args.algorithm == "supervised":
            risk = supervised_loss(loss_u, loss_s, share_s)
        else:
            found["difference"] = (loss_u.mean() - loss_prior * loss_s.mean()).detach()
            if negative is None:
                negative = mean_over_ranks(found["difference"]) < 0
            risk = pu_loss(loss_u, loss_s, loss_prior, args.correction, negative)
            found["corrected"] = negative * (args.correction != "none")
        scaler.scale(risk / args.grad_accum).backward()

        found["risk"] = risk
        for name, losses in zip(["loss_u", "loss_s"], loss.split(split_sizes)):
            if len(losses) > 0:
                found[name] = losses.mean()
        for name, value in found.items():
            means[name] = means.get(name, 0) + value.detach() / args.grad_accum
    return means

def take_step(batch, sizes):
    """Updates the weights and their moving average -> {name: mean over the batch} for the log"""
    # The sign of the difference is that of all micro-batches together. Take it for positive; where
    # it was not, drop the gradients and do the step again.
    negative = None
    if args.grad_accum > 1:
        negative = torch.zeros((), dtype=torch.bool, device=device)
    means = accumulate_gradients(batch, sizes, negative)
    if negative is not None and "difference" in means and args.correction != "none":
        if mean_over_ranks(means["difference"]) < 0:
            optimizer.zero_grad()
            means = accumulate_gradients(batch, sizes, ~negative)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        decay = averaging(args, step, pu_start)
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return means

# -----------------------------------------------------------------------------
# what is about to happen

# a network that knows nothing yet has no typical loss
use_limit = args.algorithm == "pu" and args.limit < math.inf and (pu_start > 0 or args.init_from)
say(f"{args.dataset}: U has {n_unlabeled:,} images, a fraction of {args.prior:.4g} sensitive "
    f"({args.sensitive or 'your estimate'}); S has {n_labeled:,}")
if args.scores or args.algorithm == "oracle":
    say(f"training is shown {len(u):,} images of U and {len(s):,} of S, by "
        f"{args.scores or 'labels that nobody has'}")
if pu_start:
    say(f"steps 1 to {pu_start} minimise the ordinary diffusion loss, E_U[l], on "
        f"{args.batch_size} images of U a step")
and_s = f" and {n_s} of S" if n_s else ""
say(f"steps {pu_start + 1} to {args.max_steps} minimise "
    f"{in_words(args.algorithm, loss_prior, share_s, args.correction)}, on {n_u} images of U"
    f"{and_s} a step")
if use_limit:
    say(f"in the PU risk, l is capped at {args.limit:g} times its mean on U at the same timestep")
passes = (args.max_steps - pu_start) * s_passes
if args.algorithm == "pu" and not args.recipe and passes > MAX_PASSES:
    say(f"S is small: its images come {passes:.0f} times each, and are learned by heart. Raise "
        f"--pu_start if the samples suffer, or sort U by pu_filter.py and use --scores")
if micro_batches > 1:
    say(f"each step in {micro_batches} micro-batches: {world} ranks, {args.grad_accum} each")
say(f"{args.model or args.init_from} U-Net of "
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
    f"{args.dtype}, {'not compiled' if per_image_loss is eager else 'compiled'}; "
    f"from step {step}; results in {args.out_dir}")
if ckpt and due(args.sample_interval) and rank == 0:
    with exit_status(parser, user_errors=False):
        save_samples()    # the run may have been stopped after its checkpoint, before its grid
if step >= args.max_steps:
    say(f"{ckpt_path} is at step {step}: nothing is left to do; --max_steps goes further")
    sys.exit()

# -----------------------------------------------------------------------------
# the loop

with exit_status(parser, user_errors=False):
    while step < args.max_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, pu_start)
        sizes = (n_u, n_s) if step >= pu_start else (args.batch_size, 0)
        if use_limit and step >= pu_start and typical is None:
            typical = typical_losses()
        for name, value in take_step(draw_batch(sizes), sizes).items():
            sums[name] = sums.get(name, 0) + value
        n_summed += 1
        step += 1

        log_is_due, save_is_due = due(args.log_interval), due(args.sample_interval)
        signal_number = watch.received(step, device)
        if log_is_due or save_is_due or signal_number:
            sums = {name: mean_over_ranks(value) for name, value in sums.items()}
            check_finite()
        if log_is_due:
            row = {name: float(value / n_summed) for name, value in sums.items()}
            elapsed = time.time() - start
            speed = (step - first_step) * args.batch_size / elapsed
            left = elapsed / (step - first_step) * (args.max_steps - step)
            of_s = f"l_S {row['loss_s']:.3f}  " if "loss_s" in row else ""
            say(f"step {step}/{args.max_steps}  risk {row['risk']:.3f}  l_U {row['loss_u']:.3f}  "
                f"{of_s}lr {group['lr']:.2e}  {speed:.0f} images/s  "
                f"{left // 60:.0f}:{left % 60:02.0f} left")
            if rank == 0:
                row |= dict(step=step, lr=group["lr"], images_per_second=round(speed, 1))
                write_row(row | dict(seconds=round(seconds + elapsed, 1)))
            sums, n_summed = {}, 0
        if (save_is_due or signal_number) and rank == 0:
            save_checkpoint()
        if signal_number:
            say(f"interrupted: step {step} is saved, --resume goes on from there")
            sys.exit(128 + signal_number)
        if save_is_due and rank == 0:
            save_samples()
        if step == pu_start:
            say(f"step {step}: U is learned. From here on the PU risk subtracts S; "
                f"{samples_path(step)} is what the network would have drawn")

    say(f"trained for {elapsed / 60:.1f} minutes; everything is in {args.out_dir}")
    if joined_path.exists():
        say(f"{joined_path}: what it would have drawn, and what it draws now")
say(f"to sample from it: python sample.py --ckpt {ckpt_path} --n 64 --grid samples.png")
if args.dataset != "folder":
    say(f"to judge it: python evaluate.py --ckpt {ckpt_path}")
if world > 1:
    dist.destroy_process_group()
