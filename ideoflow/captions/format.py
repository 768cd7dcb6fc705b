"""One style for caption files, from the tree alone; every run checks itself.

Two spaces of indentation, two more for continuation lines, a blank line in front of blocks, lines filled up
to :data:`WIDTH` characters. Prose is broken only at single spaces, since a break is read as one space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ideoflow.captions.lexer import CONTROL, LOOKS_LIKE_STATEMENT
from ideoflow.captions.nodes import (
    Block,
    Broken,
    Colour,
    Document,
    Element,
    Field,
    Item,
    Mark,
    PaletteBlock,
    PaletteLine,
    SizeLine,
    StyleLine,
    Use,
)
from ideoflow.captions.parser import line_lexer, parse_icap
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import caption_language as codes

WIDTH = 108
_STEP = "  "
_SINGLE_SPACE = re.compile(r"(?<! ) (?! )")
# Beyond control characters: what editors take for a line break, and a byte order mark.
_UNPLAIN = re.compile(r"[\t\n\r\x85\u2028\u2029\ufeff]")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
_TO_ESCAPE = re.compile(r'[\x00-\x1f\x7f\x85\u2028\u2029\ufeff\ud800-\udfff"\\]')


def quoted(text: str) -> str:
    """The text in double quotes, with JSON's escapes."""
    return '"' + _TO_ESCAPE.sub(lambda m: _ESCAPES.get(m[0]) or f"\\u{ord(m[0]):04x}", text) + '"'


def prose(text: str) -> str:
    """A value as it stands behind a colon: plain where plain prose can hold it, else quoted."""
    plain = text and text[0] not in ' "' and text[-1] != " "
    return text if plain and not _UNPLAIN.search(text) and not CONTROL.search(text) else quoted(text)


def _filled(text: str, indent: str, *, breakable: bool = True) -> str:
    """The line with continuation lines, none of which reads like a comment or a statement."""
    first = indent + text
    if len(first) <= WIDTH or not breakable:
        return first
    deeper = indent + _STEP
    lines: list[str] = []
    line_at, last = 0, 0  # where the current line begins, and the last place where it may break
    room = WIDTH - len(indent)
    for match in _SINGLE_SPACE.finditer(text):
        at = match.start()
        if at - line_at > room and last > line_at:
            lines.append(text[line_at:last])
            line_at, room = last + 1, WIDTH - len(deeper)
        if text[at + 1 : at + 2] != "#" and not LOOKS_LIKE_STATEMENT.match(text, at + 1):
            last = at
    if len(text) - line_at > room and last > line_at:
        lines.append(text[line_at:last])
        line_at = last + 1
    lines.append(text[line_at:])
    return indent + ("\n" + deeper).join(lines)


def _colour_list(head: str, colours: Sequence[Colour], indent: str) -> str:
    lines, line = [], indent + head
    for colour in colours:
        if len(line) + 1 + len(colour.value) > WIDTH and line.strip() != head:
            lines.append(line)
            line = indent + _STEP + colour.value
        else:
            line += " " + colour.value
    return "\n".join([*lines, line])


def _mark(mark: Mark) -> str:
    if mark.kind == "words":
        return quoted(mark.value)
    return mark.value if mark.kind in ("place", "colour") else mark.kind + mark.value


def _path(name: str) -> str:
    plain = name and name[0] not in ' ":' and name[-1] != " "
    return name if plain and not _UNPLAIN.search(name) and not CONTROL.search(name) else quoted(name)


def _statement(item: Item, indent: str, *, first: bool) -> str:
    if isinstance(item, Field):
        value = prose(item.value)
        if item.key == "description" and first and line_lexer().may_stand_bare(value, 0, len(value)):
            return _filled(value, indent)
        return _filled(f"{item.key}: {value}", indent)
    if isinstance(item, Element):
        head = " ".join([item.kind, *map(_mark, item.marks)])
        return _after_head(head, prose(item.desc), indent)
    if isinstance(item, StyleLine):
        return f"{indent}style: {item.name}"
    if isinstance(item, PaletteLine):
        return _colour_list("palette:", item.colours, indent)
    if isinstance(item, PaletteBlock):
        return _colour_list(f"palette {item.name}:", item.colours, indent)
    if isinstance(item, SizeLine):
        return f"{indent}size: {item.width}x{item.height}"
    if isinstance(item, Use):
        return f"use {_path(item.path)}"
    raise TypeError(f"{type(item).__name__} cannot be formatted")


def _after_head(head: str, value: str, indent: str) -> str:
    """An element: the head is never broken, as its words are verbatim."""
    text = f"{head}: {value}"
    if len(indent) + len(text) <= WIDTH:
        return indent + text
    start = len(head) + 2
    body = _filled("\0" * start + value, indent)  # the head's room, in which no break is found
    return indent + head + ": " + body[len(indent) + start :]


def format_document(document: Document) -> str:
    """The text of a tree. The tree must be whole: no :class:`Broken` line in it."""
    out: list[str] = []
    first = True
    for item in document.items:
        out += item.lead
        if isinstance(item, Block):
            out.append(
                f"{item.kind} {_path(item.name)}"
                if item.kind == "image"
                else f"{item.kind} {item.name}".rstrip()
            )
            inside = True
            for statement in item.body:
                out += [_STEP + line if line else line for line in statement.lead]
                out.append(_statement(statement, _STEP, first=inside))
                inside = False
            out += [_STEP + line if line else line for line in item.tail]
        else:
            out.append(_statement(item, "", first=first))
            first = first and isinstance(item, (Use, PaletteBlock))
    out += document.tail
    return "\n".join(out) + "\n" if out else ""


def format_icap(text: str, path: str = "<caption>") -> str:
    """The file in the one style; comments stay.

    Raises:
        IdeoflowError: the file has lines that cannot be read. (Unknown names and wrong boxes do not matter.)
    """
    document, diagnostics = parse_icap(text, path)
    if any(d.is_error for d in diagnostics) or _is_broken(document):
        raise IdeoflowError(diagnostics)
    result = format_document(document)
    again, problems = parse_icap(result, path)
    if (
        problems
        or again != document
        or again.comments() != document.comments()
        or format_document(again) != result
    ):
        raise IdeoflowError(
            Diagnostic(
                codes.FORMATTER_DISAGREES,
                "the formatted file does not say the same",
                Span(path),
                "please report this file",
            )
        )
    return result


def _is_broken(document: Document) -> bool:
    blocks = [item for item in document.items if isinstance(item, Block)]
    return any(
        isinstance(line, Broken) for line in (*document.items, *(li for block in blocks for li in block.body))
    )
