"""What the engine tells while it works: one small dataclass a kind of news."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` in a stage: "captions", "pictures", "load", "train" or "samples"."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class RunStarted:
    """A start, or a resumption after ``from_step`` steps."""

    from_step: int
    device: str
    torch: str


@dataclass(frozen=True)
class StageDone:
    """A stage ended after ``seconds``; ``peak_bytes`` as :class:`ideoflow.engine.meter.Meter` says."""

    stage: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class LinesMeasured:
    """Bytes on the device of the tensors that lines of the plan's ledger are about, by the lines' names.

    A name with commas stands for several lines, of which only the sum is known.
    """

    lines: dict[str, int]


@dataclass(frozen=True)
class StepDone:
    """One optimiser step: its mean loss, learning rate, gradient norm before clipping, and wall time."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    folder: Path


@dataclass(frozen=True)
class SampleMade:
    """A validation picture of a prompt after ``step`` steps; ``file`` is relative to the output folder."""

    step: int
    prompt: str
    file: Path
    seed: int
    caption: str


@dataclass(frozen=True)
class Note:
    """A sentence worth showing."""

    text: str


@dataclass(frozen=True)
class Profiled:
    """Steps were profiled; ``table`` is what ``profile.json`` in ``folder`` holds."""

    folder: Path
    table: dict[str, Any]


Event = (
    Progress
    | RunStarted
    | StageDone
    | LinesMeasured
    | StepDone
    | CheckpointSaved
    | SampleMade
    | Note
    | Profiled
)
Emit = Callable[[Event], None]
