"""JSON captions as they come: read, repaired where nothing can be lost, reported where something could.

A repair may change the order of keys, the spelling of keys and colours, and the layout; it never changes a
word. Every kind of repair is reported once a caption, as a note. What could be repaired in two ways is an
error that names both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from ideoflow.captions.emit import placeholders_in
from ideoflow.captions.jsonplaces import MOST_DEPTH, JsonOrigin, Where
from ideoflow.captions.result import CompiledCaption, CompileResult
from ideoflow.captions.rules import (
    COMPOSITION,
    ROOT,
    STYLE_ART,
    TEXT,
    canonical,
    follows_rules,
    to_json,
    violations,
)
from ideoflow.captions.source import Source
from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_json as codes
from ideoflow.diagnostics.codes.caption_language import CONTROL_CHARACTER

# Spellings seen in the wild, by level; keys are compared without case, "-" and " " as "_".
_PALETTE_NAMES = dict.fromkeys(
    ("colour_palette", "palette", "colors", "colours", "colorpalette"), "color_palette"
)
_RENAMES = {
    "root": {
        "high_level_desc": "high_level_description",
        "description": "high_level_description",
        "style": "style_description",
        "composition": "compositional_deconstruction",
    },
    "style": {**_PALETTE_NAMES, "aesthetic": "aesthetics", "artstyle": "art_style", "photography": "photo"},
    "composition": {"objects": "elements", "bg": "background"},
    "element": {
        **_PALETTE_NAMES,
        "description": "desc",
        "bounding_box": "bbox",
        "box": "bbox",
        "boundingbox": "bbox",
        "bbox_2d": "bbox",
    },
}
_KNOWN = {"root": ROOT, "style": (*STYLE_ART, "photo"), "composition": COMPOSITION, "element": TEXT}
_FENCE = re.compile(r"```[ \t]*(?:json|JSON)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL)
_SHORT_HEX = re.compile(r"#?([0-9A-Fa-f]{3}|[0-9A-Fa-f]{6})")
_SURROGATE = re.compile("[\ud800-\udfff]")
_RAW_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


class _Duplicates(dict[str, Any]):
    """An object that had a key twice, with two values."""

    twice: tuple[str, ...] = ()


def read_json_caption(text: str, *, path: str = "<caption>") -> CompileResult:
    """Reads one JSON caption, in any layout, and repairs it losslessly; never raises, whatever the text.

    Returns:
        One caption, or none and at least one error. Repairs are notes (IC41x).
    """
    source = Source(path, text)
    reader = _Reader(source, text)
    caption = reader.read()
    diagnostics = tuple(reader.diagnostics)
    if caption is None:
        return CompileResult((), diagnostics)
    compiled = CompiledCaption(None, caption, to_json(caption), Span(path, 1, 1, 1, 2), reader.origin)
    return CompileResult((compiled,), diagnostics, frozenset(placeholders_in(caption)))


class _Reader:
    def __init__(self, source: Source, text: str) -> None:
        self.source = source
        self.diagnostics: list[Diagnostic] = []
        self.origin = JsonOrigin(source)
        self.layout: list[str] = ["a byte order mark"] if source.text != text else []
        self.body = source.text

    def say(self, code: Code, message: str, where: Where | Span, cure: str = "") -> None:
        span = where if isinstance(where, Span) else self.origin.locate(where)
        self.diagnostics.append(Diagnostic(code, message, span, cure, severity=code.severity))

    def read(self) -> dict[str, Any] | None:
        """The repaired caption, or ``None`` after an error."""
        data = self._parse()
        if self.diagnostics:
            return None
        if not isinstance(data, dict):
            hint = "write { ... }"
            if isinstance(data, list):
                hint = "a list of captions belongs in a .jsonl file, one on a line"
            elif isinstance(data, str) and data.lstrip()[:1] == "{":
                hint = "this is JSON inside a JSON string: take the outer quotes and escapes off"
            self.say(codes.NOT_A_CAPTION, "this JSON is no object", (), hint)
            return None
        if not {*ROOT, *_RENAMES["root"]} & {_plain(key) for key in data}:
            self.say(
                codes.NOT_A_CAPTION,
                "this JSON has none of a caption's keys",
                (),
                "a caption has `compositional_deconstruction` at least",
            )
            return None
        repaired = self._root(data)
        if repaired is not data and self._has_errors():
            return None
        result = canonical(repaired)
        if not self._has_errors() and follows_rules(result):
            self._report_layout(data, repaired, result)
            return result
        told = {d.span for d in self.diagnostics if d.is_error}
        for code, message, where, cure in violations(result):
            if code is not codes.KEY_ORDER and self.origin.locate(where) not in told:
                self.say(code, message, where, cure)
        return None

    def _has_errors(self) -> bool:
        return any(d.is_error for d in self.diagnostics)

    # -- reading -----------------------------------------------------------------------------------------

    def _parse(self) -> Any:
        text = self.body
        fence = _FENCE.fullmatch(text.strip())
        if fence:
            self.layout.append("a Markdown fence")
            self.origin.offset = text.index("```") + fence.start(1)
            self.body = text = fence.group(1)
        odd: list[str] = []

        def constant(word: str) -> int:
            odd.append(word)
            return 0

        decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=constant, parse_int=_integer)
        try:
            try:
                data = decoder.decode(text)
            except json.JSONDecodeError as error:
                if not error.msg.startswith("Invalid control character"):
                    raise
                raw = _RAW_CONTROL.search(text)
                if raw:
                    at = self.origin.offset + raw.start()
                    self.say(
                        CONTROL_CHARACTER,
                        f"the character U+{ord(raw[0]):04X} is not text",
                        self.source.span(at, at + 1),
                        f"delete it, or write \\u{ord(raw[0]):04x}",
                    )
                    return None
                decoder.strict = False
                decoder.scan_once = json.scanner.make_scanner(decoder)  # type: ignore[attr-defined]
                data = decoder.decode(text)
                self.layout.append("line breaks inside of strings, now \\n")
        except json.JSONDecodeError as error:
            at = self.origin.offset + error.pos
            self.say(
                codes.NOT_JSON,
                f"this is not valid JSON: {error.msg[0].lower()}{error.msg[1:]}",
                self.source.span(at, at + 1),
                _json_cure(text, error),
            )
            return None
        except RecursionError:
            self.say(
                codes.TOO_DEEP,
                "this JSON is nested too deep",
                Span(self.source.path, 1, 1, 1, 2, text[:80]),
                "a caption nests five levels deep",
            )
            return None
        if odd:
            at = self.origin.offset + max(text.find(odd[0]), 0)
            self.say(
                codes.NOT_A_NUMBER,
                f"{odd[0]} is no JSON number",
                self.source.span(at, at + len(odd[0])),
                "measure the value again",
            )
        return data if self._sound(data) else None

    def _sound(self, data: Any) -> bool:
        """Looks for what no repair can mend: half characters, double keys, endless nesting. Iterative."""
        stack: list[tuple[Where, Any]] = [((), data)]
        while stack:
            where, value = stack.pop()
            if isinstance(value, str):
                if not value.isascii() and _SURROGATE.search(value):
                    self.say(
                        codes.HALF_SURROGATE, "half of a character", where, "the text was cut: write it again"
                    )
            elif isinstance(value, (dict, list)):
                if len(where) >= MOST_DEPTH:
                    self.say(
                        codes.TOO_DEEP, "this JSON is nested too deep", (), "a caption nests five levels deep"
                    )
                    return False
                if isinstance(value, _Duplicates):
                    self.layout.append("a key that stood twice")
                    for key in value.twice:
                        self.say(
                            codes.DUPLICATE_KEY,
                            f"`{key[:40]}` stands twice, with two values",
                            (*where, key),
                            "keep one of the two",
                        )
                pairs: Iterable[tuple[str | int, Any]] = (
                    value.items() if isinstance(value, dict) else enumerate(value)
                )
                for name, inner in pairs:
                    if isinstance(name, str) and _SURROGATE.search(name):
                        self.say(
                            codes.HALF_SURROGATE, "half of a character in a key", where, "write the key again"
                        )
                    elif type(inner) is not int:
                        stack.append(((*where, name), inner))
        return not self.diagnostics

    def _report_layout(self, data: dict[str, Any], repaired: dict[str, Any], result: dict[str, Any]) -> None:
        if json.dumps(result) != json.dumps(repaired):
            self.say(
                codes.REPAIRED_ORDER, "the keys are in the order that the model was trained with now", ()
            )
        compact = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        if self.layout or (compact != self.body.strip()):
            what = ", ".join(self.layout) or "spaces, line breaks or escapes"
            self.say(codes.REPAIRED_LAYOUT, f"the layout is canonical now (was: {what})", ())

    # -- repair ------------------------------------------------------------------------------------------

    def _root(self, data: dict[str, Any]) -> dict[str, Any]:
        result = self._rename(data, "root", ())
        self._drop_empty(result, ("high_level_description", "style_description"), (), (None, {}))
        style = result.get("style_description")
        if isinstance(style, dict):
            result["style_description"] = self._style(style)
        composition = result.get("compositional_deconstruction")
        if isinstance(composition, dict):
            where: Where = ("compositional_deconstruction",)
            composition = self._rename(composition, "composition", where)
            elements = composition.get("elements")
            if isinstance(elements, list):
                composition["elements"] = [
                    self._element(element, (*where, "elements", number))
                    if isinstance(element, dict)
                    else element
                    for number, element in enumerate(elements)
                ]
            result["compositional_deconstruction"] = composition
        return result

    def _style(self, style: dict[str, Any]) -> dict[str, Any]:
        where: Where = ("style_description",)
        result = self._rename(style, "style", where)
        self._drop_empty(result, ("color_palette",), where, (None, []))
        for one, other in (("photo", "art_style"), ("art_style", "photo")):
            if result.get(other):
                self._drop_empty(result, (one,), where, (None, ""))
        self._palette(result, where)
        return result

    def _element(self, element: dict[str, Any], where: Where) -> dict[str, Any]:
        result = self._rename(element, "element", where)
        kind = result.get("type")
        if (
            isinstance(kind, str)
            and kind not in ("obj", "text")
            and _plain(kind) in ("obj", "object", "text")
        ):
            result["type"] = "text" if _plain(kind) == "text" else "obj"
            self._once(codes.REPAIRED_TYPE, f"`{kind}` is `{result['type']}` now", (*where, "type"))
        self._drop_empty(result, ("bbox", "color_palette"), where, (None, []))
        if result.get("type") == "obj":
            self._drop_empty(result, ("text",), where, (None, ""))
            if "text" in result:
                self.say(
                    codes.AMBIGUOUS,
                    "an obj with a text",
                    (*where, "text"),
                    'if the words are in the image, "type" is "text"; else they belong in desc',
                )
        self._palette(result, where)
        if "bbox" in result:
            self._box(result, (*where, "bbox"))
        return result

    def _rename(self, data: dict[str, Any], level: str, where: Where) -> dict[str, Any]:
        known, other = _KNOWN[level], _RENAMES[level]
        if all(key in known for key in data):
            return dict(data)
        result: dict[str, Any] = {}
        for key, value in data.items():
            name = key if key in known else _plain(key)
            name = other.get(name, name)
            if name == key or name not in known:
                result[key] = value
            elif name in data and data[name] != value:
                result[key] = value
                self.say(
                    codes.AMBIGUOUS,
                    f"`{key}` and `{name}` are the same part, with two values",
                    (*where, key),
                    "keep one of the two",
                )
            else:
                result[name] = value
                self._once(codes.REPAIRED_KEY, f"`{key}` is `{name}` now", (*where, key))
        return result

    def _drop_empty(
        self, data: dict[str, Any], names: tuple[str, ...], where: Where, empty: tuple[Any, ...]
    ) -> None:
        for name in names:
            if name in data and any(type(data[name]) is type(e) and data[name] == e for e in empty):
                del data[name]
                self._once(codes.REPAIRED_EMPTY, f"the empty `{name}` was left out", (*where, name))

    def _palette(self, data: dict[str, Any], where: Where) -> None:
        palette = data.get("color_palette")
        if not isinstance(palette, list):
            return
        mended = [_mend_colour(colour) for colour in palette]
        if mended != palette:
            data["color_palette"] = mended
            self._once(
                codes.REPAIRED_COLOUR, "colours are #RRGGBB in capitals now", (*where, "color_palette")
            )

    def _box(self, element: dict[str, Any], where: Where) -> None:
        box = element["bbox"]
        if not isinstance(box, list) or len(box) != 4:
            return
        numbers = [_number(value) for value in box]
        if any(number is None for number in numbers):
            return
        values: list[float] = [number for number in numbers if number is not None]
        if any(value != int(value) for value in values):
            fractions = all(0 <= value <= 1 for value in values)
            self.say(
                codes.AMBIGUOUS,
                "coordinates with a fraction",
                where,
                "these look like fractions of the image: multiply by 1000, and see that y comes first"
                if fractions
                else "round them as they were meant: boxes are whole thousandths",
            )
            return
        whole = [int(value) for value in values]
        if any(value > 1000 for value in whole) and all(value >= 0 for value in whole):
            self.say(
                codes.AMBIGUOUS,
                "coordinates above 1000",
                where,
                "if they are pixels, divide by the image's size and multiply by 1000",
            )
        elif whole[0] > whole[2] or whole[1] > whole[3]:
            self.say(
                codes.AMBIGUOUS,
                "a minimum above its maximum",
                where,
                "either two numbers changed places, or the order is another: [y_min, x_min, y_max, x_max]",
            )
        if any(type(value) is not int for value in box):
            element["bbox"] = whole
            self._once(codes.REPAIRED_NUMBER, "coordinates are whole numbers now", where)

    def _once(self, code: Code, message: str, where: Where) -> None:
        """A repair of one kind is told once a caption; the first place stands for all."""
        if all(d.code is not code for d in self.diagnostics):
            self.say(code, message, where)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) == len(pairs):
        return result
    kept = _Duplicates()
    for key, value in pairs:
        if key in kept and kept[key] != value:
            kept.twice = (*kept.twice, key)
        kept.setdefault(key, value)
    return kept


def _integer(digits: str) -> int:
    # Python refuses to read numbers of thousands of digits; any beyond this is out of range just the same.
    return int(digits[:18])


def _plain(key: str) -> str:
    return key.strip().casefold().replace("-", "_").replace(" ", "_") if len(key) < 64 else key


def _mend_colour(colour: Any) -> Any:
    match = _SHORT_HEX.fullmatch(colour.strip()) if isinstance(colour, str) and len(colour) < 16 else None
    if match is None:
        return colour
    digits = match[1].upper()
    return "#" + (digits if len(digits) == 6 else "".join(2 * digit for digit in digits))


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}(\.\d{1,6})?", value):
        return float(value)
    if isinstance(value, (int, float)) and abs(value) < 1e9:
        return value
    return None


def _json_cure(text: str, error: json.JSONDecodeError) -> str:
    before = text[: error.pos].rstrip()
    if before.endswith(",") and text[error.pos : error.pos + 1] in "}]":
        return "take the comma in front of the bracket out"
    if error.pos >= len(text.rstrip()):
        return "the caption ends too early: it was probably cut"
    if error.msg.startswith("Extra data"):
        return "one caption only; many belong in a .jsonl file, one on a line"
    return "look at the character under the caret and the one before it"


def wrap_text(text: str) -> dict[str, Any]:
    """A valid caption for plain text: the words describe the whole image, and nothing else is said.

    The format requires a composition, so the background is empty and there are no elements: to repeat the
    words there would double them, and a style or a layout would be an invention. Line ends become ``\\n``;
    spaces around the text and a byte order mark are dropped.
    """
    words = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").strip()
    return {
        "high_level_description": words,
        "compositional_deconstruction": {"background": "", "elements": []},
    }
