"""``metrics.jsonl``: what happened in a run, a JSON object a line, readable at any moment.

| kind | keys |
|---|---|
| run | version, torch, device, from_step, seed: a start or a resumption |
| stage | stage (captions, pictures, load, train, samples), seconds, peak_bytes (null where unknown) |
| lines | lines: bytes on the device by line of the plan's ledger, measured from the tensors themselves |
| step | step, loss, learning_rate, grad_norm, seconds |
| sample | step, prompt, file (relative to the output folder); caption (JSON) and seed, where known |
| checkpoint | step, file |
| note | text |
| end | step, finished, adapter (file), seconds |

A resumed run appends; where it repeats steps after its checkpoint, the later line counts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.artifacts import UNWRITABLE

METRICS = "metrics.jsonl"


class Recorder:
    """Appends lines to ``metrics.jsonl`` of an output folder."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS
        self.torn = self.file.exists() and not self.file.read_bytes().endswith(b"\n")

    def write(self, kind: str, **facts: Any) -> None:
        """Appends one line at once, so that nothing is lost when the process dies.

        Raises:
            IdeoflowError: when the disk is full.
        """
        # ASCII only: no half of a character where a line is cut off, and no line break but our own.
        line = json.dumps({"kind": kind} | {k: _plain(v) for k, v in facts.items()})
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                # A line that a dying process left half-written must not swallow the next one.
                stream.write("\n" * self.torn + line + "\n")
                self.torn = False
        except OSError as error:
            cure = "free some space; the next `ideoflow run` goes on from the last checkpoint"
            fail(UNWRITABLE, f"cannot write {self.file}: {error.strerror or error}", cure=cure)


def _plain(value: Any) -> Any:
    # JSON has no NaN; a null stands for a number that is none.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, Path) else value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a last line that was cut off is left out.

    Steps, samples and checkpoints that were repeated after a resumption appear once, as they were last.
    """
    file = folder / METRICS
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else ()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        kind = line["kind"]
        key = (
            (kind, line.get("step"), line.get("prompt"))
            if kind in ("step", "sample", "checkpoint")
            else (number,)
        )
        lines.pop(key, None)
        lines[key] = line
    return list(lines.values())
