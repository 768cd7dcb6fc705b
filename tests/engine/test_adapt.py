"""Adapters of every kind: what they start from, that they learn, and that training goes on exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from ideoflow.engine.adapt import add_adapter, base_weight, trained_updates
from ideoflow.model.load import load_transformer
from ideoflow.resources import recipes
from ideoflow.workflow import prepare, run

CPU = torch.device("cpu")

KINDS = {
    "lora": {"adapter.rank": 4, "adapter.init": "gaussian"},
    "dora": {"adapter.kind": "dora", "adapter.rank": 4},
    "lokr": {"adapter.kind": "lokr", "adapter.rank": 4, "adapter.init": "lycoris"},
    "lokr full": {"adapter.kind": "lokr", "adapter.full_matrix": True},
    "loha": {"adapter.kind": "loha", "adapter.rank": 2},
}


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_from_the_base_and_in_float32(nano: Any, plan_of: Any, kind: str, precision: str) -> None:
    model = load_transformer(nano.folder, precision=precision, device=CPU)
    trained = add_adapter(model, plan_of(**KINDS[kind]))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    # Random factors have no fewer values than bf16 gives them: e4m3 would leave them a few dozen.
    assert all(p.unique().numel() > p.numel() // 8 for p in trained.values() if p.any() and p.numel() < 800)
    for name, update in trained_updates(model).items():
        weight = base_weight(model.get_submodule(name))
        torch.testing.assert_close(update.merged(weight), weight, rtol=1e-5, atol=1e-6)


STARTS = {
    "lora": LoraConfig(init_lora_weights="gaussian", r=4, lora_alpha=4),
    "dora": LoraConfig(use_dora=True, r=4, lora_alpha=4),
    "lokr": LoKrConfig(init_weights="lycoris", r=4, alpha=4),
    "lokr full": LoKrConfig(r=512, alpha=512),
    "loha": LoHaConfig(r=2, alpha=2),
}


@pytest.mark.parametrize("kind", STARTS)
def test_it_starts_as_peft_starts_it(nano: Any, plan_of: Any, kind: str) -> None:
    plan = plan_of(**KINDS[kind])
    ours, theirs = (load_transformer(nano.folder, precision="float32", device=CPU) for _ in range(2))
    add_adapter(ours, plan)
    torch.manual_seed(plan.tables.train.seed)
    config = STARTS[kind]
    config.target_modules = list(plan.targets)
    theirs.add_adapter(config)
    shared = ("to_k.lokr_w2", "to_v.lokr_w2")  # of to_q, here
    found = {name: p for name, p in ours.named_parameters() if not any(s in name for s in shared)}
    for name, expected in theirs.named_parameters():
        if name in found:
            assert torch.equal(found[name], expected), name


def test_rows_of_an_fp8_base_are_measured_with_their_scales(nano: Any, plan_of: Any) -> None:
    lengths = []
    for precision in ("float32", "fp8"):
        model = load_transformer(nano.folder, precision=precision, device=CPU)
        add_adapter(model, plan_of(**KINDS["dora"]))
        lengths.append(torch.cat([u.lengths for u in trained_updates(model).values()]))
    torch.testing.assert_close(*lengths, rtol=0.03, atol=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("coffee", "rocket"):
        shutil.copy(recipes() / "quickstart" / f"{name}.jpg", folder)
        (folder / f"{name}.icap").write_text(f"A photograph of a {name}.\nbackground: Plain.\n")
    return folder


def trained(pictures: Path, folder: Path, kind: str, steps: int) -> dict[str, Tensor]:
    adapter = "\n".join(
        f"{k.partition('.')[2]} = {str(v).lower() if isinstance(v, bool) else repr(v)}"
        for k, v in KINDS[kind].items()
    )
    recipe = folder.with_suffix(".toml")
    recipe.write_text(f"""
[model]
base = "nano"
[data]
images = "{pictures}"
resolution = 64
[adapter]
{adapter}
[train]
steps = {steps}
learning_rate = 1e-2
checkpoint_every = 1
[output]
folder = "{folder}"
dtype = "float32"
name = "a"
""")
    made = run(prepare(recipe))
    assert made.adapter is not None
    return load_file(made.adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_goes_on_exactly(pictures: Path, tmp_path: Path, kind: str) -> None:
    begun = trained(pictures, tmp_path / "halves", kind, 2)
    resumed = trained(pictures, tmp_path / "halves", kind, 3)
    straight = trained(pictures, tmp_path / "whole", kind, 3)
    assert resumed.keys() == straight.keys() == begun.keys()
    assert all(torch.equal(resumed[k], straight[k]) for k in straight)
    assert all(not torch.equal(begun[k], straight[k]) for k in straight)
