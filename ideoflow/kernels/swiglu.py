"""SwiGLU with the quantisation behind it, forward and backward, in Triton.

One program holds one token's row: for 12288 channels the backward keeps 24576 results in registers, as bf16,
until their largest magnitude is known. Going over the row twice instead costs as much again in exponentials.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.quantize import (
    FP8_MAX,
    SMALLEST_AMAX,
    empty_operand,
    load_row,
    pieces,
    store_row,
    warps_for,
)
from ideoflow.kernels.reference import Operand


@triton.jit
def _swiglu(gate_up, out, out_scale, width, FP8_OUT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0)
    gate1, gate2 = load_row(gate_up, 2 * row, width, A, B)
    up1, up2 = load_row(gate_up, 2 * row + 1, width, A, B)
    u1 = gate1 * tl.sigmoid(gate1) * up1
    store_row(out, out_scale, row, u1, gate2 * tl.sigmoid(gate2) * up2, width, FP8_OUT, A, B)


def swiglu(gate_up: Tensor, fp8: bool) -> Operand:
    """See :func:`ideoflow.kernels.reference.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = empty_operand(rows, width, gate_up, fp8)
    _swiglu[(rows,)](
        gate_up, result.values, result.scale, width, fp8, *pieces(width), num_warps=warps_for(width)
    )
    return result


@triton.jit
def _gradients(du, du_stride, gate_up, fold, row, width, columns, FOLD: tl.constexpr):
    """Gradients of gate and up for some columns of one row, in gate_up's type, and the largest of them."""
    mask = columns < width
    start = gate_up + row.to(tl.int64) * 2 * width
    # What is read once must not push the fold, which every row reads, out of the first-level cache.
    g = tl.load(
        du + row.to(tl.int64) * du_stride + columns, mask=mask, other=0.0, eviction_policy="evict_first"
    )
    gate = tl.load(start + columns, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    up = tl.load(start + width + columns, mask=mask, other=0.0, eviction_policy="evict_first")
    g, up = g.to(tl.float32), up.to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dup = g * sigmoid
    dgate = dup * up * (1.0 + gate * (1.0 - sigmoid))
    dup *= gate
    if FOLD:
        dgate *= tl.load(fold + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dup *= tl.load(fold + width + columns, mask=mask, other=0.0, eviction_policy="evict_last").to(
            tl.float32
        )
    amax = tl.max(tl.maximum(tl.abs(dgate), tl.abs(dup)), 0)
    return dgate.to(gate_up.dtype.element_ty), dup.to(gate_up.dtype.element_ty), amax


@triton.jit
def _store(start, x, factor, columns, width, FP8_OUT: tl.constexpr):
    if FP8_OUT:
        x = tl.minimum(tl.maximum(x.to(tl.float32) * factor, -FP8_MAX), FP8_MAX)
    tl.store(start + columns, x.to(start.dtype.element_ty), mask=columns < width)


@triton.jit
def _swiglu_backward(du, du_stride, gate_up, fold, out, out_scale, width, FOLD: tl.constexpr,
                     FP8_OUT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    columns1, columns2 = tl.arange(0, A), A + tl.arange(0, B)
    dgate1, dup1, amax1 = _gradients(du, du_stride, gate_up, fold, row, width, columns1, FOLD)
    dgate2, dup2, amax2 = _gradients(du, du_stride, gate_up, fold, row, width, columns2, FOLD)
    factor = 1.0
    if FP8_OUT:
        amax = tl.maximum(tl.maximum(amax1, amax2), SMALLEST_AMAX)
        tl.store(out_scale + row, amax / FP8_MAX)
        factor = FP8_MAX / amax
    start = out + row.to(tl.int64) * 2 * width
    _store(start, dgate1, factor, columns1, width, FP8_OUT)
    _store(start, dgate2, factor, columns2, width, FP8_OUT)
    _store(start + width, dup1, factor, columns1, width, FP8_OUT)
    _store(start + width, dup2, factor, columns2, width, FP8_OUT)


def swiglu_backward(du: Tensor, gate_up: Tensor, fold: Tensor | None, fp8: bool) -> Operand:
    """See :func:`ideoflow.kernels.reference.swiglu_backward`."""
    rows, width = du.shape
    result = empty_operand(rows, 2 * width, gate_up, fp8)
    # 8 warps leave room for two programs a multiprocessor; 4 and 16 warps, or prefetching rows, were slower.
    _swiglu_backward[(rows,)](
        du, du.stride(0), gate_up, fold, result.values, result.scale, width, fold is not None, fp8,
        *pieces(width), num_warps=8,
    )  # fmt: skip
    return result
