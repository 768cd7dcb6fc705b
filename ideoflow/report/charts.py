"""Charts as inline SVG: lines over steps, and bars of predicted against measured.

Positions along x are percentages of the drawing's width and only the curves are stretched to it, so that a
chart fits any screen while its lettering keeps its size. Colours and fonts are the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ideoflow.report.markup import Child, Html, tag
from ideoflow.report.units import number

# Inner coordinates of stretched curves, and the most columns that a curve is drawn with.
_WIDTH = 1000
_COLUMNS = 500
_MARKS = 50  # columns for marks that stand apart from a curve
_SMALL = 200  # height in pixels up to which a chart gets fewer words

Point = tuple[float, float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values in [low, high], about so many, at steps of 1, 2 or 5 times a power of ten."""
    if not low < high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    # Where two steps come equally near the wanted number, the narrower one.
    choices = (_multiples(low, high, m * power) for m in (1, 2, 5, 10))
    return min(choices, key=lambda found: abs(len(found) - about))


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def smooth(points: Sequence[Point], reach: float) -> list[Point]:
    """The mean around each point, weighted by exp(-|distance in x| / reach): it has no lag.

    Two sweeps of a running sum, forwards and backwards, give it in linear time. ``points`` ascend in x.
    """

    def sweep(items: Iterable[Point]) -> list[Point]:
        """(weighted sum, sum of weights) of each point and those before it."""
        sums: list[Point] = []
        total, weight, last = 0.0, 0.0, 0.0
        for x, y in items:
            fade = math.exp(-abs(x - last) / reach)
            total, weight, last = total * fade + y, weight * fade + 1, x
            sums.append((total, weight))
        return sums

    forwards, backwards = sweep(points), sweep(reversed(points))[::-1]
    # Each sweep counts the point itself.
    return [
        (x, (f[0] + b[0] - y) / (f[1] + b[1] - 1))
        for (x, y), f, b in zip(points, forwards, backwards, strict=True)
    ]


def thin(points: Sequence[Point], columns: int = _COLUMNS) -> list[Point]:
    """The lowest and the highest point of each of ``columns`` columns, where there are more than that."""
    if len(points) <= 2 * columns:
        return list(points)
    first, last = points[0][0], points[-1][0]
    groups: dict[int, list[Point]] = {}
    for x, y in points:
        groups.setdefault(min(int((x - first) / (last - first) * columns), columns - 1), []).append((x, y))
    kept = (sorted({min(g, key=lambda p: p[1]), max(g, key=lambda p: p[1])}) for g in groups.values())
    return [point for group in kept for point in group]


def ceiling(values: Sequence[float]) -> float:
    """The top of an axis: the highest value, unless a few stand so far out that they flatten the rest."""
    ordered = sorted(values)
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    top = ordered[0] + 2.5 * (usual - ordered[0])
    return top if len(ordered) >= 20 and ordered[-1] > top > ordered[0] else ordered[-1]


@dataclass(frozen=True)
class Curve:
    """A figure over steps.

    Args:
        key: names the column of the page's data that the hover readout shows.
        label: the y axis, with its unit.
        points: (step, value), ascending; steps whose value was no number are in ``lost``.
        smoothed: a second, bold line; the points are then drawn faint.
        from_zero: whether the y axis starts at zero.
        limit: a horizontal line and its name.
        caption: what the chart shows, for those who cannot see it.
    """

    key: str
    title: str
    label: str
    points: Sequence[Point]
    smoothed: Sequence[Point] = ()
    lost: Sequence[float] = ()
    from_zero: bool = True
    limit: tuple[float, str] | None = None
    caption: str = ""

    def span(self) -> Point:
        """The ends of the y axis."""
        values = [y for _, y in self.points]
        top = ceiling(values) if values else 1.0
        bottom = 0.0 if self.from_zero else min(values, default=0.0)
        if self.limit and self.limit[0] <= 1.5 * top:
            top = max(top, self.limit[0])
        margin = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
        return bottom if self.from_zero else bottom - margin, top + margin

    def beyond(self) -> list[Point]:
        """The points above the end of the axis; they are drawn as marks at its top."""
        top = self.span()[1]
        return [point for point in self.points if point[1] > top]


@dataclass(frozen=True)
class _Frame:
    """Where values lie in a chart of ``height`` pixels."""

    first: float
    last: float
    bottom: float
    top: float
    height: int

    def across(self, step: float) -> float:
        return (step - self.first) / (self.last - self.first)

    def x(self, step: float) -> str:
        return f"{100 * self.across(step):.2f}%"

    def y(self, value: float) -> float:
        """Pixels from the top; what lies above the axis is held at its end."""
        return max(round(self.height * (self.top - value) / (self.top - self.bottom), 1), 0.0)

    def path(self, points: Iterable[Point], between: str, after: str = "") -> str:
        """Path data in the stretched drawing: points joined by ``between``, each with ``after`` behind it."""
        places = (f"{_WIDTH * self.across(x):.1f} {self.y(y):.1f}{after}" for x, y in points)
        return "M" + between.join(places)


def line_chart(curve: Curve, steps: Point, resumed: Sequence[int], height: int) -> Html:
    """A curve over ``steps`` (first, last), with a dashed line wherever a run was ``resumed``."""
    first, last = steps if steps[0] < steps[1] else (steps[0] - 1, steps[0] + 1)
    frame = _Frame(first, last, *curve.span(), height)
    size = {"width": "100%", "height": height}
    drawing = tag(
        "svg", _curves(curve, frame), viewBox=f"0 0 {_WIDTH} {height}", preserveAspectRatio="none", **size
    )
    parts = [
        *_axes(curve, frame),
        *_resumed(frame, resumed),
        drawing,
        *_limit(curve, frame),
        *_marks(curve, frame),
        _line("cursor", 0, 0, 0, height),
    ]
    data = {"data_key": curve.key, "data_first": f"{first:g}", "data_last": f"{last:g}"}
    return _svg(f"chart-{curve.key}", curve.title, curve.caption, parts, height + 40, "chart lines", **data)


def _axes(curve: Curve, frame: _Frame) -> Iterator[Html]:
    height, large = frame.height, frame.height > _SMALL
    for value in ticks(frame.bottom, frame.top, 5 if large else 4):
        y = frame.y(value)
        yield _line("grid", 0, y, "100%", y)
        yield _text(number(value), "tick", -8, y, dy="0.32em", text_anchor="end")
    for value in ticks(frame.first, frame.last, 6 if large else 4):
        if value == int(value):
            x = frame.x(value)
            yield _line("notch", x, height, x, height + 5)
            yield _text(f"{value:,.0f}", "tick", x, height + 18, text_anchor="middle")
    yield _line("axis", 0, height, "100%", height)
    yield _text("step", "label", "100%", height + 34, text_anchor="end")
    yield _text(curve.label, "label", -48, -12)


def _resumed(frame: _Frame, resumed: Sequence[int]) -> Iterator[Html]:
    for step in resumed:
        if frame.first <= step <= frame.last:
            x = frame.x(step)
            yield _line("resumed", x, 0, x, frame.height)
            if frame.height > _SMALL:
                left = frame.across(step) > 0.5
                yield _text(
                    "resumed", "label", x, 10, dx=-4 if left else 4, text_anchor="end" if left else "start"
                )


def _limit(curve: Curve, frame: _Frame) -> Iterator[Html]:
    if curve.limit and curve.limit[0] <= frame.top:
        y = frame.y(curve.limit[0])
        yield _line("limit", 0, y, "100%", y)
        yield _text(curve.limit[1], "label", "100%", y, dy=-5, text_anchor="end")


def _curves(curve: Curve, frame: _Frame) -> Iterator[Html]:
    shown = thin(curve.points)
    if curve.smoothed:
        dots = [point for point in shown if point[1] <= frame.top]
        yield tag("path", class_="dots", d=frame.path(dots, "M", "h0"))
        yield tag("path", class_="curve", d=frame.path(thin(curve.smoothed), "L"))
    elif len(shown) == 1:
        yield tag("path", class_="dots strong", d=frame.path(shown, "M", "h0"))
    elif shown:
        yield tag("path", class_="curve thin", d=frame.path(shown, "L"))


def _marks(curve: Curve, frame: _Frame) -> Iterator[Html]:
    for step, value in thin(curve.beyond(), _MARKS):
        tip = tag("title", f"step {step:.0f}: {number(value)}")
        yield _text((tip, "▲"), "outlier", frame.x(step), 8, text_anchor="middle")
    for step, _ in thin([(step, 0.0) for step in curve.lost], _MARKS):
        tip = tag("title", f"step {step:.0f}: not a number")
        yield _text((tip, "×"), "lost", frame.x(step), frame.height - 4, text_anchor="middle")


@dataclass(frozen=True)
class Segment:
    """A part of a bar; ``colour`` counts through the style sheet's, None is plain ink."""

    name: str
    value: float
    colour: int | None = None


@dataclass(frozen=True)
class Bars:
    """What was predicted for one thing, above what was measured; either may be empty."""

    label: str
    predicted: tuple[Segment, ...]
    measured: tuple[Segment, ...]


_BAR, _GAP, _HEAD = 15, 3, 32  # of one bar; below it; for a row's name above the first


def bar_chart(
    id: str,
    title: str,
    rows: Sequence[Bars],
    show: Callable[[float], str],
    scale: tuple[float, str],
    limit: tuple[float, str] | None = None,
) -> Html:
    """Rows of two bars each, or of one where nothing was measured at all.

    ``scale`` is the axis' unit (size, name), ``limit`` a line (value, name).
    """
    sides = ("predicted", "measured") if any(row.measured for row in rows) else ("predicted",)
    longest = max((sum(s.value for s in side) for r in rows for side in (r.predicted, r.measured)), default=0)
    limit = limit if limit and limit[0] <= 1.6 * longest else None
    # The figure stands behind its bar, so the longest leaves room for it.
    end = max(longest * 1.02, limit[0] * 1.02 if limit else 0) or 1.0
    row_height = _HEAD + len(sides) * (_BAR + _GAP)
    room, height = 0.74, row_height * len(rows)
    parts: list[Html] = []

    def across(value: float) -> str:
        return f"{100 * room * value / end:.2f}%"

    for value in ticks(0, end / scale[0], 6):
        x = across(value * scale[0])
        parts.append(_line("grid", x, 0, x, height))
        parts.append(_text(number(value), "tick", x, height + 16, text_anchor="middle"))
    parts.append(_line("axis", 0, height, "100%", height))
    parts.append(_text(scale[1], "label", "100%", height + 16, text_anchor="end"))
    for index, row in enumerate(rows):
        y = row_height * index + 22
        parts.append(_text(row.label, "row", 0, y - 5))
        for side in sides:
            start, segments = 0.0, row.predicted if side == "predicted" else row.measured
            for segment in segments:
                colour = "ink" if segment.colour is None else f"c{segment.colour % 8}"
                tip = tag("title", f"{segment.name}: {show(segment.value)}")
                place = {"x": across(start), "width": across(segment.value), "y": y, "height": _BAR}
                parts.append(tag("rect", tip, class_=f"bar {colour}", **place))
                start += segment.value
            text = f"{show(start)} {side}" if segments else f"not {side}"
            parts.append(_text(text, "tick", across(start), y, dx=6, dy="0.95em"))
            y += _BAR + _GAP
    if limit:
        x = across(limit[0])
        parts.append(_line("limit", x, 0, x, height))
        parts.append(_text(limit[1], "label", x, -4, text_anchor="middle"))
    told = {r.label: {"predicted": _sum(r.predicted, show), "measured": _sum(r.measured, show)} for r in rows}
    caption = "; ".join(
        f"{label}: {', '.join(f'{sums[side]} {side}' for side in sides)}" for label, sums in told.items()
    )
    return _svg(id, title, caption, parts, height + 24, "chart bars")


def _sum(segments: Sequence[Segment], show: Callable[[float], str]) -> str:
    return show(sum(s.value for s in segments)) if segments else "nothing"


# Elements -------------------------------------------------------------------------------------------------


def _line(class_: str, x1: float | str, y1: float, x2: float | str, y2: float) -> Html:
    return tag("line", class_=class_, x1=x1, y1=y1, x2=x2, y2=y2)


def _text(words: Child, class_: str, x: float | str, y: float, **attributes: Any) -> Html:
    return tag("text", words, class_=class_, x=x, y=y, **attributes)


def _svg(
    id: str, title: str, caption: str, parts: Sequence[Html], height: int, class_: str, **data: str
) -> Html:
    """A drawing as wide as its place, with a title and a description for those who cannot see it."""
    heads = [tag("title", title, id=f"{id}-title")]
    if caption:
        heads.append(tag("desc", caption, id=f"{id}-desc"))
    named = f"{id}-title" + (f" {id}-desc" if caption else "")
    size = {"width": "100%", "height": height}
    return tag("svg", heads, parts, class_=class_, role="img", aria_labelledby=named, **size, **data)
