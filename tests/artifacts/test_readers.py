"""Adapter files of every kind and form in what reads them: diffusers' loaders, PEFT's, ComfyUI's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_readers import comfyui, dense, load_in_diffusers, original_layout, velocities
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from ideoflow.artifacts.adapter_file import for_form, read_adapter, write_adapter
from ideoflow.artifacts.info import describe
from ideoflow.artifacts.names import FUSED
from ideoflow.artifacts.readers import readers
from ideoflow.artifacts.saved_config import PEFT_FILES
from ideoflow.engine.adapt import base_weight, trained_updates
from ideoflow.model.base import BaseFacts

PARTLY = 'targets = ["layers.*.attention.to_q", "layers.*.attention.to_v", "layers.0.feed_forward.w2"]'
SOME = 'targets = ["layers.*.attention.*", "layers.[12].feed_forward.*", "layers.0.adaln_modulation"]'
KINDS = {
    "lora": 'kind = "lora"\nrank = 4\nalpha = 8',
    "lora-partly": f"rank = 4\n{PARTLY}",
    "lora-modulations": f"rank = 4\nalpha = 3\n{SOME}",
    "lora-patterns": 'rank_pattern = { "*" = 4, "*.to_k" = 6, "*.w2" = 2 }\nalpha_pattern = { "*.to_v" = 1 }',
    "rslora": "rank = 4\nalpha = 3\nrslora = true",
    "dora": f'kind = "dora"\nrank = 4\nalpha = 6\n{SOME}',
    "dora-partly": f'kind = "dora"\nrank = 4\n{PARTLY}',
    "loha": f'kind = "loha"\nrank = 3\nalpha = 2\n{SOME}',
    "loha-partly": f'kind = "loha"\nrank = 3\n{PARTLY}',
    "lokr": f'kind = "lokr"\nrank = 4\nalpha = 3\n{SOME}',
    "lokr-partly": f'kind = "lokr"\nrank = 4\n{PARTLY}',
    "lokr-full": 'kind = "lokr"\nfull_matrix = true\nfactor = 8',
    "lokr-both": 'kind = "lokr"\nrank = 2\nalpha = 3\ndecompose_both = true',
}


def written(model: torch.nn.Module, file: Path, form: Any) -> Path:
    updates = {name: update.folded() for name, update in trained_updates(model).items()}
    updates = for_form(updates, form, lambda m: base_weight(model.get_submodule(m)))
    return write_adapter(file, updates, form, torch.float32, {"ideoflow.base": "nano"})


@pytest.mark.parametrize("form", FUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_finds_every_key_and_computes_the_same_weights(
    base: Ideogram4Transformer2DModel, adapted: Any, tmp_path: Path, kind: str, form: str
) -> None:
    model = adapted(KINDS[kind])
    file = written(model, tmp_path / "a.safetensors", form)
    assert readers(file).words.startswith("ComfyUI")
    merged, expected = (
        comfyui(load_file(file), original_layout(base.state_dict())),
        original_layout(dense(model)),
    )
    assert merged.keys() == expected.keys()
    assert any(not torch.equal(merged[n], original_layout(base.state_dict())[n]) for n in merged)
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith(("lora", "rslora"))])
def test_the_one_file_that_both_read_gives_the_same_velocities(
    nano: BaseFacts, base: Ideogram4Transformer2DModel, adapted: Any, tmp_path: Path, kind: str
) -> None:
    model = adapted(KINDS[kind])
    file = written(model, tmp_path / "a.safetensors", "comfyui")
    ours, before = velocities(model), velocities(base)
    assert (ours - before).norm() > 0.1 * before.norm()  # the adapter does something
    torch.testing.assert_close(ours, velocities(load_in_diffusers(nano, file)), rtol=1e-4, atol=1e-4)
    with safe_open(file, "pt") as tensors:
        assert tensors.metadata()["ideoflow.base"] == "nano"


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("loha")])
def test_diffusers_own_form_gives_the_same_velocities(
    nano: BaseFacts, adapted: Any, tmp_path: Path, kind: str
) -> None:
    model = adapted(KINDS[kind])
    file = written(model, tmp_path / "a.safetensors", "diffusers")
    assert readers(file).words.startswith("diffusers")
    theirs = load_in_diffusers(nano, file, by_transformer=kind.startswith("lokr"))
    torch.testing.assert_close(velocities(model), velocities(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_its_own_form(nano: BaseFacts, adapted: Any, tmp_path: Path, kind: str) -> None:
    model = adapted(KINDS[kind])
    folder = written(model, tmp_path / "a", "peft")
    assert describe(folder).readers == describe(folder / PEFT_FILES[1]).readers == "PEFT"
    plain = Ideogram4Transformer2DModel.from_pretrained(nano.folder, subfolder="transformer")
    loaded = PeftModel.from_pretrained(plain, folder)
    torch.testing.assert_close(velocities(model), velocities(loaded.base_model.model), rtol=1e-4, atol=1e-4)
    again = read_adapter(folder)
    assert again.form == "peft" and again.kinds == sorted({u.kind for u in trained_updates(model).values()})


def test_a_file_that_diffusers_saved_has_the_strength_of_its_metadata(adapted: Any, tmp_path: Path) -> None:
    model = adapted(KINDS["lora-patterns"])
    metadata = model.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(model, adapter_name="default")
    Ideogram4Pipeline.save_lora_weights(
        tmp_path, layers, transformer_lora_adapter_metadata=json.loads(json.dumps(metadata, default=list))
    )
    (file,) = tmp_path.iterdir()
    read, ours = read_adapter(file).updates, trained_updates(model)
    assert read.keys() == ours.keys() and len({u.scale for u in read.values()}) > 1
    for name, update in read.items():
        torch.testing.assert_close(update.delta(), ours[name].delta())


def test_the_file_can_be_bf16(adapted: Any, tmp_path: Path) -> None:
    updates = trained_updates(adapted("rank = 2\ntargets = 'mlp'"))
    file = write_adapter(tmp_path / "a.safetensors", updates, "comfyui", torch.bfloat16)
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
