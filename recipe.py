"""
The recipe of a training run: its flags, and what stands for those that are not given.
"""
import argparse
import math
from collections import ChainMap
from pathlib import Path

from data import DATASETS, data_flags
from runtime import (
    count,
    decay,
    device_flags,
    fraction,
    positive,
    positive_float,
    positive_or_inf,
    read_newest,
    say,
    step_or_share,
)
from unet import PRESETS

# by network: tiny, and all others
TINY = dict(schedule="lognormal", prediction="v", lr=2e-3, warmup_steps=200, max_steps=4000,
            limit=3.0)
LARGER = dict(schedule="linear", prediction="eps", lr=1e-4, warmup_steps=500, max_steps=20000,
              limit=3.0)
# the paper's, section 5; steps follow from epochs
PAPER = dict(model="paper", schedule="linear", prediction="eps", lr=1e-4, warmup_steps=500,
             max_steps=None, epochs=100, pu_start=0, limit=math.inf)
FINE_TUNING = dict(model=None, lr=1e-4, warmup_steps=500, max_steps=None, epochs=20, pu_start=0)

MAY_CHANGE = {"lr", "device", "compile", "grad_accum", "log_interval", "sample_interval",
              "max_steps", "data_dir", "out_dir", "resume"}    # on --resume

MAX_PASSES = 60    # over S


def train_flags(description: str) -> argparse.ArgumentParser:
    """-> the parser of train.py."""
    parser = argparse.ArgumentParser(
        description=description, usage="python train.py [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    data_flags(parser)
    add = parser.add_argument
    add("--hflip", action=argparse.BooleanOptionalAction,
        help="mirror half of the images (default: photographs only)")

    add = parser.add_argument_group("what is minimised").add_argument
    add("--algorithm", default="pu", choices=["pu", "supervised", "unsupervised", "oracle"],
        help="the PU risk, or a baseline (default: pu)")
    add("--recipe", choices=["paper"], help="network, schedule, optimizer, epochs of the paper")
    add("--pu_start", type=step_or_share,
        help="step, or share of the steps, where the PU risk begins (default: 1/2, or later if S "
             "is small; 0 with --recipe and --init_from)")
    add("--correction", default="abs", choices=["abs", "nn", "none"],
        help="of a negative estimate of the normal loss (default: abs)")
    add("--limit", type=positive_or_inf,
        help="l counts up to this multiple of what is typical of U (default: 3)")
    add("--loss_prior", type=fraction, help="a wrong prior, to study (default: --prior)")
    add("--scores", type=Path, help="of pu_filter.py: leave out what scores high")
    add("--keep", type=fraction,
        help="with --scores: the fraction of U to keep (default: 0.9 (1 - prior))")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(PRESETS), help="network (default: the data set's)")
    add("--init_from", help="ckpt.pt, a diffusers folder, or a name on the hub")
    add("--schedule", choices=["linear", "cosine", "lognormal"],
        help="noise schedule (default: the model's)")
    add("--prediction", choices=["eps", "v"],
        help="what the network predicts (default: the model's)")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=positive, help="images a step, of U and S together")
    add("--grad_accum", type=positive, default=1,
        help="micro-batches a step, to save memory (default: 1)")
    add("--max_steps", type=positive, help="optimizer steps (default: the model's)")
    add("--lr", type=positive_float, help="peak learning rate (default: the model's)")
    add("--warmup_steps", type=count, help="steps of linear warm-up")
    add("--grad_clip", type=positive_or_inf, default=1.0, help="largest gradient norm (default: 1)")
    add("--ema_decay", type=decay, default=0.999,
        help="of the average of the weights, which is sampled from (default: 0.999)")

    group = parser.add_argument_group("running")
    device_flags(group)
    add = group.add_argument
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the loss (default: on cuda only)")
    add("--log_interval", type=positive, default=100, help="steps (default: 100)")
    add("--sample_interval", type=positive, default=500,
        help="steps between two sample grids and checkpoints (default: 500)")
    add("--out_dir", type=Path, help="(default: out/DATASET-ALGORITHM-PRIOR)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out_dir")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple:
    """-> the flags, and the checkpoint to resume from, or None: the last one in --out_dir, or where
    that is damaged the one before. Raises OSError where both are, ValueError for flags that
    contradict each other, or the run that is resumed."""
    args = parser.parse_args()
    if args.out_dir is None:
        kind = [name for name in ["recipe", "init_from", "scores"] if getattr(args, name)]
        words = [args.dataset, args.algorithm, f"{args.prior:.4g}", *kind]
        args.out_dir = Path("out", "-".join(words))
    paths = [args.out_dir / name for name in ["ckpt.pt", "ckpt_prev.pt"]]
    exists = any(path.exists() for path in paths)
    ckpt = None
    if args.resume and exists:
        ckpt = read_newest(*paths)
        parser.set_defaults(**ckpt["args"])    # the run's own flags, unless given again
        args = parser.parse_args(namespace=argparse.Namespace(out_dir=args.out_dir))
        for name, value in ckpt["args"].items():
            if name not in MAY_CHANGE and str(getattr(args, name)) != str(value):
                raise ValueError(f"--{name} cannot change on --resume: the run has {value}")
    elif args.resume:
        say(f"{paths[0]} does not exist yet: a new run begins")
    elif exists:
        raise ValueError(f"--out_dir {args.out_dir} already holds a run: add --resume to go on "
                         f"with it, or name another folder")
    if args.keep and not args.scores:
        raise ValueError("--keep needs --scores")
    if args.init_from and args.model:
        raise ValueError(f"--model {args.model} cannot go with --init_from, which brings its own")
    if args.algorithm == "oracle" and (args.scores or args.dataset == "folder"):
        raise ValueError("--algorithm oracle needs the labels of U: it goes with neither a folder "
                         "nor --scores")
    return args, ckpt


def fill_in(args: argparse.Namespace, known: dict):
    """Gives a value to the flags that have none, and to args.epochs.
    known: what a model to start from determines; it must not contradict the flags (ValueError)."""
    for name, value in known.items():
        if getattr(args, name) not in (None, value):
            raise ValueError(f"--{name} {getattr(args, name)} is not what {args.init_from} was "
                             f"trained with, {value}")
    sources = ChainMap(known, FINE_TUNING if args.init_from else {}, PAPER if args.recipe else {},
                       DATASETS[args.dataset])
    network = args.model or sources["model"]
    args.epochs = None
    for name, value in ChainMap(sources, TINY if network == "tiny" else LARGER).items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
    args.loss_prior = args.loss_prior or args.prior


def first_pu_step(args: argparse.Namespace, n_unlabeled: int, passes: float) -> int:
    """How long to train, and where the PU risk begins: sets args.max_steps where it follows from
    epochs, passes over U -> the number of steps before the PU risk.

    passes: the passes over S that a step makes. By default the PU risk has half of the steps, or
        as many as pass MAX_PASSES times over S; more, and S is learned by heart.
    Raises ValueError where no step would be left for it."""
    if args.max_steps is None:
        args.max_steps = math.ceil(args.epochs * n_unlabeled / args.batch_size)
    if args.algorithm != "pu":
        return 0
    if args.pu_start is None:
        return args.max_steps - max(1, min(args.max_steps // 2, int(MAX_PASSES / passes)))
    pu_start = args.pu_start
    if pu_start < 1:    # a share
        pu_start *= args.max_steps
    pu_start = round(pu_start)
    if pu_start >= args.max_steps:
        raise ValueError(f"--pu_start {args.pu_start:g} leaves no step for the PU risk: "
                         f"--max_steps is {args.max_steps}")
    return pu_start


def learning_rate(args: argparse.Namespace, step: int, pu_start: int) -> float:
    """Linear warm-up, constant while U is learned, then a cosine down to 0. The warm-up takes at
    most a quarter of the run."""
    warmup_steps = min(args.warmup_steps, args.max_steps // 4)
    warmup = min(1, (step + 1) / (warmup_steps + 1))
    start = max(pu_start, warmup_steps)    # of the cosine
    progress = max(0, step - start) / max(1, args.max_steps - start)
    return warmup * args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def averaging(args: argparse.Namespace, step: int, pu_start: int) -> float:
    """The decay of the moving average of the weights. It soon forgets random weights, and reaches
    back over half of its part of the run at most; otherwise a short second part, or a short
    fine-tuning, would sample from the model that it began with."""
    part = pu_start if step < pu_start else args.max_steps - pu_start
    slow = min(args.ema_decay, max(0, 1 - 2 / part))
    if args.init_from:
        return slow
    return min(slow, (1 + step) / (10 + step))
