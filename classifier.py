"""
A small convolutional classifier and its training, for the judge and the filter.

    model = Classifier(image_channels=1, image_size=28, n_outputs=10)
    train_classifier(model, batch_loss, steps=1500, lr=4e-3)    # batch_loss(step) -> a scalar
    logits, features = predict(model, images.split(500))        # images [N, C, H, W] uint8

All published figures come from the judge in evaluate.py. If you change its layers or training,
raise JUDGE_VERSION there. The filter is in pu_filter.py.
"""
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from images import to_float


class Classifier(nn.Module):
    """Convolutions that halve the resolution until it is at most 4, then 128 features and logits.

    Batch normalization before each ReLU gives every feature a variance near 1, so that distances
    between features do not depend on the scale of the weights."""

    def __init__(self, image_channels: int, image_size: int, n_outputs: int, strided: bool = False):
        """image_size: in pixels; larger images than 64x64 are averaged down to 64x64.
        strided: the filter's layers, twice as fast. The first convolution has a stride of 2, and
        max-pooling comes before normalization instead of after ReLU."""
        super().__init__()
        layers = []
        channels, width, size = image_channels, 32, min(image_size, 64)
        if strided:
            conv = nn.Conv2d(channels, width, 4, stride=2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels, width, size = width, 2 * width, size // 2
        while size > 4:
            conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            norm, relu, pool = nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)
            layers += [conv, pool, norm, relu] if strided else [conv, norm, relu, pool]
            channels, width, size = width, min(2 * width, 128), size // 2
        linear = nn.Linear(channels * size ** 2, 128, bias=False)
        self.features = nn.Sequential(*layers, nn.Flatten(), linear, nn.BatchNorm1d(128), nn.ReLU())
        self.out = nn.Linear(128, n_outputs)

    def forward(self, x: torch.Tensor) -> tuple:
        """x [B, C, H, W] in [-1, 1] -> logits [B, n_outputs], features [B, 128]"""
        if x.shape[-1] > 64:
            x = F.interpolate(x, (64, 64), mode="area")
        features = self.features(x)
        return self.out(features), features


def train_classifier(model: Classifier, batch_loss, steps: int, lr: float,
                     name: str = "classifier") -> Classifier:
    """Trains by AdamW and one cycle of the learning rate, and shows the progress on stderr.

    batch_loss: step in [0, steps) -> the loss of its batch, a scalar. lr: the peak learning rate.
    name: what stands before the progress. Returns the model, frozen, in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    start = time.time()
    for step in range(steps):
        loss = batch_loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % 50 == 0 or done == steps:
            left = (time.time() - start) / done * (steps - done)
            print(f"\r{name}: step {done}/{steps}, {left:.0f} seconds left ",
                  end="\n" if done == steps else "", file=sys.stderr, flush=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def predict(model: Classifier, batches) -> tuple:
    """batches: an iterable of images [B, C, H, W] uint8
    -> logits [N, n_outputs] and features [N, 128] of all of them, float32 on the CPU"""
    device = next(model.parameters()).device
    logits, features = [], []
    for batch in batches:
        batch_logits, batch_features = model(to_float(batch.to(device)))
        logits.append(batch_logits.cpu())
        features.append(batch_features.cpu())
    return torch.cat(logits), torch.cat(features)
