"""
Train a diffusion model on unlabeled images, some of which must not be generated, and a few that are labeled so.

    python train.py --dataset mnist --prior 0.5                          # half of the unlabeled digits are odd: learn the even
    python train.py --dataset mnist --prior 0.5 --resume                 # go on after an interruption as if there had been none
    python train.py --dataset mnist --prior 1/11 --sensitive 4,7         # other forbidden classes, 10 normal to 1 sensitive
    python train.py --dataset mnist --prior 0.5 --algorithm unsupervised # what happens without the method
    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32    # clean a model that exists
    torchrun --standalone --nproc_per_node=8 train.py --model paper      # the same training on 8 GPUs, or on CPU cores

A CPU or a GPU, whatever is there. Everything lands in --out_dir: ckpt.pt, log.csv, and a grid of samples now and then.
"""
import argparse
import copy
import csv
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from data import DATA_DIR, DATASETS, FITS, data_flags, has_class, load, parse_classes, split
from diffusion import GaussianDiffusion
from images import save_grid, to_uint8
from pretrained import load_pretrained
from pu_loss import pu_loss, supervised_loss, unsupervised_loss
from pu_filter import read_scores, write_scores
from runtime import compiled, default_dtype, device_flags, find_device, first_rank_first, fraction, positive, ranks, read_checkpoint
from unet import PRESETS, UNet, UNetConfig, check, preset

# -----------------------------------------------------------------------------
# the command line

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                 usage="python train.py [--flag value ...]")
flag = parser.add_argument
data_flags(parser)
flag("--hflip", action=argparse.BooleanOptionalAction, help="mirror half of the images (default: for photographs, not for digits)")
flag("--loss_prior", type=fraction, help="what the loss assumes instead, to study a wrong guess (default: --prior; --scores make both smaller)")
flag("--algorithm", default="pu", choices=["pu", "supervised", "unsupervised", "oracle"],
     help="pu: the method; supervised: takes U for normal; unsupervised: ignores S; oracle: unsupervised on the normal images of "
          "U alone, by labels that nobody has in practice (default: pu)")
flag("--correction", default="abs", choices=["abs", "nn", "none"],
     help="where the estimated normal loss is negative: take its absolute value, descend on minus it alone, or let it be (default: abs)")
flag("--push_limit", type=float, default=2.0, help="pu counts l of an image of S up to this multiple of l of the image of U at the same timestep and noise, "
                                                   "and pushes no further; inf: no limit, the paper's method (default: 2)")
flag("--scores", help="a file of pu_filter.py: do without those images of U and S that score high; auto: have it made first, in --out_dir; "
                      "none: keep all, which for pu is the paper's method (default: auto for pu, none for others)")
flag("--keep", type=fraction, help="with scores: the fraction of U to keep (default: 0.9 of the normal ones, 0.9 (1 - prior))")
flag("--init_from", help="start from this model, not from random weights: a ckpt.pt of train.py, a folder in the diffusers format, "
                         "or the name of one on the hub, such as google/ddpm-cifar10-32")
flag("--schedule", choices=["linear", "cosine", "lognormal"], help="noise schedule (default: lognormal for tiny, linear for others, or that of --init_from)")
flag("--prediction", choices=["eps", "v"], help="what the network predicts, and l is the squared error of (default: v for tiny, eps for others, or that of --init_from)")
flag("--model", choices=list(PRESETS), help="network (default: tiny for digits and clothes, paper for photographs)")
flag("--batch_size", type=positive, help="images a step, from U and S together (default: 128; stl10: 32, celeba: 16)")
flag("--grad_accum", type=positive, default=1,
     help="rounds in which each step goes through its batch, for batches that do not fit into memory at once (default: 1)")
flag("--sensitive_share", type=fraction, help="share of each batch that pu draws from S, at most 0.5 (default: what makes E_U[l] - prior E_S[l] "
                                              "least noisy, prior / (1 + prior), as a multiple of 8 images; none where --scores leave fewer than that)")
flag("--max_steps", type=positive, help="optimizer steps (default: 4000 for tiny, 20000 for paper, the size of U times 20 / --batch_size with --init_from)")
flag("--lr", type=float, help="peak learning rate (default: 2e-3 for tiny, 1e-4 for paper and with --init_from)")
flag("--warmup_steps", type=int, help="steps of linear warm-up, before the cosine decay to 0 (default: 200 for tiny, 500 for others)")
flag("--grad_clip", type=float, default=1.0, help="largest gradient norm; inf: no limit (default: 1)")
flag("--ema_decay", type=float, default=0.999, help="of the moving average of the weights, which is what samples (default: 0.999)")
device_flags(parser)
flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the loss (default: on cuda only)")
flag("--log_interval", type=positive, default=100, help="steps between two log lines (default: 100)")
flag("--sample_interval", type=positive, default=500, help="steps between two sample grids and checkpoints (default: 500)")
flag("--out_dir", type=Path, help="where all results go (default: out/DATASET-ALGORITHM-PRIOR)")
flag("--resume", action="store_true", help="go on from the checkpoint in --out_dir, with the flags it was started with")

MAY_CHANGE = {"lr", "device", "compile", "grad_accum", "log_interval", "sample_interval", "max_steps", "data_dir", "out_dir", "resume"}

def fail(error):
    """The world is not as it should be: exit status 1. (A wish that cannot be granted is parser.error's: 2.)"""
    sys.exit(f"train.py: error: {error}")

args = parser.parse_args()
signal.signal(signal.SIGINT, lambda *_: sys.exit("train.py: interrupted"))
args.out_dir = args.out_dir or Path("out") / f"{args.dataset}-{args.algorithm}-{args.prior:.4g}"
ckpt_path = args.out_dir / "ckpt.pt"
ckpt = None
if args.resume:
    try:
        ckpt = read_checkpoint(ckpt_path)
    except OSError as e:
        fail(e)
    saved = {**vars(parser.parse_args([])), "prediction": "eps", "push_limit": math.inf, **ckpt["args"]}    # for runs that are older than a flag
    saved["scores"] = saved["scores"] or "none"
    parser.set_defaults(**saved)    # the run's own flags, unless given again
    args = parser.parse_args(namespace=argparse.Namespace(out_dir=args.out_dir))
    for name, value in saved.items():
        if str(getattr(args, name)) != str(value) and name not in MAY_CHANGE:
            parser.error(f"--{name} cannot change on --resume: the run in {args.out_dir} has {value}")
elif ckpt_path.exists():
    parser.error(f"--out_dir {args.out_dir} already holds a run: add --resume to go on with it, or name another folder")

if args.init_from and args.model:
    parser.error(f"--model {args.model} cannot go with --init_from, which brings its own network")
info = {name: value for name, value in DATASETS[args.dataset].items() if not (args.init_from and name in ("model", "image_size", "channels"))}
RECIPES = {"tiny": dict(lr=2e-3, warmup_steps=200, max_steps=4000, schedule="lognormal", prediction="v"),
           "paper": dict(lr=1e-4, warmup_steps=500, max_steps=20000, schedule="linear", prediction="eps"),
           "init_from": dict(lr=1e-4, warmup_steps=500)}    # its max_steps depend on the size of U, the others on the model
recipe = "init_from" if args.init_from else args.model or info["model"]
for defaults in [info, RECIPES.get(recipe, RECIPES["paper"])]:    # what was not asked for
    for name, value in defaults.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
args.scores = args.scores or ("auto" if args.algorithm == "pu" else "none")
if args.sensitive_share and args.sensitive_share > 0.5:
    parser.error(f"--sensitive_share {args.sensitive_share} is above 0.5: every image of S is paired with one of U")
if not args.push_limit > 0:
    parser.error("--push_limit must be a positive number, or inf")
if not 0 < args.lr < math.inf:
    parser.error("--lr must be a positive number")
if not args.grad_clip > 0:
    parser.error("--grad_clip must be a positive number, or inf")
if args.keep and args.scores == "none":
    parser.error("--keep needs --scores: auto, or a file of pu_filter.py")
if args.scores != "none" and args.algorithm == "oracle":
    parser.error("--scores and --algorithm oracle do not go together: the oracle has the labels")
if args.algorithm == "oracle" and args.dataset == "folder":
    parser.error("--algorithm oracle needs the labels of U, which a folder does not have")
if args.warmup_steps < 0 or not 0 <= args.ema_decay < 1:
    parser.error("--warmup_steps must not be negative, and --ema_decay must be at least 0 and below 1")

# -----------------------------------------------------------------------------
# the device and its precision

try:
    device = find_device(args.device)
except ValueError as e:
    parser.error(e)
rank, world = ranks()
if rank:    # the first speaks, and writes, for all
    sys.stdout = open(os.devnull, "w")
args.dtype = args.dtype or default_dtype(device)
if args.compile is None:
    args.compile = device.type == "cuda" and find_spec("triton") is not None    # not on Windows
if device.type == "cuda":
    torch.set_float32_matmul_precision("high")    # TF32
autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
torch.manual_seed(args.seed)

# -----------------------------------------------------------------------------
# the data: U and S live on the device as bytes, or in a memory-mapped file where they are too large

def check_size(config, channels, size):
    if (config.image_channels, config.image_size) != (channels, size):
        parser.error(f"--init_from {args.init_from} is for {config.image_size}x{config.image_size} images of {config.image_channels} channels, "
                     f"{args.dataset} has {size}x{size} of {channels}")

try:
    initial = None
    if args.init_from and not ckpt:
        with first_rank_first():
            initial, diffusion = load_pretrained(args.init_from, DATA_DIR if args.dataset == "folder" else args.data_dir)
        if args.dataset in ("folder", "celeba"):
            args.image_size = args.image_size or initial.config.image_size
            args.channels = args.channels or initial.config.image_channels
            check_size(initial.config, args.channels, args.image_size)    # better to fail now than after the decoding
        for name in ["schedule", "prediction"]:
            asked, found = getattr(args, name), getattr(diffusion, name)
            if asked not in (None, found):
                parser.error(f"--{name} {asked} is not what {args.init_from} was trained with, {found}")
            setattr(args, name, found)
    elif args.image_size and not ckpt:
        check(preset(args.model, args.channels, args.image_size))
    with first_rank_first():
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
    channels, size = data.train.shape[1:3]
    config = UNetConfig(**ckpt["config"]) if ckpt else initial.config if initial else preset(args.model, channels, size)
    check_size(config, channels, size)
    u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled, args.n_labeled, args.seed)
    n_U, n_S = len(u), len(s)
    loss_prior = args.loss_prior = args.loss_prior or args.prior
    if args.scores != "none":
        args.keep = args.keep or 0.9 * (1 - args.loss_prior)
        scores_path = args.out_dir / "scores.pt" if args.scores == "auto" else Path(args.scores)
        if args.scores == "auto" and rank == 0 and not ckpt and not scores_path.exists():
            print(f"a classifier first, whose scores go to {scores_path}", flush=True)
            write_scores(scores_path, data, u, s, args.loss_prior, args.hflip, args.seed, device)
        if world > 1:
            dist.barrier()
        u, s = read_scores(scores_path, data, u, s, args.keep, (args.loss_prior, args.seed) if args.scores == "auto" and not ckpt else None)
        loss_prior *= (len(s) / n_S) / (len(u) / n_U)    # of what is kept
    if ckpt:
        loss_prior = ckpt.get("loss_prior", args.loss_prior)    # older ones have it there
    counts = [len(u), len(s)]
    if not loss_prior < 1:
        parser.error(f"the scores in {scores_path} leave a prior of {loss_prior:.3g}, which is none: they, or --prior, are wrong")
    if args.algorithm == "oracle":
        u = u[~has_class(data.train_labels[u], parse_classes(args.dataset, args.sensitive))]
        counts[0] = n_U = len(u)
    model = (initial or UNet(config)).to(device, memory_format=torch.channels_last)
except ValueError as e:
    parser.error(e)
except OSError as e:
    fail(e)
args.max_steps = args.max_steps or math.ceil(20 * n_U / args.batch_size)
if ckpt and ckpt["counts"] != counts:
    what, where = ("images", args.data_dir) if args.scores == "none" else ("scores", scores_path)
    fail(f"{where} holds other {what} than when the run began: U and S had {ckpt['counts']}, now {counts}")
images = data.train
if (len(u) + len(s)) * images[0].numel() <= FITS:
    images = torch.cat([images[u], images[s]]).to(device)
    u, s = torch.arange(len(u), device=device), torch.arange(len(u), len(images), device=device)

# each step draws a fixed number of each, and every rank and round gets as many as any other
parts = world * args.grad_accum
optimal = loss_prior / (1 + loss_prior)
share = {"pu": optimal and (args.sensitive_share or optimal), "supervised": counts[1] / sum(counts)}.get(args.algorithm, 0)
n_s = max(int(share > 0), round(share * args.batch_size))
if args.algorithm == "pu" and not args.sensitive_share:
    n_s = 8 * math.ceil(share * args.batch_size / 8)    # which most numbers of ranks and rounds divide
    if args.scores != "none" and len(s) < n_s:    # learned by heart, a few images tell nothing of the others that are left
        n_s = share = 0
n_s = min(n_s, args.batch_size // 2)
n_u = args.batch_size - n_s
if share and n_s == 0:
    parser.error(f"--batch_size {args.batch_size} leaves no room for images of both U and S")
if n_u % parts or n_s % parts:
    parser.error(f"a batch of {n_u} images of U and {n_s} of S cannot be divided evenly among {world} ranks with {args.grad_accum} rounds each: "
                 f"choose another --batch_size, --grad_accum or --sensitive_share")

# -----------------------------------------------------------------------------
# the model, its moving average, the loss and the optimizer

ema = copy.deepcopy(model).eval().requires_grad_(False)
net = model if world == 1 else torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
diffusion = GaussianDiffusion(1000, args.schedule, args.prediction).to(device)
fused = {"fused": True} if device.type in ("cuda", "cpu") else {}
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, **fused)
scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
corrects = args.algorithm == "pu" and args.correction != "none"
plus = torch.ones((), device=device)    # a difference that needs no correction

def over_ranks(x):
    """-> the mean over the ranks"""
    if world > 1:
        dist.all_reduce(x := x.clone())
    return x / world

def loss_fn(x_0, t, eps, whole=None):
    """One part of a batch -> its risk, and for the log [risk, mean l on U, mean limited l on S, was it corrected?, l on U and l on S by thirds of t].
    whole: E_U[l] - prior E_S[l] of the whole batch, or anything of its sign; by default the parts of all ranks are it."""
    with autocast:
        loss = diffusion.per_image_loss(net, x_0, t, eps)
    thirds = 3 * loss[:, None] * (3 * t[:, None] // diffusion.T == torch.arange(3, device=device))    # [B, 3]: into each falls a third of all t
    (loss_u, loss_s), (thirds_u, thirds_s) = (x.split([n_u // parts, n_s // parts]) for x in (loss, thirds))
    if args.algorithm == "pu" and args.push_limit < math.inf:    # else a few images of S, learned by heart, are pushed away for ever, and all others with them
        loss_s = loss_s.minimum(args.push_limit * loss_u[:len(loss_s)].detach())
    mean_u, mean_s = loss_u.mean(), loss_s.mean()
    if whole is None:
        whole = over_ranks((mean_u - loss_prior * mean_s).detach())
    if not n_s:
        risk = unsupervised_loss(loss_u)
    elif args.algorithm == "pu":
        risk = pu_loss(loss_u, loss_s, loss_prior, args.correction, whole)
    else:
        risk = supervised_loss(loss_u, loss_s, share)
    figures = torch.stack([risk, mean_u, mean_s, (whole < 0) & corrects])
    return risk, torch.cat([figures, thirds_u.mean(0), thirds_s.mean(0)]).detach()

if args.compile:
    black, eps = (torch.zeros(args.batch_size // parts, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
                  for _ in range(2))
    trial = (black, torch.zeros(len(eps), dtype=torch.long, device=device), eps, plus if args.grad_accum > 1 else None)
    eager = loss_fn
    loss_fn = compiled(eager, lambda fast: fast(*trial)[0].backward())
    optimizer.zero_grad()

step, sums, counted = 0, torch.zeros(10, device=device), 0    # sums of loss_fn's figures since the last log line
seconds = 0.0    # trained before this start
if ckpt:
    model.load_state_dict(ckpt["model"])
    ema.load_state_dict(ckpt["ema"])
    optimizer.load_state_dict(ckpt["optimizer"])
    scaler.load_state_dict(ckpt["scaler"])
    step, counted, seconds = ckpt["step"], ckpt["counted"], ckpt.get("seconds", 0.0)
    sums[:len(ckpt["sums"])] = ckpt["sums"]    # older ones are shorter
    torch.set_rng_state(ckpt["rng"]["cpu"])
    if device.type in ckpt["rng"] and device.type != "cpu":
        getattr(torch, device.type).set_rng_state(ckpt["rng"][device.type])

# -----------------------------------------------------------------------------
# where results go

def where_it_stands():
    return f"--resume goes on from {ckpt_path}" if ckpt_path.exists() else "no checkpoint was written yet"

def save_checkpoint():
    """Written beside the last one, then renamed: an interruption leaves one whole checkpoint, old or new."""
    rng = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        rng[device.type] = getattr(torch, device.type).get_rng_state()
    saved_args = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    try:
        torch.save(dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                        scaler=scaler.state_dict(), config=asdict(config), args=saved_args, loss_prior=loss_prior, counts=counts, step=step, sums=sums,
                        counted=counted, rng=rng, seconds=seconds + time.time() - start), f"{ckpt_path}.tmp")
        os.replace(f"{ckpt_path}.tmp", ckpt_path)
    except (OSError, RuntimeError) as e:    # RuntimeError: a full disk, to torch.save
        fail(f"{ckpt_path} cannot be written at step {step} ({str(e).splitlines()[0]}); {where_it_stands()}")

def save_samples(path):
    generator = torch.Generator(device).manual_seed(args.seed)    # its own: sampling does not disturb training
    with autocast:
        save_grid(to_uint8(diffusion.sample(ema, (64, channels, size, size), generator=generator)), path)

log_path = args.out_dir / "log.csv"
columns = ["step", "risk", "loss_u", "loss_s", "corrected", "lr", "images_per_second", "seconds",
           *(f"loss_{part}_{t}_t" for part in "us" for t in ["low", "middle", "high"])]
rows = []
try:
    args.out_dir.mkdir(parents=True, exist_ok=True)
    if ckpt and log_path.exists():    # what was logged after the checkpoint will be logged again
        rows = [row for row in csv.reader(log_path.open()) if row and row[0].isdecimal() and int(row[0]) <= step]
    log_file = open(os.devnull if rank else log_path, "w", newline="")
except OSError as e:
    fail(f"--out_dir {args.out_dir} cannot be written: {e}")
log = csv.writer(log_file)
log.writerows([columns, *rows])
log_file.flush()

# -----------------------------------------------------------------------------
# the loop

n_params = sum(p.numel() for p in model.parameters())
print(f"{args.dataset}: U has {n_U:,} images, {0 if args.algorithm == 'oracle' else args.prior:.4g} of them sensitive ({args.sensitive or 'assumed'}); S has {n_S:,}")
if args.scores != "none":
    print(f"{scores_path}: of these, the {args.keep:.4g} of U that score lowest, {len(u):,}, and what scores no higher of S, {len(s):,}")
print(f"{args.algorithm}, prior {loss_prior:.4g}, correction {args.correction}: {n_u} of U and {n_s} of S a step"
      + " (too few of S are left to learn from)" * (args.algorithm == "pu" and n_s == 0) + f", in {parts} parts: {world} ranks, {args.grad_accum} rounds each" * (parts > 1))
print(f"{args.model or args.init_from} U-Net of {n_params / 1e6:.2f} M parameters on {device}, {args.dtype}, "
      f"{'compiled' if args.compile and loss_fn is not eager else 'not compiled'}; steps {step} to {args.max_steps}; results in {args.out_dir}", flush=True)

def check_finite():
    """Before every log line, and so that no checkpoint is overwritten with a broken one."""
    if not sums[0].isfinite() or not all(p.isfinite().all() for p in ema.parameters()):
        fail(f"the risk or the weights are no longer finite at step {step}: try a lower --lr ({where_it_stands()})")

signal.signal(signal.SIGINT, lambda *_: sys.exit(f"interrupted at step {step}; {where_it_stands()}"))

def gradients(index, mirror, t, eps, whole=None):
    """Adds up the gradients of this rank's parts of a batch, and by DDP averages them over the ranks.
    -> the means of loss_fn's figures over these parts"""
    total = torch.zeros_like(sums)
    for part in range(rank, parts, world):    # every parts-th image of U, and of S, which are its pairs
        index_i, mirror_i, t_i, eps_i = (torch.cat([x[part:n_u:parts], x[n_u + part::parts]]) for x in [index, mirror, t, eps])
        x_0 = images[index_i]
        if device.type == "cuda" and x_0.is_cpu:
            x_0 = x_0.pin_memory()
        x_0 = x_0.to(device, non_blocking=True).float() / 127.5 - 1
        x_0 = x_0.contiguous(memory_format=torch.channels_last)    # [B / parts, C, H, W] in [-1, 1]
        if args.hflip:
            x_0 = torch.where(mirror_i, x_0.flip(3), x_0)
        net.require_backward_grad_sync = part + world >= parts    # for DDP: only after the last of them
        risk, figures = loss_fn(x_0, t_i, eps_i.contiguous(memory_format=torch.channels_last), whole)
        scaler.scale(risk / args.grad_accum).backward()
        total += figures / args.grad_accum
    return total

start, mark, first_step = time.time(), time.time(), step
while step < args.max_steps:
    # one lr for this step: linear warm-up, then a cosine down to 0
    progress = max(0, step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    lr = args.lr * min(1, (step + 1) / (args.warmup_steps + 1)) * 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = lr

    # the whole batch, which all ranks draw alike: image numbers of U and of S, what to mirror, timesteps, noise
    index = torch.cat([index[torch.randint(max(1, len(index)), (n,), device=index.device)] for index, n in [(u, n_u), (s, n_s)]])
    mirror = torch.rand(args.batch_size, 1, 1, 1, device=device) < 0.5 if args.hflip else torch.zeros(args.batch_size)
    # timesteps one golden ratio apart are spread evenly over [0, T), and so are the first few of them
    t = (diffusion.T * ((torch.rand(1, device=device) + 0.6180339887 * torch.arange(n_u, device=device)) % 1)).long()
    eps = torch.randn(n_u, channels, size, size, device=device)
    if n_s:    # image i of S has the timestep and noise of image i of U: the difference of their losses is less noisy
        t, eps = torch.cat([t, t[:n_s]]), torch.cat([eps, eps[:n_s]])

    if args.grad_accum == 1:
        figures = gradients(index, mirror, t, eps)
    else:    # take the difference for positive, and where the whole batch disagrees, do it again
        figures = gradients(index, mirror, t, eps, plus)
        if corrects and over_ranks(figures[1] - loss_prior * figures[2]) < 0:
            optimizer.zero_grad()
            figures = gradients(index, mirror, t, eps, -plus)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():    # the average forgets a random start quickly, and is as slow as asked only later
        decay = args.ema_decay if args.init_from else min(args.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    sums += figures
    counted += 1
    step += 1

    if step % args.log_interval == 0 or step % args.sample_interval == 0 or step == args.max_steps:
        sums = over_ranks(sums)
        check_finite()
    if step % args.log_interval == 0 or step == args.max_steps:
        risk, loss_u, loss_s, corrected, *thirds = (sums / counted).tolist()
        speed = counted * args.batch_size / (time.time() - mark)
        elapsed = time.time() - start
        left = elapsed / (step - first_step) * (args.max_steps - step)
        print(f"step {step}/{args.max_steps}  risk {risk:.3f}  l_U {loss_u:.3f}  " + f"l_S {loss_s:.3f}  corrected {corrected:.0%}  " * (n_s > 0)
              + f"lr {lr:.2e}  {speed:.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        log.writerow([step, risk, loss_u, loss_s, corrected, lr, round(speed, 1), round(seconds + elapsed, 1), *thirds])
        log_file.flush()
        sums, counted, mark = torch.zeros_like(sums), 0, time.time()
    if step % args.sample_interval == 0 or step == args.max_steps:
        pause = time.time()
        samples_path = args.out_dir / f"samples_{step:06d}.png"
        if rank == 0:
            save_checkpoint()
            save_samples(samples_path)
        mark += time.time() - pause

# -----------------------------------------------------------------------------
# where everything is

if step == first_step:
    print(f"{ckpt_path} is at step {step} already: nothing was left to do; --max_steps goes further")
    sys.exit()
minutes = (time.time() - start) / 60
print(f"trained for {minutes:.1f} minutes; the checkpoint is {ckpt_path}, the log {log_path}, the last samples {samples_path}")
print(f"to sample from it: python sample.py --ckpt {ckpt_path} --n 64 --grid samples.png")
if args.dataset != "folder":
    print(f"to judge it: python evaluate.py --ckpt {ckpt_path}")
if world > 1:
    dist.destroy_process_group()
