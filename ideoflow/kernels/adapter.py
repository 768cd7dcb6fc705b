"""The thin products of a low-rank adapter (Hu et al. 2021), straight from quantised operands, in Triton.

Both are bound by reading their wide operand, which is why they read the e4m3 copy that the base product reads
(half the bytes of bf16) and turn it into bf16 in registers. Long sums are split over programs into float32
partial results that a reduction adds up: no atomics, so results repeat exactly.

The rank is cut into tiles of at most 128 (q, k and v together have three times the adapter's own), and loops
hold as many steps' operands ahead as the card's shared memory has room for: 227 KiB of an H200, 99 KiB of
cards for the desktop.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.quantize import FP8_MAX, SMALLEST_AMAX
from ideoflow.kernels.reference import Operand

_PROGRAMS = 400  # three for each multiprocessor of a large card


def _rank_tiles(rank: int) -> tuple[int, int]:
    """Width of a tile of the rank, a power of two, and how many there are."""
    width = min(128, max(16, triton.next_power_of_2(rank)))
    return width, triton.cdiv(rank, width)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return 1 << 20  # the interpreter has no limit
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def _stages(device: torch.device, step: int, besides: int) -> int:
    """Steps of a loop whose operands, of ``step`` bytes, are held at once: three where they fit."""
    return max(1, min(3, (shared_memory(device) - besides) // step))


def _split(blocks: int, tiles: int) -> tuple[int, int]:
    """Steps of each program along the summed axis, and programs along it, for ``blocks`` blocks to sum."""
    programs = max(1, min(blocks // 8, round(_PROGRAMS / tiles)))
    steps = triton.cdiv(blocks, programs)
    return steps, triton.cdiv(blocks, steps)


@triton.jit
def _down(x_ptr, x_scale, matrix, unfold, out, tokens, k_size, rank, parts, stride_k, stride_r, steps,
          SCALED: tl.constexpr, UNFOLD: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
          RANK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1) % parts
    split = tl.program_id(2)
    r = tl.program_id(1) // parts * RANK + tl.arange(0, RANK)
    total = tl.zeros((TOKENS, RANK), tl.float32)
    x_row = x_ptr + t[:, None].to(tl.int64) * (parts * k_size) + part * k_size
    for step in range(steps):
        k = (split * steps + step) * K + tl.arange(0, K)
        x = tl.load(x_row + k[None, :], mask=(t[:, None] < tokens) & (k[None, :] < k_size), other=0.0)
        at = (part * k_size + k[:, None]).to(tl.int64) * stride_k + r[None, :] * stride_r
        m = tl.load(matrix + at, mask=(k[:, None] < k_size) & (r[None, :] < rank), other=0.0)
        if UNFOLD:
            u = tl.load(unfold + part * k_size + k, mask=k < k_size, other=0.0)
            m = (m.to(tl.float32) * u[:, None]).to(m.dtype)
        total += tl.dot(x.to(m.dtype), m, input_precision="ieee")
    if SCALED:
        total *= tl.load(x_scale + t, mask=t < tokens, other=0.0)[:, None]
    at = (split.to(tl.int64) * tokens + t[:, None]) * (parts * rank) + part * rank + r[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(t[:, None] < tokens) & (r[None, :] < rank))


def adapter_down(x: Operand, matrix: Tensor, parts: int = 1, unfold: Tensor | None = None) -> Tensor:
    """See :func:`ideoflow.kernels.reference.adapter_down`."""
    tokens, rank, k_size = x.values.shape[0], matrix.shape[1], matrix.shape[0] // parts
    device, (block_r, tiles) = x.values.device, _rank_tiles(rank)
    block_t = 64
    # A step reads columns of x and of the matrix; to fold a scale in takes the matrix once more.
    for block_k in (128, 64):
        part = block_k * block_r * matrix.element_size()
        besides = part if unfold is not None else 0
        stages = _stages(device, block_t * block_k * x.values.element_size() + part, besides)
        if stages == 3:
            break
    steps, splits = _split(triton.cdiv(k_size, block_k), triton.cdiv(tokens, block_t) * parts * tiles)
    dtype = torch.float32 if splits > 1 else matrix.dtype
    out = torch.empty(splits, tokens, parts * rank, dtype=dtype, device=device)
    _down[(triton.cdiv(tokens, block_t), parts * tiles, splits)](
        x.values, x.scale, matrix, unfold, out, tokens, k_size, rank, parts, *matrix.stride(), steps,
        x.scale is not None, unfold is not None, block_t, block_k, block_r, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(matrix.dtype)


@triton.jit
def _gradient(x_ptr, x_scale, z_ptr, unfold, out, tokens, n_size, rank, parts, steps,
              SCALED: tl.constexpr, UNFOLD: tl.constexpr, RANK_FIRST: tl.constexpr,
              TOKENS: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    part = tl.program_id(1) % parts
    split = tl.program_id(2)
    r = tl.program_id(1) // parts * RANK + tl.arange(0, RANK)
    total = tl.zeros((RANK, N), tl.float32)
    column = part * n_size + n
    for step in range(steps):
        t = (split * steps + step) * TOKENS + tl.arange(0, TOKENS)
        at = t[:, None].to(tl.int64) * (parts * n_size) + column[None, :]
        x = tl.load(x_ptr + at, mask=(t[:, None] < tokens) & (n[None, :] < n_size), other=0.0)
        at = t[None, :] * (parts * rank) + part * rank + r[:, None]
        z = tl.load(z_ptr + at, mask=(t[None, :] < tokens) & (r[:, None] < rank), other=0.0)
        if SCALED:
            s = tl.load(x_scale + t, mask=t < tokens, other=0.0)
            z = (z.to(tl.float32) * s[None, :]).to(z.dtype)
        total += tl.dot(z, x.to(z.dtype), input_precision="ieee")
    if UNFOLD:
        total *= tl.load(unfold + column, mask=n < n_size, other=0.0)[None, :]
    if RANK_FIRST:
        at = (split.to(tl.int64) * rank + r[:, None]) * n_size + column[None, :]
    else:
        at = (split.to(tl.int64) * parts * n_size + column[None, :]) * rank + r[:, None]
    tl.store(out + at, total, mask=(n[None, :] < n_size) & (r[:, None] < rank))


def adapter_gradient(x: Operand, z: Tensor, parts: int = 1, unfold: Tensor | None = None,
                     rank_first: bool = False) -> Tensor:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.adapter_gradient`."""
    tokens, n_size, rank = x.values.shape[0], x.values.shape[1] // parts, z.shape[1] // parts
    block_t, block_n, (block_r, tiles) = 64, 128, _rank_tiles(rank)
    read = block_t * block_r * z.element_size()
    besides = read if x.scale is not None else 0  # z with the rows' scales in it
    stages = _stages(z.device, block_t * block_n * x.values.element_size() + read, besides)
    steps, splits = _split(triton.cdiv(tokens, block_t), triton.cdiv(n_size, block_n) * parts * tiles)
    shape = (rank, n_size) if rank_first else (parts * n_size, rank)
    out = torch.empty(splits, *shape, dtype=torch.float32, device=z.device)
    _gradient[(triton.cdiv(n_size, block_n), parts * tiles, splits)](
        x.values, x.scale, z, unfold, out, tokens, n_size, rank, parts, steps, x.scale is not None,
        unfold is not None, rank_first, block_t, block_n, block_r, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0)


@triton.jit
def _up(y_ptr, z_ptr, matrix, tokens, n_size, rank, parts, y_stride, stride_n, stride_r, TOKENS: tl.constexpr,
        N: tl.constexpr, RANK: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    t = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(2)
    at = y_ptr + t[:, None].to(tl.int64) * y_stride + part * n_size + n[None, :]
    mask = (t[:, None] < tokens) & (n[None, :] < n_size)
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for tile in tl.static_range(TILES):
        r = tile * RANK + tl.arange(0, RANK)
        z = tl.load(z_ptr + t[:, None] * (parts * rank) + part * rank + r[None, :],
                    mask=(t[:, None] < tokens) & (r[None, :] < rank), other=0.0)  # fmt: skip
        m = tl.load(matrix + (part * n_size + n[None, :]).to(tl.int64) * stride_n + r[:, None] * stride_r,
                    mask=(n[None, :] < n_size) & (r[:, None] < rank), other=0.0)  # fmt: skip
        total += tl.dot(z, m, input_precision="ieee")
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=mask)


def adapter_up(y: Tensor, z: Tensor, matrix: Tensor, parts: int = 1) -> None:
    """See :func:`ideoflow.kernels.reference.adapter_up`."""
    tokens, n_size, rank = y.shape[0], y.shape[1] // parts, matrix.shape[1]
    grid = (triton.cdiv(n_size, 128), triton.cdiv(tokens, 64), parts)
    _up[grid](
        y, z, matrix, tokens, n_size, rank, parts, y.stride(0), matrix.stride(0), matrix.stride(1), 64, 128,
        *_rank_tiles(rank), num_warps=4,
    )  # fmt: skip


@triton.jit
def _split_precision(matrix, unfold, out, out_scale, n_size, rank, parts, group, stride_n, stride_r,
                     UNFOLD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    part = row // rank
    j = tl.arange(0, BLOCK)
    mask = j < n_size
    column = part * n_size + j
    x = tl.load(matrix + column.to(tl.int64) * stride_n + (row % rank) * stride_r, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if UNFOLD:
        x *= tl.load(unfold + column, mask=mask, other=0.0)
    width = parts * n_size
    high_row = (row // group) * 2 * group + row % group
    for piece in tl.static_range(2):
        target = high_row + piece * group
        amax = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST_AMAX)
        values = tl.minimum(tl.maximum(x * (FP8_MAX / amax), -FP8_MAX), FP8_MAX).to(out.dtype.element_ty)
        tl.store(out_scale + target, amax / FP8_MAX)
        for other in range(parts):  # the other parts' columns of a row are zero
            kept = tl.where((other == part) & mask, values.to(tl.float32), 0.0).to(out.dtype.element_ty)
            tl.store(out + target.to(tl.int64) * width + other * n_size + j, kept, mask=mask)
        x -= values.to(tl.float32) * (amax / FP8_MAX)


def split_precision(matrix: Tensor, out: Tensor, scale: Tensor, parts: int = 1, unfold: Tensor | None = None,
                    group: int | None = None) -> None:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.split_precision`."""
    n_size, rank = matrix.shape[0] // parts, matrix.shape[1]
    rows = parts * rank
    block = triton.next_power_of_2(n_size)
    _split_precision[(rows,)](
        matrix, unfold, out, scale, n_size, rank, parts, group or rows, matrix.stride(0), matrix.stride(1),
        unfold is not None, block, num_warps=8,
    )  # fmt: skip
