"""From canonical JSON captions to the caption language; compiling the result gives the same bytes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ideoflow.captions.format import format_document
from ideoflow.captions.nodes import (
    STYLE_TEXTS,
    Block,
    Colour,
    Document,
    Element,
    Field,
    Item,
    Mark,
    PaletteLine,
    Statement,
    StyleLine,
)
from ideoflow.captions.parser import normalised
from ideoflow.captions.rules import follows_rules, violations
from ideoflow.diagnostics import Diagnostic, IdeoflowError

Texts = tuple[tuple[str, str], ...]  # a style's texts, in the order of its keys


class _Shared:
    """A style that several captions have in common."""

    def __init__(self, name: str, texts: Texts, palette: tuple[str, ...] | None) -> None:
        self.name = name
        self.texts = texts
        self.palette = palette

    def block(self) -> Block:
        body: list[Statement] = [Field(key, value) for key, value in self.texts]
        if self.palette:
            body.append(_palette(self.palette))
        return Block("style", self.name, tuple(body))


def decompile_caption(
    captions: Sequence[tuple[str | None, dict[str, Any]]], *, share_styles: bool = False
) -> str:
    """The caption language for canonical captions.

    Args:
        captions: (image name, caption) each; a single caption without a name (``None`` or empty)
            becomes a sidecar file.
        share_styles: define styles that occur more than once in front, and refer to them.

    Raises:
        IdeoflowError: a caption does not follow the rules; ``read_json_caption`` repairs what can be.
        ValueError: several captions, and one has no name.
    """
    for name, caption in captions:
        if not name and len(captions) > 1:
            raise ValueError("captions without an image name cannot share a file")
        if not follows_rules(caption):
            raise IdeoflowError(
                [Diagnostic(code, message, None, cure) for code, message, _, cure in violations(caption)]
            )
    shared = _shared_styles([caption for _, caption in captions]) if share_styles else []
    items: list[Item] = [style.block() for style in shared]
    for name, caption in captions:
        body = _statements(caption, shared)
        if not name:
            items += body
        else:
            items.append(Block("image", name, tuple(body)))
    return format_document(normalised(Document(tuple(items))))


def _statements(caption: dict[str, Any], shared: Sequence[_Shared]) -> list[Statement]:
    lines: list[Statement] = []
    if "high_level_description" in caption:
        lines.append(Field("description", caption["high_level_description"]))
    if "style_description" in caption:
        lines += _style(caption["style_description"], shared)
    composition = caption["compositional_deconstruction"]
    lines.append(Field("background", composition["background"]))
    for element in composition["elements"]:
        marks: list[Mark] = []
        if "bbox" in element:
            y_min, x_min, y_max, x_max = element["bbox"]
            marks = [Mark("y", f"{y_min}..{y_max}"), Mark("x", f"{x_min}..{x_max}")]
        marks += [Mark("colour", colour) for colour in element.get("color_palette", ())]
        if element["type"] == "text":
            marks.append(Mark("words", element["text"]))
        lines.append(Element(element["type"], tuple(marks), element["desc"]))
    return lines


def _palette(colours: Sequence[str]) -> PaletteLine:
    return PaletteLine(tuple(Colour(colour) for colour in colours))


def _texts(style: dict[str, Any]) -> Texts:
    return tuple((key, style[key]) for key in STYLE_TEXTS if key in style)


def _style(style: dict[str, Any], shared: Sequence[_Shared]) -> list[Statement]:
    texts = _texts(style)
    palette = tuple(style.get("color_palette", ()))
    base, differing, saved = None, texts, 0
    for candidate in shared:
        own = tuple(pair for pair in texts if pair not in candidate.texts)
        won = (
            sum(len(k) + len(v) for k, v in texts)
            - sum(len(k) + len(v) for k, v in own)
            - len(candidate.name)
            - 8
        )
        won -= 15 if candidate.palette and candidate.palette != palette else 0
        if won > saved:
            base, differing, saved = candidate, own, won
    lines: list[Statement] = [Field(key, value) for key, value in differing]
    if base is None:
        return [*lines, _palette(palette)] if palette else lines
    lines.insert(0, StyleLine(base.name))
    if palette and palette != base.palette:
        lines.append(_palette(palette))
    elif base.palette and not palette:
        lines.append(PaletteLine((Colour("none"),)))
    return lines


def _shared_styles(captions: Sequence[dict[str, Any]]) -> list[_Shared]:
    """The styles whose texts occur more than once; with a palette where most of those have the same."""
    styles = [caption["style_description"] for caption in captions if "style_description" in caption]
    counts = Counter(_texts(style) for style in styles)
    taken: set[str] = set()
    found: list[_Shared] = []
    for texts, count in counts.items():
        if count < 2:
            continue
        palettes = Counter(
            tuple(style.get("color_palette", ())) for style in styles if _texts(style) == texts
        )
        palette, uses = palettes.most_common(1)[0]
        found.append(_Shared(_name(texts, taken), texts, palette if palette and uses * 2 > count else None))
    return found


def _name(texts: Texts, taken: set[str]) -> str:
    """A short name out of the style's own words."""
    words = dict(texts)
    said = unicodedata.normalize("NFKD", (words.get("photo") or words.get("art_style") or "")[:200])
    slug = "-".join(re.findall(r"[a-z][a-z0-9]*", said.lower())[:3])[:40] or "style"
    name, number = slug, 2
    while name in taken or name == "none":
        name, number = f"{slug}-{number}", number + 1
    taken.add(name)
    return name
