"""Sizes on the model's grid: properties that hold for every picture."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ideoflow.data.buckets import bucket_size, center_crop

SIDES = st.integers(16, 12_000)
RESOLUTIONS = st.integers(4, 128).map(lambda n: 16 * n)


@given(SIDES, SIDES, RESOLUTIONS, st.sampled_from(["preserve", "square"]))
def test_sides_are_multiples_of_16(width, height, resolution, aspect):
    for side in bucket_size(width, height, resolution, aspect):
        assert side % 16 == 0 and side >= 64


@given(SIDES, SIDES, RESOLUTIONS)
def test_area_aspect_and_crop(width, height, resolution):
    w, h = bucket_size(width, height, resolution, "preserve")
    ideal = resolution / math.sqrt(max(width, height) / min(width, height))
    if ideal >= 64:
        # The shorter side is less than one token off; the longer follows it.
        below, above = (1 - 16 / ideal) ** 2, (1 + 16 / ideal) ** 2
        assert below * (1 - 8 / max(w, h)) <= w * h / resolution**2 <= above * (1 + 16 / max(w, h))
    left, top, right, bottom = center_crop(width, height, (w, h)).window
    scale = w / (right - left)
    lost_columns, lost_rows = (width - (right - left)) * scale, (height - (bottom - top)) * scale
    assert min(lost_columns, lost_rows) <= 1e-6, "one axis is kept whole"
    assert max(lost_columns, lost_rows) <= 8 + 1e-6, "at most half a token of the other is cropped"


@given(SIDES, SIDES, RESOLUTIONS)
def test_a_turned_picture_has_the_turned_size(width, height, resolution):
    size = bucket_size(width, height, resolution, "preserve")
    assert bucket_size(height, width, resolution, "preserve") == size[::-1]


@given(SIDES, SIDES, st.sampled_from(["preserve", "square"]))
def test_the_crop_is_the_largest_window_of_the_middle(width, height, aspect):
    size = bucket_size(width, height, 256, aspect)
    left, top, right, bottom = center_crop(width, height, size).window
    assert 0 <= left < right <= width + 1e-6 and 0 <= top < bottom <= height + 1e-6
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    assert left == pytest.approx(width - right, abs=1e-6) and top == pytest.approx(height - bottom, abs=1e-6)


@given(st.integers(16, 300), st.integers(16, 300), st.sampled_from(["preserve", "square"]))
def test_pillow_takes_every_window(width, height, aspect):
    size = bucket_size(width, height, 64, aspect)
    window = center_crop(width, height, size).window
    assert Image.new("L", (width, height)).resize(size, Image.Resampling.LANCZOS, box=window).size == size


@pytest.mark.parametrize(
    ("picture", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((4000, 3000), 1024, (1200, 896)),
        ((3000, 4000), 1024, (896, 1200)),
        ((500, 500), 512, (512, 512)),
        ((1600, 100), 256, (1024, 64)),
    ],
)
def test_sizes_by_hand(picture, resolution, expected):
    assert bucket_size(*picture, resolution, "preserve") == expected
    assert bucket_size(*picture, resolution, "square") == (resolution, resolution)
