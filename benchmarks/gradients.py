"""Full-size correctness: the fused engine and plain diffusers + PEFT against float32, on random weights.

    python benchmarks/gradients.py --json out.json
    python benchmarks/gradients.py --exact-blocks 0 3 6 8   # FP8 with so many of the first blocks exact

All compute over the same base: e4m3 weights with row scales, which plain diffusers dequantises. Reported are
the cosine of the velocities and of every adapter gradient with those of float32, the same at several
activation budgets, and whether anything is not finite for spikes, zeros, very short and very long captions
and pictures.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
from common import (
    TARGETS,
    add_adapters,
    environment,
    make_layout,
    random_inputs,
    random_transformer,
    write_json,
)
from torch import Tensor
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.packed import PackedLayout

HARD = {
    "spikes of 1000": (PackedLayout((320,), ((64, 64),), 16), 1e3),
    "rows of zeros": (PackedLayout((320,), ((64, 64),), 16), 0.0),
    "captions of 1 and 2048 tokens": (PackedLayout((1, 2048), ((32, 32), (16, 16)), 16), None),
    "256 x 2048 pixels": (PackedLayout((7, 30), ((16, 128), (128, 16)), 64), None),
    "no caption": (PackedLayout((0, 5), ((8, 8), (3, 5)), 16), None),
}
# Twice the first: what the two differ by is the order in which a GPU adds up, and none of a budget's doing.
BUDGETS = [(1.0, ()), (1.0, ()), (0.0, ()), (0.1, ()), (0.3, ()), (0.6, ()),
           (0.2, ("input", "attention", "ffn_output"))]  # fmt: skip


def cosine(a: Tensor, b: Tensor) -> float:
    return float(functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def compare(names: list[str], got: Any, want: Any) -> dict[str, Any]:
    (velocity, loss, gradients), (velocity0, loss0, gradients0) = got, want
    cosines = {n: cosine(a, b) for n, a, b in zip(names, gradients, gradients0, strict=True)}
    ratios = [float(a.norm() / b.norm()) for a, b in zip(gradients, gradients0, strict=True)]
    ordered = sorted(cosines.values())
    layers = sorted({int(n.split("layers.")[1].split(".")[0]) for n in names})
    return {
        "velocity_cosine": cosine(velocity, velocity0), "loss": loss, "loss_float32": loss0,
        "gradient_cosine_min": ordered[0], "gradient_cosine_median": ordered[len(ordered) // 2],
        "gradient_norm_ratio": [min(ratios), max(ratios)],
        "min_by_layer": [min(c for n, c in cosines.items() if f"layers.{i}." in n) for i in layers],
        "min_by_target": {t: min(c for n, c in cosines.items() if f".{t}." in n) for t in TARGETS},
    }  # fmt: skip


def exact_name(count: int) -> str:
    return f"fused fp8, {count} exact blocks" if count else "fused fp8"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "mid", "nano"], default="full")
    parser.add_argument("--exact-blocks", type=int, nargs="+", default=[0], metavar="N",
                        help="each is compared; budgets and hard cases are those of the first")  # fmt: skip
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = "flash4" if device.type == "cuda" else "sdpa"
    layout = make_layout(1, 1024 if args.size == "full" else 128, 320 if args.size == "full" else 20, False)
    model = random_transformer(args.size, device, torch.bfloat16, fp8=True)
    parameters = add_adapters(model, 32, torch.float32)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    data = random_inputs(model, layout)
    report: dict[str, Any] = {"environment": environment(device), "budgets": [], "hard": {}}

    def results(velocity: Tensor, target: Tensor) -> tuple[Tensor, float, list[Tensor]]:
        loss = functional.mse_loss(velocity.float(), target)
        return velocity.detach(), float(loss), [g.float() for g in torch.autograd.grad(loss, parameters)]

    def fused(engine: FusedTransformer) -> tuple[Tensor, float, list[Tensor]]:
        return results(engine(data["latents"], data["timestep"], data["text"], layout), data["target"])

    engine = FusedTransformer(model, linear="fp8", attention=attention, exact_blocks=args.exact_blocks[0])
    fp8_name, first = exact_name(args.exact_blocks[0]), None
    for budget, offload in BUDGETS:
        engine.budget, engine.offload = budget, frozenset(offload)
        now = fused(engine)
        first = first or now
        # Not zero on a GPU: attention's backward pass adds in no fixed order, so two equal runs differ.
        apart = max(1 - cosine(a, b) for a, b in zip(now[2], first[2], strict=True))
        finite = all(bool(g.isfinite().all()) for g in now[2])
        row = {"budget": budget, "offload": list(offload), "loss": now[1], "max_1_minus_cosine": apart,
               "finite": finite}  # fmt: skip
        report["budgets"].append(row)
        print(row, flush=True)
    engine.budget, engine.offload = 0.3, frozenset()
    for name, (hard, spike) in HARD.items():
        case = random_inputs(model, hard)
        if spike is not None:
            case["latents"][::7] = spike
            case["text"][::5] = spike
        velocity, _, gradients = results(
            engine(case["latents"], case["timestep"], case["text"], hard), case["target"]
        )
        report["hard"][name] = bool(velocity.isfinite().all()) and all(
            bool(g.isfinite().all()) for g in gradients
        )
        print(name, "finite:", report["hard"][name], flush=True)
    engine.budget, engine.rounded = 1.0, True
    for block in engine.blocks:
        block.rounded = True
    rounded = fused(engine)
    others = {
        exact_name(n): fused(FusedTransformer(model, linear="fp8", attention=attention, exact_blocks=n))
        for n in args.exact_blocks[1:]
    }
    half = fused(FusedTransformer(model, linear="bf16", attention=attention, activation_budget=0.0))

    # Plain diffusers, its time embedding given float32 times, and the cast that they need.
    model.t_embedding.mlp_in.register_forward_pre_hook(lambda m, a: (a[0].to(m.weight.dtype),))
    model.enable_gradient_checkpointing()
    model.train()
    inputs = layout.diffusers_inputs(data["latents"], data["text"])
    image = inputs["indicator"] == 2

    # Scales and rotary frequencies stay float32.
    fixed = {id(b) for n, b in model.named_buffers() if n.endswith("weight_scale") or "inv_freq" in n}

    def plain(dtype: torch.dtype) -> tuple[Tensor, float, list[Tensor]]:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in (torch.bfloat16, torch.float32) and id(tensor) not in fixed:
                tensor.data = tensor.data.to(dtype)
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        velocity = model(timestep=data["timestep"], return_dict=False, **cast)[0][image]
        return results(velocity, data["target"])

    plain_half = plain(torch.bfloat16)
    gc.collect()
    truth = plain(torch.float32)
    report["against_float32"] = {
        name: compare(names, got, truth)
        for name, got in ((fp8_name, first), (f"{fp8_name}, rounded", rounded), ("fused bf16", half),
                          ("diffusers bf16", plain_half), *others.items())
    }  # fmt: skip
    report["against_diffusers_bf16"] = {
        name: compare(names, got, plain_half) for name, got in {fp8_name: first, **others}.items()
    }
    for name, row in [*report["against_float32"].items(), *report["against_diffusers_bf16"].items()]:
        print(name, {k: v for k, v in row.items() if k != "min_by_layer"}, flush=True)
    write_json(args.json, report)


if __name__ == "__main__":
    main()
