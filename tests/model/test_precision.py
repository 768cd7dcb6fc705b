"""Weights held in each precision, from each stored form: their values, their velocities, their size."""

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import psutil
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from checkpoint_forms import FORMS, nf4, to_nf4
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.step import accumulate, accumulate_packed, predict_velocity, prepare
from ideoflow.kernels.float8 import Float8Linear, Int8Linear, quantize_int8, quantize_weight
from ideoflow.model.base import NANO_TRANSFORMER
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.four_bit import FrozenLinear4bit, linear_4bit, stored_state
from ideoflow.model.load import load_transformer
from ideoflow.model.random import random_transformer

CPU = torch.device("cpu")
HELD = {"fp8": Float8Linear, "int8": Int8Linear, "nf4": FrozenLinear4bit, "bf16": nn.Linear,
        "float32": nn.Linear}  # fmt: skip
# Relative error of a velocity against float32 weights.
CLOSE = {"fp8": 0.08, "int8": 0.03, "nf4": 0.2, "bf16": 0.02, "float32": 1e-6}


@pytest.fixture(scope="module")
def dense(nano_folder: Path) -> dict[str, Tensor]:
    state = load_file(next((nano_folder / "transformer").glob("*.safetensors")))
    return {name: value.bfloat16() for name, value in state.items()}


@pytest.fixture
def stored(dense: dict[str, Tensor], tmp_path: Path) -> Any:
    def make(form: str) -> Path:
        file = tmp_path / "x.safetensors"
        save_file({k: v.contiguous() for k, v in FORMS[form][0](dense).items()}, file)
        return file

    return make


def velocity(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(0)
    text, noisy = torch.randn(5, 192, generator=g), torch.randn(16, 128, generator=g)
    with torch.no_grad():
        return predict_velocity(model, noisy, torch.tensor([0.4]), text, (4, 4)).float()  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", HELD)
@pytest.mark.parametrize("form", ["diffusers, bf16", "original layout, FP8, [out]", "ComfyUI", "NF4, nested"])
def test_every_form_is_held_in_every_precision(
    nano_folder: Path, stored: Any, form: str, precision: str
) -> None:
    model = load_transformer(nano_folder, precision=precision, device=CPU, file=stored(form))
    kinds = {
        type(m) for n, m in model.named_modules() if n.startswith("layers.") and hasattr(m, "in_features")
    }
    assert kinds == {HELD[precision]}
    reference = velocity(load_transformer(nano_folder, precision="float32", device=CPU))
    error = float((velocity(model) - reference).norm() / reference.norm())
    of_form = {"d": 0.01, "o": 0.1, "C": 0.15, "N": 0.15}[form[0]]
    assert error < CLOSE[precision] + of_form


def test_four_bits_are_those_of_bitsandbytes(nano_folder: Path, dense: dict[str, Tensor]) -> None:
    """Made by pieces of the rows, and rounded twice at the end: the same bytes as of the whole at once."""
    from ideoflow.model.four_bit import packed_pieces

    weight = dense["layers.0.feed_forward.w1.weight"]
    pieces = [(slice(i, i + 100), weight[i : i + 100]) for i in range(0, len(weight), 100)]
    packed, state = packed_pieces(pieces, weight.shape, CPU)
    whole, expected = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(packed, whole) and torch.equal(state.absmax, expected.absmax)
    assert torch.equal(bnb.dequantize_4bit(packed, state), bnb.dequantize_4bit(whole, expected))
    model = load_transformer(nano_folder, precision="nf4", device=CPU)
    held = model.layers[0].feed_forward.w1.weight
    exact = load_file(next((nano_folder / "transformer").glob("*.safetensors")))
    again, _ = bnb.quantize_4bit(exact["layers.0.feed_forward.w1.weight"].bfloat16(), quant_type="nf4")
    assert torch.equal(held.data, again)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_kept_as_stored(nano_folder: Path, stored: Any, dense: Any, nested: bool) -> None:
    file = stored("NF4, nested" if nested else "NF4")
    model = load_transformer(nano_folder, precision="nf4", device=CPU, file=file)
    expected = to_nf4(dense, nested)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            assert torch.equal(module.weight.data, expected[f"{name}.weight"])
            assert torch.equal(module.weight.quant_state.absmax, expected[f"{name}.weight.absmax"])
            assert module.weight.quant_state.nested == nested


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_products_are_those_of_bitsandbytes(bias: bool, nested: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(128, 96, bias=bias).bfloat16().requires_grad_(False)
    codes, state = bnb.quantize_4bit(dense.weight, quant_type="nf4", compress_statistics=nested)
    ours = linear_4bit(dense, codes, state)
    theirs = Linear4bit(128, 96, bias, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    theirs.weight, theirs.bias = ours.weight, ours.bias
    results = []
    for layer in (ours, theirs):
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.backward(torch.ones_like(y))
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0]) and results[0][0].dtype == torch.float32
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]


@pytest.mark.parametrize(("columns", "nested"), [(256, True), (256, False), (64, False)])
def test_a_third_of_fused_four_bits_is_kept_as_stored(tmp_path: Path, columns: int, nested: bool) -> None:
    """As the NF4 release in the original layout has q, k and v."""
    weight = torch.randn(3 * 64, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    name, parts = "layers.0.attention.qkv.weight", ("to_q", "to_k", "to_v")
    save_file(to_nf4({name: weight}, nested), tmp_path / "x.safetensors")
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    for part, third in zip(parts, bnb.dequantize_4bit(packed, state).chunk(3), strict=True):
        found = Checkpoint(tmp_path / "x.safetensors").four_bit(f"layers.0.attention.{part}.weight", CPU)
        assert found is not None
        kept = stored_state(found[1], torch.bfloat16, CPU)
        assert kept.shape == (64, columns) and kept.nested == nested
        assert torch.equal(bnb.dequantize_4bit(found[0], kept), third)
        assert found[0].untyped_storage().nbytes() == 64 * columns // 2, "the other two are not kept"


def test_a_third_that_cuts_a_block_of_scales_is_rounded_again(tmp_path: Path) -> None:
    weight = {"layers.0.attention.qkv.weight": torch.randn(3 * 64, 64).bfloat16()}
    save_file(to_nf4(weight, nested=True), tmp_path / "x.safetensors")
    assert Checkpoint(tmp_path / "x.safetensors").four_bit("layers.0.attention.to_k.weight", CPU) is None


def test_rounding_a_row_to_integers() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    values, scale = quantize_int8(weight)
    error = (values.float() * scale[:, None] - weight).abs()
    assert values.dtype == torch.int8 and torch.equal(scale[3], torch.tensor(1.0))
    assert (error <= 0.5 * weight.abs().amax(1, keepdim=True) / 127 * 1.001).all()
    eight, row = quantize_weight(weight)
    assert error.norm() < 0.5 * (eight.float() * row[:, None] - weight).norm()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(3 * 64, 64), (3 * 10, 96), (3 * 7, 48)])
def test_four_bits_are_looked_up_by_runs_of_rows(
    tmp_path: Path, monkeypatch: Any, rows: int, columns: int, nested: bool
) -> None:
    """Any size of run gives the formula's numbers, also where blocks of 64 do not end with rows."""
    name = "layers.0.attention.qkv.weight"
    weight = torch.randn(rows, columns).bfloat16()
    stored, numbers = nf4(name, weight, nested)
    save_file(stored, tmp_path / "x.safetensors")
    whole = numbers.chunk(3)
    checkpoint = Checkpoint(tmp_path / "x.safetensors")
    for numbers in (columns, 5 * columns, 1 << 23):
        monkeypatch.setattr("ideoflow.model.checkpoint._PIECE", numbers)
        for third, part in enumerate(("to_q", "to_k", "to_v")):
            found = torch.zeros(rows // 3, columns).bfloat16()
            for run, piece in checkpoint.pieces(f"layers.0.attention.{part}.weight", torch.bfloat16, CPU):
                found[run] = piece
            assert torch.equal(found, whole[third])


@pytest.mark.parametrize("form", ["NF4, nested", "diffusers, bf16"])
def test_rows_that_four_bit_blocks_do_not_fill(tmp_path: Path, form: str) -> None:
    """They are refused where they would be multiplied with, and right in another precision."""
    config = asdict(NANO_TRANSFORMER) | {"num_layers": 1, "intermediate_size": 96, "mrope_section": (6, 5, 5)}
    made = random_transformer(config, precision="bf16", device=CPU)
    made.save_config(tmp_path / "transformer")
    file, key = tmp_path / "transformer" / "x.safetensors", "layers.0.feed_forward.w2.weight"
    save_file(FORMS[form][0](made.state_dict()), file)
    with pytest.raises(IdeoflowError) as caught:
        load_transformer(tmp_path, precision="nf4", device=CPU)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code.id == "IM011"
    assert diagnostic.message == f"{file}: {key}: rows of 96 numbers do not fill blocks of 64"
    weight = made.get_parameter(key)
    expected = nf4(key, weight, nested=True)[1] if form.startswith("NF4") else weight
    found = load_transformer(tmp_path, precision="bf16", device=CPU)
    assert torch.equal(found.get_parameter(key), expected)


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
def test_adapters_learn_on_every_precision_and_engine(nano_folder: Path, precision: str) -> None:
    """PEFT's gradients on the held weights against those on the same weights made dense."""
    held = load_transformer(nano_folder, precision=precision, device=CPU)
    plain = load_transformer(nano_folder, precision="float32", device=CPU)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("layers."):
                module.weight.copy_(_values(held.get_submodule(name)))
    g = torch.Generator().manual_seed(1)
    from ideoflow.data.order import Draw
    from ideoflow.recipe import ScheduleSettings

    draw = Draw(0.4, torch.randn(16, 128, generator=g), False)
    sample = prepare(torch.randn(16, 128, generator=g), torch.randn(5, 192, generator=g), (4, 4), draw,
                     ScheduleSettings())  # fmt: skip
    gradients = {}
    for key, model in (("held", held), ("plain", plain)):
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_out.0", "w2"]))
        trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
        for p in trained.values():
            p.data = p.data.float()
        accumulate(model, [sample], 1)
        gradients[key] = {n: p.grad.clone() for n, p in trained.items()}  # type: ignore[union-attr]
    for p in trained.values():
        p.grad = None
    names = [n for n, p in held.named_parameters() if "lora_" in n]
    assert names == list(gradients["plain"])
    fused = FusedTransformer(held, linear="bf16", attention="sdpa")
    for p in held.parameters():
        p.grad = None
    accumulate_packed(fused, [sample], 1)
    gradients["fused"] = {n: p.grad for n, p in held.named_parameters() if "lora_" in n}  # type: ignore[misc]
    for key in ("held", "fused"):
        for name, expected in gradients["plain"].items():
            similar = nn.functional.cosine_similarity(
                gradients[key][name].flatten(), expected.flatten(), dim=0
            )
            assert similar > 0.99, (key, name)


def _values(layer: nn.Module) -> Tensor:
    if isinstance(layer, Linear4bit):
        return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.float() * layer.weight_scale[:, None]  # type: ignore[operator,union-attr,index]


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_wrong_shapes_name_file_and_key(
    nano_folder: Path, dense: Any, tmp_path: Path, precision: str
) -> None:
    for key in ("layers.0.feed_forward.w1.weight", "layers.2.attention_norm1.weight"):
        damaged = dense | {key: dense[key][..., :-64].contiguous()}
        save_file(damaged, tmp_path / "x.safetensors")
        with pytest.raises(IdeoflowError) as caught:
            load_transformer(nano_folder, precision=precision, device=CPU, file=tmp_path / "x.safetensors")
        message = caught.value.diagnostics[0].message
        assert caught.value.diagnostics[0].code.id == "IM006", message
        assert "x.safetensors" in message and key in message


def test_the_host_never_holds_much_more_than_the_result(nano_folder: Path, tmp_path: Path) -> None:
    """A wide model, so that copies show: 130 MB of float32 become 32 MB of FP8, by pieces."""
    from diffusers import Ideogram4Transformer2DModel

    from ideoflow.engine.meter import Meter

    with torch.device("meta"):
        model = Ideogram4Transformer2DModel(
            num_layers=3, attention_head_dim=256, num_attention_heads=4, intermediate_size=2048, adaln_dim=64,
            llm_features_dim=64,
        )  # fmt: skip
    model.save_config(tmp_path / "transformer")
    state = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    save_file(state, tmp_path / "transformer" / "x.safetensors")
    del state
    gc.collect()
    before, peaks = psutil.Process().memory_info().rss, []
    with Meter(CPU, lambda stage, seconds, peak: peaks.append(peak)).stage("load"):
        held = load_transformer(tmp_path, precision="fp8", device=CPU)
    size = sum(p.numel() * p.element_size() for p in held.parameters())
    assert peaks[0] - before < size + 110e6
