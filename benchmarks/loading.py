"""How long does a base take to load, and how much memory meanwhile? Every form, held in every precision.

A transformer of full size with random weights is written in each published form (bf16; the official FP8;
ComfyUI's single file; bitsandbytes' NF4), and loaded as it is and in other precisions, each in a process of
its own: seconds, the host's peak above what the process had before, the GPU's peak above the final size; then
training steps of the fused engine, to see that it works. The page cache is warm: this measures the loader.
A precision's own word is where it is rounded or goes: ``fp8:cpu`` is rounded by the processor, ``fp8:host``
leaves the blocks' weights in host memory, to be streamed. What is measured is written after each load.

    python benchmarks/loading.py --folder /scratch/loading --out loading.json     # 19 GB at a time
    python benchmarks/loading.py --folder /dev/shm/loading --forms fp8,nf4 --seconds 280 --out loading.json
    python benchmarks/loading.py --size nano --folder /scratch/nano-loading      # a try without a GPU
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import SIZES, add_adapters, child, environment, make_layout, random_inputs, write_json
from diffusers import Ideogram4Transformer2DModel
from full_size import write_part
from torch.nn import functional

from ideoflow.engine.fused import FusedTransformer
from ideoflow.kernels.float8 import quantize_weight
from ideoflow.model.load import PRECISIONS, load_transformer

# form -> the precisions that it is loaded in
FORMS = {
    "bf16": ("bf16", "fp8", "fp8:cpu", "int8", "nf4"),
    "fp8": ("fp8", "fp8:host", "nf4", "bf16", "int8"),
    "comfy": ("fp8",),
    "nf4": ("nf4", "fp8"),
}


def write(form: str, size: str, folder: Path, device: torch.device) -> None:
    """The transformer's folder, made on the device and written in shards; ComfyUI's is a single file."""
    with torch.device("meta"):
        model = Ideogram4Transformer2DModel(**SIZES[size])
    generator = torch.Generator(device).manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def random(shape: torch.Size) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
        return torch.randn(shape, device=device, generator=generator, dtype=torch.bfloat16) * scale

    shapes = {name: p.shape for name, p in model.named_parameters()}
    for name, shape in shapes.items():
        if form in ("fp8", "comfy") and (".to_k." in name or ".to_v." in name):
            continue
        value = random(shape)
        if form in ("fp8", "comfy"):
            if ".to_q." in name:
                name, value = name.replace("to_q", "qkv"), torch.cat([value, random(shape), random(shape)])
            name = name.replace("attention.to_out.0", "attention.o")
        _store(state, form, name, value)
    if form == "comfy":
        state = {f"diffusion_model.{name}": value for name, value in state.items()}
    write_part(
        folder / "transformer", model.save_config, state, "diffusion_pytorch_model", single=form == "comfy"
    )


def _store(state: dict[str, torch.Tensor], form: str, name: str, value: torch.Tensor) -> None:
    linear = value.ndim == 2 and "indicator" not in name
    if form in ("fp8", "comfy") and linear:
        values, scale = quantize_weight(value)
        if form == "comfy":  # one scale for all
            scale = value.float().abs().max() / 448
            values = (value.float() / scale).to(torch.float8_e4m3fn)
            marker = json.dumps({"format": "float8_e4m3fn"}).encode()
            state[name.replace("weight", "comfy_quant")] = torch.tensor(list(marker), dtype=torch.uint8)
        state[name], state[f"{name}_scale"] = values, scale
    elif form == "nf4" and linear and name.startswith("layers."):
        from bitsandbytes.functional import quantize_4bit

        codes, quant = quantize_4bit(value, quant_type="nf4", compress_statistics=True)
        state[name] = codes
        state |= {f"{name}.{key}": tensor for key, tensor in quant.as_dict(packed=True).items()}
    else:
        state[name] = value


class HostPeak:
    """The most that this process held, sampled every 5 ms."""

    def __init__(self) -> None:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def stop(self) -> float:
        self.done.set()
        self.thread.join()
        return (self.peak - self.before) / 2**30


def load(args: argparse.Namespace) -> dict[str, Any]:
    """One form in one precision, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, _, via = args.load.partition(":")
    if precision == "nf4" or "nf4" in str(args.folder):
        import bitsandbytes  # noqa: F401 - seconds to import, and memory of its own
    if device.type == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats()
    host, started = HostPeak(), time.perf_counter()
    model = load_transformer(
        args.folder, precision=precision, device=device, streamed=via == "host",
        quantize_on=torch.device("cpu") if via == "cpu" else None,
        file=next((args.folder / "transformer").glob("*.safetensors")) if args.single else None,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.synchronize()
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "host_gib": host.stop()}
    if device.type == "cuda":
        final, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        row |= {"final_gib": final / 2**30, "above_final": peak / final - 1}
    parameters = add_adapters(model, 32, torch.float32)
    for parameter in parameters:
        parameter.data = parameter.data.to(device)
    fp8 = precision == "fp8" and device.type == "cuda"
    fused = FusedTransformer(model, linear="fp8" if fp8 else "bf16", activation_budget=0.0,
                             attention="sdpa", dtype=PRECISIONS[precision])  # fmt: skip
    if via == "host":
        fused.stream()
    layout = make_layout(1, 1024 if args.size == "full" else 128, 320, mixed=False, multiple=64)
    data = random_inputs(model, layout)
    for _ in range(3):  # the first one compiles
        started = time.perf_counter()
        loss = functional.mse_loss(fused(data["latents"], data["timestep"], data["text"], layout).float(),
                                   data["target"])  # fmt: skip
        loss.backward()
        row["loss"] = float(loss)
        row["step_ms"] = 1e3 * (time.perf_counter() - started)
    row["finite"] = all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--precisions", help="only these, of those that a form is loaded in")
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after this time")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args)))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: dict[str, Any] = {}
    started = time.perf_counter()
    titles = ("s", "host +GiB", "GPU GiB", "peak +%", "step ms")
    print(f"{'form -> precision':24s} " + " ".join(f"{title:>9s}" for title in titles), flush=True)
    for form in args.forms.split(","):
        if (left := started + args.seconds - time.perf_counter()) < 0:
            break
        folder = args.folder / form
        shutil.rmtree(folder, ignore_errors=True)
        write(form, args.size, folder, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for precision in FORMS[form]:
            if args.precisions and precision not in args.precisions.split(","):
                continue
            name = f"{form} -> {precision}"
            if (left := started + args.seconds - time.perf_counter()) < 0:
                print(f"{name:24s} no time left", flush=True)
                continue
            command = [sys.executable, __file__, "--size", args.size, "--folder", str(folder)]
            command += ["--load", precision] + (["--single"] if form == "comfy" else [])
            row, errors = child(command, min(60 + left, 3600))
            rows[name] = row | ({"errors": errors} if "failed" in row else {})
            write_json(args.out, {"environment": environment(device), "size": args.size, "rows": rows})
            if "failed" in row:
                print(f"{name:24s} failed: {row['failed']}\n{errors}", flush=True)
                continue
            figures = (row["seconds"], row["host_gib"], row.get("final_gib", 0.0),
                       100 * row.get("above_final", 0.0), row["step_ms"])  # fmt: skip
            print(f"{name:24s} " + " ".join(f"{x:9.2f}" for x in figures), flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
