"""
Does it work? How many generated images are not sensitive, and how good are they?

    python evaluate.py --ckpt out/mnist-pu-0.5/ckpt.pt                      # samples 5,000 images
    python evaluate.py --images samples/ --dataset mnist --sensitive odd    # PNGs from anywhere
    python evaluate.py --export_real real/ --dataset mnist                  # writes test normals
    python evaluate.py --ckpt out/folder-pu-0.1/ckpt.pt                     # your own images

The judge is a small network, trained on the real labels and kept beside the data set. It measures

    non-sensitive rate   the share of images that it assigns to no sensitive class (Takahashi et al.
                         2025, section 5)
    FID                  the Frechet distance between the images and the test normals (Heusel et al.
                         2017, arXiv:1706.08500), in the judge's features. Do not compare it with
                         the FIDs of papers, which use those of Inception. The floor is the FID of
                         as many real training normals.

Your own images have no labels. There, a classifier learns to tell S, the sensitive images, from
normal_test/: how many images of each group look like S? And the Frechet distance needs no network.

The last line printed is JSON and holds all figures.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import files
import runtime
from classifier import Classifier, cross_entropy, fit, predict, score, train_classifier
from data import DATA_DIR, DATASETS, Images, digest, has_class, load, parse_classes, split
from formats import FORMATS, decode
from images import empty_png_folder, framed, save_grid, save_png, to_float
from sample import draw, open_model, sampling_flags

# -----------------------------------------------------------------------------
# the judge

JUDGE_VERSION = 1    # raise it when the judge's layers, training or seed change


def train_judge(images: torch.Tensor, labels: torch.Tensor, hflip: bool,
                device: torch.device) -> Classifier:
    """images [N, C, H, W] uint8; labels [N] class numbers, or [N, K] bool for several classes an
    image; hflip: mirror half of the images -> the judge, trained from a fixed seed"""
    torch.manual_seed(0)
    several = labels.ndim == 2
    n_classes = labels.shape[1] if several else int(labels.max()) + 1
    model = Classifier(*images.shape[1:3], n_classes)
    model = model.to(device, memory_format=torch.channels_last)
    batch_size, epochs = 128, 30
    steps = min(1500 if images.shape[1] == 1 else 6000, epochs * len(images) // batch_size)
    batches = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).split(batch_size)

    def batch_loss(step):
        x, y = to_float(images[batches[step]].to(device)), labels[batches[step]].to(device)
        if hflip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        logits, _ = model(x)
        if several:
            return F.binary_cross_entropy_with_logits(logits, y.float())
        return F.cross_entropy(logits, y)

    return train_classifier(model, batch_loss, steps, lr=4e-3)


def judge(classifier: Classifier, images: torch.Tensor, several: bool = False) -> tuple:
    """images [N, C, H, W] uint8 -> their classes, [N] numbers (several: [N, K] bool), and their
    features, [N, 128] float64, on the CPU"""
    logits, features = predict(classifier, images.split(1 + 2 ** 22 // images[0].numel()))
    return logits > 0 if several else logits.argmax(1), features.double()


def load_judge(data: Images, hflip: bool, cache: Path, device: torch.device) -> tuple:
    """-> the judge of a data set and its accuracy on the test images, from the cache. Where that is
    missing, damaged, or for another version or data, trains the judge and writes the cache."""
    key = f"{JUDGE_VERSION} {hflip} {digest(data.train)} {digest(data.train_labels)}"
    try:
        saved = files.load_verified(cache)
    except OSError:
        saved = None
    if not isinstance(saved, dict) or saved.get("key") != key:
        print(f"training a classifier to judge by; it is kept in {cache}", file=sys.stderr)
        trained = train_judge(data.train, data.train_labels, hflip, device)
        classes, _ = judge(trained, data.test, data.test_labels.ndim == 2)
        saved = {"key": key, "model": trained.cpu().state_dict(),
                 "accuracy": float((classes == data.test_labels).float().mean())}
        try:
            files.save_whole(saved, cache)
        except OSError as error:
            print(f"the next evaluation will train it again: {error}", file=sys.stderr)
    classifier = Classifier(*data.train.shape[1:3], len(saved["model"]["out.bias"]))
    classifier.load_state_dict(saved["model"])
    classifier.eval().requires_grad_(False)
    return classifier.to(device, memory_format=torch.channels_last), saved["accuracy"]


# -----------------------------------------------------------------------------
# the figures

def wilson(successes: int, n: int) -> tuple:
    """-> the 95 % interval of a probability, after `successes` in n trials (Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z ** 2 / (2 * n), z * (p * (1 - p) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    return (centre - half) / (1 + z ** 2 / n), (centre + half) / (1 + z ** 2 / n)


def frechet_distance(f: torch.Tensor, g: torch.Tensor) -> float:
    """f [N, D] and g [M, D] float64 features -> |mean f - mean g|^2 + tr(A + B - 2 (A B)^(1/2)),
    where A and B are their covariances (Heusel et al. 2017, eq. 6). Raises ValueError for fewer
    than two rows, which have no covariance."""
    if min(len(f), len(g)) < 2:
        raise ValueError(f"FID needs at least two images on either side, not {len(f)} and {len(g)}")
    A, B = f.T.cov(), g.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # A^(1/2) B A^(1/2) has the eigenvalues of A B, and is symmetric
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((f.mean(0) - g.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


def measure(classifier: Classifier, images: torch.Tensor, data: Images, sensitive: list,
            seed: int) -> tuple:
    """images [N, C, H, W] uint8 -> the figures by name, and [N] bool: is it judged sensitive?
    seed: chooses the real training normals for the floor of FID."""
    several = data.test_labels.ndim == 2
    classes, features = judge(classifier, images, several)
    counts = classes.sum(0) if several else classes.bincount(minlength=classifier.out.out_features)
    is_sensitive = has_class(classes, sensitive)
    n, n_normal = len(images), int((~is_sensitive).sum())
    low, high = wilson(n_normal, n)

    test_classes, test_features = judge(classifier, data.test, several)
    normal = ~has_class(data.test_labels, sensitive)
    wrong = (has_class(test_classes, sensitive) == normal).float()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    real = order[~has_class(data.train_labels[order], sensitive)][:n]
    _, real_features = judge(classifier, data.train[real], several)
    fid, floor = (frechet_distance(x, test_features[normal]) for x in (features, real_features))
    figures = dict(rate=n_normal / n, rate_low=low, rate_high=high, fid=fid, fid_floor=floor,
                   classes=counts.tolist(), false_alarms=float(wrong[normal].mean()),
                   misses=float(wrong[~normal].mean()))
    return figures, is_sensitive


# -----------------------------------------------------------------------------
# your own images, without labels

FOLDS = 4      # of the images
STEPS = 200    # of each training


def score_like_s(groups: dict, hflip: bool, device: torch.device) -> dict:
    """groups: images [N, C, H, W] uint8 by name -> [N] logits by name, of a classifier of
    "sensitive" against "normal_test".

    Each fold of the images is judged by a classifier that was trained on the others. It has seen
    none of them, so its errors on these two groups show its errors on other real images."""
    images = torch.cat(list(groups.values()))
    indices = torch.arange(len(images)).split([len(group) for group in groups.values()])
    parts, logits = dict(zip(groups, indices)), torch.zeros(len(images))
    torch.manual_seed(0)
    for fold in range(FOLDS):
        normal, sensitive = (parts[name][parts[name] % FOLDS != fold]
                             for name in ("normal_test", "sensitive"))
        model = fit(images, normal, sensitive, cross_entropy, hflip, STEPS, device,
                    name=f"S or normal? fold {fold + 1} of {FOLDS}")
        logits[fold::FOLDS] = score(model, images, torch.arange(fold, len(images), FOLDS))
    return {name: logits[index] for name, index in parts.items()}


def cell_features(images: torch.Tensor) -> torch.Tensor:
    """images [N, C, H, W] uint8 -> the mean and the standard deviation of each colour in each of
    4x4 cells, [N, 32 C] float64. Unlike the features of an untrained network, they tell real
    normals from a mixture with S, as well as from blurred and noisy images."""
    features = []
    for x in map(to_float, images.split(500)):
        mean, mean_square = F.adaptive_avg_pool2d(x, 4), F.adaptive_avg_pool2d(x ** 2, 4)
        deviation = (mean_square - mean ** 2).clamp(min=0).sqrt()
        features.append(torch.cat([mean, deviation], dim=1).flatten(1).double())
    return torch.cat(features)


def compare(images: torch.Tensor, data: Images, hflip: bool, seed: int,
            device: torch.device) -> tuple:
    """Compares images [N, C, H, W] uint8 with the parts of a folder, and prints a table.
    -> its rows by name, and [N]: how much is each image like S? Above 0, a classifier takes it for
    S; without normal_test/ there is none, and this is minus the distance to the nearest of S.

    The Frechet distance is to one half of normal_test/ or, without it, of U; the row of that group,
    its other half, shows the floor. It depends on how many images there are, so all rows have as
    many; smaller groups have none."""
    generator = torch.Generator().manual_seed(seed)
    u, s, normal = split("folder", data)
    u = u[torch.randperm(len(u), generator=generator)[:2 * len(images)]]
    groups = {"images": images, "unlabeled": data.train[u], "sensitive": data.train[s]}
    reference, logits = "unlabeled", {}
    if len(normal):
        reference = "normal_test"
        some = torch.randperm(len(normal), generator=generator)[:4 * len(images)]
        groups[reference] = data.test[some]
        logits = score_like_s(groups, hflip, device)
    features = {name: cell_features(group) for name, group in groups.items()}
    like_s = logits.get("images")
    if like_s is None:
        like_s = -torch.cdist(features["images"], features["sensitive"]).amin(1)
    n = min(len(images), len(groups[reference]) // 2)
    half, features[reference] = features[reference].split([n, len(groups[reference]) - n])

    column = "look like S (95 %)          " if logits else ""
    runtime.say(f"             images   {column}Frechet distance to {n:,} of {reference}/")
    rows = {}
    for name, group in groups.items():
        row = rows[name] = {"n": len(group)}
        line = f"{name:12} {len(group):6,}   "
        if logits:
            count = int((logits[name] > 0).sum())
            low, high = wilson(count, len(group))
            row |= dict(like_s=count / len(group), like_s_low=low, like_s_high=high)
            line += f"{row['like_s']:.4f} ({low:.4f} to {high:.4f})   "
        if len(features[name]) >= n:
            row["distance"] = frechet_distance(features[name][:n], half)
            line += f"{row['distance']:.3f}"
        runtime.say(line.rstrip())
    return rows, like_s


# -----------------------------------------------------------------------------
# the command

TRAINED = ["algorithm", "prior", "n_labeled", "model", "init_from", "dtype"]    # flags of train.py
REPORT = """\
judge               right on {classifier_accuracy:.2%} of the test labels; false alarms on
                    {false_alarms:.2%} of the normal images, misses {misses:.2%} of the sensitive
non-sensitive rate  {rate:.4f}, 95 % interval {rate_low:.4f} to {rate_high:.4f}, of {n:,} images
FID                 {fid:.2f} in the judge's features, not Inception's; floor {fid_floor:.2f}"""


def read_images(folder: Path, image_channels: int, image_size: int) -> torch.Tensor:
    """All PNGs of a folder, in the order of their names -> [N, C, H, W] uint8. Raises OSError for
    fewer than two, and for the first that is damaged or has another size."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".png")
    if len(paths) < 2:
        raise OSError(f"{folder} holds {len(paths)} PNGs: FID needs at least two images")
    images = []
    for path in paths:
        try:
            with Image.open(files.regular(path), formats=FORMATS) as image:
                size = image.size
            images.append(torch.from_numpy(decode(path, image_size, image_channels).copy()))
        except Exception as error:    # Pillow raises whatever its readers do
            raise OSError(f"{path} cannot be read as an image: {type(error).__name__}") from None
        if size != (image_size, image_size):
            raise OSError(f"{path} has {size[0]}x{size[1]} pixels, the data set has "
                          f"{image_size}x{image_size}: resize it, or name another --dataset or "
                          f"--image_size")
    return torch.stack(images)


def evaluate(args: argparse.Namespace):
    """The command. Raises ValueError and OSError, as runtime.exit_status expects."""
    ckpt = files.read_checkpoint(args.ckpt) if args.ckpt else None
    run = ckpt["args"] if ckpt else {}    # the flags of train.py
    name = args.dataset or run.get("dataset", "mnist")
    if name != run.get("dataset", name):
        raise ValueError(f"--dataset {name} is not what {args.ckpt} was trained on")
    info, sensitive = DATASETS[name], []
    data_dir = args.data_dir or Path(run.get("data_dir", DATA_DIR))
    if name != "folder":
        if not args.data_dir and not data_dir.exists():    # it was on the machine that trained
            data_dir = DATA_DIR
        sensitive = parse_classes(name, args.sensitive or run.get("sensitive"))
    out_dir = args.out_dir or (args.ckpt.parent if ckpt else Path())
    out_dir.mkdir(parents=True, exist_ok=True)
    device = runtime.find_device(args.device)
    with runtime.first_rank_first():
        data = load(name, data_dir, args.image_size or run.get("image_size"),
                    args.channels or run.get("channels"))
    channels, size = data.train.shape[1:3]

    # the images
    if args.export_real:
        normal = data.test[~has_class(data.test_labels, sensitive)]
        if len(normal) == 0:
            raise ValueError(f"{data_dir / 'normal_test'} holds no images to export")
        empty_png_folder(args.export_real, "--export_real")
        for i, image in enumerate(normal):
            save_png(image, args.export_real / f"{i:05d}.png", sync=False)
        runtime.say(f"{len(normal)} real test normals: {args.export_real}")
        return
    if name == "folder":
        _, s, normal = split(name, data, args.sensitive)
        if 0 < len(normal) and min(len(s), len(normal)) < FOLDS:
            raise ValueError(f"S has {len(s)} images and normal_test/ {len(normal)}: both need at "
                             f"least {FOLDS} (without normal_test/, less is measured)")
    if ckpt:
        model, diffusion = open_model(ckpt, device)
        if (model.config.image_channels, model.config.image_size) != (channels, size):
            raise ValueError(f"{args.ckpt} draws other images than --image_size and --channels say")
        images = draw(args, model, diffusion)
    else:
        images = read_images(args.images, channels, size)
    rank, world = runtime.ranks()
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return

    # the figures
    trained = {key: run.get(key) for key in TRAINED}
    if ckpt:
        trained |= dict(loss_prior=ckpt["loss_prior"], train_seed=run.get("seed"),
                        train_steps=ckpt["step"], train_seconds=ckpt["seconds"],
                        sampler=args.sampler, steps=args.steps, sampling_dtype=args.dtype)
    figures = dict(dataset=name, sensitive=sensitive, **trained, n=len(images), seed=args.seed)
    if name == "folder":
        figures["groups"], like_s = compare(images, data, run.get("hflip", info["hflip"]),
                                           args.seed, device)
        order = like_s.argsort(descending=True)
        images, is_sensitive = images[order], like_s[order] > 0
        caption = "up to 100 images, those most like S first"
        if len(data.test):
            caption += ", those that look like S framed in red"
    else:
        cache = data_dir / name / f"classifier_{size}x{channels}.pt"
        classifier, accuracy = load_judge(data, info["hflip"], cache, device)
        measured, is_sensitive = measure(classifier, images, data, sensitive, args.seed)
        figures |= dict(**measured, classifier_accuracy=accuracy)
        runtime.say(REPORT.format(**figures))
        for i, count in enumerate(figures["classes"]):
            bar = "#" * round(40 * count / max(1, *figures["classes"]))
            mark = "sensitive" if i in sensitive else ""
            if count or data.test_labels.ndim == 1:    # of attributes of faces, those that occur
                runtime.say(f"{info['classes'][i]:>20} {mark:9} {count:6d} {bar}")
        caption = "up to 100 images, those judged sensitive framed in red"
    runtime.say(f"{out_dir / 'evaluation.png'}: {caption}")
    runtime.say(json.dumps(figures))    # before anything fails
    save_grid(framed(images[:100], is_sensitive[:100]), out_dir / "evaluation.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python evaluate.py (--ckpt CKPT | --images FOLDER | --export_real FOLDER) [...]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", type=Path, help="judge samples of this checkpoint of train.py")
    what.add_argument("--images", type=Path, help="judge the PNGs in this folder")
    what.add_argument("--export_real", type=Path, help="only write the test normals to this folder")
    parser.add_argument("--dataset", choices=DATASETS, help="(default: the checkpoint's, or mnist)")
    parser.add_argument("--data_dir", type=Path, help="folder of mnist/, or of unlabeled/")
    parser.add_argument("--image_size", type=runtime.positive,
                        help="for celeba and folder (default: the checkpoint's)")
    parser.add_argument("--channels", type=int, choices=[1, 3], help="for celeba and folder")
    parser.add_argument("--sensitive", help="classes or groups (default: the checkpoint's)")
    parser.add_argument("--out_dir", type=Path, help="for evaluation.png (default: beside --ckpt)")
    sampling_flags(parser, n=5000)
    args = parser.parse_args()
    with runtime.exit_status(parser):
        evaluate(args)


if __name__ == "__main__":
    main()
