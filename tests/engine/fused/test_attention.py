"""Packed attention against the plain formula, one sample at a time; cuDNN's kernels where there is a GPU."""

import os

import pytest
import torch

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.fused.attention import CudnnVarlenAttention, make_attention
from ideoflow.engine.packed import PackedLayout

LAYOUTS = {
    "mixed": PackedLayout((5, 0, 3), ((4, 6), (3, 3), (1, 7)), multiple=16),
    "equal": PackedLayout((4, 4), ((3, 3), (1, 9))),
    "one": PackedLayout((1,), ((1, 1),), multiple=4),
}


def formula(qkv, dout, layout):
    """softmax(q k^T / sqrt(E)) v in float64 for each sample, and its gradient for q, k, v by autograd."""
    x = qkv.double().requires_grad_()
    out = torch.zeros_like(x[:, 0])
    for start, length in zip(layout.starts, layout.lengths, strict=False):
        q, k, v = x[start : start + length].permute(1, 2, 0, 3)
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1)
        out[start : start + length] = (weights @ v).transpose(0, 1)
    (gradient,) = torch.autograd.grad(out, x, dout.double())
    return out.detach(), gradient


def run(attention, qkv, dout, layout):
    out, saved = attention.forward(qkv, layout)
    return out, torch.stack(attention.backward(dout, qkv, out, saved, layout), 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sdpa_is_the_formula(name):
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    qkv, dout = torch.randn(layout.total, 3, 2, 16), torch.randn(layout.total, 2, 16)
    for got, expected in zip(run(make_attention("sdpa", qkv.device), qkv, dout, layout),
                             formula(qkv, dout, layout), strict=True):  # fmt: skip
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
        assert not got[layout.tokens :].any()  # inert tokens: neither output nor gradient


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_flash4_is_the_formula(name):
    pytest.importorskip("flash_attn.cute")
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    qkv = torch.randn(layout.total, 3, 2, 256, device="cuda").bfloat16()
    dout = torch.randn(layout.total, 2, 256, device="cuda").bfloat16()
    attention = make_attention("flash4", qkv.device)
    for got, expected in zip(run(attention, qkv, dout, layout), formula(qkv, dout, layout), strict=True):
        assert (got.double() - expected).norm() <= 2e-2 * expected.norm()
        assert not got[layout.tokens :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True], ids=["ragged", "exact"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_cudnn_is_the_formula(name, exact, monkeypatch):
    pytest.importorskip("cudnn")
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    monkeypatch.setattr(CudnnVarlenAttention, "_exact", lambda self, layout: exact)
    qkv = torch.randn(layout.total, 3, 2, 64, device="cuda").bfloat16()
    dout = torch.randn(layout.total, 2, 64, device="cuda").bfloat16()
    attention = make_attention("cudnn_varlen", qkv.device)
    for got, expected in zip(run(attention, qkv, dout, layout), formula(qkv, dout, layout), strict=True):
        assert (got.double() - expected).norm() <= 2e-2 * expected.norm()
        assert not got[layout.tokens :].any()


def test_exact_plans_are_earned(monkeypatch):
    attention = CudnnVarlenAttention()
    monkeypatch.setattr("ideoflow.engine.fused.attention._CALLS_BEFORE_EXACT", 2)
    common, rare = PackedLayout((4, 5), ((3, 3), (3, 3))), PackedLayout((4, 9), ((3, 3), (3, 3)))
    assert [attention._exact(common) for _ in range(3)] == [False, False, True]
    assert not attention._exact(rare)  # its second length is new
    assert attention._exact(common)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
@pytest.mark.parametrize("kernel", ["cudnn_varlen", "flash4"])
def test_a_missing_kernel_is_told(kernel, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    with pytest.raises(IdeoflowError) as caught:
        make_attention(kernel, torch.device("cpu"))
    assert caught.value.diagnostics[0].code.id == "IE503"
