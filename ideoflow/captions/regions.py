"""From a box as written (axes, units, places, regions) to Ideogram's ``[y_min, x_min, y_max, x_max]``."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

from ideoflow.captions.nodes import At, Mark
from ideoflow.diagnostics import closest
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_language as codes

Report = Callable[[Code, str, At, str], None]
Size = tuple[int, int]  # width, height in pixels

# Regions name a part of the picture: (y range or None, x range or None); None leaves the axis open.
_THIRDS = ((0, 333), (333, 667), (667, 1000))
REGIONS: dict[str, tuple[tuple[int, int] | None, tuple[int, int] | None]] = {
    "full": ((0, 1000), (0, 1000)),
    "left-half": (None, (0, 500)),
    "right-half": (None, (500, 1000)),
    "top-half": ((0, 500), None),
    "bottom-half": ((500, 1000), None),
    "left-third": (None, _THIRDS[0]),
    "center-third": (None, _THIRDS[1]),
    "right-third": (None, _THIRDS[2]),
    "top-third": (_THIRDS[0], None),
    "middle-third": (_THIRDS[1], None),
    "bottom-third": (_THIRDS[2], None),
}
# Places position a box of a given size: how much of the free room lies above and to the left, in halves.
PLACES: dict[str, tuple[int, int]] = {
    "top-left": (0, 0),
    "top": (0, 1),
    "top-right": (0, 2),
    "left": (1, 0),
    "center": (1, 1),
    "right": (1, 2),
    "bottom-left": (2, 0),
    "bottom": (2, 1),
    "bottom-right": (2, 2),
}

_MEASURE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(%|px)?")


def normal_range(value: str) -> str:
    """A range in its shortest spelling: ``010..040.50%`` becomes ``10..40.5%``."""
    start, _, end = value.partition("..")
    return f"{normal_measure(start)}..{normal_measure(end)}"


@lru_cache(maxsize=4096)
def normal_measure(measure: str) -> str:
    """A measure in its shortest spelling: ``040.50%`` becomes ``40.5%``."""
    match = _MEASURE.fullmatch(measure)
    assert match is not None
    number, unit = match.groups()
    whole, point, fraction = number.partition(".")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (point + fraction if fraction else "") + (unit or "")


def resolve_box(marks: Sequence[Mark], size: Size | None, report: Report) -> list[int] | None:
    """The box that an element's marks describe, or ``None`` where there is none or it is wrong (reported).

    Args:
        marks: the element's marks, of all kinds.
        size: width and height of the image in pixels, where known.
        report: takes a code, a message, a place and a cure.
    """
    boxes = [mark for mark in marks if mark.kind not in ("colour", "words")]
    if len(boxes) == 2 and boxes[0].kind == "y" and boxes[1].kind == "x":  # nearly every box
        y = _range(boxes[0], size, report)
        x = _range(boxes[1], size, report)
        return [y[0], x[0], y[1], x[1]] if y and x else None
    if not boxes:
        return None
    return _mixed(boxes, size, report)


def _mixed(boxes: Sequence[Mark], size: Size | None, report: Report) -> list[int] | None:
    axes: dict[str, tuple[int, int]] = {}
    extents: dict[str, tuple[int, Mark]] = {}
    place: Mark | None = None
    region = False
    good = True
    for mark in boxes:
        if mark.kind in ("h", "w"):
            if mark.kind in extents:
                report(codes.AXIS_TWICE, f"{mark.kind} is given twice", mark.at, "keep one of the two")
                good = False
            length = _thousandths(mark.value, "y" if mark.kind == "h" else "x", mark, size, report)
            good = good and length is not None
            extents[mark.kind] = (length or 0, mark)
        elif mark.kind == "place" and mark.value in PLACES:
            if place is not None:
                report(
                    codes.AXIS_TWICE,
                    f"`{place.value}` and `{mark.value}` are two places",
                    mark.at,
                    "keep one of the two",
                )
                good = False
            place = mark
        elif mark.kind == "place" and mark.value not in REGIONS:
            _unknown_place(mark, report)
            good = False
        else:
            ranges = REGIONS[mark.value] if mark.kind == "place" else (None, None)
            region = region or mark.kind == "place"
            if mark.kind != "place":
                own = _range(mark, size, report)
                good = good and own is not None
                ranges = (own or (0, 0), None) if mark.kind == "y" else (None, own or (0, 0))
            for axis, given in zip("yx", ranges, strict=True):
                if given is not None and axis in axes:
                    report(
                        codes.AXIS_TWICE,
                        f"{axis} is given twice",
                        mark.at,
                        f"keep one of the two, or is this one meant as {'x' if axis == 'y' else 'y'}?",
                    )
                    good = False
                if given is not None:
                    axes[axis] = given
    if not good:
        return None
    if place is not None or extents:
        return _placed(place, extents, axes, boxes, report)
    if len(axes) == 1 and not region:
        axis = next(iter(axes))
        other = "x" if axis == "y" else "y"
        report(
            codes.ONE_AXIS,
            f"this box has {axis} and no {other}",
            boxes[0].at,
            f"add `{other}0..1000` for the full {'width' if other == 'x' else 'height'}",
        )
        return None
    y, x = axes.get("y", (0, 1000)), axes.get("x", (0, 1000))
    return [y[0], x[0], y[1], x[1]]


def _placed(
    place: Mark | None,
    extents: dict[str, tuple[int, Mark]],
    axes: dict[str, tuple[int, int]],
    boxes: Sequence[Mark],
    report: Report,
) -> list[int] | None:
    at = (boxes[0].at[0], boxes[-1].at[1])
    if place is None:
        report(codes.PLACE_WITHOUT_SIZE, "this size has no place", at, "say where: `center w40% h30%`")
        return None
    if axes:
        report(
            codes.PLACE_WITHOUT_SIZE,
            f"`{place.value}` and a range or region say two things",
            at,
            f"write `{place.value} w40% h30%`, or ranges alone",
        )
        return None
    if len(extents) < 2:
        report(
            codes.PLACE_WITHOUT_SIZE,
            f"`{place.value}` does not say how large the box is",
            at,
            f"write `{place.value} w40% h30%`",
        )
        return None
    height, width = extents["h"][0], extents["w"][0]
    down, across = PLACES[place.value]
    top = (1000 - height) * down // 2
    left = (1000 - width) * across // 2
    return [top, left, top + height, left + width]


def _unknown_place(mark: Mark, report: Report) -> None:
    word = mark.value
    axis = re.match(r"([xy])(\d+)(?:[-:_]|\.)(\d+)", word)
    if axis:
        cure = f"write `{axis[1]}{axis[2]}..{axis[3]}`"
        report(codes.BAD_BOX, f"`{word}` is not a range", mark.at, cure)
        return
    if re.fullmatch(r"[xy]\d+", word):
        report(codes.BAD_BOX, f"`{word}` is one end of a range", mark.at, f"write `{word}..1000`")
        return
    if re.match(r"[xywh]-?\d", word):
        report(codes.BAD_BOX, f"`{word}` is not a range", mark.at, "write it as `y380..660`, from 0 to 1000")
        return
    if re.fullmatch(r"[0-9A-Fa-f]{6}", word):
        report(
            codes.BAD_BOX,
            f"`{word}` is no place; a colour begins with #",
            mark.at,
            f"write `#{word.upper()}`",
        )
        return
    near = None if word in ("bbox", "box") else closest(word, (*PLACES, *REGIONS))
    cure = f"did you mean `{near}`?" if near else "name the axes: `y380..660 x590..720`"
    report(codes.BAD_BOX, f"`{word}` is no place and no region", mark.at, cure)


def _range(mark: Mark, size: Size | None, report: Report) -> tuple[int, int] | None:
    first, _, last = mark.value.partition("..")
    if first.isdigit() and last.isdigit():  # the grammar has passed ASCII digits only
        start, end = int(first[:9]), int(last[:9])
        if start <= end <= 1000:
            return start, end
    elif not first.endswith(("%", "x")):
        first += last.lstrip("0123456789.")  # y10..40% is percent on both ends
    axis = mark.kind
    low = _thousandths(first, axis, mark, size, report)
    if low is None:
        return None
    high = _thousandths(last, axis, mark, size, report)
    if high is None:
        return None
    if low > high:
        report(
            codes.REVERSED_RANGE,
            f"{axis} runs backwards",
            mark.at,
            f"write `{axis}{mark.value.partition('..')[2]}..{mark.value.partition('..')[0]}`",
        )
        return None
    return low, high


def _thousandths(measure: str, axis: str, mark: Mark, size: Size | None, report: Report) -> int | None:
    """A measure in thousandths of the axis, rounded half up."""
    match = _MEASURE.fullmatch(measure[:40])
    number, unit = match.groups() if match else ("9" * 9, None)
    value = Fraction(number)
    if unit == "px":
        if size is None:
            report(
                codes.NO_IMAGE_SIZE,
                "pixels, and the image's size is not known",
                mark.at,
                "add a line `size: WIDTHxHEIGHT`, or use percent",
            )
            return None
        whole = size[1] if axis == "y" else size[0]
        if value > whole:
            report(
                codes.OUT_OF_RANGE,
                f"{measure} is outside of an image {whole} pixels {'high' if axis == 'y' else 'wide'}",
                mark.at,
                f"use 0px to {whole}px",
            )
            return None
        value = value * 1000 / whole
    elif unit == "%":
        value *= 10
        if value > 1000:
            report(codes.OUT_OF_RANGE, f"{measure} is more than the image", mark.at, "use 0% to 100%")
            return None
    elif value > 1000 or value.denominator != 1:
        report(
            codes.OUT_OF_RANGE,
            f"{_cut(measure)} is not a whole number from 0 to 1000",
            mark.at,
            "use 0 to 1000, or write the unit: 40% or 480px",
        )
        return None
    return int(value + Fraction(1, 2))


def _cut(text: str) -> str:
    return text if len(text) <= 20 else text[:20] + "..."
