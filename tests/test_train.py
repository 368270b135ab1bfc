"""The loop as a user meets it: real MNIST runs, exact resumption, and every wrong command line."""
import csv
import gzip
import math
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, SMALL, command, overhear, refused, run, torchrun
from PIL import Image

import data
import unet
from images import to_uint8


def read_log(folder):
    with (folder / "log.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_small_run_learns_and_leaves_everything_behind(small_run):
    folder, printed = small_run
    assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt", "log.csv", "samples_000020.png", "samples_000030.png"]
    log = read_log(folder)
    assert [row["step"] for row in log] == [10, 20, 30]
    assert log[-1]["risk"] < 0.9 * log[0]["risk"] and log[0]["loss_u"] < 900    # 784 or so is the loss of predicting zero
    assert Image.open(folder / "samples_000030.png").size == (8 * 29 - 1, 8 * 29 - 1)
    assert "U has 50,000 images, 0.5 of them sensitive (odd); S has 2,500" in printed
    assert "16 of U and 16 of S a step" in printed
    for words in ["step 30/30", "risk", "l_U", "l_S", "corrected", "lr", "images/s", "left", f"python sample.py --ckpt {folder}"]:
        assert words in printed
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 30 and ckpt["args"]["prior"] == 0.5 and ckpt["config"]["patch"] == 2
    assert any((ckpt["model"][k] != ckpt["ema"][k]).any() for k in ckpt["model"])


def test_learning_rate_warms_up_then_falls_as_a_cosine(small_run):
    for row in read_log(small_run[0]):    # 5 steps of warm-up, 30 in all; the row's last step is number step - 1
        assert row["lr"] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * (row["step"] - 1 - 5) / 25)))


def test_what_the_loss_is_shown(tmp_path, monkeypatch):
    """U is mixed, S is sensitive, and the two are paired."""
    shown = overhear(monkeypatch, "--batch_size", 100, "--sensitive_share", "0.4", "--max_steps", 4, "--out_dir", tmp_path / "run")
    mnist = data.load("mnist")
    label = {image.numpy().tobytes(): int(y) for image, y in zip(mnist.train, mnist.train_labels)}
    u, s, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 50000, 2500, seed=0)
    U, S = ({image.numpy().tobytes() for image in mnist.train[index]} for index in (u, s))
    hidden = 0
    for x_0, t, eps in shown:
        images = [image.contiguous().numpy().tobytes() for image in to_uint8(x_0)]
        assert len(images) == 100
        assert all(image in U for image in images[:60]) and all(image in S for image in images[60:])
        hidden += sum(label[image] % 2 for image in images[:60])
        assert torch.equal(t[60:], t[:40]) and torch.equal(eps[60:], eps[:40])
        assert abs(eps[:60].mean()) < 0.02 and abs(eps[:60].std() - 1) < 0.02
        gaps = t[:60].sort().values.diff()    # evenly spread: as close to 1000 / 60 as three kinds of gap allow
        assert gaps.max() < 2 * 1000 / 60 and t.min() < 34 and t.max() >= 966
    assert len(shown) == 4 and abs(hidden / 240 - 0.5) < 4 * 0.5 / 240 ** 0.5
    assert not torch.equal(shown[0][2], shown[1][2]) and not torch.equal(shown[0][1], shown[1][1])


def test_the_push_limit_is_relative_to_the_paired_image(tmp_path):
    """16 of U and their 16 pairs of S: where all of S is above the limit, it counts for a tenth of U, and moves nothing."""
    run("train.py", *SMALL, "--push_limit", "0.1", "--max_steps", 3, "--log_interval", 1, "--out_dir", tmp_path / "run")
    for row in read_log(tmp_path / "run"):
        assert row["loss_s"] == pytest.approx(0.1 * row["loss_u"], rel=1e-5)
        assert row["risk"] == pytest.approx(row["loss_u"] - 0.5 * row["loss_s"], rel=1e-5)
    run("train.py", *SMALL, "--push_limit", "0.2", "--max_steps", 3, "--out_dir", tmp_path / "other")
    assert same(*(torch.load(tmp_path / name / "ckpt.pt")["model"] for name in ["run", "other"]))


def test_the_oracle_is_shown_nothing_but_the_normal_images_of_u(tmp_path, monkeypatch):
    shown = overhear(monkeypatch, "--algorithm", "oracle", "--n_unlabeled", 200, "--batch_size", 400, "--max_steps", 1, "--out_dir", tmp_path)
    mnist = data.load("mnist")
    u, _, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 200, 2500, seed=0)
    normal = {image.numpy().tobytes() for image in mnist.train[u[mnist.train_labels[u] % 2 == 0]]}
    seen = {image.contiguous().numpy().tobytes() for image in to_uint8(shown[0][0])}
    assert seen <= normal and len(normal) == 100 and len(seen) > 90    # 400 draws from 100 miss 2 of them or so


def test_images_that_stay_in_their_file_are_shown_alike(tmp_path, monkeypatch):
    shown = overhear(monkeypatch, "--max_steps", 2, "--out_dir", tmp_path / "device")
    monkeypatch.setattr(data, "FITS", 0)
    assert same(shown, overhear(monkeypatch, "--max_steps", 2, "--out_dir", tmp_path / "file"))


def test_a_preset_added_to_unet_is_a_model(tmp_path, monkeypatch):
    monkeypatch.setitem(unet.PRESETS, "mine", dict(channels=(8, 8), attention=(1,), groups=8, patch=2))
    assert len(overhear(monkeypatch, "--model", "mine", "--max_steps", 1, "--out_dir", tmp_path / "run")) == 1
    assert torch.load(tmp_path / "run" / "ckpt.pt")["args"]["lr"] == 1e-4


def test_flips_are_for_those_who_ask(tmp_path, monkeypatch):
    plain = overhear(monkeypatch, "--batch_size", 200, "--max_steps", 1, "--out_dir", tmp_path / "plain")[0][0]
    flipped = overhear(monkeypatch, "--batch_size", 200, "--max_steps", 1, "--hflip", "--out_dir", tmp_path / "flipped")[0][0]
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], plain.flip(3), plain))
    assert 60 < mirrored.sum() < 140
    assert [name for name, info in data.DATASETS.items() if info["hflip"]] == ["cifar10", "stl10", "celeba", "folder"]


def test_the_log_tells_where_the_losses_differ(tmp_path, monkeypatch):
    """A fresh network says zero, so l is |eps|^2 at first; a third counts three times, for it has a third of all timesteps."""
    shown = overhear(monkeypatch, "--prediction", "eps", "--max_steps", 1, "--log_interval", 1, "--out_dir", tmp_path / "run")
    [row] = read_log(tmp_path / "run")
    (_, t, eps), = shown
    l = eps.square().flatten(1).sum(1)
    for part, l_part, t_part in [("u", l[:16], t[:16]), ("s", l[16:], t[16:])]:
        for name, low, high in [("low", 0, 334), ("middle", 334, 667), ("high", 667, 1000)]:
            inside = (low <= t_part) & (t_part < high)
            assert row[f"loss_{part}_{name}_t"] == pytest.approx(float(3 * (l_part * inside).mean()), rel=1e-5)
        assert sum(row[f"loss_{part}_{name}_t"] for name in ["low", "middle", "high"]) / 3 == pytest.approx(row[f"loss_{part}"], rel=1e-5)


def test_loss_prior_and_ema_decay(tmp_path):
    """Far from any fit, sensitive images cost nothing: the risk is | l_U - loss_prior l_S |. Decay 0 averages nothing."""
    run("train.py", *SMALL, "--loss_prior", "0.2", "--ema_decay", 0, "--max_steps", 3, "--log_interval", 1, "--out_dir", tmp_path / "run")
    for row in read_log(tmp_path / "run"):
        assert row["risk"] == pytest.approx(row["loss_u"] - 0.2 * row["loss_s"], rel=1e-5)
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert same(ckpt["model"], ckpt["ema"])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, dtype):
    """Ctrl-C somewhere after the checkpoint at step 15, which lies between two log lines."""
    flags = [*SMALL, "--dtype", dtype, "--max_steps", 30, "--log_interval", 12, "--sample_interval", 15]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run("train.py", *flags, "--out_dir", whole)

    process = subprocess.Popen(command("train.py", *flags, "--out_dir", broken), stderr=subprocess.PIPE, text=True)
    while not (broken / "samples_000015.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 1 and "interrupted at step" in error and "Traceback" not in error
    assert torch.load(broken / "ckpt.pt")["step"] == 15
    resumed = run("train.py", "--out_dir", broken, "--resume")
    assert "steps 15 to 30" in resumed.stdout

    a, b = (torch.load(folder / "ckpt.pt") for folder in (whole, broken))
    for key in ["model", "ema", "optimizer", "scaler", "config", "step", "rng"]:
        assert same(a[key], b[key]), key
    for row_a, row_b in zip(read_log(whole), read_log(broken), strict=True):
        for name in ["step", "risk", "loss_u", "loss_s", "corrected", "lr"]:
            assert row_a[name] == row_b[name]
    assert (whole / "samples_000030.png").read_bytes() == (broken / "samples_000030.png").read_bytes()


@pytest.fixture(scope="module")
def whole_batches(small_run, tmp_path_factory):
    """Runs of one process, one round a step, whose difference is sometimes negative -> by correction: flags, folder"""
    runs = {}
    for correction in ["abs", "nn"]:
        folder = tmp_path_factory.mktemp("whole") / "run"
        flags = [*SMALL, "--init_from", small_run[0] / "ckpt.pt", "--correction", correction, "--sensitive", "even", "--loss_prior", 0.99, "--lr", 1e-4,
                 "--warmup_steps", 2, "--max_steps", 5, "--log_interval", 1]
        run("train.py", *flags, "--out_dir", folder)
        assert {row["corrected"] for row in read_log(folder)} == {0, 1}
        runs[correction] = flags, folder
    return runs


def assert_same_path(folder_a, folder_b):
    for row_a, row_b in zip(read_log(folder_a), read_log(folder_b), strict=True):
        for name in ["risk", "loss_u", "loss_s", "corrected"]:
            assert row_a[name] == pytest.approx(row_b[name], rel=1e-4, abs=1e-3), name
    a, b = (torch.load(folder / "ckpt.pt") for folder in (folder_a, folder_b))
    for weights in ["model", "ema"]:
        for name in a[weights]:
            torch.testing.assert_close(a[weights][name], b[weights][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("correction, rounds", [("abs", 1), ("nn", 2)])
def test_two_ranks_follow_the_path_of_one(whole_batches, tmp_path, correction, rounds):
    flags, folder = whole_batches[correction]
    printed = torchrun("train.py", *flags, "--grad_accum", rounds, "--out_dir", tmp_path / "run")
    assert f"in {2 * rounds} parts: 2 ranks, {rounds} rounds each" in printed and printed.count("step 5/5") == 1
    assert_same_path(folder, tmp_path / "run")


@pytest.mark.parametrize("correction", ["abs", "nn"])
def test_rounds_follow_the_path_of_one_batch(whole_batches, tmp_path, correction):
    flags, folder = whole_batches[correction]
    run("train.py", *flags, "--grad_accum", 4, "--out_dir", tmp_path / "run")
    assert_same_path(folder, tmp_path / "run")


def test_compiled_it_is_one_graph_that_is_never_compiled_again(tmp_path, monkeypatch):
    """By the tracer of torch.compile and its autograd; generating C++ would take a minute. Its figures are those of the eager loss."""
    monkeypatch.setitem(unet.PRESETS, "mini", dict(channels=(8, 16), groups=4, blocks=1, attention=(), patch=2))
    compile_, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    flags = [*SMALL, "--model", "mini", "--max_steps", 4, "--log_interval", 1]
    assert ", compiled" in run("train.py", *flags, "--compile", "--out_dir", tmp_path / "compiled").stdout
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    run("train.py", *flags, "--out_dir", tmp_path / "eager")
    assert_same_path(tmp_path / "compiled", tmp_path / "eager")


def test_without_a_compiler_it_goes_on_and_says_why(tmp_path, monkeypatch):
    def broken(function):
        def call(*args):
            raise RuntimeError("\nno C++ compiler\na long story")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    printed = run("train.py", *SMALL, "--compile", "--max_steps", 1, "--out_dir", tmp_path / "run").stdout
    assert "not compiled, because torch.compile fails here: no C++ compiler\n" in printed and "float32, not compiled" in printed


@pytest.mark.parametrize("algorithm, flags, counts, share", [
    ("unsupervised", [], "64 of U and 0 of S", 0),
    ("supervised", [], "61 of U and 3 of S", 2500 / 52500),
    ("supervised", ["--n_labeled", 100, "--grad_clip", "inf"], "63 of U and 1 of S", 100 / 50100),    # one at least
])
def test_baselines_run(tmp_path, algorithm, flags, counts, share):
    result = run("train.py", *SMALL, "--algorithm", algorithm, *flags, "--batch_size", 64, "--max_steps", 3, "--log_interval", 1,
                 "--out_dir", tmp_path / "run")
    assert counts in result.stdout
    for row in read_log(tmp_path / "run"):    # sensitive images cost nothing once their loss is large
        assert row["risk"] == pytest.approx((1 - share) * row["loss_u"], rel=1e-4)


@pytest.mark.parametrize("flags", [
    ["--dtype", "bfloat16"],
    ["--dtype", "float16"],
    ["--correction", "nn", "--schedule", "cosine", "--prediction", "eps", "--sensitive", "4,7", "--prior", "1/11", "--batch_size", 31],
])
def test_other_choices_run(tmp_path, flags):
    run("train.py", *SMALL, *flags, "--max_steps", 3, "--out_dir", tmp_path / "run")
    assert 0 < read_log(tmp_path / "run")[-1]["loss_u"] < 1000


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    before = (folder / "ckpt.pt").read_bytes()
    refused(1, "no longer finite", "train.py", "--out_dir", folder, "--resume", "--lr", "1e38", "--max_steps", 50)
    assert (folder / "ckpt.pt").read_bytes() == before


def test_a_finished_run_has_nothing_left_to_do(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    result = run("train.py", "--out_dir", folder, "--resume")
    assert "nothing was left to do" in result.stdout
    assert (folder / "log.csv").read_text() == (small_run[0] / "log.csv").read_text()


@pytest.mark.parametrize("flags, words", [
    (["--prior", "0"], "--prior: '0' is not a number between 0 and 1"),
    (["--prior", "1.5"], "--prior: '1.5' is not a number between 0 and 1"),
    (["--prior", "abc"], "--prior: 'abc' is not a number between 0 and 1"),
    (["--dataset", "imagenet"], "--dataset: invalid choice: 'imagenet' (choose from"),
    (["--sensitive", "cat"], "mnist has no class 'cat'"),
    (["--sensitive", "odd,even"], "every class of mnist is sensitive"),
    (["--n_unlabeled", "60000"], "use n_unlabeled of at most"),
    (["--n_labeled", "40000"], "n_labeled = 40,000 is not possible"),
    (["--model", "huge"], "--model: invalid choice: 'huge' (choose from"),
    (["--lr", "0"], "--lr must be a positive number"),
    (["--dataset", "folder", "--algorithm", "oracle"], "--algorithm oracle needs the labels of U"),
    (["--max_steps", "0"], "--max_steps: 0 is not a positive whole number"),
    (["--push_limit", "0"], "--push_limit must be a positive number, or inf"),
    (["--sensitive_share", "0.9"], "--sensitive_share 0.9 is above 0.5"),
    (["--batch_size", "1"], "--batch_size 1 leaves no room"),
    (["--batch_size", "30", "--grad_accum", "4"], "a batch of 15 images of U and 15 of S cannot be divided evenly among 1 ranks with 4 rounds each"),
    (["--grad_clip", "0"], "--grad_clip must be a positive number, or inf"),
    (["--seed", "99999999999999999999"], "--seed: 99999999999999999999 does not fit in 64 bits"),
    (["--device", "banana"], "--device banana is not to be had here"),
    pytest.param(["--device", "cuda"], "--device cuda is not to be had here",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
])
def test_a_bad_command_line_is_refused(tmp_path, flags, words):
    refused(2, words, "train.py", "--scores", "none", *flags, "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def altered(raw):
    return raw[:20] + bytes([raw[20] ^ 1]) + raw[21:]


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.unlink(), "is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged"),
    (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-9])), "promises 60000 bytes of data, found 59991"),
    (lambda path: path.write_bytes(gzip.compress(altered(gzip.decompress(path.read_bytes())))), "expected SHA-256 65a50cbb"),
])
def test_bad_data_files_are_named(tmp_path, damage, words):
    shutil.copytree(ROOT / "data" / "mnist", tmp_path / "data" / "mnist")
    path = tmp_path / "data" / "mnist" / "train-labels-idx1-ubyte.gz"
    damage(path)
    assert path.name in refused(1, words, "train.py", "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_out_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(1, f"--out_dir {tmp_path / 'file'} cannot be written", "train.py", "--out_dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_is_neither_overwritten_nor_bent(small_run):
    folder = small_run[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(2, f"--out_dir {folder} already holds a run", "train.py", *SMALL, "--out_dir", folder)
    refused(2, "--prior cannot change on --resume", "train.py", "--prior", "0.4", "--out_dir", folder, "--resume")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_checkpoint_from_before_a_flag_existed_has_its_default(small_run, tmp_path):
    shutil.copytree(small_run[0], tmp_path / "run")
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    del ckpt["args"]["keep"], ckpt["args"]["scores"], ckpt["args"]["grad_accum"]
    torch.save(ckpt, tmp_path / "run" / "ckpt.pt")
    refused(2, "--scores cannot change on --resume: the run in", "train.py", "--scores", "some.pt", "--out_dir", tmp_path / "run", "--resume")
    assert "step 31/31" in run("train.py", "--max_steps", 31, "--out_dir", tmp_path / "run", "--resume").stdout


def test_resuming_from_nothing_or_from_garbage(tmp_path):
    refused(1, "ckpt.pt does not exist", "train.py", "--out_dir", tmp_path, "--resume")
    (tmp_path / "ckpt.pt").write_text("garbage")
    refused(1, "ckpt.pt is not a checkpoint of train.py", "train.py", "--out_dir", tmp_path, "--resume")
    assert (tmp_path / "ckpt.pt").read_text() == "garbage"
