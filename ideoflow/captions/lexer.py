"""From text to tokens: lines first, then the pieces of each line.

Every pattern comes from ``grammar/caption.lark``. What is added here is what a regular expression cannot
see: which lines continue a statement (they are indented deeper), where a block begins and ends, and where a
line's exact part ends and its prose begins. Lark's own contextual lexer with an indenter could do it too, but
would take a misspelt key for prose, where this one can name the mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from lark.common import LexerConf
from lark.lexer import Lexer, LexerState

from ideoflow.captions.source import Source

LINE_WORDS = ("USE", "STYLE", "PALETTE", "DEFAULTS", "IMAGE", "SIZE", "ELEMENT")
PIECES = ("COLON", "COLOUR", "PALETTE_NAME", "AXIS", "EXTENT", "DIMENSIONS", "STRING", "NAME")
# On lines of names and colours nothing else is looked for, so that a style may be called w40.
LIST_PIECES = ("COLON", "COLOUR", "PALETTE_NAME", "NAME")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "b": "\b", "f": "\f", '"': '"', "\\": "\\", "/": "/"}

_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|.)", re.DOTALL)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
# A continuation line that was surely meant as a statement of its own.
LOOKS_LIKE_STATEMENT = re.compile(
    r"(?:(?:description|aesthetics|lighting|photo|art_style|medium|background|style|palette|size)[ \t]*:"
    r"|(?:obj|text)(?:[ \t]+(?:[xywh]\d[^\s:]*|#\w+|\"[^\"]*\"|\[[^\]]*\]))+[ \t]*:)"
)
_KEY_LIKE = re.compile(r"([^\W\d][\w-]*)[ \t]*:(?!/)")
_WORD = re.compile(r"[^\W\d][\w-]*")
_JSON_LINE = re.compile(r'[{\[]|"[^"]*"[ \t]*:')
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]|\r(?!\n)")


class Tok:
    """A token: its terminal, its value (unescaped), its place, and the comments above it."""

    __slots__ = ("end", "lead", "start", "type", "value")

    def __init__(self, type: str, value: str, start: int, end: int, lead: tuple[str, ...] = ()) -> None:
        self.type = type
        self.value = value
        self.start = start
        self.end = end
        self.lead = lead

    def __repr__(self) -> str:
        return f"Tok({self.type}, {self.value!r})"


class ScanInput:
    """What the lexer reads, and the problems it finds that no grammar rule can name."""

    __slots__ = ("problems", "source")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[tuple[str, int, int]] = []


class LineLexer(Lexer):  # type: ignore[misc]
    """Lark's lexer interface over :func:`scan`; built once, holds only compiled patterns."""

    __future_interface__ = 2

    def __init__(self, lexer_conf: LexerConf) -> None:
        patterns: dict[str, str] = {t.name: t.pattern.to_regexp() for t in lexer_conf.terminals}
        words = "|".join(f"(?P<{name}>(?:{patterns[name]})(?![\\w-]))" for name in LINE_WORDS)
        self.line_start = re.compile(f"(?P<FIELD>{patterns['FIELD']})|{words}")

        def scanner(names: tuple[str, ...]) -> re.Pattern[str]:
            # UNKNOWN is no terminal of the grammar, so it always ends in a diagnostic.
            pieces = "|".join(f"(?P<{name}>{patterns[name]})" for name in names)
            return re.compile(f'{pieces}|(?P<UNKNOWN>"[^\\n]*|[^\\s:]+)')

        self.piece = scanner(PIECES)
        self.list_piece = scanner(LIST_PIECES)
        self.colour = re.compile(patterns["COLOUR"])
        keys = re.findall(r"[a-z_]{3,}", patterns["FIELD"])
        self.words = frozenset([*keys, "use", "style", "palette", "defaults", "image", "size", "obj", "text"])

    def lex(self, lexer_state: LexerState, parser_state: Any) -> Iterator[Tok]:
        given: Any = lexer_state.text
        return self.scan(given)

    def scan(self, given: ScanInput) -> Iterator[Tok]:
        """The tokens of a file. Never raises; problems go to ``given.problems``."""
        text = given.source.text
        line_start, is_colour = self.line_start.match, self.colour.match
        out: list[Tok] = []
        comments: list[tuple[int, str]] = []  # lines since the last one with words: (indent, text or "")
        line: _Line | None = None
        body = 0  # indent of the open block's lines; 0: no block is open, -1: opened, no line yet
        at, size = 0, len(text)
        while at < size:
            stop = text.find("\n", at)
            if stop < 0:
                stop = size
            full = text[at:stop]
            stripped = full.strip(" \t\r")
            begin = at
            at = stop + 1
            if not stripped:
                comments.append((0, ""))
                continue
            indent = full.index(stripped[0])
            start = begin + indent
            end = start + len(stripped)
            if stripped[0] == "#" and not is_colour(text, start):
                comments.append((indent, stripped))
                continue
            if "\t" in full[:indent]:
                given.problems.append(("tab", begin, start))
                indent = len(full[:indent].expandtabs(4))
            if indent and line is not None and body >= 0 and indent > body:
                line.pieces.append((start, end))
                if comments:
                    line.lead += tuple(c for _, c in comments if c)
                    comments.clear()
                continue
            if line is not None:
                yield from self._finish(line, given)
            tail: tuple[str, ...] = ()
            if body and not indent:
                if body > 0:
                    tail, comments = _split_tail(comments)
                    yield Tok("DEDENT", "", begin, begin, tail)
                body = 0
            elif body == -1:
                body = indent
                yield Tok("_INDENT", "", begin, start)
            elif indent != body:
                given.problems.append(("indent", begin, start))
            match = line_start(text, start)
            kind = match.lastgroup if match and match.end() <= end else None
            line = _Line(kind, start, match.end() if kind and match else start, end, _collapse(comments))
            comments = []
            if not indent and self._opens_block(line, text, at):
                line.opens = True
                body = -1
        if line is not None:
            yield from self._finish(line, given)
        if body > 0:
            tail, comments = _split_tail(comments)
            out.append(Tok("DEDENT", "", size, size, tail))
        out.append(Tok("TAIL", "", size, size, _collapse(comments)))
        yield from out

    def _opens_block(self, line: _Line, text: str, following: int) -> bool:
        """Whether the lines indented below ``line`` are statements rather than a continuation of it."""
        rest = text[line.after : line.pieces[0][1]].lstrip(" \t")
        if line.kind in ("DEFAULTS", "IMAGE"):
            return True
        if line.kind == "STYLE":
            return not rest.startswith(":") or rest == ":"
        if line.kind is None:
            # A misspelt header: its first indented line is plainly a statement.
            below = re.compile(r"[ \t]+(\S[^\n]*)").match(text, following)
            return (
                below is not None
                and bool(self.line_start.match(text, below.start(1)))
                and (LOOKS_LIKE_STATEMENT.match(text, below.start(1)) is not None)
            )
        return False

    def _finish(self, line: _Line, given: ScanInput) -> Iterator[Tok]:
        """The tokens of one statement with its continuation lines."""
        text = given.source.text
        start, end = line.pieces[0]
        kind, after = line.kind, line.after
        if kind == "FIELD":
            yield Tok("FIELD", text[start:after], start, after, line.lead)
            line.pieces[0] = (after, end)
            yield from self._prose(line.pieces, given, "PROSE")
        elif kind is None:
            yield from self._bare(line, given)
        else:
            yield Tok(kind, text[start:after], start, after, line.lead)
            if kind in ("USE", "IMAGE"):
                yield from self._path(line, given)
            else:
                yield from self._pieces(line, given)
        last = line.pieces[-1][1]
        yield Tok("_NL", "", last, last)

    def _pieces(self, line: _Line, given: ScanInput) -> Iterator[Tok]:
        """The exact part of a line; behind the colon of an element, its prose."""
        text = given.source.text
        match_piece = (self.list_piece if line.kind in ("STYLE", "PALETTE") else self.piece).match
        line.pieces[0] = (line.after, line.pieces[0][1])
        for number, (at, end) in enumerate(line.pieces):
            while True:
                while at < end and text[at] in " \t":
                    at += 1
                if at >= end:
                    break
                match = match_piece(text, at, end)
                if match is None:  # only whitespace that is neither space nor tab
                    at += 1
                    continue
                kind: str = match.lastgroup  # type: ignore[assignment]
                value = match.group()
                begin, at = at, match.end()
                if kind == "STRING":
                    value = self._unescape(value, begin, given)
                yield Tok(kind, value, begin, at)
                if kind == "COLON" and line.kind == "ELEMENT":
                    yield from self._prose([(at, end), *line.pieces[number + 1 :]], given, "PROSE")
                    return

    def _path(self, line: _Line, given: ScanInput) -> Iterator[Tok]:
        text = given.source.text
        end = line.pieces[0][1]
        value = text[line.after : end]
        start = end - len(value.lstrip(" \t"))
        value = value.strip(" \t")
        if value.startswith(":"):
            yield Tok("COLON", ":", start, start + 1)
        elif value.startswith('"') and _QUOTED.fullmatch(value):
            yield Tok("PATH", self._unescape(value, start, given), start, end)
        elif value.startswith('"'):
            yield Tok("UNKNOWN", value, start, end)
        elif value:
            yield Tok("PATH", value, start, end)
        for begin, stop in line.pieces[1:]:
            yield Tok("UNKNOWN", text[begin:stop], begin, stop)

    def _bare(self, line: _Line, given: ScanInput) -> Iterator[Tok]:
        """A line that begins with no known word: a description, or a mistake (UNKNOWN)."""
        text = given.source.text
        start, end = line.pieces[0]
        if line.opens or not self.may_stand_bare(text, start, end):
            yield Tok("UNKNOWN", text[start:end], start, end, line.lead)
            return
        for token in self._prose(line.pieces, given, "BARE"):
            token.lead = line.lead
            yield token

    def may_stand_bare(self, text: str, start: int, end: int) -> bool:
        """Whether a description can be written without its key: it is not taken for something else."""
        word = _WORD.match(text, start, end)
        known = word is not None and word.group() in self.words
        other = _JSON_LINE.match(text, start, end) or _KEY_LIKE.match(text, start, end)
        return not known and text[start] != "#" and other is None

    def _prose(self, pieces: list[tuple[int, int]], given: ScanInput, kind: str) -> Iterator[Tok]:
        text = given.source.text
        start, end = pieces[0]
        value = text[start:end].strip(" \t")
        start = end - len(text[start:end].lstrip(" \t"))
        if len(pieces) > 1:
            for begin, stop in pieces[1:]:
                if LOOKS_LIKE_STATEMENT.match(text, begin, stop):
                    given.problems.append(("swallowed", begin, stop))
            words = [value] if value else []
            value = " ".join(words + [text[begin:stop] for begin, stop in pieces[1:]])
            if not words:
                start = pieces[1][0]
            end = pieces[-1][1]
        if not value:
            return
        if value[0] == '"':
            quoted = _QUOTED.match(value)
            if quoted is None:
                yield Tok("UNKNOWN", value, start, end)
                return
            if quoted.end() == len(value):
                value = self._unescape(value, start, given)
        yield Tok(kind, value, start, end)

    def _unescape(self, quoted: str, start: int, given: ScanInput) -> str:
        inner = quoted[1:-1]
        if "\\" not in inner:
            return inner

        def one(match: re.Match[str]) -> str:
            what = match.group(1)
            if what[0] == "u" and len(what) == 5:
                return chr(int(what[1:], 16))
            if what in ESCAPES:
                return ESCAPES[what]
            given.problems.append(("escape", start + 1 + match.start(), start + 1 + match.end()))
            return what

        value = _ESCAPE.sub(one, inner)
        if CONTROL.search(value) and any("\ud800" <= c <= "\udfff" for c in value):
            # A pair of \u escapes above U+FFFF is one character, as in JSON; half a pair is none.
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if "\ufffd" in value:
                given.problems.append(("surrogate", start, start + len(quoted)))
        return value


class _Line:
    """A statement being read: its first word's terminal, where that word ends, and its lines' ranges."""

    __slots__ = ("after", "kind", "lead", "opens", "pieces")

    def __init__(self, kind: str | None, start: int, after: int, end: int, lead: tuple[str, ...]) -> None:
        self.kind = kind
        self.after = after
        self.pieces = [(start, end)]
        self.lead = lead
        self.opens = False


def _collapse(comments: list[tuple[int, str]]) -> tuple[str, ...]:
    """Comment lines, with one "" for each run of blank lines."""
    lines: list[str] = []
    for _, comment in comments:
        if comment or not lines or lines[-1]:
            lines.append(comment)
    return tuple(lines)


def _split_tail(comments: list[tuple[int, str]]) -> tuple[tuple[str, ...], list[tuple[int, str]]]:
    """Comments below a block's last line: the indented ones belong to the block, the rest to what follows."""
    cut = max((i + 1 for i, (indent, comment) in enumerate(comments) if comment and indent), default=0)
    return _collapse(comments[:cut]), comments[cut:]
