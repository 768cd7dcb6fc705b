"""Exact blocks beside FP8 products: when they are planned, what they cost, and what is said of them."""

import dataclasses

import pytest

from ideoflow.diagnostics import IdeoflowError
from ideoflow.model.spec import TransformerSpec
from ideoflow.plan import make_plan, named_hardware
from ideoflow.plan.calibration import shipped
from ideoflow.plan.choices import exact_block_counts
from ideoflow.plan.document import Rejected
from ideoflow.plan.record import planned_choice
from ideoflow.plan.render import rejected_words
from ideoflow.plan.sizes import Choice
from ideoflow.plan.timing import Load, Speed, step_parts

GIB = 1 << 30
LOAD = Load(((4096, 320, 1.0),), 1)
FIXED = """[memory]
precision = "fp8"
matmul = "fp8"
activation_budget = 0
graphs = "off"
offload = "none"
activation_offload = "none"
optimizer_state = "float32"
"""


def parts(budget, exact):
    picked = Choice("cuda", "fused", "fp8", "fp8", budget, "off", "proxy", exact_blocks=exact)
    card = named_hardware("h200")
    speed = Speed.of(card, picked, shipped().shares["fused"], LOAD)
    targets = tuple(TransformerSpec().linears())
    targets = tuple(name for name in targets if "adaln" not in name)
    return {p.name: p.ms for p in step_parts(TransformerSpec(), targets, 32, LOAD, picked, speed)}, speed


@pytest.mark.parametrize("card", ["h200", "h100", "b200", "rtx-5090", "rtx-4080", "rtx-4060"])
def test_fp8_products_come_with_exact_blocks(card, plan_for):
    plan = plan_for("fp8", card, "[train]\nsteps = 2000\n")
    decision = plan.decision("exact_blocks")
    assert (plan.value("matmul"), decision.value, decision.source) == ("fp8", 6, "auto")
    assert decision.reason_code == "exact" and "6: " in decision.evidence
    (none,) = decision.rejected
    assert (none.value, none.reason_code) == (0, "less-exact")
    assert -0.1 * plan.time.step_ms < none.delta_ms < 0
    assert planned_choice(plan).exact_blocks == 6


def test_without_room_for_them_everything_is_rounded(full_base, write_recipe, summarize):
    base, card = dataclasses.replace(full_base, storage="fp8"), named_hardware("h100")

    def plan(exact, free):
        recipe = write_recipe(f"{FIXED}exact_blocks = {exact}\n")
        return make_plan(recipe, base, summarize(), dataclasses.replace(card, free_bytes=free))

    none, six = (plan(exact, card.free_bytes).ledger.peak_bytes for exact in (0, 6))
    # A twentieth stays free: with all of it there is room for six, between the two there is not.
    between = plan('"auto"', int((none + six) / 2 / 0.95))
    assert plan('"auto"', int(six / 0.95) + 1).value("exact_blocks") == 6
    decision = between.decision("exact_blocks")
    assert (decision.value, decision.reason_code) == (0, "needs-memory")
    (rejected,) = decision.rejected
    assert (rejected.value, rejected.reason_code) == (6, "tight")
    assert rejected.delta_bytes == six - none > 0 < rejected.delta_ms


@pytest.mark.parametrize("count", [0, 3, 34])
def test_what_the_recipe_sets_is_kept(count, plan_for):
    plan = plan_for("fp8", "h200", f"[memory]\nexact_blocks = {count}\n")
    decision = plan.decision("exact_blocks")
    assert (decision.value, decision.source, decision.reason_code) == (count, "recipe", "recipe")
    assert {r.reason_code for r in decision.rejected} == {"set-by-recipe"}


def test_some_exact_blocks_mean_fp8_products_and_none_mean_nothing(plan_for):
    some = plan_for("full", "h100", "[memory]\nexact_blocks = 4\n")
    assert (some.value("precision"), some.value("matmul"), some.value("exact_blocks")) == ("fp8", "fp8", 4)
    for base, machine in (("full", "h100"), ("fp8", "rtx-3090"), ("nano", "cpu")):
        plain = plan_for(base, machine)
        assert plain.decision("exact_blocks").reason_code == "not-used"
        asked = plan_for(base, machine, "[memory]\nexact_blocks = 0\n")
        assert {d.id: d.value for d in asked.decisions} == {d.id: d.value for d in plain.decisions}


def test_the_share_follows_the_depth():
    assert [exact_block_counts(n, {}) for n in (34, 17, 6, 2)] == [(0, 6), (0, 3), (0, 1), (0,)]
    assert exact_block_counts(34, {"exact_blocks": 9}) == (0, 6, 9)


@pytest.mark.parametrize(("budget", "passes"), [(1.0, 1), (0.0, 2)])
def test_their_forward_products_take_as_long_as_in_bf16(budget, passes):
    (none, speed), (six, _), (every, _) = (parts(budget, n) for n in (0, 6, 34))
    # Of a pass over 4416 tokens, 76.5 TFLOP, with recomputing twice; and each weight is dequantised for it.
    flop = passes * 76.5e12
    longer = 1e3 * flop * (1 / speed.matmul_bf16 - 1 / speed.matmul)
    assert every["matmul"] - none["matmul"] == pytest.approx(longer, rel=0.002)
    assert six["matmul"] - none["matmul"] == pytest.approx(6 / 34 * longer, rel=0.002)
    moved = 1e3 * passes * 3 * 8.66e9 / speed.memory
    assert every["transpose"] - none["transpose"] == pytest.approx(moved, rel=0.002)
    same = ("attention", "adapter", "gaps", "transfer", "optimizer")
    assert all(every.get(name) == none.get(name) for name in same)


def test_a_processor_is_told_to_leave_exact_blocks_out_and_no_more(plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for("nano", "cpu", "[memory]\nexact_blocks = 1\n")
    problem = caught.value.diagnostics[0]
    assert problem.message == "exact_blocks is for the fused engine, and the fused engine needs an NVIDIA GPU"
    assert problem.cure == "remove exact_blocks"


def test_an_alternative_that_costs_a_step_nothing_is_not_zero_slower(plan_for):
    plan = plan_for("fp8", "rtx-4090", '[memory]\nprecision = "fp8"\n[validate]\nprompts = ["*.icap"]\n')
    streamed = Rejected("streamed", "slower", 0, 0.0)
    assert rejected_words(plan, streamed) == "takes longer in all"
    assert rejected_words(plan, Rejected("off", "slower", 0, 12.0)) == "12 ms slower"
