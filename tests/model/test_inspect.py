"""What a checkpoint holds is told from headers, for every form; and what is wrong with it."""

import json
import shutil

import pytest
import torch
from checkpoint_forms import FORMS
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import load_file, save_file

from ideoflow.cli import main
from ideoflow.diagnostics import IdeoflowError
from ideoflow.model.base import NANO_TRANSFORMER, locate_base
from ideoflow.model.inspect import inspect
from ideoflow.model.spec import TransformerSpec


@pytest.fixture(scope="module")
def weights(nano_folder):
    state = load_file(next((nano_folder / "transformer").glob("*.safetensors")))
    return {name: value.bfloat16() for name, value in state.items()}


def test_the_table_of_tensors_is_that_of_diffusers():
    with torch.device("meta"):
        model = Ideogram4Transformer2DModel()
    assert TransformerSpec().tensors() == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_recognised(weights, tmp_path, form):
    save_file({k: v.contiguous() for k, v in FORMS[form][0](weights).items()}, tmp_path / "x.safetensors")
    (part,) = inspect(tmp_path / "x.safetensors").parts
    assert part.form == ("bf16" if "bf16" in form else "nf4" if "NF4" in form else "fp8")
    assert not part.problems
    assert ("fused" in part.layout) == ("original" in form or "ComfyUI" in form)
    assert ("diffusion_model." in part.layout) == ("ComfyUI" in form)
    assert part.parameters == NANO_TRANSFORMER.parameters()
    assert part.bytes <= (tmp_path / "x.safetensors").stat().st_size


def test_a_whole_base_has_the_digest_of_its_plans(nano_folder):
    found = inspect(nano_folder)
    assert found.digest == locate_base(str(nano_folder)).digest and not found.problems
    assert {p.name for p in found.parts} == {
        "transformer", "unconditional_transformer", "text_encoder", "vae"
    }  # fmt: skip
    assert [p.name for p in inspect(nano_folder / "vae").parts] == ["vae"]


def test_what_is_wrong_is_named(weights, tmp_path):
    file = tmp_path / "x.safetensors"
    damaged = dict(weights)
    damaged.pop("layers.2.feed_forward.w1.weight")
    damaged["stranger.weight"] = torch.zeros(2)
    damaged["adaln_proj.bias"] = torch.zeros(7)
    save_file(damaged, file)
    messages = [p.message for p in inspect(file).problems]
    assert len(messages) == 3 and all(str(file) in m for m in messages)
    for key in ("missing: layers.2.feed_forward.w1.weight", "not known: stranger.weight",
                "of the wrong shape: adaln_proj.bias ([7], not [64])"):  # fmt: skip
        assert any(m.endswith(key) for m in messages)
    save_file({"w": torch.zeros(2)}, file)
    assert "no transformer of Ideogram 4" in inspect(file).problems[0].message


def test_an_adapter_is_told_from_a_damaged_base(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"diffusion_model.layers.0.attention.qkv.lora_A.weight": torch.zeros(2, 2)}, file)
    (problem,) = inspect(file).problems
    assert problem.message.endswith("is an adapter, not a transformer")
    assert problem.cure == f"ideoflow adapter info {file}"


def test_nano_is_shown_by_its_name(nano_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["model", "inspect", "nano", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["place"] == str(nano_folder)


def test_nothing_there(tmp_path):
    with pytest.raises(IdeoflowError) as caught:
        inspect(tmp_path / "none")
    assert caught.value.diagnostics[0].code.id == "IM001"


def test_the_command(nano_folder, tmp_path, capsys):
    assert main(["model", "inspect", str(nano_folder)]) == 0
    page = capsys.readouterr().out
    assert inspect(nano_folder).digest in page and "transformer: float32" in page
    assert main(["model", "inspect", str(nano_folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parts"][0]["parameters"] == NANO_TRANSFORMER.parameters()
    shutil.copytree(nano_folder / "transformer", tmp_path / "transformer")
    file = next((tmp_path / "transformer").glob("*.safetensors"))
    save_file({"x.weight": torch.zeros(9, dtype=torch.int8)}, file)
    assert main(["model", "inspect", str(tmp_path / "transformer")]) == 1
    assert "stored as int8" in capsys.readouterr().err
    file.write_bytes(file.read_bytes()[:20])
    assert main(["model", "inspect", str(file)]) == 1
    assert file.name in capsys.readouterr().err
