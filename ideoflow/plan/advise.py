"""What to say about a plan: warnings, and for one that does not fit the cheapest changes that would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    WITHOUT_EFFECT,
)
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.plan.choices import fixed_by_recipe, refusals
from ideoflow.plan.document import Change, Plan, Value
from ideoflow.plan.problem import TIGHT_SHARE, Evaluation, Problem, times_known
from ideoflow.plan.profiles import DRIVER_SHARE, PROFILES, hardware_from_profile
from ideoflow.plan.search import solve
from ideoflow.plan.variants import with_axis
from ideoflow.recipe import Recipe

GIB, GB = 1 << 30, 10**9
_LARGE_FILE = GB
# A model of this many parameters is no work for a processor.
_LARGE_MODEL = 1e9
_RESOLUTIONS = (1024, 768, 512, 256)
_RANKS = (256, 128, 64, 32, 16, 8, 4)


@dataclass(frozen=True)
class _Option:
    """One change: what it is called, the quality it costs, in words, and how it is made."""

    setting: str
    value: Value
    quality: int
    note: str
    make: Callable[[Problem], Problem]


def cheapest_changes(problem: Problem, best: Evaluation) -> tuple[Change, ...]:
    """Changes to the recipe or the machine that make it fit, by quality, then by time; or lower the peak.

    If no single one fits, or only one that costs more than several others together, these are there too, and
    last the smallest card that would do.
    """
    timed = times_known(problem, best.choice)

    def change(options: Sequence[_Option]) -> Change:
        changed = problem
        for option in options:
            changed = option.make(changed)
        found = solve(changed)
        delta = round(found.step_ms - best.step_ms, 1) if timed else None
        first, several = options[0], len(options) > 1
        return Change(
            "together" if several else first.setting,
            ", ".join(f"{o.setting} = {o.value}" for o in options) if several else first.value,
            found.ledger.peak_bytes,
            found.fits,
            delta,
            max(o.quality for o in options),
            "none of them alone is enough" if several else first.note,
        )

    # Of several values for one setting: the first that fits, they come mildest first; else the last.
    series: dict[str, list[_Option]] = {}
    for option in _options(problem):
        series.setdefault(option.setting, []).append(option)
    singles: dict[str, Change] = {}
    for setting, options in series.items():
        for made in (change([option]) for option in options):
            if made.fits or made.peak_bytes < best.ledger.peak_bytes:
                singles[setting] = made
            if made.fits:
                break
    cheapest = min((c.quality for c in singles.values() if c.fits), default=None)
    together = _together([series[setting] for setting in singles], change, cheapest)
    every = [*singles.values(), *together]
    fitting = [c for c in every if c.fits]
    found = sorted(fitting or singles.values(), key=lambda c: (c.quality, c.delta_ms or 0.0, c.peak_bytes))
    return (*found, *([] if fitting else together), *_smallest_card(problem, best))


def _together(
    series: Sequence[Sequence[_Option]], change: Callable[[Sequence[_Option]], Change], below: int | None
) -> list[Change]:
    """The few changes that fit only together and cost less quality than ``below``; or all that there are."""
    taken: list[_Option] = []
    for options in sorted(series, key=lambda options: options[0].quality):
        if below is not None and options[0].quality >= below:
            return []
        taken.append(options[-1])
        if len(taken) > 1 and change(taken).fits:
            break
    else:
        if below is not None or len(taken) < 2:
            return []
        return [replace(change(taken), note="all of this is not enough")]
    # The last one as mild as will do, and then without those that are not needed.
    taken[-1] = next(o for o in options if change([*taken[:-1], o]).fits)
    for option in taken[-2::-1]:  # the dearest first
        fewer = [o for o in taken if o is not option]
        if len(fewer) > 1 and change(fewer).fits:
            taken = fewer
    return [change(taken)]


def _options(problem: Problem) -> Iterator[_Option]:
    tables, hardware = problem.tables, problem.hardware
    blocks = problem.base.transformer.num_layers
    if hardware.other_processes:
        whole = int(hardware.total_bytes * (1 - DRIVER_SHARE))
        freed = replace(hardware, free_bytes=max(whole, hardware.free_bytes), other_processes=0)
        taken = f"they have {(freed.free_bytes - hardware.free_bytes) / GIB:.1f} GiB of the card"
        yield _Option("other processes", "closed", 0, taken, lambda p: replace(p, hardware=freed))
    for name, value in fixed_by_recipe(tables).items():
        made = partial(_with_memory, name=name)
        changed = made(problem)
        if not refusals(changed.tables, hardware, problem.device, problem.targets, blocks, problem.processes):
            yield _Option(f"memory.{name}", "auto", 0, f"{value!r} is what you set", made)
    train = tables.train
    if train.batch > 1:
        parts = replace(train, batch=1, accumulation=train.batch * train.accumulation)
        note = f"the same step in {parts.accumulation} passes"
        value = f"1, {parts.accumulation}"
        yield _Option("train.batch, accumulation", value, 0, note, partial(_with, train=parts))
    if problem.prompts:
        side = (tables.validate.width or tables.data.resolution) // 2 // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        smaller = replace(tables.validate, width=max(side, 64), height=max(side, 64))
        note = "smaller validation pictures"
        made = partial(_with, validate=smaller)
        yield _Option("validate.width, height", max(side, 64), 0, note, made)
        note = "no pictures while it trains"
        yield _Option("validate.prompts", "[]", 1, note, lambda p: replace(p, prompts=0))
    for rank in (r for r in _RANKS if r < tables.adapter.rank):
        note = "a smaller adapter learns less detail"
        yield _Option("adapter.rank", rank, 1, note, partial(_varied, axis="rank", value=rank))
    if tables.adapter.targets == "all":
        yield _Option("adapter.targets", "attention", 1, "trains fewer modules", _attention_only)
    for side in (s for s in _RESOLUTIONS if s < tables.data.resolution):
        made = partial(_varied, axis="resolution", value=side)
        yield _Option("data.resolution", side, 2, "smaller pictures teach less detail", made)


def _with(problem: Problem, **tables: object) -> Problem:
    return replace(problem, tables=replace(problem.tables, **tables))  # type: ignore[arg-type]


def _with_memory(problem: Problem, name: str) -> Problem:
    """The planner is free to decide ``name``."""
    free: dict[str, Any] = {name: "auto"}
    return _with(problem, memory=replace(problem.tables.memory, **free))


def _attention_only(problem: Problem) -> Problem:
    return _with(problem, adapter=replace(problem.tables.adapter, targets="attention"))


def _varied(problem: Problem, axis: str, value: int) -> Problem:
    tables, data = with_axis(problem.tables, problem.data, axis, value)
    return replace(problem, tables=tables, data=data)


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
        # What the cheapest change is about comes first: the eye goes there.
        cheapest = next((str(c.words) for c in plan.changes if c.fits), "")
        fixed.sort(key=lambda name: name not in cheapest)
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
    rounded = plan.decision("quantize_via")
    if rounded.source == "recipe" and rounded.reason_code == "not-used":
        found.add(
            WITHOUT_EFFECT,
            f"quantize_via = '{rounded.value}' has no effect: no weights are rounded",
            recipe.span("memory.quantize_via"),
            cure="remove it, or set the precision that is meant",
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
