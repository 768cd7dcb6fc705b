"""One training step: plain diffusers + PEFT against the fused engine, in the same run, on random weights.

    python benchmarks/step.py --json out.json                 # the full model, 1024 x 1024, batch 1
    python benchmarks/step.py --batch 1 2 4 --pixels 512 1024 --mixed both
    python benchmarks/step.py --size nano --device cpu        # a try without a GPU

A step is: gradients to None, forward, mean squared error in float32, backward, AdamW. Plain diffusers runs in
bf16 with gradient checkpointing on every block and adapters in bf16 (float32 adapters would make PEFT
multiply in float32); the fused engine keeps its adapters in float32. The floor is two passes of the block
linears and one of attention, forward and backward, at the rates that this card reached in this run.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
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
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.attention import make_attention
from ideoflow.engine.packed import PackedLayout


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
    fused: FusedTransformer, parameters: list, layout: PackedLayout, data: dict
) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=data["latents"].is_cuda)

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        velocity = fused(data["latents"], data["timestep"], data["text"], layout)
        loss = functional.mse_loss(velocity.float(), data["target"])
        loss.backward()
        optimizer.step()
        return loss

    return run


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


def main() -> None:
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
    parser.add_argument("--paths", nargs="+", choices=["diffusers", "fused"], default=["diffusers", "fused"])
    parser.add_argument("--linear", choices=["fp8", "bf16"], help="default: fp8 on a GPU, bf16 elsewhere")
    parser.add_argument(
        "--attention", choices=["flash4", "cudnn_varlen", "sdpa"], help="default: flash4 on a GPU"
    )
    parser.add_argument("--budget", type=float, nargs="+", default=[1.0])
    parser.add_argument("--offload", nargs="*", default=[], help="groups of values kept in host memory")
    parser.add_argument("--rounded", action="store_true", help="keep values for the backward pass as e4m3")
    parser.add_argument("--keep-transposed", action="store_true")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--profile", metavar="FILE", help="write a table of the kernels of one fused step")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    fp8 = (args.linear or ("fp8" if gpu else "bf16")) == "fp8"
    dtype = torch.bfloat16 if gpu or fp8 else torch.float32
    layouts = [
        make_layout(batch, pixels, args.text, mixed)
        for pixels in args.pixels
        for batch in args.batch
        for mixed in {"no": [False], "yes": [True], "both": [False, True]}[args.mixed]
    ]
    rows: list[dict[str, Any]] = []
    shown_arguments = {name: value for name, value in vars(args).items() if name not in ("json", "profile")}
    report = {"environment": environment(device), "arguments": shown_arguments, "rows": rows}

    def add(path: str, layout: PackedLayout, figures: dict[str, float], **settings: Any) -> None:
        config = model.config
        floor = None
        if rates:
            linear, attention = linear_flop(layout, config), attention_flop(layout, config)
            floor = 1e-9 * (2 * linear / rates["linear"] + 3.5 * attention / rates["attention"])
        row = {"path": path, "samples": layout.samples, "tokens": layout.tokens, "equal": layout.equal,
               "lengths": layout.lengths, **settings, **figures}  # fmt: skip
        row["tokens_per_second"] = layout.tokens / figures["ms"] * 1e3
        row["model_tflops"] = 1e-9 * (2 * linear_flop(layout, config) + 3.5 * attention_flop(layout, config))
        row["model_tflops"] /= figures["ms"]
        if floor:
            row |= {"floor_ms": floor, "share_of_floor": floor / figures["ms"]}
        rows.append(row)
        shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(shown, flush=True)
        write_json(args.json, report)

    rates: dict[str, float] = {}
    if "diffusers" in args.paths:
        model = random_transformer(args.size, device, dtype)
        parameters = add_adapters(model, args.rank, dtype)
        model.enable_gradient_checkpointing()
        model.train()
        if gpu and args.size == "full":
            rates = report["rates_tflops"] = unit_rates(model.config, device, fp8)
            print(rates, flush=True)
        for layout in layouts:
            run = diffusers_step(model, parameters, layout, random_inputs(model, layout))
            add("diffusers", layout, measure(run, device, warmup=1, repeat=args.repeat))
        del model, parameters, run
        free()
    if "fused" in args.paths:
        model = random_transformer(args.size, device, dtype, fp8=fp8)
        parameters = add_adapters(model, args.rank, torch.float32)
        if gpu and args.size == "full" and not rates:
            rates = report["rates_tflops"] = unit_rates(model.config, device, fp8)
        attention = args.attention or ("flash4" if gpu else "sdpa")
        fused = FusedTransformer(model, linear="fp8" if fp8 else "bf16", attention=attention, dtype=dtype,
                                 offload=args.offload, rounded=args.rounded,
                                 keep_transposed=args.keep_transposed)  # fmt: skip
        for layout in layouts:
            for budget in args.budget:
                fused.budget = budget
                free()
                run = fused_step(fused, parameters, layout, random_inputs(model, layout))
                settings = {"linear": "fp8" if fp8 else "bf16", "attention": attention, "budget": budget,
                            "offload": args.offload, "rounded": args.rounded,
                            "keep_transposed": args.keep_transposed}  # fmt: skip
                # Lengths earn exact attention plans after 230 calls: seven steps of 34 blocks.
                add(
                    "fused",
                    layout,
                    measure(run, device, warmup=8 if gpu else 1, repeat=args.repeat),
                    **settings,
                )
        if args.profile and gpu:
            _profile(run, args.profile)


def _profile(run: Callable[[], Any], path: str) -> None:
    """Time of each kernel over one step, longest first."""
    from pathlib import Path

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run()
        torch.cuda.synchronize()
    kernels = [
        e for e in trace.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"
    ]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    lines = [f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:6d} x  {e.key[:120]}" for e in kernels[:60]]
    total = sum(e.self_device_time_total for e in kernels) / 1e3
    text = f"{total:9.3f} ms in kernels\n" + "\n".join(lines) + "\n"
    Path(path).write_text(text)
    print(text, flush=True)


if __name__ == "__main__":
    main()
