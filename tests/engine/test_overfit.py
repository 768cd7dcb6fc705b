"""Whether gradients do what they are for: one picture, fixed noise levels and noise, learnt by heart."""

from typing import Any

import torch

from ideoflow.data.buckets import center_crop
from ideoflow.data.order import draw
from ideoflow.data.pixels import load_pixels
from ideoflow.data.survey import Sample
from ideoflow.engine.setup import build
from ideoflow.engine.step import accumulate, prepare
from ideoflow.model.base import BaseFacts
from ideoflow.model.latents import encode_pixels
from ideoflow.model.load import load_vae
from ideoflow.model.text import TextEncoder
from ideoflow.recipe import ScheduleSettings
from ideoflow.resources import recipes

CAPTION = '{"compositional_deconstruction":{"background":"A cat.","elements":[]}}'


def test_one_picture_is_learnt_at_fixed_noise(nano: BaseFacts, plan_of: Any) -> None:
    assert nano.folder
    cpu = torch.device("cpu")
    picture = recipes() / "quickstart" / "cat.jpg"
    geometry = center_crop(451, 300, (64, 64))
    vae = load_vae(nano.folder, dtype=torch.float32, device=cpu)
    latents = encode_pixels(vae, load_pixels(Sample(picture, (64, 64), geometry, CAPTION))[None])[0]
    encoder = TextEncoder(nano.folder, dtype=torch.float32, device=cpu, max_tokens=2048)
    text = encoder.encode(CAPTION)
    pairs = [
        prepare(latents, text, (4, 4), draw(n, *latents.shape, 0, 0.0), ScheduleSettings()) for n in range(2)
    ]

    model = build(plan_of(**{"adapter.rank": 32}))
    model.transformer.train()
    optimizer = torch.optim.AdamW(model.parameters.values(), lr=4e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        losses.append(float(accumulate(model.transformer, pairs, parts=1)))
        optimizer.step()
        optimizer.zero_grad()
        if losses[-1] < losses[0] / 2:
            break
    assert losses[-1] < losses[0] / 2, losses[:: len(losses) // 6]
