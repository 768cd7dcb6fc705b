"""Our sampler against ``Ideogram4Pipeline``'s own, with true guidance and with the proxy; decoding too."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Ideogram4Pipeline

from ideoflow.engine.sampling import Sampler
from ideoflow.engine.schedule import PRESETS
from ideoflow.engine.setup import build
from ideoflow.model.base import BaseFacts
from ideoflow.model.text import TextEncoder

CAPTION = '{"high_level_description":"A cat.","compositional_deconstruction":{"background":"","elements":[]}}'


@pytest.fixture(scope="module")
def text(nano: BaseFacts) -> torch.Tensor:
    assert nano.folder
    encoder = TextEncoder(nano.folder, dtype=torch.float32, device=torch.device("cpu"), max_tokens=2048)
    return encoder.encode(CAPTION)


def pipelines_picture(nano: BaseFacts, **options: Any) -> np.ndarray:
    pipe = Ideogram4Pipeline.from_pretrained(nano.folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(6 * 4, 128, generator=torch.Generator().manual_seed(9))[None]
    picture = pipe(CAPTION, height=96, width=64, latents=noise, max_sequence_length=100, **options).images[0]
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_are_the_pipelines_own(
    nano: BaseFacts, plan_of: Any, text: torch.Tensor, preset: str
) -> None:
    settings = {"preset": preset, "steps": 5, "height": 96, "width": 64, "seed": 9, "prompts": ["x"]}
    plan = plan_of(**{f"validate.{k}": v for k, v in settings.items()})
    sampler = Sampler(plan, build(plan))
    p = PRESETS[preset]
    theirs = pipelines_picture(
        nano, num_inference_steps=5, guidance_schedule=p.guidance(5, None), mu=p.mu, std=p.std
    )
    ours = np.asarray(sampler.sample([text])[0]).astype(int)
    assert ours.shape == theirs.shape == (96, 64, 3)
    # 8-bit rounding may fall on the other side where float32 sums ran in another order.
    assert np.abs(ours - theirs).max() <= 1


def test_without_the_second_transformer_the_conditional_one_runs_without_text(
    nano: BaseFacts, plan_of: Any, text: torch.Tensor
) -> None:
    settings = {"steps": 3, "height": 96, "width": 64, "seed": 9, "guidance": 4.0, "prompts": ["x"]}
    plan = plan_of(**{f"validate.{k}": v for k, v in settings.items()})
    sampler = Sampler(plan, build(plan))
    sampler.unconditional = None  # as it is where the plan says proxy
    pipe = Ideogram4Pipeline.from_pretrained(nano.folder)
    pipe.unconditional_transformer = pipe.transformer
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(24, 128, generator=torch.Generator().manual_seed(9))[None]
    preset = PRESETS["default"]
    theirs = pipe(
        CAPTION,
        height=96,
        width=64,
        latents=noise,
        max_sequence_length=100,
        num_inference_steps=3,
        guidance_scale=4.0,
        guidance_schedule=None,
        mu=preset.mu,
        std=preset.std,
    ).images[0]
    ours = sampler.sample([text])[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("precision", ["float32", "fp8", "int8", "nf4"])
def test_a_streamed_second_transformer_makes_the_same_pictures(
    plan_of: Any, text: torch.Tensor, precision: str
) -> None:
    settings = {"validate.prompts": ["x"], "validate.steps": 2, "memory.precision": precision}
    plan = plan_of(**settings)
    decisions = [replace(d, value="streamed") if d.id == "unconditional" else d for d in plan.decisions]
    streamed = Sampler(replace(plan, decisions=tuple(decisions)), build(plan))
    loaded = Sampler(plan, build(plan))
    assert streamed.stream is not None
    texts = [text] * (2 if precision == "float32" else 1)  # decoding in bf16 takes longest here
    expected = [p.tobytes() for p in loaded.sample(texts)]
    for _ in range(2):  # the second time in slots made anew
        assert streamed.stream.slot_bytes == 0, "nothing of it is on the device while it is not needed"
        assert [p.tobytes() for p in streamed.sample(texts)] == expected
    assert streamed.stream.fetched > 0


def test_sampling_leaves_the_model_as_it_was(plan_of: Any, text: torch.Tensor) -> None:
    plan = plan_of(**{"validate.prompts": ["x"], "validate.steps": 2})
    model = build(plan)
    model.transformer.train()
    pictures = Sampler(plan, model).sample([text, text])
    assert model.transformer.training
    assert all(p.grad is None for p in model.parameters.values())
    assert pictures[0].tobytes() != pictures[1].tobytes()  # each prompt has its own seed
