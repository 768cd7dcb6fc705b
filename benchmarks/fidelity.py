"""Which FP8 product costs how much exactness? One at a time is left exact, and one at a time rounded.

    python benchmarks/fidelity.py --json out.json          # the released size, on a GPU
    python benchmarks/fidelity.py --size mid --seeds 0 1   # as deep but 768 wide, on a processor

Plain diffusers in bf16 (or `--dtype float32`) over e4m3 weights with row scales, random numbers, is the
reference. Hooks round the inputs of chosen Linears to e4m3 row by row, as the fused engine's operands are;
everything else stays as it is. Reported is 1 - cosine of the velocities, in units of 1e-4, and beside each
way what its exact products would add to the forward pass: a product in bf16 takes twice as long as in FP8,
so by operations.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from common import SIZES, environment, make_layout, random_inputs, write_json
from torch import Tensor, nn
from torch.nn import functional

from ideoflow.engine.packed import PackedLayout
from ideoflow.kernels.reference import quantize
from ideoflow.model import random

PRODUCTS = {
    "qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "o": ("attention.to_out.0",),
    "gate_up": ("feed_forward.w1", "feed_forward.w3"),
    "down": ("feed_forward.w2",),
}
Place = tuple[int, str]  # block, module


def places(blocks: Iterable[int], products: Iterable[str] = PRODUCTS) -> set[Place]:
    return {(block, name) for block in blocks for product in products for name in PRODUCTS[product]}


def ways(count: int) -> dict[str, set[Place]]:
    """What is rounded in each way."""
    every, third = range(count), -(-count // 3)
    parts = {"first third": every[:third], "middle third": every[third:-third], "last third": every[-third:]}
    found = {"all FP8": places(every)}
    found |= {f"only {name} in FP8": places(every, [name]) for name in PRODUCTS}
    found |= {f"only {part} in FP8": {(b, f"attention.{part}") for b in every}
              for part in ("to_q", "to_k", "to_v")}  # fmt: skip
    found |= {f"only {name} in FP8": places(part) for name, part in parts.items()}

    def exact(name: str, blocks: Iterable[int], products: Iterable[str] = PRODUCTS) -> None:
        found[f"exact {name}"] = found["all FP8"] - places(blocks, products)

    for product in PRODUCTS:
        exact(product, every, [product])
    for name, part in parts.items():
        exact(name, part)
    for first in (1, 2, 3, 4, 6, 8):
        exact(f"first {first}", every[:first])
    for products in (["o"], ["o", "down"], ["o", "gate_up"], ["qkv", "o", "down"]):
        exact(f"{' + '.join(products)} of the first third", every[:third], products)
    exact("o + down", every, ["o", "down"])
    exact("o + gate_up", every, ["o", "gate_up"])
    return found


def rounding(places: set[Place], here: Place) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        if here not in places:
            return None
        x = inputs[0]
        return quantize(x.flatten(0, -2)).dense(x.dtype).view(x.shape)

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "mid", "nano"], default="full")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pixels", type=int, help="side of the picture (full: 1024, else 256)")
    parser.add_argument("--text", type=int, help="text tokens (full: 320, else 64)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, full = getattr(torch, args.dtype), args.size == "full"
    layout = make_layout(1, args.pixels or (1024 if full else 256), args.text or (320 if full else 64), False)
    rows: dict[str, dict[str, Any]] = {}
    for seed in args.seeds:
        model = random.random_transformer(SIZES[args.size], precision="fp8", device=device, seed=seed)
        for way, share, apart in differences(model, dtype, layout, seed):
            rows.setdefault(way, {"way": way, "exact_share_of_operations": share, "apart": []})
            rows[way]["apart"].append(apart)
            rows[way]["mean"] = statistics.fmean(rows[way]["apart"])
            print(f"seed {seed}  {way:36}{apart:8.2f}  {share:6.1%} exact", flush=True)
        write_json(args.json, {
            "environment": environment(device),
            "arguments": {k: v for k, v in vars(args).items() if k != "json"},
            "unit": "1e-4 of 1 - cosine",
            "rows": list(rows.values()),
        })  # fmt: skip


@torch.no_grad()
def differences(
    model: nn.Module, dtype: torch.dtype, layout: PackedLayout, seed: int
) -> Iterator[tuple[str, float, float]]:
    """(way, share of the operations that stay exact, 1e4 (1 - cosine)) of every way."""
    rounded: set[Place] = set()
    weights = {}
    for index, block in enumerate(model.layers):
        for name in (name for names in PRODUCTS.values() for name in names):
            linear = block.get_submodule(name)
            linear.register_forward_pre_hook(rounding(rounded, (index, name)))
            weights[index, name] = linear.weight.numel()
    # Times stay float32 up to the sinusoid; the Linear behind it wants its own type.
    model.t_embedding.mlp_in.register_forward_pre_hook(lambda m, a: (a[0].to(m.weight.dtype),))
    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "inv_freq" not in n)):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.to(dtype)
    data = random_inputs(model, layout, seed + 2)
    # Projected features go in, as in training.
    model.llm_cond_norm, model.llm_cond_proj = nn.Identity(), nn.Identity()
    inputs = layout.diffusers_inputs(data["latents"], data["text"])
    image = inputs["indicator"] == 2

    def velocity(chosen: set[Place]) -> Tensor:
        rounded.clear()
        rounded.update(chosen)
        result = model(timestep=data["timestep"], return_dict=False, **inputs)[0][image]
        return result.double().flatten()

    exact = velocity(set())
    for way, chosen in ways(len(model.layers)).items():
        share = 1 - sum(weights[place] for place in chosen) / sum(weights.values())
        yield way, share, 1e4 * (1 - float(functional.cosine_similarity(velocity(chosen), exact, 0)))


if __name__ == "__main__":
    main()
