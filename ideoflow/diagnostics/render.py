"""Diagnostics as text with carets, as JSON, and as GitHub workflow annotations.

Plain ANSI sequences rather than rich: an error must print fast, also where rich is broken or absent.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable

from ideoflow.diagnostics.types import Diagnostic, Span

_COLOURS = {"error": "\x1b[1;31m", "warning": "\x1b[1;33m", "note": "\x1b[1;36m"}
_BLUE, _BOLD, _RESET = "\x1b[1;34m", "\x1b[1m", "\x1b[0m"
_WIDTH = 100  # longest piece of a source line that is shown


def cell_width(text: str) -> int:
    """Terminal cells that ``text`` fills: wide East Asian characters two, combining marks none."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def render_text(diagnostics: Iterable[Diagnostic], *, colour: bool = False) -> str:
    """Every diagnostic with its place, source line, caret and cure; ends without a newline."""
    return "\n\n".join(_one(d, colour) for d in diagnostics)


def _one(d: Diagnostic, colour: bool) -> str:
    def paint(text: str, style: str) -> str:
        return f"{style}{text}{_RESET}" if colour else text

    tone = _COLOURS[d.severity]
    lines = [f"{paint(f'{d.severity}[{d.code.id}]', tone)}{paint(f': {d.message}', _BOLD)}"]
    gutter = " " * (len(str(d.span.line)) if d.span and d.span.line else 1)
    bar = paint("|", _BLUE)
    if d.span is not None:
        lines.append(f"{gutter}{paint('-->', _BLUE)} {d.span}")
    if d.span is not None and d.span.line:
        shown, offset, length = _window(d.span)
        caret = paint("^" * length + (f" {d.label}" if d.label else ""), tone)
        lines += [
            f"{gutter} {bar}",
            f"{paint(str(d.span.line), _BLUE)} {bar} {shown}",
            f"{gutter} {bar} {' ' * offset}{caret}",
        ]
    lines += [f"{gutter} {paint('=', _BLUE)} {paint('note', _BOLD)}: {note}" for note in d.notes]
    if d.cure:
        first, *rest = d.cure.split("\n")
        lines.append(f"{gutter} {paint('=', _BLUE)} {paint('help', _BOLD)}: {first}")
        lines += [f"{gutter}         {line}" for line in rest]
    return "\n".join(lines)


def _window(span: Span) -> tuple[str, int, int]:
    """The piece of the source line to show, and the caret's offset and length in cells."""
    source = span.source
    start = min(span.column - 1, len(source))
    end = span.end_column - 1 if span.end_line == span.line else len(source)
    end = max(start, min(end, len(source)))
    left = max(0, start - _WIDTH // 2) if len(source) > _WIDTH else 0
    right = min(len(source), left + _WIDTH)
    prefix = "..." if left else ""
    shown = prefix + _printable(source[left:right]) + ("..." if right < len(source) else "")
    offset = len(prefix) + cell_width(_printable(source[left:start]))
    length = max(1, cell_width(_printable(source[start : min(end, right)])))
    return shown, offset, length


def _printable(text: str) -> str:
    """Tabs, control, format and line-separating characters as one space each, so that carets line up."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(" " if unicodedata.category(c) in hidden else c for c in text)


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """A JSON array, one object a diagnostic."""
    return json.dumps([d.as_dict() for d in diagnostics], ensure_ascii=False, indent=2)


def render_github(diagnostics: Iterable[Diagnostic]) -> str:
    """GitHub workflow commands, one line each, so that they appear beside the diff."""
    return "\n".join(_annotation(d) for d in diagnostics)


def _annotation(d: Diagnostic) -> str:
    kind = {"error": "error", "warning": "warning", "note": "notice"}[d.severity]
    properties = {"title": f"{d.code.id} {d.code.title}"}
    if d.span is not None:
        properties["file"] = d.span.path
        if d.span.line:
            properties |= {"line": str(d.span.line), "endLine": str(d.span.end_line or d.span.line),
                           "col": str(d.span.column), "endColumn": str(d.span.end_column)}  # fmt: skip
    joined = ",".join(f"{k}={_escape(v, ':,')}" for k, v in properties.items())
    message = d.message + (f"\n{d.cure}" if d.cure else "")
    return f"::{kind} {joined}::{_escape(message)}"


def _escape(text: str, also: str = "") -> str:
    # GitHub's documented escapes for workflow commands.
    for c in "%\r\n" + also:
        text = text.replace(c, f"%{ord(c):02X}")
    return text
