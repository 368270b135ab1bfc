"""The benchmark of very small networks: its figures fit together; it compares like with like."""
import json

import pytest
import torch
import torch.nn as nn
from conftest import MINI, run

import unet

FAST = ["--device", "cpu", "--dtype", "float32", "--batch_size", 4, "--steps", 2, "--repeats", 1]

NAMES = {    # of layers: ours, and the library's
    "time.0": "time_embedding.linear_1", "time.2": "time_embedding.linear_2",
    "down.": "down_blocks.", "up.": "up_blocks.", ".blocks.": ".resnets.", "skip": "conv_shortcut",
    ".time.": ".time_emb_proj.", "mid1": "mid_block.resnets.0", "mid2": "mid_block.resnets.1",
    "mid_attention": "mid_block.attentions.0", ".norm.": ".group_norm.", ".out.": ".to_out.0.",
    "norm_out": "conv_norm_out"}


def test_its_figures_fit_together():
    done = run("bench.py", *FAST, "--image_size", 8)
    model, results = done.variables["model"], json.loads(done.stdout.splitlines()[-1])
    assert results["train_images_per_second"] == pytest.approx(4 / results["step_seconds"])
    flops_per_second = results["train_flops_per_image"] * results["train_images_per_second"]
    assert results["share_of_peak"] == pytest.approx(flops_per_second / results["matmul_flops"])
    seconds = done.variables["seconds"]
    assert not results["compile"]
    assert results["sample_images_per_second"] == pytest.approx(4 / seconds["sample"])
    assert results["matmul_flops"] == pytest.approx(2 * 1024 ** 3 / seconds["matmul"])

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
def test_the_library_gets_the_same_network(monkeypatch, patch):
    """With our weights it computes the same: ours is DDPM's network, and speeds are comparable."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(unet.PRESETS, "patched", MINI | dict(patch=patch))
    variables = run("bench.py", *FAST, "--model", "patched", "--image_size", 8, "--against",
                    "diffusers").variables
    ours, theirs, weights = variables["model"], variables["rival"], {}
    for name, weight in ours.state_dict().items():
        weight += 0.05 * torch.randn_like(weight)    # in place, for some are near 0
        for old, new in NAMES.items():
            name = name.replace(old, new)
        name = name.replace("resample", name.split("_")[0] + "samplers.0.conv")
        for part, rows in zip("qkv", weight.chunk(3) if "qkv" in name else [weight]):
            weights[name.replace("qkv", f"to_{part}")] = rows
    theirs.net.load_state_dict(weights)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    folded = nn.functional.pixel_unshuffle(x, patch)
    expected = nn.functional.pixel_shuffle(theirs(folded, t), patch)
    torch.testing.assert_close(ours(x, t), expected, rtol=1e-4, atol=1e-4)
    for name in ["train", "sample"]:
        ratio = variables["seconds"][f"rival_{name}"] / variables["seconds"][name]
        assert variables["results"][f"{name}_ratio"] == pytest.approx(ratio)
