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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from ideoflow.model.files import data_start, read_safetensors_header, weight_files
from ideoflow.model.forms import plain_name
from ideoflow.model.quiet import import_library
from ideoflow.model.reading import read_tensor
from ideoflow.model.sides import SIDE, is_side

_FUSED = ("to_q", "to_k", "to_v")
FP8 = torch.float8_e4m3fn
# Numbers that are converted at once.
_PIECE = 1 << 23

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": FP8,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Place(NamedTuple):
    """A tensor in a file, from byte ``start`` on."""

    file: Path
    key: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, device: torch.device) -> Tensor:
        return read_tensor(self.file, self.start, self.shape, self.dtype, device)

    def read_rows(self, first: int, last: int, device: torch.device) -> Tensor:
        row = prod(self.shape[1:]) * self.dtype.itemsize
        shape = (last - first, *self.shape[1:])
        return read_tensor(self.file, self.start + first * row, shape, self.dtype, device)


@dataclass(frozen=True)
class _Source:
    """Where a tensor is, which third of its rows if not all, and what stands beside it, by suffix."""

    place: _Place
    third: int | None
    sides: dict[str, _Place]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape

    @property
    def rows_here(self) -> int:
        """Rows of this tensor: a third of those in the file where it is a part of a fused one."""
        return self.shape[0] // (1 if self.third is None else 3)


class Checkpoint:
    """The tensors of one part of a base.

    Args:
        part: a folder with safetensors files (sharded or not), or one file.

    Raises:
        OSError, ValueError: when a file cannot be read or is not safetensors.
    """

    def __init__(self, part: Path) -> None:
        files = [part] if part.is_file() else weight_files(part)
        found: list[_Place] = []
        sides: dict[str, dict[str, _Place]] = {}  # a scale may be in another shard than its weight
        for place in (place for file in files for place in _places(file)):
            if match := SIDE.fullmatch(place.key):
                sides.setdefault(match["weight"], {})[match["side"]] = place
            elif not is_side(place.key):
                found.append(place)
        self.sources: dict[str, _Source] = {}
        for place in found:
            name = plain_name(place.key).replace("attention.o.", "attention.to_out.0.")
            fused = ".attention.qkv." in name
            for third, leaf in enumerate(_FUSED) if fused else [(None, "")]:
                source = _Source(place, third, sides.get(place.key, {}))
                self.sources[name.replace("qkv", leaf) if fused else name] = source

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def names(self) -> Iterable[str]:
        """Every tensor's name in diffusers' model."""
        return self.sources.keys()

    def place(self, name: str) -> str:
        """File and name of a tensor as stored, for messages."""
        place = self.sources[name].place
        return f"{place.file}: {place.key}"

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape; None for 4-bit codes, which are flat in the file."""
        source = self.sources[name]
        if ".absmax" in source.sides:
            return None
        return (source.rows_here, *source.shape[1:]) if source.shape else ()

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor's values in ``dtype``: scales multiplied in, 4-bit codes looked up."""
        source = self.sources[name]
        if ".absmax" in source.sides:
            pieces = [piece for _, piece in self.pieces(name, dtype, device)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if len(source.shape) < 2:
            return source.place.read(device).to(dtype)
        if source.place.dtype == dtype:
            ((_, whole),) = self._stored(source, source.rows_here, device)
            return whole
        out = torch.empty(source.rows_here, *source.shape[1:], dtype=dtype, device=device)
        for rows, piece in self.pieces(name, dtype, device):
            out[rows] = piece
        return out

    def pieces(self, name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The same by runs of rows, so that no second copy of a large tensor ever exists: (rows, values)."""
        source = self.sources[name]
        if ".absmax" in source.sides:
            yield from self._four_bit(source, dtype, device)
            return
        scale: Tensor | None = None
        count = max(1, _PIECE // max(1, prod(source.shape[1:])))
        for rows, stored in self._stored(source, count, device):
            if stored.dtype == FP8:
                if scale is None:
                    scale = self._scale(source, source.rows_here, device)
                yield rows, (stored.float() * scale[rows, None]).to(dtype)
            else:
                yield rows, stored.to(dtype)

    def float8(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(e4m3 values [out, in], float32 scales [out]) exactly as stored, or ``None`` for another form."""
        source = self.sources[name]
        if source.place.dtype != FP8 or len(source.shape) != 2:
            return None
        ((_, values),) = self._stored(source, source.rows_here, device)
        return values, self._scale(source, source.rows_here, device)

    def four_bit(self, name: str, device: torch.device) -> tuple[Tensor, dict[str, Tensor]] | None:
        """(packed codes, what bitsandbytes keeps beside them) exactly as stored, or ``None``.

        ``None`` also for a third of a fused tensor whose blocks of numbers do not end where its rows do.
        """
        source = self.sources[name]
        if ".absmax" not in source.sides:
            return None
        sides = {side.removeprefix("."): place.read(device) for side, place in source.sides.items()}
        packed = source.place.read(device)
        if source.third is None:
            return packed, sides
        cut = _third_of_four_bit(sides, source)
        return (_third(packed, source), cut) if cut else None

    def _stored(self, source: _Source, count: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """The stored numbers by ``count`` rows."""
        start = (source.third or 0) * source.rows_here
        for first in range(0, source.rows_here, count):
            last = min(first + count, source.rows_here)
            yield slice(first, last), source.place.read_rows(start + first, start + last, device)

    def _scale(self, source: _Source, rows: int, device: torch.device) -> Tensor:
        """Scales as [rows]; e4m3 without any is taken as it is."""
        if "_scale" not in source.sides:
            return torch.ones(rows, device=device)
        scale = source.sides["_scale"].read(device).float().flatten()
        if not scale.isfinite().all():
            raise ValueError(f"{source.sides['_scale'].key} holds numbers that are not finite")
        if scale.numel() == 1:
            return scale.expand(rows).contiguous()
        return _third(scale, source)

    def _four_bit(
        self, source: _Source, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """4-bit codes looked up, by runs of rows; as a whole where blocks of numbers do not end with rows."""
        import_library("bitsandbytes", "a checkpoint in NF4")  # seconds
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        sides = {f"weight{side}": place.read(device) for side, place in source.sides.items()}
        state = QuantState.from_dict(sides, device=device)
        packed, block = source.place.read(device).flatten(), state.blocksize
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        rows, width = state.shape[0], prod(state.shape[1:])
        here = rows if source.third is None else rows // 3
        start, count = (source.third or 0) * here, max(1, _PIECE // width)
        # Runs of rows that begin and end with a block of numbers.
        aligned = block // gcd(block, width)
        count = -(-count // aligned) * aligned
        whole = start % aligned or here % aligned
        for first in range(0, here, here if whole else count):
            low, high = (start + first) * width, (start + min(first + count, here)) * width
            if whole:
                low, high = 0, rows * width
            part = QuantState(
                scales[low // block : -(-high // block)].float(),
                torch.Size((high - low,)), state.code, block, state.quant_type, state.dtype,
            )  # fmt: skip
            found = dequantize_4bit(packed[low // 2 : -(-high // 2), None], part).view(-1, *state.shape[1:])
            if whole:
                yield slice(0, here), _third(found, source).to(dtype)
            else:
                yield slice(first, first + len(found)), found.to(dtype)


def _places(file: Path) -> Iterator[_Place]:
    """The tensors of a file; raises like :class:`Checkpoint`."""
    header = read_safetensors_header(file)
    with safe_open(file, framework="pt"):
        pass  # it checks that sizes and places are those of the shapes
    data = data_start(file, header)
    for key, facts in header.items():
        if facts["dtype"] not in _DTYPES:
            raise ValueError(f"{key} is of the type {facts['dtype']}, which no base has")
        start = data + int(facts["data_offsets"][0])
        yield _Place(file, key, start, tuple(facts["shape"]), _DTYPES[facts["dtype"]])


def _third_of_four_bit(sides: dict[str, Tensor], source: _Source) -> dict[str, Tensor] | None:
    """What stands beside one third of the codes; None where a block of numbers, or of scales, is cut."""
    from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict

    mark = next(side for side in sides if side.startswith("quant_state."))
    facts = unpack_tensor_to_dict(sides[mark].cpu())
    rows, *others = facts["shape"]
    numbers, block = prod(facts["shape"]) // 3, facts["blocksize"]
    nested = facts.get("nested_blocksize", 1) if "nested_absmax" in sides else 1
    if rows % 3 or numbers % (block * nested):
        return None
    cut = {side: _third(sides[side], source) for side in ("absmax", "nested_absmax") if side in sides}
    return sides | cut | {mark: pack_dict_to_tensor(facts | {"shape": [rows // 3, *others]})}


def _third(whole: Tensor, source: _Source) -> Tensor:
    """The part that is asked for, in memory of its own: the other two must not stay for its sake."""
    return whole if source.third is None else whole.chunk(3)[source.third].clone()
