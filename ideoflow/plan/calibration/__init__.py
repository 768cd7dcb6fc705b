"""What was measured, and how it corrects the formulas.

Two kinds of measurement. *Shares of peak* come with the package (``ENGINE.json`` beside this file): how much
of a card's data-sheet rates each kind of work reaches; the time model starts from them on every card. *Runs*
are appended by ``ideoflow run`` to ``calibration.json`` in the user's cache: what was predicted and what was
measured, for one device, engine and set of versions. They scale the prediction for exactly that combination:
memory by the greatest of the last runs, so that it is not predicted too small, time by their median.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes.plan import BAD_CALIBRATION
from ideoflow.plan.codec import Mismatch, decode, encode
from ideoflow.resources import user_cache, write_whole

FORMAT = 1
# Runs of one combination that are looked at, newest last; and kept in the file.
_RECENT, _KEPT = 8, 500
# How far they may correct. Of processors only the memory is known beforehand; their time is a guess.
_LARGEST_MEMORY, _LARGEST_TIME = 4.0, 50.0


@dataclass(frozen=True)
class Shares:
    """Shares of data-sheet peaks, by kind of work, and milliseconds a block spends on launching kernels."""

    format: int
    device: str
    versions: Mapping[str, str]
    source: str
    note: str
    efficiency: Mapping[str, float]
    block_ms: Mapping[str, float]
    rows: tuple[Mapping[str, float | bool], ...]


@dataclass(frozen=True)
class Measured:
    """One run: what was predicted and what came; ``engine`` is a choice's ``path``.

    ``moving`` bytes are those of the train phase that come and go (not weights, adapter or CUDA context),
    as allocated at the peak; ``engine_digest`` changes with the engine's code. ``waits_for_host``: by the
    prediction, the step takes as long as the host needs to launch its kernels.
    """

    device: str
    engine: str
    engine_digest: str
    versions: Mapping[str, str]
    compiled: bool
    predicted_moving: int
    measured_moving: int
    predicted_step_ms: float | None
    measured_step_ms: float
    waits_for_host: bool = False


@dataclass(frozen=True)
class Factors:
    """Corrections for one combination; ``source`` is empty where it was not measured itself.

    ``time`` is of the device's work, ``host`` of launching it.
    """

    memory: float = 1.0
    time: float = 1.0
    source: str = ""
    host: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """All that is known: the shares that ship, by engine, and the runs made here."""

    shares: Mapping[str, Shares]
    runs: tuple[Measured, ...] = ()

    def factors(self, device: str, engine: str, compiled: bool) -> Factors:
        """Corrections from the newest runs of this device and engine, if there are any.

        Where only another mode (compiled or eager) or another engine was measured, its time corrects this one
        too: else a device that is slower than predicted would make what was never tried look fast.
        """
        here = [r for r in self.runs if r.device == device]
        # A changed engine is another engine: only runs of the newest one count.
        here = [r for r in here if r.engine_digest == here[-1].engine_digest]
        runs = [r for r in here if r.engine == engine]
        same = [r for r in runs if r.compiled == compiled][-_RECENT:]
        time, host = (_time_factor(same or runs or here, waits) for waits in (False, True))
        if not same:
            return Factors(time=time, host=host)
        memory = max(r.measured_moving / max(r.predicted_moving, 1) for r in same)
        count = f"{len(same)} run{'s' if len(same) > 1 else ''} on this {device}"
        return Factors(_bounded(memory, _LARGEST_MEMORY), time, count, host)


def _time_factor(runs: Sequence[Measured], waits: bool) -> float:
    """The median of measured to predicted step times, of runs that wait for the host or of the others."""
    times = [
        r.measured_step_ms / r.predicted_step_ms
        for r in runs
        if r.predicted_step_ms and r.waits_for_host == waits
    ]
    return _bounded(statistics.median(times), _LARGEST_TIME) if times else 1.0


def _bounded(factor: float, largest: float) -> float:
    """A measurement that is wildly off (a shared machine, a swap) must not make plans absurd."""
    return min(max(factor, 1 / largest), largest)


@cache
def shipped() -> Calibration:
    """What comes with the package."""
    files = {engine: Path(__file__).with_name(f"{engine}.json") for engine in ("reference", "fused")}
    texts = {engine: file.read_text(encoding="utf-8") for engine, file in files.items()}
    return Calibration({engine: decode(Shares, json.loads(text)) for engine, text in texts.items()})


def user_file() -> Path:
    """Where runs made here are kept."""
    return user_cache() / "calibration.json"


def load_calibration(file: Path | None = None) -> tuple[Calibration, list[Diagnostic]]:
    """What ships and what was measured here; a damaged file is a warning and counts for nothing."""
    file = file or user_file()
    try:
        runs = _read(file)
    except FileNotFoundError:
        return shipped(), []
    except (OSError, ValueError) as error:
        cure = "remove the file; later runs make a new one"
        message = f"measurements of earlier runs cannot be used: {error}"
        return shipped(), [
            Diagnostic(BAD_CALIBRATION, message, Span(str(file)), cure, severity=BAD_CALIBRATION.severity)
        ]
    return Calibration(shipped().shares, runs), []


def _read(file: Path) -> tuple[Measured, ...]:
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("runs"), list):
        raise Mismatch("format", f"not a calibration of format {FORMAT}")
    return tuple(decode(Measured, run, f"runs.{i}") for i, run in enumerate(data["runs"]))


def append_runs(runs: Iterable[Measured], file: Path | None = None) -> Path:
    """Adds measurements to the user's file, which is replaced whole; the oldest go when it grows long.

    Raises:
        OSError: if it cannot be written.
    """
    file = file or user_file()
    try:
        earlier = _read(file)
    except (OSError, ValueError):
        earlier = ()
    kept: list[Any] = [encode(run) for run in (*earlier, *runs)][-_KEPT:]
    content = json.dumps({"format": FORMAT, "runs": kept}, indent=1)
    write_whole(file, content.encode())
    return file
