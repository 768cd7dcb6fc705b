"""Image tokens against the decode path of ``Ideogram4Pipeline`` itself."""

import pytest
import torch

from ideoflow.model.latents import decode_tokens, encode_pixels, patchify, unpatchify


@pytest.fixture
def still(pipeline, monkeypatch):
    """The pipeline with transformers that predict no velocity: it decodes the latents that it was given."""

    def nothing(hidden_states, **_):
        return (torch.zeros_like(hidden_states),)

    for model in (pipeline.transformer, pipeline.unconditional_transformer):
        monkeypatch.setattr(model, "forward", nothing)

    def decode(latents, width, height, output_type="pt"):
        return pipeline(
            "x", height=height, width=width, latents=latents, num_inference_steps=1, max_sequence_length=32,
            guidance_scale=1.0, guidance_schedule=None, output_type=output_type,
        ).images  # fmt: skip

    return decode


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64), (64, 112)])
def test_the_pipeline_decodes_tokens_alike(still, pipeline, width, height):
    grid = (height // 16, width // 16)
    tokens = noise(1, grid[0] * grid[1], 128)
    assert torch.equal(still(tokens, width, height, "latent"), tokens), "the stand-in changes nothing"
    ours = (decode_tokens(pipeline.vae, tokens, grid) / 2 + 0.5).clamp(0, 1)
    assert ours.shape == (1, 3, height, width)
    torch.testing.assert_close(ours, still(tokens, width, height), rtol=0, atol=1e-6)


def test_encoded_pixels_decode_in_the_pipeline_to_what_the_autoencoder_gives(still, pipeline):
    pixels = noise(1, 3, 64, 96).clamp(-1, 1)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        expected = (pipeline.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    tokens = encode_pixels(pipeline.vae, pixels)
    assert tokens.shape == (1, 24, 128) and tokens.dtype == torch.float32
    torch.testing.assert_close(still(tokens, 96, 64), expected, rtol=0, atol=1e-5)


def test_the_latents_are_the_mode_and_not_a_sample(pipeline):
    pixels = noise(1, 3, 64, 64)
    assert torch.equal(encode_pixels(pipeline.vae, pixels), encode_pixels(pipeline.vae, pixels))


def test_a_batch_is_its_pictures(pipeline):
    pixels = noise(3, 3, 64, 64)
    batch = encode_pixels(pipeline.vae, pixels)
    alone = torch.cat([encode_pixels(pipeline.vae, p[None]) for p in pixels])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 32, 4, 4), (2, 32, 2, 6), (3, 5, 8, 2)])
def test_patchify_by_its_definition(shape):
    latents = torch.arange(float(torch.Size(shape).numel())).view(shape)
    tokens = patchify(latents)
    b, channels, height, width = shape
    for n in range(b):
        for token in range(height * width // 4):
            row, column = divmod(token, width // 2)
            for channel in range(4 * channels):
                (down, right), c = divmod(channel // channels, 2), channel % channels
                assert tokens[n, token, channel] == latents[n, c, 2 * row + down, 2 * column + right]
    assert torch.equal(unpatchify(tokens, (height // 2, width // 2)), latents)
