"""How fast a host launches kernels, and what that makes of a step that waits for it.

A step takes as long as the device works, or as the host needs to launch that work, whichever is longer. The
second differs from one machine to another, and on a shared one from second to second: one step, done 24
times, took 141 to 216 ms. So before each step that might wait for the host a :class:`Probe` says how fast the
host is: the engine's own code on a model so small that nothing but launching is left of it. The means of both
are compared, over so many that what others do on the host falls on one as on the other. How many milliseconds
of a probe the shipped launching times stand for is one number for all machines (:data:`SHIPPED_PROBE_MS`),
found from rows that are not held out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import add_adapters, make_layout, random_inputs, random_transformer
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.plan import Plan
from ideoflow.plan.calibration import Calibration, Measured, shipped
from ideoflow.plan.timing import waits_for_host

# A probe on a host that launches as fast as the shipped calibration says; `plan_accuracy.py --fit-probe`.
SHIPPED_PROBE_MS = 89.3
_TRIED = [1.02**n for n in range(-25, 26)]
_STEPS = 3


class Probe:
    """Milliseconds that the host takes for three steps of a small model."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = random_transformer("nano", device, dtype)
        self._adapters = add_adapters(model, 8, torch.float32)
        self._fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=dtype)
        self._layout = make_layout(1, 64, 32, mixed=False, multiple=64)
        self._data = random_inputs(model, self._layout)
        # Not what the allocator has more: libraries' workspaces among it would be there without the probe.
        tensors = (*model.parameters(), *model.buffers(), *self._data.values())
        self.held_bytes = sum(t.nbytes for t in tensors if t.device.type == "cuda")
        self()  # compiles

    def __call__(self) -> float:
        self.synchronize()
        started = time.perf_counter()
        for _ in range(_STEPS):
            velocity = self._fused(
                self._data["latents"], self._data["timestep"], self._data["text"], self._layout
            )
            functional.mse_loss(velocity.float(), self._data["target"]).backward()
        self.synchronize()
        seconds = time.perf_counter() - started
        for parameter in self._adapters:
            parameter.grad = None
        return 1e3 * seconds

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class PairedSteps:
    """Steps of a trainer from ``first`` on, each by itself and just after a probe.

    ``found`` has of each, in milliseconds: its probe, itself, and what the process's threads worked in it.
    """

    probe: Probe
    first: int
    found: list[tuple[float, float, float]] = field(default_factory=list)

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        if step < self.first:
            yield
            return
        probed = self.probe()
        started, worked = time.perf_counter(), time.process_time()
        yield
        self.probe.synchronize()
        taken = time.perf_counter() - started, time.process_time() - worked
        self.found.append((probed, *(1e3 * seconds for seconds in taken)))

    def means(self) -> dict[str, Any]:
        """What a row of results has of it."""
        probed, launched, worked = (statistics.mean(values) for values in zip(*self.found, strict=True))
        return {"probe_ms": probed, "launched_ms": launched, "worked_ms": worked, "paired": self.found}


def launching_times(factor: float, device: str) -> Calibration:
    """What ships, corrected as after a run on a host that takes ``factor`` times as long to launch."""
    run = Measured(device, "probe", "", {}, False, 1, 1, 1.0, factor, waits_for_host=True)
    return replace(shipped(), runs=(run,))


def waits(plan: Plan) -> bool:
    """Whether the device waits for the host in a step, by the plan: for its launches, or at groups' turns."""
    parts = plan.time.parts if plan.time else ()
    return waits_for_host(parts) or any(part.name == "turns" for part in parts)


def best_probe(rows: list[dict[str, Any]], step_ms: Callable[[dict[str, Any], float], float]) -> float:
    """The :data:`SHIPPED_PROBE_MS` that rows agree with best: least mean error of log(step time).

    Only of rows that are not held out and, by the plan, wait for the host. ``step_ms`` says what is predicted
    of a row's step with so many times the shipped launching.
    """
    found = [row for row in rows if "probe_ms" in row and row["waits"] and not row["held_out"]]

    def error(probe_ms: float) -> float:
        return sum(
            abs(math.log(step_ms(row, row["probe_ms"] / probe_ms) / row["launched_ms"])) for row in found
        )

    return min((SHIPPED_PROBE_MS * times for times in _TRIED), key=error)
