"""
Train a diffusion model on unlabeled images, some of which must not be generated, and a few that are
labeled sensitive.

    python train.py --dataset mnist --prior 0.5                        # half of U is odd
    python train.py --dataset mnist --prior 0.5 --resume               # go on after an interruption
    python train.py --prior 0.5 --algorithm unsupervised               # without the method
    python train.py --dataset cifar10 --prior 1/11 --recipe paper      # as in the paper
    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32    # clean it
    torchrun --standalone --nproc_per_node=8 train.py --dataset cifar10 --prior 1/11 --recipe paper

It runs on a CPU or a GPU. Everything lands in --out_dir: ckpt.pt, log.csv, args.json and grids of
samples.
"""
import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch

import data
import runtime
from diffusion import GaussianDiffusion
from images import grid, load_png, save_png, side_by_side, to_float, to_uint8
from pretrained import describe, load_checkpoint, load_pretrained
from pu_loss import cap_loss, pu_loss, supervised_loss
from runtime import UserError, mean_over_ranks, say, shell
from unet import UNet, preset

# -----------------------------------------------------------------------------
# recipes and flags

LAPTOP = dict(schedule="lognormal", prediction="v", lr=2e-3, warmup_steps=200, max_steps=4000,
              constant_lr=0.5)
DDPM = dict(network="paper", schedule="linear", prediction="eps", lr=1e-4, warmup_steps=500)
RECIPES = {    # defaults of flags, and settings without a flag
    # small networks: for digits, and for photographs
    "tiny": dict(LAPTOP, network="tiny"),
    "small": dict(LAPTOP, network="small", lr=5e-4),    # with 2e-3 the PU risk diverged
    # the paper's network: first E_U[l], then the PU risk
    "large": dict(DDPM, max_steps=20000, constant_lr=0.5),
    # section 5 of the paper; an epoch has |U| / batch_size steps
    "paper": dict(DDPM, epochs=100, pu_start=0.0, constant_lr=0.0, limit=math.inf),
    # with --init_from, whose model knows U already
    "fine_tuning": dict(lr=1e-4, warmup_steps=500, epochs=20, pu_start=0.0, constant_lr=0.0),
}
GRAD_CLIP = 1.0      # largest norm of the gradient
EMA_DECAY = 0.999    # of the average of the weights, which is sampled from
MAX_PASSES = 60      # over S: with more, the network memorises S
FEWEST_STEPS = 300   # where a recipe counts epochs: a small U would give too few steps to learn
MAY_CHANGE = ["lr", "data_dir", "scores", "grad_accum", "device", "compile", "save_interval",
              "out_dir", "resume"]    # on --resume

parser = runtime.make_parser(__doc__, "python train.py [--flag value ...]")
data.data_flags(parser)
add = parser.add_argument_group("what is minimised").add_argument
add("--algorithm", default="pu", choices=["pu", "supervised", "unsupervised", "oracle"],
    help="the PU risk, or a baseline (default: pu)")
add("--pu_start", type=runtime.number,
    help="step, or share of the steps, where the PU risk begins (default: 1/2, or later if S is "
         "small; 0 with --recipe paper or --init_from)")
add("--correction", default="abs", choices=["abs", "nn", "none"],
    help="of a negative estimate of the normal loss (default: abs)")
add("--limit", type=float, default=3.0,
    help="cap l at this multiple of its mean on U (default: 3, paper: inf; unused where a new "
         "network begins with the PU risk)")
add("--loss_prior", type=runtime.fraction, help="use another prior in the risk (default: --prior)")
add("--scores", type=runtime.user_path, help="of pu_filter.py: drop what scores high")
add("--keep", type=runtime.fraction,
    help="with --scores: the fraction of U to keep (default: 0.9 (1 - loss_prior))")
add = parser.add_argument_group("model and optimization").add_argument
add("--recipe", choices=["tiny", "small", "large", "paper"],
    help="network, noise schedule, optimizer, steps (default: the data set's)")
add("--init_from", help="ckpt.pt, a diffusers folder, or a name on the hub")
add("--batch_size", type=int, help="images per step, of U and S together")
add("--grad_accum", type=int, default=1, help="micro-batches per step, to save memory (default: 1)")
add("--max_steps", type=int, help="optimizer steps (default: the recipe's)")
add("--lr", type=float, help="peak learning rate (default: the recipe's)")
group = parser.add_argument_group("running")
runtime.device_flags(group)
add = group.add_argument
add("--compile", action=argparse.BooleanOptionalAction,
    help="torch.compile the loss (default: on cuda only)")
add("--save_interval", type=int, default=500,
    help="steps between two checkpoints and sample grids (default: 500)")
add("--out_dir", type=runtime.user_path, help="(default: out/DATASET-ALGORITHM-PRIOR...)")
add("--resume", action="store_true", help="go on from the checkpoint in --out_dir, if it exists")

args = parser.parse_args()
if args.out_dir is None:
    data.check_data_flags(args)    # fills in --prior, which is part of the name
    words = [args.dataset, args.algorithm, f"{args.prior:.4g}", args.recipe]
    words += [name for name in ["init_from", "scores"] if getattr(args, name)]
    args.out_dir = Path("out", "-".join(filter(None, words)))
ckpt_path, previous_path = args.out_dir / "ckpt.pt", args.out_dir / "ckpt_prev.pt"
ckpt = None
if ckpt_path.exists() or previous_path.exists():
    if not args.resume:
        raise UserError(f"--out_dir {args.out_dir} already holds a run: add --resume to go on with "
                        f"it, or name another folder")
    ckpt = runtime.read_newest(args.out_dir)
    parser.set_defaults(**ckpt["args"])
else:
    if args.resume:
        say(f"{ckpt_path} does not exist yet: a new run begins")
    if args.init_from and args.recipe:
        raise UserError("--recipe does not go with --init_from, which brings its own network")
    defaults = data.DATASETS[args.dataset]
    recipe = "fine_tuning" if args.init_from else args.recipe or defaults["recipe"]
    parser.set_defaults(recipe=recipe, batch_size=defaults["batch_size"], **RECIPES[recipe])
# parse again: a flag that was not given now has the value of the run, or of the recipe
args = parser.parse_args(namespace=argparse.Namespace(out_dir=args.out_dir))
data.check_data_flags(args)
runtime.require_positive(args, "batch_size", "grad_accum", "max_steps", "lr", "limit",
                         "save_interval")
for name, value in (ckpt["args"].items() if ckpt else []):
    if name == "max_steps" and args.max_steps != value:
        raise UserError(f"--max_steps: this run was planned for {value} steps, where its learning "
                        f"rate ends. Start a new one, or fine-tune it: --init_from {ckpt_path}")
    if name not in MAY_CHANGE and str(getattr(args, name)) != str(value):
        raise UserError(f"--{name} cannot change on --resume: the run has {value}")
if args.keep and not args.scores:
    raise UserError("--keep needs --scores")
if args.algorithm == "oracle" and (args.scores or args.dataset == "folder"):
    raise UserError("--algorithm oracle knows the labels of U: it needs no --scores, and a folder "
                    "has no labels")
args.loss_prior = args.loss_prior or args.prior
device = runtime.find_device(args.device, torchrun=True)
rank, world = runtime.ranks()
runtime.set_precision(args, device)
torch.manual_seed(args.seed)

# -----------------------------------------------------------------------------
# the model to start from, if any, and the data

model = channels = None
with runtime.first_rank_first():
    if ckpt:
        model, diffusion = load_checkpoint(ckpt)
    elif args.init_from:
        model, diffusion = load_pretrained(args.init_from)
    if model and "image_size" in data.DATASETS[args.dataset]:    # resize images to what it draws
        channels = model.config.image_channels
        args.image_size = args.image_size or model.config.image_size
    dataset = data.load(args.dataset, args.data_dir, args.image_size, channels)
images = dataset.train    # uint8 [N, C, H, W]; u and s are indices into it
u, s, _ = data.split(args.dataset, dataset, args.sensitive, args.prior, args.n_unlabeled,
                     args.n_labeled, args.seed, args.labeled)
n_unlabeled, n_labeled = len(u), len(s)    # before labels or scores drop any
loss_prior = args.loss_prior
if args.algorithm == "oracle":
    sensitive = data.parse_classes(args.dataset, args.sensitive)
    u = u[~data.has_class(dataset.train_labels[u], sensitive)]
if args.scores:
    args.keep = args.keep or 0.9 * (1 - loss_prior)
    u, s = data.read_scores(args.scores, images, u, s, args.keep)
    # P(sensitive | kept) by Bayes: S is kept as often as the sensitive images in U
    loss_prior *= (len(s) / n_labeled) / (len(u) / n_unlabeled)
    if args.algorithm == "pu" and loss_prior >= 1:
        raise UserError(f"--scores leave a prior of {loss_prior:.3g}: they, or --prior, are wrong")
checksum = data.digest(images) + data.digest(torch.cat([u, s]))
if ckpt and ckpt["checksum"] != checksum:
    raise UserError(f"{args.scores or args.data_dir} holds other images than this run began with")
if images.numel() <= data.MAX_ON_DEVICE:    # more stay in their file
    images, u, s = images.to(device), u.to(device), s.to(device)
shape = images.shape[1:]

# -----------------------------------------------------------------------------
# how many images of U and of S are in a batch, and how many steps each part of the run has

micro_batches = world * args.grad_accum
share_s = len(s) / (len(u) + len(s))    # for the supervised risk
n_s = 0
if args.algorithm == "pu":
    # E_U[l] - prior E_S[l] has the least variance where n_s / n_u is the prior. n_s is rounded up
    # to sixteenths of a batch, which micro-batches can share. If S is small, n_s is about |S|.
    sixteenth = max(1, args.batch_size // 16)
    best = math.ceil(loss_prior / (1 + loss_prior) * args.batch_size / sixteenth)
    n_s = sixteenth * max(1, min(best, len(s) // sixteenth))
elif args.algorithm == "supervised":
    n_s = max(1, round(share_s * args.batch_size))
n_s = min(n_s, args.batch_size // 2)    # each image of S is paired with one of U
n_u = args.batch_size - n_s
if args.batch_size < 2 or n_u % micro_batches or n_s % micro_batches:
    raise UserError(f"--batch_size {args.batch_size}: {n_u} images of U and {n_s} of S cannot be "
                    f"divided among {micro_batches} micro-batches")
if args.scores and len(s) < n_s:
    raise UserError(f"--scores leave {len(s)} images of S, fewer than the {n_s} per step: they "
                    f"would be memorised. Use --algorithm unsupervised, or a larger --keep")
if args.max_steps is None:
    args.max_steps = max(FEWEST_STEPS, math.ceil(args.epochs * n_unlabeled / args.batch_size))
if args.algorithm != "pu":
    pu_start = 0
elif args.pu_start is None:    # the PU risk gets half of the steps, but at most MAX_PASSES over S
    pu_steps = min(args.max_steps // 2, int(MAX_PASSES * len(s) / n_s))
    pu_start = args.max_steps - max(1, pu_steps)
else:    # a share of the steps, or a step
    pu_start = round(args.pu_start * args.max_steps if args.pu_start < 1 else args.pu_start)
if not 0 <= pu_start < args.max_steps:
    raise UserError(f"--pu_start {pu_start} must be below the number of steps, {args.max_steps}")

# -----------------------------------------------------------------------------
# the network, its moving average, the loss, the optimizer

if model is None:
    model = UNet(preset(args.network, *shape[:2]))
    diffusion = GaussianDiffusion(args.schedule, args.prediction)
if (model.config.image_channels, model.config.image_size) != shape[:2]:
    raise UserError(f"{args.init_from} draws images of {model.config.image_channels} channels and "
                    f"{model.config.image_size} pixels, {args.dataset} has {tuple(shape)}")
model = model.train().to(device, memory_format=torch.channels_last)
diffusion = diffusion.to(device)
ema = copy.deepcopy(model).eval().requires_grad_(False)
net = model
if world > 1:
    net = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=device.type in ("cuda", "cpu"))
scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

def per_image_loss(x_0, t, eps, **condition):
    """x_0, eps [B, C, H, W], t [B] -> l [B]"""
    x_0, eps = (x.contiguous(memory_format=torch.channels_last) for x in (x_0, eps))
    with runtime.autocast(args, device):
        return diffusion.per_image_loss(net, x_0, t, eps, **condition)

eager = per_image_loss    # for typical_losses, whose batches have another size
if args.compile:
    x = torch.zeros(args.batch_size // micro_batches, *shape, device=device)
    t = torch.zeros(len(x), dtype=torch.long, device=device)
    # x twice would be one tensor for two arguments: torch.compile would compile again later
    per_image_loss = runtime.compiled(eager, lambda fast: fast(x, t, x.clone()).sum().backward(),
                                      graphs=micro_batches == 1)
    optimizer.zero_grad()

# -----------------------------------------------------------------------------
# what changes with the steps

def learning_rate(step):
    """Linear warm-up, then constant until a share constant_lr of the steps is over and the PU risk
    has begun, then a cosine down to 0."""
    warmup_steps = min(args.warmup_steps, args.max_steps // 4)
    cosine_start = max(pu_start, warmup_steps, round(args.constant_lr * args.max_steps))
    progress = max(0, step - cosine_start) / max(1, args.max_steps - cosine_start)
    warmup = min(1, (step + 1) / (warmup_steps + 1))
    return args.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))

def ema_decay(step):
    """The average spans 1 / (1 - decay) steps: at most half of this part of the run, to forget the
    part before it, and few at first, to forget the random weights of a new network."""
    part_steps = pu_start if step < pu_start else args.max_steps - pu_start
    decay = min(EMA_DECAY, max(0, 1 - 2 / part_steps))
    return decay if args.init_from else min(decay, (1 + step) / (10 + step))

def typical_losses():
    """-> [20], the mean l on U now in each twentieth of the timesteps, by 4,000 random images."""
    torch.manual_seed(args.seed)
    t = torch.arange(200, device=device) * diffusion.T // 200
    total = torch.zeros(200, device=device)
    with torch.no_grad():
        for _ in range(20):    # passes, each with 10 images in every twentieth
            x_0 = to_float(images[u[torch.randint(len(u), (200,), device=u.device)]].to(device))
            total += eager(x_0, t, torch.randn_like(x_0))
    return total.view(20, 10).mean(1) / 20    # passes

# a network that knows nothing yet has no typical loss
use_cap = args.algorithm == "pu" and args.limit < math.inf and (pu_start > 0 or args.init_from)

# -----------------------------------------------------------------------------
# where the run stands, and what it writes

step, start = 0, time.monotonic()
typical = None    # mean l on U by timestep, once the network knows U
state = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
if ckpt:
    for name, module in state.items():
        module.load_state_dict(ckpt[name])
    step, start = ckpt["step"], time.monotonic() - ckpt["seconds"]    # of the whole run
    if ckpt["typical"] is not None:
        typical = ckpt["typical"].to(device)
before_path = args.out_dir / f"samples_{pu_start:06d}.png"
sums, n_summed = {}, 0    # over the steps since the last row of the log

# Losses are without the cap; the difference is with it, and share_negative is how often it was < 0.
# What you add to `logged` needs a column here.
columns = ["step", "risk", "loss_unlabeled", "loss_sensitive", "difference", "share_negative",
           "learning_rate", "images_per_second", "seconds"]
if rank == 0:
    args.out_dir.mkdir(parents=True, exist_ok=True)
    runtime.save_args(args, device, args.out_dir / "args.json")
    log = runtime.open_log(args.out_dir / "log.csv", columns, step)

def save_checkpoint():
    saved = {name: module.state_dict() for name, module in state.items()}
    saved |= dict(network=describe(model), step=step, seconds=time.monotonic() - start,
                  diffusion=dict(alpha_bar=diffusion.alpha_bar, prediction=diffusion.prediction),
                  args=runtime.plain(args), loss_prior=loss_prior, pu_start=pu_start,
                  typical=typical, checksum=checksum)
    runtime.save_whole(saved, ckpt_path, keep=previous_path)

def save_samples():
    """A grid at this step; at the end also beside the one from before the PU risk."""
    generator = torch.Generator(device).manual_seed(args.seed)    # the same noise each time
    with runtime.autocast(args, device):
        samples = grid(to_uint8(diffusion.sample(ema, (64, *shape), generator=generator)))
    save_png(samples, args.out_dir / f"samples_{step:06d}.png")
    if step == args.max_steps and before_path.exists():
        save_png(side_by_side([load_png(before_path), samples]), args.out_dir / "before_after.png")

# -----------------------------------------------------------------------------
# what is about to happen

estimate = f"E_U[l] - {loss_prior:.4g} E_S[l]"
corrected = dict(abs=f"|{estimate}|", nn=f"max(0, {estimate})", none=estimate)[args.correction]
cost_s, ordinary = "E_S[-log(1 - exp(-l))]", "the ordinary diffusion loss, E_U[l]"
minimised = dict(
    pu=f"the PU risk, {loss_prior:.4g} {cost_s} + {corrected}",
    supervised=f"the supervised risk, {1 - share_s:.4g} E_U[l] + {share_s:.4g} {cost_s}",
    unsupervised=ordinary, oracle=ordinary)[args.algorithm]
which = args.sensitive or data.DATASETS[args.dataset].get("sensitive", "your estimate")
say(f"{args.dataset}: U has {n_unlabeled:,} images, a fraction of {args.prior:.4g} sensitive "
    f"({which}); S has {n_labeled:,}{f', of {args.labeled}' if args.labeled else ''}"
    f"{'; images are mirrored at random' if args.hflip else ''}")
if len(u) < n_unlabeled:
    of_s = f" and {len(s):,} of S" if n_s else ""
    say(f"training sees {len(u):,} images of U{of_s}, by {args.scores or 'labels'}")
if pu_start:
    say(f"steps 1 to {pu_start} minimise {ordinary}, on {args.batch_size} images of U per step")
say(f"steps {pu_start + 1} to {args.max_steps} minimise {minimised}, on {n_u} images of U"
    f"{f' and {n_s} of S' if n_s else ''} per step")
if use_cap:
    say(f"in the PU risk, l is capped at {args.limit:g} times its mean on U at the same timestep")
passes = (args.max_steps - pu_start) * n_s / max(1, len(s))
if args.algorithm == "pu" and passes > 1.01 * MAX_PASSES:
    say(f"S is small: the run takes {passes:.0f} passes over it, and may memorise it. If the "
        f"samples suffer, start again with a later --pu_start or fewer --max_steps")
say(f"{args.init_from or args.network} U-Net of "
    f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}, "
    f"{args.dtype}; from step {step}; results in {args.out_dir}")

# -----------------------------------------------------------------------------
# the loop

watch = runtime.SignalWatch()
while step < args.max_steps:
    if use_cap and step == pu_start:
        typical = typical_losses()
    # Draw a batch, the same on all ranks: it follows from --seed and the step. Image i of S has the
    # timestep and the noise of image i of U, which makes the difference less noisy. Timesteps one
    # golden ratio apart (modulo 1) are spread evenly, and so are the first count_s, which S shares.
    torch.manual_seed(1_000_003 * args.seed + step)
    count_s = n_s if step >= pu_start else 0
    count_u = args.batch_size - count_s
    index_u = u[torch.randint(len(u), (count_u,), device=u.device)]
    index_s = s[torch.randint(max(1, len(s)), (count_s,), device=s.device)]
    spread = torch.rand(1, device=device) + 0.6180339887 * torch.arange(count_u, device=device)
    t_u = (diffusion.T * (spread % 1)).long()
    eps_u = torch.randn(count_u, *shape, device=device)

    for micro_batch in range(rank, micro_batches, world):
        # the loss of each image of this micro-batch
        rows = slice(micro_batch, None, micro_batches)
        index = torch.cat([index_u[rows], index_s[rows]])
        x_0 = to_float(images[index].to(device))    # [B, C, H, W]
        if args.hflip:
            x_0 = torch.where(torch.rand(len(x_0), 1, 1, 1, device=device) < 0.5, x_0.flip(3), x_0)
        t = torch.cat([t_u[rows], t_u[:count_s][rows]])
        eps = torch.cat([eps_u[rows], eps_u[:count_s][rows]])
        net.require_backward_grad_sync = micro_batch >= micro_batches - world    # only in the last
        loss = per_image_loss(x_0, t, eps)    # [B]

        # the cap, and the risk
        sizes = count_u // micro_batches, count_s // micro_batches
        capped = loss if typical is None else cap_loss(loss, t, typical, args.limit, diffusion.T)
        loss_u, loss_s = capped.split(sizes)
        logged = dict(loss_unlabeled=loss[:sizes[0]].mean())
        if count_s:
            logged["loss_sensitive"] = loss[sizes[0]:].mean()
        if count_s == 0:
            risk = loss_u.mean()
        elif args.algorithm == "supervised":
            risk = supervised_loss(loss_u, loss_s, share_s)
        else:
            difference = (loss_u.mean() - loss_prior * loss_s.mean()).detach()
            negative = mean_over_ranks(difference) < 0
            risk = pu_loss(loss_u, loss_s, loss_prior, args.correction, negative)
            logged |= dict(difference=difference, share_negative=negative.float())
        scaler.scale(risk / args.grad_accum).backward()
        for name, value in dict(logged, risk=risk).items():
            sums[name] = sums.get(name, 0) + value.detach() / args.grad_accum
    n_summed += 1

    lr = optimizer.param_groups[0]["lr"] = learning_rate(step)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - ema_decay(step))
    step += 1

    save_is_due = step % args.save_interval == 0 or step in (pu_start, args.max_steps)
    signal_number = watch.received(step, device)
    if step % 100 == 0 or save_is_due or signal_number:    # checked before it is saved
        row = {name: float(mean_over_ranks(total) / n_summed) for name, total in sums.items()}
        finite = math.isfinite(row["risk"]) and all(p.isfinite().all() for p in ema.parameters())
        # images of U above the cap have no gradient, so l on U would stay there
        u_lost = typical is not None and row["loss_unlabeled"] > max(3, args.limit) * typical.mean()
        if u_lost or not finite:
            raise UserError(f"training diverged at step {step}, where l on U is "
                            f"{row['loss_unlabeled']:.4g}: try a lower --lr, with --resume if "
                            f"{ckpt_path} exists")
        elapsed = time.monotonic() - start
        speed = step * args.batch_size / elapsed
        left = round(elapsed / step * (args.max_steps - step))
        text_s = f"l_S {row['loss_sensitive']:.3f}  " if "loss_sensitive" in row else ""
        say(f"step {step}/{args.max_steps}  risk {row['risk']:.3f}  "
            f"l_U {row['loss_unlabeled']:.3f}  {text_s}lr {lr:.2e}  {speed:.0f} images/s  "
            f"{left // 60}:{left % 60:02} left")
        if rank == 0:
            log.writerow(dict(row, step=step, learning_rate=lr, images_per_second=round(speed, 1),
                              seconds=round(elapsed, 1)))
        sums, n_summed = {}, 0
    if rank == 0 and save_is_due:
        save_samples()
    if rank == 0 and (save_is_due or signal_number):
        save_checkpoint()
    if signal_number:
        say(f"interrupted: step {step} is saved, --resume goes on from there")
        runtime.leave_ranks()
        sys.exit(128 + signal_number)
    if step == pu_start:
        say(f"step {step}: U is learned. From here on the PU risk subtracts S; "
            f"{before_path} shows what the network draws now")

minutes = (time.monotonic() - start) / 60
say(f"trained for {minutes:.1f} minutes; everything is in {args.out_dir}")
say("to sample from it:", shell("python", "sample.py", "--ckpt", ckpt_path))
say("to evaluate it:", shell("python", "evaluate.py", "--ckpt", ckpt_path))
runtime.leave_ranks()
