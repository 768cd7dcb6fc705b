"""Noise levels against the published formulas, their closed-form quantiles, and diffusers' own sampler."""

import math
import statistics

import pytest
import torch
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu

from ideoflow.data.order import draw
from ideoflow.engine.schedule import (
    PRESETS,
    T_MAX,
    T_MIN,
    learning_rate_factor,
    sampling_sigmas,
    training_time,
)


def quantile(p: float, side: int, mu: float = 0.0, std: float = 1.5) -> float:
    """Closed form in plain Python: sigma is logit-normal, so t's p-quantile is 1 - logistic at 1 - p."""
    mean = mu + 0.5 * math.log(side * side / 512**2)
    z = statistics.NormalDist().inv_cdf(1 - p)
    return min(max(1 - 1 / (1 + math.exp(-(mean + std * z))), T_MIN), T_MAX)


@pytest.mark.parametrize("side", [512, 1024])
def test_training_density_has_the_closed_form_quantiles(side: int) -> None:
    times = sorted(
        training_time(draw(n, 1, 1, seed=7, dropout=0.0).uniform, side, side, 0.0, 1.5).item()
        for n in range(4000)
    )
    for p in (0.05, 0.25, 0.5, 0.75, 0.95):
        # Standard error of an empirical quantile, in probability: sqrt(p (1 - p) / n); four of them.
        tolerance = 4 * math.sqrt(p * (1 - p) / len(times))
        below = sum(t <= quantile(p, side) for t in times) / len(times)
        assert abs(below - p) < tolerance


@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.1, 0.5, 0.9, 1 - 1e-12, 1.0])
def test_a_time_is_the_formula_at_its_quantile_and_stays_in_bounds(uniform: float) -> None:
    time = training_time(uniform, 1024, 1024, 0.0, 1.5)
    assert time.dtype == torch.float32 and time.shape == (1,)
    expected = quantile(1 - uniform, 1024) if 0 < uniform < 1 else (T_MAX if uniform == 0 else T_MIN)
    assert time.item() == pytest.approx(expected, rel=1e-5)
    assert pytest.approx(1 / (1 + math.e**9)) == T_MIN and pytest.approx(1 / (1 + math.e**-7.5)) == T_MAX


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [(512, 512), (1024, 768)])
def test_sampling_sigmas_are_diffusers_own(name: str, size: tuple[int, int]) -> None:
    preset = PRESETS[name]
    theirs = _logit_normal_sigmas(preset.steps, _resolution_aware_mu(*size, preset.mu), std=preset.std)
    assert sampling_sigmas(preset.steps, *size, preset.mu, preset.std) == theirs.tolist()


def test_presets_are_the_published_ones() -> None:
    course = {name: p.guidance(p.steps, None) for name, p in PRESETS.items()}
    assert course == {
        "quality": [7.0] * 45 + [3.0] * 3,
        "default": [7.0] * 18 + [3.0] * 2,
        "turbo": [7.0] * 11 + [3.0],
    }
    assert PRESETS["default"].guidance(1, None) == [7.0]
    assert PRESETS["turbo"].guidance(3, 4.5) == [4.5] * 3


def test_learning_rate_rises_and_falls() -> None:
    rise = [learning_rate_factor(s, 100, 10, "cosine") for s in range(10)]
    assert rise == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert [learning_rate_factor(s, 100, 10, "constant") for s in (10, 50, 99)] == [1, 1, 1]
    assert learning_rate_factor(55, 100, 10, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(55, 100, 10, "cosine") == pytest.approx(0.5)
    assert 0 < learning_rate_factor(99, 100, 10, "cosine") < 0.01
