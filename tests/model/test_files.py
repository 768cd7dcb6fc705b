"""Headers, indices and folders that say what is not so: inspecting and reading a base refuse them alike."""

import json
import shutil

import pytest
import torch
from damage import edit, refused, weights
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.base import locate_base
from ideoflow.model.inspect import inspect
from ideoflow.model.latents import encode_pixels
from ideoflow.model.load import load_vae

KEY = "layers.1.feed_forward.w1.weight"
OWN = "diffusion_pytorch_model.safetensors"


def rewrite(file, change):
    """Replaces a file by one whose header, as JSON, was changed."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    words = json.dumps(header).encode()
    file.unlink()
    file.write_bytes(len(words).to_bytes(8, "little") + words + content[8 + size :])


def moved(by, kind=int):
    return lambda tensor: {**tensor, "data_offsets": [kind(o + by) for o in tensor["data_offsets"]]}


HEADERS = {
    "overlapping": (moved(-4), "lies at bytes"),
    "with a gap": (moved(4), "lies at bytes"),
    "negative": (lambda t: {**t, "data_offsets": [-4, 4]}, "has the data_offsets [-4, 4]"),
    "backwards": (lambda t: {**t, "data_offsets": t["data_offsets"][::-1]}, "lies at bytes"),
    "past the end": (moved(1 << 40), "lies at bytes"),
    "strings": (moved(0, str), 'has the data_offsets ["'),
    "floats": (moved(0, float), "has the data_offsets ["),
    "one offset": (lambda t: {**t, "data_offsets": [4]}, "has the data_offsets [4]"),
    "no offsets": (lambda t: {"dtype": "F32", "shape": [1]}, "has the data_offsets null"),
    "no shape": (lambda t: {**t, "shape": None}, "has the shape null"),
    "a word as shape": (lambda t: {**t, "shape": "x"}, 'has the shape "x"'),
    "no type": (lambda t: {**t, "dtype": None}, "has the dtype null"),
    "another type": (lambda t: {**t, "dtype": "F16"}, "is F16"),
    "nothing": (lambda t: None, "has no entries"),
}


@pytest.mark.parametrize(("change", "told"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_wrong_about_a_tensor(copy, change, told):
    file = weights(copy, "transformer")
    rewrite(file, lambda header: header.update({KEY: change(header[KEY])}))
    refused(copy, f"{file} cannot be used: ", told, code=codes.BAD_CONFIG)


def test_files_that_are_longer_or_say_what_is_no_text(copy):
    file = weights(copy, "vae")
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole + b"more")
    refused(copy, f"{file} cannot be used: 4 bytes are left over", code=codes.BAD_CONFIG)
    file.write_bytes(whole)
    rewrite(file, lambda header: header.update(__metadata__={"format": 1}))
    refused(copy, f"{file} cannot be used: ", "__metadata__ holds what is no text", code=codes.BAD_CONFIG)


# Indices --------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(copy):
    """(the folder, write) of a transformer in two shards, whose index ``write`` changes."""
    part = copy / "transformer"
    whole = load_file(part / OWN)
    (part / OWN).unlink()
    shards = {key: f"{number % 2}.safetensors" for number, key in enumerate(sorted(whole))}
    for name in set(shards.values()):
        save_file({key: whole[key] for key in shards if shards[key] == name}, part / name)

    def write(change=lambda shards: {"weight_map": shards}):
        (part / f"{OWN}.index.json").write_text(json.dumps(change(dict(shards))))
        return shards

    write()
    return part, write


INDICES = {
    "a list": (lambda shards: [], "is no index"),
    "no map": (lambda shards: {}, "is no index: it lacks 'weight_map'"),
    "an empty map": (lambda shards: {"weight_map": {}}, "names no files"),
    "numbers": (lambda shards: {"weight_map": {"a": 1}}, "is no index"),
    "files elsewhere": (lambda shards: {"weight_map": {"a": "../vae/x.safetensors"}}, "names no files"),
}


@pytest.mark.parametrize(("change", "told"), INDICES.values(), ids=INDICES)
def test_an_index_that_is_none(copy, sharded, change, told):
    part, write = sharded
    write(change)
    refused(copy, f"{part / OWN}.index.json ", told, code=codes.BAD_CONFIG)


def test_an_index_that_says_otherwise_than_its_shards(copy, sharded):
    part, write = sharded
    assert locate_base(str(copy)).present and not inspect(copy).problems
    shards = write(lambda shards: {"weight_map": shards | {"stranger.weight": "0.safetensors"}})
    refused(copy, f"{part / '0.safetensors'}: tensors are missing: stranger.weight")
    other = {"0.safetensors": "1.safetensors", "1.safetensors": "0.safetensors"}
    write(lambda shards: {"weight_map": {key: other[name] for key, name in shards.items()}})
    refused(copy, f"{part / OWN}.index.json says that ", "is in 0.safetensors, and it is in 1.safetensors")
    write()
    shard = part / shards[KEY]
    save_file({key: value for key, value in load_file(shard).items() if key != KEY}, shard)
    refused(copy, f"{shard}: tensors are missing: {KEY}")


def test_a_file_of_the_librarys_name_comes_before_any_index(copy):
    (copy / "transformer" / "old.safetensors.index.json").write_text("{}")
    assert locate_base(str(copy)).present and not inspect(copy).problems


# Folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["flux2-vae.safetensors", "diffusion_pytorch_model.fp16.safetensors", "index"]
)
def test_an_autoencoder_by_any_name(copy, nano_folder, name):
    file = weights(copy, "vae")
    if name == "index":  # without the entry "metadata"
        shards = dict.fromkeys(load_file(file), "a.safetensors")
        (copy / "vae" / f"{OWN}.index.json").write_text(json.dumps({"weight_map": shards}))
        name = "a.safetensors"
    file.rename(copy / "vae" / name)
    options = {"dtype": torch.float32, "device": torch.device("cpu")}
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    one, other = (encode_pixels(load_vae(folder, **options), pixels) for folder in (copy, nano_folder))
    assert torch.equal(one, other) and not inspect(copy).problems and locate_base(str(copy)).present


PIPELINES = {
    "{": ("cannot be read", codes.BAD_CONFIG),
    "[]": ("is not a JSON object", codes.BAD_CONFIG),
    '{"_class_name": "FluxPipeline"}': ("_class_name is FluxPipeline", codes.UNSUPPORTED_FORM),
}


@pytest.mark.parametrize(("content", "told"), PIPELINES.items(), ids=PIPELINES)
def test_a_folder_of_another_pipeline(copy, content, told):
    (copy / "model_index.json").write_text(content)
    refused(copy, copy / "model_index.json", told[0], code=told[1])


def test_a_scheduler_that_is_damaged(copy):
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text("[]")
    refused(copy, f"{file} is not a JSON object", code=codes.BAD_CONFIG)


def test_folders_that_are_no_base(copy):
    shutil.rmtree(copy / "unconditional_transformer")
    (copy / "unconditional_transformer").write_text("")
    refused(copy, "unconditional_transformer is a nameless file", code=codes.UNSUPPORTED_FORM)
    (copy / "unconditional_transformer").unlink()
    (copy / "model_index.json").unlink()
    refused(copy, "has no model_index.json", code=codes.UNSUPPORTED_FORM)


def test_comfyuis_older_form_is_named(copy):
    half = torch.zeros(8, 8).to(torch.float8_e4m3fn)
    edit(copy, "transformer", lambda t: {KEY: half, KEY.replace("weight", "scale_weight"): torch.ones(1)})
    refused(copy, "is stored as ComfyUI's older FP8 (scaled_fp8)", code=codes.UNSUPPORTED_FORM)
