"""Networks of the diffusers library: the numbers are the library's, and the way there and back."""
import json
import shutil
import sys

import pytest
import torch
from conftest import SMALL, refused, run, same

from pretrained import describe, load_checkpoint, load_pretrained, save_diffusers
from runtime import UserError, read_checkpoint
from unet import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")
COSINE = dict(beta_schedule="squaredcos_cap_v2")
SCALED = dict(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")


def save(folder, scheduler=COSINE):
    """Writes the pipeline of a small network with random weights -> its folder."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        28, 1, 1, layers_per_block=1, block_out_channels=[4] * 3, norm_num_groups=2,
        down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"], attention_head_dim=4,
        up_block_types=["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"])
    for p in net.parameters():    # norms and biases too
        p.data += 0.05 * torch.randn_like(p)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save(tmp_path_factory.mktemp("pretrained") / "pipeline")


@pytest.mark.parametrize("scheduler, tolerance", [
    ({}, 1e-4), (SCALED, 1e-4), (dict(SCALED, rescale_betas_zero_snr=True), 1e-3)])
def test_loss_and_samples_are_those_of_the_library(tmp_path, scheduler, tolerance):
    theirs = diffusers.DDPMPipeline.from_pretrained(save(tmp_path / "model", scheduler))
    net, scheduler = theirs.unet, theirs.scheduler
    model, diffusion = load_pretrained(str(tmp_path / "model"))

    t, eps = torch.tensor([0, 400, 998]), torch.randn(3, 1, 28, 28)
    x_0 = torch.rand(3, 1, 28, 28) * 2 - 1
    target = eps if diffusion.prediction == "eps" else scheduler.get_velocity(x_0, eps, t)
    loss = (target - net(scheduler.add_noise(x_0, eps, t), t).sample).square().sum((1, 2, 3))
    torch.testing.assert_close(diffusion.per_image_loss(model, x_0, t, eps), loss)

    ddim = diffusers.DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    ddim.set_timesteps(20)
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    ours = diffusion.sample(model, x.shape, 20, "ddim", generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for t in ddim.timesteps:
            x = ddim.step(net(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=tolerance)


def test_a_checkpoint_holds_either_kind_of_network(pipeline, tmp_path):
    ours = UNet(UNetConfig(1, 28, (8, 16), blocks=1, attention=(1,), groups=4, patch=4))
    theirs, diffusion = load_pretrained(str(pipeline))
    alpha_bar = diffusion.alpha_bar
    for model in (ours, theirs):
        torch.save(dict(network=describe(model), ema=model.state_dict(), step=0,
                        diffusion=dict(alpha_bar=alpha_bar, prediction="v")), tmp_path / "ckpt.pt")
        ckpt = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        back, diffusion = load_checkpoint(ckpt)
        assert (diffusion.alpha_bar, diffusion.prediction) == (alpha_bar, "v")
        assert type(back) is type(model) and back.config == model.config
        assert same(back.state_dict(), model.state_dict())
        assert not back.training
        again, _ = load_pretrained(str(tmp_path))    # the folder of the ckpt.pt
        assert same(again.state_dict(), model.state_dict())
        ckpt["ema"].popitem()
        with pytest.raises(UserError, match="does not fit the network"):
            load_checkpoint(ckpt)
    with pytest.raises(UserError, match="from scratch"):
        save_diffusers(ours, tmp_path / "ours")
    with pytest.raises(FileExistsError):
        save_diffusers(theirs, tmp_path)


def test_a_whole_round(tmp_path):
    """Clean a model of 2,000 timesteps, go on with the result, resume that, and give it back."""
    start = save(tmp_path / "model", dict(SCALED, num_train_timesteps=2000))
    flags = [*SMALL, "--max_steps", 2, "--save_interval", 2]
    run("train.py", *flags, "--init_from", start, "--limit", 3, "--out_dir", tmp_path / "a")
    run("train.py", *flags, "--init_from", tmp_path / "a", "--out_dir", tmp_path / "b")
    run("train.py", "--resume", "--out_dir", tmp_path / "b")
    run("sample.py", "--ckpt", tmp_path / "b/ckpt.pt", "--save_diffusers", tmp_path / "cleaned")
    before, after = (diffusers.DDPMPipeline.from_pretrained(path)
                     for path in (start, tmp_path / "cleaned"))
    trained, _ = load_checkpoint(read_checkpoint(tmp_path / "b/ckpt.pt"))
    assert same(trained.net.state_dict(), after.unet.state_dict())
    assert not same(before.unet.state_dict(), after.unet.state_dict())
    assert torch.equal(before.scheduler.alphas_cumprod, after.scheduler.alphas_cumprod)
    assert after.scheduler.config.prediction_type == "v_prediction"


def test_layouts_that_people_have(pipeline, tmp_path):
    unet, bias = pipeline / "unet", load_pretrained(str(pipeline))[0].net.conv_out.bias

    def loads(path, bias=bias):
        model, diffusion = load_pretrained(str(path))
        expected = diffusers.DDPMScheduler(**COSINE).alphas_cumprod
        assert diffusion.alpha_bar == pytest.approx(expected.tolist())
        assert torch.equal(model.net.conv_out.bias, bias)

    loads(unet)    # the scheduler is beside it
    flat = shutil.copytree(unet, tmp_path / "flat")
    shutil.copytree(pipeline / "scheduler", flat, dirs_exist_ok=True)
    loads(flat)    # as google/ddpm-cifar10-32
    pndm = json.dumps(COSINE | dict(_class_name="PNDMScheduler"))
    (flat / "scheduler_config.json").write_text(pndm)
    loads(flat)
    checkpoint = shutil.copytree(pipeline, tmp_path / "training") / "checkpoint-500"
    shutil.copytree(unet, checkpoint / "unet")
    loads(checkpoint)
    average = diffusers.UNet2DModel.from_pretrained(unet)
    average.conv_out.bias.data += 1
    average.save_pretrained(checkpoint / "unet_ema", safe_serialization=False)
    loads(checkpoint, bias=bias + 1)
    with pytest.raises(UserError, match="scheduler_config.json"):    # no schedule is guessed
        load_pretrained(str(shutil.copytree(unet, tmp_path / "bare")))


def test_names_on_the_hub(pipeline, tmp_path, monkeypatch):
    """The library finds what it has downloaded before, by name and revision."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path / "models--someone--a-model"
    for revision, model in dict(main=pipeline, v1=save(tmp_path / "linear", {})).items():
        shutil.copytree(model, cache / "snapshots" / revision)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(revision)
    for source, schedule in {"someone/a-model": COSINE, "someone/a-model@v1": {}}.items():
        expected = diffusers.DDPMScheduler(**schedule).alphas_cumprod
        assert load_pretrained(source)[1].alpha_bar == pytest.approx(expected.tolist())
    with pytest.raises(UserError, match="^someone/another: "):
        load_pretrained("someone/another")
    with pytest.raises(UserError, match="does not exist"):    # tests/ does: a mistyped path
        load_pretrained("tests/a-model")


def test_without_the_library(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused("pip install diffusers", "train.py", *SMALL, "--init_from", pipeline)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[:-1000],                     # truncated
    lambda whole: whole[:20] + b"#" + whole[21:],    # another name of a tensor
    lambda whole: whole[:-4] + b"\0\0\xc0\x7f"])     # the last number is NaN
def test_damaged_weights_are_refused(pipeline, tmp_path, damage):
    folder = shutil.copytree(pipeline, tmp_path / "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    refused(str(folder), "train.py", *SMALL, "--init_from", folder)


@pytest.mark.parametrize("file, fields, words", [
    ("unet/config", dict(up_block_types=["UpBlock2D"] * 3), "do not fit"),    # too many weights
    ("unet/config", dict(block_out_channels=[4, 4, 8]), "size mismatch"),
    ("unet/config", dict(_class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
    ("unet/config", dict(in_channels=4, out_channels=4), "4 channels in.*text_to_image.py"),
    ("unet/config", dict(out_channels=2), "1 channels in and 2 out"),
    ("unet/config", dict(sample_size=[28, 32]), r"\[28, 32\]"),
    ("unet/config", dict(sample_size=None), "sample_size None"),
    ("unet/config", dict(num_class_embeds=10), "labels"),
    ("scheduler/scheduler_config", dict(COSINE, prediction_type="sample"), "predicts sample"),
    ("scheduler/scheduler_config", dict(_class_name="ScoreSdeVeScheduler"), "ScoreSdeVeScheduler"),
    ("vqvae/config", {}, "latent.*text_to_image.py")])
def test_what_cannot_be_trained_is_named(pipeline, tmp_path, file, fields, words):
    folder = shutil.copytree(pipeline, tmp_path / "model")
    (folder / file).parent.mkdir(exist_ok=True)
    old = json.loads((folder / "unet/config.json").read_text()) if "unet" in file else {}
    (folder / f"{file}.json").write_text(json.dumps(old | fields))
    with pytest.raises(UserError, match=f"{folder}.*{words}"):
        load_pretrained(str(folder))
