"""Where captions come from: finds caption files and reads the records in them, streaming.

Finding is cheap and happens in the main process (:func:`find`); reading happens in the workers
(:func:`read`). Between the two travels an :class:`Item`: a whole small file, or one row of a large one.

Understood are this project's ``.icap``, Ideogram's JSON in ``.json`` and ``.txt`` in any layout, plain text,
and what other trainers leave behind:

* sidecars ``.txt`` / ``.caption`` of plain text or JSON (all of them), ``.json`` with ``caption``
  (ai-toolkit);
* one ``.json`` that maps pictures to captions (kohya's sd-scripts, ai-toolkit) or lists records;
* ``.jsonl`` of ``image_path`` and ``caption`` (musubi-tuner); ``metadata.jsonl``, ``metadata.csv`` and
  parquet of ``file_name`` (Hugging Face imagefolder); parquet of any named columns (SimpleTuner).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_tools as codes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jxl")
SIDECAR_SUFFIXES = (".icap", ".json", ".txt", ".caption")  # the first wins where a picture has several
TABLE_SUFFIXES = (".jsonl", ".parquet", ".csv")
CAPTION_COLUMNS = ("caption", "text", "prompt")
NAME_COLUMNS = ("file_name", "image_path", "image", "filename", "path", "key", "id")
_CAPTION_KEYS = frozenset({"high_level_description", "style_description", "compositional_deconstruction"})


@dataclass(frozen=True, slots=True)
class Columns:
    """Which keys of a record hold the caption and the picture's name; ``None`` looks for the usual ones."""

    caption: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One unit of work.

    ``folder`` is the part of ``path``'s folder that belongs to the picture's name. ``line`` and ``row`` are
    set for one row of a table; ``problem`` where finding it already failed. ``stamp`` changes when the input
    does.
    """

    path: str
    folder: str = ""
    image: str | None = None
    line: int = 0
    row: bytes | dict[str, Any] | None = None
    alone: bool = False  # a caption file without a picture, in a folder with pictures
    stamp: str = ""
    problem: Diagnostic | None = None

    @property
    def key(self) -> str:
        """Tells this item, in this version, from every other."""
        return f"{self.path}\0{self.line}\0{self.stamp}"


@dataclass(frozen=True, slots=True)
class Source:
    """One caption as it was found.

    ``name`` is the picture's path in the data set, with ``/``; ``image`` where the picture should lie on this
    disk, perhaps without its suffix (:func:`locate_image`).
    """

    name: str
    text: str
    form: Literal["icap", "json", "text"]
    path: str
    line: int
    image: str


def check_paths(paths: Sequence[str | Path]) -> None:
    """Raises IC710 or IC712, all at once, for paths that are not there or are no caption files."""
    problems = []
    for path in map(Path, paths):
        if _is_unnamable(str(path)):
            problems.append(_bad_name(str(path)))
        elif not path.exists():
            problems.append(_problem(codes.NO_INPUT, f"{path} does not exist", str(path)))
        elif not path.is_dir() and path.suffix.lower() not in SIDECAR_SUFFIXES + TABLE_SUFFIXES:
            problems.append(
                _problem(
                    codes.UNKNOWN_KIND,
                    f"{path.name} is not a kind of caption file",
                    str(path),
                    f"captions come in {', '.join(SIDECAR_SUFFIXES + TABLE_SUFFIXES)}, or give the folder",
                )
            )
    if problems:
        raise IdeoflowError(problems)


def find(
    paths: Iterable[str | Path], columns: Columns, *, skip: frozenset[str] = frozenset()
) -> Iterator[Item]:
    """Every item under paths that :func:`check_paths` has passed.

    The order is stable: paths as given, folders sorted by name. ``skip`` holds resolved paths that are not
    looked into (the output itself).
    """
    for path in map(Path, paths):
        if path.is_dir():
            yield from _walk(path, columns, skip)
        elif path.suffix.lower() in TABLE_SUFFIXES:
            yield from _table(path, "", columns)
        else:
            image = locate_image(path)
            yield Item(str(path), image=str(image) if image else None, stamp=_stamp(path))


def _walk(root: Path, columns: Columns, skip: frozenset[str]) -> Iterator[Item]:
    for here, folders, files in os.walk(root):
        yield from (Item("", problem=_bad_name(f)) for f in sorted((*folders, *files)) if _is_unnamable(f))
        files = [f for f in files if not _is_unnamable(f)]
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not _is_unnamable(f))
        if skip:
            folders[:] = [f for f in folders if str(Path(here, f).resolve()) not in skip]
        folder = Path(here).relative_to(root).as_posix()
        folder = "" if folder == "." else folder
        yield from _folder(Path(here), folder, sorted(files), columns, skip)


def _folder(
    here: Path, folder: str, files: list[str], columns: Columns, skip: frozenset[str]
) -> Iterator[Item]:
    images: dict[str, str] = {}
    for picture in map(PurePath, files):
        if picture.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(picture.stem, picture.name)
            images[picture.name] = picture.name  # boat.jpg.txt is also a sidecar of boat.jpg
    used: dict[str, str] = {}
    order = {suffix: i for i, suffix in enumerate(SIDECAR_SUFFIXES)}
    resolved = here.resolve()
    paths = [here / f for f in files if not f.startswith(".") and str(resolved / f) not in skip]
    for path in sorted(paths, key=lambda p: (p.stem, order.get(p.suffix.lower(), 9))):
        file, stem, suffix = path.name, path.stem, path.suffix.lower()
        if suffix in (".jsonl", ".parquet") or (suffix == ".csv" and stem == "metadata"):
            yield from _table(path, folder, columns)
        elif suffix in order:
            image = images.get(stem)
            if image and used.setdefault(image, file) != file:
                yield Item(str(path), problem=_problem(
                    codes.CAPTIONED_TWICE, f"{image} has two captions: {used[image]} is used, {file} is not",
                    str(path)))  # fmt: skip
            elif not image and images and suffix in (".txt", ".caption"):
                yield Item(
                    str(path),
                    problem=_problem(
                        codes.NO_PICTURE, f"{file} was left out: no picture has its name", str(path)
                    ),
                )
            else:
                yield Item(str(path), folder, str(here / image) if image else None,
                           alone=bool(images) and not image, stamp=_stamp(path))  # fmt: skip


def _table(path: Path, folder: str, columns: Columns) -> Iterator[Item]:
    stamp = _stamp(path)
    try:
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield Item(str(path), folder, line=number, row=line, stamp=stamp)
        elif path.suffix.lower() == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                for row in reader:
                    yield Item(str(path), folder, line=reader.line_num, row=row, stamp=stamp)
        else:
            for number, row in enumerate(_parquet_rows(path, columns), 1):
                yield Item(str(path), folder, line=number, row=row, stamp=stamp)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        yield Item(str(path), stamp=stamp, problem=_unreadable(str(path), error))


def _parquet_rows(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """Rows with only the two columns that matter, so that embedded pictures are never decoded."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise IdeoflowError(_problem(codes.NO_PYARROW, f"{path.name} cannot be read: pyarrow is absent",
                                     str(path), "pip install 'ideoflow[parquet]'")) from None  # fmt: skip
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            known = schema.names
            chosen = [c for c in (columns.caption, columns.name) if c]
            missing = [c for c in chosen if c not in known]
            captions = [columns.caption] if columns.caption else [c for c in CAPTION_COLUMNS if c in known]
            if missing or not captions:
                lost = f"no column {missing[0]!r}" if missing else "no column that is known to hold captions"
                raise IdeoflowError(_problem(codes.NO_COLUMN, f"{path.name} has {lost}", str(path),
                    f"name it with --column; there are {', '.join(known[:12])}"))  # fmt: skip
            name = columns.name or next((c for c in NAME_COLUMNS if c in known), None)
            wanted = list(captions)
            if name is not None:
                # Hugging Face stores pictures as {bytes, path}: read the path only.
                is_struct = pa.types.is_struct(schema.field(name).type)
                wanted.append(f"{name}.path" if is_struct else name)
            for batch in file.iter_batches(batch_size=512, columns=wanted):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise IdeoflowError(_unreadable(str(path), error)) from None


def read(item: Item, columns: Columns) -> Iterator[Source | Diagnostic]:
    """The captions in an item, as text, with a diagnostic for each that cannot be had; never raises."""
    if item.problem is not None:
        yield item.problem
        return
    if item.row is not None:
        yield from _row(item, columns)
        return
    path = Path(item.path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        yield _unreadable(item.path, error)
        return
    suffix = path.suffix.lower()
    image = item.image or str(path.with_suffix(""))
    own = Source(_join(item.folder, Path(image).name), text, "text", item.path, 0, image)
    if suffix == ".icap":
        yield replace(own, form="icap")
    elif suffix == ".json":
        yield from _json_file(item, own, columns)
    else:
        yield replace(own, form="json") if looks_like_json(text) else own


def looks_like_json(text: str) -> bool:
    """Whether a text is meant as a JSON caption: also in a Markdown fence, or behind a trigger word.

    To take it for prose would put braces and quotes into a description.
    """
    start = text.lstrip("\ufeff \t\r\n")[:3]
    return start[:1] == "{" or start == "```" or '"compositional_deconstruction"' in text


def _row(item: Item, columns: Columns) -> Iterator[Source | Diagnostic]:
    span = Span(item.path, item.line)
    row: Any = item.row
    if isinstance(row, bytes):
        try:
            row = json.loads(row.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            yield _unreadable(item.path, error, item.line)
            return
        except (ValueError, RecursionError):
            yield _problem(
                codes.BAD_RECORD,
                "the line is not valid JSON",
                span,
                "write one JSON object a line; a pretty-printed object belongs in a .json file",
            )
            return
    stem = f"{Path(item.path).stem}-{item.line:06d}"
    yield from _record(row, stem, item, span, columns)


def _json_file(item: Item, own: Source, columns: Columns) -> Iterator[Source | Diagnostic]:
    try:
        data = json.loads(own.text)
    except (ValueError, RecursionError):
        yield replace(own, form="json")  # the repair knows what can be wrong with a caption, and says so
        return
    span = Span(item.path)
    if isinstance(data, dict) and (_CAPTION_KEYS & data.keys() or _looks_like_caption(data)):
        yield replace(own, form="json")
    elif isinstance(data, dict) and _caption_key(data, columns):
        # ai-toolkit's sidecar: {"caption": ..., "caption_short": ...}
        yield from _record(data, PurePosixPath(own.name).name, item, span, columns)
    elif isinstance(data, list) and data:
        for number, record in enumerate(data, 1):
            yield from _record(record, f"{Path(item.path).stem}-{number:06d}", item, span, columns)
    elif isinstance(data, dict) and data and all(isinstance(v, dict | str) for v in data.values()):
        for name, value in data.items():
            record = {"file_name": name, **(value if isinstance(value, dict) else {"caption": value})}
            yield from _record(record, name, item, span, columns)
    else:
        yield _problem(codes.UNKNOWN_KIND, f"{Path(item.path).name} holds no caption", span,
                       severity="warning" if item.alone else "error")  # fmt: skip


def _looks_like_caption(data: dict[str, Any]) -> bool:
    return isinstance(data.get("elements"), list) or "background" in data


def _caption_key(record: dict[str, Any], columns: Columns) -> list[str]:
    wanted = (columns.caption,) if columns.caption else CAPTION_COLUMNS
    return [key for key in wanted if record.get(key) not in (None, "")]


def _record(
    record: Any, fallback: str, item: Item, span: Span, columns: Columns
) -> Iterator[Source | Diagnostic]:
    """One row, list entry or map entry; ``fallback`` names a picture that has no name."""
    if isinstance(record, str):
        record = {"caption": record}
    if not isinstance(record, dict):
        yield _problem(codes.BAD_RECORD, "a record is not a JSON object", span)
        return
    value: Any
    if _CAPTION_KEYS & record.keys():
        value = {k: v for k, v in record.items() if k not in NAME_COLUMNS}
    else:
        keys = _caption_key(record, columns)
        if len(keys) != 1:
            what = (
                f"several columns could be the caption: {', '.join(keys)}"
                if keys
                else "no caption in the record"
            )
            yield _problem(codes.NO_COLUMN, what, span,
                f"name the right one with --column; there are {', '.join(map(str, list(record)[:12]))}",
                severity="warning" if item.alone and not keys else "error")  # fmt: skip
            return
        value = record[keys[0]]
    name = _picture_name(record, columns) or fallback
    clean = clean_name(name)
    if clean is None:
        yield _problem(codes.BAD_NAME, f"the picture's name {name!r} cannot be used", span)
        return
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    form: Literal["json", "text"] = "json" if looks_like_json(text) else "text"
    # An absolute name is kept to find the picture by; joined to a folder it stays absolute.
    image = item.image or str(Path(item.path).parent / name)
    yield Source(_join(item.folder, clean), text, form, item.path, item.line, image)


def _picture_name(record: dict[str, Any], columns: Columns) -> str | None:
    for key in (columns.name,) if columns.name else NAME_COLUMNS:
        value = record.get(key)
        if isinstance(value, dict):
            value = value.get("path")
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def clean_name(name: str) -> str | None:
    """A picture's name as a relative path with ``/``; ``None`` where it leads out of the data set."""
    name = name.replace("\\", "/")
    if _is_unnamable(name) or any(ord(c) < 32 for c in name):
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or (len(name) > 1 and name[1] == ":"):
        return path.name or None
    if ".." in path.parts or not path.name:
        return None
    return path.as_posix()


def _is_unnamable(name: str) -> bool:
    """Whether a name is no valid UTF-8: Python then has half characters in it, which JSON cannot hold."""
    return any(0xD800 <= ord(c) < 0xE000 for c in name)


def _bad_name(name: str) -> Diagnostic:
    shown = name.encode("utf-8", "replace").decode()
    return _problem(codes.BAD_NAME, f"the name {shown!r} is no valid UTF-8", shown, "rename it")


def locate_image(expected: str | Path) -> Path | None:
    """The picture at a path that may lack its suffix (or have that of the caption), if it exists."""
    path = Path(expected)
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        return path
    for stem in (path.with_suffix(""), path):
        for suffix in IMAGE_SUFFIXES:
            candidate = stem.with_name(stem.name + suffix)
            if candidate.is_file():
                return candidate
    return None


def image_size(expected: str | Path) -> tuple[int, int] | None:
    """(width, height) in pixels of a caption's picture, as it is shown: a quarter turn in EXIF swaps them.

    ``None`` where there is no picture, or none that Pillow can read.
    """
    path = locate_image(expected)
    if path is None:
        return None
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            # Pillow has swapped the sides of a TIFF already.
            turned = image.getexif().get(0x0112) in (5, 6, 7, 8) and image.format != "TIFF"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return (height, width) if turned else (width, height)


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "gone"
    return f"{status.st_size}.{status.st_mtime_ns}"


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _unreadable(path: str, error: Exception, line: int = 0) -> Diagnostic:
    if isinstance(error, UnicodeDecodeError):
        what = f"byte {error.start + 1} of {'the line' if line else Path(path).name} is not UTF-8"
    else:
        what = f"{Path(path).name} cannot be read: {getattr(error, 'strerror', None) or error}"
    return _problem(codes.UNREADABLE, what, Span(path, line))


def _problem(code: Code, message: str, place: str | Span, cure: str = "",
             severity: Literal["error", "warning", "note"] | None = None) -> Diagnostic:  # fmt: skip
    span = place if isinstance(place, Span) else Span(place)
    return Diagnostic(code, message, span, cure, severity=severity or code.severity)
