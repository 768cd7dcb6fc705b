"""Weights of a transformer under diffusers' names, whatever form its safetensors files have.

| form | what is different |
|---|---|
| diffusers, dense | nothing |
| original layout | ``attention.qkv`` and ``attention.o``: q, k, v are thirds of the rows |
| FP8 | ``X.weight`` e4m3 with ``X.weight_scale`` float32: [out], [out, 1] or [] |
| ComfyUI single file | a prefix, original layout, FP8 with scales [], ``X.comfy_quant`` markers |
| NF4 | bitsandbytes' packed ``X.weight`` with ``X.weight.absmax``, ``.quant_map``, ``.quant_state.*`` |

Only headers are read to begin with; a tensor is read when it is asked for, by rows where it is a part of a
fused one, straight to the device. Nothing is ever unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ideoflow.model.base import read_safetensors_header, weight_files

_PREFIX = re.compile(r"^(?:model\.)?diffusion_model\.")
_FUSED = ("to_q", "to_k", "to_v")
# What stands beside a weight and belongs to it.
_SIDE = re.compile(
    r"(?P<weight>.+\.weight)(?P<side>_scale|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map"
    r"|\.quant_state\.bitsandbytes__\w+)"
)
FP8 = torch.float8_e4m3fn


# A tensor in a file.
_Place = tuple[Path, str]


@dataclass(frozen=True)
class _Source:
    """Where a tensor is, which third of its rows if not all, and what stands beside it, by suffix."""

    place: _Place
    third: int | None
    rows: int
    sides: dict[str, _Place]


class Checkpoint:
    """The tensors of one part of a base.

    Args:
        part: a folder with safetensors files (sharded or not), or one file.

    Raises:
        OSError, ValueError: when a file cannot be read or is not safetensors.
    """

    def __init__(self, part: Path) -> None:
        files = [part] if part.is_file() else weight_files(part)
        shapes: dict[_Place, list[int]] = {}
        sides: dict[str, dict[str, _Place]] = {}  # a scale may be in another shard than its weight
        for file in files:
            for key, facts in read_safetensors_header(file).items():
                if match := _SIDE.fullmatch(key):
                    sides.setdefault(match["weight"], {})[match["side"]] = (file, key)
                elif not key.endswith(".comfy_quant"):
                    shapes[file, key] = facts["shape"]
        self.sources: dict[str, _Source] = {}
        for place, shape in shapes.items():
            key = place[1]
            rows = shape[0] if shape else 1
            name = _PREFIX.sub("", key).replace("attention.o.", "attention.to_out.0.")
            fused = ".attention.qkv." in name
            for third, leaf in enumerate(_FUSED) if fused else [(None, "")]:
                source = _Source(place, third, rows, sides.get(key, {}))
                self.sources[name.replace("qkv", leaf) if fused else name] = source

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def names(self) -> Iterable[str]:
        """Every tensor's name in diffusers' model."""
        return self.sources.keys()

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor's values in ``dtype``: scales multiplied in, 4-bit codes looked up."""
        source = self.sources[name]
        if ".absmax" in source.sides:
            return _third(self._four_bit(source, device), source).to(dtype)
        values = self._read(source, device)
        if values.dtype != FP8:
            return values.to(dtype)
        return (values.float() * self._scale(source, values.shape[0], device)[:, None]).to(dtype)

    def float8(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(e4m3 values [out, in], float32 scales [out]) exactly as stored, or ``None`` for another form."""
        source = self.sources[name]
        values = self._read(source, device)
        return (values, self._scale(source, values.shape[0], device)) if values.dtype == FP8 else None

    def _read(self, source: _Source, device: torch.device) -> Tensor:
        if source.third is None:
            return _tensor(source.place, device)
        file, key = source.place
        rows = source.rows // 3
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            part: Tensor = tensors.get_slice(key)[source.third * rows : (source.third + 1) * rows]
            return part

    def _scale(self, source: _Source, rows: int, device: torch.device) -> Tensor:
        """Scales as [rows]; e4m3 without any is taken as it is."""
        if "_scale" not in source.sides:
            return torch.ones(rows, device=device)
        scale = _tensor(source.sides["_scale"], device).float().flatten()
        if scale.numel() == 1:
            return scale.expand(rows).contiguous()
        return _third(scale, source)

    def _four_bit(self, source: _Source, device: torch.device) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit  # seconds to import

        state = {f"weight{side}": _tensor(place, device) for side, place in source.sides.items()}
        packed = _tensor(source.place, device)
        whole: Tensor = dequantize_4bit(packed, QuantState.from_dict(state, device=device))
        return whole


def _tensor(place: _Place, device: torch.device) -> Tensor:
    file, key = place
    with safe_open(file, framework="pt", device=str(device)) as tensors:
        value: Tensor = tensors.get_tensor(key)
        return value


def _third(whole: Tensor, source: _Source) -> Tensor:
    return whole if source.third is None else whole.chunk(3)[source.third]
