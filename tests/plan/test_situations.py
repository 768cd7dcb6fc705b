"""What is decided, one row a situation, so that a change of mind shows in a diff."""

import pytest

from ideoflow.plan import Plan

SAMPLES = '[validate]\nprompts = ["a.icap"]\n'
LONG, SHORT = "[train]\nsteps = 2000\n", "[train]\nsteps = 20\ncheckpoint_every = 10\n"


def memory(text):
    return f"[memory]\n{text}\n"


def in_words(plan):
    """A plan in a line: its decisions, then those that are unusual, then what does not fit."""
    precision = f"{plan.value('precision')}/{plan.value('matmul')}"
    precision += f"+{plan.value('exact_blocks')}" if plan.value("exact_blocks") else ""
    words = [plan.value("engine"), precision, plan.value("attention"), plan.value("activation_budget")]
    unusual = {
        "compile": "off",
        "offload": "none",
        "activation_offload": "none",
        "optimizer_state": "float32",
    }
    words += [f"{id}={plan.value(id)}" for id, usual in unusual.items() if plan.value(id) != usual]
    words += ["graphs"] * (plan.value("graphs") == "on") + [plan.value("unconditional")]
    return " ".join(map(str, words)) + ("" if plan.fits else "; over")


# base, machine, further recipe, resolution -> engine, precision of weights/products+exact blocks, attention,
# activation budget, whatever is not as usual, guidance.
SITUATIONS = {
    "laptop, nano": ("nano", "cpu", SAMPLES, 256, "reference float32/float32 sdpa 1.0 loaded"),
    "laptop, nano, no prompts": ("nano", "cpu", "", 256, "reference float32/float32 sdpa 1.0 proxy"),
    "laptop, full model": ("full", "cpu", "", 1024, "reference float32/float32 sdpa 0.0 proxy"),
    "laptop, FP8": ("fp8", "cpu", "", 1024, "reference fp8/bf16 sdpa 0.0 proxy"),
    "nano on a large card": ("nano", "h200", SAMPLES, 256, "fused bf16/bf16 flash4 1.0 graphs loaded"),
    # bf16 base
    "8 GB": ("full", "rtx-4060", LONG, 1024,
        "fused bf16/bf16 sdpa 0.15 offload=stream activation_offload=gate_up optimizer_state=cpu proxy"),
    "12 GB": ("full", "rtx-3060", LONG + SAMPLES, 1024,
        "fused bf16/bf16 sdpa 0.2 offload=stream activation_offload=inputs streamed"),
    "16 GB": ("full", "rtx-4080", LONG, 1024,
        "fused fp8/fp8+6 sdpa 0.06 proxy"),
    "24 GB": ("full", "rtx-4090", LONG + SAMPLES, 1024, "fused bf16/bf16 sdpa 0.6 offload=stream streamed"),
    "24 GB, 512": ("full", "rtx-4090", LONG, 512,
        "fused bf16/bf16 sdpa 0.3 proxy"),
    "24 GB, few steps": ("full", "rtx-4090", SHORT, 512, "fused bf16/bf16 sdpa 0.3 proxy"),
    "24 GB, rank 128": ("full", "rtx-4090", LONG + "[adapter]\nrank = 128\n", 1024,
        "fused bf16/bf16 sdpa 0.5 offload=stream proxy"),
    "32 GB": ("full", "rtx-5090", LONG + SAMPLES, 1024, "fused bf16/bf16 sdpa 0.35 streamed"),
    "40 GB": ("full", "a100-40gb", LONG + SAMPLES, 1024, "fused bf16/bf16 sdpa 0.7 loaded"),
    "48 GB": ("full", "l40s", LONG + SAMPLES, 1024, "fused bf16/bf16 sdpa 0.9 loaded"),
    "80 GB": ("full", "h100", LONG + SAMPLES, 1024, "fused bf16/bf16 flash4 1.0 loaded"),
    "80 GB, batch of 4": ("full", "h100", "[train]\nsteps = 2000\nbatch = 4\n", 1024,
        "fused bf16/bf16 flash4 0.5 proxy"),
    "141 GB, few steps": ("full", "h200", SHORT, 1024, "reference bf16/bf16 sdpa 1.0 proxy"),
    # FP8 base
    "FP8, 8 GB": ("fp8", "rtx-4060", LONG, 1024,
        "fused fp8/fp8+6 sdpa 0.1 offload=stream activation_offload=inputs proxy"),
    "FP8, 12 GB": ("fp8", "rtx-4070", LONG, 1024,
        "fused fp8/fp8+6 sdpa 0.25 offload=stream proxy"),
    "FP8, 12 GB, no FP8 units": ("fp8", "rtx-3060", LONG, 1024,
        "fused fp8/bf16 sdpa 0.25 offload=stream activation_offload=inputs proxy"),
    "FP8, 12 GB, 512": ("fp8", "rtx-3060", LONG, 512,
        "fused fp8/bf16 sdpa 0.9 offload=stream proxy"),
    "FP8, 10 GB": ("fp8", "rtx-3080", LONG + SAMPLES, 1024,
        "fused fp8/bf16 sdpa 0.15 offload=stream activation_offload=inputs streamed"),
    "FP8, 6 GB": ("fp8", "6gb", LONG, 1024,
        "fused fp8/bf16 sdpa 0.04 offload=stream activation_offload=inputs optimizer_state=cpu proxy"),
    "FP8, 4 GB": ("fp8", "4gb", LONG, 1024,
        "fused nf4/bf16 sdpa 0.0 offload=stream activation_offload=inputs optimizer_state=offload proxy"),
    "FP8, 8 GB, 512": ("fp8", "rtx-4060", LONG, 512,
        "fused fp8/fp8+6 sdpa 0.45 offload=stream proxy"),
    "FP8, 8 GB, little host memory": ("fp8", "rtx-4060, host 6", LONG, 1024,
        "fused nf4/bf16 sdpa 0.1 offload=stream activation_offload=inputs proxy"),
    "FP8, 16 GB": ("fp8", "rtx-4080", LONG, 1024,
        "fused fp8/fp8+6 sdpa 0.06 proxy"),
    "FP8, 24 GB": ("fp8", "rtx-4090", LONG + SAMPLES, 1024, "fused fp8/fp8+6 sdpa 0.45 loaded"),
    "FP8, 24 GB, data centre": ("fp8", "a10", LONG + SAMPLES, 1024,
        "fused fp8/bf16 sdpa 0.35 loaded"),
    "FP8, 24 GB, batch of 4": ("fp8", "rtx-4090", "[train]\nsteps = 2000\nbatch = 4\n", 1024,
        "fused fp8/fp8+6 sdpa 0.02 proxy"),
    "FP8, 24 GB, batch of 4 in passes": ("fp8", "rtx-4090", "[train]\nsteps = 2000\naccumulation = 4\n", 1024,
        "fused fp8/fp8+6 sdpa 0.4 proxy"),
    "FP8, 24 GB, 2048": ("fp8", "rtx-4090", LONG, 2048, "fused fp8/fp8+6 sdpa 0.04 proxy"),
    "FP8, 24 GB, a DoRA": ("fp8", "rtx-4090", LONG + '[adapter]\nkind = "dora"\n', 1024,
        "fused fp8/fp8+6 sdpa 0.25 proxy"),
    "FP8, 24 GB, a LoKr": ("fp8", "rtx-4090", LONG + '[adapter]\nkind = "lokr"\n', 1024,
        "fused fp8/fp8+6 sdpa 0.45 proxy"),
    "FP8, 24 GB, no FP8 units": ("fp8", "rtx-3090", LONG + SAMPLES, 1024,
        "fused fp8/bf16 sdpa 0.35 loaded"),
    "FP8, 32 GB": ("fp8", "rtx-5090", LONG + SAMPLES, 1024, "fused fp8/fp8+6 sdpa 0.8 loaded"),
    "FP8, 40 GB, no FP8 units": ("fp8", "a100-40gb", LONG + SAMPLES, 1024, "fused fp8/bf16 sdpa 1.0 loaded"),
    "FP8, 141 GB": ("fp8", "h200", LONG + SAMPLES, 1024, "fused fp8/fp8+6 flash4 1.0 loaded"),
    "FP8, 80 GB, a small share is free": ("fp8", "h100, free 10", LONG + SAMPLES, 1024,
        "fused fp8/fp8+6 flash4 0.2 offload=stream streamed"),
    "FP8, 141 GB, 512": ("fp8", "h200", LONG, 512, "fused fp8/fp8+6 flash4 1.0 graphs proxy"),
    "FP8, 141 GB, 2048": ("fp8", "h200", LONG, 2048, "fused fp8/fp8+6 flash4 1.0 proxy"),
    "FP8, 192 GB": ("fp8", "b200", LONG + SAMPLES, 1024, "fused fp8/fp8+6 flash4 1.0 graphs loaded"),
    "FP8, 141 GB, batch of 8": ("fp8", "h200", "[train]\nsteps = 2000\nbatch = 8\n", 1024,
        "fused fp8/fp8+6 flash4 0.6 proxy"),
    "FP8, unknown 24 GB": ("fp8", "24gb", LONG, 1024,
        "fused fp8/bf16 sdpa 0.35 proxy"),
    "FP8, no Triton": ("fp8", "h100, no triton", LONG + SAMPLES, 1024,
        "reference fp8/bf16 sdpa 1.0 optimizer_state=cpu loaded"),
    "FP8, no FlashAttention-4": ("fp8", "h100, no flash-attn-4", LONG + SAMPLES, 1024,
        "fused fp8/fp8+6 cudnn_varlen 1.0 loaded"),
    "FP8, neither it nor cuDNN's front end": ("fp8", "h100, no flash-attn-4, no cudnn", LONG + SAMPLES, 1024,
        "fused fp8/fp8+6 sdpa 1.0 loaded"),
    "NF4, 24 GB": ("nf4", "rtx-4090", LONG, 1024, "fused nf4/bf16 sdpa 0.5 proxy"),
    "NF4, 16 GB": ("nf4", "rtx-4080", LONG, 1024, "fused nf4/bf16 sdpa 0.2 proxy"),
    "NF4, 12 GB": ("nf4", "rtx-4070", LONG, 1024,
        "fused nf4/bf16 sdpa 0.06 proxy"),
    "NF4, 8 GB": ("nf4", "rtx-4060", LONG, 1024,
        "fused nf4/bf16 sdpa 0.15 offload=stream activation_offload=gate_up proxy"),
    "NF4, 8 GB, rank 128": ("nf4", "rtx-4060", LONG + "[adapter]\nrank = 128\n", 1024,
        "fused nf4/bf16 sdpa 0.2 offload=stream activation_offload=gate_up optimizer_state=offload proxy"),
    # elsewhere
    "unknown 24 GB": ("full", "24gb", LONG, 1024, "fused bf16/bf16 sdpa 0.6 offload=stream proxy"),
    "no bf16 units": ("full", "t4", LONG, 512, "reference int8/bf16 sdpa 0.0 compile=regional proxy"),
    "AMD": ("full", "mi300x", LONG + SAMPLES, 1024, "reference bf16/bf16 sdpa 1.0 loaded"),
    "Apple, nano": ("nano", "m3-max", SAMPLES, 256, "reference float32/float32 sdpa 1.0 loaded"),
    # wishes
    "you want float32": ("full", "h200", memory('precision = "float32"'), 1024,
        "reference float32/float32 sdpa 1.0 compile=regional proxy"),
    "you want float32 on 24 GB": ("full", "rtx-4090", memory('precision = "float32"'), 1024,
        "reference float32/float32 sdpa 0.0 offload=stream proxy"),
    "you want no checkpointing": ("full", "rtx-4090", memory('checkpointing = "off"'), 1024,
        "fused bf16/bf16 sdpa 1.0 offload=stream activation_offload=outputs proxy"),
    "you want checkpointing": ("full", "h200", memory('checkpointing = "on"'), 1024,
        "fused bf16/bf16 flash4 0.0 proxy"),
    "you want the reference engine": ("full", "h200", LONG + memory('engine = "reference"'), 1024,
        "reference bf16/bf16 sdpa 1.0 compile=regional proxy"),
    "you want the reference engine, few steps": ("full", "h200", SHORT + memory('engine = "reference"'), 1024,
        "reference bf16/bf16 sdpa 1.0 proxy"),
    "the reference engine on 24 GB": ("full", "rtx-4090", LONG + memory('engine = "reference"'), 1024,
        "reference int8/bf16 sdpa 0.0 compile=regional proxy"),
    "you want the reference engine with FP8": ("fp8", "rtx-4090", LONG + memory('engine = "reference"'), 1024,
        "reference fp8/bf16 sdpa 0.0 compile=regional proxy"),
    "you want compiling": ("full", "h100", LONG + memory('compile = "regional"'), 1024,
        "reference bf16/bf16 sdpa 1.0 compile=regional proxy"),
    "you want no compiling": ("full", "h100", LONG + memory('compile = "off"'), 1024,
        "fused bf16/bf16 flash4 1.0 proxy"),
    "you want adapters on the modulations": ("fp8", "h200",
        LONG + '[adapter]\ntargets = ["layers.*.attention.*", "layers.*.adaln_modulation"]\n', 1024,
        "reference fp8/bf16 sdpa 1.0 compile=regional proxy"),
    "you want FP8": ("full", "h100", LONG + memory('precision = "fp8"'), 1024,
        "fused fp8/fp8+6 flash4 1.0 proxy"),
    "you want FP8 products": ("full", "h100", LONG + memory('matmul = "fp8"'), 1024,
        "fused fp8/fp8+6 flash4 1.0 proxy"),
    "you want bf16 of FP8": ("fp8", "h100", LONG + memory('precision = "bf16"'), 1024,
        "fused bf16/bf16 flash4 1.0 proxy"),
    "you want bf16 products of FP8": ("fp8", "h100", LONG + memory('matmul = "bf16"'), 1024,
        "fused fp8/bf16 flash4 1.0 proxy"),
    "you want a budget": ("fp8", "h100", LONG + memory('activation_budget = 0.35'), 1024,
        "fused fp8/fp8+6 flash4 0.35 proxy"),
    "you want everything kept": ("fp8", "rtx-4090", LONG + memory('activation_budget = 1'), 1024,
        "fused fp8/fp8+6 sdpa 1.0 offload=stream activation_offload=outputs proxy"),
    "you want everything kept and at hand": ("fp8", "rtx-4090",
        LONG + memory('activation_budget = 1\noffload = "none"\nactivation_offload = "none"'), 1024,
        "fused nf4/bf16 sdpa 1.0 optimizer_state=offload proxy; over"),
    "you want NF4": ("fp8", "rtx-4060", LONG + memory('precision = "nf4"'), 1024,
        "fused nf4/bf16 sdpa 0.15 offload=stream activation_offload=gate_up proxy"),
    "you want int8": ("full", "rtx-3090", LONG + memory('precision = "int8"'), 1024,
        "fused int8/bf16 sdpa 0.35 proxy"),
    "you want weights on the host": ("fp8", "h200", LONG + memory('offload = "stream"'), 1024,
        "fused fp8/fp8+6 flash4 1.0 offload=stream proxy"),
    "you want groups of blocks": ("fp8", "rtx-4090", LONG + memory('offload = "block"'), 1024,
        "reference fp8/bf16 sdpa 0.0 offload=block proxy"),
    "you want everything on the device": ("fp8", "rtx-4060", LONG + memory('offload = "none"'), 1024,
        "fused nf4/bf16 sdpa 0.0 activation_offload=outputs optimizer_state=offload proxy"),
    "you want moments in 8 bits": ("fp8", "h200", LONG + memory('optimizer_state = "8bit"'), 1024,
        "fused fp8/fp8+6 flash4 1.0 optimizer_state=8bit proxy"),
    "you want inputs on the host": ("fp8", "h200", LONG + memory('activation_offload = "inputs"'), 1024,
        "fused fp8/fp8+6 flash4 1.0 activation_offload=inputs proxy"),
    "you want graphs": ("fp8", "h200", LONG + memory('graphs = "on"'), 1024,
        "fused fp8/fp8+6 flash4 1.0 graphs proxy"),
}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)
def test_situations(situation, plan_for):
    """What is decided, and that the plan agrees with itself."""
    *given, wanted = situation
    plan = plan_for(*given)
    assert in_words(plan) == wanted
    assert Plan.from_json(plan.to_json()) == plan
    for d in plan.decisions:
        assert d.reason and d.reason_code
        assert d.value not in [r.value for r in d.rejected]
    assert plan.fits == (plan.ledger.peak_bytes <= plan.hardware.free_bytes) == (not plan.changes)
    assert ("IP020" in {w.code.id for w in plan.warnings}) == (not plan.fits)
    assert len({d.id for d in plan.decisions}) == len(plan.decisions)


# Each engine, both ways to wait on the host, a small base, what does not fit, and graphs.
@pytest.mark.parametrize(
    "name",
    ["24 GB", "FP8, 8 GB, little host memory", "no bf16 units", "Apple, nano", "you want groups of blocks",
     "you want everything kept and at hand", "you want graphs"],
)  # fmt: skip
def test_a_plan_is_the_same_again(name, plan_for):
    first, second = (plan_for(*SITUATIONS[name][:4]).to_json() for _ in range(2))
    assert first == second
