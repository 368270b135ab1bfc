"""The weights of the judge in the repository, which every published figure hangs on."""
import hashlib

import torch
from conftest import ROOT

SHIPPED = "6997f3d69522a66cdad3a5fe7e0729cc0897acfce4fe14153f496e453cc3978a"
ACCURACY = 0.9944999814033508


def test_the_shipped_weights_are_the_published_ones():
    """Over the bytes of the tensors in order: neither their names nor the file's format matter."""
    cache = torch.load(ROOT / "data" / "mnist" / "classifier_28x1.pt", weights_only=True)
    digest = hashlib.sha256()
    for tensor in cache["model"].values():
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == SHIPPED and cache["accuracy"] == ACCURACY
