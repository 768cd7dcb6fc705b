"""Tensors read by threads in pieces, against safetensors' own reader."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ideoflow.model import reading
from ideoflow.model.checkpoint import _places
from ideoflow.model.reading import read_tensor

CPU = torch.device("cpu")


def raw(tensor):
    """Its bytes; a scalar has no last axis to take apart."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "odd": torch.randint(0, 255, (7, 13), dtype=torch.uint8),
        "rows": torch.randn(50, 33).bfloat16(),
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "eight": torch.randn(9, 9).to(torch.float8_e4m3fn),
        "flags": torch.rand(5) > 0.5,
    }
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("chunk", [1, 64, 1000, 8 << 20])
def test_they_are_the_tensors_of_the_file(file, chunk, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", chunk)
    with safe_open(file, "pt") as expected:
        for place in _places(file):
            whole = expected.get_tensor(place.key)
            got = place.read(CPU)
            assert got.dtype == whole.dtype and got.shape == whole.shape
            assert torch.equal(raw(got), raw(whole))
            if whole.ndim == 2 and len(whole) > 4:
                assert torch.equal(place.read_rows(2, 5, CPU).float(), whole[2:5].float())


def test_a_file_that_ends_meanwhile_is_told(file):
    with pytest.raises(ValueError, match="cut short"):
        read_tensor(file, file.stat().st_size - 10, (20,), torch.uint8, CPU)


@pytest.mark.gpu
def test_a_gpu_gets_the_same(file, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 64)
    for place in _places(file):
        got = place.read(torch.device("cuda"))
        assert torch.equal(raw(got.cpu()), raw(place.read(CPU)))
