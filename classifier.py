"""
A small convolutional classifier and its training, for the judge, the filter, and your own images.

    model = Classifier(image_channels=1, image_size=28, n_outputs=10)
    train_classifier(model, batch_loss, steps=1500, lr=4e-3)    # batch_loss(step) -> a scalar
    logits, features = predict(model, images.split(500))        # images [N, C, H, W] uint8

The judge in evaluate.py gave all published rates and FIDs but those of the emoji. If you change its
layers or training, raise JUDGE_VERSION there.
"""
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

from images import to_float
from runtime import warn


class Classifier(nn.Module):
    """Convolutions that halve the resolution until it is at most 4, then 128 features and logits.
    Batch normalization before each ReLU gives all features a similar scale, so that distances
    between features do not depend on the scale of the weights."""

    def __init__(self, image_channels: int, image_size: int, n_outputs: int, strided: bool = False):
        """image_size: in pixels; images larger than 64x64 are averaged down to 64x64.
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
    name: what stands before the progress. -> the model, frozen, in eval mode"""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    start = time.monotonic()
    for step in range(1, steps + 1):
        loss = batch_loss(step - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            left = (time.monotonic() - start) / step * (steps - step)
            end = "\n" if step == steps else ""
            warn(f"\r{name}: step {step}/{steps}, {left:.0f} seconds left ", end=end)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def predict(model: Classifier, batches) -> tuple:
    """batches: an iterable of images [B, C, H, W] uint8
    -> logits [N, n_outputs] and features [N, 128] of all of them, float32 on the CPU"""
    device = next(model.parameters()).device
    logits, features = zip(*(model(to_float(batch.to(device))) for batch in batches))
    return torch.cat(logits).cpu(), torch.cat(features).cpu()


# -----------------------------------------------------------------------------
# sensitive or normal?

def balanced_loss(z_n: torch.Tensor, z_s: torch.Tensor) -> torch.Tensor:
    """z_n [B_n], z_s [B_s]: logits of "sensitive" on normal and sensitive images. -> scalar"""
    return 0.5 * (F.softplus(z_n).mean() + F.softplus(-z_s).mean())


def distort(x: torch.Tensor, hflip: bool) -> torch.Tensor:
    """x [B, C, H, W] in [-1, 1] -> each image rotated, scaled, sheared, shifted and, with hflip,
    mirrored at random; the border is black."""
    angle, scale, shear, right, down = torch.rand(5, len(x), device=x.device) * 2 - 1
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    x = torch.where(mirrored & hflip, x.flip(3), x)
    cos, sin, scale = (0.3 * angle).cos(), (0.3 * angle).sin(), 1 + 0.15 * scale
    row_x = torch.stack([scale * cos, 0.2 * shear - sin, 0.15 * right], dim=1)
    row_y = torch.stack([sin, scale * cos, 0.15 * down], dim=1)
    where = F.affine_grid(torch.stack([row_x, row_y], dim=1), x.shape, align_corners=False)
    return F.grid_sample(x + 1, where, align_corners=False) - 1


def fit(images: torch.Tensor, normal: torch.Tensor, sensitive: torch.Tensor, loss_fn, hflip: bool,
        steps: int, device: torch.device, name: str) -> Classifier:
    """Trains on 64 random images of each class per step -> the network, with one logit.
    images [N, C, H, W] uint8; normal, sensitive: indices of the two classes in it, or of U and S;
    hflip: mirror at random; loss_fn(z_n, z_s): of their logits, [64] each -> scalar"""
    model = Classifier(*images.shape[1:3], n_outputs=1, strided=True)
    model = model.to(device, memory_format=torch.channels_last)

    def batch_loss(step):
        batch = torch.cat([ids[torch.randint(len(ids), (64,))] for ids in (normal, sensitive)])
        logits, _ = model(distort(to_float(images[batch].to(device)), hflip))
        return loss_fn(*logits[:, 0].split(64))

    return train_classifier(model, batch_loss, steps, lr=3e-3, name=name)


def sensitive_logits(model: Classifier, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """-> the logits of "sensitive" of images[index], [len(index)] float32 on the CPU"""
    logits, _ = predict(model, (images[batch] for batch in index.split(500)))
    return logits[:, 0]
