"""
Networks of the diffusers library: read one to clean it, write the cleaned one back.

    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32
    python sample.py --ckpt out/cifar10-pu-0.09091-init_from/ckpt.pt --save_diffusers cleaned/

The first command fetches a model from the hub; DDPMPipeline.from_pretrained reads what the second
writes. --init_from also takes a folder in that library's format, or a ckpt.pt of train.py.
"""
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch.nn as nn

from diffusion import GaussianDiffusion
from runtime import UserError, all_finite, read_checkpoint
from unet import UNet, UNetConfig

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}    # the library's words -> ours


class DiffusersUNet(nn.Module):
    """The library's UNet2DModel, called as our UNet: x_t [B, C, H, W], t [B] -> like x_t."""
    def __init__(self, net, scheduler_config: dict):
        super().__init__()
        self.net, self.scheduler_config = net, scheduler_config
        self.config = SimpleNamespace(image_channels=net.config.in_channels,
                                      image_size=net.config.sample_size)

    def forward(self, x_t, t, **condition):
        return self.net(x_t, t, **condition).sample


@contextmanager
def one_sentence(subject):
    """Runs the block; any error of the library becomes a UserError: the subject, and its reason."""
    try:
        yield
    except ImportError:
        raise UserError("this model needs the diffusers library: pip install diffusers") from None
    except Exception as error:    # it raises many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{subject}: {reason}") from None


def load_pretrained(source: str) -> tuple:
    """-> a network to start from, and its diffusion. It takes averaged weights if there are any.
    source: a ckpt.pt, or the folder of one; a folder in the diffusers format; or OWNER/NAME or
    OWNER/NAME@REVISION, which that library fetches from the hub.
    Raises UserError where it is missing, damaged, or a model that train.py cannot train."""
    path = Path(source).expanduser()
    hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", source)
    if not path.exists() and (not hub_name or Path(path.parts[0]).exists()):    # as out/typo
        raise UserError(f"{source} does not exist, and is not the name of a model on the hub")
    path = path / "ckpt.pt" if (path / "ckpt.pt").exists() else path
    if path.is_file():
        return load_checkpoint(read_checkpoint(path))
    return load_diffusers(source, path)


def load_diffusers(source: str, path: Path) -> tuple:
    """-> the DiffusersUNet in a folder, or on the hub if there is none, and its diffusion."""
    origin, revision = str(path), None
    with one_sentence(source):
        from diffusers import DDPMScheduler, UNet2DModel, logging
        from huggingface_hub import snapshot_download

        logging.set_verbosity(logging.FATAL)    # the library also raises what it logs
        if not path.exists():    # the small files first: they tell whether train.py can train it
            origin, revision = f"{source}@main".split("@")[:2]
            path = Path(snapshot_download(origin, revision=revision, allow_patterns="*.json"))
        part = next((part for part in ("unet_ema", "unet") if (path / part).exists()), "")
        folders = [(path / part).resolve()]
        while re.match("unet|checkpoint-", folders[-1].name):    # inside a pipeline or a training
            folders.append(folders[-1].parent)
        config = UNet2DModel.load_config(folders[0])
        places = [place for folder in folders for place in (folder, folder / "scheduler")]
        found = (place for place in places if (place / "scheduler_config.json").exists())
        scheduler_config = DDPMScheduler.load_config(next(found, places[0]))    # raises for none
        scheduler = DDPMScheduler.from_config(scheduler_config)

    kind, size, c_in, c_out = map(config.get, [
        "_class_name", "sample_size", "in_channels", "out_channels"])
    prediction = scheduler.config.prediction_type
    vae = any((folder / name).exists() for folder in folders for name in ("vae", "vqvae"))
    misfits = [
        vae and "is latent: a vae turns its samples into pixels",
        kind != "UNet2DModel" and f"is a {kind}, not a UNet2DModel",
        (c_in not in (1, 3) or c_out != c_in) and f"has {c_in} channels in and {c_out} out",
        not isinstance(size, int) and f"has sample_size {size}, not one number",
        (config.get("class_embed_type") or config.get("num_class_embeds")) and "needs labels",
        "beta_schedule" not in scheduler_config and f"has a {scheduler_config.get('_class_name')}",
        prediction not in PREDICTIONS and f"predicts {prediction}, not epsilon or v_prediction"]
    if any(misfits):
        raise UserError(f"{source} {next(filter(None, misfits))}: train.py cannot train it "
                        f"(text_to_image.py is for Stable Diffusion)")
    with one_sentence(source):
        net, report = UNet2DModel.from_pretrained(
            origin, subfolder=part, revision=revision, low_cpu_mem_usage=False,
            output_loading_info=True)
    if any(report.values()) or not all_finite(net.state_dict()):
        raise UserError(f"{source}: the weights do not fit its config.json, or are not finite")
    diffusion = GaussianDiffusion(scheduler.alphas_cumprod, PREDICTIONS[prediction])
    return DiffusersUNet(net, scheduler_config), diffusion


def load_checkpoint(ckpt: dict) -> tuple:
    """A checkpoint of train.py -> its network, with the averaged weights and in eval mode, and its
    diffusion. Raises UserError where they do not fit that network."""
    config, scheduler_config = ckpt["network"]["config"], ckpt["network"]["scheduler_config"]
    with one_sentence("the checkpoint does not fit the network that pretrained.py builds"):
        if scheduler_config is None:
            model = UNet(UNetConfig(**config))
        else:
            from diffusers import UNet2DModel

            model = DiffusersUNet(UNet2DModel.from_config(config), scheduler_config)
        model.load_state_dict(ckpt["ema"])
    diffusion = GaussianDiffusion(ckpt["diffusion"]["alpha_bar"], ckpt["diffusion"]["prediction"])
    return model.eval(), diffusion


def describe(model) -> dict:
    """-> what load_checkpoint builds the network from: numbers, strings, lists, dicts"""
    if isinstance(model, UNet):
        return dict(config=vars(model.config), scheduler_config=None)
    return dict(config=dict(model.net.config), scheduler_config=model.scheduler_config)


def save_diffusers(model, folder: Path):
    """Writes a new folder, which DDPMPipeline.from_pretrained reads.
    Raises UserError for a network of our own, and FileExistsError where the folder exists."""
    if isinstance(model, UNet):
        raise UserError("--save_diffusers is for networks of the diffusers library: this run began "
                        "from scratch, and is saved as ckpt.pt only")
    from diffusers import DDPMPipeline, DDPMScheduler

    folder.mkdir(parents=True)
    scheduler = DDPMScheduler.from_config(model.scheduler_config)
    DDPMPipeline(model.net, scheduler).save_pretrained(folder)
