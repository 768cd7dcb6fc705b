"""Every place that the scanner finds, cut out of the text and read by tomli, is what tomli read there."""

import math

import pytest
import tomli
from hypothesis import assume, given, settings
from toml_documents import documents

from ideoflow.recipe.places import find_places


def paths_of(data, path=()):
    """Every key and every item in nested data, with its value."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in pairs:
        yield (*path, key), value
        if isinstance(value, dict | list):
            yield from paths_of(value, (*path, key))


def same(a, b):
    """Equality with NaN equal to itself."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


def check(text):
    data = tomli.loads(text)
    places = find_places(text)
    expected = dict(paths_of(data))
    assert places.keys() == expected.keys()
    for path, place in places.items():
        key, value = text[slice(*place.key)], text[slice(*place.value)]
        if isinstance(path[-1], str):
            assert tomli.loads(f"{key} = 0") == {path[-1]: 0}, path
        if value[0] in "[{" or not isinstance(expected[path], dict | list):
            assert same(tomli.loads(f"x = {value}")["x"], expected[path]), path
        else:
            assert place.value == place.key, "a table without a value of its own stands at its name"


@settings(max_examples=100, deadline=None)
@given(documents())
def test_places_hold_what_tomli_read(text):
    try:
        tomli.loads(text)
    except tomli.TOMLDecodeError:
        assume(False)  # the writer made the same dotted key twice
    check(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "a = \"\"\"\"quoted\"\"\"\"\nb = ''''x''''\nc = \"\"\nd = ''",
        'a = """\\\n  x \\""" y"""\nb = 1',
        "a.b.c = 1\na.b.d = [1, [2, 3], {x = 4}]\n[a.e]\n'f.g'.\"h\\u0041\" = 5",
        "[[a]]\nx = 1\n[[a.b]]\n[[a.b]]\ny = 2\n[a.c]\n[[a]]\n[[a.b]]\nz = 3",
        "d = 1979-05-27 07:32:00\ne = 07:32:00 # comment\nf = [ # a\n 1, # b ]\n 2 ]",
        "[ a . 'b' ]\r\nx = 1\r\n",
        "t = {a = {b = [{}, {c = '}'}]}, d.e = \"]\"}",
    ],
)
def test_places_of(text):
    check(text)


def test_an_item_of_an_array_of_tables_stands_at_its_own_header():
    text = "[[a]]\n[[a]]\n[[a]]\n"
    places = find_places(text)
    assert [places["a", i].key for i in range(3)] == [(2, 3), (8, 9), (14, 15)]
