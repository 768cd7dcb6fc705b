"""Attention over packed samples, forward and backward: which kernel is fastest at equal and at mixed lengths.

``ragged`` and ``exact`` are the two kinds of plan of ``cudnn_varlen``.

    python benchmarks/attention.py --json out.json
    python benchmarks/attention.py --size nano --device cpu      # a try without a GPU
"""

from __future__ import annotations

import argparse

import torch
from common import configuration, environment, measure, write_json

from ideoflow.engine.fused.attention import make_attention
from ideoflow.engine.packed import PackedLayout

CASES = {
    "full": {
        "1 x 4416": PackedLayout((320,), ((64, 64),)),
        "4 x 4416": PackedLayout((320,) * 4, ((64, 64),) * 4),
        "4276..4796": PackedLayout((180, 320, 500, 700), ((64, 64),) * 4),
        "2 x 1344": PackedLayout((320,) * 2, ((32, 32),) * 2),
    },
    "nano": {
        "2 x 84": PackedLayout((20,) * 2, ((8, 8),) * 2),
        "76..94": PackedLayout((12, 20, 30), ((8, 8),) * 3),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(CASES), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device, config = torch.device(args.device), configuration(args.size)
    heads, width = config.num_attention_heads, config.attention_head_dim
    report = {"environment": environment(device), "rows": []}
    for name, layout in CASES[args.size].items():
        qkv = torch.randn(layout.total, 3, heads, width, device=device).bfloat16()
        dout = torch.randn_like(qkv[:, 0])
        results = {}
        for kernel in ("sdpa", "flash4", "ragged", "exact") if device.type == "cuda" else ("sdpa",):
            cudnn = kernel in ("ragged", "exact")
            attention = make_attention("cudnn_varlen" if cudnn else kernel, device)
            if cudnn:  # one kind of plan only, whatever the number of calls
                attention._exact = lambda _, choice=kernel == "exact": choice
            out, saved = attention.forward(qkv, layout)
            results[kernel] = (out, *attention.backward(dout, qkv, out, saved, layout))
            forward = measure(lambda a=attention, q=qkv, at=layout: a.forward(q, at), device)
            backward = measure(
                lambda a=attention, q=qkv, at=layout, o=out, s=saved, d=dout: a.backward(d, q, o, s, at),
                device,
            )
            flop = 4.0 * sum(n * n for n in layout.lengths) * heads * width
            row = {"case": name, "kernel": kernel, "forward_ms": forward["ms"], "backward_ms": backward["ms"],
                   "tflops": 3.5e-9 * flop / (forward["ms"] + backward["ms"])}  # fmt: skip
            if kernel != "sdpa":
                row["difference"] = [
                    float((a.float() - b.float()).norm() / b.float().norm())
                    for a, b in zip(results[kernel], results["sdpa"], strict=True)
                ]
            report["rows"].append(row)
            print(row, flush=True)
    write_json(args.json, report)


if __name__ == "__main__":
    main()
