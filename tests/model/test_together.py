"""Parts that are whole and of different models: inspecting and reading the base refuse it alike."""

import json

import pytest
from damage import SPAN, configure, edit, refused
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.base import locate_base


def vae(folder, **changes):
    """Another autoencoder, as its own class saves it."""
    config = AutoencoderKLFlux2.load_config(folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    AutoencoderKLFlux2.from_config({**config, **changes}).save_pretrained(folder / "vae")


def fewer_layers(folder):
    edit(folder, "text_encoder", lambda t: {k: v for k, v in t.items() if _layer(k) < 20})
    configure(folder, "text_encoder", "text_config", num_hidden_layers=20)


def _layer(key):
    return int(key.split(".layers.")[1].split(".")[0]) if ".layers." in key else 0


def other_features(folder):
    cut = {"llm_cond_norm.weight": (slice(208),), "llm_cond_proj.weight": (slice(None), slice(208))}
    edit(folder, "transformer", lambda t: {k: v[cut[k]] if k in cut else v for k, v in t.items()})
    configure(folder, "transformer", llm_features_dim=208)


def fewer_words(folder):
    key = "language_model.embed_tokens.weight"
    edit(folder, "text_encoder", lambda t: {**t, key: t[key][:700]})
    configure(folder, "text_encoder", "text_config", vocab_size=700)


def other_channels(folder, *parts):
    sides = {"input_proj.weight": 1, "final_layer.linear.weight": 0, "final_layer.linear.bias": 0}
    for part in parts:
        edit(folder, part, lambda t: {**t, **{k: t[k].chunk(2, side)[0] for k, side in sides.items()}})
        configure(folder, part, in_channels=64)


def fewer_blocks(folder):
    vae(
        folder,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


STRANGERS = {
    "a shallow text encoder": (
        fewer_layers,
        (
            "text_encoder/config.json: num_hidden_layers is 20",
            "llm_features_dim of",
            "taken from the first 36",
        ),
    ),
    "other text features": (
        other_features,
        (
            "transformer/config.json: llm_features_dim is 208",
            "hidden_size of",
            "text_encoder/config.json is 416",
        ),
    ),
    "fewer words": (
        fewer_words,
        ("tokenizer/tokenizer.json: ids go up to 736", "vocab_size of", "text_encoder/config.json is 700"),
    ),
    "fewer latent channels": (
        lambda folder: vae(folder, latent_channels=16),
        ("transformer/config.json: in_channels is 128", "latent_channels of", "vae/config.json is 64"),
    ),
    "fewer channels": (
        lambda folder: other_channels(folder, "transformer", "unconditional_transformer"),
        ("transformer/config.json: in_channels is 64", "latent_channels of", "vae/config.json is 128"),
    ),
    "fewer blocks": (
        fewer_blocks,
        ("vae/config.json: block_out_channels has 3 blocks", "8 pixels wide", "in_channels of", "for 16"),
    ),
    "another second transformer": (
        lambda folder: other_channels(folder, "unconditional_transformer"),
        ("unconditional_transformer/config.json: in_channels is 64", "transformer/config.json is 128"),
    ),
}


@pytest.mark.parametrize(("change", "wanted"), STRANGERS.values(), ids=STRANGERS)
def test_parts_of_different_models(copy, change, wanted):
    change(copy)
    refused(copy, *wanted)


@pytest.mark.parametrize("parts", ["folder", "nano"])
def test_a_single_file_and_parts_of_another_model(nano_folder, tmp_path, monkeypatch, parts):
    state = load_file(nano_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    for key, side in (("llm_cond_norm.weight", 0), ("llm_cond_proj.weight", 1)):
        state[key] = state[key].narrow(side, 0, 208).contiguous()
    file = tmp_path / "x.safetensors"
    save_file(state, file)
    named = str(nano_folder)
    if parts == "nano":  # before it is made
        monkeypatch.setattr("ideoflow.model.base.user_cache", lambda: tmp_path)
        named = "nano"
    else:  # of whose transformer nothing is used
        bare = tmp_path / "bare"
        bare.mkdir()
        for part in ("text_encoder", "tokenizer", "vae"):
            (bare / part).symlink_to(nano_folder / part)
        named = str(bare)
    with pytest.raises(IdeoflowError) as caught:
        locate_base(str(file), parts=named, span=SPAN)
    (told,) = caught.value.diagnostics
    assert told.code is codes.WRONG_WEIGHTS and told.span is SPAN
    assert told.message.startswith(f"{file}: llm_features_dim is 208") and "text_encoder" in told.message


@pytest.mark.parametrize(
    ("part", "within", "key"),
    [("transformer", None, "num_layers"), ("text_encoder", "text_config", "num_hidden_layers"),
     ("vae", None, "layers_per_block")],
)  # fmt: skip
def test_more_layers_than_any_file_has(copy, part, within, key):
    file = configure(copy, part, within, **{key: 10**30})
    refused(copy, f"{file}: {key} is {10**30}, and {copy / part} has")


VALUES = {
    "transformer": (
        None,
        {
            "num_layers": ["6", None, 0, 6.0],
            "norm_eps": ["x", -1, True],
            "mrope_section": ["x", [6, 5], [6, 5, "5"]],
        },
    ),
    "text_encoder": (
        "text_config",
        {
            "rms_norm_eps": ["x", None],
            "hidden_act": ["gelux", None],
            "hidden_size": ["32"],
            "rope_parameters": [3],
        },
    ),
    "vae": (
        None,
        {
            "norm_num_groups": [0, 3],
            "batch_norm_eps": ["x", None],
            "act_fn": ["gelux"],
            "in_channels": [4, None],
            "patch_size": [[4, 1], None],
            "use_quant_conv": ["x"],
            "decoder_block_out_channels": ["x"],
            "block_out_channels": [None, [], ["16", 32, 32, 32]],
            "down_block_types": [["AttnDownBlock2D"] * 4, ["DownEncoderBlock2D"] * 3, None],
        },
    ),
}


@pytest.mark.parametrize("part", VALUES)
def test_values_that_no_part_can_be_built_with(copy, part):
    within, values = VALUES[part]
    file = copy / part / "config.json"
    whole = file.read_text()
    for key, several in values.items():
        for value in several:
            configure(copy, part, within, **{key: value})
            named = f"{within}.{key}" if within else key
            refused(copy, f"{file}: {named} is {json.dumps(value)}, and must be", code=codes.BAD_CONFIG)
            file.write_text(whole)


def test_a_text_encoder_of_another_kind(copy):
    file = configure(copy, "text_encoder", model_type="llama")
    refused(copy, f'{file}: model_type is "llama"', code=codes.UNSUPPORTED_FORM)


def test_tokenizers_that_cannot_be_used(copy):
    folder = copy / "tokenizer"
    for name, content, told in (
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "{}", "has no vocabulary"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "1"}}, "added_tokens": []}', "has no vocabulary"),
        ("chat_template.jinja", None, "is missing: the tokenizer has no chat template"),
        ("chat_template.jinja", "{% for x in %}", "the chat template is none, in line 1: Expected"),
    ):
        whole = (folder / name).read_text()
        (folder / name).unlink() if content is None else (folder / name).write_text(content)
        refused(copy, folder / name, told, code=codes.BAD_CONFIG)
        (folder / name).write_text(whole)
