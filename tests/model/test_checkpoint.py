"""Each form of checkpoint gives the weights it was made from, within the form's error, and predicts alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_forms import FORMS, fuse, to_fp8
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.step import predict_velocity
from ideoflow.kernels.float8 import Float8Linear
from ideoflow.model.base import locate_base
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.hub import fetch_base
from ideoflow.model.load import load_transformer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    """The nano transformer's weights as bf16 holds them: what a checkpoint is made from."""
    facts = fetch_base(locate_base("nano"))
    model = Ideogram4Transformer2DModel.from_pretrained(facts.folder, subfolder="transformer")
    return {name: value.bfloat16() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def config() -> str:
    facts = fetch_base(locate_base("nano"))
    assert facts.folder
    return (facts.folder / "transformer" / "config.json").read_text()


@pytest.fixture
def make(tmp_path: Path, dense: dict[str, Tensor], config: str) -> Any:
    """make(form, shards) -> folder with a transformer in that form."""

    def build(form: str, shards: int = 1) -> Path:
        part = tmp_path / f"{shards}" / "transformer"
        part.mkdir(parents=True)
        (part / "config.json").write_text(config)
        tensors = {k: v.contiguous() for k, v in FORMS[form][0](dense).items()}
        names = sorted(tensors)
        stem = "diffusion_pytorch_model"
        if shards == 1:
            save_file(tensors, part / f"{stem}.safetensors", {"format": "pt"})
        else:
            files = [f"{stem}-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
            where = {name: files[n % shards] for n, name in enumerate(names)}  # a scale far from its weight
            for file in files:
                save_file({k: tensors[k] for k in names if where[k] == file}, part / file, {"format": "pt"})
            (part / f"{stem}.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": where})
            )
        return part.parent

    return build


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_weights_of_its_origin(make: Any, dense: dict[str, Tensor], form: str) -> None:
    checkpoint = Checkpoint(make(form) / "transformer")
    assert set(checkpoint.names()) == set(dense)
    for name, value in dense.items():
        read = checkpoint.dense(name, torch.float32, CPU)
        assert read.shape == value.shape
        largest = value.float().abs().amax()
        assert (read - value.float()).abs().amax() <= FORMS[form][1] * largest, name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_predicts_alike(make: Any, dense: dict[str, Tensor], form: str) -> None:
    def velocity(folder: Path) -> Tensor:
        model = load_transformer(folder, precision="float32", device=CPU)
        g = torch.Generator().manual_seed(0)
        text, noisy = torch.randn(5, 192, generator=g), torch.randn(16, 128, generator=g)
        with torch.no_grad():
            return predict_velocity(model, noisy, torch.tensor([0.4]), text, (4, 4))

    expected = velocity(fetch_base(locate_base("nano")).folder)  # type: ignore[arg-type]
    error = (velocity(make(form)) - expected).norm() / expected.norm()
    assert error < (0.01 if FORMS[form][1] == 0 else 0.15)


@pytest.mark.parametrize("form", ["split, FP8, [out]", "original layout, FP8, [out]", "NF4, nested"])
def test_shards_are_one_checkpoint(make: Any, dense: dict[str, Tensor], form: str) -> None:
    whole, sharded = Checkpoint(make(form) / "transformer"), Checkpoint(make(form, shards=3) / "transformer")
    for name in dense:
        assert torch.equal(whole.dense(name, torch.float32, CPU), sharded.dense(name, torch.float32, CPU))


def test_fp8_is_kept_exactly_as_stored(make: Any, dense: dict[str, Tensor]) -> None:
    folder = make("original layout, FP8, [out]")
    model = load_transformer(folder, precision="fp8", device=CPU)
    stored = to_fp8(dense, "[out]")  # rows are scaled one by one, so fusing them changes nothing
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            count += 1
            assert torch.equal(module.weight.view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
            torch.testing.assert_close(module.weight_scale, stored[f"{name}.weight_scale"])
    assert count == 6 * 8  # q, k, v, o, w1, w2, w3 and the modulation of each block
    assert model.input_proj.weight.dtype == torch.bfloat16


def test_a_dense_base_can_be_held_in_fp8(make: Any, dense: dict[str, Tensor]) -> None:
    model = load_transformer(make("diffusers, bf16"), precision="fp8", device=CPU)
    w1 = model.layers[0].feed_forward.w1
    restored = w1.weight.float() * w1.weight_scale[:, None]
    original = dense["layers.0.feed_forward.w1.weight"].float()
    assert (restored - original).norm() / original.norm() < 0.03


def test_the_original_layout_loads_without_a_config(tmp_path):
    """Sizes inferred from the tensors' shapes give the same model as a config.json, heads as released."""
    torch.manual_seed(0)
    model = Ideogram4Transformer2DModel(
        num_layers=2, num_attention_heads=1, intermediate_size=64, adaln_dim=32, llm_features_dim=416
    ).bfloat16()
    with_config, without = tmp_path / "a", tmp_path / "b"
    for folder in (with_config, without):
        (folder / "transformer").mkdir(parents=True)
        save_file(fuse(model.state_dict()), folder / "transformer" / "model.safetensors")
    model.save_config(with_config / "transformer")
    models = [load_transformer(f, precision="fp8", device=CPU) for f in (with_config, without)]
    g = torch.Generator().manual_seed(0)
    text, noisy = torch.randn(5, 256, generator=g), torch.randn(16, 128, generator=g)
    with torch.no_grad():
        one, other = (predict_velocity(m, noisy, torch.tensor([0.4]), text, (4, 4)) for m in models)
    assert torch.equal(one, other)
    states = [m.state_dict() for m in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k].float(), states[1][k].float()) for k in states[0])


def test_other_sizes_without_a_config_are_told(dense, tmp_path):
    """How a head is divided among the rotary embedding's axes is in no shape."""
    (tmp_path / "transformer").mkdir()
    save_file(fuse(dense), tmp_path / "transformer" / "model.safetensors")
    with pytest.raises(IdeoflowError, match="no config"):
        load_transformer(tmp_path, precision="fp8", device=CPU)


def test_a_scale_that_is_not_finite_is_told(make, dense):
    """It would show only in a loss that is not a number, as if the learning rate were too high."""
    folder, key = make("split, FP8, [out]"), "layers.1.feed_forward.w2.weight_scale"
    (file,) = (folder / "transformer").glob("*.safetensors")
    state = {k: v.clone() for k, v in load_file(file).items()}
    state[key][3] = float("nan")
    file.unlink()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(IdeoflowError, match=key):
        load_transformer(folder, precision="fp8", device=CPU)
