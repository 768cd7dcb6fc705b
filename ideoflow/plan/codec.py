"""Frozen dataclasses to JSON data and back, for files that ideoflow itself writes.

The dataclasses' annotations are the format: :func:`encode` and :func:`decode` are each other's inverse, and
:func:`json_schema` describes the same thing as JSON Schema draft 2020-12. A file that does not match is
damaged or from another version, so the first mismatch stops the reading.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ideoflow.diagnostics.codes import Code, find_code

_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_MOST = sys.float_info.max
_SCHEMA_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


class Mismatch(ValueError):
    """The data is not what the annotation says; ``where`` is a dotted path."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def encode(value: Any) -> Any:
    """JSON-ready data; dataclass fields keep their order."""
    if isinstance(value, Code):
        return value.id
    if isinstance(value, Path):
        return value.as_posix()
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    return value


def decode(
    annotation: Any,
    data: Any,
    where: str = "",
    special: Mapping[Any, Callable[[Any, str], Any]] | None = None,
) -> Any:
    """The value that ``data`` stands for; ``special`` reads annotations of its own.

    Raises:
        Mismatch: at the first thing that is missing, left over or of another type.
    """
    special = special or {}
    if annotation in special:
        return special[annotation](data, where)
    if is_dataclass(annotation) and annotation is not Code:
        return _decode_dataclass(annotation, data, where, special)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, where, special)
    if origin is Literal:
        if data not in args:
            raise Mismatch(where, f"{data!r} is not one of {', '.join(map(str, args))}")
        return data
    if origin is tuple:
        items = _expect(list, data, where, "a list")
        kinds = (args[0],) * len(items) if args[1:] == (...,) else args
        if len(kinds) != len(items):
            raise Mismatch(where, f"{len(kinds)} values belong here, not {len(items)}")
        pairs = zip(kinds, items, strict=True)
        return tuple(decode(k, v, f"{where}.{i}", special) for i, (k, v) in enumerate(pairs))
    if origin is not None:  # Mapping[str, X]
        table = _expect(dict, data, where, "a table")
        return {k: decode(args[1], v, f"{where}.{k}", special) for k, v in table.items()}
    return _decode_scalar(annotation, data, where)


def _decode_dataclass(cls: Any, data: Any, where: str, special: Mapping[Any, Any]) -> Any:
    table = _expect(dict, data, where, "a table")
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in fields(cls)}
    for key in table:
        if key not in known:
            raise Mismatch(prefix + key, "unknown key")
    values = {}
    for name, field in known.items():
        if name in table:
            values[name] = decode(_hints(cls)[name], table[name], prefix + name, special)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise Mismatch(prefix + name, "missing")
    return cls(**values)


def _decode_union(options: tuple[Any, ...], data: Any, where: str, special: Mapping[Any, Any]) -> Any:
    last: Mismatch | None = None
    for option in options:
        try:
            return decode(option, data, where, special)
        except Mismatch as mismatch:
            # The option that got deepest is the one that was meant.
            if last is None or len(mismatch.where) > len(last.where):
                last = mismatch
    assert last is not None, "a union has options"
    raise last


def _decode_scalar(annotation: Any, data: Any, where: str) -> Any:
    if annotation is Path:
        return Path(_expect(str, data, where, "text"))
    if annotation is Code:
        code = find_code(_expect(str, data, where, "text"))
        if code is None:
            raise Mismatch(where, f"there is no diagnostic code {data}")
        return code
    if annotation is float and isinstance(data, int | float) and not isinstance(data, bool):
        if not abs(data) <= _MOST:
            raise Mismatch(where, "must be a finite number")
        return data  # a whole number stays one, so that it is written again as it was
    if annotation is type(None):
        if data is not None:
            raise Mismatch(where, "must be null")
        return None
    return _expect(annotation, data, where, _NAMES[annotation])


def _expect(kind: type, data: Any, where: str, words: str) -> Any:
    if not isinstance(data, kind) or (isinstance(data, bool) and kind is not bool):
        raise Mismatch(where, f"must be {words}")
    return data


def json_schema(annotation: Any, special: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    """What :func:`encode` makes of such a value, as JSON Schema draft 2020-12."""
    special = special or {}
    if annotation in special:
        return dict(special[annotation])
    if is_dataclass(annotation) and annotation is not Code:
        cls: Any = annotation
        names = [f.name for f in fields(cls)]
        return {
            "type": "object",
            "description": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
            "properties": {name: json_schema(_hints(cls)[name], special) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        options = [json_schema(a, special) for a in args]
        if all(set(o) == {"type"} for o in options):
            return {"type": [o["type"] for o in options]}
        return {"anyOf": options}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple and args[1:] == (...,):
        return {"type": "array", "items": json_schema(args[0], special)}
    if origin is tuple:
        exact = {"prefixItems": [json_schema(a, special) for a in args], "items": False}
        return {"type": "array", "minItems": len(args)} | exact
    if origin is not None:
        return {"type": "object", "additionalProperties": json_schema(args[1], special)}
    return {"type": "string" if annotation in (Path, Code) else _SCHEMA_TYPES[annotation]}
