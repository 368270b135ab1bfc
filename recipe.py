"""
The recipe of a training run: its flags, their defaults, and what follows from them.
"""
import argparse
import math
from collections import ChainMap
from pathlib import Path

from data import DATASETS, data_flags, known_prior
from files import read_newest
from runtime import (
    absolute,
    absolute_or_name,
    below_one,
    count,
    device_flags,
    fraction,
    positive,
    positive_float,
    positive_or_inf,
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
             max_steps=None, epochs=100, pu_start=0.0, limit=math.inf)
FINE_TUNING = dict(model=None, lr=1e-4, warmup_steps=500, max_steps=None, epochs=20, pu_start=0.0)

MAY_CHANGE = {"lr", "device", "compile", "grad_accum", "log_interval", "sample_interval",
              "max_steps", "data_dir", "scores", "out_dir", "resume"}    # on --resume

MAX_PASSES = 60    # over S: more, and it is learned by heart


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
        help="l is capped at this multiple of its mean on U (default: 3; unused where a new "
             "network begins with the PU risk)")
    add("--loss_prior", type=fraction, help="use another prior in the risk (default: --prior)")
    add("--scores", type=absolute, help="of pu_filter.py: leave out what scores high")
    add("--keep", type=fraction,
        help="with --scores: the fraction of U to keep (default: 0.9 (1 - loss_prior))")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=PRESETS, help="network (default: the data set's)")
    add("--init_from", type=absolute_or_name,
        help="ckpt.pt, a diffusers folder, or a name on the hub")
    add("--schedule", choices=["linear", "cosine", "lognormal"],
        help="noise schedule (default: the model's)")
    add("--prediction", choices=["eps", "v"],
        help="what the network predicts (default: the model's)")

    add = parser.add_argument_group("optimization").add_argument
    add("--batch_size", type=positive, help="images a step, of U and S together")
    add("--grad_accum", type=positive, default=1,
        help="micro-batches a step, to save memory (default: 1)")
    add("--max_steps", type=positive,
        help="optimizer steps (default: the model's; by epochs with --recipe and --init_from)")
    add("--lr", type=positive_float, help="peak learning rate (default: the model's)")
    add("--warmup_steps", type=count, help="steps of linear warm-up")
    add("--grad_clip", type=positive_or_inf, default=1.0, help="largest gradient norm (default: 1)")
    add("--ema_decay", type=below_one, default=0.999,
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
    """-> the flags; and with --resume the newest checkpoint in --out_dir that can be read, or None
    where there is none yet. Raises OSError where none can be read, ValueError for flags that
    contradict each other, or the run that is resumed."""
    args = parser.parse_args()
    if args.out_dir is None:
        words = [args.dataset, args.algorithm, f"{known_prior(args.dataset, args.prior):.4g}"]
        words += [name for name in ["recipe", "init_from", "scores"] if getattr(args, name)]
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
    args.prior = known_prior(args.dataset, args.prior)
    return args, ckpt


def fill_in(args: argparse.Namespace, known: dict):
    """Gives a value to the flags that have none, and sets args.epochs, which is None or asks for
    epochs |U| / batch_size steps.
    known: what a model to start from determines. Raises ValueError where a flag contradicts it."""
    for name, value in known.items():
        if getattr(args, name) not in (None, value):
            raise ValueError(f"--{name} {getattr(args, name)} is not what {args.init_from} was "
                             f"trained with, {value}")
    # the first that has a value wins
    sources = ChainMap(known, FINE_TUNING if args.init_from else {}, PAPER if args.recipe else {},
                       DATASETS[args.dataset])
    network = args.model or sources["model"]
    sources.maps.append(TINY if network == "tiny" else LARGER)
    args.epochs = sources.get("epochs")
    for name, value in vars(args).items():
        if value is None:
            setattr(args, name, sources.get(name))
    args.loss_prior = args.loss_prior or args.prior


def plain(args: argparse.Namespace) -> dict:
    """-> the flags as numbers and strings, for a checkpoint."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()}


# -----------------------------------------------------------------------------
# what a step takes

def batch_composition(algorithm: str, batch_size: int, prior: float, n_unlabeled: int,
                      n_labeled: int, micro_batches: int = 1) -> tuple:
    """How many images of U and of S a step takes -> n_u, n_s.

    "pu": the variance of E_U[l] - prior E_S[l] is smallest where the share of S is
    prior / (1 + prior). It is rounded up to sixteenths of the batch, which ranks and micro-batches
    can share. If S has at least a sixteenth, n_s is at most |S|, so that a small S lasts longer.
    "supervised": S has its share of all images. Other algorithms do not see S.
    At most half of a batch is S, for each of its images is paired with one of U.
    Raises ValueError for a prior of 1 or more, and where the batch is too small, or its images
    cannot be divided evenly among the micro-batches of all ranks."""
    n_s = 0
    if algorithm == "pu":
        if prior >= 1:
            raise ValueError(f"--scores leave a prior of {prior:.3g}: they, or --prior, are wrong")
        sixteenth = max(1, batch_size // 16)
        best = math.ceil(prior / (1 + prior) * batch_size / sixteenth)
        n_s = sixteenth * max(1, min(best, n_labeled // sixteenth))
    elif algorithm == "supervised":
        n_s = max(1, round(n_labeled / (n_unlabeled + n_labeled) * batch_size))
    n_s = min(n_s, batch_size // 2)
    if n_s == 0 and algorithm in ("pu", "supervised"):
        raise ValueError(f"--batch_size {batch_size} leaves no room for images of U and of S")
    for n in [batch_size, n_s]:
        if n % micro_batches:
            raise ValueError(f"{n} images cannot be divided evenly among {micro_batches} "
                             f"micro-batches: choose another --batch_size or --grad_accum")
    return batch_size - n_s, n_s


ORDINARY = "the ordinary diffusion loss, E_U[l]"


def formula(algorithm: str, prior: float, share_s: float, correction: str) -> str:
    """What an algorithm minimises. prior, correction: of pu_loss; share_s: of supervised_loss."""
    sensitive = "E_S[-log(1 - exp(-l))]"
    if algorithm == "pu":
        difference = f"E_U[l] - {prior:.4g} E_S[l]"
        corrected = {"abs": f"|{difference}|", "nn": f"max(0, {difference})", "none": difference}
        return f"the PU risk, {prior:.4g} {sensitive} + {corrected[correction]}"
    if algorithm == "supervised":
        return f"the supervised risk, {1 - share_s:.4g} E_U[l] + {share_s:.4g} {sensitive}"
    return ORDINARY


def in_words(args: argparse.Namespace, n_u: int, n_s: int, pu_start: int, loss_prior: float,
             share_s: float, s_passes_per_step: float) -> list:
    """-> what each part of a run minimises, a line each"""
    lines = []
    if pu_start:
        lines.append(f"steps 1 to {pu_start} minimise {ORDINARY}, on "
                     f"{args.batch_size} images of U a step")
    and_s = f" and {n_s} of S" if n_s else ""
    lines.append(f"steps {pu_start + 1} to {args.max_steps} minimise "
                 f"{formula(args.algorithm, loss_prior, share_s, args.correction)}, on {n_u} "
                 f"images of U{and_s} a step")
    passes = (args.max_steps - pu_start) * s_passes_per_step
    if args.algorithm == "pu" and not args.recipe and passes > MAX_PASSES:
        lines.append(f"S is small: its images come {passes:.0f} times each, and are learned by "
                     f"heart. Raise --pu_start if the samples suffer, or sort U by pu_filter.py "
                     f"and use --scores")
    return lines


# -----------------------------------------------------------------------------
# what changes with the steps

def steps_before_pu(args: argparse.Namespace, s_passes_per_step: float) -> int:
    """How many steps minimise E_U[l], before the PU risk begins. By default the risk has half of
    the steps, but at most MAX_PASSES passes over S."""
    if args.algorithm != "pu":
        return 0
    if args.pu_start is None:
        most = int(MAX_PASSES / s_passes_per_step)
        return args.max_steps - max(1, min(args.max_steps // 2, most))
    if args.pu_start < 1:    # a share
        return round(args.pu_start * args.max_steps)
    return int(args.pu_start)


def learning_rate(args: argparse.Namespace, step: int, pu_start: int) -> float:
    """step in [0, max_steps) -> (0, lr]. Linear warm-up over a quarter of the run at most, constant
    while U is learned, then a cosine down to 0. Without a first part, as for all baselines, the
    cosine begins after the warm-up."""
    warmup_steps = min(args.warmup_steps, args.max_steps // 4)
    warmup = min(1, (step + 1) / (warmup_steps + 1))
    start = max(pu_start, warmup_steps)    # of the cosine
    progress = max(0, step - start) / max(1, args.max_steps - start)
    return warmup * args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def averaging(args: argparse.Namespace, step: int, pu_start: int) -> float:
    """The decay of the moving average of the weights. The average spans at most half of the current
    part of the run; otherwise a short second part, or a short fine-tuning, would sample from the
    model that it began with. The average soon forgets random weights."""
    part = pu_start if step < pu_start else args.max_steps - pu_start
    slow = min(args.ema_decay, max(0, 1 - 2 / part))
    if args.init_from:
        return slow
    return min(slow, (1 + step) / (10 + step))
