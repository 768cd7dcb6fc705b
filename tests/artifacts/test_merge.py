"""Merging into bases of every form: the same velocities as base and adapter, within the form's own error."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_readers import original_layout, velocities
from bitsandbytes.functional import quantize_4bit
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import load_file, save_file

from ideoflow.artifacts.adapter_file import read_adapter, write_adapter
from ideoflow.artifacts.merge import find_base, merge
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes.artifacts import CANNOT_MERGE, UNWRITABLE, WRONG_BASE
from ideoflow.diagnostics.codes.model import NOT_A_BASE
from ideoflow.engine.adapt import trained_updates
from ideoflow.kernels.float8 import quantize_weight
from ideoflow.model.base import BaseFacts
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.files import read_safetensors_header

KINDS = {
    "lora": "rank = 2",
    "dora": 'kind = "dora"\nrank = 2\ntargets = ["*.to_q", "*.w1"]',
    "loha": 'kind = "loha"\nrank = 2\nalpha = 1',
    "lokr": 'kind = "lokr"\nfull_matrix = true',
}


@pytest.fixture(scope="session")
def bases(base: Ideogram4Transformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One transformer file in each form: dense and FP8, diffusers' names and the original ones."""
    folder, made = tmp_path_factory.mktemp("bases"), {}
    split = {k: v.clone() for k, v in base.state_dict().items()}
    for layout, state in (("split", split), ("fused", original_layout(split))):
        dense = {k: v.bfloat16().contiguous() for k, v in state.items()}
        rows, whole = dict(dense), {}
        for name, value in dense.items():
            if name.startswith("layers.") and value.ndim == 2:
                values, scale = quantize_weight(value)
                rows[name], rows[f"{name}_scale"] = values, scale[:, None] if layout == "fused" else scale
                size = value.float().abs().max() / 448
                whole[f"model.diffusion_model.{name}"] = (value.float() / size).to(torch.float8_e4m3fn)
                whole[f"model.diffusion_model.{name}_scale"] = size
            else:
                whole[f"model.diffusion_model.{name}"] = value
        for form, tensors in (("bf16", dense), ("fp8 a row", rows), ("fp8 a tensor", whole)):
            made[f"{layout} {form}"] = folder / f"{layout}-{form.replace(' ', '-')}.safetensors"
            save_file(tensors, made[f"{layout} {form}"], {"made": "here"})
    return made


def loaded(file: Path, like: Ideogram4Transformer2DModel) -> Ideogram4Transformer2DModel:
    model = Ideogram4Transformer2DModel.from_config(like.config)
    checkpoint, cpu = Checkpoint(file), torch.device("cpu")
    model.load_state_dict({n: checkpoint.dense(n, torch.float32, cpu) for n in checkpoint.names()})
    return model


FORMS = [
    f"{layout} {form}" for layout in ("split", "fused") for form in ("bf16", "fp8 a row", "fp8 a tensor")
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_those_of_base_and_adapter(
    base: Any, bases: Any, adapted: Any, tmp_path: Path, kind: str, form: str
) -> None:
    updates = trained_updates(adapted(KINDS[kind]))
    to = (
        "peft" if form.startswith("fused") or kind == "dora" else "comfyui"
    )  # the layout that the base is not in
    adapter = read_adapter(write_adapter(tmp_path / "a.safetensors", updates, to, torch.float32))
    done = merge(adapter, find_base(str(bases[form])), tmp_path / "merged.safetensors")
    before, after = loaded(bases[form], base), loaded(done.place, base)
    step = {"bf16": 2**-8, "fp8 a row": 2**-4, "fp8 a tensor": 2**-4}[form.partition(" ")[2]]
    for name, old in before.named_parameters():
        new, update = after.get_parameter(name).detach(), updates.get(name.removesuffix(".weight"))
        expected = old.detach() if update is None else update.merged(old.detach())
        error = (new - expected).abs()
        # Rounding is relative to the number, and below the smallest e4m3 to the row's (or tensor's) largest.
        assert (error <= step * expected.abs() + expected.abs().max() * 2**-17).all(), name
    ours, theirs = velocities(adapted_on(before, updates)), velocities(after)
    assert (ours - theirs).norm() / ours.norm() < {2**-8: 0.03, 2**-4: 0.25}[step]
    assert read_safetensors_header(done.place) == read_safetensors_header(bases[form])


def adapted_on(model: Any, updates: Any) -> Any:
    """The base with the updates in float32."""
    for name, update in updates.items():
        weight = model.get_submodule(name).weight
        weight.data = update.merged(weight.data)
    return model


def test_a_whole_base_stays_one_and_what_is_not_adapted_stays_the_same(
    nano: BaseFacts, adapted: Any, tmp_path: Path
) -> None:
    from diffusers import Ideogram4Pipeline

    model = adapted("rank = 2\ntargets = 'mlp'")
    adapter = read_adapter(
        write_adapter(tmp_path / "a.safetensors", trained_updates(model), "kohya", torch.float32)
    )
    done = merge(adapter, find_base(str(nano.folder)), tmp_path / "merged")
    assert done.weights == 18 and done.change > 0.01
    pipeline = Ideogram4Pipeline.from_pretrained(done.place)
    torch.testing.assert_close(velocities(pipeline.transformer), velocities(model), rtol=1e-4, atol=1e-4)
    old, new = (
        load_file(next((p / "transformer").glob("*.safetensors"))) for p in (Path(nano.folder), done.place)
    )
    same = {n for n in old if torch.equal(old[n], new[n])}
    assert {n for n in old if "feed_forward.w" not in n} == same
    assert list(tmp_path.glob(".*")) == []


def test_shards_are_written_shard_by_shard(bases: Any, base: Any, adapted: Any, tmp_path: Path) -> None:
    state = load_file(bases["fused fp8 a row"])
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(state, key=lambda n: (n.endswith("_scale"), n))
    cut = sum(not n.endswith("_scale") for n in names)
    shards = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
    for file, keys in shards.items():
        save_file({k: state[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "x.safetensors.index.json").write_text(json.dumps(index))
    updates = trained_updates(adapted("rank = 2"))
    adapter = read_adapter(write_adapter(tmp_path / "a.safetensors", updates, "comfyui", torch.float32))
    whole = merge(adapter, find_base(str(bases["fused fp8 a row"])), tmp_path / "whole.safetensors")
    parts = merge(adapter, find_base(str(folder)), tmp_path / "parts")
    found = {k: v for file in shards for k, v in load_file(parts.place / file).items()}
    expected = load_file(whole.place)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k].float(), expected[k].float()) for k in found)
    assert (parts.place / "x.safetensors.index.json").exists()


def refused(code: Any, work: Any) -> str:
    with pytest.raises(IdeoflowError) as caught:
        work()
    assert {d.code for d in caught.value.diagnostics} == {code}
    return caught.value.diagnostics[0].message


def test_what_does_not_fit_is_refused_before_anything_is_written(
    bases: Any, adapted: Any, tmp_path: Path
) -> None:
    updates = trained_updates(adapted("rank = 2"))
    good = read_adapter(write_adapter(tmp_path / "a.safetensors", updates, "comfyui", torch.float32))
    base, out = find_base(str(bases["split bf16"])), tmp_path / "out.safetensors"
    key = "diffusion_model.layers.{}.feed_forward.w1"
    for number, width, words in ((99, 192, "no layers.99.feed_forward.w1"), (0, 64, "changes [512, 64]")):
        state = {f"{key.format(number)}.lora_A.weight": torch.ones(2, width),
                 f"{key.format(number)}.lora_B.weight": torch.ones(512, 2)}  # fmt: skip
        save_file(state, tmp_path / "other.safetensors")
        other = read_adapter(tmp_path / "other.safetensors")
        assert words in refused(WRONG_BASE, lambda adapter=other: merge(adapter, base, out))
    packed, weight = load_file(bases["split bf16"]), "layers.0.feed_forward.w1.weight"
    packed[weight], state = quantize_4bit(packed[weight], quant_type="nf4")
    packed |= {f"{weight}.{key}": side for key, side in state.as_dict(packed=True).items()}
    save_file(packed, tmp_path / "nf4.safetensors")
    nf4 = find_base(str(tmp_path / "nf4.safetensors"))
    message = refused(CANNOT_MERGE, lambda: merge(good, nf4, out))
    assert "nf4.safetensors" in message and "layers.0.feed_forward.w1.weight" in message and "U8" in message
    shutil.copy(bases["split bf16"], out)
    before = out.read_bytes()
    assert "is there already" in refused(UNWRITABLE, lambda: merge(good, base, out))
    assert out.read_bytes() == before


W1 = "layers.0.feed_forward.w1.weight"
SCALE = f"{W1}_scale"
NAN = torch.full((512, 1), float("nan"))


def header_of(**facts: Any) -> Callable[[Path], object]:
    """Changes what the header says of the first tensor."""

    def change(file: Path) -> None:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        key = min(k for k in header if k != "__metadata__")
        header[key] = {k: v for k, v in (header[key] | facts).items() if v is not ...}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return change


def tensors_of(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(file: Path) -> None:
        state = load_file(file)
        change(state)
        save_file(state, file)

    return rewrite


def put(key: str, value: torch.Tensor) -> Callable[[Path], object]:
    return tensors_of(lambda state: state.update({key: value}))


def index_of(text: str) -> Callable[[Path], object]:
    return lambda file: file.with_name("x.safetensors.index.json").write_text(text)


# Damage of an FP8 base in the original layout, and what must be named.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no scale": (tensors_of(lambda state: state.pop(SCALE)), SCALE),
    "NaN as a scale": (put(SCALE, NAN), W1),
    "half a scale": (put(SCALE, torch.ones(256, 1)), SCALE),
    "a wrong shape": (put(W1, torch.ones(512, 96)), W1),
    "one row": (put(W1, torch.ones(512)), W1),
    "a cube": (put(W1, torch.ones(512, 192, 1)), W1),
    "int8": (put(W1, torch.ones(512, 192, dtype=torch.int8)), W1),
    "int32": (put(W1, torch.ones(512, 192, dtype=torch.int32)), W1),
    "all int8": (tensors_of(lambda s: s.update({n: t.char() for n, t in s.items()})), "int8"),
    "no shape": (header_of(shape=...), ""),
    "words for offsets": (header_of(data_offsets=["none", 4]), ""),
    "overlapping": (header_of(data_offsets=[8, 8 + 2 * 192 * 64]), ""),
    "a pickle": (lambda file: file.write_bytes(pickle.dumps(1)), "pickle"),
}
INDEXES = {"cut": "{", "a list": "[]", "no map": "{}", "a number": '{"weight_map": 3}'}


def test_a_damaged_base_is_refused_by_file_and_key(bases: Any, adapted: Any, tmp_path: Path) -> None:
    updates = trained_updates(adapted('kind = "dora"\nrank = 2\ntargets = ["*.w1"]'))
    adapter = read_adapter(write_adapter(tmp_path / "a.safetensors", updates, "peft", torch.float32))
    folder = tmp_path / "base"
    folder.mkdir()
    given, out = folder / "x.safetensors", tmp_path / "out.safetensors"
    cases = [(given, *case) for case in DAMAGES.values()]
    cases += [(folder, index_of(text), "") for text in INDEXES.values()]
    for place, damage, word in cases:
        shutil.copy(bases["fused fp8 a row"], given)
        damage(given)
        with pytest.raises(IdeoflowError) as caught:
            merge(adapter, find_base(str(place)), out)
        first = caught.value.diagnostics[0]
        assert str(place) in first.message and word in first.message and first.cure, first.message
        assert list(tmp_path.glob("*out*")) == [], first.message
    for name in ("", "~nobody/x", "x" * 5000, str(tmp_path / "not there")):
        assert name[:50] in refused(NOT_A_BASE, lambda name=name: find_base(name))


def test_what_the_bases_form_cannot_hold_is_not_written(bases: Any, tmp_path: Path) -> None:
    state = {name: value.half() for name, value in load_file(bases["split bf16"]).items()}
    file, key = tmp_path / "base.safetensors", f"diffusion_model.{W1.removesuffix('.weight')}"
    save_file(state, file)
    ones = {f"{key}.lora_A.weight": torch.ones(1, 192), f"{key}.lora_B.weight": torch.ones(512, 1) * 1e5}
    save_file(ones, tmp_path / "a.safetensors")
    adapter, out = read_adapter(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    message = refused(CANNOT_MERGE, lambda: merge(adapter, find_base(str(file)), out))
    assert W1 in message and "too large" in message and not out.exists()
