"""
What the scripts share: the device, the ranks, the precision, compilation, checkpoints, types of arguments.
"""
import argparse
import math
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist


# -----------------------------------------------------------------------------
# errors and files

@contextmanager
def exit_status(parser: argparse.ArgumentParser):
    """Ends the script in one sentence where the block raises: ValueError, a wish that cannot be granted, with exit
    status 2; OSError, a file or a machine that is not as it should be, and Ctrl-C with 1."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")


def write_whole(path: Path, write):
    """write(temporary path), then renames: the file is there whole or not at all, and nothing else stays behind.
    Raises OSError naming the file where it cannot be written."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:    # RuntimeError: a full disk, to torch.save
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        part.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# devices, ranks, precision

def find_device(name: str = None) -> torch.device:
    """The device of that name, or the best there is: cuda, else mps, else cpu. Under torchrun each process, a rank, gets
    its own, and they are connected, by NCCL or on CPUs by gloo. Raises ValueError where it cannot be had."""
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    name = name or str(torch.accelerator.current_accelerator() or "cpu")
    try:
        device = torch.device(name)
        if torchrun and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torchrun and device.type == "mps":    # which no backend connects
            device = torch.device("cpu")
        torch.zeros(1, device=device).item()
        if device.index:
            torch.accelerator.set_device_index(device.index)    # so that cuda:1 means that one everywhere
        if torchrun:
            nccl = device.type == "cuda"
            dist.init_process_group("nccl" if nccl else "gloo", device_id=device if nccl else None, timeout=timedelta(days=1))
    except (RuntimeError, AssertionError, ImportError) as e:    # AssertionError: PyTorch was built without CUDA
        reason = str(e).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} is not to be had here: {reason}") from None
    return device


def ranks() -> tuple:
    """-> the number of this process among those that torchrun started, and how many they are; otherwise 0 and 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def first_rank_first():
    """The first rank of each machine runs this block before the others do, which find what it downloaded or decoded."""
    turns = ranks()[1] > 1
    if turns and os.environ["LOCAL_RANK"] != "0":
        dist.barrier()
    yield
    if turns and os.environ["LOCAL_RANK"] == "0":
        dist.barrier()


def device_flags(parser):
    """Adds the flags that find_device and default_dtype are the defaults of."""
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of the network's forward pass (default: bfloat16 on cuda that has it and on CPUs with AVX512-BF16, float16 on "
                             "other cuda, else float32)")


def default_dtype(device: torch.device) -> str:
    """-> bfloat16 on CUDA GPUs that compute in it and on CPUs with AVX512-BF16, float16 on other CUDA GPUs, float32 elsewhere."""
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        return "bfloat16"
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def compiled(function, trial):
    """-> torch.compile(function), tried by trial(it); where there is no compiler, says so and returns the function itself."""
    fast = torch.compile(function)
    try:
        trial(fast)
    except Exception as e:    # torch.compile raises whatever its parts do
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        print(f"not compiled, because torch.compile fails here: {reason}", flush=True)
        return function
    return fast


def read_checkpoint(path) -> dict:
    """What train.py saved, on the CPU. Raises OSError where the file is missing or is something else."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: train.py writes it at its first sample grid") from None
    except Exception:    # torch.load raises whatever its readers do
        ckpt = None
    if not isinstance(ckpt, dict) or not {"config", "ema", "args"} <= ckpt.keys():
        raise OSError(f"{path} is not a checkpoint of train.py, or is damaged")
    return ckpt


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def seed(text: str) -> int:
    """A whole number that torch's generators take, for argparse."""
    if abs(int(text)) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} does not fit in 64 bits")
    return int(text)


def fraction(text: str) -> float:
    """"0.5" or "1/11" -> a number in (0, 1), for argparse."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, such as 0.5 or 1/11")
    return value
