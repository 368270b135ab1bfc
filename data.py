"""
Images, and their split into what the method may see.

    data = load("mnist")                                     # uint8 images and labels
    u, s, test = split("mnist", data, prior=0.5)             # U: half of it odd digits; S: 2,500 labeled odd digits
    U, S = data.train[u], data.train[s]

    python data.py --dataset cifar10 --preview cifar10.png   # look at your data first
    python data.py --dataset folder --data_dir my_images --image_size 64 --preview mine.png

`load` knows the labels because a data set to experiment with has them; a model is trained on U and S alone.
"""
import argparse
import hashlib
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from formats import load_celeba, load_folder, load_idx, load_records
from images import save_grids
from runtime import fraction, positive, seed

DATA_DIR = Path(__file__).parent / "data"

# classes: names, in the order of their numbers. groups: names for several of them. sensitive: what must not be
# generated, unless told otherwise. n_normal: normal images in U. n_labeled: images in S. As in the paper, section 5.
DATASETS = {
    "mnist": dict(
        classes=[str(digit) for digit in range(10)],
        groups={"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]},
        sensitive="odd", n_normal=25000, n_labeled=2500, model="tiny", batch_size=128, hflip=False),
    "fashion_mnist": dict(
        classes=["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
        groups={"clothes": [0, 1, 2, 3, 4, 6], "shoes_and_bags": [5, 7, 8, 9]},
        sensitive="shoes_and_bags", n_normal=20000, n_labeled=2000, model="tiny", batch_size=128, hflip=False),
    "cifar10": dict(
        classes=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        groups={"vehicles": [0, 1, 8, 9], "animals": [2, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=20000, n_labeled=2000, model="paper", batch_size=128, hflip=True),
    "stl10": dict(
        classes=["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
        groups={"vehicles": [0, 2, 8, 9], "animals": [1, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=2000, n_labeled=200, model="paper", batch_size=32, hflip=True),
    "celeba": dict(    # attributes, not classes: number i + 40 is "not attribute i"
        classes=[sign + name for sign in ("", "not_") for name in (
            "5_o_clock_shadow arched_eyebrows attractive bags_under_eyes bald bangs big_lips big_nose black_hair blond_hair "
            "blurry brown_hair bushy_eyebrows chubby double_chin eyeglasses goatee gray_hair heavy_makeup high_cheekbones "
            "male mouth_slightly_open mustache narrow_eyes no_beard oval_face pale_skin pointy_nose receding_hairline "
            "rosy_cheeks sideburns smiling straight_hair wavy_hair wearing_earrings wearing_hat wearing_lipstick "
            "wearing_necklace wearing_necktie young").split()],
        groups={"female": [60]},
        sensitive="female", n_normal=2000, n_labeled=200, image_size=256, channels=3, model="paper", batch_size=16, hflip=True),
    "folder": dict(    # --data_dir with unlabeled/ and sensitive/
        image_size=32, channels=3, model="paper", batch_size=128, hflip=True),
}
FITS = 2 ** 29    # bytes: U and S up to this size are kept on the device, larger ones are read from their file


@dataclass
class Images:
    train: torch.Tensor           # [N, C, H, W] uint8, perhaps memory-mapped
    train_labels: torch.Tensor    # [N] int64 class numbers, or [N, K] bool where an image has several
    test: torch.Tensor
    test_labels: torch.Tensor

def load(name: str, data_dir: Path = DATA_DIR, image_size: int = None, channels: int = None) -> Images:
    """The whole data set. Fashion-MNIST, CIFAR-10 and STL-10 are downloaded to data_dir where they are not there yet.
    image_size (pixels) and channels (1 or 3) are for "folder" (32 and 3 if not given) and "celeba" (256 and 3).
    Raises ValueError for an unknown name, OSError for a file that is missing or is not what it should be."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    folder = Path(data_dir) / name
    if name in ("folder", "celeba"):
        size = (image_size or DATASETS[name]["image_size"], channels or DATASETS[name]["channels"])
        return Images(*(load_folder(Path(data_dir), *size) if name == "folder" else load_celeba(folder, *size)))
    if image_size or channels:
        raise ValueError(f"image_size and channels are for folder and celeba: {name} has its own")
    if name in ("mnist", "fashion_mnist"):
        return Images(*load_idx(name, folder))
    return Images(*load_records(name, folder))


# -----------------------------------------------------------------------------
# the split

def parse_classes(name: str, text: str) -> list:
    """"odd", "1,3,5" or "cat,dog" -> class numbers, sorted. Names of groups and classes, or numbers, with commas.
    Raises ValueError for a class that does not exist, or where every class is meant."""
    info, chosen = DATASETS[name], set()
    for word in text.split(","):
        word = word.strip().lower()
        if word in info["groups"]:
            chosen |= set(info["groups"][word])
        elif word in info["classes"]:
            chosen.add(info["classes"].index(word))
        elif word.isdecimal() and int(word) < len(info["classes"]):
            chosen.add(int(word))
        else:
            raise ValueError(f"{name} has no class {word!r}: choose among {', '.join([*info['groups'], *info['classes']])}")
    if len(chosen) == len(info["classes"]):
        raise ValueError(f"every class of {name} is sensitive: leave at least one to be generated")
    return sorted(chosen)


def has_class(labels: torch.Tensor, classes: list) -> torch.Tensor:
    """labels [N] class numbers or [N, K] bool -> [N] bool: is the image of one of the classes?"""
    return torch.isin(labels, torch.tensor(classes)) if labels.ndim == 1 else labels[:, classes].any(1)


def pu_split(data: Images, sensitive: list, prior: float, n_unlabeled: int, n_labeled: int, seed: int = 0) -> tuple:
    """Which images are U, S and the test normals: int64 index vectors into data.train, data.train and data.test.

    U has n_unlabeled images, of which round(prior * n_unlabeled) are of the sensitive classes; S has n_labeled, all
    of the sensitive classes and none of them in U; both are in random order, drawn by the seed. The test normals are
    all test images of the other classes. Raises ValueError, with the largest size that works, for too few images."""
    is_sensitive = has_class(data.train_labels, sensitive)
    n_pos, n_neg = int(is_sensitive.sum()), int((~is_sensitive).sum())

    def fits(n):    # U of n images: enough sensitive ones beside those for S, and enough normal ones?
        return round(prior * n) <= n_pos - n_labeled and n - round(prior * n) <= n_neg

    if not 0 < n_labeled < n_pos:
        raise ValueError(f"n_labeled = {n_labeled:,} is not possible: there are {n_pos:,} sensitive images, "
                         f"and U needs some of them too")
    if not fits(n_unlabeled):
        largest = math.ceil(min((n_pos - n_labeled + 0.5) / prior, (n_neg + 0.5) / (1 - prior)))
        while not fits(largest):
            largest -= 1
        raise ValueError(f"{n_unlabeled:,} unlabeled images at prior {prior:.4g} and {n_labeled:,} labeled ones are more "
                         f"than the {n_pos:,} sensitive and {n_neg:,} normal images allow: "
                         f"use n_unlabeled of at most {largest:,}, or another prior")
    n_hidden = round(prior * n_unlabeled)    # the sensitive images in U
    if not 0 < n_hidden < n_unlabeled:
        raise ValueError(f"{n_unlabeled:,} unlabeled images at prior {prior:.4g} do not hold one sensitive and one normal "
                         f"image: use a larger n_unlabeled")

    generator = torch.Generator().manual_seed(seed)
    def shuffle(index):
        return index[torch.randperm(len(index), generator=generator)]
    positives, negatives = shuffle(is_sensitive.nonzero()[:, 0]), shuffle((~is_sensitive).nonzero()[:, 0])
    u = shuffle(torch.cat([positives[:n_hidden], negatives[:n_unlabeled - n_hidden]]))
    test_normal = (~has_class(data.test_labels, sensitive)).nonzero()[:, 0]
    return u, positives[n_hidden:n_hidden + n_labeled], test_normal


def split(name: str, data: Images, sensitive: str = None, prior: float = 0.5, n_unlabeled: int = None,
          n_labeled: int = None, seed: int = 0) -> tuple:
    """pu_split with the data set's own choice for what is not given. A folder comes split: its prior is a guess, and
    ValueError is raised for the rest."""
    if name == "folder":
        if sensitive or n_unlabeled or n_labeled:
            raise ValueError("--sensitive, --n_unlabeled and --n_labeled are for labeled data sets: a folder is split already")
        return (data.train_labels == 0).nonzero()[:, 0], (data.train_labels == 1).nonzero()[:, 0], torch.arange(len(data.test))
    info = DATASETS[name]
    return pu_split(data, parse_classes(name, sensitive or info["sensitive"]), prior,
                    n_unlabeled or round(info["n_normal"] / (1 - prior)), n_labeled or info["n_labeled"], seed)


def digest(images: torch.Tensor) -> str:
    """What tells these images from others; of very many, some are looked at."""
    return hashlib.sha256(images[::1 + images.numel() // FITS].numpy().tobytes()).hexdigest()

# -----------------------------------------------------------------------------
# look at your data first

def data_flags(parser):
    """Adds the flags that say what U and S are."""
    flag = parser.add_argument
    flag("--dataset", default="mnist", choices=list(DATASETS), help="(default: mnist)")
    flag("--data_dir", type=Path, default=DATA_DIR,
         help="folder that holds mnist/ and the others; for folder, the one with unlabeled/ and sensitive/ (default: data/ beside this file)")
    flag("--image_size", type=positive, help="pixels, for folder and celeba (default: 32 and 256)")
    flag("--channels", type=int, choices=[1, 3], help="grey or colour, for folder and celeba (default: 3)")
    flag("--sensitive", help="what must not be generated: classes or groups, with commas (default: the data set's; mnist: odd)")
    flag("--prior", type=fraction, default=0.5, help="fraction of sensitive images in U (default: 0.5)")
    flag("--n_unlabeled", type=positive, help="images in U (default: as many as hold the data set's normal ones; mnist: 25,000 normal)")
    flag("--n_labeled", type=positive, help="images in S, labeled sensitive (default: the data set's; mnist: 2,500)")
    flag("--seed", type=seed, default=0, help="of all that is drawn at random (default: 0)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python data.py [--flag value ...]")
    flag = parser.add_argument
    data_flags(parser)
    flag("--preview", type=Path, default=Path("preview.png"), help="PNG to write: images of U, then of S (default: preview.png)")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, lambda *_: sys.exit("data.py: interrupted"))
    try:
        data = load(args.dataset, args.data_dir, args.image_size, args.channels)
        u, s, test_normal = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled, args.n_labeled, args.seed)
        size = f"{tuple(data.train.shape[1:])}"
        print(f"{args.dataset}: {len(data.train):,} training images {size}; U has {len(u):,}, S has {len(s):,}; "
              f"{len(test_normal):,} normal test images")
        if args.dataset == "folder":
            print("the fraction of sensitive images in U is not known: --prior is your guess of it")
        else:
            chosen = parse_classes(args.dataset, args.sensitive or DATASETS[args.dataset]["sensitive"])
            hidden = int(has_class(data.train_labels[u], chosen).sum())
            print(f"sensitive: {', '.join(DATASETS[args.dataset]['classes'][i] for i in chosen)}; "
                  f"in U: {hidden:,}, which is {hidden / len(u):.4g} of it")
        some = torch.Generator().manual_seed(0)
        save_grids([data.train[index[torch.randperm(len(index), generator=some)[:64]]] for index in (u, s)], args.preview)
        print(f"{args.preview}: U on the left, S on the right")
    except ValueError as e:
        parser.error(e)
    except OSError as e:
        sys.exit(f"data.py: error: {e}")


if __name__ == "__main__":
    main()
