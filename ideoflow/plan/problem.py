"""What is planned for, and what one combination of decisions comes to: its memory and its time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from ideoflow.kernels.budget import MOST_GRAPHS, PACKED_MULTIPLE
from ideoflow.model.base import BaseFacts
from ideoflow.model.spec import PIXELS_PER_TOKEN, target_modules
from ideoflow.plan.adapters import AdaptedModule, AdapterSize, adapted_modules, adapter_size
from ideoflow.plan.calibration import Calibration, Factors
from ideoflow.plan.choices import Series, combinations, exact_block_counts, fixed_decisions
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
# A prediction is not exact: above this share of the free memory a plan is only made if there is no other.
TIGHT_SHARE = 0.95
# What the second transformer may be: streaming it gives the same pictures, later.
GUIDANCE = ("loaded", "streamed", "proxy")

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
    def series(self) -> tuple[Series, ...]:
        """All that the machine could do, the recipe's word apart."""
        guidance: tuple[str, ...] = ("proxy",)
        if self.base.has_unconditional and self.prompts:
            guidance = GUIDANCE if self.device == "cuda" else ("loaded", "proxy")
        fixed, kind = tuple(fixed_decisions(self.tables).items()), self.tables.adapter.kind
        exact = exact_block_counts(self.base.transformer.num_layers, dict(fixed))
        several = min(self.processes, 2)
        return _series(self.hardware, self.device, self.targets, fixed, kind, guidance, exact, several)

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
def _series(
    hardware: Hardware,
    device: str,
    targets: tuple[str, ...],
    fixed: tuple[tuple[str, str | float], ...],
    kind: str,
    guidance: tuple[str, ...],
    exact: tuple[int, ...],
    processes: int,
) -> tuple[Series, ...]:
    """The same for most of the problems that advice is sought for."""
    every = combinations(hardware, device, targets, dict(fixed), kind, exact, processes)
    return tuple(
        replace(series, first=replace(series.first, unconditional=value))
        for series in every
        for value in guidance
    )


@dataclass(frozen=True)
class Evaluation:
    """What one combination comes to: its memory and its times, each when it is asked for.

    ``step_ms`` and ``run_seconds`` only rank where speeds are unknown.
    """

    problem: Problem = field(repr=False, compare=False)
    choice: Choice

    @cached_property
    def ledger(self) -> Ledger:
        p, factors = self.problem, self.problem.factors(self.choice)
        ledger = build_ledger(
            p.base,
            p.targets,
            p.rank,
            p.shapes,
            self.choice,
            batch=p.tables.train.batch,
            accumulation=p.tables.train.accumulation,
            memory_factor=factors.memory,
            calibrated_by=factors.source,
            adapter=p.adapter,
            group=_group(p),
            processes=p.processes,
        )
        several = p.processes > 1 and self.choice.device == "cuda"
        return with_nccl(ledger, self.choice.offload) if several else ledger

    @cached_property
    def peak_bytes(self) -> int:
        return self.ledger.peak_bytes

    @cached_property
    def fits(self) -> bool:
        """On the device and in host memory."""
        return self.peak_bytes <= self.problem.hardware.free_bytes and self._host_fits()

    def _host_fits(self) -> bool:
        """Whether what waits in host memory has room; a plan without any of it is not held to that."""
        free = self.problem.hardware.host_free_bytes
        waits = self.choice.lean or self.choice.unconditional != "proxy"
        if not waits or self.choice.device == "cpu" or free is None:
            return True
        return self.problem.host_bytes(self.choice) <= free

    @property
    def tight(self) -> bool:
        """Whether less than a twentieth of the free memory would be left."""
        return self.peak_bytes > TIGHT_SHARE * self.problem.hardware.free_bytes

    @property
    def trainable(self) -> bool:
        """Whether training would have room to spare, whatever the other phases need."""
        return self.ledger.peak("train") <= TIGHT_SHARE * self.problem.hardware.free_bytes

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
        """Whether launching a step's kernels takes the host longer than the device needs for them."""
        return waits_for_host(self.parts)


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


def cache_dtype(precision: str) -> str:
    """Type of the numbers that pictures and captions are encoded in, as torch calls it: the arithmetic's."""
    return "float32" if precision == "float32" else "bfloat16"


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
