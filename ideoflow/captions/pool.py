"""An ordered map over chunks of work on all cores, with bounded memory."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import wait
from typing import TypeVar

from ideoflow.diagnostics import Diagnostic, IdeoflowError
from ideoflow.diagnostics.codes.caption_tools import WORKER_DIED

Given = TypeVar("Given")
Result = TypeVar("Result")


def ordered_map(work: Callable[[list[Given]], list[Result]], items: Iterable[Given], *, jobs: int,
                chunk: int) -> Iterator[list[Result]]:  # fmt: skip
    """``work`` of each chunk of items, in the order of the items, whatever the speed of the workers.

    At most a few chunks are under way, so an endless ``items`` is fine. One job, or fewer than two chunks,
    run in this process. ``work`` must be picklable. Raises IC723 where a worker is killed.
    """
    chunks = _chunks(iter(items), chunk)
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    if jobs <= 1 or len(first) < 2:
        yield from map(work, chunks)
        return
    # Not fork: the caller may have threads (a progress bar), and a lock held at a fork is never released.
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(jobs, get_context(method), _start_worker)
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for piece in chunks:
            waiting.append(pool.submit(work, piece))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise IdeoflowError(
            Diagnostic(
                WORKER_DIED,
                "a worker process was killed by the system",
                cure="run the same command again, it goes on; --jobs 1 needs the least memory",
            )
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which stops the workers
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """Ends this worker when the main process is gone: killed, it could not tell its workers to stop."""
    wait([sentinel])
    os._exit(1)


def _chunks(items: Iterator[Given], size: int) -> Iterator[list[Given]]:
    while piece := list(islice(items, size)):
        yield piece
