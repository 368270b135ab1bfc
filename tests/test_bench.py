"""The bench on a network small enough for a test: every figure is there, and the arithmetic is counted right."""
import json

import pytest
import torch
import torch.nn as nn
from conftest import refused, run

import unet

FLAGS = ["--device", "cpu", "--model", "mini", "--image_size", 8, "--batch_size", 4, "--steps", 2, "--repeats", 2]


@pytest.fixture(autouse=True)
def mini(monkeypatch):
    monkeypatch.setitem(unet.PRESETS, "mini", dict(channels=(8, 16), groups=4, blocks=1, attention=()))


def test_every_figure_is_there():
    printed = run("bench.py", *FLAGS).stdout
    figures = json.loads(printed.splitlines()[-1])
    assert figures["train_images_per_second"] == pytest.approx(4 / figures["step_seconds"])
    assert figures["share_of_peak"] == pytest.approx(figures["train_flops_per_image"] * figures["train_images_per_second"] / figures["matmul_flops"])
    assert 0 < figures["forward_seconds"] < figures["step_seconds"] and figures["sample_images_per_second"] > 0
    assert figures["memory_bytes"] > 2 ** 20 and "rival" not in figures
    for words in ["training", "images/s", "sampling", "in 2 steps", "of a matrix multiplication's", "memory", "not compiled"]:
        assert words in printed


def test_flops_are_twice_the_multiplications_forward_and_about_twice_that_backward():
    model = unet.UNet(unet.preset("mini", 1, 8))
    multiplications = []

    def count(module, inputs, output):
        weights = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features    # of one output
        multiplications.append(output.numel() * weights)

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(4, 1, 8, 8), torch.zeros(4))
    figures = json.loads(run("bench.py", *FLAGS).stdout.splitlines()[-1])
    assert figures["train_flops_per_image"] == pytest.approx(3 * 2 * sum(multiplications) / 4, rel=0.1)


def test_against_the_library():
    pytest.importorskip("diffusers")
    for flags, rival in [([], "the same architecture"), (["--model", "tiny"], "channels (32, 64, 64)")]:
        figures = json.loads(run("bench.py", *FLAGS, *flags, "--against", "diffusers").stdout.splitlines()[-1])
        assert figures["rival"] == rival
        assert figures["train_ratio"] > 0 and figures["rival_train_images_per_second"] > 0 and figures["sample_ratio"] > 0


@pytest.mark.parametrize("flags, words", [
    (["--batch_size", "1"], "--batch_size must be at least 2"),
    (["--steps", "1001"], "--steps 1001 is more than the 1000 timesteps"),
    (["--image_size", "7"], "image size 7 cannot be halved evenly"),
    (["--model", "huge"], "--model: invalid choice: 'huge'"),
    (["--device", "banana"], "--device banana is not to be had here"),
])
def test_a_bad_command_line_is_refused(flags, words):
    refused(2, words, "bench.py", *FLAGS, *flags)
