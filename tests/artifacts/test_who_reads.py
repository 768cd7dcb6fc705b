"""What ``adapter info`` says of who loads a file, held to diffusers' own loader and to ComfyUI's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_readers import comfyui, dense, load_in_diffusers, original_layout
from diffusers import Ideogram4Transformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ideoflow.artifacts.adapter_file import read_adapter, write_adapter
from ideoflow.artifacts.info import describe
from ideoflow.artifacts.merge import find_base, merge
from ideoflow.model.base import BaseFacts

FUSED = ("attention.qkv", "attention.o", "feed_forward.w2")
APART = ("attention.to_k", "attention.to_out.0", "feed_forward.w2")
COMFYUI, DIFFUSERS, BOTH, NEITHER = "ComfyUI, not", "diffusers, not", "ComfyUI and diffusers", "neither"
BY_TRANSFORMER = "diffusers, with transformer.load_lora_adapter, not"
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def lora(prefix: str, modules: tuple[str, ...], names: tuple[str, str] = AB, *more: str) -> dict[str, Tensor]:
    """A LoRA of rank 2 in block 1, spelt so; ``more``: further tensors of each module."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for module in modules:
        key = f"{prefix}layers.1.{module}"
        if prefix.endswith("_"):
            key = key.replace(".", "_")
        rows, columns = (3 if "qkv" in module else 1) * 192, 512 if module.endswith("w2") else 192
        state[f"{key}.{names[0]}"] = torch.randn(2, columns, generator=g)
        state[f"{key}.{names[1]}"] = torch.randn(rows, 2, generator=g)
        sizes = {"alpha": (), "dora_scale": (rows, 1), "lora_magnitude_vector": (rows,)}
        state |= {f"{key}.{name}": torch.full(sizes[name], 1.5) for name in more}
    return state


def lokr(prefix: str, module: str, *more: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    key = f"{prefix}layers.1.{module}"
    state = {f"{key}.lokr_w1": torch.randn(12, 12, generator=g), f"{key}.lokr_w2_a": torch.randn(16, 2),
             f"{key}.lokr_w2_b": torch.randn(2, 16, generator=g)}  # fmt: skip
    return state | {f"{key}.{name}": torch.tensor(1.0) for name in more}


LENGTHS = lora("transformer.", APART[1:], AB, "lora_magnitude_vector")
FILES: dict[str, tuple[dict[str, Tensor], str]] = {
    "comfyui": (lora("diffusion_model.", FUSED), BOTH),
    "comfyui, alpha": (lora("diffusion_model.", FUSED, AB, "alpha"), BOTH),
    "comfyui, down and up": (lora("diffusion_model.", FUSED, DOWN_UP, "alpha"), BOTH),
    "comfyui, apart": (lora("diffusion_model.", APART), NEITHER),
    "comfyui, to_out": (lora("diffusion_model.", ("attention.to_out.0",)), NEITHER),
    "comfyui, lengths": (lora("diffusion_model.", FUSED, AB, "dora_scale"), NEITHER),
    "another prefix": (lora("model.diffusion_model.", FUSED), NEITHER),
    "conditional": (lora("conditional_transformer.", FUSED), DIFFUSERS),
    "conditional, no qkv": (lora("conditional_transformer.", FUSED[1:]), NEITHER),
    "diffusers": (lora("transformer.", APART), DIFFUSERS),
    "diffusers, alpha": (lora("transformer.", APART, AB, "alpha"), NEITHER),
    "diffusers, down and up": (lora("transformer.", APART, DOWN_UP), NEITHER),
    "diffusers, fused": (lora("transformer.", FUSED), NEITHER),
    "diffusers, o": (lora("transformer.", FUSED[1:]), NEITHER),
    "diffusers, lengths": (lora("transformer.", APART, AB, "lora_magnitude_vector"), DIFFUSERS),
    "diffusers, some lengths": (lora("transformer.", APART[:1]) | LENGTHS, NEITHER),
    "diffusers, lokr": (lokr("transformer.", "attention.to_q"), BY_TRANSFORMER),
    "diffusers, lokr, alpha": (lokr("transformer.", "attention.to_q", "alpha"), NEITHER),
    "diffusers, lokr, o": (lokr("transformer.", "attention.o"), NEITHER),
    "comfyui, lokr": (lokr("diffusion_model.", "attention.o", "alpha"), COMFYUI),
    "no prefix": (lora("", FUSED), DIFFUSERS),
    "no prefix, apart": (lora("", APART), NEITHER),
    "kohya": (lora("lora_unet_", FUSED, DOWN_UP, "alpha"), COMFYUI),
    "kohya, apart": (lora("lora_unet_", APART, DOWN_UP, "alpha"), NEITHER),
    "kohya, lengths": (lora("lora_unet_", FUSED, DOWN_UP, "dora_scale"), NEITHER),
    "lycoris": (lora("lycoris_", FUSED, DOWN_UP), NEITHER),
    "peft": (lora("base_model.model.", APART), NEITHER),
    "comfyui and diffusers": (lora("diffusion_model.", FUSED[:1]) | lora("transformer.", APART[1:]), NEITHER),
    "comfyui and kohya": (lora("diffusion_model.", FUSED[:1]) | lora("lora_unet_", FUSED[1:]), COMFYUI),
    "two spellings": (
        lora("diffusion_model.", FUSED[:1]) | lora("diffusion_model.", FUSED[1:], DOWN_UP), COMFYUI,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_info_says_who_loads_a_file(
    nano: BaseFacts, base: Ideogram4Transformer2DModel, tmp_path: Path, name: str
) -> None:
    state, words = FILES[name]
    file = tmp_path / "a.safetensors"
    save_file(state, file)
    found = describe(file)
    assert found.readers.startswith(words)
    assert bool(found.remarks) == (words == NEITHER or name == "comfyui and kohya")
    merge(read_adapter(file), find_base(str(nano.folder / "transformer")), tmp_path / "merged")
    meant = {k: v for f in (tmp_path / "merged").glob("*.safetensors") for k, v in load_file(f).items()}

    def same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
        return all(torch.allclose(weights[n], expected[n], rtol=1e-4, atol=1e-4) for n in expected)

    try:
        loads = same(dense(load_in_diffusers(nano, file, by_transformer="lokr" in name)), meant)
    except (ValueError, RuntimeError, KeyError, IndexError):
        loads = False
    assert loads == (words in (DIFFUSERS, BY_TRANSFORMER, BOTH))
    try:
        loads = same(comfyui(state, original_layout(base.state_dict())), original_layout(meant))
    except AssertionError:
        loads = False
    assert loads == (words in (COMFYUI, BOTH))


# What PEFT's configuration says -> whether PEFT then computes what ideoflow reads.
CONFIGS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "as written": ({}, True),
    "a regular expression": ({"target_modules": r"layers\.1\..*(to_k|to_out\.0|w2)"}, True),
    "rslora": ({"lora_alpha": 3, "use_rslora": True}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "nothing": (None, False),
    "another rank": ({"r": 4}, False),
    "another rank there": ({"rank_pattern": {"to_k": 3}}, False),
    "no rank": ({"r": None}, False),
    "no kind": ({"peft_type": None}, False),
    "an unknown kind": ({"peft_type": "SAILS"}, False),
    "loha": ({"peft_type": "LOHA"}, False),
    "dora": ({"use_dora": True}, False),
    "fewer modules": ({"target_modules": ["to_k"]}, False),
    "other modules": ({"target_modules": ["to_sail"]}, False),
    "another task": ({"task_type": "CAUSAL_LM"}, False),
    "megatron": ({"megatron_config": {"a": 1}, "megatron_core": "no_such_module"}, False),
    "pissa": ({"init_lora_weights": "pissa"}, False),
}


@pytest.mark.filterwarnings("ignore:Unexpected keyword", "ignore:Found missing adapter keys")
def test_info_says_whether_peft_loads_a_folder(nano: BaseFacts, base: Any, tmp_path: Path) -> None:
    save_file(lora("diffusion_model.", APART), tmp_path / "a.safetensors")
    updates = read_adapter(tmp_path / "a.safetensors").updates
    folder = write_adapter(tmp_path / "peft", updates, "peft", torch.float32)
    written = json.loads((folder / "adapter_config.json").read_text())
    for name, (changes, loads) in CONFIGS.items():
        config = {} if changes is None else written | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        found = describe(folder)
        assert (found.readers == "PEFT") == loads, name
        assert any("PEFT does not load it" in remark for remark in found.remarks) == (not loads), name
        model = Ideogram4Transformer2DModel.from_config(base.config)
        model.load_state_dict(base.state_dict())
        try:
            theirs = dense(PeftModel.from_pretrained(model, str(folder)).base_model.model)
        except Exception:
            assert not loads, name
            continue
        same = True
        for module, update in read_adapter(folder).updates.items():
            meant = base.get_submodule(module).weight + update.delta()
            same &= torch.allclose(theirs[f"{module}.weight"], meant, rtol=1e-4, atol=1e-4)
        assert same == loads, name
