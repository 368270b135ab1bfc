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
network has seen none of these images, so it keeps the same fraction of S as of the sensitive images
in U:

    E_U[kept l] = prior E_S[kept l] + (1 - prior) E_N[kept l]        kept(x) is 1 or 0

So the PU risk on the kept images is exact, with a prior of prior * P_S(kept) / P_U(kept), if S is
like the sensitive images in U.
"""
from functools import partial
from pathlib import Path

import torch

import runtime
from classifier import balanced_loss, fit, sensitive_logits
from data import check_data_flags, data_flags, digest, has_class, load, parse_classes, split
from images import grid, save_png, side_by_side
from runtime import UserError, say, shell, user_path

FOLDS = 4    # of U and S
ROUNDS = 3    # networks for each fold, one after another
TRUSTED = 0.8    # share of U's normal, and of its sensitive images, that a later round trusts


def nnpu_loss(z_u: torch.Tensor, z_s: torch.Tensor, prior: float) -> torch.Tensor:
    """The non-negative PU risk (Kiryo et al. 2017, eq. 6 and algorithm 1), equal class weights.
    z_u [B_u], z_s [B_s]: logits of "sensitive" on U and S; prior in (0, 1). -> scalar"""
    sensitive = torch.sigmoid(-z_s).mean()
    normal = (torch.sigmoid(z_u).mean() - prior * torch.sigmoid(z_s).mean()) / (1 - prior)
    return 0.5 * torch.where(normal < 0, -normal, sensitive + normal)


def cross_fit(images: torch.Tensor, parts: list, train) -> list:
    """Scores each fold of images by a network that was trained on the other folds.
    images [N, C, H, W] uint8; parts: vectors of indices in it; train(others, name): trains on a
    list of such vectors, the parts without a fold -> the network; name: for the progress
    -> for each part, its logits of "sensitive", float32 on the CPU"""
    folds = [torch.randperm(len(part)) % FOLDS for part in parts]
    logits = [torch.zeros(len(part)) for part in parts]
    for fold in range(FOLDS):
        others = [part[fold_of != fold] for part, fold_of in zip(parts, folds)]
        network = train(others, f"fold {fold + 1} of {FOLDS}")
        for part, fold_of, z in zip(parts, folds, logits):
            z[fold_of == fold] = sensitive_logits(network, images, part[fold_of == fold])
    return logits


def train_filter(images: torch.Tensor, prior: float, hflip: bool, steps: int, device: torch.device,
                 others: list, name: str):
    """Trains the network of a fold, in several rounds of `steps` steps -> the last round's.
    images [N, C, H, W] uint8; others: the indices of U and of S in it, without the fold"""
    u, s = others
    fit_fold = partial(fit, images, hflip=hflip, steps=steps, device=device, name=name)
    n_normal, n_sensitive = (max(1, round(TRUSTED * p * len(u))) for p in (1 - prior, prior))
    network = fit_fold(u, s, partial(nnpu_loss, prior=prior))
    for _ in range(ROUNDS - 1):
        ranked = u[sensitive_logits(network, images, u).argsort()]    # most normal first
        certain_s = torch.cat([s, ranked[-n_sensitive:]])
        network = fit_fold(ranked[:n_normal], certain_s, balanced_loss)
    return network


def print_table(args, z_u: torch.Tensor, z_s: torch.Tensor, labels_u: torch.Tensor):
    """Prints what --keep does: the sensitive fraction of the kept images, estimated by S, and where
    U has labels, the true fraction and the fraction of normal images that are kept."""
    order, has_labels = z_u.argsort(), args.dataset != "folder"
    if has_labels:
        normal = (~has_class(labels_u, parse_classes(args.dataset, args.sensitive))).float()
    for share in (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5):
        keep = share * (1 - args.prior)
        kept = order[:max(1, round(keep * len(z_u)))]
        passed = (z_s <= z_u[kept[-1]]).float().mean()
        row = {"--keep": keep, "sensitive, by S": args.prior * passed / keep}
        if has_labels:
            row["sensitive, by labels"] = 1 - normal[kept].mean()
            row["normal images kept"] = normal[kept].sum() / normal.sum()
        if share == 1:
            say("   ".join(row))
        say("   ".join(f"{value:{len(name)}.4f}" for name, value in row.items()))


def main():
    parser = runtime.make_parser(__doc__, "python pu_filter.py [--flag value ...]")
    data_flags(parser)
    parser.add_argument("--steps", type=int, default=500, help="of each network (default: 500)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    parser.add_argument("--out_dir", type=user_path, help="(default: out/filter-DATASET-PRIOR)")
    args = parser.parse_args()
    check_data_flags(args)
    runtime.require_positive(args, "steps")
    out_dir = args.out_dir or Path("out", f"filter-{args.dataset}-{args.prior:.4g}")
    path, picture = out_dir / "scores.pt", out_dir / "dropped.png"
    if path.exists():
        raise UserError(f"--out_dir {out_dir} already holds scores: name another folder")
    device = runtime.find_device(args.device)
    data = load(args.dataset, args.data_dir, args.image_size)
    u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled,
                    args.n_labeled, args.seed, args.labeled)
    if min(len(u), len(s)) < FOLDS:
        raise UserError(f"U has {len(u)} images and S {len(s)}: they need at least {FOLDS}")
    runtime.check_writable(out_dir)    # fails now, not after the work
    say(f"{args.dataset}: U has {len(u):,} images, S has {len(s):,}"
        f"{'; images are mirrored at random' if args.hflip else ''}")

    torch.manual_seed(args.seed)
    train = partial(train_filter, data.train, args.prior, args.hflip, args.steps, device)
    z_u, z_s = cross_fit(data.train, [u, s], train)
    if not (z_u.sum() + z_s.sum()).isfinite():
        raise UserError("the classifier diverged: its scores are not finite. Try another --seed")
    runtime.save_whole(dict(u=u, s=s, z_u=z_u, z_s=z_s, digest=digest(data.train)), path)
    print_table(args, z_u, z_s, data.train_labels[u])
    order = z_u.argsort()
    n_kept = min(max(1, round((1 - args.prior) * len(u))), len(u) - 1)
    sides = [u[order[n_kept:]], u[order[:n_kept]]]    # dropped, kept
    shown = [data.train[side[torch.randperm(len(side))[:64]]] for side in sides]
    save_png(side_by_side([grid(images) for images in shown]), picture)
    say(f"{picture}: what --keep {1 - args.prior:.3g} drops, and what it keeps")
    command = shell("python", "train.py", "--algorithm", "unsupervised", "--scores", path)
    say(f"to use it: {command}, with the same data flags")


if __name__ == "__main__":
    main()
