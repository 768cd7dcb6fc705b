"""A plan as a page of its own, before anything has run: the same sections as a report's second half."""

from __future__ import annotations

from ideoflow.plan.document import Change, Plan
from ideoflow.report import account, training
from ideoflow.report.history import History
from ideoflow.report.html import page
from ideoflow.report.markup import Html
from ideoflow.report.parts import masthead, remark, section, table
from ideoflow.report.units import duration, plural, signed, size

_NOTHING_RAN = History((), (), (), (), (), "open", 0, None, None, None, {})


def render_plan(plan: Plan) -> str:
    """The page as text: memory over the phases of the run as a chart, time, decisions, warnings, settings."""
    parts = [
        account.memory(plan, _NOTHING_RAN),
        _changes(plan.changes) if plan.changes else None,
        account.times(plan, _NOTHING_RAN),
        account.decisions(plan),
        account.warnings(plan, _NOTHING_RAN),
        account.settings(plan),
    ]
    links = {
        "memory": "Memory",
        "time": "Time",
        "plan": "Plan",
        "warnings": "Warnings and notes",
        "settings": "Settings",
    }
    return page(f"{plan.name}: plan", _headline(plan), links, parts, training.readout(_NOTHING_RAN))


def _headline(plan: Plan) -> Html:
    peak, free = plan.ledger.peak_bytes, plan.hardware.free_bytes
    style, sentence = (
        ("good", "Fits") if plan.fits else ("bad", f"Does not fit: {size(peak - free)} too much")
    )
    tiles = [("peak", size(peak), f"of {size(free)} free"), ("adapter", size(plan.sizes.adapter), "file")]
    if plan.sizes.latents is not None and plan.sizes.text is not None:
        tiles.append(("caches", size(plan.sizes.latents + plan.sizes.text), "on the disk"))
    if plan.time:
        steps = plural(plan.tables.train.steps, "step")
        tiles.append(("step", duration(plan.time.step_ms / 1e3), "predicted"))
        tiles.append(("run", duration(plan.time.total_seconds), f"{steps}, without loading"))
    return masthead("Ideogram 4 LoRA, plan", plan, sentence, style, tiles)


def _changes(changes: tuple[Change, ...]) -> Html:
    rows = [
        (
            c.words,
            size(c.peak_bytes),
            "fits" if c.fits else "not enough",
            "" if c.delta_ms is None else signed(f"{c.delta_ms:.0f} ms".replace("-", "\N{MINUS SIGN}")),
            c.note,
        )
        for c in changes
    ]
    return section(
        "changes",
        "What would make it fit",
        remark("Cheapest first."),
        table(("change", "peak", "", "a step", "what it costs"), rows, (1, 3)),
    )
