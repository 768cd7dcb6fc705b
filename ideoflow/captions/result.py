"""What compiling gives: captions that know where each of their parts was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ideoflow.captions.nodes import At, Element, Field, PaletteLine, Statement, StyleLine
from ideoflow.captions.rules import Path as Where
from ideoflow.captions.source import Source
from ideoflow.diagnostics import Diagnostic, Span


class Locator(Protocol):
    """Finds the part of a caption, given as keys and indices, in the text that it came from."""

    def locate(self, where: Where) -> Span | None: ...


@dataclass(frozen=True, slots=True)
class CompiledCaption:
    """One caption that follows the rules.

    Args:
        name: the image's name in a file for many images; ``None`` in a sidecar.
        caption: the caption with its keys in canonical order.
        json: the caption on one line, as the model reads it.
        span: where it begins in its file.
    """

    name: str | None
    caption: dict[str, Any]
    json: str
    span: Span | None = None
    _origin: Locator | None = field(default=None, repr=False, compare=False)

    def locate(self, where: Where) -> Span | None:
        """The place in the file of a part of ``caption``, given as keys and indices; else of the caption."""
        return (self._origin.locate(where) if self._origin else None) or self.span


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What came out of one file.

    Args:
        captions: those without an error, in order.
        diagnostics: everything found, in reading order.
        placeholders: the names of all placeholders that occur in the captions.
        files: files taken over with ``use``; a cache must look at them too.
    """

    captions: tuple[CompiledCaption, ...]
    diagnostics: tuple[Diagnostic, ...] = ()
    placeholders: frozenset[str] = frozenset()
    files: tuple[Path, ...] = ()

    @property
    def errors(self) -> tuple[Diagnostic, ...]:
        """The diagnostics that are errors."""
        return tuple(d for d in self.diagnostics if d.is_error)


class SourceOrigin:
    """Finds the source of a caption's parts again, without keeping a span for each."""

    __slots__ = ("bodies", "source")

    def __init__(self, source: Source, bodies: Sequence[Sequence[Statement]]) -> None:
        self.source = source
        self.bodies = bodies  # the caption's own lines, then the defaults'

    def locate(self, where: Where) -> Span | None:
        at = self.find(where)
        return self.source.span(*at) if at else None

    def find(self, where: Where) -> At | None:
        if where[:2] == ("compositional_deconstruction", "elements") and len(where) > 2:
            elements = [line for line in self.bodies[0] if isinstance(line, Element)]
            number = where[2]
            if not isinstance(number, int) or number >= len(elements):
                return None
            element = elements[number]
            wanted = {"bbox": ("y", "x", "h", "w", "place"), "text": ("words",), "color_palette": ("colour",)}
            kinds = wanted.get(str(where[3]), ()) if len(where) > 3 else ()
            marks = [mark for mark in element.marks if mark.kind in kinds]
            if marks and where[3] == "color_palette" and len(where) > 4 and isinstance(where[4], int):
                marks = marks[where[4] : where[4] + 1] or marks
            if marks:
                return min(m.at[0] for m in marks), max(m.at[1] for m in marks)
            return element.at
        names = {"high_level_description": "description", "color_palette": "palette"}
        key = names.get(str(where[-1]), str(where[-1])) if where else ""
        if len(where) > 1 and where[1] == "color_palette":
            key = "palette"
        for body in self.bodies:
            for line in body:
                if isinstance(line, Field) and line.key == key:
                    return line.at
                if isinstance(line, PaletteLine) and key == "palette":
                    return line.at
        if where[:1] == ("style_description",):
            return next((li.at for body in self.bodies for li in body if isinstance(li, StyleLine)), None)
        return None
