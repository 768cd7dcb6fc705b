"""Checks of sense: captions that follow every rule and still teach the model something wrong.

One function a check, each with its own code. A check takes what it looks at and yields findings; it guesses
only where a wrong guess costs a warning. Positions are compared with a margin, so that "on the left" is
only doubted where the whole box lies on the right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ideoflow.captions.emit import placeholders_in, prose_of
from ideoflow.captions.rules import Path as Where
from ideoflow.captions.rules import to_json, violations
from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_json as codes

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_TOKENS = 2048
MOST_WORDS = 50
COLOUR_DISTANCE = 0.15  # in OKLab, where 0.02 is just visible and 1 is black to white

Finding = tuple[Code, str, Where, str]
Element = tuple[Where, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known beside the caption itself, for the checks that need it."""

    placeholders: Collection[str] = ()
    image: Image | None = None
    count_tokens: Callable[[str], int] | None = None


def check_caption(
    caption: Any,
    *,
    path: str = "<caption>",
    locate: Callable[[Where], Span | None] | None = None,
    placeholders: Collection[str] = (),
    image: Image | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> tuple[Diagnostic, ...]:
    """Everything that is or looks wrong with one caption: the rules first, and if they hold, the sense.

    Args:
        caption: JSON data in canonical form.
        path: the file, for messages.
        locate: finds the place of a part (``CompiledCaption.locate``); without it messages name the file.
        placeholders: names of placeholders of which the caption should use one.
        image: the picture, for the palette check.
        count_tokens: JSON caption -> tokens with the chat template, for the length check.
    """
    found: list[Finding] = list(violations(caption))
    if not found:
        known = Known(placeholders, image, count_tokens)
        for check in CHECKS:
            found += check(caption, known)
    return tuple(
        Diagnostic(
            code, message, (locate(where) if locate else None) or Span(path), cure, severity=code.severity
        )
        for code, message, where, cure in found
    )


def _elements(caption: dict[str, Any]) -> Iterator[Element]:
    for number, element in enumerate(caption["compositional_deconstruction"]["elements"]):
        yield ("compositional_deconstruction", "elements", number), element


def zero_area(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Boxes whose sides coincide."""
    for where, element in _elements(caption):
        box = element.get("bbox")
        if box and (box[0] == box[2] or box[1] == box[3]):
            yield codes.ZERO_AREA, "this box covers nothing", (*where, "bbox"), "look at its two sides again"


# Words that say what shape the thing itself has; only the beginning of a description is about the thing.
_TALL = re.compile(
    r"\b(?:tall|towering|upright|(?<!third )vertical|skyscraper|lighthouse|obelisk|flagpole|lamppost)\b", re.I
)
_WIDE = re.compile(r"\b(?:wide|horizontal|panoramic|sprawling|reclining|lying)\b", re.I)
_TURNED = re.compile(
    r"\b(?:vertical\w*|rotated|sideways|stacked|upright|column|curved|arc|circular|diagonal\w*)\b", re.I
)
_LATIN_LINE = re.compile(r"[A-Za-zÀ-ɏ0-9 '&.,!?-]{8,}")


def swapped_box(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Boxes with the shape that the words deny: x and y were probably exchanged."""
    for where, element in _elements(caption):
        box = element.get("bbox")
        if not box or box[0] == box[2] or box[1] == box[3]:
            continue
        shape = (box[3] - box[1]) / (box[2] - box[0])  # width over height
        head = " ".join(element["desc"].split()[:8])
        tall, wide = bool(_TALL.search(head)), bool(_WIDE.search(head))
        said = ""
        if tall and not wide and shape >= 2:
            said = "the words say tall, and the box is wide"
        elif wide and not tall and shape <= 0.5:
            said = "the words say wide, and the box is tall"
        elif (
            element["type"] == "text"
            and shape <= 0.4
            and _LATIN_LINE.fullmatch(element["text"])
            and not _TURNED.search(element["desc"])
        ):
            said = "one line of text stands in a box that is much taller than wide"
        if said:
            fits = f"y{box[1]}..{box[3]} x{box[0]}..{box[2]}"
            yield codes.SWAPPED_BOX, said, (*where, "bbox"), f"with the axes exchanged it would be {fits}"


_FRAME = r"of the (?:image|frame|picture|photo|photograph|scene|composition|canvas|page|poster|shot)"
_PART = rf"(?:[- ](?:hand )?(?:side|edge|corner|half)\b| {_FRAME}\b)"
_POSITION = re.compile(
    r"\b(?:(?P<third>left|right|top|upper|bottom|lower)[- ]third\b"
    rf"|(?:at|in|on|along|near|to) the (?:far |extreme |very )?"
    rf"(?:(?P<both_y>upper|lower|top|bottom)[- ](?P<both_x>left|right)(?:{_PART}|(?=[,.;]|$))"
    rf"|(?P<x>left|right)(?:{_PART}|(?=[,.;]|$))|(?P<y>top|bottom)(?:[- ](?:edge|half)\b| {_FRAME}\b)))",
    re.I,
)
_THIRD = {
    "left": (1, 0, 333),
    "right": (1, 667, 1000),
    "top": (0, 0, 333),
    "upper": (0, 0, 333),
    "bottom": (0, 667, 1000),
    "lower": (0, 667, 1000),
}
_HALF = {
    "left": (1, 0, 500),
    "right": (1, 500, 1000),
    "top": (0, 0, 500),
    "upper": (0, 0, 500),
    "bottom": (0, 500, 1000),
    "lower": (0, 500, 1000),
}


def words_against_box(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Left, right, top or bottom of the image in the words, and a box wholly on the other side."""
    for where, element in _elements(caption):
        box = element.get("bbox")
        if not box:
            continue
        claims: list[tuple[str, tuple[int, int, int]]] = []
        for match in _POSITION.finditer(element["desc"]):
            if match["third"]:
                claims.append((match["third"], _THIRD[match["third"].lower()]))
            for group in ("both_x", "both_y", "x", "y"):
                if match[group]:
                    claims.append((match[group], _HALF[match[group].lower()]))
        against = [word for word, claim in claims if not _meets(box, claim)]
        if against:
            swapped = [box[1], box[0], box[3], box[2]]
            cure = "correct the words or the box"
            if all(_meets(swapped, claim) for _, claim in claims):
                cure = f"with the axes exchanged it would fit: y{box[1]}..{box[3]} x{box[0]}..{box[2]}"
            yield (
                codes.WORDS_AGAINST_BOX,
                f"the words say {against[0].lower()}, and the box lies elsewhere",
                (*where, "bbox"),
                cure,
            )


def _meets(box: list[int], claim: tuple[int, int, int]) -> bool:
    axis, low, high = claim
    return box[axis] < high and box[axis + 2] > low


def same_text(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Two text elements with the same words in the same place."""
    seen: dict[str, list[Any]] = {}
    for where, element in _elements(caption):
        if element["type"] == "text" and element["text"].strip():
            box = element.get("bbox")
            others = seen.setdefault(" ".join(element["text"].split()), [])
            if any(box is None or other is None or _overlap(box, other) > 0.5 for other in others):
                yield (
                    codes.SAME_TEXT,
                    "these words stand in another element already",
                    (*where, "text"),
                    "keep one, or give both their own boxes",
                )
            others.append(box)


def _overlap(a: list[int], b: list[int]) -> float:
    """Intersection over union of two boxes."""
    height = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    both = height * width
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union else 0.0


def text_without_words(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Text elements whose text is empty."""
    for where, element in _elements(caption):
        if element["type"] == "text" and not element["text"].strip():
            yield (
                codes.TEXT_WITHOUT_WORDS,
                "this text element has no words",
                (*where, "text"),
                "write the words, or describe it as an obj",
            )


def too_long(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Captions over the model's 2048 tokens; needs a tokenizer."""
    if known.count_tokens is not None:
        tokens = known.count_tokens(to_json(caption))
        if tokens > MOST_TOKENS:
            yield (
                codes.TOO_LONG,
                f"{tokens} tokens, and the model reads {MOST_TOKENS}",
                (),
                "shorten descriptions, or leave minor elements out",
            )


def colour_not_in_image(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Palette colours that no part of the picture comes near; needs the picture."""
    if known.image is None:
        return
    palettes: list[tuple[Where, list[str], list[int] | None]] = []
    style = caption.get("style_description", {})
    if "color_palette" in style:
        palettes.append((("style_description", "color_palette"), style["color_palette"], None))
    for where, element in _elements(caption):
        if "color_palette" in element:
            palettes.append(((*where, "color_palette"), element["color_palette"], element.get("bbox")))
    if not palettes:
        return
    from ideoflow.captions.colours import nearest_distance

    for where, palette, box in palettes:
        for number, distance in enumerate(nearest_distance(known.image, palette, box)):
            if distance > COLOUR_DISTANCE:
                place = "in its box" if box else "in the picture"
                yield (
                    codes.COLOUR_NOT_IN_IMAGE,
                    f"nothing {place} comes near {palette[number]}",
                    (*where, number),
                    "take the colour from the picture, or leave it out",
                )


_SURFACE = re.compile(
    r"(?:(?:a|an|the)\s+)?(?:[\w-]+,?\s+){0,3}?(?:sky|ground|floor|background|backdrop|ocean|sea|wall|lawn)"
    r"(?=\s*(?:[,;.]|$)|\s+(?:with|in|of|at|behind|above|below|beneath|filling|covering|under)\b)",
    re.I,
)


def background_as_element(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Elements that are the surface behind everything else."""
    for where, element in _elements(caption):
        if element["type"] != "obj" or not _SURFACE.match(element["desc"][:120]):
            continue
        box = element.get("bbox")
        if box is None or (box[2] - box[0]) * (box[3] - box[1]) >= 500_000:
            yield (
                codes.BACKGROUND_AS_ELEMENT,
                "this is a background rather than an element",
                (*where, "desc"),
                "move the description to `background`",
            )


def long_description(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Element descriptions over 50 words."""
    for where, element in _elements(caption):
        words = len(element["desc"].split())
        if words > MOST_WORDS:
            yield (
                codes.LONG_DESCRIPTION,
                f"{words} words, and {MOST_WORDS} are a good limit",
                (*where, "desc"),
                "shorten it, or describe the parts as elements",
            )


def unused_placeholder(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """A caption that uses none of the placeholders it should."""
    if known.placeholders and not placeholders_in(caption) & {
        name.strip("<>") for name in known.placeholders
    }:
        names = " or ".join(f"<{name.strip('<>')}>" for name in sorted(known.placeholders))
        yield (
            codes.UNUSED_PLACEHOLDER,
            f"no {names} in this caption",
            (),
            "write it where the subject is named",
        )


def empty_background(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """A background without a word."""
    if not caption["compositional_deconstruction"]["background"].strip():
        where = ("compositional_deconstruction", "background")
        yield (
            codes.EMPTY_BACKGROUND,
            "the background is not described",
            where,
            "say what is behind the elements",
        )


def empty_description(caption: dict[str, Any], known: Known) -> Iterator[Finding]:
    """Elements, styles or whole images described with no words."""
    for where, text in prose_of(caption):
        if not text.strip() and where[-1] not in ("background", "text"):
            yield codes.EMPTY_DESCRIPTION, f"`{where[-1]}` is empty", where, "write it, or leave the part out"


CHECKS: tuple[Callable[[dict[str, Any], Known], Iterator[Finding]], ...] = (
    zero_area,
    swapped_box,
    words_against_box,
    same_text,
    text_without_words,
    too_long,
    colour_not_in_image,
    background_as_element,
    long_description,
    unused_placeholder,
    empty_background,
    empty_description,
)
