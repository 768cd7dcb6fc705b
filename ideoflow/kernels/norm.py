"""RMSNorm with adaptive scale or gate, its backward, and the quantisation behind it, one pass each, in Triton.

One program holds one token's row in registers, so each tensor is read once and written once: these kernels
run at the memory's speed. The inverse rms is computed again in the backward pass, where the row is at hand
anyway, rather than saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.quantize import empty_operand, store_row, warps_for
from ideoflow.kernels.reference import Operand


@triton.jit
def _load_row(pointer, row, width, columns, mask):
    return tl.load(pointer + row.to(tl.int64) * width + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rms_backward(g, x, width, eps):
    """Gradient of x / rms(x) for one row; masked elements are zero in both."""
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    normed = x * inverse
    return inverse * (g - normed * (tl.sum(g * normed, 0) / width))


@triton.jit
def _norm_modulate(h, weight, scale, sample, out, out_scale, width, eps, FP8_OUT: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = _load_row(h, row, width, columns, mask)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    s = _load_row(scale, tl.load(sample + row), width, columns, mask)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    store_row(out, out_scale, row, columns, mask, x * inverse * (w * (1.0 + s)), width, FP8_OUT)


def norm_modulate(h: Tensor, weight: Tensor, scale: Tensor, sample: Tensor, eps: float, fp8: bool) -> Operand:
    """See :func:`ideoflow.kernels.reference.norm_modulate`."""
    rows, width = h.shape
    result = empty_operand(rows, width, h, fp8)
    block = triton.next_power_of_2(width)
    _norm_modulate[(rows,)](
        h,
        weight,
        scale,
        sample,
        result.values,
        result.scale,
        width,
        eps,
        fp8,
        block,
        num_warps=warps_for(block),
    )
    return result


@triton.jit
def _norm_modulate_backward(dx, h, weight, scale, sample, residual, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = _load_row(h, row, width, columns, mask)
    g = _load_row(dx, row, width, columns, mask)
    before = _load_row(residual, row, width, columns, mask)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    s = _load_row(scale, tl.load(sample + row), width, columns, mask)
    grad = before + _rms_backward(g * (w * (1.0 + s)), x, width, eps)
    tl.store(out + row.to(tl.int64) * width + columns, grad.to(out.dtype.element_ty), mask=mask)


def norm_modulate_backward(dx: Tensor, h: Tensor, weight: Tensor, scale: Tensor, sample: Tensor, eps: float,
                           residual: Tensor) -> Tensor:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.norm_modulate_backward`."""
    rows, width = h.shape
    out = torch.empty_like(h)
    block = triton.next_power_of_2(width)
    _norm_modulate_backward[(rows,)](
        dx, h, weight, scale, sample, residual, out, width, eps, block, num_warps=warps_for(block)
    )
    return out


@triton.jit
def _gated_residual(h, y, weight, gate, sample, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = _load_row(y, row, width, columns, mask)
    before = _load_row(h, row, width, columns, mask)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    g = _load_row(gate, tl.load(sample + row), width, columns, mask)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    after = before + g * x * inverse * w
    tl.store(out + row.to(tl.int64) * width + columns, after.to(out.dtype.element_ty), mask=mask)


def gated_residual(h: Tensor, y: Tensor, weight: Tensor, gate: Tensor, sample: Tensor, eps: float) -> Tensor:
    """See :func:`ideoflow.kernels.reference.gated_residual`."""
    rows, width = h.shape
    out = torch.empty_like(h)
    block = triton.next_power_of_2(width)
    _gated_residual[(rows,)](h, y, weight, gate, sample, out, width, eps, block, num_warps=warps_for(block))
    return out


@triton.jit
def _gated_residual_backward(dh, y, weight, gate, sample, fold, out, out_scale, width, eps,
                             FOLD: tl.constexpr, FP8_OUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = _load_row(y, row, width, columns, mask)
    g = _load_row(dh, row, width, columns, mask)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    g *= _load_row(gate, tl.load(sample + row), width, columns, mask) * w
    grad = _rms_backward(g, x, width, eps)
    if FOLD:
        grad *= tl.load(fold + columns, mask=mask, other=0.0)
    store_row(out, out_scale, row, columns, mask, grad, width, FP8_OUT)


def gated_residual_backward(dh: Tensor, y: Tensor, weight: Tensor, gate: Tensor, sample: Tensor, eps: float,
                            fold: Tensor | None, fp8: bool) -> Operand:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.gated_residual_backward`."""
    rows, width = y.shape
    result = empty_operand(rows, width, y, fp8)
    block = triton.next_power_of_2(width)
    _gated_residual_backward[(rows,)](
        dh, y, weight, gate, sample, fold, result.values, result.scale, width, eps, fold is not None, fp8, block,
        num_warps=warps_for(block),
    )  # fmt: skip
    return result
