"""What a run measured, put beside what was predicted, for later plans."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ideoflow.plan.calibration import Measured, shipped
from ideoflow.plan.document import Plan
from ideoflow.plan.memory import TRANSIENT
from ideoflow.plan.search import Problem, evaluate
from ideoflow.plan.sizes import Choice

# Lines that are no tensors, which an allocator's figures do not hold.
NOT_ALLOCATED = frozenset({"CUDA context", "Python and torch", "fragmentation"})


def engine_digest() -> str:
    """Changes with the code of the engines and their kernels: other code is measured anew."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(f for part in ("engine", "kernels") for f in (package / part).rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def planned_choice(plan: Plan) -> Choice:
    """The combination that a plan decided for."""
    text = {
        name: str(plan.value(name))
        for name in (
            "device",
            "engine",
            "precision",
            "matmul",
            "compile",
            "unconditional",
            "optimizer_state",
            "offload",
            "activation_offload",
            "graphs",
        )
    }
    return Choice(activation_budget=float(plan.value("activation_budget")), **text)


def measured_run(
    plan: Plan, *, train_peak_bytes: int, step_ms: float, engine_digest: str, versions: Mapping[str, str]
) -> Measured:
    """One run's figures, for :func:`ideoflow.plan.calibration.append_runs`.

    Args:
        plan: what was run.
        train_peak_bytes: allocated at the peak of training (``torch.cuda.max_memory_allocated``).
        step_ms: median time of an optimiser step, compiling not counted.
        engine_digest: changes with the engine's code.
        versions: of torch, driver and whatever else decides speed.

    The prediction is made again without any correction, so that corrections do not compound.
    """
    choice = planned_choice(plan)
    problem = Problem(plan.tables, plan.base, plan.data, plan.hardware, shipped(), 0)
    if any(line.phase == "sample" for line in plan.ledger.lines):
        problem = replace(problem, prompts=1)
    plain = evaluate(problem, choice)
    lines = [x for x in plain.ledger.of("train") if x.name not in NOT_ALLOCATED]
    moving = sum(x.bytes for x in lines if x.name in TRANSIENT)
    steady = sum(x.bytes for x in lines) - moving
    return Measured(
        plan.hardware.name,
        choice.path,
        engine_digest,
        dict(versions),
        choice.compiled,
        moving,
        max(0, train_peak_bytes - steady),
        plain.step_ms,
        step_ms,
    )


class RunMeter:
    """Gathers a run's own figures from the engine's events; on processors nothing is gathered.

    There the peak is the whole process', of which the formulas describe only a part.
    """

    # Kernels are compiled, and attention planned, in the first steps after a start.
    _SKIPPED, _FEWEST = 5, 5

    def __init__(self, plan: Plan) -> None:
        self.plan, self.peak, self.torch = plan, 0, ""
        self.seconds: list[float] = []

    def see(self, event: Any) -> None:
        """Takes what counts from an event of :mod:`ideoflow.engine.events`."""
        kind = type(event).__name__
        if kind == "RunStarted":
            self.torch = event.torch
        elif kind == "StepDone":
            self.seconds.append(event.seconds)
        elif kind == "StageDone" and event.stage == "train":
            self.peak = max(self.peak, event.peak_bytes)

    def measured(self) -> Measured | None:
        """The run as a measurement; None where there is too little of it."""
        later = self.seconds[self._SKIPPED :]
        if self.plan.value("device") != "cuda" or not self.peak or len(later) < self._FEWEST:
            return None
        return measured_run(
            self.plan,
            train_peak_bytes=self.peak,
            step_ms=1e3 * median(later),
            engine_digest=engine_digest(),
            versions={"torch": self.torch},
        )
