"""
Which images of U are probably sensitive? A positive-unlabeled (PU) classifier scores them.

    python pu_filter.py --prior 0.5        # writes out/filter-mnist-0.5/scores.pt and a picture
    python train.py --prior 0.5 --algorithm unsupervised --scores out/filter-mnist-0.5/scores.pt

The filter is optional, and not part of the default method, which trains on all of U and S. It is
that method's rival: sort U first, then train on what is kept (--algorithm unsupervised).

The classifier needs no labeled normal image. It minimises the non-negative PU risk of Kiryo et al.
2017 (arXiv:1703.00593), with equal weights for both classes (Su et al., IJCAI 2021), or it would
ignore a rare one. Then it is trained from scratch twice more, on S and on the images of U that it
was most certain of (self-training, Scudder 1965). That helps most where labels are few.

U and S are cut into four folds, and each is scored by a network trained on the other three. That
has seen none of these images, so it keeps the same fraction of S as of the sensitive images in U:

    E_U[kept l] = prior E_S[kept l] + (1 - prior) E_N[kept l]        kept(x) is 1 or 0

So the PU risk on the kept images is exact, with a prior of prior * P_S(kept) / P_U(kept).
"""
import argparse
import math
from functools import partial
from pathlib import Path

import torch

from classifier import cross_entropy, fit, score
from data import (
    DATASETS,
    Images,
    data_flags,
    digest,
    has_class,
    known_prior,
    load,
    parse_classes,
    split,
)
from files import load_verified, save_whole
from images import save_grids
from runtime import exit_status, find_device, positive, ranks, say

FOLDS, ROUNDS = 4, 3    # of U and S; trainings for each fold
TRUSTED = 0.8    # fraction of U's normal, and of its sensitive images that a later round trusts


def nnpu_loss(z_u: torch.Tensor, z_s: torch.Tensor, prior: float) -> torch.Tensor:
    """The non-negative PU risk (Kiryo et al. 2017, eq. 6 and algorithm 1), equal class weights.
    z_u [B_u], z_s [B_s]: logits of "sensitive" on U and S; prior in (0, 1). -> scalar"""
    sensitive = torch.sigmoid(-z_s).mean()
    normal = (torch.sigmoid(z_u).mean() - prior * torch.sigmoid(z_s).mean()) / (1 - prior)
    return 0.5 * torch.where(normal < 0, -normal, sensitive + normal)


def cross_scores(images: torch.Tensor, u: torch.Tensor, s: torch.Tensor, prior: float, hflip: bool,
                 steps: int, device: torch.device) -> tuple:
    """images [N, C, H, W] uint8; u, s: indices of U and S in it; steps: of each training
    -> the logits of "sensitive" of U and of S, by networks trained on the other folds.
    Raises OSError where the training diverged."""
    z_u, z_s = torch.zeros(len(u)), torch.zeros(len(s))
    fold_u, fold_s = torch.randperm(len(u)) % FOLDS, torch.randperm(len(s)) % FOLDS
    for fold in range(FOLDS):
        train_u, train_s = u[fold_u != fold], s[fold_s != fold]
        n_normal, n_sensitive = (max(1, round(TRUSTED * share * len(train_u)))
                                 for share in (1 - prior, prior))
        name = f"fold {fold + 1} of {FOLDS}"
        train = partial(fit, images, hflip=hflip, steps=steps, device=device, name=name)
        model = train(train_u, train_s, partial(nnpu_loss, prior=prior))
        for _ in range(ROUNDS - 1):
            ranked = train_u[score(model, images, train_u).argsort()]
            certain_s = torch.cat([train_s, ranked[-n_sensitive:]])
            model = train(ranked[:n_normal], certain_s, cross_entropy)
        z_u[fold_u == fold] = score(model, images, u[fold_u == fold])
        z_s[fold_s == fold] = score(model, images, s[fold_s == fold])
    if not (z_u.sum() + z_s.sum()).isfinite():
        raise OSError("the classifier diverged: its scores are not finite")
    return z_u, z_s


def read_scores(path: Path, data: Images, u: torch.Tensor, s: torch.Tensor, keep: float) -> tuple:
    """-> the fraction `keep` of u that scores lowest, and those of s that score no higher.
    Raises OSError for a file that pu_filter.py did not write, ValueError for other images."""
    kind = "what pu_filter.py writes"
    try:
        scores = load_verified(path, kind)
        z_u, z_s, images = (scores[name] for name in ["z_u", "z_s", "images"])
        matches = z_u.shape == scores["u"].shape and z_s.shape == scores["s"].shape
    except FileNotFoundError:
        raise FileNotFoundError(f"--scores {path} does not exist: pu_filter.py writes it") from None
    except (AttributeError, LookupError, TypeError):
        matches = False
    if not matches:
        raise OSError(f"--scores {path} is not {kind}, or is damaged")
    same = torch.equal(scores["u"], u) and torch.equal(scores["s"], s)
    if not same or images != digest(data.train):
        raise ValueError(f"--scores {path} is for other images: use the same data flags and --seed")
    threshold = z_u.kthvalue(math.ceil(keep * len(u))).values
    return u[z_u <= threshold], s[z_s <= threshold]


# -----------------------------------------------------------------------------
# the command

def print_table(args: argparse.Namespace, z_u: torch.Tensor, z_s: torch.Tensor, labels_u):
    """Prints what --keep does: the sensitive fraction of the kept images, estimated by S, and where
    U has labels, the true fraction and the fraction of normal images that are kept."""
    head = " --keep   sensitive, by S"
    if args.dataset != "folder":
        head += "   sensitive, by labels   normal images kept"
        normal = (~has_class(labels_u, parse_classes(args.dataset, args.sensitive))).float()
    say(head)
    order = z_u.argsort()
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        keep = share * (1 - args.prior)
        kept = order[:max(1, round(keep * len(z_u)))]
        passed = (z_s <= z_u[kept[-1]]).float().mean()
        line = f"{keep:7.3f}   {args.prior * passed / keep:15.4f}"
        if args.dataset != "folder":
            line += f"   {1 - normal[kept].mean():20.4f}"
            line += f"   {normal[kept].sum() / normal.sum():18.4f}"
        say(line)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python pu_filter.py [--flag value ...]")
    data_flags(parser)
    parser.add_argument("--steps", type=positive, default=500, help="a training (default: 500)")
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    parser.add_argument("--out_dir", type=Path, help="(default: out/filter-DATASET-PRIOR)")
    args = parser.parse_args()
    with exit_status(parser):
        args.prior = known_prior(args.dataset, args.prior)
        out_dir = args.out_dir or Path("out") / f"filter-{args.dataset}-{args.prior:.4g}"
        path = out_dir / "scores.pt"
        device = find_device(args.device)
        if ranks()[1] > 1:
            raise ValueError("pu_filter.py is one process, not for torchrun")
        if path.exists():
            raise ValueError(f"--out_dir {out_dir} already holds scores: name another folder")
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
        u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled,
                        args.n_labeled, args.seed)
        if min(len(u), len(s)) < FOLDS:
            raise ValueError(f"U has {len(u)} images and S {len(s)}: they need at least {FOLDS}")
        out_dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        hflip = DATASETS[args.dataset]["hflip"]
        z_u, z_s = cross_scores(data.train, u, s, args.prior, hflip, args.steps, device)
        scores = {"u": u, "s": s, "z_u": z_u, "z_s": z_s, "images": digest(data.train)}
        save_whole(scores, path)
        print_table(args, z_u, z_s, data.train_labels[u])

        order = z_u.argsort()
        n_kept = min(max(1, round((1 - args.prior) * len(u))), len(u) - 1)
        halves = [u[order[n_kept:]], u[order[:n_kept]]]
        some = [half[torch.randperm(len(half))[:64]] for half in halves]
        save_grids([data.train[index] for index in some], out_dir / "dropped.png")
    say(f"{out_dir / 'dropped.png'}: what --keep {1 - args.prior:.3g} drops, and what it keeps")
    say(f"to use it: python train.py --algorithm unsupervised --scores {path}, with the "
        f"same data flags")


if __name__ == "__main__":
    main()
