"""Why something is decided: against plain enumeration, with its costs and reasons; and what is refused."""

import dataclasses

import pytest

from ideoflow.diagnostics import IdeoflowError
from ideoflow.kernels.budget import ROUNDING
from ideoflow.plan import Plan, make_plan, named_hardware, search
from ideoflow.plan.calibration import shipped
from ideoflow.plan.choices import DOMAINS
from ideoflow.plan.problem import Evaluation, Problem, times_known
from ideoflow.plan.search import candidates

GIB = 1 << 30
SAMPLES = '[validate]\nprompts = ["a.icap"]\n'
LONG = "[train]\nsteps = 2000\n"


def memory(text):
    return f"[memory]\n{text}\n"


def every_choice(problem):
    return [series.at(budget) for series in candidates(problem) for budget in series.budgets]


@pytest.mark.parametrize("name", ["rtx-4090", "h100", "a100-40gb"])
def test_no_allowed_combination_that_fits_makes_a_faster_run(name, full_base, write_recipe, summarize):
    """The choice against a plain enumeration of everything that may be decided."""
    hardware, recipe = named_hardware(name), write_recipe(LONG)
    problem = Problem(recipe.tables, full_base, summarize(), hardware, shipped(), 0)
    plan = make_plan(recipe, full_base, summarize(), hardware)
    every = every_choice(problem)
    fp8 = hardware.compute_capability >= (8, 9)
    # The fused engine: nineteen budgets, four precisions and, with FP8 units, FP8 products with exact blocks
    # and without; and the reference engine: five precisions, checkpointing and compiling or not (FP8 only
    # with its units). Each plain; and with three kinds of moments (in the fused engine also with all of the
    # adapter on the host), weights here or on the host, what the fused engine keeps here or there (in two
    # ways, and two more with FP8 units); the reference engine's weights go only where nothing is compiled and
    # everything computed again. Where there is FlashAttention-4, also as graphs, with any moments.
    graphs = name == "h100"
    plain = 19 * (6 if fp8 else 4) * (1 + graphs) + 5 * 4 - (0 if fp8 else 2)
    lean = 19 * (31 if fp8 else 15) * (6 if fp8 else 4) + 5 * (5 + 3 * 2) - (0 if fp8 else 2 * 2)
    lean += 2 * 19 * 6 * graphs
    assert (len(every), sum(c.lean for c in every)) == (plain + lean, lean)
    # A twentieth of the memory stays free, and weights and moments are as they are, as there is room.
    every = [c for c in every if c.precision in ("bf16", "float32") and c.optimizer_state != "8bit"]
    room = [e for c in every if (e := Evaluation(problem, c)).peak_bytes <= 0.95 * hardware.free_bytes]
    taken = next(e for e in room if all(getattr(e.choice, d) == plan.value(d) for d in DOMAINS))
    assert search.cost(taken) <= 1.03 * min(map(search.cost, room))
    # Whatever is faster rounds something, or has something wait on the host that does not wait here.
    for e in room:
        if e.run_seconds < taken.run_seconds / 1.03:
            more = (e.choice.lean, e.choice.offload != "none", e.choice.activation_offload in ROUNDING)
            here = (taken.choice.lean, taken.choice.offload != "none", False)
            assert any(a and not b for a, b in zip(more, here, strict=True))


@pytest.mark.parametrize("machine", ["4gb", "rtx-4070", "rtx-4090", "a100-40gb"])
def test_the_search_leaves_nothing_out_that_is_better(machine, full_base, write_recipe, summarize):
    """What it does not look at would not have been chosen from among everything."""
    base = dataclasses.replace(full_base, storage="fp8")
    problem = Problem(write_recipe(LONG).tables, base, summarize(), named_hardware(machine), shipped(), 1)
    found = search.solve(problem)
    best = search.choose([Evaluation(problem, c) for c in every_choice(problem)], "fp8")
    assert found.run_seconds == best.run_seconds
    others = dataclasses.replace(found.choice, activation_budget=best.choice.activation_budget)
    assert others == best.choice


def test_rejected_alternatives_carry_their_cost(plan_for):
    plan = plan_for("full", "h100", LONG)
    least, less = plan.decision("activation_budget").rejected
    assert (least.value, less.value) == (0.0, 0.9) and least.reason_code == "slower"
    assert least.delta_bytes < -15 * GIB and least.delta_ms > 100 > less.delta_ms > 0
    reference = plan.decision("engine").rejected[0]
    assert reference.value == "reference" and reference.reason_code == "slower" and reference.delta_ms > 100
    assert plan.ledger.peak_bytes + reference.delta_bytes <= plan.hardware.free_bytes
    evidence = plan.decision("engine").evidence
    assert "fused" in evidence and "GiB" in evidence and "ms a step" in evidence
    precisions = {r.value: r for r in plan.decision("precision").rejected}
    assert precisions["fp8"].delta_bytes < -5 * GIB
    assert {r.value: r.reason_code for r in plan.decision("matmul").rejected}.keys() == {"fp8", "float32"}


def test_what_another_setting_leaves_no_choice_of_says_so(plan_for):
    """Not that it were as fast: what is left out would be faster, and its figures stand beside it."""
    plan = plan_for("fp8", "rtx-4090", LONG + memory('offload = "leaf"'))
    engine = plan.decision("engine")
    assert (engine.value, engine.reason_code) == ("reference", "required")
    assert "offload = 'leaf'" in engine.reason
    (fused,) = engine.rejected
    assert (fused.value, fused.reason_code) == ("fused", "excluded") and fused.delta_ms < 0
    assert plan.decision("compile").reason_code == "required"
    assert plan.decision("checkpointing").reason_code == "only-choice"
    assert plan.decision("offload").source == "recipe"


def test_the_reference_engine_tells_of_checkpointing(plan_for):
    plan = plan_for("full", "h100", LONG + memory('engine = "reference"'))
    (on,) = plan.decision("checkpointing").rejected
    assert on.value == "on" and on.delta_bytes < -5 * GIB and on.delta_ms > 100
    assert "on: " in plan.decision("checkpointing").evidence
    assert plan.decision("activation_budget").reason_code == "not-used"


def test_what_the_recipe_sets_is_kept_and_named(plan_for):
    settings = 'engine = "reference"\ncheckpointing = "off"\ncompile = "off"'
    plan = plan_for("full", "rtx-4090", memory(settings))
    for id, value in (("engine", "reference"), ("checkpointing", "off"), ("compile", "off")):
        decision = plan.decision(id)
        assert (decision.value, decision.source, decision.reason_code) == (value, "recipe", "recipe")
        assert {r.reason_code for r in decision.rejected} == {"set-by-recipe"}
    assert plan.decision("precision").source == "auto"
    assert not plan.fits
    first = plan.changes[0]
    assert (first.value, first.fits, first.quality) == ("auto", True, 0)
    assert first.setting in ("memory.engine", "memory.checkpointing")


IMPOSSIBLE = {
    "fused on a processor": ("nano", "cpu", 'engine = "fused"', "engine", "NVIDIA GPU"),
    "fused on AMD": ("full", "mi300x", 'engine = "fused"', "engine", "NVIDIA"),
    "fused without bf16 units": ("full", "t4", 'engine = "fused"', "engine", "bf16 units"),
    "fused without Triton": ("full", "h100, no triton", 'engine = "fused"', "engine", "triton"),
    "fused in float32": ("full", "h100", 'engine = "fused"\nprecision = "float32"', "precision", "bf16"),
    "fused and compiled": ("full", "h100", 'engine = "fused"\ncompile = "regional"', "compile", "reference"),
    "FP8 products before sm_89": ("fp8", "rtx-3090", 'matmul = "fp8"', "matmul", "FP8 units"),
    "FP8 products on an unknown card": ("fp8", "24gb", 'matmul = "fp8"', "matmul", "FP8 units"),
    "FP8 products of bf16": ("full", "h100", 'matmul = "fp8"\nprecision = "bf16"', "matmul", "precision"),
    "FP8 products in the reference engine": ("fp8", "h100", 'matmul = "fp8"\nengine = "reference"',
                                             "matmul", "fused"),
    "bf16 products of float32": ("full", "h200", 'matmul = "bf16"\nprecision = "float32"',
      "matmul", "float32"),
    "a budget in the reference engine": ("full", "h100", 'activation_budget = 0.5\nengine = "reference"',
                                         "activation_budget", "fused"),
    "a budget on a processor": ("nano", "cpu", "activation_budget = 0.5", "activation_budget",
                                "NVIDIA"),
    "exact blocks of bf16 products": ("fp8", "h100", 'exact_blocks = 6\nmatmul = "bf16"', "exact_blocks",
                                      "FP8 products"),
    "exact blocks of bf16 weights": ("full", "h100", 'exact_blocks = 6\nprecision = "bf16"', "exact_blocks",
                                     "precision"),
    "exact blocks in the reference engine": ("fp8", "h100", 'exact_blocks = 6\nengine = "reference"',
                                             "exact_blocks", "fused"),
    "exact blocks before sm_89": ("fp8", "rtx-3090", "exact_blocks = 6", "exact_blocks", "FP8 units"),
    "exact blocks on a processor": ("nano", "cpu", "exact_blocks = 1", "exact_blocks", "NVIDIA"),
    "more exact blocks than blocks": ("fp8", "h100", "exact_blocks = 35", "exact_blocks", "34 blocks"),
    "a budget and checkpointing": ("full", "h100", 'activation_budget = 0.5\ncheckpointing = "on"',
                                   "checkpointing", "activation_budget"),
    "groups in the fused engine": ("full", "h100", 'engine = "fused"\noffload = "block"', "offload",
                                   "never calls"),
    "groups and what only the fused engine has": ("full", "h100", 'activation_offload = "inputs"\n'
                                                  'offload = "leaf"', "offload", "never calls"),
    "offloaded, with everything kept": ("full", "h100", 'engine = "reference"\noffload = "stream"\n'
                                        'checkpointing = "off"', "offload", "autograd keeps"),
    "offloaded and compiled": ("full", "h100", 'offload = "block"\ncompile = "regional"', "offload", "hook"),
    "inputs in the reference engine": ("full", "h100", 'engine = "reference"\nactivation_offload = "inputs"',
                                       "activation_offload", "fused"),
    "paged on a processor": ("nano", "cpu", 'optimizer_state = "paged"', "optimizer_state", "NVIDIA"),
    "rounding on a GPU without one": ("nano", "cpu", 'quantize_via = "gpu"', "quantize_via", "none"),
    "rounding of what is not rounded": ("full", "h100", 'quantize_via = "cpu"\nprecision = "bf16"',
                                        "quantize_via", "rounds none"),
    "groups of what is not grouped": ("full", "h100", 'offload = "stream"\noffload_blocks = 2',
                                      "offload_blocks", "block"),
    "streams without groups": ("full", "h100", "offload_streams = false", "offload_streams", "leaf"),
    "a folder without a disk": ("full", "h100", 'offload = "block"\noffload_folder = "x"',
                                "offload_folder", "disk"),
    "compiled without a GPU": ("nano", "cpu", 'compile = "regional"', "compile", "Triton"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "machine", "settings", "key", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_settings_that_cannot_be_carried_out(base, machine, settings, key, words, plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for(base, machine, memory(settings))
    problem = caught.value.diagnostics[0]
    assert problem.code.id == "IP016" and words in problem.message and problem.cure
    assert problem.span.source.startswith(key)


def test_every_combination_of_settings_is_planned_or_refused(full_base, processor, write_recipe, summarize):
    """Whatever [memory] says, on any machine: a plan that says so, or a diagnostic; never anything else."""
    from itertools import product

    machines = [processor, *map(named_hardware, ("h100", "rtx-3090", "mi300x"))]
    planned = 0
    values = (
        ("auto", "fused", "reference"), ("auto", "bf16", "fp8", "float32"), ("auto", "fp8", "bf16"),
        ("auto", 0.0, 0.25), ("auto", "on", "off"), ("auto", "regional", "off"),
    )  # fmt: skip
    names = ("engine", "precision", "matmul", "activation_budget", "checkpointing", "compile")
    for number, combination in enumerate(product(*values)):
        if number % 7:  # a spread over all of them
            continue
        asked = {k: v for k, v in zip(names, combination, strict=True) if v != "auto"}
        recipe = write_recipe(memory("\n".join(f"{k} = {v!r}" for k, v in asked.items())))
        hardware = machines[number % len(machines)]
        try:
            plan = make_plan(recipe, full_base, summarize(), hardware)
        except IdeoflowError as error:
            assert {d.code.id for d in error.diagnostics} == {"IP016"}
            continue
        planned += 1
        for key, value in asked.items():
            if key != "checkpointing" or plan.value("engine") == "reference":
                assert plan.value(key) == value, (asked, key)
            else:
                assert plan.value("activation_budget") == {"on": 0.0, "off": 1.0}[value]
    assert planned > 20


def test_lines_of_the_recipe_are_told(plan_for):
    plan = plan_for("fp8", "h100", "[train]\nbatch = 4\n[memory]\ncheckpointing = 'on'\ncompile = 'off'\n")
    told = {id: plan.decision(id).reason for id in ("batch", "activation_budget", "compile", "accumulation")}
    assert told["batch"] == "4 pictures a pass, line 7" and told["compile"] == "you set this, line 10"
    assert told["activation_budget"] == "you set checkpointing = 'on', line 9"
    assert plan.decision("batch").source == "recipe" and plan.decision("accumulation").source == "auto"


def test_a_batch_tells_what_others_would_take(plan_for):
    plan = plan_for("fp8", "h100", "[train]\nbatch = 4\n")
    half, double = plan.decision("batch").rejected
    assert (half.value, double.value) == (2, 8) and half.delta_ms < 0 < double.delta_ms
    found = plan_for("fp8", "h100", "[train]\nbatch = 2\n")
    assert half.delta_bytes == found.ledger.peak_bytes - plan.ledger.peak_bytes
    (passes,) = plan.decision("accumulation").rejected
    single = plan_for("fp8", "h100", "[train]\nbatch = 1\naccumulation = 4\n")
    assert passes.value == 4 and passes.delta_bytes == single.ledger.peak_bytes - plan.ledger.peak_bytes < 0


@pytest.mark.parametrize(
    ("machine", "codes"),
    [
        ("h100", {"cudnn_varlen": "slower", "sdpa": "slower"}),
        ("h100, no flash-attn-4", {"flash4": "not-installed", "sdpa": "no-gain"}),
        ("h100, no flash-attn-4, no cudnn", {"flash4": "not-installed", "cudnn_varlen": "not-installed"}),
        ("b200", {"cudnn_varlen": "unsupported", "sdpa": "slower"}),
        ("rtx-4090", {"flash4": "unsupported", "cudnn_varlen": "unsupported"}),
    ],
)
def test_attention_kernels_that_were_not_taken_say_why(machine, codes, plan_for):
    decision = plan_for("fp8", machine).decision("attention")
    assert {r.value: r.reason_code for r in decision.rejected} == codes
    for r in decision.rejected:
        if r.reason_code == "not-installed":
            with_all = plan_for("fp8", machine.partition(",")[0]).time.step_ms
            now = plan_for("fp8", machine).time.step_ms
            assert r.value != "flash4" or r.delta_ms == pytest.approx(with_all - now, abs=0.2)
        assert (r.delta_ms is None) == (r.reason_code == "unsupported")


def test_caches_are_in_the_type_of_the_arithmetic(plan_for):
    assert plan_for("nano", "cpu").value("cache_dtype") == "float32"
    for base in ("full", "fp8", "nf4"):
        assert plan_for(base, "h100").value("cache_dtype") == "bfloat16"


def test_what_is_rounded_is_told_as_less_exact(plan_for):
    found = {r.value: r.reason_code for r in plan_for("fp8", "h200").decision("precision").rejected}
    assert (found["int8"], found["nf4"], found["bf16"]) == ("less-exact", "less-exact", "slower")
    moments = plan_for("fp8", "rtx-3080", LONG + SAMPLES).decision("optimizer_state").rejected
    assert {r.value: r.reason_code for r in moments}["8bit"] == "less-exact"


def test_times_are_only_told_where_speeds_are_known(plan_for):
    assert plan_for("nano", "cpu").time is None
    assert plan_for("full", "24gb").time is None
    known = plan_for("full", "rtx-4090").time
    assert known.step_ms > 0 and not known.calibrated and "data sheet" in known.evidence
    for decision in plan_for("full", "24gb").decisions:
        assert all(r.delta_ms is None for r in decision.rejected)


@pytest.mark.parametrize("engine", ["reference", "fused"])
def test_more_work_takes_longer(engine, plan_for):
    def ms(train="", resolution=1024):
        extra = memory(f'engine = "{engine}"\ncheckpointing = "on"') + train
        return plan_for("full", "h200", extra, resolution).time.step_ms

    # Packed together, four samples load the weights once; one after the other they cost four times as much.
    assert ms("[train]\nbatch = 4\n") == pytest.approx(4 * ms(), rel=0.05 if engine == "fused" else 0.02)
    assert ms("[train]\naccumulation = 2\n") > 1.9 * ms()
    assert ms() < ms(resolution=2048) / 4


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
    small = dataclasses.replace(card, host_bytes=32 * GIB, host_free_bytes=16 * GIB)
    large = dataclasses.replace(card, host_bytes=256 * GIB, host_free_bytes=200 * GIB)
    assert make_plan(recipe, full_base, summarize(), large).value("unconditional") == "loaded"
    plan = make_plan(recipe, full_base, summarize(), small)
    assert plan.value("unconditional") == "proxy"
    assert plan.decision("unconditional").rejected[0].reason_code == "over-host-memory"


def test_without_a_data_set_the_recipes_resolution_is_planned(full_base, write_recipe):
    plan = make_plan(write_recipe(), full_base, None, named_hardware("rtx-4090"))
    assert plan.data is None and plan.digests.captions is None and plan.sizes.latents is None
    assert plan.fits and Plan.from_json(plan.to_json()) == plan


def test_problem_knows_when_times_are_known(full_base, write_recipe):
    recipe = write_recipe()
    problem = Problem(recipe.tables, full_base, None, named_hardware("24gb"), shipped(), 0)
    assert not times_known(problem, candidates(problem)[0].first)
