"""Text features against ``Ideogram4Pipeline.encode_prompt`` and the transformer's own projection."""

import pytest
import torch
from diffusers import Ideogram4Transformer2DModel

from ideoflow.diagnostics import IdeoflowError, Span
from ideoflow.diagnostics.codes import model as codes
from ideoflow.model.spec import TAPPED_LAYERS
from ideoflow.model.text import TextEncoder, raw_features, tokenize

CAPTIONS = [
    "x",
    '{"high_level_description":"A boat.","compositional_deconstruction":{"background":"sea","elements":[]}}',
    "naïve café 日本語 🦝\nsecond line",
]


@pytest.fixture(scope="module")
def encoder(nano_folder):
    return TextEncoder.load(nano_folder, dtype=torch.float32, device=torch.device("cpu"), max_tokens=2048)


def encoded_by_the_pipeline(pipeline, caption, length=160):
    """(tokens, features) of the pipeline's packed sequence, padding and image tokens removed."""
    with torch.no_grad():
        features, _, _, indicator = pipeline.encode_prompt(caption, 4, 4, length, torch.device("cpu"))
    return features[0][indicator[0] == 3]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_raw_features_are_the_pipelines(encoder, pipeline, caption):
    ids = tokenize(encoder.tokenizer, caption, max_tokens=2048)
    ours, theirs = raw_features(encoder.model, ids), encoded_by_the_pipeline(pipeline, caption)
    assert ours.shape == (len(ids), 13 * 32)
    # Padding changes nothing but the order of the sums.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_projected_features_are_the_transformers(encoder, nano_folder, pipeline, caption):
    model = Ideogram4Transformer2DModel.from_pretrained(nano_folder, subfolder="transformer")
    with torch.no_grad():
        theirs = model.llm_cond_proj(model.llm_cond_norm(encoded_by_the_pipeline(pipeline, caption)))
    torch.testing.assert_close(encoder.encode(caption), theirs, rtol=1e-4, atol=1e-4)


def test_the_layer_index_varies_fastest(encoder):
    """Column ``13 * h + k`` holds hidden unit h after the k-th tapped layer: hooks on the layers say so."""
    ids = tokenize(encoder.tokenizer, CAPTIONS[1], max_tokens=2048)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out, i=i: outputs.update({i: out}))
        for i, layer in enumerate(encoder.model.language_model.layers)
    ]
    features = raw_features(encoder.model, ids)
    for hook in hooks:
        hook.remove()
    for k, layer in enumerate(TAPPED_LAYERS):
        assert torch.equal(features[:, k :: len(TAPPED_LAYERS)], outputs[layer][0].float())


def test_bf16_projects_in_bf16(nano_folder):
    encoder = TextEncoder.load(nano_folder, dtype=torch.bfloat16, device=torch.device("cpu"), max_tokens=2048)
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
