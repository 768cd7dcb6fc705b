"""RMSNorm with adaptive scale or gate, its backward, and the quantisation behind it, in Triton.

One program holds one token's row in registers, so each tensor is read once and written once: these kernels
run at the memory's speed. The inverse rms is computed again in the backward pass, where the row is at hand
anyway, rather than saved. Rows come in two pieces (see ``load_row``), hence the pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.quantize import empty_operand, load_row, pieces, store_row, warps_for
from ideoflow.kernels.reference import Operand


@triton.jit
def _inverse_rms(first, second, width, eps):
    return tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / width + eps)


@triton.jit
def _rms_backward(g1, g2, x1, x2, width, eps):
    """Gradient of x / rms(x) for one row."""
    inverse = _inverse_rms(x1, x2, width, eps)
    mean = inverse * inverse * (tl.sum(g1 * x1, 0) + tl.sum(g2 * x2, 0)) / width
    return inverse * (g1 - x1 * mean), inverse * (g2 - x2 * mean)


@triton.jit
def _norm_modulate(h, factor, sample, out, out_scale, width, eps, FP8_OUT: tl.constexpr, A: tl.constexpr,
                   B: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    x1, x2 = load_row(h, row, width, A, B)
    f1, f2 = load_row(factor, tl.load(sample + row), width, A, B)
    inverse = _inverse_rms(x1, x2, width, eps)
    store_row(out, out_scale, row, x1 * inverse * f1, x2 * inverse * f2, width, FP8_OUT, A, B)


def norm_modulate(h: Tensor, factor: Tensor, sample: Tensor, eps: float, fp8: bool) -> Operand:
    """See :func:`ideoflow.kernels.reference.norm_modulate`."""
    rows, width = h.shape
    result = empty_operand(rows, width, h, fp8)
    _norm_modulate[(rows,)](
        h,
        factor,
        sample,
        result.values,
        result.scale,
        width,
        eps,
        fp8,
        *pieces(width),
        num_warps=warps_for(width),
    )
    return result


@triton.jit
def _norm_modulate_backward(dx, dx_stride, h, factor, sample, residual, out, width, eps, A: tl.constexpr,
                            B: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    x1, x2 = load_row(h, row, width, A, B)
    g1, g2 = load_row(dx + row.to(tl.int64) * (dx_stride - width), row, width, A, B)
    f1, f2 = load_row(factor, tl.load(sample + row), width, A, B)
    before1, before2 = load_row(residual, row, width, A, B)
    g1, g2 = _rms_backward(g1 * f1, g2 * f2, x1, x2, width, eps)
    store_row(out, out, row, before1 + g1, before2 + g2, width, False, A, B)


def norm_modulate_backward(dx: Tensor, h: Tensor, factor: Tensor, sample: Tensor, eps: float,
                           residual: Tensor) -> Tensor:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.norm_modulate_backward`."""
    rows, width = h.shape
    out = torch.empty_like(h)
    _norm_modulate_backward[(rows,)](
        dx,
        dx.stride(0),
        h,
        factor,
        sample,
        residual,
        out,
        width,
        eps,
        *pieces(width),
        num_warps=warps_for(width),
    )
    return out


@triton.jit
def _gated_residual(h, y, factor, sample, out, width, eps, A: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0)
    x1, x2 = load_row(y, row, width, A, B)
    before1, before2 = load_row(h, row, width, A, B)
    f1, f2 = load_row(factor, tl.load(sample + row), width, A, B)
    inverse = _inverse_rms(x1, x2, width, eps)
    store_row(out, out, row, before1 + x1 * inverse * f1, before2 + x2 * inverse * f2, width, False, A, B)


def gated_residual(h: Tensor, y: Tensor, factor: Tensor, sample: Tensor, eps: float) -> Tensor:
    """See :func:`ideoflow.kernels.reference.gated_residual`."""
    rows, width = h.shape
    out = torch.empty_like(h)
    _gated_residual[(rows,)](
        h, y, factor, sample, out, width, eps, *pieces(width), num_warps=warps_for(width)
    )
    return out


@triton.jit
def _gated_residual_backward(dh, y, factor, sample, fold, out, out_scale, width, eps, FOLD: tl.constexpr,
                             FP8_OUT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    x1, x2 = load_row(y, row, width, A, B)
    g1, g2 = load_row(dh, row, width, A, B)
    f1, f2 = load_row(factor, tl.load(sample + row), width, A, B)
    g1, g2 = _rms_backward(g1 * f1, g2 * f2, x1, x2, width, eps)
    if FOLD:
        s1, s2 = load_row(fold, row * 0, width, A, B)
        g1 *= s1
        g2 *= s2
    store_row(out, out_scale, row, g1, g2, width, FP8_OUT, A, B)


def gated_residual_backward(dh: Tensor, y: Tensor, factor: Tensor, sample: Tensor, eps: float,
                            fold: Tensor | None, fp8: bool) -> Operand:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.gated_residual_backward`."""
    rows, width = y.shape
    result = empty_operand(rows, width, y, fp8)
    _gated_residual_backward[(rows,)](
        dh, y, factor, sample, fold, result.values, result.scale, width, eps, fold is not None, fp8,
        *pieces(width), num_warps=warps_for(width),
    )  # fmt: skip
    return result
