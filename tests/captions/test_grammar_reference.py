"""The grammar page is what the grammar says, and the grammar is documented rule by rule."""

import re
from pathlib import Path

import pytest
from lark import Lark

from ideoflow import resources
from ideoflow.captions.grammar_reference import grammar_reference
from ideoflow.captions.lexer import LineLexer

GRAMMAR = resources.grammar("caption.lark")
PAGE = Path(__file__).parents[2] / "docs" / "caption-grammar.md"


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == grammar_reference(GRAMMAR), (
        "run: python -m ideoflow.captions.grammar_reference > docs/caption-grammar.md"
    )


def test_every_rule_has_a_comment_above_it():
    lines = GRAMMAR.splitlines()
    rules = [number for number, line in enumerate(lines) if re.match(r"[a-z_]+:", line)]
    assert len(rules) > 20
    assert [lines[n] for n in rules if not lines[n - 1].startswith("//")] == []


def test_every_rule_and_terminal_is_on_the_page():
    lark = Lark(GRAMMAR, parser="lalr", lexer=LineLexer)
    names = {str(rule.origin.name) for rule in lark.rules} | {terminal.name for terminal in lark.terminals}
    page = grammar_reference(GRAMMAR)
    assert [name for name in names if not name.startswith("__") and f"`{name}`" not in page] == []


def test_a_line_that_is_neither_is_an_error():
    with pytest.raises(ValueError, match="not understood"):
        grammar_reference("start: a\n= b\n")
