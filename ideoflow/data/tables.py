"""Lists of pictures: .jsonl, .csv and .parquet files of paths (or of pictures) and captions (torch-free)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ideoflow.captions.inputs import CAPTION_COLUMNS, NAME_COLUMNS
from ideoflow.captions.rules import ROOT
from ideoflow.data.pictures import PICTURE_SUFFIXES, ParquetCell, Stored
from ideoflow.data.texts import ColumnProblem, Entry, record_texts
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span, fail
from ideoflow.diagnostics.codes.caption_tools import NO_PYARROW
from ideoflow.diagnostics.codes.data import BAD_LIST
from ideoflow.recipe import SourceSettings


def read_list(file: Path, source: SourceSettings, root: Path) -> Iterator[Entry | Diagnostic]:
    """Every picture that a list names, with its captions, or what is wrong with its row.

    Args:
        root: the folder that paths in it are relative to.

    Raises:
        IdeoflowError: when the file as a whole cannot be read.
    """
    if file.suffix.lower() == ".parquet":
        yield from _parquet(file, source, root)
        return
    for line, record in _records(file):
        place = Span(str(file), line)
        if isinstance(record, Diagnostic):
            yield record
            continue
        name = _path_in(record, source.image_column)
        if name is None:
            known = source.image_column or "file_name, image_path or image"
            yield Diagnostic(
                BAD_LIST,
                f"line {line} names no picture: it has no {known}",
                place,
                "name the column of the pictures' paths: data.image_column",
            )
            continue
        yield _entry(_located(root, name), name, record, source, place)


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any] | Diagnostic]]:
    """(line, record) of a .jsonl or .csv file."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix.lower() == ".csv":
                reader = csv.DictReader(stream)
                for row in reader:
                    yield reader.line_num, row
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _json_record(line, Span(str(file), number))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        _unreadable(file, error)


def _json_record(line: str, place: Span) -> dict[str, Any] | Diagnostic:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return record
    cure = 'write one JSON object a line, such as {"file_name": "a.jpg", "text": "a boat"}'
    return Diagnostic(BAD_LIST, f"line {place.line} is no JSON object", place, cure)


def _path_in(record: Mapping[str, Any], column: str | None) -> str | None:
    """The picture's path in a record, under ``column`` or one of the usual names."""
    for key in (column,) if column else NAME_COLUMNS:
        value = record.get(key)
        if isinstance(value, Mapping):
            value = value.get("path")
        if isinstance(value, str) and value.strip() and "\0" not in value:
            return value.strip()
    return None


def _located(root: Path, name: str) -> Path:
    """The picture of that name, which some lists write without its suffix."""
    if Path(name).suffix.lower() not in PICTURE_SUFFIXES:
        for suffix in sorted(PICTURE_SUFFIXES):
            if (file := root / f"{name}{suffix}").is_file():
                return file
    return root / name


def _entry(
    picture: Stored, name: str, record: Mapping[str, Any], source: SourceSettings, place: Span
) -> Entry | Diagnostic:
    if source.caption in ("instance", "filename", "sidecar"):
        return Entry(picture, name)
    try:
        return Entry(picture, name, record_texts(record, source.caption_column, place))
    except ColumnProblem as problem:
        return Diagnostic(BAD_LIST, str(problem), place, "name the right one: data.caption_column")


def _parquet(file: Path, source: SourceSettings, root: Path) -> Iterator[Entry | Diagnostic]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        cure = "pip install 'ideoflow[parquet]'"
        fail(NO_PYARROW, f"{file.name} cannot be read: pyarrow is absent", Span(str(file)), cure=cure)
    try:
        with parquet.ParquetFile(file) as table:
            schema, groups = table.schema_arrow, table.metadata.num_row_groups
            image, paths = _picture_column(file, schema, source, arrow)
            wanted = [*_caption_columns(file, schema.names, source), *([paths] if paths else [])]
            line = 0
            for group in range(groups):
                rows = table.read_row_group(group, columns=wanted).to_pylist() if wanted else ()
                for row in range(table.metadata.row_group(group).num_rows):
                    line += 1
                    record, place = rows[row] if wanted else {}, Span(str(file), line)
                    name = _path_in(record, paths.partition(".")[0]) if paths else None
                    if image:
                        cell = ParquetCell(file, image, group, row)
                        yield _entry(cell, name or cell.name, record, source, place)
                    elif name:
                        yield _entry(_located(root, name), name, record, source, place)
                    else:
                        cure = "fill it in, or take the row out"
                        yield Diagnostic(BAD_LIST, f"row {line} has an empty '{paths}'", place, cure)
    except (arrow.ArrowException, OSError) as error:
        _unreadable(file, error)


def _picture_column(file: Path, schema: Any, source: SourceSettings, arrow: Any) -> tuple[str, str]:
    """(column of the pictures' bytes, column of their paths), one of them perhaps empty."""
    known = (source.image_column,) if source.image_column else NAME_COLUMNS
    columns = [name for name in known if name in schema.names]
    if not columns:
        what = (
            f"no column '{source.image_column}'" if source.image_column else "no column that names pictures"
        )
        cure = f"name it with image_column; there are {', '.join(schema.names[:12])}"
        fail(BAD_LIST, f"{file.name} has {what}", Span(str(file)), cure=cure)
    for name in columns:  # bytes are a picture for certain, a text may be anything
        kind = schema.field(name).type
        if arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind):
            return name, next((c for c in columns if arrow.types.is_string(schema.field(c).type)), "")
        parts = [kind.field(i).name for i in range(kind.num_fields)] if arrow.types.is_struct(kind) else []
        if "bytes" in parts:  # Hugging Face's Image: {bytes, path}
            return f"{name}.bytes", f"{name}.path" if "path" in parts else ""
    return "", columns[0]


def _caption_columns(file: Path, names: Sequence[str], source: SourceSettings) -> list[str]:
    if source.caption in ("instance", "filename", "sidecar"):
        return []
    wanted = (source.caption_column,) if source.caption_column else (*CAPTION_COLUMNS, *ROOT)
    found = [name for name in wanted if name in names]
    if not found:
        what = f"no column '{source.caption_column}'" if source.caption_column else "no column of captions"
        cure = f"name it with caption_column; there are {', '.join(names[:12])}"
        fail(BAD_LIST, f"{file.name} has {what}", Span(str(file)), cure=cure)
    return found


def _unreadable(file: Path, error: Exception) -> None:
    reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None)
    raise IdeoflowError(
        Diagnostic(BAD_LIST, f"{file} cannot be read: {reason or error}", Span(str(file)), "restore the file")
    ) from None
