"""What is decided, one row a situation, so that a change of mind shows in a diff; and why it says so."""

import dataclasses

import pytest

from ideoflow.diagnostics import IdeoflowError
from ideoflow.plan import Plan, make_plan, named_hardware
from ideoflow.plan.search import DOMAINS, Problem, candidates, evaluate, times_known

GIB = 1 << 30
SAMPLES = '[validate]\nprompts = ["a.icap"]\n'
LONG, SHORT = "[train]\nsteps = 2000\n", "[train]\nsteps = 20\ncheckpoint_every = 10\n"


def memory(text):
    return f"[memory]\n{text}\n"


# base, machine, further recipe, resolution -> precision, checkpointing, compile, unconditional, fits
SITUATIONS = {
    "laptop, nano": ("nano", "cpu", SAMPLES, 256, "float32", "off", "off", "loaded", True),
    "laptop, nano, no prompts": ("nano", "cpu", "", 256, "float32", "off", "off", "proxy", True),
    "laptop, full model": ("full", "cpu", "", 1024, "float32", "on", "off", "proxy", True),
    "nano on a large card": ("nano", "h200", SAMPLES, 256, "bf16", "off", "off", "loaded", True),
    "12 GB": ("full", "rtx-3060", LONG + SAMPLES, 1024, "bf16", "on", "regional", "proxy", False),
    "16 GB": ("full", "rtx-4080", LONG, 1024, "bf16", "on", "regional", "proxy", False),
    "24 GB": ("full", "rtx-4090", LONG + SAMPLES, 1024, "bf16", "on", "regional", "proxy", True),
    "24 GB, 512": ("full", "rtx-4090", LONG, 512, "bf16", "on", "regional", "proxy", True),
    "24 GB, few steps": ("full", "rtx-4090", SHORT, 512, "bf16", "on", "off", "proxy", True),
    "32 GB": ("full", "rtx-5090", LONG + SAMPLES, 1024, "bf16", "on", "regional", "proxy", True),
    "32 GB, 512": ("full", "rtx-5090", LONG, 512, "bf16", "off", "regional", "proxy", True),
    "40 GB": ("full", "a100-40gb", LONG + SAMPLES, 1024, "bf16", "on", "regional", "loaded", True),
    "48 GB": ("full", "l40s", LONG + SAMPLES, 1024, "bf16", "on", "regional", "loaded", True),
    "48 GB, small pictures": ("full", "l40s", LONG + SAMPLES, 768, "bf16", "off", "regional", "loaded", True),
    "80 GB": ("full", "h100", LONG + SAMPLES, 1024, "bf16", "off", "regional", "loaded", True),
    "80 GB, few steps": ("full", "h100", SHORT + SAMPLES, 1024, "bf16", "on", "off", "loaded", True),
    "141 GB, few steps": ("full", "h200", SHORT, 1024, "bf16", "off", "off", "proxy", True),
    "unknown 24 GB": ("full", "24gb", LONG, 1024, "bf16", "on", "regional", "proxy", True),
    "AMD": ("full", "mi300x", LONG + SAMPLES, 1024, "bf16", "off", "off", "loaded", True),
    "Apple, nano": ("nano", "m3-max", SAMPLES, 256, "float32", "off", "off", "loaded", True),
    "you want float32": ("full", "h200", memory('precision = "float32"'), 1024, "float32", "off", "regional",
                         "proxy", True),
    "you want float32 on 24 GB": ("full", "rtx-4090", memory('precision = "float32"'), 1024, "float32", "on",
                                  "off", "proxy", False),
    "you want no checkpointing": ("full", "rtx-4090", memory('checkpointing = "off"'), 1024, "bf16", "off",
                                  "regional", "proxy", False),
    "you want checkpointing": ("full", "h200", memory('checkpointing = "on"'), 1024, "bf16", "on", "regional",
                               "proxy", True),
    "you want no compiling": ("full", "h100", LONG + memory('compile = "off"'), 1024, "bf16", "on", "off",
                              "proxy", True),
}  # fmt: skip


@pytest.fixture
def plan_for(full_base, nano_base, processor, write_recipe, summarize):
    def make(base, machine, extra="", resolution=1024, **options):
        facts = {"full": full_base, "nano": nano_base}[base]
        hardware = processor if machine == "cpu" else named_hardware(machine)
        recipe = write_recipe(extra, facts.name, resolution)
        return make_plan(recipe, facts, summarize(size=resolution), hardware, **options)

    return make


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_situations(situation, plan_for):
    *given, precision, checkpointing, compiling, unconditional, fits = situation
    plan = plan_for(*given)
    decided = tuple(plan.value(d) for d in DOMAINS)
    assert (*decided, plan.fits) == (precision, checkpointing, compiling, unconditional, fits)


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_every_plan_is_consistent(situation, plan_for):
    plan = plan_for(*situation[:4])
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.to_json() == plan_for(*situation[:4]).to_json()
    for d in plan.decisions:
        assert d.reason and d.reason_code
        assert d.value not in [r.value for r in d.rejected]
    assert plan.fits == (plan.ledger.peak_bytes <= plan.hardware.free_bytes) == (not plan.changes)
    assert ("IP020" in {w.code.id for w in plan.warnings}) == (not plan.fits)
    assert len({d.id for d in plan.decisions}) == len(plan.decisions)


@pytest.mark.parametrize("name", ["rtx-4090", "h100", "a100-40gb", "l40s"])
def test_no_allowed_combination_that_fits_makes_a_faster_run(name, full_base, write_recipe, summarize):
    """The choice against a plain enumeration of everything that may be decided."""
    from ideoflow.plan.calibration import shipped

    hardware, recipe = named_hardware(name), write_recipe(LONG)
    problem = Problem(recipe.tables, full_base, summarize(), hardware, shipped(), 0)
    plan = make_plan(recipe, full_base, summarize(), hardware)
    every = [evaluate(problem, c) for c in candidates(problem)]
    assert len(every) == 2 * 2 * 2
    # A twentieth of the memory stays free where that is possible at all.
    room = [e for e in every if e.ledger.peak_bytes <= 0.95 * hardware.free_bytes]
    fitting = room or [e for e in every if e.ledger.peak_bytes <= hardware.free_bytes]
    taken = next(e for e in every if all(getattr(e.choice, d) == plan.value(d) for d in DOMAINS))
    assert taken in fitting
    assert taken.run_seconds <= 1.03 * min(e.run_seconds for e in fitting)


def test_rejected_alternatives_carry_their_cost(plan_for):
    plan = plan_for("full", "h100", LONG)
    (on,) = plan.decision("checkpointing").rejected
    assert on.value == "on" and on.reason_code == "slower"
    assert on.delta_bytes < -5 * GIB and on.delta_ms > 100
    (eager,) = plan.decision("compile").rejected
    assert eager.reason_code == "over-memory"
    assert plan.ledger.peak_bytes + eager.delta_bytes > plan.hardware.free_bytes
    assert "GiB" in plan.decision("compile").evidence and "ms a step" in plan.decision("compile").evidence


def test_what_the_recipe_sets_is_kept_and_named(plan_for):
    plan = plan_for("full", "rtx-4090", memory('checkpointing = "off"\ncompile = "off"'))
    for id in ("checkpointing", "compile"):
        decision = plan.decision(id)
        assert (decision.value, decision.source, decision.reason_code) == ("off", "recipe", "recipe")
        assert [r.reason_code for r in decision.rejected] == ["set-by-recipe"]
    assert plan.decision("precision").source == "auto"
    assert not plan.fits
    first = plan.changes[0]
    assert (first.setting, first.value, first.fits, first.quality) == (
        "memory.checkpointing",
        "auto",
        True,
        0,
    )


def test_changes_are_ranked_cheapest_first_and_do_what_they_say(plan_for):
    plan = plan_for("full", "rtx-4090", "[adapter]\nrank = 256\n")
    assert not plan.fits
    here = [c for c in plan.changes if c.setting != "another card"]
    assert [not c.fits for c in here] == sorted(not c.fits for c in here)
    fitting = [c for c in here if c.fits]
    assert [c.quality for c in fitting] == sorted(c.quality for c in fitting)
    assert all(c.peak_bytes < plan.ledger.peak_bytes for c in here)
    rank = next(c for c in fitting if c.setting == "adapter.rank")
    # The mildest rank that fits: it does, and the next larger one of the series does not.
    assert plan_for("full", "rtx-4090", f"[adapter]\nrank = {rank.value}\n").fits
    assert not plan_for("full", "rtx-4090", f"[adapter]\nrank = {rank.value * 2}\n").fits
    card = next(c for c in plan.changes if c.setting == "another card")
    assert plan_for("full", str(card.value), "[adapter]\nrank = 256\n").fits


def test_where_nothing_fits_it_says_so_and_names_a_card(plan_for):
    plan = plan_for("full", "8gb")
    assert [c.setting for c in plan.changes][-2:] == ["all of these", "another card"]
    assert [c.fits for c in plan.changes] == [False] * (len(plan.changes) - 1) + [True]
    assert {d.reason_code for d in plan.decisions if d.id in ("precision", "checkpointing")} == {
        "least-memory"
    }


def test_times_are_only_told_where_speeds_are_known(plan_for):
    assert plan_for("nano", "cpu").time is None
    assert plan_for("full", "24gb").time is None
    known = plan_for("full", "rtx-4090").time
    assert known.step_ms > 0 and not known.calibrated and "data sheet" in known.evidence
    for decision in plan_for("full", "24gb").decisions:
        assert all(r.delta_ms is None for r in decision.rejected)


def test_more_work_takes_longer(plan_for):
    base = plan_for("full", "rtx-4090", "[train]\nbatch = 1\n").time.step_ms
    assert plan_for("full", "rtx-4090", "[train]\nbatch = 4\n").time.step_ms == pytest.approx(
        4 * base, rel=0.02
    )
    assert plan_for("full", "rtx-4090", "[train]\naccumulation = 2\n").time.step_ms > 1.9 * base
    assert plan_for("full", "rtx-4090", resolution=512).time.step_ms < base / 3


@pytest.mark.parametrize(
    ("device", "machine", "code"),
    [("cuda", "cpu", "IP011"), ("cuda", "m3-max", "IP011"), ("cpu", "h100", "IP015")],
)
def test_a_device_that_the_machine_is_not(device, machine, code, plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for("full", machine, memory(f'device = "{device}"'))
    (problem,) = caught.value.diagnostics
    assert problem.code.id == code and problem.span.line and problem.cure


def test_targets_that_only_the_released_model_has(plan_for):
    with pytest.raises(IdeoflowError, match="IP014"):
        plan_for("nano", "cpu", '[adapter]\ntargets = ["layers.33.*"]\n')
    assert len(plan_for("nano", "cpu", '[adapter]\ntargets = ["layers.5.attention.*"]\n').targets) == 4


def test_the_second_transformer_needs_room_in_the_host_too(full_base, write_recipe, summarize):
    card, recipe = named_hardware("h200"), write_recipe(SAMPLES)
    small = dataclasses.replace(card, host_bytes=32 * GIB, host_free_bytes=24 * GIB)
    large = dataclasses.replace(card, host_bytes=256 * GIB, host_free_bytes=200 * GIB)
    assert make_plan(recipe, full_base, summarize(), large).value("unconditional") == "loaded"
    plan = make_plan(recipe, full_base, summarize(), small)
    assert plan.value("unconditional") == "proxy"
    assert plan.decision("unconditional").rejected[0].reason_code == "over-host-memory"


WARNINGS = {
    "tight": ({"machine": "16gb", "free": 0}, "IP021"),
    "AMD": ({"machine": "mi300x"}, "IP022"),
    "Apple": ({"machine": "m3-max"}, "IP022"),
    "no bf16 units": ({"machine": "t4"}, "IP022"),
    "full model on a processor": ({"machine": "cpu"}, "IP022"),
    "large adapter": ({"machine": "h200", "extra": "[adapter]\nrank = 512\n"}, "IP023"),
    "little disk": ({"machine": "h200", "disk_free_bytes": 10**6}, "IP024"),
    "little host memory": ({"machine": "h200", "host_free_bytes": 8 * GIB}, "IP025"),
    "shared card": ({"machine": "h200", "other_processes": 2}, "IP026"),
    "proxy": ({"machine": "rtx-4090", "extra": SAMPLES}, "IP027"),
}


@pytest.mark.parametrize(("given", "code"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(given, code, full_base, processor, write_recipe, summarize):
    given = dict(given)
    machine, extra = given.pop("machine"), given.pop("extra", "")
    hardware = processor if machine == "cpu" else named_hardware(machine)
    if "free" in given:
        need = make_plan(write_recipe(extra), full_base, summarize(), hardware).ledger.peak_bytes
        given = {"free_bytes": int(need * 1.02), "total_bytes": int(need * 1.1)}
    plan = make_plan(write_recipe(extra), full_base, summarize(), dataclasses.replace(hardware, **given))
    assert code in {w.code.id for w in plan.warnings}
    usual = make_plan(write_recipe(), full_base, summarize(), named_hardware("h200"))
    assert usual.warnings == ()


def test_adapter_file_size_is_that_of_the_file_that_is_written(nano_base, write_recipe, summarize, processor):
    """Against artifacts' own fused form."""
    import torch

    from ideoflow.artifacts import fused_state
    from ideoflow.plan.document import Plan as PlanClass

    for targets in ('"all"', '"mlp"', '["layers.?.attention.to_q", "layers.?.attention.to_v"]'):
        recipe = write_recipe(f"[adapter]\nrank = 8\ntargets = {targets}\n", "nano")
        plan: PlanClass = make_plan(recipe, nano_base, summarize(), processor)
        sizes = nano_base.transformer.linears()
        factors = {n: (torch.zeros(8, sizes[n][1]), torch.zeros(sizes[n][0], 8)) for n in plan.targets}
        dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[plan.tables.output.dtype]
        state = fused_state(factors, 1.0, dtype)
        assert plan.sizes.adapter == sum(t.numel() * t.element_size() for t in state.values())


def test_without_a_data_set_the_recipes_resolution_is_planned(full_base, write_recipe):
    plan = make_plan(write_recipe(), full_base, None, named_hardware("rtx-4090"))
    assert plan.data is None and plan.digests.captions is None and plan.sizes.latents is None
    assert plan.fits and Plan.from_json(plan.to_json()) == plan


def test_problem_knows_when_times_are_known(full_base, write_recipe):
    from ideoflow.plan.calibration import shipped

    recipe = write_recipe()
    problem = Problem(recipe.tables, full_base, None, named_hardware("24gb"), shipped(), 0)
    assert not times_known(problem, candidates(problem)[0])
