"""The syntax tree of a caption file: one class a grammar rule, in the order of ``grammar/caption.lark``.

``at`` is a node's place, ``(start, end)`` in characters of the file; it never counts in comparisons, so two
files that say the same thing have equal trees. ``lead`` holds the comment lines above a node, ``""`` where
one or more blank lines stood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

At = tuple[int, int]
Lead = tuple[str, ...]

STYLE_TEXTS = ("aesthetics", "lighting", "photo", "medium", "art_style")
FIELD_KEYS = ("description", *STYLE_TEXTS, "background")


@dataclass(frozen=True, slots=True)
class Field:
    """``key: prose``; a bare description is the field ``description``."""

    key: str
    value: str
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class StyleLine:
    """``style: name``."""

    name: str
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class Colour:
    """``#RRGGBB``, ``@name`` of a palette, or the bare word that stood where a colour should."""

    value: str
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class PaletteLine:
    """``palette: colours``."""

    colours: tuple[Colour, ...]
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class SizeLine:
    """``size: WIDTHxHEIGHT`` in pixels."""

    width: int
    height: int
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class Mark:
    """One piece of an element beside its description.

    ``kind`` is ``y`` or ``x`` (value ``380..660``, unit included), ``h`` or ``w`` (value ``30%``),
    ``place`` (value ``center``), ``colour`` or ``words`` (value unescaped).
    """

    kind: str
    value: str
    at: At = field(default=(0, 0), compare=False)


MARK_ORDER = ("place", "y", "x", "h", "w", "colour", "words")


@dataclass(frozen=True, slots=True)
class Element:
    """``obj`` or ``text`` with its marks, sorted by ``MARK_ORDER``, and its description."""

    kind: str
    marks: tuple[Mark, ...]
    desc: str
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class Broken:
    """A line that could not be read."""

    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


Statement = Field | StyleLine | PaletteLine | SizeLine | Element | Broken


@dataclass(frozen=True, slots=True)
class Use:
    """``use path``."""

    path: str
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class PaletteBlock:
    """``palette name: colours``."""

    name: str
    colours: tuple[Colour, ...]
    lead: Lead = ()
    at: At = field(default=(0, 0), compare=False)


@dataclass(frozen=True, slots=True)
class Block:
    """``style name``, ``defaults`` or ``image name`` with its lines; ``tail`` are the comments below them."""

    kind: str
    name: str
    body: tuple[Statement, ...]
    lead: Lead = ()
    tail: Lead = ()
    at: At = field(default=(0, 0), compare=False)


Item = Use | PaletteBlock | Block | Statement


@dataclass(frozen=True, slots=True)
class Document:
    """A whole caption file; ``tail`` are the comments below its last line."""

    items: tuple[Item, ...]
    tail: Lead = ()

    def images(self) -> Iterator[Block]:
        """The ``image`` blocks, in order."""
        return (item for item in self.items if isinstance(item, Block) and item.kind == "image")

    def comments(self) -> list[str]:
        """Every comment line, in order."""
        found: list[str] = []
        for item in self.items:
            found += item.lead
            if isinstance(item, Block):
                for statement in item.body:
                    found += statement.lead
                found += item.tail
        return [line for line in (*found, *self.tail) if line]
