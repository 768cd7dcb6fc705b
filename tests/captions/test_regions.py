"""Boxes as written against boxes worked out by other means."""

from decimal import ROUND_HALF_UP, Decimal
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ideoflow.captions import compile_caption
from ideoflow.captions.regions import PLACES, REGIONS


def box_of(written, size=None):
    result = compile_caption(f"background: b\nobj {written}: d\n", image_size=size)
    assert result.diagnostics == (), written
    return result.captions[0].caption["compositional_deconstruction"]["elements"][0]["bbox"]


def thousandths(value):
    return int(Decimal(value).quantize(Decimal(1), ROUND_HALF_UP))


pairs = st.lists(st.integers(0, 1000), min_size=2, max_size=2).map(sorted)


@given(pairs, pairs)
def test_the_order_of_the_axes_does_not_matter(y, x):
    written = f"y{y[0]}..{y[1]}", f"x{x[0]}..{x[1]}"
    assert box_of(" ".join(written)) == box_of(" ".join(written[::-1])) == [y[0], x[0], y[1], x[1]]


@given(pairs, pairs)
def test_percent_is_a_tenth_of_thousandths(y, x):
    y, x = ([Decimal(n) / 10 for n in pair] for pair in (y, x))
    expected = [int(10 * n) for n in (y[0], x[0], y[1], x[1])]
    assert box_of(f"y{y[0]}%..{y[1]}% x{x[0]}..{x[1]}%") == expected


@given(st.integers(1, 5000), st.integers(1, 5000), st.data())
def test_pixels_are_rounded_half_up(width, height, data):
    y = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2)))
    x = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2)))
    expected = [
        thousandths(Decimal(1000 * a) / b)
        for a, b in ((y[0], height), (x[0], width), (y[1], height), (x[1], width))
    ]
    assert box_of(f"x{x[0]}px..{x[1]}px y{y[0]}px..{y[1]}px", (width, height)) == expected


@given(st.sampled_from(sorted(PLACES)), st.integers(0, 1000), st.integers(0, 1000))
def test_places_touch_the_sides_that_they_name_and_are_centred_else(place, height, width):
    top, left, bottom, right = box_of(f"{place} w{width} h{height}")
    assert (bottom - top, right - left) == (height, width)
    for side, low, high in (("top bottom", top, 1000 - bottom), ("left right", left, 1000 - right)):
        first, last = side.split()
        if first in place:
            assert low == 0
        elif last in place:
            assert high == 0
        else:
            assert abs(low - high) <= 1


def test_thirds_and_halves_tile_the_image():
    for names in (
        ("left-third", "center-third", "right-third"),
        ("top-third", "middle-third", "bottom-third"),
        ("left-half", "right-half"),
        ("top-half", "bottom-half"),
    ):
        boxes = [box_of(name) for name in names]
        assert sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes) == 1_000_000
        assert all(b[0] == a[2] or b[1] == a[3] for a, b in pairwise(boxes))
    assert set(REGIONS) >= {"full", "left-third", "top-half"} and box_of("full") == [0, 0, 1000, 1000]


def test_a_size_line_wins_over_the_image():
    text = "size: 100x200\nbackground: b\nobj y50px..100px x50px..100px: d\n"
    result = compile_caption(text, image_size=(1000, 1000))
    assert '"bbox":[250,500,500,1000]' in result.captions[0].json


NO_BOXES = ["y1..2 x3..4 x5..6", "y1..2", "y2..1 x3..4", "y0..1001 x0..1", "center", "w1 h2", "full y1..2"]


@pytest.mark.parametrize(
    "written", [*NO_BOXES, "y1px..2px x1..2", "left-third right-third", "center center w1 h1"]
)
def test_what_is_no_box_is_an_error_at_its_place(written):
    result = compile_caption(f"background: b\nobj {written}: d\n")
    assert result.captions == ()
    assert all(d.code.id.startswith("IC20") and d.span.line == 2 for d in result.diagnostics)
