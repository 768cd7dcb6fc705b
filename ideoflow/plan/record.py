"""What a run measured, put beside what was predicted, for later plans."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from ideoflow.plan.calibration import Calibration, Measured, shipped
from ideoflow.plan.document import PHASES, Ledger, LedgerLine, Phase, Plan
from ideoflow.plan.memory import TRANSIENT
from ideoflow.plan.problem import Evaluation, Problem
from ideoflow.plan.sizes import Choice

# Lines that are no tensors, which an allocator's figures do not hold.
NOT_ALLOCATED = frozenset({"CUDA context", "Python and torch", "fragmentation", "NCCL"})
# The stage of a run in which each phase of the ledger happens.
STAGE_OF: Mapping[Phase, str] = {
    "text": "captions",
    "latents": "pictures",
    "train": "train",
    "sample": "samples",
}
# A peak is worth a word when it is this much above the prediction, as a share and in bytes (what libraries
# allocate is more than all of a tiny base), or comes this near to what was free.
_ABOVE, _ABOVE_BYTES, _NEAR = 0.05, 128 << 20, 0.03


def allocated(ledger: Ledger, phase: Phase = "train") -> list[LedgerLine]:
    """The lines of a phase that are tensors."""
    return [line for line in ledger.of(phase) if line.name not in NOT_ALLOCATED]


def engine_digest() -> str:
    """Changes with the code of the engines and their kernels: other code is measured anew."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(f for part in ("engine", "kernels") for f in (package / part).rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def planned_choice(plan: Plan) -> Choice:
    """The combination that a plan decided for."""
    numbers = ("activation_budget", "exact_blocks")
    text = {field.name: str(plan.value(field.name)) for field in fields(Choice) if field.name not in numbers}
    budget, exact = (plan.value(name) for name in numbers)
    return Choice(activation_budget=float(budget), exact_blocks=int(exact), **text)


def predict(plan: Plan, calibration: Calibration) -> Evaluation:
    """Memory and time of what a plan decided for, as some calibration has it."""
    facts = plan.tables, plan.base, plan.data, plan.hardware
    problem = Problem(*facts, calibration, 0, plan.processes)
    if any(line.phase == "sample" for line in plan.ledger.lines):
        problem = replace(problem, prompts=1)
    return Evaluation(problem, planned_choice(plan))


def measured_run(
    plan: Plan,
    *,
    train_peak_bytes: int | None,
    step_ms: float,
    engine_digest: str,
    versions: Mapping[str, str],
) -> Measured:
    """One run's figures, for :func:`ideoflow.plan.calibration.append_runs`.

    Args:
        plan: what was run.
        train_peak_bytes: allocated at the peak of training (``torch.cuda.max_memory_allocated``); None where
            it was not measured, and counts as predicted.
        step_ms: median time of an optimiser step, compiling not counted.
        engine_digest: changes with the engine's code.
        versions: of torch, driver and whatever else decides speed.

    The prediction is made again without any correction, so that corrections do not compound.
    """
    choice, plain = planned_choice(plan), predict(plan, shipped())
    lines = allocated(plain.ledger)
    moving = sum(x.bytes for x in lines if x.name in TRANSIENT)
    steady = sum(x.bytes for x in lines) - moving
    return Measured(
        plan.hardware.name,
        choice.path,
        engine_digest,
        dict(versions),
        choice.compiled,
        moving,
        moving if train_peak_bytes is None else max(0, train_peak_bytes - steady),
        plain.step_ms,
        step_ms,
        plain.waits_for_host,
    )


def wrong_lines(plan: Plan, peaks: Mapping[str, int], lines: Mapping[str, int]) -> list[str]:
    """A sentence for each phase whose peak was over 5 % and 128 MiB too high, or within 3 % of what was free.

    It names the line of the ledger, or those that were measured together, that was too small by most. What
    was not measured line by line is what is left of the peak.

    Args:
        peaks: bytes by stage, as the engine's meter tells them: allocated on a GPU, the process' on a CPU. Of
            a CPU only nearness counts: the libraries that a process holds are no formula's.
        lines: bytes by line in the train phase, as ``LinesMeasured`` tells them.
    """
    sentences, free = [], plan.hardware.free_bytes
    cpu = plan.value("device") == "cpu"
    for phase in PHASES:
        ledger, peak = plan.ledger.of(phase), peaks.get(STAGE_OF[phase], 0)
        outside = 0 if cpu else sum(x.bytes for x in ledger if x.name in NOT_ALLOCATED)
        predicted = plan.ledger.peak(phase) - outside
        room = free - peak - outside
        above = not cpu and peak - predicted > max(_ABOVE * predicted, _ABOVE_BYTES)
        if not ledger or not peak or not (above or room < _NEAR * free):
            continue
        counted = {x.name: x.bytes for x in ledger if cpu or x.name not in NOT_ALLOCATED}
        parts, left = [], peak
        for names, found in lines.items() if phase == "train" else ():
            if expected := sum(counted.pop(name, 0) for name in names.split(", ")):
                parts.append((names, expected, found))
                left -= found
        rest = ", ".join(sorted(counted, key=lambda name: -counted[name]))
        parts.append((rest, sum(counted.values()), left))
        names, expected, found = max(parts, key=lambda part: part[2] - part[1])
        sentences.append(
            f"{phase}: the peak was {_mib(peak)} where {_mib(predicted)} were predicted "
            f"({peak / predicted - 1:+.1%}), {_mib(max(room, 0))} below the limit; "
            + (
                f"'{names}' took {_mib(found)}, not {_mib(expected)}"
                if found > expected
                else "no line was larger"
            )
        )
    return sentences


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


class RunMeter:
    """Gathers a run's own figures from the engine's events.

    Those of processors are not kept for later plans: there the peak is the whole process', of which the
    formulas describe only a part.
    """

    # Kernels are compiled, and attention planned, in the first steps after a start.
    _SKIPPED, _FEWEST = 5, 5

    def __init__(self, plan: Plan) -> None:
        self.plan, self.torch = plan, ""
        self.seconds: list[float] = []
        self.peaks: dict[str, int] = {}
        self.lines: dict[str, int] = {}

    def see(self, event: Any) -> None:
        """Takes what counts from an event of :mod:`ideoflow.engine.events`."""
        kind = type(event).__name__
        if kind == "RunStarted":
            self.torch = event.torch
        elif kind == "StepDone":
            self.seconds.append(event.seconds)
        elif kind == "LinesMeasured":
            self.lines = event.lines
        elif kind == "StageDone":
            self.peaks[event.stage] = max(self.peaks.get(event.stage, 0), event.peak_bytes)

    def wrong_lines(self) -> list[str]:
        """What :func:`wrong_lines` says of the run so far."""
        return wrong_lines(self.plan, self.peaks, self.lines)

    def measured(self) -> Measured | None:
        """The run as a measurement; None where there is too little of it."""
        later, peak = self.seconds[self._SKIPPED :], self.peaks.get("train", 0)
        if self.plan.value("device") != "cuda" or not peak or len(later) < self._FEWEST:
            return None
        return measured_run(
            self.plan,
            train_peak_bytes=peak,
            step_ms=1e3 * median(later),
            engine_digest=engine_digest(),
            versions={"torch": self.torch},
        )
