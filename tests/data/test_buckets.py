"""Sizes on the model's grid and crops: properties that hold for every picture."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ideoflow.data.buckets import bucket_size, center_crop, crop, enlargement, measure, share_cut_away
from ideoflow.recipe import PictureSettings

SIDES = st.integers(16, 12_000)
RATIOS = st.floats(1 / 16, 16)
RESOLUTIONS = st.integers(4, 128).map(lambda n: 16 * n)
KINDS = st.sampled_from(["pixel_area", "pixel"])
SETTINGS = st.builds(
    PictureSettings,
    resolution=RESOLUTIONS,
    resolution_type=KINDS,
    aspect=st.sampled_from(["preserve", "square", "closest", "random"]),
    crop=st.sampled_from(["center", "random", "corner"]),
    target_downsample_size=st.none() | st.integers(64, 4096),
    maximum_image_size=st.none() | st.integers(64, 4096),
)


@given(RATIOS, RESOLUTIONS, KINDS)
def test_sides_are_multiples_of_16(ratio, resolution, kind):
    for side in bucket_size(ratio, resolution, kind):
        assert side % 16 == 0 and side >= 64


@given(RATIOS, st.integers(4, 40).map(lambda n: 16 * n))
def test_no_other_size_weighs_aspect_and_area_better(ratio, resolution):
    """Against every size on the grid: least squares of the two errors, as logarithms."""

    def cost(size):
        aspect = math.log(size[0] / size[1] / ratio)
        area = math.log(size[0] * size[1] / resolution**2)
        return aspect**2 + area**2

    chosen = bucket_size(ratio, resolution)
    others = [(16 * w, 16 * h) for w in range(4, 170) for h in range(4, 170)]
    assert cost(chosen) <= min(map(cost, others)) + 1e-9


@given(st.floats(1 / 3, 3), st.integers(8, 128).map(lambda n: 16 * n))
def test_the_area_is_held(ratio, resolution):
    width, height = bucket_size(ratio, resolution)
    tokens = resolution / 16
    most = 1.1 * math.sqrt(3) / tokens  # each side is at most about half a token off
    assert abs(math.log(width * height / resolution**2)) <= most
    assert abs(math.log(width / height / ratio)) <= most


@given(RATIOS, RESOLUTIONS)
def test_pixel_holds_the_shorter_side(ratio, resolution):
    size = bucket_size(ratio, resolution, "pixel")
    assert min(size) == resolution
    assert math.log(max(size) / min(size)) == pytest.approx(abs(math.log(ratio)), abs=8 / resolution + 0.01)


@given(SIDES, SIDES, RESOLUTIONS, KINDS)
def test_a_turned_picture_has_the_turned_size(width, height, resolution, kind):
    size = bucket_size(width / height, resolution, kind)
    turned = bucket_size(height / width, resolution, kind)[::-1]
    assert all(abs(a - b) <= 16 for a, b in zip(size, turned, strict=True))  # ties may fall either way


@given(SIDES, SIDES, SETTINGS, st.text(max_size=5), st.integers(0, 9), st.booleans())
def test_every_crop_is_inside_and_has_the_aspect_of_its_size(width, height, settings, name, variant, flip):
    size, geometry = crop(width, height, settings, name, variant, flip)
    left, top, right, bottom = geometry.window
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1], rel=1e-6)
    assert (geometry.width, geometry.height, geometry.flip) == (width, height, flip)
    assert crop(width, height, settings, name, variant, flip) == (size, geometry), "chance repeats itself"
    assert crop(width, height, settings, name, variant, not flip)[1].window == geometry.window
    assert 0 <= share_cut_away(geometry) < 1


@given(SIDES, SIDES, RESOLUTIONS)
def test_the_plain_crop_is_the_largest_window_of_the_middle(width, height, resolution):
    size, geometry = crop(width, height, PictureSettings(resolution=resolution))
    left, top, right, bottom = geometry.window
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    assert left == pytest.approx(width - right, abs=1e-6) and top == pytest.approx(height - bottom, abs=1e-6)
    assert geometry == center_crop(width, height, size)


@given(st.integers(16, 300), st.integers(16, 300), SETTINGS)
def test_pillow_takes_every_window(width, height, settings):
    size, geometry = crop(width, height, replace(settings, resolution=64), "a")
    small = (size[0] // 16, size[1] // 16)
    resized = Image.new("L", (width, height)).resize(small, Image.Resampling.BOX, box=geometry.window)
    assert resized.size == small


@pytest.mark.parametrize(
    ("picture", "resolution", "expected"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((4000, 3000), 1024, (1184, 880)),
        ((3000, 4000), 1024, (880, 1184)),
        ((500, 500), 512, (512, 512)),
        ((1600, 100), 256, (1024, 64)),
        ((1536, 640), 1024, (1536, 640)),  # on the grid, and near enough: every pixel stays
        ((1536, 768), 1024, (1456, 720)),
        ((150, 100), 64, (80, 64)),  # with its own aspect, 96 x 64, it would have half as much again
    ],
)
def test_sizes_by_hand(picture, resolution, expected):
    settings = PictureSettings(resolution=resolution)
    assert crop(*picture, settings)[0] == expected
    assert crop(*picture, replace(settings, aspect="square"))[0] == (resolution, resolution)


def test_closest_and_random_aspects():
    settings = PictureSettings(resolution=512, aspect="closest", aspects=(1.0, 2.0, 0.5))
    assert [crop(*s, settings)[0] for s in [(130, 100), (150, 100), (100, 300)]] == [
        (512, 512), (720, 368), (368, 720)]  # fmt: skip
    drawn = [crop(100, 100, replace(settings, aspect="random"), "x", k)[0] for k in range(300)]
    counts = [drawn.count(size) for size in [(512, 512), (720, 368), (368, 720)]]
    assert sum(counts) == 300 and min(counts) > 60, "each a third, within five standard deviations"


def test_random_crops_reach_every_part():
    settings = PictureSettings(resolution=64, aspect="square", crop="random")
    lefts = [crop(200, 100, settings, f"{n}")[1].window[0] for n in range(400)]
    assert 0 <= min(lefts) < 5 and 95 < max(lefts) <= 100
    assert 45 < sum(lefts) / 400 < 55
    assert len({crop(200, 100, settings, "a", k)[1].window for k in range(8)}) == 8


def test_corner_and_no_crop():
    settings = PictureSettings(resolution=64, aspect="square", crop="corner")
    assert crop(200, 100, settings)[1].window == (100, 0, 200, 100)
    size, geometry = crop(205, 100, PictureSettings(resolution=256, crop="off"))
    assert geometry.window == (0, 0, 205, 100) and size == (368, 176)


@pytest.mark.parametrize(
    ("side", "window"),
    [
        (4096, 3276.8),  # scaled down to 1280, of which 1024 are cut out
        (1600, 1280),
        (1500, 1024),  # not above 1536: cut at its own scale
        (1024, 1024),
        (500, 500),  # smaller than the cut: enlarged
    ],
)
def test_scaling_down_before_the_cut(side, window):
    settings = PictureSettings(aspect="square", maximum_image_size=1536, target_downsample_size=1280)
    size, geometry = crop(side, side, settings)
    left, _, right, _ = geometry.window
    assert size == (1024, 1024) and right - left == pytest.approx(window)
    assert enlargement(size, geometry) == pytest.approx(1024 / window)
    assert share_cut_away(geometry) == pytest.approx(1 - (window / side) ** 2)


def test_sizes_are_measured_as_the_resolution_is():
    assert measure(400, 100, "pixel_area") == 200 and measure(400, 100, "pixel") == 100
