"""What happened in a run, read from ``metrics.jsonl``: steps, pictures, stages, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ideoflow.report.record import read_metrics

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """One optimiser step; a figure that was not a finite number is None. Gradient norm before clipping."""

    step: int
    loss: float | None
    learning_rate: float | None
    grad_norm: float | None
    seconds: float | None


@dataclass(frozen=True)
class Sample:
    """A picture of ``prompt`` after ``step`` steps; ``file`` is relative to the run's folder."""

    step: int
    prompt: str
    file: str
    caption: str
    seed: int | None


@dataclass(frozen=True)
class Stage:
    """All passes of one stage: their seconds together, and the highest of their memory peaks."""

    name: str
    seconds: float
    peak_bytes: int | None
    passes: int


@dataclass(frozen=True)
class Start:
    """A start or a resumption, as its ``run`` line tells it."""

    from_step: int
    version: str
    torch: str
    device: str
    seed: int | None


@dataclass(frozen=True)
class History:
    """A run from its first start to now.

    ``ending`` is "finished", "stopped" (by request, at a step of its own choosing) or "open": the last start
    has no end line, because it still runs or died. ``seconds`` is the wall time of all starts that ended,
    ``lines`` what was measured of the ledger's lines, in bytes.
    """

    starts: tuple[Start, ...]
    steps: tuple[Step, ...]
    samples: tuple[Sample, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]
    ending: Literal["finished", "stopped", "open"]
    step: int
    adapter: str | None
    seconds: float | None
    checkpoint: int | None
    lines: Mapping[str, int]

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """The steps after which training went on in a later start."""
        return tuple(start.from_step for start in self.starts[1:])

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)


def read_history(folder: Path) -> History:
    """The history of the run in ``folder``; an empty one where nothing was recorded."""
    lines = _timeline(read_metrics(folder))
    steps = [_step(line) for line in _of(lines, "step")]
    starts = [_start(line) for line in _of(lines, "run")]
    ends = _of(lines, "end")
    samples = [_sample(line) for line in _of(lines, "sample")]
    checkpoints = [_count(line.get("step")) for line in _of(lines, "checkpoint")]
    last_end = max((i for i, line in enumerate(lines) if line["kind"] == "end"), default=-1)
    last_start = max((i for i, line in enumerate(lines) if line["kind"] == "run"), default=-1)
    ended = last_end > last_start
    end: Line = ends[-1] if ended else {}
    reached = max((s.step for s in steps), default=starts[-1].from_step if starts else 0)
    spent = [seconds for line in ends if (seconds := finite(line.get("seconds"))) is not None]
    return History(
        starts=tuple(starts),
        steps=tuple(sorted(steps, key=lambda s: s.step)),
        samples=tuple(sorted(samples, key=lambda s: s.step)),
        stages=tuple(_stages(_of(lines, "stage"))),
        notes=tuple(dict.fromkeys(str(line.get("text", "")) for line in _of(lines, "note"))),
        ending="open" if not ended else "finished" if end.get("finished") is True else "stopped",
        step=_count(end.get("step"), reached),
        adapter=str(end["adapter"]) if end.get("adapter") else None,
        seconds=sum(spent) if spent else None,
        checkpoint=max(checkpoints, default=None),
        lines=_lines(_of(lines, "lines")),
    )


def finite(value: Any) -> float | None:
    """A finite number, or None for everything else that JSON can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _count(value: Any, default: int = 0) -> int:
    found = finite(value)
    return default if found is None else int(found)


def _timeline(lines: Sequence[Line]) -> list[Line]:
    """The lines without what a resumption undid: steps and pictures after the checkpoint it began from."""
    kept: list[Line] = []
    for line in lines:
        if line["kind"] == "run":
            first = _count(line.get("from_step"))
            kept = [old for old in kept if old["kind"] not in _UNDONE or _count(old.get("step")) <= first]
        kept.append(line)
    return kept


_UNDONE = ("step", "sample", "checkpoint")


def _of(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _start(line: Line) -> Start:
    seed = finite(line.get("seed"))
    version, torch, device = (str(line.get(key) or "unknown") for key in ("version", "torch", "device"))
    return Start(_count(line.get("from_step")), version, torch, device, None if seed is None else int(seed))


def _step(line: Line) -> Step:
    figures = (finite(line.get(key)) for key in ("loss", "learning_rate", "grad_norm", "seconds"))
    return Step(_count(line.get("step")), *figures)


def _sample(line: Line) -> Sample:
    caption, seed = line.get("caption"), finite(line.get("seed"))
    return Sample(
        _count(line.get("step")),
        str(line.get("prompt", "")),
        str(line.get("file", "")),
        caption if isinstance(caption, str) else "",
        None if seed is None else int(seed),
    )


def _lines(measured: Sequence[Line]) -> dict[str, int]:
    """Bytes by line of the ledger, as they were measured last."""
    found = measured[-1].get("lines") if measured else None
    return {str(k): _count(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _stages(lines: Sequence[Line]) -> list[Stage]:
    stages: dict[str, Stage] = {}
    for line in lines:
        name = str(line.get("stage", ""))
        seconds, peak = finite(line.get("seconds")) or 0.0, finite(line.get("peak_bytes"))
        old = stages.get(name, Stage(name, 0.0, None, 0))
        peaks = [p for p in (old.peak_bytes, peak) if p is not None]
        stages[name] = Stage(name, old.seconds + seconds, int(max(peaks)) if peaks else None, old.passes + 1)
    return list(stages.values())
