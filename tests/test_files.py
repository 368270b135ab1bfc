"""Files that are whole or not there, and what is read back from them."""
import os
import random

import pytest
import torch

from files import (
    CHECKPOINT,
    load_verified,
    read_checkpoint,
    read_newest,
    save_whole,
    write_whole,
)
from images import save_grid


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")    # not on Windows
    path, noise = tmp_path / "file", torch.randint(256, (1, 1, 400, 400), dtype=torch.uint8)
    path.write_text("old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))    # fails as a full disk does
    try:
        for save in [save_whole, save_grid]:
            with pytest.raises(OSError, match="file cannot be written: File too large$"):
                save(noise, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def fail(part):
        part.write_text("half")
        raise OSError("2 of 3 images cannot be decoded")

    with pytest.raises(OSError, match="^2 of 3 images"):    # writing was not the problem, ...
        write_whole(path, fail)
    with pytest.raises(OSError, match="No such file or directory: 'nowhere'$"):    # ... nor here
        write_whole(path, lambda part: part.write_bytes(open("nowhere").read()))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_power_cut_at_any_moment_leaves_a_whole_file(tmp_path, monkeypatch):
    path, previous, moments = tmp_path / "new", tmp_path / "old", []

    def observed(function):
        def call(*args):
            function(*args)
            held = [file.read_text() for file in [path, previous] if file.exists()]
            moments.append((function.__name__, held))
        return call

    monkeypatch.setattr(os, "fsync", observed(os.fsync))
    monkeypatch.setattr(os, "replace", observed(os.replace))
    for text in "abc":
        write_whole(path, lambda part: part.write_text(text), keep=previous)    # noqa: B023
    assert moments[7:] == [("fsync", ["b", "a"]), ("replace", ["b"]), ("replace", ["c", "b"]),
                            ("fsync", ["c", "b"])]


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, state = tmp_path / "flipped", {"weights": torch.randn(20), "step": 7}
    save_whole(state, path)
    raw, n_refused = bytearray(path.read_bytes()), 0
    flips = random.Random(0).sample(range(8 * len(raw)), 200)
    flips += [8 * (i + 38) + 4 for i in range(len(raw)) if raw[i:i + 4] == b"PK\1\2"]    # folders
    for bit in flips:
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        raw[bit // 8] ^= 1 << bit % 8
        try:
            loaded = load_verified(path)
            assert loaded["step"] == 7 and torch.equal(loaded["weights"], state["weights"])
        except OSError as error:
            assert str(error) == f"{path} is not a file of torch.save, or is damaged"
            n_refused += 1
    assert n_refused > 100
    save_whole([{"weights": torch.tensor([1, torch.inf])}], path)
    with pytest.raises(OSError, match="flipped holds numbers that are not finite"):
        load_verified(path)
    with pytest.raises(OSError, match="is not a regular file"):    # instead of waiting for this one
        os.mkfifo(tmp_path / "pipe")
        load_verified(tmp_path / "pipe")


def test_read_checkpoint_refuses_what_is_none(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist: train.py writes it"):
        read_checkpoint(tmp_path / "none.pt")
    whole = dict.fromkeys(CHECKPOINT, 0) | {"args": {}}
    wrong = [{name: whole[name] for name in whole if name != missing} for missing in whole]
    for state in ["text", whole | {"args": 0}, *wrong]:
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(OSError, match="bad.pt is not a checkpoint of train.py"):
            read_checkpoint(tmp_path / "bad.pt")
    torch.save(whole, tmp_path / "good.pt")
    for path in ["bad.pt", "none.pt"]:
        assert read_newest(tmp_path / path, tmp_path / "good.pt") == whole
        assert f"{path} " in capsys.readouterr().out
    assert (tmp_path / "ckpt_damaged.pt").exists()    # nothing is lost
    assert read_newest(tmp_path / "good.pt", tmp_path / "none.pt") == whole
