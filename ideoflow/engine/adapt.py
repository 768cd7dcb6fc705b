"""Puts an adapter on a frozen model, with PEFT's own classes, and reads it back as weight updates."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ideoflow.artifacts.updates import Loha, Lokr, Lora, Update
from ideoflow.plan.adapters import AdaptedModule, adapted_modules, together
from ideoflow.plan.document import Plan
from ideoflow.recipe import AdapterSettings

_NAME = "default"


def add_adapter(transformer: Ideogram4Transformer2DModel, plan: Plan) -> dict[str, nn.Parameter]:
    """Puts PEFT's layers on the plan's targets; returns the trained tensors, float32.

    The adapter learns in float32 whatever the base's type: at a learning rate of 1e-4, most updates of a
    bf16 weight round away.
    """
    settings = plan.tables.adapter
    modules = adapted_modules(settings, plan.base.transformer, plan.targets)
    with torch.random.fork_rng():
        torch.manual_seed(plan.tables.train.seed)
        transformer.add_adapter(peft_config(settings, modules))
    device = transformer.device  # it walks through all modules each time
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if parameter.requires_grad:
            # PEFT puts it beside the base's weight, which may wait on the host.
            parameter.data = parameter.data.to(device, torch.float32)
    if settings.kind == "dora":
        _measure_rows(transformer)
    if settings.kind == "lokr":
        _share_factors(transformer, modules)
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def peft_config(settings: AdapterSettings, modules: tuple[AdaptedModule, ...]) -> PeftConfig:
    """PEFT's own configuration of the adapter, module by module."""
    ranks = {f"^{re.escape(m.name)}": m.rank for m in modules}
    alphas = {f"^{re.escape(m.name)}": m.alpha for m in modules}
    common: dict[str, Any] = {"target_modules": [m.name for m in modules], "rank_pattern": ranks,
                              "alpha_pattern": alphas, "r": modules[0].rank}  # fmt: skip
    if settings.kind == "lokr":
        factor = settings.factor or -1
        start: Any = "lycoris" if settings.init == "lycoris" else True
        both = settings.decompose_both
        return LoKrConfig(decompose_factor=factor, decompose_both=both, init_weights=start, **common)
    if settings.kind == "loha":
        return LoHaConfig(**common)
    return LoraConfig(
        use_dora=settings.kind == "dora",
        use_rslora=settings.rslora,
        init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        **common,
    )


def _is_adapter(name: str) -> bool:
    return any(part in name for part in (".lora_", ".lokr_", ".hada_"))


def _measure_rows(transformer: nn.Module) -> None:
    """DoRA's lengths in float32: PEFT rounds them to the base's type, which moves the model at step 0."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer) and _NAME in layer.lora_magnitude_vector:
            update = layer.lora_B[_NAME].weight @ layer.lora_A[_NAME].weight
            magnitude = layer.lora_magnitude_vector[_NAME]
            weight = base_weight(layer)
            magnitude.weight.data = magnitude.get_weight_norm(weight, update, layer.scaling[_NAME]).detach()


def _share_factors(transformer: nn.Module, modules: tuple[AdaptedModule, ...]) -> None:
    """Makes the second factor one for q, k and v of a block (:mod:`ideoflow.plan.adapters` says why)."""
    for first, *others in together(modules):
        source = transformer.get_submodule(first.name)
        for other in others:
            layer = transformer.get_submodule(other.name)
            for factor in ("lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
                if _NAME in getattr(source, factor):
                    getattr(layer, factor)[_NAME] = getattr(source, factor)[_NAME]


def base_weight(layer: nn.Module) -> Tensor:
    """The frozen weight [out, in] of a Linear, or under a PEFT layer; float32, whatever it is stored as."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight: Tensor = dequantize_module_weight(base)
    return weight.detach().float()


def trained_updates(transformer: nn.Module) -> dict[str, Update]:
    """The weight update of every adapted Linear, by diffusers' module name; tensors are the trained ones."""
    return dict(_updates(transformer))


def _updates(transformer: nn.Module) -> Iterator[tuple[str, Update]]:
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoKrLayer):
            parts = {p: _value(layer, f"lokr_{p}") for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
            yield name, Lokr(scale=layer.scaling[_NAME], **parts)
        elif isinstance(layer, LoHaLayer):
            parts = {p: _value(layer, f"hada_{p}") for p in ("w1_a", "w1_b", "w2_a", "w2_b")}
            yield name, Loha(scale=layer.scaling[_NAME], **parts)  # type: ignore[arg-type]
        elif isinstance(layer, LoraLayer):
            lengths = layer.lora_magnitude_vector
            yield (
                name,
                Lora(
                    layer.lora_A[_NAME].weight.detach(),
                    layer.lora_B[_NAME].weight.detach(),
                    layer.scaling[_NAME],
                    lengths[_NAME].weight.detach() if _NAME in lengths else None,
                ),
            )


def _value(layer: nn.Module, factor: str) -> Tensor | None:
    found = getattr(layer, factor)
    return found[_NAME].detach() if _NAME in found else None
