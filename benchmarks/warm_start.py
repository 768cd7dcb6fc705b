"""How long until the first step is done, cold and warm, and does anything compile once training goes?

    python benchmarks/warm_start.py --json out.json                          # the fused engine at full size
    python benchmarks/warm_start.py --engine reference --json out.json       # diffusers' blocks, compiled
    python benchmarks/warm_start.py --size nano --device cpu --engine reference   # a try without a GPU

Two processes run one after the other with one cache folder, empty at first. Each makes a random model on the
device and trains on pictures of five aspect ratios, a caption of another length each, one picture a step.
Counted are Triton's kernels (compiled, and loaded from the cache), torch.compile's graphs, recorded CUDA
graphs and the files in the cache. Seconds are from the process' start; making the model is told apart, since
a real run reads its base from the disk instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

_GRIDS = ((1.0, 1.0), (1.25, 0.8), (0.8, 1.25), (1.5, 0.66), (0.66, 1.5))  # of the square's side


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engine", choices=["fused", "reference"], default="fused")
    parser.add_argument("--attention", choices=["flash4", "cudnn_varlen", "sdpa"],
                        help="of the fused engine; default: flash4 on a GPU")  # fmt: skip
    parser.add_argument("--graphs", action="store_true", help="record fused steps as CUDA graphs")
    parser.add_argument("--pixels", type=int, help="default: 1024, nano 128")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        Path(args.child).write_text(json.dumps(child(args)))
        return
    report: dict[str, Any] = {
        "arguments": {k: v for k, v in vars(args).items() if k not in ("json", "child")}
    }
    ours = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as scratch:
        variables = {k: v for k, v in os.environ.items() if k not in ours} | {"IDEOFLOW_CACHE": cache}
        for name in ("cold", "warm"):
            file = Path(scratch) / name
            variables["WARM_START_BEGAN"] = str(time.time())
            subprocess.run([sys.executable, *sys.argv, "--child", str(file)], env=variables, check=True)
            report[name] = json.loads(file.read_text())
            report["environment"] = report[name].pop("environment")
            made = [p for p in Path(cache).rglob("*") if p.is_file()]
            report[name]["cache_files"] = len(made)
            report[name]["cache_mb"] = round(sum(p.stat().st_size for p in made) / 1e6, 1)
            shown = {k: v for k, v in report[name].items() if k != "steps"}
            print(f"{name}: {json.dumps(shown)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def child(args: argparse.Namespace) -> dict[str, Any]:
    """One process: its times in seconds, and what was compiled in which step."""
    began = float(os.environ["WARM_START_BEGAN"])
    import ideoflow.engine  # noqa: F401 - first, as in a run: it says where compiled kernels are kept

    import torch  # isort: skip
    from common import environment

    device = torch.device(args.device)
    counts = {"compiled": 0, "loaded": 0}
    if importlib.util.find_spec("triton"):
        import triton

        def listen(*, cache_hit: bool, **_: Any) -> None:
            counts["loaded" if cache_hit else "compiled"] += 1

        triton.knobs.compilation.listener = listen
    imported = time.time()
    step, recorded = make(args, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    made = time.time()
    steps = []
    for n in range(args.steps):
        started = time.time()
        step(n)
        if device.type == "cuda":
            torch.cuda.synchronize()
        from torch._dynamo.utils import counters

        steps.append({
            "seconds": round(time.time() - started, 3), "triton_compiled": counts["compiled"],
            "triton_loaded": counts["loaded"], "torch_compile_graphs": counters["stats"]["unique_graphs"],
            "cuda_graphs": recorded(),
        })  # fmt: skip
        if n == 0:
            first = time.time()
    late = steps[min(20, len(steps)) - 1]
    return {
        "environment": environment(device),
        "import_seconds": round(imported - began, 2),
        "model_seconds": round(made - imported, 2),
        "first_step_seconds": steps[0]["seconds"],
        "start_to_first_step_seconds": round(first - began, 2),
        "without_making_the_model_seconds": round(first - began - (made - imported), 2),
        "median_step_seconds": median(s["seconds"] for s in steps[len(steps) // 2 :]),
        "compiled_in_all": {k: v for k, v in steps[-1].items() if k != "seconds"},
        "compiled_after_step_20": {k: steps[-1][k] - late[k] for k in late if k != "seconds"},
        "steps": steps,
    }


def make(args: argparse.Namespace, device: Any) -> tuple[Callable[[int], Any], Callable[[], int]]:
    """The model; returns what does step n, and what counts the recorded CUDA graphs."""
    import torch
    from common import add_adapters, random_inputs, random_transformer

    from ideoflow.engine.fused import FusedTransformer
    from ideoflow.engine.fused.graphs import GraphedSteps
    from ideoflow.engine.packed import PackedLayout
    from ideoflow.engine.setup import UnpaddedAttention
    from ideoflow.engine.step import TrainingSample, accumulate
    from ideoflow.kernels.budget import PACKED_MULTIPLE

    gpu, fused = device.type == "cuda", args.engine == "fused"
    dtype = torch.bfloat16 if gpu else torch.float32
    model = random_transformer(args.size, device, dtype, fp8=gpu and fused)
    parameters = add_adapters(model, 32 if args.size == "full" else 8, torch.float32)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=gpu)
    side = (args.pixels or (1024 if args.size == "full" else 128)) // 16
    longest = 500 if args.size == "full" else 60

    def layout_of(n: int) -> PackedLayout:
        wide, high = _GRIDS[n % len(_GRIDS)]
        text = 40 + (n * 137) % (longest - 40) if longest > 100 else 3 + (n * 17) % longest
        return PackedLayout(
            (text,), ((round(side * high), round(side * wide)),), PACKED_MULTIPLE if fused else 1
        )

    if fused:
        attention = args.attention or ("flash4" if gpu else "sdpa")
        engine = FusedTransformer(model, linear="fp8" if gpu else "bf16", attention=attention, dtype=dtype)
        graphs = GraphedSteps(engine, parameters) if args.graphs else None
    else:
        # As the engine sets the reference path up.
        model.set_attn_processor(UnpaddedAttention())
        model.compile_repeated_blocks()
        model.train()

    def step(n: int) -> None:
        layout = layout_of(n)
        data = random_inputs(model, layout, seed=n)
        optimizer.zero_grad(set_to_none=True)
        if fused:
            inputs = [data[name] for name in ("latents", "target", "timestep", "text")]
            (graphs or engine.add_gradients)(*inputs, layout, 1)
        else:
            sample = TrainingSample(data["latents"].float(), data["target"], data["timestep"], data["text"],
                                    layout.grids[0])  # fmt: skip
            accumulate(model, [sample], 1)
        optimizer.step()

    return step, lambda: len(graphs._graphs) if fused and graphs else 0


if __name__ == "__main__":
    main()
