"""How right is the plan? Predicted against measured peak memory and step time of both engines.

    python benchmarks/plan_accuracy.py --json out.json     # the full model on this GPU, 168 configurations
    python benchmarks/plan_accuracy.py --quick             # a few of them
    python benchmarks/plan_accuracy.py --engine fused      # one engine only
    python benchmarks/plan_accuracy.py --size nano --device cpu --quick   # a try without a GPU: times only

Each configuration is planned as a recipe that sets everything, built from the engine's own parts on random
weights, and run for a few steps. Predicted is what the formulas and the shares of peak that
ship say, without any correction; every third configuration is marked *held out*, for whoever fits shares to
the rest.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from common import environment, make_layout, random_inputs, random_transformer, write_json

from ideoflow.data.order import Draw
from ideoflow.engine.fused import FusedTransformer
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
    """What is varied; ``budget`` is the activation budget, 0 or 1 (checkpointing on or off) in the reference
    engine."""

    engine: str
    precision: str
    matmul: str
    budget: float
    compile: str
    batch: int
    pixels: int
    rank: int
    targets: str = "all"


def configurations(quick: bool, gpu: bool, engines: list[str]) -> list[Configuration]:
    small, large = (512, 1024) if gpu else (64, 128)
    precision = "bf16" if gpu else "float32"
    compiled = ["off", "regional"] if gpu else ["off"]
    reference = [
        Configuration("reference", precision, precision, budget, mode, 1, pixels, rank)
        for budget, mode, pixels, rank in product([0.0, 1.0], compiled, [small, large], [8, 32, 128])
    ]
    fused = [
        Configuration("fused", *weights, budget, "off", batch, pixels, rank)
        for weights, budget, batch, pixels, rank in product(
            [("fp8", "fp8"), ("fp8", "bf16"), ("bf16", "bf16")], [0.0, 0.1, 0.4, 1.0], [1, 2], [small, large],
            [8, 32, 128],
        )
    ]  # fmt: skip
    chosen = (reference if "reference" in engines else []) + (fused if "fused" in engines and gpu else [])
    # A stride that shares no factor with the sizes of the grids meets every value of each.
    return chosen[::5] if quick else chosen


def base_facts(size: str) -> BaseFacts:
    specs = {
        "full": (TransformerSpec(), TextEncoderSpec(), VaeSpec()),
        "nano": (NANO_TRANSFORMER, NANO_TEXT, NANO_VAE),
    }
    return BaseFacts(size, None, False, *specs[size], "bf16", "random", False)


def plan_of(c: Configuration, base: BaseFacts, device: str) -> Plan:
    memory: dict[str, str | float] = {"engine": c.engine, "precision": c.precision}
    if c.engine == "fused":
        memory |= {"matmul": c.matmul, "activation_budget": c.budget}
    else:
        memory |= {"checkpointing": "on" if c.budget == 0 else "off", "compile": c.compile}
    if device == "cpu":
        memory["device"] = "cpu"
    lines = [
        '[model]\nbase = "random"\n[data]\nimages = "none"',
        f"resolution = {c.pixels}",
        f'[adapter]\nrank = {c.rank}\ntargets = "{c.targets}"',
        f"[train]\nbatch = {c.batch}",
        "[memory]",
        *(f"{name} = {value!r}" for name, value in memory.items()),
    ]
    data = DataSummary(1, 0, (Bucket(c.pixels, c.pixels, 1),), (TEXT_TOKENS,) * 3, False, "random")
    return make_plan(parse_recipe("\n".join(lines)), base, data, detect_hardware(device))


def run(plan: Plan, size: str, c: Configuration, device: torch.device, steps: int) -> dict[str, float]:
    """Median milliseconds of a step and, on a GPU, its peak in bytes."""
    gpu = device.type == "cuda"
    dtype = torch.float32 if c.precision == "float32" else torch.bfloat16
    model = random_transformer(size, device, dtype, fp8=c.precision == "fp8")
    model.t_embedding.mlp_in.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))
    parameters = list(add_adapter(model, plan).values())
    backward = (fused_backward if c.engine == "fused" else reference_backward)(plan, model, c)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    times = []
    for step in range(3 + steps):
        if gpu and step == 3:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        backward()
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


def reference_backward(plan: Plan, model: Any, c: Configuration) -> Callable[[], None]:
    """Forward and backward pass of one batch, sample by sample."""
    model.set_attn_processor(UnpaddedAttention())
    if c.budget == 0:
        model.enable_gradient_checkpointing()
    if c.compile == "regional":
        torch._dynamo.reset()
        model.compile_repeated_blocks()
    model.train()
    side, channels = c.pixels // 16, model.config.in_channels
    latents, noise = torch.randn(side * side, channels), torch.randn(side * side, channels)
    text = torch.randn(TEXT_TOKENS, model.hidden_size, dtype=model.input_proj.weight.dtype)
    draw = Draw(uniform=0.4, noise=noise, drop_caption=False)
    sample = prepare(latents, text, (side, side), draw, plan.tables.train.schedule)

    def backward() -> None:
        float(accumulate(model, [sample] * c.batch, 1))

    return backward


def fused_backward(plan: Plan, model: Any, c: Configuration) -> Callable[[], None]:
    """The same, packed."""
    attention = str(plan.value("attention"))
    fused = FusedTransformer(model, linear=c.matmul, attention=attention, activation_budget=c.budget)
    layout = make_layout(c.batch, c.pixels, TEXT_TOKENS, False)
    data = random_inputs(model, layout)

    def backward() -> None:
        velocity = fused(data["latents"], data["timestep"], data["text"], layout)
        torch.nn.functional.mse_loss(velocity.float(), data["target"]).backward()

    return backward


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
    parser.add_argument("--quick", action="store_true", help="every fifth configuration")
    parser.add_argument("--engine", nargs="+", choices=["reference", "fused"], default=["reference", "fused"])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device, base = torch.device(args.device), base_facts(args.size)
    rows: list[dict[str, Any]] = []
    report = {"environment": environment(device), "arguments": vars(args), "rows": rows}
    for index, c in enumerate(configurations(args.quick, device.type == "cuda", args.engine)):
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
