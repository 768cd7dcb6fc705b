"""A plan as a page of text, for people: at most 80 columns, and the same words with and without colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ideoflow.plan.adapters import adapted_modules, learnt_numbers, rank_words
from ideoflow.plan.document import (
    PHASES,
    Bucket,
    Change,
    DataSummary,
    Decision,
    Ledger,
    Phase,
    Plan,
    Rejected,
    TimeEstimate,
)
from ideoflow.plan.problem import Evaluation
from ideoflow.plan.record import allocated

GIB, GB = 1 << 30, 10**9
WIDTH = 80
PHASE_NAMES: dict[Phase, str] = {
    "text": "encode captions",
    "latents": "encode pictures",
    "train": "train",
    "sample": "sample",
}
# Decisions on the page always, and those there where they are not left at their usual value.
_SHOWN = {
    "fused": ("engine", "precision", "matmul", "attention", "activation_budget", "unconditional"),
    "reference": ("engine", "precision", "checkpointing", "compile", "unconditional"),
}
_USUAL = {
    "device": "cuda",
    "offload": "none",
    "activation_offload": "none",
    "optimizer_state": "float32",
    "graphs": "off",
    "exact_blocks": 0,
}
_SIZES = 8
_REJECTED = {
    "set-by-recipe": "",
    "excluded": "not with what you set",
    "over-memory": "over by {over}",
    "over-host-memory": "host memory too small",
    "tight": "leaves less than 5 % free",
    "little-gain": "only {faster}for what waits on the host",
    "slower": "{ms} slower",
    "slower-to-compile": "compiling takes longer",
    "less-exact": "less exact",
    "no-gain": "no gain",
    "unsupported": "not on this device",
    "only-on-request": "",
    "not-installed": "{faster}not installed",
    "no-gpu": "no GPU",
}


# Of those, what the page tells beside a decision; --explain tells all.
_TOLD = (
    "over-memory",
    "over-host-memory",
    "tight",
    "less-exact",
    "slower",
    "slower-to-compile",
    "not-installed",
)


def print_page(plan: Plan, console: Console) -> None:
    """The whole page."""
    for part in _page(plan):
        console.print(part, highlight=False)


def _page(plan: Plan) -> list[RenderableType]:
    parts = [_head(plan), _decisions(plan), _memory(plan), _changes(plan.changes), _time_and_disk(plan)]
    return [part for part in parts if part is not None]


def _head(plan: Plan) -> RenderableType:
    hardware, base = plan.hardware, plan.base
    facts = [f"{size(hardware.total_bytes)}, {hardware.free_bytes / GIB:.1f} free"]
    if hardware.compute_capability:
        facts.append("sm_{}{}".format(*hardware.compute_capability))
    if hardware.pcie_generation and hardware.pcie_width:
        facts.append(f"PCIe {hardware.pcie_generation} x{hardware.pcie_width}")
    if hardware.note:
        facts.append(hardware.note)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    grid.add_row("recipe", plan.recipe_path)
    grid.add_row("data", _data(plan))
    if plan.data is not None:
        grid.add_row("sizes", _sizes(plan.data))
    parameters = base.transformer.parameters()
    count = f"{parameters / 1e9:.2f} G" if parameters > 1e8 else f"{parameters / 1e6:.1f} M"
    grid.add_row("base", f"{base.name}   {count} parameters, stored as {base.storage}")
    adapter = plan.tables.adapter
    what = adapter.targets if isinstance(adapter.targets, str) else f"{len(plan.targets)} modules"
    learnt = learnt_numbers(adapter, adapted_modules(adapter, base.transformer, plan.targets))
    numbers = f"{learnt / 1e6:.1f} M parameters, a file of {disk(plan.sizes.adapter)}"
    grid.add_row("adapter", f"{adapter.kind}, {what}, {rank_words(adapter)}; {numbers}")
    named = " (by name)" if hardware.source == "profile" else ""
    several = f"{plan.processes} x " if plan.processes > 1 and hardware.kind == "cuda" else ""
    grid.add_row("machine", f"{several}{hardware.name}{named}   {', '.join(facts)}")
    grid.add_row("verdict", _verdict(plan))
    return grid


def _verdict(plan: Plan) -> Text:
    """What most people want to know."""
    peak, free, phase = plan.ledger.peak_bytes, plan.hardware.free_bytes, plan.ledger.peak_phase
    amount, unit = (mib, "MiB") if peak < GIB else (gib, "GiB")
    needs = f"needs {amount(peak)} of {amount(free)} {unit} ({PHASE_NAMES[phase]})"
    if not plan.fits:
        over = size(peak - free)
        return Text.assemble(("does not fit", "bold red"), f"  {needs}, {over} too much")
    words = ""
    if plan.time is not None:
        words = f"; {milliseconds(plan.time.step_ms)} a step, {duration(plan.time.total_seconds)} in all"
    return Text.assemble(("fits", "bold green"), f"  {needs}{words}")


def _data(plan: Plan) -> str:
    if plan.data is None:
        return "no data set: pictures of the recipe's resolution"
    data = plan.data
    warned = f", {data.warnings} warning{'s' if data.warnings != 1 else ''}" if data.warnings else ""
    sizes = f"{len(data.buckets)} size{'s' if len(data.buckets) != 1 else ''}"
    crops = f", {data.crops:,} crops" if data.crops != data.pictures else ""
    texts = f" in {data.texts:,} forms" if data.texts > data.crops else ""
    return f"{data.pictures:,} pictures with captions{texts}{crops}, {sizes}{warned}{_cached(plan, data)}"


def _cached(plan: Plan, data: DataSummary) -> str:
    """What need not be encoded again."""
    cached = data.cached_as(str(plan.value("cache_dtype")))
    if not cached.captions and not cached.crops:
        return ""
    return f"; encoded before: {cached.captions:,} captions, {cached.crops:,} pictures"


def _sizes(data: DataSummary) -> RenderableType:
    """How many crops there are of each size, and what it costs them; the commonest sizes first."""
    buckets = sorted(data.buckets, key=lambda b: (-b.count, b.width, b.height))
    shown = [([b], f"{b.width} x {b.height}") for b in buckets[:_SIZES]]
    if rest := buckets[_SIZES:]:
        shown.append((rest, f"{len(rest)} more sizes"))
    if all(_crop_words(some) == _WHOLE for some, _ in shown):
        each = [f"{name}: {sum(b.count for b in some):,}" for some, name in shown]
        return Text(f"{', '.join(each)}; {_WHOLE}")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    for some, name in shown:
        grid.add_row(name, f"{sum(b.count for b in some):,}", Text(_crop_words(some), style="dim"))
    return grid


_WHOLE = "nothing cut away"


def _crop_words(buckets: Sequence[Bucket]) -> str:
    count = sum(b.count for b in buckets)
    cut = sum(b.cut_away * b.count for b in buckets) / count
    enlarged = sum(b.enlarged for b in buckets)
    words = _WHOLE if cut < 5e-5 else f"{cut:.1%} of the area cut away"
    return words + (f", {enlarged:,} enlarged" if enlarged else "")


def _decisions(plan: Plan) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(style="green", no_wrap=True)
    grid.add_column(ratio=1)
    shown = [
        *_SHOWN[str(plan.value("engine"))],
        *(x for x, usual in _USUAL.items() if plan.value(x) != usual),
        *(["processes"] if plan.processes > 1 else []),
    ]
    for decision in (plan.decision(id) for id in shown):
        rejected = decision.rejected
        if decision.id == "activation_budget":  # of many values, the next one that would be faster
            rejected = tuple(r for r in rejected if r.value > decision.value)[:1]  # type: ignore[operator]
        against = [f"{r.value} {rejected_words(plan, r)}" for r in rejected if _worth_telling(plan, r)]
        text = Text(decision.reason)
        if against:
            text.append(f"  ({'; '.join(against)})", style="dim")
        grid.add_row(decision.id, str(decision.value), text)
    return Padding(grid, (1, 0, 0, 0))


def _worth_telling(plan: Plan, rejected: Rejected) -> bool:
    """Whether the page names an alternative: one that could be had, and not whatever does not fit either."""
    if rejected.value == "float32" and plan.base.storage != "float32" and rejected.delta_bytes is not None:
        return False
    return plan.fits and rejected.reason_code in _TOLD


def rejected_words(plan: Plan, rejected: Rejected) -> str:
    """Why an alternative was not taken, in a few words; empty where there is nothing to say."""
    over = ""
    if rejected.delta_bytes is not None:
        peak = plan.ledger.peak_bytes + rejected.delta_bytes
        over = size(max(0, peak - plan.hardware.free_bytes))
    slower = "" if rejected.delta_ms is None else milliseconds(rejected.delta_ms)
    if rejected.reason_code == "slower" and not slower:
        return "slower"
    if rejected.reason_code == "slower" and (rejected.delta_ms or 0) < 0.5:
        return "takes longer in all"  # loading, or samples: a step is as fast
    faster = "" if rejected.delta_ms is None else f"{milliseconds(-rejected.delta_ms)} faster, "
    words = _REJECTED.get(rejected.reason_code, rejected.reason_code)
    return words.format(over=over, ms=slower, faster=faster)


def _memory(plan: Plan) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(ratio=1)
    limit, small = plan.hardware.free_bytes, plan.ledger.peak_bytes < GIB
    amount = mib if small else gib
    grid.add_row(
        "memory",
        "MiB" if small else "GiB",
        Text("at the peak of each phase; * as measured here before", style="dim"),
    )
    for phase in (p for p in PHASES if plan.ledger.of(p)):
        peak = plan.ledger.peak(phase)
        style = "red" if peak > limit else "bold" if phase == plan.ledger.peak_phase else ""
        cells = Text(amount(peak), style=style), Text(_lines(plan.ledger, phase, amount), style="dim")
        grid.add_row(f"  {PHASE_NAMES[phase]}", *cells)
    verdict = "fits" if plan.fits else f"over by {size(plan.ledger.peak_bytes - limit)}"
    grid.add_row("  free", amount(limit), Text(verdict, style="green" if plan.fits else "bold red"))
    if plan.host_bytes >= GIB:
        free = plan.hardware.host_free_bytes
        of = f" of {size(free)} that are free there" if free is not None else ""
        words = f"GiB{of}: what waits in the machine's own memory"
        grid.add_row("  host", gib(plan.host_bytes), Text(words, style="dim"))
    return Padding(grid, (1, 0, 0, 0))


def _lines(ledger: Ledger, phase: Phase, amount: Callable[[float], str]) -> str:
    """The lines of a phase, largest first; what is small beside the peak is summed up."""
    lines, peak = sorted(ledger.of(phase), key=lambda x: -x.bytes), ledger.peak(phase)
    least = 0.02 * peak
    large = [x for x in lines if x.bytes >= least]
    rest = sum(x.bytes for x in lines if x.bytes < least)
    cells = [f"{x.name} {amount(x.bytes)}{'*' if x.calibrated else ''}" for x in large]
    return " | ".join([*cells, f"rest {amount(rest)}"] if rest >= 0.002 * peak else cells)


def _changes(changes: Sequence[Change]) -> RenderableType | None:
    if not changes:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(ratio=1)
    for change in changes:
        text = Text(change.words, style="green" if change.fits else "yellow")
        time = f"; {milliseconds(change.delta_ms, sign=True)} a step" if change.delta_ms else ""
        enough = "" if change.fits else "; not enough"
        text.append(f"  ({change.note}{time}{enough})", style="dim")
        grid.add_row(f"  {gib(change.peak_bytes)}", text)
    title = Text("What would make it fit, cheapest first; GiB at the peak", style="bold")
    return Padding(Group(title, grid), (1, 0, 0, 0))


def _time_and_disk(plan: Plan) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    if plan.time is None:
        grid.add_row("time", "not predicted: this device's speed is not known")
    else:
        _add_time(grid, plan, plan.time)
    sizes = plan.sizes
    parts = [f"adapter {disk(sizes.adapter)}", f"checkpoint {disk(sizes.checkpoint)}"]
    if sizes.latents is not None and sizes.text is not None:
        parts.append(f"caches {disk(sizes.latents + sizes.text)}")
    grid.add_row("disk", ", ".join(parts))
    return Padding(grid, (1, 0, 0, 0))


def _add_time(grid: Table, plan: Plan, time: TimeEstimate) -> None:
    steps = plan.tables.train.steps
    grid.add_row("time", f"{milliseconds(time.step_ms)} a step, {steps} steps {duration(time.train_seconds)}")
    stages = {
        "encoding": time.encode_seconds,
        "compiling": time.compile_seconds,
        "samples": time.sample_seconds,
    }
    others = ", ".join(f"{name} {duration(seconds)}" for name, seconds in stages.items() if seconds >= 1)
    how = "as measured here before" if time.calibrated else "not yet measured here"
    total = f"about {duration(time.total_seconds)} in all, without loading; {how}"
    grid.add_row("", f"{others}; {total}" if others else total)
    parts = [f"{p.name} {p.ms / time.step_ms:.0%}" for p in time.parts if p.ms >= 0.01 * time.step_ms]
    grid.add_row("", Text(f"of a step: {' | '.join(parts)}", style="dim"))


def print_decision(plan: Plan, decision: Decision, console: Console) -> None:
    """One decision in full: who took it, why, and what the alternatives would cost."""
    by = "set in the recipe" if decision.source == "recipe" else "decided by the planner"
    by = {"default": "left at the default", "launched": "set by torchrun or --processes"}.get(
        decision.reason_code, by
    )
    console.print(f"[bold]{decision.id}[/bold] = {decision.value}   {by} ({decision.reason_code})")
    console.print(f"  {decision.reason}", markup=False, highlight=False)
    if not decision.rejected:
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column()
    step = milliseconds(plan.time.step_ms) if plan.time else ""
    heads = ("", "GiB", "a step" if plan.time else "", "")
    grid.add_row(*(Text(word, style="bold") for word in heads))
    grid.add_row(f"  {decision.value}", gib(plan.ledger.peak_bytes), step, Text("this plan", style="green"))
    for r in decision.rejected:
        peak = time = ""
        if r.delta_bytes is not None:
            peak = gib(plan.ledger.peak_bytes + r.delta_bytes)
        if r.delta_ms is not None and plan.time:
            time = milliseconds(plan.time.step_ms + r.delta_ms)
        words = rejected_words(plan, r) or r.reason_code.replace("-", " ")
        grid.add_row(f"  {r.value}", peak, time, Text(words, style="dim"))
    console.print(Padding(grid, (1, 0, 0, 0)), highlight=False)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Plan]]], console: Console
) -> None:
    """Peaks and step times of variants: a row a machine, a column a value."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    for _ in columns:
        grid.add_column(justify="right")
    grid.add_row(Text(title, style="bold"), *(Text(c, style="bold") for c in columns))
    for name, plans in rows:
        grid.add_row(name, *(_cell(plan) for plan in plans))
    console.print(Padding(grid, (1, 0, 0, 0)), highlight=False)


def print_legend(console: Console) -> None:
    """What the tables' cells are; under the last one."""
    words = "Peak, and time of a step; each is planned for itself, so a larger batch may keep less of it."
    console.print(Padding(Text(words, style="dim"), (1, 0, 0, 0)), highlight=False)


class _Trial(Protocol):
    """:class:`ideoflow.workflow.Trial`."""

    @property
    def name(self) -> str: ...
    @property
    def before(self) -> Evaluation: ...
    @property
    def after(self) -> Evaluation: ...
    @property
    def peak_bytes(self) -> int | None: ...
    @property
    def step_ms(self) -> float: ...


def print_trials(trials: Sequence[_Trial], console: Console) -> None:
    """What was predicted of short runs before they were measured, what came, and what is predicted now."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    for _ in range(4):
        grid.add_column(justify="right")
    grid.add_row(*(Text(word, style="bold") for word in ("", "", "predicted", "measured", "now predicted")))
    for trial in trials:
        sides = trial.before, trial.after
        was, now = (milliseconds(e.step_ms) for e in sides)
        grid.add_row(trial.name, "a step", was, milliseconds(trial.step_ms), now)
        if trial.peak_bytes is not None:
            was, now = (size(sum(x.bytes for x in allocated(e.ledger))) for e in sides)
            grid.add_row("", "peak", was, size(trial.peak_bytes), now)
    console.print(grid, highlight=False)


def _cell(plan: Plan) -> Text:
    peak, free = plan.ledger.peak_bytes, plan.hardware.free_bytes
    if not plan.fits:
        return Text(f"over by {(peak - free) / GIB:.1f}", style="red")
    time = f"  {milliseconds(plan.time.step_ms)}" if plan.time else ""
    return Text(f"{gib(peak)} GiB{time}")


def gib(size: float) -> str:
    """``22.2``, and ``0.03`` below a tenth."""
    value = size / GIB
    return f"{value:.1f}" if value >= 0.095 or value == 0 else f"{max(value, 0.01):.2f}"


def mib(size: float) -> str:
    """Whole MiB, one decimal below ten."""
    value = size / (1 << 20)
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def size(size: float) -> str:
    """``22.2 GiB``."""
    return f"{gib(size)} GiB"


def disk(size: float) -> str:
    """Decimal, as file managers count: ``382 MB``."""
    return (
        f"{size / GB:.2f} GB"
        if size >= GB
        else f"{size / 1e6:.0f} MB"
        if size >= 1e6
        else f"{size / 1e3:.0f} kB"
    )


def milliseconds(ms: float, *, sign: bool = False) -> str:
    """``582 ms`` or ``3.93 s``."""
    plus = "+" if sign else ""
    return f"{ms / 1e3:{plus}.2f} s" if abs(ms) >= 1000 else f"{ms:{plus}.0f} ms"


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
