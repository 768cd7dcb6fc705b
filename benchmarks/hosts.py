"""How fast each machine's host launches kernels: one number a machine, from the rows that are not held out.

A step takes as long as the device works, or as the host needs to launch that work, whichever is longer. The
second differs from one machine to another, and on a shared one from minute to minute: a loop of ten million
additions took 0.33 s and 0.67 s within five minutes. `ideoflow plan --calibrate` corrects the launching of
the machine at hand; here it is found for each machine that rows come from.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ideoflow.plan import Plan
from ideoflow.plan.calibration import Calibration, shipped

# Factors of the shipped launching times that are tried.
_FACTORS = [1.04**n for n in range(-30, 31)]
# Where launching takes less than this share of the device's work, a step cannot be waiting for the host.
_SURELY_DEVICE = 0.5
MANY = 64.0
_NOT_OVERLAPPED = ("optimizer", "moments", "fetching", "launch")


@cache
def launching_times(factor: float) -> Calibration:
    """What ships, with a host that takes ``factor`` times as long to launch."""
    known = shipped()
    slower = {
        engine: replace(s, block_ms={kind: factor * ms for kind, ms in s.block_ms.items()})
        for engine, s in known.shares.items()
    }
    return replace(known, shares=slower)


@dataclass(frozen=True)
class Halves:
    """Milliseconds of a step: the device's work that launching overlaps with, launching, and the rest."""

    device: float
    launching: float
    rest: float

    @classmethod
    def of(cls, as_shipped: Plan, slow_host: Plan) -> Halves:
        """From the plans with :func:`launching_times` of 1 and of :data:`MANY`; the second surely waits."""
        assert as_shipped.time is not None and slow_host.time is not None
        parts = as_shipped.time.parts
        device = sum(p.ms for p in parts if p.name not in _NOT_OVERLAPPED)
        rest = sum(p.ms for p in parts if p.name in _NOT_OVERLAPPED and p.name != "launch")
        waiting = sum(p.ms for p in slow_host.time.parts if p.name == "launch")
        return cls(device, (waiting + device) / MANY, rest)

    def step(self, factor: float) -> float:
        return max(self.device, factor * self.launching) + self.rest

    def waits(self, factor: float) -> bool:
        """Whether the step's time hangs on the host's speed."""
        return factor * self.launching > self.device


def host_factors(rows: list[dict[str, Any]], halves: dict[int, Halves]) -> dict[str, float]:
    """For each machine the factor that its rows agree with best: least mean error of log(step time).

    Only rows that are not held out, and whose launching might matter, are looked at.
    """
    machines = defaultdict(list)
    for row in rows:
        h = halves.get(row["index"])
        if "ms" in row and h and not row["held_out"] and h.launching > _SURELY_DEVICE * h.device:
            machines[row["machine"]].append((h, row["ms"]))

    def error(found: list[tuple[Halves, float]], factor: float) -> float:
        return sum(abs(math.log(h.step(factor) / ms)) for h, ms in found)

    return {name: min(_FACTORS, key=lambda f: error(found, f)) for name, found in machines.items()}
