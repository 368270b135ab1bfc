"""
Models in the diffusers format: read one to clean it, write the cleaned one back.

    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32
    python sample.py --ckpt out/cifar10-pu-0.09091/ckpt.pt --save_diffusers cleaned/

The first command fetches a model from the hub; DDPMPipeline.from_pretrained reads what the second
writes. A model is a folder with config.json, diffusion_pytorch_model.bin or .safetensors, and
scheduler_config.json, or with the first two in unet/ and the last in scheduler/. Our U-Net is
theirs, with other names for its fields and tensors.
"""
import json
import re
from pathlib import Path

import torch

from data import DATA_DIR
from diffusion import GaussianDiffusion
from formats import fetch
from runtime import read_checkpoint, save_whole
from unet import UNet, UNetConfig, check

HUB = "https://huggingface.co"
WEIGHTS = "diffusion_pytorch_model"

# The fields of config.json that UNetConfig has as well: our names -> theirs.
FIELDS = {
    "image_size": "sample_size", "image_channels": "in_channels", "channels": "block_out_channels",
    "blocks": "layers_per_block", "head_dim": "attention_head_dim", "groups": "norm_num_groups",
    "dropout": "dropout", "norm_eps": "norm_eps", "downsample_padding": "downsample_padding",
    "flip_sin_to_cos": "flip_sin_to_cos", "freq_shift": "freq_shift",
}
# The fields for which our U-Net has one value only.
FIXED = {
    "_class_name": "UNet2DModel", "act_fn": "silu", "add_attention": True,
    "time_embedding_type": "positional", "time_embedding_dim": None, "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default", "downsample_type": "conv", "upsample_type": "conv",
}
DERIVED = ["down_block_types", "up_block_types", "out_channels"]    # these follow from the others

# The same for scheduler_config.json, and the values that have other names: theirs -> ours.
FIXED_SCHEDULER = {
    "num_train_timesteps": 1000, "trained_betas": None, "beta_start": 1e-4, "beta_end": 0.02,
    "rescale_betas_zero_snr": False, "thresholding": False,
}
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}

# Our names of tensors -> theirs. Our qkv is their to_q, to_k and to_v, concatenated.
NAMES = {
    r"^time\.0": "time_embedding.linear_1",
    r"^time\.2": "time_embedding.linear_2",
    r"^mid1": "mid_block.resnets.0",
    r"^mid2": "mid_block.resnets.1",
    r"^mid_attention": "mid_block.attentions.0",
    r"^(down|up)\.(\d+)\.blocks": r"\1_blocks.\2.resnets",
    r"^(down|up)\.(\d+)\.attentions": r"\1_blocks.\2.attentions",
    r"^(down|up)\.(\d+)\.resample": r"\1_blocks.\2.\1samplers.0.conv",
    r"(resnets\.\d+)\.time": r"\1.time_emb_proj",
    r"(resnets\.\d+)\.skip": r"\1.conv_shortcut",
    r"(attentions\.\d+)\.norm": r"\1.group_norm",
    r"(attentions\.\d+)\.out": r"\1.to_out.0",
    r"^norm_out": "conv_norm_out",
}
# The names in attention until 2023, as in many files on the hub -> today's.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusers_names(name: str) -> list:
    """The name of one of our tensors -> the names of the one or three that diffusers has for it."""
    for ours, theirs in NAMES.items():
        name = re.sub(ours, theirs, name)
    if "qkv" in name:
        return [name.replace("qkv", theirs) for theirs in ["to_q", "to_k", "to_v"]]
    return [name]


def describe(config: UNetConfig) -> dict:
    """-> the fields of the config.json that describes a network"""
    fields = FIXED | {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    levels = range(len(config.channels))
    down = ["AttnDownBlock2D" if i in config.attention else "DownBlock2D" for i in levels]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    derived = {"out_channels": config.image_channels, "attention_head_dim": config.head_dim or None}
    return fields | derived | {"down_block_types": down, "up_block_types": up}


# -----------------------------------------------------------------------------
# reading

def load_checkpoint(ckpt: dict) -> tuple:
    """A checkpoint (see runtime.read_checkpoint) -> its network with the averaged weights, ready
    to sample, and its diffusion. Raises OSError where the network is not one of today's unet.py."""
    try:
        model = UNet(UNetConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["ema"])
    except (TypeError, ValueError, RuntimeError):
        raise OSError("the checkpoint holds a network that does not fit this unet.py") from None
    diffusion = GaussianDiffusion(1000, ckpt["args"]["schedule"], ckpt["args"]["prediction"])
    return model.eval().requires_grad_(False), diffusion


def load_pretrained(source, data_dir: Path = DATA_DIR) -> tuple:
    """-> a UNet to start from, ready to train, and its diffusion. source: a folder in the diffusers
    format, the name of such a model on the hub, which is fetched to data_dir once, or a ckpt.pt of
    train.py, of which the averaged weights are taken. Raises OSError where a file is missing or
    damaged, or describes what this project does not have."""
    folder = Path(source)
    if folder.is_file():
        model, diffusion = load_checkpoint(read_checkpoint(folder))
        return model.train().requires_grad_(True), diffusion
    if not folder.exists():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
            raise FileNotFoundError(f"{source} does not exist, and is not the name of a model")
        folder = fetch_pretrained(str(source), Path(data_dir))
    inner = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    diffusion = read_diffusion(scheduler / "scheduler_config.json")
    model = UNet(read_config(inner / "config.json"))
    weights, state = read_weights(inner), {}
    misfit = f"the weights in {inner} do not fit its config.json"
    try:
        for name in model.state_dict():
            state[name] = torch.cat([weights.pop(theirs) for theirs in diffusers_names(name)])
        model.load_state_dict(state)
    except KeyError as error:
        raise OSError(f"{misfit}: they lack {error}") from None
    except RuntimeError as error:
        raise OSError(f"{misfit}: {str(error).splitlines()[-1].strip()}") from None
    if weights:
        raise OSError(f"{misfit}: they have a {min(weights)}")
    return model, diffusion


def fetch_pretrained(name: str, data_dir: Path) -> Path:
    """Fetches those files of a model that data_dir does not have yet -> their folder."""
    folder = data_dir / name

    def get(file, inner):
        urls = [f"{HUB}/{name}/resolve/main/{path}" for path in [file, f"{inner}/{file}"]]
        if not (folder / file).exists():
            fetch(urls, folder / file, lambda part: None)

    try:
        get("config.json", "unet")
    except OSError as error:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise OSError(f"{name} is neither a folder here nor a model on the hub: {error}") from None
    get("scheduler_config.json", "scheduler")
    read_config(folder / "config.json")    # fails early: the weights are gigabytes
    read_diffusion(folder / "scheduler_config.json")
    if not (folder / f"{WEIGHTS}.safetensors").exists():
        try:
            get(f"{WEIGHTS}.bin", "unet")
        except OSError:
            get(f"{WEIGHTS}.safetensors", "unet")
    return folder


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise OSError(f"{path} does not exist: a model in the diffusers format has one") from None
    except (ValueError, TypeError):
        raise OSError(f"{path} is damaged: it is not a JSON object") from None


def require(path: Path, fields: dict, name: str, allowed):
    """Raises OSError where a field of the JSON file at path has none of the allowed values."""
    value = fields.get(name)
    if value not in list(allowed):
        raise OSError(f"{path}: {name} = {json.dumps(value)} is not supported here")


def read_diffusion(path: Path) -> GaussianDiffusion:
    """Reads a scheduler_config.json. What is absent there has its value in DDPM."""
    fields = {"beta_schedule": "linear", "prediction_type": "epsilon"}
    fields |= FIXED_SCHEDULER | read_json(path)
    require(path, fields, "beta_schedule", SCHEDULES)
    require(path, fields, "prediction_type", PREDICTIONS)
    schedule = SCHEDULES[fields["beta_schedule"]]
    prediction = PREDICTIONS[fields["prediction_type"]]
    for name, value in FIXED_SCHEDULER.items():
        if schedule == "linear" or not name.startswith("beta_"):    # cosine has no such ends
            require(path, fields, name, [value])
    return GaussianDiffusion(1000, schedule, prediction)


def read_config(path: Path) -> UNetConfig:
    """Reads a config.json."""
    fields = {"dropout": 0.0} | read_json(path)    # some models on the hub have no dropout
    for name in fields:
        if name in FIXED:
            require(path, fields, name, [FIXED[name]])
        elif name not in [*FIELDS.values(), *DERIVED] and not name.startswith("_"):
            require(path, fields, name, [None, False])    # unknown here, so it must be off
    try:
        config = UNetConfig(**{ours: fields[theirs] for ours, theirs in FIELDS.items()})
        config.channels, config.head_dim = tuple(config.channels), config.head_dim or 0
        kinds = enumerate(fields["down_block_types"])
        config.attention = tuple(i for i, kind in kinds if kind.startswith("Attn"))
        if not isinstance(config.image_size, int):
            raise ValueError(f"sample_size = {config.image_size} is not one number")
        check(config)
    except KeyError as error:
        raise OSError(f"{path} lacks {error}") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, IndexError) as error:
        raise OSError(f"{path} makes no sense: {error}") from None
    for name in DERIVED:
        require(path, fields, name, [describe(config)[name]])
    return config


def read_weights(folder: Path) -> dict:
    """-> {name: float32 tensor}, with the names that attention has today."""
    path = folder / f"{WEIGHTS}.bin"
    if not path.exists():
        path = path.with_suffix(".safetensors")
    if not path.exists():
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS}.bin nor {WEIGHTS}.safetensors")
    try:
        if path.suffix == ".bin":
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            from safetensors.torch import load_file  # an optional package

            weights = load_file(path)
        for old, new in OLD_NAMES.items():
            weights = {name.replace(f".{old}.", f".{new}."): x for name, x in weights.items()}
        return {name: x.float() for name, x in weights.items()}
    except ImportError:
        raise OSError(f"to read {path}: pip install safetensors") from None
    except Exception:    # torch.load and load_file raise whatever their readers raise
        raise OSError(f"{path} is damaged, or is not a file of weights: get it again") from None


# -----------------------------------------------------------------------------
# writing

def save_pretrained(model: UNet, diffusion: GaussianDiffusion, folder: Path):
    """Writes a folder that load_pretrained reads, and DDPMPipeline.from_pretrained of diffusers.
    Raises ValueError for what that library does not have, OSError where it cannot be written."""
    patch, pad = model.config.patch, model.config.pad
    if patch > 1 or pad > 0:
        raise ValueError(f"patch = {patch}, pad = {pad}: the diffusers format has 1 and 0 only")
    if diffusion.schedule not in SCHEDULES.values():
        raise ValueError(f"the diffusers format has no word for {diffusion.schedule!r} as its "
                         f"beta_schedule: only for {', '.join(SCHEDULES.values())}")
    words = {ours: theirs for theirs, ours in (SCHEDULES | PREDICTIONS).items()}
    scheduler = {"_class_name": "DDPMScheduler", "beta_schedule": words[diffusion.schedule],
                 "prediction_type": words[diffusion.prediction], **FIXED_SCHEDULER}
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"],
             "scheduler": ["diffusers", "DDPMScheduler"]}
    weights = {}
    for name, tensor in model.state_dict().items():
        names = diffusers_names(name)
        weights |= zip(names, [part.clone() for part in tensor.cpu().chunk(len(names))])
    folder.mkdir(parents=True, exist_ok=True)
    save_whole(weights, folder / f"{WEIGHTS}.bin")
    for file, fields in [("config.json", describe(model.config)), ("model_index.json", index),
                         ("scheduler_config.json", scheduler)]:
        (folder / file).write_text(json.dumps(fields, indent=2) + "\n")
