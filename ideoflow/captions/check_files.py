"""Checks every caption under some paths: form, rules, sense; and what only shows over the whole set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ideoflow.captions.checks import check_caption
from ideoflow.captions.emit import compile_caption
from ideoflow.captions.inputs import Columns, Source, check_paths, find, image_size, locate_image, read
from ideoflow.captions.plain import read_plain_caption
from ideoflow.captions.repair import read_json_caption
from ideoflow.captions.result import CompileResult
from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes.caption_json import UNUSED_PLACEHOLDER

if TYPE_CHECKING:
    from PIL.Image import Image


def check_captions(
    paths: Sequence[str | Path],
    *,
    placeholders: Mapping[str, str] | None = None,
    pictures: bool = False,
    count_tokens: Callable[[str], int] | None = None,
) -> list[Diagnostic]:
    """Everything that is wrong, or looks wrong, with the captions under ``paths`` (files and folders).

    Args:
        paths: ``.icap``, ``.json``, ``.txt``, ``.jsonl``, ``.parquet``, ``.csv`` files, or folders of them.
        placeholders: the recipe's; unknown ones are errors, unused ones warnings.
        pictures: open the pictures too, and look for the palettes' colours in them.
        count_tokens: JSON caption -> tokens, to find captions that the model could not read whole.

    Raises:
        IdeoflowError: a path does not exist, or is no caption file.
    """
    found: list[Diagnostic] = []
    used: set[str] = set()
    for part, names in check_each(
        paths, placeholders=placeholders, pictures=pictures, count_tokens=count_tokens
    ):
        found += part
        used |= names
    for name in sorted({name.strip("<>") for name in placeholders or {}} - used):
        found.append(
            Diagnostic(
                UNUSED_PLACEHOLDER,
                f"no caption uses <{name}>",
                Span(str(paths[0])),
                "write it where the subject is named",
                severity="warning",
            )
        )
    return found


def check_each(
    paths: Sequence[str | Path],
    *,
    placeholders: Mapping[str, str] | None = None,
    pictures: bool = False,
    count_tokens: Callable[[str], int] | None = None,
) -> Iterator[tuple[list[Diagnostic], frozenset[str]]]:
    """:func:`check_captions` file by file: diagnostics, and the placeholders that were found."""
    check_paths(paths)
    columns = Columns()
    for item in find(paths, columns):
        found: list[Diagnostic] = []
        names: frozenset[str] = frozenset()
        for source in read(item, columns):
            if isinstance(source, Diagnostic):
                found.append(source)
                continue
            result = compile_source(source, placeholders)
            said = list(result.diagnostics)
            names |= result.placeholders
            for one in result.captions:
                place = source.image if one.name is None else str(Path(source.path).parent / one.name)
                picture = _open(place) if pictures else None
                said += check_caption(
                    one.caption, path=source.path, locate=one.locate, image=picture, count_tokens=count_tokens
                )
            found += (at_line(d, source) for d in said)
        yield found, names


def compile_source(source: Source, placeholders: Mapping[str, str] | None = None) -> CompileResult:
    """The captions of one source, whatever its form."""
    if source.form == "icap":
        size = image_size(source.image) if "px" in source.text else None
        return compile_caption(source.text, path=source.path, placeholders=placeholders, image_size=size)
    if source.form == "json":
        return read_json_caption(source.text, path=source.path)
    return read_plain_caption(source.text, path=source.path, line=source.line)


def at_line(d: Diagnostic, source: Source) -> Diagnostic:
    """Diagnostics of a table's row point at the row: columns inside it mean nothing to a person."""
    if not source.line:
        return d
    return Diagnostic(d.code, d.message, Span(source.path, source.line), d.cure, "", d.notes, d.severity)


def _open(place: str) -> Image | None:
    """The picture, if there is one that can be opened; what is wrong with pictures is not told here."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = locate_image(place) if place else None
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
