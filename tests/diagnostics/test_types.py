"""Spans count as editors do; the collector stops at its limit and keeps everything it saw."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ideoflow.diagnostics import Collector, Diagnostic, IdeoflowError, Span, closest
from ideoflow.diagnostics.codes import Code

ERROR = Code("IC998", "an error", "Only for tests.")
WARNING = Code("IC997", "a warning", "Only for tests.", "warning")


@given(st.text(alphabet="ab\n\r\t猫", max_size=30), st.data())
def test_a_span_gives_back_the_text_it_was_made_of(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    span = Span.of("f", text, start, end)
    lines = text.split("\n")
    part = lines[span.line - 1 : span.end_line]
    part[-1] = part[-1][: span.end_column - 1]
    part[0] = part[0][span.column - 1 :]
    assert "\n".join(part) == text[start:end]
    assert span.source == lines[span.line - 1].rstrip("\r")


def test_a_span_prints_as_editors_open_it():
    assert str(Span.of("a/b.icap", "one\ntwo", 5, 6)) == "a/b.icap:2:2"
    assert str(Span("a/b.icap")) == "a/b.icap"


def test_the_collector_stops_at_its_limit_with_all_it_has():
    found = Collector(limit=3)
    found.add(WARNING, "w")
    found.add(ERROR, "1")
    found.add(ERROR, "2")
    with pytest.raises(IdeoflowError) as stop:
        found.add(ERROR, "3")
    assert [d.message for d in stop.value.diagnostics] == ["w", "1", "2", "3"]


def test_warnings_alone_never_stop():
    found = Collector(limit=1)
    for _ in range(5):
        found.add(WARNING, "w")
    found.raise_if_errors()
    assert len(found.warnings) == len(list(found)) == 5
    assert found.errors == []


def test_a_severity_given_by_hand_wins_over_the_code():
    found = Collector()
    found.add(ERROR, "only a hint", severity="note")
    found.raise_if_errors()
    found.add(WARNING, "strict", severity="error")
    with pytest.raises(IdeoflowError, match=r"IC998 only a hint; IC997 strict"):
        found.raise_if_errors()


def test_an_error_takes_one_or_many():
    one = Diagnostic(ERROR, "m")
    assert IdeoflowError(one).diagnostics == (one,)
    assert IdeoflowError([one, one]).diagnostics == (one, one)


def test_a_diagnostic_needs_a_code_of_the_table():
    with pytest.raises(TypeError, match="takes a Code"):
        Diagnostic("IC998", "m")


def test_the_closest_word():
    assert closest("learnign_rate", ["learning_rate", "rank"]) == "learning_rate"
    assert closest("zzz", ["learning_rate", "rank"]) is None
