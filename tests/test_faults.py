"""A real process, killed while it trains."""
import os
import random
import subprocess
import sys
import time

import torch
from conftest import ROOT, SMALL, same

FLAGS = [*SMALL, "--pu_start", "1/2", "--limit", 3, "--max_steps", 40, "--save_interval", 4]


def start(out_dir):
    """Starts train.py with small networks in a process of its own, or goes on -> the process"""
    argv = map(str, ["tests/conftest.py", "train.py", *FLAGS, "--out_dir", out_dir, "--resume"])
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def finish(out_dir):
    """Trains to the end -> the checkpoint"""
    printed, _ = (process := start(out_dir)).communicate()
    assert process.returncode == 0, printed
    return torch.load(out_dir / "ckpt.pt")


def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL leaves what is on the disk, which is a whole checkpoint or none."""
    moments = random.Random(0)
    for _ in range(3):
        process = start(tmp_path / "broken")
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(moments.random())
        process.kill()
        process.communicate()
        if (tmp_path / "broken" / "ckpt.pt").exists():
            torch.load(tmp_path / "broken" / "ckpt.pt")
    whole, resumed = (finish(tmp_path / name) for name in ["whole", "broken"])
    for key in ["model", "ema", "optimizer", "typical", "step"]:
        assert same(resumed[key], whole[key]), key
