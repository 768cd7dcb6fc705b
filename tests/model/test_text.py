"""Text features against ``Ideogram4Pipeline.encode_prompt`` and the transformer's own projection."""

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel

from ideoflow.diagnostics import IdeoflowError, Span, fail
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model import text
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


def test_the_token_ids_are_the_pipelines_length(encoder, pipeline):
    for caption in CAPTIONS:
        assert len(encoder.tokens(caption)) == len(encoded_by_the_pipeline(pipeline, caption))


@pytest.mark.parametrize("limit", [1, 60, 10_000])
def test_captions_that_go_together_do_not_touch_each_other(encoder, monkeypatch, limit):
    monkeypatch.setattr(text, "TOKENS_AT_ONCE", limit)
    done = []
    groups = encoder.encode_tokens([encoder.tokens(c) for c in CAPTIONS], done.append)
    together = [features for group in groups for features in group]
    for caption, features in zip(CAPTIONS, together, strict=True):
        assert torch.equal(features, encoder.encode(caption))
    assert done == sorted(done) and done[-1] == len(CAPTIONS)


def test_the_plan_counts_as_many_tokens_together():
    assert memory._TOKENS_AT_ONCE == text.TOKENS_AT_ONCE


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
