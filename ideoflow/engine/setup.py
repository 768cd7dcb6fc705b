"""Makes a trainable model out of a plan, in a fixed order: load, adapt, checkpoint, compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from diffusers import Ideogram4Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4AttnProcessor
from torch import Tensor, nn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import NO_DEVICE
from ideoflow.engine.adapt import add_adapter
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.attention import Kernel
from ideoflow.engine.step import (
    TrainingSample,
    accumulate,
    accumulate_packed,
    predict_packed,
    predict_velocity,
)
from ideoflow.model.load import PRECISIONS, load_transformer
from ideoflow.plan.document import Plan


def plan_device(plan: Plan) -> torch.device:
    """The device that the plan was made for.

    Raises:
        IdeoflowError: when this machine has none.
    """
    device = torch.device(str(plan.value("device")))
    if device.type == "cuda" and not torch.cuda.is_available():
        cure = "set memory.device = 'cpu', or install a torch build for your GPU and driver"
        fail(NO_DEVICE, "the plan is for a GPU, but torch finds none", cure=cure)
    return device


def plan_dtype(plan: Plan) -> torch.dtype:
    """Type of the arithmetic, and of the frozen weights that are not quantised."""
    return PRECISIONS[str(plan.value("precision"))]


class UnpaddedAttention(Ideogram4AttnProcessor):
    """Diffusers' attention without its mask.

    Diffusers always passes a [1, 1, L, L] mask of segments. One sample alone, without padding, is one
    segment, so the mask is all true; leaving it out gives the same result through the fast kernels.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        return super().__call__(attn, hidden_states, None, image_rotary_emb)


@dataclass
class Trainable:
    """The model with its adapter, and how the plan's engine computes with it.

    Args:
        transformer: frozen base with PEFT's layers; names and files are theirs on every path.
        parameters: the trained tensors by name, float32.
        predict: velocity of one sample, as :func:`ideoflow.engine.step.predict_velocity` gives it.
        gradients: adds a batch's gradients, as :func:`ideoflow.engine.step.accumulate` does.
    """

    transformer: Ideogram4Transformer2DModel
    parameters: dict[str, nn.Parameter]
    predict: Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
    gradients: Callable[[list[TrainingSample], int], Tensor]


def build(plan: Plan) -> Trainable:
    """Loads the base, puts a fresh adapter on it, and sets up the engine that the plan chose."""
    device = plan_device(plan)
    assert plan.base.folder is not None, "the base is fetched before the engine starts"
    transformer = load_transformer(
        plan.base.folder,
        precision=str(plan.value("precision")),
        device=device,
        file=plan.base.files.get("transformer"),
    )
    transformer.set_attn_processor(UnpaddedAttention())
    parameters = add_adapter(transformer, plan)
    if plan.value("engine") == "fused":
        fused = FusedTransformer(
            transformer,
            linear=str(plan.value("matmul")),
            attention=cast(Kernel, plan.value("attention")),
            activation_budget=float(plan.value("activation_budget")),
            dtype=plan_dtype(plan),
        )
        return Trainable(
            transformer, parameters, partial(predict_packed, fused), partial(accumulate_packed, fused)
        )
    if plan.value("checkpointing") == "on":
        transformer.enable_gradient_checkpointing()
    if plan.value("compile") == "regional":
        transformer.compile_repeated_blocks()
    return Trainable(
        transformer, parameters, partial(predict_velocity, transformer), partial(accumulate, transformer)
    )
