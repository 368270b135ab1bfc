"""The diffusers format: parity with that library, if installed, and models that do not fit."""
import json
import random
import shutil
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
CELEBA = dict(    # google/ddpm-celebahq-256
    CIFAR10, sample_size=256, block_out_channels=(128, 128, 256, 256, 512, 512),
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


@pytest.mark.parametrize("config, n_params", [(CIFAR10, 35_746_307), (CELEBA, 113_673_219)])
def test_published_models_have_as_many_parameters_here(tmp_path, config, n_params):
    UNet2DModel = pytest.importorskip("diffusers").UNet2DModel
    with torch.device("meta"):
        model = UNet2DModel(**config)
    model.save_config(tmp_path)
    ours = pretrained.read_config(tmp_path / "config.json")
    for network in [model, ours]:
        assert sum(p.numel() for p in network.parameters()) == n_params


def smaller(config, sample_size):
    """Returns a config with a quarter of the channels, and images of another size."""
    channels = tuple(c // 4 for c in config["block_out_channels"])
    return dict(config, sample_size=sample_size, block_out_channels=channels, norm_num_groups=8)


@pytest.mark.parametrize("config", [
    smaller(CIFAR10, 16), smaller(CELEBA, 32), DEFAULTS, LARGE_EPS])
def test_parity_and_the_way_back(tmp_path, config):
    model = theirs(config)
    save_theirs(model, tmp_path / "theirs")
    ours, diffusion = load_pretrained(tmp_path / "theirs")
    assert (diffusion.schedule, diffusion.prediction) == ("cosine", "eps")
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


class Hub(SimpleHTTPRequestHandler):
    """Serves files, or the log-in page of a hotel instead of all of them."""
    log_in, asked = False, []

    def do_GET(self):
        self.asked.append(self.path)
        if not self.log_in:
            return super().do_GET()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Welcome! Please log in.</html>")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """Starts a hub with someone/a-model. Returns its handler, its server and the model's folder."""
    pipeline(folder, tmp_path / "hub" / "someone" / "a-model" / "resolve" / "main")
    handler = type("Handler", (Hub,), dict(asked=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0),
                                 partial(handler, directory=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(pretrained, "HUB", f"http://127.0.0.1:{server.server_address[1]}")
    yield handler, server, tmp_path / "hub" / "someone" / "a-model" / "resolve"
    server.shutdown()


def pipeline(folder, copy):
    """Copies a model to unet/ and scheduler/ in another folder."""
    for path in folder.iterdir():
        inner = copy / ("scheduler" if "scheduler" in path.name else "unet")
        inner.mkdir(parents=True, exist_ok=True)
        (inner / path.name).write_bytes(path.read_bytes())


def test_a_model_is_fetched_from_the_hub_once(hub, tmp_path):
    model, diffusion = load_pretrained("someone/a-model", tmp_path / "data")
    with pytest.raises(OSError, match="someone/no-model is neither a folder here nor a model"):
        load_pretrained("someone/no-model", tmp_path / "data")
    assert not (tmp_path / "data" / "someone" / "no-model").exists()
    hub[1].shutdown()
    again, _ = load_pretrained("someone/a-model", tmp_path / "data")
    assert diffusion.schedule == "cosine"
    assert same_weights(model.state_dict(), again.state_dict())


def test_a_revision_can_be_named(hub, tmp_path):
    handler, _, files = hub
    (files / "main").rename(files / "v1.2")
    model, _ = load_pretrained("someone/a-model@v1.2", tmp_path / "data")
    assert (tmp_path / "data" / "someone" / "a-model@v1.2" / "config.json").exists()
    assert all("/someone/a-model/resolve/v1.2/" in path for path in handler.asked)
    with pytest.raises(OSError, match="someone/a-model is neither a folder here nor a model"):
        load_pretrained("someone/a-model", tmp_path / "data")


def test_only_a_whole_download_is_kept(hub, tmp_path):
    handler, _, files = hub
    copy, weights = tmp_path / "data" / "someone" / "a-model", "diffusion_pytorch_model.bin"
    handler.log_in = True
    with pytest.raises(OSError, match="is neither .* is damaged: it is not a JSON object"):
        load_pretrained("someone/a-model", tmp_path / "data")
    assert not copy.exists()
    handler.log_in = False

    whole = (files / "main" / "unet" / weights).read_bytes()
    for damaged in [whole[:-9000], whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]]:
        (files / "main" / "unet" / weights).write_bytes(damaged)
        with pytest.raises(OSError, match="bin.*.tmp is damaged.*safetensors could not be"):
            load_pretrained("someone/a-model", tmp_path / "data")
        assert sorted(path.name for path in copy.iterdir()) == [
            "config.json", "scheduler_config.json"]
    (files / "main" / "unet" / weights).write_bytes(whole)
    load_pretrained("someone/a-model", tmp_path / "data")
    assert (copy / weights).read_bytes() == whole


def test_safetensors_are_fetched_where_there_is_no_bin(hub, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    unet = hub[2] / "main" / "unet"
    weights = torch.load(unet / "diffusion_pytorch_model.bin")
    (unet / "diffusion_pytorch_model.bin").unlink()
    safetensors.save_file(weights, unet / "diffusion_pytorch_model.safetensors")
    whole = (unet / "diffusion_pytorch_model.safetensors").read_bytes()
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(OSError, match="safetensors could not be downloaded"):
        load_pretrained("someone/a-model", tmp_path / "data")
    (unet / "diffusion_pytorch_model.safetensors").write_bytes(whole)
    load_pretrained("someone/a-model", tmp_path / "data")


@pytest.mark.parametrize("path", [
    "here/typo", "./someone/a-model", "../a-model", "~/a-model", "someone/a-model/unet",
    "someone\\a-model", "typo", "someone/a-model@", "/someone"])
def test_a_mistyped_path_does_not_ask_the_hub(hub, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(path, tmp_path / "data")
    assert hub[0].asked == []


def test_the_layouts_that_people_have(folder, small_run, tmp_path, capsys):
    weights = load_pretrained(folder)[0].state_dict()

    def loads(path, schedule="cosine", expected=weights):
        model, diffusion = load_pretrained(path)
        assert diffusion.schedule == schedule
        assert same_weights(model.state_dict(), expected)
        assert all(p.requires_grad and not p.is_meta for p in model.parameters())
        return capsys.readouterr().err

    # a pipeline, its unet/ alone, with and without a scheduler beside it
    pipeline(folder, tmp_path / "pipeline")
    assert not loads(tmp_path / "pipeline") and not loads(tmp_path / "pipeline" / "unet")
    shutil.copytree(tmp_path / "pipeline" / "unet", tmp_path / "bare")
    shutil.copytree(tmp_path / "pipeline" / "unet", tmp_path / "checkpoint-1" / "unet")
    for bare in ["bare", "checkpoint-1"]:
        printed = loads(tmp_path / bare, "linear")
        assert "has no scheduler_config.json: assuming DDPM's linear" in printed
        assert len(printed.splitlines()) == 1

    # training checkpoints: the moving average before the last weights, the scheduler above
    checkpoint = tmp_path / "pipeline" / "checkpoint-500"
    shutil.copytree(tmp_path / "pipeline" / "unet", checkpoint / "unet_ema")
    ema = json.loads((folder / "config.json").read_text())
    ema |= dict(decay=0.9999, inv_gamma=1.0, min_decay=0.0, optimization_step=500, power=0.75,
                update_after_step=0, use_ema_warmup=True)
    (checkpoint / "unet_ema" / "config.json").write_text(json.dumps(ema))
    (checkpoint / "unet").mkdir()
    assert not loads(checkpoint) and not loads(checkpoint / "unet_ema")
    with pytest.raises(OSError, match=r"has one, so has a checkpoint-500/"):
        load_pretrained(tmp_path)

    # a variant, and several files
    name = "diffusion_pytorch_model"
    whole, half = tmp_path / "bare" / f"{name}.bin", tmp_path / "bare" / f"{name}.fp16.bin"
    torch.save({name: x.half() for name, x in torch.load(whole).items()}, half)
    loads(tmp_path / "bare", "linear")
    whole.unlink()
    loads(tmp_path / "bare", "linear", {name: x.half().float() for name, x in weights.items()})
    (tmp_path / "bare" / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(OSError, match="index.json: weights in several files are not supported"):
        load_pretrained(tmp_path / "bare")

    # a run of train.py
    loads(small_run[0], "lognormal", torch.load(small_run[0] / "ckpt.pt")["ema"])


def test_what_that_library_writes_is_understood(tmp_path, capsys):
    """A bare U-Net, its moving average, its variants and shards."""
    pytest.importorskip("diffusers")
    from diffusers.training_utils import EMAModel

    model, bare = theirs(DEFAULTS), tmp_path / "bare"
    model.save_pretrained(bare)
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.save_pretrained(tmp_path / "checkpoint-500" / "unet_ema")
    for path in [bare, tmp_path / "checkpoint-500"]:
        ours, diffusion = load_pretrained(path)
        assert diffusion.schedule == "linear" and difference(model, ours, DEFAULTS) < SAME
        assert "assuming DDPM's linear noise schedule" in capsys.readouterr().err
    model.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors").exists()
    ours, _ = load_pretrained(tmp_path / "half")
    assert difference(model.float(), ours, DEFAULTS) < SAME
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    with pytest.raises(OSError, match="index.json: weights in several files are not supported"):
        load_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_flipped_bits(folder, tmp_path, kind):
    """In .bin files every flip that matters is noticed. .safetensors files have no checksum: there,
    no flip leads to a traceback, NaN or an absurd weight."""
    copy, right = changed(folder, tmp_path), load_pretrained(folder)[0].state_dict()
    path = copy / f"diffusion_pytorch_model.{kind}"
    if kind == "safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(torch.load(path.with_suffix(".bin")), path)
        path.with_suffix(".bin").unlink()
    whole, choose, n_refused = path.read_bytes(), random.Random(0), 0
    header = int.from_bytes(whole[:8], "little")
    for i in range(60):
        place = choose.randrange(len(whole))
        if kind == "safetensors" and i % 2:
            place = choose.randrange(header)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        try:
            model = load_pretrained(copy)[0]
        except OSError as error:
            assert "\n" not in str(error) and str(copy) in str(error)
            n_refused += 1
        else:
            if kind == "bin":
                assert same_weights(model.state_dict(), right)
            assert all(x.abs().max() < 1e6 for x in model.parameters())
    assert n_refused > (40 if kind == "bin" else 25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0 ** 120])
def test_weights_that_are_not_finite_or_absurd(folder, tmp_path, value):
    copy = changed(folder, tmp_path)
    weights = torch.load(copy / "diffusion_pytorch_model.bin")
    weights["conv_out.bias"][0] = value
    torch.save(weights, copy / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match=f"{copy}.* is damaged"):
        load_pretrained(copy)


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
    ("config.json", {"layers_per_block": 1.0}, "layers_per_block = 1.0 is not possible"),
    ("config.json", {"flip_sin_to_cos": "false"}, 'flip_sin_to_cos = "false" is not possible'),
    ("config.json", {"attention_head_dim": -8}, "attention_head_dim = -8 is not possible"),
    ("config.json", {"downsample_padding": 2}, "downsample_padding = 2 is not supported"),
    ("config.json", {"norm_eps": None}, "norm_eps = null is not possible"),
    ("config.json", {"block_out_channels": [8, 2 ** 20]}, "not fit its config.json: size mismatch"),
    ("config.json", {"block_out_channels": [8, 2 ** 80]}, "config.json makes no sense"),
    ("scheduler_config.json", {"prediction_type": "sample"}, 'prediction_type = "sample" is not'),
    ("scheduler_config.json", {"beta_schedule": None, "shift": 3.0}, "beta_schedule = null is not"),
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
    for text in ["[1]", "[]", "<html>", "[" * 10 ** 5]:
        (copy / "config.json").write_text(text)
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
    # the average starts at the model, and spans half of the run: its decay is 1 - 2 / 3
    assert change_of_average == pytest.approx(2 / 3 * change_of_model, rel=0.01)

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
    refused(2, "patch = 4, pad = 2", "sample.py", "--ckpt", start,
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
    for part in [dict(args={}), dict(args=dict(schedule="x", prediction="eps")), dict(ema=[]),
                 dict(ema={}), dict(config=None), dict(config=dict(vars(toy), groups=0))]:
        with pytest.raises(OSError, match="does not fit this unet.py"):
            load_checkpoint(ckpt | part)
    ckpt["ema"]["conv_out.bias"][0] = float("nan")
    with pytest.raises(OSError, match="the checkpoint is damaged: conv_out.bias holds a nan"):
        load_checkpoint(ckpt)
