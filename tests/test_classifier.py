"""The classifier, and the judge's weights, on which every published result depends."""
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from classifier import Classifier, balanced_loss, predict, train_classifier

SHIPPED = "6997f3d69522a66cdad3a5fe7e0729cc0897acfce4fe14153f496e453cc3978a"
ACCURACY = 0.9944999814033508


def test_the_shipped_weights_are_the_published_ones():
    """The digest is of the tensors alone, without their names and the file's format."""
    cache = torch.load(ROOT / "data" / "mnist" / "classifier_28x1.pt", weights_only=True)
    digest = hashlib.sha256()
    for tensor in cache["model"].values():
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == SHIPPED and cache["accuracy"] == ACCURACY


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 32), (3, 96)])
def test_every_size_gives_128_features(channels, size, strided):
    model = Classifier(channels, size, n_outputs=5, strided=strided).eval()
    logits, features = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 5) and features.shape == (2, 128) and features.min() == 0


def test_large_images_are_averaged():
    torch.manual_seed(0)
    model = Classifier(1, 128, n_outputs=2).eval()
    x = torch.randn(2, 1, 128, 128)
    torch.testing.assert_close(model(x)[0], model(F.avg_pool2d(x, 2))[0])


def test_both_classes_weigh_the_same():
    loss = balanced_loss(torch.tensor([0, 2.0, 1]), torch.tensor([3.0]))
    normal = torch.tensor([0, 2.0, 1]).exp().log1p().mean()    # -log(1 - sigmoid(z))
    assert loss == pytest.approx(0.5 * (normal + math.log(1 + math.exp(-3))).item())


def test_training_separates_bright_from_dark():
    torch.manual_seed(0)
    images = torch.randint(100, (64, 1, 8, 8), dtype=torch.uint8)
    images[::2] += 100
    labels = torch.arange(64) % 2
    model = Classifier(1, 8, n_outputs=2)
    train_classifier(model, lambda _: F.cross_entropy(model(images / 127.5 - 1)[0], labels),
                     steps=20, lr=1e-2)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    logits, features = predict(model, images.split(50))
    assert torch.equal(logits.argmax(1), labels) and features.shape == (64, 128)
