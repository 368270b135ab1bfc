"""Real processes, killed and signalled while they train."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, same

FLAGS = [*SMALL, "--pu_start", "1/2", "--limit", 3, "--max_steps", 40, "--save_interval", 4]


def start(out_dir, *flags):
    """Starts train.py with small networks in a process of its own -> the process"""
    argv = map(str, ["tests/conftest.py", "train.py", *FLAGS, "--out_dir", out_dir, *flags])
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    printed, _ = (process := start(folder)).communicate()
    assert process.returncode == 0, printed
    return torch.load(folder / "ckpt.pt")


def assert_resumed(folder, whole):
    printed, _ = (process := start(folder, "--resume")).communicate()
    assert process.returncode == 0, printed
    resumed = torch.load(folder / "ckpt.pt")
    for key in ["model", "ema", "optimizer", "typical", "step"]:
        assert same(resumed[key], whole[key]), key


def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(tmp_path, whole):
    """SIGKILL leaves what is on the disk, which is a whole checkpoint or none."""
    moments = random.Random(0)
    for _ in range(3):
        process = start(tmp_path / "run", "--resume")
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(moments.random())
        process.kill()
        process.communicate()
        if (tmp_path / "run" / "ckpt.pt").exists():
            torch.load(tmp_path / "run" / "ckpt.pt")
    assert_resumed(tmp_path / "run", whole)


def test_a_closed_terminal_saves_first(tmp_path, whole):
    process = start(tmp_path / "run")
    for line in process.stdout:
        if line.startswith("step 4/"):
            process.send_signal(signal.SIGHUP)
            break
    printed, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP, printed
    assert "is saved, --resume goes on from there" in printed.splitlines()[-1]
    assert_resumed(tmp_path / "run", whole)
