"""sample.py as a user runs it, with a real checkpoint."""
import numpy as np
import pytest
import torch
from conftest import SAMPLING, refused, run
from PIL import Image

from files import CHECKPOINT


def pixels(path):
    return np.array(Image.open(path))


def sample(*flags, **kwargs):
    return run("sample.py", "--device", "cpu", "--dtype", "float32", "--steps", 3, *flags, **kwargs)


def test_grid_and_folder_hold_the_same_images(small_run, tmp_path):
    ckpt = small_run[0] / "ckpt.pt"
    sample("--ckpt", ckpt, "--n", 5, "--batch_size", 2,
           "--grid", tmp_path / "g" / "grid.png", "--out_dir", tmp_path / "pngs")
    names = sorted(path.name for path in (tmp_path / "pngs").iterdir())
    assert names == [f"{i:05d}.png" for i in range(5)]
    grid = pixels(tmp_path / "g" / "grid.png")
    assert grid.shape == (2 * 29 - 1, 3 * 29 - 1)
    for i in range(5):
        image = pixels(tmp_path / "pngs" / f"{i:05d}.png")
        assert image.shape == (28, 28)
        assert np.array_equal(grid[i // 3 * 29:, i % 3 * 29:][:28, :28], image)


def test_two_ranks_draw_what_one_draws(small_run, two_ranks, tmp_path):
    run("sample.py", *SAMPLING, "--ckpt", small_run[0] / "ckpt.pt",
        "--grid", tmp_path / "grid.png", "--out_dir", tmp_path / "pngs")
    assert len(list((two_ranks[1] / "pngs").iterdir())) == 7
    for name in ["grid.png", *[f"pngs/{i:05d}.png" for i in range(7)]]:
        one, two = (pixels(folder / name).astype(int) for folder in [tmp_path, two_ranks[1]])
        assert np.abs(one - two).max() <= 1    # other batches, other rounding


def test_half_precision_draws_nearly_the_same(small_run, tmp_path):
    for dtype in ["float32", "bfloat16"]:
        sample("--ckpt", small_run[0] / "ckpt.pt", "--n", 4, "--dtype", dtype,
               "--grid", tmp_path / f"{dtype}.png")
    float32, bfloat16 = (pixels(tmp_path / f"{dtype}.png") for dtype in ["float32", "bfloat16"])
    difference = float32.astype(float) - bfloat16
    assert 0 < np.abs(difference).mean() < 4    # of 255


def test_the_seed_decides(small_run, tmp_path):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        sample("--ckpt", small_run[0] / "ckpt.pt", "--n", 4, "--sampler", "ddpm", "--seed", seed,
               "--grid", tmp_path / f"{name}.png")
    a, b, c = (pixels(tmp_path / f"{name}.png") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_samples_come_from_the_average_of_the_weights(small_run, tmp_path):
    """With the seed, sampler and batch size of train.py, the grid equals the last of the run."""
    run("sample.py", "--device", "cpu", "--dtype", "float32", "--n", 64,
        "--ckpt", small_run[0] / "ckpt.pt", "--grid", tmp_path / "grid.png")
    expected = pixels(small_run[0] / "samples_000030.png")
    assert np.array_equal(pixels(tmp_path / "grid.png"), expected)


def test_without_a_destination_the_grid_is_samples_png(small_run, tmp_path):
    result = sample("--ckpt", small_run[0] / "ckpt.pt", "--n", 1, cwd=tmp_path)
    assert pixels(tmp_path / "samples.png").shape == (28, 28)
    assert "samples.png" in result.stdout


@pytest.mark.parametrize("flags, words", [
    (["--n", "0"], "--n: 0 is not a positive whole number"),
    (["--steps", "1001"], "steps must be 1 to 1000, not 1001"),
    (["--sampler", "euler"], "invalid choice: 'euler'"),
    (["--device", "banana"], "--device banana is not to be had here"),
    ([], "--ckpt"),
])
def test_a_bad_command_line_is_refused(small_run, tmp_path, flags, words):
    ckpt = ["--ckpt", small_run[0] / "ckpt.pt"] if flags else []
    refused(2, words, "sample.py", *ckpt, *flags, "--grid", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_checkpoint_that_is_none(small_run, tmp_path):
    refused(1, "none.pt does not exist", "sample.py", "--ckpt", tmp_path / "none.pt",
            "--out_dir", tmp_path / "samples")
    assert not (tmp_path / "samples").exists()
    raw = bytearray((small_run[0] / "ckpt.pt").read_bytes())
    raw[len(raw) // 2] ^= 64    # in a weight
    (tmp_path / "bad.pt").write_bytes(raw)
    refused(1, "bad.pt is not a checkpoint of train.py", "sample.py", "--ckpt", tmp_path / "bad.pt")
    assert torch.load(small_run[0] / "ckpt.pt").keys() == CHECKPOINT    # each is asked for


def test_folders_that_hold_images_or_cannot_be_made(small_run, tmp_path):
    ckpt, full = small_run[0] / "ckpt.pt", tmp_path / "full"
    full.mkdir()
    (full / "00000.png").write_text("precious")
    refused(2, "full already holds PNGs", "sample.py", "--ckpt", ckpt, "--out_dir", full)
    for flag, path in [("--out_dir", "00000.png"), ("--grid", "00000.png/grid.png")]:
        refused(1, "00000.png", "sample.py", "--ckpt", ckpt, flag, full / path)
    assert (full / "00000.png").read_text() == "precious"


def test_a_grid_does_not_overwrite_the_checkpoint(small_run):
    ckpt = small_run[0] / "ckpt.pt"
    before = ckpt.read_bytes()
    refused(2, "must end in .png", "sample.py", "--ckpt", ckpt, "--grid", ckpt)
    assert ckpt.read_bytes() == before
