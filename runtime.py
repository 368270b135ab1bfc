"""
What the scripts share: errors, signals, devices, ranks, precision, argument types.
"""
import argparse
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# -----------------------------------------------------------------------------
# errors, signals, closed pipes

OUT_OF_MEMORY = re.compile("MemoryError|out of memory|can't allocate memory")    # as devices say it


@contextmanager
def exit_status(parser: argparse.ArgumentParser, user_errors: bool = True):
    """Ends the script with one sentence instead of a traceback: with exit status 2 for ValueError
    (an invalid request), with 1 for OSError (a bad file or machine), too little memory,
    and Ctrl-C. user_errors: False where a ValueError is a bug, and keeps its traceback."""
    with suppress(AttributeError):    # a stdout that is no file
        sys.stdout.reconfigure(errors="backslashreplace")    # names that it cannot encode
    try:
        yield
    except ValueError as error:
        if not user_errors:
            raise
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not OUT_OF_MEMORY.search(repr(error)):
            raise
        sys.exit(f"{parser.prog}: error: out of memory: try a smaller --batch_size, --image_size "
                 f"or --n, or for training a larger --grad_accum")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: interrupted")


def say(text: str):
    """Prints a line at once. Once nobody reads it any more, as in `train.py | head -1`, or the disk
    is full, this line and all others are lost, but the program goes on."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class SignalWatch:
    """Catches SIGTERM and Ctrl-C, so that a run can save first. A second one exits at once, but not
    within a second of the first: where a scheduler signals all processes, torchrun does so too."""
    number = 0    # of the signal

    def __init__(self):
        for number in [signal.SIGINT, signal.SIGTERM]:
            signal.signal(number, self.catch)

    def catch(self, number, frame):
        if self.number == 0:
            self.number, self.start = number, time.monotonic()
        elif time.monotonic() - self.start > 1:
            sys.exit(128 + number)

    def received(self, step: int, device: torch.device) -> int:
        """-> the number of the signal that any rank has caught, or 0. All ranks agree on it. On
        GPUs, which must wait for the answer, they ask at every tenth step only."""
        if ranks()[1] == 1:
            return self.number
        if device.type == "cuda" and step % 10:
            return 0
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


# -----------------------------------------------------------------------------
# devices and ranks

def find_device(name: str = None) -> torch.device:
    """The device of that name; without a name cuda, else mps, else cpu. Under torchrun, each
    process (rank) gets a device of its own. NCCL, or gloo on CPUs, connects them, and only the
    first prints.
    Raises ValueError where this machine has no such device."""
    torchrun = dist.is_available() and dist.is_torchelastic_launched()
    if name is None:
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        device = torch.device(name)
        if torchrun and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torchrun and device.type == "mps":    # no backend connects these
            device = torch.device("cpu")
        torch.zeros(1, device=device).item()
        if device.index:
            torch.accelerator.set_device_index(device.index)    # "cuda" means cuda:1 from now on
        if torchrun:
            timeout = timedelta(days=1)    # other ranks may wait for a download
            if device.type == "cuda":
                dist.init_process_group("nccl", device_id=device, timeout=timeout)
            else:
                dist.init_process_group("gloo", timeout=timeout)
            if dist.get_rank() > 0:
                sys.stdout = open(os.devnull, "w")
    except (RuntimeError, AssertionError, ImportError) as error:    # Assertion: torch without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} is not to be had here: {reason}") from None
    return device


def ranks() -> tuple:
    """-> the rank of this process and the number of ranks: 0 and 1 without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """-> the mean of the x of all ranks, on every rank. x itself stays."""
    _, world = ranks()
    x = x.clone()
    if world > 1:
        dist.all_reduce(x)
    return x / world


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


def random_state(device: torch.device) -> dict:
    """-> the state of the random numbers on the CPU and on the device, for set_random_state."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_random_state(state: dict, device: torch.device):
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type])


# -----------------------------------------------------------------------------
# precision and compilation

def device_flags(parser: argparse.ArgumentParser):
    """Adds --device and --dtype, for find_device and default_dtype."""
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="of the forward pass (default: what is fast here)")


def set_precision(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """Fills in args.dtype and args.compile -> the context of forward passes."""
    args.dtype = args.dtype or default_dtype(device)
    if args.compile is None:
        args.compile = device.type == "cuda"
    dtype = getattr(torch, args.dtype)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def default_dtype(device: torch.device) -> str:
    """-> bfloat16 on CUDA GPUs and CPUs that are fast at it, float16 on other CUDA GPUs, float32
    elsewhere."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16"):
        # Having the instructions is not enough: with them, an AMD EPYC multiplies matrices four
        # times as fast as in float32, an Intel Xeon without AMX half as fast. So measure, and ask
        # for a clear gain, since conversions take time as well.
        if 1.5 * matmul_seconds(torch.bfloat16) < matmul_seconds(torch.float32):
            return "bfloat16"
    return "float32"


def matmul_seconds(dtype: torch.dtype) -> float:
    """The processor time of a 512x512 matrix multiplication on one thread, the best of 5. Other
    programs do not count in it, so a busy machine decides like an idle one."""
    a = torch.ones(512, 512, dtype=dtype)
    seconds = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(5):
        start = time.thread_time()
        a @ a
        seconds.append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return min(seconds)


def compiled(function, trial, graphs: bool = True):
    """-> torch.compile(function), once trial(it) has worked; else says why not -> function.

    graphs: on a GPU, replay CUDA graphs. A small network needs them: to launch its kernels one by
    one takes longer than to run them. The next call overwrites what a call returned, and the
    gradients, so there is none for a sum of several calls."""
    fast = torch.compile(function, mode="reduce-overhead" if graphs else "default")
    try:
        trial(fast)
    except Exception as error:    # torch.compile raises whatever its parts raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        say(f"not compiled, because torch.compile fails here: {reason}")
        return function
    return fast


# -----------------------------------------------------------------------------
# types of command-line arguments

def argument_type(parse, accepts, error: str):
    """A type for argparse: text -> parse(text), a number that `accepts` returns True for.
    error: the sentence for any other text, with {} in the place of that text."""
    def convert(text: str):
        try:
            number = parse(text)
        except (ValueError, ArithmeticError):
            number = math.nan    # which no comparison accepts
        if not accepts(number):
            raise argparse.ArgumentTypeError(error.format(text))
        return number
    return convert


def ratio(text: str) -> float:
    """"1/11" -> 1 / 11. Unlike Fraction, it does not compute all the digits of 1e10000000."""
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def png(text: str) -> Path:
    """A path for a picture, which must not replace another kind of file, such as a checkpoint."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    return Path(text)


def absolute(text: str) -> Path:
    """A path that still holds where a run is resumed from another folder."""
    return Path(os.path.realpath(text))


def absolute_or_name(text: str) -> str:
    """The same for what exists; other text, such as a name on the hub, stays as it is."""
    return os.path.realpath(text) if os.path.exists(text) else text


positive = argument_type(int, lambda n: 1 <= n < 2 ** 31,
                         "{} is not a positive whole number, or is too large")
count = argument_type(int, lambda n: 0 <= n < 2 ** 31,
                      "{} is not a whole number, 0 or more, or is too large")
int64 = argument_type(int, lambda n: abs(n) < 2 ** 63,
                      "{} does not fit in 64 bits as a whole number")
fraction = argument_type(ratio, lambda x: 0 < x < 1,
                         "'{}' is not a number between 0 and 1, such as 0.5 or 1/11")
positive_float = argument_type(float, lambda x: 0 < x < math.inf, "{} is not a positive number")
positive_or_inf = argument_type(float, lambda x: x > 0, "{} is not a positive number, or inf")
below_one = argument_type(float, lambda x: 0 <= x < 1, "{} is not a number from 0 to below 1")
step_or_share = argument_type(ratio, lambda x: 0 <= x < 2 ** 31 and (x < 1 or x == int(x)),
                              "{} is neither a step nor a share of the steps, such as 1/2")
