"""What to say about a plan: warnings, and for one that does not fit the cheapest changes that would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ideoflow.diagnostics import Collector, Diagnostic
from ideoflow.diagnostics.codes.plan import (
    CARD_SHARED,
    DISK_SHORT,
    DOES_NOT_FIT,
    HOST_SHORT,
    LARGE_ADAPTER,
    NOT_RECOMMENDED,
    PROXY_GUIDANCE,
    TIGHT,
)
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.plan.choices import fixed_by_recipe, refusals
from ideoflow.plan.document import Change, Plan, Value
from ideoflow.plan.profiles import PROFILES, hardware_from_profile
from ideoflow.plan.search import TIGHT_SHARE, Evaluation, Problem, solve, times_known
from ideoflow.plan.variants import with_axis
from ideoflow.recipe import MemorySettings, Recipe

GIB, GB = 1 << 30, 10**9
_LARGE_FILE = GB
# A model of this many parameters is no work for a processor.
_LARGE_MODEL = 1e9
_RESOLUTIONS = (1024, 768, 512, 256)
_RANKS = (256, 128, 64, 32, 16, 8, 4)


def cheapest_changes(problem: Problem, best: Evaluation) -> tuple[Change, ...]:
    """Changes to the recipe that lower the peak, cheapest first: those that fit, then by quality, then time.

    If no single one fits, the last entries are all of them together, and the smallest card that would do.
    """
    timed = times_known(problem, best.choice)

    def change(setting: str, value: Value, quality: int, note: str, changed: Problem) -> Change:
        found = solve(changed)
        delta = round(found.step_ms - best.step_ms, 1) if timed else None
        return Change(setting, value, found.ledger.peak_bytes, found.fits, delta, quality, note)

    # Of several values for one setting: the first that fits, they come mildest first; else the last.
    chosen: dict[str, Change] = {}
    for option in _options(problem):
        made = change(*option)
        if made.peak_bytes < best.ledger.peak_bytes and not (option[0] in chosen and chosen[option[0]].fits):
            chosen[made.setting] = made
    changes = list(chosen.values())
    changes.sort(key=lambda c: (not c.fits, c.quality, c.delta_ms or 0.0, c.peak_bytes))
    if changes and not any(c.fits for c in changes):
        note = "the least that this engine can do"
        changes.append(change("all of these", "together", 3, note, _apply_all(problem)))
    return (*changes, *_smallest_card(problem, best))


Option = tuple[str, Value, int, str, Problem]


def _options(problem: Problem) -> Iterator[Option]:
    """(setting, value, quality it costs, note, the problem with it)."""
    tables = problem.tables
    for name, value in fixed_by_recipe(tables).items():
        memory = _released(tables.memory, name)
        changed = _with(problem, memory=memory)
        if not refusals(changed.tables, problem.hardware, problem.device, problem.targets):
            yield f"memory.{name}", "auto", 0, f"{value!r} is what you set", changed
    train = tables.train
    if train.batch > 1:
        parts = replace(train, batch=1, accumulation=train.batch * train.accumulation)
        note = f"the same step in {parts.accumulation} passes"
        yield "train.batch, accumulation", f"1, {parts.accumulation}", 0, note, _with(problem, train=parts)
    if problem.prompts:
        side = (tables.validate.width or tables.data.resolution) // 2 // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        smaller = replace(tables.validate, width=max(side, 64), height=max(side, 64))
        note = "smaller validation pictures"
        yield "validate.width, height", max(side, 64), 0, note, _with(problem, validate=smaller)
    for rank in (r for r in _RANKS if r < tables.adapter.rank):
        note = "a smaller adapter learns less detail"
        yield "adapter.rank", rank, 1, note, _varied(problem, "rank", rank)
    if tables.adapter.targets == "all":
        adapter = replace(tables.adapter, targets="attention")
        yield "adapter.targets", "attention", 1, "trains fewer modules", _with(problem, adapter=adapter)
    for side in (s for s in _RESOLUTIONS if s < tables.data.resolution):
        yield (
            "data.resolution",
            side,
            2,
            "smaller pictures teach less detail",
            _varied(problem, "resolution", side),
        )


def _released(memory: MemorySettings, *names: str) -> MemorySettings:
    """The settings with the planner free to decide ``names``."""
    free: dict[str, Any] = dict.fromkeys(names, "auto")
    return replace(memory, **free)


def _with(problem: Problem, **tables: object) -> Problem:
    return replace(problem, tables=replace(problem.tables, **tables))  # type: ignore[arg-type]


def _varied(problem: Problem, axis: str, value: int) -> Problem:
    tables, data = with_axis(problem.tables, problem.data, axis, value)
    return replace(problem, tables=tables, data=data)


def _apply_all(problem: Problem) -> Problem:
    """Every option at its most saving."""
    tables = problem.tables
    memory = _released(tables.memory, *fixed_by_recipe(tables))
    targets = "attention" if tables.adapter.targets == "all" else tables.adapter.targets
    adapter = replace(tables.adapter, rank=min(_RANKS[-1], tables.adapter.rank), targets=targets)
    validate = replace(tables.validate, width=256, height=256) if problem.prompts else tables.validate
    side = min(_RESOLUTIONS[-1], tables.data.resolution)
    train = replace(tables.train, batch=1, accumulation=tables.train.batch * tables.train.accumulation)
    least = _with(problem, memory=memory, adapter=adapter, validate=validate, train=train)
    return _varied(least, "resolution", side)


def _smallest_card(problem: Problem, best: Evaluation) -> tuple[Change, ...]:
    """The card with the least memory that the recipe fits as it is."""
    if problem.device != "cuda":
        return ()
    peak = best.ledger.peak_bytes
    cards = [h for p in PROFILES if p.kind == "cuda" and (h := hardware_from_profile(p.key))]
    fitting = [h for h in cards if TIGHT_SHARE * h.free_bytes >= peak and h.fast_bf16]
    if not fitting:
        return ()
    card = min(fitting, key=lambda h: (h.total_bytes, h.name))
    note = f"the smallest card that runs this recipe as it is ({card.total_bytes / GIB:.0f} GiB)"
    return (Change("another card", card.name, peak, True, None, 0, note),)


def advise(plan: Plan, problem: Problem, best: Evaluation, recipe: Recipe) -> tuple[Diagnostic, ...]:
    """Everything worth knowing before the run."""
    found = Collector(limit=100)
    peak, free = plan.ledger.peak_bytes, plan.hardware.free_bytes
    if not plan.fits:
        fixed = [f"memory.{name}" for name in fixed_by_recipe(plan.tables)]
        phase = {"text": "encoding captions", "latents": "encoding pictures", "train": "training"}
        where = phase.get(plan.ledger.peak_phase, "sampling")
        found.add(
            DOES_NOT_FIT,
            f"{where} needs {peak / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on {plan.hardware.name}",
            recipe.span(fixed[0]) if fixed else None,
            cure="the plan's list of changes begins with the cheapest",
        )
    elif peak > TIGHT_SHARE * free:
        found.add(
            TIGHT,
            f"the run needs {peak / GIB:.1f} of {free / GIB:.1f} GiB",
            cure="close what else uses the card",
        )
    _about_device(plan, found)
    _about_storage(plan, problem, best, found, recipe)
    second = plan.decision("unconditional")
    if second.value == "proxy" and second.reason_code == "needs-memory":
        found.add(PROXY_GUIDANCE, "samples are made with proxy guidance, for want of memory")
    return tuple(found)


def _about_device(plan: Plan, found: Collector) -> None:
    hardware, large = plan.hardware, plan.base.transformer.parameters() > _LARGE_MODEL
    works = "precision bf16 with memory.compile = 'off'"
    if hardware.kind == "rocm":
        found.add(
            NOT_RECOMMENDED,
            f"{hardware.name} is an AMD card: nothing was measured there",
            cure=f"what should still work is the reference path: {works}",
        )
    elif hardware.kind == "mps":
        found.add(
            NOT_RECOMMENDED,
            f"{hardware.name}: Apple's GPU is not used",
            cure="the nano base runs well on the processor; rent an NVIDIA card for the full model",
        )
    elif hardware.kind == "cuda" and not hardware.fast_bf16:
        found.add(
            NOT_RECOMMENDED,
            f"{hardware.name} has no bf16 units: products take many times longer",
            cure="use a card of compute capability 8.0 or newer",
        )
    elif hardware.kind == "cpu" and large:
        found.add(
            NOT_RECOMMENDED,
            f"{plan.base.transformer.parameters() / 1e9:.1f} G parameters take days on a processor",
            cure="plan for a card with --gpu NAME, or try the recipe with base = 'nano' first",
        )
    if hardware.other_processes:
        taken = hardware.total_bytes - hardware.free_bytes
        many = f"{hardware.other_processes} other process{'es' if hardware.other_processes > 1 else ''}"
        found.add(CARD_SHARED, f"{many} on {hardware.name}; {taken / GIB:.1f} GiB of it are taken")


def _about_storage(plan: Plan, problem: Problem, best: Evaluation, found: Collector, recipe: Recipe) -> None:
    sizes, hardware = plan.sizes, plan.hardware
    full = plan.tables.adapter.full_matrix
    if sizes.adapter > _LARGE_FILE:
        found.add(
            LARGE_ADAPTER,
            f"the adapter's file will be {sizes.adapter / GB:.1f} GB",
            recipe.span("adapter.full_matrix" if full else "adapter.rank"),
            cure="remove full_matrix, or set another factor" if full else "lower adapter.rank",
        )
    kept = min(
        plan.tables.train.keep_checkpoints, 1 + plan.tables.train.steps // plan.tables.train.checkpoint_every
    )
    needed = sizes.adapter + (kept + 1) * sizes.checkpoint + (sizes.latents or 0) + (sizes.text or 0)
    if hardware.disk_free_bytes is not None and needed > hardware.disk_free_bytes:
        found.add(
            DISK_SHORT,
            f"caches and results take {needed / GB:.1f} GB, {hardware.disk_free_bytes / GB:.1f} GB are free",
            cure="free some space, or lower train.keep_checkpoints",
        )
    host = problem.host_bytes(best.choice)
    if (
        plan.value("device") == "cuda"
        and hardware.host_free_bytes is not None
        and host > hardware.host_free_bytes
    ):
        found.add(
            HOST_SHORT,
            f"models of {host / GIB:.1f} GiB pass the host's memory, where "
            f"{hardware.host_free_bytes / GIB:.1f} GiB are free",
            cure="close other programs, or add swap space",
        )
