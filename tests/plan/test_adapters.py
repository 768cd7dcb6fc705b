"""What the plan says of adapters against what PEFT makes, what autograd keeps and what the file holds."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ideoflow.diagnostics import IdeoflowError
from ideoflow.model.spec import TransformerSpec, target_modules
from ideoflow.plan import make_plan
from ideoflow.plan.adapters import AdaptedModule, adapted_modules, adapter_size, factorise
from ideoflow.plan.profiles import hardware_from_profile
from ideoflow.recipe import AdapterSettings, parse_recipe

KINDS = {
    "lora": "rank = 8",
    "some": 'rank = 8\ntargets = ["layers.?.attention.to_q", "layers.?.attention.to_v", "layers.0.adaln*"]',
    "ranks": 'rank = 8\nrank_pattern = { "*.to_k" = 3 }',
    "dora": 'kind = "dora"\nrank = 4',
    "dora-some": 'kind = "dora"\nrank = 4\ntargets = ["*.to_k"]',
    "loha": 'kind = "loha"\nrank = 4',
    "lokr": 'kind = "lokr"\nrank = 4',
    "lokr-some": 'kind = "lokr"\nrank = 4\ntargets = ["*.to_q", "*.to_v", "*.w1"]',
    "lokr-both": 'kind = "lokr"\nrank = 2\ndecompose_both = true\nfactor = 12',
    "lokr-full": 'kind = "lokr"\nfull_matrix = true\nfactor = 8',
}


def plan_for(adapter: str, base: Any, hardware: Any, output: str = "") -> Any:
    text = f'[model]\nbase = "{base.name}"\n[data]\nimages = "."\n[adapter]\n{adapter}\n{output}'
    return make_plan(parse_recipe(text, Path("test.toml")), base, None, hardware)


@settings(deadline=None)
@given(dimension=st.integers(1, 5000), factor=st.none() | st.integers(1, 300))
def test_sides_are_factorised_as_peft_does(dimension: int, factor: int | None) -> None:
    from peft.tuners.lokr.layer import factorization

    assert factorise(dimension, factor) == factorization(dimension, factor or -1)


@pytest.mark.parametrize("name", KINDS)
def test_numbers_and_files_are_those_that_training_makes(
    name: str, nano_base: Any, processor: Any, tmp_path: Path
) -> None:
    import torch
    from diffusers import Ideogram4Transformer2DModel

    from ideoflow.artifacts.adapter_file import arrange, for_form, state_dict
    from ideoflow.engine.adapt import add_adapter, base_weight, trained_updates

    spec = nano_base.transformer
    model = Ideogram4Transformer2DModel(**dataclasses.asdict(spec), mrope_section=(6, 5, 5))
    plan = plan_for(KINDS[name], nano_base, processor)
    trained = add_adapter(model, plan)
    numbers = sum(p.numel() for p in trained.values())
    adapter = plan.tables.adapter
    assert adapter_size(adapter, adapted_modules(adapter, spec, plan.targets)).parameters == numbers
    assert plan.sizes.checkpoint == 12 * numbers
    for form in ("comfyui", "diffusers") if adapter.kind != "loha" else ("comfyui",):
        updates = {n: u.folded() for n, u in trained_updates(model).items()}
        updates = for_form(updates, form, lambda m: base_weight(model.get_submodule(m)))
        state = state_dict(arrange(updates, form), form, torch.float32)
        output = f'[output]\nformat = "{form}"\ndtype = "float32"'
        planned = plan_for(KINDS[name], nano_base, processor, output).sizes.adapter
        assert planned == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_what_autograd_keeps_beyond_a_lora(kind: str, nano_base: Any, processor: Any) -> None:
    import torch
    from diffusers import Ideogram4Transformer2DModel

    from ideoflow.engine.adapt import add_adapter

    spec = dataclasses.replace(nano_base.transformer, num_layers=1)
    base, tokens = dataclasses.replace(nano_base, transformer=spec), 48

    class Kept:
        """A saved tensor; gone when the graph that needs it is."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def measured(adapter: str) -> int:
        model = Ideogram4Transformer2DModel(**dataclasses.asdict(spec), mrope_section=(6, 5, 5))
        add_adapter(model.requires_grad_(False), plan_for(adapter, base, processor))
        hidden = torch.randn(1, tokens, spec.hidden, requires_grad=True)
        rotary = torch.randn(1, tokens, 32), torch.randn(1, tokens, 32)
        modulation = torch.randn(1, 1, spec.adaln_dim)
        known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), hidden, *rotary)}
        kept: weakref.WeakSet[Kept] = weakref.WeakSet()

        def keep(tensor: torch.Tensor) -> Kept:
            one = Kept(tensor)
            kept.add(one)
            return one

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one.tensor):
            result = model.layers[0](hidden, None, rotary, modulation)
        gc.collect()
        found = {s.data_ptr(): s.nbytes() for one in kept if (s := one.tensor.untyped_storage())}
        assert result.requires_grad  # so that its graph is still there
        return sum(size for place, size in found.items() if place not in known)

    rank = 4
    adapter = AdapterSettings(kind=kind, rank=rank)  # type: ignore[arg-type]
    names = target_modules("all", spec)
    size = adapter_size(adapter, adapted_modules(adapter, spec, names))
    predicted = size.kept(tokens, 4, block=False)
    # A LoRA keeps its thin products, which the Kronecker and Hadamard products do not have.
    thin = 0 if kind == "dora" else 4 * tokens * rank * len(names)
    more = measured(f'kind = "{kind}"\nrank = {rank}') - measured(f"rank = {rank}")
    assert predicted == pytest.approx(more + thin, rel=0.05)


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 512), (256, 1024), (1024, 256)])
def test_matrices_of_a_weights_size_are_as_many_as_the_allocator_sees(
    kind: str, inputs: int, outputs: int
) -> None:
    import torch
    from peft import inject_adapter_in_model
    from torch.profiler import ProfilerActivity, profile

    from ideoflow.engine.adapt import peft_config

    adapter = AdapterSettings(kind=kind, rank=4)  # type: ignore[arg-type]
    module = AdaptedModule("layers.0.x", outputs, inputs, 4, 4.0)
    layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": torch.nn.ModuleDict({"x": layer})})})
    inject_adapter_in_model(peft_config(adapter, (module,)), model.requires_grad_(False))
    for name, p in model.named_parameters():
        if "base" not in name:
            p.data, p.requires_grad = p.data.float(), True

    def most(work: Any) -> tuple[Any, int]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()
        held = peak = 0
        events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return result, peak

    x = torch.randn(4, inputs, dtype=torch.bfloat16, requires_grad=True)
    result, forward = most(lambda: model["layers"]["0"]["x"](x))
    _, backward = most(lambda: result.float().sum().backward())
    forward -= adapter_size(adapter, (module,)).kept(4, 2, block=True)
    assert adapter_size(adapter, (module,)).workspace == pytest.approx(max(forward, backward), rel=0.06)


def test_a_full_matrix_lokr_says_its_size_before_the_run(full_base: Any) -> None:
    from io import StringIO

    from rich.console import Console

    from ideoflow.plan.render import print_page

    card = hardware_from_profile("h200")
    plan = plan_for('kind = "lokr"\nfull_matrix = true\nfactor = 4', full_base, card)
    page = Console(file=StringIO(), width=120)
    print_page(plan, page)
    # Attention, of 4608 x 4608: 4 x 4 numbers and 1152 x 1152; three of the four share the large ones.
    h, f = 4608 // 4, 12288 // 4
    numbers = 34 * (7 * 16 + 2 * h * h + 3 * f * h)
    assert plan.sizes.checkpoint == 12 * numbers
    assert f"full matrices; {numbers / 1e6:.1f} M parameters" in page.file.getvalue()  # type: ignore[attr-defined]
    one = plan_for('kind = "lokr"\nfull_matrix = true\nfactor = 2', full_base, card)
    (warning,) = [w for w in one.warnings if w.code.id == "IP023"]
    assert f"{one.sizes.adapter / 1e9:.1f} GB" in warning.message and "factor" in warning.cure


def test_other_kinds_are_planned_on_the_fused_engine_with_what_they_take(full_base: Any) -> None:
    card = hardware_from_profile("h200")
    plain = plan_for("rank = 16", full_base, card)
    dense = sum(o * i for n, (o, i) in TransformerSpec().linears().items() if "adaln" not in n)
    for kind in ("dora", "lokr", "loha"):
        fused = '[memory]\nengine = "fused"'
        plan = plan_for(f'kind = "{kind}"\nrank = 16', full_base, card, fused)
        assert plan.time.step_ms > plain.time.step_ms
        lines = {line.name: line.bytes for line in plan.ledger.of("train")}
        assert lines["adapter workspace"] > 4 * 12288 * 4608
        adapter = plan.tables.adapter
        size = adapter_size(adapter, adapted_modules(adapter, TransformerSpec(), plan.targets))
        assert (size.multiplied == dense) == (kind != "dora")


@pytest.mark.parametrize(
    ("kind", "memory", "words"),
    [
        ("dora", 'offload = "stream"', "measures rows of the frozen weights"),
        ("lokr", 'precision = "nf4"', "sizes of a lokr from the weight"),
        ("loha", 'precision = "nf4"', "sizes of a loha from the weight"),
    ],
)
def test_pairs_that_cannot_work_are_refused_with_the_reason(
    full_base: Any, kind: str, memory: str, words: str
) -> None:
    card = hardware_from_profile("24gb")
    with pytest.raises(IdeoflowError) as caught:
        plan_for(f'kind = "{kind}"\nrank = 16', full_base, card, f"[memory]\n{memory}")
    assert any(words in d.message and d.cure for d in caught.value.diagnostics)
    # Left open, the planner does not choose them.
    plan = plan_for(f'kind = "{kind}"\nrank = 16', full_base, hardware_from_profile("8gb"))
    assert plan.value("precision") != "nf4" if kind != "dora" else plan.value("offload") == "none"
