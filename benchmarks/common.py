"""What the benchmarks share: random models made on the device, layouts, a clock, and what machine this is."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from peft import LoraConfig
from torch import nn

from ideoflow.engine.packed import PackedLayout
from ideoflow.model import random

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]
SIZES: dict[str, dict[str, Any]] = {
    "full": {},
    # As deep as the released model, on a processor.
    "mid": {"num_layers": 34, "attention_head_dim": 256, "num_attention_heads": 3, "intermediate_size": 2048,
            "adaln_dim": 512, "llm_features_dim": 16},
    # Six small blocks, wide enough that every product's sizes are multiples of 16.
    "nano": {"num_layers": 6, "attention_head_dim": 32, "num_attention_heads": 6, "intermediate_size": 512,
             "adaln_dim": 64, "mrope_section": (6, 5, 5)},
}  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """Card, versions and commit, to be stored beside every figure."""
    packages = {}
    for name in (
        "torch",
        "triton",
        "diffusers",
        "peft",
        "nvidia-cudnn-cu13",
        "nvidia-cudnn-frontend",
        "flash-attn-4",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    # A copy on a machine without the repository's history is told its commit.
    commit = (
        os.environ.get("GIT_COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "packages": packages,
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def configuration(size: str) -> Any:
    """The architecture of a size."""
    with torch.device("meta"):
        return Ideogram4Transformer2DModel(**SIZES[size]).config


def random_transformer(size: str, device: torch.device, dtype: torch.dtype, *, fp8: bool = False,
                       seed: int = 0) -> Ideogram4Transformer2DModel:  # fmt: skip
    """A frozen transformer of random numbers; with ``fp8`` in the blocks' weights."""
    precision = "fp8" if fp8 else "float32" if dtype == torch.float32 else "bf16"
    return random.random_transformer(SIZES[size], precision=precision, device=device, seed=seed)


def child(
    command: list[str], seconds: float, variables: dict[str, str] | None = None, *, quiet: bool = True
) -> tuple[dict[str, Any], str]:
    """The JSON that another process prints last, or how it ``failed``; and the end of its standard error.

    ``variables`` are added to the environment. Unless ``quiet``, its standard error is this terminal's.
    """
    errors = subprocess.PIPE if quiet else None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, check=False, timeout=seconds,
                              env=os.environ | (variables or {}))  # fmt: skip
    except subprocess.TimeoutExpired as ended:
        return {"failed": f"not done after {seconds:.0f} s"}, _end(ended.stderr)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}, _end(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), _end(done.stderr)


def _end(printed: bytes | None) -> str:
    return (printed or b"").decode(errors="replace")[-1500:]


def cap_memory(cap: int) -> None:
    """Lets this process take so many bytes of the GPU; all of it where ``cap`` is 0, or there is none."""
    if cap and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))


def held(size: str, device: torch.device, precision: str, streamed: bool = False) -> nn.Module:
    """A random transformer, its blocks' Linears in a precision; the large ones on the host if streamed."""
    return random.random_transformer(SIZES[size], precision=precision, device=device, streamed=streamed)


def add_adapters(model: nn.Module, rank: int, dtype: torch.dtype, targets: list[str] = TARGETS,
                 seed: int = 1) -> list[nn.Parameter]:  # fmt: skip
    """LoRA on every block linear by PEFT, small random numbers in both matrices; returns its parameters."""
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    parameters = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.empty(parameter.shape, dtype=dtype, device=generator.device)
            scale = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.01
            parameter.data.normal_(0, scale, generator=generator)
            parameters.append(parameter.requires_grad_(True))
    return parameters


def make_layout(batch: int, pixels: int, text: int, mixed: bool, multiple: int = 16) -> PackedLayout:
    """``batch`` samples of ``pixels`` squared; mixed ones vary caption and aspect at about equal area."""
    side = pixels // 16
    if not mixed:
        return PackedLayout((text,) * batch, ((side, side),) * batch, multiple)
    shift = [0, side // 8, -side // 8, side // 16]
    grids = tuple((side - shift[b % 4], round(side * side / (side - shift[b % 4]))) for b in range(batch))
    texts = tuple(max(1, text + (b % 4 - 1) * text // 2 - b % 3) for b in range(batch))
    return PackedLayout(texts, grids, multiple)


def random_inputs(
    model: Ideogram4Transformer2DModel, layout: PackedLayout, seed: int = 2
) -> dict[str, torch.Tensor]:
    """Latents, times, text features and target velocities, packed."""
    device, dtype = model.input_proj.weight.device, model.input_proj.weight.dtype
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    return {
        "latents": normal(layout.image_total, model.config.in_channels).to(dtype),
        "timestep": torch.rand(layout.samples, device=device, generator=generator),
        "text": normal(layout.text_total, model.hidden_size).to(dtype),
        "target": normal(layout.image_total, model.config.in_channels),
    }


def measure(
    run: Callable[[], Any], device: torch.device, *, warmup: int = 3, repeat: int = 6
) -> dict[str, float]:
    """Median and spread of ``run`` in milliseconds, and its peak memory in GiB on a GPU."""
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        return {"ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return {
        "ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times),
        "allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
    }  # fmt: skip


def linear_flop(layout: PackedLayout, config: Any) -> float:
    """Floating-point operations of all block linears in one pass."""
    hidden = config.attention_head_dim * config.num_attention_heads
    weights = 4 * hidden * hidden + 3 * hidden * config.intermediate_size
    return 2.0 * layout.tokens * weights * config.num_layers


def attention_flop(layout: PackedLayout, config: Any) -> float:
    """Operations of attention's two forward products over all blocks; the backward pass takes 2.5 times."""
    hidden = config.attention_head_dim * config.num_attention_heads
    return 4.0 * sum(length * length for length in layout.lengths) * hidden * config.num_layers


def write_json(path: str | None, data: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(data, indent=1) + "\n")
