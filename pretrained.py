"""
Models in the diffusers format: read one to clean it, write the cleaned one back.

    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32
    python sample.py --ckpt out/cifar10-pu-0.09091-init_from/ckpt.pt --save_diffusers cleaned/

The first command fetches a model from the hub; DDPMPipeline.from_pretrained reads what the second
writes. A model is a folder with config.json, diffusion_pytorch_model.bin or .safetensors, and
scheduler_config.json, or with the first two in unet/ and the last in scheduler/. Our U-Net is
theirs, with other names for its fields and tensors.
"""
import json
import os
import re
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from data import DATA_DIR
from diffusion import GaussianDiffusion
from files import load_verified, read_checkpoint, save_whole, write_whole
from formats import fetch
from unet import UNet, UNetConfig

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
IGNORED = ["decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup",
           "inv_gamma", "power"]    # how the average in unet_ema/ came about

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
    """A checkpoint (see files.read_checkpoint) -> its network with the averaged weights, ready
    to sample, and its diffusion. Raises OSError where they are damaged, or not for this unet.py."""
    try:
        model = UNet(UNetConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["ema"])
        diffusion = GaussianDiffusion(1000, ckpt["args"]["schedule"], ckpt["args"]["prediction"])
    except Exception:    # whatever the fields of another program lead to
        raise OSError("the checkpoint holds a network that does not fit this unet.py") from None
    check_weights(model, "the checkpoint")
    return model.eval().requires_grad_(False), diffusion


def check_weights(model: UNet, source):
    """Raises OSError where a weight is not finite, or larger than in any network that works."""
    for name, weight in model.named_parameters():
        if not weight.abs().max() < 1e6:    # a flipped bit makes 1e36 of 0.01, or NaN
            raise OSError(f"{source} is damaged: {name} holds a {weight.abs().max():.3g}")


def load_pretrained(source, data_dir: Path = DATA_DIR) -> tuple:
    """-> a UNet to start from, ready to train, and its diffusion. source: a folder in the diffusers
    format; OWNER/NAME or OWNER/NAME@REVISION, a model on the hub, which is fetched to data_dir
    once; or a ckpt.pt of train.py, or its folder. Averaged weights are taken where there are any.
    Raises OSError where a file is missing or damaged, or describes what this project lacks."""
    path = Path(os.path.expanduser(source))
    if not path.exists():
        name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?", str(source))
        if not name or Path(path.parts[0]).exists():    # a mistyped path does not ask the hub
            raise FileNotFoundError(f"{source} does not exist, and is not the name of a model")
        path = fetch_pretrained(str(source), Path(data_dir))
    places = ["ckpt.pt", "unet_ema", "unet", "."]    # the moving average before the last weights
    path = next(path / place for place in places if (path / place).exists())
    if path.is_file():
        model, diffusion = load_checkpoint(read_checkpoint(path))
        return model.train().requires_grad_(True), diffusion
    model, diffusion = read_config(path / "config.json"), read_diffusion(path)
    weights, state = read_weights(path), {}
    misfit = f"the weights in {path} do not fit its config.json"
    try:
        for name in model.state_dict():
            state[name] = torch.cat([weights.pop(theirs) for theirs in diffusers_names(name)])
        model.load_state_dict(state, assign=True)
    except KeyError as error:
        raise OSError(f"{misfit}: they lack {error}") from None
    except RuntimeError as error:
        raise OSError(f"{misfit}: {str(error).splitlines()[-1].strip()}") from None
    if weights:
        raise OSError(f"{misfit}: they have a {min(weights)}")
    check_weights(model, path)
    return model, diffusion


def fetch_pretrained(name: str, data_dir: Path) -> Path:
    """Fetches those files of OWNER/NAME[@REVISION] that data_dir does not have -> their folder."""
    folder = data_dir / name
    repository, _, revision = name.partition("@")

    def get(file, inner, verify=read_json):
        root = f"{HUB}/{repository}/resolve/{revision or 'main'}"
        if not (folder / file).exists():
            fetch([f"{root}/{file}", f"{root}/{inner}/{file}"], folder / file, verify)

    try:
        get("config.json", "unet")
    except OSError as error:
        with suppress(OSError):    # it is not empty, or could not be made
            folder.rmdir()
        raise OSError(f"{name} is neither a folder here nor a model on the hub: {error}") from None
    get("scheduler_config.json", "scheduler")
    read_config(folder / "config.json")    # fails early: the weights are gigabytes
    read_diffusion(folder)
    if not (folder / f"{WEIGHTS}.safetensors").exists():
        try:
            get(f"{WEIGHTS}.bin", "unet", read_tensors)
        except OSError as error:
            try:
                import safetensors  # noqa: F401 (fail before the download)

                get(f"{WEIGHTS}.safetensors", "unet", read_tensors)
            except (OSError, ImportError) as other:
                raise OSError(f"{error}; {other}") from None
    return folder


def read_json(path: Path) -> dict:
    try:
        return {} | json.loads(path.read_bytes())    # TypeError if it is no dictionary
    except FileNotFoundError:
        raise OSError(f"{path} does not exist: a model in the diffusers format has one, so has a "
                      f"checkpoint-500/ of such a training") from None
    except (ValueError, TypeError, RecursionError):
        raise OSError(f"{path} is damaged: it is not a JSON object") from None


def require(path: Path, fields: dict, name: str, allowed):
    """Raises OSError where a field of the JSON file at path has none of the allowed values."""
    value = fields.get(name)
    if value not in list(allowed):
        raise OSError(f"{path}: {name} = {json.dumps(value)} is not supported here")


def read_diffusion(folder: Path) -> GaussianDiffusion:
    """Reads the scheduler_config.json of the model in a folder: there, in scheduler/, or beside the
    folder, if it is a unet/ or checkpoint-500/. What is absent has its value in DDPM, except for
    beta_schedule, which other kinds of diffusion lack."""
    for place in [folder.resolve(), *folder.resolve().parents]:
        paths = [place / "scheduler_config.json", place / "scheduler" / "scheduler_config.json"]
        path = next(filter(Path.exists, paths), None)
        if path or not re.match("unet|checkpoint-", place.name):
            break
    if path is None:
        print(f"{folder} has no scheduler_config.json: assuming DDPM's linear noise schedule, and "
              f"that it predicts eps", file=sys.stderr)
        return GaussianDiffusion()
    fields = FIXED_SCHEDULER | {"prediction_type": "epsilon"} | read_json(path)
    require(path, fields, "beta_schedule", SCHEDULES)
    require(path, fields, "prediction_type", PREDICTIONS)
    schedule = SCHEDULES[fields["beta_schedule"]]
    prediction = PREDICTIONS[fields["prediction_type"]]
    for name, value in FIXED_SCHEDULER.items():
        if schedule == "linear" or not name.startswith("beta_"):    # cosine has no such ends
            require(path, fields, name, [value])
    return GaussianDiffusion(1000, schedule, prediction)


def read_config(path: Path) -> UNet:
    """Reads a config.json -> the network that it describes, without weights."""
    fields = {"dropout": 0.0} | read_json(path)    # some models on the hub have no dropout
    for name in fields:
        if name in FIXED:
            require(path, fields, name, [FIXED[name]])
        elif name not in [*FIELDS.values(), *DERIVED, *IGNORED] and not name.startswith("_"):
            require(path, fields, name, [None, False])    # unknown here, so it must be off
    try:
        config = UNetConfig(**{ours: fields[theirs] for ours, theirs in FIELDS.items()})
        config.channels, config.head_dim = tuple(config.channels), config.head_dim or 0
        kinds = enumerate(fields["down_block_types"])
        config.attention = tuple(i for i, kind in kinds if kind.startswith("Attn"))
        for ours, default in vars(UNetConfig()).items():
            value = getattr(config, ours)
            if type(value) not in (type(default), int) or (type(value) is int and value < 0):
                raise ValueError(f"{FIELDS[ours]} = {json.dumps(value)} is not possible")
        with torch.device("meta"):    # takes no memory, however large
            model = UNet(config)
    except KeyError as error:
        raise OSError(f"{path} lacks {error}") from None
    except Exception as error:    # layers raise anything
        raise OSError(f"{path} makes no sense: {str(error).splitlines()[0]}") from None
    for name in DERIVED:
        require(path, fields, name, [describe(config)[name]])
    require(path, fields, "downsample_padding", [0, 1])
    return model


def read_weights(folder: Path) -> dict:
    """-> {name: float32 tensor}, with the names that attention has today. Without the usual files,
    a variant is read, such as diffusion_pytorch_model.fp16.safetensors."""
    kinds = [".bin", ".safetensors", ".*.json", ".*.bin", ".*.safetensors"]
    paths = [path for kind in kinds for path in sorted(folder.glob(WEIGHTS + kind))]
    if not paths:
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS}.bin nor {WEIGHTS}.safetensors")
    if paths[0].suffix == ".json":
        raise OSError(f"{paths[0]}: weights in several files are not supported: save them in one")
    weights = read_tensors(paths[0])
    for old, new in OLD_NAMES.items():
        weights = {name.replace(f".{old}.", f".{new}."): x for name, x in weights.items()}
    return weights


def read_tensors(path: Path) -> dict:
    """Reads and checks a file of weights -> {name: float32 tensor}"""
    try:
        if ".safetensors" in path.name:    # also while its name ends in .tmp
            from safetensors.torch import load_file  # an optional package

            weights = load_file(path)
        else:
            weights = load_verified(path)
        return {name: x.float() for name, x in weights.items()}
    except ImportError:
        raise OSError(f"to read {path}: pip install safetensors") from None
    except Exception as error:    # anything
        raise OSError(f"{path} is damaged, or cannot be read ({type(error).__name__})") from None


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
        text = json.dumps(fields, indent=2) + "\n"
        write_whole(folder / file, partial(Path.write_text, data=text))
