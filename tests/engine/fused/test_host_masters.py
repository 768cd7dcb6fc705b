"""Masters on the host through the engine alone, on whichever device there is: steps, and what is where."""

import pytest
import torch
from tiny_models import ALL, DEVICE, inputs, tiny

from ideoflow.engine import masters as module
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.packed import PackedLayout
from ideoflow.recipe import TrainSettings

LAYOUT = PackedLayout((5, 3), ((4, 6), (3, 3)), multiple=16)
# The first block has no adapter: nothing goes backward through it.
LATER = [f"layers.{i}.attention.{part}" for i in (1, 2) for part in ("to_q", "to_out.0")]


def trained(kind, targets, steps=4, passes=2):
    model = tiny(targets=targets)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    fused = FusedTransformer(
        model, linear="bf16", attention="sdpa", activation_budget=0.5, dtype=torch.float32
    )
    masters = fused.masters_on_host(list(parameters.values())) if kind == "offload" else None
    optimizer = Optimizer(kind, parameters, TrainSettings(), masters)
    norms = []
    for step in range(steps):
        for part in range(passes):
            latents, time, text = inputs(LAYOUT, 10 * step + part)
            target = torch.randn(latents.shape, device=DEVICE)
            fused.add_gradients(latents, target, time, text, LAYOUT, passes)
        if kind == "offload":
            assert all(p.device.type == p.grad.device.type == "cpu" for p in parameters.values())
        norms.append(optimizer.clip(0.05))
        assert norms[-1].device.type == DEVICE
        optimizer.step(1e-2)
    state = optimizer.state()  # waits for the device
    return {n: p.detach().cpu() for n, p in parameters.items()}, torch.stack(norms).cpu(), state


@pytest.mark.parametrize("targets", [ALL, LATER], ids=["all", "later blocks"])
@pytest.mark.parametrize("most", [1 << 20, 700])
def test_steps_are_those_of_an_adapter_on_the_device(targets, most, monkeypatch):
    monkeypatch.setattr(module, "BUCKET", most)
    here, there = (trained(kind, targets) for kind in ("float32", "offload"))
    assert (here[1] > 0.05).all()  # clipped in every step
    tolerance = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(there[0], here[0], **tolerance)
    torch.testing.assert_close(there[1], here[1], **tolerance)
    assert there[2].keys() == here[2].keys()
    for key, value in there[2].items():
        torch.testing.assert_close(value.cpu(), here[2][key].cpu(), **tolerance)


@pytest.mark.gpu
def test_what_is_allocated_on_a_gpu_between_steps():
    """Beside the working copies nothing of the adapter but two buckets of four arrays."""
    model = tiny()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    numbers = sum(p.numel() for p in parameters.values())
    fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    masters = fused.masters_on_host(list(parameters.values()))
    torch.cuda.synchronize()
    # Less a scalar a block, which autograd comes by.
    assert before - torch.cuda.memory_allocated() >= 4 * numbers - 512 * len(fused.blocks)
    assert all(p.is_pinned() for p in parameters.values())
    optimizer = Optimizer("offload", parameters, TrainSettings(), masters)
    slots = sum(t.nbytes for t in optimizer.device_tensors())
    assert slots == 2 * 4 * 4 * min(numbers, module.BUCKET)
