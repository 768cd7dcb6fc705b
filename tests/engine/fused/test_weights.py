"""The two products with a frozen weight, for every storage, against a dense product."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ideoflow import kernels
from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.fused.weights import FrozenWeight, Scratch
from ideoflow.kernels.float8 import Float8Linear

OPS = kernels.load("reference")
CPU = torch.device("cpu")


def layers(count=2):
    torch.manual_seed(0)
    return [nn.Linear(64, 32, bias=False).requires_grad_(False) for _ in range(count)]


def products(weight, x, dy, fp8=False):
    if weight.fold is not None:
        dy = dy * weight.fold.float()
    return weight.forward(OPS.quantize(x, fp8)).float(), weight.backward(OPS.quantize(dy, fp8)).float()


def close(got, expected, bound):
    assert all((a - b).norm() <= bound * b.norm() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("storage", "fp8", "bound"), [("dense", False, 1e-6), ("fp8", False, 1e-6),
                                                       ("fp8", True, 0.05)])  # fmt: skip
@pytest.mark.parametrize("keep_transposed", [False, True])
def test_products(storage, fp8, bound, keep_transposed):
    parts = layers()
    if storage == "fp8":
        parts = [Float8Linear.of(layer) for layer in parts]
        dense = torch.cat([layer.weight.float() * layer.weight_scale[:, None] for layer in parts])
    else:
        dense = torch.cat([layer.weight.data for layer in parts])
    x, dy = torch.randn(16, 64), torch.randn(16, 64)
    before = [layer(x) for layer in parts]
    weight = FrozenWeight(parts, fp8=fp8, ops=OPS, scratch=Scratch(CPU), keep_transposed=keep_transposed)
    close(products(weight, x, dy, fp8), (x @ dense.t(), dy @ dense), bound)
    # The modules became views of one matrix and compute what they did.
    assert parts[1].weight.data_ptr() == weight.values[32:].data_ptr()
    close([layer(x) for layer in parts], before, 1e-6)


def test_four_bit_weights():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parts = []
    for layer in layers():
        packed = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        parts.append(packed.to(CPU))
        if packed.weight.quant_state is None:
            pytest.skip("this bitsandbytes does not quantise on the CPU")
    dense = torch.cat([
        bitsandbytes.functional.dequantize_4bit(p.weight.data, p.weight.quant_state) for p in parts
    ]).float()  # fmt: skip
    weight = FrozenWeight(parts, fp8=False, ops=OPS, scratch=Scratch(CPU))
    x, dy = torch.randn(16, 64), torch.randn(16, 64)
    close(products(weight, x, dy), (x @ dense.t(), dy @ dense), 1e-6)


@pytest.mark.parametrize(
    "parts",
    [
        [nn.Linear(64, 32, bias=False), Float8Linear(64, 32)],
        [nn.Linear(64, 32)],
        [SimpleNamespace(out_features=32, in_features=64, weight=torch.zeros(32, 64, dtype=torch.int8))],
    ],
    ids=["mixture", "bias", "int8"],
)
def test_other_storages_are_told(parts):
    with pytest.raises(IdeoflowError) as caught:
        FrozenWeight(parts, fp8=False, ops=OPS, scratch=Scratch(CPU))
    assert caught.value.diagnostics[0].code.id == "IE501"


def test_scratch_grows_and_is_reused():
    scratch = Scratch(CPU)
    small = scratch.take(2, 3, torch.float32)
    assert scratch.take(4, 8, torch.bfloat16).shape == (4, 8)
    assert small.shape == (2, 3)
    large = scratch.take(8, 8, torch.float32)
    assert scratch.take(2, 2, torch.float32).data_ptr() == large.data_ptr()
