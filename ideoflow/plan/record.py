"""What a run measured, put beside what was predicted, for later plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ideoflow.plan.calibration import Measured, shipped
from ideoflow.plan.document import Plan
from ideoflow.plan.memory import TRANSIENT, Choice
from ideoflow.plan.search import DOMAINS, ENGINE, Problem, evaluate

# Lines that are no tensors, which an allocator's figures do not hold.
NOT_ALLOCATED = frozenset({"CUDA context", "Python and torch", "fragmentation"})


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
    choice = Choice(str(plan.value("device")), *(str(plan.value(d)) for d in DOMAINS))
    problem = Problem(plan.tables, plan.base, plan.data, plan.hardware, shipped(), 0)
    if any(line.phase == "sample" for line in plan.ledger.lines):
        problem = replace(problem, prompts=1)
    plain = evaluate(problem, choice)
    lines = [x for x in plain.ledger.of("train") if x.name not in NOT_ALLOCATED]
    moving = sum(x.bytes for x in lines if x.name in TRANSIENT)
    steady = sum(x.bytes for x in lines) - moving
    return Measured(
        plan.hardware.name,
        ENGINE,
        engine_digest,
        dict(versions),
        choice.compiled,
        moving,
        max(0, train_peak_bytes - steady),
        plain.step_ms,
        step_ms,
    )
