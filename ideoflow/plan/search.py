"""Weighs every combination of what may be decided: does it fit, and how long does the run take with it?

There are few enough combinations to evaluate them all with the ledger and the time model, so the choice is a
minimum over real alternatives and not a chain of rules per card. Among those that fit, the fastest whole run
wins (compiling counts); alternatives within 3 % of it are equals, and of equals the simplest wins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from ideoflow.model.base import BaseFacts
from ideoflow.model.spec import PIXELS_PER_TOKEN, target_modules
from ideoflow.plan.calibration import Calibration, Factors
from ideoflow.plan.document import Bucket, DataSummary, Hardware, Ledger, TimeEstimate
from ideoflow.plan.memory import Choice, Shapes, build_ledger, resident_parameters
from ideoflow.plan.timing import (
    COMPILE_SECONDS,
    SAMPLING_STEPS,
    Load,
    Speed,
    encoding_seconds,
    sampling_seconds,
    step_parts,
)
from ideoflow.recipe import RecipeTables

ENGINE = "reference"
# Captions' length where there is no data set; estimated lengths get this much more, to be on the safe side.
_USUAL_TEXT, _ESTIMATE_MARGIN = 400, 1.15
_EQUAL = 1.03
# A prediction is not exact: above this share of the free memory a plan is only made if there is no other.
TIGHT_SHARE = 0.95
DOMAINS = {
    "precision": ("bf16", "float32"),
    "checkpointing": ("off", "on"),
    "compile": ("off", "regional"),
    "unconditional": ("loaded", "proxy"),
}
_PRECISION_BITS = {"fp8": 8, "float16": 16, "bf16": 16, "float32": 32}


@dataclass(frozen=True)
class Problem:
    """What is given: settings, base, data, machine and measurements; ``prompts`` are the pictures sampled."""

    tables: RecipeTables
    base: BaseFacts
    data: DataSummary | None
    hardware: Hardware
    calibration: Calibration
    prompts: int

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
        return Shapes(largest // per_token, self.text_tokens[2], largest, sampled // per_token, sampled)

    @cached_property
    def load(self) -> Load:
        total = sum(b.count for b in self.buckets)
        lengths = tuple(
            (b.width * b.height // PIXELS_PER_TOKEN**2, self.text_tokens[1], b.count / total)
            for b in self.buckets
        )
        return Load(lengths, self.tables.train.batch * self.tables.train.accumulation)

    def host_bytes(self, choice: Choice) -> int:
        """What a GPU run needs of host memory: models pass it, and the second transformer waits there."""
        transformer = self.base.transformer.parameters() * choice.element
        waiting = resident_parameters(self.base.transformer) * choice.element
        vae = self.base.vae.parameters() * choice.element if self.prompts else 0
        text = self.base.text_encoder.parameters() * choice.element
        return max(text, transformer + vae + (waiting if choice.unconditional == "loaded" else 0))

    def factors(self, choice: Choice) -> Factors:
        return self.calibration.factors(self.hardware.name, ENGINE, choice.compiled)


@dataclass(frozen=True)
class Evaluation:
    """One combination, evaluated. ``step_ms`` and ``run_seconds`` only rank where speeds are unknown."""

    choice: Choice
    ledger: Ledger
    step_ms: float
    compile_seconds: float
    run_seconds: float
    fits: bool
    tight: bool


def fixed_by_recipe(tables: RecipeTables) -> dict[str, str]:
    """Decisions that the recipe has taken."""
    memory = tables.memory
    asked = {"precision": memory.precision, "checkpointing": memory.checkpointing, "compile": memory.compile}
    return {name: value for name, value in asked.items() if value != "auto"}


def possible(problem: Problem, decision: str) -> tuple[str, ...]:
    """Values that the engine has on this machine, the recipe's word apart."""
    if decision == "compile" and problem.hardware.kind != "cuda":
        return ("off",)
    if decision == "unconditional" and not (problem.base.has_unconditional and problem.prompts):
        return ("proxy",)
    return DOMAINS[decision]


def candidates(problem: Problem) -> list[Choice]:
    """Every combination that respects the recipe."""
    fixed = fixed_by_recipe(problem.tables)
    axes = [(fixed[d],) if d in fixed else possible(problem, d) for d in DOMAINS]
    return [Choice(problem.device, *values) for values in product(*axes)]


def evaluate(problem: Problem, choice: Choice) -> Evaluation:
    """Memory and time of one combination."""
    factors = problem.factors(choice)
    ledger = build_ledger(
        problem.base,
        problem.targets,
        problem.tables.adapter.rank,
        problem.shapes,
        choice,
        samples=problem.load.samples,
        memory_factor=factors.memory,
        calibrated_by=factors.source,
    )
    speed = _speed(problem, choice)
    rank = problem.tables.adapter.rank
    parts = step_parts(problem.base.transformer, problem.targets, rank, problem.load, choice, speed)
    step_ms = sum(part.ms for part in parts) * factors.time
    compiling = _compile_seconds(problem) if choice.compiled else 0.0
    run = compiling + step_ms / 1e3 * problem.tables.train.steps
    peak, free = ledger.peak_bytes, problem.hardware.free_bytes
    fits = peak <= free and _host_fits(problem, choice)
    return Evaluation(choice, ledger, step_ms, compiling, run, fits, peak > TIGHT_SHARE * free)


def _host_fits(problem: Problem, choice: Choice) -> bool:
    """Whether what waits in host memory has room there; only the second transformer can be done without."""
    free = problem.hardware.host_free_bytes
    if choice.unconditional != "loaded" or choice.device == "cpu" or free is None:
        return True
    return problem.host_bytes(choice) <= free


def _speed(problem: Problem, choice: Choice) -> Speed:
    return Speed.of(problem.hardware, choice, problem.calibration.shares, problem.load)


def _compile_seconds(problem: Problem) -> float:
    """The first shape is compiled as it is, a second one makes shapes symbolic; after that nothing is."""
    least, _, greatest = problem.text_tokens
    shapes = len(problem.buckets) + (greatest > least)
    return COMPILE_SECONDS * min(shapes, 2)


def choose(evaluated: Iterable[Evaluation], storage: str) -> Evaluation:
    """The best that fits; where none does, the one that needs least.

    What leaves some memory free comes first: running out of it costs more than a slower step. Then come
    pictures with true guidance: the second transformer is there only while sampling, so it costs
    the training nothing.
    """
    evaluated = list(evaluated)
    fitting = [e for e in evaluated if e.fits]
    if not fitting:
        return min(evaluated, key=lambda e: (e.ledger.peak_bytes, _plainness(e.choice, storage)))
    pool = [e for e in fitting if not e.tight] or fitting
    pool = [e for e in pool if e.choice.unconditional == "loaded"] or pool
    fastest = min(e.run_seconds for e in pool)
    return min(
        (e for e in pool if e.run_seconds <= _EQUAL * fastest),
        key=lambda e: (_plainness(e.choice, storage), e.run_seconds),
    )


def _plainness(choice: Choice, storage: str) -> tuple[int, bool, bool]:
    """Of equals, the least: no bits of the weights lost or wasted, nothing compiled, nothing recomputed."""
    bits = _PRECISION_BITS[choice.precision] - _PRECISION_BITS[storage]
    return (2 if bits < 0 else min(bits, 1), choice.compiled, choice.checkpointing == "on")


def solve(problem: Problem) -> Evaluation:
    """The combination to run."""
    return choose((evaluate(problem, c) for c in candidates(problem)), problem.base.storage)


def times_known(problem: Problem, choice: Choice) -> bool:
    """Whether a predicted time may be shown: the device's rates are known, or it was measured."""
    rates = problem.hardware.rates is not None and problem.device == "cuda"
    return rates or bool(problem.factors(choice).source)


def estimate_time(problem: Problem, best: Evaluation) -> TimeEstimate | None:
    """The whole run's time; None where nothing is known of the device's speed."""
    choice, tables = best.choice, problem.tables
    if not times_known(problem, choice):
        return None
    factors, speed = problem.factors(choice), _speed(problem, choice)
    rank, base = tables.adapter.rank, problem.base
    parts = step_parts(base.transformer, problem.targets, rank, problem.load, choice, speed)
    pictures = problem.data.pictures if problem.data else 0
    pixels = float(sum(b.width * b.height * b.count for b in problem.buckets)) if problem.data else 0.0
    prompts = problem.prompts
    samplings = 2 + (tables.train.steps - 1) // tables.validate.every if prompts else 0
    per_picture = sampling_seconds(
        base.transformer,
        problem.targets,
        problem.shapes.sample_tokens,
        problem.text_tokens[1],
        tables.validate.steps or SAMPLING_STEPS[tables.validate.preset],
        choice,
        speed,
    )
    rates = problem.hardware.rates
    source = (
        f"{rates.source}, shares of peak from {problem.calibration.shares.source}" if rates else "a guess"
    )
    return TimeEstimate(
        tuple(replace(p, ms=round(p.ms * factors.time, 3)) for p in parts),
        best.compile_seconds,
        round(encoding_seconds(base, pictures + prompts, problem.text_tokens[1], pixels, speed), 3),
        round(best.step_ms * tables.train.steps / 1e3, 3),
        round(samplings * prompts * per_picture * factors.time, 3),
        bool(factors.source),
        f"{source}; x {factors.time:.2f} by {factors.source}" if factors.source else source,
    )
