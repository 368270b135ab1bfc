"""The diffusers format: parity with that library, if installed, and models that do not fit."""
import json
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import SMALL, refused, run

import pretrained
from diffusion import GaussianDiffusion
from pretrained import load_checkpoint, load_pretrained, save_pretrained
from unet import UNet, UNetConfig

CIFAR10 = dict(    # google/ddpm-cifar10-32
    sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None,
    downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
CELEBA = dict(    # google/ddpm-celebahq-256, at a quarter of its image size
    CIFAR10, sample_size=64, block_out_channels=(128, 128, 256, 256, 512, 512),
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4)
DEFAULTS = dict(    # that library's own paddings, embeddings, heads and epsilon
    sample_size=16, in_channels=1, out_channels=1, block_out_channels=(32, 64), norm_num_groups=8,
    layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"))
LARGE_EPS = dict(DEFAULTS, norm_eps=0.1)    # so that it matters to the output
COSINE = GaussianDiffusion(1000, "cosine")
SAME = 1e-4    # the largest difference of outputs, relative, that counts as rounding


def theirs(config):
    torch.manual_seed(0)
    model = pytest.importorskip("diffusers").UNet2DModel(**config).eval()
    with torch.no_grad():
        for p in model.parameters():    # norms and biases too
            p += 0.02 * torch.randn_like(p)
    return model


def difference(theirs, ours, config):
    """Returns the largest difference between the outputs of their network and ours on random
    images, as a fraction of the largest output."""
    size = config["sample_size"]
    x, t = torch.randn(2, config.get("in_channels", 3), size, size), torch.tensor([3, 977])
    with torch.no_grad():
        a, b = theirs(x, t).sample, ours.eval()(x, t)
    return float((a - b).abs().max() / a.abs().max())


def save_theirs(model, folder, scheduler='{"beta_schedule": "squaredcos_cap_v2"}'):
    model.save_pretrained(folder, safe_serialization=False)
    (folder / "scheduler_config.json").write_text(scheduler)


@pytest.mark.parametrize("config, n_params", [
    (CIFAR10, 35_746_307), (CELEBA, 113_673_219), (DEFAULTS, None), (LARGE_EPS, None)])
def test_parity_and_the_way_back(tmp_path, config, n_params):
    model = theirs(config)
    save_theirs(model, tmp_path / "theirs")
    ours, diffusion = load_pretrained(tmp_path / "theirs")
    assert (diffusion.schedule, diffusion.prediction) == ("cosine", "eps")
    assert n_params in (None, sum(p.numel() for p in ours.parameters()))
    assert ours.config.norm_eps == model.config.norm_eps
    assert difference(model, ours, config) < SAME
    save_pretrained(ours, diffusion, tmp_path / "ours")
    back = type(model).from_pretrained(tmp_path / "ours")
    assert same_weights(back.state_dict(), model.state_dict())
    for key, value in config.items():
        assert back.config[key] == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("field, value", [
    ("norm_eps", 0.01), ("downsample_padding", 0), ("flip_sin_to_cos", False), ("freq_shift", 1),
    ("attention_head_dim", 16)])
def test_a_wrong_field_is_seen_in_the_output(tmp_path, field, value):
    """Each of these mistakes exceeds the bound of the test above."""
    model = theirs(LARGE_EPS)
    save_theirs(model, tmp_path / "theirs")
    wrong, _ = load_pretrained(changed(tmp_path / "theirs", tmp_path, **{field: value}))
    assert difference(model, wrong, LARGE_EPS) > 10 * SAME


def test_swapped_weights_are_seen_in_the_output(tmp_path):
    model = theirs(DEFAULTS)
    save_theirs(model, tmp_path / "theirs")
    ours, _ = load_pretrained(tmp_path / "theirs")
    right = {name: weight.clone() for name, weight in ours.state_dict().items()}
    block, attention = "up.0.blocks.1", "down.1.attentions.0"
    q, k, v = right[f"{attention}.qkv.weight"].chunk(3)
    for wrong in [
        {f"{attention}.qkv.weight": torch.cat([q, v, k])},
        {f"{block}.norm1.weight": right[f"{block}.norm1.bias"]},
        {f"{block}.conv2.weight": right["mid1.conv2.weight"]},
    ]:
        ours.load_state_dict(right | wrong)
        assert difference(model, ours, DEFAULTS) > 10 * SAME
    ours.load_state_dict(right)
    assert difference(model, ours, DEFAULTS) < SAME


def test_a_pipeline_with_safetensors_and_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = theirs(DEFAULTS)
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    ours, diffusion = load_pretrained(tmp_path / "theirs")
    assert diffusion.schedule == "linear" and difference(model, ours, DEFAULTS) < SAME
    save_pretrained(ours, COSINE, tmp_path / "ours")
    back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert same_weights(back.unet.state_dict(), model.state_dict())
    alpha_bar = back.scheduler.alphas_cumprod.tolist()
    torch.testing.assert_close(alpha_bar, COSINE.alpha_bar, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("sampler, steps, prediction", [
    ("ddim", 50, "eps"), ("ddpm", 1000, "eps"), ("ddim", 50, "v")])
def test_samplers_agree(tmp_path, sampler, steps, prediction):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = UNet(UNetConfig(1, 8, channels=(8,), blocks=1, attention=(), groups=4)).eval()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    diffusion, noise = GaussianDiffusion(prediction=prediction), torch.Generator().manual_seed(1)
    save_pretrained(model, diffusion, tmp_path)
    x = torch.randn(2, 1, 8, 8, generator=noise)
    scheduler, extra = diffusers.DDPMScheduler.from_pretrained(tmp_path), {}
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, timestep_spacing="trailing")
        extra = dict(use_clipped_model_output=True)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.expand(2)), t, x, generator=noise, **extra).prev_sample
    generator = torch.Generator().manual_seed(1)
    ours = diffusion.sample(model, (2, 1, 8, 8), steps, sampler, generator=generator)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


# -----------------------------------------------------------------------------
# without that library

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a model for MNIST in the diffusers format, written by our code."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    torch.manual_seed(0)
    config = UNetConfig(1, 28, channels=(8, 16), blocks=1, attention=(1,), groups=4)
    save_pretrained(UNet(config), COSINE, folder)
    return folder


def changed(folder, tmp_path, file="config.json", **fields):
    """Returns a copy of the folder with other values in one of its files."""
    copy = tmp_path / "changed"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **fields}))
    return copy


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_old_names_of_attention_are_understood(folder, tmp_path):
    copy = changed(folder, tmp_path)
    weights = torch.load(copy / "diffusion_pytorch_model.bin")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in old_names.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert "mid_block.attentions.0.proj_attn.bias" in weights
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    a, b = load_pretrained(copy)[0], load_pretrained(folder)[0]
    assert same_weights(a.state_dict(), b.state_dict())


def test_a_model_is_fetched_from_the_hub_once(folder, tmp_path, monkeypatch):
    hub = tmp_path / "hub" / "someone" / "a-model" / "resolve" / "main"
    for path in folder.iterdir():
        inner = hub / ("scheduler" if "scheduler" in path.name else "unet")
        inner.mkdir(parents=True, exist_ok=True)
        (inner / path.name).write_bytes(path.read_bytes())
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(pretrained, "HUB", f"http://127.0.0.1:{server.server_address[1]}")
    model, diffusion = load_pretrained("someone/a-model", tmp_path / "data")
    with pytest.raises(OSError, match="someone/no-model is neither a folder here nor a model"):
        load_pretrained("someone/no-model", tmp_path / "data")
    assert not (tmp_path / "data" / "someone" / "no-model").exists()
    server.shutdown()
    again, _ = load_pretrained("someone/a-model", tmp_path / "data")
    assert diffusion.schedule == "cosine"
    assert same_weights(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("file, fields, words", [
    ("config.json", {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768},
     '_class_name = "UNet2DConditionModel" is not'),
    ("config.json", {"cross_attention_dim": 768}, "cross_attention_dim = 768 is not"),
    ("config.json", {"num_class_embeds": 10}, "num_class_embeds = 10 is not"),
    ("config.json", {"out_channels": 2}, "out_channels = 2 is not"),
    ("config.json", {"sample_size": [28, 32]}, r"sample_size = \[28, 32\] is not"),
    ("config.json", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, r"up_block_types = \["),
    ("config.json", {"norm_num_groups": 3}, "no sense: groups = 3 does not divide 8 channels"),
    ("config.json", {"block_out_channels": [8, 32]}, "not fit its config.json: size mismatch for"),
    ("config.json", {"block_out_channels": 8}, "config.json makes no sense"),
    ("config.json", {"down_block_types": [3, 4]}, "config.json makes no sense"),
    ("config.json", {"layers_per_block": None}, "config.json makes no sense"),
    ("config.json", {"layers_per_block": 2}, "lack 'down_blocks.0.resnets.1.norm1.weight'"),
    ("config.json",
     {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
     "have a down_blocks.1.attentions.0"),
    ("scheduler_config.json", {"prediction_type": "sample"}, 'prediction_type = "sample" is not'),
    ("scheduler_config.json", {"beta_schedule": "scaled_linear"},
     'beta_schedule = "scaled_linear" is not'),
    ("scheduler_config.json", {"beta_schedule": "linear", "beta_end": 0.03},
     "beta_end = 0.03 is not"),
])
def test_what_cannot_be_honoured_is_named(folder, tmp_path, file, fields, words):
    with pytest.raises(OSError, match=words):
        load_pretrained(changed(folder, tmp_path, file, **fields))


def test_files_that_are_missing_or_damaged(folder, tmp_path):
    copy = changed(folder, tmp_path)
    weights = copy / "diffusion_pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(1, f"{weights} is damaged",
            "train.py", "--init_from", copy, "--out_dir", tmp_path / "run")
    weights.unlink()
    with pytest.raises(OSError, match="has neither diffusion_pytorch_model.bin nor"):
        load_pretrained(copy)
    (copy / "config.json").write_text("[1]")
    with pytest.raises(OSError, match="config.json is damaged"):
        load_pretrained(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(OSError, match="config.json lacks 'sample_size'"):
        load_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(OSError, match="config.json does not exist: a model in the diffusers form"):
        load_pretrained(copy)
    with pytest.raises(OSError, match="nowhere does not exist, and is not the name of a model"):
        load_pretrained(tmp_path / "nowhere")


def test_fine_tuning_starts_at_the_model_and_goes_back_to_its_format(folder, tmp_path):
    """With a learning rate too small to change a weight, the model comes out as it went in."""
    flags = [*SMALL, "--lr", "1e-50", "--out_dir", tmp_path / "run", "--init_from", folder]
    printed = run("train.py", *flags, "--max_steps", 2).stdout
    assert f"{folder} U-Net of" in printed
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert ckpt["args"]["schedule"] == "cosine" and ckpt["args"]["max_steps"] == 2
    for weights in (ckpt["model"], ckpt["ema"]):
        assert same_weights(weights, load_pretrained(folder)[0].state_dict())
    run("train.py", "--out_dir", tmp_path / "run", "--resume", "--max_steps", 3, "--lr", "0.01")
    moved = torch.load(tmp_path / "run" / "ckpt.pt")
    assert not same_weights(moved["model"], ckpt["model"])
    start = ckpt["ema"]["conv_out.bias"]
    change_of_model, change_of_average = (
        float((moved[kind]["conv_out.bias"] - start).norm()) for kind in ("model", "ema"))
    # the average starts at the model, and reaches back over a quarter of the run, which is a step
    assert change_of_average == pytest.approx(change_of_model, rel=0.01)

    save = ["--ckpt", tmp_path / "run" / "ckpt.pt", "--save_diffusers", tmp_path / "cleaned"]
    run("sample.py", *save, cwd=tmp_path)
    assert not (tmp_path / "samples.png").exists()
    assert same_weights(load_pretrained(tmp_path / "cleaned")[0].state_dict(), moved["ema"])
    refused(2, "is not empty", "sample.py", *save)


def test_fine_tuning_our_own_checkpoint(small_run, folder, tmp_path):
    start = small_run[0] / "ckpt.pt"
    run("train.py", *SMALL, "--lr", "1e-50", "--max_steps", 1, "--init_from", start,
        "--out_dir", tmp_path / "run")
    a, b = torch.load(start), torch.load(tmp_path / "run" / "ckpt.pt")
    assert same_weights(a["ema"], b["model"])
    assert (b["args"]["schedule"], b["args"]["prediction"]) == ("lognormal", "v")
    refused(2, "patch = 2, pad = 0", "sample.py", "--ckpt", start,
            "--save_diffusers", tmp_path / "cleaned")
    refused(2, "--model tiny cannot go with --init_from",
            "train.py", "--init_from", start, "--model", "tiny")
    refused(2, "--schedule cosine is not what",
            "train.py", "--init_from", start, "--schedule", "cosine")
    wide = UNet(UNetConfig(3, 32, channels=(8, 16), blocks=1, attention=(), groups=4))
    save_pretrained(wide, GaussianDiffusion(), tmp_path / "wide")
    with pytest.raises(ValueError, match="'lognormal' as its beta_schedule: only for linear, cos"):
        save_pretrained(wide, GaussianDiffusion(1000, "lognormal"), tmp_path / "no")
    refused(2, "is for 32x32 images of 3 channels, mnist has 28x28 of 1",
            "train.py", "--init_from", tmp_path / "wide", "--out_dir", tmp_path / "no")
    assert not (tmp_path / "no").exists() and not (tmp_path / "cleaned").exists()
    (tmp_path / "mine" / "unlabeled").mkdir(parents=True)
    (tmp_path / "mine" / "sensitive").mkdir()
    refused(2, "--image_size 64 is not what",
            "train.py", "--init_from", tmp_path / "wide", "--dataset", "folder",
            "--data_dir", tmp_path / "mine", "--image_size", 64, "--prior", "0.1")


def test_a_checkpoint_of_another_network_is_refused():
    toy = UNetConfig(2, 8, channels=(8, 16), blocks=1, attention=(1,), groups=4)
    ckpt = dict(config=vars(toy), ema=UNet(toy).state_dict(),
                args=dict(schedule="linear", prediction="eps"))
    assert load_checkpoint(ckpt)[0].config == toy
    for config in [replace(toy, blocks=2), replace(toy, groups=3)]:
        with pytest.raises(OSError, match="does not fit this unet.py"):
            load_checkpoint(ckpt | dict(config=vars(config)))
    with pytest.raises(OSError, match="does not fit this unet.py"):
        load_checkpoint(ckpt | dict(config=dict(vars(toy), depth=3)))
