"""
Does it work? How many generated images are not sensitive, and how good are they?

    python evaluate.py --ckpt out/mnist-pu-0.5/ckpt.pt                      # samples 5,000 images
    python evaluate.py --images samples/ --dataset mnist --sensitive odd    # images from anywhere
    python evaluate.py --export_real real/ --dataset mnist                  # the normal test images
    python evaluate.py --ckpt out/folder-pu-0.1-tiny/ckpt.pt                # your own images

The judge is a small network, trained on the real labels (of CelebA: sensitive or not) and kept
beside the data set. It measures

    rate    the non-sensitive rate: the fraction of images without a sensitive class (Takahashi et
            al. 2025, section 5), with its 95 % interval from rate_low to rate_high
    fid     the Frechet distance of its features between the images and the normal test images
            (Heusel et al. 2017, arXiv:1706.08500). Do not compare it with the FIDs of papers, which
            use the features of Inception. fid_floor is that of as many normal training images
            (of all, if there are fewer).

and its own errors: false_alarms on normal test images, and misses of sensitive ones.
Your own images have no labels. There, a classifier learns to tell S, the sensitive images, from
normal_test/: how many images of each group look like S? The Frechet distance is that of means and
deviations of colours, without a network.
evaluation.png shows up to 100 images, with red frames around those that look sensitive; your own
are sorted, those most like S first. The last line printed is JSON and holds all figures.
"""
import json
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from PIL import Image

import runtime
from classifier import Classifier, balanced_loss, fit, predict, train_classifier
from data import DATA_DIR, DATASETS, Images, digest, has_class, load, parse_classes, split
from formats import FORMATS, decode, image_files
from images import framed, grid, save_png, to_float
from pretrained import load_checkpoint
from pu_filter import FOLDS, cross_fit
from runtime import UserError, make_parser, say, user_path
from sample import draw, make_png_folder, sampling_flags

JUDGE_VERSION = 1    # raise it when the judge's layers, training or seed change


def with_interval(name: str, successes: int, n: int) -> dict:
    """-> the share of successes in n trials, and the ends of its 95 % interval (Wilson 1927)."""
    z, p = 1.959964, successes / n
    centre, half = p + z ** 2 / (2 * n), z * (p * (1 - p) / n + z ** 2 / (4 * n ** 2)) ** 0.5
    low, high = (end / (1 + z ** 2 / n) for end in (centre - half, centre + half))
    return {name: p, f"{name}_low": low, f"{name}_high": high}


def frechet_distance(f: torch.Tensor, g: torch.Tensor) -> float:
    """f [N, D] and g [M, D] float64 features -> |mean f - mean g|^2 + tr(A + B - 2 (A B)^(1/2)),
    where A and B are their covariances (Heusel et al. 2017, eq. 6). N and M are at least 2."""
    A, B = f.T.cov(), g.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # A^(1/2) B A^(1/2) has the eigenvalues of A B, and is symmetric
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return float((f.mean(0) - g.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross)


# -----------------------------------------------------------------------------
# published data sets, with labels and a judge

def load_judge(data: Images, hflip: bool, cache: Path, device: torch.device) -> tuple:
    """-> the judge of a data set and its accuracy on the test images, from the cache. Where that is
    missing, damaged, or for another version or data, trains the judge, and writes the cache.
    hflip: mirror half of the images"""
    images, labels = data.train, data.train_labels
    torch.manual_seed(0)
    judge = Classifier(*images.shape[1:3], n_outputs=int(labels.max()) + 1)
    judge = judge.to(device, memory_format=torch.channels_last)
    key = f"{JUDGE_VERSION} {hflip} {digest(images)} {digest(labels)}"
    with suppress(UserError):
        saved = runtime.load_verified(cache, "a judge")
        if saved.get("key") == key:
            judge.load_state_dict(saved["model"])
            return judge.eval(), saved["accuracy"]

    runtime.warn(f"training the judge; {cache} keeps it, if it can be written")
    batch_size, epochs = 128, 30
    steps = min(1500 if images.shape[1] == 1 else 6000, epochs * len(images) // batch_size)
    batches = torch.cat([torch.randperm(len(images)) for _ in range(epochs)]).split(batch_size)

    def batch_loss(step):
        x, y = to_float(images[batches[step]].to(device)), labels[batches[step]].to(device)
        if hflip:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)
        return F.cross_entropy(judge(x)[0], y)

    train_classifier(judge, batch_loss, steps, lr=4e-3, name="judge")
    classes, _ = classes_and_features(judge, data.test)
    accuracy = float((classes == data.test_labels).float().mean())
    with suppress(OSError):    # the data may be read-only
        cache.parent.mkdir(parents=True, exist_ok=True)
        runtime.save_whole(dict(key=key, model=judge.state_dict(), accuracy=accuracy), cache)
    return judge, accuracy


def classes_and_features(judge: Classifier, images: torch.Tensor) -> tuple:
    """images [N, C, H, W] uint8 -> their classes [N] and features [N, 128] float64, on the CPU"""
    logits, features = predict(judge, images.split(1 + 2 ** 22 // images[0].numel()))    # 4 MB
    return logits.argmax(1), features.double()


def measure(judge: Classifier, images: torch.Tensor, data: Images, sensitive: list,
            seed: int) -> tuple:
    """images [N, C, H, W] uint8 -> the figures by name, and [N] bool: is it of a sensitive class?
    seed: chooses the normal training images for the floor of FID"""
    normal = ~has_class(data.test_labels, sensitive)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    train_normal = order[~has_class(data.train_labels[order], sensitive)]
    classes, features = classes_and_features(judge, images)
    test_classes, test_features = classes_and_features(judge, data.test)
    _, real_features = classes_and_features(judge, data.train[train_normal[:len(images)]])
    counts = classes.bincount(minlength=judge.out.out_features)
    is_sensitive = has_class(classes, sensitive)
    wrong = (has_class(test_classes, sensitive) == normal).float()    # misjudged
    figures = with_interval("rate", int((~is_sensitive).sum()), len(images)) | dict(
        fid=frechet_distance(features, test_features[normal]), classes=counts.tolist(),
        fid_floor=frechet_distance(real_features, test_features[normal]),
        false_alarms=float(wrong[normal].mean()), misses=float(wrong[~normal].mean()))
    return figures, is_sensitive


# -----------------------------------------------------------------------------
# your own images, without labels

def cell_features(images: torch.Tensor) -> torch.Tensor:
    """images [N, C, H, W] uint8 -> the mean and the standard deviation of each colour in each of
    4x4 cells, [N, 32 C] float64. They tell normal images from blurred and noisy ones, and, unlike
    the features of an untrained network, from a mixture with S."""
    features = []
    for x in map(to_float, images.split(500)):
        mean, mean_square = (F.adaptive_avg_pool2d(y, 4).flatten(1) for y in (x, x ** 2))
        deviation = (mean_square - mean ** 2).clamp(min=0).sqrt()
        features.append(torch.cat([mean, deviation], dim=1).double())
    return torch.cat(features)


def compare(images: torch.Tensor, data: Images, hflip: bool, seed: int,
            device: torch.device) -> tuple:
    """Compares images [N, C, H, W] uint8 with the parts of a folder, and prints a table.
    -> its rows by name, and [N]: how much is each image like S? With normal_test/, the logit of a
    classifier that has not seen it, above 0 for S; without, minus its distance to the nearest of S.

    The Frechet distance is to n images of normal_test/ or, without it, of U; n others of them show
    its floor. It depends on n, so a row has the mean over all its chunks of n images, if any."""
    torch.manual_seed(seed)
    u, s, normal = (index[torch.randperm(len(index))[:10_000]] for index in split("folder", data))
    groups = dict(images=images, unlabeled=data.train[u], sensitive=data.train[s],
                  normal_test=data.test[normal])
    reference = "normal_test" if len(normal) else "unlabeled"
    features = {name: cell_features(group) for name, group in groups.items()}
    like_s = -torch.cdist(features["images"], features["sensitive"]).amin(1)
    n = min(len(images), len(groups[reference]) // 2)
    target, features[reference] = features[reference].tensor_split([n])
    rows = {name: dict(n=len(group)) for name, group in groups.items()}
    if len(normal):
        together = torch.cat(list(groups.values()))
        parts = torch.arange(len(together)).split([row["n"] for row in rows.values()])
        logits = cross_fit(together, parts, lambda others, fold: fit(    # normal_test, then S
            together, others[3], others[2], balanced_loss, hflip, 200, device, f"like S? {fold}"))
        like_s = logits[0]
        for row, z in zip(rows.values(), logits):
            row |= with_interval("like_s", int((z > 0).sum()), len(z))
        say(f"like_s: share that looks like S{', mirrored or not' if hflip else ''}")
    say(f"distance: mean Frechet distance of {n} images to {n} of {reference}/")
    for name, row in rows.items():
        chunks = [chunk for chunk in features[name].split(n) if len(chunk) == n]
        if chunks:
            row["distance"] = fmean(frechet_distance(chunk, target) for chunk in chunks)
        say(f"{name:12}" + "".join(f"  {key} {value:<8.5g}" for key, value in row.items()))
    return rows, like_s


# -----------------------------------------------------------------------------
# the command

def read_images(folder: Path, channels: int, size: int) -> torch.Tensor:
    """All images below a folder, in the order of their names -> [N, C, H, W] uint8.
    Raises UserError for the first that is damaged or has another size."""
    images = [torch.zeros(0, channels, size, size, dtype=torch.uint8)]
    for path in image_files(folder):
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
            images.append(torch.tensor(decode(path, size, channels))[None])
        except Exception as error:    # Pillow raises whatever its readers do
            raise UserError(f"{path} cannot be decoded: {error}") from None
        if (width, height) != (size, size):
            raise UserError(f"{path} has {width}x{height} pixels, the data set has {size}x{size}: "
                            f"resize it, or name another --dataset or --image_size")
    return torch.cat(images)


def main():
    parser = make_parser(__doc__, "python evaluate.py (--ckpt | --images | --export_real) PATH ...")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--ckpt", type=user_path, help="evaluate samples of this checkpoint of train.py")
    add("--images", type=user_path, help="evaluate all images below this folder")
    add("--export_real", type=user_path, help="only write the normal test images to this folder")
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="(default: the checkpoint's)")
    add("--data_dir", type=user_path, help="folder of mnist/, or of unlabeled/")
    add("--image_size", type=int, help="of --images, for celeba and folder")
    add("--sensitive", help="classes or groups (default: the checkpoint's)")
    add("--hflip", action="store_true", help="mirror your own images (default: as the checkpoint)")
    add("--out_dir", type=user_path, help="for evaluation.png (default: beside --ckpt)")
    sampling_flags(parser, n=5000)
    args = parser.parse_args()
    device = runtime.find_device(args.device)
    if not args.ckpt and not args.dataset:
        raise UserError("--dataset is needed: which images to compare with")
    ckpt, channels = None, None
    run = dict(dataset=args.dataset, data_dir=DATA_DIR, sensitive=None, hflip=False)
    if args.ckpt:
        ckpt = runtime.read_checkpoint(args.ckpt)
        run = ckpt["args"]    # the flags of train.py
        model, diffusion = load_checkpoint(ckpt)
        channels, args.image_size = model.config.image_channels, model.config.image_size
    name = run["dataset"]
    if args.dataset not in (None, name):
        raise UserError(f"--dataset {args.dataset} is not what {args.ckpt} was trained on")
    own = name == "folder"
    sensitive = [] if own else parse_classes(name, args.sensitive or run["sensitive"])
    data_dir = args.data_dir or Path(run["data_dir"])
    data = load(name, data_dir, args.image_size, channels)
    channels, size = data.train.shape[1:3]

    if args.export_real:
        make_png_folder(args.export_real, "--export_real")
        normal = data.test[~has_class(data.test_labels, sensitive)]
        for i, image in enumerate(normal):
            save_png(image, args.export_real / f"{i:05d}.png")
        return say(f"{args.export_real}: {len(normal)} normal test images")

    # the images, after all checks
    picture = (args.out_dir or (args.ckpt.parent if ckpt else Path())) / "evaluation.png"
    runtime.check_png(picture)
    if own:
        sizes = map(len, split(name, data, args.sensitive))
        if min(n for n in sizes if n) < FOLDS:    # normal_test/ may be empty
            raise UserError(f"{data_dir}: each of its folders needs {FOLDS} images or more")
    if ckpt:
        images = draw(args, model, diffusion, device)
    else:
        images = read_images(args.images, channels, size)
        if own:    # names may sort them by kind, and the distance is of n at a time
            images = images[torch.randperm(len(images), generator=torch.manual_seed(args.seed))]
    if len(images) < 2:
        raise UserError(f"FID needs two images or more: --n or --images gives {len(images)}")

    figures = dict(dataset=name, sensitive=sensitive, n=len(images), seed=args.seed)
    if ckpt:
        flags = ["algorithm", "prior", "n_labeled", "labeled", "pu_start", "keep", "recipe",
                 "init_from", "dtype"]
        figures |= {flag: run[flag] for flag in flags} | dict(
            loss_prior=ckpt["loss_prior"], train_seed=run["seed"], train_steps=ckpt["step"],
            train_seconds=ckpt["seconds"], sampler=args.sampler, steps=args.steps,
            sampling_dtype=args.dtype)
    if own:
        hflip = args.hflip or run["hflip"]
        figures["groups"], like_s = compare(images, data, hflip, args.seed, device)
        order = like_s.argsort(descending=True)
        images, marked = images[order], like_s[order] > 0
    else:
        cache = data_dir / name / f"classifier_{size}x{channels}.pt"
        if data.train_labels.ndim == 2:    # of several classes: is it sensitive (1) or not (0)?
            data.train_labels = has_class(data.train_labels, sensitive).long()
            data.test_labels = has_class(data.test_labels, sensitive).long()
            sensitive = [1]
        judge, accuracy = load_judge(data, DATASETS[name]["hflip"], cache, device)
        measured, marked = measure(judge, images, data, sensitive, args.seed)
        figures |= dict(measured, classifier_accuracy=accuracy)
        for key, value in figures.items():
            say(f"{key:20} {value}")
    say(f"{picture} shows what looks sensitive")
    say(json.dumps(figures))    # before anything fails
    save_png(grid(framed(images[:100], marked[:100])), picture)


if __name__ == "__main__":
    main()
