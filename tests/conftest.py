"""What tests share: running a script as a user would, a small real run, a folder of images."""
import contextlib
import csv
import functools
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""    # the equalities hold for float32 on a CPU

import numpy as np
import pytest
import torch
from PIL import Image

import data
import diffusion
import formats
import images
import runtime
import unet

ROOT = Path(__file__).parent.parent
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]
for number in SIGNALS:    # nohup and background jobs ignore some, and train.py respects that
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
rng = np.random.default_rng(0)
MINI = dict(channels=(8, 16), groups=4, blocks=1, attention=(1,), patch=4)    # a small network

read_once = functools.cache(formats.read_idx)    # MNIST, which many tests load


def read_idx(path, sha256, read=formats.read_idx):
    return (read_once if path.parent == data.DATA_DIR / "mnist" else read)(path, sha256)


formats.read_idx = read_idx
torch.set_num_threads(1)    # for networks so small; more wait for each other on a busy machine


@contextlib.contextmanager
def small_networks():
    """Where this is in force, the networks tiny and paper are as small as MINI."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ["tiny", "paper"]:
            patch.setitem(unet.PRESETS, name, MINI)
        yield


def run(script, *flags, check=True, cwd=None):
    """Runs a script in this process, where torch is imported already, with small networks.

    check: the script must succeed. Returns its exit status, stdout, stderr and variables.
    An exception that is not meant for a person fails the test."""
    argv, folder = sys.argv, os.getcwd()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    out, err, status, variables = io.StringIO(), io.StringIO(), 0, {}
    try:
        sys.argv = [script, *map(str, flags)]
        os.chdir(cwd or folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), small_networks():
            variables = runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    except (runtime.UserError, OSError) as error:
        status = 1
        err.write(f"{script}: error: {error}\n")
    finally:
        sys.argv = argv
        os.chdir(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not check or status == 0, err.getvalue()
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue(),
                           variables=variables)


def refused(words, script, *flags):
    """Runs a script, which must fail with one line that holds these words. Returns that line."""
    result = run(script, *flags, check=False)
    assert result.returncode in (1, 2)
    last = result.stderr.strip().splitlines()[-1]
    assert words in last, result.stderr
    return last


def torchrun(script, *flags):
    """Runs a script as two ranks on CPUs, with small networks. Returns what it printed."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "--", __file__, str(script), *map(str, flags)]
    result = subprocess.run(ranks, capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_log(folder):
    """-> the rows of the log of a run, without the cells that are empty."""
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


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
         "--device", "cpu", "--dtype", "float32", "--batch_size", 32]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The default training, 15 steps of each part. Returns its folder and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "results"
    flags = [*SMALL, "--pu_start", "1/2", "--limit", 3, "--max_steps", 30,
             "--save_interval", 10, "--out_dir", folder]
    return folder, run("train.py", *flags).stdout


def make_folder(root, n=200, broken=()):
    """Writes a user's own data set: real digits as PNG and JPEG files in subfolders of unlabeled/
    (n images), sensitive/ (n / 4) and normal_test/ (5).

    broken: numbers of the files in unlabeled/ that are not images"""
    digits = data.load("mnist").train[:, 0].numpy()
    for part, count in [("unlabeled", n), ("sensitive", n // 4), ("normal_test", 5)]:
        for i in range(count):
            path = root / part / "ab"[i % 2] / f"{i:04d}.{['png', 'JPG'][i % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if part == "unlabeled" and i in broken:
                path.write_bytes(b"\x89PNG\r\n broken")
            else:
                Image.fromarray(digits[i]).save(path, format=["PNG", "JPEG"][i % 2])
    (root / "unlabeled" / "notes.txt").write_text("not an image, and not meant to be")


def write(pictures, folder):
    folder.mkdir(parents=True)
    for i, image in enumerate(pictures):
        images.save_png(image, folder / f"{i:05d}.png")
    return folder


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def arrows(n, n_left):
    """Returns [n, 1, 16, 16] uint8, noisy arrows of which the first n_left point to the left."""
    row, column = torch.arange(16)[:, None], torch.arange(16)
    left = ((row - 8).abs() <= column - 4) & (column < 12)
    is_left = (torch.arange(n) < n_left).view(-1, 1, 1, 1)
    shapes = torch.where(is_left, left, left.flip(1))
    return (150 * shapes + torch.randint(60, (n, 1, 16, 16))).byte()


def random_bytes(*shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def write_cifar10(folder, batches=2, n=5):
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{i + 1}.bin" for i in range(batches)), "test_batch.bin"]:
        records = random_bytes(n, 3073)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())


def write_celeba(folder):
    (folder / "img_align_celeba").mkdir(parents=True)
    names = ["5_o_Clock_Shadow", *(f"Attribute_{i}" for i in range(1, 40))]
    rows, partition = [], []
    for i in range(3):    # 178 x 218: red, blue to the right, green outside the centre square
        face = np.zeros((218, 178, 3), np.uint8)
        face[:, :89, 0] = face[:, 89:, 2] = 250
        face[:18] = face[-18:] = (0, 250, 0)
        name = f"{i + 1:06d}.jpg"
        Image.fromarray(face).save(folder / "img_align_celeba" / name, quality=95)
        values = [1 if (k + i) % 2 == 0 else -1 for k in range(40)]
        rows.append(f"{name} " + " ".join(f"{value:2d}" for value in values) + " ")
        partition.append(f"{name} {[0, 1, 2][i]}")
    lines = ["3", " ".join(names) + " ", *rows]
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")


def overhear(*command, killed=False):
    """Runs a script -> what it prints, and gives per_image_loss. killed: by SIGTERM in that."""
    calls, original = [], diffusion.GaussianDiffusion.per_image_loss

    def per_image_loss(self, model, *args, **condition):
        if killed and not calls:
            signal.raise_signal(signal.SIGTERM)
        calls.append([x.clone() for x in [*args, *condition.values()]])
        return original(self, model, *args, **condition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion.GaussianDiffusion, "per_image_loss", per_image_loss)
        result = run(*command, check=not killed)
    assert result.returncode == (128 + signal.SIGTERM if killed else 0)
    return result.stdout, calls


@pytest.fixture(scope="session")
def scores(tmp_path_factory):
    """Runs the filter on real digits, trained very briefly. Returns its file of scores and
    what it printed."""
    folder = tmp_path_factory.mktemp("filter")
    flags = ["--prior", "0.5", "--n_unlabeled", 600, "--n_labeled", 100, "--steps", 10]
    printed = run("pu_filter.py", *flags, "--device", "cpu", "--out_dir", folder).stdout
    return folder / "scores.pt", printed


if __name__ == "__main__":    # a process of its own, or a rank of torchrun
    sys.argv = sys.argv[1:]
    with small_networks():
        runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
