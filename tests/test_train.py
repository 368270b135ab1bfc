"""train.py as a user runs it: short MNIST runs, exact resumption, wrong command lines."""
import json
import math
import re
import shutil
import signal

import pytest
import torch
from conftest import ROOT, SMALL, make_folder, overhear, read_log, refused, run, same, torchrun
from PIL import Image

import data
import diffusion
import images
import pretrained
import unet
from images import to_uint8


def test_a_small_run_learns_and_leaves_everything_behind(small_run):
    folder, printed = small_run
    assert sorted(path.name for path in folder.iterdir()) == [
        "args.json", "before_after.png", "ckpt.pt", "ckpt_prev.pt", "log.csv",
        *[f"samples_{step:06d}.png" for step in (10, 15, 20, 30)]]
    log = read_log(folder)
    assert [row["step"] for row in log] == [10, 15, 20, 30]
    assert log[1]["loss_unlabeled"] < 0.9 * log[0]["loss_unlabeled"]
    side = 8 * 29 - 1
    assert Image.open(folder / "samples_000030.png").size == (side, side)
    with Image.open(folder / "before_after.png") as both:
        for name, left in [("samples_000015.png", 0), ("samples_000030.png", side + 12)]:
            with Image.open(folder / name) as one:
                assert both.crop((left, 0, left + side, side)).tobytes() == one.tobytes()
    ckpt = torch.load(folder / "ckpt.pt", weights_only=True)
    assert ckpt["step"] == 30 and ckpt["args"]["prior"] == 0.5
    assert any((ckpt["model"][k] != ckpt["ema"][k]).any() for k in ckpt["model"])
    about = json.loads((folder / "args.json").read_text())
    assert about["flags"] == ckpt["args"] and about["torch"] == torch.__version__
    assert about["flags"]["recipe"] == "tiny" and "--save_interval 10" in about["command"]


def test_a_run_says_what_it_minimises(small_run):
    """The PU risk in the words of README.md, at the same prior."""
    assert ("steps 1 to 15 minimise the ordinary diffusion loss, E_U[l], on 32 images of U per step"
            in small_run[1].splitlines())
    shown = re.search("minimise the PU risk, .*, on", (ROOT / "README.md").read_text())[0]
    assert f"steps 16 to 30 {shown} 20 images of U and 12 of S per step" in small_run[1]


def test_the_log_of_both_parts(small_run):
    """A cell is empty where nothing was computed, and never nan. Sensitive images cost nothing once
    their loss is large, so the risk is the difference."""
    for row in read_log(small_run[0]):
        assert not any(math.isnan(value) for value in row.values())
        of_s = {"loss_sensitive", "difference", "share_negative"} & row.keys()
        assert len(of_s) == (0 if row["step"] <= 15 else 3)
        expected = row["loss_unlabeled"] if row["step"] <= 15 else row["difference"]
        assert row["risk"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pu_start", [0, 9])
def test_learning_rate_and_average(tmp_path, pu_start):
    """Warm-up over a quarter of a short run, constant for half of it or until the PU risk begins,
    then a cosine down to 0. A row has the rate of its last step, number step - 1."""
    done = run("train.py", *SMALL, "--pu_start", pu_start, "--max_steps", 12, "--save_interval", 1,
               "--limit", 3, "--out_dir", tmp_path / "run")
    start = max(pu_start, 6)
    for row in read_log(tmp_path / "run"):
        step = row["step"] - 1
        lr = 2e-3 * min(1, row["step"] / 4)
        lr *= 0.5 * (1 + math.cos(math.pi * max(0, step - start) / (12 - start)))
        assert row["learning_rate"] == pytest.approx(lr)
    # half of a part of 3 steps, or (1 + 11) / (10 + 11)
    assert done.variables["ema_decay"](11) == pytest.approx(1 / 3 if pu_start else 12 / 21)
    done.variables["args"].max_steps = 4000    # a long run is warm after 200 steps
    assert done.variables["learning_rate"](99) == pytest.approx(2e-3 * 100 / 201)
    assert (done.variables["typical"] is None) == (pu_start == 0)    # no cap before U is known


def shown(*flags):
    """-> x_0, t and eps of each call of per_image_loss"""
    return overhear("train.py", *SMALL, *flags)[1]


@pytest.mark.parametrize("limit", [math.inf, 1.0])
def test_both_parts_step_by_step_by_hand(tmp_path, limit):
    """A step on E_U[l] and one on the PU risk, by AdamW, from the weights of the seed."""
    first, *typical, second = shown("--limit", limit, "--pu_start", 1, "--max_steps", 2, "--lr",
                                    "1e-3", "--save_interval", 1, "--out_dir", tmp_path / "run")
    assert len(first[0]) == len(second[0]) == 32
    assert len(typical) == (0 if limit == math.inf else 20)

    ckpt = torch.load(tmp_path / "run" / "ckpt.pt")
    config = pretrained.load_checkpoint(ckpt)[0].config
    torch.manual_seed(0)
    model = unet.UNet(config).to(memory_format=torch.channels_last)
    ema = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    process = diffusion.GaussianDiffusion("lognormal", "v")

    def update(risk, decay):
        risk.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, weight in model.state_dict().items():
            ema[name].lerp_(weight, 1 - decay)

    update(process.per_image_loss(model, *first).mean(), decay=0)    # a part of one step
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
    assert read_log(tmp_path / "run")[1]["risk"] == pytest.approx(risk.item(), rel=1e-4)
    update(risk, decay=0)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(ckpt["model"][name], weight, rtol=0, atol=1e-4)
        torch.testing.assert_close(ckpt["ema"][name], ema[name], rtol=0, atol=1e-4)


def test_what_the_loss_is_shown(tmp_path):
    """U is mixed, S is sensitive; image i of S has the timestep and the noise of image i of U. The
    first part of the run draws whole batches of U."""
    only_u, *both = shown("--batch_size", 100, "--pu_start", 1, "--max_steps", 5,
                          "--out_dir", tmp_path / "run")
    mnist = data.load("mnist")
    label = {image.numpy().tobytes(): int(y) for image, y in zip(mnist.train, mnist.train_labels)}
    u, s, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 50000, 2500, seed=0)
    images_u, images_s = ({image.numpy().tobytes() for image in mnist.train[index]}
                          for index in (u, s))
    hidden = 0
    for x_0, t, eps in both:
        seen = [image.contiguous().numpy().tobytes() for image in to_uint8(x_0)]
        assert len(seen) == 100
        assert set(seen[:64]) <= images_u and set(seen[64:]) <= images_s
        hidden += sum(label[image] % 2 for image in seen[:64])
        assert torch.equal(t[64:], t[:36]) and torch.equal(eps[64:], eps[:36])
        assert abs(eps[:64].mean()) < 0.02 and abs(eps[:64].std() - 1) < 0.02
        gaps = t[:64].sort().values.diff()    # spread evenly: all near 1000 / 64
        assert gaps.max() < 2 * 1000 / 64 and t.min() < 34 and t.max() >= 966
    assert len(both) == 4 and abs(hidden / 256 - 0.5) < 4 * 0.5 / 256 ** 0.5
    assert not torch.equal(both[0][2], both[1][2]) and not torch.equal(both[0][1], both[1][1])
    seen = {image.contiguous().numpy().tobytes() for image in to_uint8(only_u[0])}
    assert seen <= images_u and len(only_u[2].unique(dim=0)) == 100


def test_the_oracle_is_shown_nothing_but_the_normal_images_of_u(tmp_path):
    (x_0, _, _), = shown("--algorithm", "oracle", "--n_unlabeled", 200, "--batch_size", 400,
                         "--max_steps", 1, "--out_dir", tmp_path)
    mnist = data.load("mnist")
    u, _, _ = data.pu_split(mnist, [1, 3, 5, 7, 9], 0.5, 200, 2500, seed=0)
    normal = {image.numpy().tobytes() for image in mnist.train[u[mnist.train_labels[u] % 2 == 0]]}
    seen = {image.contiguous().numpy().tobytes() for image in to_uint8(x_0)}
    assert seen <= normal and len(normal) == 100
    assert len(seen) > 90    # 400 draws miss about 2 of 100 images


def test_another_seed_shows_other_batches(tmp_path):
    (a,), (b,) = (shown("--max_steps", 1, "--seed", seed, "--out_dir", tmp_path / str(seed))
                  for seed in (0, 1))
    assert not any(map(torch.equal, a, b))    # images, timesteps, noise


def test_images_are_mirrored_for_those_who_ask(tmp_path):
    flags = ["--batch_size", 200, "--max_steps", 1]
    plain = shown(*flags, "--out_dir", tmp_path / "plain")[0][0]
    flipped = shown(*flags, "--hflip", "--out_dir", tmp_path / "flipped")[0][0]
    mirrored = (flipped != plain).flatten(1).any(1)
    assert torch.equal(flipped, torch.where(mirrored[:, None, None, None], plain.flip(3), plain))
    assert 60 < mirrored.sum() < 140


@pytest.mark.parametrize("n_labeled, n_s, pu_start", [
    (2500, 48, 2000), (500, 48, 3375), (100, 48, 3875), (20, 16, 3925), (5, 8, 3963)])
def test_with_few_labels_the_pu_risk_begins_later(tmp_path, n_labeled, n_s, pu_start):
    """At most half of the steps, and 60 passes over S. S has the share prior / (1 + prior), in
    sixteenths of the batch, but no more than there are."""
    # an absurd learning rate ends the run at its first row of the log
    printed = run("train.py", "--n_labeled", n_labeled, "--lr", "1e38", "--save_interval", 1,
                  "--dtype", "float32", "--out_dir", tmp_path / "run", check=False).stdout
    assert f"steps 1 to {pu_start} minimise" in printed
    assert f"on {128 - n_s} images of U and {n_s} of S per step" in printed


@pytest.mark.parametrize("number, dtype, pu_start", [
    (signal.SIGTERM, "float32", "0.6"), (signal.SIGINT, "float16", "0.5")])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
        tmp_path, monkeypatch, number, dtype, pu_start):
    """The signal comes while the samples of step 14 are drawn, and is answered after the next step.
    There the PU risk begins, or three steps later."""
    flags = [*SMALL, "--dtype", dtype, "--pu_start", pu_start, "--limit", 2, "--max_steps", 30,
             "--save_interval", 7]
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def save_png(picture, path, save=images.save_png):
        save(picture, path)
        if path == broken / "samples_000014.png":
            signal.raise_signal(number)

    monkeypatch.setattr(images, "save_png", save_png)
    run("train.py", *flags, "--out_dir", whole)
    stopped = run("train.py", *flags, "--out_dir", broken, check=False)
    assert stopped.returncode == 128 + number and stopped.stderr == ""
    assert "interrupted: step 15 is saved" in stopped.stdout.splitlines()[-1]
    assert torch.load(broken / "ckpt.pt")["step"] == 15
    assert torch.load(broken / "ckpt_prev.pt")["step"] == 14
    resumed = run("train.py", "--out_dir", broken, "--resume")
    assert "from step 15;" in resumed.stdout

    a, b = (torch.load(folder / "ckpt.pt") for folder in (whole, broken))
    for key in ["model", "ema", "optimizer", "scaler", "network", "step", "typical"]:
        assert same(a[key], b[key]), key
    rows_a, rows_b = ({row["step"]: row["risk"] for row in read_log(folder)}
                      for folder in (whole, broken))
    assert rows_b.keys() == rows_a.keys() | {15}    # the rest of rows is equal, but the one after
    assert all(rows_b[step] == risk for step, risk in rows_a.items() if step != 18)
    for name in ["samples_000030.png", "before_after.png"]:
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def assert_same_path(folder_a, folder_b):
    for row_a, row_b in zip(read_log(folder_a), read_log(folder_b), strict=True):
        for name in row_a.keys() & {"risk", "loss_unlabeled", "loss_sensitive", "share_negative"}:
            assert row_a[name] == pytest.approx(row_b[name], rel=1e-4, abs=1e-3), name
    a, b = (torch.load(folder / "ckpt.pt") for folder in (folder_a, folder_b))
    for weights in ["model", "ema"]:
        for name in a[weights]:
            torch.testing.assert_close(a[weights][name], b[weights][name], rtol=0, atol=1e-5)


def test_two_ranks_follow_the_path_of_one(small_run, tmp_path):
    """Also where the difference is negative."""
    flags = ["train.py", *SMALL, "--init_from", small_run[0] / "ckpt.pt", "--sensitive", "even",
             "--loss_prior", 0.99, "--lr", 1e-4, "--pu_start", 1, "--limit", 3, "--max_steps", 5,
             "--save_interval", 1, "--out_dir"]
    run(*flags, tmp_path / "one")
    assert torchrun(*flags, tmp_path / "two").count("step 5/5") == 1
    assert {row["share_negative"] for row in read_log(tmp_path / "one")[1:]} == {0, 1}
    assert_same_path(tmp_path / "one", tmp_path / "two")


def test_micro_batches_follow_the_path_of_one_batch(tmp_path):
    """Where the difference has one sign, their risks average to that of the whole batch."""
    flags = [*SMALL, "--max_steps", 3, "--save_interval", 1]
    run("train.py", *flags, "--out_dir", tmp_path / "whole")
    run("train.py", *flags, "--grad_accum", 4, "--out_dir", tmp_path / "parts")
    torchrun("train.py", *flags, "--grad_accum", 2, "--out_dir", tmp_path / "ranks")
    assert_same_path(tmp_path / "whole", tmp_path / "parts")
    assert_same_path(tmp_path / "whole", tmp_path / "ranks")


def test_compiled_it_is_one_graph_that_is_never_compiled_again(tmp_path, monkeypatch):
    """Compiled and eager runs agree. Only the tracer of torch.compile and its autograd run, for
    generating C++ would take a minute."""
    compile_, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, "compile",
                        lambda function, mode: compile_(function, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    flags = [*SMALL, "--pu_start", 2, "--max_steps", 4, "--save_interval", 4]
    printed = run("train.py", *flags, "--compile", "--out_dir", tmp_path / "compiled").stdout
    assert "not compiled" not in printed
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    run("train.py", *flags, "--out_dir", tmp_path / "eager")
    assert_same_path(tmp_path / "compiled", tmp_path / "eager")


@pytest.mark.parametrize("algorithm, flags, counts, share", [
    ("unsupervised", [], "E_U[l], on 64 images of U", 0),
    ("supervised", [], "61 images of U and 3 of S", 2500 / 52500),
    ("supervised", ["--n_labeled", 100], "63 images of U and 1 of S", 100 / 50100),
])
def test_baselines(small_run, tmp_path, algorithm, flags, counts, share):
    result = run("train.py", *SMALL, "--algorithm", algorithm, *flags, "--batch_size", 64,
                 "--init_from", small_run[0] / "ckpt.pt", "--limit", 0.1,
                 "--max_steps", 2, "--save_interval", 1, "--out_dir", tmp_path / "run")
    assert counts in result.stdout
    for row in read_log(tmp_path / "run"):    # large l: sensitive images cost nothing; no cap
        assert row["risk"] == pytest.approx((1 - share) * row["loss_unlabeled"], rel=1e-4)


def test_other_choices(tmp_path):
    """Where losses are large, sensitive images cost nothing: the risk is l_U - loss_prior l_S, here
    below 0, for ones have the darkest images."""
    run("train.py", *SMALL, "--dtype", "bfloat16", "--correction", "none", "--sensitive", "1",
        "--prior", "1/11", "--loss_prior", "0.999", "--batch_size", 31, "--max_steps", 2,
        "--save_interval", 1, "--out_dir", tmp_path / "run")
    for row in read_log(tmp_path / "run"):
        expected = row["loss_unlabeled"] - 0.999 * row["loss_sensitive"]
        assert row["risk"] < 0 and row["risk"] == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("lr", ["1", "1e38"])    # the second is no longer finite
def test_a_run_that_diverges_never_reaches_a_checkpoint(small_run, tmp_path, lr):
    ckpt = torch.load(small_run[0] / "ckpt_prev.pt")    # of step 20
    ckpt["args"]["out_dir"] = str(tmp_path)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    refused("diverged", "train.py", "--out_dir", tmp_path, "--resume", "--lr", lr)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_finished_run_is_not_trained_further(small_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    run("train.py", "--out_dir", folder, "--resume")
    assert (folder / "log.csv").read_text() == (small_run[0] / "log.csv").read_text()
    refused("--init_from", "train.py", "--out_dir", folder, "--resume", "--max_steps", 60)
    assert torch.load(folder / "ckpt.pt")["step"] == 30


@pytest.mark.parametrize("flags, words", [
    (["--labeled", "3,4"], "--labeled"),
    (["--labeled", "1", "--n_labeled", "5000"], "--labeled: only"),
    (["--lr", "0"], "--lr"),
    (["--dataset", "folder", "--prior", "0.1", "--algorithm", "oracle"], "--algorithm oracle"),
    (["--pu_start", "9", "--max_steps", "9"], "--pu_start 9 must be below"),
    (["--keep", "0.4"], "--keep needs --scores"),
    (["--batch_size", "1"], "--batch_size 1"),
    (["--batch_size", "30", "--grad_accum", "4"], "4 micro-batches"),
    (["--image_size", "32"], "--image_size 32"),
])
def test_a_bad_command_line_is_refused(tmp_path, flags, words):
    refused(words, "train.py", *flags, "--out_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_changed(small_run):
    folder = small_run[0]
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused(f"--out_dir {folder} already holds a run", "train.py", *SMALL, "--out_dir", folder)
    refused("--prior cannot change", "train.py", "--prior", "0.4", "--out_dir", folder, "--resume")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_of_a_folder_is_resumed_from_another_place(small_run, tmp_path):
    """All its paths were relative; then the scores have moved."""
    mine, there = tmp_path / "mine", tmp_path / "there"
    make_folder(mine / "images", n=40)
    there.mkdir()
    shutil.copy(small_run[0] / "ckpt.pt", mine)
    loaded = data.load("folder", mine / "images", 28, 1)
    u, s, _ = data.split("folder", loaded)
    torch.save(dict(u=u, s=s, z_u=torch.arange(40.), z_s=4 * torch.arange(10.),
                    digest=data.digest(loaded.train)), mine / "scores.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mine)
        overhear("train.py", "--dataset", "folder", "--data_dir", "images", "--prior", "0.4",
                 "--scores", "scores.pt", "--init_from", "ckpt.pt", "--batch_size", 16, "--device",
                 "cpu", "--dtype", "float32", "--max_steps", 3, "--out_dir", "run", killed=True)
    (mine / "scores.pt").rename(there / "scores.pt")
    saved = torch.load(there / "scores.pt")
    torch.save(saved | dict(z_u=-saved["z_u"]), there / "other.pt")
    refused("holds other images", "train.py", "--out_dir", mine / "run", "--resume", "--scores",
            there / "other.pt")
    run("train.py", "--out_dir", "../mine/run", "--resume", "--scores", "scores.pt", cwd=there)
    ckpt = torch.load(mine / "run" / "ckpt.pt")
    assert ckpt["step"] == 3 and ckpt["args"]["keep"] == pytest.approx(0.54)
    assert ckpt["args"]["scores"] == str(there / "scores.pt")


def test_where_the_last_checkpoint_is_missing_the_one_before_is_used(small_run, tmp_path):
    """A run that is killed between the two renames of write_whole leaves it so."""
    folder = tmp_path / "run"
    shutil.copytree(small_run[0], folder)
    (folder / "ckpt.pt").unlink()
    previous = torch.load(folder / "ckpt_prev.pt")
    torch.save(previous | dict(seconds=100), folder / "ckpt_prev.pt")
    printed = run("train.py", "--out_dir", folder, "--resume").stdout
    last = read_log(folder)[-1]    # its time and speed are those of the whole run
    assert 100 < last["seconds"] < 200
    assert last["images_per_second"] == pytest.approx(30 * 32 / last["seconds"], abs=0.1)
    assert "ckpt_prev.pt, is used instead" in printed and "from step 20;" in printed
    a, b = (torch.load(path / "ckpt.pt") for path in (folder, small_run[0]))
    assert same(a["ema"], b["ema"]) and a["step"] == 30


def test_resuming_from_nothing_or_from_garbage(tmp_path):
    printed = run("train.py", *SMALL, "--max_steps", 1, "--out_dir", tmp_path / "new", "--resume")
    assert "ckpt.pt does not exist yet: a new run begins" in printed.stdout
    assert torch.load(tmp_path / "new" / "ckpt.pt")["step"] == 1
    (tmp_path / "ckpt.pt").write_text("garbage")
    refused("is not a checkpoint of train.py", "train.py", "--out_dir", tmp_path, "--resume")
    assert (tmp_path / "ckpt.pt").read_text() == "garbage"


# -----------------------------------------------------------------------------
# recipes

@pytest.mark.parametrize("n_unlabeled, flags, steps", [
    (11000, ["--recipe", "paper"], 8594), (11000, ["--init_from", "ckpt.pt"], 1719),
    (11, ["--init_from", "ckpt.pt"], 300)])
def test_recipes_with_epochs(small_run, tmp_path, monkeypatch, n_unlabeled, flags, steps):
    """Section 5 of the paper."""
    shutil.copy(small_run[0] / "ckpt.pt", tmp_path)
    monkeypatch.chdir(tmp_path)
    overhear("train.py", "--prior", "1/11", "--n_unlabeled", n_unlabeled, "--n_labeled", 5, *flags,
             "--device", "cpu", "--dtype", "float32", "--out_dir", "run", killed=True)
    args = json.loads((tmp_path / "run" / "args.json").read_text())["flags"]
    expected = dict(max_steps=steps, pu_start=0, lr=1e-4, warmup_steps=500, constant_lr=0)
    assert {name: args[name] for name in expected} == expected
    if flags[0] == "--recipe":
        expected = dict(network="paper", schedule="linear", prediction="eps", correction="abs",
                        limit=math.inf)
        assert {name: args[name] for name in expected} == expected


def test_a_short_fine_tuning_samples_from_what_it_learned(small_run, tmp_path):
    """It has fewer steps than the warm-up of the recipe. The average must still follow."""
    before = torch.load(small_run[0] / "ckpt.pt")["ema"]
    run("train.py", *SMALL, "--init_from", small_run[0] / "ckpt.pt", "--limit", 3,
        "--max_steps", 50, cwd=tmp_path)
    after = torch.load(tmp_path / "out" / "mnist-pu-0.5-init_from" / "ckpt.pt")
    change = {key: sum((after[key][name] - before[name]).square().sum() for name in before) ** 0.5
              for key in ["model", "ema"]}
    assert change["ema"] > 0.5 * change["model"]
    assert len(after["typical"]) == 20    # a network that knows U has the cap from its first step


def test_a_network_that_draws_other_images_is_refused(small_run, tmp_path):
    color = unet.UNet(unet.preset("tiny", 3, 32))
    torch.save(torch.load(small_run[0] / "ckpt.pt") | dict(
        network=pretrained.describe(color), ema=color.state_dict()), tmp_path / "ckpt.pt")
    refused("draws images of 3 channels and 32 pixels", "train.py", *SMALL, "--init_from",
            tmp_path / "ckpt.pt", "--out_dir", tmp_path / "run")
