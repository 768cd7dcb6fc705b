"""Noise levels: the density they are trained with, the sequence they are sampled with; and learning rates.

Model time t runs from 0 (noise) to 1 (data); sigma = 1 - t. Source of the formulas: Ideogram 4's published
sampler as diffusers has it (``_logit_normal_sigmas`` and ``_resolution_aware_mu`` in ``pipeline_ideogram4``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The log signal-to-noise ratio is held to [-15, 18]: t between the logistic of minus 9 and of 7.5.
T_MIN = 1 / (1 + math.exp(9.0))
T_MAX = 1 / (1 + math.exp(-7.5))


def resolution_mean(mu: float, height: int, width: int) -> float:
    """Mean of the logit-normal at a size in pixels: mu + ln(height * width / 512^2) / 2."""
    return mu + 0.5 * math.log(height * width / 512**2)


def logit_normal_time(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Quantiles in [0, 1] -> model times: 1 - logistic(mean + std * normal quantile), clamped; float64.

    The normal quantile needs float64: in float32 its tails are off by whole noise levels.
    """
    t = 1 - torch.special.expit(mean + std * torch.special.ndtri(uniform.double()))
    return t.clamp(T_MIN, T_MAX)


def training_time(uniform: float, height: int, width: int, mu: float, std: float) -> Tensor:
    """One model time, shape (1,), float32, for a sample of the given size in pixels."""
    mean = resolution_mean(mu, height, width)
    return logit_normal_time(torch.tensor([uniform]), mean, std).float()


def sampling_sigmas(steps: int, height: int, width: int, mu: float, std: float) -> list[float]:
    """Noise levels of a sampling run, from near 1 down; the scheduler adds the final 0."""
    quantiles = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    times = logit_normal_time(quantiles, resolution_mean(mu, height, width), std)
    sigmas: list[float] = (1 - times).flip(0)[:-1].float().tolist()
    return sigmas


@dataclass(frozen=True)
class Preset:
    """A sampling preset of the model's authors: guidance 7, and 3 for the last ``polish`` steps."""

    steps: int
    polish: int
    mu: float
    std: float

    def guidance(self, steps: int, constant: float | None) -> list[float]:
        """Guidance for each step; ``constant`` replaces the preset's own course."""
        if constant is not None:
            return [constant] * steps
        polish = min(self.polish, steps - 1)
        return [7.0] * (steps - polish) + [3.0] * polish


PRESETS = {
    "quality": Preset(48, 3, 0.0, 1.5),
    "default": Preset(20, 2, 0.0, 1.75),
    "turbo": Preset(12, 1, 0.5, 1.75),
}


def learning_rate_factor(step: int, steps: int, warmup: int, decay: str) -> float:
    """Share of the peak learning rate for step ``step``, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if decay == "linear":
        return 1 - progress
    if decay == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
