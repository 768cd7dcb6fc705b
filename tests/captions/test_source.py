"""Spans from the table of line starts are those that counting lines gives."""

from hypothesis import given
from hypothesis import strategies as st

from ideoflow.captions.source import Source
from ideoflow.diagnostics import Span

texts = st.lists(st.sampled_from(["a", "é", "\n", "\r\n", "\t", "🎞️"]), max_size=30).map("".join)


@given(texts, st.integers(0, 40), st.integers(0, 40))
def test_span_is_the_span_of_counting(text, start, end):
    start, end = min(start, len(text)), min(end, len(text))
    span, expected = Source("p", text).span(start, end), Span.of("p", text, start, end)
    assert span == expected and span.source == expected.source


def test_a_byte_order_mark_is_no_text():
    assert Source("p", "\ufeffA").text == "A"
