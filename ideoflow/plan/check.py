"""Whether a plan still is about what it was made from, and what has changed if not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes.plan import BASE_CHANGED, DATA_CHANGED, RECIPE_CHANGED
from ideoflow.model.base import BaseFacts
from ideoflow.plan.codec import encode
from ideoflow.plan.document import PHASES, DataSummary, Plan
from ideoflow.recipe import Recipe

_SHOWN = 12


def check_digests(plan: Plan, recipe: Recipe, base: BaseFacts, data: DataSummary | None) -> list[Diagnostic]:
    """One diagnostic for each of recipe, pictures with captions, and base that is not as it was planned.

    ``data`` may be None where the plan was made without a data set; the data is not compared then.
    """
    problems = []
    again = f"plan again: ideoflow plan {recipe.path.as_posix()}"
    if recipe.digest != plan.digests.recipe:
        notes = changed_values(encode(plan.tables), encode(recipe.tables))
        message = "the recipe has changed since it was planned"
        problems.append(_problem(RECIPE_CHANGED, message, str(recipe.path), again, notes))
    if data is not None and plan.digests.captions is not None and data.digest != plan.digests.captions:
        # What is encoded already is no part of the data.
        before, now = (encode(replace(d, digest="", cached=())) for d in (plan.data, data) if d is not None)
        notes = changed_values(before, now)
        notes = notes or ["as many and of the same sizes as before, but not the same"]
        message = "the pictures or captions have changed since they were planned"
        problems.append(_problem(DATA_CHANGED, message, str(recipe.path), again, notes))
    if base.digest != plan.digests.base:
        facts = ("name", "storage", "digest", "has_unconditional")
        notes = changed_values(
            {k: encode(getattr(plan.base, k)) for k in facts}, {k: encode(getattr(base, k)) for k in facts}
        )
        message = f"the weights of '{base.name}' are not those that were planned"
        problems.append(_problem(BASE_CHANGED, message, str(recipe.path), again, notes))
    return problems


def changed_since(file: Path, plan: Plan) -> list[str]:
    """Sentences on what an earlier run's plan.json has otherwise in recipe and data; none without it."""
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        before, captions = earlier["tables"], earlier["digests"]["captions"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [f"{file} cannot be read, so recipes are not compared: {error}"]
    sentences = []
    if found := changed_values(before, encode(plan.tables)):
        sentences.append(f"the recipe has changed since this run began: {'; '.join(_shortened(found))}")
    if captions != plan.digests.captions:
        sentences.append("the pictures or captions have changed since this run began")
    return sentences


def plan_changes(old: Plan, new: Plan) -> list[str]:
    """What differs between two plans, a line each: inputs, decisions, peaks in GiB, and times."""
    return changed_values(_outline(old), _outline(new))


def _outline(plan: Plan) -> dict[str, Any]:
    gib = 1 << 30
    times = plan.time
    return {
        "recipe": encode(plan.tables),
        "base": plan.base.name,
        "base digest": plan.digests.base,
        "captions digest": plan.digests.captions,
        "machine": plan.hardware.name,
        "free GiB": f"{plan.hardware.free_bytes / gib:.2f}",
        "decision": {d.id: d.value for d in plan.decisions},
        "peak GiB": {phase: f"{plan.ledger.peak(phase) / gib:.2f}" for phase in PHASES},
        "step ms": f"{times.step_ms:.0f}" if times else None,
        "run seconds": f"{times.total_seconds:.0f}" if times else None,
        "adapter bytes": plan.sizes.adapter,
        "fits": plan.fits,
    }


def _problem(code: Any, message: str, path: str, cure: str, notes: list[str]) -> Diagnostic:
    return Diagnostic(code, message, Span(path), cure, notes=tuple(_shortened(notes)))


def _shortened(changes: list[str]) -> list[str]:
    """The first of them, and how many there are besides."""
    more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
    return changes[:_SHOWN] + more


def changed_values(old: Any, new: Any) -> list[str]:
    """``train.steps: 1000 -> 500`` for each value that differs between two pieces of JSON data."""
    before, after = dict(_flat(old)), dict(_flat(new))
    paths = [*before, *(path for path in after if path not in before)]
    return [
        f"{path}: {before.get(path, '(absent)')} -> {after.get(path, '(absent)')}"
        for path in paths
        if before.get(path, _ABSENT) != after.get(path, _ABSENT)
    ]


_ABSENT = object()


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every leaf; lists of plain values are leaves."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    elif isinstance(data, list) and any(isinstance(item, dict | list) for item in data):
        for index, item in enumerate(data):
            yield from _flat(item, f"{path}.{index}")
    else:
        yield path, data
