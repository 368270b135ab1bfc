"""
Which images of U are probably sensitive? A positive-unlabeled classifier: a rival of the PU diffusion model, or its ally.

    python filter.py --dataset mnist --prior 0.5            # scores U and S: out/filter-mnist-0.5/scores.pt, and what it would drop
    S="--prior 0.5 --scores out/filter-mnist-0.5/scores.pt"
    python train.py $S --keep 0.45 --algorithm unsupervised # the rival: drop what scores high, then train as usual
    python train.py $S                                      # the ally: images count by their score, and the PU risk sees to the rest

The classifier is trained without a labeled normal image, by the non-negative risk of Kiryo et al. 2017 (arXiv:1703.00593).
Both classes weigh the same in it, for a rare one would be ignored (Su et al., Positive-Unlabeled Learning from
Imbalanced Data, IJCAI 2021). U and S are each cut into two halves; the network that scores one half is trained on the
other. So it has seen none of the images that it scores, and what it does to those of S it does to the sensitive ones of U:

    E_U[w l] = prior E_S[w l] + (1 - prior) E_N[w l]        for any weight w(x) between 0 and 1, such as "kept or not".

The PU risk on weighted images is therefore as exact as without them, with prior E_S[w] / E_U[w] in the place of prior: what
the classifier misses is counted, not forgotten. The less there is of it, the less noise is in the difference of the means.
"""
import argparse
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data import DATASETS, Images, data_flags, digest, has_class, load, parse_classes, positive, save_grids, split
from evaluate import Classifier
from unet import find_device, ranks


def nnpu_loss(z_u: torch.Tensor, z_s: torch.Tensor, prior: float) -> torch.Tensor:
    """The non-negative PU risk of a classifier (Kiryo et al. 2017, eq. 6 and algorithm 1), both classes weighted one half.
    z_u [B_u], z_s [B_s]: logits of "sensitive" for images of U and of S; prior in (0, 1). -> scalar"""
    sensitive = torch.sigmoid(-z_s).mean()
    normal = (torch.sigmoid(z_u).mean() - prior * torch.sigmoid(z_s).mean()) / (1 - prior)
    return 0.5 * torch.where(normal < 0, -normal, sensitive + normal)


def distort(x: torch.Tensor, hflip: bool) -> torch.Tensor:
    """x [B, C, H, W] in [-1, 1] -> each image turned, scaled, slanted and shifted a little at random; black around it."""
    turn, scale, slant, across, down = (torch.rand(5, len(x), device=x.device) * 2 - 1) * torch.tensor([[0.3], [0.15], [0.2], [0.15], [0.15]], device=x.device)
    mirror = torch.where(torch.rand(len(x), device=x.device) < 0.5 * hflip, -1, 1)
    rows = [[mirror * (1 + scale) * turn.cos(), slant - turn.sin(), across], [turn.sin(), (1 + scale) * turn.cos(), down]]
    matrices = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)                     # [B, 2, 3]
    return F.grid_sample(x + 1, F.affine_grid(matrices, x.shape, align_corners=False), align_corners=False) - 1


def to_float(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def fit(images: torch.Tensor, u: torch.Tensor, s: torch.Tensor, prior: float, hflip: bool, steps: int,
        device: torch.device, name: str) -> Classifier:
    """images [N, C, H, W] uint8; u, s: which of them are unlabeled and which labeled sensitive -> a network with one logit."""
    model = Classifier(*images.shape[1:3], n_classes=1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start, n_u, n_s = time.time(), 128, 64
    for step in range(1, steps + 1):
        index = torch.cat([index[torch.randint(len(index), (n,))] for index, n in [(u, n_u), (s, n_s)]])
        z = model(distort(to_float(images[index], device), hflip))[0][:, 0]
        loss = nnpu_loss(z[:n_u], z[n_u:], prior)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            left = (time.time() - start) / step * (steps - step)
            print(f"\r{name}: step {step}/{steps}, {left:.0f} seconds left ", end="" if step < steps else "\n", file=sys.stderr, flush=True)
    return model.eval()


@torch.no_grad()
def logits(model: Classifier, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """-> [len(index)] float32, on the CPU"""
    device = next(model.parameters()).device
    return torch.cat([model(to_float(images[i], device))[0][:, 0].cpu() for i in index.split(500)])


def cross_scores(data: Images, u: torch.Tensor, s: torch.Tensor, prior: float, hflip: bool, steps: int, device: torch.device) -> tuple:
    """-> for each image of U and of S the logit of "sensitive", by a classifier that was trained on the other half of both."""
    z_u, z_s = torch.zeros(len(u)), torch.zeros(len(s))
    orders = [torch.randperm(len(index)) for index in (u, s)]
    for half in [0, 1]:
        (u_fit, u_score), (s_fit, s_score) = ((order[1 - half::2], order[half::2]) for order in orders)
        model = fit(data.train, u[u_fit], s[s_fit], prior, hflip, steps, device, f"classifier {half + 1} of 2")
        z_u[u_score], z_s[s_score] = logits(model, data.train, u[u_score]), logits(model, data.train, s[s_score])
    return z_u, z_s


def read_weights(path: Path, data: Images, u: torch.Tensor, s: torch.Tensor, keep: float = None) -> tuple:
    """What main wrote -> how probable each image of U, and of S, is to be drawn, float32: 1 for the fraction `keep` of U of the
    lowest scores and for what scores no higher in S, 0 for the others; without keep, the probability of being normal.
    Raises OSError for a file that is missing or something else, ValueError where it is for other images."""
    try:
        scores = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--scores {path} does not exist: filter.py writes it") from None
    except Exception:    # torch.load raises whatever its readers do
        scores = None
    if not isinstance(scores, dict) or not {"u", "s", "z_u", "z_s", "images"} <= scores.keys():
        raise OSError(f"--scores {path} is not what filter.py writes, or is damaged")
    if not torch.equal(scores["u"], u) or not torch.equal(scores["s"], s) or scores["images"] != digest(data.train):
        raise ValueError(f"--scores {path} is for other images: say what U and S are, and --seed, as filter.py was told")
    z_u, z_s = scores["z_u"], scores["z_s"]
    if not keep:
        return torch.sigmoid(-z_u), torch.sigmoid(-z_s)
    threshold = z_u.kthvalue(math.ceil(keep * len(u))).values
    return (z_u <= threshold).float(), (z_s <= threshold).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python filter.py [--flag value ...]")
    flag = parser.add_argument
    data_flags(parser)
    flag("--steps", type=positive, default=500, help="of training, for each of two classifiers (default: 500)")
    flag("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    flag("--out_dir", type=Path, help="where scores.pt and dropped.png go (default: out/filter-DATASET-PRIOR)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\nfilter.py: interrupted"))
    args.out_dir = args.out_dir or Path("out") / f"filter-{args.dataset}-{args.prior:.4g}"
    try:
        device = find_device(args.device)
        if ranks()[1] > 1:
            parser.error("filter.py is one process, not for torchrun")
        if (args.out_dir / "scores.pt").exists():
            parser.error(f"--out_dir {args.out_dir} already holds scores, which a run may be using: name another folder")
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
        u, s, _ = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled, args.n_labeled, args.seed)
        if min(len(u), len(s)) < 4:
            parser.error(f"U has {len(u)} images and S {len(s)}: the two classifiers need at least 4 of each")
        args.out_dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        z_u, z_s = cross_scores(data, u, s, args.prior, DATASETS[args.dataset]["hflip"], args.steps, device)
        if not (z_u.sum() + z_s.sum()).isfinite():
            raise OSError("the classifier diverged: its scores are not finite")
        order = z_u.argsort()
        n_kept = min(max(1, round((1 - args.prior) * len(u))), len(u) - 1)
        dropped, kept = (u[some[torch.randperm(len(some))[:64]]] for some in [order[n_kept:], order[:n_kept]])
        save_grids([data.train[dropped], data.train[kept]], args.out_dir / "dropped.png")
        torch.save(dict(u=u, s=s, z_u=z_u, z_s=z_s, images=digest(data.train)), args.out_dir / "scores.tmp")
        (args.out_dir / "scores.tmp").rename(args.out_dir / "scores.pt")
    except ValueError as e:
        parser.error(e)
    except (OSError, RuntimeError) as e:    # RuntimeError: a full disk, to torch.save
        sys.exit(f"filter.py: error: {str(e).splitlines()[0]}")

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
