"""SwiGLU with the quantisation behind it, forward and backward, in Triton.

The backward row is too wide to hold (2 * 12288 results from 3 * 12288 inputs), so it goes over the row twice:
once for the largest magnitude, once to write. The second reading comes from the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.quantize import FP8_MAX, SMALLEST_AMAX, empty_operand, store_row, warps_for
from ideoflow.kernels.reference import Operand


@triton.jit
def _swiglu(gate_up, out, out_scale, width, FP8_OUT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    start = gate_up + row.to(tl.int64) * 2 * width
    gate = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + width + columns, mask=mask, other=0.0).to(tl.float32)
    store_row(out, out_scale, row, columns, mask, gate * tl.sigmoid(gate) * up, width, FP8_OUT)


def swiglu(gate_up: Tensor, fp8: bool) -> Operand:
    """See :func:`ideoflow.kernels.reference.swiglu`."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = empty_operand(rows, width, gate_up, fp8)
    block = triton.next_power_of_2(width)
    _swiglu[(rows,)](gate_up, result.values, result.scale, width, fp8, block, num_warps=warps_for(block))
    return result


@triton.jit
def _gradients(du, gate_up, fold, row, width, columns, FOLD: tl.constexpr):
    mask = columns < width
    start = gate_up + row.to(tl.int64) * 2 * width
    g = tl.load(du + row.to(tl.int64) * width + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(start + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + width + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dup = g * gate * sigmoid
    if FOLD:
        dgate *= tl.load(fold + columns, mask=mask, other=0.0)
        dup *= tl.load(fold + width + columns, mask=mask, other=0.0)
    return dgate, dup


@triton.jit
def _swiglu_backward(du, gate_up, fold, out, out_scale, width: tl.constexpr, FOLD: tl.constexpr,
                     FP8_OUT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    factor = 1.0
    if FP8_OUT:
        largest = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, width, BLOCK):
            dgate, dup = _gradients(du, gate_up, fold, row, width, first + tl.arange(0, BLOCK), FOLD)
            largest = tl.maximum(largest, tl.maximum(tl.abs(dgate), tl.abs(dup)))
        amax = tl.maximum(tl.max(largest, 0), SMALLEST_AMAX)
        tl.store(out_scale + row, amax / FP8_MAX)
        factor = FP8_MAX / amax
    start = out + row.to(tl.int64) * 2 * width
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < width
        dgate, dup = _gradients(du, gate_up, fold, row, width, columns, FOLD)
        if FP8_OUT:
            dgate = tl.minimum(tl.maximum(dgate * factor, -FP8_MAX), FP8_MAX)
            dup = tl.minimum(tl.maximum(dup * factor, -FP8_MAX), FP8_MAX)
        tl.store(start + columns, dgate.to(out.dtype.element_ty), mask=mask)
        tl.store(start + width + columns, dup.to(out.dtype.element_ty), mask=mask)


def swiglu_backward(du: Tensor, gate_up: Tensor, fold: Tensor | None, fp8: bool) -> Operand:
    """See :func:`ideoflow.kernels.reference.swiglu_backward`."""
    rows, width = du.shape
    result = empty_operand(rows, 2 * width, gate_up, fp8)
    _swiglu_backward[(rows,)](
        du, gate_up, fold, result.values, result.scale, width, fold is not None, fp8, 4096, num_warps=8
    )
    return result
