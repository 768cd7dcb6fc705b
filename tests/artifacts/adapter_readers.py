"""What other programs do with an adapter file, for the tests: ComfyUI's published rules, and velocities.

ComfyUI's are written from ``comfy/lora.py`` (``model_lora_keys_unet``, ``load_lora``) and
``comfy/weight_adapter/{lora,loha,lokr,base}.py`` at v0.3.77: the model's own names with ``diffusion_model.``
in front, or with ``lora_unet_`` and underscores; ``weight += strength * alpha / rank * difference``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from ideoflow.model.base import BaseFacts


def velocities(model: Ideogram4Transformer2DModel) -> Tensor:
    """Of one picture of 4 x 4 tokens and a caption of 7, always the same."""
    g = torch.Generator().manual_seed(5)
    positions, segments, indicator = Ideogram4Pipeline._prepare_ids([7], 4, 4, 7, torch.device("cpu"))
    with torch.no_grad():
        out: Tensor = model(
            hidden_states=torch.randn(1, 23, 128, generator=g),
            timestep=torch.tensor([0.3]),
            encoder_hidden_states=torch.randn(1, 23, 416, generator=g),
            position_ids=positions,
            segment_ids=segments,
            indicator=indicator,
        ).sample
    return out[:, 7:]


def load_in_diffusers(
    base: BaseFacts, file: Path, *, by_transformer: bool = False
) -> Ideogram4Transformer2DModel:
    """The transformer after diffusers' own loader: the pipeline's, or the transformer's own."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "vae", "unconditional_transformer"))
    pipeline = Ideogram4Pipeline.from_pretrained(base.folder, **absent)
    if by_transformer:
        pipeline.transformer.load_lora_adapter(load_file(file))
    else:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return pipeline.transformer


def dense(model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights with the adapter merged by PEFT itself."""
    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.merge()
    state = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if not any(x in k for x in ("lora_", "lokr_", "hada_"))}


def original_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers state dict under the original names: q, k, v rows stacked in ``attention.qkv``."""
    out = {}
    for name, value in state.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [state[name.replace("to_q", p)] for p in ("to_q", "to_k", "to_v")]
            out[name.replace("to_q", "qkv")] = torch.cat(parts)
        else:
            out[name.replace("to_out.0", "o")] = value
    return out


def comfyui(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that ComfyUI computes with; every key must be one that it finds."""
    merged, used = dict(base), set()
    for name, weight in base.items():
        if not name.endswith(".weight"):
            continue
        own = name.removesuffix(".weight")
        for key in (f"diffusion_model.{own}", f"lora_unet_{own.replace('.', '_')}"):
            mine = {k.removeprefix(f"{key}."): v.float() for k, v in state.items() if k.startswith(f"{key}.")}
            found = _difference(mine)
            if found is None:
                continue
            difference, rank = found
            scale = float(mine["alpha"]) / rank if "alpha" in mine and rank else 1.0
            if "dora_scale" in mine:
                merged[name] = _decompose(mine["dora_scale"], weight, scale * difference)
            else:
                merged[name] = weight + scale * difference.reshape(weight.shape)
            used |= {f"{key}.{k}" for k in mine}
    assert used == set(state), f"ComfyUI would not find {sorted(set(state) - used)[:3]}"
    return merged


def _difference(mine: dict[str, Tensor]) -> tuple[Tensor, int | None] | None:
    for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
        if up in mine:
            return mine[up] @ mine[down], mine[down].shape[0]
    if "hada_w1_a" in mine:
        first, second = (mine[f"hada_w{n}_a"] @ mine[f"hada_w{n}_b"] for n in (1, 2))
        return first * second, mine["hada_w1_b"].shape[0]
    if not any(k.startswith("lokr_") for k in mine):
        return None
    factors, rank = [], None
    for n in (1, 2):
        if f"lokr_w{n}" in mine:
            factors.append(mine[f"lokr_w{n}"])
        else:
            factors.append(mine[f"lokr_w{n}_a"] @ mine[f"lokr_w{n}_b"])
            rank = mine[f"lokr_w{n}_b"].shape[0]
    return torch.kron(*factors), rank


def _decompose(dora_scale: Tensor, weight: Tensor, difference: Tensor) -> Tensor:
    changed = weight + difference
    if dora_scale.shape[0] == changed.shape[0]:  # on the output axis, and by the norm of the unchanged weight
        norm = weight.norm(dim=1, keepdim=True)
    else:
        norm = changed.norm(dim=0, keepdim=True)
    return changed * (dora_scale / (norm + torch.finfo(weight.dtype).eps))
