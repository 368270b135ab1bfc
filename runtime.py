"""
What the scripts share: errors, flags, whole files, signals, devices, ranks, precision.
"""
import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist


def say(*words):
    print(*words, flush=True)


def warn(*words, end="\n"):
    print(*words, end=end, file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# errors and flags

class UserError(Exception):
    """What the person who started a script can mend; the text says how."""


def explain(kind, error, trace):
    """The hook for all uncaught errors: one sentence for a person, else Python's traceback."""
    script = Path(sys.argv[0]).name
    if isinstance(error, (UserError, OSError)):
        warn(f"{script}: error: {error}")
    elif isinstance(error, MemoryError) or any(
            words in str(error) for words in ["out of memory", "can't allocate memory"]):
        warn(f"{script}: error: out of memory: try a smaller --batch_size or --image_size")
    elif isinstance(error, KeyboardInterrupt):
        warn(f"{script}: interrupted")
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = explain


def make_parser(description: str, usage: str) -> argparse.ArgumentParser:
    """-> a parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, usage=usage,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def number(text: str) -> float:
    """For argparse: "1/11" -> 1 / 11."""
    return float(Fraction(text))


def fraction(text: str) -> float:
    """For argparse: as number, and between 0 and 1."""
    if not 0 < number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return number(text)


def user_path(text: str) -> Path:
    """For argparse: an absolute path, the same from every working folder. ~ is the home folder."""
    return Path(text).expanduser().absolute()


def require_positive(args: argparse.Namespace, *names: str):
    """Raises UserError where one of these flags is given, and not positive."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise UserError(f"--{name} must be positive, not {getattr(args, name)}")


def check_writable(folder: Path):
    """Makes a folder, if need be. Raises OSError where no file can be written there."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def check_png(path: Path):
    """check_writable for a PNG file. Raises UserError for another suffix, such as .pt."""
    if path.suffix.lower() != ".png":
        raise UserError(f"{path} must end in .png")
    check_writable(path.parent)


def shell(*words) -> str:
    """-> the words as a command line to copy, quoted where they need it."""
    return shlex.join(map(str, words))


def plain(args: argparse.Namespace) -> dict:
    """-> the flags, with paths as text, for a file."""
    return {name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()}


def save_args(args: argparse.Namespace, device: torch.device, path: Path):
    """Writes what a run was: its flags, command, machine, version of torch, and commit if any, with
    "-dirty" where files have changed since."""
    git = subprocess.run("git describe --always --dirty --abbrev=40", shell=True,    # or no git
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    machine = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    about = {"flags": plain(args), "command": shell("python", *sys.argv), "machine": machine,
             "torch": torch.__version__, "commit": git.stdout.strip() or None}
    path.write_text(json.dumps(about, indent=2) + "\n")


def open_log(path: Path, columns: list, last_step: int) -> csv.DictWriter:
    """-> a log with these columns, "step" first, to go on with. Rows after last_step are dropped:
    they will be written again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [line for line in lines if line.endswith("\n") and line.split(",")[0].isdigit()
            and int(line.split(",")[0]) <= last_step]
    write_whole(path, lambda file: file.write("".join([",".join(columns), "\n", *rows]).encode()))
    return csv.DictWriter(path.open("a", newline="", buffering=1), columns, lineterminator="\n")


# -----------------------------------------------------------------------------
# whole files

def write_whole(path: Path, write, keep: Path = None):
    """Calls write(temporary file), then renames it, so that path never holds half a file. What it
    held before stays under the name `keep`, if that is given."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_whole(state, path: Path, keep: Path = None):
    """torch.save by write_whole. Given a file, torch.save raises OSError where a disk is full."""
    write_whole(path, lambda file: torch.save(state, file), keep)


def load_verified(path: Path, kind: str) -> dict:
    """Reads a dict that torch.save wrote, onto the CPU, and checks what torch.load does not: the
    checksums of the zip archive, and that all numbers are finite. kind: in words, for the error.
    Raises UserError where the file is missing, damaged, or something else."""
    try:
        with zipfile.ZipFile(path) as archive:
            # external_attr is 0, and in no checksum: a flipped bit makes torch.load read garbage
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
        finite = isinstance(state, dict) and all_finite(state)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception:    # damaged files make torch.load raise anything
        raise UserError(f"{path} is not {kind}, or is damaged") from None
    if not finite:
        raise UserError(f"{path} is not {kind}, or holds numbers that are not finite")
    return state


def all_finite(tree) -> bool:
    """Are all numbers finite in the tensors of nested dicts and lists?"""
    if isinstance(tree, (dict, list)):
        return all(map(all_finite, tree.values() if isinstance(tree, dict) else tree))
    return not isinstance(tree, torch.Tensor) or bool(tree.isfinite().all())


def read_checkpoint(path: Path) -> dict:
    """Reads what train.py saved. Raises UserError where path holds nothing like it."""
    ckpt = load_verified(path, "a checkpoint of train.py")
    if not {"network", "ema", "step"} <= ckpt.keys():
        raise UserError(f"{path} is not a checkpoint of train.py, or of an earlier version")
    return ckpt


def read_newest(folder: Path) -> dict:
    """-> the checkpoint in the folder of a run, or the one before it where that cannot be read.
    Raises UserError where there is neither."""
    try:
        return read_checkpoint(folder / "ckpt.pt")
    except UserError as error:
        if not (folder / "ckpt_prev.pt").exists():
            raise
        say(f"{error}; the checkpoint before it, ckpt_prev.pt, is used instead")
    return read_checkpoint(folder / "ckpt_prev.pt")


# -----------------------------------------------------------------------------
# signals

class SignalWatch:
    """Catches Ctrl-C and what ends a run from outside, so that it can save first. A second signal
    exits at once, unless it comes within a second: torchrun sends every Ctrl-C once more."""

    def __init__(self):
        self.number = 0    # of the first signal
        for name in ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"]:
            number = getattr(signal, name, None)    # Windows has two of them
            if number and signal.getsignal(number) != signal.SIG_IGN:    # as nohup wants
                signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number == 0:
            self.number, self.start = number, time.monotonic()
        elif time.monotonic() - self.start > 1:
            sys.exit(128 + number)

    def received(self, step: int, device: torch.device) -> int:
        """-> the number of the signal that any rank has caught, or 0; all ranks agree on it. GPUs
        would have to wait for the answer: they ask at every tenth step."""
        _, world = ranks()
        if world == 1:
            return self.number
        if device.type == "cuda" and step % 10:
            return 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


# -----------------------------------------------------------------------------
# devices and ranks

def find_device(name: str = None, torchrun: bool = False) -> torch.device:
    """The device of that name; without a name cuda, else mps, else cpu. torchrun: this script may
    run under torchrun, where each process (rank) gets a device of its own, and only the first
    prints. Raises UserError where this machine has no such device, and where torchrun starts
    another script."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if launched and not torchrun:
        raise UserError("torchrun is for train.py: start one process, or more with other --seed")
    name = name or str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
        if launched:    # only cuda and cpu connect ranks
            index = int(os.environ["LOCAL_RANK"])
            device = torch.device("cuda", index) if device.type == "cuda" else torch.device("cpu")
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:    # Assertion: torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available here: {reason}") from None
    if device.index:
        torch.accelerator.set_device_index(device.index)    # "cuda" means cuda:1 from now on
    if launched:
        gpu = device if device.type == "cuda" else None
        # a day, since other ranks may wait for a download
        dist.init_process_group("nccl" if gpu else "gloo", device_id=gpu, timeout=timedelta(days=1))
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
    return device


def ranks() -> tuple:
    """-> the rank of this process and the number of ranks: 0 and 1 without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave_ranks():
    """All ranks wait for one another, then part: one that exits early can abort the others."""
    if ranks()[1] > 1:
        dist.barrier()
        dist.destroy_process_group()


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """-> the mean of the x of all ranks, on every rank. x itself stays."""
    _, world = ranks()
    x = x / world
    if world > 1:
        dist.all_reduce(x)
    return x


@contextmanager
def first_rank_first():
    """Runs the block on the first rank of each machine, then on the others, which find what the
    first has downloaded or decoded."""
    alone = ranks()[1] == 1
    first = alone or os.environ["LOCAL_RANK"] == "0"
    if not first:
        dist.barrier()
    yield
    if first and not alone:
        dist.barrier()


# -----------------------------------------------------------------------------
# precision and compilation

def device_flags(parser):
    """Adds --device and --dtype, for find_device and set_precision."""
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of the forward pass (default: what is fast here)")


def set_precision(args: argparse.Namespace, device: torch.device):
    """Fills in args.dtype and args.compile, and makes float32 fast."""
    args.dtype = args.dtype or fastest_dtype(device)
    if args.compile is None:
        args.compile = device.type == "cuda"
    torch.set_float32_matmul_precision("high")    # TF32 on GPUs
    torch.set_flush_denormal(True)    # the supervised risk has gradients below 1e-38, slow on CPUs


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """-> the context of forward passes in args.dtype."""
    return torch.autocast(device.type, getattr(torch, args.dtype), args.dtype != "float32")


def fastest_dtype(device: torch.device) -> str:
    """-> bfloat16 on GPUs and CPUs that are fast at it, float16 on other GPUs, else float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        # With these instructions some CPUs are four times as fast, others half as fast: measure.
        if 1.5 * matmul_seconds(torch.bfloat16) < matmul_seconds(torch.float32):
            return "bfloat16"
    return "float32"


def matmul_seconds(dtype: torch.dtype) -> float:
    """The processor time of a 512x512 matrix multiplication on one thread, the best of 5."""
    from torch.utils.benchmark import Timer  # slow to import: not for every script

    timer = Timer("a @ a", timer=time.thread_time, globals={"a": torch.ones(512, 512, dtype=dtype)})
    return min(timer.timeit(1).mean for _ in range(5))    # other programs do not count


def compiled(function, trial, graphs: bool = True):
    """-> torch.compile(function), once trial(it) has worked; else says why not -> function.

    graphs: on a GPU, replay CUDA graphs, without which launching the kernels of a small network
    takes longer than running them. Not where several calls are summed: a call overwrites what the
    one before returned, and its gradients."""
    fast = torch.compile(function, mode="reduce-overhead" if graphs else "default")
    try:
        trial(fast)
    except Exception as error:    # torch.compile raises whatever its parts raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"not compiled, because torch.compile fails here: {reason}")
        return function
    return fast
