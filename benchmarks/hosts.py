"""How fast a host launches kernels, and what that makes of a step that waits for it.

A step takes as long as the device works, or as the host needs to launch that work, whichever is longer. The
second differs from one machine to another, and on a shared one from minute to minute: a loop of ten million
additions took 0.33 s and 0.67 s within five minutes. So between the steps that might wait for the host a
:class:`Probe` says how fast the host is: the engine's own code on a model so small that nothing but launching
is left of it. What others do on a shared host only ever adds to a time, so of steps and of probes the fastest
are compared. How many milliseconds of a probe the shipped launching times stand for is one number for all
machines (:data:`SHIPPED_PROBE_MS`), found from rows that are not held out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import add_adapters, make_layout, random_inputs, random_transformer
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.plan import Plan
from ideoflow.plan.calibration import Calibration, Measured, shipped

# A probe on a host that launches as fast as the shipped calibration says; `plan_accuracy.py --fit-probe`.
SHIPPED_PROBE_MS = 78.5
_TRIED = [1.02**n for n in range(-25, 26)]
_STEPS, _TIMES = 3, 4


class Probe:
    """Milliseconds that the host takes for three steps of a small model, the fastest of four times."""

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
        return min(self._once() for _ in range(_TIMES))

    def _once(self) -> float:
        self._synchronize()
        started = time.perf_counter()
        for _ in range(_STEPS):
            velocity = self._fused(
                self._data["latents"], self._data["timestep"], self._data["text"], self._layout
            )
            functional.mse_loss(velocity.float(), self._data["target"]).backward()
        self._synchronize()
        seconds = time.perf_counter() - started
        for parameter in self._adapters:
            parameter.grad = None
        return 1e3 * seconds

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def launching_times(factor: float, device: str) -> Calibration:
    """What ships, corrected as after a run on a host that takes ``factor`` times as long to launch."""
    run = Measured(device, "probe", "", {}, False, 1, 1, 1.0, factor, waits_for_host=True)
    return replace(shipped(), runs=(run,))


def waits(plan: Plan) -> bool:
    """Whether the device waits for the host in a step, by the plan."""
    return plan.time is not None and any(part.name == "launch" for part in plan.time.parts)


def best_probe(rows: list[dict[str, Any]], step_ms: Callable[[dict[str, Any], float], float]) -> float:
    """The :data:`SHIPPED_PROBE_MS` that rows agree with best: least mean error of log(step time).

    Only of rows that are not held out and wait for the host. ``step_ms`` says what is predicted of a row's
    step with so many times the shipped launching.
    """
    found = [row for row in rows if "probe_ms" in row and row["waits"] and not row["held_out"]]

    def error(probe_ms: float) -> float:
        return sum(
            abs(math.log(step_ms(row, row["probe_ms"] / probe_ms) / row["fastest_ms"])) for row in found
        )

    return min((SHIPPED_PROBE_MS * times for times in _TRIED), key=error)
