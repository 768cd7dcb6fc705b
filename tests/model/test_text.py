"""Text features against ``Ideogram4Pipeline.encode_prompt`` and the transformer's own projection."""

import json

import pytest
import torch
from checkpoint_forms import nf4, to_fp8
from diffusers import Ideogram4Transformer2DModel
from safetensors.torch import load_file, save_file

from ideoflow.diagnostics import IdeoflowError, Span, fail
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model import text
from ideoflow.model.base import locate_base
from ideoflow.model.text import TextEncoder, tokenize
from ideoflow.plan import memory

CAPTIONS = [
    "x",
    '{"high_level_description":"A boat.","compositional_deconstruction":{"background":"sea","elements":[]}}',
    "naïve café 日本語 🦝\nsecond line",
]


@pytest.fixture(scope="module")
def encoder(nano_folder):
    return TextEncoder(nano_folder, dtype=torch.float32, device=torch.device("cpu"), max_tokens=2048)


def encoded_by_the_pipeline(pipeline, caption, length=160):
    """(tokens, features) of the pipeline's packed sequence, padding and image tokens removed."""
    with torch.no_grad():
        features, _, _, indicator = pipeline.encode_prompt(caption, 4, 4, length, torch.device("cpu"))
    return features[0][indicator[0] == 3]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_projected_features_are_the_transformers(encoder, nano_folder, pipeline, caption):
    model = Ideogram4Transformer2DModel.from_pretrained(nano_folder, subfolder="transformer")
    with torch.no_grad():
        theirs = model.llm_cond_proj(model.llm_cond_norm(encoded_by_the_pipeline(pipeline, caption)))
    torch.testing.assert_close(encoder.encode(caption), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("form", ["FP8", "NF4"])
def test_an_encoder_as_the_official_releases_store_it(copy, encoder, form, sharded):
    """In FP8 every Linear has a scale a row, and config.json a flag; in NF4 both are bitsandbytes'."""
    part = copy / "text_encoder"
    (file,) = part.glob("*.safetensors")
    dense = load_file(file)
    linears = {n for n in dense if n.endswith("_proj.weight")}
    stored, exact = dict(dense), dict(dense)
    for name in linears:
        if form == "FP8":
            made = to_fp8({name: dense[name]}, "[out]")
            exact[name] = made[name].float() * made[f"{name}_scale"][:, None]
        else:
            made, exact[name] = nf4(name, dense[name], nested=False)
        stored |= made
    config = json.loads((part / "config.json").read_text())
    mark = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config |= {"ideogram_fp8_weight_only": True} if form == "FP8" else {"quantization_config": mark}
    (part / "config.json").write_text(json.dumps(config))
    file.unlink()
    names = sorted(stored)
    shards = {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]} if sharded else {"model": names}
    for shard, inside in shards.items():
        save_file({n: stored[n] for n in inside}, part / f"{shard}.safetensors", {"format": "pt"})
    if sharded:
        places = {n: f"{shard}.safetensors" for shard, inside in shards.items() for n in inside}
        (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert locate_base(str(copy)).present
    found = TextEncoder(copy, dtype=torch.float32, device=torch.device("cpu"), max_tokens=2048)
    features = found.encode(CAPTIONS[1])
    for file in part.glob("*.safetensors*"):
        file.unlink()
    save_file(exact, part / "model.safetensors", {"format": "pt"})
    rounded = TextEncoder(copy, dtype=torch.float32, device=torch.device("cpu"), max_tokens=2048)
    torch.testing.assert_close(features, rounded.encode(CAPTIONS[1]))
    assert not torch.equal(features, encoder.encode(CAPTIONS[1]))


def test_the_token_ids_are_the_pipelines_length(encoder, pipeline):
    for caption in CAPTIONS:
        assert len(encoder.tokens(caption)) == len(encoded_by_the_pipeline(pipeline, caption))


@pytest.mark.parametrize(("limit", "batch"), [(1, 1), (60, 100), (10_000, 1), (10_000, 2048)])
def test_captions_that_go_together_do_not_touch_each_other(encoder, monkeypatch, limit, batch):
    """Padding included: only the order of the sums may differ."""
    alone = {caption: encoder.encode(caption) for caption in CAPTIONS}
    monkeypatch.setattr(text, "TOKENS_AT_ONCE", limit)
    monkeypatch.setitem(text.TOKENS_A_BATCH, "cpu", batch)
    done = []
    groups = encoder.encode_tokens([encoder.tokens(c) for c in CAPTIONS], done.append)
    together = [features for group in groups for features in group]
    for caption, features in zip(CAPTIONS, together, strict=True):
        close = {"rtol": 1e-5, "atol": 1e-5} if batch > 1 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(features, alone[caption], **close)
    assert done == sorted(done) and done[-1] == len(CAPTIONS)


def test_batches_are_of_about_one_length():
    captions = [[1] * n for n in (5, 300, 7, 290, 6, 2000, 1)]
    batches = text._batches(captions, 600)
    assert batches == [[6, 0, 4, 2], [3, 1], [5]]
    assert text._padded([captions[c] for c in batches[1]]).shape == (2, 300)


def test_the_plan_counts_as_many_tokens_together():
    assert memory._TOKENS_AT_ONCE == text.TOKENS_AT_ONCE
    assert text.TOKENS_A_BATCH["cuda"] == memory._TOKENS_A_BATCH


def test_no_more_than_two_layers_are_there(encoder):
    there = []
    for _ in encoder._layers(36):
        there.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in encoder.decoder.layers))
    assert there == [1] * 36, "besides the one that is being read"


def test_a_layer_that_cannot_be_read_is_told(encoder, monkeypatch):
    read = encoder._read

    def fails_later(name):
        if name.startswith("layers.7."):
            fail(codes.BAD_CONFIG, "damaged", cure="mend it")
        return read(name)

    monkeypatch.setattr(encoder, "_read", fails_later)
    with pytest.raises(IdeoflowError):
        encoder.encode(CAPTIONS[0])


def test_no_layer_stays(encoder):
    encoder.encode(CAPTIONS[0])
    assert all(p.is_meta for p in encoder.decoder.parameters())


def test_bf16_projects_in_bf16(nano_folder):
    encoder = TextEncoder(nano_folder, dtype=torch.bfloat16, device=torch.device("cpu"), max_tokens=2048)
    features = encoder.encode(CAPTIONS[0])
    assert features.dtype == torch.bfloat16 and features.isfinite().all()


def test_the_longest_caption_is_taken_and_one_more_token_is_not(encoder):
    caption = "boat " * 30
    length = len(tokenize(encoder.tokenizer, caption, max_tokens=2048))
    assert len(tokenize(encoder.tokenizer, caption, max_tokens=length)) == length
    with pytest.raises(IdeoflowError) as caught:
        tokenize(encoder.tokenizer, caption, max_tokens=length - 1, span=Span("a.icap"))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code is codes.TOO_LONG and diagnostic.span.path == "a.icap"
    assert f"{length} tokens" in diagnostic.message and str(length - 1) in diagnostic.message
    assert any("boat boat" in note for note in diagnostic.notes), "says which caption"


def test_more_than_2048_tokens_are_refused_and_not_cut(encoder):
    with pytest.raises(IdeoflowError) as caught:
        encoder.encode("\u65e5" * 2000)
    assert caught.value.diagnostics[0].code is codes.TOO_LONG
