"""Damaged and foreign adapter files: a diagnostic that names the file and the key; nothing is unpickled."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from ideoflow.artifacts.adapter_file import read_adapter, write_adapter
from ideoflow.artifacts.resize import resize
from ideoflow.artifacts.updates import Lora
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes.artifacts import CANNOT_CONVERT, DAMAGED_ADAPTER, NOT_AN_ADAPTER

LORA, LOKR, LOHA = (f"diffusion_model.layers.0.feed_forward.{w}" for w in ("w1", "w2", "w3"))


def whole() -> dict[str, Tensor]:
    ones = torch.ones
    return {
        f"{LORA}.lora_A.weight": ones(2, 8), f"{LORA}.lora_B.weight": ones(12, 2),
        f"{LORA}.alpha": torch.tensor(2.0),
        f"{LOKR}.lokr_w1": ones(2, 2), f"{LOKR}.lokr_w2_a": ones(4, 2), f"{LOKR}.lokr_w2_b": ones(2, 6),
        f"{LOHA}.hada_w1_a": ones(12, 2), f"{LOHA}.hada_w1_b": ones(2, 8),
        f"{LOHA}.hada_w2_a": ones(12, 2), f"{LOHA}.hada_w2_b": ones(2, 8),
    }  # fmt: skip


Damage = Callable[[dict[str, Tensor]], Any]


def drop(key: str) -> Damage:
    return lambda state: state.pop(key)


def put(key: str, value: Tensor) -> Damage:
    return lambda state: state.update({key: value})


def qkv_of(**shapes: tuple[int, int]) -> Damage:
    names = {name: f"{name}.weight" if name.startswith("lora") else name for name in shapes}
    key = "diffusion_model.layers.0.attention.qkv"
    return lambda state: state.update({f"{key}.{names[n]}": torch.ones(*s) for n, s in shapes.items()})


def qkv_twice(state: dict[str, Tensor]) -> None:
    for module in ("qkv", "to_k"):
        for factor, shape in (("A", (2, 6)), ("B", (6, 2))):
            state[f"diffusion_model.layers.0.attention.{module}.lora_{factor}.weight"] = torch.ones(*shape)


A, OTHER = f"{LORA}.lora_A.weight", "diffusion_model.input_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no partner": (drop(f"{LORA}.lora_B.weight"), ("layers.0.feed_forward.w1", "up is missing")),
    "no half": (drop(f"{LOKR}.lokr_w2_b"), ("feed_forward.w2", "w2_b is missing")),
    "no factor": (drop(f"{LOKR}.lokr_w1"), ("feed_forward.w2", "w1 is missing")),
    "three quarters": (drop(f"{LOHA}.hada_w2_a"), ("feed_forward.w3", "w2_a is missing")),
    "one and two": (put(f"{LOKR}.lokr_w2", torch.ones(4, 6)), ("w2", "as one and in two")),
    "extra": (put(OTHER, torch.ones(2, 2)), (OTHER, "not known")),
    "bias": (put(f"{LORA}.lora_B.bias", torch.ones(12)), (f"{LORA}.lora_B.bias", "not known")),
    "integers": (put(A, torch.ones(2, 8, dtype=torch.int8)), (A, "int8")),
    "fp8": (put(A, torch.ones(2, 8).to(torch.float8_e4m3fn)), (A, "float8_e4m3fn")),
    "not finite": (put(A, torch.full((2, 8), float("nan"))), (A, "not finite")),
    "ranks": (put(A, torch.ones(3, 8)), ("w1", "[12, 2]", "[3, 8]")),
    "a vector": (put(A, torch.ones(16)), ("w1", "[16]", "matrix")),
    "an empty one": (put(A, torch.ones(2, 0)), ("w1", "[2, 0]")),
    "rows": (put(f"{LOHA}.hada_w2_a", torch.ones(9, 2)), ("w3", "differ in their rows")),
    "columns": (put(f"{LOHA}.hada_w2_b", torch.ones(2, 9)), ("w3", "differ in their columns")),
    "alphas": (put(f"{LORA}.alpha", torch.ones(2)), ("w1", "alpha", "[2]")),
    "lengths": (put(f"{LORA}.dora_scale", torch.ones(1, 8)), ("w1", "[1, 8]", "number a row")),
    "lengths of a lokr": (put(f"{LOKR}.dora_scale", torch.ones(8, 1)), ("feed_forward.w2", "lokr")),
    "two kinds": (put(f"{LORA}.lokr_w1", torch.ones(2, 2)), ("feed_forward.w1", "lokr", "lora")),
    "two names": (put(f"{LORA}.lora_down.weight", torch.ones(2, 8)), ("w1", "twice")),
    "rows of qkv": (
        qkv_of(lora_A=(2, 6), lora_B=(7, 2)),
        ("diffusion_model.layers.0.attention.qkv", "7 rows"),
    ),
    "rows of a product": (qkv_of(lokr_w1=(2, 3), lokr_w2=(4, 2)), ("layers.0.attention.qkv", "8 rows")),
    "qkv twice": (qkv_twice, ("layers.0.attention.qkv", "as one and in parts")),
}


def refused(file: Path) -> Any:
    with pytest.raises(IdeoflowError) as caught:
        read_adapter(file)
    first = caught.value.diagnostics[0]
    assert first.cure and str(file) in first.message and first.span.path.startswith(str(file))
    return first


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    save_file(whole(), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert adapter.kinds == ["loha", "lokr", "lora"] and adapter.form == "comfyui"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_with_its_file_and_key(tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    state = whole()
    damage(state)
    file = tmp_path / "a.safetensors"
    save_file(state, file)
    found = refused(file)
    assert found.code is DAMAGED_ADAPTER
    assert all(word in found.message for word in words), found.message


CONFIGS = (
    "{", "[]", '{"r": 0}', '{"r": "many"}', '{"r": true}', '{"rank_pattern": 3}',
    '{"rank_pattern": {"*": 3}}',
    '{"alpha_pattern": {"(": 3}}', '{"r": 4, "lora_alpha": NaN}', '{"r": -4, "use_rslora": true}',
    '{"lora_alpha": 1%s}' % ("0" * 400), '{"r": 1e-300, "lora_alpha": 1e300}', "[" * 100_000,
)  # fmt: skip


def test_a_damaged_configuration_is_told(tmp_path: Path) -> None:
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    for text in CONFIGS:
        beside.unlink(missing_ok=True)
        save_file(whole(), file, {"lora_adapter_metadata": text})
        found = refused(file)
        assert found.code is DAMAGED_ADAPTER and re.search("lora_adapter_metadata|no rank", found.message)
        save_file(whole(), file)
        beside.write_text(text, encoding="utf-8")
        for path in (tmp_path, file):
            with pytest.raises(IdeoflowError) as caught:
                read_adapter(path)
            (found,) = caught.value.diagnostics
            assert str(beside) in found.message and found.cure, found.message


def test_a_configuration_beside_the_file_counts(tmp_path: Path) -> None:
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({name: tensor for name, tensor in whole().items() if LOKR in name}, file)
    beside.write_text('{"r": 2, "alpha": 3}', encoding="utf-8")
    assert [u.scale for u in read_adapter(file).updates.values()] == [1.5]


def test_alpha_may_be_an_integer(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float64):
        save_file(whole() | {f"{LORA}.alpha": torch.tensor(16, dtype=dtype)}, file)
        adapter = read_adapter(file)
        assert adapter.updates["layers.0.feed_forward.w1"].scale == 8 and adapter.dtype == torch.float32


def test_what_is_too_large_is_not_written(tmp_path: Path) -> None:
    state = {name: t.half() for name, t in whole().items() if LORA in name}
    save_file(state | {f"{LORA}.alpha": torch.tensor(1e6)}, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    for form, fits in (("diffusers", False), ("peft", False), ("comfyui", True), ("kohya", True)):
        out = tmp_path / f"{form}.safetensors"
        if fits:
            write_adapter(out, adapter.updates, form, adapter.dtype)
            continue
        with pytest.raises(IdeoflowError) as caught:
            write_adapter(out, adapter.updates, form, adapter.dtype)
        found = caught.value.diagnostics[0]
        assert found.code is CANNOT_CONVERT and not out.exists()
        assert "layers.0.feed_forward.w1.lora_B.weight" in found.message and "float16" in found.message
    large = Lora(torch.full((2, 8), 1e30), torch.full((12, 2), 1e30))
    with pytest.raises(IdeoflowError, match="w1 is too large"):
        resize({"layers.0.feed_forward.w1": large}, rank=1)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    state = whole()
    state.pop(f"{LORA}.lora_B.weight")
    state.pop(f"{LOHA}.hada_w1_b")
    file = tmp_path / "a.safetensors"
    save_file(state, file)
    with pytest.raises(IdeoflowError) as caught:
        read_adapter(file)
    assert len(caught.value.diagnostics) == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cut_or_overwritten_bytes_never_end_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(save(whole()))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("cut") / "a.safetensors"
    file.write_bytes(content)
    try:
        read_adapter(file)
    except IdeoflowError as error:
        assert str(file) in error.diagnostics[0].message


class _Trap:
    """Unpickling this creates a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str, zipped: bool) -> None:
    sprung, file = tmp_path / "sprung", tmp_path / f"a{suffix}"
    if zipped:
        torch.save({"trap": _Trap(sprung)}, file)
    else:
        file.write_bytes(pickle.dumps(_Trap(sprung)))
    found = refused(file)
    assert found.code is NOT_AN_ADAPTER and "pickle" in found.message
    assert not sprung.exists()


def test_what_is_not_there_or_no_adapter_is_told(tmp_path: Path) -> None:
    assert refused(tmp_path / "no.safetensors").code is NOT_AN_ADAPTER
    assert refused(tmp_path / ("x" * 5000)).code is NOT_AN_ADAPTER
    save_file({}, tmp_path / "empty.safetensors")
    assert refused(tmp_path / "empty.safetensors").code is NOT_AN_ADAPTER
    assert refused(tmp_path).code is NOT_AN_ADAPTER  # a folder, but not PEFT's
    (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
    assert "not a JSON object" in refused(tmp_path).message
