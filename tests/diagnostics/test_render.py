"""Carets stand under what they mean, whatever the line holds; JSON and GitHub output stay well-formed."""

import json
import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from ideoflow.diagnostics import Diagnostic, Span, render_github, render_json, render_text
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.render import cell_width

CODE = Code("IC999", "an example", "Only for tests.")


def at(text: str, part: str) -> Span:
    start = text.index(part)
    return Span.of("a.icap", text, start, start + len(part))


def caret_cells(span: Span) -> tuple[str, str]:
    """The source line and caret line of the rendering, gutters removed."""
    lines = render_text([Diagnostic(CODE, "m", span)]).split("\n")
    gutter = len(str(span.line)) + 3
    return lines[3][gutter:], lines[4][gutter:]


def test_the_whole_text_of_a_diagnostic():
    text = "a lake\nobj y380..660 x720..590: boat\n"
    found = Diagnostic(
        CODE,
        "the box runs backwards",
        at(text, "x720..590"),
        cure="swap the numbers:\nx590..720",
        label="720 > 590",
        notes=("x runs from left to right",),
    )
    assert render_text([found]) == (
        "error[IC999]: the box runs backwards\n"
        " --> a.icap:2:15\n"
        "  |\n"
        "2 | obj y380..660 x720..590: boat\n"
        "  |               ^^^^^^^^^ 720 > 590\n"
        "  = note: x runs from left to right\n"
        "  = help: swap the numbers:\n"
        "          x590..720"
    )


def test_several_are_set_apart_and_a_place_is_optional():
    text = render_text([Diagnostic(CODE, "one"), Diagnostic(CODE, "two", Span("b.toml"), severity="warning")])
    assert text == "error[IC999]: one\n\nwarning[IC999]: two\n --> b.toml"


@pytest.mark.parametrize(
    "line",
    [
        "obj y1..2 x3..4: HERE",
        "\tobj\ty1..2:\tHERE\ttail",
        "一只猫坐在 HERE 桌子上",
        "ネコ\tHERE\tテーブル",
        "🚀🌙 HERE 🐈",
        "e\u0301te\u0301 กำลัง HERE",
        "שלום HERE עולם",
        "\u200bHERE\u2028tail",
        "x" * 5000 + " HERE " + "猫" * 5000,
        "猫" * 80 + "HERE" + "\t" * 300,
    ],
)
def test_the_caret_stands_under_the_part(line):
    shown, caret = caret_cells(at(f"first\n{line}\nlast", "HERE"))
    before = shown[: shown.index("HERE")]
    assert caret == " " * cell_len(before) + "^^^^"
    assert "\t" not in shown
    assert cell_len(shown) <= 2 * 100 + len("......")


def test_the_caret_of_a_wide_part_is_as_wide():
    _, caret = caret_cells(at("ab 猫猫 cd", "猫猫"))
    assert caret == "   ^^^^"


def test_the_caret_of_nothing_and_of_the_end_is_one_cell():
    assert caret_cells(Span.of("a", "abc", 1, 1))[1] == " ^"
    assert caret_cells(Span.of("a", "abc", 3, 3))[1] == "   ^"
    assert caret_cells(Span.of("a", "", 0, 0))[1] == "^"


def test_a_part_over_several_lines_is_marked_to_the_end_of_its_first():
    assert caret_cells(at("ab cd\nef gh", "cd\nef"))[1] == "   ^^"


def test_windows_line_ends_do_not_show():
    shown, caret = caret_cells(at("one\r\ntwo\r\n", "two\r\n"))
    assert (shown, caret) == ("two", "^^^")


def test_colour_adds_only_escapes():
    found = [Diagnostic(CODE, "m", at("a HERE b", "HERE"), cure="c", notes=("n",))]
    coloured = render_text(found, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == render_text(found)


@given(st.text(st.characters(categories=("L", "Nd", "P", "Zs")), max_size=40))
def test_widths_agree_with_rich(text):
    # Marks and symbols are left out: rich also joins emoji sequences, which terminals disagree about.
    conjoining = [c for c in text if "\u1160" <= c <= "\u11ff" or "\ud7b0" <= c <= "\ud7ff" or c == "\u3164"]
    if not conjoining:
        assert cell_width(text) == cell_len(text)


@given(st.text(max_size=60), st.data())
def test_no_text_breaks_a_renderer(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    found = [Diagnostic(CODE, text, Span.of(text or "f", text, start, end), cure=text, label="l")]
    assert render_text(found).startswith("error[IC999]: ")
    assert json.loads(render_json(found))[0]["message"] == text
    assert len(re.split(r"[\r\n]", render_github(found))) == 1


def test_json_carries_every_field():
    span = at("one\n  two", "two")
    found = Diagnostic(CODE, "mes\nsage", span, "cure", "label", ("n1", "n2"), "note")
    assert json.loads(render_json([found])) == [
        {
            "code": "IC999",
            "severity": "note",
            "title": "an example",
            "message": "mes\nsage",
            "place": {"path": "a.icap", "line": 2, "column": 3, "end_line": 2, "end_column": 6},
            "cure": "cure",
            "label": "label",
            "notes": ["n1", "n2"],
        }
    ]
    assert json.loads(render_json([])) == []
    assert json.loads(render_json([Diagnostic(CODE, "m")]))[0]["place"] is None


def test_github_commands_escape_and_read_back():
    span = Span("dir,a:b/50%.icap", 3, 5, 3, 9, "source")
    line = render_github([Diagnostic(CODE, "50% off:\r\nnow", span, cure="mend, it", severity="note")])
    head, message = re.fullmatch(r"::notice (.*?)::(.*)", line).groups()
    fields = dict(pair.split("=", 1) for pair in head.split(","))
    assert {k: unquote(v) for k, v in fields.items()} == {
        "title": "IC999 an example",
        "file": "dir,a:b/50%.icap",
        "line": "3",
        "endLine": "3",
        "col": "5",
        "endColumn": "9",
    }
    # The message escapes percent signs and line ends, but not colons and commas.
    assert message == "50%25 off:%0D%0Anow%0Amend, it"


@pytest.mark.parametrize(("severity", "command"), [("error", "error"), ("warning", "warning")])
def test_github_commands_follow_the_severity(severity, command):
    assert render_github([Diagnostic(CODE, "m", severity=severity)]).startswith(f"::{command} title=")
