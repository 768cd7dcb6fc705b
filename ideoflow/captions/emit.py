"""From the syntax tree to canonical caption JSON.

A caption takes each part of its style from the nearest place that has it: its own lines, the style it names,
the file's defaults, the style these name. What cannot be compiled is reported and left out; everything
that comes out follows the official rules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ideoflow.captions.library import DROPPED, Library, Reporter, Style, check_lines, set_text, take_over
from ideoflow.captions.mistakes import LIMIT
from ideoflow.captions.nodes import (
    At,
    Block,
    Broken,
    Document,
    Element,
    Field,
    PaletteBlock,
    PaletteLine,
    SizeLine,
    Statement,
    StyleLine,
    Use,
)
from ideoflow.captions.parser import parse_source
from ideoflow.captions.regions import PLACES, REGIONS, Size, resolve_box
from ideoflow.captions.result import CompiledCaption, CompileResult, SourceOrigin
from ideoflow.captions.rules import STYLE_ART, STYLE_PHOTO, follows_rules, to_json
from ideoflow.captions.rules import Path as Where
from ideoflow.captions.source import Source
from ideoflow.diagnostics import Diagnostic, closest
from ideoflow.diagnostics.codes import caption_language as codes

PLACEHOLDER = re.compile(r"<([^\W\d][\w-]*)>")
_COLOUR_AT_END = re.compile(r"(?:^|\s)(#[0-9A-Fa-f]{6})$")


def compile_caption(
    text: str,
    *,
    path: str = "<caption>",
    placeholders: Mapping[str, str] | None = None,
    image_size: Size | None = None,
    base_dir: Path | None = None,
) -> CompileResult:
    """Compiles the text of an ``.icap`` file; never raises, whatever the text.

    Args:
        text: the file.
        path: its name for messages, and where ``base_dir`` is not given, where ``use`` looks from.
        placeholders: name -> replacement (``{"token": "sks dog"}`` for ``<token>``); a name in prose that is
            not among them is an error. ``None`` leaves placeholders as they stand.
        image_size: width and height in pixels for boxes in pixels; a ``size:`` line has precedence.
        base_dir: the folder that ``use`` is relative to.
    """
    source = Source(path, text)
    document, found = parse_source(source)
    return _Compiler(source, list(found), placeholders, image_size, base_dir).run(document)


class _Compiler:
    def __init__(
        self,
        source: Source,
        diagnostics: list[Diagnostic],
        placeholders: Mapping[str, str] | None,
        image_size: Size | None,
        base_dir: Path | None,
    ) -> None:
        self.source = source
        self.report = Reporter(source, diagnostics)
        self.placeholders = _bare_names(placeholders) if placeholders is not None else None
        self.image_size = image_size
        self.base_dir = base_dir
        self.library = Library()
        self.used: set[str] = set()
        self.defaults: Sequence[Statement] = ()
        self.default_style = Style()
        self.captions: list[CompiledCaption] = []

    def run(self, document: Document) -> CompileResult:
        items = self.report.items
        bad_lines = sorted({d.span.line for d in items if d.is_error and d.span})
        folder = self.base_dir if self.base_dir is not None else Path(self.source.path).parent
        library = self.library
        library.add(document, self.report)
        take_over(library, document, self.report, folder)
        good = self._defaults(document)
        sidecar: list[Statement] = []
        images: dict[str, Block] = {}
        for item in document.items:
            if isinstance(item, Block):
                if item.kind != "image":
                    continue
                if item.name in images:
                    first = self.source.span(*images[item.name].at).line
                    self.report(
                        codes.SAME_IMAGE,
                        f"`{item.name}` has a caption already, in line {first}",
                        item.at,
                        "keep one of the two",
                    )
                    continue
                images[item.name] = item
                self._caption(
                    item.name, item.body, item.at, whole=good and not self._touches(bad_lines, item)
                )
            elif not isinstance(item, (Use, PaletteBlock)):
                sidecar.append(item)
        if sidecar and images:
            first_line = sidecar[0]
            self.report(
                codes.MIXED_FILE,
                "this line belongs to no image",
                first_line.at,
                "put it into an image block, or under `defaults`",
            )
        elif sidecar:
            self._caption(None, sidecar, sidecar[0].at, whole=good and not bad_lines)
        elif not images and not items and not library.styles and not library.palettes:
            self.report(codes.NO_CAPTION, "there is no caption in this file", (0, 0), "describe the image")
        self._look_at_styles()
        if len(items) > 1:
            items.sort(
                key=lambda d: (
                    (d.span.path != self.source.path, d.span.line, d.span.column) if d.span else (True, 0, 0)
                )
            )
        return CompileResult(
            tuple(self.captions), _at_most(items), frozenset(self.used), tuple(library.files)
        )

    def _touches(self, bad_lines: Sequence[int], block: Block) -> bool:
        """Whether a line that could not be read lies inside the block."""
        if not bad_lines:
            return False
        first = self.source.span(*block.at).line
        last = self.source.span(block.at[0], block.body[-1].at[1]).end_line
        return any(first <= line <= last for line in bad_lines)

    def _defaults(self, document: Document) -> bool:
        """Reads the ``defaults`` block; returns whether captions can be built on it."""
        blocks = [item for item in document.items if isinstance(item, Block) and item.kind == "defaults"]
        if not blocks:
            return True
        for extra in blocks[1:]:
            self.report(codes.REPEATED, "`defaults` is given twice", extra.at, "join the two")
        before = len(self.report.items)
        self.defaults = blocks[0].body
        check_lines(self.defaults, "defaults", self.report)
        known = self._layer(self.default_style, self.defaults) is not None
        broken = any(isinstance(line, Broken) for line in self.defaults)
        return known and not broken and not any(d.is_error for d in self.report.items[before:])

    def _layer(self, style: Style, body: Sequence[Statement]) -> bool | None:
        """Lays a body's style, texts and palette over ``style``; returns whether it says anything of a style,
        ``None`` where it names one that cannot be had."""
        says: bool | None = False
        for line in body:
            if isinstance(line, StyleLine):
                named = self.library.style(line.name, line.at, self.report)
                if named is None:
                    return None
                says = True
                for key, value in named.texts.items():
                    set_text(style.texts, key, value)
                if named.palette is not None:
                    style.palette = named.palette
        for line in body:
            if isinstance(line, Field):
                if line.key != "description" and line.key != "background":
                    says = True
                    set_text(style.texts, line.key, line.value)
            elif isinstance(line, PaletteLine):
                says = says or line.colours[0].value != "none"
                style.palette = self.library.colours(line.colours, 16, "a style", self.report)
        return says

    def _caption(self, name: str | None, body: Sequence[Statement], at: At, *, whole: bool) -> None:
        """Compiles one caption, or (not ``whole``: lines of it could not be read) only looks for mistakes."""
        report, items = self.report, self.report.items
        before = len(items)
        check_lines(body, "image", report)
        style = Style(dict(self.default_style.texts), self.default_style.palette)
        says = self._layer(style, body)
        if says is None or any(d.is_error for d in items[before:]):
            whole = False  # then what the style lacks is no news
        texts: dict[str, str] = {}
        size = self.image_size
        elements: list[dict[str, Any]] = []
        for layer in (self.defaults, body):
            for line in layer:
                if isinstance(line, Field):
                    if line.key == "description" or line.key == "background":
                        texts[line.key] = line.value
                elif isinstance(line, SizeLine):
                    size = self._size(line)
        for line in body:
            if isinstance(line, Element):
                elements.append(self._element(line, size))
            elif isinstance(line, Broken):
                whole = False
        if not whole:
            return
        caption: dict[str, Any] = {}
        if "description" in texts:
            caption["high_level_description"] = texts["description"]
        if says or style.texts or style.palette not in (None, DROPPED):
            built = self._style(style, body, at)
            if built is None:
                return
            caption["style_description"] = built
        if "background" not in texts:
            report(codes.NO_BACKGROUND, "this caption has no background", at, "add a line `background: ...`")
        caption["compositional_deconstruction"] = {
            "background": texts.get("background", ""),
            "elements": elements,
        }
        if any(d.is_error for d in items[before:]):
            return
        origin = SourceOrigin(self.source, (body, self.defaults))
        encoded = to_json(caption)
        if "<" in encoded:
            filled = self._fill(caption, origin, at)
            if any(d.is_error for d in items[before:]):
                return
            if filled is not caption:
                caption = filled
                encoded = to_json(caption)
        if not follows_rules(caption):
            # No input is known to lead here; if one does, it must neither reach the model nor raise.
            cure = "please report this file"
            report(codes.COMPILED_AGAINST_RULES, "this caption was compiled wrongly", at, cure)
            return
        self.captions.append(CompiledCaption(name, caption, encoded, self.source.span(*at), origin))

    def _size(self, line: SizeLine) -> Size | None:
        if 1 <= line.width <= 65536 and 1 <= line.height <= 65536:
            return line.width, line.height
        self.report(
            codes.BAD_SIZE,
            "no image has this size",
            line.at,
            "write width x height in pixels: `size: 1536x1024`",
        )
        return self.image_size

    def _style(self, style: Style, body: Sequence[Statement], at: At) -> dict[str, Any] | None:
        """The JSON style, or ``None`` after reporting what it lacks."""
        texts = style.texts
        order = STYLE_PHOTO if "photo" in texts else STYLE_ART
        try:
            built: dict[str, Any] = {key: texts[key] for key in order[:4]}
        except KeyError:
            missing = [key for key in ("aesthetics", "lighting", "medium") if key not in texts]
            if "photo" not in texts and "art_style" not in texts:
                missing.insert(len(missing), "photo or art_style")
            line = next(
                (
                    li
                    for li in body
                    if isinstance(li, (StyleLine, PaletteLine)) or (isinstance(li, Field) and li.key in texts)
                ),
                None,
            )
            self.report(
                codes.INCOMPLETE_STYLE,
                f"this style lacks {_listed(missing)}",
                line.at if line else at,
                "add the missing lines, or start from a complete style with `style: NAME`",
            )
            return None
        if style.palette is not None and style.palette != DROPPED:
            built["color_palette"] = list(style.palette)
        return built

    def _element(self, line: Element, size: Size | None) -> dict[str, Any]:
        element: dict[str, Any] = {"type": line.kind}
        marks = line.marks
        words = [mark for mark in marks if mark.kind == "words"]
        if line.kind == "text" and not words:
            self._no_words(line)
        elif marks:
            box = resolve_box(marks, size, self.report)
            if box is not None:
                element["bbox"] = box
        if line.kind == "text":
            if len(words) == 1:
                element["text"] = words[0].value
            elif words:
                self.report(
                    codes.REPEATED, "this text has words twice", words[1].at, "keep one, or write two texts"
                )
        elif words:
            self.report(
                codes.MISPLACED,
                "an `obj` has no words",
                words[0].at,
                "write `text` instead of `obj`, or describe them behind the colon",
            )
        element["desc"] = line.desc
        colours = [mark for mark in marks if mark.kind == "colour"]
        if colours:
            found = self.library.colours(colours, 5, "an element", self.report)
            if found:
                element["color_palette"] = list(found)
        elif line.desc[-1:].isalnum():
            at_end = _COLOUR_AT_END.search(line.desc[-8:])
            if at_end:
                self.report(
                    codes.COLOUR_IN_PROSE,
                    f"`{at_end[1]}` is read as part of the description",
                    (line.at[1] - 7, line.at[1]),
                    "write colours in front of the colon",
                )
        return element

    def _no_words(self, line: Element) -> None:
        """Reports a text element without words, or with words that are not in quotes."""
        bare = [
            m for m in line.marks if m.kind == "place" and m.value not in PLACES and m.value not in REGIONS
        ]
        if bare:
            at = (min(mark.at[0] for mark in bare), max(mark.at[1] for mark in bare))
            said = self.source.text[slice(*at)]
            cure = f'put them in quotes: "{said}"'
            self.report(codes.UNQUOTED_WORDS, "these words stand outside of quotes", at, cure)
        else:
            cure = 'give them in front of the colon: text "STILL WATER": ...'
            self.report(codes.UNQUOTED_WORDS, "this text has no words", (line.at[0], line.at[0] + 4), cure)

    def _fill(self, caption: dict[str, Any], origin: SourceOrigin, at: At) -> dict[str, Any]:
        """Fills in placeholders and reports unknown ones."""
        self.used |= placeholders_in(caption)
        if self.placeholders is None:
            return caption
        for where, text in prose_of(caption):
            for match in PLACEHOLDER.finditer(text):
                if match[1] in self.placeholders or (where and where[-1] == "text"):
                    continue
                start, end = origin.find(where) or at
                found = self.source.text.find(match[0], start, end)
                place = (found, found + len(match[0])) if found >= 0 else (start, end)
                near = closest(match[1], self.placeholders)
                known = ", ".join(f"<{name}>" for name in sorted(self.placeholders)) or "none are defined"
                self.report(
                    codes.UNKNOWN_PLACEHOLDER,
                    f"there is no placeholder `{match[0]}`",
                    place,
                    f"did you mean `<{near}>`?" if near else f"the recipe's placeholders: {known}",
                )
        return fill_placeholders(caption, self.placeholders)

    def _look_at_styles(self) -> None:
        """Reports what is wrong in this file's styles that no caption asked for, too."""
        for name, (block, owner) in list(self.library.styles.items()):
            if owner.source is self.source:
                self.library.style(name, block.at, owner)


def _at_most(items: Sequence[Diagnostic]) -> tuple[Diagnostic, ...]:
    """Up to ``LIMIT`` errors, with the warnings between them; warnings are limited alike."""
    if len(items) <= LIMIT:
        return tuple(dict.fromkeys(items))
    kept: list[Diagnostic] = []
    counts = {True: 0, False: 0}
    for diagnostic in dict.fromkeys(items):
        counts[diagnostic.is_error] += 1
        if counts[diagnostic.is_error] <= LIMIT:
            kept.append(diagnostic)
    return tuple(kept)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _bare_names(placeholders: Mapping[str, str]) -> dict[str, str]:
    return {name.strip("<>"): value for name, value in placeholders.items()}


def prose_of(caption: dict[str, Any]) -> Iterator[tuple[Where, str]]:
    """Every string of a valid caption that can hold words, with its place; colours and types are none."""
    if "high_level_description" in caption:
        yield ("high_level_description",), caption["high_level_description"]
    for key, value in caption.get("style_description", {}).items():
        if key != "color_palette":
            yield ("style_description", key), value
    composition = caption["compositional_deconstruction"]
    yield ("compositional_deconstruction", "background"), composition["background"]
    for number, element in enumerate(composition["elements"]):
        for key in ("text", "desc"):
            if key in element:
                yield ("compositional_deconstruction", "elements", number, key), element[key]


def placeholders_in(caption: dict[str, Any]) -> set[str]:
    """The names of the placeholders in a valid caption."""
    return {name for _, text in prose_of(caption) if "<" in text for name in PLACEHOLDER.findall(text)}


def fill_placeholders(caption: dict[str, Any], placeholders: Mapping[str, str]) -> dict[str, Any]:
    """The caption with every known placeholder replaced, inside its strings; the argument is not changed.

    Args:
        caption: a valid caption.
        placeholders: name (with or without angle brackets) -> replacement; replacements are not looked at
            again.
    """
    names = _bare_names(placeholders)

    def fill(text: str) -> str:
        return PLACEHOLDER.sub(lambda match: names.get(match[1], match[0]), text) if "<" in text else text

    result = dict(caption)
    if "high_level_description" in result:
        result["high_level_description"] = fill(result["high_level_description"])
    if "style_description" in result:
        style = result["style_description"]
        result["style_description"] = {k: fill(v) if isinstance(v, str) else v for k, v in style.items()}
    composition = result["compositional_deconstruction"]
    elements = [
        {k: fill(v) if k in ("text", "desc") else v for k, v in element.items()}
        for element in composition["elements"]
    ]
    result["compositional_deconstruction"] = {
        "background": fill(composition["background"]),
        "elements": elements,
    }
    return result
