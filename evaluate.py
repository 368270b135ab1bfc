"""
Does it work? How many of the generated images are not sensitive, and how good they are.

    python evaluate.py --ckpt out/mnist-pu-0.5/ckpt.pt                          # samples 5,000 images and judges them
    python evaluate.py --images samples/ --dataset mnist --sensitive odd        # judges PNGs made by anything
    python evaluate.py --export_real real/ --dataset mnist --sensitive odd      # the test normals as PNGs, for any FID tool

The judge is a small convolutional network trained on the real labels, which a data set to experiment with has:

    non-sensitive rate   the share of images that it does not take for a sensitive class (Takahashi et al. 2025, section 5)
    FID                  Frechet distance (Heusel et al. 2017, arXiv:1706.08500) between the images and the test normals, in
                         the judge's penultimate features: not Inception's, so not comparable with FIDs of other papers.
                         As many real training normals give its floor.

The judge is kept beside the data set. The last line printed is JSON, with all figures.
"""
import argparse
import hashlib
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from data import DATA_DIR, DATASETS, FITS, has_class, load, parse_classes
from formats import decode
from images import empty_png_folder, framed, save_grid, save_png
from runtime import find_device, first_rank_first, positive, ranks, read_checkpoint
from sample import draw, open_model, sampling_flags

# -----------------------------------------------------------------------------
# the judge


class Classifier(nn.Module):
    """A convolution a resolution, halved down to 3x3 or so, then 128 features; images above 64x64 are averaged down to that.
    BatchNorm gives each feature a variance near 1 before its ReLU, so that FID does not depend on how large the network
    happens to make them."""

    def __init__(self, image_channels: int, image_size: int, n_classes: int):
        super().__init__()
        layers, c, width, size = [], image_channels, 32, min(image_size, 64)
        while size > 4:
            layers += [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            c, width, size = width, min(2 * width, 128), size // 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(c * size ** 2, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.out = nn.Linear(128, n_classes)

    def forward(self, x):
        """x [B, C, H, W] in [-1, 1] -> logits [B, K], features [B, 128]"""
        features = self.features(F.interpolate(x, (64, 64), mode="area") if x.shape[-1] > 64 else x)
        return self.out(features), features


def train_classifier(images: torch.Tensor, labels: torch.Tensor, hflip: bool, device: torch.device) -> Classifier:
    """images [N, C, H, W] uint8; labels [N] class numbers, or [N, K] bool where an image has several; hflip: mirror half
    of the images. -> the trained network, in eval mode. Seeds torch's generators."""
    torch.manual_seed(0)
    several = labels.ndim == 2
    model = Classifier(*images.shape[1:3], labels.shape[1] if several else int(labels.max()) + 1)
    model = model.to(device, memory_format=torch.channels_last).train()
    batch_size, epochs = 128, 30
    steps = min(1500 if images.shape[1] == 1 else 6000, epochs * len(images) // batch_size)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])[:steps * batch_size]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    start = time.time()
    for step, index in enumerate(order.split(batch_size), start=1):
        x, y = images[index].to(device).float() / 127.5 - 1, labels[index].to(device)
        if hflip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        logits, _ = model(x)
        loss = F.binary_cross_entropy_with_logits(logits, y.float()) if several else F.cross_entropy(logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            left = (time.time() - start) / step * (steps - step)
            print(f"\rclassifier: step {step}/{steps}, {left:.0f} seconds left ", end="" if step < steps else "\n", file=sys.stderr, flush=True)
    return model.eval().requires_grad_(False)


def look(classifier: Classifier, images: torch.Tensor, several: bool = False) -> tuple:
    """images [N, C, H, W] uint8 -> what the classifier takes them for, [N] class numbers (several: [N, K] bool), and
    their features [N, 128] in float64, both on the CPU."""
    device, verdicts, features = next(classifier.parameters()).device, [], []
    with torch.no_grad():
        for batch in images.split(1 + 2 ** 22 // images[0].numel()):
            logits, feature = classifier(batch.to(device).float() / 127.5 - 1)
            verdicts.append((logits > 0 if several else logits.argmax(1)).cpu())
            features.append(feature.cpu().double())
    return torch.cat(verdicts), torch.cat(features)


def cache_key(data, hflip: bool) -> str:
    """Changes when the classifier's code or the images and labels that it is trained on do."""
    key = hashlib.sha256(f"{inspect.getsource(Classifier)}{inspect.getsource(train_classifier)}{hflip}".encode())
    for array in [data.train_labels, data.train[::1 + data.train.numel() // FITS]]:    # of the very large, a part
        key.update(f"{array.shape}".encode() + array.numpy().tobytes())
    return key.hexdigest()


def load_classifier(data, hflip: bool, cache: Path, device: torch.device) -> tuple:
    """-> the classifier for this data set, and its accuracy on the test images. From the cache, if that was trained by
    this very code on this very data; otherwise it is trained, which takes minutes, and kept there."""
    key, several = cache_key(data, hflip), data.train_labels.ndim == 2
    try:
        kept = torch.load(cache, map_location="cpu", weights_only=True)
        if kept["key"] != key:
            raise ValueError("trained by other code or on other data")
        classifier = Classifier(*data.train.shape[1:3], len(kept["model"]["out.bias"])).eval().requires_grad_(False)
        classifier.load_state_dict(kept["model"])
        return classifier.to(device, memory_format=torch.channels_last), kept["accuracy"]
    except Exception:    # nothing there, damaged, or for something else
        print(f"training a classifier to judge by; it is kept in {cache}", file=sys.stderr)
    classifier = train_classifier(data.train, data.train_labels, hflip, device)
    accuracy = float((look(classifier, data.test, several)[0] == data.test_labels).float().mean())
    part = cache.with_suffix(f".{os.getpid()}.tmp")
    try:
        torch.save(dict(key=key, model=classifier.cpu().state_dict(), accuracy=accuracy), part)
        os.replace(part, cache)
    except (OSError, RuntimeError) as e:
        print(f"{cache} cannot be written, so it will be trained again next time: {e}", file=sys.stderr)
    finally:
        part.unlink(missing_ok=True)
    return classifier.to(device), accuracy


# -----------------------------------------------------------------------------
# the figures


def wilson(successes: int, n: int) -> tuple:
    """-> the 95 % interval of a share of which `successes` of `n` were seen (Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z ** 2 / (2 * n), z * (p * (1 - p) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    return (centre - half) / (1 + z ** 2 / n), (centre + half) / (1 + z ** 2 / n)


def frechet_distance(f: torch.Tensor, g: torch.Tensor) -> float:
    """f [N, D] and g [M, D] float64 features -> |mean f - mean g|^2 + tr(A + B - 2 (A B)^(1/2)), A and B their
    covariances (Heusel et al. 2017, eq. 6). Raises ValueError for fewer than two rows, which have no covariance."""
    if min(len(f), len(g)) < 2:
        raise ValueError(f"FID needs at least two images on either side, not {len(f)} and {len(g)}")
    A, B = f.T.cov(), g.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()    # A^1/2 B A^1/2 has the eigenvalues of A B
    return float((f.mean(0) - g.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def read_images(folder: Path, image_channels: int, image_size: int) -> torch.Tensor:
    """All PNGs of a folder, in the order of their names -> [N, C, H, W] uint8. Raises OSError for a folder without any,
    and naming the first that cannot be read or has another size."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".png")
    if not paths:
        raise FileNotFoundError(f"{folder} holds no PNGs: sample.py --out_dir writes some")
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                width, height = image.size
            images.append(torch.from_numpy(decode(path, image_size, image_channels).copy()))
        except Exception as e:    # Pillow raises whatever its readers do
            raise OSError(f"{path} cannot be read as an image ({type(e).__name__}): remove or replace it") from None
        if (width, height) != (image_size, image_size):
            raise OSError(f"{path} has {width}x{height} pixels, the data set has {image_size}x{image_size}: "
                          f"give the --dataset (celeba: and --image_size) that the images are like, or resize them")
    return torch.stack(images)


# -----------------------------------------------------------------------------
# the command


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python evaluate.py (--ckpt CKPT | --images FOLDER | --export_real FOLDER) [--flag value ...]")
    flag = parser.add_argument
    flag("--ckpt", type=Path, help="the ckpt.pt that train.py wrote; its averaged weights are sampled from")
    flag("--images", type=Path, help="judge the PNGs in this folder instead")
    flag("--export_real", type=Path, help="folder to write the real test normals to, as PNGs, for any FID tool")
    flag("--dataset", choices=[name for name in DATASETS if name != "folder"], help="(default: the checkpoint's, or mnist)")
    flag("--data_dir", type=Path, default=DATA_DIR, help="folder that holds mnist/ and the others (default: data/ beside this file)")
    flag("--image_size", type=positive, help="pixels, for celeba (default: the checkpoint's, or 256)")
    flag("--channels", type=int, choices=[1, 3], help="grey or colour, for celeba (default: the checkpoint's, or 3)")
    flag("--sensitive", help="classes or groups, with commas (default: the checkpoint's, or the data set's)")
    flag("--out_dir", type=Path, help="where evaluation.png goes, the first 100 images, sensitive ones framed "
                                      "(default: the checkpoint's folder, or the current one)")
    sampling_flags(parser, n=5000)
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit("\nevaluate.py: interrupted"))
    if args.ckpt and args.images or not (args.ckpt or args.images or args.export_real):
        parser.error("give --ckpt or --images (one of them), or --export_real")
    if args.n < 2:
        parser.error("--n must be at least 2: FID needs a covariance")

    # what was trained, and the data set
    try:
        ckpt = read_checkpoint(args.ckpt) if args.ckpt else {}
        if args.export_real:
            empty_png_folder(args.export_real, "--export_real")    # before the ranks meet, so that none has written yet
        device = find_device(args.device)
        rank, world = ranks()
        run = ckpt.get("args", {})
        if args.ckpt:
            model, diffusion = open_model(ckpt, args, device)
            if args.dataset not in (None, run["dataset"]):
                parser.error(f"--dataset {args.dataset} is not what {args.ckpt} was trained on, {run['dataset']}")
            if run["dataset"] == "folder":
                parser.error("a folder has no labels to judge by: use sample.py --out_dir and an FID tool")
        name = args.dataset or run.get("dataset", "mnist")
        info = DATASETS[name]
        sensitive = parse_classes(name, args.sensitive or run.get("sensitive") or info["sensitive"])
        args.out_dir = args.out_dir or (args.ckpt.parent if args.ckpt else Path())
        args.out_dir.mkdir(parents=True, exist_ok=True)
        with first_rank_first():
            data = load(name, args.data_dir, args.image_size or run.get("image_size"), args.channels or run.get("channels"))
        normal = ~has_class(data.test_labels, sensitive)
        if normal.sum() < 2:
            parser.error(f"--sensitive {args.sensitive} leaves fewer than two normal test images to compare with")
        shape = data.train.shape[1:]
        if args.images:
            images = read_images(args.images, shape[0], shape[1])
            if len(images) < 2:
                raise OSError(f"{args.images} holds one PNG: FID needs at least two images")
        if args.export_real and rank == 0:
            for i, image in enumerate(data.test[normal]):
                save_png(image, args.export_real / f"{i:05d}.png")
            print(f"{int(normal.sum())} real test normals: {args.export_real}")
    except ValueError as e:
        parser.error(e)
    except OSError as e:
        sys.exit(f"evaluate.py: error: {e}")

    # the images, which all ranks draw, and the verdict, which the first gives
    if args.ckpt:
        images = draw(args, model, diffusion)
    if world > 1:
        dist.destroy_process_group()
    if rank or not (args.ckpt or args.images):
        return
    classifier, accuracy = load_classifier(data, info["hflip"], args.data_dir / name / f"classifier_{shape[1]}x{shape[0]}.pt", device)
    several, n = data.test_labels.ndim == 2, len(images)
    verdicts, features = look(classifier, images, several)
    test_verdicts, test_features = look(classifier, data.test, several)
    shuffled = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(args.seed))
    real = shuffled[~has_class(data.train_labels[shuffled], sensitive)][:n]
    _, real_features = look(classifier, data.train[real], several)
    is_sensitive, test_is_sensitive = has_class(verdicts, sensitive), has_class(test_verdicts, sensitive)
    fid, floor = (frechet_distance(x, test_features[normal]) for x in (features, real_features))
    n_normal = int((~is_sensitive).sum())
    rate, (low, high) = n_normal / n, wilson(n_normal, n)
    false_alarms, misses = float(test_is_sensitive[normal].float().mean()), float((~test_is_sensitive[~normal]).float().mean())
    counts = (verdicts.sum(0) if several else verdicts.bincount(minlength=len(info["classes"]))).tolist()

    print(f"judged by a classifier that is right on {accuracy:.2%} of {name}'s test {'labels' if several else 'images'}, takes {false_alarms:.2%} of the normal ones "
          f"for sensitive and {misses:.2%} of the sensitive ones for normal: no rate is known better than that")
    print(f"non-sensitive rate  {rate:.4f}, 95 % interval {low:.4f} to {high:.4f}, of {n:,} images")
    print(f"FID                 {fid:.2f} in {name}-classifier features, not Inception; floor {floor:.2f}, of {len(real):,} real training normals")
    widest = max(counts) or 1
    for i, count in enumerate(counts):
        if not several or count:
            print(f"{info['classes'][i]:>20} {count:6d} {'#' * round(40 * count / widest)}{' sensitive' if i in sensitive else ''}")
    try:
        save_grid(framed(images[:100], is_sensitive[:100]), args.out_dir / "evaluation.png")
        print(f"{args.out_dir / 'evaluation.png'}: the first {min(n, 100)}, those judged sensitive framed in red")
    except OSError as e:
        sys.exit(f"evaluate.py: error: {e}")
    trained = {key: run.get(key) for key in ["algorithm", "prior", "n_labeled", "model", "init_from", "dtype"]}
    trained |= {"loss_prior": ckpt.get("loss_prior", run.get("loss_prior")), "train_seed": run.get("seed"),
                "train_steps": ckpt.get("step"), "train_seconds": ckpt.get("seconds")} if run else {}
    print(json.dumps(dict(dataset=name, sensitive=sensitive, **trained, n=n, sampler=args.sampler if run else None,
                          steps=args.steps if run else None, seed=args.seed, rate=rate, rate_low=low, rate_high=high, fid=fid,
                          fid_floor=floor, classes=counts, classifier_accuracy=accuracy, false_alarms=false_alarms, misses=misses)))


if __name__ == "__main__":
    main()
