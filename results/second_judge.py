"""
A second opinion: does a judge of another architecture agree with the one of evaluate.py?

    python sample.py --ckpt out/mnist-pu-0.5/ckpt.pt --n 1000 --out_dir samples/
    python results/second_judge.py --dataset mnist --sensitive odd samples/

The judge of evaluate.py and the filter are both small convolutional networks, and could share blind
spots. This one is a transformer: 4x4 patches, attention, no convolution and no batch normalization.
It is trained on the same real labels. Both judge the real test images, and the PNGs of each folder.
One line of JSON for each goes to results/judges.jsonl.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W] in [-1, 1] -> logits [B, n_classes]"""
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=4, q=4)
        return self.out(self.layers(self.embed(patches) + self.position).mean(1))


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, device: torch.device):
    """images [N, C, H, W] uint8, labels [N] -> the transformer, trained from a fixed seed"""
    torch.manual_seed(0)
    model = Transformer(*images.shape[1:3], int(labels.max()) + 1).to(device)
    steps = epochs * len(images) // 128
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(len(images), (128,))
        x, y = to_float(images[index].to(device)), labels[index].to(device)
        right, down = torch.randint(-2, 3, (2,)).tolist()
        loss = F.cross_entropy(model(x.roll((down, right), (2, 3))), y)    # the border is black
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"\rstep {step + 1}/{steps}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return model.eval()


def compare(name: str, first: torch.Tensor, second: torch.Tensor, sensitive: list) -> dict:
    """first, second [N]: classes by both judges -> how many are normal, and where both agree"""
    first, second = (has_class(classes, sensitive) for classes in (first, second))
    return {"images": name, "n": len(first), "rate": float((~first).float().mean()),
            "rate_by_second": float((~second).float().mean()),
            "agreement": float((first == second).float().mean())}


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
        sensitive = parse_classes(args.dataset, args.sensitive or info["sensitive"])
        data = load(args.dataset)
        channels, size = data.train.shape[1:3]
        folders = {str(folder): read_images(folder, channels, size) for folder in args.folders}
        cache = DATA_DIR / args.dataset / f"classifier_{size}x{channels}.pt"
        first, accuracy = load_judge(data, info["hflip"], cache, device)
        second = train(data.train, data.train_labels, args.epochs, device)

        def both(images):
            with torch.no_grad():
                logits = [second(to_float(some.to(device))) for some in images.split(500)]
            return judge(first, images)[0], torch.cat(logits).argmax(1).cpu()

        results = []
        by_first, by_second = both(data.test)
        is_sensitive = has_class(data.test_labels, sensitive)
        for name, group in [("normal", ~is_sensitive), ("sensitive", is_sensitive)]:
            results.append(compare(f"real test images, {name}", by_first[group], by_second[group],
                                   sensitive))
        accuracies = {"accuracy": accuracy,
                      "accuracy_of_second": float((by_second == data.test_labels).float().mean())}
        for name, images in folders.items():
            results.append(compare(name, *both(images), sensitive))
    with RESULTS.open("a") as file:
        for result in results:
            line = json.dumps(dict(dataset=args.dataset, sensitive=sensitive) | result | accuracies)
            print(line)
            file.write(line + "\n")


if __name__ == "__main__":
    main()
