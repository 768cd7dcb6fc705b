"""Converts one item of a data set: a caption file, or one row of a table. Runs in the workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ideoflow.captions import CompiledCaption, check_files, decompile_caption, fill_placeholders, to_json
from ideoflow.captions.boxes import shorten
from ideoflow.captions.inputs import Columns, Item, Source, clean_name, read
from ideoflow.captions.sinks import Made
from ideoflow.captions.words import TRIGGER_MARKS, insert_trigger, swap_box_axes
from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes import caption_tools as codes


@dataclass(frozen=True, slots=True)
class Options:
    """What is done to every caption.

    Args:
        placeholders: values for ``<name>``, as pairs.
        trigger: a word that every caption must have, see :func:`~ideoflow.captions.words.insert_trigger`.
        boxes: ``xyxy`` if JSON captions have ``[x1, y1, x2, y2]``: a person's word, never guessed.
        columns: keys of the caption and the picture's name in records.
        one_per_line: a plain-text file holds several captions, a line each (SimpleTuner).
        write: ``json`` (canonical captions) or ``icap``.
    """

    placeholders: tuple[tuple[str, str], ...] = ()
    trigger: str | None = None
    boxes: Literal["yxyx", "xyxy"] = "yxyx"
    columns: Columns = field(default_factory=Columns)
    one_per_line: bool = False
    write: Literal["json", "icap"] = "json"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item: a file may hold many captions, or none (a library of styles).

    ``key`` identifies the item and its version, so that an interrupted run can tell whether it has changed.
    """

    key: str
    made: tuple[Made, ...]
    diagnostics: tuple[Diagnostic, ...]
    failed: int


def convert_item(item: Item, options: Options) -> Outcome:
    """Reads and converts one item; every mistake becomes a diagnostic."""
    made: list[Made] = []
    diagnostics: list[Diagnostic] = []
    failed = 0
    for found in read(item, options.columns):
        if isinstance(found, Diagnostic):
            diagnostics.append(found)
            failed += found.is_error
            continue
        for source in _split(found, options):
            captions, said = compile_source(source, options)
            diagnostics += said
            failed += any(d.is_error for d in said)
            made += (_make(caption, options) for caption in captions)
    return Outcome(item.key, tuple(made), tuple(diagnostics), failed)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A caption of a data set, compiled and edited."""

    name: str
    image: str
    caption: dict[str, Any]
    origin: CompiledCaption  # as compiled, before words were inserted: it finds places in the file


def compile_source(source: Source, options: Options) -> tuple[list[Compiled], list[Diagnostic]]:
    """The canonical captions of one source, with placeholders, trigger and box order applied.

    A caption with an error is left out; others in the same file stay.
    """
    values = dict(options.placeholders)
    if values and options.trigger:
        values.setdefault("trigger", options.trigger)
    source, problem = _text_before_json(source, options)
    if problem is not None:
        return [], [problem]
    result = check_files.compile_source(source, values or None)
    captions: list[Compiled] = []
    diagnostics = [check_files.at_line(d, source) for d in result.diagnostics]
    for compiled in result.captions:
        name, image = _named(compiled.name, source)
        caption = compiled.caption
        if source.form != "icap":
            if options.boxes == "xyxy":
                caption = swap_box_axes(caption)
            if values:
                caption = fill_placeholders(caption, values)
        if options.trigger:
            caption, chosen = insert_trigger(caption, options.trigger)
            if chosen:
                place = compiled.span or Span(source.path, source.line)
                diagnostics.append(_trigger_placed(name, options.trigger, place))
        captions.append(Compiled(name, image, caption, compiled))
    return captions, diagnostics


def _text_before_json(source: Source, options: Options) -> tuple[Source, Diagnostic | None]:
    """Takes a trigger word off the front of a JSON caption; other text there is an error, not a guess."""
    if source.form != "json" or source.text.lstrip("\ufeff \t\r\n").startswith(("{", "```")):
        return source, None
    before, brace, rest = source.text.partition("{")
    word = before.strip(" \t\r\n,.;:\ufeff")
    if not brace or not word or word in (options.trigger, *TRIGGER_MARKS):
        return replace(source, text=brace + rest), None
    cure = f"--trigger {word!r} moves it inside" if len(word) < 40 else "move it into a description"
    message = f"{shorten(word)!r} stands in front of the JSON"
    return source, Diagnostic(codes.TEXT_BEFORE_JSON, message, Span(source.path, source.line), cure)


def _trigger_placed(name: str, word: str, place: Span) -> Diagnostic:
    message = f"{name} had no {word!r}: it now opens the description"
    return Diagnostic(
        codes.TRIGGER_PLACED, message, place, "write [trigger] where it belongs", severity="note"
    )


def _split(source: Source, options: Options) -> Iterator[Source]:
    if source.form != "text" or not options.one_per_line:
        yield source
        return
    for number, line in enumerate(source.text.splitlines(), 1):
        if line.strip():
            yield Source(source.name, line, source.form, source.path, number, source.image)


def _named(name: str | None, source: Source) -> tuple[str, str]:
    """Name and expected place of one of an .icap file's pictures."""
    if name is None:
        return source.name, source.image
    folder = source.name.rpartition("/")[0]
    clean = clean_name(name) or PurePosixPath(name).name or "unnamed"
    return (f"{folder}/{clean}" if folder else clean), str(Path(source.path).parent / name)


def _make(compiled: Compiled, options: Options) -> Made:
    if options.write == "icap":
        text = decompile_caption([(None, compiled.caption)]).rstrip("\n")
    else:
        text = to_json(compiled.caption)
    return Made(compiled.name, compiled.image, text)
