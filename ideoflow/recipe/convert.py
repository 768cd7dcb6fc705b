"""Plain data (from TOML or JSON) into the settings dataclasses, and back.

The dataclasses' own annotations say what is allowed; problems go to a callback, so that a recipe reports
them at their line and a plan file at their path.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ideoflow.diagnostics import closest
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.recipe import BAD_VALUE, MISSING_KEY, OTHER_TRAINER, UNKNOWN_KEY, WRONG_TYPE
from ideoflow.recipe.places import Path

# report(code, path, message, cure, label)
Report = Callable[[Code, Path, str, str, str], None]

_FAILED = object()
_MOST = 2**63 - 1  # TOML's whole numbers have 64 bits; tomli reads longer ones too
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_MANY = {str: "texts", int: "whole numbers", float: "numbers"}


def from_plain(cls: Any, data: Mapping[str, Any], report: Report, path: Path = ()) -> Any:
    """An instance of dataclass ``cls`` from nested mappings, or ``None`` if anything in it was reported."""
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            _report_unknown(key, cls, known, (*path, key), report)
    values: dict[str, Any] = {}
    complete = True
    if (one_of := _one_of(cls)) and all(data.get(name) in (None, [], ()) for name in one_of):
        cure = f"add {one_of[0]} = ... ({known[one_of[0]].metadata['doc']})"
        report(MISSING_KEY, path, f"the key '{one_of[0]}' is missing", cure, f"needs {one_of[0]}")
        complete = False
    for name, spec in known.items():
        annotation = hints[name]
        if name in data:
            value = _convert(annotation, data[name], spec, (*path, name), report)
            complete &= value is not _FAILED
            values[name] = value
        elif _required(spec):
            complete = False
            if is_dataclass(annotation):
                inner = ", ".join(
                    [f.name for f in fields(annotation) if _required(f)] + [*_one_of(annotation)[:1]]
                )
                report(
                    MISSING_KEY,
                    path,
                    f"the table [{name}] is missing",
                    f"add [{name}] with {inner} = ...",
                    "",
                )
            else:
                cure = f"add {name} = ... ({spec.metadata['doc']})"
                report(MISSING_KEY, path, f"the key '{name}' is missing", cure, f"needs {name}")
    return cls(**values) if complete else None


def _one_of(cls: Any) -> tuple[str, ...]:
    """Keys of which a table needs one."""
    return getattr(cls, "ONE_OF", ())


def _required(spec: Field[Any]) -> bool:
    return spec.default is MISSING and spec.default_factory is MISSING


def _report_unknown(key: str, cls: type, known: Mapping[str, Any], path: Path, report: Report) -> None:
    near = closest(key, known)
    cure = f"did you mean '{near}'?" if near else f"known here: {', '.join(known)}"
    where = f" in [{'.'.join(map(str, path[:-1]))}]" if len(path) > 1 else ""
    report(UNKNOWN_KEY, path, f"unknown key '{key}'{where}", cure, "not a key of a recipe")


def _convert(annotation: Any, value: Any, spec: Field[Any], path: Path, report: Report) -> Any:
    if is_dataclass(annotation):
        if not isinstance(value, Mapping):
            report(
                WRONG_TYPE,
                path,
                f"'{path[-1]}' is a table, not {_kind(value)}",
                f"write it as [{'.'.join(map(str, path))}]",
                "",
            )
            return _FAILED
        made = from_plain(annotation, value, report, path)
        return _FAILED if made is None else made
    if get_origin(annotation) is tuple and is_dataclass(inner := get_args(annotation)[0]):
        return _tables(inner, value, path, report)
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if value is None and type(None) in options:
        return None  # only JSON has null
    for option in options:
        converted = _match(option, value)
        if converted is not _FAILED:
            return converted if _within(converted, spec, path, report) else _FAILED
    _report_mismatch(options, value, spec, path, report)
    return _FAILED


def _tables(cls: Any, value: Any, path: Path, report: Report) -> Any:
    """A list of tables, such as ``[[data.source]]``."""
    header = f"[[{'.'.join(map(str, path))}]]"
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        report(WRONG_TYPE, path, f"'{path[-1]}' is a list of tables", f"write each as {header}", "")
        return _FAILED
    made = [from_plain(cls, item, report, (*path, n)) for n, item in enumerate(value)]
    return _FAILED if None in made else tuple(made)


def _match(annotation: Any, value: Any) -> Any:
    origin = get_origin(annotation)
    if origin is Literal:
        return value if isinstance(value, str) and value in get_args(annotation) else _FAILED
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _FAILED
        items = [_match(get_args(annotation)[0], item) for item in value]
        return _FAILED if _FAILED in items else tuple(items)
    if origin is not None:  # Mapping[str, ...]
        if not isinstance(value, Mapping):
            return _FAILED
        table = {k: _match(get_args(annotation)[1], v) for k, v in value.items()}
        return _FAILED if _FAILED in table.values() else table
    if annotation is float:
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value) if abs(value) <= _MOST else math.inf
        return value if isinstance(value, float) else _FAILED
    if annotation is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _FAILED
    if annotation is type(None):
        return _FAILED
    return value if isinstance(value, annotation) else _FAILED


def _within(value: Any, spec: Field[Any], path: Path, report: Report) -> bool:
    if any("\0" in text for text in _texts(value)):
        message = f"'{path[-1]}' must not hold a NUL character"
        report(BAD_VALUE, path, message, "remove \\u0000 from it", "")
        return False
    if isinstance(value, Mapping):  # the bounds are those of each value
        within = [_within(v, spec, (*path, k), report) for k, v in value.items()]  # reports every one
        return all(within)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    m = spec.metadata
    wrong: str | None = None
    if isinstance(value, int) and abs(value) > _MOST:
        report(BAD_VALUE, path, f"'{path[-1]}' is longer than 64 bits", m["doc"], "too long")
        return False
    if not math.isfinite(value):
        wrong = "must be finite"
    elif "above" in m and value <= m["above"]:
        wrong = f"must be above {m['above']:g}"
    elif "minimum" in m and value < m["minimum"]:
        wrong = f"must be at least {m['minimum']:g}"
    elif "maximum" in m and value > m["maximum"]:
        wrong = f"must be at most {m['maximum']:g}"
    elif "multiple_of" in m and value % m["multiple_of"]:
        step = m["multiple_of"]
        below = value // step * step
        wrong = f"must be a multiple of {step}; the nearest are {below} and {below + step}"
    if wrong:
        report(BAD_VALUE, path, f"'{path[-1]}' is {value}, but {wrong}", m["doc"], wrong)
    return wrong is None


def _texts(value: Any) -> list[str]:
    """The texts in a value: itself, or those of a list or a table."""
    if isinstance(value, Mapping):
        return [text for pair in value.items() for text in pair if isinstance(text, str)]
    items = value if isinstance(value, tuple) else (value,)
    return [item for item in items if isinstance(item, str)]


def _report_mismatch(
    options: tuple[Any, ...], value: Any, spec: Field[Any], path: Path, report: Report
) -> None:
    choices = [c for o in options if get_origin(o) is Literal for c in get_args(o)]
    others = [_wanted(o) for o in options if get_origin(o) is not Literal and o is not type(None)]
    allowed = [*choices, *others]
    one_of = " or ".join(allowed) if len(choices) == 1 else "one of: " + ", ".join(allowed)
    if isinstance(value, str | bool):
        word = str(value).lower()
        known = spec.metadata.get("elsewhere", {})
        if found := next((known[glob] for glob in known if fnmatchcase(word, glob)), None):
            why, cure = found
            shown = word if isinstance(value, bool) else f"'{value}'"
            message = f"'{path[-1]}' cannot be {shown}: it {why}"
            report(OTHER_TRAINER, path, message, cure, one_of)
            return
    if choices and isinstance(value, str):
        near = closest(value, choices)
        cure = f"did you mean '{near}'?" if near else one_of
        report(BAD_VALUE, path, f"'{path[-1]}' cannot be '{value}'", cure, one_of)
        return
    wanted = " or ".join(dict.fromkeys(_wanted(o) for o in options if o is not type(None)))
    found = _kind(value) + (
        f" holding {_kind(odd)}" if (odd := _odd_item(options, value)) is not None else ""
    )
    report(WRONG_TYPE, path, f"'{path[-1]}' must be {wanted}, not {found}", "", f"expected {wanted}")


def _odd_item(options: tuple[Any, ...], value: Any) -> Any:
    """The first item that makes a list or table the wrong one for every option of its kind, or ``None``."""
    if isinstance(value, Mapping):
        kinds = [get_args(o)[1] for o in options if get_origin(o) is Mapping]
        return next((v for v in value.values() if kinds and _match(kinds[0], v) is _FAILED), None)
    kinds = [get_args(o)[0] for o in options if get_origin(o) is tuple]
    if not kinds or not isinstance(value, list):
        return None
    return next((item for item in value if all(_match(k, item) is _FAILED for k in kinds)), None)


def _wanted(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if origin is tuple:
        return "a list of " + _MANY[get_args(annotation)[0]]
    return "a table of " + _MANY[get_args(annotation)[1]] if origin is not None else _WORDS[annotation]


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    for kind, words in (
        (str, "a text"),
        (int, "a whole number"),
        (float, "a number"),
        (list, "a list"),
        (Mapping, "a table"),
    ):
        if isinstance(value, kind):
            return words
    return "a date or time"


def to_plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as JSON-ready data; the inverse of :func:`from_plain`."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(v) for v in value]
    return value
