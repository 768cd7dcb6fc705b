"""What a run shows: a progress bar a stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ideoflow.plan.document import Plan
from ideoflow.processes import this_process
from ideoflow.report.profile import heading, terminal_table

STAGES = {
    "captions": "encoding captions",
    "pictures": "encoding pictures",
    "load": "loading the base",
    "train": "training",
    "samples": "sampling",
    "verify": "reading shards",
    "prune": "writing shards anew",
}
_PLAIN_SECONDS = 5.0  # between two lines of one stage, without a terminal


class Console:
    """Shows the events of a run; a context manager, so that bars are put away whatever happens."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.rich = RichConsole(stderr=True, highlight=False)
        self.tasks: dict[str, TaskID] = {}
        self.last_line: dict[str, tuple[float, int]] = {}  # when a stage last printed, and which number
        self.details: dict[str, str] = {}
        self.progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.rich,
        )
        self.live = self.rich.is_terminal and not quiet

    def __enter__(self) -> Console:
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.progress.stop()

    def say(self, text: str) -> None:
        """One line of plain text."""
        if not self.quiet:
            self.rich.print(escape(text), style="dim" if self.rich.is_terminal else None)

    def plan(self, plan: Plan) -> None:
        """The plan in one line; `ideoflow plan` shows the page."""
        peak, free = plan.ledger.peak_bytes / 2**30, plan.hardware.free_bytes / 2**30
        decided = ", ".join(f"{d} {plan.value(d)}" for d in ("precision", "checkpointing", "compile"))
        self.say(f"plan: {plan.hardware.name}, {decided}; about {peak:.1f} of {free:.1f} GiB")
        if plan.processes > 1:
            self.say(f"{plan.decision('processes').reason}; the memory is each one's")

    def progress_of(self, stage: str, done: int, total: int) -> None:
        """Shows how far a stage is, of work that has no events."""
        self._progress(stage, done, total)

    def event(self, event: Any) -> None:
        """Shows one event of the engine."""
        kind = type(event).__name__
        if kind == "Progress":
            self._progress(event.stage, event.done, event.total)
        elif kind == "StepDone":
            self._detail("train", f"loss {event.loss:.3f}")
        elif kind == "SampleMade" and not self.live:
            self.say(f"sample of '{event.prompt}' at step {event.step}: {event.file}")
        elif kind == "Note":
            self.say(event.text)
        elif kind == "Profiled" and not self.quiet:
            self.say(f"{heading(event.table)}; more in {event.folder}")
            self.rich.print(terminal_table(event.table))

    def _progress(self, stage: str, done: int, total: int) -> None:
        name = STAGES.get(stage, stage)
        if self.live:
            if stage not in self.tasks:
                self.tasks[stage] = self.progress.add_task(name, total=total, detail="")
            self.progress.update(self.tasks[stage], completed=done, total=total)
        elif not self.quiet:
            at, printed = self.last_line.get(stage, (0.0, -1))
            now = time.monotonic()
            if done != printed and (done in (0, total) or now - at > _PLAIN_SECONDS):
                self.last_line[stage] = (now, done)
                detail = f", {self.details[stage]}" if stage in self.details else ""
                self.rich.print(f"{name}: {done} of {total}{detail}", markup=False)

    def _detail(self, stage: str, text: str) -> None:
        self.details[stage] = text
        if self.live and stage in self.tasks:
            self.progress.update(self.tasks[stage], detail=text)

    def result(self, result: Any, recipe: str) -> None:
        """Where everything is; on stdout, for whoever pipes it on."""
        if self.live:
            self.progress.stop()
        out = RichConsole(highlight=False, file=sys.stdout, soft_wrap=True)
        if result.adapter is None:
            process = this_process()
            several = f"torchrun --nproc-per-node {process.local_ranks} -m " if process.ranks > 1 else ""
            again = f"{several}ideoflow run {recipe}"
            if process.ranks > process.local_ranks:
                again = "the same command on every host"  # which only its caller knows
            out.print(f"stopped after step {result.step}; go on with: {again}", markup=False)
        else:
            size = Path(result.adapter).stat().st_size / 1e6
            out.print(f"adapter  {result.adapter}  ({size:.1f} MB)", markup=False)
        out.print(f"report   {result.report}", markup=False)
