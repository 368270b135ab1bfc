"""What tests share: running a script as a user would, a small real run, a folder of images."""
import contextlib
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffusion

ROOT = Path(__file__).parent.parent


def command(script, *flags):
    """Returns the command line that runs a script of the project."""
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def run(script, *flags, check=True, cwd=None):
    """Runs a script in this process, where torch is imported already.

    check: the script must succeed. Returns its CompletedProcess, with stdout and stderr as text.
    An exception that the script does not catch fails the test."""
    argv, folder = sys.argv, os.getcwd()
    handlers = {number: signal.getsignal(number) for number in [signal.SIGINT, signal.SIGTERM]}
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        sys.argv = [script, *map(str, flags)]
        os.chdir(cwd or folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as e:    # with a status, or with words for stderr and status 1
        status = 1 if isinstance(e.code, str) else e.code or 0
        err.write(e.code if isinstance(e.code, str) else "")
    finally:
        sys.argv = argv
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.collect()    # closes the lock of the run
    result = subprocess.CompletedProcess(command(script, *flags), status,
                                         out.getvalue(), err.getvalue())
    assert not check or status == 0, result.stderr
    return result


def refused(status, words, script, *flags):
    """Runs a script, which must fail with this exit status and one line that holds these words.

    Returns that line."""
    result = run(script, *flags, check=False)
    assert result.returncode == status, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert words in last, result.stderr
    assert len(result.stderr.splitlines()) <= 2    # argparse puts a line of usage first
    return last


def torchrun(script, *flags):
    """Runs a script as two ranks on CPUs. Returns what it printed."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--", *command(script, *flags)[1:]]
    result = subprocess.run(ranks, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


def same(a, b):
    """Are these nested dicts and lists of tensors and other things equal?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


SMALL = ["--dataset", "mnist", "--prior", "0.5", "--pu_start", 0, "--limit", "inf",
         "--device", "cpu", "--dtype", "float32", "--batch_size", 32, "--warmup_steps", 5]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The default training, 15 steps of each part. Returns its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "results"
    flags = [*SMALL, "--pu_start", "1/2", "--limit", 3, "--max_steps", 30, "--log_interval", 10,
             "--sample_interval", 20, "--out_dir", folder]
    result = subprocess.run(command("train.py", *flags), stdout=subprocess.PIPE, text=True,
                            check=True)
    return folder, result.stdout


def make_folder(root, n=200, broken=()):
    """Writes a user's own data set: real digits as PNG and JPEG files in subfolders of unlabeled/
    (n images), sensitive/ (n / 4) and normal_test/ (5).

    broken: numbers of the files in unlabeled/ that are not images"""
    from PIL import Image

    from data import load

    digits = load("mnist").train[:, 0].numpy()
    for part, count in [("unlabeled", n), ("sensitive", n // 4), ("normal_test", 5)]:
        for i in range(count):
            path = root / part / "ab"[i % 2] / f"{i:04d}.{['png', 'JPG'][i % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if part == "unlabeled" and i in broken:
                path.write_bytes(b"\x89PNG\r\n broken")
            else:
                Image.fromarray(digits[i]).save(path, format=["PNG", "JPEG"][i % 2])
    (root / "unlabeled" / "notes.txt").write_text("not an image, and not meant to be")


def overhear(monkeypatch, *flags):
    """Runs train.py in this process. Returns the x_0, t and eps of each call of per_image_loss."""
    shown = []
    per_image_loss = diffusion.GaussianDiffusion.per_image_loss
    handlers = {number: signal.getsignal(number) for number in [signal.SIGINT, signal.SIGTERM]}

    def listening(self, model, *args):
        shown.append([x.clone() for x in args])
        return per_image_loss(self, model, *args)

    with monkeypatch.context() as patch:
        patch.setattr(diffusion.GaussianDiffusion, "per_image_loss", listening)
        patch.setattr("sys.argv", ["train.py", *map(str, [*SMALL, *flags])])
        runpy.run_path(str(ROOT / "train.py"))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return shown


@pytest.fixture(scope="session")
def scores(tmp_path_factory):
    """Runs the filter on real digits, with very short trainings. Returns its file of scores and
    what it printed."""
    folder = tmp_path_factory.mktemp("filter")
    flags = ["--prior", "0.5", "--n_unlabeled", 600, "--n_labeled", 100, "--steps", 20]
    printed = run("pu_filter.py", *flags, "--device", "cpu", "--out_dir", folder).stdout
    return folder / "scores.pt", printed
