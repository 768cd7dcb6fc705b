"""Does each card's recipe run within that card's memory, from encoding captions to a sample?

For every recipe in ``recipes/cards``: a plan is made for a real card of that size, then a process whose share
of the GPU's memory is capped to the card's less 1 GiB carries it out on a base of full size with random
weights: it encodes captions and pictures, loads the transformer, trains 20 steps, and samples around that.
Printed are the peak of each stage against what the plan said of it, both without the CUDA context, and the
step time on the GPU at hand (which is not that card's).

    python benchmarks/cards.py --base /scratch/base --out cards.json      # 19 GB, made if it is not there
    python benchmarks/cards.py --base /scratch/base --cards 8gb,12gb      # some of them
    python benchmarks/cards.py --size nano --base /scratch/nano --steps 2   # a try without a GPU, not capped
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import cap_memory, child, environment, write_json
from full_size import make_base

from ideoflow.data.survey import read_dataset, read_prompts
from ideoflow.model.base import locate_base
from ideoflow.model.nano import make_nano
from ideoflow.plan import detect_hardware, make_plan, named_hardware
from ideoflow.plan.record import STAGE_OF, allocated
from ideoflow.recipe import load_recipe
from ideoflow.resources import recipes
from ideoflow.workflow import prepare, run

# The card that each recipe is planned for.
CARDS = {"8gb": "rtx-4060", "12gb": "rtx-4070", "16gb": "rtx-4080", "24gb": "rtx-4090", "48gb": "l40s",
         "80gb": "h100"}  # fmt: skip
GIB = 1 << 30


def write_recipe(name: str, args: argparse.Namespace, folder: Path) -> Path:
    """The shipped recipe with this base, these steps and a short sampling; nothing else is changed."""
    text = (recipes() / "cards" / f"{name}.toml").read_text(encoding="utf-8")
    text = re.sub(r'base = ".*"', f'base = "{args.base}"', text)
    text = text.replace('"../quickstart', f'"{recipes() / "quickstart"}')
    text = re.sub(r"steps = \d+", f"steps = {args.steps}\ncheckpoint_every = {args.steps}", text)
    text = text.replace("[validate]\n", "[validate]\nsteps = 4\n")
    if args.size == "nano":
        text = re.sub(r'\[memory\](\n[a-z_]+ = "[a-z0-9]+".*)+\n', "", text)
        text = text.replace("upscale_limit", "resolution = 128\nupscale_limit")
    file = folder / f"{name}.toml"
    file.write_text(f'{text}\n[output]\nfolder = "{folder / name}"\n', encoding="utf-8")
    return file


def plan_for(file: Path, card: str | None) -> tuple[Path, int]:
    """Plans for a card (or the machine at hand); where the plan is written, and the card's bytes.

    The card is taken to have the packages that are installed here, since the plan is carried out here.
    """
    recipe = load_recipe(file)
    model = recipe.tables.model
    base = locate_base(model.base, revision=model.revision, parts=model.parts, relative_to=recipe.folder)
    dataset, prompts = read_dataset(recipe), read_prompts(recipe)
    summary = dataset.summary()
    hardware = detect_hardware()
    if card:
        hardware = replace(named_hardware(card), packages=hardware.packages)
    plan = make_plan(recipe, base, summary, hardware, prompts=len(prompts))
    written = file.with_suffix(".plan.json")
    written.write_text(plan.to_json(), encoding="utf-8")
    return written, hardware.total_bytes


def carry_out(plan_file: Path, cap: int) -> dict[str, Any]:
    """Runs a plan in this process, which may take ``cap`` bytes of the GPU."""
    cap_memory(cap)
    prepared, events, reserved = prepare(plan_file), [], 0
    stages: dict[str, dict[str, float]] = {}
    started = time.perf_counter()

    def tell(event: Any) -> None:
        nonlocal reserved
        events.append(event)
        if type(event).__name__ == "StageDone":
            if torch.cuda.is_available():  # each stage starts this anew
                reserved = max(reserved, torch.cuda.max_memory_reserved())
            peak = f", {event.peak_bytes / GIB:.1f} GiB" if event.peak_bytes else ""
            print(f"  {event.stage}: {event.seconds:.1f} s{peak}", file=sys.stderr, flush=True)
            stage = stages.setdefault(event.stage, {"seconds": 0.0, "peak_gib": 0.0})
            stage["seconds"] += event.seconds
            stage["peak_gib"] = max(stage["peak_gib"], event.peak_bytes / GIB)
            # Of a run that ends early, what it did is known all the same.
            stages_file(plan_file).write_text(json.dumps(stages), encoding="utf-8")

    result = run(prepared, on_event=tell)
    steps = sorted(e.seconds for e in events if type(e).__name__ == "StepDone")
    plan = prepared.plan
    return {
        "finished": result.finished,
        "seconds": time.perf_counter() - started,
        "step_ms": 1e3 * steps[len(steps) // 2],
        "stages": stages,
        "reserved_gib": reserved / GIB,
        "predicted_gib": {
            stage: sum(line.bytes for line in allocated(plan.ledger, phase)) / GIB
            for phase, stage in STAGE_OF.items()
        },
        "decisions": {d.id: d.value for d in plan.decisions},
    }


def stages_file(plan_file: Path) -> Path:
    return plan_file.with_suffix(".stages.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--base", type=Path, required=True, help="where the base is, or is made")
    parser.add_argument("--cards", default=",".join(CARDS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--share-cache", action="store_true", help="encode once, for the first card")
    parser.add_argument("--seconds", type=float, default=900, help="end a card's run after this time")
    parser.add_argument("--out")
    parser.add_argument("--carry-out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.carry_out:
        print(json.dumps(carry_out(args.carry_out, args.cap)))
        return
    args.base = args.base.resolve()
    if args.size == "full":
        make_base(args.base, "fp8", "cuda")
    elif not args.base.exists():
        make_nano(args.base)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as scratch:
        carry_out_each(args, Path(scratch))


def carry_out_each(args: argparse.Namespace, scratch: Path) -> None:
    """Every card's recipe in a process of its own; what is measured is written after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"environment": environment(device), "size": args.size}
    rows: dict[str, Any] = {}
    for name in args.cards.split(","):
        folder = scratch / name
        folder.mkdir()
        card = CARDS[name] if args.size == "full" else None
        plan, total = plan_for(write_recipe(name, args, folder), card)
        cap = total - GIB
        command = [sys.executable, __file__, "--base", str(args.base), "--carry-out", str(plan)]
        # A cache of its own, unless one may do for all, so that every card encodes by itself.
        cache = (scratch if args.share_cache else folder) / "cache"
        print(f"{name}: planned, capped to {cap / GIB:.1f} GiB", flush=True)
        started = time.perf_counter()
        variables = {"IDEOFLOW_CACHE": str(cache)}
        row, _ = child([*command, "--cap", str(cap)], args.seconds, variables, quiet=False)
        rows[name] = row
        shutil.rmtree(folder / name, ignore_errors=True)  # checkpoints are large
        if "failed" in row and (done := stages_file(plan)).exists():
            row["stages"] = json.loads(done.read_text(encoding="utf-8"))
        write_json(args.out, {**about, "rows": rows})
        if "failed" in row:
            print(f"{name}: failed after {time.perf_counter() - started:.0f} s: {row['failed']}", flush=True)
            continue
        said = row["predicted_gib"]
        peaks = ", ".join(f"{stage} {s['peak_gib']:.2f} ({said[stage]:.2f})"
                          for stage, s in row["stages"].items() if stage in said)  # fmt: skip
        print(f"{name}: {row['step_ms']:.0f} ms a step, {row['seconds']:.0f} s; GiB (as planned): {peaks}; "
              f"reserved {row['reserved_gib']:.2f}; second transformer {row['decisions']['unconditional']}",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
