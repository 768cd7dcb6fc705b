"""How right is the plan? Predicted against measured peak memory and step time of the reference engine.

    python benchmarks/plan_accuracy.py --json out.json         # the full model on this GPU, 24 configurations
    python benchmarks/plan_accuracy.py --quick                 # 6 of them
    python benchmarks/plan_accuracy.py --size nano --device cpu --quick   # a try without a GPU: times only

Each configuration is planned as a recipe that sets everything, built from the engine's own parts on random
weights, and run for a few steps of one sample. Predicted is what the formulas and the shares of peak that
ship say, without any correction; every third configuration is marked *held out*, for whoever fits shares to
the rest.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from common import environment, random_transformer, write_json

from ideoflow.data.order import Draw
from ideoflow.engine.setup import UnpaddedAttention, add_adapter
from ideoflow.engine.step import accumulate, prepare
from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.plan import Plan, detect_hardware, make_plan
from ideoflow.plan.document import Bucket, DataSummary
from ideoflow.plan.record import NOT_ALLOCATED
from ideoflow.recipe import parse_recipe

TEXT_TOKENS = 320
GIB = 1 << 30


@dataclass(frozen=True)
class Configuration:
    """What is varied."""

    checkpointing: str
    compile: str
    pixels: int
    rank: int
    targets: str


def configurations(quick: bool, gpu: bool) -> list[Configuration]:
    compiled = ["off", "regional"] if gpu else ["off"]
    sizes = [512, 1024] if gpu else [64, 128]
    if quick:
        return [Configuration(c, m, sizes[-1], 32, "all") for c, m in product(["on", "off"], compiled)] + [
            Configuration("on", m, sizes[0], 8, "attention") for m in compiled
        ]
    grid = product(["on", "off"], compiled, sizes, [8, 32, 128], ["all"])
    return [Configuration(*values) for values in grid]


def base_facts(size: str) -> BaseFacts:
    specs = {
        "full": (TransformerSpec(), TextEncoderSpec(), VaeSpec()),
        "nano": (NANO_TRANSFORMER, NANO_TEXT, NANO_VAE),
    }
    return BaseFacts(size, None, False, *specs[size], "bf16", "random", False)


def plan_of(c: Configuration, base: BaseFacts, device: str) -> Plan:
    precision = "bf16" if device == "cuda" else "float32"
    memory = {"precision": precision, "checkpointing": c.checkpointing, "compile": c.compile}
    if device == "cpu":
        memory = {k: v for k, v in memory.items() if k != "compile"} | {"device": "cpu"}
    lines = [
        '[model]\nbase = "random"\n[data]\nimages = "none"',
        f"resolution = {c.pixels}",
        f'[adapter]\nrank = {c.rank}\ntargets = "{c.targets}"',
        "[memory]",
        *(f'{name} = "{value}"' for name, value in memory.items()),
    ]
    data = DataSummary(1, 0, (Bucket(c.pixels, c.pixels, 1),), (TEXT_TOKENS,) * 3, False, "random")
    return make_plan(parse_recipe("\n".join(lines)), base, data, detect_hardware(device))


def run(plan: Plan, size: str, c: Configuration, device: torch.device, steps: int) -> dict[str, float]:
    """Median milliseconds of a step and, on a GPU, its peak in bytes."""
    gpu = device.type == "cuda"
    model = random_transformer(size, device, torch.bfloat16 if gpu else torch.float32)
    model.t_embedding.mlp_in.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))
    model.set_attn_processor(UnpaddedAttention())
    parameters = list(add_adapter(model, plan).values())
    if c.checkpointing == "on":
        model.enable_gradient_checkpointing()
    if c.compile == "regional":
        torch._dynamo.reset()
        model.compile_repeated_blocks()
    model.train()
    side = c.pixels // 16
    channels = model.config.in_channels
    latents, noise = torch.randn(side * side, channels), torch.randn(side * side, channels)
    text = torch.randn(TEXT_TOKENS, model.hidden_size, dtype=model.input_proj.weight.dtype)
    draw = Draw(uniform=0.4, noise=noise, drop_caption=False)
    sample = prepare(latents, text, (side, side), draw, plan.tables.train.schedule)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    times = []
    for step in range(3 + steps):
        if gpu and step == 3:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        float(accumulate(model, [sample], 1))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    found = {"ms": statistics.median(times[3:])}
    if gpu:
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        found |= {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
            "context": total - free - reserved,
        }
    return found


def compare(plan: Plan, found: dict[str, float]) -> dict[str, float]:
    """Predicted figures and relative errors (predicted / measured - 1)."""
    lines = plan.ledger.of("train")
    allocated = sum(x.bytes for x in lines if x.name not in NOT_ALLOCATED)
    row: dict[str, float] = {"predicted_allocated": allocated, "predicted_peak": plan.ledger.peak("train")}
    if "allocated" in found:
        row["memory_error"] = allocated / found["allocated"] - 1
    if plan.time is not None:
        row["predicted_ms"] = plan.time.step_ms
        row["time_error"] = plan.time.step_ms / found["ms"] - 1
    return row


def summary(rows: list[dict[str, Any]], key: str) -> str:
    """Worst and mean error, over all configurations and over those held out."""
    words = []
    for name, chosen in (("all", rows), ("held out", [r for r in rows if r["held_out"]])):
        errors = [r[key] for r in chosen if key in r]
        if errors:
            worst, mean = max(errors, key=abs), statistics.mean(map(abs, errors))
            words.append(f"{name}: worst {worst:+.1%}, least {min(errors):+.1%}, mean {mean:.1%}")
    return f"{key}  " + ("; ".join(words) or "nothing to compare")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="six configurations")
    parser.add_argument(
        "--append", action="store_true", help="add the measurements to the user's calibration"
    )
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device, base = torch.device(args.device), base_facts(args.size)
    rows: list[dict[str, Any]] = []
    report = {"environment": environment(device), "arguments": vars(args), "rows": rows}
    for index, c in enumerate(configurations(args.quick, device.type == "cuda")):
        plan = plan_of(c, base, device.type)
        if not plan.fits:
            print(f"{c}: does not fit, not tried", flush=True)
            continue
        found = run(plan, args.size, c, device, args.steps)
        row = {**asdict(c), "held_out": index % 3 == 2, **found, **compare(plan, found)}
        rows.append(row)
        print(
            " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
            flush=True,
        )
        write_json(args.json, report)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(summary(rows, "memory_error"))
    print(summary(rows, "time_error"))


if __name__ == "__main__":
    main()
