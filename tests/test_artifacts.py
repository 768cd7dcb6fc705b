"""Adapter files against diffusers' loader and ComfyUI's key map; checkpoints against crashes and damage."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ideoflow.artifacts import Checkpoints, fused_state, lora_factors, set_aside, write_adapter
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes.artifacts import DAMAGED_CHECKPOINT, OTHER_RUN, UNWRITABLE
from ideoflow.model.base import NANO_TRANSFORMER, BaseFacts, locate_base
from ideoflow.model.hub import fetch_base
from ideoflow.model.spec import TARGET_SETS, match_targets

ALL = list(TARGET_SETS["all"])


@pytest.fixture(scope="module")
def nano() -> BaseFacts:
    return fetch_base(locate_base("nano"))


def adapted(
    nano: BaseFacts, targets: list[str], rank: int = 4, alpha: float = 8
) -> Ideogram4Transformer2DModel:
    model = Ideogram4Transformer2DModel.from_pretrained(nano.folder, subfolder="transformer")
    matched = match_targets([f"layers.*.{t}" for t in targets], NANO_TRANSFORMER)
    names = [name for modules in matched.values() for name in modules]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names))
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def lora(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def velocities(model: Ideogram4Transformer2DModel) -> Tensor:
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


@pytest.mark.parametrize(
    "targets",
    [
        ALL,
        ["attention.to_k", "feed_forward.w2"],
        ["attention.to_q", "attention.to_v"],
        ["attention.to_out.0", "adaln_modulation"],
    ],
)
def test_diffusers_loads_the_file_and_predicts_the_same_velocities(
    nano: BaseFacts, tmp_path: Path, targets: list[str]
) -> None:
    model = adapted(nano, targets)
    file = tmp_path / "a.safetensors"
    write_adapter(file, lora_factors(lora(model)), 8 / 4, torch.float32, {"ideoflow.base": "nano"})
    pipeline = Ideogram4Pipeline.from_pretrained(nano.folder)
    before = velocities(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    ours, theirs = velocities(model), velocities(pipeline.transformer)
    assert (ours - before).norm() > 0.1 * before.norm()  # the adapter does something
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with safe_open(file, "pt") as tensors:
        assert tensors.metadata()["ideoflow.base"] == "nano"


def comfy_merge(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's rule, written from its key map: KEY.lora_A/B on ``diffusion_model.`` + the model's own names.

    The model there is the original layout with fused qkv; W += alpha / rank * B @ A, 1 without an alpha.
    """
    merged, used = dict(base), set()
    for name, weight in base.items():
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        a, b = state.get(f"{key}.lora_A.weight"), state.get(f"{key}.lora_B.weight")
        if a is not None and b is not None:
            merged[name] = weight + b @ a
            used |= {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    assert used == set(state), f"ComfyUI would not find {sorted(set(state) - used)}"
    return merged


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


@pytest.mark.parametrize(
    "targets", [ALL, ["attention.to_v"], ["attention.to_q", "attention.to_k", "adaln_modulation"]]
)
def test_comfyui_finds_every_key_and_merges_the_same_weights(nano: BaseFacts, targets: list[str]) -> None:
    model = adapted(nano, targets)
    base = Ideogram4Transformer2DModel.from_pretrained(nano.folder, subfolder="transformer").state_dict()
    state = fused_state(lora_factors(lora(model)), 2.0, torch.float32)
    merged = comfy_merge(state, original_layout(base))
    model.fuse_lora()
    model.unload_lora()
    expected = original_layout(model.state_dict())
    assert merged.keys() == expected.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-5, atol=1e-6)


def tensors(value: float) -> dict[str, Tensor]:
    return {"w": torch.full((5,), value)}


IDENTITY = {"base": "b", "rank": 4}


def test_checkpoints_come_back_and_old_ones_go(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, IDENTITY, keep=2)
    for step in (1, 2, 3):
        store.save(step, tensors(step), tensors(10 * step), {"recipe": "r"})
    found, warnings = store.newest()
    assert found is not None and not warnings
    assert found.step == 3 and torch.equal(found.adapter["w"], tensors(3)["w"])
    assert torch.equal(found.optimizer["w"], tensors(30)["w"]) and found.facts == {"recipe": "r"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    store = Checkpoints(tmp_path, IDENTITY, keep=3)
    store.save(1, tensors(1), tensors(1), {})
    file = store.save(2, tensors(2), tensors(2), {}) / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x40
        file.write_bytes(content)
    found, warnings = store.newest()
    if name == "state.json" and damage == "flip":
        assert found is not None  # one flipped bit of a JSON text may still be the same facts
    else:
        assert found is not None and found.step == 1
        assert [w.code for w in warnings] == [DAMAGED_CHECKPOINT]


def test_another_run_is_not_continued_and_can_be_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Checkpoints(folder / "checkpoints", IDENTITY, keep=1).save(1, tensors(1), tensors(1), {})
    with pytest.raises(IdeoflowError) as caught:
        Checkpoints(folder / "checkpoints", {"base": "b", "rank": 8}, keep=1).newest()
    assert [d.code for d in caught.value.diagnostics] == [OTHER_RUN]
    assert "rank" in caught.value.diagnostics[0].message
    first, second = set_aside(folder), set_aside(folder)
    assert first is not None and first.name == "out.old-1" and second is None
    assert (first / "checkpoints" / "step-000001" / "state.json").exists()


def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        store = Checkpoints(disk, IDENTITY, keep=2)
        store.save(1, tensors(1), tensors(1), {})
        with pytest.raises(IdeoflowError) as caught:
            store.save(2, {"w": torch.zeros(50_000)}, tensors(2), {})
        assert [d.code for d in caught.value.diagnostics] == [UNWRITABLE]
        found, _ = store.newest()
        assert found is not None and found.step == 1
        assert [p.name for p in disk.iterdir()] == ["step-000001"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_killed_while_writing_the_last_good_checkpoint_is_there(tmp_path: Path) -> None:
    """A child writes checkpoints without end; SIGKILL at odd moments never leaves a broken newest one."""
    child = textwrap.dedent(f"""
        import torch
        from pathlib import Path
        from ideoflow.artifacts import Checkpoints
        store = Checkpoints(Path({str(tmp_path)!r}), {IDENTITY!r}, keep=2)
        found, _ = store.newest()
        step = found.step if found else 0
        print("ready", flush=True)
        while True:
            step += 1
            adapter = {{"w": torch.full((400_000,), float(step))}}
            store.save(step, adapter, {{"m": torch.zeros(400_000)}}, {{}})
    """)
    last = 0
    for wait in (0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found, warnings = Checkpoints(tmp_path, IDENTITY, keep=2).newest()
        assert not warnings
        step = found.step if found else 0
        assert step >= last
        if found:
            assert torch.equal(found.adapter["w"], torch.full((400_000,), float(step)))
        last = step
    assert last > 0


def test_files_hold_no_pickle(nano: BaseFacts, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, IDENTITY, keep=1)
    place = store.save(1, tensors(1), tensors(1), {})
    assert {p.suffix for p in place.iterdir()} == {".safetensors", ".json"}
    json.loads((place / "state.json").read_text())
    assert load_file(place / "adapter.safetensors").keys() == {"w"}


def test_the_adapter_file_can_be_bf16(nano: BaseFacts, tmp_path: Path) -> None:
    factors: Any = lora_factors(lora(adapted(nano, ["feed_forward.w1"])))
    file = write_adapter(tmp_path / "a.safetensors", factors, 1.0, torch.bfloat16, {})
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
