"""One training step: plain diffusers + PEFT against the fused engine, in the same run, on random weights.

    python benchmarks/step.py --json out.json                 # the full model, 1024 x 1024, batch 1
    python benchmarks/step.py --batch 1 2 4 --pixels 512 1024 2048 --mixed both --budget 1 0.5 0.2 0 --fit \\
        --seconds 480 --json out.json --chart out.svg
    python benchmarks/step.py --size nano --device cpu --pixels 64 128   # a try without a GPU

Configurations run from the smallest to the largest; one that does not fit in memory, or that --seconds leaves
no time for, is a row that says so.

A step is: gradients to None, forward, mean squared error in float32, backward, AdamW. Plain diffusers runs in
bf16 with gradient checkpointing on every block and adapters in bf16 (float32 adapters would make PEFT
multiply in float32); the fused engine keeps its adapters in float32. The floor is two passes of the block
linears and one of attention, forward and backward, at the rates that this card reached in this run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from itertools import repeat as endless
from pathlib import Path
from typing import Any

import torch
from chart import write_chart
from common import (
    add_adapters,
    attention_flop,
    environment,
    linear_flop,
    make_layout,
    measure,
    random_inputs,
    random_transformer,
    write_json,
)
from rich.console import Console
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.attention import make_attention
from ideoflow.engine.fused.graphs import GraphedSteps
from ideoflow.engine.packed import PackedLayout
from ideoflow.engine.profile import Capture
from ideoflow.kernels.budget import PACKED_MULTIPLE
from ideoflow.report.profile import terminal_table


def diffusers_step(model: Any, parameters: list, layout: PackedLayout, data: dict) -> Callable[[], Any]:
    """Plain diffusers: samples padded to the longest, as one batch, with its mask."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=data["latents"].is_cuda)
    device, dtype = data["latents"].device, data["latents"].dtype
    longest, batch = layout.max_length, layout.samples
    index = layout.tensors(device)
    one = layout.diffusers_inputs(data["latents"], data["text"])

    def padded(x: torch.Tensor, value: int) -> torch.Tensor:
        out = x.new_full((batch, longest, *x.shape[2:]), value)
        for b, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=False)):
            out[b, :length] = x[0, start : start + length]
        return out

    inputs = {name: padded(x, {"segment_ids": -1, "indicator": -1}.get(name, 0)) for name, x in one.items()}
    image = inputs["indicator"] == 2
    timestep = data["timestep"].to(dtype)
    del index

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        velocity = model(timestep=timestep, return_dict=False, **inputs)[0][image]
        loss = functional.mse_loss(velocity.float(), data["target"])
        loss.backward()
        optimizer.step()
        return loss

    return run


def fused_step(
    fused: FusedTransformer, parameters: list, layouts: Iterator[PackedLayout], data: dict,
    graphs: GraphedSteps | None,
) -> Callable[[], Any]:  # fmt: skip
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=data["latents"].is_cuda)
    inputs = [data[name] for name in ("latents", "target", "timestep")]

    def run() -> torch.Tensor:
        layout = next(layouts)
        optimizer.zero_grad(set_to_none=True)
        loss = (graphs or fused.add_gradients)(*inputs, data["text"][: layout.text_total], layout, 1)
        optimizer.step()
        return loss

    return run


def shorter_captions(layout: PackedLayout) -> Iterator[PackedLayout]:
    """The layout, and then again and again with captions a token shorter than before."""
    for less in count():
        texts = tuple(max(1, length - less) for length in layout.text_lengths)
        yield replace(layout, text_lengths=texts, multiple=PACKED_MULTIPLE)


def unit_rates(config: Any, device: torch.device, fp8: bool) -> dict[str, float]:
    """Rates that this card reaches on this model's largest product and on attention, in TFLOP/s."""
    hidden, tokens = config.attention_head_dim * config.num_attention_heads, 4416
    outputs = 2 * config.intermediate_size
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    w = torch.randn(outputs, hidden, device=device).bfloat16()

    def product() -> torch.Tensor:
        return x @ w.t()

    if fp8:
        a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        sa, sb = torch.ones(tokens, 1, device=device), torch.ones(1, outputs, device=device)

        def product() -> torch.Tensor:
            return torch._scaled_mm(
                a, b.t(), scale_a=sa, scale_b=sb, out_dtype=torch.bfloat16, use_fast_accum=True
            )

    ms = measure(product, device, repeat=20)["min_ms"]
    layout = PackedLayout((320,), ((64, 64),))
    kernel = make_attention("sdpa", device)
    qkv = torch.randn(
        layout.total, 3, config.num_attention_heads, config.attention_head_dim, device=device
    ).bfloat16()
    dout = torch.randn_like(qkv[:, 0])

    def attend() -> None:
        out, saved = kernel.forward(qkv, layout)
        kernel.backward(dout, qkv, out, saved, layout)

    attention_ms = measure(attend, device, repeat=20)["min_ms"]
    flop = 3.5 * attention_flop(layout, config) / config.num_layers
    return {"linear": 2e-9 * tokens * hidden * outputs / ms, "attention": flop * 1e-9 / attention_ms}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def steady(run: Callable[[], Any], device: torch.device, warmup: int, repeat: int, left: float) -> dict:
    """:func:`measure` with as many steps as ``left`` seconds have room for, two at least."""
    run()  # compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    room = int(min(left / (time.perf_counter() - started), 1e6))
    repeat = max(min(repeat, room), 2)
    return measure(run, device, warmup=max(min(warmup, room - repeat), 0), repeat=repeat) | {"repeat": repeat}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024])
    parser.add_argument("--text", type=int, default=320, help="text tokens of a sample")
    parser.add_argument(
        "--mixed", choices=["no", "yes", "both"], default="no", help="mixed captions and aspects"
    )
    parser.add_argument("--fresh", action="store_true", help="fused steps have captions of lengths that "
                        "none had before, as in a large data set")  # fmt: skip
    parser.add_argument("--paths", nargs="+", choices=["diffusers", "fused"], default=["diffusers", "fused"])
    parser.add_argument("--linear", choices=["fp8", "bf16"], help="default: fp8 on a GPU, bf16 elsewhere")
    parser.add_argument(
        "--attention", choices=["flash4", "cudnn_varlen", "sdpa"], help="default: flash4 on a GPU"
    )
    parser.add_argument("--budget", type=float, nargs="+", default=[1.0])
    parser.add_argument("--fit", action="store_true", help="only the largest budget that fits in memory")
    parser.add_argument("--graphs", action="store_true", help="replay fused steps as CUDA graphs")
    parser.add_argument("--offload", nargs="*", default=[], help="groups of values kept in host memory")
    parser.add_argument("--rounded", action="store_true", help="keep values for the backward pass as e4m3")
    parser.add_argument("--exact-blocks", type=int, default=0, help="first blocks with bf16 forward products")
    parser.add_argument("--keep-transposed", action="store_true")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--seconds", type=float, help="limit of the whole run, half of it for each path")
    parser.add_argument(
        "--profile", metavar="FILE", help="where the time of the last fused step goes, by part"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--chart", metavar="FILE", help="an SVG of ms and GiB, ours against plain diffusers")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    fp8 = (args.linear or ("fp8" if gpu else "bf16")) == "fp8"
    dtype = torch.bfloat16 if gpu or fp8 else torch.float32
    configurations = [
        (f"{pixels} px, batch {batch}, {'mixed' if mixed else 'equal'}",
         make_layout(batch, pixels, args.text, mixed))
        for pixels in args.pixels
        for batch in args.batch
        for mixed in {"no": [False], "yes": [True], "both": [False, True]}[args.mixed]
        if batch > 1 or not mixed or args.mixed == "yes"
    ]  # fmt: skip
    configurations.sort(key=lambda each: each[1].tokens)
    rows: list[dict[str, Any]] = []
    shown_arguments = {
        name: value for name, value in vars(args).items() if name not in ("json", "profile", "chart")
    }
    report = {"environment": environment(device), "arguments": shown_arguments, "rows": rows}
    rates: dict[str, float] = {}

    def add(
        path: str, label: str, layout: PackedLayout, make: Callable[[], Callable], deadline: float, **settings
    ) -> None:
        """Measures one configuration into a row."""
        row = {"path": path, "label": label, "samples": layout.samples, "tokens": layout.tokens,
               "equal": layout.equal, "lengths": layout.lengths, **settings}  # fmt: skip
        left = deadline - time.perf_counter()
        if left <= 0:
            row["failed"] = "no time left"
        else:
            try:
                # Lengths earn exact cuDNN plans after 230 calls: seven steps of 34 blocks.
                warmup = 8 if settings.get("attention") == "cudnn_varlen" else 2
                row |= steady(make(), device, warmup, args.repeat, left)
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
        free()
        if "ms" in row:
            row |= derived(row["ms"], layout, model.config, rates)
        rows.append(row)
        shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(shown, flush=True)
        write_json(args.json, report)

    def until(paths_left: int) -> float:
        """When the path that starts now must be done."""
        if args.seconds is None:
            return float("inf")
        return time.perf_counter() + (started + args.seconds - time.perf_counter()) / paths_left

    started = time.perf_counter()
    if "diffusers" in args.paths:
        model = random_transformer(args.size, device, dtype)
        parameters = add_adapters(model, args.rank, dtype)
        model.enable_gradient_checkpointing()
        model.train()
        if gpu and args.size == "full":
            rates = report["rates_tflops"] = unit_rates(model.config, device, fp8)
            print(rates, flush=True)
        deadline = until(len(args.paths))
        for label, layout in configurations:
            inputs = random_inputs(model, layout)
            add(
                "diffusers",
                label,
                layout,
                partial(diffusers_step, model, parameters, layout, inputs),
                deadline,
            )
        del model, parameters
        free()
    if "fused" in args.paths:
        model = random_transformer(args.size, device, dtype, fp8=fp8)
        parameters = add_adapters(model, args.rank, torch.float32)
        if gpu and args.size == "full" and not rates:
            rates = report["rates_tflops"] = unit_rates(model.config, device, fp8)
        attention = args.attention or ("flash4" if gpu else "sdpa")
        fused = FusedTransformer(model, linear="fp8" if fp8 else "bf16", attention=attention, dtype=dtype,
                                 offload=args.offload, rounded=args.rounded, exact_blocks=args.exact_blocks,
                                 keep_transposed=args.keep_transposed)  # fmt: skip
        graphs = GraphedSteps(fused, parameters) if args.graphs else None
        settings = {"linear": "fp8" if fp8 else "bf16", "attention": attention, "offload": args.offload,
                    "rounded": args.rounded, "keep_transposed": args.keep_transposed,
                    "graphs": args.graphs, "exact_blocks": args.exact_blocks,
                    "fresh": args.fresh}  # fmt: skip

        def fused_run(layout: PackedLayout) -> Callable[[], Any]:
            if graphs:
                graphs.release()
            layouts = shorter_captions(layout) if args.fresh else endless(layout)
            return fused_step(fused, parameters, layouts, random_inputs(model, layout), graphs)

        deadline = until(1)
        for label, layout in configurations:
            for budget in sorted(args.budget, reverse=True):
                fused.budget = budget
                add("fused", label, layout, partial(fused_run, layout), deadline, budget=budget, **settings)
                if args.fit and rows[-1].get("failed") != "out of memory":
                    break
        if args.profile and "ms" in rows[-1]:
            report["profile"] = profiled(fused_run(configurations[-1][1]), fused, args.rank, args.profile)
            write_json(args.json, report)
    write_chart(args.chart, rows, f"One training step, {report['environment']['device']}")


def derived(ms: float, layout: PackedLayout, config: Any, rates: dict[str, float]) -> dict[str, float]:
    """Speed of a step, and what part of the floor it is at, where the card's rates are known."""
    linear, attention = linear_flop(layout, config), attention_flop(layout, config)
    found = {
        "tokens_per_second": layout.tokens / ms * 1e3,
        "model_tflops": 1e-9 * (2 * linear + 3.5 * attention) / ms,
    }
    if rates:
        floor = 1e-9 * (2 * linear / rates["linear"] + 3.5 * attention / rates["attention"])
        found |= {"floor_ms": floor, "share_of_floor": floor / ms}
    return found


def profiled(run: Callable[[], Any], fused: FusedTransformer, rank: int, path: str) -> dict[str, Any]:
    """Where three steps' time goes, by part: on the screen, as JSON in ``path``, their trace beside it."""
    for _ in range(4):  # compiles, and records graphs
        run()
    capture = Capture(fused.device, fused, {rank})
    for n in range(3):
        with capture.step(last=n == 2):
            run()
    trace = capture.finish()
    found = capture.account(trace)
    Path(path).write_text(json.dumps(found, indent=1) + "\n")
    Path(path).with_suffix(".trace.json").write_bytes(trace)
    Console().print(f"{found['wall_ms']:.2f} ms a step")
    Console().print(terminal_table(found))
    return found


if __name__ == "__main__":
    main()
