"""Masters and gradients on the host: the same adapter to the bit, with only working copies on the device."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import HEAD, one_photograph
from safetensors.torch import load_file
from test_fused_step import batch, loss_and_gradients, with_fused

from ideoflow.data.order import Draw
from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine import batches
from ideoflow.engine import masters as module
from ideoflow.engine.events import SampleMade, StepDone
from ideoflow.engine.loop import Stop
from ideoflow.engine.masters import HostMasters, buckets
from ideoflow.engine.meter import measure_lines
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.session import carry_out
from ideoflow.engine.setup import build
from ideoflow.workflow import Prepared, prepare

RECIPE = (
    HEAD
    + """[adapter]
rank = 4
alpha = 6.0
[train]
steps = {steps}
learning_rate = 1e-2
checkpoint_every = 2
accumulation = {accumulation}
max_grad_norm = {limit}
[output]
dtype = "float32"
[validate]
prompts = ["pictures/coffee.icap"]
steps = 2
every = 3
"""
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: Any) -> Any:
    """prepared(accumulation, limit, steps) -> what a run on the nano base starts from."""
    folder = tmp_path_factory.mktemp("masters")
    one_photograph(folder)

    def make(accumulation: int = 1, limit: float = 0.0, steps: int = 4) -> Prepared:
        text = RECIPE.format(accumulation=accumulation, limit=limit, steps=steps)
        (folder / "recipe.toml").write_text(text)
        return prepare(folder / "recipe.toml")

    return make


def carried_out(prepared: Prepared, folder: Path, kind: str, steps: int = 4, **values: Any) -> list[Any]:
    """The events of a run, or of what is left of it; its folder ends with the adapter."""
    plan, told = with_fused(prepared.plan, optimizer_state=kind, **values), []
    stop = Stop()

    def emit(event: Any) -> None:
        told.append(event)
        stop.requested |= (
            isinstance(event, StepDone) and event.step == steps < prepared.plan.tables.train.steps
        )

    carry_out(plan, prepared.dataset, prepared.prompts, folder, emit=emit, stop=stop)
    return told


def learnt(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# Every pair of values of two settings.
@pytest.mark.parametrize(
    ("accumulation", "limit", "budget"), [(1, 0.0, 0.0), (1, 1e-3, 1.0), (3, 0.0, 1.0), (3, 1e-3, 0.0)]
)
def test_a_run_is_the_same_to_the_bit(
    prepared: Any, accumulation: int, limit: float, budget: float, tmp_path: Path
) -> None:
    """Losses, norms, samples between the steps, and the adapter."""
    start, found = prepared(accumulation, limit), {}
    for kind in ("float32", "offload"):
        told = carried_out(start, tmp_path / kind, kind, activation_budget=budget)
        steps = [(e.loss, e.grad_norm) for e in told if isinstance(e, StepDone)]
        pictures = [(tmp_path / kind / e.file).read_bytes() for e in told if isinstance(e, SampleMade)]
        found[kind] = steps, pictures, learnt(tmp_path / kind)
    (steps, pictures, adapter), (others, same_pictures, same_adapter) = found.values()
    assert len(steps) == 4 and len(set(pictures)) == 3  # the adapter shows in what is sampled
    assert steps == others and pictures == same_pictures and same(adapter, same_adapter)
    assert all(norm > 1e-3 for _, norm in steps)


def test_fp8_products_read_what_was_learnt(prepared: Any, tmp_path: Path) -> None:
    """Their e4m3 pieces are of the working copies, which the update writes: the second step reads them."""
    start, found = prepared(steps=2), []
    for kind in ("cpu", "offload"):
        carried_out(start, tmp_path / kind, kind, precision="fp8", matmul="fp8", exact_blocks=2)
        found.append(learnt(tmp_path / kind))
    assert same(*found)


@pytest.fixture(scope="module")
def uninterrupted(prepared: Any, tmp_path_factory: Any) -> tuple[Prepared, dict[str, torch.Tensor]]:
    """What a run starts from, and what it learns on the device without a break."""
    start, folder = prepared(2, 1e-2), tmp_path_factory.mktemp("uninterrupted")
    carried_out(start, folder, "float32")
    return start, learnt(folder)


@pytest.mark.parametrize(
    ("first", "then"), [("float32", "offload"), ("offload", "float32"), ("offload", "offload")]
)
def test_a_run_goes_on_with_either(uninterrupted: Any, first: str, then: str, tmp_path: Path) -> None:
    start, whole = uninterrupted
    carried_out(start, tmp_path, first, steps=2)
    assert not list(tmp_path.glob("*.safetensors"))
    told = carried_out(start, tmp_path, then)
    assert [e.step for e in told if isinstance(e, StepDone)] == [3, 4]
    assert same(learnt(tmp_path), whole)


def test_a_step_that_is_not_a_number_is_told(prepared: Any, tmp_path: Path, monkeypatch: Any) -> None:
    start, messages = prepared(), []
    for kind in ("float32", "offload"):
        drawn = batches.draw
        monkeypatch.setattr(batches, "draw", lambda n, *a, d=drawn: _spoilt(d(n, *a)) if n else d(n, *a))
        with pytest.raises(IdeoflowError) as caught:
            carried_out(start, tmp_path / kind, kind)
        monkeypatch.undo()
        messages.append(caught.value.diagnostics[0])
    assert messages[0] == messages[1] and messages[0].code.id == "IE003"
    assert "at step 2" in messages[0].message and "learning_rate" in messages[0].cure
    drawn = batches.draw
    monkeypatch.setattr(batches, "draw", lambda n, *a: _spoilt(drawn(n, *a)))
    with pytest.raises(IdeoflowError) as caught:
        carried_out(start, tmp_path / "first", "float32")
    assert "at step 1" in str(caught.value) and "base" in caught.value.diagnostics[0].cure


def _spoilt(draw: Draw) -> Draw:
    return replace(draw, noise=draw.noise * torch.nan)


def test_gradients_are_there_and_add_up(plan_of: Any) -> None:
    plan = plan_of(**{"adapter.rank": 4, "adapter.alpha": 6.0})
    here = build(with_fused(plan))
    there = build(with_fused(plan, optimizer_state="offload"))
    _, expected = loss_and_gradients(here)
    _, found = loss_and_gradients(there)
    assert same(found, expected)
    for model in (here, there):
        model.gradients(batch()[:1], 3)
    whole = {name: p.grad for name, p in here.parameters.items()}
    assert same({name: p.grad for name, p in there.parameters.items()}, whole)
    assert there.masters is not None
    norm = torch.nn.utils.get_total_norm(list(whole.values()))
    assert torch.equal(there.masters.norm(), norm)


def test_the_device_keeps_working_copies_alone(plan_of: Any) -> None:
    """Parameters and gradients are views of the host's arrays; between steps two buckets of each are left."""
    plan = with_fused(plan_of(**{"adapter.rank": 4}), optimizer_state="offload")
    model = build(plan)
    masters = model.masters
    assert masters is not None
    optimizer = Optimizer("offload", model.parameters, plan.tables.train, masters)
    loss_and_gradients(model)
    (engine,) = model.predict.args  # type: ignore[attr-defined]

    def storages(tensors: Any) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tensors}

    parameters = list(model.parameters.values())
    of_host = [storages(array[p] for p in parameters) for array in (masters.values, masters.gradients)]
    assert storages(parameters) == of_host[0] and storages(p.grad for p in parameters) == of_host[1]
    lasting = storages([copy for copy, _, _ in engine._copies]) | storages(optimizer.device_tensors())
    assert not lasting & (of_host[0] | of_host[1])
    sizes = sum(t.nbytes for t in optimizer.device_tensors())
    assert sizes <= 2 * 4 * 4 * module.BUCKET
    # Nothing of a step outlives it: the graph's leaves have no gradient.
    assert all(leaf.grad is None for block in engine.blocks for leaf in block.leaves)
    optimizer.clip(1.0)
    optimizer.step(1e-3)
    assert all(p.grad is None for p in parameters)
    assert {"adapter", "optimizer state"} <= measure_lines(model, optimizer).keys()


def test_buckets_change_nothing(plan_of: Any, monkeypatch: Any) -> None:
    plan, found = plan_of(**{"adapter.rank": 4}), []
    for most, piece in ((1 << 20, 16 << 20), (3000, 7000)):
        monkeypatch.setattr(module, "BUCKET", most)
        monkeypatch.setattr(module, "PIECE", piece)
        model = build(with_fused(plan, optimizer_state="offload"))
        optimizer = Optimizer("offload", model.parameters, plan.tables.train, model.masters)
        for _ in range(2):
            model.gradients(batch(), 1)
            optimizer.clip(1e-2)
            optimizer.step(1e-2)
        found.append({n: p.detach().clone() for n, p in model.parameters.items()})
    assert len(buckets(list(model.parameters.values()), 3000)) > 10
    assert same(*found)


def test_masters_are_for_offload_alone(plan_of: Any) -> None:
    plan = plan_of(**{"adapter.rank": 4, "adapter.kind": "lokr"})
    with pytest.raises(ValueError, match="PEFT"):
        build(with_fused(plan, optimizer_state="offload"))
    parameters = {"w": torch.nn.Parameter(torch.ones(3))}
    host = HostMasters(list(parameters.values()), torch.device("cpu"))
    for kind, masters in (("offload", None), ("cpu", host)):
        with pytest.raises(ValueError, match="offload"):
            Optimizer(kind, parameters, plan.tables.train, masters)
