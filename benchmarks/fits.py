"""Is the line between what fits and what does not where the plan draws it? Forced runs on both sides of it.

For cards of 24, 16, 12 and 8 GiB: the largest square picture that the planner says fits, and the next one,
which it says does not, with everything else fixed by the recipe. Both are carried out by the engine under a
cap of the card's free memory, less the CUDA context, which the cap does not count. The first should train;
the second should run out of memory. (That the cards' own recipes run within their cap is `cards.py`.)

    python benchmarks/fits.py --json fits.json       # the full model on a GPU
    python benchmarks/fits.py --needed --json needed.json     # the least cap under which each one trains
    python benchmarks/fits.py --list                 # what would be run, and how far from the line it is
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json
from configurations import Configuration
from plan_accuracy import Samples, Weights, base_facts, outcome, plan_of

from ideoflow.engine.warm import grow_memory
from ideoflow.plan import Plan, named_hardware

GIB = 1 << 30
STEP = 16  # pixels; one row of image tokens more
_PLAIN = Configuration(
    "fused", "fp8", "fp8", "sdpa", 0.5, "none", "none", "float32", "off", "off", 1, 512, 32
)


@dataclass(frozen=True)
class Card:
    """A card, and the way of training that is held fixed for it."""

    name: str
    way: Configuration


CARDS = (
    Card("rtx-4090", _PLAIN),
    Card("rtx-4080", replace(_PLAIN, budget=0.0)),
    Card("rtx-4070", replace(_PLAIN, precision="nf4", matmul="bf16", budget=0.2)),
    Card("rtx-4060", replace(_PLAIN, budget=0.2, offload="stream")),
)


def over(plan: Plan) -> float:
    """How far training's predicted peak is above (or below) the free memory, as a share of it."""
    return plan.ledger.peak("train") / plan.hardware.free_bytes - 1


def sides(card: Card, least: int = 256, most: int = 3072) -> list[tuple[Configuration, Plan]]:
    """The largest picture that fits by the plan, and the smallest that does not.

    Predicted memory grows with the picture, so the line is found by bisection.
    """
    base, hardware = base_facts("full"), named_hardware(card.name)

    def planned(steps: int) -> tuple[Configuration, Plan]:
        c = replace(card.way, pixels=STEP * steps)
        return c, plan_of(c, base, hardware)

    low, high = least // STEP, most // STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if over(planned(middle)[1]) <= 0 else (low, middle)
    # A little to both sides: a prediction within 1 % of the line says nothing.
    while over(planned(low)[1]) > -0.01:
        low -= 1
    while over(planned(high)[1]) < 0.01:
        high += 1
    return [planned(low), planned(high)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", default=",".join(card.name for card in CARDS))
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument(
        "--needed", action="store_true", help="find the least cap under which each one trains"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    grow_memory()  # as a run does
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.list:
        parser.error("this needs a GPU; --list shows what it would run")
    rows: list[dict[str, Any]] = []
    weights, spec = Weights("full", device), base_facts("full").transformer
    with tempfile.TemporaryDirectory() as scratch:
        samples = Samples(Path(scratch) / "cache", spec.hidden, spec.in_channels)
        for card in (c for c in CARDS if c.name in args.cards.split(",")):
            for c, plan in sides(card)[: 1 if args.needed else 2]:
                row: dict[str, Any] = {"card": card.name, **asdict(c), "over": over(plan)}
                expected = "out of memory" if over(plan) > 0 else "measured"
                started = time.perf_counter()
                if args.needed and not args.list:
                    row |= needed(plan, c, weights, samples, Path(scratch))
                    print(f"  needs {row['needed'] / GIB:.2f} GiB for {row['allocated'] / GIB:.2f}, "
                          f"predicted {row['predicted'] / GIB:.2f} with gaps", flush=True)  # fmt: skip
                elif not args.list:
                    row |= capped(plan, c, cap_of(plan), weights, samples, Path(scratch))
                rows.append(row)
                found = row.get("outcome", "not run")
                peak = f", {row['reserved'] / GIB:.2f} GiB reserved" if "reserved" in row else ""
                print(f"{card.name} {c.pixels} x {c.pixels}, {plan.hardware.free_bytes / GIB:.2f} GiB free, "
                      f"{over(plan):+.1%} by the plan: {found}{peak}, expected: {expected} "
                      f"[{time.perf_counter() - started:.1f} s]", flush=True)  # fmt: skip
                write_json(args.json, {"environment": environment(device), "rows": rows})


def cap_of(plan: Plan) -> int:
    """A card's free memory, less the CUDA context."""
    context = next(x.bytes for x in plan.ledger.of("train") if x.name == "CUDA context")
    return plan.hardware.free_bytes - context


def capped(
    plan: Plan, c: Configuration, cap: int, weights: Weights, samples: Samples, scratch: Path
) -> dict[str, Any]:
    """What comes of a configuration under a cap; weights are made before the cap is set."""
    with weights.of(c.precision, c.offload == "stream"):
        torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    try:
        return {"cap": cap, **outcome(plan, weights, samples, c, 2, scratch)}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def needed(
    plan: Plan, c: Configuration, weights: Weights, samples: Samples, scratch: Path, halvings: int = 4
) -> dict[str, Any]:
    """The least cap under which a configuration trains: what it allocates, and the gaps that remain then."""
    free = capped(plan, c, torch.cuda.get_device_properties(0).total_memory, weights, samples, scratch)
    low = free["allocated"]
    high = low + 2 * GIB
    for _ in range(halvings):
        middle = (low + high) // 2
        trained = capped(plan, c, middle, weights, samples, scratch)["outcome"] == "measured"
        low, high = (low, middle) if trained else (middle, high)
    context = plan.hardware.free_bytes - cap_of(plan)
    return free | {"needed": high, "predicted": plan.ledger.peak("train") - context}


if __name__ == "__main__":
    main()
