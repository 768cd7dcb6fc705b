"""Safetensors files and what their headers say; no tensor is loaded (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, UNSUPPORTED_FORM, WRONG_WEIGHTS
from ideoflow.model.forms import plain_name, unread_file

AGAIN = "download or export the model again"
# What diffusers and transformers read of a folder without an index, whatever lies beside it.
_OWN_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
# Bytes of a number, by safetensors' name of its type; types that no base has are left out.
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2} | dict.fromkeys(
    ("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1
)


class Stored(NamedTuple):
    """A tensor in a file: ``size`` bytes from byte ``start`` on; ``dtype`` as safetensors calls it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> bytes:
        """Raises OSError, and ValueError where the file ends too early."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            content = stream.read(self.size)
        if len(content) != self.size:
            raise ValueError("cut short")
        return content


def some(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def weight_files(part: Path) -> list[Path]:
    """The weight files of a part: the one that its library reads, else those that its index names, else
    those that are there; or itself.

    Raises:
        OSError, ValueError: when the index cannot be read.
    """
    if part.is_file():
        return [part]
    if own := _own_file(part):
        return [own]
    if index := _index_of(part):
        return sorted({part / name for name in _read_index(index).values()})
    return sorted(part.glob("*.safetensors"))


def _own_file(part: Path) -> Path | None:
    """The file that the part's library reads, whatever lies beside it."""
    return next((part / name for name in _OWN_NAMES if (part / name).is_file()), None)


def _index_of(part: Path) -> Path | None:
    """The index that says which shards are read, if one does."""
    if part.is_file() or _own_file(part):
        return None
    own = [part / f"{name}.index.json" for name in _OWN_NAMES]
    return next((i for i in (*own, *sorted(part.glob("*.safetensors.index.json"))) if i.is_file()), None)


def _read_index(index: Path) -> dict[str, str]:
    """The name of the shard that has each tensor."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not (shards and all(Path(shard).name == shard for shard in shards.values())):
            raise ValueError("its weight_map names no files")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{index} is no index: {reason}") from None
    return dict(shards)


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """What the header of a safetensors file says of its tensors; raises like :func:`safetensors_header`."""
    return safetensors_header(file)[0]


def safetensors_header(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file: 8 bytes of little-endian length, then JSON.

    Raises:
        ValueError: when the file is cut or is something else.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("not a safetensors file, or cut short")
        try:
            tensors = json.loads(stream.read(length))
            metadata = tensors.pop("__metadata__", {})
            texts = all(isinstance(text, str) for text in metadata.values())
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise ValueError("not a safetensors file") from None
    if not texts:
        raise ValueError("not a safetensors file: __metadata__ holds what is no text")
    try:
        end = max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, OverflowError):
        check_tensors(tensors)
        raise
    if size != (whole := 8 + length + end):
        check_tensors(tensors)
        what = "cut short" if size < whole else f"{size - whole} bytes are left over"
        raise ValueError(f"{what}: {size} bytes where its header promises {whole}")
    return tensors, metadata


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Holds the entries of a header to the format: types, and places without gaps from the first byte on.

    Raises:
        ValueError: with the name of the first tensor that is wrong.
    """
    for key, facts in tensors.items():
        if not isinstance(facts, dict):
            raise ValueError(f"{key} has no entries dtype, shape and data_offsets in the header")
        if not isinstance(facts.get("dtype"), str):
            raise ValueError(f"{key} has the dtype {json.dumps(facts.get('dtype'))}")
        for entry in ("shape", "data_offsets"):
            found = facts.get(entry)
            if not (isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)):
                raise ValueError(f"{key} has the {entry} {json.dumps(found)}, no list of whole numbers")
        if len(facts["data_offsets"]) != 2:
            raise ValueError(f"{key} has the data_offsets {facts['data_offsets']}, not a begin and an end")
    before, end = "the header", 0
    for key, facts in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = facts["data_offsets"]
        if begin != end or stop < begin:
            raise ValueError(f"{key} lies at bytes {begin} to {stop}, and {before} ends at {end}")
        before, end = key, stop


def data_start(file: Path, tensors: Mapping[str, Any]) -> int:
    """The byte from which a header's offsets count, given what :func:`safetensors_header` tells."""
    return file.stat().st_size - max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)


def part_headers(place: Path, span: Span | None = None) -> dict[str, Stored]:
    """Where every tensor of a part is, by its name in the files, from their headers.

    Raises:
        IdeoflowError: when there are none, or one is cut or no safetensors, or two hold the same tensor, or
            an index says otherwise.
    """
    tensors: dict[str, Stored] = {}
    holders: dict[str, Path] = {}
    try:
        files = weight_files(place)
    except (OSError, ValueError) as error:
        fail(BAD_CONFIG, f"{place} cannot be used: {error}", span, cure=AGAIN)
    for file in files:
        try:
            if unread := unread_file(file):
                fail(UNSUPPORTED_FORM, f"{file} is {unread[0]}", span, cure=unread[1])
            found = _stored(file)
        except FileNotFoundError:
            fail(BAD_CONFIG, f"{file} is missing", span, cure=AGAIN)
        except (OSError, ValueError) as error:
            fail(BAD_CONFIG, f"{file} cannot be used: {error}", span, cure=AGAIN)
        for key in found:
            if other := holders.get(plain_name(key)):
                message = f"{place} holds more than one model: {other} and {file} both have {key}"
                cure = f"name one of them, such as {other}, or leave only one in the folder"
                fail(UNSUPPORTED_FORM, message, span, cure=cure)
        holders |= dict.fromkeys(map(plain_name, found), file)
        tensors |= found
    if not tensors:
        fail(
            UNSUPPORTED_FORM,
            f"{place} holds no .safetensors file",
            span,
            cure="ideoflow reads safetensors only; it never unpickles a .bin or .pt",
        )
    if index := _index_of(place):
        _check_index(index, tensors, span)
    return tensors


def _check_index(index: Path, tensors: Mapping[str, Stored], span: Span | None) -> None:
    """Each tensor must be in the shard that the index gives."""
    for shard in sorted(set((shards := _read_index(index)).values())):
        named = [key for key, name in shards.items() if name == shard]
        if missing := [key for key in named if key not in tensors]:
            message = f"{index.parent / shard}: tensors are missing: {some(missing)}"
            fail(WRONG_WEIGHTS, message, span, cure=f"{AGAIN}: {index} says that they are there")
        if moved := [key for key in named if tensors[key].file.name != shard]:
            message = (
                f"{index} says that {moved[0]} is in {shard}, and it is in {tensors[moved[0]].file.name}"
            )
            fail(WRONG_WEIGHTS, message, span, cure=AGAIN)


def _stored(file: Path) -> dict[str, Stored]:
    header = read_safetensors_header(file)
    check_tensors(header)
    start, found = data_start(file, header), {}
    for key, facts in header.items():
        begin, end = facts["data_offsets"]
        dtype, shape = facts["dtype"], tuple(facts["shape"])
        if dtype in _BYTES and prod(shape) * _BYTES[dtype] != end - begin:
            raise ValueError(f"{key} is {dtype} {list(shape)}, which does not make {end - begin} bytes")
        found[key] = Stored(file, dtype, shape, start + begin, end - begin)
    return found
