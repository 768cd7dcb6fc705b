"""The eager truth of every fused operation: plain PyTorch, any device, arithmetic in float32 or wider.

Shapes: T tokens, B samples, D hidden size, F feed-forward size, H heads of size E (D = H * E), N and K the
outputs and inputs of a linear layer, R adapter rank. ``sample`` is int32 [T]: the sample of each token.

RMSNorm: Zhang and Sennrich 2019, y = x / sqrt(mean(x^2) + eps) * weight. SwiGLU: Shazeer 2020. Rotary
embedding with halves rotated: Su et al. 2021, as in diffusers' ``transformer_ideogram4``. FP8 is e4m3fn
(Micikevicius et al. 2022), its largest number 448; a row's scale is its largest magnitude over 448.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
# Gradients of a mean over half a million elements, times a weight scale, reach 1e-13: far above this floor.
SMALLEST_AMAX = 1e-30


class Operand(NamedTuple):
    """An operand of a matrix product: ``values`` [T, K] and, if they are e4m3, float32 row scales [T]."""

    values: Tensor
    scale: Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the operand stands for."""
        if self.scale is None:
            return self.values.to(dtype)
        return (self.values.float() * self.scale[:, None]).to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _operand(x: Tensor, fp8: bool, dtype: torch.dtype) -> Operand:
    if not fp8:
        return Operand(x.to(dtype))
    scale = x.abs().amax(-1).clamp_min(SMALLEST_AMAX) / FP8_MAX
    # e4m3fn has no infinity: what overflows becomes NaN, so clamp after the division's rounding.
    return Operand((x / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale.float())


def quantize(x: Tensor, fp8: bool = True) -> Operand:
    """x [T, K] as an operand: quantised row by row, or as it is."""
    return _operand(_wide(x), True, x.dtype) if fp8 else Operand(x)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """An e4m3 or int8 weight [N, K] with a scale a row [N], as dense numbers; into ``out`` where given."""
    dense = (weight.float() * scale.float()[:, None]).to(dtype)
    return dense if out is None else out.copy_(dense)


def transpose(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """The transpose of an 8-bit matrix, contiguous: [N, K] -> [K, N]."""
    result = weight.view(torch.uint8).t().contiguous().view(weight.dtype)
    return result if out is None else out.copy_(result)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def norm_modulate(h: Tensor, factor: Tensor, sample: Tensor, eps: float, fp8: bool) -> Operand:
    """RMSNorm(h) * factor[sample], as an operand; h [T, D], factor [B, D] = weight * (1 + scale)."""
    x = _wide(h)
    return _operand(x * _inverse_rms(x, eps) * _wide(factor)[sample], fp8, h.dtype)


def _rms_backward(dnormed: Tensor, x: Tensor, eps: float) -> Tensor:
    """Gradient of x / rms(x): r * (g - n * mean(g * n)) with n the normalised row and r its inverse rms."""
    inverse = _inverse_rms(x, eps)
    normed = x * inverse
    return inverse * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))


def norm_modulate_backward(dx: Tensor, h: Tensor, factor: Tensor, sample: Tensor, eps: float,
                           residual: Tensor) -> Tensor:  # fmt: skip
    """residual + the gradient of :func:`norm_modulate` for h, given dx; all [T, D]."""
    dnormed = _wide(dx) * _wide(factor)[sample]
    return (_wide(residual) + _rms_backward(dnormed, _wide(h), eps)).to(h.dtype)


def gated_residual(h: Tensor, y: Tensor, factor: Tensor, sample: Tensor, eps: float) -> Tensor:
    """h + RMSNorm(y) * factor[sample]; h and y [T, D], factor [B, D] = weight * tanh(gate)."""
    x = _wide(y)
    return (_wide(h) + x * _inverse_rms(x, eps) * _wide(factor)[sample]).to(h.dtype)


def gated_residual_backward(dh: Tensor, y: Tensor, factor: Tensor, sample: Tensor, eps: float,
                            fold: Tensor | None, fp8: bool) -> Operand:  # fmt: skip
    """The gradient of :func:`gated_residual` for y, times ``fold`` [D] where given, as an operand.

    ``fold`` holds the row scales of the weight that made y: with them in the gradient, the backward product
    needs the bare e4m3 weight only.
    """
    dy = _rms_backward(_wide(dh) * _wide(factor)[sample], _wide(y), eps)
    return _operand(dy if fold is None else dy * fold, fp8, y.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def qk_norm_rope(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """RMSNorm over each head of q and k, then rotary embedding, in place; v stays.

    qkv [T, 3, H, E], weights [E], cos and sin [T, E / 2] (both halves of a head share them).

    Returns:
        The inverse rms of each head, float32 [T, 2, H], for the backward pass.
    """
    x = _wide(qkv[:, :2])
    inverse = _inverse_rms(x, eps)
    weight = torch.stack((_wide(weight_q), _wide(weight_k)))[None, :, None]
    qkv[:, :2] = _rotate(x * inverse * weight, _wide(cos)[:, None, None], _wide(sin)[:, None, None]).to(
        qkv.dtype
    )
    return inverse[..., 0].float()


def qk_norm_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, inverse: Tensor, weight_q: Tensor,
                          weight_k: Tensor, cos: Tensor, sin: Tensor, fold: Tensor | None,
                          fp8: bool) -> Operand:  # fmt: skip
    """The gradient of the raw projections [T, 3 * D], times ``fold`` [3 * D] where given, as an operand.

    dq, dk, dv [T, H, E] of any strides; qkv as :func:`qk_norm_rope` left it. The normalised heads are not
    kept but recovered: rotate back, divide by the weight. Channels whose weight is zero recover as zero.
    """
    dout, out = torch.stack((dq, dk), 1), _wide(qkv[:, :2])
    cos, sin = _wide(cos)[:, None, None], _wide(sin)[:, None, None]
    weight = torch.stack((_wide(weight_q), _wide(weight_k)))[None, :, None]
    normed = torch.where(weight == 0, 0.0, _rotate(out, cos, -sin) / torch.where(weight == 0, 1.0, weight))
    g = _rotate(_wide(dout), cos, -sin) * weight
    dx = inverse[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    grad = torch.cat((dx, _wide(dv)[:, None]), 1).flatten(1)
    return _operand(grad if fold is None else grad * fold, fp8, qkv.dtype)


def swiglu(gate_up: Tensor, fp8: bool) -> Operand:
    """silu(gate) * up of gate_up [T, 2 * F] (gate first), as an operand [T, F]."""
    gate, up = _wide(gate_up).chunk(2, -1)
    return _operand(torch.nn.functional.silu(gate) * up, fp8, gate_up.dtype)


def swiglu_backward(du: Tensor, gate_up: Tensor, fold: Tensor | None, fp8: bool) -> Operand:
    """The gradient of gate_up [T, 2 * F] given du [T, F], times ``fold`` [2 * F] if given, as an operand."""
    gate, up = _wide(gate_up).chunk(2, -1)
    du_, sigmoid = _wide(du), torch.sigmoid(gate)
    grad = torch.cat((du_ * up * sigmoid * (1 + gate * (1 - sigmoid)), du_ * gate * sigmoid), -1)
    return _operand(grad if fold is None else grad * fold, fp8, gate_up.dtype)


def adapter_down(x: Operand, matrix: Tensor, parts: int = 1, unfold: Tensor | None = None) -> Tensor:
    """x [T, parts * K] times matrix [parts * K, R], part by part: [T, parts * R].

    With one part it is the down-projection of an adapter; with several it is the gradient that flows into
    each part's down-projection from its own outputs. ``unfold`` [parts * K] multiplies x's columns.
    """
    dtype = matrix.dtype
    dense = _wide(x.dense(torch.float32 if x.scale is not None else x.values.dtype))
    if unfold is not None:
        dense = dense * unfold
    k = matrix.shape[0] // parts
    pieces = [dense[:, p * k : (p + 1) * k] @ _wide(matrix[p * k : (p + 1) * k]) for p in range(parts)]
    return torch.cat(pieces, -1).to(dtype)


def adapter_gradient(x: Operand, z: Tensor, parts: int = 1, unfold: Tensor | None = None,
                     rank_first: bool = False) -> Tensor:  # fmt: skip
    """x^T z, part by part, in float32: [parts * K, R] from x [T, parts * K] and z [T, parts * R].

    With ``rank_first`` (one part only) the result comes transposed, [R, K], and contiguous.
    """
    dense = _wide(x.dense(torch.float32 if x.scale is not None else x.values.dtype))
    if unfold is not None:
        dense = dense * unfold
    pairs = zip(dense.chunk(parts, -1), _wide(z).chunk(parts, -1), strict=True)
    result = torch.cat([left.t() @ right for left, right in pairs])
    return result.t().contiguous() if rank_first else result


def adapter_up(y: Tensor, z: Tensor, matrix: Tensor, parts: int = 1) -> None:
    """y [T, parts * N] += z [T, parts * R] times matrix [parts * N, R] transposed, part by part, in place."""
    for into, left, right in zip(y.chunk(parts, 1), z.chunk(parts, 1), matrix.chunk(parts), strict=True):
        into.copy_(_wide(into) + _wide(left) @ _wide(right).t())


def split_precision(matrix: Tensor, out: Tensor, scale: Tensor, parts: int = 1, unfold: Tensor | None = None,
                    group: int | None = None) -> None:  # fmt: skip
    """A thin matrix as e4m3 rows in two pieces, the second what the first rounded away (2^-8 together).

    matrix [parts * K, R], each row times ``unfold`` where given; ``out`` [2 * parts * R, parts * K] and
    ``scale`` [2 * parts * R] are written. Row p * R + r of the first pieces holds column r of part p, and
    zeros in the other parts' columns. Of every ``group`` rows (default all) first pieces come before second.
    """
    k, rank = matrix.shape[0] // parts, matrix.shape[1]
    group = group or parts * rank
    source = _wide(matrix) if unfold is None else _wide(matrix) * unfold[:, None]
    dense = source.new_zeros(parts * rank, parts * k)
    for p in range(parts):
        dense[p * rank : (p + 1) * rank, p * k : (p + 1) * k] = source[p * k : (p + 1) * k].t()
    high = _operand(dense, True, dense.dtype)
    low = _operand(dense - high.dense(), True, dense.dtype)
    values, scales = out.view(-1, 2, group, parts * k), scale.view(-1, 2, group)
    for i, piece in enumerate((high, low)):
        values[:, i] = piece.values.view(-1, group, parts * k)
        scales[:, i] = piece.scale.view(-1, group)
