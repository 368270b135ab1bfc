"""The benchmark of a very small network: every number is there and is computed correctly."""
import json

import pytest
import torch
import torch.nn as nn
from conftest import refused, run

import unet

FLAGS = ["--device", "cpu", "--model", "mini", "--image_size", 8, "--batch_size", 2,
         "--steps", 2, "--repeats", 1]


@pytest.fixture(autouse=True, scope="module")
def mini():
    config = dict(channels=(8, 16), groups=4, blocks=1, attention=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unet.PRESETS, "mini", config)
        yield


@pytest.fixture(scope="module")
def bench(mini):
    """Runs the benchmark. Returns the JSON of its last line, and all that it printed."""
    printed = run("bench.py", *FLAGS).stdout
    return json.loads(printed.splitlines()[-1]), printed


def test_every_figure_is_there(bench):
    bench, printed = bench
    assert bench["train_images_per_second"] == pytest.approx(2 / bench["step_seconds"])
    flops_per_second = bench["train_flops_per_image"] * bench["train_images_per_second"]
    assert bench["share_of_peak"] == pytest.approx(flops_per_second / bench["matmul_flops"])
    assert bench["sample_images_per_second"] > 0
    assert bench["memory_bytes"] is None and "rival" not in bench    # it is for GPUs
    for words in ["training", "images/s", "sampling", "in 2 steps", "not compiled",
                  "of a matrix multiplication's"]:
        assert words in printed


def test_flops_are_twice_the_multiplications_forward_and_about_twice_that_backward(bench):
    model = unet.UNet(unet.preset("mini", 1, 8))
    multiplications = []

    def count(module, inputs, output):
        multiplications.append(output.numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    expected = 3 * 2 * sum(multiplications)
    assert bench[0]["train_flops_per_image"] == pytest.approx(expected, rel=0.1)


def test_against_the_library():
    pytest.importorskip("diffusers")
    for flags, rival in [([], "the same architecture"),
                         (["--model", "tiny"], "channels (32, 64, 64)")]:
        printed = run("bench.py", *FLAGS, *flags, "--against", "diffusers").stdout
        bench = json.loads(printed.splitlines()[-1])
        assert bench["rival"] == rival
        assert bench["train_ratio"] > 0 and bench["rival_train_images_per_second"] > 0
        assert bench["sample_ratio"] > 0 and bench["rival_sample_images_per_second"] > 0


@pytest.mark.parametrize("flags, words", [
    (["--batch_size", "1"], "--batch_size must be at least 2"),
    (["--steps", "1001"], "--steps 1001 is more than the 1000 timesteps"),
    (["--image_size", "7"], "image size 7 cannot be halved evenly"),
    (["--model", "huge"], "--model: invalid choice: 'huge'"),
    (["--device", "banana"], "--device banana is not to be had here"),
])
def test_a_bad_command_line_is_refused(flags, words):
    refused(2, words, "bench.py", *FLAGS, *flags)
