"""RMSNorm over the heads of q and k with rotary embedding, and the backward of both, in Triton.

Forward works in place on blocks of tokens of one head. Backward holds one token: its 3 * H heads share one
quantisation scale, because they are one row of the product that follows.
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
def _rotated_back(grad, stride, out, inverse, weight, fold, c, s, first, heads, half, FOLD: tl.constexpr,
                  HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Gradients of some heads of one token's raw q or k: both halves [HEADS, HALF], and the largest."""
    h, e = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    mask = (h[:, None] < heads) & (e[None, :] < half)
    at = h[:, None] * 2 * half + e[None, :]
    w1 = tl.load(weight + e, mask=e < half, other=0.0).to(tl.float32)
    w2 = tl.load(weight + half + e, mask=e < half, other=0.0).to(tl.float32)
    v1 = tl.where(w1 == 0.0, 0.0, 1.0 / tl.where(w1 == 0.0, 1.0, w1))[None, :]
    v2 = tl.where(w2 == 0.0, 0.0, 1.0 / tl.where(w2 == 0.0, 1.0, w2))[None, :]
    o1 = tl.load(out + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    o2 = tl.load(out + at + half, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    n1 = (o1 * c + o2 * s) * v1
    n2 = (o2 * c - o1 * s) * v2
    g = grad + h[:, None] * stride + e[None, :]
    g1 = tl.load(g, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    g2 = tl.load(g + half, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    x1 = (g1 * c + g2 * s) * w1[None, :]
    x2 = (g2 * c - g1 * s) * w2[None, :]
    mean = tl.sum(x1 * n1 + x2 * n2, 1) / (2 * half)
    r = tl.load(inverse + h, mask=h < heads, other=0.0)[:, None]
    return _folded(r * (x1 - n1 * mean[:, None]), r * (x2 - n2 * mean[:, None]), fold + at, half, mask,
                   out.dtype.element_ty, FOLD)  # fmt: skip


@triton.jit
def _plain(grad, stride, fold, first, heads, half, dtype: tl.constexpr, FOLD: tl.constexpr,
           HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """The same for v, whose gradient passes through."""
    h, e = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    mask = (h[:, None] < heads) & (e[None, :] < half)
    g = grad + h[:, None] * stride + e[None, :]
    x1 = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(g + half, mask=mask, other=0.0).to(tl.float32)
    return _folded(x1, x2, fold + h[:, None] * 2 * half + e[None, :], half, mask, dtype, FOLD)


@triton.jit
def _folded(x1, x2, fold, half, mask, dtype: tl.constexpr, FOLD: tl.constexpr):
    if FOLD:
        x1 *= tl.load(fold, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x2 *= tl.load(fold + half, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return x1.to(dtype), x2.to(dtype), tl.max(tl.maximum(tl.abs(x1), tl.abs(x2)))


@triton.jit
def _store_halves(out, x1, x2, factor, first, heads, half, FP8_OUT: tl.constexpr, HEADS: tl.constexpr,
                  HALF: tl.constexpr):  # fmt: skip
    h, e = first + tl.arange(0, HEADS), tl.arange(0, HALF)
    mask = (h[:, None] < heads) & (e[None, :] < half)
    at = out + h[:, None] * 2 * half + e[None, :]
    if FP8_OUT:
        x1 = tl.minimum(tl.maximum(x1.to(tl.float32) * factor, -FP8_MAX), FP8_MAX)
        x2 = tl.minimum(tl.maximum(x2.to(tl.float32) * factor, -FP8_MAX), FP8_MAX)
    tl.store(at, x1.to(out.dtype.element_ty), mask=mask)
    tl.store(at + half, x2.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_backward(
    dq, dk, dv, q_token, q_head, k_token, k_head, v_token, v_head, qkv, inverse, weight_q, weight_k, cos, sin,
    fold, out, out_scale, tokens, heads, half, FOLD: tl.constexpr, FP8_OUT: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, HALF)
    size = heads * 2 * half
    dtype: tl.constexpr = qkv.dtype.element_ty
    for i in tl.range(TOKENS, num_stages=STAGES):
        t = tl.minimum(tl.program_id(0) * TOKENS + i, tokens - 1).to(tl.int64)
        c = tl.load(cos + t * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + t * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
        q, k, ri = qkv + t * 3 * size, qkv + t * 3 * size + size, inverse + t * 2 * heads
        gq, gk, gv = dq + t * q_token, dk + t * k_token, dv + t * v_token
        # The heads come in two pieces of power-of-two sizes (18 = 16 + 2), so that no lanes are wasted.
        q1, q2, m1 = _rotated_back(gq, q_head, q, ri, weight_q, fold, c, s, 0, heads, half, FOLD, A, HALF)
        q3, q4, m2 = _rotated_back(gq, q_head, q, ri, weight_q, fold, c, s, A, heads, half, FOLD, B, HALF)
        ri += heads
        k1, k2, m3 = _rotated_back(
            gk, k_head, k, ri, weight_k, fold + size, c, s, 0, heads, half, FOLD, A, HALF
        )
        k3, k4, m4 = _rotated_back(
            gk, k_head, k, ri, weight_k, fold + size, c, s, A, heads, half, FOLD, B, HALF
        )
        v1, v2, m5 = _plain(gv, v_head, fold + 2 * size, 0, heads, half, dtype, FOLD, A, HALF)
        v3, v4, m6 = _plain(gv, v_head, fold + 2 * size, A, heads, half, dtype, FOLD, B, HALF)
        factor = 1.0
        if FP8_OUT:
            amax = tl.maximum(tl.maximum(tl.maximum(m1, m2), tl.maximum(m3, m4)), tl.maximum(m5, m6))
            amax = tl.maximum(amax, SMALLEST_AMAX)
            tl.store(out_scale + t, amax / FP8_MAX)
            factor = FP8_MAX / amax
        row = out + t * 3 * size
        _store_halves(row, q1, q2, factor, 0, heads, half, FP8_OUT, A, HALF)
        _store_halves(row, q3, q4, factor, A, heads, half, FP8_OUT, B, HALF)
        _store_halves(row + size, k1, k2, factor, 0, heads, half, FP8_OUT, A, HALF)
        _store_halves(row + size, k3, k4, factor, A, heads, half, FP8_OUT, B, HALF)
        _store_halves(row + 2 * size, v1, v2, factor, 0, heads, half, FP8_OUT, A, HALF)
        _store_halves(row + 2 * size, v3, v4, factor, A, heads, half, FP8_OUT, B, HALF)


_TOKENS, _STAGES, _WARPS = 4, 2, 4  # the fastest of a dozen settings on an H200


def qk_norm_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, inverse: Tensor, weight_q: Tensor,
                          weight_k: Tensor, cos: Tensor, sin: Tensor, fold: Tensor | None,
                          fp8: bool) -> Operand:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.qk_norm_rope_backward`."""
    tokens, _, heads, size = qkv.shape
    result = empty_operand(tokens, 3 * heads * size, qkv, fp8)
    has_fold = fold is not None
    first = 1 << (heads.bit_length() - 1)
    rest = triton.next_power_of_2(max(1, heads - first))
    _qk_norm_rope_backward[(triton.cdiv(tokens, _TOKENS),)](
        dq, dk, dv, dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), qkv,
        inverse, weight_q, weight_k, cos, sin, fold if has_fold else inverse, result.values, result.scale,
        tokens, heads, size // 2, has_fold, fp8, first, rest, triton.next_power_of_2(size // 2), _TOKENS,
        _STAGES, num_warps=_WARPS,
    )  # fmt: skip
    return result
