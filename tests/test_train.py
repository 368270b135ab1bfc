"""train.py as a user runs it: short MNIST trainings, exact resumption, wrong command lines."""
import csv
import gzip
import math
import shutil
import signal
import subprocess

import pytest
import torch
from conftest import ROOT, SMALL, command, make_folder, overhear, refused, run, same
from PIL import Image

import data
import diffusion
import images
import unet
from images import to_uint8

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def read_log(folder):
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def test_a_small_run_learns_and_leaves_everything_behind(small_run):
    folder, printed = small_run
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "before_after.png", "ckpt.pt", "ckpt_prev.pt", "log.csv",
        "samples_000015.png", "samples_000020.png", "samples_000030.png"]
    log = read_log(folder)
    assert [row["step"] for row in log] == [10, 15, 20, 30]
    assert log[-1]["risk"] < 0.9 * log[0]["risk"]
    assert log[0]["loss_u"] < 900    # 784 or so is the loss of predicting zero
    side = 8 * 29 - 1
    assert Image.open(folder / "samples_000030.png").size == (side, side)
    with Image.open(folder / "before_after.png") as both:
        for name, left in [("samples_000015.png", 0), ("samples_000030.png", side + 12)]:
            with Image.open(folder / name) as one:
                assert both.crop((left, 0, left + side, side)).tobytes() == one.tobytes()
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 30 and ckpt["args"]["prior"] == 0.5 and ckpt["config"]["patch"] == 4
    assert any((ckpt["model"][k] != ckpt["ema"][k]).any() for k in ckpt["model"])


def test_a_run_says_what_it_minimises(small_run):
    lines = small_run[1].splitlines()
    assert "U has 50,000 images, a fraction of 0.5 sensitive (odd); S has 2,500" in lines[0]
    assert lines[1] == ("steps 1 to 15 minimise the ordinary diffusion loss, E_U[l], on 32 images "
                        "of U a step")
    assert lines[2] == ("steps 16 to 30 minimise the PU risk, 0.5 E_S[-log(1 - exp(-l))] + "
                        "|E_U[l] - 0.5 E_S[l]|, on 20 images of U and 12 of S a step")
    assert "l is capped at 3 times its mean on U at the same timestep" in lines[3]
    assert "step 15: U is learned. From here on the PU risk subtracts S" in small_run[1]
    for words in ["step 30/30", "risk", "l_U", "l_S", "lr", "images/s", "left", "before_after.png",
                  f"python sample.py --ckpt {small_run[0]}"]:
        assert words in small_run[1]


def test_the_log_of_both_parts(small_run):
    """A row is empty where nothing was computed, and never nan."""
    for row in read_log(small_run[0]):
        assert not any(math.isnan(value) for value in row.values())
        of_s = {name for name in row if name.startswith(("loss_s", "difference", "corrected"))}
        assert len(of_s) == (0 if row["step"] <= 15 else 3)
        if row["step"] <= 15:
            assert row["risk"] == row["loss_u"]
        else:    # sensitive images cost nothing once their loss is large
            assert row["risk"] == pytest.approx(row["difference"], rel=1e-5)


def test_learning_rate(small_run, tmp_path):
    """The rate warms up, is constant while U is learned, then falls to 0 along a cosine. Without a
    first part it falls at once. A row has the rate of its last step, number step - 1."""
    for row in read_log(small_run[0]):
        lr = 2e-3
        if row["step"] > 15:
            lr = 2e-3 * 0.5 * (1 + math.cos(math.pi * (row["step"] - 1 - 15) / 15))
        assert row["lr"] == pytest.approx(lr)
    run("train.py", *SMALL, "--max_steps", 21, "--log_interval", 1, "--out_dir", tmp_path / "run")
    for row in read_log(tmp_path / "run"):
        step = row["step"] - 1
        lr = 2e-3 * min(1, row["step"] / 6)
        lr *= 0.5 * (1 + math.cos(math.pi * max(0, step - 5) / 16))
        assert row["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("limit", [math.inf, 1.0])
def test_both_parts_step_by_step_by_hand(tmp_path, monkeypatch, limit):
    """A step on E_U[l] and one on the PU risk, by AdamW, from the weights of the seed."""
    flags = ["--limit", limit, "--pu_start", 1, "--max_steps", 2, "--warmup_steps", 0,
             "--ema_decay", 0, "--grad_clip", "inf", "--lr", "1e-3",
             "--out_dir", tmp_path / "run"]
    first, *typical, second = overhear(monkeypatch, *flags, "--log_interval", 1)
    assert len(first[0]) == len(second[0]) == 32
    assert len(typical) == (0 if limit == math.inf else 20)

    torch.manual_seed(0)
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    model = unet.UNet(unet.UNetConfig(**ckpt["config"])).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    process = diffusion.GaussianDiffusion(1000, "lognormal", "v")
    process.per_image_loss(model, *first).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = process.per_image_loss(model, *second)
    if typical:    # 4,000 images of U, 200 in each twentieth of the timesteps
        with torch.no_grad():
            t = torch.cat([t for _, t, _ in typical])
            of_u = torch.cat([process.per_image_loss(model, *batch) for batch in typical])
        limits = limit * torch.stack([of_u[t // 50 == k].mean() for k in range(20)])
        limits = limits[second[1] // 50]
        assert 3 < (loss > limits).sum() < 29
        loss = torch.where(loss > limits, limits, loss)
    loss_u, loss_s = loss.split([20, 12])
    sensitive = -0.5 * torch.log(1 - torch.exp(-loss_s)).mean()
    risk = sensitive + (loss_u.mean() - 0.5 * loss_s.mean()).abs()
    risk.backward()
    assert read_log(tmp_path / "run")[1]["risk"] == pytest.approx(risk.item(), rel=1e-4)
    optimizer.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ckpt["model"][name], weight, rtol=0, atol=1e-4)
    assert same(ckpt["model"], ckpt["ema"])    # a decay of 0 averages nothing


def test_what_the_loss_is_shown(tmp_path, monkeypatch):
    """U is mixed, S is sensitive; image i of S has the timestep and the noise of image i of U."""
    shown = overhear(monkeypatch, "--batch_size", 100, "--max_steps", 4,
                     "--out_dir", tmp_path / "run")
    mnist = data.load("mnist")
    label = {image.numpy().tobytes(): int(y) for image, y in zip(mnist.train, mnist.train_labels)}
    u, s, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 50000, 2500, seed=0)
    images_u, images_s = ({image.numpy().tobytes() for image in mnist.train[index]}
                          for index in (u, s))
    hidden = 0
    for x_0, t, eps in shown:
        images = [image.contiguous().numpy().tobytes() for image in to_uint8(x_0)]
        assert len(images) == 100
        assert set(images[:64]) <= images_u and set(images[64:]) <= images_s
        hidden += sum(label[image] % 2 for image in images[:64])
        assert torch.equal(t[64:], t[:36]) and torch.equal(eps[64:], eps[:36])
        assert abs(eps[:64].mean()) < 0.02 and abs(eps[:64].std() - 1) < 0.02
        gaps = t[:64].sort().values.diff()    # spread evenly: all near 1000 / 64
        assert gaps.max() < 2 * 1000 / 64 and t.min() < 34 and t.max() >= 966
    assert len(shown) == 4 and abs(hidden / 256 - 0.5) < 4 * 0.5 / 256 ** 0.5
    assert not torch.equal(shown[0][2], shown[1][2]) and not torch.equal(shown[0][1], shown[1][1])


def test_the_first_part_draws_whole_batches_of_u(tmp_path, monkeypatch):
    shown = overhear(monkeypatch, "--batch_size", 48, "--pu_start", 2, "--max_steps", 4,
                     "--out_dir", tmp_path / "run")
    mnist = data.load("mnist")
    _, s, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 50000, 2500, seed=0)
    images_s = {image.numpy().tobytes() for image in mnist.train[s]}
    for (x_0, _, eps), n_s in zip(shown, [0, 0, 18, 18], strict=True):
        of_s = [image.contiguous().numpy().tobytes() in images_s for image in to_uint8(x_0)]
        assert of_s == [False] * (48 - n_s) + [True] * n_s
        assert len(set(eps.flatten(1).sum(1).tolist())) == 48 - n_s    # pairs share their noise


def test_the_oracle_is_shown_nothing_but_the_normal_images_of_u(tmp_path, monkeypatch):
    shown = overhear(monkeypatch, "--algorithm", "oracle", "--n_unlabeled", 200,
                     "--batch_size", 400, "--max_steps", 1, "--out_dir", tmp_path)
    mnist = data.load("mnist")
    u, _, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 200, 2500, seed=0)
    normal = {image.numpy().tobytes() for image in mnist.train[u[mnist.train_labels[u] % 2 == 0]]}
    seen = {image.contiguous().numpy().tobytes() for image in to_uint8(shown[0][0])}
    assert seen <= normal and len(normal) == 100
    assert len(seen) > 90    # 400 draws miss about 2 of 100 images


def test_images_that_stay_in_their_file_are_shown_alike(tmp_path, monkeypatch):
    shown = overhear(monkeypatch, "--max_steps", 2, "--out_dir", tmp_path / "device")
    monkeypatch.setattr(data, "MAX_ON_DEVICE", 1)
    assert same(shown, overhear(monkeypatch, "--max_steps", 2, "--out_dir", tmp_path / "file"))


def test_a_preset_added_to_unet_is_a_model(tmp_path, monkeypatch):
    mine = dict(channels=(8, 8), attention=(1,), groups=8, patch=2)
    monkeypatch.setitem(unet.PRESETS, "mine", mine)
    shown = overhear(monkeypatch, "--model", "mine", "--max_steps", 1,
                     "--out_dir", tmp_path / "run")
    assert len(shown) == 1
    assert torch.load(tmp_path / "run" / "ckpt.pt")["args"]["lr"] == 1e-4


def test_flips_are_for_those_who_ask(tmp_path, monkeypatch):
    flags = ["--batch_size", 200, "--max_steps", 1]
    plain = overhear(monkeypatch, *flags, "--out_dir", tmp_path / "plain")[0][0]
    flipped = overhear(monkeypatch, *flags, "--hflip", "--out_dir", tmp_path / "flipped")[0][0]
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], plain.flip(3), plain))
    assert 60 < mirrored.sum() < 140
    assert [name for name, entry in data.DATASETS.items() if entry["hflip"]] == [
        "cifar10", "stl10", "celeba", "folder"]


def test_the_log_holds_the_losses_of_u_and_of_s(tmp_path, monkeypatch):
    """A new network predicts zero, so l is |eps|^2."""
    shown = overhear(monkeypatch, "--prediction", "eps", "--max_steps", 1, "--log_interval", 1,
                     "--out_dir", tmp_path / "run")
    [row] = read_log(tmp_path / "run")
    (_, _, eps), = shown
    loss_u, loss_s = eps.square().flatten(1).sum(1).split([20, 12])
    assert row["loss_u"] == pytest.approx(float(loss_u.mean()), rel=1e-5)
    assert row["loss_s"] == pytest.approx(float(loss_s.mean()), rel=1e-5)
    assert row["difference"] == pytest.approx(float(loss_u.mean() - loss_s.mean() / 2), rel=1e-5)


def test_loss_prior_and_ema_decay(tmp_path):
    """Where losses are large, sensitive images cost nothing: the risk is |l_U - loss_prior l_S|.
    With decay 0, the average is the last step's weights."""
    run("train.py", *SMALL, "--loss_prior", "0.2", "--ema_decay", 0, "--max_steps", 3,
        "--log_interval", 1, "--out_dir", tmp_path / "run")
    for row in read_log(tmp_path / "run"):
        assert row["risk"] == pytest.approx(row["loss_u"] - 0.2 * row["loss_s"], rel=1e-5)
    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    assert same(ckpt["model"], ckpt["ema"])


@pytest.mark.parametrize("dtype, number", [
    ("float32", signal.SIGTERM), ("bfloat16", signal.SIGINT), ("float32", signal.SIGKILL)])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
        tmp_path, monkeypatch, dtype, number):
    """The signal comes after the checkpoint of step 15, which lies between two log lines and before
    the PU risk begins at step 18. What can be caught saves another checkpoint; SIGKILL leaves what
    is on the disk."""
    flags = [*SMALL, "--dtype", dtype, "--pu_start", "0.6", "--limit", 2, "--max_steps", 30,
             "--log_interval", 12, "--sample_interval", 15]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def save_grid(pictures, path, save=images.save_grid):
        save(pictures, path)
        if path == broken / "samples_000015.png":
            signal.raise_signal(number)
        elif path == whole / "samples_000015.png" and number == signal.SIGKILL:
            shutil.copytree(whole, broken)

    monkeypatch.setattr(images, "save_grid", save_grid)
    run("train.py", *flags, "--out_dir", whole)
    step = 15
    if number != signal.SIGKILL:
        stopped = run("train.py", *flags, "--out_dir", broken, check=False)
        assert stopped.returncode == 128 + number and stopped.stderr == ""
        step = 16
        assert f"interrupted: step {step} is saved" in stopped.stdout.splitlines()[-1]
    assert torch.load(broken / "ckpt.pt")["step"] == step
    monkeypatch.undo()
    resumed = run("train.py", "--out_dir", broken, "--resume")
    assert f"from step {step};" in resumed.stdout

    a, b = (torch.load(folder / "ckpt.pt") for folder in (whole, broken))
    for key in ["model", "ema", "optimizer", "scaler", "config", "step", "rng"]:
        assert same(a[key], b[key]), key
    for row_a, row_b in zip(read_log(whole), read_log(broken), strict=True):
        for timed in ["images_per_second", "seconds"]:
            del row_a[timed], row_b[timed]
        assert row_a == row_b
    for name in ["samples_000030.png", "before_after.png"]:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def assert_same_path(folder_a, folder_b):
    for row_a, row_b in zip(read_log(folder_a), read_log(folder_b), strict=True):
        for name in row_a.keys() & {"risk", "loss_u", "loss_s", "corrected"}:
            assert row_a[name] == pytest.approx(row_b[name], rel=1e-4, abs=1e-3), name
    a, b = (torch.load(folder / "ckpt.pt") for folder in (folder_a, folder_b))
    for weights in ["model", "ema"]:
        for name in a[weights]:
            torch.testing.assert_close(a[weights][name], b[weights][name], rtol=0, atol=1e-5)


def test_differences_of_both_signs_are_followed(whole_batches):
    for _, folder in whole_batches.values():
        assert {row["corrected"] for row in read_log(folder)[1:]} == {0, 1}


def test_two_ranks_follow_the_path_of_one(whole_batches, two_ranks):
    printed, folder = two_ranks
    assert printed.count("step 5/5") == 2
    for correction, grad_accum in [("abs", 1), ("nn", 2)]:
        words = f"each step in {2 * grad_accum} micro-batches: 2 ranks, {grad_accum} each"
        assert words in printed
        assert_same_path(whole_batches[correction][1], folder / correction)


@pytest.mark.parametrize("correction", ["abs", "nn"])
def test_micro_batches_follow_the_path_of_one_batch(whole_batches, tmp_path, correction):
    flags, folder = whole_batches[correction]
    run("train.py", *flags, "--grad_accum", 4, "--out_dir", tmp_path / "run")
    assert_same_path(folder, tmp_path / "run")


def test_compiled_it_is_one_graph_that_is_never_compiled_again(tmp_path, monkeypatch):
    """Compiled and eager runs agree. Only the tracer of torch.compile and its autograd run, for
    generating C++ would take a minute."""
    compile_, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile",
                        lambda function, mode: compile_(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    flags = [*SMALL, "--pu_start", 2, "--max_steps", 4, "--log_interval", 1]
    printed = run("train.py", *flags, "--compile", "--out_dir", tmp_path / "compiled").stdout
    assert ", compiled" in printed
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    run("train.py", *flags, "--out_dir", tmp_path / "eager")
    assert_same_path(tmp_path / "compiled", tmp_path / "eager")


def test_without_a_compiler_it_goes_on_and_says_why(tmp_path, monkeypatch):
    def broken(function, mode):
        def call(*args):
            raise RuntimeError("\nno C++ compiler\na long story")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    printed = run("train.py", *SMALL, "--compile", "--max_steps", 1,
                  "--out_dir", tmp_path / "run").stdout
    assert "not compiled, because torch.compile fails here: no C++ compiler\n" in printed
    assert "float32, not compiled" in printed


@pytest.mark.parametrize("algorithm, flags, counts, share", [
    ("unsupervised", [], "E_U[l], on 64 images of U", 0),
    ("supervised", [], "61 images of U and 3 of S", 2500 / 52500),
    # one of S at least
    ("supervised", ["--n_labeled", 100, "--grad_clip", "inf"], "63 images of U and 1 of S",
     100 / 50100),
])
def test_baselines_run(tmp_path, algorithm, flags, counts, share):
    result = run("train.py", *SMALL, "--algorithm", algorithm, *flags, "--batch_size", 64,
                 "--max_steps", 3, "--log_interval", 1, "--out_dir", tmp_path / "run")
    assert counts in result.stdout
    for row in read_log(tmp_path / "run"):    # sensitive images cost nothing where l is large
        assert row["risk"] == pytest.approx((1 - share) * row["loss_u"], rel=1e-4)


@pytest.mark.parametrize("flags", [
    ["--dtype", "bfloat16"],
    ["--dtype", "float16"],
    ["--correction", "nn", "--schedule", "cosine", "--prediction", "eps", "--sensitive", "4,7",
     "--prior", "1/11", "--batch_size", 31],
])
def test_other_choices_run(tmp_path, flags):
    run("train.py", *SMALL, *flags, "--max_steps", 3, "--out_dir", tmp_path / "run")
    assert 0 < read_log(tmp_path / "run")[-1]["loss_u"] < 1000


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    before = (folder / "ckpt.pt").read_bytes()
    refused(1, "no longer finite", "train.py", "--out_dir", folder, "--resume", "--lr", "1e38",
            "--max_steps", 50)
    assert (folder / "ckpt.pt").read_bytes() == before


def test_a_finished_run_has_nothing_left_to_do(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    result = run("train.py", "--out_dir", folder, "--resume")
    assert "nothing is left to do" in result.stdout
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
    (["--lr", "0"], "--lr: 0 is not a positive number"),
    (["--dataset", "folder", "--algorithm", "oracle"], "--algorithm oracle needs the labels of U"),
    (["--max_steps", "0"], "--max_steps: 0 is not a positive whole number"),
    (["--pu_start", "-1"], "--pu_start: -1 is neither a step nor a share of the steps"),
    (["--pu_start", "2.5"], "--pu_start: 2.5 is neither a step nor a share of the steps"),
    (["--pu_start", "9", "--max_steps", "9"], "--pu_start 9 leaves no step for the PU risk"),
    (["--keep", "0.4"], "--keep needs --scores"),
    (["--batch_size", "1"], "--batch_size 1 leaves no room"),
    (["--batch_size", "30", "--grad_accum", "4"],
     "30 images cannot be divided evenly among 4 micro-batches"),
    (["--grad_clip", "0"], "--grad_clip: 0 is not a positive number, or inf"),
    (["--seed", "99999999999999999999"], "--seed: 99999999999999999999 does not fit in 64 bits"),
    (["--device", "banana"], "--device banana is not to be had here"),
    pytest.param(["--device", "cuda"], "--device cuda is not to be had here", marks=NO_CUDA),
])
def test_a_bad_command_line_is_refused(tmp_path, flags, words):
    refused(2, words, "train.py", *flags, "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def altered(raw):
    return raw[:20] + bytes([raw[20] ^ 1]) + raw[21:]


def edited(edit):
    """Returns a function that applies `edit` to the unpacked bytes of a gzip file."""
    def damage(path):
        path.write_bytes(gzip.compress(edit(gzip.decompress(path.read_bytes()))))
    return damage


@pytest.mark.parametrize("damage, words", [
    (lambda path: path.unlink(), "is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is damaged"),
    (edited(lambda raw: raw[:-9]), "has been altered"),
    (edited(altered), "expected SHA-256 65a50cbb"),
])
def test_bad_data_files_are_named(tmp_path, damage, words):
    shutil.copytree(ROOT / "data" / "mnist", tmp_path / "data" / "mnist")
    path = tmp_path / "data" / "mnist" / "train-labels-idx1-ubyte.gz"
    damage(path)
    line = refused(1, words, "train.py", "--data_dir", tmp_path / "data",
                   "--out_dir", tmp_path / "run")
    assert path.name in line
    assert not (tmp_path / "run").exists()


def test_an_out_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(1, f"--out_dir {tmp_path / 'file'} cannot be written",
            "train.py", "--out_dir", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_is_neither_overwritten_nor_changed(small_run):
    folder = small_run[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(2, f"--out_dir {folder} already holds a run",
            "train.py", *SMALL, "--out_dir", folder)
    refused(2, "--prior cannot change on --resume",
            "train.py", "--prior", "0.4", "--out_dir", folder, "--resume")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_is_resumed_from_another_folder(tmp_path):
    """All its paths were relative; then the scores have moved."""
    mine, there = tmp_path / "mine", tmp_path / "there"
    make_folder(mine / "images", n=40)
    there.mkdir()
    short = ["--dataset", "folder", "--image_size", 8, "--device", "cpu", "--dtype", "float32",
            "--batch_size", 16, "--max_steps", 1]
    images = data.load("folder", mine / "images", 8)
    u, s, _ = data.split("folder", images)
    torch.save(dict(u=u, s=s, z_u=torch.arange(40.), z_s=4 * torch.arange(10.),
                    images=data.digest(images.train)), mine / "scores.pt")
    relative = ["--data_dir", "images", "--prior", "0.5", "--scores", "scores.pt"]
    run("train.py", *short, "--model", "tiny", *relative, "--out_dir", "start", cwd=mine)
    run("train.py", *short, "--init_from", "start/ckpt.pt", *relative, "--out_dir", "run", cwd=mine)
    resume = ["--out_dir", "../mine/run", "--resume", "--max_steps"]
    run("train.py", *resume, 2, cwd=there)
    (mine / "scores.pt").rename(there / "scores.pt")
    flags = ["--scores", "scores.pt", "--init_from", "../mine/start/ckpt.pt"]
    run("train.py", *resume, 3, *flags, cwd=there)
    ckpt = torch.load(mine / "run" / "ckpt.pt")
    assert ckpt["step"] == 3 and ckpt["args"]["scores"] == str(there / "scores.pt")


def test_where_the_last_checkpoint_is_damaged_the_one_before_is_used(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    damaged = bytearray((folder / "ckpt.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "ckpt.pt").write_bytes(damaged)
    printed = run("train.py", "--out_dir", folder, "--resume").stdout
    assert "ckpt_prev.pt, is used instead" in printed and "from step 20;" in printed
    assert (folder / "ckpt_damaged.pt").read_bytes() == damaged
    a, b = (torch.load(path / "ckpt.pt") for path in (folder, small_run[0]))
    assert same(a["ema"], b["ema"]) and a["step"] == 30
    assert torch.load(folder / "ckpt_prev.pt")["step"] == 20


def test_a_run_of_the_command_line(tmp_path):
    """No other run may use its folder, also before its first checkpoint. Nobody has to read what it
    prints."""
    folder = tmp_path / "run"
    flags = [*SMALL, "--max_steps", 30, "--log_interval", 15, "--out_dir", folder]
    process = subprocess.Popen(command("train.py", *flags), stdout=subprocess.PIPE, text=True)
    while "from step 0;" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    log = (folder / "log.csv").read_bytes()
    refused(2, f"another run uses {folder}", "train.py", *flags)
    assert (folder / "log.csv").read_bytes() == log
    process.send_signal(signal.SIGCONT)
    process.stdout.close()
    assert process.wait() == 0
    assert [row["step"] for row in read_log(folder)] == [15, 30]


def test_a_damaged_log_loses_no_whole_row(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    whole = (folder / "log.csv").read_bytes()
    (folder / "log.csv").write_bytes(whole + b"4\xff,2\n" + bytes(200_000) + b"\n40,1.5,3")
    run("train.py", "--out_dir", folder, "--resume")
    assert (folder / "log.csv").read_bytes() == whole


def test_resuming_from_nothing_or_from_garbage(tmp_path):
    printed = run("train.py", *SMALL, "--max_steps", 1, "--out_dir", tmp_path / "new", "--resume")
    assert "ckpt.pt does not exist yet: a new run begins" in printed.stdout
    assert torch.load(tmp_path / "new" / "ckpt.pt")["step"] == 1
    (tmp_path / "ckpt.pt").write_text("garbage")
    refused(1, "ckpt.pt is not a checkpoint of train.py",
            "train.py", "--out_dir", tmp_path, "--resume")
    assert (tmp_path / "ckpt.pt").read_text() == "garbage"


# -----------------------------------------------------------------------------
# the recipe of the paper, and the defaults of other flags

@pytest.mark.parametrize("flags, epochs", [([], 100), (["--init_from", "start/ckpt.pt"], 20)])
def test_the_recipe_of_the_paper(tmp_path, flags, epochs):
    """Section 5 of the paper, with a smaller network: 10 images of U in batches of 16."""
    common = ["--n_unlabeled", 10, "--n_labeled", 5, "--batch_size", 16, "--device", "cpu"]
    if flags:
        run("train.py", *common, "--recipe", "paper", "--max_steps", 1, "--out_dir", "start",
            cwd=tmp_path)
    printed = run("train.py", *common, "--prior", "1/11", "--recipe", "paper", *flags,
                  cwd=tmp_path).stdout
    folder = "mnist-pu-0.09091-recipe"
    if flags:
        folder += "-init_from"
    args = torch.load(tmp_path / "out" / folder / "ckpt.pt")["args"]
    expected = dict(schedule="linear", prediction="eps", lr=1e-4, warmup_steps=500, pu_start=0,
                    max_steps=math.ceil(epochs * 10 / 16), correction="abs", grad_clip=1.0)
    assert {name: args[name] for name in expected} == expected
    assert f"steps 1 to {expected['max_steps']} minimise the PU risk" in printed
    assert args["model"] == (None if flags else "paper")


def test_what_a_recipe_says_can_be_overruled(tmp_path):
    run("train.py", "--recipe", "paper", "--batch_size", 16, "--max_steps", 2, "--lr", "1e-3",
        "--device", "cpu", "--out_dir", tmp_path / "run")
    args = torch.load(tmp_path / "run" / "ckpt.pt")["args"]
    assert (args["model"], args["lr"], args["max_steps"]) == ("paper", 1e-3, 2)


def test_the_data_sets_of_the_paper_have_its_numbers():
    """Batch sizes and sizes of U and S, of section 5."""
    for name, batch_size, n_normal, n_labeled in [
            ("mnist", 128, 25000, 2500), ("cifar10", 128, 20000, 2000), ("stl10", 32, 2000, 200),
            ("celeba", 16, 2000, 200)]:
        entry = data.DATASETS[name]
        assert (entry["batch_size"], entry["n_normal"], entry["n_labeled"]) == (
            batch_size, n_normal, n_labeled)
    paper = unet.PRESETS["paper"]
    assert paper["channels"] == (128, 128, 256, 512) and paper["attention"] == (2,)


def test_a_short_fine_tuning_samples_from_what_it_learned(small_run, tmp_path):
    """20 epochs of a small U have fewer steps than the warm-up. The average must still follow."""
    before = torch.load(small_run[0] / "ckpt.pt")["ema"]
    run("train.py", "--init_from", small_run[0] / "ckpt.pt", "--n_unlabeled", 40, "--n_labeled", 20,
        "--batch_size", 16, "--device", "cpu", "--dtype", "float32", "--out_dir", tmp_path / "run")
    after = torch.load(tmp_path / "run" / "ckpt.pt")
    assert after["step"] == 50
    change = {key: sum((after[key][name] - before[name]).square().sum() for name in before) ** 0.5
              for key in ["model", "ema"]}
    assert change["ema"] > 0.5 * change["model"]
    log = read_log(tmp_path / "run")
    assert log[-1]["lr"] < 0.01 * 1e-4    # the cosine has ended


def test_runs_of_different_kinds_have_different_folders(small_run, tmp_path):
    flags = [*SMALL, "--max_steps", 1]
    run("train.py", *flags, cwd=tmp_path)
    run("train.py", *flags, "--init_from", small_run[0] / "ckpt.pt", cwd=tmp_path)
    run("train.py", *flags, "--algorithm", "supervised", cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "mnist-pu-0.5", "mnist-pu-0.5-init_from", "mnist-supervised-0.5"]
