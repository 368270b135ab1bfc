"""What the scripts share: errors, flags, the log, whole files, signals, ranks, precision."""
import argparse
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SIGNALS, torchrun

import runtime
from runtime import UserError

CPU = torch.device("cpu")

ERRORS = """
import os, runtime
for code in ["raise runtime.UserError('no such colour')", "open('nowhere')", "bytes(2 ** 60)",
             "raise ValueError('a bug')"]:
    if os.fork() == 0:
        exec(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_errors_for_a_person_are_one_sentence_and_bugs_keep_their_traceback():
    ended = subprocess.run([sys.executable, "-c", ERRORS], cwd=ROOT, capture_output=True, text=True)
    user, system, memory, *bug = ended.stderr.splitlines()
    assert user == "-c: error: no such colour"
    assert system == "-c: error: [Errno 2] No such file or directory: 'nowhere'"
    assert "out of memory" in memory
    assert bug[0].startswith("Traceback") and bug[-1] == "ValueError: a bug"
    assert ended.stdout.split() == ["1", "1", "1", "1"]


def test_flags(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert runtime.user_path("~/runs") == Path("/somewhere/runs")
    assert [runtime.number(text) for text in ["0", "1/2", "7"]] == [0, 0.5, 7]
    assert [runtime.fraction(text) for text in ["1/11", "0.5"]] == [1 / 11, 0.5]
    for text in ["0", "1", "-1", "nan", "inf", "x"]:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            runtime.fraction(text)
    for bad in [0, -1, float("nan")]:
        with pytest.raises(UserError, match="--n must be positive"):
            runtime.require_positive(argparse.Namespace(n=bad, m=None), "m", "n")


def test_the_log_loses_what_lies_behind_the_checkpoint_and_half_lines(tmp_path):
    path, columns = tmp_path / "log.csv", ["step", "risk", "difference"]
    log = runtime.open_log(path, columns, 0)
    for step in [100, 200, 300]:
        log.writerow(dict(step=step, risk=step / 8))
    whole = path.read_bytes()
    path.write_bytes(whole + b"3")    # of 301
    log = runtime.open_log(path, columns, 200)
    log.writerow(dict(step=300, risk=300 / 8))
    assert path.read_bytes() == whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path, previous = tmp_path / "file", tmp_path / "previous"
    for text in [b"a", b"b", b"c"]:
        runtime.write_whole(path, lambda file: file.write(text), keep=previous)    # noqa: B023

    def fail(file):
        file.write(b"half")
        assert path.read_text() == "c"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runtime.write_whole(path, fail, keep=previous)
    assert (path.read_text(), previous.read_text()) == ("c", "b")
    assert sorted(tmp_path.iterdir()) == [path, previous]


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, state = tmp_path / "flipped", {"weights": torch.randn(20), "step": 7}
    runtime.save_whole(state, path)
    raw, n_refused = bytearray(path.read_bytes()), 0
    flips = random.Random(0).sample(range(8 * len(raw)), 200)
    flips += [8 * (i + 38) + 4 for i in range(len(raw)) if raw[i:i + 4] == b"PK\1\2"]    # folders
    for bit in flips:
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        raw[bit // 8] ^= 1 << bit % 8
        try:
            loaded = runtime.load_verified(path, "a test")
            assert loaded["step"] == 7 and torch.equal(loaded["weights"], state["weights"])
        except UserError as error:
            assert str(error) == f"{path} is not a test, or is damaged"
            n_refused += 1
    assert n_refused > 100
    runtime.save_whole({"optimizer": [{"weights": torch.tensor([1, torch.inf])}]}, path)
    with pytest.raises(UserError, match="not finite"):
        runtime.load_verified(path, "a test")


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    newest, previous = tmp_path / "ckpt.pt", tmp_path / "ckpt_prev.pt"
    with pytest.raises(UserError, match="ckpt.pt does not exist"):
        runtime.read_newest(tmp_path)
    for state in ["text", {"weights": torch.ones(2)}]:
        torch.save(state, newest)
        with pytest.raises(UserError, match="ckpt.pt is not a checkpoint of train.py"):
            runtime.read_newest(tmp_path)
    good = dict(network={}, ema={}, step=3)
    torch.save(good, previous)
    for _ in range(2):    # damaged, then missing
        assert runtime.read_newest(tmp_path) == good
        assert "ckpt_prev.pt, is used instead" in capsys.readouterr().out
        newest.unlink(missing_ok=True)


@pytest.fixture
def handlers():
    """Signals do nothing at first, whatever started pytest."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_a_late_second_one_exits(handlers, number):
    watch = runtime.SignalWatch()
    assert watch.received(1, CPU) == 0
    for _ in range(2):    # torchrun sends it once more
        signal.raise_signal(number)
    assert watch.received(1, CPU) == number
    watch.start -= 2
    with pytest.raises(SystemExit) as exit:
        signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 128 + signal.SIGTERM


def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    watch = runtime.SignalWatch()
    signal.raise_signal(signal.SIGHUP)
    assert watch.number == 0


RANK = """
import signal, sys, time, torch, runtime
from pathlib import Path
downloaded, left = Path(sys.argv[1], "downloaded"), Path(sys.argv[1], "left")
try:
    runtime.find_device("cpu")
    raise AssertionError
except runtime.UserError:    # only train.py is for torchrun
    device = runtime.find_device("cpu", torchrun=True)
rank, world = runtime.ranks()

def slow_touch(path):
    time.sleep(0.5)
    path.touch()

with runtime.first_rank_first():
    if rank == 0:
        slow_touch(downloaded)
    assert downloaded.exists()
watch = runtime.SignalWatch()
if rank == 1:
    signal.raise_signal(signal.SIGUSR1)
assert watch.received(9, torch.device("cuda")) == 0    # a GPU is not asked at each step
assert watch.received(9, device) == signal.SIGUSR1
x = torch.tensor([1.0, 2.0]) + 2 * rank
assert runtime.mean_over_ranks(x).tolist() == [2, 3] and x[0] == 1 + 2 * rank
runtime.say(f"rank {rank} of {world}")
if rank == 0:
    slow_touch(left)
runtime.leave_ranks()
assert left.exists()    # no rank is ahead
"""


def test_two_ranks_wait_agree_and_leave_together(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    assert torchrun(tmp_path / "rank.py", tmp_path) == "rank 0 of 2\n"
    assert runtime.ranks() == (0, 1)


def test_find_device():
    assert runtime.find_device("cpu") == CPU
    assert runtime.find_device().type in ("cuda", "mps", "xpu", "cpu")
    for name in ["banana", "meta", "cuda:99"]:
        with pytest.raises(UserError, match=f"--device {name} is not available here"):
            runtime.find_device(name)


def test_a_function_that_does_not_compile_is_returned_as_it_is(capsys):
    def trial(fast):
        raise RuntimeError("\nno compiler")

    assert runtime.compiled(abs, trial) is abs
    assert "torch.compile fails here: no compiler" in capsys.readouterr().out
