"""The benchmark of very small networks: its figures fit together; it compares like with like."""
import json

import pytest
import torch
import torch.nn as nn
from conftest import MINI, run

import unet

FAST = ["--device", "cpu", "--dtype", "float32", "--batch_size", 4, "--steps", 2, "--repeats", 1]


def test_its_figures_fit_together():
    done = run("bench.py", *FAST, "--image_size", 8)
    model, results = done.variables["model"], json.loads(done.stdout.splitlines()[-1])
    assert results["train_images_per_second"] == pytest.approx(4 / results["step_seconds"])
    flops_per_second = results["train_flops_per_image"] * results["train_images_per_second"]
    assert results["share_of_peak"] == pytest.approx(flops_per_second / results["matmul_flops"])
    assert results["sample_images_per_second"] > 0 and not results["compile"]

    multiplications = []

    def listen(module, inputs, output):
        multiplications.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(listen)
    model(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    # each is a multiplication and an addition; backward takes twice as many
    assert results["train_flops_per_image"] == pytest.approx(6 * sum(multiplications), rel=0.1)


@pytest.mark.parametrize("patch", [1, 4])
def test_the_library_gets_a_network_of_the_same_size(monkeypatch, patch):
    pytest.importorskip("diffusers")
    monkeypatch.setitem(unet.PRESETS, "patched", MINI | dict(patch=patch))
    variables = run("bench.py", *FAST, "--model", "patched", "--image_size", 7, "--against",
                    "diffusers").variables
    ours, theirs = (sum(p.numel() for p in variables[name].parameters())
                    for name in ["model", "rival"])
    assert ours == theirs
    assert variables["results"]["train_ratio"] > 0 and variables["results"]["sample_ratio"] > 0
