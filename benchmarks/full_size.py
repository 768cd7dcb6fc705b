"""Does the whole path hold at the true size? Runs a recipe on a base of full size with random weights.

No weights are downloaded: transformer (9.3 G), text encoder (8.2 G) and autoencoder are filled with random
numbers on the GPU and written to disk (19 GB in FP8, as the official release), then `ideoflow`'s own workflow
plans, encodes, trains, samples and exports, exactly as for a user. Prints what each stage took, and the
memory predicted against measured.

    python benchmarks/full_size.py --base /scratch/base --out results.json
    python benchmarks/full_size.py --size nano --steps 2 --resolution 64       # a try without a GPU
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import environment
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from ideoflow.engine.setup import plan_device
from ideoflow.kernels.float8 import quantize_weight
from ideoflow.model.base import TextEncoderSpec
from ideoflow.model.nano import make_nano, nano_pipeline
from ideoflow.resources import recipes
from ideoflow.workflow import prepare, run


def fill(model: nn.Module, device: str) -> nn.Module:
    """Random weights that keep activations near unit size: 1 / sqrt(inputs); norms one, biases zero."""
    model = model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            p.normal_(0, (p.numel() / p.shape[0]) ** -0.5)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in model.named_buffers():
        buffer.fill_(1) if "var" in name else buffer.zero_()
    return model


PARTS = ("text_encoder", "vae", "transformer")


def make_base(folder: Path, form: str, device: str, parts: Collection[str] = PARTS) -> None:
    """A base of full size, or the parts of it that are asked for; tells the seconds of each.

    ``form`` is ``bf16`` (diffusers' layout) or ``fp8`` as the official release has it: transformer and text
    encoder in e4m3 with a scale a row, the former in the original layout with fused qkv.
    The unconditional transformer is the same files again. Without ``transformer``, that folder holds its
    text projection only, which is what encoding captions needs of it. What is there is not made again.
    """
    spec = TextEncoderSpec()
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    text = {name: getattr(spec, name) for name in spec.__slots__} | {"rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64,
              "out_hidden_size": spec.hidden_size, "deepstack_visual_indexes": [0]}  # fmt: skip
    with torch.device("meta"):
        transformer, vae = Ideogram4Transformer2DModel(), AutoencoderKLFlux2()
        encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    if not (folder / "model_index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = nano_pipeline().tokenizer
        Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=tokenizer,
            transformer=None, unconditional_transformer=None,
        ).save_pretrained(folder)  # fmt: skip
        index = json.loads((folder / "model_index.json").read_text())
        index |= {
            "vae": ["diffusers", "AutoencoderKLFlux2"],
            "text_encoder": ["transformers", "Qwen3VLModel"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, model in (("vae", vae), ("text_encoder", encoder)):
        if name in parts and not (folder / name).exists():
            config = model.save_config if name == "vae" else model.config.save_pretrained
            state = fill(model, device).state_dict()
            state = original_fp8(state) if form == "fp8" and name == "text_encoder" else state
            file = "diffusion_pytorch_model" if name == "vae" else "model"
            write_part(folder / name, config, state, file)
            del state
            model.to("meta")
    whole, there = "transformer" in parts, (folder / "transformer").exists()
    if there and not (whole and (folder / "transformer" / PROJECTION_ONLY).exists()):
        return
    if not whole:
        transformer.layers = nn.ModuleList()
    state = fill(transformer, device).state_dict()
    state = original_fp8(state) if form == "fp8" else state
    write_part(folder / "transformer", transformer.save_config, state, "diffusion_pytorch_model")
    (folder / "transformer" / PROJECTION_ONLY).unlink(missing_ok=True)
    if not whole:
        (folder / "transformer" / PROJECTION_ONLY).touch()
    if not (folder / "unconditional_transformer").exists():
        (folder / "unconditional_transformer").symlink_to("transformer")


# Marks a transformer's folder in which the blocks are missing.
PROJECTION_ONLY = "projection-only"
_SHARD = 5 << 30
# Tables of two dimensions that are no Linear.
_EMBEDDINGS = ("embed_image_indicator.weight", "embed_tokens.weight", "pos_embed.weight")


def write_part(
    folder: Path,
    save_config: Callable[[Path], Any],
    state: dict[str, torch.Tensor],
    name: str,
    *,
    single: bool = False,
) -> None:
    """A model's config, and its weights in shards that four threads bring from the device and write."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    save_config(folder)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for key, value in state.items():
        if sum(v.nbytes for v in shards[-1].values()) > _SHARD and not single:
            shards.append({})
        shards[-1][key] = value
    files = [f"{name}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [f"{name}.safetensors"]

    def write(file: str, shard: dict[str, torch.Tensor]) -> None:
        save_file({k: v.contiguous().cpu() for k, v in shard.items()}, folder / file, {"format": "pt"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, files, shards))
    size = sum(v.nbytes for v in state.values())
    if len(shards) > 1:
        places = {key: file for file, shard in zip(files, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    print(f"  made {folder.name}: {size / 1e9:.1f} GB in {time.perf_counter() - started:.1f} s", flush=True)


def original_fp8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The official release's form: q, k, v rows in one matrix; every Linear as e4m3 with a scale a row."""
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            value = torch.cat([state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            name = name.replace("to_q", "qkv")
        name = name.replace("attention.to_out.0", "attention.o")
        if value.ndim == 2 and not name.endswith(_EMBEDDINGS):
            out[name], out[f"{name}_scale"] = quantize_weight(value)
        else:
            out[name] = value
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["full", "nano"], default="full")
    parser.add_argument("--form", choices=["fp8", "bf16"], default="fp8", help="storage of a full-size base")
    parser.add_argument(
        "--base", type=Path, help="where to make (or find) the base; default: a temporary folder"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="further settings"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = measure(args, Path(scratch))
    print(json.dumps(results, indent=1))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Makes the base, runs the recipe, gathers what happened."""
    base = args.base or scratch / "base"
    started = time.perf_counter()
    if not base.exists():
        make_nano(base) if args.size == "nano" else make_base(base, args.form, "cuda")
    made = time.perf_counter() - started
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    recipe = scratch / "full.toml"
    recipe.write_text(recipe_text(base, args, scratch))
    events: list[Any] = []
    prepared = prepare(recipe)
    run(prepared, on_event=events.append)
    plan = prepared.plan
    stages: dict[str, dict[str, float]] = {}
    for e in events:
        if type(e).__name__ == "StageDone":
            stage = stages.setdefault(e.stage, {"seconds": 0.0, "peak_gib": 0.0})
            stage["seconds"] += e.seconds
            stage["peak_gib"] = max(stage["peak_gib"], e.peak_bytes / 2**30)
    steps = [e for e in events if type(e).__name__ == "StepDone"]
    later = sorted(e.seconds for e in steps[3:] or steps)
    return {
        "environment": environment(plan_device(plan)),
        "size": args.size,
        "form": args.form,
        "resolution": args.resolution,
        "decisions": {d.id: d.value for d in plan.decisions},
        "make_base_seconds": made,
        "stages": stages,
        "predicted_gib": {p: plan.ledger.peak(p) / 2**30 for p in ("text", "latents", "train", "sample")},
        "predicted_step_ms": plan.time.step_ms if plan.time else None,
        "first_step_ms": 1e3 * steps[0].seconds,
        "step_ms_median": 1e3 * later[len(later) // 2],
        "losses": [e.loss for e in steps],
    }


def recipe_text(base: Path, args: argparse.Namespace, scratch: Path) -> str:
    """A recipe over the shipped photographs."""
    pictures = recipes() / "quickstart"
    prompt = pictures / "prompts" / "cat-with-cup.icap"
    tables: dict[str, list[str]] = {
        "model": [f'base = "{base}"'],
        "data": [f'images = "{pictures}"', f"resolution = {args.resolution}", "upscale_limit = 99.0"],
        "adapter": ["rank = 32"],
        "train": [f"steps = {args.steps}", "checkpoint_every = 1000"],
        "memory": [],
        "validate": [f'prompts = ["{prompt}"]', 'preset = "turbo"', "every = 1000"],
        "output": [f'folder = "{scratch / "out"}"'],
    }  # fmt: skip
    for setting in args.set:
        key, _, value = setting.partition("=")
        table, _, name = key.partition(".")
        tables[table] = [line for line in tables[table] if not line.startswith(f"{name} ")] + [
            f"{name} = {value}"
        ]
    return "\n".join(f"[{table}]\n" + "\n".join(lines) + "\n" for table, lines in tables.items())


if __name__ == "__main__":
    main()
