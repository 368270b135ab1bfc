"""
Data sets, and their split into an unlabeled set U, a sensitive set S, and normal test images.

    data = load("mnist")                          # images and labels
    u, s, test_normal = split("mnist", data)      # indices; half of U is odd, all of S
    data.train[u], data.train[s]                  # what training sees

    python data.py --dataset cifar10 --preview cifar10.png      # look at your data first

Labels are used to draw the split and to judge the result. Training does not see them, except with
--algorithm oracle.
"""
import argparse
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import runtime
from formats import CELEBA_ATTRIBUTES, load_celeba, load_folder, load_idx, load_records
from images import grid, numbered, save_png, side_by_side
from runtime import UserError, say

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
        recipe="tiny", batch_size=128, hflip=False),
    "fashion_mnist": dict(
        classes="t-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
        groups={"clothes": [0, 1, 2, 3, 4, 6], "shoes_and_bags": [5, 7, 8, 9]},
        sensitive="shoes_and_bags", n_normal=20000, n_labeled=2000,
        recipe="tiny", batch_size=128, hflip=False),
    "cifar10": dict(
        classes="airplane automobile bird cat deer dog frog horse ship truck".split(),
        groups={"vehicles": [0, 1, 8, 9], "animals": [2, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=20000, n_labeled=2000,
        recipe="large", batch_size=128, hflip=True),
    "stl10": dict(
        classes="airplane bird car cat deer dog horse monkey ship truck".split(),
        groups={"vehicles": [0, 2, 8, 9], "animals": [1, 3, 4, 5, 6, 7]},
        sensitive="animals", n_normal=2000, n_labeled=200,
        recipe="large", batch_size=32, hflip=True),
    "celeba": dict(    # an image has several of these classes
        classes=CELEBA_ATTRIBUTES + [f"not_{name}" for name in CELEBA_ATTRIBUTES],
        groups={"female": [40 + CELEBA_ATTRIBUTES.index("male")]},    # not_male
        sensitive="female", n_normal=2000, n_labeled=200,
        recipe="large", batch_size=16, hflip=True, image_size=256, channels=3),
    "folder": dict(    # your own images, split already; for grey ones, change channels to 1
        recipe="large", batch_size=128, hflip=False, image_size=32, channels=3),
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
    Raises UserError for files that are missing or damaged, or another size than the images have."""
    folder, entry = Path(data_dir) / name, DATASETS[name]
    size = image_size or entry.get("image_size"), channels or entry.get("channels")
    if name == "folder":
        arrays = load_folder(Path(data_dir), *size)
    elif name == "celeba":
        arrays = load_celeba(folder, *size)
    elif name in ("cifar10", "stl10"):
        arrays = load_records(name, folder)
    else:
        arrays = load_idx(name, folder)
    images = Images(*arrays)
    if image_size not in (None, images.train.shape[2]):
        raise UserError(f"--image_size {image_size} is for folder and celeba: {name} has "
                        f"{images.train.shape[2]} pixels")
    return images


def digest(images: torch.Tensor) -> str:
    """-> a checksum of the images, or of every k-th if they are very many."""
    k = 1 + images.numel() // MAX_ON_DEVICE
    return hashlib.sha256(images[::k].numpy().tobytes()).hexdigest()


# -----------------------------------------------------------------------------
# the split

def parse_classes(name: str, text: str = None) -> list:
    """Names of classes or groups, or class numbers, with commas (default: those of the data set)
    -> class numbers, sorted. For example, parse_classes("cifar10", "cat, 1") is [1, 3].

    Raises UserError for a class that does not exist, and if no class would be left."""
    classes, groups = DATASETS[name]["classes"], DATASETS[name]["groups"]
    numbers_of = {str(i): [i] for i in range(len(classes))}
    numbers_of |= {word: [i] for i, word in enumerate(classes)} | groups
    chosen = set()
    text = DATASETS[name]["sensitive"] if text is None else text
    for word in text.lower().split(","):
        word = word.strip()
        if word not in numbers_of:
            known = ", ".join([*groups, *classes])
            raise UserError(f"{name} has no class {word!r}: choose among {known}")
        chosen.update(numbers_of[word])
    if len(chosen) == len(classes):
        raise UserError(f"every class of {name} is sensitive: leave at least one to be generated")
    return sorted(chosen)


def has_class(labels: torch.Tensor, classes: list) -> torch.Tensor:
    """Labels as in Images -> bool [N]: is the image of one of these classes?"""
    if labels.ndim == 2:
        return labels[:, classes].any(dim=1)
    return torch.isin(labels, torch.tensor(classes))


def pu_split(data: Images, sensitive: list, prior: float, n_unlabeled: int, n_labeled: int,
             seed: int = 0, labeled: list = None) -> tuple:
    """Draws U and S, disjoint, from the training images.

    sensitive: class numbers. prior: fraction of sensitive images in U, between 0 and 1.
    labeled: the classes that S shows (default: the sensitive ones).
    -> three index vectors: U and S in data.train, in random order, and all normal images in
    data.test. Raises UserError if there are too few images."""
    is_sensitive = has_class(data.train_labels, sensitive)
    n_sensitive, n_normal = int(is_sensitive.sum()), int((~is_sensitive).sum())
    n_hidden = round(prior * n_unlabeled)    # sensitive images in U
    largest = max(0, round(min((n_sensitive - n_labeled) / prior, n_normal / (1 - prior))))
    if not 0 < n_hidden < n_unlabeled or n_unlabeled > largest:
        raise UserError(f"--n_unlabeled {n_unlabeled} with --prior {prior:.4g} and --n_labeled "
                        f"{n_labeled}: there are {n_sensitive:,} sensitive and {n_normal:,} normal "
                        f"images. U can have {largest:,} at most, and needs images of both kinds")

    generator = torch.Generator().manual_seed(seed)

    def shuffle(index):
        return index[torch.randperm(len(index), generator=generator)]

    all_sensitive = shuffle(is_sensitive.nonzero()[:, 0])
    all_normal = shuffle((~is_sensitive).nonzero()[:, 0])
    u = shuffle(torch.cat([all_sensitive[:n_hidden], all_normal[:n_unlabeled - n_hidden]]))
    s = all_sensitive[n_hidden:]
    s = s[has_class(data.train_labels[s], labeled or sensitive)][:n_labeled]
    if len(s) < n_labeled:
        raise UserError(f"--labeled: only {len(s):,} images of these classes are left for S")
    return u, s, (~has_class(data.test_labels, sensitive)).nonzero()[:, 0]


def split(name: str, data: Images, sensitive: str = None, prior: float = None,
          n_unlabeled: int = None, n_labeled: int = None, seed: int = 0,
          labeled: str = None) -> tuple:
    """pu_split, with the data set's defaults for what is None, and a prior of 0.5.

    A folder is split already: label 0 is U and 1 is S. Raises UserError if flags ask for another
    split."""
    if name == "folder":
        if sensitive or n_unlabeled or n_labeled or labeled:
            raise UserError("--sensitive, --labeled, --n_unlabeled, --n_labeled: a folder is split "
                            "already")
        u, s = ((data.train_labels == label).nonzero()[:, 0] for label in (0, 1))
        if 0 in (len(u), len(s)):
            raise UserError("unlabeled/ or sensitive/ holds no image that can be decoded")
        return u, s, torch.arange(len(data.test))
    defaults, prior = DATASETS[name], prior or 0.5
    n_unlabeled = n_unlabeled or round(defaults["n_normal"] / (1 - prior))
    sensitive = parse_classes(name, sensitive)
    labeled = parse_classes(name, labeled) if labeled else sensitive
    if not set(labeled) <= set(sensitive):
        raise UserError("--labeled: every class of S must be a sensitive one")
    return pu_split(data, sensitive, prior, n_unlabeled, n_labeled or defaults["n_labeled"], seed,
                    labeled)


def read_scores(path: Path, images: torch.Tensor, u: torch.Tensor, s: torch.Tensor,
                keep: float) -> tuple:
    """Reads what pu_filter.py wrote: z_u and z_s, logits of "sensitive" of images[u] and images[s].
    -> the fraction `keep` of u that scores lowest, and those of s that score no higher.
    Raises UserError for another file, or for the scores of other images."""
    scores = runtime.load_verified(path, "what pu_filter.py writes")
    same = scores.get("digest") == digest(images)
    if not same or not torch.equal(scores["u"], u) or not torch.equal(scores["s"], s):
        raise UserError(f"--scores {path} is not what pu_filter.py writes for these images: use "
                        f"the same data flags and --seed")
    threshold = scores["z_u"].kthvalue(math.ceil(keep * len(u))).values
    return u[scores["z_u"] <= threshold], s[scores["z_s"] <= threshold]


# -----------------------------------------------------------------------------
# look at your data first

def data_flags(parser):
    """Adds the flags that choose U and S."""
    add = parser.add_argument
    add("--dataset", default="mnist", choices=DATASETS, help="(default: mnist)")
    add("--data_dir", type=runtime.user_path, default=DATA_DIR,
        help="folder of mnist/ and the others, or of unlabeled/ and sensitive/")
    add("--image_size", type=int, help="pixels (default for a folder: 32, for celeba: 256)")
    add("--hflip", action=argparse.BooleanOptionalAction,
        help="mirror images at random (default: only cifar10, stl10, celeba)")
    add("--sensitive", help="classes or groups, with commas (default for mnist: odd)")
    add("--labeled", help="only these classes in S (default: all sensitive ones)")
    add("--prior", type=runtime.fraction,
        help="fraction of sensitive images in U (default: 0.5; a folder needs it)")
    add("--n_unlabeled", type=int, help="images in U (default: by data set)")
    add("--n_labeled", type=int, help="images in S (default: by data set)")
    add("--seed", type=int, default=0, help="of all random draws (default: 0)")


def check_data_flags(args: argparse.Namespace, needs_prior: bool = True):
    """Checks these flags, and gives --hflip and --prior their defaults. Raises UserError."""
    runtime.require_positive(args, "image_size", "n_unlabeled", "n_labeled")
    if args.hflip is None:
        args.hflip = DATASETS[args.dataset]["hflip"]
    if args.dataset == "folder" and args.prior is None and needs_prior:
        raise UserError("--dataset folder needs --prior, the fraction of sensitive images in "
                        "unlabeled/: count them among the 400 that data.py shows")
    args.prior = args.prior or 0.5


def main():
    parser = runtime.make_parser(__doc__, "python data.py [--flag value ...]")
    data_flags(parser)
    parser.add_argument("--preview", type=runtime.user_path, default="preview.png",
                        help="PNG of U and S, or of 400 images of a folder's U to count on "
                             "(default: preview.png)")
    args = parser.parse_args()
    check_data_flags(args, needs_prior=False)
    runtime.check_png(args.preview)
    data = load(args.dataset, args.data_dir, args.image_size)
    u, s, test_normal = split(args.dataset, data, args.sensitive, args.prior, args.n_unlabeled,
                              args.n_labeled, args.seed, args.labeled)
    say(f"{args.dataset}: {len(data.train):,} training images {tuple(data.train[0].shape)}; "
        f"U has {len(u):,}, S has {len(s):,}; {len(test_normal):,} normal test images")
    torch.manual_seed(args.seed)
    u, s = u[torch.randperm(len(u))], s[torch.randperm(len(s))]
    if args.dataset == "folder":
        n = min(400, len(u))
        save_png(grid(numbered(data.train[u[:n]])), args.preview)
        say(f"{args.preview}: {n} random images of U. Count the sensitive ones: --prior is their "
            f"number divided by {n}. Its standard error is {0.5 / n ** 0.5:.2g} at most")
    else:
        classes = parse_classes(args.dataset, args.sensitive)
        names = ", ".join(DATASETS[args.dataset]["classes"][i] for i in classes)
        n_hidden = int(has_class(data.train_labels[u], classes).sum())
        say(f"sensitive: {names}; in U: {n_hidden:,}, which is {n_hidden / len(u):.4g} of it")
        save_png(side_by_side([grid(data.train[u[:64]]), grid(data.train[s[:64]])]), args.preview)
        say(f"{args.preview}: U on the left, S on the right")


if __name__ == "__main__":
    main()
