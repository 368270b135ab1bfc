"""What the scripts share: devices, precision, checkpoints."""
import pytest
import torch

from runtime import default_dtype, find_device, read_checkpoint


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
    for name in ["banana", "meta", "cuda:99"]:
        with pytest.raises(ValueError, match=f"--device {name} is not to be had here"):
            find_device(name)


def test_the_default_precision_is_what_the_processor_computes_in(monkeypatch):
    for capabilities, dtype in [({"avx512_bf16": True}, "bfloat16"), ({"avx512_bf16": False}, "float32"), ({}, "float32")]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        assert default_dtype(torch.device("cpu")) == dtype
    assert default_dtype(torch.device("mps")) == "float32"
