"""What the scripts share: errors, signals, devices, precision, argument types."""
import argparse
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import files
import runtime
from runtime import exit_status, find_device


@pytest.mark.parametrize("error, status", [
    (ValueError("no such colour"), 2), (OSError("no such file"), "tool.py: error: no such file"),
    (KeyboardInterrupt(), "tool.py: interrupted")])
def test_errors_become_an_exit_status_and_a_sentence(error, status, capsys):
    with pytest.raises(SystemExit) as exit, exit_status(argparse.ArgumentParser("tool.py")):
        raise error
    assert exit.value.code == status    # a text goes to stderr and means status 1
    assert ("tool.py: error: no such colour" in capsys.readouterr().err) == (status == 2)


@pytest.mark.parametrize("empty", [torch.empty, np.empty])
def test_too_little_memory_is_a_sentence_too(empty):
    with pytest.raises(SystemExit, match="out of memory: try a smaller --batch_size"):
        with exit_status(argparse.ArgumentParser()):
            empty(2 ** 50)
    with pytest.raises(RuntimeError, match="a bug"), exit_status(argparse.ArgumentParser()):
        raise RuntimeError("a bug")


PRINTS = r"""import argparse
from runtime import *
with exit_status(argparse.ArgumentParser("tool.py")):
    for line in ["собака", os.fsdecode(b"caf\xe9"), "last"]:
        say(line)
        print(line, file=sys.stderr)
    raise OSError("собака is missing")
"""


@pytest.mark.parametrize("full", [False, True])
def test_text_that_stdout_cannot_take(full, tmp_path):
    """An old encoding, or a full disk behind it: no traceback, and the program goes on."""
    if full and not os.path.exists("/dev/full"):
        pytest.skip("only Linux has /dev/full")
    path = "/dev/full" if full else tmp_path / "out.txt"
    old = os.environ | {"PYTHONIOENCODING": "ascii"}
    with open(path, "wb") as out:
        ended = subprocess.run([sys.executable, "-c", PRINTS], cwd=ROOT, env=old, stdout=out,
                               stderr=subprocess.PIPE, text=True)
    dog = ascii("собака")[1:-1]
    lines = [dog, r"caf\udce9", "last"]
    assert ended.stderr.splitlines() == [*lines, f"tool.py: error: {dog} is missing"]
    assert ended.returncode == 1 and (full or path.read_text().splitlines() == lines)


CHILD = """import sys, time
from files import *
from runtime import *
lock, watch = lock_folder(Path(sys.argv[1])), SignalWatch()
while True:
    say(watch.number)
    time.sleep(0.1)
"""


def test_signals_locks_and_closed_pipes(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path / "run"], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "0\n"
        with pytest.raises(ValueError, match="another run uses .*run: wait, or name another"):
            files.lock_folder(tmp_path / "run")
        for number in [signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT]:
            child.send_signal(number)    # two arrive together, and count as one
        while (line := child.stdout.readline()) == "0\n":
            pass
        assert line in ["2\n", "15\n"]
        child.stdout.close()
        time.sleep(1.5)
        assert child.poll() is None
        (tmp_path / "run" / "ckpt.pt.1.tmp").touch()
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
    finally:
        child.kill()
    files.lock_folder(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_ranks_agree_on_a_signal_that_another_has_caught(monkeypatch):
    monkeypatch.setattr(runtime, "ranks", lambda: (0, 2))
    monkeypatch.setattr(runtime.dist, "all_reduce", lambda number, op: number.fill_(signal.SIGTERM))
    watch = object.__new__(runtime.SignalWatch)    # without its handlers
    assert watch.received(9, torch.device("cpu")) == signal.SIGTERM
    assert watch.received(9, torch.device("cuda")) == 0    # a GPU is not asked at each step


# -----------------------------------------------------------------------------
# devices and arguments

def test_find_device():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type in ("cuda", "mps", "xpu", "cpu")
    assert runtime.ranks() == (0, 1)
    for name in ["banana", "meta", "cuda:99"]:
        with pytest.raises(ValueError, match=f"--device {name} is not to be had here"):
            find_device(name)


@pytest.mark.parametrize("avx512_bf16, bfloat16_seconds, dtype", [
    (True, 0.2, "bfloat16"), (True, 1.0, "float32"), (True, 2.0, "float32"),
    (False, 0.2, "float32"), (None, 0.2, "float32")])
def test_default_precision_is_the_faster_one(monkeypatch, avx512_bf16, bfloat16_seconds, dtype):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": avx512_bf16})
    monkeypatch.setattr(runtime, "matmul_seconds", lambda dtype: seconds[dtype])
    assert runtime.default_dtype(torch.device("cpu")) == dtype
    assert runtime.default_dtype(torch.device("mps")) == "float32"


def test_a_function_that_does_not_compile_is_returned_as_it_is(capsys):
    def trial(fast):
        raise RuntimeError("\nno compiler")

    assert runtime.compiled(abs, trial) is abs
    assert "torch.compile fails here: no compiler" in capsys.readouterr().out


def test_paths_are_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert runtime.absolute("here/../new") == tmp_path / "new"
    assert runtime.absolute_or_name("here") == str(tmp_path / "here")
    for name in ["google/ddpm-cifar10-32", "a" * 5000]:
        assert runtime.absolute_or_name(name) == name


@pytest.mark.parametrize("name, good, bad, sentence", [
    ("positive", {"1": 1, "128": 128}, ["0", "-3", "1.5", "x", "1e400", str(2 ** 31)],
     "0 is not a positive whole number, or is too large"),
    ("count", {"0": 0, "500": 500}, ["-1", "0.5", "", str(2 ** 31)],
     "-1 is not a whole number, 0 or more, or is too large"),
    ("int64", {"0": 0, "-7": -7, str(2 ** 63 - 1): 2 ** 63 - 1}, [str(2 ** 63), "a", "1.0"],
     f"{2 ** 63} does not fit in 64 bits as a whole number"),
    ("fraction", {"0.5": 0.5, "1/11": 1 / 11}, ["0", "1", "1/0", "nan", "1e999999999", "x"],
     "'0' is not a number between 0 and 1, such as 0.5 or 1/11"),
    ("positive_float", {"2e-3": 2e-3, "1": 1.0}, ["0", "-1", "inf", "1e400", "nan", "x"],
     "0 is not a positive number"),
    ("positive_or_inf", {"2": 2.0, "inf": float("inf")}, ["0", "-inf", "nan", "x"],
     "0 is not a positive number, or inf"),
    ("below_one", {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan", "x"],
     "1 is not a number from 0 to below 1"),
    ("step_or_share", {"0": 0.0, "1/2": 0.5, "7": 7.0}, ["1.5", "-1", "1/0", "nan", "1e999999999"],
     "1.5 is neither a step nor a share of the steps, such as 1/2"),
])
def test_argument_types(capsys, name, good, bad, sentence):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", type=getattr(runtime, name))
    for text, number in good.items():
        flag = parser.parse_args([f"--flag={text}"]).flag
        assert flag == number and type(flag) is type(number)
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--flag={text}"])
        error = capsys.readouterr().err
        assert error.endswith(f"argument --flag: {sentence.replace(bad[0], text, 1)}\n")
