"""Converts whole data sets of captions: streaming, on all cores, in order, resumable.

The main process finds items and writes results; workers read, compile and serialise. At most a few chunks are
under way at once, so memory does not grow with the data set. Results are written in the order of the input,
whatever the workers' speed: the same input gives the same output, byte for byte.

Every second the state is written to a small journal beside the output. After a kill the same command reads
it, checks by a running digest that the items done so far are still the same, and goes on behind them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ideoflow.captions.convert_item import Options, Outcome, convert_item
from ideoflow.captions.inputs import Item, check_paths, find
from ideoflow.captions.pool import ordered_map
from ideoflow.captions.sinks import ImageFolderSink, JsonlSink, SidecarSink, Sink
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import caption_tools as codes

CHUNK = 64  # items a worker takes at once: large enough to hide the cost of passing them
SHOWN = 20  # diagnostics of each severity kept for the end; every error is in the failures file
CHECKPOINT_SECONDS = 1.0

Target = Literal["sidecars", "jsonl", "hf-imagefolder", "icap"]


@dataclass(slots=True)
class Report:
    """The outcome so far. ``diagnostics`` has the first of each severity; ``failures`` the file with all
    errors."""

    written: int = 0
    failed: int = 0
    warned: int = 0
    resumed_after: int = 0
    diagnostics: list[Diagnostic] = field(default_factory=list)
    failures: Path | None = None

    def add(self, d: Diagnostic) -> None:
        self.warned += d.severity == "warning"
        if sum(known.severity == d.severity for known in self.diagnostics) < SHOWN:
            self.diagnostics.append(d)


def convert(
    paths: Sequence[str | Path],
    out: str | Path,
    to: Target,
    options: Options,
    *,
    force: bool = False,
    jobs: int | None = None,
    on_progress: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Converts every caption under ``paths``. Failures are gathered in the report, not raised one by one.

    Raises :class:`IdeoflowError` for what concerns the run as a whole: a missing path, an existing output.
    """
    given = [str(p) for p in paths]
    check_paths(given)
    run = _Run(Path(out).absolute(), to, given, options, force)
    items = run.open()
    work = partial(_work, options=options)
    try:
        for outcomes in ordered_map(work, items, jobs=jobs or os.cpu_count() or 1, chunk=CHUNK):
            for outcome in outcomes:
                run.take(outcome)
            run.checkpoint()
            on_progress(run.report)
    except BaseException:
        run.close(finished=False)
        raise
    run.close(finished=True)
    return run.report


def make_sink(out: Path, to: Target, *, force: bool) -> Sink:
    """The sink for a kind of output."""
    if to == "jsonl":
        return JsonlSink(out, force=force)
    if to == "hf-imagefolder":
        return ImageFolderSink(out, force=force)
    return SidecarSink(out, ".icap" if to == "icap" else ".json", force=force)


class _Run:
    """The state of one conversion: output, journal, failures file, counts."""

    def __init__(self, out: Path, to: Target, paths: list[str], options: Options, force: bool) -> None:
        self.paths, self.options = paths, options
        self.sink = make_sink(out, to, force=force)
        self.report = Report()
        self.done = 0
        self._digest = b""
        self._journal = out.with_name(out.name + ".progress.json")
        self._failures = out.with_name(out.name + ".failures.jsonl")
        self._failures_file: BinaryIO | None = None
        own = {self._journal, self._failures, out.with_name(out.name + ".part")}
        # Sidecars may go beside the pictures; any other output must not be read as input.
        if not any(out == Path(p).absolute() for p in paths):
            own.add(out)
        self._skip = frozenset(str(p.resolve()) for p in own)
        asked = {"paths": [str(Path(p).absolute()) for p in paths], "to": to, "options": asdict(options)}
        self._asked = hashlib.blake2b(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        self._last = time.monotonic()

    def open(self) -> Iterator[Item]:
        """The items that are still to do."""
        state = self._read_journal()
        if state is not None:
            items = self._find()
            for item in islice(items, state["done"]):
                self._count(item.key)
            if self._digest.hex() == state["digest"] and self.done == state["done"]:
                self.report = Report(state["written"], state["failed"], state["warned"], self.done)
                self._open_files(state)
                return items
            self.done, self._digest = 0, b""
            self.report.add(
                Diagnostic(
                    codes.STARTED_OVER,
                    "an interrupted conversion's input changed: starting over",
                    Span(str(self._journal)),
                    severity="note",
                )
            )
        items = self._find()
        first = next(items, None)
        if first is None:
            where = ", ".join(self.paths)
            raise IdeoflowError(
                Diagnostic(codes.NO_INPUT, f"there is no caption in {where}", Span(self.paths[0]))
            )
        self._open_files(None)
        return chain([first], items)

    def take(self, outcome: Outcome) -> None:
        """Writes the results of one item."""
        self._count(outcome.key)
        self.report.failed += outcome.failed
        problems = list(outcome.diagnostics)
        for made in outcome.made:
            problem = self.sink.write(made)
            if problem is None:
                self.report.written += 1
            else:
                self.report.failed += 1
                # What is only worth a warning elsewhere keeps a caption from being written here.
                problems.append(as_error(problem))
        for d in problems:
            self.report.add(d)
            if d.is_error and self._failures_file is not None:
                self._failures_file.write(
                    json.dumps(d.as_dict(), ensure_ascii=False).encode(errors="replace") + b"\n"
                )

    def checkpoint(self) -> None:
        if time.monotonic() - self._last >= CHECKPOINT_SECONDS:
            self._write_journal()
            self._last = time.monotonic()

    def close(self, *, finished: bool) -> None:
        if not finished:
            self._write_journal()
        self.sink.close(finished=finished)
        if self._failures_file is not None:
            self._failures_file.close()
        if finished:
            self._journal.unlink(missing_ok=True)
            if self.report.failed:
                self.report.failures = self._failures
            else:
                self._failures.unlink(missing_ok=True)

    def _find(self) -> Iterator[Item]:
        return find(self.paths, self.options.columns, skip=self._skip)

    def _count(self, key: str) -> None:
        self.done += 1
        self._digest = hashlib.blake2b(
            self._digest + key.encode(errors="surrogatepass"), digest_size=16
        ).digest()

    def _open_files(self, state: dict[str, Any] | None) -> None:
        self.sink.open(state["sink"] if state else None)
        self._failures.parent.mkdir(parents=True, exist_ok=True)
        self._failures_file = self._failures.open("r+b" if state and self._failures.exists() else "wb")
        self._failures_file.truncate(state["failures"] if state else 0)
        self._failures_file.seek(0, os.SEEK_END)

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            state = json.loads(self._journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and state.get("asked") == self._asked else None

    def _write_journal(self) -> None:
        if self._failures_file is None:
            return
        self._failures_file.flush()
        state = {"asked": self._asked, "done": self.done, "digest": self._digest.hex(),
                 "written": self.report.written, "failed": self.report.failed, "warned": self.report.warned,
                 "sink": self.sink.state(), "failures": self._failures_file.tell()}  # fmt: skip
        part = self._journal.with_name(self._journal.name + ".part")
        part.write_text(json.dumps(state), encoding="utf-8")
        part.replace(self._journal)


def as_error(d: Diagnostic) -> Diagnostic:
    return replace(d, severity="error")


def _work(items: list[Item], options: Options) -> list[Outcome]:
    return [convert_item(item, options) for item in items]
