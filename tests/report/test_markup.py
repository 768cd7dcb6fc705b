"""Escaping and units, held against the standard library's parsers and against exact values."""

import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ideoflow.report import units
from ideoflow.report.markup import Html, json_script, tag

text = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=40)


@given(text, text)
def test_text_and_attributes_come_back_from_an_xml_parser(inside, attribute):
    element = ElementTree.fromstring(tag("p", inside, title=attribute))
    if not any(c in "\ufffe\uffff" for c in inside + attribute):
        assert (element.text or "") == inside and element.get("title") == attribute


@given(st.text(max_size=40))
def test_no_text_makes_an_element(words):
    class Tags(HTMLParser):
        found = 0

        def handle_starttag(self, tag, attrs):
            self.found += 1

    page = Tags()
    page.feed(tag("p", words, title=words, data_x=words))
    page.close()
    assert page.found == 1
    tag("p", words).encode("utf-8")


def test_markup_passes_and_lists_are_flattened():
    assert tag("p", Html("<b>"), ["<", None, (1, 2.5)]) == "<p><b>&lt;12.5</p>"
    assert tag("img", alt="", src=None, hidden=True, class_="a") == '<img alt="" hidden="" class="a">'


@given(st.recursive(st.text(max_size=10) | st.none() | st.integers(), lambda x: st.lists(x, max_size=3)))
def test_data_comes_back_and_cannot_end_its_script(data):
    element = json_script("d", data)
    inside = element.removeprefix('<script type="application/json" id="d">').removesuffix("</script>")
    assert json.loads(inside) == data and not set("<>&") & set(inside)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.number(0.000012), "1.2e−5"),
        (units.number(0), "0"),
        (units.number(999.9), "1,000"),
        (units.number(-0.5), "−0.5"),
        (units.number(12345.6), "12,346"),
        (units.size(0), "0 B"),
        (units.size(1023), "1023 B"),
        (units.size(1536), "1.50 KiB"),
        (units.size(24 << 30), "24.0 GiB"),
        (units.size(-180 << 20), "−180 MiB"),
        (units.size(5 << 50), "5120 TiB"),
        (units.duration(0), "0 s"),
        (units.duration(0.00085), "850 µs"),
        (units.duration(0.0125), "12.5 ms"),
        (units.duration(0.9999), "1 s"),
        (units.duration(59.99), "1 min 0 s"),
        (units.duration(725), "12 min 5 s"),
        (units.duration(11220), "3 h 7 min"),
        (units.share(0.0412), "+4.1 %"),
        (units.share(-0.5), "−50 %"),
        (units.with_error(0.69342, 0.0617), "0.693 ± 0.062"),
        (units.with_error(12.0, 3.0), "12.0 ± 3.0"),
        (units.with_error(1.0, 0.0), "1.000 ± 0.000"),
        (units.plural(1, "step"), "1 step"),
        (units.plural(1200, "pass", "passes"), "1,200 passes"),
    ],
)
def test_figures_read_well(text, expected):
    assert text == expected
