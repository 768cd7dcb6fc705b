"""The editor files against the language: keywords must not drift, every pattern must do its part."""

from __future__ import annotations

import json
import re

import pytest

from ideoflow import resources
from ideoflow.captions.completion import BLOCKS, STATEMENTS, complete, defined, describe
from ideoflow.captions.regions import PLACES, REGIONS

FOLDER = resources.data_root() / "docs" / "editor" / "vscode"
TEXTMATE = json.loads((FOLDER / "syntaxes" / "icap.tmLanguage.json").read_text())
GRAMMAR = resources.grammar("caption.lark")


def language_words() -> tuple[set[str], set[str]]:
    """First words of statements and of blocks, read off the language's grammar."""
    fields = re.search(r"^FIELD: /\(([\w|]+)\)", GRAMMAR, re.MULTILINE)[1].split("|")
    elements = re.findall(r'"(\w+)"', re.search(r"^ELEMENT: (.*)$", GRAMMAR, re.MULTILINE)[1])
    rules = set(re.findall(r"^(\w+)_line: ", GRAMMAR, re.MULTILINE))
    blocks = {"use", "defaults", "image"} | set(re.findall(r"^(\w+)_block: [A-Z]", GRAMMAR, re.MULTILINE))
    return {*fields, *elements, *rules}, blocks - {"broken"}


def test_completion_offers_exactly_the_words_of_the_language():
    statements, blocks = language_words()
    assert set(STATEMENTS) == statements
    assert set(BLOCKS) == blocks


def test_the_textmate_grammar_knows_every_word():
    patterns = json.dumps(TEXTMATE["repository"])
    for word in set().union(*language_words()):
        assert re.search(rf"[(|]{word}[|)]", patterns), word


def patterns_in(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("match", "begin", "end"):
                yield value
            else:
                yield from patterns_in(value)
    elif isinstance(node, list):
        for value in node:
            yield from patterns_in(value)


@pytest.mark.parametrize("pattern", sorted(set(patterns_in(TEXTMATE))))
def test_every_textmate_pattern_compiles(pattern):
    re.compile(pattern)


@pytest.mark.parametrize(("part", "line", "group", "found"), [
    ("comment", "  # a comment", 1, "# a comment"),
    ("element", '  obj y1..2 x3..4: A boat', 1, "obj"),
])  # fmt: skip
def test_patterns_find_what_they_are_for(part, line, group, found):
    rule = TEXTMATE["repository"][part]
    assert re.match(rule.get("match") or rule["begin"], line)[group] == found


def test_a_description_that_begins_with_a_colour_is_no_comment():
    assert not re.match(TEXTMATE["repository"]["comment"]["match"], "#FFEEDD is the sky")


def test_the_extension_points_at_files_that_exist():
    package = json.loads((FOLDER / "package.json").read_text())
    named = [package["main"], package["contributes"]["languages"][0]["configuration"],
             package["contributes"]["grammars"][0]["path"]]  # fmt: skip
    assert all((FOLDER / name).is_file() for name in named)
    json.loads((FOLDER / "language-configuration.json").read_text())


TEXT = """\
use shared.icap
style dusk
  photo: 35mm.
palette sea: #112233

image a.jpg
  style: d
  obj x1..2 : A boat @
"""


def labels(line: int, column: int, path=None, text: str = TEXT) -> list[str]:
    return [offer.label for offer in complete(text, line, column, path)]


def test_completion_follows_the_place(tmp_path):
    (tmp_path / "shared.icap").write_text("use deeper.icap\nstyle noon\n  photo: x\npalette sand: #FFEEDD\n")
    (tmp_path / "deeper.icap").write_text("use shared.icap\nstyle night\n  photo: x\n")  # a cycle
    (tmp_path / "a.jpg").write_bytes(b"")
    path = tmp_path / "me.icap"
    assert labels(6, 10, path) == ["dusk", "noon", "night"]
    assert labels(6, 10) == ["dusk"]
    assert labels(7, 22, path) == ["@sea", "@sand"]
    assert labels(0, 4, path) == ["deeper.icap", "shared.icap"]
    assert labels(5, 6, path) == ["a.jpg"]
    assert set(labels(2, 2)) == set(STATEMENTS)
    assert set(labels(8, 0)) == set(STATEMENTS) | {f"{w} " for w in BLOCKS}
    inside = labels(7, 12)
    assert "y" in inside and "x" not in inside and {*REGIONS, *PLACES} <= set(inside)
    assert labels(7, 18) == []


def test_names_are_found_in_windows_files():
    assert defined("style", TEXT.replace("\n", "\r\n"), None) == ["dusk"]


def test_hover_tells_keys_from_blocks():
    assert "named style that captions share" in describe(TEXT, 1, 2)
    assert "of this caption" in describe(TEXT, 6, 4)
    assert describe(TEXT, 2, 10) == "" and describe(TEXT, 99, 0) == ""
