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
    _qk_norm_rope[(triton.cdiv(tokens, 16), 2 * heads)](
        qkv, weight_q, weight_k, cos, sin, inverse, tokens, heads, size // 2, eps,
        TOKENS=16, HALF=triton.next_power_of_2(size // 2), num_warps=4,
    )  # fmt: skip
    return inverse


@triton.jit
def _head_gradients(grad, stride, out, inverse, weight, c, s, h, e, heads, half):
    """Gradient of the raw projection, both halves [heads, half], of one token's q or k."""
    mask = (h[:, None] < heads) & (e[None, :] < half)
    at = h[:, None] * 2 * half + e[None, :]
    w1 = tl.load(weight + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight + half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    o1 = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(out + at + half, mask=mask, other=0.0).to(tl.float32)
    n1 = (o1 * c + o2 * s) / tl.where(w1 == 0.0, 1.0, w1)
    n2 = (o2 * c - o1 * s) / tl.where(w2 == 0.0, 1.0, w2)
    n1 = tl.where(w1 == 0.0, 0.0, n1)
    n2 = tl.where(w2 == 0.0, 0.0, n2)
    g = grad + h[:, None] * stride + e[None, :]
    g1 = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(g + half, mask=mask, other=0.0).to(tl.float32)
    x1 = (g1 * c + g2 * s) * w1
    x2 = (g2 * c - g1 * s) * w2
    mean = tl.sum(x1 * n1 + x2 * n2, 1) / (2 * half)
    r = tl.load(inverse + h, mask=h < heads, other=0.0)[:, None]
    return r * (x1 - n1 * mean[:, None]), r * (x2 - n2 * mean[:, None])


@triton.jit
def _folded(x1, x2, fold, h, e, heads, half, FOLD: tl.constexpr):
    if FOLD:
        mask = (h[:, None] < heads) & (e[None, :] < half)
        at = fold + h[:, None] * 2 * half + e[None, :]
        x1 *= tl.load(at, mask=mask, other=0.0)
        x2 *= tl.load(at + half, mask=mask, other=0.0)
    return x1, x2, tl.max(tl.maximum(tl.abs(x1), tl.abs(x2)))


@triton.jit
def _store_halves(out, x1, x2, factor, h, e, heads, half, FP8_OUT: tl.constexpr):
    mask = (h[:, None] < heads) & (e[None, :] < half)
    at = out + h[:, None] * 2 * half + e[None, :]
    if FP8_OUT:
        x1 = tl.minimum(tl.maximum(x1 * factor, -FP8_MAX), FP8_MAX)
        x2 = tl.minimum(tl.maximum(x2 * factor, -FP8_MAX), FP8_MAX)
    tl.store(at, x1.to(out.dtype.element_ty), mask=mask)
    tl.store(at + half, x2.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_backward(
    dq, dk, dv, q_token, q_head, k_token, k_head, v_token, v_head, qkv, inverse, weight_q, weight_k, cos, sin,
    fold, out, out_scale, heads, half, FOLD: tl.constexpr, FP8_OUT: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h, e = tl.arange(0, HEADS), tl.arange(0, HALF)
    mask = (h[:, None] < heads) & (e[None, :] < half)
    size = heads * 2 * half
    c = tl.load(cos + t * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + t * half + e, mask=e < half, other=0.0).to(tl.float32)[None, :]
    token = qkv + t * 3 * size
    rms = inverse + t * 2 * heads
    q1, q2 = _head_gradients(dq + t * q_token, q_head, token, rms, weight_q, c, s, h, e, heads, half)
    k1, k2 = _head_gradients(
        dk + t * k_token, k_head, token + size, rms + heads, weight_k, c, s, h, e, heads, half
    )
    v = dv + t * v_token + h[:, None] * v_head + e[None, :]
    v1 = tl.load(v, mask=mask, other=0.0).to(tl.float32)
    v2 = tl.load(v + half, mask=mask, other=0.0).to(tl.float32)
    q1, q2, q_max = _folded(q1, q2, fold, h, e, heads, half, FOLD)
    k1, k2, k_max = _folded(k1, k2, fold + size, h, e, heads, half, FOLD)
    v1, v2, v_max = _folded(v1, v2, fold + 2 * size, h, e, heads, half, FOLD)
    factor = 1.0
    if FP8_OUT:
        amax = tl.maximum(tl.maximum(q_max, tl.maximum(k_max, v_max)), SMALLEST_AMAX)
        tl.store(out_scale + t, amax / FP8_MAX)
        factor = FP8_MAX / amax
    row = out + t * 3 * size
    _store_halves(row, q1, q2, factor, h, e, heads, half, FP8_OUT)
    _store_halves(row + size, k1, k2, factor, h, e, heads, half, FP8_OUT)
    _store_halves(row + 2 * size, v1, v2, factor, h, e, heads, half, FP8_OUT)


def qk_norm_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, inverse: Tensor, weight_q: Tensor,
                          weight_k: Tensor, cos: Tensor, sin: Tensor, fold: Tensor | None,
                          fp8: bool) -> Operand:  # fmt: skip
    """See :func:`ideoflow.kernels.reference.qk_norm_rope_backward`."""
    tokens, _, heads, size = qkv.shape
    result = empty_operand(tokens, 3 * heads * size, qkv, fp8)
    has_fold = fold is not None
    _qk_norm_rope_backward[(tokens,)](
        dq, dk, dv, dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1), qkv,
        inverse, weight_q, weight_k, cos, sin, fold if has_fold else inverse, result.values, result.scale, heads,
        size // 2, has_fold, fp8, triton.next_power_of_2(heads), triton.next_power_of_2(size // 2), num_warps=8,
    )  # fmt: skip
    return result
