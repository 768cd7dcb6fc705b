"""Charts: round ticks, the smoothing against its formula, thinning that keeps extremes."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ideoflow.report.charts import Bars, Curve, Segment, bar_chart, ceiling, line_chart, smooth, thin, ticks
from ideoflow.report.units import duration

values = st.floats(-1e9, 1e9, allow_nan=False)


@given(values, st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_evenly_spaced_and_inside(low, width, about):
    high = low + width
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return
    found = ticks(low, high, about)
    step = 1e-9 * max(abs(low), abs(high), 1)
    assert len(found) <= 2 * about
    assert all(low - step <= v <= high + step for v in found)
    gaps = {float(f"{b - a:.3g}") for a, b in pairwise(found)}
    assert len(gaps) <= 1 or max(gaps) - min(gaps) <= 2 * step
    for gap in gaps if width > 1e-3 * abs(low) else ():
        assert round(gap / 10 ** math.floor(math.log10(gap) + 1e-9), 2) in (1, 2, 5)


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 300, 6, [0, 50, 100, 150, 200, 250, 300]),
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 1.32, 5, [0.4, 0.6, 0.8, 1.0, 1.2]),
        (0, 2e-4, 4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (7, 7, 5, [7]),
    ],
)
def test_ticks_that_a_person_would_choose(low, high, about, expected):
    assert ticks(low, high, about) == expected


curves = st.lists(
    st.tuples(st.integers(0, 500), st.floats(-100, 100)), min_size=1, max_size=60, unique_by=lambda p: p[0]
)


@given(curves, st.floats(0.5, 50))
def test_smoothing_is_the_weighted_mean_it_says(points, reach):
    points = sorted(points)
    x, y = np.array(points, dtype=float).T
    weights = np.exp(-np.abs(x[:, None] - x[None]) / reach)
    expected = weights @ y / weights.sum(1)
    found = smooth(points, reach)
    assert [p[0] for p in found] == [p[0] for p in points]
    np.testing.assert_allclose([p[1] for p in found], expected, atol=1e-9, rtol=1e-9)


def test_smoothing_has_no_lag():
    line = [(x, 3.0 * x) for x in range(200)]
    middle = smooth(line, 5)[90:110]
    np.testing.assert_allclose([y for _, y in middle], [3.0 * x for x, _ in middle], rtol=1e-6)


def test_thinning_keeps_the_ends_and_every_extreme():
    rng = np.random.default_rng(0)
    points = [(i, float(v)) for i, v in enumerate(rng.standard_normal(20_000))]
    found = thin(points, 100)
    assert len(found) <= 200 and set(found) <= set(points)
    assert found == sorted(found)
    for column in range(0, 20_000, 5000):
        part = [p for p in points if column <= p[0] < column + 5000]
        assert {max(part, key=lambda p: p[1]), min(part, key=lambda p: p[1])} <= set(found)
    assert thin(points[:150], 100) == points[:150]


def test_an_axis_is_not_flattened_by_one_spike():
    usual = [0.5 + 0.001 * i for i in range(100)]
    assert ceiling(usual) == max(usual)
    assert ceiling([*usual, 40.0]) < 1
    assert ceiling([1.0, 40.0]) == 40.0, "too few to call one an exception"
    assert ceiling([1.0] * 30) == 1.0
    curve = Curve("loss", "t", "l", [*enumerate(usual), (100, 40.0)])
    assert curve.beyond() == [(100, 40.0)]
    assert "step 100: 40" in line_chart(curve, (0, 100), (), 300)


def test_a_point_is_where_its_value_says():
    curve = Curve("k", "t", "l", [(0, 0.0), (50, 1.0), (100, 2.0)])
    top = curve.span()[1]
    svg = line_chart(curve, (0, 100), (), 100)
    assert f"M0.0 100.0L500.0 {round(100 * (1 - 1 / top), 1)}L1000.0 {round(100 * (1 - 2 / top), 1)}" in svg


def test_bars_are_as_long_as_their_values():
    rows = [Bars("a", (Segment("x", 30.0, 0), Segment("y", 10.0, 1)), (Segment("m", 50.0),))]
    svg = bar_chart("b", "t", rows, duration, (1.0, "seconds"))
    widths = [float(part.split("%")[0]) for part in svg.split('width="')[2:]]
    assert widths[0] / widths[2] == pytest.approx(30 / 50, rel=1e-3)
    assert widths[1] / widths[2] == pytest.approx(10 / 50, rel=2e-3)
    assert "40 s predicted" in svg and "50 s measured" in svg


def test_a_run_of_many_steps_and_failures_stays_a_small_drawing():
    points = [(x, 1.0 + x % 7 if x % 60 else 90.0 + x) for x in range(30_000)]
    curve = Curve("loss", "t", "l", points, smooth(points, 9), lost=list(range(20_000)))
    svg = line_chart(curve, (0, 30_000), (), 300)
    assert len(svg) < 100_000 and svg.count("<text") < 400
    assert "step 29940: 30,030" in svg, "the highest keeps its mark"
