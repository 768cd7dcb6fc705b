"""Every published form of a transformer's weights, made from dense ones."""

from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

FP8_MAX = 448.0


def fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original layout: q, k, v rows stacked as qkv, to_out.0 called o."""
    out = {}
    for name, value in state.items():
        if ".to_q." in name:
            parts = [state[name.replace("to_q", leaf)] for leaf in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            out[name.replace("to_out.0", "o")] = value
    return out


def is_linear(name: str, value: Tensor) -> bool:
    return name.endswith(".weight") and value.ndim == 2 and "indicator" not in name


def to_fp8(state: dict[str, Tensor], scale_shape: str, marker: bool = False) -> dict[str, Tensor]:
    """Each Linear as e4m3 with a scale a row ([out] or [out, 1]) or one for all ([])."""
    out = {}
    for name, value in state.items():
        if not is_linear(name, value):
            out[name] = value
            continue
        w = value.float()
        largest = w.abs().amax(1, keepdim=True) if scale_shape != "[]" else w.abs().max()
        scale = (largest / FP8_MAX).clamp(min=1e-12)
        out[name] = (w / scale).to(torch.float8_e4m3fn)
        out[f"{name}_scale"] = scale if scale_shape == "[out, 1]" else scale.squeeze()
        if marker:
            out[name.replace(".weight", ".comfy_quant")] = torch.zeros(8, dtype=torch.uint8)
    return out


def to_nf4(state: dict[str, Tensor], nested: bool) -> dict[str, Tensor]:
    """The blocks' Linears in bitsandbytes' 4-bit form."""
    out = {}
    for name, value in state.items():
        if is_linear(name, value) and name.startswith("layers."):
            out |= nf4(name, value, nested)[0]
        else:
            out[name] = value
    return out


def nf4(name: str, weight: Tensor, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(A weight's codes and what stands beside them, by key; the numbers that they stand for).

    The numbers are by the formula, code[nibble] * scale of 64, and of nested scales code[byte] * scale of 256
    + offset: bitsandbytes 0.50.2 itself looks them up wrong on processors with AVX-512 where rows do not hold
    whole blocks.
    """
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    scales = state.absmax
    if nested:
        inner = state.state2
        scales = inner.code[scales.long()] * _each(inner.absmax, inner.blocksize, len(scales)) + state.offset
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()]
    numbers = state.code[nibbles.long()] * _each(scales, state.blocksize, weight.numel())
    sides = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: packed, **sides}, numbers.to(weight.dtype).view(weight.shape)


def _each(scales: Tensor, block: int, count: int) -> Tensor:
    return scales.repeat_interleave(block)[:count]


FORMS: dict[str, tuple[Any, float]] = {
    # form -> (how it is made, largest error relative to the largest weight of a row)
    "diffusers, bf16": (lambda s: s, 0.0),
    "original layout, bf16": (fuse, 0.0),
    "split, FP8, [out]": (lambda s: to_fp8(s, "[out]"), 2**-4),
    "original layout, FP8, [out]": (lambda s: to_fp8(fuse(s), "[out]"), 2**-4),
    "original layout, FP8, [out, 1]": (lambda s: to_fp8(fuse(s), "[out, 1]"), 2**-4),
    "ComfyUI": (
        lambda s: {f"diffusion_model.{k}": v for k, v in to_fp8(fuse(s), "[]", marker=True).items()},
        2**-4,
    ),
    "ComfyUI, long prefix": (
        lambda s: {f"model.diffusion_model.{k}": v for k, v in to_fp8(fuse(s), "[]").items()},
        2**-4,
    ),
    "NF4": (lambda s: to_nf4(s, nested=False), 0.2),
    "NF4, nested": (lambda s: to_nf4(s, nested=True), 0.2),
    "original layout, NF4": (lambda s: to_nf4(fuse(s), nested=False), 0.2),
}
