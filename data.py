"""
Data sets, and their split into an unlabeled set U, a sensitive set S, and normal test images.

    data = load("mnist")                          # images and labels
    u, s, test_normal = split("mnist", data)      # indices; U is half odd digits, S only those
    data.train[u], data.train[s]                  # what training sees

    python data.py --dataset cifar10 --preview cifar10.png      # look at your data first

Labels are used to draw the split and to judge the result. Training does not see them, except with
--algorithm oracle.
"""
import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from formats import CELEBA_ATTRIBUTES, load_celeba, load_folder, load_idx, load_records
from images import numbered, save_grid, save_grids
from runtime import absolute, exit_status, fraction, int64, png, positive, say

DATA_DIR = Path(__file__).parent / "data"
MAX_ON_DEVICE = 2 ** 29    # bytes of images; more stay in their file

# classes: names, in the order of their numbers. groups: names for several classes.
# Defaults: `sensitive` must not be generated, U has n_normal normal images, S has n_labeled;
# where the paper uses the data set, they are the paper's (arXiv:2503.03789, section 5).
DATASETS = {
    "mnist": dict(
        classes="0 1 2 3 4 5 6 7 8 9".split(),
        groups={"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]},
        sensitive="odd", n_normal=25000, n_labeled=2500,
        model="tiny", batch_size=128, hflip=False),
    "fashion_mnist": dict(
        classes="t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
        groups={"clothes": [0, 1, 2, 3, 4, 6], "shoes_and_bags": [5, 7, 8, 9]},
        sensitive="shoes_and_bags", n_normal=20000, n_labeled=2000,
        model="tiny", batch_size=128, hflip=False),
    "cifar10": dict(
        classes="airplane automobile bird cat deer dog frog horse ship truck".split(),
        groups={"vehicles": [0, 1, 8, 9], "animals": [2, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=20000, n_labeled=2000,
        model="paper", batch_size=128, hflip=True),
    "stl10": dict(
        classes="airplane bird car cat deer dog horse monkey ship truck".split(),
        groups={"vehicles": [0, 2, 8, 9], "animals": [1, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=2000, n_labeled=200,
        model="paper", batch_size=32, hflip=True),
    "celeba": dict(    # an image has several of these classes
        classes=CELEBA_ATTRIBUTES + [f"not_{name}" for name in CELEBA_ATTRIBUTES],
        groups={"female": [40 + CELEBA_ATTRIBUTES.index("male")]},    # not_male
        sensitive="female", n_normal=2000, n_labeled=200,
        model="paper", batch_size=16, hflip=True, image_size=256, channels=3),
    "folder": dict(    # your own images, split already
        model="paper", batch_size=128, hflip=True, image_size=32, channels=3),
}


@dataclass
class Images:
    train: torch.Tensor           # uint8 [N, C, H, W]
    train_labels: torch.Tensor    # int64 [N]: class numbers; or bool [N, K]: is it of class k?
    test: torch.Tensor
    test_labels: torch.Tensor


def load(name: str, data_dir: Path = DATA_DIR, image_size: int = None,
         channels: int = None) -> Images:
    """Loads a data set. Fashion-MNIST, CIFAR-10 and STL-10 are downloaded the first time.

    image_size (pixels) and channels (1 or 3) are for "folder" and "celeba", which are resized.
    Raises ValueError for what does not exist, OSError for files that are missing or damaged."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    folder = Path(data_dir) / name
    if name in ("folder", "celeba"):
        image_size = image_size or DATASETS[name]["image_size"]
        channels = channels or DATASETS[name]["channels"]
    elif image_size or channels:
        raise ValueError(f"image_size and channels are for folder and celeba: {name} has its own")

    if name == "folder":
        return Images(*load_folder(Path(data_dir), image_size, channels))
    if name == "celeba":
        return Images(*load_celeba(folder, image_size, channels))
    if name in ("mnist", "fashion_mnist"):
        return Images(*load_idx(name, folder))
    return Images(*load_records(name, folder))


def digest(images: torch.Tensor) -> str:
    """Returns a checksum of the images. If they are very many, it reads only every k-th."""
    k = 1 + images.numel() // MAX_ON_DEVICE
    return hashlib.sha256(images[::k].numpy().tobytes()).hexdigest()


# -----------------------------------------------------------------------------
# the split

def parse_classes(name: str, text: str = None) -> list:
    """Names of classes or groups, or class numbers, with commas (default: those of the data set)
    -> class numbers, sorted. For example, parse_classes("cifar10", "cat, 1") is [1, 3].

    Raises ValueError for a class that does not exist, and if no class would be left."""
    classes, groups = DATASETS[name]["classes"], DATASETS[name]["groups"]
    numbers_of = {str(i): [i] for i in range(len(classes))}
    numbers_of |= {word: [i] for i, word in enumerate(classes)} | groups
    chosen = set()
    text = DATASETS[name]["sensitive"] if text is None else text
    for word in text.lower().split(","):
        word = word.strip()
        if word not in numbers_of:
            known = ", ".join([*groups, *classes])
            raise ValueError(f"{name} has no class {word!r}: choose among {known}")
        chosen.update(numbers_of[word])
    if len(chosen) == len(classes):
        raise ValueError(f"every class of {name} is sensitive: leave at least one to be generated")
    return sorted(chosen)


def has_class(labels: torch.Tensor, classes: list) -> torch.Tensor:
    """Labels as in Images -> bool [N]: is the image of one of these classes?"""
    if labels.ndim == 2:
        return labels[:, classes].any(dim=1)
    return torch.isin(labels, torch.tensor(classes))


def pu_split(data: Images, sensitive: list, prior: float, n_unlabeled: int, n_labeled: int,
             seed: int = 0) -> tuple:
    """Draws U and S, disjoint, from the training images.

    sensitive: class numbers. prior: fraction of sensitive images in U, between 0 and 1.
    Returns three index vectors: U and S in data.train, in random order, and all normal images in
    data.test. Raises ValueError if there are too few images."""
    is_sensitive = has_class(data.train_labels, sensitive)
    n_sensitive, n_normal = int(is_sensitive.sum()), int((~is_sensitive).sum())
    if not 0 < n_labeled < n_sensitive:
        raise ValueError(f"n_labeled = {n_labeled:,} is not possible: there are {n_sensitive:,} "
                         f"sensitive images, and U needs some of them too")

    def fits(n):    # are there enough images of both kinds for a U of n?
        return round(prior * n) <= n_sensitive - n_labeled and n - round(prior * n) <= n_normal

    if not fits(n_unlabeled):
        largest = max(n for n in range(n_sensitive + n_normal) if fits(n))
        raise ValueError(f"{n_sensitive:,} sensitive and {n_normal:,} normal images are too few: "
                         f"use n_unlabeled of at most {largest:,}, or another prior")
    n_hidden = round(prior * n_unlabeled)    # sensitive images in U
    if not 0 < n_hidden < n_unlabeled:
        raise ValueError("U must hold images of both kinds: use a larger n_unlabeled")

    generator = torch.Generator().manual_seed(seed)

    def shuffle(index):
        return index[torch.randperm(len(index), generator=generator)]

    all_sensitive = shuffle(is_sensitive.nonzero()[:, 0])
    all_normal = shuffle((~is_sensitive).nonzero()[:, 0])
    u = shuffle(torch.cat([all_sensitive[:n_hidden], all_normal[:n_unlabeled - n_hidden]]))
    s = all_sensitive[n_hidden:n_hidden + n_labeled]
    return u, s, (~has_class(data.test_labels, sensitive)).nonzero()[:, 0]


def known_prior(name: str, prior: float = None) -> float:
    """-> prior, or 0.5. Raises ValueError for a folder, where a guess would silently train
    something else."""
    if name == "folder" and prior is None:
        raise ValueError("--dataset folder needs --prior, the fraction of sensitive images in "
                         "unlabeled/: count them among the 400 that `python data.py --dataset "
                         "folder --data_dir ...` shows")
    return prior or 0.5


def split(name: str, data: Images, sensitive: str = None, prior: float = None,
          n_unlabeled: int = None, n_labeled: int = None, seed: int = 0) -> tuple:
    """pu_split, with the data set's defaults for what is None.

    A folder is split already: label 0 is U and 1 is S. Raises ValueError if flags ask for another
    split."""
    if name == "folder":
        if sensitive or n_unlabeled or n_labeled:
            raise ValueError("--sensitive, --n_unlabeled, --n_labeled: a folder is split already")
        u, s = ((data.train_labels == label).nonzero()[:, 0] for label in (0, 1))
        return u, s, torch.arange(len(data.test))
    defaults = DATASETS[name]
    classes = parse_classes(name, sensitive)
    prior = known_prior(name, prior)
    n_unlabeled = n_unlabeled or round(defaults["n_normal"] / (1 - prior))
    return pu_split(data, classes, prior, n_unlabeled, n_labeled or defaults["n_labeled"], seed)


def on_device(images: torch.Tensor, u: torch.Tensor, s: torch.Tensor,
              device: torch.device) -> tuple:
    """Puts the images of U and S on the device, unless they are too many: those stay in their file.
    -> images, and the new indices of U and S in them."""
    sizes = [len(u), len(s)]
    if sum(sizes) * images[0].numel() > MAX_ON_DEVICE:
        return images, u, s
    images = torch.cat([images[u], images[s]]).to(device)
    return images, *torch.arange(sum(sizes), device=device).split(sizes)


# -----------------------------------------------------------------------------
# look at your data first

def data_flags(parser):
    """Adds the flags that choose U and S."""
    parser.add_argument("--dataset", default="mnist", choices=DATASETS, help="(default: mnist)")
    parser.add_argument("--data_dir", type=absolute, default=DATA_DIR,
                        help="folder of mnist/ and the others, or of unlabeled/ and sensitive/")
    parser.add_argument("--image_size", type=positive, help="pixels (folder: 32, celeba: 256)")
    parser.add_argument("--channels", type=int, choices=[1, 3], help="grey or colour (default: 3)")
    parser.add_argument("--sensitive", help="classes or groups, with commas (mnist: odd)")
    parser.add_argument("--prior", type=fraction,
                        help="fraction of sensitive images in U, as 1/11 (default: 0.5; a folder "
                             "needs it)")
    parser.add_argument("--n_unlabeled", type=positive, help="images in U (default: by data set)")
    parser.add_argument("--n_labeled", type=positive, help="images in S (default: by data set)")
    parser.add_argument("--seed", type=int64, default=0, help="of all random draws (default: 0)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage="python data.py [--flag value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    data_flags(parser)
    parser.add_argument("--preview", type=png, default="preview.png",
                        help="PNG to write: images of U and S; of a folder, 400 of U to count on "
                             "(default: preview.png)")
    args = parser.parse_args()
    with exit_status(parser):
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
        u, s, test_normal = split(args.dataset, data, args.sensitive, args.prior,
                                  args.n_unlabeled, args.n_labeled, args.seed)
        say(f"{args.dataset}: {len(data.train):,} training images {tuple(data.train[0].shape)}; "
            f"U has {len(u):,}, S has {len(s):,}; {len(test_normal):,} normal test images")
        if args.dataset != "folder":    # whose fraction of sensitive images in U is not known
            classes = parse_classes(args.dataset, args.sensitive)
            names = ", ".join(DATASETS[args.dataset]["classes"][i] for i in classes)
            n_hidden = int(has_class(data.train_labels[u], classes).sum())
            say(f"sensitive: {names}; in U: {n_hidden:,}, which is {n_hidden / len(u):.4g} of it")
        torch.manual_seed(args.seed)
        if args.dataset == "folder":
            some = u[torch.randperm(len(u))[:400]]
            save_grid(numbered(data.train[some]), args.preview)
            say(f"{args.preview}: {len(some)} random images of U. Count the sensitive ones: "
                f"--prior is their number divided by {len(some)}. Its standard error is "
                f"{0.5 / len(some) ** 0.5:.2g} at most")
        else:
            some = [index[torch.randperm(len(index))[:64]] for index in (u, s)]
            save_grids([data.train[index] for index in some], args.preview)
            say(f"{args.preview}: U on the left, S on the right")


if __name__ == "__main__":
    main()
