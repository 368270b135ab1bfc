"""What the scripts share: errors, files, devices, precision, checkpoints, argument types."""
import argparse
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

import runtime
from images import save_grid
from runtime import exit_status, find_device, load_verified, save_whole, write_whole


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
            runtime.lock_folder(tmp_path / "run")
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
    runtime.lock_folder(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_under_what_is_printed_stops_nothing(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        runtime.say("lost")
        runtime.say("lost, too")


# -----------------------------------------------------------------------------
# files

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")    # not on Windows
    path, noise = tmp_path / "file", torch.randint(256, (1, 1, 400, 400), dtype=torch.uint8)
    path.write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))    # fails as a full disk does
    try:
        for save in [save_whole, save_grid]:
            with pytest.raises(OSError, match="file cannot be written: File too large$"):
                save(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def fail(part):
        part.write_text("half")
        raise OSError("2 of 3 images cannot be decoded")

    with pytest.raises(OSError, match="^2 of 3 images"):    # writing was not the problem, ...
        write_whole(path, fail)
    with pytest.raises(OSError, match="No such file or directory: 'nowhere'$"):    # ... nor here
        write_whole(path, lambda part: part.write_bytes(open("nowhere").read()))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_power_cut_at_any_moment_leaves_a_whole_file(tmp_path, monkeypatch):
    path, previous, moments = tmp_path / "new", tmp_path / "old", []

    def observed(function):
        def call(*args):
            function(*args)
            held = [file.read_text() for file in [path, previous] if file.exists()]
            moments.append((function.__name__, held))
        return call

    monkeypatch.setattr(os, "fsync", observed(os.fsync))
    monkeypatch.setattr(os, "replace", observed(os.replace))
    for text in "abc":
        write_whole(path, lambda part: part.write_text(text), keep=previous)    # noqa: B023
    assert moments[7:] == [("fsync", ["b", "a"]), ("replace", ["b"]), ("replace", ["c", "b"]),
                            ("fsync", ["c", "b"])]


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, state = tmp_path / "flipped", {"weights": torch.randn(20), "step": 7}
    save_whole(state, path)
    raw, n_refused = bytearray(path.read_bytes()), 0
    flips = random.Random(0).sample(range(8 * len(raw)), 200)
    flips += [8 * (i + 38) + 4 for i in range(len(raw)) if raw[i:i + 4] == b"PK\1\2"]    # folders
    for bit in flips:
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        raw[bit // 8] ^= 1 << bit % 8
        try:
            loaded = load_verified(path)
            assert loaded["step"] == 7 and torch.equal(loaded["weights"], state["weights"])
        except OSError as error:
            assert str(error) == f"{path} is not a file of torch.save, or is damaged"
            n_refused += 1
    assert n_refused > 100
    save_whole([{"weights": torch.tensor([1, torch.inf])}], path)
    with pytest.raises(OSError, match="flipped holds numbers that are not finite"):
        load_verified(path)
    with pytest.raises(OSError, match="is not a regular file"):    # instead of waiting for this one
        os.mkfifo(tmp_path / "pipe")
        load_verified(tmp_path / "pipe")


def test_read_checkpoint_refuses_what_is_none(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist: train.py writes it"):
        runtime.read_checkpoint(tmp_path / "none.pt")
    whole = dict.fromkeys(runtime.CHECKPOINT, 0) | {"args": {}}
    wrong = [{name: whole[name] for name in whole if name != missing} for missing in whole]
    for state in ["text", whole | {"args": 0}, *wrong]:
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(OSError, match="bad.pt is not a checkpoint of train.py"):
            runtime.read_checkpoint(tmp_path / "bad.pt")
    torch.save(whole, tmp_path / "good.pt")
    for path in ["bad.pt", "none.pt"]:
        assert runtime.read_newest(tmp_path / path, tmp_path / "good.pt") == whole
        assert f"{path} " in capsys.readouterr().out
    assert (tmp_path / "ckpt_damaged.pt").exists()    # nothing is lost
    assert runtime.read_newest(tmp_path / "good.pt", tmp_path / "none.pt") == whole


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
