"""Chooses among all combinations of what may be decided: what fits, and makes the run shortest.

There are few enough to look through them all with the ledger and the time model, so the choice is a minimum
over real alternatives and not a chain of rules per card. First it is settled how exact weights and moments
can be. Of what is as exact as that, the fastest whole run wins (compiling counts), where whatever else is
rounded, and whatever waits on the host, counts as a tenth more; alternatives within 3 % of it are equals, and
of equals the simplest wins.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import fields
from operator import attrgetter, ne

from ideoflow.kernels.budget import ROUNDING
from ideoflow.plan.choices import Series, fixed_decisions
from ideoflow.plan.problem import Evaluation, Problem
from ideoflow.plan.sizes import Choice

_EQUAL = 1.03
# Each thing that is rounded must make the run this much shorter. So must having anything wait on the host,
# and once more having weights wait: that takes host memory, its time hangs on the link, and steps that fetch
# weights take 4 % longer than told (benchmarks/results/plan-accuracy.json). Moments in 8 bits count as both.
WORTH = 1.1
_PRECISION_BITS = {"nf4": 4, "fp8": 8, "int8": 8, "float16": 16, "bf16": 16, "float32": 32}
# How far weights are from those that are stored: kept, rounded to 8 bits, rounded to 4. Of what is FP8, wider
# ones are as exact, but no better than rounded ones: more of what there is too little of.
_LOSS = {
    "fp8": {"fp8": 0, "bf16": 1, "float32": 1, "int8": 1, "nf4": 2},
    "nf4": {"nf4": 0, "bf16": 0, "float32": 0, "int8": 1, "fp8": 1},
    "dense": {"bf16": 0, "float32": 0, "int8": 1, "fp8": 1, "nf4": 2},
}

_NAMES = tuple(f.name for f in fields(Choice) if f.name != "activation_budget")
_others = attrgetter(*_NAMES)


def candidates(problem: Problem, released: str = "") -> list[Series]:
    """Every combination that respects the recipe, apart from its word on the decision ``released``."""
    fixed = fixed_decisions(problem.tables)
    fixed.pop(released, None)
    budget = fixed.pop("activation_budget", None)
    found = [s for s in problem.series if all(s.has(name, value) for name, value in fixed.items())]
    if budget is None:
        return found
    return [one for s in found if (one := s.with_budget(float(budget)))]


def alternatives(problem: Problem, best: Evaluation, decision: str) -> dict[str | float, Evaluation]:
    """For each other value of ``decision`` the combination most like the best one, with the best budget.

    Where the recipe's other settings leave none, the machine's combinations are looked through as a whole.
    """
    here = best.choice
    if decision == "activation_budget":
        (series,) = (s for s in candidates(problem, decision) if _others(s.first) == _others(here))
        return {b: Evaluation(problem, series.at(b)) for b in series.budgets if b != here.activation_budget}
    rest = attrgetter(*(n for n in _NAMES if n != decision))
    groups: dict[str | float, list[Series]] = {}
    for series in candidates(problem, decision):
        groups.setdefault(getattr(series.first, decision), []).append(series)
    allowed = set(groups)
    for series in problem.series:
        if (value := getattr(series.first, decision)) not in allowed:
            groups.setdefault(value, []).append(series)
    groups.pop(getattr(here, decision), None)
    found = {}
    for value, every in groups.items():
        unlike = [sum(map(ne, rest(s.first), rest(here))) for s in every]
        least = min(unlike)
        near = [s for s, n in zip(every, unlike, strict=True) if n == least]
        found[value] = choose([e for s in near for e in _worth_looking_at(problem, s)], problem.base.storage)
    return found


def excluded_by(problem: Problem, decision: str, value: str | float) -> str:
    """The recipe's setting with which ``decision`` cannot have this value, as it is written; or nothing.

    Where only several settings together leave it out, the last of them.
    """
    fixed = fixed_decisions(problem.tables)
    fixed.pop(decision, None)
    left = [s for s in problem.series if s.has(decision, value)]
    if not left:
        return ""
    alone = [name for name, v in fixed.items() if not any(s.has(name, v) for s in left)]
    for name, v in fixed.items():
        left = [s for s in left if s.has(name, v)]
        if not left:
            name, v = (alone[0], fixed[alone[0]]) if alone else (name, v)
            return f"{name} = {v!r}"
    return ""


def _weights_lost(choice: Choice, storage: str) -> int:
    return _LOSS.get(storage, _LOSS["dense"])[choice.precision]


def _degree(choice: Choice, storage: str) -> tuple[int, bool]:
    """What has to be given up, the least first: looked for in this order until something leaves room.

    Weights on the device, as they are stored; rounded to 8 bits; as stored but fetched from the host in every
    pass; rounded and fetched; in 4 bits. Within each, moments in 8 bits come last.
    """
    loss, away = _weights_lost(choice, storage), choice.offload != "none"
    degree = loss + 2 * away if loss < 2 else 4 + away
    return degree, choice.optimizer_state == "8bit"


def _no_less_exact(choice: Choice, storage: str, degree: tuple[int, bool]) -> bool:
    """Whether it keeps as much of weights and moments as what is of this degree."""
    sacrifice, moments = degree
    loss = sacrifice % 2 if sacrifice < 4 else 2
    return _weights_lost(choice, storage) <= loss and (choice.optimizer_state == "8bit") <= moments


def rounded(choice: Choice, storage: str) -> tuple[int, bool, bool, bool]:
    """What is rounded, the worst first: weights, moments, every block's products, activations on the host."""
    kept = choice.precision in ("bf16", "float32")
    return (
        0 if kept else _weights_lost(choice, storage),
        choice.optimizer_state == "8bit",
        choice.matmul == "fp8" and not choice.exact_blocks,
        choice.activation_offload in ROUNDING,
    )


def cost(e: Evaluation) -> float:
    """Seconds of the whole run, and more for what must be worth it."""
    choice = e.choice
    count = sum(map(bool, rounded(choice, e.problem.base.storage))) + choice.lean + (choice.offload != "none")
    return e.run_seconds * WORTH**count


def _plainness(choice: Choice, storage: str) -> tuple[int, bool, bool, int, bool, bool, bool]:
    """Of equals, the least: no bits of the weights lost or wasted, no FP8 products, nothing on the host,
    nothing compiled, nothing recomputed, and the adapter where it is trained."""
    bits = _PRECISION_BITS[choice.precision] - _PRECISION_BITS[storage]
    rounded = 2 if bits < 0 else min(bits, 1)
    # Row by row, int8 is a third of e4m3's rounding away; but what is e4m3 already is that exactly.
    coarse = choice.precision == "fp8" and storage not in ("fp8", "nf4")
    fp8 = choice.matmul == "fp8"
    adapter = choice.optimizer_state == "offload"
    return rounded, fp8, coarse, choice.savings, choice.compiled, choice.checkpointing == "on", adapter


def solve(problem: Problem) -> Evaluation:
    """The combination to run."""
    storage, every = problem.base.storage, candidates(problem)
    degrees: dict[tuple[int, bool], list[Series]] = {}
    for series in every:
        degrees.setdefault(_degree(series.first, storage), []).append(series)
    for degree, some in sorted(degrees.items()):
        if any(_room(Evaluation(problem, series.first)) == 3 for series in some):
            as_exact = [s for s in every if _no_less_exact(s.first, storage, degree)]
            return choose(_promising(problem, as_exact), storage)
    return choose([e for s in every for e in _worth_looking_at(problem, s)], storage)


def _promising(problem: Problem, every: Iterable[Series]) -> list[Evaluation]:
    """What can come of them: with true guidance where that is possible, and nothing that would take too long
    even if it kept all activations."""
    found: list[Evaluation] = []
    parted: tuple[list[tuple[Evaluation, Series]], ...] = [], []
    for series in every:
        most = Evaluation(problem, series.at(series.budgets[-1]))
        parted[most.choice.unconditional == "proxy"].append((most, series))
    for some in parted:
        least = math.inf
        for most, series in sorted(some, key=lambda pair: cost(pair[0])):
            if cost(most) > _EQUAL * least:
                break
            here = _worth_looking_at(problem, series)
            found += here
            least = min([least, *(cost(e) for e in here if _room(e) == 3)])
        if least < math.inf:
            break
    return found


def _worth_looking_at(problem: Problem, series: Series) -> list[Evaluation]:
    """The least budget, and the largest with as much room: a larger one takes memory and saves time."""
    first = Evaluation(problem, series.first)
    room = _room(first)
    if not room or len(series.budgets) == 1:
        return [first]
    less = bisect_left(
        series.budgets, True, 1, key=lambda budget: _room(Evaluation(problem, series.at(budget))) < room
    )
    return [first, Evaluation(problem, series.at(series.budgets[less - 1]))]


def _room(e: Evaluation) -> int:
    """3: it fits, and leaves some memory free; 2: it fits; 1: the training would; 0: nothing does."""
    return (2 if e.tight else 3) if e.fits else int(e.trainable)


def choose(evaluated: Iterable[Evaluation], storage: str) -> Evaluation:
    """The best that fits; where none does, the one that needs least.

    What leaves some memory free comes first: running out of it costs more than a slower step. Of that, what
    is as exact as the least degree of sacrifice allows; then pictures with true guidance: the second
    transformer is there only while sampling, so it costs the training nothing.
    """
    evaluated = list(evaluated)
    fitting = [e for e in evaluated if e.fits]
    if fitting:
        pool = [e for e in fitting if not e.tight] or fitting
    else:
        smallest = min(e.peak_bytes for e in evaluated)
        pool = [e for e in evaluated if e.peak_bytes == smallest]
        # It may be the encoders alone that do not fit; the training is then planned as if they did.
        if not (pool := [e for e in pool if e.trainable] or pool)[0].trainable:
            return min(pool, key=lambda e: (e.ledger.peak("train"), _plainness(e.choice, storage)))
    degree = min(_degree(e.choice, storage) for e in pool)
    pool = [e for e in pool if _no_less_exact(e.choice, storage, degree)]
    # Fetching the second transformer makes the same pictures, later; that time is part of the run's.
    pool = [e for e in pool if e.choice.unconditional != "proxy"] or pool
    least = min(map(cost, pool))
    return min(
        (e for e in pool if cost(e) <= _EQUAL * least), key=lambda e: (_plainness(e.choice, storage), cost(e))
    )
