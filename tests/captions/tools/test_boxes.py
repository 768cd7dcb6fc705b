"""Boxes against rendered masks: the box is painted, the pixels are transformed, and the two must agree."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ideoflow.captions.boxes import GRID, Geometry, map_box, obstacles, transform_caption, visible_share
from ideoflow.diagnostics.codes import all_codes


@st.composite
def boxes(draw, smallest: int = 1):
    y0, x0 = draw(st.integers(0, GRID - smallest)), draw(st.integers(0, GRID - smallest))
    return [y0, x0, draw(st.integers(y0 + smallest, GRID)), draw(st.integers(x0 + smallest, GRID))]


@st.composite
def geometries(draw, crops: bool = True):
    width, height = draw(st.integers(20, 400)), draw(st.integers(20, 400))
    crop = None
    if crops and draw(st.booleans()):
        left, top = draw(st.integers(-width // 2, width - 10)), draw(st.integers(-height // 2, height - 10))
        right, bottom = draw(st.integers(left + 10, width * 2)), draw(st.integers(top + 10, height * 2))
        crop = (left, top, right, bottom)
    return Geometry(width, height, crop, draw(st.sampled_from([0, 90, 180, 270])), draw(st.booleans()))


def transform_pixels(mask: np.ndarray, geometry: Geometry) -> np.ndarray:
    """The same geometry done by Pillow on pixels: it knows nothing of boxes."""
    image = Image.fromarray(mask)
    if geometry.crop:
        image = image.crop(geometry.crop)  # pads with 0 outside
    turn = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
    if geometry.rotate:  # Pillow's names count counter-clockwise
        image = image.transpose(turn[geometry.rotate])
    if geometry.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def paint(box, width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    y0, x0, y1, x1 = box
    mask[round(y0 * height / GRID):round(y1 * height / GRID),
         round(x0 * width / GRID):round(x1 * width / GRID)] = 255  # fmt: skip
    return mask


@given(boxes(smallest=60), geometries())
@settings(max_examples=400, deadline=None)
def test_a_mapped_box_covers_the_transformed_pixels(box, geometry):
    before = paint(box, geometry.width, geometry.height)
    after = transform_pixels(before, geometry)
    rows, columns = np.nonzero(after)
    if not len(rows):
        assert visible_share(box, geometry) < 0.5 or min(before.shape) < 40
        return
    height, width = after.shape
    drawn = [
        rows.min() / height,
        columns.min() / width,
        (rows.max() + 1) / height,
        (columns.max() + 1) / width,
    ]
    mapped = np.array(map_box(box, geometry)) / GRID
    # Half a source pixel was lost when the mask was painted, half a grid unit when the box was rounded.
    pixel = np.array([1 / height, 1 / width] * 2)
    assert np.all(np.abs(mapped - drawn) <= 0.5 * pixel + 0.5 / GRID + 1e-9), (mapped, drawn)


@given(boxes(smallest=80), geometries())
@settings(max_examples=300, deadline=None)
def test_the_visible_share_is_the_share_of_pixels_that_stay(box, geometry):
    before = paint(box, geometry.width * 3, geometry.height * 3)
    finer = Geometry(
        geometry.width * 3, geometry.height * 3, geometry.crop and tuple(3 * v for v in geometry.crop),
        geometry.rotate, geometry.flip,
    )  # fmt: skip
    after = transform_pixels(before, finer)
    counted = np.count_nonzero(after) / np.count_nonzero(before)
    rows, columns = np.nonzero(before.any(1))[0], np.nonzero(before.any(0))[0]
    tolerance = 1.5 / len(rows) + 1.5 / len(columns)
    assert visible_share(box, geometry) == pytest.approx(counted, abs=tolerance)


@given(boxes(), geometries())
@example([0, 0, 1, 1], Geometry(100, 100, (-900, -900, 1000, 1000)))
@settings(max_examples=400, deadline=None)
def test_mapped_boxes_are_boxes_and_keep_an_area(box, geometry):
    y0, x0, y1, x1 = map_box(box, geometry)
    assert 0 <= y0 <= y1 <= GRID and 0 <= x0 <= x1 <= GRID
    if visible_share(box, geometry) > 0:
        assert y0 < y1 and x0 < x1


@given(boxes(smallest=0), geometries(crops=False))
def test_whole_pictures_map_exactly_and_undo(box, geometry):
    assert map_box(box, Geometry(geometry.width, geometry.height)) == box
    assert visible_share(box, geometry) == 1
    # Mirroring undoes itself; a rotated and mirrored picture is undone by the same once more, a merely
    # rotated one by the rest of the turn.
    back = geometry.rotate if geometry.flip else (360 - geometry.rotate) % 360
    undo = Geometry(geometry.width, geometry.height, None, back, geometry.flip)
    assert map_box(map_box(box, geometry), undo) == box


def caption(*elements, **parts):
    return {**parts, "compositional_deconstruction": {"background": "A lake.", "elements": list(elements)}}


SAIL = {"type": "obj", "bbox": [380, 590, 660, 720], "desc": "A sailboat", "color_palette": ["#112233"]}
WORDS = {"type": "text", "bbox": [40, 80, 120, 920], "text": "STILL\nWATER", "desc": "A headline"}
BLANK = {"type": "obj", "desc": "Mist"}


def test_crop_clips_drops_and_reports():
    source = caption(SAIL, WORDS, BLANK)
    kept = copy.deepcopy(source)
    result = transform_caption(source, Geometry(1000, 1000, (0, 300, 650, 1000)), path="a.icap")
    assert source == kept, "the given caption was changed"
    elements = result.caption["compositional_deconstruction"]["elements"]
    assert [e["desc"] for e in elements] == ["A sailboat", "Mist"]
    # x 590..650 of a window 650 wide; y 80..360 of one 700 high
    assert elements[0]["bbox"] == [114, 908, 514, 1000]
    assert list(elements[0]) == list(SAIL)
    assert result.dropped == (1,)
    assert [(d.code.id, d.severity, d.span.path) for d in result.diagnostics] == [
        ("IC702", "warning", "a.icap")
    ]


def test_the_share_that_must_stay_visible_is_the_callers():
    half = Geometry(1000, 1000, (655, 0, 1000, 1000))  # half of the boat's width
    assert transform_caption(caption(SAIL), half).dropped == ()
    strict = transform_caption(caption(SAIL), half, min_visible=0.6)
    assert strict.dropped == (0,) and strict.diagnostics[0].code.id == "IC701"
    gone = transform_caption(caption(SAIL), Geometry(1000, 1000, (0, 0, 100, 100)), min_visible=0)
    assert gone.dropped == (0,), "a box wholly outside cannot stay"


def test_padding_moves_boxes_and_drops_none():
    result = transform_caption(caption(SAIL, WORDS), Geometry(1000, 500, (0, -250, 1000, 750)))
    assert [e["bbox"] for e in result.caption["compositional_deconstruction"]["elements"]] == [
        [440, 590, 580, 720], [270, 80, 310, 920]]  # fmt: skip
    assert result.dropped == () and result.diagnostics == ()


FLIP, TURN = Geometry(100, 100, flip=True), Geometry(100, 100, rotate=90)


@pytest.mark.parametrize(("source", "refused_by"), [
    (caption(SAIL), ()),
    (caption(WORDS), (FLIP, TURN)),
    (caption({**SAIL, "desc": "A boat on the Left"}), (FLIP, TURN)),
    (caption({**SAIL, "desc": "The rightmost of three"}), (FLIP, TURN)),
    (caption({**SAIL, "desc": "A left-handed player"}), (FLIP, TURN)),
    (caption({**SAIL, "desc": "A bright, copyrighted right angle"}), ()),
    (caption({**SAIL, "desc": 'A sign that reads "OPEN"'}), (FLIP, TURN)),
    (caption({**SAIL, "desc": "左边的船"}), (FLIP, TURN)),
    (caption({**SAIL, "desc": "A cup above a shelf"}), (TURN,)),
    (caption(SAIL, high_level_description="A boat at right"), (FLIP, TURN)),
    (caption(SAIL, style_description={"lighting": "Sun from the left", "color_palette": ["#000000"]}),
     (FLIP, TURN)),
])  # fmt: skip
def test_flips_that_contradict_the_words_are_refused_unless_forced(source, refused_by):
    for geometry in (FLIP, TURN):
        result = transform_caption(source, geometry)
        assert result.refused == (geometry in refused_by), geometry
        assert bool(obstacles(source, geometry)) == result.refused
        if result.refused:
            assert [(d.code.id, d.severity) for d in result.diagnostics] == [("IC703", "error")]
            forced = transform_caption(source, geometry, force=True)
            assert not forced.refused and forced.diagnostics[0].severity == "warning"
    assert not transform_caption(source, Geometry(100, 100, (0, 0, 100, 100))).refused


def test_impossible_geometries_are_rejected():
    for bad in ({"width": 0, "height": 5}, {"width": 5, "height": 5, "crop": (2, 0, 2, 5)},
                {"width": 5, "height": 5, "rotate": 45}):  # fmt: skip
        with pytest.raises(ValueError):
            Geometry(**bad)


def test_the_codes_are_in_the_table():
    assert {"IC701", "IC702", "IC703"} <= set(all_codes())
