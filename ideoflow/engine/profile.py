"""Profiles a few steps of a run with torch's profiler; a profile that fails costs a note, not the run.

Ranges are put around the engine's parts only while a profile is taken: outside of it they cost nothing.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ideoflow import kernels
from ideoflow.engine import parts
from ideoflow.engine.events import Emit, Note, Profiled
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.linear import AdaptedLinear
from ideoflow.engine.fused.weights import FrozenWeight
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.setup import Trainable
from ideoflow.plan.adapters import adapted_modules
from ideoflow.plan.document import Plan
from ideoflow.resources import write_whole

WARM_UP = 10  # steps before the first that is profiled: by then everything is compiled, planned and recorded
STEPS = 3
_LARGE = 16 << 20  # bytes from which a trace is compressed; chrome://tracing and Perfetto open both

_OPS = {
    "adapter": parts.ADAPTER,
    "split_precision": parts.ADAPTER,
    "transpose": parts.WEIGHTS,
    "dequantize": parts.WEIGHTS,
}
_METHODS = [
    (FrozenWeight, ("forward", "backward", "backward_with"), parts.FROZEN),
    (FrozenWeight, ("_dense", "_transposed_weight"), parts.WEIGHTS),
    (AdaptedLinear, ("_down",), parts.ADAPTER),
]


def _ranged(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(parts.RANGE + part):
            return function(*args, **kwargs)

    return inside


@contextmanager
def ranges(fused: FusedTransformer | None) -> Iterator[None]:
    """Names the parts of the fused engine in traces that are taken meanwhile."""
    with ExitStack() as stack:

        def put(owner: Any, name: str, part: str) -> None:
            own = vars(owner).get(name)
            setattr(owner, name, _ranged(part, getattr(owner, name)))
            stack.callback(delattr, owner, name) if own is None else stack.callback(setattr, owner, name, own)

        put(Optimizer, "clip", parts.OPTIMISER)
        put(Optimizer, "step", parts.OPTIMISER)
        if fused:
            for op in kernels.OPS:
                part = next((part for start, part in _OPS.items() if op.startswith(start)), parts.POINTWISE)
                put(fused.ops, op, part)
            for owner, names, part in _METHODS:
                for name in names:
                    put(owner, name, part)
            attention = fused.blocks[0].attention
            put(attention, "forward", parts.ATTENTION)
            put(attention, "backward", parts.ATTENTION_BACKWARD)
        yield


class Capture:
    """Takes a trace of the steps that run inside :meth:`step`.

    Args:
        device: where the steps compute.
        fused: the engine whose parts are named; None for the reference engine.
        ranks: the adapter's ranks.
    """

    def __init__(self, device: torch.device, fused: FusedTransformer | None, ranks: Collection[int]) -> None:
        self.device, self.ranks = device, ranks
        self._stack = ExitStack()
        self._stack.enter_context(ranges(fused))
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        try:
            self._profile = profile(activities=activities, record_shapes=True)
            self._synchronize()
            self._profile.start()
        except BaseException:
            self._stack.close()
            raise

    @contextmanager
    def step(self, last: bool) -> Iterator[None]:
        """One step; the last one ends when its kernels have."""
        with record_function(parts.STEP):
            yield
            if last:
                self._synchronize()

    def finish(self) -> bytes:
        """Ends the trace and gives it as JSON.

        Raises:
            OSError, RuntimeError: if it cannot be written or read back.
        """
        with self._stack:
            self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(file))
            return file.read_bytes()

    def account(self, trace: bytes) -> dict[str, Any]:
        """What :func:`ideoflow.engine.parts.account` finds in the trace, and the device's name.

        Raises:
            ValueError: if the trace was cut off, as on a full disk.
        """
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {"device": name, **parts.account(json.loads(trace), self.ranks)}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def capture_training(plan: Plan, model: Trainable) -> Capture:
    """Starts a trace of the plan's engine."""
    # The fused engine is what its prediction is bound to.
    bound = getattr(model.predict, "args", ())
    fused = next((engine for engine in bound if isinstance(engine, FusedTransformer)), None)
    modules = adapted_modules(plan.tables.adapter, plan.base.transformer, plan.targets)
    return Capture(model.transformer.device, fused, {m.rank for m in modules})


class RunProfile:
    """Profiles steps of one run; leaves ``profile/trace.json`` and ``profile/profile.json`` in its folder.

    The steps are the :data:`STEPS` after the first :data:`WARM_UP` of this start, or the last ones where
    fewer are to be done.

    Args:
        first: the number of the run's next step, from 1.
        last: the number of its last step.
        capture: starts a :class:`Capture`.
    """

    def __init__(self, folder: Path, first: int, last: int, capture: Callable[[], Capture],
                 emit: Emit) -> None:  # fmt: skip
        self.folder, self.capture, self.emit = folder / "profile", capture, emit
        begin = max(min(first + WARM_UP, last + 1 - STEPS), first)
        self.wanted = range(begin, min(begin + STEPS, last + 1))
        self.taken: list[int] = []
        self.running: Capture | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Goes around every step of the run."""
        if step not in self.wanted:
            yield
            return
        if step == self.wanted[0]:
            self._try("started", self._start)
        if self.running is None:
            yield
            return
        with self.running.step(last=step == self.wanted[-1]):
            yield
        self.taken.append(step)
        if step == self.wanted[-1]:
            self.close()

    def close(self) -> None:
        """Ends a profile that is under way and writes what it has."""
        if self.running:
            capture, self.running = self.running, None
            self._try("finished", partial(self._write, capture))

    def _start(self) -> None:
        self.running = self.capture()

    def _write(self, capture: Capture) -> None:
        text = capture.finish()
        name = "trace.json" if len(text) < _LARGE else "trace.json.gz"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("trace.json*"):
            old.unlink()
        write_whole(self.folder / name, text if name == "trace.json" else gzip.compress(text, 6))
        found = {"trace": name, "numbers": self.taken, **capture.account(text)}
        if capture.device.type == "cuda" and found["counted"] != "kernels":
            self.emit(Note("the profile has no GPU kernels, only the host's time: CUPTI is missing or not "
                           "allowed (see NVIDIA's page on ERR_NVGPUCTRPERM)"))  # fmt: skip
        write_whole(self.folder / "profile.json", (json.dumps(found, indent=1) + "\n").encode())
        self.emit(Profiled(self.folder, found))

    def _try(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            self.emit(Note(f"the profile could not be {what}: {reason[0]}"))
