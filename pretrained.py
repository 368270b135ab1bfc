"""
Models in the diffusers format: read one to clean it, write the cleaned one back.

    python train.py --dataset cifar10 --prior 1/11 --init_from google/ddpm-cifar10-32   # fetched from the hub
    python sample.py --ckpt out/cifar10-pu-0.09091/ckpt.pt --save_diffusers cleaned/    # for DDPMPipeline.from_pretrained

The format is a folder with config.json, diffusion_pytorch_model.bin or .safetensors, and scheduler_config.json, or with
the first two in unet/ and the last in scheduler/. Our U-Net is theirs, with other names for its tensors.
"""
import json
import re
from pathlib import Path

import torch

from data import DATA_DIR
from diffusion import GaussianDiffusion
from formats import fetch
from runtime import read_checkpoint
from unet import UNet, UNetConfig, check

HUB = "https://huggingface.co"

REQUIRED = {    # fields of config.json, which may be absent there, with the only values that we can honour
    "_class_name": "UNet2DModel", "act_fn": "silu", "time_embedding_type": "positional", "time_embedding_dim": None,
    "center_input_sample": False, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1, "add_attention": True,
    "attn_norm_num_groups": None, "resnet_time_scale_shift": "default", "downsample_type": "conv", "upsample_type": "conv",
    "class_embed_type": None, "num_class_embeds": None,
}
DEFAULTS = {    # the others, with what diffusers takes where they are absent
    "sample_size": None, "in_channels": 3, "out_channels": 3, "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 8,
    "norm_num_groups": 32, "dropout": 0.0, "norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
}
SCHEDULER = {    # of scheduler_config.json, likewise
    "num_train_timesteps": 1000, "trained_betas": None, "beta_start": 1e-4, "beta_end": 0.02, "rescale_betas_zero_snr": False,
    "thresholding": False,
}
OURS = {    # and those whose values have other names here
    "beta_schedule": {"linear": "linear", "squaredcos_cap_v2": "cosine"},
    "prediction_type": {"epsilon": "eps", "v_prediction": "v"},
}

NAMES = [    # our tensors -> theirs; qkv is to_q, to_k and to_v below one another
    (r"^time\.0", "time_embedding.linear_1"),
    (r"^time\.2", "time_embedding.linear_2"),
    (r"^mid1", "mid_block.resnets.0"),
    (r"^mid2", "mid_block.resnets.1"),
    (r"^mid_attention", "mid_block.attentions.0"),
    (r"^(down|up)\.(\d+)\.blocks", r"\1_blocks.\2.resnets"),
    (r"^(down|up)\.(\d+)\.attentions", r"\1_blocks.\2.attentions"),
    (r"^(down|up)\.(\d+)\.resample", r"\1_blocks.\2.\1samplers.0.conv"),
    (r"(resnets\.\d+)\.time", r"\1.time_emb_proj"),
    (r"(resnets\.\d+)\.skip", r"\1.conv_shortcut"),
    (r"(attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"(attentions\.\d+)\.out", r"\1.to_out.0"),
    (r"^norm_out", "conv_norm_out"),
]
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}    # of attention, until 2023


def diffusers_names(name: str) -> list:
    """The name of one of our tensors -> theirs, or those of the three that it is made of."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return [name.replace("qkv", f"to_{letter}") for letter in "qkv"] if "qkv" in name else [name]


# -----------------------------------------------------------------------------
# reading

def load_checkpoint(ckpt: dict) -> tuple:
    """A checkpoint (see runtime.read_checkpoint) -> the network with its averaged weights, ready to sample, and its diffusion.
    Raises OSError where unet.py has changed too much since to hold it."""
    try:
        model = UNet(UNetConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["ema"])
    except (TypeError, ValueError, RuntimeError):
        raise OSError("the checkpoint's network does not fit this unet.py: it was trained with another") from None
    diffusion = GaussianDiffusion(1000, ckpt["args"]["schedule"], ckpt["args"]["prediction"])
    return model.eval().requires_grad_(False), diffusion


def load_pretrained(folder_or_name, data_dir: Path = DATA_DIR) -> tuple:
    """A folder, or the name of a model on the hub, which is fetched to data_dir once, or a ckpt.pt of train.py, of which
    the averaged weights are taken -> the UNet, ready to train, and its diffusion.
    Raises OSError where a file is missing or damaged, and for an architecture or a diffusion that is not ours, naming the field."""
    folder = Path(folder_or_name)
    if folder.is_file():
        model, diffusion = load_checkpoint(read_checkpoint(folder))
        return model.train().requires_grad_(True), diffusion
    if not folder.exists():
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(folder_or_name)):
            raise FileNotFoundError(f"{folder} does not exist, and is not the name of a model on the hub either")
        folder = fetch_pretrained(str(folder_or_name), Path(data_dir))
    inner = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    scheduler = folder / "scheduler" / "scheduler_config.json"
    diffusion = read_diffusion(scheduler if scheduler.exists() else folder / "scheduler_config.json")
    model = UNet(read_config(inner / "config.json"))
    weights, state = read_weights(inner), {}
    try:
        for name in model.state_dict():
            state[name] = torch.cat([weights.pop(theirs) for theirs in diffusers_names(name)])
        model.load_state_dict(state)
    except KeyError as e:
        raise OSError(f"the weights in {inner} lack {e}, which its config.json asks for") from None
    except RuntimeError as e:
        raise OSError(f"the weights in {inner} do not fit its config.json: {str(e).splitlines()[-1].strip()}") from None
    if weights:
        raise OSError(f"the weights in {inner} have a {min(weights)}, which its config.json does not ask for")
    return model, diffusion


def fetch_pretrained(name: str, data_dir: Path) -> Path:
    """-> the folder that the hub's files of the model are in, fetched where they are not there yet."""
    folder = data_dir / name

    def get(file, inner):
        if not (folder / file).exists():
            fetch([f"{HUB}/{name}/resolve/main/{path}" for path in (file, f"{inner}/{file}")], folder / file, lambda part: None)

    try:
        get("config.json", "unet")
    except OSError as e:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise OSError(f"{name} is neither a folder here nor a model that could be fetched from the hub: {e}") from None
    get("scheduler_config.json", "scheduler")
    read_config(folder / "config.json"), read_diffusion(folder / "scheduler_config.json")    # before the gigabytes
    if not (folder / "diffusion_pytorch_model.safetensors").exists():
        try:
            get("diffusion_pytorch_model.bin", "unet")
        except OSError as e:
            try:
                get("diffusion_pytorch_model.safetensors", "unet")
            except OSError as e2:
                raise OSError(f"{e}; {e2}") from None
    return folder


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: a model in the diffusers format has one") from None
    except (ValueError, TypeError):
        raise OSError(f"{path} is damaged: it is not a JSON object") from None


def refusal(path: Path, found: dict, name: str) -> OSError:
    return OSError(f"{path}: {name} = {json.dumps(found.get(name))} is not something that this project can honour")


def read_diffusion(path: Path) -> GaussianDiffusion:
    found = {**SCHEDULER, "beta_schedule": "linear", "prediction_type": "epsilon", **read_json(path)}
    for name, known in OURS.items():
        if found[name] not in list(known):
            raise refusal(path, found, name)
    schedule, prediction = (known[found[name]] for name, known in OURS.items())
    for name, value in SCHEDULER.items():
        if found[name] != value and not (schedule == "cosine" and name.startswith("beta_")):
            raise refusal(path, found, name)
    return GaussianDiffusion(1000, schedule, prediction)


def read_config(path: Path) -> UNetConfig:
    found = read_json(path)
    for name, value in found.items():
        unknown = name not in REQUIRED and name not in DEFAULTS and not name.startswith("_") and value
        if unknown or name in REQUIRED and value != REQUIRED[name]:
            raise refusal(path, found, name)
    c = {**DEFAULTS, **found}
    if not isinstance(c["sample_size"], int):
        raise refusal(path, c, "sample_size")
    try:
        attention = tuple(i for i, kind in enumerate(c["down_block_types"]) if kind == "AttnDownBlock2D")
        config = UNetConfig(c["in_channels"], c["sample_size"], tuple(c["block_out_channels"]), c["layers_per_block"], attention,
                            c["attention_head_dim"] or 0, c["norm_num_groups"], c["dropout"], norm_eps=c["norm_eps"],
                            downsample_padding=c["downsample_padding"], flip_sin_to_cos=c["flip_sin_to_cos"], freq_shift=c["freq_shift"])
        check(config)
    except (TypeError, ValueError, ZeroDivisionError, IndexError) as e:
        raise OSError(f"{path} makes no sense: {e}") from None
    ours = describe(config)
    for name in ["down_block_types", "up_block_types", "out_channels"]:
        if c[name] != ours[name]:
            raise refusal(path, c, name)
    return config


def read_weights(folder: Path) -> dict:
    """-> {name: float32 tensor}, with the names that attention has today"""
    path = folder / "diffusion_pytorch_model.bin"
    try:
        if path.exists():
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            path = path.with_suffix(".safetensors")
            from safetensors.torch import load_file    # optional
            weights = load_file(path)
        return {re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda m: OLD_NAMES[m[0]], name): x.float() for name, x in weights.items()}
    except ImportError:
        raise OSError(f"{folder} has no diffusion_pytorch_model.bin, and to read .safetensors: pip install safetensors") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has neither diffusion_pytorch_model.bin nor diffusion_pytorch_model.safetensors") from None
    except Exception:    # torch.load and load_file raise whatever their readers do
        raise OSError(f"{path} is damaged, or is not a file of weights: get it again") from None


# -----------------------------------------------------------------------------
# writing

def describe(config: UNetConfig) -> dict:
    """-> their config.json"""
    kinds = ["Attn" * (i in config.attention) for i in range(len(config.channels))]
    return dict(REQUIRED, sample_size=config.image_size, in_channels=config.image_channels, out_channels=config.image_channels,
                block_out_channels=list(config.channels), layers_per_block=config.blocks, attention_head_dim=config.head_dim or None,
                norm_num_groups=config.groups, dropout=config.dropout, norm_eps=config.norm_eps, freq_shift=config.freq_shift,
                downsample_padding=config.downsample_padding, flip_sin_to_cos=config.flip_sin_to_cos,
                down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
                up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)])


def save_pretrained(model: UNet, diffusion: GaussianDiffusion, folder: Path):
    """Writes a folder that DDPMPipeline.from_pretrained reads, and load_pretrained. Raises ValueError for what that
    library's U-Net does not have, OSError where the folder cannot be written."""
    if model.config.patch > 1 or model.config.pad:
        raise ValueError(f"the diffusers format has no words for patch = {model.config.patch}, pad = {model.config.pad} in this model's config: "
                         f"only for 1 and 0")
    scheduler = dict(SCHEDULER, _class_name="DDPMScheduler")
    for (name, known), ours in zip(OURS.items(), [diffusion.schedule, diffusion.prediction]):
        theirs = [word for word, value in known.items() if value == ours]
        if not theirs:
            raise ValueError(f"the diffusers format has no word for {ours!r} as its {name}: only for {', '.join(known.values())}")
        scheduler[name] = theirs[0]
    weights = {}
    for name, tensor in model.state_dict().items():
        theirs = diffusers_names(name)
        weights |= zip(theirs, (part.clone() for part in tensor.cpu().chunk(len(theirs))))
    index = dict(_class_name="DDPMPipeline", unet=["diffusers", "UNet2DModel"], scheduler=["diffusers", "DDPMScheduler"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    except RuntimeError as e:    # a full disk, to torch.save
        raise OSError(f"{folder} cannot be written: {str(e).splitlines()[0]}") from None
    for file, content in [("config.json", describe(model.config)), ("scheduler_config.json", scheduler), ("model_index.json", index)]:
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
