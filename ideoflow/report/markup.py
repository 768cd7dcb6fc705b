"""HTML and SVG, escaped by default: text goes in as text, and only :class:`Html` as markup."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

# Elements of HTML that have no end tag; SVG has none of them.
_VOID = frozenset({"br", "col", "hr", "img", "input", "link", "meta"})
# Neither HTML nor XML can carry these, even escaped: control characters, lone surrogates, noncharacters.
_UNSPEAKABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def escape(text: object) -> Html:
    """``text`` for use between tags or in a quoted attribute; what cannot be carried becomes U+FFFD."""
    return Html(html.escape(_UNSPEAKABLE.sub("\ufffd", str(text))))


def join(*children: Child) -> Html:
    """Children one after the other: :class:`Html` as it is, other text escaped, None left out."""
    return Html("".join(_pieces(children)))


def _pieces(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str | int | float):
            yield escape(child)
        else:
            yield from _pieces(child)


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """An element.

    Attribute names may end in an underscore (``class_``) and have hyphens as underscores (``data_step``);
    True writes the bare name, None and False leave the attribute out. Elements that are neither void nor
    filled are closed with an end tag, so that the same text is good HTML and good XML.
    """
    start = f"<{name}"
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        start += f" {key.rstrip('_').replace('_', '-')}"
        start += '=""' if value is True else f'="{escape(value)}"'
    if name in _VOID:
        return Html(start + ">")
    return Html(f"{start}>{join(*children)}</{name}>")


def json_script(id: str, data: Any) -> Html:
    """Data for the page's script, in a form in which no ``</script>`` or ``<!--`` can occur."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Html(f'<script type="application/json" id="{escape(id)}">{text}</script>')
