"""One training step, on the reference path and on the fused one.

The reference path is plain diffusers and PEFT, one sample at a time, unpadded; the fused path computes a
whole batch at once on packed tokens. Both give the same loss and gradients.

The model is given x_sigma = (1 - sigma) x0 + sigma eps at time t = 1 - sigma and predicts the velocity
x0 - eps; the loss is the mean squared error over image tokens, in float32, unweighted. There is no autocast:
inputs are cast to the weights' type. A batch is run sample by sample and its gradients are summed, which is
the same sum without padding, without a mask, and with the memory of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import Ideogram4Transformer2DModel
from torch import Tensor

from ideoflow.data.order import Draw
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.graphs import GraphedSteps
from ideoflow.engine.packed import PackedLayout
from ideoflow.engine.schedule import training_time
from ideoflow.kernels.budget import PACKED_MULTIPLE
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.recipe import ScheduleSettings


@dataclass(frozen=True)
class TrainingSample:
    """What one sample gives to one step.

    Args:
        noisy: (tokens, 128) x_sigma, float32.
        target: (tokens, 128) velocity x0 - eps, float32.
        time: (1,) model time, float32.
        text: (text tokens, hidden) projected features; no rows where the caption is dropped.
        grid: (rows, columns) of image tokens.
    """

    noisy: Tensor
    target: Tensor
    time: Tensor
    text: Tensor
    grid: tuple[int, int]

    def pinned(self) -> TrainingSample:
        """The same in page-locked memory, from which a GPU fetches it without holding up anyone."""
        tensors = (getattr(self, name).pin_memory() for name in ("noisy", "target", "time", "text"))
        return TrainingSample(*tensors, self.grid)


def prepare(
    latents: Tensor, text: Tensor, grid: tuple[int, int], draw: Draw, schedule: ScheduleSettings
) -> TrainingSample:
    """Adds noise to a sample's latents (tokens, 128) at the level that was drawn for it."""
    height, width = (n * PIXELS_PER_TOKEN for n in grid)
    time = training_time(draw.uniform, height, width, schedule.mu, schedule.std)
    sigma = 1 - time
    noisy = (1 - sigma) * latents + sigma * draw.noise
    return TrainingSample(noisy, latents - draw.noise, time, text[:0] if draw.drop_caption else text, grid)


def predict_velocity(
    transformer: Ideogram4Transformer2DModel, noisy: Tensor, time: Tensor, text: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Velocity (tokens, 128) of one sample, in the weights' type.

    ``noisy`` (tokens, 128) and ``text`` (text tokens, hidden) may be of any type and on any device.
    """
    weight = transformer.input_proj.weight
    layout = PackedLayout((text.shape[0],), (grid,))
    noisy, time, text = (x.to(weight.device, non_blocking=True) for x in (noisy, time, text))
    inputs = layout.diffusers_inputs(noisy.to(weight.dtype), text.to(weight.dtype))
    output: Tensor = transformer(**inputs, timestep=time, return_dict=False)[0]
    return output[0, text.shape[0] :]


def velocity_loss(transformer: Ideogram4Transformer2DModel, sample: TrainingSample) -> Tensor:
    """Mean squared error of the predicted velocity over the sample's image tokens, float32 scalar."""
    velocity = predict_velocity(transformer, sample.noisy, sample.time, sample.text, sample.grid)
    target = sample.target.to(velocity.device, non_blocking=True)
    return torch.nn.functional.mse_loss(velocity.float(), target)


def accumulate(transformer: Ideogram4Transformer2DModel, batch: list[TrainingSample], parts: float) -> Tensor:
    """Adds the gradients of a batch's loss, divided by ``parts``, to the adapter; returns the loss, detached.

    The loss of a batch is the mean over all its image tokens, so larger pictures weigh more, as in one padded
    forward pass.
    """
    tokens = sum(s.noisy.shape[0] for s in batch)
    total = torch.zeros((), device=transformer.input_proj.weight.device)
    for sample in batch:
        loss = velocity_loss(transformer, sample) * (sample.noisy.shape[0] / tokens)
        (loss / parts).backward()
        total += loss.detach()
    return total


def predict_packed(
    fused: FusedTransformer, noisy: Tensor, time: Tensor, text: Tensor, grid: tuple[int, int]
) -> Tensor:
    """:func:`predict_velocity` through the fused engine."""
    layout = PackedLayout((text.shape[0],), (grid,), PACKED_MULTIPLE)
    return fused(noisy.to(fused.device), time.to(fused.device), text.to(fused.device), layout)


def accumulate_packed(
    fused: FusedTransformer, batch: list[TrainingSample], parts: float, graphs: GraphedSteps | None = None
) -> Tensor:
    """:func:`accumulate` through the fused engine: the whole batch in one pass, by a graph where there are
    graphs."""
    layout = PackedLayout(
        tuple(s.text.shape[0] for s in batch), tuple(s.grid for s in batch), PACKED_MULTIPLE
    )
    noisy, target, time, text = (
        torch.cat([getattr(s, name).to(fused.device, non_blocking=True) for s in batch])
        for name in ("noisy", "target", "time", "text")
    )
    if graphs:
        return graphs(noisy, target, time, text.to(fused.dtype), layout, parts)
    return fused.add_gradients(noisy, target, time, text, layout, parts)
