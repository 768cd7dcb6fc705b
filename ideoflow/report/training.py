"""The curves of the page: loss, learning rate, gradient norm and time over steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median, stdev

from ideoflow.plan.document import Plan
from ideoflow.report.charts import Curve, Point, line_chart, smooth
from ideoflow.report.history import History
from ideoflow.report.markup import Html, tag
from ideoflow.report.parts import remark, section
from ideoflow.report.pictures import spread
from ideoflow.report.units import duration, number, plural, with_error

# Fewer steps than this have no trend to speak of.
_FEW_STEPS = 20


def trend(losses: Sequence[float]) -> tuple[Point, Point, int] | None:
    """(mean, standard error) of the first and of the last tenth, and how many steps a tenth is."""
    if len(losses) < _FEW_STEPS:
        return None
    count = max(len(losses) // 10, 5)
    first, last = losses[:count], losses[-count:]
    return (
        (fmean(first), stdev(first) / math.sqrt(count)),
        (fmean(last), stdev(last) / math.sqrt(count)),
        count,
    )


def training(plan: Plan, history: History) -> Html:
    """Loss, learning rate, gradient norm and time of every step."""
    steps, resumed = history.steps, history.resumed_at
    if not steps:
        return section("training", "Training", remark("No step has been recorded."))
    ends = (min(steps[0].step, 1), steps[-1].step)
    loss, about = _loss_curve(history)
    beyond, lost = loss.beyond(), loss.lost
    marks = []
    if beyond:
        highest = max(beyond, key=lambda point: point[1])
        marks.append(f"▲ {plural(len(beyond), 'step')} beyond the axis, the highest {number(highest[1])} at "
                     f"step {highest[0]:,.0f}. ")  # fmt: skip
    if lost:
        marks.append(
            f"× {plural(len(lost), 'step')} whose loss was not a number, first step {lost[0]:,.0f}. "
        )
    rest = [curve for curve in _other_curves(plan, history) if curve.points]
    return section(
        "training",
        "Training",
        tag("figure", line_chart(loss, ends, resumed, 300), tag("figcaption", about, marks), class_="plot"),
        tag("div", [tag("figure", line_chart(c, ends, resumed, 120), class_="plot") for c in rest],
            class_="multiples"),
    )  # fmt: skip


def _loss_curve(history: History) -> tuple[Curve, str]:
    """The curve of the loss, and what to know when reading it."""
    points, lost = _column(history, "loss")
    reach = smoothing_reach(len(points))
    about = "Dots: each step. "
    if reach:
        about += (
            f"Line: the mean around each step, weighted by exp(−distance / {number(reach)} steps) to both "
            "sides, so it does not lag. "
        )
    summary = plural(len(points), "step")
    if found := trend([y for _, y in points]):
        first, last, count = found
        summary = (
            f"Mean of the first {count} steps {with_error(*first)}, of the last {count} "
            f"{with_error(*last)} (± one standard error). "
        )
        about += summary
    about += (
        "Every step draws its own noise levels, so single losses between 0.3 and 1.3 with spikes are normal "
        "for this model: judge the trend. "
    )
    label = "loss (mean squared error of the velocity)"
    smoothed = smooth(points, reach) if reach else ()
    curve = Curve("loss", "Loss over steps", label, points, smoothed, lost, from_zero=False, caption=summary)
    return curve, about


def _other_curves(plan: Plan, history: History) -> Iterator[Curve]:
    rates, norms, seconds = (_column(history, key)[0] for key in ("learning_rate", "grad_norm", "seconds"))
    limit = plan.tables.train.max_grad_norm
    clipped = (limit, f"clipped to {number(limit)}") if limit else None
    median_time = f"Median {duration(median(y for _, y in seconds))}" if seconds else ""
    yield Curve("learning_rate", "Learning rate over steps", "learning rate", rates)
    yield Curve(
        "grad_norm", "Gradient norm over steps", "gradient norm before clipping", norms, limit=clipped
    )
    yield Curve("seconds", "Seconds of each step", "seconds a step", seconds, caption=median_time)


def _column(history: History, key: str) -> tuple[list[Point], list[float]]:
    """The (step, value) points of one figure, and the steps where it was no number."""
    values = [(step.step, getattr(step, key)) for step in history.steps]
    return [(x, y) for x, y in values if y is not None], [x for x, y in values if y is None]


def smoothing_reach(steps: int) -> float | None:
    """How far the smoothed line looks, in steps; None where there are too few to smooth."""
    return max(2.0, round(steps / 25)) if steps >= _FEW_STEPS else None


def readout(history: History) -> dict[str, list[float | None]]:
    """Figures for the hover readout, evenly thinned: short columns, four digits."""
    steps = spread(history.steps, 1000)
    losses = _column(history, "loss")[0]
    reach = smoothing_reach(len(losses))
    smoothed = dict(smooth(losses, reach)) if reach else {}

    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.4g}")

    return {
        "step": [s.step for s in steps],
        "loss": [short(s.loss) for s in steps],
        "smoothed": [short(smoothed.get(s.step)) for s in steps],
        "learning_rate": [short(s.learning_rate) for s in steps],
        "grad_norm": [short(s.grad_norm) for s in steps],
        "seconds": [short(s.seconds) for s in steps],
    }
