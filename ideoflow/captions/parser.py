"""From text to the syntax tree, with recovery: a line that cannot be read is reported and left out.

The grammar is compiled once a process (Lark, LALR(1)); rules build nodes as they are reduced, so no
intermediate tree exists. After an error the stack is popped to the nearest place where a line may begin,
``BROKEN`` stands in for the bad line, and parsing goes on: yacc's error token, by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from lark import Lark
from lark.exceptions import UnexpectedToken

from ideoflow import resources
from ideoflow.captions import mistakes
from ideoflow.captions.lexer import LineLexer, ScanInput, Tok
from ideoflow.captions.nodes import (
    MARK_ORDER,
    Block,
    Broken,
    Colour,
    Document,
    Element,
    Field,
    Item,
    Lead,
    Mark,
    PaletteBlock,
    PaletteLine,
    SizeLine,
    Statement,
    StyleLine,
    Use,
)
from ideoflow.captions.regions import normal_measure, normal_range
from ideoflow.captions.source import Source
from ideoflow.diagnostics import Diagnostic

_RANK = {kind: rank for rank, kind in enumerate(MARK_ORDER)}


class _Builder:
    """Lark callbacks, one a grammar rule; children are tokens and finished nodes."""

    def start(self, children: list[Any]) -> Document:
        *items, tail = children
        return normalised(Document(tuple(items), tail.lead))

    def use(self, c: list[Tok]) -> Use:
        return Use(c[1].value, c[0].lead, (c[0].start, c[1].end))

    def style_block(self, c: list[Any]) -> Block:
        return _block("style", c[1].value, c[0], c[1], c[2:-1], c[-1])

    def defaults(self, c: list[Any]) -> Block:
        return _block("defaults", "", c[0], c[0], c[1:-1], c[-1])

    def image(self, c: list[Any]) -> Block:
        return _block("image", c[1].value, c[0], c[1], c[2:-1], c[-1])

    def broken_block(self, c: list[Any]) -> Block:
        return _block("broken", "", c[0], c[0], c[1:-1], c[-1])

    def palette_block(self, c: list[Any]) -> PaletteBlock:
        return PaletteBlock(c[1].value, c[2], c[0].lead, (c[0].start, c[1].end))

    def description(self, c: list[Tok]) -> Field:
        return Field("description", c[0].value, c[0].lead, (c[0].start, c[0].end))

    def field(self, c: list[Tok]) -> Field:
        key = c[0].value[:-1].rstrip(" \t")
        return Field(key, c[1].value, c[0].lead, (c[0].start, c[1].end))

    def style_line(self, c: list[Tok]) -> StyleLine:
        return StyleLine(c[1].value, c[0].lead, (c[0].start, c[1].end))

    def palette_line(self, c: list[Any]) -> PaletteLine:
        return PaletteLine(c[1], c[0].lead, (c[0].start, c[1][-1].at[1]))

    def size_line(self, c: list[Tok]) -> SizeLine:
        width, _, height = c[1].value.partition("x")
        # Longer numbers than any image has are cut to one that is out of range too.
        return SizeLine(int(width[:9]), int(height[:9]), c[0].lead, (c[0].start, c[1].end))

    def element(self, c: list[Any]) -> Element:
        marks = c[1:-1]
        if len(marks) > 1:
            marks.sort(key=_rank)
        return Element(c[0].value, tuple(marks), c[-1].value, c[0].lead, (c[0].start, c[-1].end))

    def axis(self, c: list[Tok]) -> Mark:
        token = c[0]
        return Mark(token.value[0], normal_range(token.value[1:]), (token.start, token.end))

    def extent(self, c: list[Tok]) -> Mark:
        token = c[0]
        return Mark(token.value[0], normal_measure(token.value[1:]), (token.start, token.end))

    def place(self, c: list[Tok]) -> Mark:
        return Mark("place", c[0].value, (c[0].start, c[0].end))

    def colour(self, c: list[Tok]) -> Mark:
        return Mark("colour", _colour(c[0]), (c[0].start, c[0].end))

    def words(self, c: list[Tok]) -> Mark:
        return Mark("words", c[0].value, (c[0].start, c[0].end))

    def colours(self, c: list[Tok]) -> tuple[Colour, ...]:
        return tuple(Colour(_colour(token), (token.start, token.end)) for token in c)

    def broken(self, c: list[Tok]) -> Broken:
        return Broken(c[0].lead, (c[0].start, c[0].end))


def _rank(mark: Mark) -> int:
    return _RANK[mark.kind]


def _colour(token: Tok) -> str:
    return token.value.upper() if token.type == "COLOUR" else token.value


def _block(kind: str, name: str, head: Tok, last: Tok, body: Sequence[Statement], dedent: Tok) -> Block:
    return Block(kind, name, tuple(body), head.lead, dedent.lead, (head.start, last.end))


def normalised(document: Document) -> Document:
    """The tree with blank lines as :func:`format_icap` writes them, so that layout tells no trees apart."""
    items: list[Item] = []
    for item in document.items:
        lead = _trim(item.lead) if not items else item.lead
        if isinstance(item, Block):
            if items and (not lead or lead[0]):
                lead = ("", *lead)
            if item.body[0].lead[:1] == ("",):
                first = replace(item.body[0], lead=_trim(item.body[0].lead))
                item = replace(item, body=(first, *item.body[1:]))
            if item.tail and not item.tail[-1]:
                item = replace(item, tail=item.tail[:-1])
        elif items and isinstance(items[-1], Block) and (not lead or lead[0]):
            lead = ("", *lead)
        items.append(item if lead is item.lead else replace(item, lead=lead))
    tail = document.tail
    if tail and not tail[-1]:
        tail = tail[:-1]
    return Document(tuple(items), tail if items else _trim(tail))


def _trim(lead: Lead) -> Lead:
    return lead[1:] if lead and not lead[0] else lead


@cache
def _lark() -> Lark:
    return Lark(
        resources.grammar("caption.lark"),
        parser="lalr",
        lexer=LineLexer,
        transformer=_Builder(),
        maybe_placeholders=False,
    )


@cache
def line_lexer() -> LineLexer:
    """The compiled lexer."""
    lexer = _lark().parser.lexer
    assert isinstance(lexer, LineLexer)
    return lexer


def parse_icap(text: str, path: str = "<caption>") -> tuple[Document, tuple[Diagnostic, ...]]:
    """The tree of a caption file and what is wrong with its form; never raises.

    Names, boxes and colours are looked at by ``compile_caption``; this reads the lines only.
    """
    return parse_source(Source(path, text))


def parse_source(source: Source) -> tuple[Document, tuple[Diagnostic, ...]]:
    """:func:`parse_icap` on a :class:`Source`."""
    diagnostics = list(mistakes.unreadable(source))
    if any(d.is_error for d in diagnostics):
        return Document(()), tuple(diagnostics)
    given = ScanInput(source)
    state = _lark().parse_interactive("").parser_state
    tokens = list(line_lexer().scan(given))
    states = state.parse_conf.states
    at, line_at, count = 0, 0, len(tokens)  # line_at: the token that the current line began with
    while at < count:
        token = tokens[at]
        try:
            state.feed_token(token)
        except UnexpectedToken as error:
            diagnostics.append(mistakes.explain(source, tokens, line_at, at, error.expected))
            if len(diagnostics) >= mistakes.LIMIT:
                return Document(()), mistakes.finished(source, diagnostics, given.problems)
            values, stack = state.value_stack, state.state_stack
            depth = len(stack)
            while "BROKEN" not in states[stack[-1]]:
                stack.pop()
                values.pop()
            if at == line_at and len(stack) < depth:
                continue  # the line before was at fault, and its beginnings are gone
            lead = tokens[line_at].lead
            while tokens[at].type != "_NL":
                at += 1
            state.feed_token(Tok("BROKEN", "", tokens[line_at].start, tokens[at].end, lead))
            continue
        at += 1
        if token.type in ("_NL", "_INDENT", "DEDENT"):
            line_at = at
    document = state.feed_token(Tok("$END", "", 0, 0), True)
    if not given.problems and not diagnostics:
        return document, ()
    if len(diagnostics) + len(given.problems) > mistakes.LIMIT:
        document = Document(())  # what is wrong beyond the limit is not told, so nothing is taken for right
    return document, mistakes.finished(source, diagnostics, given.problems)
