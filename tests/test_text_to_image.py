"""text_to_image.py, with small random pipelines of the library's own classes."""
import json

import pytest
import torch
from conftest import overhear, refused, run, same, write
from PIL import Image

from images import grid, load_png, to_uint8

pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
load = diffusers.StableDiffusionPipeline.from_pretrained


def write_pipeline(folder, prediction_type):
    """A model for images of 8 pixels and latents of 4, with random weights."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *"phot", "a</w>", "o</w>"]    # of "a photo"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    diffusers.StableDiffusionPipeline(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=8),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(
            vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1)),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.3,
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2),
        unet=diffusers.UNet2DConditionModel(
            sample_size=4, block_out_channels=[8], layers_per_block=1,
            down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"],
            mid_block_type=None, norm_num_groups=4, cross_attention_dim=16),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False,
                                          steps_offset=1, prediction_type=prediction_type),
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models_and_images")
    for name in ["epsilon", "v_prediction"]:
        write_pipeline(root / name, name)
    for part, count in [("unlabeled", 12), ("sensitive", 4)]:
        write(torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8), root / "images" / part)
    return root


def flags(root, model, out, *more):
    return ["text_to_image.py", "--model", root / model, "--data_dir", root / "images", "--prompt",
            "a photo", "--prior", 0.5, "--batch_size", 6, "--lr", 1e-2, "--device", "cpu",
            "--dtype", "float32", "--out_dir", root / out, *more]


@pytest.fixture(scope="module")
def whole(root):
    return overhear(*flags(root, "epsilon", "whole", "--max_steps", 30))


@pytest.mark.parametrize("model", ["epsilon", "v_prediction"])
def test_first_step_by_hand(root, model):
    command = flags(root, model, model + "_1", "--batch_size", 12, "--grad_accum", 2)
    printed, calls = overhear(*command, killed=True)
    assert "steps 1 to 60 minimise" in printed    # 60 passes over 4 images, 4 per step
    assert len(calls) == 2    # the signal does not cut a step
    pipe, risk = load(root / model), 0
    for x_0, t, eps, prompt in calls:    # 4 images of U and 2 of S
        assert same([t[:2], eps[:2], prompt[:2]], [t[4:], eps[4:], prompt[4:]])
        assert t[:4].sort().values.diff().min() > 100    # spread evenly
        target = pipe.scheduler.get_velocity(x_0, eps, t) if model == "v_prediction" else eps
        output = pipe.unet(pipe.scheduler.add_noise(x_0, eps, t), t, prompt).sample
        loss_u, loss_s = (target - output).square().sum(dim=(1, 2, 3)).split([4, 2])
        risk += 0.5 * -torch.log(1 - torch.exp(-loss_s)).mean() / 2
        risk += (loss_u.mean() - 0.5 * loss_s.mean()).abs() / 2
    assert f"risk {risk:.2f} " in printed
    gradient = torch.autograd.grad(risk, list(pipe.unet.parameters()))
    norm = torch.cat([part.flatten() for part in gradient]).norm()
    state = torch.load(root / f"{model}_1" / "ckpt.pt")["optimizer"]["state"]
    for i, part in enumerate(gradient):    # AdamW's first moment: 0.1 of the clipped gradient
        torch.testing.assert_close(state[i]["exp_avg"], 0.1 * part / norm, rtol=1e-3, atol=1e-6)


def test_latents_and_prompts_are_the_librarys(root, whole):
    pipe, latents = load(root / "epsilon"), []
    with torch.no_grad():
        for part in ["unlabeled", "sensitive"]:
            files = sorted((root / "images" / part).iterdir())
            x = pipe.image_processor.preprocess([Image.open(file) for file in files])
            latents.append(pipe.vae.encode(x).latent_dist.mode() * pipe.vae.config.scaling_factor)
        tokens = pipe.tokenizer(["a photo", ""], padding="max_length", return_tensors="pt")
        texts = pipe.text_encoder(tokens.input_ids)[0]
    def nearest(found, expected):    # -> the row of `expected` that each row of `found` is
        distance = (found.flatten(1)[:, None] - expected.flatten(1)).abs().amax(2)
        assert distance.amin(1).max() < 1e-5
        return distance.argmin(1)
    x_0, _, _, prompts = map(torch.stack, zip(*whole[1]))    # [30 steps, 4 of U and 2 of S, ...]
    assert len(nearest(x_0[:, :4].flatten(0, 1), latents[0]).unique()) == 12    # all of U
    assert len(nearest(x_0[:, 4:].flatten(0, 1), latents[1]).unique()) == 4    # all of S
    assert 4 <= nearest(prompts[:, :4].flatten(0, 1), texts).sum() <= 20    # about a tenth of 120


@pytest.mark.parametrize("lora", [False, True])
def test_result_draws_the_images_and_only_the_unet_changed(root, whole, lora):
    old, folder = load(root / "epsilon"), root / ("lora" if lora else "whole")
    if lora:    # resumed
        command = flags(root, "epsilon", "lora", "--lora", 2, "--lr", 0.1, "--max_steps", 5)
        overhear(*command, killed=True)
        run(*command, "--resume")
        assert all("lora" in name for name in torch.load(folder / "ckpt.pt")["weights"])
        (new := load(root / "epsilon")).load_lora_weights(folder / "lora")
    else:
        new = load(folder / "model")
        assert same(dict(old.vae.state_dict()), dict(new.vae.state_dict()))
        assert same(dict(old.text_encoder.state_dict()), dict(new.text_encoder.state_dict()))
    before, _, after = load_png(folder / "before_after.png").split([26, 12, 26], dim=2)
    assert (before.int() - after).abs().max() > 10
    for pipe, expected in [(old, before), (new, after)]:
        x = pipe(["a photo"] * 8, generator=torch.manual_seed(0), output_type="pt").images
        assert (grid(to_uint8(2 * x - 1)).int() - expected).abs().max() <= 1    # rounding


def test_resumption_is_exact_and_needs_the_same_flags(root, whole):
    command = flags(root, "epsilon", "cut", "--max_steps", 30)
    overhear(*command, killed=True)
    refused("add --resume", *command)
    refused("--lr cannot", *command, "--lr", 1, "--resume")
    assert "steps 2 to 30" in run(*command, "--resume").stdout
    end, resumed = (torch.load(root / name / "ckpt.pt") for name in ["whole", "cut"])
    assert same(end, resumed)
    last, = end["optimizer"]["param_groups"]    # the rate falls from --lr to 0
    assert last["lr"] == pytest.approx(1e-2 / 30)
