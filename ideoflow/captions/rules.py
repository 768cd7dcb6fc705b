"""The official rules of caption JSON: canonical key order, serialisation, and a fast validator.

:func:`follows_rules` answers yes or no in a few microseconds and is run on everything that is compiled;
:func:`violations` says what is wrong and where, and is run only after a no. Both are held against
``schemas/ideogram-caption.schema.json`` and an independent verifier by property tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_json as codes

ROOT = ("high_level_description", "style_description", "compositional_deconstruction")
STYLE_PHOTO = ("aesthetics", "lighting", "photo", "medium", "color_palette")
STYLE_ART = ("aesthetics", "lighting", "medium", "art_style", "color_palette")
COMPOSITION = ("background", "elements")
OBJ = ("type", "bbox", "desc", "color_palette")
TEXT = ("type", "bbox", "text", "desc", "color_palette")
STYLE_COLOURS = 16
ELEMENT_COLOURS = 5

Path = tuple[str | int, ...]
Violation = tuple[Code, str, Path, str]  # code, message, where, cure

_COLOUR = re.compile(r"#[0-9A-F]{6}")
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def _ordered(data: dict[str, Any], order: tuple[str, ...]) -> dict[str, Any]:
    keys = [key for key in order if key in data]
    if len(keys) < len(data):
        keys += [key for key in data if key not in order]
    return data if list(data) == keys else {key: data[key] for key in keys}


def canonical(caption: dict[str, Any]) -> dict[str, Any]:
    """The caption with its keys in the order that the model was trained with; unknown keys go last.

    Values are shared with the argument, never changed. Parts that are not of the expected kind are left
    as they are, for :func:`violations` to name.
    """
    result = dict(_ordered(caption, ROOT))
    style = result.get("style_description")
    if isinstance(style, dict):
        result["style_description"] = _ordered(style, STYLE_PHOTO if "photo" in style else STYLE_ART)
    composition = result.get("compositional_deconstruction")
    if isinstance(composition, dict):
        composition = dict(_ordered(composition, COMPOSITION))
        elements = composition.get("elements")
        if isinstance(elements, list):
            composition["elements"] = [
                _ordered(element, TEXT) if isinstance(element, dict) else element for element in elements
            ]
        result["compositional_deconstruction"] = composition
    return result


def to_json(caption: dict[str, Any]) -> str:
    """The caption on one line as the model reads it: canonical key order, ``,`` and ``:`` without spaces,
    characters beyond ASCII as themselves.

    Raises:
        ValueError: NaN or an infinity inside, which JSON does not have.
    """
    return _encode(canonical(caption))


def follows_rules(caption: Any) -> bool:
    """Whether a caption follows every rule, key order included."""
    if type(caption) is not dict:
        return False
    keys = tuple(caption)
    if keys[-1:] != ("compositional_deconstruction",) or not _in_order(keys, ROOT):
        return False
    if not isinstance(caption.get("high_level_description", ""), str):
        return False
    if "style_description" in caption:
        style = caption["style_description"]
        if type(style) is not dict:
            return False
        order = STYLE_PHOTO if "photo" in style else STYLE_ART
        names = tuple(style)
        with_palette = names == order and _colours(style["color_palette"], STYLE_COLOURS)
        if names != order[:4] and not with_palette:
            return False
        for name in order[:4]:
            if not isinstance(style[name], str):
                return False
    composition = caption["compositional_deconstruction"]
    if type(composition) is not dict or tuple(composition) != COMPOSITION:
        return False
    elements = composition["elements"]
    if not isinstance(composition["background"], str) or type(elements) is not list:
        return False
    return all(map(_element_follows_rules, elements))


def _element_follows_rules(element: Any) -> bool:
    if type(element) is not dict:
        return False
    kind = element.get("type")
    if kind == "text":
        if not _in_order(tuple(element), TEXT) or not isinstance(element.get("text"), str):
            return False
    elif kind != "obj" or not _in_order(tuple(element), OBJ):
        return False
    if not isinstance(element.get("desc"), str):
        return False
    if "bbox" in element:
        box = element["bbox"]
        if type(box) is not list or len(box) != 4:
            return False
        for value in box:
            if type(value) is not int:
                return False
        if not (0 <= box[0] <= box[2] <= 1000 and 0 <= box[1] <= box[3] <= 1000):
            return False
    return "color_palette" not in element or _colours(element["color_palette"], ELEMENT_COLOURS)


def _in_order(keys: tuple[Any, ...], order: tuple[str, ...]) -> bool:
    at = 0
    for key in order:
        if at < len(keys) and keys[at] == key:
            at += 1
    return at == len(keys)


def _colours(palette: Any, most: int) -> bool:
    if type(palette) is not list or not 1 <= len(palette) <= most:
        return False
    return all(type(colour) is str and _COLOUR.fullmatch(colour) for colour in palette)


def violations(caption: Any) -> Iterator[Violation]:
    """Every rule that a caption breaks; nothing exactly where :func:`follows_rules` is true."""
    if type(caption) is not dict:
        yield codes.NOT_A_CAPTION, f"a caption is an object, not {_kind(caption)}", (), "write { ... }"
        return
    yield from _members(caption, ROOT, ("compositional_deconstruction",), ())
    yield from _strings(caption, ("high_level_description",), ())
    if "style_description" in caption:
        yield from _style(caption["style_description"], ("style_description",))
    composition = caption.get("compositional_deconstruction", {"background": "", "elements": []})
    where: Path = ("compositional_deconstruction",)
    if type(composition) is not dict:
        yield _wrong(composition, "an object", where)
        return
    yield from _members(composition, COMPOSITION, COMPOSITION, where)
    yield from _strings(composition, ("background",), where)
    elements = composition.get("elements", [])
    if type(elements) is not list:
        yield _wrong(elements, "a list", (*where, "elements"))
        return
    for number, element in enumerate(elements):
        yield from _element(element, (*where, "elements", number))


def _style(style: Any, where: Path) -> Iterator[Violation]:
    if type(style) is not dict:
        yield _wrong(style, "an object", where)
        return
    if ("photo" in style) == ("art_style" in style):
        found = "both photo and art_style" if "photo" in style else "neither photo nor art_style"
        yield codes.STYLE_KIND, f"the style has {found}", where, "a style has exactly one of the two"
    order = STYLE_PHOTO if "photo" in style else STYLE_ART
    known = (*order, "art_style") if order is STYLE_PHOTO else (*order, "photo")
    yield from _members(style, known, ("aesthetics", "lighting", "medium"), where)
    yield from _strings(style, ("aesthetics", "lighting", "photo", "medium", "art_style"), where)
    if "color_palette" in style:
        yield from _palette(style["color_palette"], STYLE_COLOURS, (*where, "color_palette"))


def _element(element: Any, where: Path) -> Iterator[Violation]:
    if type(element) is not dict:
        yield _wrong(element, "an object", where)
        return
    kind = element.get("type")
    if "type" in element and kind not in ("obj", "text"):
        yield codes.ELEMENT_TYPE, "type is neither obj nor text", (*where, "type"), 'write "obj" or "text"'
    order = OBJ if kind == "obj" else TEXT
    yield from _members(
        element, order, ("type", "text", "desc") if kind == "text" else ("type", "desc"), where
    )
    yield from _strings(element, ("text", "desc"), where)
    if "bbox" in element:
        yield from _bbox(element["bbox"], (*where, "bbox"))
    if "color_palette" in element:
        yield from _palette(element["color_palette"], ELEMENT_COLOURS, (*where, "color_palette"))


def _members(
    data: dict[Any, Any], order: tuple[str, ...], required: tuple[str, ...], where: Path
) -> Iterator[Violation]:
    for key in data:
        if key not in order:
            yield (
                codes.UNKNOWN_MEMBER,
                f"`{str(key)[:40]}` is no key of a caption",
                (*where, key),
                f"the keys here are {', '.join(order)}",
            )
    for key in required:
        if key not in data:
            yield codes.MISSING_MEMBER, f"`{key}` is missing", where, f"add `{key}`"
    known = tuple(key for key in data if key in order)
    if not _in_order(known, order):
        right = ", ".join(key for key in order if key in data)
        yield codes.KEY_ORDER, "the keys are out of order", where, f"the order is {right}"


def _strings(data: dict[str, Any], names: tuple[str, ...], where: Path) -> Iterator[Violation]:
    for name in names:
        if name in data and not isinstance(data[name], str):
            yield _wrong(data[name], "a string", (*where, name))


def _bbox(box: Any, where: Path) -> Iterator[Violation]:
    if type(box) is not list or len(box) != 4 or any(type(value) is not int for value in box):
        yield (codes.BBOX, "a box is four whole numbers", where, "write [y_min, x_min, y_max, x_max]")
        return
    if any(not 0 <= value <= 1000 for value in box):
        yield (
            codes.BBOX,
            "a coordinate is outside of 0 to 1000",
            where,
            "boxes count in thousandths of the image",
        )
    for axis, low, high in (("y", box[0], box[2]), ("x", box[1], box[3])):
        if low > high:
            yield (codes.BBOX, f"{axis}_min is above {axis}_max", where, "write [y_min, x_min, y_max, x_max]")


def _palette(palette: Any, most: int, where: Path) -> Iterator[Violation]:
    if type(palette) is not list:
        yield _wrong(palette, "a list", where)
    elif not 1 <= len(palette) <= most:
        yield codes.PALETTE, f"{len(palette)} colours in a palette", where, f"a palette here has 1 to {most}"
    else:
        for number, colour in enumerate(palette):
            if type(colour) is not str or not _COLOUR.fullmatch(colour):
                shown = colour if isinstance(colour, str) and len(colour) < 20 else _kind(colour)
                yield (
                    codes.PALETTE,
                    f"{shown} is not #RRGGBB in capitals",
                    (*where, number),
                    "write for example #1B3A5C",
                )


def _wrong(value: Any, wanted: str, where: Path) -> Violation:
    return codes.WRONG_TYPE, f"`{where[-1]}` is {_kind(value)}, not {wanted}", where, f"write {wanted}"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return "a number"
    kinds: tuple[tuple[type, str], ...] = ((str, "a string"), (list, "a list"), (dict, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)
