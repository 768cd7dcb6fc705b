"""How much memory and time does each way to hold the model take? One step of the full model, random numbers.

For every precision of the frozen weights: resident; with the blocks' inputs on the host, or more of their
values; with AdamW's moments there too, or with all of the adapter but its working copies, or moments in 8
bits; and with the weights streamed from pinned host memory.
Plain diffusers + PEFT with gradient checkpointing runs in the same process for comparison: bf16 resident,
with its weights streamed by our own streamer, and offloaded in groups by diffusers' hooks (a block, a Linear,
and a block on disk), whose figures are also those of the reference engine.

    python benchmarks/memory.py --out memory.json
    python benchmarks/memory.py --size nano --pixels 128      # a try without a GPU
    python benchmarks/memory.py --precisions fp8 --modes 0,9 --plain bf16:none,fp8:block --out some.json
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import TARGETS, add_adapters, environment, held, make_layout, measure, random_inputs, write_json
from torch import nn
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.offload import offload_groups, stream_blocks
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.setup import UnpaddedAttention
from ideoflow.kernels.budget import AWAY, ROUNDING
from ideoflow.recipe import TrainSettings

# name -> (activation_offload, optimizer_state, weights streamed)
MODES = {
    "resident": ("none", "float32", False),
    "inputs on the host": ("inputs", "float32", False),
    "and moments": ("inputs", "cpu", False),
    "8-bit moments": ("inputs", "8bit", False),
    "outputs on the host, 8-bit moments": ("outputs", "8bit", False),
    "streamed": ("none", "float32", True),
    "streamed, outputs on the host": ("outputs", "float32", True),
    "streamed, inputs and moments": ("inputs", "cpu", True),
    "streamed, outputs and 8-bit moments": ("outputs", "8bit", True),
    "outputs on the host, adapter and moments there": ("outputs", "offload", False),
    "streamed, outputs, adapter and moments": ("outputs", "offload", True),
}
# Of plain diffusers: precision and offload.
PLAIN = "bf16:none,bf16:stream,bf16:block,bf16:leaf,bf16:disk"


def fused_step(args: argparse.Namespace, device: torch.device, precision: str, mode: str) -> dict[str, float]:
    away, moments, streamed = MODES[mode]
    model = held(args.size, device, precision, streamed)
    parameters = add_adapters(model, args.rank, torch.float32)
    for parameter in parameters:
        parameter.data = parameter.data.to(device)
    fp8 = precision == "fp8" and device.type == "cuda"
    fused = FusedTransformer(
        model, linear="fp8" if fp8 else "bf16", attention=args.attention, activation_budget=0.0,
        offload=AWAY[away], rounded=away in ROUNDING,
    )  # fmt: skip
    if streamed:
        fused.stream()
    return run_steps(args, device, model, parameters, moments, fused)


def run_steps(
    args: argparse.Namespace, device: torch.device, model: Any, parameters: list[nn.Parameter], moments: str,
    fused: FusedTransformer | None,
) -> dict[str, float]:  # fmt: skip
    layout = make_layout(1, args.pixels, args.text, mixed=False, multiple=64 if fused else 1)
    data = random_inputs(model, layout)
    masters = fused.masters_on_host(parameters) if fused and moments == "offload" else None
    optimizer = Optimizer(moments, {str(i): p for i, p in enumerate(parameters)}, TrainSettings(), masters)
    index = layout.tensors(device)

    def step() -> None:
        if fused:
            velocity = fused(data["latents"], data["timestep"], data["text"], layout)
        else:
            inputs = layout.diffusers_inputs(data["latents"], data["text"])
            velocity = model(timestep=data["timestep"], return_dict=False, **inputs)[0][0, index.image_index]
        functional.mse_loss(velocity.float(), data["target"]).backward()
        optimizer.clip(1.0)
        optimizer.step(1e-4)

    return measure(step, device, warmup=2, repeat=args.repeat)


def plain_step(
    args: argparse.Namespace, device: torch.device, precision: str, offload: str
) -> dict[str, float]:
    """diffusers + PEFT, checkpointed; its blocks resident, streamed, or offloaded in groups."""
    model = held(args.size, device, precision, offload != "none")
    model.set_attn_processor(UnpaddedAttention())
    model.t_embedding.mlp_in.register_forward_pre_hook(lambda layer, x: (x[0].to(layer.weight.dtype),))
    parameters = add_adapters(model, args.rank, torch.float32, TARGETS)
    for parameter in parameters:
        parameter.data = parameter.data.to(device)
    with TemporaryDirectory(dir=args.folder) as folder:
        if offload == "stream":
            stream_blocks(model, device)
        elif offload != "none":
            level = "leaf" if offload == "leaf" else "block"
            offload_groups(model, device, level, folder=Path(folder) if offload == "disk" else None)
        model.enable_gradient_checkpointing()
        model.train()
        return run_steps(args, device, model, parameters, "float32", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--text", type=int, default=320)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--precisions", default="fp8,nf4,int8,bf16")
    parser.add_argument("--modes", default=",".join(map(str, range(len(MODES)))), help="numbers of modes")
    parser.add_argument("--plain", default=PLAIN, help="precision:offload of plain diffusers, or none of it")
    parser.add_argument("--folder", help="where weights that wait on disk are; default: the temporary one")
    parser.add_argument("--attention", help="default: flash4 on a GPU, else sdpa")
    parser.add_argument("--out")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.attention = args.attention or ("flash4" if device.type == "cuda" else "sdpa")
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "folder")}
    rows: dict[str, dict[str, Any]] = {}

    def record(name: str, run: Any) -> None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            rows[name] = run()
        except Exception as error:  # told in the row, and the others still run
            rows[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(f"{name:50s} {rows[name]['failed']}", flush=True)
        else:
            gib = f"{rows[name]['allocated_gib']:6.2f} GiB" if "allocated_gib" in rows[name] else ""
            print(f"{name:50s} {rows[name]['ms']:8.0f} ms {gib}", flush=True)
        write_json(args.out, {"environment": environment(device), "arguments": asked, "rows": rows})

    plain = [tuple(each.split(":")) for each in args.plain.split(",") if each]

    def record_plain(chosen: list[tuple[str, ...]]) -> None:
        for precision, offload in chosen:
            where = "" if offload == "none" else f", {offload}"
            record(
                f"diffusers + PEFT, {precision}{where}", partial(plain_step, args, device, precision, offload)
            )

    record_plain([each for each in plain if each[1] == "none"])
    for precision in filter(None, args.precisions.split(",")):
        for mode in (list(MODES)[int(number)] for number in args.modes.split(",")):
            record(f"{precision}, {mode}", lambda p=precision, m=mode: fused_step(args, device, p, m))
    record_plain([each for each in plain if each[1] != "none"])  # last: 17 GB of pinned memory take long


if __name__ == "__main__":
    main()
