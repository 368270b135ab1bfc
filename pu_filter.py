"""
Which images of U are probably sensitive? A positive-unlabeled classifier, which train.py trains first and asks.

    python pu_filter.py --dataset mnist --prior 0.5            # out/filter-mnist-0.5/scores.pt, a picture, and what is to be expected
    python train.py --prior 0.5                             # the same first, then the PU risk on what is kept: fewer to push away
    python train.py --prior 0.5 --scores out/filter-mnist-0.5/scores.pt --algorithm unsupervised    # the rival: no PU risk

The classifier is trained without a labeled normal image, by the non-negative risk of Kiryo et al. 2017 (arXiv:1703.00593).
Both classes weigh the same in it, for a rare one would be ignored (Su et al., Positive-Unlabeled Learning from
Imbalanced Data, IJCAI 2021). Twice more it is trained from scratch, then as any classifier, on S and on what it was
surest of in U: with few labels, that is where most of what it knows comes from (self-training, Scudder 1965).

U and S are each cut into four parts; the network that scores one part is trained on the other three. So it has seen none
of the images that it scores, and what it does to those of S it does to the sensitive ones of U:

    E_U[kept l] = prior E_S[kept l] + (1 - prior) E_N[kept l]        where kept(x) is 1 or 0, by the score of x

The PU risk on the images that are kept, of U and of S, is therefore as exact as on all, with the prior P_S(kept) / P_U(kept)
times what it was: what the classifier misses is counted, not forgotten. And it is far less noisy, for to know E_N[l] from
E_U[l] - prior E_S[l] takes ((1 + prior) / (1 - prior))^2 times as many images as from N itself: nine times as many at 0.5.
Where fewer images of S are kept than a step takes, train.py leaves the PU risk out: of so few it learns nothing but them.
"""
import argparse
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DATASETS, Images, data_flags, digest, has_class, load, parse_classes, split
from images import save_grids
from runtime import find_device, positive, ranks

PARTS, ROUNDS = 4, 3    # of U and S; of training for each part
STEPS = 500    # of a round
SURE = 0.8    # share of the normal and of the sensitive images of U whose labels the next round trusts


class Classifier(nn.Sequential):
    """x [B, C, H, W] in [-1, 1] -> logits of "sensitive" [B, 1]. Convolutions, each halving the resolution down to 3x3 or so;
    the first by a stride, for full resolution costs most and tells little; images above 64x64 are averaged down to that."""

    def __init__(self, image_channels: int, image_size: int):
        width, size = 32, min(image_size, 64) // 2
        layers = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        while size > 4:
            c, width, size = width, min(2 * width, 128), size // 2
            layers += [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * size ** 2, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, x):
        return super().forward(F.interpolate(x, (64, 64), mode="area") if x.shape[-1] > 64 else x)


def nnpu_loss(z_u: torch.Tensor, z_s: torch.Tensor, prior: float) -> torch.Tensor:
    """The non-negative PU risk of a classifier (Kiryo et al. 2017, eq. 6 and algorithm 1), both classes weighted one half.
    z_u [B_u], z_s [B_s]: logits of "sensitive" for images of U and of S; prior in (0, 1). -> scalar"""
    sensitive = torch.sigmoid(-z_s).mean()
    normal = (torch.sigmoid(z_u).mean() - prior * torch.sigmoid(z_s).mean()) / (1 - prior)
    return 0.5 * torch.where(normal < 0, -normal, sensitive + normal)


def sure_loss(z_n: torch.Tensor, z_s: torch.Tensor) -> torch.Tensor:
    """Cross-entropy. z_n [B_n], z_s [B_s]: logits of "sensitive" for images that count as normal and as sensitive. -> scalar"""
    return 0.5 * (F.softplus(z_n).mean() + F.softplus(-z_s).mean())


def distort(x: torch.Tensor, hflip: bool) -> torch.Tensor:
    """x [B, C, H, W] in [-1, 1] -> each image turned, scaled, slanted and shifted a little at random; black around it."""
    turn, scale, slant, across, down = (torch.rand(5, len(x), device=x.device) * 2 - 1) * torch.tensor([[0.3], [0.15], [0.2], [0.15], [0.15]], device=x.device)
    mirror = torch.where(torch.rand(len(x), device=x.device) < 0.5 * hflip, -1, 1)
    rows = [[mirror * (1 + scale) * turn.cos(), slant - turn.sin(), across], [turn.sin(), (1 + scale) * turn.cos(), down]]
    matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)                     # [B, 2, 3]
    return F.grid_sample(x + 1, F.affine_grid(matrices, x.shape, align_corners=False), align_corners=False) - 1


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def fit(images: torch.Tensor, n: torch.Tensor, s: torch.Tensor, loss_of, hflip: bool, steps: int, device: torch.device,
        turn: int) -> Classifier:
    """images [N, C, H, W] uint8; n, s: which of them to tell apart, by loss_of(z_n, z_s) of their logits; turn: of PARTS
    ROUNDS trainings, the how-manieth -> a network with one logit, in eval mode"""
    model = Classifier(*images.shape[1:3]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start, batch_size = time.time(), 64    # of each
    for step in range(1, steps + 1):
        index = torch.cat([index[torch.randint(len(index), (batch_size,))] for index in (n, s)])
        z = model(distort(to_float(images[index], device), hflip))[:, 0]
        loss = loss_of(*z.split(batch_size))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            left = (time.time() - start) / step * (steps * (PARTS * ROUNDS - turn) - step)
            print(f"\rclassifier {turn + 1} of {PARTS * ROUNDS}: {max(0, left):.0f} seconds left  ", end="", file=sys.stderr, flush=True)
    return model.eval()


@torch.no_grad()
def logits(model: Classifier, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """-> [len(index)] float32, on the CPU"""
    device = next(model.parameters()).device
    return torch.cat([model(to_float(images[i], device))[:, 0].cpu() for i in index.split(500)])


def cross_scores(data: Images, u: torch.Tensor, s: torch.Tensor, prior: float, hflip: bool, steps: int, device: torch.device) -> tuple:
    """-> for each image of U and of S the logit of "sensitive", by a classifier that was trained on the other parts of both."""
    z_u, z_s = torch.zeros(len(u)), torch.zeros(len(s))
    part_u, part_s = torch.randperm(len(u)) % PARTS, torch.randperm(len(s)) % PARTS
    for part in range(PARTS):
        u_fit, s_fit = u[part_u != part], s[part_s != part]
        n_normal, n_sensitive = (max(1, round(SURE * share * len(u_fit))) for share in [1 - prior, prior])
        for turn in range(part * ROUNDS, (part + 1) * ROUNDS):
            if turn == part * ROUNDS:
                model = fit(data.train, u_fit, s_fit, partial(nnpu_loss, prior=prior), hflip, steps, device, turn)
            else:
                ranked = u_fit[logits(model, data.train, u_fit).argsort()]
                model = fit(data.train, ranked[:n_normal], torch.cat([s_fit, ranked[-n_sensitive:]]), sure_loss, hflip, steps, device, turn)
        for z, index, parts in [(z_u, u, part_u), (z_s, s, part_s)]:
            z[parts == part] = logits(model, data.train, index[parts == part])
    print(file=sys.stderr)
    return z_u, z_s


def write_scores(path: Path, data: Images, u: torch.Tensor, s: torch.Tensor, prior: float, hflip: bool, seed: int,
                 device: torch.device, steps: int = None) -> tuple:
    """cross_scores of u and s, which also go to a file that read_scores reads; torch's generators stay as they are.
    Raises ValueError for fewer than 4 images of either, OSError where the file cannot be written or training diverged."""
    if min(len(u), len(s)) < PARTS:
        raise ValueError(f"U has {len(u)} images and S {len(s)}: the classifiers need at least {PARTS} of each (train.py --scores none does without)")
    try:    # better to fail now than after the training
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(f"--out_dir {path.parent} cannot be written: {e}") from None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        z_u, z_s = cross_scores(data, u, s, prior, hflip, steps or STEPS, device)
    if not (z_u.sum() + z_s.sum()).isfinite():
        raise OSError("the classifier diverged: its scores are not finite")
    try:
        torch.save(dict(u=u, s=s, z_u=z_u, z_s=z_s, images=digest(data.train), told=(prior, seed)), f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except RuntimeError as e:    # a full disk, to torch.save
        raise OSError(f"{path} cannot be written: {str(e).splitlines()[0]}") from None
    return z_u, z_s


def read_scores(path: Path, data: Images, u: torch.Tensor, s: torch.Tensor, keep: float, told: tuple = None) -> tuple:
    """What write_scores wrote -> those of u that are kept, the fraction `keep` of the lowest scores, and those of s that score no
    higher. told: the prior and the seed that it must have been given, if that matters. Raises OSError for a file that is missing or
    something else, ValueError where it is for other images or was told otherwise."""
    try:
        scores = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--scores {path} does not exist: pu_filter.py writes it") from None
    except Exception:    # torch.load raises whatever its readers do
        scores = None
    if not isinstance(scores, dict) or not {"u", "s", "z_u", "z_s", "images"} <= scores.keys():
        raise OSError(f"--scores {path} is not what pu_filter.py writes, or is damaged")
    if not torch.equal(scores["u"], u) or not torch.equal(scores["s"], s) or scores["images"] != digest(data.train):
        raise ValueError(f"--scores {path} is for other images: say what U and S are, and --seed, as when it was made, or delete it")
    if told and scores.get("told", told) != told:
        raise ValueError("{} was made for a prior of {:.4g} and --seed {}: delete it, or say --scores {} to use it".format(path, *scores["told"], path))
    z_u, z_s = scores["z_u"], scores["z_s"]
    threshold = z_u.kthvalue(math.ceil(keep * len(u))).values
    return u[z_u <= threshold], s[z_s <= threshold]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python pu_filter.py [--flag value ...]")
    flag = parser.add_argument
    data_flags(parser)
    flag("--steps", type=positive, default=STEPS, help=f"of each of {PARTS * ROUNDS} trainings (default: {STEPS})")
    flag("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    flag("--out_dir", type=Path, help="where scores.pt and dropped.png go (default: out/filter-DATASET-PRIOR)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\npu_filter.py: interrupted"))
    args.out_dir = args.out_dir or Path("out") / f"filter-{args.dataset}-{args.prior:.4g}"
    try:
        device = find_device(args.device)
        if ranks()[1] > 1:
            parser.error("pu_filter.py is one process, not for torchrun")
        if (args.out_dir / "scores.pt").exists():
            parser.error(f"--out_dir {args.out_dir} already holds scores, which a run may be using: name another folder")
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
        u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled, args.n_labeled, args.seed)
        z_u, z_s = write_scores(args.out_dir / "scores.pt", data, u, s, args.prior, DATASETS[args.dataset]["hflip"], args.seed, device, args.steps)
        order = z_u.argsort()
        n_kept = min(max(1, round((1 - args.prior) * len(u))), len(u) - 1)
        dropped, kept = (u[some[torch.randperm(len(some))[:64]]] for some in [order[n_kept:], order[:n_kept]])
        save_grids([data.train[dropped], data.train[kept]], args.out_dir / "dropped.png")
    except ValueError as e:
        parser.error(e)
    except OSError as e:
        sys.exit(f"pu_filter.py: error: {e}")

    labeled = args.dataset != "folder"    # then we can look, as nobody could in practice
    if labeled:
        chosen = parse_classes(args.dataset, args.sensitive or DATASETS[args.dataset]["sensitive"])
        is_sensitive = has_class(data.train_labels[u], chosen)
    print("--keep   sensitive among the kept, by S" + "   and by the labels   normal ones kept" * labeled)
    for keep in [share * (1 - args.prior) for share in [1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5]]:
        kept = order[:max(1, round(keep * len(u)))]
        missed = float((z_s <= z_u[kept[-1]]).float().mean())
        line = f"{keep:6.3f}   {args.prior * missed / keep:31.4f}"
        if labeled:
            line += f"   {float(is_sensitive[kept].float().mean()):17.4f}   {float((~is_sensitive[kept]).sum() / (~is_sensitive).sum()):16.4f}"
        print(line)
    print(f"{args.out_dir / 'dropped.png'}: on the left what --keep {1 - args.prior:.3g} would drop, on the right what it would keep")
    print(f"to use it: python train.py --scores {args.out_dir / 'scores.pt'} and the flags that say what U and S are")


if __name__ == "__main__":
    main()
