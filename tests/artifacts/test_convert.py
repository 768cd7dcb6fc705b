"""Between all forms and back: the same updates, bit for bit where nothing is multiplied in."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ideoflow.artifacts.adapter_file import for_form, read_adapter, write_adapter
from ideoflow.artifacts.merge import base_weights, find_base
from ideoflow.artifacts.names import FORMS, read_key, write_key
from ideoflow.artifacts.updates import Lora, join
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes.artifacts import CANNOT_CONVERT
from ideoflow.engine.adapt import trained_updates

KINDS = {
    "lora": "rank = 2\nalpha = 3",
    "dora": 'kind = "dora"\nrank = 2\nalpha = 3\ntargets = "attention"',
    "loha": 'kind = "loha"\nrank = 2\nalpha = 3',
    "lokr": 'kind = "lokr"\nrank = 2\nalpha = 3',
    "full": 'kind = "lokr"\nfull_matrix = true',
}


def deltas(updates: dict[str, Any]) -> dict[str, Tensor]:
    """Dense changes by module, q, k and v apart."""
    found = {}
    for module, update in updates.items():
        if module.endswith("qkv"):
            for part, rows in zip("qkv", update.delta().chunk(3), strict=True):
                found[module.replace("qkv", f"to_{part}")] = rows
        else:
            found[module] = update.delta()
    return found


def place(folder: Path, name: str, form: str) -> Path:
    return folder / (name if form == "peft" else f"{name}.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_and_back(adapted: Any, tmp_path: Path, kind: str) -> None:
    updates = trained_updates(adapted(KINDS[kind]))
    forms = [f for f in FORMS if not (f == "diffusers" and kind == "loha")]
    weight = base_weights(find_base("nano"))
    expected = deltas(updates)
    files = {form: place(tmp_path, form, form) for form in forms}
    for form, file in files.items():
        write_adapter(file, for_form(updates, form, weight), form, torch.float32)
    for (first, file), second in product(files.items(), forms):
        other = place(tmp_path, f"{first}-{second}", second)
        read = read_adapter(file)
        assert read.form == first
        write_adapter(other, for_form(read.updates, second, weight), second, torch.float32)
        found = read_adapter(other)
        assert found.form == second and found.kinds == read.kinds
        for module, delta in deltas(found.updates).items():
            torch.testing.assert_close(delta, expected[module], rtol=1e-5, atol=1e-6)
        lengths = [u.lengths for u in for_form(found.updates, "peft", weight).values() if isinstance(u, Lora)]
        if kind == "dora":
            ours = [u.lengths for u in updates.values()]
            torch.testing.assert_close(torch.cat(lengths).sort().values, torch.cat(ours).sort().values)


def test_parting_and_joining_qkv_gives_back_the_very_file(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    key = "diffusion_model.layers.3.attention.qkv"
    state = {
        f"{key}.lora_A.weight": torch.randn(4, 24, generator=g).bfloat16(),
        f"{key}.lora_B.weight": torch.randn(72, 4, generator=g).bfloat16(),
        f"{key}.alpha": torch.tensor(2.0),  # a power of two times the rank: nothing is rounded
    }
    save_file(state, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    split = write_adapter(tmp_path / "b.safetensors", adapter.updates, "diffusers", adapter.dtype)
    assert load_file(split)["transformer.layers.3.attention.to_k.lora_B.weight"].shape == (24, 4)
    back = write_adapter(tmp_path / "c.safetensors", read_adapter(split).updates, "comfyui", adapter.dtype)
    found = load_file(back)
    assert torch.equal(found[f"{key}.lora_A.weight"], state[f"{key}.lora_A.weight"])
    assert torch.equal(found[f"{key}.lora_B.weight"] * 2, state[f"{key}.lora_B.weight"])
    kohya = write_adapter(tmp_path / "d.safetensors", adapter.updates, "kohya", adapter.dtype)
    names = load_file(kohya)
    assert torch.equal(
        names["lora_unet_layers_3_attention_qkv.lora_up.weight"], state[f"{key}.lora_B.weight"]
    )
    assert float(names["lora_unet_layers_3_attention_qkv.alpha"]) == 2.0


def test_names_that_others_write_are_known() -> None:
    for key, module, tensor in (
        ("layers.0.attention.o.lora_A.weight", "layers.0.attention.to_out.0", "down"),
        ("model.diffusion_model.layers.12.feed_forward.w2.lora_up.weight", "layers.12.feed_forward.w2", "up"),
        ("lycoris_layers_1_feed_forward_w1.lokr_w2_b", "layers.1.feed_forward.w1", "w2_b"),
        ("lora_unet_layers_33_attention_to_out_0.alpha", "layers.33.attention.to_out.0", "alpha"),
        ("transformer.layers.2.attention.to_q.lora_B.default.weight", "layers.2.attention.to_q", "up"),
        ("base_model.model.layers.2.adaln_modulation.hada_w1_a", "layers.2.adaln_modulation", "w1_a"),
    ):
        found = read_key(key)
        assert found is not None and (found.module, found.tensor) == (module, tensor)
    for key in ("diffusion_model.input_proj.lora_A.weight", "lora_unet_double_blocks_0.lora_up.weight",
                "transformer.layers.0.attention.to_q.bias"):  # fmt: skip
        assert read_key(key) is None


TENSORS = [("lora", "down"), ("dora", "lengths"), ("loha", "w2_b"), ("lokr", "w1"), ("lora", "alpha")]


@pytest.mark.parametrize("form", FORMS)
def test_a_written_key_is_read_back(form: Any) -> None:
    for module in ("layers.7.attention.to_out.0", "layers.7.feed_forward.w3"):
        for kind, tensor in (
            ("lora", "down"),
            ("dora", "lengths"),
            ("loha", "w2_b"),
            ("lokr", "w1"),
            ("lora", "alpha"),
        ):
            found = read_key(write_key(form, module, tensor, kind))
            assert found is not None and (found.form, found.module, found.tensor) == (form, module, tensor)


def refused(code: Any, work: Any) -> str:
    with pytest.raises(IdeoflowError) as caught:
        work()
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is code and diagnostic.cure
    return diagnostic.message


def test_what_has_no_exact_form_is_refused(adapted: Any, tmp_path: Path) -> None:
    dora = trained_updates(adapted(KINDS["dora"]))
    assert "base" in refused(CANNOT_CONVERT, lambda: for_form(dora, "comfyui"))
    loha = trained_updates(adapted(KINDS["loha"]))
    file = tmp_path / "a.safetensors"
    assert "LoHa" in refused(CANNOT_CONVERT, lambda: write_adapter(file, loha, "diffusers", torch.float32))
    first = trained_updates(adapted(KINDS["lokr"]))
    apart = {name: u for name, u in first.items() if name.startswith("layers.0.attention")}
    other = trained_updates(adapted(KINDS["lokr"], seed=1))
    apart["layers.0.attention.to_k"] = other["layers.0.attention.to_k"]
    message = refused(CANNOT_CONVERT, lambda: write_adapter(file, apart, "comfyui", torch.float32))
    assert "layers.0.attention.to_" in message and "Kronecker" in message
    assert not file.exists()


def test_joined_updates_are_the_rows_of_their_parts(adapted: Any) -> None:
    updates = trained_updates(adapted("rank = 2\nalpha_pattern = { '*.to_k' = 5 }"))
    parts = [updates["layers.0.attention.to_q"], None, updates["layers.0.attention.to_k"]]
    whole = join(parts)
    q, k, v = whole.delta().chunk(3)
    assert whole.rank == 4 and not k.any()
    torch.testing.assert_close(q, parts[0].delta())
    torch.testing.assert_close(v, parts[2].delta())


def test_joined_updates_come_apart_with_their_own_ranks() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [Lora(torch.randn(r, 24, generator=g), torch.randn(16, r, generator=g), 0.5) for r in (2, 3, 4)]
    for found, part in zip(join(parts).thirds(), parts, strict=True):
        assert found.rank == part.rank
        torch.testing.assert_close(found.delta(), part.delta())
    untrained = [Lora(p.down, torch.zeros_like(p.up)) for p in parts]
    assert [part.rank for part in join(untrained).thirds()] == [9, 9, 9], "a rank of 0 is no adapter"
