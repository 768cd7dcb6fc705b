"""Several processes that work as one: torch.distributed, and how an error of one of them ends all.

torchrun starts the processes and tells each which it is (:mod:`ideoflow.processes`). Words and flags go
through gloo, tensors on GPUs through NCCL. Whoever fails leaves its diagnostics in the store that all share
before it closes its connections; the first process shows them, and the others stay until it has, since
torchrun ends all as soon as one has ended.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ideoflow.diagnostics import Diagnostic, IdeoflowError, fail
from ideoflow.diagnostics.codes.processes import PROCESS_LOST, TOO_FEW_GPUS
from ideoflow.plan.codec import decode, encode
from ideoflow.processes import Process, this_process

T = TypeVar("T")
Tell = Callable[[Sequence[Diagnostic]], None]

# Nobody waits for one that died: its connections close. Sampling and loading may take long.
_PATIENCE = timedelta(days=7)
# NCCL does not notice. In a step they wait for each other for seconds, or while a checkpoint is written.
_GPU_PATIENCE = timedelta(minutes=30)
_FAILED, _TOLD = "failed", "told"
_TELLING = 20.0  # seconds that the others leave the first process to show what is wrong
_LOOK = 0.5  # seconds between looks for an error of another process
_CURE = "look at its own output; the next run goes on from the last checkpoint"
_GRACE = 8.0  # seconds in which the main thread may end by itself after one


class Processes:
    """What one process needs of the others; alone, everything is free and nothing is exchanged."""

    def __init__(
        self, process: Process | None = None, store: Any = None, gpus: Any = None, weights: Any = None
    ) -> None:
        self.process, self.store = process or Process(), store
        self._gpus, self._weights = gpus, weights
        self.rank, self.ranks, self.first = self.process.rank, self.process.ranks, self.process.first

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in order of rank; waits for all."""
        if self.ranks == 1:
            return [value]
        gathered: list[Any] = [None] * self.ranks
        dist.all_gather_object(gathered, value)
        return gathered

    def of_first(self, value: T) -> T:
        """The first process's value."""
        if self.ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether any process says so; the same answer for all. The GPU is not waited for."""
        if self.ranks == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def wait(self) -> None:
        """Until all have come here."""
        self.any(False)

    def agree(self, work: Callable[[], T]) -> T:
        """The result of a piece of work that every process does, without exchanges.

        Raises:
            IdeoflowError: on all of them, with what went wrong on any.
        """
        if self.ranks == 1:
            return work()
        result, problems = None, ()
        try:
            result = work()
        except IdeoflowError as error:
            problems = error.diagnostics
        # All of them meet the same mistake in a recipe: it is told once.
        found = list(dict.fromkeys(d for diagnostics in self.gather(problems) for d in diagnostics))
        if found:
            raise IdeoflowError(found[:20])
        return result  # type: ignore[return-value]

    def first_then_others(self, work: Callable[[], T]) -> T:
        """:meth:`agree`, but the others begin when the first is done, and find what it fetched and noted."""
        if self.ranks == 1:
            return work()
        result = self.agree(lambda: work() if self.first else None)
        others = self.agree(lambda: None if self.first else work())
        return result if self.first else others  # type: ignore[return-value]

    def group(self, device: torch.device) -> Any:
        """The group of torch.distributed in which tensors on a device travel; None is the default one."""
        return self._gpus if device.type == "cuda" else None

    def weights_group(self, device: torch.device) -> Any:
        """That in which weights travel, which must not wait for gradients; None is the default one."""
        return self._weights if device.type == "cuda" else None

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites tensors, alike in all processes, with the first process's."""
        if self.ranks > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0, group=self.group(tensor.device))


ALONE = Processes()
_joined: Processes | None = None


def check_device(device: torch.device) -> None:
    """Sees to it that each process on this host has a GPU of its own, where GPUs are used.

    Raises:
        IdeoflowError: when there are too few.
    """
    process, count = this_process(), torch.cuda.device_count() if device.type == "cuda" else 0
    if process.ranks > 1 and device.type == "cuda" and process.local_ranks > count:
        gpus = f"{count} GPU" + ("s" if count != 1 else "")
        message = f"torchrun started {process.local_ranks} processes on this host, which has {gpus}"
        fail(TOO_FEW_GPUS, message, cure=f"torchrun --nproc-per-node {count} -m ideoflow ...")


@contextmanager
def joined(tell: Tell | None = None) -> Iterator[Processes]:
    """Joins the other processes, if torchrun started several; inside another ``joined``, the same ones.

    Args:
        tell: how the first process shows diagnostics, its own and those of others. The process then ends
            with exit code 1, as do the others without a word. Without it, all raise them.

    Raises:
        IdeoflowError: when torchrun's variables are incomplete; what the body raises; what another process
            failed with.
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    process = this_process()
    if process.ranks == 1:
        yield ALONE
        return
    _joined = processes = _connect(process)
    watch = _Watch(processes, tell)
    try:
        yield processes
        processes.wait()
    except (IdeoflowError, RuntimeError, OSError) as error:
        problems = _told_by_others(processes, error)
        if problems is None:
            _leave_word(processes, _lost(process, f"ended by {type(error).__name__}: {error}"))
            _set_told(processes)
            raise
        _leave_word(processes, *problems)
        if tell is None:
            raise IdeoflowError(problems) from None
        if not process.first:
            _close()  # so that whoever waits for this process hears of it
        watch.tell(problems)
        raise SystemExit(1) from None
    except BaseException as error:
        _leave_word(processes, _lost(process, f"ended by {type(error).__name__}"))
        _set_told(processes)
        raise
    finally:
        _close()  # under watch: it may wait for a kernel that never ends
        watch.stop()
        _joined = None


def _connect(process: Process) -> Processes:
    """The groups, and a store of words that all share."""
    gpus = torch.cuda.is_available()
    if gpus and process.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(process.local_rank)
    store, rank, ranks = next(iter(dist.rendezvous("env://")))
    # torchrun's store outlives a restart, and must not give the new processes the old ones' addresses.
    store = dist.PrefixStore(f"ideoflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    groups = dist.PrefixStore("groups", store)
    dist.init_process_group("gloo", store=groups, rank=rank, world_size=ranks, timeout=_PATIENCE)
    nccl = gpus and dist.is_nccl_available()
    # One for gradients, one for weights that are fetched meanwhile (engine.offload.Shards): within a group,
    # one thing is done after the other. Kernels of two groups could wait for each other for ever, if one kept
    # the other off the GPU, or if processes launched them in different orders. NCCL's are small (at most 32
    # thread blocks) and nothing else on a GPU waits for another process, so both find room. And the order is
    # the same in all: one thread launches all of a pass (forward the main one; backward autograd's for this
    # GPU, and the main one waits), along graphs that are alike. Where a process waits for its GPU, as when
    # memory is allocated, it waits for what the others have launched, or will launch without it.
    nccl_groups = [dist.new_group(backend="nccl", timeout=_GPU_PATIENCE) for _ in range(2 if nccl else 0)]
    return Processes(process, dist.PrefixStore("words", store), *nccl_groups)


def _close() -> None:
    """Closes the connections, which tells whoever waits for this process; never waits for a GPU."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _lost(process: Process, how: str) -> Diagnostic:
    return Diagnostic(PROCESS_LOST, f"process {process.rank} of {process.ranks} {how}", cure=_CURE)


def _leave_word(processes: Processes, *problems: Diagnostic) -> None:
    """Tells the others why this process ends, unless one of them was first."""
    with suppress(RuntimeError):
        if not processes.store.check([_FAILED]):
            processes.store.set(_FAILED, json.dumps(encode(problems)))


def _set_told(processes: Processes) -> None:
    """The first process has said what it has to say: nobody needs to wait for it."""
    if processes.first:
        with suppress(RuntimeError):
            processes.store.set(_TOLD, b"1")


def _word_of(store: Any) -> tuple[Diagnostic, ...]:
    """What a process left for the others; nothing where that is not whole diagnostics."""
    with suppress(RuntimeError, ValueError):
        if store.check([_FAILED]):
            return decode(tuple[Diagnostic, ...], json.loads(store.get(_FAILED)))  # type: ignore[no-any-return]
    return ()


def _told_by_others(processes: Processes, error: Exception) -> tuple[Diagnostic, ...] | None:
    """The diagnostics behind an error: its own, or those of the process that broke a connection."""
    if isinstance(error, IdeoflowError):
        return error.diagnostics
    if not _is_connection(error):
        return None
    for _ in range(10):  # a diagnostic may be on its way
        if found := _word_of(processes.store):
            return found
        time.sleep(0.1)
    message = "another process ended, or can no longer be reached"
    return (Diagnostic(PROCESS_LOST, message, cure=_CURE, notes=_first_words(error)),)


def _first_words(error: Exception) -> tuple[str, ...]:
    """What an error says happened, without the guesses at its cause that gloo adds."""
    return tuple(line.partition(" This is typically")[0] for line in str(error).splitlines()[:1])


def _is_connection(error: Exception) -> bool:
    """Whether an error is of the exchange with other processes, rather than of this one's own work."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "process group")
    return isinstance(error, dist.DistError | ConnectionError) or any(w in str(error).lower() for w in words)


class _Watch:
    """Looks, in a thread, for another process's error while this one may wait for it on a GPU.

    A kernel that waits for a process that is gone never ends, and the main thread with it: after some grace
    the first process shows what happened, and this process ends.
    """

    def __init__(self, processes: Processes, tell: Tell | None) -> None:
        self.processes, self._tell = processes, tell
        self._done = threading.Event()
        self._telling = threading.Lock()
        self._told = False
        self._store = processes.store.clone()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        if tell is not None:
            self._thread.start()

    def stop(self) -> None:
        self._done.set()

    def tell(self, problems: Sequence[Diagnostic]) -> None:
        """The first process shows them, once; the others wait until it has."""
        assert self._tell is not None
        if not self.processes.first:
            with suppress(RuntimeError):
                until = time.monotonic() + _TELLING
                while time.monotonic() < until and not self._store.check([_TOLD]):
                    time.sleep(0.05)
            return
        with self._telling:
            if not self._told:
                self._told = True
                self._tell(problems)
                _set_told(self.processes)

    def _look(self) -> None:
        while not self._done.wait(_LOOK):
            if not (problems := _word_of(self._store)):
                continue
            if not self._done.wait(_GRACE):
                self.tell(problems)
                os._exit(1)
            return
