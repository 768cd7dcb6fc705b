"""Safetensors files and what their headers say; no tensor is loaded (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, UNSUPPORTED_FORM
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


def weight_files(part: Path) -> list[Path]:
    """The weight files of a part: those that its index names, else the one that its library reads, else
    those that are there; or itself."""
    if part.is_file():
        return [part]
    for index in part.glob("*.safetensors.index.json"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({part / name for name in names})
    own = [part / name for name in _OWN_NAMES if (part / name).is_file()]
    return own[:1] or sorted(part.glob("*.safetensors"))


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
            header = json.loads(stream.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            tensors = dict(header)
            end = max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            raise ValueError("not a safetensors file") from None
    if 8 + length + end != size:
        raise ValueError(f"cut short: {size} bytes where its header promises {8 + length + end}")
    return tensors, metadata


def data_start(file: Path, tensors: Mapping[str, Any]) -> int:
    """The byte from which a header's offsets count, given what :func:`safetensors_header` tells."""
    return file.stat().st_size - max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)


def part_headers(place: Path, span: Span | None = None) -> dict[str, Stored]:
    """Where every tensor of a part is, by its name in the files, from their headers.

    Raises:
        IdeoflowError: when there are none, or one is cut or no safetensors, or two hold the same tensor.
    """
    tensors: dict[str, Stored] = {}
    file, holders = place, dict[str, Path]()
    try:
        for file in weight_files(place):
            if unread := unread_file(file):
                fail(UNSUPPORTED_FORM, f"{file} is {unread[0]}", span, cure=unread[1])
            found = _stored(file)
            for key in found:
                if other := holders.get(plain_name(key)):
                    message = f"{place} holds more than one model: {other} and {file} both have {key}"
                    cure = f"name one of them, such as {other}, or leave only one in the folder"
                    fail(UNSUPPORTED_FORM, message, span, cure=cure)
            holders |= dict.fromkeys(map(plain_name, found), file)
            tensors |= found
    except FileNotFoundError:
        fail(BAD_CONFIG, f"{file} is missing", span, cure=AGAIN)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(BAD_CONFIG, f"{file} cannot be used: {error}", span, cure=AGAIN)
    if not tensors:
        fail(
            UNSUPPORTED_FORM,
            f"{place} holds no .safetensors file",
            span,
            cure="ideoflow reads safetensors only; it never unpickles a .bin or .pt",
        )
    return tensors


def _stored(file: Path) -> dict[str, Stored]:
    header = read_safetensors_header(file)
    start, found = data_start(file, header), {}
    for key, facts in header.items():
        begin, end = map(int, facts["data_offsets"])
        dtype, shape = str(facts["dtype"]), tuple(map(int, facts["shape"]))
        if dtype in _BYTES and prod(shape) * _BYTES[dtype] != end - begin:
            raise ValueError(f"{key} is {dtype} {list(shape)}, which does not make {end - begin} bytes")
        found[key] = Stored(file, dtype, shape, start + begin, end - begin)
    return found
