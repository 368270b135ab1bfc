"""The benchmark of very small networks: its figures fit together; it compares like with like."""
import json
import runpy

import pytest
import torch
import torch.nn as nn
from conftest import MINI, ROOT, small_networks

import unet


def bench(monkeypatch, *flags):
    """Runs the benchmark. Returns its variables."""
    small = ["--device", "cpu", "--dtype", "float32", "--batch_size", "4", "--steps", "2",
             "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["bench.py", *small, *flags])
    with small_networks():
        return runpy.run_path(str(ROOT / "bench.py"))


def test_its_figures_fit_together(monkeypatch, capsys):
    model = bench(monkeypatch, "--image_size", "8")["model"]
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
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
    padded = ["--model", "patched", "--image_size", "7"]
    variables = bench(monkeypatch, *padded, "--against", "diffusers")
    ours, theirs = (sum(p.numel() for p in variables[name].parameters())
                    for name in ["model", "rival"])
    assert ours == theirs
    assert variables["results"]["train_ratio"] > 0 and variables["results"]["sample_ratio"] > 0
