"""What the scripts share: errors, files, devices, precision, checkpoints, argument types."""
import argparse

import pytest
import torch

import runtime
from runtime import (
    compiled,
    default_dtype,
    exit_status,
    find_device,
    matmul_seconds,
    ranks,
    read_checkpoint,
    write_whole,
)


@pytest.mark.parametrize("error, status", [
    (ValueError("no such colour"), 2), (OSError("no such file"), "tool.py: error: no such file"),
    (KeyboardInterrupt(), "tool.py: interrupted")])
def test_errors_become_an_exit_status_and_a_sentence(error, status, capsys):
    with pytest.raises(SystemExit) as exit, exit_status(argparse.ArgumentParser("tool.py")):
        raise error
    assert exit.value.code == status    # a text goes to stderr and means status 1
    assert ("tool.py: error: no such colour" in capsys.readouterr().err) == (status == 2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda part: part.write_text("old"))

    def fail(part):
        part.write_text("half")
        raise RuntimeError("disk full\nand a long trace")

    with pytest.raises(OSError, match="file cannot be written: disk full$"):
        write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_read_checkpoint_refuses_what_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt does not exist"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ["text.pt", "other.pt"]:
        with pytest.raises(OSError, match=f"{name} is not a checkpoint of train.py"):
            read_checkpoint(tmp_path / name)


def test_find_device():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type in ("cuda", "mps", "xpu", "cpu")
    assert ranks() == (0, 1)
    for name in ["banana", "meta", "cuda:99"]:
        with pytest.raises(ValueError, match=f"--device {name} is not to be had here"):
            find_device(name)


@pytest.mark.parametrize("avx512_bf16, bfloat16_seconds, dtype", [
    (True, 0.2, "bfloat16"), (True, 1.0, "float32"), (True, 2.0, "float32"),
    (False, 0.2, "float32"), (None, 0.2, "float32")])
def test_default_precision_is_the_faster_one(monkeypatch, avx512_bf16, bfloat16_seconds, dtype):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": avx512_bf16})
    monkeypatch.setattr(runtime, "matmul_seconds", lambda dtype: seconds[dtype])
    assert default_dtype(torch.device("cpu")) == dtype
    assert default_dtype(torch.device("mps")) == "float32"


def test_measuring_the_precision_draws_no_random_numbers():
    state = torch.get_rng_state()
    assert matmul_seconds(torch.float32) > 0 and matmul_seconds(torch.bfloat16) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_that_does_not_compile_is_returned_as_it_is(capsys):
    def trial(fast):
        raise RuntimeError("\nno compiler")

    assert compiled(abs, trial) is abs
    assert "torch.compile fails here: no compiler" in capsys.readouterr().out


@pytest.mark.parametrize("name, good, bad, sentence", [
    ("positive", {"1": 1, "128": 128}, ["0", "-3", "1.5", "x"], "0 is not a positive whole number"),
    ("count", {"0": 0, "500": 500}, ["-1", "0.5", ""], "-1 is not a whole number, 0 or more"),
    ("seed", {"0": 0, "-7": -7, str(2 ** 63 - 1): 2 ** 63 - 1}, [str(2 ** 63), "a", "1.0"],
     f"{2 ** 63} does not fit in 64 bits as a whole number"),
    ("fraction", {"0.5": 0.5, "1/11": 1 / 11}, ["0", "1", "1/0", "nan", "1e400", "abc"],
     "'0' is not a number between 0 and 1, such as 0.5 or 1/11"),
    ("positive_float", {"2e-3": 2e-3, "1": 1.0}, ["0", "-1", "inf", "nan", "x"],
     "0 is not a positive number"),
    ("positive_or_inf", {"2": 2.0, "inf": float("inf")}, ["0", "-inf", "nan", "x"],
     "0 is not a positive number, or inf"),
    ("decay", {"0": 0.0, "0.999": 0.999}, ["1", "-0.1", "nan", "x"],
     "1 is not a number from 0 to below 1"),
])
def test_argument_types(capsys, name, good, bad, sentence):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", type=getattr(runtime, name))
    for text, number in good.items():
        flag = parser.parse_args([f"--flag={text}"]).flag
        assert flag == number and type(flag) is type(number)
    for text in bad:
        with pytest.raises(SystemExit):
            parser.parse_args([f"--flag={text}"])
        error = capsys.readouterr().err
        assert error.endswith(f"argument --flag: {sentence.replace(bad[0], text, 1)}\n")
