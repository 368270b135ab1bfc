"""
Train a diffusion model on unlabeled images, some of which must not be generated, and a few that are
labeled sensitive.

    python train.py --dataset mnist --prior 0.5                        # half of the digits are odd
    python train.py --dataset mnist --prior 0.5 --resume               # go on after an interruption
    python train.py --prior 0.5 --algorithm unsupervised               # without the method
    python train.py --dataset cifar10 --prior 1/11 --recipe paper      # as in the paper
    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32    # clean it
    torchrun --standalone --nproc_per_node=8 train.py --recipe paper   # on 8 GPUs

It runs on a CPU or a GPU. Everything lands in --out_dir: ckpt.pt, log.csv and grids of samples.
The flags, and their defaults, are in recipe.py.
"""
import copy
import math
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

import files
import recipe
import runtime
from data import DATA_DIR, DATASETS, digest, has_class, load, on_device, parse_classes, split
from diffusion import GaussianDiffusion
from images import join_pngs, save_grid, to_float, to_uint8
from pretrained import load_checkpoint, load_pretrained
from pu_filter import read_scores
from pu_loss import limited, pu_loss, supervised_loss
from runtime import exit_status, mean_over_ranks, say
from unet import UNet, check, preset

# -----------------------------------------------------------------------------
# the flags, the device and its precision

parser = recipe.train_flags(__doc__)
with exit_status(parser):
    args, ckpt = recipe.parse(parser)
    device = runtime.find_device(args.device)
rank, world = runtime.ranks()
autocast = runtime.set_precision(args, device)
if device.type == "cuda":
    torch.set_float32_matmul_precision("high")    # TF32
torch.set_flush_denormal(True)    # the supervised risk has gradients below 1e-38, slow on a CPU
torch.manual_seed(args.seed)

# -----------------------------------------------------------------------------
# the model to start from; then the flags that were not given can be filled in

model, known = None, {}
with exit_status(parser):
    if ckpt:
        model, _ = load_checkpoint(ckpt)
        model.train().requires_grad_(True)
    elif args.init_from:
        hub_dir = DATA_DIR if args.dataset == "folder" else args.data_dir
        with runtime.first_rank_first():
            model, diffusion = load_pretrained(args.init_from, hub_dir)
        known = dict(schedule=diffusion.schedule, prediction=diffusion.prediction)
        if "image_size" in DATASETS[args.dataset]:    # its images are resized to the model's size
            known |= dict(image_size=model.config.image_size, channels=model.config.image_channels)
    recipe.fill_in(args, known)

# -----------------------------------------------------------------------------
# the data, how many images a step takes, and how many steps

with exit_status(parser):
    if args.image_size and model is None:    # before images of that size are decoded
        check(preset(args.model, args.channels, args.image_size))
    with runtime.first_rank_first():
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
    some = torch.cat([index[::1 + len(index) // 500] for index in (u, s)])    # a spot check
    fingerprint = [len(u), len(s), digest(data.train[some])[:8]]
    if ckpt and ckpt["fingerprint"] != fingerprint:
        raise OSError(f"the sizes and the checksum of U and S were {ckpt['fingerprint']}, now they "
                      f"are {fingerprint}: {args.scores or args.data_dir} has changed")
    # from here on, u and s number the rows of `images`, which need not be those of data.train
    images, u, s = on_device(data.train, u, s, device)
    shape = images.shape[1:]
    channels, image_size, _ = shape

    share_s = len(s) / (len(u) + len(s))    # for the supervised risk
    micro_batches = world * args.grad_accum    # a step, over all ranks
    n_u, n_s = recipe.batch_composition(args.algorithm, args.batch_size, loss_prior, len(u), len(s),
                                        micro_batches)
    if args.scores and len(s) < n_s:
        raise ValueError(f"--scores {args.scores} leave {len(s)} images of S, fewer than the {n_s} "
                         f"a step takes: they would be learned by heart. Use --algorithm "
                         f"unsupervised, or a larger --keep")
    args.max_steps = args.max_steps or math.ceil(args.epochs * n_unlabeled / args.batch_size)
    s_passes_per_step = n_s / max(1, len(s))
    pu_start = ckpt["pu_start"] if ckpt else recipe.steps_before_pu(args, s_passes_per_step)
    if pu_start >= args.max_steps:
        raise ValueError(f"--pu_start {pu_start} leaves no step for the PU risk: --max_steps is "
                         f"{args.max_steps}")

# -----------------------------------------------------------------------------
# the network, its moving average, the loss, the optimizer

with exit_status(parser):
    if model is None:
        model = UNet(preset(args.model, channels, image_size))
    config = model.config
    if (config.image_channels, config.image_size) != (channels, image_size):
        raise ValueError(f"--init_from {args.init_from} is for {config.image_size}x"
                         f"{config.image_size} images of {config.image_channels} channels, "
                         f"{args.dataset} has {image_size}x{image_size} of {channels}")
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

eager = per_image_loss    # stays uncompiled, for typical_losses
if args.compile:
    x = torch.zeros(args.batch_size // micro_batches, *shape, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(len(x), dtype=torch.long, device=device)
    # x twice would be one tensor for two arguments: torch.compile would compile again later
    per_image_loss = runtime.compiled(eager, lambda fast: fast(x, t, x.clone()).sum().backward(),
                                      graphs=micro_batches == 1)
    optimizer.zero_grad()

# -----------------------------------------------------------------------------
# where the run stands

step, seconds = 0, 0.0
sums, n_summed = {}, 0    # over the steps since the last row of the log
typical = None    # mean l on U by timestep, once the network knows U
modules = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
if ckpt:
    for name, module in modules.items():
        module.load_state_dict(ckpt[name])
    step, sums, n_summed, seconds = map(ckpt.get, ["step", "sums", "n_summed", "seconds"])
    sums = {name: value.to(device) for name, value in sums.items()}
    if ckpt["typical"] is not None:
        typical = ckpt["typical"].to(device)
    runtime.set_random_state(ckpt["rng"], device)
first_step, start = step, time.time()
ckpt_path, joined_path = args.out_dir / "ckpt.pt", args.out_dir / "before_after.png"

with exit_status(parser):
    if rank == 0:
        lock = files.lock_folder(args.out_dir)    # held until the process ends
        columns = "step risk loss_u loss_s difference corrected lr images_per_second seconds"
        write_row = files.open_log(args.out_dir / "log.csv", columns.split(), step)
watch = runtime.SignalWatch()

def samples_path(step):
    return args.out_dir / f"samples_{step:06d}.png"

def check_finite():
    """So that no checkpoint is overwritten with a broken one."""
    if not sums["risk"].isfinite() or not all(p.isfinite().all() for p in ema.parameters()):
        sys.exit(f"train.py: error: the risk or the weights are no longer finite at step {step}: "
                 f"try a lower --lr, with --resume if {ckpt_path} exists")

def save_checkpoint():
    state = {name: module.state_dict() for name, module in modules.items()}
    state |= dict(config=asdict(config), args=recipe.plain(args), fingerprint=fingerprint,
                  loss_prior=loss_prior, pu_start=pu_start, typical=typical, step=step, sums=sums,
                  n_summed=n_summed, rng=runtime.random_state(device),
                  seconds=seconds + time.time() - start)
    files.save_whole(state, ckpt_path, keep=args.out_dir / "ckpt_prev.pt")

def due(interval):
    """Is this step one of every `interval`, or the last of one part?"""
    return step % interval == 0 or step in (pu_start, args.max_steps)

def save_samples():
    """A grid at this step; at the end also beside the one from before the PU risk"""
    generator = torch.Generator(device).manual_seed(args.seed)    # not that of training
    with autocast:
        samples = diffusion.sample(ema, (64, *shape), generator=generator)
    save_grid(to_uint8(samples), samples_path(step))
    if step == args.max_steps and samples_path(pu_start).exists():
        join_pngs([samples_path(pu_start), samples_path(step)], joined_path)

# -----------------------------------------------------------------------------
# one step

def draw_batch(composition):
    """The batch of one step, which all ranks draw alike: n_u images of U, then n_s of S
    -> {name: [B, ...]}. Image i of S has the timestep and the noise of image i of U, which makes
    the difference of their losses less noisy."""
    n_u, n_s = composition
    of_u = u[torch.randint(len(u), (n_u,), device=u.device)]
    of_s = s[torch.randint(max(1, len(s)), (n_s,), device=s.device)]    # S may be empty, and n_s 0
    batch = dict(index=torch.cat([of_u, of_s]))
    if args.hflip:
        batch["mirrored"] = torch.rand(n_u + n_s, 1, 1, 1, device=device) < 0.5
    # numbers one golden ratio apart (modulo 1) are spread evenly, and so are the first n_s of them
    spread = torch.rand(1, device=device) + 0.6180339887 * torch.arange(n_u, device=device)
    t = (diffusion.T * (spread % 1)).long()
    eps = torch.randn(n_u, *shape, device=device)
    return batch | dict(t=torch.cat([t, t[:n_s]]), eps=torch.cat([eps, eps[:n_s]]))

def read_images(index):
    """Rows of `images` [B] -> x_0 [B, C, H, W] in [-1, 1], on the device"""
    return to_float(images[index].to(device)).contiguous(memory_format=torch.channels_last)

def typical_losses():
    """What images of U cost the network now -> [20], the mean l by twentieths of the timesteps."""
    generator = torch.Generator(device).manual_seed(args.seed)    # not that of training
    t = torch.arange(200, device=device) * diffusion.T // 200
    total = torch.zeros(200, device=device)
    with torch.no_grad():
        for _ in range(20):    # 4,000 images
            chosen = torch.randint(len(u), (200,), generator=generator, device=device)
            x_0 = read_images(u[chosen.to(u.device)])
            eps = torch.randn(x_0.shape, generator=generator, device=device)
            total += eager(x_0, t, eps)
    return total.view(20, 10).mean(1) / 20

def accumulate_gradients(batch, composition, negative=None):
    """Sends this rank's micro-batches of a batch forward and backward.

    negative: bool scalar, is E_U[l] - prior E_S[l] of the whole batch negative? None: computed
        here, which is right where each rank has one micro-batch
    -> {name: mean over the micro-batches} for the log
    """
    means = {}
    for number in range(rank, micro_batches, world):
        micro_batch = {}
        for name, x in batch.items():
            parts = x.split(composition)
            micro_batch[name] = torch.cat([part[number::micro_batches] for part in parts])
        x_0, t = read_images(micro_batch["index"]), micro_batch["t"]
        if args.hflip:
            x_0 = torch.where(micro_batch["mirrored"], x_0.flip(3), x_0)
        eps = micro_batch["eps"].contiguous(memory_format=torch.channels_last)
        net.require_backward_grad_sync = number + world >= micro_batches    # DDP: after the last
        loss = per_image_loss(x_0, t, eps)    # [B]
        capped = loss if typical is None else limited(loss, t, typical, args.limit)
        split_sizes = [n // micro_batches for n in composition]
        loss_u, loss_s = capped.split(split_sizes)

        names_and_losses = zip(["loss_u", "loss_s"], loss.split(split_sizes))
        found = {name: losses.mean() for name, losses in names_and_losses if len(losses) > 0}
        if len(loss_s) == 0:
            found["risk"] = loss_u.mean()
        elif args.algorithm == "supervised":
            found["risk"] = supervised_loss(loss_u, loss_s, share_s)
        else:
            found["difference"] = (loss_u.mean() - loss_prior * loss_s.mean()).detach()
            if negative is None:
                negative = mean_over_ranks(found["difference"]) < 0
            found["corrected"] = negative & (args.correction != "none")
            found["risk"] = pu_loss(loss_u, loss_s, loss_prior, args.correction, negative)
        scaler.scale(found["risk"] / args.grad_accum).backward()
        for name, value in found.items():
            means[name] = means.get(name, 0) + value.detach() / args.grad_accum
    return means

def take_step(batch, composition):
    """Updates the weights and their moving average -> {name: mean over the batch} for the log"""
    # With several micro-batches, the sign of the difference is known only after the last of them.
    # Assume that it is positive; where it was not, do the step again.
    negative = None if args.grad_accum == 1 else torch.tensor(False, device=device)
    means = accumulate_gradients(batch, composition, negative)
    sign_matters = negative is not None and "difference" in means and args.correction != "none"
    if sign_matters and mean_over_ranks(means["difference"]) < 0:
        optimizer.zero_grad()
        means = accumulate_gradients(batch, composition, ~negative)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        decay = recipe.averaging(args, step, pu_start)
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
for line in recipe.in_words(args, n_u, n_s, pu_start, loss_prior, share_s, s_passes_per_step):
    say(line)
if use_limit:
    say(f"in the PU risk, l is capped at {args.limit:g} times its mean on U at the same timestep")
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
        lr = optimizer.param_groups[0]["lr"] = recipe.learning_rate(args, step, pu_start)
        composition = (n_u, n_s) if step >= pu_start else (args.batch_size, 0)
        if use_limit and step == pu_start:
            typical = typical_losses()
        for name, value in take_step(draw_batch(composition), composition).items():
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
            left = round(elapsed / (step - first_step) * (args.max_steps - step))
            text_s = f"l_S {row['loss_s']:.3f}  " if "loss_s" in row else ""
            say(f"step {step}/{args.max_steps}  risk {row['risk']:.3f}  l_U {row['loss_u']:.3f}  "
                f"{text_s}lr {lr:.2e}  {speed:.0f} images/s  {left // 60}:{left % 60:02} left")
            if rank == 0:
                row |= dict(step=step, lr=lr, images_per_second=round(speed, 1))
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

    say(f"trained for {(seconds + elapsed) / 60:.1f} minutes; everything is in {args.out_dir}")
    if joined_path.exists():
        say(f"{joined_path}: what it would have drawn, and what it draws now")
say(f"to sample from it: python sample.py --ckpt {ckpt_path} --n 64 --grid samples.png")
say(f"to judge it: python evaluate.py --ckpt {ckpt_path}")
if world > 1:
    dist.destroy_process_group()
