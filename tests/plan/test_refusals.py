"""Whatever [memory] says in any combination is refused, or there is something to choose from."""

import random
from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from ideoflow.diagnostics import IdeoflowError
from ideoflow.model.spec import TransformerSpec
from ideoflow.plan import named_hardware
from ideoflow.plan.choices import combinations, exact_block_counts, fixed_decisions, refusals
from ideoflow.recipe.settings import MemorySettings

TARGETS = tuple(name for name in TransformerSpec().linears() if "adaln" not in name)
BLOCKS = TransformerSpec().num_layers
NUMBERS = {"exact_blocks": ("auto", 0, 4, 35), "activation_budget": ("auto", 0.0, 0.33, 1.0)}


def choices(name, hint):
    literals = [o for o in (hint, *get_args(hint)) if get_origin(o) is Literal]
    return NUMBERS.get(name) or tuple(value for o in literals for value in get_args(o))


DECIDED = {
    name: choices(name, hint) for name, hint in get_type_hints(MemorySettings).items() if name != "device"
}
DECIDED = {name: values for name, values in DECIDED.items() if values}


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("machine", ["cpu", "h200", "rtx-4090", "rtx-3090", "t4", "mi300x"])
def test_nothing_is_neither_refused_nor_possible(machine, kind, processor, write_recipe):
    hardware = processor if machine == "cpu" else named_hardware(machine)
    device = "cpu" if machine == "cpu" else "cuda"
    plain = write_recipe(f'[adapter]\nkind = "{kind}"\n').tables
    draw, possible = random.Random(f"{machine} {kind}"), 0
    for _ in range(50):
        asked = {
            name: draw.choice(DECIDED[name]) for name in draw.sample(sorted(DECIDED), draw.randint(1, 4))
        }
        changed = replace(plain, memory=replace(plain.memory, **asked))
        if refusals(changed, hardware, device, TARGETS, BLOCKS):
            continue
        possible += 1
        fixed = fixed_decisions(changed)
        every = combinations(hardware, device, TARGETS, fixed, kind, exact_block_counts(BLOCKS, fixed))
        assert any(all(series.has(d, v) for d, v in fixed.items()) for series in every), asked
    assert possible > 10


TOGETHER = {
    "compiled blocks and what only the fused engine has": (
        "rtx-4090",
        'compile = "regional"\nactivation_offload = "inputs"',
        "remove one of compile, activation_offload",
    ),
    "e4m3 that Triton does not read": (
        "rtx-3090",
        'compile = "regional"\nprecision = "fp8"\noffload = "none"',
        "remove one of precision, compile",
    ),
    "what has no part in it is not named": (
        "rtx-4090",
        'offload = "leaf"\nexact_blocks = 4\ncheckpointing = "on"',
        "remove one of offload, exact_blocks",
    ),
}


@pytest.mark.parametrize(("machine", "settings", "cure"), TOGETHER.values(), ids=TOGETHER)
def test_the_fewest_settings_are_named(machine, settings, cure, plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for("fp8", machine, f"[memory]\n{settings}\n")
    (problem,) = caught.value.diagnostics
    assert problem.code.id == "IP016" and problem.cure == cure
    assert "cannot be carried out together on" in problem.message
    assert problem.span.source.startswith(cure.split(", ")[-1])


def test_a_kind_of_adapter_is_named_where_it_matters(plan_for):
    settings = '[adapter]\nkind = "lokr"\n[memory]\nprecision = "nf4"\n'
    with pytest.raises(IdeoflowError) as caught:
        plan_for("fp8", "rtx-4090", settings)
    assert "lokr" in caught.value.diagnostics[0].message
