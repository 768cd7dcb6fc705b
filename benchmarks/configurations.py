"""The configurations that the planner is held to: a covering with grouped weights, and launch-bound steps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """What is varied. In the reference engine a budget of 0 is checkpointing, and 1 none."""

    engine: str
    precision: str
    matmul: str
    attention: str
    budget: float
    activation_offload: str
    offload: str
    optimizer_state: str
    graphs: str
    compile: str
    batch: int
    pixels: int
    rank: int

    @property
    def possible(self) -> bool:
        """Whether both engines and the planner can do all this together, in seconds a step."""
        most = 8 if self.engine == "fused" else 4 if self.offload == "none" else 2
        if (self.matmul == "fp8" and self.precision != "fp8") or self.batch * self.pixels**2 > most * 1024**2:
            return False
        if self.graphs == "on" and (
            self.offload != "none" or self.activation_offload != "none" or self.attention != "flash4"
        ):
            return False
        if self.engine == "fused":
            return self.compile == "off"
        plain = (self.matmul, self.activation_offload, self.graphs, self.attention)
        if plain != ("bf16", "none", "off", "sdpa") or self.budget not in (0.0, 1.0):
            return False
        return self.offload == "none" or (self.budget == 0 and self.compile == "off")

    @property
    def cost(self) -> float:
        """Roughly its work: pixels in millions, more for attention's square and for what is recomputed."""
        area = (self.pixels / 1024) ** 2
        work = self.batch * area * (1 + 0.15 * area) * (1.5 if self.precision != "fp8" else 1)
        return 1 + work + (40 if self.compile == "regional" else 0) + (1 if self.on_host else 0)

    @property
    def on_host(self) -> bool:
        """Whether the large weights wait in host memory."""
        return self.offload != "none"


DOMAINS: dict[str, tuple[Any, ...]] = {
    "engine": ("fused", "fused", "reference"),
    "precision": ("fp8", "bf16", "nf4", "int8"),
    "matmul": ("bf16", "fp8"),
    "attention": ("flash4", "flash4", "cudnn_varlen", "sdpa"),
    "budget": (0.0, 0.2, 0.5, 1.0),
    "activation_offload": ("none", "inputs", "outputs", "gate_up"),
    "offload": ("none", "stream"),
    "optimizer_state": ("float32", "cpu", "8bit"),
    "graphs": ("off", "on"),
    "compile": ("off", "regional"),
    "batch": (1, 2, 4),
    "pixels": (512, 1024, 2048),
    "rank": (8, 32, 128),
}


def drawn(chance: random.Random) -> Iterator[Configuration]:
    """Possible configurations at random, for ever; the reference engine's options where it is drawn."""
    while True:
        c = Configuration(**{name: chance.choice(values) for name, values in DOMAINS.items()})
        if c.engine == "reference":
            c = replace(c, matmul="bf16", activation_offload="none", graphs="off", attention="sdpa",
                        budget=chance.choice((0.0, 1.0)))  # fmt: skip
        else:
            c = replace(c, compile="off")
        if c.possible:
            yield c


def pairs(c: Configuration) -> list[tuple[Any, ...]]:
    """Every two decisions with their values."""
    return list(combinations(asdict(c).items(), 2))


def covering(count: int, scale: int = 1, seed: int = 7) -> list[Configuration]:
    """``count`` configurations, always the same ones, in which pairs of values meet often and evenly.

    Greedy: of many drawn at random, the next is the one whose pairs have met least, for its cost. The sizes
    of the pictures are divided by ``scale``.
    """
    chance, met = random.Random(seed), Counter[tuple[Any, ...]]()

    source, chosen = drawn(chance), list[Configuration]()
    while len(chosen) < count:
        pool = [c for c, _ in zip(source, range(400), strict=False) if c not in chosen]
        best = max(pool, key=lambda c: sum(0.3 ** met[p] for p in pairs(c)) / c.cost**0.7)
        met.update(pairs(best))
        chosen.append(best)
    return [replace(c, pixels=c.pixels // scale) for c in chosen]


def grouped(scale: int = 1) -> list[Configuration]:
    """Weights offloaded by diffusers' hooks, which only the reference engine does."""
    usual = Configuration("reference", "fp8", "bf16", "sdpa", 0.0, "none", "block", "float32", "off", "off",
                          1, 1024 // scale, 32)  # fmt: skip
    small = replace(usual, batch=2, pixels=512 // scale)
    return [usual, replace(usual, precision="nf4", offload="leaf"), replace(small, offload="leaf")]


def held_to(count: int, scale: int = 1) -> list[Configuration]:
    """``count`` configurations of the covering, and the grouped ones."""
    return [*covering(count, scale), *grouped(scale)]


def launch_bound(scale: int = 1) -> list[Configuration]:
    """Steps in which the device waits for the host, one decision changed at a time."""
    usual = Configuration("fused", "bf16", "bf16", "flash4", 1.0, "none", "none", "float32", "off", "off",
                          1, max(64, 256 // scale), 8)  # fmt: skip
    changes: list[dict[str, Any]] = [
        {}, {"budget": 0.0}, {"attention": "cudnn_varlen"}, {"attention": "sdpa"},
        *({"activation_offload": away} for away in ("inputs", "outputs", "gate_up")),
        {"optimizer_state": "cpu"}, {"optimizer_state": "8bit"}, {"offload": "stream"},
        {"precision": "fp8"}, {"precision": "fp8", "matmul": "fp8"},
        {"precision": "fp8", "matmul": "fp8", "budget": 0.0}, {"precision": "int8"},
        {"precision": "nf4"}, {"precision": "nf4", "budget": 0.0},
        *({"engine": "reference", "attention": "sdpa"} | change
          for change in ({}, {"budget": 0.0}, {"precision": "fp8"}, {"precision": "nf4"},
                         {"compile": "regional"})),
    ]  # fmt: skip
    return [replace(usual, **change) for change in changes]
