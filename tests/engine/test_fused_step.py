"""The fused path through the engine's own set-up: the reference path's losses and gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ideoflow.data.order import draw
from ideoflow.engine.setup import Trainable, build
from ideoflow.engine.step import TrainingSample, prepare
from ideoflow.plan.document import Decision, Plan
from ideoflow.recipe import ScheduleSettings


def with_fused(plan: Plan, **values: Any) -> Plan:
    """The plan with the fused engine; the planner itself only chooses it for GPUs."""
    wanted = {"engine": "fused", "matmul": "bf16", "attention": "sdpa", "activation_budget": 1.0, **values}
    kept = [d for d in plan.decisions if d.id not in wanted]
    made = [Decision(id, value, "recipe", "test", "the test asks for it") for id, value in wanted.items()]
    return replace(plan, decisions=(*kept, *made))


def batch() -> list[TrainingSample]:
    samples = []
    for n, (grid, words) in enumerate([((4, 4), 7), ((2, 5), 0), ((3, 3), 12)]):
        g = torch.Generator().manual_seed(n)
        latents, text = torch.randn(grid[0] * grid[1], 128, generator=g), torch.randn(words, 192, generator=g)
        samples.append(prepare(latents, text, grid, draw(n, *latents.shape, 0, 0.0), ScheduleSettings()))
    return samples


def loss_and_gradients(model: Trainable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.05)
    loss = model.gradients(batch(), 2)
    return loss, {n: p.grad for n, p in model.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("budget", [0.0, 0.4, 1.0])
def test_float32_losses_and_gradients_are_the_reference_paths(plan_of: Any, budget: float) -> None:
    plan = plan_of(**{"adapter.rank": 4, "adapter.alpha": 6.0})
    expected, theirs = loss_and_gradients(build(plan))
    loss, ours = loss_and_gradients(build(with_fused(plan, activation_budget=budget)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6, msg=name)


def test_fp8_gradients_point_where_bf16_ones_do(plan_of: Any) -> None:
    plan = plan_of(**{"adapter.rank": 8})
    _, exact = loss_and_gradients(build(plan))
    _, fp8 = loss_and_gradients(build(with_fused(plan, precision="fp8", matmul="fp8")))
    one, two = (torch.cat([g[n].flatten() for n in sorted(exact)]) for g in (exact, fp8))
    assert torch.nn.functional.cosine_similarity(one, two, dim=0) > 0.97


def test_exact_blocks_of_a_plan_are_the_engines(plan_of: Any) -> None:
    plan, found = plan_of(**{"adapter.rank": 8}), {}
    _, exact = loss_and_gradients(build(plan))
    for count in (0, 1, 6):
        fp8 = with_fused(plan, precision="fp8", matmul="fp8", exact_blocks=count)
        _, gradients = loss_and_gradients(build(fp8))
        one, two = (torch.cat([g[n].flatten() for n in sorted(exact)]) for g in (exact, gradients))
        found[count] = 1 - torch.nn.functional.cosine_similarity(one, two, dim=0)
    assert found[0] > found[1] > found[6]


def test_predictions_are_the_reference_paths(plan_of: Any) -> None:
    plan = plan_of(**{"adapter.rank": 4})
    sample = batch()[0]
    with torch.no_grad():
        ours, theirs = (
            build(p).predict(sample.noisy, sample.time, sample.text, sample.grid)
            for p in (with_fused(plan), plan)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_adapters_that_peft_computes_learn_the_same_on_both_engines(plan_of: Any, kind: str) -> None:
    plan = plan_of(**{"adapter.rank": 4, "adapter.kind": kind})
    expected, theirs = loss_and_gradients(build(plan))
    loss, ours = loss_and_gradients(build(with_fused(plan, activation_budget=0.4)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        size = float(theirs[name].abs().max())
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4 * size + 1e-9, msg=name)
