"""RMSNorm over the heads of q and k with rotary embedding, and the backward of both, in Triton.

Forward works in place on blocks of tokens of one head. Backward takes one token a program: its 3 * H heads
share one quantisation scale, because they are one row of the product that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ideoflow.kernels.quantize import FP8_MAX, SMALLEST_AMAX, empty_operand
from ideoflow.kernels.reference import Operand


@triton.jit
def _qk_norm_rope(qkv, weight_q, weight_k, cos, sin, inverse_out, tokens, heads, half, eps,
                  TOKENS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)  # 0..2H-1: the heads of q, then of k
    e = tl.arange(0, HALF)
    mask = (t[:, None] < tokens) & (e[None, :] < half)
    start = qkv + (t[:, None].to(tl.int64) * 3 * heads + head) * 2 * half + e[None, :]
    first = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(start + half, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * half) + eps)
    weight = weight_q if head < heads else weight_k
    first *= inverse[:, None] * tl.load(weight + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    second *= inverse[:, None] * tl.load(weight + half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + t[:, None] * half + e[None, :], mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + t[:, None] * half + e[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(start, (first * c - second * s).to(qkv.dtype.element_ty), mask=mask)
    tl.store(start + half, (second * c + first * s).to(qkv.dtype.element_ty), mask=mask)
    tl.store(inverse_out + t * 2 * heads + head, inverse, mask=t < tokens)


def qk_norm_rope(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """See :func:`ideoflow.kernels.reference.qk_norm_rope`."""
    tokens, _, heads, size = qkv.shape
    inverse = torch.empty(tokens, 2, heads, dtype=torch.float32, device=qkv.device)
    _qk_norm_rope[(triton.cdiv(tokens, 8), 2 * heads)](
        qkv, weight_q, weight_k, cos, sin, inverse, tokens, heads, size // 2, eps,
        TOKENS=8, HALF=triton.next_power_of_2(size // 2), num_warps=4,
    )  # fmt: skip
    return inverse


@triton.jit
def _rotated_back(grad, out, at_grad, at, inverse, w1, w2, v1, v2, c, s, half, mask):
    """Gradients of some heads of one token's raw q or k: both halves [HEADS, HALF] in float32."""
    o1 = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(out + at + half, mask=mask, other=0.0).to(tl.float32)
    g1 = tl.load(grad + at_grad, mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(grad + at_grad + half, mask=mask, other=0.0).to(tl.float32)
    n1, n2 = (o1 * c + o2 * s) * v1, (o2 * c - o1 * s) * v2
    x1, x2 = (g1 * c + g2 * s) * w1, (g2 * c - g1 * s) * w2
    mean = (tl.sum(x1 * n1 + x2 * n2, 1) / (2 * half))[:, None]
    return inverse * (x1 - n1 * mean), inverse * (x2 - n2 * mean)


@triton.jit
def _inverse_or_zero(weight):
    return tl.where(weight == 0.0, 0.0, 1.0 / tl.where(weight == 0.0, 1.0, weight))


@triton.jit
def _gradient_of_part(grad, head_stride, part, heads, out, inverse, weight, c, s, fold, half, first,
                      FOLD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Some heads of part 0, 1 or 2 (q, k, v) of a token: both halves, where they go, and which exist."""
    h, e = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    mask = (h[:, None] < heads) & (e[None, :] < half)
    at = (part * heads + h[:, None]) * 2 * half + e[None, :]
    at_grad = h[:, None] * head_stride + e[None, :]
    if part == 2:  # v's gradient passes through
        x1 = tl.load(grad + at_grad, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(grad + at_grad + half, mask=mask, other=0.0).to(tl.float32)
    else:
        w1 = tl.load(weight + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
        r = tl.load(inverse + part * heads + h, mask=h < heads, other=0.0)[:, None]
        x1, x2 = _rotated_back(grad, out, at_grad, at, r, w1, w2, _inverse_or_zero(w1), _inverse_or_zero(w2),
                               c, s, half, mask)  # fmt: skip
    if FOLD:
        x1 *= tl.load(fold + at, mask=mask, other=0.0).to(tl.float32)
        x2 *= tl.load(fold + at + half, mask=mask, other=0.0).to(tl.float32)
    return x1, x2, at, mask


@triton.jit
def _qk_norm_rope_backward(
    dq, dk, dv, q_token, q_head, k_token, k_head, v_token, v_head, qkv, inverse, weight_q, weight_k, cos, sin,
    fold, out, out_scale, heads: tl.constexpr, half: tl.constexpr, FOLD: tl.constexpr, FP8_OUT: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    t, e = tl.program_id(0).to(tl.int64), tl.arange(0, HALF)
    c = tl.load(cos + t * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    row, ri = qkv + t * 6 * heads * half, inverse + t * 2 * heads
    gq, gk, gv = dq + t * q_token, dk + t * k_token, dv + t * v_token
    factor = 1.0
    # Twice over the row, which the second time comes from the caches: holding 13824 results in registers
    # until the largest is known leaves room for too few programs to keep the memory busy.
    if FP8_OUT:
        largest = tl.zeros((HEADS, HALF), tl.float32)
        for first in range(0, heads, HEADS):
            x1, x2, _, _ = _gradient_of_part(gq, q_head, 0, heads, row, ri, weight_q, c, s, fold, half, first,
                                             FOLD, HEADS, HALF)  # fmt: skip
            largest = tl.maximum(largest, tl.maximum(tl.abs(x1), tl.abs(x2)))
            x1, x2, _, _ = _gradient_of_part(gk, k_head, 1, heads, row, ri, weight_k, c, s, fold, half, first,
                                             FOLD, HEADS, HALF)  # fmt: skip
            largest = tl.maximum(largest, tl.maximum(tl.abs(x1), tl.abs(x2)))
            x1, x2, _, _ = _gradient_of_part(gv, v_head, 2, heads, row, ri, weight_k, c, s, fold, half, first,
                                             FOLD, HEADS, HALF)  # fmt: skip
            largest = tl.maximum(largest, tl.maximum(tl.abs(x1), tl.abs(x2)))
        amax = tl.maximum(tl.max(tl.max(largest, 1), 0), SMALLEST_AMAX)
        tl.store(out_scale + t, amax / FP8_MAX)
        factor = FP8_MAX / amax
    to = out + t * 6 * heads * half
    for first in range(0, heads, HEADS):
        x1, x2, at, mask = _gradient_of_part(gq, q_head, 0, heads, row, ri, weight_q, c, s, fold, half, first,
                                             FOLD, HEADS, HALF)  # fmt: skip
        _store_halves(to + at, x1, x2, factor, half, mask, FP8_OUT)
        x1, x2, at, mask = _gradient_of_part(gk, k_head, 1, heads, row, ri, weight_k, c, s, fold, half, first,
                                             FOLD, HEADS, HALF)  # fmt: skip
        _store_halves(to + at, x1, x2, factor, half, mask, FP8_OUT)
        x1, x2, at, mask = _gradient_of_part(gv, v_head, 2, heads, row, ri, weight_k, c, s, fold, half, first,
                                             FOLD, HEADS, HALF)  # fmt: skip
        _store_halves(to + at, x1, x2, factor, half, mask, FP8_OUT)


@triton.jit
def _store_halves(at, x1, x2, factor, half, mask, FP8_OUT: tl.constexpr):
    if FP8_OUT:
        x1 = tl.minimum(tl.maximum(x1 * factor, -FP8_MAX), FP8_MAX)
        x2 = tl.minimum(tl.maximum(x2 * factor, -FP8_MAX), FP8_MAX)
    tl.store(at, x1.to(at.dtype.element_ty), mask=mask)
    tl.store(at + half, x2.to(at.dtype.element_ty), mask=mask)


_HEADS, _WARPS = 4, 4  # the fastest of twenty settings on an H200


def qk_norm_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, inverse: Tensor, weight_q: Tensor,
                          weight_k: Tensor, cos: Tensor, sin: Tensor, fold: Tensor | None,
                          fp8: bool) -> Operand:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.qk_norm_rope_backward`."""
    tokens, _, heads, size = qkv.shape
    result = empty_operand(tokens, 3 * heads * size, qkv, fp8)
    _qk_norm_rope_backward[(tokens,)](
        dq, dk, dv, dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), qkv,
        inverse, weight_q, weight_k, cos, sin, fold, result.values, result.scale, heads, size // 2,
        fold is not None, fp8, _HEADS, triton.next_power_of_2(size // 2), num_warps=_WARPS,
    )  # fmt: skip
    return result
