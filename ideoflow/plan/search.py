"""Weighs every combination of what may be decided: does it fit, and how long does the run take with it?

There are few enough combinations to evaluate them all with the ledger and the time model, so the choice is a
minimum over real alternatives and not a chain of rules per card. Among those that fit, the fastest whole run
wins (compiling counts); alternatives within 3 % of it are equals, and of equals the simplest wins. Rounding
weights, or letting them wait on the host, is no equal: it is only done where nothing else leaves room.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from operator import attrgetter, ne

from ideoflow.kernels.budget import MOST_GRAPHS, PACKED_MULTIPLE
from ideoflow.model.base import BaseFacts
from ideoflow.model.spec import PIXELS_PER_TOKEN, target_modules
from ideoflow.plan.adapters import AdaptedModule, AdapterSize, adapted_modules, adapter_size
from ideoflow.plan.calibration import Calibration, Factors
from ideoflow.plan.choices import combinations, exact_block_counts, fixed_decisions
from ideoflow.plan.document import (
    Bucket,
    DataSummary,
    Hardware,
    Ledger,
    LedgerLine,
    Phase,
    TimeEstimate,
    TimePart,
)
from ideoflow.plan.fused import away_bytes
from ideoflow.plan.memory import build_ledger
from ideoflow.plan.phases import SAMPLING_STEPS, encoding_seconds, sampling_seconds, starting_seconds
from ideoflow.plan.sizes import Choice, Shapes, host_arrays, streamed_bytes, weight_bytes
from ideoflow.plan.timing import Load, Speed, step_parts, waits_for_host
from ideoflow.recipe import RecipeTables

# Captions' length where there is no data set; estimated lengths get this much more, to be on the safe side.
_USUAL_TEXT, _ESTIMATE_MARGIN = 400, 1.15
_EQUAL = 1.03
# A prediction is not exact: above this share of the free memory a plan is only made if there is no other.
TIGHT_SHARE = 0.95
# The first blocks' forward products are left exact beside FP8 for up to this much of a run's time.
EXACT_WORTH = 1.1
# What the second transformer may be: streaming it gives the same pictures, later.
GUIDANCE = ("loaded", "streamed", "proxy")
_PRECISION_BITS = {"nf4": 4, "fp8": 8, "int8": 8, "float16": 16, "bf16": 16, "float32": 32}


# What several processes need besides: NCCL's channels, and a bucket of gradients on its way.
NCCL = LedgerLine("train", "NCCL", 450 << 20, False, "usual size; depends on the links between the cards")


def with_nccl(ledger: Ledger, offload: str) -> Ledger:
    """A ledger with what NCCL takes; as much again, and while sampling too, where weights go through it."""
    lines = [line for line in ledger.lines if line.name != NCCL.name]
    if offload != "shard":
        return Ledger((*lines, NCCL))
    both = replace(NCCL, bytes=2 * NCCL.bytes, evidence=f"for gradients and for weights; {NCCL.evidence}")
    phases: list[Phase] = ["train", *(["sample"] if ledger.of("sample") else [])]  # type: ignore[list-item]
    return Ledger((*lines, *(replace(both, phase=phase) for phase in phases)))


@dataclass(frozen=True)
class Problem:
    """What is given: settings, base, data, machine and measurements; ``prompts`` are the pictures sampled.

    ``processes`` train together, each on such a machine.
    """

    tables: RecipeTables
    base: BaseFacts
    data: DataSummary | None
    hardware: Hardware
    calibration: Calibration
    prompts: int
    processes: int = 1

    @property
    def device(self) -> str:
        """The device that a run uses: a GPU that torch calls cuda (ROCm's too), or the CPU."""
        if self.tables.memory.device == "cpu" or self.hardware.kind not in ("cuda", "rocm"):
            return "cpu"
        return "cuda"

    @cached_property
    def targets(self) -> tuple[str, ...]:
        return target_modules(self.tables.adapter.targets, self.base.transformer)

    @cached_property
    def modules(self) -> tuple[AdaptedModule, ...]:
        """What is adapted, each with its rank."""
        return adapted_modules(self.tables.adapter, self.base.transformer, self.targets)

    @cached_property
    def adapter(self) -> AdapterSize:
        return adapter_size(self.tables.adapter, self.modules)

    @cached_property
    def rank(self) -> int:
        """The greatest rank of a low-rank product that tokens go through."""
        low_rank = self.tables.adapter.kind in ("lora", "dora")
        return max((m.rank for m in self.modules), default=0) if low_rank else 0

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Sizes of the pictures; without a data set, one square of the recipe's resolution."""
        side = self.tables.data.resolution
        return self.data.buckets if self.data else (Bucket(side, side, 1),)

    @cached_property
    def text_tokens(self) -> tuple[int, int, int]:
        """(least, median, greatest) caption length to plan with."""
        if self.data is None:
            return (_USUAL_TEXT,) * 3
        least, median, greatest = self.data.text_tokens
        if self.data.text_tokens_estimated:
            greatest = min(int(greatest * _ESTIMATE_MARGIN), self.tables.captions.max_tokens)
        return least, median, max(greatest, median)

    @cached_property
    def shapes(self) -> Shapes:
        largest = max(b.width * b.height for b in self.buckets)
        validate, side = self.tables.validate, self.tables.data.resolution
        sampled = (validate.width or side) * (validate.height or side) if self.prompts else 0
        per_token = PIXELS_PER_TOKEN**2
        captions = (self.data.texts if self.data else 1) + self.prompts
        return Shapes(
            largest // per_token,
            self.text_tokens[2],
            largest,
            sampled // per_token,
            sampled,
            captions * self.text_tokens[1],
            self._graph_shapes(),
        )

    def _graph_shapes(self) -> int:
        """Each size of picture with each 64 text tokens; a batch may combine them in any way."""
        least, _, greatest = self.text_tokens
        one = len(self.buckets) * (greatest // PACKED_MULTIPLE - least // PACKED_MULTIPLE + 1)
        combined = math.prod([min(one, MOST_GRAPHS)] * min(self.tables.train.batch, MOST_GRAPHS))
        return min(MOST_GRAPHS, combined)

    @cached_property
    def load(self) -> Load:
        total = sum(b.count for b in self.buckets)
        lengths = tuple(
            (b.width * b.height // PIXELS_PER_TOKEN**2, self.text_tokens[1], b.count / total)
            for b in self.buckets
        )
        train = self.tables.train
        return Load(lengths, train.batch * train.accumulation, passes=train.accumulation)

    @cached_property
    def combinations(self) -> tuple[Choice, ...]:
        """All that the machine could do, the recipe's word apart."""
        guidance: tuple[str, ...] = ("proxy",)
        if self.base.has_unconditional and self.prompts:
            guidance = GUIDANCE if self.device == "cuda" else ("loaded", "proxy")
        fixed, kind = tuple(fixed_decisions(self.tables).items()), self.tables.adapter.kind
        exact = exact_block_counts(self.base.transformer.num_layers, dict(fixed))
        several = min(self.processes, 2)
        return _combinations(self.hardware, self.device, self.targets, fixed, kind, guidance, exact, several)

    def host_bytes(self, choice: Choice) -> int:
        """What a GPU run needs of host memory: what samples are made with waits there, and what is offloaded.

        The other weights go from their files to the device tensor by tensor; but those that are cut up among
        processes pass through the host of each as a whole, before the rest is there.
        """
        spec, second = self.base.transformer, choice.unconditional != "proxy"
        waiting = weight_bytes(spec, choice.precision) if second else 0
        if choice.offload not in ("none", "disk", "shard"):
            waiting += streamed_bytes(spec, choice.precision)
        waiting += 4 * host_arrays(choice) * self.adapter.parameters
        tokens = self.tables.train.batch * self.shapes.tokens
        waiting += tokens * away_bytes(spec, choice.element, choice.activation_offload) * spec.num_layers
        waiting += self.base.vae.parameters() * choice.element
        passing = streamed_bytes(spec, choice.precision) if choice.offload == "shard" else 0
        return max(waiting, passing)

    def factors(self, choice: Choice) -> Factors:
        """Corrections by the runs made here, looked through once for all combinations that they are for."""
        key = choice.path, choice.compiled
        if key not in self._factors:
            self._factors[key] = self.calibration.factors(self.hardware.name, *key)
        return self._factors[key]

    @cached_property
    def _factors(self) -> dict[tuple[str, bool], Factors]:
        return {}


@lru_cache(maxsize=8)
def _combinations(
    hardware: Hardware,
    device: str,
    targets: tuple[str, ...],
    fixed: tuple[tuple[str, str | float], ...],
    kind: str,
    guidance: tuple[str, ...],
    exact: tuple[int, ...],
    processes: int,
) -> tuple[Choice, ...]:
    """The same for most of the problems that advice is sought for."""
    every = combinations(hardware, device, targets, dict(fixed), kind, exact, processes)
    return tuple(
        c if value == c.unconditional else replace(c, unconditional=value)
        for c in every
        for value in guidance
    )


@dataclass(frozen=True)
class Evaluation:
    """One combination, evaluated; its times when they are asked for, which of most they never are.

    ``step_ms`` and ``run_seconds`` only rank where speeds are unknown. ``trainable``: training would have
    room, whatever the other phases need. ``waits_for_host``: launching a step's kernels takes the host longer
    than the device needs for them.
    """

    problem: Problem = field(repr=False, compare=False)
    choice: Choice
    ledger: Ledger
    fits: bool
    tight: bool
    trainable: bool

    @cached_property
    def parts(self) -> tuple[TimePart, ...]:
        """A step's time by kind of work, without what runs made here correct of the device's."""
        p, speed = self.problem, _speed(self.problem, self.choice)
        facts = p.base.transformer, p.targets, p.rank, p.load, self.choice, speed, p.adapter
        return step_parts(*facts, _group(p), p.processes)

    @cached_property
    def step_ms(self) -> float:
        return sum(part.ms for part in self.parts) * self.problem.factors(self.choice).time

    @property
    def compile_seconds(self) -> float:
        return starting_seconds(self.choice, _shapes(self.problem))

    @cached_property
    def run_seconds(self) -> float:
        return self.compile_seconds + self.step_ms / 1e3 * self.problem.tables.train.steps

    @property
    def waits_for_host(self) -> bool:
        return waits_for_host(self.parts)


def candidates(problem: Problem, released: str = "") -> list[Choice]:
    """Every combination that respects the recipe, apart from its word on the decision ``released``."""
    fixed = fixed_decisions(problem.tables)
    fixed.pop(released, None)
    choices = list(problem.combinations)
    for decision, value in fixed.items():
        choices = [c for c in choices if getattr(c, decision) == value]
    return choices


def alternatives(problem: Problem, best: Evaluation, decision: str) -> dict[str | float, Evaluation]:
    """For each other value of ``decision`` the combination most like the best one, evaluated.

    Where the recipe's other settings leave none, the machine's combinations are looked through as a whole.
    """
    rest = attrgetter(*(f.name for f in fields(Choice) if f.name != decision))
    here = rest(best.choice)
    groups: dict[str | float, list[Choice]] = {}
    for choice in candidates(problem, decision):
        groups.setdefault(getattr(choice, decision), []).append(choice)
    allowed = set(groups)
    for choice in problem.combinations:
        if (value := getattr(choice, decision)) not in allowed:
            groups.setdefault(value, []).append(choice)
    groups.pop(getattr(best.choice, decision), None)
    found = {}
    for value, choices in groups.items():
        # Tens of thousands of them, each several times: compared without a loop of Python's.
        unlike = [sum(map(ne, rest(choice), here)) for choice in choices]
        least = min(unlike)
        near = [evaluate(problem, c) for c, n in zip(choices, unlike, strict=True) if n == least]
        found[value] = choose(near, problem.base.storage)
    return found


def evaluate(problem: Problem, choice: Choice) -> Evaluation:
    """Memory and time of one combination."""
    factors = problem.factors(choice)
    ledger = build_ledger(
        problem.base,
        problem.targets,
        problem.rank,
        problem.shapes,
        choice,
        batch=problem.tables.train.batch,
        accumulation=problem.tables.train.accumulation,
        memory_factor=factors.memory,
        calibrated_by=factors.source,
        adapter=problem.adapter,
        group=_group(problem),
        processes=problem.processes,
    )
    if problem.processes > 1 and choice.device == "cuda":
        ledger = with_nccl(ledger, choice.offload)
    peak, free = ledger.peak_bytes, problem.hardware.free_bytes
    fits = peak <= free and _host_fits(problem, choice)
    limit = TIGHT_SHARE * free
    return Evaluation(problem, choice, ledger, fits, peak > limit, ledger.peak("train") <= limit)


def _host_fits(problem: Problem, choice: Choice) -> bool:
    """Whether what waits in host memory has room there; a plan without any of it is not held to that."""
    free, waits = problem.hardware.host_free_bytes, choice.lean or choice.unconditional != "proxy"
    if not waits or choice.device == "cpu" or free is None:
        return True
    return problem.host_bytes(choice) <= free


def _speed(problem: Problem, choice: Choice) -> Speed:
    shares, factors = problem.calibration.shares[choice.engine], problem.factors(choice)
    # All parts are multiplied by the device's factor in the end, the host's among them.
    return Speed.of(problem.hardware, choice, shares, problem.load, factors.host / factors.time)


def _group(problem: Problem) -> tuple[int, bool]:
    """Blocks of an offloaded group, and whether the next one is fetched meanwhile."""
    memory = problem.tables.memory
    return memory.offload_blocks, memory.offload_streams


def _shapes(problem: Problem) -> int:
    """How many lengths of a sample there are, as far as it matters: one, or two for several."""
    least, _, greatest = problem.text_tokens
    return min(2, len(problem.buckets) + (greatest > least))


def choose(evaluated: Iterable[Evaluation], storage: str) -> Evaluation:
    """The best that fits; where none does, the one that needs least.

    What leaves some memory free comes first: running out of it costs more than a slower step. Then comes the
    least sacrifice, then pictures with true guidance: the second transformer is there only while sampling, so
    it costs the training nothing; then exact blocks, where they cost little time.
    """
    evaluated = list(evaluated)
    fitting = [e for e in evaluated if e.fits]
    if fitting:
        pool = [e for e in fitting if not e.tight] or fitting
    else:
        least = min(e.ledger.peak_bytes for e in evaluated)
        pool = [e for e in evaluated if e.ledger.peak_bytes == least]
        # It may be the encoders alone that do not fit; the training is then planned as if they did.
        if not (pool := [e for e in pool if e.trainable] or pool)[0].trainable:
            return min(pool, key=lambda e: (e.ledger.peak("train"), _plainness(e.choice, storage)))
    best = min(_sacrifice(e.choice, storage) for e in pool)
    pool = [e for e in pool if _sacrifice(e.choice, storage) == best]
    # Fetching the second transformer makes the same pictures, later; that time is part of the run's.
    pool = [e for e in pool if e.choice.unconditional != "proxy"] or pool
    pool = _faithful(pool)
    fastest = min(e.run_seconds for e in pool)
    return min(
        (e for e in pool if e.run_seconds <= _EQUAL * fastest),
        key=lambda e: (_plainness(e.choice, storage), e.run_seconds),
    )


def _faithful(pool: list[Evaluation]) -> list[Evaluation]:
    """What does not round in every block, where that costs little; else all."""
    limit = EXACT_WORTH * min(e.run_seconds for e in pool)
    if not any(e.choice.exact_blocks and e.run_seconds <= limit for e in pool):
        return pool
    return [e for e in pool if e.choice.exact_blocks or e.choice.matmul != "fp8"]


def cache_dtype(precision: str) -> str:
    """Type of the numbers that pictures and captions are encoded in, as torch calls it: the arithmetic's."""
    return "float32" if precision == "float32" else "bfloat16"


# How far weights are from those that are stored: kept or widened, rounded to 8 bits, rounded to 4.
_LOSS = {
    "fp8": {"fp8": 0, "bf16": 1, "float32": 1, "int8": 1, "nf4": 2},
    "nf4": {"nf4": 0, "bf16": 0, "float32": 0, "int8": 1, "fp8": 1},
    "dense": {"bf16": 0, "float32": 0, "int8": 1, "fp8": 1, "nf4": 2},
}


def _sacrifice(choice: Choice, storage: str) -> tuple[int, bool, bool]:
    """What is given up for memory, the least first; within one degree the fastest is taken.

    Weights on the device, as they are stored; rounded to 8 bits; as stored but fetched from the host in every
    pass; rounded and fetched; in 4 bits. Then moments in 8 bits, and last whatever else only costs time.
    """
    loss, away = _LOSS.get(storage, _LOSS["dense"])[choice.precision], choice.offload != "none"
    degree = loss + 2 * away if loss < 2 else 4 + away
    return degree, choice.optimizer_state == "8bit", choice.lean


def _plainness(choice: Choice, storage: str) -> tuple[int, bool, bool, bool, bool, bool]:
    """Of equals, the least: no bits of the weights lost or wasted, no FP8 products, nothing compiled, nothing
    recomputed, and the adapter where it is trained."""
    bits = _PRECISION_BITS[choice.precision] - _PRECISION_BITS[storage]
    rounded = 2 if bits < 0 else min(bits, 1)
    # Row by row, int8 is a third of e4m3's rounding away; but what is e4m3 already is that exactly.
    coarse = choice.precision == "fp8" and storage not in ("fp8", "nf4")
    fp8 = choice.matmul == "fp8"
    away = choice.optimizer_state == "offload"
    return rounded, fp8, coarse, choice.compiled, choice.checkpointing == "on", away


def solve(problem: Problem) -> Evaluation:
    """The combination to run: of the least sacrifice that leaves some memory free."""
    storage = problem.base.storage
    degrees: dict[tuple[int, bool, bool], list[Choice]] = {}
    for choice in candidates(problem):
        degrees.setdefault(_sacrifice(choice, storage), []).append(choice)
    seen: list[Evaluation] = []
    for _, choices in sorted(degrees.items()):
        evaluated = list(_evaluations(problem, choices))
        if any(e.fits and not e.tight for e in evaluated):
            return choose(evaluated, storage)
        seen += evaluated
    return choose(seen, storage)


_BUT_THE_BUDGET = attrgetter(*(f.name for f in fields(Choice) if f.name != "activation_budget"))


def _evaluations(problem: Problem, choices: Iterable[Choice]) -> Iterator[Evaluation]:
    """What can come of them: a larger activation budget than one that is too large already is left out."""
    series: dict[tuple[object, ...], list[Choice]] = {}
    for choice in choices:
        series.setdefault(_BUT_THE_BUDGET(choice), []).append(choice)
    for alike in series.values():
        for choice in sorted(alike, key=lambda c: c.activation_budget):
            yield (found := evaluate(problem, choice))
            if found.ledger.peak("train") > problem.hardware.free_bytes:
                break


def times_known(problem: Problem, choice: Choice) -> bool:
    """Whether a predicted time may be shown: the device's rates are known, or it was measured."""
    rates = problem.hardware.rates is not None and problem.device == "cuda"
    return rates or bool(problem.factors(choice).source)


def _to_encode(problem: Problem, choice: Choice) -> tuple[int, float]:
    """Captions, and pixels of pictures, that are not cached yet."""
    data = problem.data
    if data is None:
        return problem.prompts, 0.0
    cached = data.cached_as(cache_dtype(choice.precision))
    pixels = sum(b.width * b.height * b.count for b in data.buckets)
    return max(0, data.texts + problem.prompts - cached.captions), pixels * (1 - cached.crops / data.crops)


def estimate_time(problem: Problem, best: Evaluation) -> TimeEstimate | None:
    """The whole run's time; None where nothing is known of the device's speed."""
    choice, tables = best.choice, problem.tables
    if not times_known(problem, choice):
        return None
    base, factors = problem.base, problem.factors(choice)
    # Captions are encoded and samples made by plain modules, whichever engine trains.
    plain = replace(choice, engine="reference", matmul="float32" if choice.precision == "float32" else "bf16")
    eager = _speed(problem, plain)
    captions, pixels = _to_encode(problem, choice)
    prompts = problem.prompts
    samplings = 2 + (tables.train.steps - 1) // tables.validate.every if prompts else 0
    per_picture = sampling_seconds(
        base.transformer,
        problem.targets,
        problem.shapes.sample_tokens,
        problem.text_tokens[1],
        tables.validate.steps or SAMPLING_STEPS[tables.validate.preset],
        plain,
        eager,
        problem.processes,
    )
    rates = problem.hardware.rates
    shares = problem.calibration.shares[choice.engine]
    source = f"{rates.source}, shares of peak from {shares.source}" if rates else "a guess"
    return TimeEstimate(
        tuple(replace(p, ms=round(p.ms * factors.time, 3)) for p in best.parts),
        best.compile_seconds,
        round(encoding_seconds(base, captions, problem.text_tokens[1], pixels, eager), 3),
        round(best.step_ms * tables.train.steps / 1e3, 3),
        round(samplings * prompts * per_picture * factors.time, 3),
        bool(factors.source),
        f"{source}; x {factors.time:.2f} by {factors.source}" if factors.source else source,
    )
