"""sample.py as a user runs it, with a real checkpoint."""
import numpy as np
import pytest
from conftest import pixels, refused, run

SAMPLING = ["--device", "cpu", "--dtype", "float32", "--steps", 3, "--n", 7, "--batch_size", 2]


def sample(folder, *flags, **kwargs):
    return run("sample.py", "--ckpt", folder / "ckpt.pt", *SAMPLING, *flags, **kwargs)


def test_grid_and_folder_hold_the_same_images(small_run, tmp_path):
    sample(small_run[0], "--grid", tmp_path / "new" / "grid.png", "--out_dir", tmp_path / "pngs")
    names = [f"{i:05d}.png" for i in range(7)]
    grid = pixels(tmp_path / "new" / "grid.png")
    assert grid.shape == (3 * 29 - 1, 3 * 29 - 1)
    assert sorted(path.name for path in (tmp_path / "pngs").iterdir()) == names
    assert len({path.read_bytes() for path in (tmp_path / "pngs").iterdir()}) == 7    # all differ
    for i, name in enumerate(names):
        tile = grid[i // 3 * 29:, i % 3 * 29:][:28, :28]
        assert np.array_equal(pixels(tmp_path / "pngs" / name), tile)


def test_half_precision_draws_nearly_the_same(small_run, tmp_path):
    for dtype in ["float32", "bfloat16"]:
        sample(small_run[0], "--dtype", dtype, "--grid", tmp_path / f"{dtype}.png")
    difference = pixels(tmp_path / "float32.png") - pixels(tmp_path / "bfloat16.png")
    assert 0 < np.abs(difference).mean() < 4    # of 255


def test_the_seed_the_sampler_and_its_steps_decide(small_run, tmp_path):
    path, grids = tmp_path / "grid.png", []
    for flags in [[], [], ["--seed", 4], ["--steps", 4], ["--sampler", "ddim"]]:
        sample(small_run[0], "--sampler", "ddpm", "--seed", 3, *flags, "--grid", path)
        grids.append(path.read_bytes())
    assert grids[0] == grids[1] and len(set(grids)) == 4


def test_samples_come_from_the_average_of_the_weights(small_run, tmp_path, monkeypatch):
    """With the seed, sampler and batch size of train.py, the grid equals the last of the run. It
    is samples.png, where nothing else is asked; ~ is the home folder."""
    monkeypatch.setenv("HOME", str(small_run[0]))
    run("sample.py", "--device", "cpu", "--dtype", "float32", "--ckpt", "~/ckpt.pt", cwd=tmp_path)
    expected = pixels(small_run[0] / "samples_000030.png")
    assert np.array_equal(pixels(tmp_path / "samples.png"), expected)


@pytest.mark.parametrize("flags, words", [
    (["--n", "0"], "--n must be positive"),
    (["--steps", "1001"], "--steps 1001 is more than the 1000"),
    (["--ckpt", "none.pt"], "none.pt does not exist"),
])
def test_a_bad_command_line_is_refused(small_run, tmp_path, flags, words):
    refused(words, "sample.py", "--ckpt", small_run[0] / "ckpt.pt", *flags,
            "--grid", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_nothing_is_overwritten(small_run, tmp_path):
    ckpt, full = small_run[0] / "ckpt.pt", tmp_path / "full"
    full.mkdir()
    (full / "0.PNG").write_text("precious")
    before = ckpt.read_bytes()
    for words, *flags in [("already holds PNGs", "--out_dir", full),
                          ("must end in .png", "--grid", ckpt),
                          ("0.PNG", "--out_dir", full / "0.PNG"),
                          ("0.PNG", "--grid", full / "0.PNG" / "grid.png")]:
        refused(words, "sample.py", "--ckpt", ckpt, *flags)
    assert (full / "0.PNG").read_text() == "precious" and ckpt.read_bytes() == before
