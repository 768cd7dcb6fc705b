"""What stands beside quantised weights, held to the weights from headers alone (torch-free).

FP8 has a scale beside each weight. bitsandbytes' NF4 has a scale for each block of numbers (``absmax``), the
16 numbers that codes stand for (``quant_map``), and as JSON the weight's own shape and the size of its blocks
(``quant_state``); the scales may in turn be 8-bit codes (``nested_*``). Files whose parts do not belong
together load all the same, into wrong weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import isfinite, prod
from typing import TYPE_CHECKING, NamedTuple

from ideoflow.model.files import Stored

if TYPE_CHECKING:
    import numpy as np

_STATE = ".quant_state.bitsandbytes__nf4"
# A weight, and what stands beside it and belongs to it.
SIDE = re.compile(
    r"(?P<weight>.+\.weight)(?P<side>_scale|\.absmax|\.quant_map|\.nested_absmax|\.nested_quant_map"
    r"|\.quant_state\.bitsandbytes__\w+)"
)
_UNUSED = (".comfy_quant", ".input_scale")
# What bitsandbytes can read.
_FLOATS = ("float32", "bfloat16", "float16")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def is_side(key: str) -> bool:
    """Whether a tensor only stands beside a weight."""
    return bool(SIDE.fullmatch(key)) or key.endswith(_UNUSED)


class Packed(NamedTuple):
    """What the state of a 4-bit weight says: the shape that was packed, and how many numbers or scales share
    a scale; ``nested`` is None where scales are no codes themselves."""

    shape: tuple[int, ...]
    block: int
    nested: int | None


def missing_sides(header: Mapping[str, Stored]) -> set[str]:
    """Names that are not there: what belongs beside a quantised weight, or the weight of what stands alone.

    FP8 weights without a scale are complete where no weight has one.
    """
    sides = [match for name in header if (match := SIDE.fullmatch(name))]
    scaled = {match["weight"] for match in sides if match["side"] == "_scale"}
    eight = {n for n, t in header.items() if t.dtype == "F8_E4M3" and n.endswith(".weight")}
    wanted = scaled | {f"{name}_scale" for name in (eight if scaled else ())}
    for weight in {match["weight"] for match in sides if match["side"] != "_scale"}:
        wanted |= {weight, f"{weight}.absmax", f"{weight}.quant_map", f"{weight}{_STATE}"}
        if _is_nested(header, weight):
            wanted |= {f"{weight}.nested_absmax", f"{weight}.nested_quant_map"}
    return wanted - header.keys()


def _is_nested(header: Mapping[str, Stored], weight: str) -> bool:
    scales = header.get(f"{weight}.absmax")
    nested = {f"{weight}.nested_absmax", f"{weight}.nested_quant_map"} & header.keys()
    return bool(nested) or (scales is not None and scales.dtype == "U8")


def weight_shapes(header: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that stands for itself, by its name in the files: of 4-bit codes, which are flat,
    the one that was packed.

    Raises:
        OSError, ValueError: when the state of a 4-bit weight cannot be read.
    """
    shapes = {name: stored.shape for name, stored in header.items() if not is_side(name)}
    for name, stored in header.items():
        if name.endswith(_STATE):
            weight = name.removesuffix(_STATE)
            shapes[weight] = read_packed(stored, nested=_is_nested(header, weight)).shape
    return shapes


def numbers(stored: Stored) -> np.ndarray:
    """A tensor of a floating type, flat; float8 as its codes without the sign.

    Raises:
        OSError: when the file cannot be read.
        KeyError: when the type is another.
    """
    import numpy as np  # plans of bases that are not quantised do without

    if stored.dtype == "BF16":
        return (np.frombuffer(stored.read(), "<u2").astype("<u4") << 16).view("<f4")
    if stored.dtype == "F8_E4M3":
        return np.frombuffer(stored.read(), "u1") & 0x7F
    return np.frombuffer(stored.read(), {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[stored.dtype])


def odd_shapes(header: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of scales whose shape is not [], [1], [out] or [out, 1] of their weight."""
    for name, scale in header.items():
        if name.endswith(".weight_scale") and prod(scale.shape) != 1:
            rows = header[name.removesuffix("_scale")].shape[:1]
            if not rows or not prod(scale.shape) == scale.shape[0] == rows[0]:
                yield name, f"has the shape {list(scale.shape)}, not a scale a row or one for all"


def odd_scales(header: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of scales that are not numbers above 0, or of no FP8 matrix, or not there.

    Raises:
        OSError: when a file cannot be read.
    """
    eight = [n for n, stored in header.items() if stored.dtype == "F8_E4M3" and n.endswith(".weight")]
    for name, scale in header.items():
        if not name.endswith(".weight_scale"):
            continue
        weight = header[name.removesuffix("_scale")]
        if weight.dtype != "F8_E4M3" or len(weight.shape) < 2:
            yield name, f"stands beside {weight.dtype} {list(weight.shape)}, which has no scale"
        elif scale.dtype != "F8_E4M3" and not _all_positive(scale):
            yield name, "holds scales that are not finite or not above 0"
    if eight and not any(f"{name}_scale" in header for name in eight):
        # Numbers that were scaled reach up to 448; plain weights stay far below 128, whose code this is.
        smallest = min(eight, key=lambda name: header[name].size)
        if numbers(header[smallest]).max(initial=0) >= 0x70:
            yield smallest, "holds numbers of 128 and above, and has no scale"


def _all_positive(stored: Stored) -> bool:
    values = numbers(stored)
    return bool((values > 0).all() and (values < float("inf")).all())


def odd_four_bit(header: Mapping[str, Stored]) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of whatever does not fit the state of its 4-bit weight; none may be missing.

    Raises:
        OSError: when a file cannot be read.
    """
    for name, stored in header.items():
        if not name.endswith(_STATE):
            continue
        weight = name.removesuffix(_STATE)
        try:
            packed = read_packed(stored, nested=_is_nested(header, weight))
        except ValueError as error:
            yield name, f"is damaged: {error}"
            continue
        for side, (dtype, count) in _sides_of(packed).items():
            found = header[weight + side]
            if (found.dtype, prod(found.shape)) != (dtype, count):
                of = f"{list(packed.shape)} in blocks of {packed.block}"
                what = f"is {found.dtype} {list(found.shape)}, and {count} of {dtype} belong to {of}"
                yield weight + side, what
            elif side and found.dtype == "F32" and (what := _odd_numbers(side, found)):
                yield weight + side, f"is damaged: its numbers {what}"


def _sides_of(packed: Packed) -> dict[str, tuple[str, int]]:
    """(type, how many) of the codes and all beside them."""
    numbers = prod(packed.shape)
    blocks = -(-numbers // packed.block)
    sides = {"": ("U8", -(-numbers // 2)), ".absmax": ("F32", blocks), ".quant_map": ("F32", 16)}
    if packed.nested is not None:
        sides[".absmax"] = ("U8", blocks)
        sides[".nested_absmax"] = ("F32", -(-blocks // packed.nested))
        sides[".nested_quant_map"] = ("F32", 256)
    return sides


def _odd_numbers(side: str, stored: Stored) -> str:
    """What is wrong with a table or with scales; "" where nothing is."""
    values = numbers(stored)
    if side.endswith("quant_map"):
        if not (values[1:] > values[:-1]).all():
            return "do not ascend"
        return "" if abs(values).max() <= 1 else "are not within -1 and 1"
    if not ((values >= 0).all() and (values < float("inf")).all()):
        return "are not finite or below 0"
    return "are all 0" if side == ".absmax" and not values.any() else ""


def read_packed(stored: Stored, *, nested: bool) -> Packed:
    """What the state of a 4-bit weight says, as bitsandbytes' ``QuantState`` would read it.

    Raises:
        ValueError: when it is no such JSON.
        OSError: when the file cannot be read.
    """
    try:
        facts = json.loads(stored.read().decode())
        if not isinstance(facts, dict):
            raise ValueError("it is no JSON object")
        shape, block, inner = tuple(facts["shape"]), facts["blocksize"], None
        floats = [facts["dtype"]]
        if nested:
            inner = facts["nested_blocksize"]
            floats.append(facts["nested_dtype"])
        good = facts["quant_type"] == "nf4" and block in _BLOCKS and inner in (None, *_BLOCKS)
        good &= all(type(n) is int and n > 0 for n in shape) and all(t in _FLOATS for t in floats)
        good &= not nested or isfinite(facts["nested_offset"])
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from None
    if not good:
        raise ValueError(f"it says {json.dumps(facts)[:300]}")
    return Packed(shape, block, inner)
