"""A transformer in one file, as ComfyUI has it, with the other parts from somewhere else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_forms import FORMS
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics import IdeoflowError, Span
from ideoflow.diagnostics.codes import model as codes
from ideoflow.engine.step import predict_velocity
from ideoflow.model.base import NANO_TRANSFORMER, locate_base
from ideoflow.model.hub import fetch_base
from ideoflow.model.load import load_transformer
from ideoflow.model.spec import TransformerSpec
from ideoflow.model.text import TextEncoder

CPU = torch.device("cpu")
SPAN = Span("recipe.toml", 2, 8, 2, 14, 'base = "x.safetensors"')
NAME = "ideogram4_fp8_scaled.safetensors"


def refused(*args, **options):
    with pytest.raises(IdeoflowError) as caught:
        locate_base(*args, span=SPAN, **options)
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.span is SPAN and diagnostic.cure
    return diagnostic


@pytest.fixture(scope="module")
def weights(nano_folder):
    state = load_file(next((nano_folder / "transformer").glob("*.safetensors")))
    return {name: value.bfloat16() for name, value in state.items()}


@pytest.fixture
def single(weights, tmp_path):
    """single(form) -> the file."""

    def make(form="ComfyUI", name=NAME) -> Path:
        file = tmp_path / "comfy" / name
        file.parent.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in FORMS[form][0](weights).items()}, file)
        return file

    return make


def velocity(base):
    model = load_transformer(base.folder, precision="float32", device=CPU, file=base.files.get("transformer"))
    g = torch.Generator().manual_seed(0)
    text, noisy = torch.randn(5, 192, generator=g), torch.randn(16, 128, generator=g)
    with torch.no_grad():
        return predict_velocity(model, noisy, torch.tensor([0.4]), text, (4, 4))


@pytest.mark.parametrize("form", ["ComfyUI", "ComfyUI, long prefix", "diffusers, bf16", "NF4, nested"])
def test_a_single_file_with_the_parts_of_a_folder(single, nano_folder, form):
    base = locate_base(str(single(form)), parts=str(nano_folder), span=SPAN)
    assert base.present and base.folder == nano_folder and base.transformer == NANO_TRANSFORMER
    assert base.storage == {"C": "fp8", "d": "bf16", "N": "nf4"}[form[0]] and not base.has_unconditional
    expected = velocity(locate_base(str(nano_folder)))
    error = (velocity(base) - expected).norm() / expected.norm()
    assert error < (0.01 if FORMS[form][1] == 0 else 0.15)


def test_the_parts_may_be_nano(single):
    base = locate_base(str(single()), parts="nano")
    assert fetch_base(base).present


def test_the_text_projection_is_the_files_own(single, nano_folder, weights):
    file = single("diffusers, bf16")
    changed = dict(weights)
    changed["llm_cond_proj.bias"] = weights["llm_cond_proj.bias"] + 1
    save_file(changed, file.with_name("other.safetensors"))
    options = {"dtype": torch.float32, "device": CPU, "max_tokens": 64}
    one, other = (
        TextEncoder(nano_folder, transformer=f, **options).encode("x")
        for f in (file, file.with_name("other.safetensors"))
    )
    torch.testing.assert_close(other, one + 1, rtol=0, atol=0.02)  # the bias is stored in bf16


def test_parts_beside_the_file(single, nano_folder):
    file = single()
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(nano_folder / part, file.parent / part)
    # Shapes do not tell how the rotary axes are divided; with the released sizes the default is right.
    (file.parent / "transformer").mkdir()
    shutil.copy(nano_folder / "transformer" / "config.json", file.parent / "transformer")
    base = locate_base(file.name, relative_to=file.parent)
    assert base.folder == file.parent and base.parts is None
    assert torch.isfinite(velocity(base)).all()


def test_a_second_transformer_beside_the_first(single, nano_folder):
    file = single()
    alone = locate_base(str(file), parts=str(nano_folder))
    other = single(name="ideogram4_unconditional_fp8_scaled.safetensors")
    both = locate_base(str(file), parts=str(nano_folder))
    assert both.has_unconditional and both.files["unconditional_transformer"] == other
    assert alone.digest != both.digest


def test_the_digest_follows_file_and_parts(single, copy):
    file = single()
    first = locate_base(str(file), parts=str(copy)).digest
    (copy / "README.md").write_text("words")
    (copy / "transformer" / "x.json").write_text("{}")
    assert locate_base(str(file), parts=str(copy)).digest == first
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 2}))
    second = locate_base(str(file), parts=str(copy)).digest
    single("ComfyUI, long prefix")
    assert len({first, second, locate_base(str(file), parts=str(copy)).digest}) == 3


# The parts on the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(nano_folder, monkeypatch, tmp_path):
    """A repository as the client would have downloaded it for its parts: no weights of transformers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    shutil.copytree(nano_folder, folder)
    for part in ("transformer", "unconditional_transformer"):
        next((folder / part).glob("*.safetensors")).unlink()
    return folder


def test_downloaded_parts_are_used_offline(single, hub):
    base = locate_base(str(single()), parts="owner/name")
    assert base.present and base.folder == hub and base.parts == "owner/name"
    assert not locate_base("owner/name").present, "as a whole base it is not complete"


def test_only_the_parts_are_downloaded(single, nano_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(nano_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    # A local path of three names is no file on the hub, and the revision is of the parts.
    name, near = f"{tmp_path.name}/comfy/{single().name}", {"relative_to": tmp_path.parent}
    base = locate_base(name, parts="owner/name", revision="v2", **near)
    assert not base.present and base.transformer == NANO_TRANSFORMER and base.storage == "fp8"
    said = []
    fetched = fetch_base(base, "v2", say=said.append, **near)
    assert fetched.present and fetched.files == base.files and fetched.name == base.name
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2") and "owner/name" in said[0]
    from fnmatch import fnmatch

    def wanted(file):
        return any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    assert wanted("text_encoder/model.safetensors") and wanted("transformer/config.json")
    assert not wanted("transformer/diffusion_pytorch_model.safetensors")


def test_a_file_on_the_hub_is_planned_before_it_is_here(nano_folder, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = locate_base(f"owner/name/files/{NAME}", parts=str(nano_folder), revision="v2", span=SPAN)
    assert not base.present and (base.transformer, base.storage) == (TransformerSpec(), "fp8")
    assert not base.has_unconditional and "@v2" in base.digest
    with pytest.raises(IdeoflowError) as caught:  # the tests run with HF_HUB_OFFLINE
        fetch_base(base, "v2", span=SPAN)
    assert caught.value.diagnostics[0].code is codes.NO_DOWNLOAD
    assert refused(f"owner/name/{NAME}").code is codes.NO_PARTS
    assert refused(f"owner/name/{NAME}", parts="nowhere").code is codes.NOT_A_BASE
    assert refused(f"owner/a name/{NAME}", parts="nano").code is codes.NOT_A_BASE
    assert refused(f"owner/name/{NAME}.gguf", parts="nano").code is codes.NO_PARTS


# What is refused ------------------------------------------------------------------------------------------


def test_without_parts(single):
    diagnostic = refused(str(single()))
    assert diagnostic.code is codes.NO_PARTS and "model.parts" in diagnostic.cure


def test_parts_of_a_whole_base(nano_folder):
    assert refused(str(nano_folder), parts="nano").code is codes.NO_PARTS
    assert refused("nano", parts="nano").code is codes.NO_PARTS


@pytest.mark.parametrize("parts", ["nowhere", "", "/no/where"])
def test_parts_that_are_not_there(single, parts):
    assert refused(str(single()), parts=parts).code is codes.NOT_A_BASE


def test_parts_that_lack_one(single, copy):
    shutil.rmtree(copy / "vae")
    diagnostic = refused(str(single()), parts=str(copy))
    assert diagnostic.code is codes.UNSUPPORTED_FORM and "vae" in diagnostic.message


def test_parts_of_another_size(single, copy):
    config = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 9}))
    diagnostic = refused(str(single()), parts=str(copy))
    assert diagnostic.code is codes.WRONG_WEIGHTS and "num_layers" in diagnostic.message


@pytest.mark.parametrize("name", ["nano", "folder"])
def test_a_revision_of_nothing_on_the_hub(nano_folder, single, name):
    diagnostic = refused("nano" if name == "nano" else str(nano_folder), revision="v1")
    assert diagnostic.code is codes.NO_REVISION
    assert refused(str(single()), parts=str(nano_folder), revision="v1").code is codes.NO_REVISION


OTHERS = {
    "GGUF": ("model.gguf", b"GGUF\x03\x00\x00\x00", "GGUF"),
    "GGUF by another name": ("model.safetensors", b"GGUF\x03\x00\x00\x00", "GGUF"),
    "a pickle": ("model.ckpt", b"", "a pickle"),
    "torch.save": ("model.safetensors", b"PK\x03\x04 data.pkl", "a pickle"),
    "an old pickle": ("model.safetensors", b"\x80\x02}q\x00.", "a pickle"),
    "a picture": ("model.png", b"\x89PNG", "a .png file"),
}


@pytest.mark.parametrize(("name", "content", "what"), OTHERS.values(), ids=OTHERS)
def test_other_kinds_of_file_are_named(tmp_path, nano_folder, name, content, what):
    (tmp_path / name).write_bytes(content)
    diagnostic = refused(str(tmp_path / name), parts=str(nano_folder))
    assert diagnostic.code is codes.UNSUPPORTED_FORM
    assert diagnostic.message.endswith(f"is {what}") and "safetensors" in diagnostic.cure + "safetensors"


def test_a_pickle_is_never_opened(tmp_path, nano_folder):
    """One that would leave a mark if it were unpickled."""
    mark = tmp_path / "mark"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    for name in ("model.safetensors", "model.pt"):
        torch.save({"w": Bomb()}, tmp_path / name)
        assert refused(str(tmp_path / name), parts=str(nano_folder)).code is codes.UNSUPPORTED_FORM
    assert not mark.exists()


FP8, BYTE = torch.float8_e4m3fn, torch.uint8
UNREAD = {
    "NVFP4": {"x.weight": torch.zeros(64, 8, dtype=BYTE), "x.weight_scale": torch.zeros(2).to(FP8),
              "x.weight_scale_2": torch.ones(())},
    "int8": {"x.weight": torch.zeros(64, 8, dtype=torch.int8), "x.weight_scale": torch.ones(64)},
    "SDNQ": {"x.weight": torch.zeros(64, 8, dtype=BYTE), "x.scale": torch.ones(4),
             "x.zero_point": torch.ones(4)},
    "FP4": {"x.weight": torch.zeros(64, 8, dtype=BYTE),
            "x.weight.quant_state.bitsandbytes__fp4": torch.zeros(9, dtype=BYTE)},
    "F8_E5M2": {"x.weight": torch.zeros(64, 8).to(torch.float8_e5m2)},
}  # fmt: skip


@pytest.mark.parametrize("form", UNREAD)
def test_forms_that_are_not_read_are_named(tmp_path, nano_folder, form):
    shutil.copytree(nano_folder, tmp_path / "base")
    file = next((tmp_path / "base" / "transformer").glob("*.safetensors"))
    file.unlink()
    save_file(UNREAD[form], file)
    diagnostic = refused(str(tmp_path / "base"))
    assert diagnostic.code is codes.UNSUPPORTED_FORM and diagnostic.message.endswith(f"stored as {form}")
    assert "ideogram-4-nf4" in diagnostic.cure


def test_numbers_that_are_none(single, nano_folder, weights):
    file = single()
    save_file({**weights, "layers.1.attention_norm1.weight": torch.ones(192, dtype=torch.int64)}, file)
    diagnostic = refused(str(file), parts=str(nano_folder))
    assert diagnostic.code is codes.WRONG_WEIGHTS
    assert file.name in diagnostic.message and "layers.1.attention_norm1.weight" in diagnostic.message
