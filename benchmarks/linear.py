"""Each fused operation alone, at the model's shapes: microseconds, and bytes or operations a second.

Without a GPU these are the eager operations, or Triton's kernels in its interpreter.

    python benchmarks/linear.py --json out.json
    python benchmarks/linear.py --size nano --device cpu --tokens 64      # a try without a GPU
    TRITON_INTERPRET=1 python benchmarks/linear.py --size nano --device cpu --tokens 16
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import configuration, environment, measure, write_json

from ideoflow import kernels
from ideoflow.engine.fused.weights import FrozenWeight, Scratch
from ideoflow.kernels.float8 import Float8Linear


def _microseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median time with a cold second-level cache; the flush before each run also hides the launch."""
    if device.type != "cuda":
        return measure(run, device)["ms"] * 1e3
    from triton.testing import do_bench

    return do_bench(run, warmup=8, rep=40, return_mode="median") * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=4416)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device, config = torch.device(args.device), configuration(args.size)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    ops = kernels.load("triton" if device.type == "cuda" or interpreted else "reference")
    rows = []
    heads, width = config.num_attention_heads, config.attention_head_dim
    t, d, f, r = args.tokens, heads * width, config.intermediate_size, args.rank

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    def add(name: str, run, megabytes: float = 0, gigaflop: float = 0) -> None:
        us = _microseconds(run, device)
        row = {"op": name, "us": us}
        if megabytes:
            row["tb_per_s"] = megabytes / us
        if gigaflop:
            row["tflops"] = gigaflop / us * 1e3
        rows.append(row)
        print(
            " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
            flush=True,
        )

    def u(width: int, itemsize: float = 2) -> float:
        return t * width * itemsize / 1e6

    scratch = Scratch(device)
    for name, inputs, outputs, parts in (
        ("qkv", d, 3 * d, 3),
        ("o", d, d, 1),
        ("w13", d, 2 * f, 2),
        ("w2", f, d, 1),
    ):
        layer = Float8Linear.of(
            torch.nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
        )
        weight = FrozenWeight([layer], fp8=True, ops=ops, scratch=scratch)
        x, dy = ops.quantize(normal(t, inputs)), ops.quantize(normal(t, outputs))
        flop = 2e-9 * t * inputs * outputs  # 1e9 operations
        add(f"{name} forward", lambda w=weight, x=x: w.forward(x), gigaflop=flop)
        add(f"{name} backward with transpose", lambda w=weight, x=dy: w.backward(x), gigaflop=flop)
        add(f"{name} transpose", lambda w=weight: ops.transpose(w.values), 2e-6 * inputs * outputs)
        down, up = normal(parts * r, inputs), normal(outputs, r)
        z = normal(t, parts * r)
        unfold = torch.rand(outputs, device=device)
        add(f"{name} adapter down", lambda x=x, m=down: ops.adapter_down(x, m.t()), u(inputs, 1))
        add(
            f"{name} adapter dz",
            lambda x=dy, m=up, p=parts, s=unfold: ops.adapter_down(x, m, p, s),
            u(outputs, 1),
        )
        add(
            f"{name} adapter dup",
            lambda x=dy, z=z, p=parts, s=unfold: ops.adapter_gradient(x, z, p, s),
            u(outputs, 1),
        )
        add(
            f"{name} adapter ddown",
            lambda x=x, z=z: ops.adapter_gradient(x, z, rank_first=True),
            u(inputs, 1),
        )
        y, dx = normal(t, outputs), normal(t, inputs)
        add(f"{name} adapter up", lambda y=y, z=z, m=up, p=parts: ops.adapter_up(y, z, m, p), 2 * u(outputs))
        add(f"{name} adapter dx", lambda y=dx, z=z, m=down: ops.adapter_up(y, z, m.t()), 2 * u(inputs))
    s = SimpleNamespace(h=normal(t, d), y=normal(t, d), m=normal(1, d), fold=normal(3 * d))
    sample = torch.zeros(t, dtype=torch.int32, device=device)
    add("quantize", lambda: ops.quantize(s.y), u(d, 3))
    add("norm_modulate", lambda: ops.norm_modulate(s.h, s.m, sample, 1e-5, True), u(d, 3))
    add(
        "norm_modulate_backward",
        lambda: ops.norm_modulate_backward(s.h, s.y, s.m, sample, 1e-5, s.h),
        u(d, 8),
    )
    add("gated_residual", lambda: ops.gated_residual(s.h, s.y, s.m, sample, 1e-5), u(d, 6))
    add("gated_residual_backward",
        lambda: ops.gated_residual_backward(s.h, s.y, s.m, sample, 1e-5, s.fold[:d], True),
        u(d, 5))  # fmt: skip
    gate_up, du, fold = normal(t, 2 * f), normal(t, f), normal(2 * f)
    add("swiglu", lambda: ops.swiglu(gate_up, True), u(f, 5))
    add("swiglu_backward", lambda: ops.swiglu_backward(du, gate_up, fold, True), u(f, 8))
    qkv = normal(t, 3, heads, width)
    half = normal(t, width // 2)
    norm = normal(width)
    inverse = ops.qk_norm_rope(qkv, norm, norm, half, half, 1e-5)
    add("qk_norm_rope", lambda: ops.qk_norm_rope(qkv, norm, norm, half, half, 1e-5), u(d, 8))
    dqkv = normal(t, 3, heads, width)
    add("qk_norm_rope_backward",
        lambda: ops.qk_norm_rope_backward(*dqkv.unbind(1), qkv, inverse, norm, norm, half, half, s.fold,
                                          True),
        u(d, 13))  # fmt: skip
    write_json(
        args.json,
        {"environment": environment(device), "size": args.size, "tokens": args.tokens, "rows": rows},
    )


if __name__ == "__main__":
    main()
