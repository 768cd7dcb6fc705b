"""What captions share: the styles and palettes of a file and of the files that it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ideoflow.captions.mistakes import bad_colour
from ideoflow.captions.nodes import (
    At,
    Block,
    Colour,
    Document,
    Element,
    Field,
    Mark,
    PaletteBlock,
    PaletteLine,
    StyleLine,
    Use,
)
from ideoflow.captions.parser import parse_source
from ideoflow.captions.source import Source
from ideoflow.diagnostics import Diagnostic, closest
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_language as codes

USE_DEPTH = 32  # files that use files; a chain this long is surely a mistake
DROPPED = ("none",)  # `palette: none`

StyleParts = dict[str, str]  # aesthetics, lighting, photo or art_style, medium


@dataclass(slots=True)
class Style:
    """A style with all it starts from: its texts and palette (``None``: it says nothing of one)."""

    texts: StyleParts = field(default_factory=dict)
    palette: tuple[str, ...] | None = None


class Reporter:
    """Collects diagnostics with places in one source."""

    __slots__ = ("items", "source")

    def __init__(self, source: Source, items: list[Diagnostic]) -> None:
        self.source = source
        self.items = items

    def __call__(self, code: Code, message: str, at: At, cure: str, label: str = "") -> None:
        span = self.source.span(*at)
        self.items.append(Diagnostic(code, message, span, cure, label, severity=code.severity))


class Library:
    """The named styles and palettes that a file can refer to, its own and used ones."""

    def __init__(self) -> None:
        self.styles: dict[str, tuple[Block, Reporter]] = {}
        self.palettes: dict[str, tuple[PaletteBlock, Reporter]] = {}
        self.files: list[Path] = []  # every file taken over, for caches
        self._resolved: dict[str, Style | None] = {}
        self._colours: dict[str, tuple[str, ...]] = {}

    def add(self, document: Document, report: Reporter) -> None:
        """Takes in the definitions of a document; a second one of a name is reported."""
        for item in document.items:
            if isinstance(item, Block) and item.kind == "style":
                self._define(self.styles, item, report)
            elif isinstance(item, PaletteBlock):
                self._define(self.palettes, item, report)

    def _define(self, table: dict, item: Block | PaletteBlock, report: Reporter) -> None:  # type: ignore[type-arg]
        if item.name not in table:
            table[item.name] = (item, report)
            return
        first, where = table[item.name]
        if first is item:
            return  # reached by two ways of `use`
        kind = "style" if isinstance(item, Block) else "palette"
        report(
            codes.SAME_NAME,
            f"{kind} `{item.name}` is defined a second time",
            item.at,
            f"give it another name; the first is at {where.source.span(*first.at)}",
        )

    def style(self, name: str, at: At, report: Reporter, chain: tuple[str, ...] = ()) -> Style | None:
        """The style called ``name``; ``None`` where it is unknown, circular or broken, which was reported."""
        if name in chain:
            circle = " -> ".join((*chain[chain.index(name) :], name))
            report(
                codes.STYLE_CYCLE,
                f"style `{name}` starts from itself: {circle}",
                at,
                "take one of the steps out",
            )
            return None
        if name in self._resolved:
            return self._resolved[name]
        if name not in self.styles:
            near = closest(name, self.styles)
            known = (
                f"known are {', '.join(sorted(self.styles)[:8])}"
                if self.styles
                else f"define it: `style {name}`"
            )
            report(
                codes.UNKNOWN_STYLE,
                f"there is no style `{name}`",
                at,
                f"did you mean `{near}`?" if near else known,
            )
            return None
        block, owner = self.styles[name]
        before = len(owner.items)
        result = self._build(block, owner, (*chain, name))
        good = not any(d.is_error for d in owner.items[before:])
        self._resolved[name] = result if good else None
        return self._resolved[name]

    def _build(self, block: Block, report: Reporter, chain: tuple[str, ...]) -> Style | None:
        result = Style()
        bases = [line for line in block.body if isinstance(line, StyleLine)]
        if bases:
            base = self.style(bases[0].name, bases[0].at, report, chain)
            if base is None:
                return None
            result = Style(dict(base.texts), base.palette)
        check_lines(block.body, "style", report)
        for line in block.body:
            if isinstance(line, Field):
                set_text(result.texts, line.key, line.value)
            elif isinstance(line, PaletteLine):
                result.palette = self.colours(line.colours, 16, "a style", report)
            elif not isinstance(line, StyleLine):
                return None
        return result

    def colours(
        self, given: Sequence[Colour | Mark], most: int, owner: str, report: Reporter
    ) -> tuple[str, ...] | None:
        """The colours with palette names filled in; ``DROPPED`` for ``none``, ``None`` after an error."""
        if len(given) == 1 and given[0].value == "none":
            return DROPPED
        found: list[str] = []
        for colour in given:
            value = colour.value
            if value[0] == "#":
                found.append(value)
            elif value[0] == "@":
                named = self._palette(value[1:], colour.at, report)
                if named is None:
                    return None
                found += named
            else:
                if value == "none":
                    report(
                        codes.BAD_COLOUR,
                        "`none` stands beside colours",
                        colour.at,
                        "`palette: none` stands alone",
                    )
                else:
                    report.items.append(bad_colour(report.source, value, colour.at[0]))
                return None
        if len(found) > most:
            at = (given[0].at[0], given[-1].at[1])
            report(
                codes.TOO_MANY_COLOURS,
                f"{len(found)} colours, and {owner} takes {most}",
                at,
                "keep the main ones",
            )
            return None
        return tuple(found)

    def _palette(self, name: str, at: At, report: Reporter) -> tuple[str, ...] | None:
        if name not in self.palettes:
            near = closest(name, self.palettes)
            cure = f"did you mean `@{near}`?" if near else f"define it: `palette {name}: #1B3A5C`"
            report(codes.UNKNOWN_PALETTE, f"there is no palette `{name}`", at, cure)
            return None
        if name not in self._colours:
            block, owner = self.palettes[name]
            self._colours[name] = ()
            for colour in block.colours:
                if colour.value[0] != "#":
                    owner.items.append(bad_colour(owner.source, colour.value, colour.at[0]))
            self._colours[name] = tuple(c.value for c in block.colours if c.value[0] == "#")
        return self._colours[name]


def set_text(texts: StyleParts, key: str, value: str) -> None:
    """Sets a part of a style; photo and art_style take each other's place."""
    if key == "photo":
        texts.pop("art_style", None)
    elif key == "art_style":
        texts.pop("photo", None)
    texts[key] = value


_ALLOWED = {
    "style": frozenset({"aesthetics", "lighting", "photo", "medium", "art_style", "palette", "style"}),
    "defaults": frozenset(
        {
            "aesthetics",
            "lighting",
            "photo",
            "medium",
            "art_style",
            "palette",
            "style",
            "description",
            "background",
            "size",
        }
    ),
}


def key_of(line: object) -> str:
    """The key that a statement sets; ``""`` for elements and broken lines."""
    if isinstance(line, Field):
        return line.key
    return {"StyleLine": "style", "PaletteLine": "palette", "SizeLine": "size"}.get(type(line).__name__, "")


def check_lines(body: Iterable[object], kind: str, report: Callable[..., None]) -> None:
    """Reports keys given twice, photo beside art_style, and statements that do not belong in a block."""
    seen: dict[str, object] = {}
    allowed = _ALLOWED.get(kind)
    for line in body:
        key = key_of(line)
        at: At = line.at  # type: ignore[attr-defined]
        if allowed is not None and (key not in allowed if key else isinstance(line, Element)):
            what = "an element" if not key else f"`{key}`"
            report(
                codes.MISPLACED,
                f"{what} does not belong under `{kind}`",
                at,
                "move it to the image it describes",
            )
            continue
        if not key:
            continue
        if key in seen:
            report(codes.REPEATED, f"`{key}` is given twice", at, "keep one of the two")
        elif (key == "photo" and "art_style" in seen) or (key == "art_style" and "photo" in seen):
            report(
                codes.PHOTO_AND_ART,
                "photo and art_style exclude each other",
                at,
                "keep `photo` for a photograph, `art_style` for anything made",
            )
        seen[key] = line


_read: dict[Path, tuple[tuple[int, int], Document, Reporter]] = {}


def take_over(
    library: Library, document: Document, report: Reporter, folder: Path, chain: tuple[Path, ...] = ()
) -> None:
    """Adds the definitions of every file that ``document`` uses, and of the files used there."""
    for use in document.items:
        if not isinstance(use, Use):
            continue
        try:
            path = (folder / use.path).resolve()
            stat = path.stat()
            if not path.is_file():
                raise ValueError("it is not a file")
            known = _read.get(path)
            stamp = (stat.st_mtime_ns, stat.st_size)
            if known is None or known[0] != stamp:
                text = path.read_bytes().decode("utf-8")
                source = Source(str(folder / use.path), text)
                inner, problems = parse_source(source)
                known = (stamp, inner, Reporter(source, list(problems)))
                _read[path] = known
        except (OSError, ValueError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if isinstance(error, UnicodeDecodeError):
                why = "it is not UTF-8"
            report(
                codes.CANNOT_USE,
                f"`{use.path}` cannot be read: {why}",
                use.at,
                "the path is relative to the file that it stands in",
            )
            continue
        if path in chain:
            circle = " -> ".join(p.name for p in (*chain[chain.index(path) :], path))
            report(codes.USE_CYCLE, f"these files use each other: {circle}", use.at, "take one `use` out")
            continue
        if len(chain) >= USE_DEPTH:
            report(
                codes.CANNOT_USE, f"more than {USE_DEPTH} files use one another", use.at, "use fewer files"
            )
            continue
        if path in library.files:
            continue
        library.files.append(path)
        _, inner, theirs = known
        own = Reporter(theirs.source, list(theirs.items))
        if any(d.is_error for d in own.items):
            report(
                codes.USED_FILE_HAS_ERRORS, f"`{use.path}` has errors of its own", use.at, "mend that file"
            )
            report.items.extend(own.items)
        own.items = report.items
        if any(isinstance(item, Block) and item.kind == "image" for item in inner.items) or any(
            key_of(item) or isinstance(item, Element) for item in inner.items
        ):
            report(
                codes.USED_FILE_HAS_CAPTIONS,
                f"`{use.path}` holds captions",
                use.at,
                "only its styles are used",
            )
        library.add(inner, own)
        take_over(library, inner, own, path.parent, (*chain, path))
