"""The second half of the page: what was planned, against what was measured; why; and with which settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from statistics import median
from typing import Any

from ideoflow.diagnostics import Diagnostic
from ideoflow.plan.document import PHASES, Decision, Phase, Plan, Rejected, Value
from ideoflow.plan.record import STAGE_OF
from ideoflow.report.charts import Bars, Segment, bar_chart
from ideoflow.report.history import History
from ideoflow.report.markup import Child, Html, tag
from ideoflow.report.parts import NOTHING, remark, section, table
from ideoflow.report.units import duration, number, plural, share, signed, size, without_home

STAGE_NAMES = {
    "captions": "Encoding captions",
    "pictures": "Encoding pictures",
    "load": "Loading the model",
    "train": "Training",
    "samples": "Sampling",
}


# Memory ---------------------------------------------------------------------------------------------------


def memory(plan: Plan, history: History) -> Html:
    """Predicted against measured peaks, and the ledger; before anything has run, the predicted ones."""
    measured = {stage.name: stage.peak_bytes for stage in history.stages}
    names = list(dict.fromkeys(line.name for line in plan.ledger.lines))
    places: list[tuple[Phase | None, str]] = [(phase, STAGE_OF[phase]) for phase in PHASES]
    rows, summary = [], []
    for phase, stage in (*places, (None, "load")):
        lines, found = plan.ledger.of(phase) if phase else (), measured.get(stage)
        if lines or found is not None:
            segments = tuple(Segment(line.name, line.bytes, names.index(line.name)) for line in lines)
            seen = () if found is None else (Segment("measured", found),)
            rows.append(Bars(STAGE_NAMES[stage], segments, seen))
            predicted = sum(line.bytes for line in lines) if lines else None
            summary.append((STAGE_NAMES[stage], *_compared(predicted, found)))
    if not rows:
        return section("memory", "Memory", remark("Nothing was predicted or measured."))
    scale = (2**30, "GiB") if _longest(rows) >= 2**30 else (2**20, "MiB")
    hardware = plan.hardware
    free = (hardware.free_bytes, f"{size(hardware.free_bytes)} free")
    ran = bool(measured)
    title = "Peak memory, predicted and measured" if ran else "Peak memory, predicted"
    chart = bar_chart("chart-memory", title, rows, size, scale, free)
    columns = ("phase", "predicted", "measured", "measured against predicted")
    return section(
        "memory",
        "Memory",
        remark(
            f"{_how_measured(plan)} " if ran else None,
            f"{free[1]} of {size(hardware.total_bytes)}. ",
            _uncalibrated(plan),
        ),
        tag("figure", chart, _legend(names, ran), class_="plot"),
        table(columns, summary, (1, 2, 3)) if ran else None,
        tag("details", tag("summary", "The ledger, line by line"), _ledger(plan, names, history.lines))
        if names
        else None,
    )


def _longest(rows: Sequence[Bars]) -> float:
    return max(sum(s.value for s in side) for row in rows for side in (row.predicted, row.measured))


def _how_measured(plan: Plan) -> str:
    if plan.hardware.kind == "cpu":
        return (
            "The device is the CPU, so what was measured is the memory of the whole process (RSS): Python "
            "and every loaded library, not tensors alone."
        )
    return (
        "What was measured is the most that torch's allocator held for tensors in each stage. The driver's "
        "own context is not in it."
    )


def _uncalibrated(plan: Plan) -> str | None:
    lines = plan.ledger.lines
    count = sum(not line.calibrated for line in lines)
    of = plural(len(lines), "predicted line")
    return f"{count} of {of} not yet corrected by runs on this device." if count else None


def _legend(names: Sequence[str], ran: bool) -> Html:
    items = [tag("li", tag("i", class_=f"swatch c{i % 8}"), name) for i, name in enumerate(names)]
    measured = tag("li", tag("i", class_="swatch ink"), "measured") if ran else None
    return tag("ul", items, measured, class_="legend")


def _compared(predicted: int | None, measured: int | None) -> tuple[str, str, str]:
    texts = [NOTHING if value is None else size(value) for value in (predicted, measured)]
    against = share(measured / predicted - 1) if predicted and measured is not None else NOTHING
    return texts[0], texts[1], against


def _ledger(plan: Plan, names: Sequence[str], measured: Mapping[str, int]) -> Html:
    """Every line; what was measured of it stands in the train phase, in which it was measured."""
    rows: list[tuple[Child, ...]] = []
    for phase in PHASES:
        for line in sorted(plan.ledger.of(phase), key=lambda line: -line.bytes):
            swatch = tag("i", class_=f"swatch c{names.index(line.name) % 8}")
            found = measured.get(line.name) if phase == "train" else None
            seen = size(found) if found else NOTHING
            rows.append((STAGE_NAMES[STAGE_OF[phase]], tag("span", swatch, line.name), size(line.bytes),
                         seen, _certainty(line.calibrated), line.evidence))  # fmt: skip
    return table(("phase", "line", "predicted", "measured", "", "where the figure is from"), rows, (2, 3))


def _certainty(calibrated: bool) -> Html:
    if calibrated:
        return tag("span", "calibrated", class_="chip good")
    return tag("span", "not calibrated", class_="chip warn")


# Time -----------------------------------------------------------------------------------------------------


def times(plan: Plan, history: History) -> Html:
    """Seconds of each stage; predicted where the plan has an estimate."""
    spent = {stage.name: stage for stage in history.stages}
    order = [name for name in STAGE_NAMES if name in spent] + [n for n in spent if n not in STAGE_NAMES]
    rows = list(_time_bars(plan, history))
    if not rows:
        return section("time", "Time", remark("No stage has been timed."))
    longest = _longest(rows)
    scale = (1.0, "seconds")
    if longest >= 180:
        scale = (60.0, "minutes") if longest < 7200 else (3600.0, "hours")
    body = [
        (STAGE_NAMES.get(n, n), duration(spent[n].seconds), plural(spent[n].passes, "pass", "passes"))
        for n in order
    ]
    title = "Time of each stage, predicted and measured" if spent else "Time of each stage, predicted"
    chart = bar_chart("chart-time", title, rows, duration, scale)
    return section(
        "time",
        "Time",
        remark(_step_times(plan, history)),
        tag("figure", chart, class_="plot"),
        table(("stage", "time", "in"), body, (1,)) if body else None,
        _parts(plan),
    )


def _time_bars(plan: Plan, history: History) -> Iterator[Bars]:
    """A row for every stage that was timed or has an estimate; captions and pictures share one estimate."""
    spent = {stage.name: stage.seconds for stage in history.stages}
    encode: tuple[Segment, ...] = ()
    train: tuple[Segment, ...] = ()
    sample: tuple[Segment, ...] = ()
    if estimate := plan.time:
        encode = (Segment("encoding", estimate.encode_seconds, 0),)
        train = (
            Segment("compiling", estimate.compile_seconds, 3),
            Segment("steps", estimate.train_seconds, 0),
        )
        sample = (Segment("sampling", estimate.sample_seconds, 0),)
    groups = [
        ("Encoding captions and pictures", ("captions", "pictures"), encode),
        (STAGE_NAMES["load"], ("load",), ()),
        (STAGE_NAMES["train"], ("train",), train),
        (STAGE_NAMES["samples"], ("samples",), sample),
        *((name, (name,), ()) for name in spent if name not in STAGE_NAMES),
    ]
    for label, stages, expected in groups:
        predicted = tuple(segment for segment in expected if segment.value > 0)
        measured = tuple(Segment(STAGE_NAMES.get(n, n), spent[n]) for n in stages if n in spent)
        if predicted or measured:
            yield Bars(label, predicted, measured)


def _step_times(plan: Plan, history: History) -> list[Child]:
    seconds = [step.seconds for step in history.steps if step.seconds is not None]
    texts: list[Child] = []
    if seconds:
        texts.append(f"A step took {duration(median(seconds))} (median of {len(seconds):,}). ")
    if plan.time:
        texts.append(f"The plan expected {duration(plan.time.step_ms / 1e3)} a step. ")
        texts.append(_certainty(plan.time.calibrated))
        texts.append(f" {plan.time.evidence}" if plan.time.evidence else None)
    else:
        texts.append("The plan made no estimate of time.")
    return texts


def _parts(plan: Plan) -> Html | None:
    if not plan.time or not plan.time.parts:
        return None
    rows = [(part.name, duration(part.ms / 1e3), part.evidence) for part in plan.time.parts]
    return tag(
        "details",
        tag("summary", "What a step was expected to spend its time on"),
        table(("part", "predicted", "where the figure is from"), rows, (1,)),
    )


# Decisions and warnings -----------------------------------------------------------------------------------


def decisions(plan: Plan) -> Html:
    """What was decided, by whom and why, and what was turned down."""
    if not plan.decisions:
        return section("plan", "The plan", remark("The plan holds no decisions."))
    return section("plan", "The plan", tag("ul", [_decision(d) for d in plan.decisions], class_="decisions"))


def _decision(decision: Decision) -> Html:
    who = "your recipe" if decision.source == "recipe" else "the planner"
    by = tag("span", "torchrun" if decision.reason_code == "launched" else who, class_="chip")
    rejected = [_rejected(r) for r in decision.rejected]
    costs = any(r.delta_bytes is not None for r in decision.rejected)  # the same figures as differences
    return tag(
        "li",
        tag("h3", decision.id.replace("_", " "), " ", tag("code", value_text(decision.value)), by),
        tag("p", decision.reason),
        remark(decision.evidence) if decision.evidence and not costs else None,
        tag("ul", rejected, class_="rejected") if rejected else None,
    )


def _rejected(rejected: Rejected) -> Html:
    deltas = []
    if rejected.delta_bytes is not None:
        deltas.append(f"{signed(size(rejected.delta_bytes))} at the peak")
    if rejected.delta_ms is not None:
        sign = "\N{MINUS SIGN}" if rejected.delta_ms < 0 else ""
        deltas.append(f"{signed(sign + duration(abs(rejected.delta_ms) / 1e3))} a step")
    return tag("li", "not ", tag("code", value_text(rejected.value)), ": ",
               rejected.reason_code.replace("_", " ").replace("-", " "),
               f" ({', '.join(deltas)})" if deltas else None)  # fmt: skip


def value_text(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return number(value) if isinstance(value, float) else without_home(str(value))


def warnings(plan: Plan, history: History) -> Html:
    """The plan's warnings, and notes of the run."""
    items = [_diagnostic(d) for d in plan.warnings]
    items += [tag("li", tag("p", text)) for text in history.notes]
    if not items:
        return section("warnings", "Warnings and notes", remark("None."))
    return section("warnings", "Warnings and notes", tag("ul", items, class_="warnings"))


def _diagnostic(found: Diagnostic) -> Html:
    style = {"error": "bad", "warning": "warn", "note": ""}[found.severity]
    code = tag("span", found.code.id, class_=f"chip {style}", title=found.code.title)
    return tag(
        "li",
        tag("p", code, " ", found.message),
        remark(tag("code", without_home(str(found.span)))) if found.span else None,
        remark("Cure: ", found.cure) if found.cure else None,
        [remark(text) for text in found.notes],
    )


# Settings and versions ------------------------------------------------------------------------------------


def settings(plan: Plan) -> Html:
    """Every setting of the recipe, defaults filled in."""
    shown = [
        tag("div", tag("h3", tag("code", f"[{name}]")), table(("key", "value", ""), rows))
        for name, rows in _setting_tables(plan.tables)
    ]
    return section(
        "settings",
        "The recipe in full",
        remark("Defaults are filled in; ", tag("b", "bold"), " differs from the default or has none."),
        tag("details", tag("summary", "Show every setting"), tag("div", shown, class_="tables")),
    )


def _setting_tables(tables: Any, prefix: str = "") -> Iterator[tuple[str, list[tuple[Child, ...]]]]:
    """(name, rows) of every table of a recipe, those inside others too."""
    values = {field: getattr(tables, field.name) for field in fields(tables)}
    rows: list[tuple[Child, ...]] = []
    for field, value in values.items():
        if not is_dataclass(value):
            text = toml_text(value)
            shown = tag("code", text if value == _default(field) else tag("b", text))
            rows.append((tag("code", field.name), shown, field.metadata.get("doc", "")))
    if rows:
        yield prefix.rstrip("."), rows
    for field, value in values.items():
        if is_dataclass(value):
            yield from _setting_tables(value, f"{prefix}{field.name}.")


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def toml_text(value: Any) -> str:
    """A setting as its recipe would write it; what is not set, and has no spelling in TOML, as a dash."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(without_home(value), ensure_ascii=False)
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{json.dumps(k)} = {toml_text(v)}" for k, v in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, Sequence):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    return str(value)


def versions(plan: Plan, history: History) -> Html:
    """What it takes to know which run this was."""
    starts = [(f"{s.from_step:,}", s.version, s.torch, s.device, NOTHING if s.seed is None else str(s.seed))
              for s in history.starts]  # fmt: skip
    digests = plan.digests
    facts: list[tuple[str, Child]] = [
        ("recipe", f"{without_home(plan.recipe_path)}, digest {digests.recipe[:16]}"),
        (
            "base",
            f"{without_home(plan.base.name)}, stored as {plan.base.storage}, digest {digests.base[:16]}",
        ),
        ("captions", f"digest {digests.captions[:16]}" if digests.captions else "without a digest"),
        ("adapter", f"on {plural(len(plan.targets), 'module')}"),
        ("device", f"{plan.hardware.name}, {size(plan.hardware.total_bytes)}"),
        ("plan", f"format {plan.format}"),
    ]
    if plan.data:
        buckets = ", ".join(f"{b.count} of {b.width} × {b.height}" for b in plan.data.buckets[:12])
        least, middle, most = plan.data.text_tokens
        about = "about " if plan.data.text_tokens_estimated else ""
        facts.append(("pictures", f"{plan.data.pictures} ({buckets}), digest {plan.data.digest[:16]}"))
        facts.append(("captions' length", f"{about}{least} to {most} tokens, median {middle}"))
    return section(
        "versions",
        "Versions",
        table(("from step", "ideoflow", "torch", "device", "seed"), starts, (0,)) if starts else None,
        tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in facts], class_="facts"),
    )
