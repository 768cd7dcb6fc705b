"""Bases are found and read without loading them; whatever is wrong with their files is told."""

import contextlib
import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_forms import fuse, to_fp8, to_nf4
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics import IdeoflowError, Span
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, hub_cache, locate_base
from ideoflow.model.files import read_safetensors_header
from ideoflow.model.load import load_tokenizer, load_transformer, load_vae, read_tensors
from ideoflow.model.spec import TransformerSpec
from ideoflow.model.text import TextEncoder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SPAN = Span("recipe.toml", 2, 8, 2, 14, 'base = "base"')
FP8 = torch.float8_e4m3fn
CPU = {"dtype": torch.float32, "device": torch.device("cpu")}


def refused(call, *args, **options):
    with pytest.raises(IdeoflowError) as caught:
        call(*args, **options)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic


def located(folder):
    diagnostic = refused(locate_base, str(folder), span=SPAN)
    assert diagnostic.span is SPAN and diagnostic.cure
    return diagnostic


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace(file, content):
    file.unlink()
    file.write_bytes(content)


# What is found --------------------------------------------------------------------------------------------


def test_nano_is_known_before_it_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path))
    facts = locate_base("nano")
    assert not facts.present and facts.folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_read_as_what_it_is(nano_folder, monkeypatch):
    facts = locate_base(str(nano_folder))
    assert (facts.transformer, facts.text_encoder, facts.vae) == (NANO_TRANSFORMER, NANO_TEXT, NANO_VAE)
    assert facts.present and facts.has_unconditional and facts.storage == "float32"
    assert facts.folder == nano_folder
    near = locate_base(nano_folder.name, relative_to=nano_folder.parent)
    assert (near.folder, near.digest) == (facts.folder, facts.digest)
    monkeypatch.setenv("HOME", str(nano_folder.parent))
    assert locate_base(f"~/{nano_folder.name}").digest == facts.digest


def test_a_hub_id_that_is_not_here_has_the_released_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    facts = locate_base("ideogram-ai/ideogram-4", revision="abc")
    assert not facts.present and facts.folder is None
    assert facts.transformer == TransformerSpec() and facts.digest == "ideogram-ai/ideogram-4@abc"


@pytest.fixture
def hub(copy, monkeypatch, tmp_path):
    """A copy of nano as the hub's client would have downloaded it, and the folder that it is in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    return Path(shutil.move(copy, repository / "snapshots" / ("0" * 40)))


def test_a_hub_id_that_was_downloaded_is_a_folder(hub, nano_folder):
    facts = locate_base("owner/name")
    assert facts.present and facts.folder == hub
    assert facts.digest == locate_base(str(nano_folder)).digest


@pytest.mark.parametrize("part", ["transformer", "unconditional_transformer", "text_encoder", "vae"])
def test_an_interrupted_download_is_not_present(hub, part):
    next((hub / part).glob("*.safetensors")).unlink()
    assert not locate_base("owner/name").present
    (hub / part / "a.safetensors.index.json").write_text(
        '{"weight_map": {"w": "a-00001-of-00002.safetensors"}}'
    )
    assert not locate_base("owner/name").present
    shutil.rmtree(hub / part)
    assert not locate_base("owner/name").present


def test_the_digest_follows_every_byte_that_matters(copy):
    first = locate_base(str(copy)).digest
    tensors = load_file(copy / WEIGHTS)
    tensors["layers.0.attention.to_q.weight"][0, 0] += 1
    (copy / WEIGHTS).unlink()
    save_file(tensors, copy / WEIGHTS)
    second = locate_base(str(copy)).digest
    edit(copy / "vae" / "config.json", scaling_factor=2)
    third = locate_base(str(copy)).digest
    (copy / "README.md").write_text("words")
    assert len({first, second, third}) == 3 and locate_base(str(copy)).digest == third


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "float16"), (torch.float32, "float32")]
)
def test_the_storage_is_that_of_most_bytes(copy, dtype, name):
    state = load_file(copy / WEIGHTS)
    store(copy, "transformer", {n: t.to(dtype) if t.ndim == 2 else t for n, t in state.items()})
    assert locate_base(str(copy)).storage == name


def test_shards_are_read_by_their_index(copy):
    tensors = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: tensors[n].bfloat16() for n in part}, copy / "transformer" / file)
    index = {n: file for file, part in halves.items() for n in part}
    where = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    where.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert locate_base(str(copy)).storage == "bf16"
    model = load_transformer(copy, precision="float32", device=torch.device("cpu"))
    assert torch.equal(model.input_proj.weight, tensors["input_proj.weight"].bfloat16().float())
    (found,) = read_tensors(copy / "transformer", ["llm_cond_proj.bias"], **CPU).values()
    assert torch.equal(found, tensors["llm_cond_proj.bias"].bfloat16())
    (copy / "transformer" / "b.safetensors").unlink()
    diagnostic = located(copy)
    assert diagnostic.code is codes.BAD_CONFIG and "b.safetensors is missing" in diagnostic.message


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["nowhere", "", ".", "..", "a/b/c", "/no/where", "./a/b", "~nobody/x", "a/b c"]
)
def test_names_that_are_no_base(name, tmp_path):
    diagnostic = refused(locate_base, name, relative_to=tmp_path, span=SPAN)
    assert diagnostic.code in (codes.NOT_A_BASE, codes.UNSUPPORTED_FORM) and diagnostic.span is SPAN


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "tokenizer", "vae", "model_index.json"])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
    diagnostic = located(copy)
    assert diagnostic.code is codes.UNSUPPORTED_FORM and part in diagnostic.message


def test_the_second_transformer_may_be_absent(copy):
    shutil.rmtree(copy / "unconditional_transformer")
    assert not locate_base(str(copy)).has_unconditional


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "unconditional_transformer"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "\ud800", "[" * 100_000, '"x"'])
def test_a_damaged_config(copy, part, content):
    (copy / part / "config.json").unlink()
    if content is not None:
        (copy / part / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    diagnostic = located(copy)
    assert diagnostic.code is codes.BAD_CONFIG and f"{part}/config.json" in diagnostic.message


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("transformer", {"num_layers": "many"}),
        ("transformer", {"num_layers": None}),
        ("text_encoder", {"text_config": [1]}),
        ("text_encoder", {"text_config": {"hidden_size": {}}}),
        ("text_encoder", {"text_config": 3}),
        ("vae", {"block_out_channels": 3}),
        ("vae", {"layers_per_block": "two"}),
    ],
)
def test_a_config_with_odd_values(copy, part, changes):
    edit(copy / part / "config.json", **changes)
    assert located(copy).code is codes.BAD_CONFIG


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae", "unconditional_transformer"])
def test_truncated_weights(copy, part):
    file = next((copy / part).glob("*.safetensors"))
    content = file.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        replace(file, content[:length])
        diagnostic = located(copy)
        assert diagnostic.code is codes.BAD_CONFIG and file.name in diagnostic.message


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "data_offsets", "w", "__metadata__"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    ).map(lambda v: json.dumps(v).encode())
    | st.binary(max_size=20)
)
def test_any_header_is_read_or_refused(tmp_path_factory, header):
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with contextlib.suppress(ValueError):
        assert isinstance(read_safetensors_header(file), dict)


def test_the_header_is_the_one_that_safetensors_wrote(tmp_path):
    tensors = {"a": torch.zeros(3, 4), "b.c": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_safetensors_header(tmp_path / "x.safetensors")
    assert {n: (h["dtype"], tuple(h["shape"])) for n, h in header.items()} == {
        "a": ("F32", (3, 4)),
        "b.c": ("BF16", (5,)),
    }


def test_pickled_weights_are_not_opened(copy):
    (copy / WEIGHTS).unlink()
    torch.save({"w": torch.zeros(1)}, copy / "transformer" / "diffusion_pytorch_model.bin")
    diagnostic = located(copy)
    assert diagnostic.code is codes.UNSUPPORTED_FORM and "never unpickles" in diagnostic.cure


@pytest.mark.parametrize(
    ("part", "config", "method"),
    [
        ("vae", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ("text_encoder", {"quant_method": "awq"}, "awq"),
        ("unconditional_transformer", {"quant_method": "gguf"}, "gguf"),
        ("transformer", {"quant_method": "sdnq"}, "sdnq"),
        ("text_encoder", {"load_in_8bit": True}, "an unknown method"),
        ("transformer", ["x"], "an unknown method"),
    ],
)
def test_quantised_parts(copy, part, config, method):
    edit(copy / part / "config.json", quantization_config=config)
    diagnostic = located(copy)
    assert diagnostic.code is codes.UNSUPPORTED_FORM
    assert diagnostic.message.endswith(f"{part} is quantised with {method}") and "bf16" in diagnostic.cure


def store(folder, part, tensors):
    file = next((folder / part).glob("*.safetensors"))
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("shape", ["[out]", "[out, 1]", "[]", "[1]"])
@pytest.mark.parametrize("part", ["transformer", "unconditional_transformer"])
def test_fp8_storage(copy, part, shape):
    state = to_fp8(load_file(copy / WEIGHTS), "[]" if shape == "[1]" else shape)
    ones = {n: t.view(1) for n, t in state.items() if shape == "[1]" and n.endswith("_scale")}
    store(copy, part, state | ones)
    facts = locate_base(str(copy))
    assert facts.storage == ("fp8" if part == "transformer" else "float32")


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_scale_that_is_missing_among_others(copy, part):
    """One that is read without its scale is hundreds of times too large."""
    eight, whole = torch.zeros(8, 8).to(FP8), load_file(next((copy / part).glob("*.safetensors")))
    store(copy, part, {"a.weight": eight, "a.weight_scale": torch.ones(8), "b.weight": eight.clone()})
    diagnostic = located(copy)
    assert diagnostic.code is codes.WRONG_WEIGHTS and "b.weight_scale" in diagnostic.message
    store(copy, part, {"a.weight": eight, "a.weight_scale": torch.ones(8), "b.weight_scale": torch.ones(8)})
    assert located(copy).message.endswith("missing: b.weight")
    # Rounded without any scales.
    store(copy, part, {n: t.to(FP8) if t.ndim == 2 else t for n, t in whole.items()})
    assert locate_base(str(copy)).present


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float8_e5m2])
@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_one_weight_that_is_no_number(copy, part, dtype):
    """The form is that of most bytes; the others must be numbers as well."""
    store(copy, part, {"a.weight": torch.zeros(64, 8), "b.weight": torch.zeros(8, 8).to(dtype)})
    diagnostic = located(copy)
    assert (
        diagnostic.code is codes.WRONG_WEIGHTS and ".safetensors: b.weight is stored as" in diagnostic.message
    )


def test_nf4_storage(copy):
    state = to_nf4(load_file(copy / WEIGHTS), nested=False)
    store(copy, "transformer", state)
    edit(copy / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert locate_base(str(copy)).storage == "nf4"
    store(copy, "transformer", {name: value for name, value in state.items() if "quant_state" not in name})
    assert "stored as U8" in located(copy).message


@pytest.mark.parametrize(
    ("part", "dtype", "name"),
    [
        ("transformer", torch.int8, "int8"),
        ("unconditional_transformer", torch.float8_e5m2, "F8_E5M2"),
        ("text_encoder", torch.int8, "int8"),
        ("vae", FP8, "fp8"),
        ("vae", torch.int8, "int8"),
    ],
)
def test_storage_that_is_not_read(copy, part, dtype, name):
    store(copy, part, {"w.weight": torch.zeros(8, 8).to(dtype)})
    diagnostic = located(copy)
    assert diagnostic.code is codes.UNSUPPORTED_FORM and f"stored as {name}" in diagnostic.message
    assert ("NF4" in diagnostic.cure) == (part != "vae")


@pytest.mark.parametrize(
    ("name", "storage"),
    [("ideogram-ai/ideogram-4-fp8", "fp8"), ("a/Ideogram-4-NF4-diffusers", "nf4"), ("a/b", "bf16")],
)
def test_the_form_of_a_hub_id_that_is_not_here_is_in_its_name(monkeypatch, tmp_path, name, storage):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate_base(name).storage == storage


def to_original_layout(folder, part="transformer"):
    """q, k and v as one tensor, and no config.json: as the model's authors store it."""
    fused = fuse(load_file(next((folder / part).glob("*.safetensors"))))
    store(folder, part, fused)
    (folder / part / "config.json").unlink()
    return fused


def test_sizes_are_inferred_where_the_original_layout_comes_without_a_config(copy):
    to_original_layout(copy)
    assert locate_base(str(copy)).transformer == NANO_TRANSFORMER


@pytest.mark.parametrize(
    "name", ["input_proj.weight", "layers.0.attention.norm_q.weight", "llm_cond_proj.weight"]
)
def test_shapes_that_do_not_tell_the_sizes(copy, name):
    fused = to_original_layout(copy)
    for damaged in ({n: t for n, t in fused.items() if n != name}, {**fused, name: torch.zeros(2, 2, 2)}):
        store(copy, "transformer", damaged)
        diagnostic = located(copy)
        assert diagnostic.code is codes.WRONG_WEIGHTS and name in diagnostic.message


def test_another_model(copy):
    edit(copy / "transformer" / "config.json", _class_name="Flux2Transformer2DModel")
    diagnostic = located(copy)
    assert diagnostic.code is codes.UNSUPPORTED_FORM and "Flux2Transformer2DModel" in diagnostic.message


# Loading --------------------------------------------------------------------------------------------------


def load_text_encoder(folder, *, dtype, device):
    TextEncoder(folder, dtype=dtype, device=device, max_tokens=64).encode("x")


def load_float32_transformer(folder, *, dtype, device):
    return load_transformer(folder, precision="float32", device=device)


@pytest.mark.parametrize(
    ("load", "part"),
    [(load_float32_transformer, "transformer"), (load_vae, "vae"), (load_text_encoder, "text_encoder")],
)
def test_weights_that_do_not_fit(copy, load, part):
    file = next((copy / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if tensors[n].ndim in (2, 4))
    damaged = {
        "missing": {n: t for n, t in tensors.items() if n != name},
        "not known": {**tensors, "stranger.weight": torch.zeros(1)},
        "of the wrong shape": {**tensors, name: tensors[name][:-1].contiguous()},
    }
    for what, content in damaged.items():
        file.unlink()
        save_file(content, file, metadata={"format": "pt"})
        diagnostic = refused(load, copy, **CPU)
        assert diagnostic.code in (codes.WRONG_WEIGHTS, codes.BAD_CONFIG), what
        assert "stranger" in diagnostic.message if what == "not known" else part in diagnostic.message
    replace(file, file.read_bytes()[:-10])
    assert refused(load, copy, **CPU).code is codes.BAD_CONFIG


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": 3}', "\x00"])
def test_a_damaged_tokenizer(copy, content):
    if content is None:
        shutil.rmtree(copy / "tokenizer")
    else:
        (copy / "tokenizer" / "tokenizer.json").write_text(content)
    diagnostic = refused(load_tokenizer, copy)
    assert diagnostic.code is codes.BAD_CONFIG and "tokenizer" in diagnostic.message


def test_a_tokenizer_without_a_chat_template(copy):
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    diagnostic = refused(load_tokenizer, copy)
    assert diagnostic.code is codes.BAD_CONFIG and "no chat template" in diagnostic.message


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("chat_template.jinja", "{% for x in %}", "cannot be used: Expected an expression"),
        (
            "chat_template.jinja",
            "{{ messages[3].content.text }}",
            "cannot be used: list object has no element 3",
        ),
        ("chat_template.jinja", "<|im_start|>user", "leaves the caption out"),
        ("tokenizer_config.json", "[]", "cannot be loaded"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', "cannot be loaded"),
        (
            "tokenizer.json",
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}',
            " makes 'a",
        ),
    ],
)
def test_a_tokenizer_that_loses_the_caption(copy, file, content, told):
    (copy / "tokenizer" / file).write_text(content)
    diagnostic = refused(load_tokenizer, copy)
    assert diagnostic.code is codes.BAD_CONFIG and diagnostic.cure
    assert str(copy / "tokenizer") in diagnostic.message and told in diagnostic.message


def test_tensors_by_name_that_are_missing(nano_folder):
    diagnostic = refused(
        read_tensors, nano_folder / "transformer", ["llm_cond_norm.weight", "no.such"], **CPU
    )
    assert diagnostic.code is codes.WRONG_WEIGHTS and "no.such" in diagnostic.message


@pytest.mark.parametrize(
    "place",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg"},
        {"HUGGINGFACE_HUB_CACHE": "$HOME/older", "HF_HOME": "/hf"},
        {"HF_HUB_CACHE": "~/$SUB/newer", "HUGGINGFACE_HUB_CACHE": "/older", "SUB": "sub"},
    ],
)
def test_the_hub_cache_is_where_the_hub_has_it(place, monkeypatch):
    """Worked out without the client, which takes long to import, as its own code does."""
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    wanted = importlib.util.module_from_spec(importlib.util.find_spec("huggingface_hub.constants"))
    wanted.__spec__.loader.exec_module(wanted)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants")
    assert hub_cache() == Path(wanted.HF_HUB_CACHE)
