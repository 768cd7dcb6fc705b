"""One training step against the published formulas, written out with diffusers' own packing helpers."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import IMAGE_POSITION_OFFSET, Ideogram4MRoPE
from peft import LoraConfig
from torch import Tensor

from ideoflow.data.order import draw
from ideoflow.engine.setup import build
from ideoflow.engine.step import accumulate, predict_velocity, prepare, velocity_loss
from ideoflow.model.base import BaseFacts
from ideoflow.model.load import PRECISIONS, load_transformer
from ideoflow.model.text import TextEncoder
from ideoflow.recipe import ScheduleSettings

CAPTION = '{"high_level_description":"A cat.","compositional_deconstruction":{"background":"","elements":[]}}'
GRID = (4, 6)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"]


@pytest.fixture(scope="module")
def encoder(nano: BaseFacts) -> TextEncoder:
    assert nano.folder
    return TextEncoder(nano.folder, dtype=torch.float32, device=torch.device("cpu"), max_tokens=2048)


def randomise(model: torch.nn.Module) -> None:
    """The same values for both factors in every model; the second starts at zero and would hide gradients."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=g) * 0.05)


def pipelines_features(nano: BaseFacts) -> Tensor:
    """(tokens, features) raw text features of the pipeline's own encoder, padding removed."""
    pipeline = Ideogram4Pipeline.from_pretrained(nano.folder)
    with torch.no_grad():
        features, _, _, indicator = pipeline.encode_prompt(CAPTION, 4, 4, 100, torch.device("cpu"))
    return features[0][indicator[0] == 3]


def written_out_step(
    nano: BaseFacts, raw: Tensor, latents: Tensor, draws: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and LoRA gradients by the formulas, with the whole diffusers model, padding and its mask."""
    model = Ideogram4Transformer2DModel.from_pretrained(nano.folder, subfolder="transformer")
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    randomise(model)
    padded = raw.shape[0] + 5
    positions, segments, indicator = Ideogram4Pipeline._prepare_ids(
        [raw.shape[0]], *GRID, padded, torch.device("cpu")
    )
    uniform, eps = draws.uniform, draws.noise
    mean = 0.5 * torch.log(torch.tensor(GRID[0] * 16 * GRID[1] * 16 / 512**2, dtype=torch.float64))
    y = mean + 1.5 * torch.special.ndtri(torch.tensor(uniform, dtype=torch.float64))
    t = (1 - 1 / (1 + torch.exp(-y))).clamp(1 / (1 + torch.e**9.0), 1 / (1 + torch.e**-7.5)).float()
    sigma = 1 - t
    noisy = (1 - sigma) * latents + sigma * eps
    features = torch.zeros(1, padded + latents.shape[0], raw.shape[1])
    features[0, 5:padded] = raw
    hidden = torch.cat([torch.zeros(padded, 128), noisy])[None]
    out = model(
        hidden_states=hidden,
        timestep=t[None],
        encoder_hidden_states=features,
        position_ids=positions,
        segment_ids=segments,
        indicator=indicator,
    ).sample[0, padded:]
    loss = ((out - (latents - eps)) ** 2).mean()
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_step_is_the_published_formulas_to_float32_rounding(
    nano: BaseFacts, plan_of: Any, encoder: TextEncoder
) -> None:
    raw = pipelines_features(nano)
    latents = torch.randn(GRID[0] * GRID[1], 128, generator=torch.Generator().manual_seed(3))
    chance = draw(5, *latents.shape, seed=0, dropout=0.0)
    loss, gradients = written_out_step(nano, raw, latents, chance)

    model = build(plan_of(**{"adapter.rank": 8}))
    randomise(model.transformer)
    sample = prepare(latents, encoder.encode(CAPTION), GRID, chance, ScheduleSettings())
    ours = accumulate(model.transformer, [sample], parts=1)

    torch.testing.assert_close(ours, loss.detach(), rtol=1e-5, atol=1e-6)
    assert model.parameters.keys() == gradients.keys()
    for name, parameter in model.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-4, atol=1e-7, msg=name)


def test_a_batch_is_the_mean_over_all_its_tokens(plan_of: Any, encoder: TextEncoder) -> None:
    model = build(plan_of(**{"adapter.rank": 4}))
    randomise(model.transformer)
    text = encoder.encode(CAPTION)
    batch = []
    for n, grid in enumerate([(2, 3), (4, 4)]):
        latents = torch.randn(grid[0] * grid[1], 128, generator=torch.Generator().manual_seed(n))
        batch.append(prepare(latents, text, grid, draw(n, *latents.shape, 0, 0.0), ScheduleSettings()))
    loss = accumulate(model.transformer, batch, parts=2)
    with torch.no_grad():
        errors = torch.cat(
            [
                (predict_velocity(model.transformer, s.noisy, s.time, s.text, s.grid) - s.target).flatten()
                for s in batch
            ]
        )
    torch.testing.assert_close(loss, errors.pow(2).mean())
    got = {n: p.grad.clone() for n, p in model.parameters.items() if p.grad is not None}
    model.transformer.zero_grad()
    weighted = sum(velocity_loss(model.transformer, s) * s.noisy.numel() for s in batch) / errors.numel()
    (weighted / 2).backward()
    for name, p in model.parameters.items():
        torch.testing.assert_close(got[name], p.grad)


def test_checkpointing_changes_nothing(plan_of: Any, encoder: TextEncoder) -> None:
    text = encoder.encode(CAPTION)
    latents = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    sample = prepare(latents, text, (4, 4), draw(0, 16, 128, 0, 0.0), ScheduleSettings())
    results = []
    for way in ("on", "off"):
        model = build(plan_of(**{"adapter.rank": 4, "memory.checkpointing": way}))
        model.transformer.train()
        randomise(model.transformer)
        loss = accumulate(model.transformer, [sample], parts=1)
        results.append((loss, [p.grad for p in model.parameters.values()]))
    torch.testing.assert_close(results[0], results[1])


def test_a_dropped_caption_leaves_no_text_tokens() -> None:
    latents = torch.zeros(16, 128)
    kept, dropped = (
        prepare(latents, torch.ones(9, 8), (4, 4), draw(0, 16, 128, 0, share), ScheduleSettings())
        for share in (0.0, 1.0)
    )
    assert kept.text.shape == (9, 8) and dropped.text.shape == (0, 8)
    assert torch.equal(kept.noisy, dropped.noisy)


def test_every_image_position_has_its_own_rotary_row_even_under_autocast() -> None:
    """In bf16, positions from 65536 on step by 512, and a whole picture would share one row."""
    rope = Ideogram4MRoPE(head_dim=256, base=5_000_000, mrope_section=(24, 20, 20))
    h, w = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    positions = torch.stack([torch.zeros_like(h), h, w], -1).reshape(1, -1, 3) + IMAGE_POSITION_OFFSET
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            cos, sin = rope(positions)
        assert torch.unique(torch.cat([cos, sin], -1)[0], dim=0).shape[0] == 4096


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8"])
def test_time_keeps_its_precision_up_to_the_sinusoid(nano: BaseFacts, precision: str) -> None:
    assert nano.folder
    model = load_transformer(nano.folder, precision=precision, device=torch.device("cpu"))
    near = torch.tensor([0.5, 0.5 + 1e-4])  # the same number in bf16, 1 apart on the embedding's 1e4 scale
    with torch.no_grad():
        a, b = model.t_embedding(near)
    assert a.dtype == PRECISIONS[precision]
    assert (a - b).float().norm() > 0.05 * a.float().norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiling_the_blocks_changes_nothing_but_rounding(plan_of: Any) -> None:
    latents = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    text = torch.randn(9, 192, generator=torch.Generator().manual_seed(3))
    sample = prepare(latents, text, (4, 4), draw(0, 16, 128, 0, 0.0), ScheduleSettings())
    targets = ["layers.0.attention.*", "layers.5.feed_forward.*"]
    plan = plan_of(**{"adapter.rank": 4, "adapter.targets": targets})
    # The planner only compiles for GPUs; the engine does what a plan says.
    compiled = replace(
        plan,
        decisions=tuple(replace(d, value="regional") if d.id == "compile" else d for d in plan.decisions),
    )
    results = []
    for each in (plan, compiled):
        model = build(each)
        model.transformer.train()
        randomise(model.transformer)
        loss = model.gradients([sample], 1)
        results.append((loss, {n: p.grad for n, p in model.parameters.items()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)
