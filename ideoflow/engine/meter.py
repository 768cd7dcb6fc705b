"""Seconds and peak memory of each stage of a run; running out of memory as a diagnostic."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

from ideoflow.data.encode import release
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import OUT_OF_MEMORY
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.setup import Trainable
from ideoflow.plan.document import Plan

_INTERVAL = 0.05  # seconds between looks at the process's memory


class Meter:
    """Measures stages on one device and tells ``report(stage, seconds, peak_bytes)`` at their end.

    On a GPU the peak is what torch's allocator had reserved for tensors (``max_memory_allocated``); on a CPU
    it is the resident memory of the whole process, libraries included, as seen every 50 ms.
    """

    def __init__(self, device: torch.device, report: Callable[[str, float, int], None]) -> None:
        self.device, self.report = device, report

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside the ``with`` is one stage; it is told also when it ends in an error."""
        peak = _GpuPeak(self.device) if self.device.type == "cuda" else _ProcessPeak()
        started = time.perf_counter()
        try:
            yield
        finally:
            bytes_ = peak.stop()
            self.report(name, time.perf_counter() - started, bytes_)


def measure_lines(model: Trainable, optimizer: Optimizer) -> dict[str, int]:
    """Bytes on the device by line of the ledger, for :class:`ideoflow.engine.events.LinesMeasured`.

    Where weights wait elsewhere, those that are fetched cannot be told from those that stay.
    """
    transformer = model.transformer
    trained = {id(p) for p in model.parameters.values()}
    frozen = [*(t for t in _tensors(transformer) if id(t) not in trained), *model.shards]
    names = "weights, fetched weights" if model.streamed else "weights"
    lines = {
        names: frozen,
        "adapter": model.parameters.values(),
        "optimizer state": optimizer.device_tensors(),
    }
    return {name: _bytes(tensors, optimizer.device) for name, tensors in lines.items()}


def _tensors(transformer: nn.Module) -> Iterator[Tensor]:
    yield from transformer.parameters()
    yield from transformer.buffers()
    for module in transformer.modules():
        state = getattr(
            getattr(module, "weight", None), "quant_state", None
        )  # bitsandbytes' scales and tables
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if t is not None)
            state = state.state2


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """What they occupy there; tensors that share memory count once."""
    storages = {
        s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors if t.device == device)
    }
    return sum(storages.values())


@contextmanager
def memory_errors_told(plan: Plan) -> Iterator[None]:
    """Turns running out of memory into a diagnostic."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        _out_of_memory(plan, str(error))
    except RuntimeError as error:
        # The CPU's allocator has no exception type of its own.
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        _out_of_memory(plan, str(error))


def _out_of_memory(plan: Plan, reason: str) -> None:
    release(torch.device(str(plan.value("device"))))
    fail(
        OUT_OF_MEMORY,
        f"out of memory on {plan.hardware.name}",
        cure="`ideoflow plan RECIPE` lists changes that save memory; the next run goes on from the last "
        "checkpoint",
        notes=reason.strip().splitlines()[:1],
    )


class _GpuPeak:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)

    def stop(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


class _ProcessPeak:
    def __init__(self) -> None:
        self.process = psutil.Process()
        self.peak = self.process.memory_info().rss
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(_INTERVAL):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def stop(self) -> int:
        self.done.set()
        self.thread.join()
        return max(self.peak, self.process.memory_info().rss)
