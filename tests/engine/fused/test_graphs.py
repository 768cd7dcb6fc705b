"""Steps in a place of fixed shapes, and steps replayed from a graph: the gradients of plain steps."""

import pytest
import torch
from tiny_models import DEVICE, inputs, tiny

from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.graphs import GraphedSteps, Place
from ideoflow.engine.packed import PackedLayout

GRIDS = ((4, 6), (3, 3))
# One shape: the same grids, 48 tokens together with the inert ones, other captions.
LAYOUTS = [PackedLayout(texts, GRIDS, multiple=48) for texts in ((5, 0), (0, 15), (7, 3), (1, 1), (15, 0))]


def batch(layout, seed=0):
    latents, time, text = inputs(layout, seed)
    torch.manual_seed(seed)
    return latents, torch.randn(latents.shape, device=DEVICE), time, text


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_a_place_gives_the_losses_and_gradients_of_plain_steps():
    model = tiny()
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.float32)
    steps = GraphedSteps(fused, parameters)
    place = None
    for seed, layout in enumerate(LAYOUTS):
        data = batch(layout, seed)
        for parameter in parameters:
            parameter.grad = None
        expected = fused.add_gradients(*data, layout, 2)
        want = [g.clone() for g in gradients(model)]
        for parameter in parameters:
            parameter.grad = None
        place = place or Place(layout, 16, fused.rotary(layout), data[-1])
        place.load(layout, *data, fused.rotary(layout))  # over what the layout before has left there
        steps.in_place(place, 2)
        torch.testing.assert_close(place.loss, expected, rtol=1e-5, atol=1e-6)
        for got, gradient in zip(gradients(model), want, strict=True):
            torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)


def test_gradients_of_several_batches_add_up_in_one_set_of_buffers(monkeypatch):
    monkeypatch.setattr("ideoflow.engine.fused.graphs._EAGER_STEPS", 99)  # recording needs a GPU
    model = tiny()
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.float32)
    for layout in LAYOUTS[:2]:
        fused.add_gradients(*batch(layout), layout, 2)
    want = [g.clone() for g in gradients(model)]
    steps = GraphedSteps(fused, parameters)
    for _ in range(2):  # the second time, over what the first has left
        for parameter in parameters:
            parameter.grad = None
        for layout in LAYOUTS[:2]:
            steps(*batch(layout), layout, 2)
        for got, gradient in zip(gradients(model), want, strict=True):
            torch.testing.assert_close(got, gradient)
    buffers = [g.data_ptr() for g in gradients(model)]
    for parameter in parameters:
        parameter.grad = None
    steps(*batch(LAYOUTS[0]), LAYOUTS[0], 2)
    assert [g.data_ptr() for g in gradients(model)] == buffers


@pytest.mark.gpu
@pytest.mark.parametrize(("fp8", "exact"), [(False, 0), (True, 0), (True, 2)], ids=["bf16", "fp8", "exact"])
def test_replays_give_the_gradients_of_plain_steps(fp8, exact):
    pytest.importorskip("flash_attn.cute")
    model = tiny(fp8=fp8)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    parameters = [p for p in model.parameters() if p.requires_grad]
    linear = "fp8" if fp8 else "bf16"
    fused = FusedTransformer(model, linear=linear, attention="flash4", activation_budget=0.5,
                             exact_blocks=exact)  # fmt: skip
    steps = GraphedSteps(fused, parameters)
    for seed in range(4):  # twice plainly, then recorded, then replayed, for other captions each time
        for layout in LAYOUTS:
            data = [x.bfloat16() if i == 3 else x for i, x in enumerate(batch(layout, seed))]
            results = []
            for run in (fused.add_gradients, steps):
                for parameter in parameters:
                    parameter.grad = None
                loss = run(*data, layout, 1)
                results.append((loss.clone(), torch.cat([g.flatten() for g in gradients(model)])))
            (loss, plain), (loss_again, replayed) = results
            assert abs(loss - loss_again) < 2e-2 * loss
            assert torch.nn.functional.cosine_similarity(plain, replayed, dim=0) > 0.99
    assert len(steps._graphs) == 1
    steps.release()
    assert torch.isfinite(steps(*data, layout, 1))
