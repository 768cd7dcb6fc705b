"""The time model against measured steps, and against arithmetic done another way."""

from dataclasses import replace

import pytest

from ideoflow.model.spec import TransformerSpec, target_modules
from ideoflow.plan import make_plan, named_hardware
from ideoflow.plan.calibration import shipped
from ideoflow.plan.document import Cached
from ideoflow.plan.sizes import Choice
from ideoflow.plan.timing import Load, Speed, linear_parameters, pointwise_bytes, step_parts

SPEC, ALL = TransformerSpec(), target_modules("all")


def choice(**changes):
    usual = {
        "device": "cuda",
        "engine": "reference",
        "precision": "bf16",
        "matmul": "bf16",
        "activation_budget": 0.0,
        "compile": "off",
        "unconditional": "proxy",
    }
    return Choice(**usual | changes)


def parts_on(name, load, picked, rank=32, targets=ALL):
    speed = Speed.of(named_hardware(name), picked, shipped().shares[picked.engine], load)
    return {p.name: p.ms for p in step_parts(SPEC, targets, rank, load, picked, speed)}


@pytest.mark.parametrize(
    "row", shipped().shares["reference"].rows, ids=lambda r: f"{r['batch']:.0f} {r['compiled']}"
)
def test_plain_diffusers_as_measured(row):
    """The rows that the shares of peak were derived from, on an H200: samples in one padded, masked pass."""
    samples = int(row["batch"])
    load = Load(((4096, 320, 1.0),), samples, together=samples, masked=True, adapter=2)
    picked = choice(compile="regional" if row["compiled"] else "off")
    assert sum(parts_on("h200", load, picked).values()) == pytest.approx(row["ms"], rel=0.03)


def test_a_trainer_that_was_not_used_for_the_shares():
    # SimpleTuner with bf16 weights and regional compile, same card and shapes: 674 and 2605 ms.
    for samples, ms in ((1, 674), (4, 2605)):
        load = Load(((4096, 320, 1.0),), samples, together=samples, masked=True, adapter=2)
        assert sum(parts_on("h200", load, choice(compile="regional")).values()) == pytest.approx(ms, rel=0.06)


def test_matmul_work_against_the_published_count():
    # Block linears: 76.5 TFLOP for one pass over 4416 tokens.
    assert 2 * 4416 * linear_parameters(SPEC) == pytest.approx(76.5e12, rel=0.002)


def test_attention_work_against_flop_counted_by_torch():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    heads, width, tokens = 3, 32, 48
    q, k, v = (torch.randn(1, heads, tokens, width, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        (q @ k.transpose(-1, -2)).softmax(-1).matmul(v).sum()
    assert counter.get_total_flops() == 4 * tokens**2 * heads * width


def test_each_part_grows_as_its_work_does():
    def parts(image=4096, text=320, samples=1, **changes):
        return parts_on("rtx-4090", Load(((image, text, 1.0),), samples), choice(**changes))

    usual = parts()
    assert parts(image=2048 - 160, text=160)["matmul"] == pytest.approx(
        usual["matmul"] * 2048 / 4416, rel=1e-3
    )
    assert parts(image=2048 - 160, text=160)["attention"] == pytest.approx(
        usual["attention"] * (2048 / 4416) ** 2, rel=1e-3
    )
    # Without recomputation two passes of three remain, and the optimiser does not notice.
    kept = parts(activation_budget=1.0)
    assert kept["matmul"] == pytest.approx(usual["matmul"] * 2 / 3, rel=1e-3)
    assert kept["optimizer"] == usual["optimizer"]
    assert parts(compile="regional")["pointwise"] < usual["pointwise"] / 2
    assert parts(precision="float32")["matmul"] == pytest.approx(2 * usual["matmul"], rel=1e-3)
    assert parts(samples=3)["matmul"] == pytest.approx(3 * usual["matmul"], rel=1e-3)
    assert parts(samples=3)["optimizer"] == usual["optimizer"]


def test_mixed_sizes_are_weighed_by_their_share():
    mixed = parts_on("h100", Load(((4096, 320, 0.25), (1024, 320, 0.75)), 1), choice())
    large = parts_on("h100", Load(((4096, 320, 1.0),), 1), choice())
    small = parts_on("h100", Load(((1024, 320, 1.0),), 1), choice())
    for name in ("matmul", "attention", "pointwise"):
        assert mixed[name] == pytest.approx(0.25 * large[name] + 0.75 * small[name], rel=1e-4)


def test_blocks_in_front_of_the_first_adapter_run_forward_once():
    late = parts_on("h200", Load(((4096, 320, 1.0),), 1), choice(), targets=("layers.33.attention.to_q",))
    every = parts_on("h200", Load(((4096, 320, 1.0),), 1), choice())
    # 34 forward passes of a block, one recomputation and one backward pass, against 34 of each.
    assert late["matmul"] == pytest.approx(every["matmul"] * 36 / 102, rel=1e-3)


def test_a_card_without_bf16_units_is_slower_than_in_float32():
    load = Load(((1024, 320, 1.0),), 1)
    assert (
        parts_on("t4", load, choice())["matmul"] > parts_on("t4", load, choice(precision="float32"))["matmul"]
    )


def test_pointwise_bytes_of_an_eager_block_against_a_count_by_hand():
    # No adapter, bf16: per element of width h six norms of 34 bytes, two modulations of 4, two rotary
    # embeddings of 20, two residuals of 10; and SwiGLU: SiLU reads and writes, the product reads two.
    h, f = SPEC.hidden, SPEC.intermediate_size
    by_hand = 6 * 34 * h + 2 * 4 * h + 2 * 20 * h + 2 * 10 * h + (4 + 6) * f
    assert pointwise_bytes(SPEC, frozenset(), 2, compiled=False, adapter=4) == by_hand


@pytest.mark.parametrize("row", shipped().shares["fused"].rows, ids=str)
def test_the_fused_engine_as_measured(row):
    """Rows that the shares were fitted to, and rows held out, on an H200."""
    samples = int(row["batch"])
    load = Load(((4096, int(row["text"]), 1.0),), samples)
    parts = parts_on("h200", load, fused(float(row["budget"])))
    ms = sum(parts.values()) - (parts["transpose"] if row["transposed"] else 0)
    assert ms == pytest.approx(row["ms"], rel=0.04 if row["held_out"] else 0.02)


# A prototype of the engine on the same card: FP8 weights multiplied in bf16, everything recomputed.
@pytest.mark.parametrize(("samples", "ms"), [(1, 584), (4, 2259)])
def test_products_in_bf16_beside_a_prototype(samples, ms):
    load = Load(((4096, 320, 1.0),), samples)
    picked = choice(engine="fused", precision="fp8")
    assert sum(parts_on("h200", load, picked).values()) == pytest.approx(ms, rel=0.1)


def fused(budget=1.0, **changes):
    return choice(engine="fused", precision="fp8", matmul="fp8", activation_budget=budget, **changes)


def test_what_the_budget_does_not_keep_is_computed_again():
    load = Load(((4096, 320, 1.0),), 1)
    steps = [parts_on("h200", load, fused(b / 10)) for b in range(11)]
    totals = [sum(parts.values()) for parts in steps]
    assert totals == sorted(totals, reverse=True)
    assert steps[0]["matmul"] == pytest.approx(1.5 * steps[10]["matmul"], rel=1e-3)
    # Attention is the first thing that is kept: at a tenth of the budget none of it is done again.
    assert steps[1]["attention"] < steps[0]["attention"] and steps[1]["attention"] == steps[10]["attention"]
    assert "transpose" in steps[0] and "dequantise" not in steps[0]
    assert "dequantise" in parts_on("h200", load, choice(engine="fused", precision="fp8"))


def test_the_fused_engine_packs_samples_and_pays_for_weights_once_a_pass():
    one, four = (Load(((4096, 320, 1.0),), n) for n in (1, 4))
    apart = Load(((4096, 320, 1.0),), 4, passes=4)
    single, packed, separate = (parts_on("h200", load, fused()) for load in (one, four, apart))
    assert packed["matmul"] == pytest.approx(4 * single["matmul"], rel=1e-3)
    assert packed["transpose"] == single["transpose"]
    assert separate["transpose"] == pytest.approx(4 * single["transpose"], rel=1e-3)


def test_what_is_cached_is_not_encoded_again(full_base, write_recipe, summarize):
    def seconds(data):
        plan = make_plan(write_recipe(), full_base, data, named_hardware("h100"), prompts=2)
        return plan.time.encode_seconds

    plain = summarize(pictures=100)
    none, captions, both = (
        seconds(replace(plain, cached=(Cached("bfloat16", *cached),)))
        for cached in ((0, 0), (102, 0), (102, 100))
    )
    assert none == seconds(plain) > captions > both == 0
    half = seconds(replace(plain, cached=(Cached("bfloat16", 102, 50),)))
    assert half == pytest.approx(captions / 2, rel=1e-3)
    assert seconds(replace(plain, cached=(Cached("float32", 102, 100),))) == none, "of another type"


def test_every_form_of_a_caption_is_encoded(full_base, write_recipe, summarize):
    def made(data):
        plan = make_plan(write_recipe(), full_base, data, named_hardware("h100"), prompts=0)
        return plan.time.encode_seconds, plan.sizes

    (one, sizes), (eight, more) = made(summarize()), made(replace(summarize(), captions=8 * 48))
    assert eight > one and more.text == 8 * sizes.text and more.latents == sizes.latents
