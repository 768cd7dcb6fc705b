"""The captions of each picture, found and compiled as its source says (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ideoflow.captions import (
    CompiledCaption,
    CompileResult,
    check_caption,
    compile_caption,
    fill_placeholders,
    read_json_caption,
    to_json,
    wrap_text,
)
from ideoflow.captions.inputs import CAPTION_COLUMNS, NAME_COLUMNS, looks_like_json
from ideoflow.captions.rules import ROOT
from ideoflow.data.pictures import Stored
from ideoflow.diagnostics import Collector, Diagnostic, Span
from ideoflow.diagnostics.codes.data import BAD_LIST, NO_CAPTION, NO_PICTURE, NOT_JSON
from ideoflow.recipe import Recipe

CAPTION_SUFFIXES = (".icap", ".json", ".txt")
# One caption file for a whole folder, each caption under its picture's name.
FOLDER_CAPTIONS = "captions.icap"


@dataclass(frozen=True, slots=True)
class Text:
    """A caption as it was found; ``kind`` is ``.icap``, ``.json`` or ``.txt``, like the suffix of a file."""

    content: str
    kind: str
    place: Span


@dataclass(frozen=True, slots=True)
class Entry:
    """A picture that a source has: ``name`` within the source, and the captions that came with it.

    ``texts`` is None where nothing could come with it, so that captions are looked for beside the picture.
    """

    picture: Stored
    name: str
    texts: tuple[Text, ...] | None = None


class ColumnProblem(Exception):
    """A record has no caption, or several columns that could be it."""


def record_texts(record: Mapping[str, Any], column: str | None, place: Span) -> tuple[Text, ...]:
    """The captions in a record of a table, a line of a list, or a .json beside a picture.

    A record may be a caption itself: then what names its picture is left out.

    Raises:
        ColumnProblem: when it is not clear which column holds the caption.
    """
    if column is None and set(ROOT) & record.keys():
        return _value_texts({k: v for k, v in record.items() if k not in NAME_COLUMNS}, place)
    known = (column,) if column else CAPTION_COLUMNS
    keys = [key for key in known if record.get(key) not in (None, "", [])]
    if len(keys) > 1:
        raise ColumnProblem(f"several columns could be the caption: {', '.join(keys)}")
    if column and column not in record:
        raise ColumnProblem(f"there is no '{column}' here, only {', '.join(map(str, list(record)[:12]))}")
    return _value_texts(record[keys[0]], place) if keys else ()


def _value_texts(value: Any, place: Span) -> tuple[Text, ...]:
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in _value_texts(item, place))
    if isinstance(value, Mapping):
        return (Text(json.dumps(value, ensure_ascii=False), ".json", place),)
    text = "" if value is None else str(value)
    if not text.strip():
        return ()
    return (Text(text, ".json" if looks_like_json(text) else ".txt", place),)


class CaptionFinder:
    """Finds the captions of each picture of one source, as its ``caption`` says."""

    def __init__(self, recipe: Recipe, number: int, problems: Collector) -> None:
        self.recipe, self.number, self.problems = recipe, number, problems
        self.source = recipe.tables.data.sources[number]
        self.named: set[Path] = set()  # pictures that a captions.icap names
        self._folders: dict[Path, dict[str, CompiledCaption]] = {}
        self._instances: dict[tuple[int, int] | None, CompileResult] = {}
        self._told: set[Diagnostic] = set()

    def of(self, entry: Entry, size: tuple[int, int] | None) -> tuple[Mapping[str, Any], ...]:
        """Every caption of a picture of (width, height) ``size``; none where a problem was reported."""
        way = self.source.caption
        if way == "instance":
            return self._instance(size)
        if way == "filename":
            return self._filename(entry, size)
        beside = isinstance(entry.picture, Path) and (way == "sidecar" or entry.texts is None)
        if beside and way != "column":
            return self._sidecar(entry.picture, size)  # type: ignore[arg-type]
        if not entry.texts:
            cure = "write one, or set data.caption" if entry.texts is not None else "set caption = 'auto'"
            self.problems.add(NO_CAPTION, f"{entry.name} has no caption", Span(str(entry.picture)), cure=cure)
            return ()
        found: list[Mapping[str, Any]] = []
        for text in entry.texts:
            result = read_caption(text.content, text.place.path, text.kind, self.recipe, size)
            if text.place.line:  # places in a text are none in the table that it is a cell of
                moved = tuple(replace(d, span=text.place) for d in result.diagnostics)
                result = replace(result, diagnostics=moved)
            found += self._captions(result, text.place)
        return tuple(found)

    def _instance(self, size: tuple[int, int] | None) -> tuple[Mapping[str, Any], ...]:
        span = self.recipe.source_span(self.number, "instance_prompt")
        if size not in self._instances:
            text = self.source.instance_prompt or ""
            result = read_caption(
                text, str(self.recipe.path), _kind_of(text), self.recipe, size, self.recipe.folder
            )
            # Lines of the prompt are no lines of the recipe: what is wrong stands at the prompt as a whole.
            found = tuple(replace(d, span=span) for d in result.diagnostics)
            self._instances[size] = replace(result, diagnostics=found)
        return self._captions(self._instances[size], span)

    def _filename(self, entry: Entry, size: tuple[int, int] | None) -> tuple[Mapping[str, Any], ...]:
        words = Path(entry.name).stem.replace("_", " ").replace("-", " ")
        span = Span(str(entry.picture))
        if any("\ud800" <= c <= "\udfff" for c in words):  # Python's stand-ins for other encodings
            shown = words.encode("utf-8", "replace").decode()
            message = f"the name '{shown}' is no valid UTF-8, and so no caption"
            place = Span(str(Path(str(entry.picture)).parent))
            self.problems.add(NO_CAPTION, message, place, cure="rename the picture")
            return ()
        return self._captions(read_caption(words, str(entry.picture), ".txt", self.recipe, size), span)

    def _sidecar(self, picture: Path, size: tuple[int, int] | None) -> tuple[Mapping[str, Any], ...]:
        for suffix in CAPTION_SUFFIXES:
            file = picture.with_suffix(suffix)
            if file.is_file():
                column = self.source.caption_column
                return self._captions(read_caption_file(file, self.recipe, size, column), Span(str(file)))
        shared = self.of_folder(picture.parent).get(picture.name)
        if shared is not None:
            return (shared.caption,)
        cure = f"write {picture.stem}.icap (or .json, .txt) beside it, or set data.caption"
        self.problems.add(NO_CAPTION, f"{picture.name} has no caption", Span(str(picture)), cure=cure)
        return ()

    def of_folder(self, folder: Path) -> dict[str, CompiledCaption]:
        """The captions in a folder's captions.icap, by picture."""
        if folder not in self._folders:
            file = folder / FOLDER_CAPTIONS
            found: dict[str, CompiledCaption] = {}
            if file.is_file():
                result = read_caption_file(file, self.recipe, None)
                self._report(result.diagnostics)
                found = {c.name: c for c in result.captions if c.name}
                self.named |= {folder / name for name in found}
            self._folders[folder] = found
        return self._folders[folder]

    def _captions(self, result: CompileResult, span: Span) -> tuple[Mapping[str, Any], ...]:
        """The captions that were found, one if they are a person's words for one picture."""
        self._report(result.diagnostics)
        if len(result.captions) == 1 or (not any(c.name for c in result.captions) and result.captions):
            return tuple(c.caption for c in result.captions)
        if not any(d.is_error for d in result.diagnostics):
            message = f"one caption was expected here, not {len(result.captions)}"
            cure = f"captions of several pictures go into {FOLDER_CAPTIONS}, each under its picture's name"
            self.problems.add(NO_CAPTION, message, span, cure=cure)
        return ()

    def _report(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        # One caption serves many pictures with data.caption = 'instance': its faults are told once.
        # Notes, which say how a caption could be better, are for `captions check`.
        self.problems.extend(d for d in diagnostics if d not in self._told and d.severity != "note")
        self._told.update(diagnostics)
        if len(self.problems.errors) >= self.problems.limit:
            self.problems.raise_if_errors()

    def report_orphans(self, entries: Sequence[Entry]) -> None:
        """Reports captions without a picture, in the folders that hold pictures."""
        pictures = [e.picture for e in entries if isinstance(e.picture, Path) and e.texts is None]
        stems = {p.with_suffix("") for p in pictures}
        for folder in sorted({p.parent for p in pictures}):
            self.of_folder(folder)
            for file in sorted(p for p in folder.iterdir() if p.suffix in CAPTION_SUFFIXES and p.is_file()):
                if file.name == FOLDER_CAPTIONS or file.with_suffix("") in stems:
                    continue
                # A file of shared styles has no caption of its own, and not every .json is one.
                if read_caption_file(file, self.recipe, None).captions:
                    self.problems.add(
                        NO_PICTURE,
                        f"{file.name} has no picture of that name",
                        Span(str(file)),
                        cure="rename it after its picture, or remove it",
                    )
        for picture in sorted(self.named - set(pictures)):
            self.problems.add(
                NO_PICTURE,
                f"{FOLDER_CAPTIONS} names {picture.name}, which is not there",
                Span(str(picture.parent / FOLDER_CAPTIONS)),
                cure="add the picture, or remove its caption",
            )


def _kind_of(text: str) -> str:
    """How to read a caption that has no suffix: JSON, caption language, or prose."""
    if text.lstrip().startswith("{"):
        return ".json"
    return ".icap" if "\n" in text.strip() else ".txt"


def read_caption_file(
    file: Path, recipe: Recipe, size: tuple[int, int] | None, column: str | None = None
) -> CompileResult:
    """Captions of one file, by its suffix; a .json that is no caption may hold some in ``column``."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        message = f"{file} cannot be read: {reason}"
        problem = Diagnostic(NO_CAPTION, message, Span(str(file)), "save it as UTF-8 text")
        return CompileResult((), (problem,))
    if file.suffix.lower() == ".json" and (texts := sidecar_texts(text, column, Span(str(file)))) is not None:
        if isinstance(texts, Diagnostic):
            return CompileResult((), (texts,))
        results = [read_caption(t.content, str(file), t.kind, recipe, size, file.parent) for t in texts]
        return CompileResult(
            tuple(c for r in results for c in r.captions), tuple(d for r in results for d in r.diagnostics)
        )
    kind = ".json" if text.lstrip().startswith("{") else file.suffix.lower()
    return read_caption(text, str(file), kind, recipe, size, file.parent)


def sidecar_texts(text: str, column: str | None, place: Span) -> tuple[Text, ...] | Diagnostic | None:
    """Captions in the text of a .json beside a picture that holds them under a key, as some trainers write.

    None where it is to be read as a caption itself; a diagnostic where it is not clear which key is meant.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None  # the reader of captions knows what can be wrong with one
    if not isinstance(record, dict) or (
        (column or "") not in record and not set(CAPTION_COLUMNS) & record.keys()
    ):
        return None
    if column is None and set(ROOT) & record.keys():
        return None
    try:
        return record_texts(record, column, place)
    except ColumnProblem as problem:
        return Diagnostic(BAD_LIST, str(problem), place, "name the right one: data.caption_column")


def read_caption(
    text: str,
    path: str,
    kind: str,
    recipe: Recipe,
    size: tuple[int, int] | None,
    base_dir: Path | None = None,
) -> CompileResult:
    """Captions of one text: ``.icap``, ``.json``, or ``.txt`` for prose."""
    placeholders = recipe.tables.captions.placeholders
    if kind == ".json":
        return _filled(read_json_caption(text, path=path), placeholders)
    if kind == ".icap":
        return compile_caption(text, path=path, placeholders=placeholders, image_size=size, base_dir=base_dir)
    if not recipe.tables.captions.wrap:
        problem = Diagnostic(
            NOT_JSON,
            f"{path} is plain text, and captions.wrap is off",
            Span(path),
            cure="write it as .icap or JSON, or set wrap = true in [captions]",
        )
        return CompileResult((), (problem,))
    caption = wrap_text(text)
    problems = check_caption(caption, path=path)
    compiled = CompiledCaption(None, caption, to_json(caption), Span(path))
    return _filled(CompileResult((compiled,), tuple(problems)), placeholders)


def _filled(result: CompileResult, placeholders: Mapping[str, str]) -> CompileResult:
    """The captions with the recipe's placeholders filled in, as compiling does it for caption language."""
    filled = (fill_placeholders(c.caption, placeholders) for c in result.captions)
    captions = (replace(c, caption=f, json=to_json(f)) for c, f in zip(result.captions, filled, strict=True))
    return replace(result, captions=tuple(captions))
