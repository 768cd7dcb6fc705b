"""Is the line between what fits and what does not where the plan draws it? Forced runs on both sides of it.

For cards of 24, 16, 12 and 8 GiB: the largest square picture that the planner says fits, and the next one,
which it says does not, with everything else fixed by the recipe. Both are carried out under a cap of the
card's free memory, less the CUDA context, which the cap does not count. The first should train; the second
should run out of memory. (That the cards' own recipes run within their cap is `cards.py`.)

Each is a process of its own, capped from its beginning, that loads its base through the engine's loader as a
run does: weights that another case left, or that were made on the device, leave gaps that no run has. Of one
that runs out of memory the row tells where it was, torch's own words, and what the allocator held right then.

    python benchmarks/fits.py --base /scratch/base --json fits.json     # 9 GB, made if it is not there
    python benchmarks/fits.py --base /scratch/base --jobs 2 --json fits.json        # on two GPUs at once
    python benchmarks/fits.py --base /scratch/base --needed --json needed.json      # the least caps that do
    python benchmarks/fits.py --list                 # what would be run, and how far from the line it is
    python benchmarks/fits.py --size nano --base /scratch/nano     # a try without a GPU, nothing is capped
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from common import cap_memory, child, environment, write_json
from configurations import Configuration
from plan_accuracy import Samples, base_facts, on_processor, outcome, plan_of

from ideoflow.engine.meter import memory_errors_told
from ideoflow.engine.setup import loading_options
from ideoflow.engine.warm import grow_memory
from ideoflow.model.load import load_transformer
from ideoflow.model.nano import make_nano
from ideoflow.plan import Plan, named_hardware

GIB = 1 << 30
STEP = 16  # pixels; one row of image tokens more
NANO_PIXELS = (128, 144)
HALVINGS = 4
HELD = ("allocated", "reserved", "inactive_split", "awaited")
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


@dataclass(frozen=True)
class Case:
    """What is carried out; another process makes the same again from its name."""

    card: str
    c: Configuration
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.card}:{self.c.pixels}"


def case_of(card: Card, pixels: int, size: str) -> Case:
    c = replace(card.way, pixels=pixels)
    return Case(card.name, c, plan_of(c, base_facts(size), named_hardware(card.name)))


def over(plan: Plan) -> float:
    """How far training's predicted peak is above (or below) the free memory, as a share of it."""
    return plan.ledger.peak("train") / plan.hardware.free_bytes - 1


def sides(card: Card, size: str, least: int = 256, most: int = 3072) -> list[Case]:
    """The largest picture that fits by the plan, and the smallest that does not.

    Predicted memory grows with the picture, so the line is found by bisection. A nano base has no such line.
    """
    if size == "nano":
        return [case_of(card, pixels, size) for pixels in NANO_PIXELS]

    def planned(steps: int) -> Case:
        return case_of(card, STEP * steps, size)

    low, high = least // STEP, most // STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if over(planned(middle).plan) <= 0 else (low, middle)
    # A little to both sides: a prediction within 1 % of the line says nothing.
    while over(planned(low).plan) > -0.01:
        low -= 1
    while over(planned(high).plan) < 0.01:
        high += 1
    return [planned(low), planned(high)]


def context_of(plan: Plan) -> int:
    return next(line.bytes for line in plan.ledger.of("train") if line.name == "CUDA context")


class Watch:
    """Where a process is, and what the allocator held at each stage's beginning and when it gave up."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stage = device, "loading"
        self.stages: dict[str, dict[str, Any]] = {}  # of each, what was held when it began
        self.failure: dict[str, Any] = {}
        if device.type == "cuda":
            # The error itself comes too late: who tells of it gives memory back first.
            torch._C._cuda_attach_out_of_memory_observer(self._gave_up)

    def begin(self, stage: str) -> None:
        self.stage = stage
        print(f"  {stage}", file=sys.stderr, flush=True)  # all that is known of one that dies
        if self.device.type == "cuda":
            self.stages[stage] = held_now()

    def _gave_up(self, device: int, asked: int, limit: int, free: int) -> None:
        self.failure = {"asked": asked, "limit": limit, "device_free": free}
        try:
            self.failure |= held_now()
        except Exception as error:  # would take the place of torch's own
            self.failure["unknown"] = repr(error)


def held_now() -> dict[str, Any]:
    """Bytes that torch's allocator holds, and the gaps between them.

    Torch leaves segments that grow out of ``inactive_split``, so gaps are also counted block by block.
    """
    stats = torch.cuda.memory_stats()
    held: dict[str, Any] = {}
    for name, key in (("allocated", "allocated_bytes"), ("reserved", "reserved_bytes")):
        held |= {name: stats[f"{key}.all.current"], f"{name}_peak": stats[f"{key}.all.peak"]}
    held["inactive_split"] = stats["inactive_split_bytes.all.current"]
    # Freed, but another stream may still be reading.
    held["awaited"] = stats["active_bytes.all.current"] - held["allocated"]
    held |= {"retries": stats["num_alloc_retries"], "failures": stats["num_ooms"]}
    segments = torch.cuda.memory_snapshot()
    for pool in ("large", "small"):
        gaps = [block["size"] for s in segments if s["segment_type"] == pool
                for block in s["blocks"] if block["state"] == "inactive"]  # fmt: skip
        held[f"{pool}_gaps"] = {"count": len(gaps), "bytes": sum(gaps), "largest": max(gaps, default=0)}
    return held | {"growing": all(s.get("is_expandable", False) for s in segments)}


@contextmanager
def loaded(plan: Plan, base: Path) -> Iterator[Any]:
    """The frozen base as the engine's ``build`` has it, for a plan that was made without one."""
    with memory_errors_told(plan):
        model = load_transformer(base, **loading_options(plan))
    yield model


def carry_out(args: argparse.Namespace) -> dict[str, Any]:
    """One case in this process, which may take ``args.cap`` bytes of the GPU, or all."""
    grow_memory()  # as a run does, before anything is allocated
    begun, device = time.perf_counter(), torch.device(args.device)
    cap_memory(args.cap)
    name, _, pixels = args.carry_out.partition(":")
    card = next(card for card in CARDS if card.name == name)
    case, watch = case_of(card, int(pixels), args.size), Watch(device)
    plan = case.plan if device.type == "cuda" else on_processor(case.plan)
    spec = plan.base.transformer
    with tempfile.TemporaryDirectory() as scratch:
        samples = Samples(Path(scratch) / "cache", spec.hidden, spec.in_channels)
        model = loaded(plan, args.base)
        row = outcome(plan, model, samples, case.c, 2, Path(scratch), watch.begin)
    if row["outcome"] != "measured":
        row |= {"stage": watch.stage, "failure": watch.failure}
    row |= {"stages": watch.stages, "carried_out_seconds": time.perf_counter() - begun}
    return row | {"environment": environment(device)}


def carried_out(args: argparse.Namespace, what: str, gpu: str | None, cap: int = 0) -> dict[str, Any]:
    """What came of a case in a process of its own, or how that ended."""
    command = [sys.executable, __file__, "--size", args.size, "--device", args.device]
    command += ["--base", str(args.base), "--carry-out", what, "--cap", str(cap)]
    row, errors = child(command, args.seconds, {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    row = {"cap": cap, **row}
    if "failed" in row:
        row["outcome"] = row.pop("failed")
    return row if row["outcome"] == "measured" or ran_out(row) else row | {"errors": errors}


def ran_out(row: dict[str, Any]) -> bool:
    return str(row["outcome"]).startswith("out of memory")


def told(row: dict[str, Any]) -> str:
    """What came of a case; of one that did not train, all that is known of why."""
    if row["outcome"] == "measured":
        if "allocated" not in row:
            return "trained"
        return f"trained, {row['allocated'] / GIB:.2f} GiB allocated, {row['reserved'] / GIB:.2f} reserved"
    lines = [f"{row['outcome']}, {row['stage']}" if "stage" in row else str(row["outcome"])]
    if failure := row.get("failure"):
        asked, limit = failure["asked"] / GIB, failure["limit"] / GIB
        lines.append(f"asked for {asked:.3f} GiB, limit {limit:.2f}; " + failure.get("unknown", ""))
        if "allocated" in failure:
            lines[-1] += ", ".join(f"{key} {failure[key] / GIB:.2f}" for key in HELD)
            for pool in ("large", "small"):
                gaps = failure[f"{pool}_gaps"]
                lines[-1] += f", {gaps['count']} {pool} gaps of {gaps['bytes'] / GIB:.2f} in all"
    return "\n    ".join([*lines, *row.get("notes", ()), *row.get("errors", "").splitlines()[-3:]])


def needed(args: argparse.Namespace, case: Case, gpu: str | None) -> dict[str, Any]:
    """The least cap under which a case trains: what it allocates, and the gaps that remain then."""
    row = carried_out(args, case.name, gpu)
    if "allocated" not in row:
        return row
    low, tries = row["allocated"], []
    high = low + 2 * GIB
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        tried = carried_out(args, case.name, gpu, middle)
        tries.append({key: value for key, value in tried.items() if key != "environment"})
        print(f"  {case.name} under {middle / GIB:.2f} GiB: {told(tried)}", flush=True)
        if tried["outcome"] != "measured" and not ran_out(tried):
            return row | {"tries": tries}  # says nothing of memory
        trained = tried["outcome"] == "measured"
        low, high = (low, middle) if trained else (middle, high)
    row |= {"tries": tries, "predicted": case.plan.ledger.peak("train") - context_of(case.plan)}
    # Without any that trained, nothing is known but that it is more.
    enough = any(tried["outcome"] == "measured" for tried in tries)
    return row | ({"needed": high} if enough else {"more_than": low})


def measure(args: argparse.Namespace, case: Case, gpus: SimpleQueue[str | None]) -> dict[str, Any]:
    """A case's row, carried out on whatever GPU is free."""
    row: dict[str, Any] = {"card": case.card, **asdict(case.c), "over": over(case.plan)}
    gpu, started = gpus.get(), time.perf_counter()
    try:
        if args.needed:
            row |= needed(args, case, gpu)
        else:
            capped = args.size == "full"
            free = case.plan.hardware.free_bytes
            row |= carried_out(args, case.name, gpu, free - context_of(case.plan) if capped else 0)
    finally:
        gpus.put(gpu)
    return row | {"seconds": time.perf_counter() - started}


def show(case: Case, row: dict[str, Any]) -> None:
    expected = "out of memory" if over(case.plan) > 0 else "trains"
    seconds = f" [{row['seconds']:.1f} s]" if "seconds" in row else ""
    free = case.plan.hardware.free_bytes / GIB
    print(f"{case.card} {case.c.pixels} x {case.c.pixels}, {free:.2f} GiB free, {over(case.plan):+.1%} by "
          f"the plan, expected: {expected}{seconds}: {told(row)}")  # fmt: skip
    if "predicted" in row:
        least = f"needs {row['needed'] / GIB:.2f}" if "needed" in row else \
            f"needs more than {row['more_than'] / GIB:.2f}"  # fmt: skip
        print(f"  {least} GiB for {row['allocated'] / GIB:.2f}, predicted {row['predicted'] / GIB:.2f} "
              "with gaps")  # fmt: skip
    sys.stdout.flush()


def prepare_base(args: argparse.Namespace) -> None:
    if args.size == "nano":
        if not args.base.exists():
            make_nano(args.base)
        return
    from full_size import make_base  # seconds to import, which only this needs

    make_base(args.base, "fp8", "cuda", ("transformer",))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base", type=Path, help="where the base is, or is made")
    parser.add_argument("--cards", default=",".join(card.name for card in CARDS))
    parser.add_argument("--jobs", type=int, default=1, help="cases at once, each on a GPU of its own")
    parser.add_argument("--seconds", type=float, default=240, help="end a process after this time")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--side", choices=["both", "fits", "not"], default="both", help="of the line")
    parser.add_argument(
        "--needed", action="store_true", help="find the least cap under which each one trains"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--carry-out", metavar="CARD:PIXELS", help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.carry_out == "base":
        return prepare_base(args)
    if args.carry_out:
        return print(json.dumps(carry_out(args)), flush=True)
    chosen = [card for card in CARDS if card.name in args.cards.split(",")]
    which = {"both": slice(2), "fits": slice(1), "not": slice(1, 2)}["fits" if args.needed else args.side]
    cases = [case for card in chosen for case in sides(card, args.size)[which]]
    if args.list:
        for case in cases:
            show(case, {"outcome": "not run"})
        return
    if args.base is None:
        parser.error("--base says where the base is, or is to be made; --list needs none")
    if args.device == "cpu" and (args.size == "full" or args.needed):
        parser.error("this needs a GPU; --list shows what it would run, --size nano tries it")
    args.base = args.base.resolve()
    measure_all(args, cases, gpus_of(args, parser))


def gpus_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> SimpleQueue[str | None]:
    """The numbers of as many GPUs as there are jobs; on a processor, so many times nothing."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: list[Any] = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    names = [None] * args.jobs if args.device == "cpu" else names
    if not 1 <= args.jobs <= len(names):
        parser.error(f"--jobs is {args.jobs}, of {len(names)} GPUs")
    gpus: SimpleQueue[str | None] = SimpleQueue()
    for name in names[: args.jobs]:
        gpus.put(name)
    return gpus


def measure_all(args: argparse.Namespace, cases: list[Case], gpus: SimpleQueue[str | None]) -> None:
    """All cases; what is measured is written after each."""
    # In a process of its own: this one's context would count as theirs.
    made = [sys.executable, __file__, "--size", args.size, "--base", str(args.base), "--carry-out", "base"]
    subprocess.run(made, check=True)
    rows: dict[int, dict[str, Any]] = {}
    about: dict[str, Any] = {}
    started = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        numbers = {pool.submit(measure, args, case, gpus): n for n, case in enumerate(cases)}
        for future in as_completed(numbers):
            number, row = numbers[future], future.result()
            about = row.pop("environment", about)
            rows[number] = row
            show(cases[number], row)
            ordered = [rows[n] for n in sorted(rows)]
            write_json(args.json, {"environment": about, "size": args.size, "rows": ordered})
    if args.size == "full" and not args.needed:
        right = sum(ran_out(rows[n]) if over(case.plan) > 0 else rows[n]["outcome"] == "measured"
                    for n, case in enumerate(cases))  # fmt: skip
        print(f"{right} of {len(cases)} as expected, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
