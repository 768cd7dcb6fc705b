"""Boxes follow the pixels: crop, pad, rotate by 90 degrees, flip; resizing costs nothing.

A caption's boxes are fractions of the picture, in thousandths, as ``[y_min, x_min, y_max, x_max]``. A
training pipeline that crops or mirrors the pixels and leaves the boxes where they were teaches the model
wrong layouts, and silently. The functions here are pure: a :class:`Geometry` says what happens to the
pixels, :func:`map_box` what happens to one box, :func:`transform_caption` what happens to a whole caption.

The order is **crop (or pad), then rotate, then flip**, the order in which image loaders do it; a resize may
happen anywhere in between, since boxes are relative.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ideoflow.captions.emit import prose_of
from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.caption_tools import ELEMENT_DROPPED, MIRROR_REFUSED, TEXT_CUT

GRID = 1000  # boxes count in thousandths of the picture

# (y_min, x_min, y_max, x_max) as fractions of a picture
_Fractions = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a pipeline does to the pixels of one picture.

    Args:
        width, height: size of the source in pixels, after its EXIF orientation has been applied.
        crop: window (left, top, right, bottom) in source pixels, the last two exclusive; fractions are
            allowed, and a window that reaches outside the source pads it. ``None`` is the whole picture.
        rotate: degrees clockwise, after the crop.
        flip: mirrored left to right, after the rotation.

    Raises:
        ValueError: where the source or the window is empty, or the rotation is not a quarter turn.
    """

    width: int
    height: int
    crop: tuple[float, float, float, float] | None = None
    rotate: Literal[0, 90, 180, 270] = 0
    flip: bool = False

    def __post_init__(self) -> None:
        left, top, right, bottom = self.window
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a picture of {self.width}x{self.height} pixels has no boxes")
        if not (left < right and top < bottom):
            raise ValueError(f"the crop window {self.window} is empty")
        if self.rotate not in (0, 90, 180, 270):
            raise ValueError(f"rotate is 0, 90, 180 or 270 degrees, not {self.rotate}")

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The crop window, or the whole picture."""
        return self.crop or (0, 0, self.width, self.height)

    @property
    def mirrors(self) -> bool:
        """Whether left and right change places, or letters are no longer upright."""
        return self.flip or self.rotate != 0


@dataclass(frozen=True, slots=True)
class GeometryResult:
    """A caption after a :class:`Geometry`.

    ``caption`` is ``None`` where the geometry was refused: do not use the transformed pixels then.
    ``dropped`` holds the indices, in the source caption, of the elements that were taken out.
    """

    caption: dict[str, Any] | None
    dropped: tuple[int, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def refused(self) -> bool:
        return self.caption is None


def visible_share(box: Sequence[int], geometry: Geometry) -> float:
    """The share of a box's area, 0..1, that lies inside the crop window.

    Each axis counts by length and the two are multiplied, so that a box without area (a line, a point) is
    visible as far as its line or point is.
    """
    y0, x0, y1, x1 = _in_window(box, geometry)
    return _axis_share(y0, y1) * _axis_share(x0, x1)


def map_box(box: Sequence[int], geometry: Geometry) -> list[int]:
    """``[y_min, x_min, y_max, x_max]`` in the source to the same in the result, clipped to the picture.

    Edges round to the nearest thousandth; a box that had an area keeps one, however small it became. A box
    wholly outside ends on the nearest edge: ask :func:`visible_share` first.
    """
    y0, x0, y1, x1 = (min(max(v, 0.0), 1.0) for v in _in_window(box, geometry))
    if geometry.rotate == 90:
        y0, x0, y1, x1 = x0, 1 - y1, x1, 1 - y0
    elif geometry.rotate == 180:
        y0, x0, y1, x1 = 1 - y1, 1 - x1, 1 - y0, 1 - x0
    elif geometry.rotate == 270:
        y0, x0, y1, x1 = 1 - x1, y0, 1 - x0, y1
    if geometry.flip:
        x0, x1 = 1 - x1, 1 - x0
    (top, bottom), (left, right) = _to_grid(y0, y1), _to_grid(x0, x1)
    return [top, left, bottom, right]


def obstacles(caption: dict[str, Any], geometry: Geometry) -> list[str]:
    """Why the words of a caption would be wrong after this geometry, a line each; empty if they would not.

    A pipeline with random flips asks this before it draws one.
    """
    if not geometry.mirrors:
        return []
    found = []
    texts = [e["text"] for e in caption["compositional_deconstruction"]["elements"] if e["type"] == "text"]
    if texts:
        found.append(f"a text element would be mirrored or turned: {shorten(texts[0])}")
    pattern = _DIRECTIONS if geometry.rotate else _SIDES
    for where, words in prose_of(caption):
        if where[-1] == "text":
            continue
        place = _place_name(where)
        if match := pattern.search(words):
            found.append(f'{place} says "{match.group()}"')
        if match := _QUOTED.search(words):
            found.append(f"{place} quotes words that would be mirrored or turned: {shorten(match.group())}")
    return found


def transform_caption(caption: dict[str, Any], geometry: Geometry, *, min_visible: float = 0.25,
                      min_visible_text: float = 0.9, force: bool = False,
                      path: str | None = None) -> GeometryResult:  # fmt: skip
    """The caption that is right for the transformed pixels. The given caption is left as it is.

    Args:
        caption: a canonical caption.
        geometry: what happened to the pixels.
        min_visible: elements with a smaller visible share of their box are dropped, and reported (IC701).
        min_visible_text: the same for text elements (IC702): half a word is another word.
        force: mirror even where the words contradict it; reported as a warning (IC703).
        path: the file to name in the diagnostics.
    """
    span = Span(path) if path is not None else None
    diagnostics: list[Diagnostic] = []
    if reasons := obstacles(caption, geometry):
        deed = "flip" if geometry.flip else f"rotation by {geometry.rotate} degrees"
        diagnostics.append(Diagnostic(
            MIRROR_REFUSED, f"the {deed} contradicts the caption", span,
            cure="turn flips off for this picture, or force it if the words do not matter",
            notes=tuple(reasons), severity="warning" if force else "error",
        ))  # fmt: skip
        if not force:
            return GeometryResult(None, (), tuple(diagnostics))

    composition = caption["compositional_deconstruction"]
    kept: list[dict[str, Any]] = []
    dropped: list[int] = []
    for index, element in enumerate(composition["elements"]):
        if "bbox" not in element:
            kept.append(element)
            continue
        is_text = element["type"] == "text"
        share, wanted = visible_share(element["bbox"], geometry), min_visible_text if is_text else min_visible
        if share == 0 or share < wanted:
            dropped.append(index)
            diagnostics.append(_dropped(element, index, share, wanted, span))
        else:
            kept.append({**element, "bbox": map_box(element["bbox"], geometry)})
    result = {**caption, "compositional_deconstruction": {**composition, "elements": kept}}
    return GeometryResult(result, tuple(dropped), tuple(diagnostics))


def _in_window(box: Sequence[int], geometry: Geometry) -> _Fractions:
    """The box as fractions of the crop window, not clipped."""
    y0, x0, y1, x1 = box
    left, top, right, bottom = geometry.window

    def across(x: float) -> float:
        return (x * geometry.width / GRID - left) / (right - left)

    def down(y: float) -> float:
        return (y * geometry.height / GRID - top) / (bottom - top)

    return down(y0), across(x0), down(y1), across(x1)


def _axis_share(low: float, high: float) -> float:
    if low == high:
        return 1.0 if 0 <= low <= 1 else 0.0
    return max(0.0, min(high, 1.0) - max(low, 0.0)) / (high - low)


def _to_grid(low: float, high: float) -> tuple[int, int]:
    first, last = math.floor(low * GRID + 0.5), math.floor(high * GRID + 0.5)
    if first == last and low < high:
        # 1e-9 absorbs the float error of an edge that lies on the grid.
        first, last = math.floor(low * GRID + 1e-9), math.ceil(high * GRID - 1e-9)
        if first == last:
            first, last = (first, first + 1) if first < GRID else (GRID - 1, GRID)
    return first, last


_SIDES = re.compile(
    r"\b(?:left|right(?!\s+angle|-angle)|(?:anti|counter)?-?clockwise)"
    r"(?:most|wards?|-hand(?:ed)?|-facing|-leaning|-aligned)?\b|[左右]",
    re.IGNORECASE,
)
_DIRECTIONS = re.compile(
    _SIDES.pattern + r"|\b(?:top|bottom|upper|lower|above|below|beneath|upright|overhead)(?:most)?\b|[上下]",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'"[^"]+"|“[^”]+”|«[^»]+»|「[^」]+」|『[^』]+』')


def _place_name(where: Sequence[str | int]) -> str:
    return f"element {int(where[2]) + 1}" if len(where) > 2 else str(where[-1])


def _dropped(
    element: dict[str, Any], index: int, share: float, wanted: float, span: Span | None
) -> Diagnostic:
    is_text = element["type"] == "text"
    code: Code = TEXT_CUT if is_text else ELEMENT_DROPPED
    what = shorten(element.get("text", "") if is_text else element.get("desc", ""))
    return Diagnostic(
        code,
        f"element {index + 1} ({what}) was dropped: {share:.0%} of its box is left, {wanted:.0%} is needed",
        span, cure="crop less, or lower the share that must stay visible", severity=code.severity,
    )  # fmt: skip


def shorten(words: str, limit: int = 40) -> str:
    """Words on one line, cut for a message."""
    words = " ".join(words.split())
    return words if len(words) <= limit else words[: limit - 3] + "..."
