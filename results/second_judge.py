"""
A second opinion: does a judge of another architecture agree with the one of evaluate.py?

    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 1000 --out_dir samples/PU
    python results/second_judge.py --dataset mnist --sensitive odd samples/PU

The judge of evaluate.py and the filter are both small convolutional networks, and could share blind
spots. This one is a transformer: 4x4 patches, attention, no convolution and no batch normalization.
It is trained on the same real labels. Both judge the real test images, and the PNGs of each folder.
One line of JSON for each goes to results/judges.jsonl, with the folder's name.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from classifier import train_classifier  # noqa: E402
from data import DATA_DIR, DATASETS, has_class, load, parse_classes  # noqa: E402
from evaluate import judge, load_judge, read_images  # noqa: E402
from images import to_float  # noqa: E402
from runtime import exit_status, find_device  # noqa: E402

RESULTS = ROOT / "results" / "judges.jsonl"


class Transformer(nn.Module):
    def __init__(self, image_channels: int, image_size: int, n_classes: int, width: int = 64):
        super().__init__()
        self.embed = nn.Linear(16 * image_channels, width)
        self.position = nn.Parameter(0.02 * torch.randn((image_size // 4) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.1,
                                           activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.out = nn.Linear(width, n_classes)

    def forward(self, x: torch.Tensor) -> tuple:
        """x [B, C, H, W] in [-1, 1] -> logits [B, n_classes], features [B, width]"""
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4)
        features = self.layers(self.embed(patches) + self.position).mean(1)
        return self.out(features), features


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int,
          device: torch.device) -> Transformer:
    """images [N, C, H, W] uint8, labels [N] -> the transformer, trained from a fixed seed"""
    torch.manual_seed(0)
    model = Transformer(*images.shape[1:3], int(labels.max()) + 1).to(device)
    size = images.shape[2]

    def batch_loss(step):
        index = torch.randint(len(images), (128,))
        x, y = to_float(images[index].to(device)), labels[index].to(device)
        down, right = torch.randint(5, (2,)).tolist()    # shifts by up to two pixels
        x = F.pad(x, [2] * 4, value=-1)[:, :, down:down + size, right:right + size]
        return F.cross_entropy(model(x)[0], y)

    return train_classifier(model, batch_loss, epochs * len(images) // 128, lr=2e-3,
                            name="second judge")


def compare(name: str, first: torch.Tensor, second: torch.Tensor, sensitive: list) -> dict:
    """first, second [N]: classes by both judges -> how many are normal, and where both agree"""
    first, second = (has_class(classes, sensitive) for classes in (first, second))
    return {"images": name, "n": len(first), "rate": float((~first).float().mean()),
            "rate_by_second": float((~second).float().mean()),
            "agreement": float((first == second).float().mean()),
            "sensitive_to_either": int((first | second).sum()),
            "sensitive_to_both": int((first & second).sum())}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--sensitive", help="classes or groups (default: the data set's)")
    parser.add_argument("--epochs", type=int, default=5, help="of the transformer (default: 5)")
    parser.add_argument("folders", type=Path, nargs="*", help="folders of PNGs")
    args = parser.parse_args()
    with exit_status(parser):
        info, device = DATASETS[args.dataset], find_device()
        sensitive = parse_classes(args.dataset, args.sensitive)
        data = load(args.dataset)
        channels, size = data.train.shape[1:3]
        normal = ~has_class(data.test_labels, sensitive)
        groups = {"real test images, normal": data.test[normal],
                  "real test images, sensitive": data.test[~normal]}
        for folder in args.folders:
            groups[folder.name] = read_images(folder, channels, size)
        cache = DATA_DIR / args.dataset / f"classifier_{size}x{channels}.pt"
        first, accuracy = load_judge(data, info["hflip"], cache, device)
        second = train(data.train, data.train_labels, args.epochs, device)
        right = judge(second, data.test)[0] == data.test_labels
    known = dict(dataset=args.dataset, sensitive=sensitive, accuracy=accuracy,
                 accuracy_of_second=float(right.float().mean()))
    with RESULTS.open("a") as file:
        for name, images in groups.items():
            by_first, by_second = (judge(model, images)[0] for model in (first, second))
            line = json.dumps(known | compare(name, by_first, by_second, sensitive))
            print(line)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
