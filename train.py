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
"""
import argparse
import copy
import csv
import math
import os
import signal
import sys
import time
from collections import ChainMap
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from data import DATA_DIR, DATASETS, FITS, data_flags, has_class, load, parse_classes, split
from diffusion import GaussianDiffusion
from images import join_pngs, save_grid, to_float, to_uint8
from pretrained import load_pretrained
from pu_filter import read_scores
from pu_loss import limited, pu_loss, sensitive_per_batch, supervised_loss, unsupervised_loss
from runtime import (
    compiled,
    count,
    decay,
    default_dtype,
    device_flags,
    exit_status,
    find_device,
    first_rank_first,
    fraction,
    positive,
    positive_float,
    positive_or_inf,
    ranks,
    read_checkpoint,
    step_or_share,
    write_whole,
)
from unet import PRESETS, UNet, UNetConfig, check, preset

# -----------------------------------------------------------------------------
# the command line

# what flags that are not given stand for: by network, ...
DEFAULTS = {
    "tiny": dict(schedule="lognormal", prediction="v", lr=2e-3, warmup_steps=200, max_steps=4000,
                 pu_start=0.5, limit=3.0),
    "paper": dict(schedule="linear", prediction="eps", lr=1e-4, warmup_steps=500, max_steps=20000,
                  pu_start=0.5, limit=3.0),    # and for networks of your own
}
# ... and where the recipe, or a model to start from, says more (section 5 of the paper)
PAPER = dict(model="paper", schedule="linear", prediction="eps", lr=1e-4, warmup_steps=500,
             max_steps=None, epochs=100, pu_start=0, limit=math.inf)
FINE_TUNING = dict(model=None, lr=1e-4, warmup_steps=500, max_steps=None, epochs=20, pu_start=0)

parser = argparse.ArgumentParser(description=__doc__, usage="python train.py [--flag value ...]",
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
data_flags(parser)
parser.add_argument("--hflip", action=argparse.BooleanOptionalAction,
                    help="mirror half of the images (default: photographs only)")

group = parser.add_argument_group("what is minimised")
group.add_argument("--algorithm", default="pu",
                   choices=["pu", "supervised", "unsupervised", "oracle"],
                   help="the PU risk, or a baseline (default: pu)")
group.add_argument("--recipe", choices=["paper"],
                   help="paper: network, schedule, optimizer and epochs of the paper")
group.add_argument("--pu_start", type=step_or_share,
                   help="step, or share of the steps, where the PU risk begins (default: 1/2, or 0 "
                        "with --recipe and --init_from)")
group.add_argument("--correction", default="abs", choices=["abs", "nn", "none"],
                   help="of a negative estimate of the normal loss (default: abs)")
group.add_argument("--limit", type=positive_or_inf,
                   help="l counts up to this multiple of what is typical of U (default: 3)")
group.add_argument("--loss_prior", type=fraction, help="a wrong prior, to study (default: --prior)")
group.add_argument("--scores", type=Path, help="of pu_filter.py: leave out what scores high")
group.add_argument("--keep", type=fraction,
                   help="with --scores: the fraction of U to keep (default: 0.9 (1 - prior))")

group = parser.add_argument_group("model")
group.add_argument("--model", choices=list(PRESETS), help="network (default: the data set's)")
group.add_argument("--init_from", help="ckpt.pt, a diffusers folder, or a name on the hub")
group.add_argument("--schedule", choices=["linear", "cosine", "lognormal"],
                   help="noise schedule (default: the model's)")
group.add_argument("--prediction", choices=["eps", "v"],
                   help="what the network predicts (default: the model's)")

group = parser.add_argument_group("optimization")
group.add_argument("--batch_size", type=positive, help="images a step, of U and S together")
group.add_argument("--grad_accum", type=positive, default=1,
                   help="micro-batches a step, to save memory (default: 1)")
group.add_argument("--max_steps", type=positive, help="optimizer steps (default: the model's)")
group.add_argument("--lr", type=positive_float, help="peak learning rate (default: the model's)")
group.add_argument("--warmup_steps", type=count, help="steps of linear warm-up")
group.add_argument("--grad_clip", type=positive_or_inf, default=1.0,
                   help="largest gradient norm (default: 1)")
group.add_argument("--ema_decay", type=decay, default=0.999,
                   help="of the average of the weights, which is sampled from (default: 0.999)")

group = parser.add_argument_group("running")
device_flags(group)
group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile the loss (default: on cuda only)")
group.add_argument("--log_interval", type=positive, default=100, help="steps (default: 100)")
group.add_argument("--sample_interval", type=positive, default=500,
                   help="steps between two sample grids and checkpoints (default: 500)")
group.add_argument("--out_dir", type=Path, help="(default: out/DATASET-ALGORITHM-PRIOR)")
group.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out_dir")

MAY_CHANGE = {"lr", "device", "compile", "grad_accum", "log_interval", "sample_interval",
              "max_steps", "data_dir", "out_dir", "resume"}

args = parser.parse_args()
if args.out_dir is None:
    kind = [name for name in ["recipe", "init_from", "scores"] if getattr(args, name)]
    words = [args.dataset, args.algorithm, f"{args.prior:.4g}", *kind]
    args.out_dir = Path("out", "-".join(words))
ckpt_path = args.out_dir / "ckpt.pt"
ckpt = None
with exit_status(parser):
    if args.resume:
        ckpt = read_checkpoint(ckpt_path)
        parser.set_defaults(**ckpt["args"])    # the run's own flags, unless given again
        args = parser.parse_args(namespace=argparse.Namespace(out_dir=args.out_dir))
        for name, value in ckpt["args"].items():
            if name not in MAY_CHANGE and str(getattr(args, name)) != str(value):
                raise ValueError(f"--{name} cannot change on --resume: the run has {value}")
    elif ckpt_path.exists():
        raise ValueError(f"--out_dir {args.out_dir} already holds a run: add --resume to go on "
                         f"with it, or name another folder")
    if args.keep and not args.scores:
        raise ValueError("--keep needs --scores")
    if args.init_from and args.model:
        raise ValueError(f"--model {args.model} cannot go with --init_from, which brings its own")
    if args.algorithm == "oracle" and (args.scores or args.dataset == "folder"):
        raise ValueError("--algorithm oracle needs the labels of U: it goes with neither a folder "
                         "nor --scores")

# -----------------------------------------------------------------------------
# the device and its precision

with exit_status(parser):
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
# the model to start from, and what stands for the flags that were not given

given, known = None, {}
if args.init_from and not ckpt:
    with exit_status(parser):
        data_dir = DATA_DIR if args.dataset == "folder" else args.data_dir
        with first_rank_first():
            given, given_diffusion = load_pretrained(args.init_from, data_dir)
        known = dict(schedule=given_diffusion.schedule, prediction=given_diffusion.prediction)
        if "image_size" in DATASETS[args.dataset]:    # whose images are resized to what it has
            known |= dict(image_size=given.config.image_size, channels=given.config.image_channels)
        for name, value in known.items():
            if getattr(args, name) not in (None, value):
                raise ValueError(f"--{name} {getattr(args, name)} is not what {args.init_from} "
                                 f"was trained with, {value}")

sources = [known, FINE_TUNING if args.init_from else {}, PAPER if args.recipe else {},
          DATASETS[args.dataset]]
network = args.model or ChainMap(*sources)["model"]
choices = ChainMap(*sources, DEFAULTS.get(network, DEFAULTS["paper"]))
for name, value in choices.items():
    if getattr(args, name, value) is None:
        setattr(args, name, value)

# -----------------------------------------------------------------------------
# the data: U and S are bytes on the device, or stay in their file where they are too large for it

with exit_status(parser):
    if args.image_size and not (given or ckpt):
        check(preset(args.model, args.channels, args.image_size))    # before images are decoded
    with first_rank_first():
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
    channels, size = data.train.shape[1:3]
    u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled,
                    args.n_labeled, args.seed)
    n_unlabeled, n_labeled = len(u), len(s)
    if args.algorithm == "oracle":
        u = u[~has_class(data.train_labels[u], parse_classes(args.dataset, args.sensitive))]
    args.loss_prior = args.loss_prior or args.prior
    loss_prior = args.loss_prior
    if args.scores:
        args.keep = args.keep or 0.9 * (1 - loss_prior)
        u, s = read_scores(args.scores, data, u, s, args.keep)
        loss_prior *= (len(s) / n_labeled) / (len(u) / n_unlabeled)    # of what is kept

    # how long, and where the second part begins
    if args.max_steps is None:
        args.max_steps = math.ceil(choices["epochs"] * n_unlabeled / args.batch_size)
    pu_start = args.pu_start if args.algorithm == "pu" else 0
    if pu_start < 1:    # a share
        pu_start = round(pu_start * args.max_steps)
    pu_start = int(pu_start)
    if ckpt:
        pu_start = ckpt["pu_start"]    # also where --max_steps is another now
    elif pu_start >= args.max_steps:
        raise ValueError(f"--pu_start {args.pu_start:g} leaves no step for the PU risk: "
                         f"--max_steps is {args.max_steps}")
    knows_u = args.algorithm == "pu" and args.limit < math.inf and (pu_start > 0 or args.init_from)

    # how many images of U and of S a step takes
    n_s = 0
    share_s = len(s) / (len(u) + len(s))
    if args.algorithm == "pu":
        if not loss_prior < 1:
            raise ValueError(f"--scores {args.scores} leave a prior of {loss_prior:.3g}: they, or "
                             f"--prior, are wrong")
        n_s = sensitive_per_batch(args.batch_size, loss_prior)
    elif args.algorithm == "supervised":
        n_s = min(max(1, round(share_s * args.batch_size)), args.batch_size // 2)
    if args.scores and args.algorithm in ("pu", "supervised") and len(s) < max(1, n_s):
        raise ValueError(f"--scores {args.scores} leave {len(s)} images of S, fewer than the "
                         f"{max(1, n_s)} a step takes: they would be learned by heart. Use "
                         f"--algorithm unsupervised, or a larger --keep")
    n_u = args.batch_size - n_s
    if n_s == 0 and args.algorithm in ("pu", "supervised"):
        raise ValueError(f"--batch_size {args.batch_size} leaves no room for images of U and of S")
    micro_batches = world * args.grad_accum    # a step, over all ranks
    for n in [n_u, n_s, args.batch_size]:
        if n % micro_batches:
            raise ValueError(f"{n} images cannot be divided evenly among {world} ranks with "
                             f"{args.grad_accum} micro-batches each: choose another --batch_size "
                             f"or --grad_accum")

    # the network
    if ckpt:
        config = UNetConfig(**ckpt["config"])
    elif given:
        config = given.config
    else:
        config = preset(args.model, channels, size)
    if (config.image_channels, config.image_size) != (channels, size):
        raise ValueError(f"--init_from {args.init_from} is for {config.image_size}x"
                         f"{config.image_size} images of {config.image_channels} channels, "
                         f"{args.dataset} has {size}x{size} of {channels}")
    model = (given or UNet(config)).to(device, memory_format=torch.channels_last)
    counts = [len(u), len(s)]
    if ckpt and ckpt["counts"] != counts:
        raise OSError(f"U and S had {ckpt['counts']} images when the run began, now {counts}: "
                      f"{args.scores or args.data_dir} has changed")

images = data.train
if sum(counts) * images[0].numel() <= FITS:
    images = torch.cat([images[u], images[s]]).to(device)
    u, s = torch.arange(sum(counts), device=device).split(counts)

# -----------------------------------------------------------------------------
# the moving average, the loss, the optimizer

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

eager = per_image_loss
if args.compile:
    x = torch.zeros(args.batch_size // micro_batches, channels, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.zeros(len(x), dtype=torch.long, device=device)
    per_image_loss = compiled(eager, lambda fast: fast(x, t, x.clone()).sum().backward())
    optimizer.zero_grad()

def learning_rate(step):
    """Linear warm-up, constant while U is learned, then a cosine down to 0."""
    warmup_steps = min(args.warmup_steps, args.max_steps // 4)
    warmup = min(1, (step + 1) / (warmup_steps + 1))
    start = max(pu_start, warmup_steps)    # of the cosine
    progress = max(0, step - start) / max(1, args.max_steps - start)
    return warmup * args.lr * 0.5 * (1 + math.cos(math.pi * progress))

def averaging(step):
    """The decay of the moving average. It soon forgets random weights, and reaches back over at
    most a quarter of the run; otherwise a short fine-tuning would sample from the old model."""
    slow = min(args.ema_decay, max(0, 1 - 4 / args.max_steps))
    if not args.init_from:
        slow = min(slow, (1 + step) / (10 + step))
    return slow

# -----------------------------------------------------------------------------
# one step

def over_ranks(x):
    """-> the mean over the ranks"""
    if world > 1:
        dist.all_reduce(x := x.clone())
    return x / world

def draw_batch(n_u, n_s):
    """The batch of one step, which all ranks draw alike: n_u images of U, then n_s of S
    -> {name: [n_u + n_s, ...]}. Image i of S has the timestep and the noise of image i of U, which
    makes the difference of their losses less noisy."""
    index = torch.cat([rows[torch.randint(max(1, len(rows)), (n,), device=rows.device)]
                       for rows, n in [(u, n_u), (s, n_s)]])
    batch = dict(index=index)
    if args.hflip:
        batch["mirrored"] = torch.rand(n_u + n_s, 1, 1, 1, device=device) < 0.5
    # timesteps one golden ratio apart are spread evenly, and so are the first n_s of them
    spread = torch.rand(1, device=device) + 0.6180339887 * torch.arange(n_u, device=device)
    t = (diffusion.T * (spread % 1)).long()
    eps = torch.randn(n_u, channels, size, size, device=device)
    return batch | dict(t=torch.cat([t, t[:n_s]]), eps=torch.cat([eps, eps[:n_s]]))

def read_images(index):
    """Their numbers [B] -> x_0 [B, C, H, W] in [-1, 1], on the device"""
    x_0 = images[index]
    if device.type == "cuda" and x_0.is_cpu:
        x_0 = x_0.pin_memory()
    return to_float(x_0.to(device, non_blocking=True))

def typical_losses():
    """What images of U cost the network now -> [20], the mean l by twentieths of the timesteps."""
    generator = torch.Generator(device).manual_seed(args.seed)    # training's is left alone
    t = torch.arange(200, device=device) * diffusion.T // 200
    total = torch.zeros(200, device=device)
    with torch.no_grad():
        for _ in range(20):
            chosen = torch.randint(len(u), (200,), generator=generator, device=device)
            x_0 = read_images(u[chosen.to(u.device)])
            eps = torch.randn(x_0.shape, generator=generator, device=device)
            total += eager(x_0, t, eps)
    return total.view(20, 10).mean(1) / 20

def accumulate_gradients(batch, n_u, n_s, negative=None):
    """Sends this rank's micro-batches of a batch forward and backward.

    negative: is E_U[l] - prior E_S[l] of the whole batch negative? None, where each rank has one
        micro-batch: they are the whole batch, and decide
    -> {name: mean over the micro-batches} for the log
    """
    means = {}
    for first in range(rank, micro_batches, world):
        part = {name: torch.cat([x[first:n_u:micro_batches], x[n_u + first::micro_batches]])
                for name, x in batch.items()}
        x_0 = read_images(part["index"])
        x_0 = x_0.contiguous(memory_format=torch.channels_last)
        if args.hflip:
            x_0 = torch.where(part["mirrored"], x_0.flip(3), x_0)
        eps = part["eps"].contiguous(memory_format=torch.channels_last)
        net.require_backward_grad_sync = first + world >= micro_batches    # for DDP: after the last
        loss = per_image_loss(x_0, part["t"], eps)
        sizes = [n_u // micro_batches, n_s // micro_batches]
        loss_u, loss_s = loss.split(sizes)
        found = {}

        if n_s == 0:
            risk = unsupervised_loss(loss_u)
        elif args.algorithm == "supervised":
            risk = supervised_loss(loss_u, loss_s, share_s)
        else:
            counted_u, counted_s = loss_u, loss_s
            if typical is not None:
                counted_u, counted_s = limited(loss, part["t"], typical, args.limit).split(sizes)
            difference = (counted_u.mean() - loss_prior * counted_s.mean()).detach()
            if negative is None:
                negative = over_ranks(difference) < 0
            risk = pu_loss(counted_u, counted_s, loss_prior, args.correction, negative)
            found["difference"] = difference
            found["corrected"] = negative * (args.correction != "none")
        scaler.scale(risk / args.grad_accum).backward()

        found["risk"] = risk
        of_u, of_s = part["t"].split(sizes)
        for name, losses, t in [("loss_u", loss_u, of_u), ("loss_s", loss_s, of_s)]:
            if len(losses) > 0:
                found[name] = losses.mean()
                for third, where in enumerate(["low", "middle", "high"]):    # a third of all t each
                    inside = 3 * t // diffusion.T == third
                    found[f"{name}_{where}_t"] = (3 * losses * inside).mean()
        for name, value in found.items():
            means[name] = means.get(name, 0) + value.detach() / args.grad_accum
    return means

# -----------------------------------------------------------------------------
# what a run leaves behind, and how it goes on

step, sums, counted, seconds = 0, {}, 0, 0.0    # sums: of the means of the `counted` last steps
typical = None    # l on U by timestep, once the network knows U
trained = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
if ckpt:
    for name, part in trained.items():
        part.load_state_dict(ckpt[name])
    step, counted, seconds = ckpt["step"], ckpt["counted"], ckpt["seconds"]
    if ckpt["typical"] is not None:
        typical = ckpt["typical"].to(device)
    sums = {name: value.to(device) for name, value in ckpt["sums"].items()}
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if device.type != "cpu" and device.type in ckpt["rng"]:
        getattr(torch, device.type).set_rng_state(ckpt["rng"][device.type])
first_step, start, mark = step, time.time(), time.time()

columns = ["step", "risk", "loss_u", "loss_s", "difference", "corrected", "lr",
           "images_per_second", "seconds",
           *(f"loss_{of}_{t}_t" for of in "us" for t in ["low", "middle", "high"])]
log_path = args.out_dir / "log.csv"
rows = []
with exit_status(parser):
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        if ckpt and log_path.exists():    # what was logged after the checkpoint comes again
            rows = [row for row in csv.DictReader(log_path.open()) if int(row["step"]) <= step]
        log_file = open(os.devnull if rank > 0 else log_path, "w", newline="")
    except OSError as error:
        raise OSError(f"--out_dir {args.out_dir} cannot be written: {error}") from None
log = csv.DictWriter(log_file, columns)    # without a value, a cell is empty
log.writeheader()
log.writerows(rows)
log_file.flush()

def where_it_stands():
    if ckpt_path.exists():
        return f"--resume goes on from {ckpt_path}"
    return "no checkpoint was written yet"

def check_finite():
    """So that no checkpoint is overwritten with a broken one."""
    if not sums["risk"].isfinite() or not all(p.isfinite().all() for p in ema.parameters()):
        sys.exit(f"train.py: error: the risk or the weights are no longer finite at step {step}: "
                 f"try a lower --lr ({where_it_stands()})")

def save_checkpoint():
    rng = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        rng[device.type] = getattr(torch, device.type).get_rng_state()
    plain_args = {name: str(value) if isinstance(value, Path) else value
                  for name, value in vars(args).items()}
    state = {name: part.state_dict() for name, part in trained.items()}
    state |= dict(config=asdict(config), args=plain_args, loss_prior=loss_prior, pu_start=pu_start,
                  typical=typical, counts=counts, step=step, sums=sums, counted=counted, rng=rng,
                  seconds=seconds + time.time() - start)
    with exit_status(parser):
        write_whole(ckpt_path, lambda part: torch.save(state, part))

def save_samples(path):
    generator = torch.Generator(device).manual_seed(args.seed)    # training's is left alone
    with autocast:
        samples = diffusion.sample(ema, (64, channels, size, size), generator=generator)
    with exit_status(parser):
        save_grid(to_uint8(samples), path)

signal.signal(signal.SIGINT, lambda *_: sys.exit(f"interrupted at step {step}; "
                                                 f"{where_it_stands()}"))

# -----------------------------------------------------------------------------
# what is about to happen

difference = f"E_U[l] - {loss_prior:.4g} E_S[l]"
corrected = {"abs": f"|{difference}|", "nn": f"max(0, {difference})", "none": difference}
ordinary = f"the ordinary diffusion loss, E_U[l], on {args.batch_size} images of U a step"
objective = {
    "pu": f"the PU risk, {loss_prior:.4g} E_S[-log(1 - exp(-l))] + {corrected[args.correction]}, "
          f"on {n_u} images of U and {n_s} of S a step",
    "supervised": f"the supervised risk, {1 - share_s:.4g} E_U[l] + "
                  f"{share_s:.4g} E_S[-log(1 - exp(-l))], "
                  f"on {n_u} images of U and {n_s} of S a step",
    "unsupervised": ordinary,
    "oracle": f"{ordinary}, the {len(u):,} that are normal by labels that nobody has",
}[args.algorithm]
print(f"{args.dataset}: U has {n_unlabeled:,} images, a fraction of {args.prior:.4g} sensitive "
      f"({args.sensitive or 'your estimate'}); S has {n_labeled:,}")
if args.scores:
    print(f"{args.scores}: of these, the {len(u):,} of U that score lowest, a fraction of "
          f"{args.keep:.4g}, and the {len(s):,} of S that score no higher")
if pu_start:
    print(f"steps 1 to {pu_start} minimise {ordinary}")
print(f"steps {pu_start + 1} to {args.max_steps} minimise {objective}")
if knows_u:
    print(f"in the PU risk, l counts up to {args.limit:g} times what U costs at the same timestep")
if args.algorithm == "pu" and len(s) < 4 * n_s:
    print(f"S is small: {len(s)} images are soon learned by heart. Watch the samples, raise "
          f"--pu_start if they suffer, or sort U by pu_filter.py and use --scores")
if micro_batches > 1:
    print(f"each step in {micro_batches} micro-batches: {world} ranks, {args.grad_accum} each")
print(f"{args.model or args.init_from} U-Net of "
      f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
      f"{args.dtype}, {'not compiled' if per_image_loss is eager else 'compiled'}; "
      f"from step {step}; results in {args.out_dir}", flush=True)

# -----------------------------------------------------------------------------
# the loop

while step < args.max_steps:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    composition = (n_u, n_s)
    if step < pu_start:
        composition = (args.batch_size, 0)
    elif knows_u and typical is None:
        typical = typical_losses()
    batch = draw_batch(*composition)

    guess = None
    if args.grad_accum > 1:    # positive; where the whole batch disagrees, the step is done again
        guess = torch.zeros((), dtype=torch.bool, device=device)
    means = accumulate_gradients(batch, *composition, guess)
    if guess is not None and "difference" in means and args.correction != "none":
        if over_ranks(means["difference"]) < 0:
            optimizer.zero_grad()
            means = accumulate_gradients(batch, *composition, ~guess)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - averaging(step))
    for name, value in means.items():
        sums[name] = sums.get(name, 0) + value
    counted += 1
    step += 1

    last = step in (pu_start, args.max_steps)    # of one part
    log_is_due = last or step % args.log_interval == 0
    save_is_due = last or step % args.sample_interval == 0
    if log_is_due or save_is_due:
        sums = {name: over_ranks(value) for name, value in sums.items()}
        check_finite()
    if log_is_due:
        row = {name: float(value / counted) for name, value in sums.items()}
        speed = counted * args.batch_size / (time.time() - mark)
        elapsed = time.time() - start
        left = elapsed / (step - first_step) * (args.max_steps - step)
        of_s = f"l_S {row['loss_s']:.3f}  " if "loss_s" in row else ""
        print(f"step {step}/{args.max_steps}  risk {row['risk']:.3f}  l_U {row['loss_u']:.3f}  "
              f"{of_s}lr {group['lr']:.2e}  {speed:.0f} images/s  "
              f"{left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        log.writerow(row | dict(step=step, lr=group["lr"], images_per_second=round(speed, 1),
                                seconds=round(seconds + elapsed, 1)))
        log_file.flush()
        sums, counted, mark = {}, 0, time.time()
    if save_is_due:
        pause = time.time()
        samples_path = args.out_dir / f"samples_{step:06d}.png"
        if rank == 0:
            save_checkpoint()
            save_samples(samples_path)
        mark += time.time() - pause
        if step == pu_start:
            print(f"step {step}: U is learned. From here on the PU risk subtracts S; "
                  f"{samples_path} is what the network would have drawn", flush=True)

# -----------------------------------------------------------------------------
# where everything is

if step == first_step:
    print(f"{ckpt_path} is at step {step}: nothing was left to do; --max_steps goes further")
    sys.exit()
print(f"trained for {(time.time() - start) / 60:.1f} minutes; the checkpoint is {ckpt_path}, the "
      f"log {log_path}, the last samples {samples_path}")
before_path = args.out_dir / f"samples_{pu_start:06d}.png"
if rank == 0 and pu_start and before_path.exists():
    join_pngs([before_path, samples_path], args.out_dir / "before_after.png")
    print(f"{args.out_dir / 'before_after.png'}: what it would have drawn, and what it draws now")
print(f"to sample from it: python sample.py --ckpt {ckpt_path} --n 64 --grid samples.png")
if args.dataset != "folder":
    print(f"to judge it: python evaluate.py --ckpt {ckpt_path}")
if world > 1:
    dist.destroy_process_group()
