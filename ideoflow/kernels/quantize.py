"""Row-wise e4m3 quantisation, its inverse, and the transpose of an 8-bit matrix, in Triton.

The transpose exists because the backward product wants each weight in the other order. A second copy of the
weights would cost as much memory as the model; this kernel moves 3.6 TB/s on an H200 (63 microseconds for
24576 x 4608), so the copy is made when it is needed, into a scratch buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.reference import FP8, Operand

FP8_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(1e-30)


@triton.jit
def load_row(pointer, row, width, A: tl.constexpr, B: tl.constexpr):
    """One row in float32, in two pieces of power-of-two sizes: A elements, then the rest in B lanes.

    One piece of the next power of two would waste lanes: 44% of them for a width of 4608.
    """
    start = pointer + row.to(tl.int64) * width
    rest = A + tl.arange(0, B)
    first = tl.load(start + tl.arange(0, A)).to(tl.float32)
    return first, tl.load(start + rest, mask=rest < width, other=0.0).to(tl.float32)


@triton.jit
def store_row(out, out_scale, row, first, second, width, FP8_OUT: tl.constexpr, A: tl.constexpr,
              B: tl.constexpr):  # fmt: skip
    """Writes one float32 row, quantised with its own scale or as it is."""
    if FP8_OUT:
        amax = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
        amax = tl.maximum(amax, SMALLEST_AMAX)
        tl.store(out_scale + row, amax / FP8_MAX)
        first = tl.minimum(tl.maximum(first * (FP8_MAX / amax), -FP8_MAX), FP8_MAX)
        second = tl.minimum(tl.maximum(second * (FP8_MAX / amax), -FP8_MAX), FP8_MAX)
    start = out + row.to(tl.int64) * width
    rest = A + tl.arange(0, B)
    tl.store(start + tl.arange(0, A), first.to(out.dtype.element_ty))
    tl.store(start + rest, second.to(out.dtype.element_ty), mask=rest < width)


def pieces(width: int) -> tuple[int, int]:
    """A and B of :func:`load_row` for a width: 4608 = 4096 + 512, 12288 = 8192 + 4096."""
    first = 1 << (width.bit_length() - 1)
    return first, max(16, triton.next_power_of_2(max(1, width - first)))


def warps_for(width: int) -> int:
    """Warps for a kernel that holds one row; 4 for 4608 and 8 for 12288 were the fastest on an H200."""
    return min(16, max(4, triton.next_power_of_2(width) // 2048))


def empty_operand(rows: int, width: int, like: Tensor, fp8: bool) -> Operand:
    """Uninitialised memory for an operand [rows, width]; a bf16 one carries no scale."""
    values = torch.empty(rows, width, dtype=FP8 if fp8 else like.dtype, device=like.device)
    return Operand(values, torch.empty(rows, dtype=torch.float32, device=like.device) if fp8 else None)


@triton.jit
def _quantize(x_ptr, out, out_scale, width, FP8_OUT: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0)
    first, second = load_row(x_ptr, row, width, A, B)
    store_row(out, out_scale, row, first, second, width, FP8_OUT, A, B)


def quantize(x: Tensor, fp8: bool = True) -> Operand:
    """See :func:`ideoflow.kernels.reference.quantize`."""
    if not fp8:
        return Operand(x)
    rows, width = x.shape
    result = empty_operand(rows, width, x, fp8)
    _quantize[(rows,)](
        x, result.values, result.scale, width, True, *pieces(width), num_warps=warps_for(width)
    )
    return result


@triton.jit
def _dequantize(weight, scale, out, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    factor = tl.load(scale + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        x = tl.load(weight + row.to(tl.int64) * width + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + row.to(tl.int64) * width + columns, (x * factor).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dequantize_bits(weight, scale, out, width: tl.constexpr, BLOCK: tl.constexpr):
    # e4m3 in float16's place: the same sign, its exponent's bias 8 lower, its fraction's bits at the top. So
    # the bits moved to where float16 has them are the value divided by 2^8, subnormal numbers included.
    row = tl.program_id(0)
    factor = tl.load(scale + row) * 256.0
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        bits = tl.load(weight + row.to(tl.int64) * width + columns, mask=mask, other=0).to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = half.to(tl.float16, bitcast=True).to(tl.float32)
        tl.store(out + row.to(tl.int64) * width + columns, (x * factor).to(out.dtype.element_ty), mask=mask)


def _reads_e4m3(device: torch.device) -> bool:
    """Whether Triton has e4m3 as a type there: from sm_89 on, and in its interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """See :func:`ideoflow.kernels.reference.dequantize`."""
    rows, width = weight.shape
    if out is None:
        out = torch.empty(rows, width, dtype=dtype, device=weight.device)
    if weight.dtype != FP8 or _reads_e4m3(weight.device):
        _dequantize[(rows,)](weight, scale, out, width, 2048, num_warps=4)
    else:
        _dequantize_bits[(rows,)](weight.view(torch.uint8), scale, out, width, 2048, num_warps=4)
    return out


@triton.jit
def _transpose(x_ptr, out, rows, columns, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(
        x_ptr + r[:, None].to(tl.int64) * columns + c[None, :],
        mask=(r[:, None] < rows) & (c[None, :] < columns),
        other=0,
    )
    tl.store(
        out + c[:, None].to(tl.int64) * rows + r[None, :],
        tl.trans(x),
        mask=(c[:, None] < columns) & (r[None, :] < rows),
    )


def transpose(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """See :func:`ideoflow.kernels.reference.transpose`."""
    rows, columns = weight.shape
    if out is None:
        out = torch.empty(columns, rows, dtype=weight.dtype, device=weight.device)
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128))
    _transpose[grid](weight.view(torch.uint8), out.view(torch.uint8), rows, columns, 128, num_warps=8)
    return out
