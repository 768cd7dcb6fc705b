"""What waits on the host, and when: what it saves, what it costs, and what comes before it."""

import io

import pytest
from rich.console import Console

from ideoflow.diagnostics import IdeoflowError
from ideoflow.plan import make_plan, named_hardware
from ideoflow.plan.decide import for_processes
from ideoflow.plan.record import NOT_ALLOCATED
from ideoflow.plan.render import print_page

GIB = 1 << 30
LONG = "[train]\nsteps = 2000\n"


def memory(text):
    return f"[memory]\n{text}\n"


def test_an_fp8_base_on_small_cards(plan_for):
    """Training at 1024 needs 12.7 GiB, of which the weights are 8.5; on less they wait on the host."""
    assert plan_for("fp8", "rtx-4080").value("offload") == "none"
    for machine in ("rtx-4070", "rtx-4060", "6gb"):
        plan = plan_for("fp8", machine)
        assert plan.fits and (plan.value("precision"), plan.value("offload")) == ("fp8", "stream")
        assert plan.decision("offload").reason_code == "needs-memory"
        rejected = {r.value: r for r in plan.decision("offload").rejected}
        assert rejected["none"].reason_code == "over-memory"
        assert plan.ledger.peak_bytes + rejected["none"].delta_bytes > plan.hardware.free_bytes
    plan = plan_for("fp8", "3gb")
    assert not plan.fits and {"adapter.rank", "data.resolution"} < {c.setting for c in plan.changes}


def test_weights_go_to_the_host_for_a_tenth_of_the_time_but_not_for_less(plan_for):
    def step_ms(base, offload):
        plan = plan_for(base, "rtx-4090", memory(f'offload = "{offload}"'))
        assert plan.fits
        return plan.time.step_ms

    much = plan_for("full", "rtx-4090").decision("offload")
    assert (much.value, much.reason_code) == ("stream", "fastest-that-fits")
    assert step_ms("full", "stream") < step_ms("full", "none") / 1.08
    little = plan_for("fp8", "rtx-4090").decision("offload")
    (stream,) = (r for r in little.rejected if r.value == "stream")
    assert (little.value, stream.reason_code) == ("none", "little-gain") and stream.delta_ms < 0
    assert step_ms("fp8", "none") / 1.1 < step_ms("fp8", "stream") < step_ms("fp8", "none")


def test_what_costs_only_time_comes_before_what_costs_exactness(plan_for):
    """A bf16 base on ever smaller cards: first rounded to 8 bits, then as it is but fetched in every pass."""
    found = {name: plan_for("full", name) for name in ("rtx-4090", "rtx-4080", "rtx-4070", "rtx-4060")}
    assert [p.value("precision") for p in found.values()] == ["bf16", "fp8", "bf16", "bf16"]
    here = {name: plan_for("full", name, memory('offload = "none"')) for name in found}
    assert [p.value("precision") for p in here.values()] == ["bf16", "fp8", "nf4", "nf4"]
    assert all(p.fits and p.value("optimizer_state") != "8bit" for p in found.values())
    stored = plan_for("nf4", "rtx-4070")
    assert (stored.value("precision"), stored.value("offload")) == ("nf4", "none")
    assert stored.decision("precision").reason_code == "lossless"


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_each_way_to_save_memory_does(precision, plan_for):
    def peak(extra=""):
        asked = f'precision = "{precision}"\nengine = "fused"\nmatmul = "bf16"\nactivation_budget = 0\n'
        if "activation_offload" not in extra:
            asked += 'activation_offload = "none"\n'
        plan = plan_for("full", "h200", memory(asked + extra))
        return plan.ledger.peak("train") / GIB, plan.time.step_ms

    here, ms = peak()
    weights = {"bf16": 16.0, "fp8": 8.0, "int8": 8.0, "nf4": 4.0}[precision]
    streamed, slower = peak('offload = "stream"')
    assert here - streamed == pytest.approx(weights * 31 / 34, rel=0.02) and ms <= slower < 1.6 * ms
    moments, more = peak('optimizer_state = "cpu"')
    assert 0.4 < here - moments < 0.7 and ms < more < ms + 40
    assert 0.3 < here - peak('optimizer_state = "8bit"')[0] < 0.7
    # Of 16 bytes for each of 95 M numbers, a few buckets' and two blocks' are left; at the peak of a pass,
    # the gradients were not all there.
    offloaded, longest = peak('optimizer_state = "offload"')
    assert 0.4 < moments - offloaded < 0.75 and more < longest < more + 40
    assert 0.8 < here - peak('activation_offload = "inputs"')[0] < 1.4


GROUPS = {"stream": 3, "block": 2, "leaf": 1.4, "disk": 2}


@pytest.mark.parametrize("offload", GROUPS)
def test_the_reference_engine_offloads_by_groups(offload, plan_for):
    asked = f'engine = "reference"\noffload = "{offload}"\n'
    plan = plan_for("fp8", "rtx-4060", memory(asked))
    line = next(x for x in plan.ledger.of("train") if x.name == "fetched weights")
    assert line.bytes / GIB == pytest.approx(8.07 / 34 * GROUPS[offload], rel=0.02)
    assert (plan.value("checkpointing"), plan.value("compile")) == ("on", "off")
    if offload in ("block", "disk"):
        larger = plan_for("fp8", "h100", memory(asked + "offload_blocks = 4\n"))
        line = next(x for x in larger.ledger.of("train") if x.name == "fetched weights")
        assert line.bytes / GIB == pytest.approx(8.07 / 34 * 8, rel=0.02)
    if offload != "stream":
        serial = plan_for("fp8", "rtx-4060", memory(asked + "offload_streams = false\n"))
        assert serial.time.step_ms > plan.time.step_ms


# What an H200 held at most, in GiB (torch.cuda.max_memory_allocated), with FP8 products at batch 1, 1024 x
# 1024, 320 text tokens, rank 32. These steps ran without a trainer around them, which holds the rest of the
# workspaces.
@pytest.mark.parametrize(
    ("offload", "budget", "gib"),
    [("none", 0, 12.1), ("inputs", 0, 11.18), ("outputs", 0, 11.06), ("gate_up", 0.18, 12.71)],
)
def test_what_waits_on_the_host_as_measured(offload, budget, gib, plan_for):
    asked = (
        f'activation_offload = "{offload}"\nactivation_budget = {budget}\ngraphs = "off"\nexact_blocks = 0\n'
    )
    plan = plan_for("fp8", "h200", memory(asked + 'offload = "none"\noptimizer_state = "float32"\n'))
    lines = [x.bytes for x in plan.ledger.of("train") if x.name not in NOT_ALLOCATED]
    assert sum(lines) / GIB == pytest.approx(gib, rel=0.035)


def test_graphs_are_for_steps_that_wait_for_the_host(plan_for):
    small, large = (plan_for("fp8", "h200", LONG, resolution) for resolution in (512, 1024))
    assert [p.value("graphs") for p in (small, large)] == ["on", "off"]
    assert small.decision("graphs").rejected[0].delta_ms > 30
    off = plan_for("fp8", "h200", LONG + memory('graphs = "off"\nengine = "fused"'), 512)
    assert [any(part.name == "launch" for part in p.time.parts) for p in (small, off)] == [False, True]
    missing = plan_for("fp8", "h100, no flash-attn-4", LONG, 512)
    assert missing.decision("graphs").reason_code == "unsupported"


@pytest.mark.parametrize(
    ("machine", "asked", "words"),
    [
        ("h100, no flash-attn-4", 'graphs = "on"', "flash-attn-4"),
        ("rtx-4090", 'graphs = "on"', "flash-attn-4"),
        ("h100", 'graphs = "on"\nengine = "reference"', "reference engine"),
        ("h100", 'graphs = "on"\nactivation_offload = "inputs"', "activation_offload"),
        ("rtx-3090", 'activation_offload = "outputs"', "e4m3"),
    ],
)
def test_what_graphs_and_rounding_need_is_told(machine, asked, words, plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for("fp8", machine, LONG + memory(asked))
    (told,) = caught.value.diagnostics
    assert told.code.id == "IP016" and words in told.message + told.cure


@pytest.mark.parametrize("machine", ["rtx-4060", "h100"])
def test_the_page_tells_what_waits_on_the_host(machine, plan_for):
    """Decisions at their usual value are left out; no line is wider than a terminal."""
    plan = plan_for("fp8", machine)
    text = io.StringIO()
    print_page(plan, Console(file=text, width=80))
    shown = {line.split()[0] for line in text.getvalue().splitlines() if line.strip()}
    assert ("offload" in shown) == (plan.value("offload") != "none") == (machine == "rtx-4060")
    assert ("optimizer_state" in shown) == (plan.value("optimizer_state") != "float32")
    assert max(map(len, text.getvalue().splitlines())) <= 80
    found = {r.value: r.reason_code for r in plan.decision("offload").rejected}
    assert {found[v] for v in ("block", "leaf", "disk")} == {"only-on-request"}


def test_samples_on_a_small_card_get_true_guidance(plan_for):
    """The second transformer's blocks are fetched in every pass; that takes the link's time at least."""
    plan = plan_for("fp8", "rtx-4060", LONG + '[validate]\nprompts = ["a.icap"]\nsteps = 10\nevery = 2000\n')
    assert plan.fits and plan.value("unconditional") == "streamed"
    blocks = 34 * (4 * 4608**2 + 3 * 4608 * 12288)
    # Two samplings of ten steps, in each both transformers.
    assert plan.time.sample_seconds >= 2 * 10 * 2 * blocks / (1e9 * plan.hardware.rates.host_gbps)
    assert not any(w.code.id == "IP027" for w in plan.warnings)


def test_streamed_and_compiled_blocks_are_there_on_request(plan_for):
    both = '[memory]\nengine = "reference"\noffload = "stream"\ncompile = "regional"\n'
    plan = plan_for("fp8", "rtx-4090", both)
    assert plan.fits and (plan.value("offload"), plan.value("compile")) == ("stream", "regional")
    assert plan.value("checkpointing") == "on"
    alone = plan_for("fp8", "rtx-4090", both.replace('compile = "regional"\n', ""))
    assert alone.value("compile") == "off"


@pytest.mark.parametrize("machine", ["cpu", "t4", "mi300x"])
@pytest.mark.parametrize(
    ("key", "waits", "plain"),
    [
        ("activation_offload", "inputs", "none"),
        ("activation_offload", "gate_up", "none"),
        ("optimizer_state", "offload", "float32"),
    ],
)
def test_what_waits_on_the_host_needs_the_fused_engine(machine, key, waits, plain, plan_for):
    """A recipe for a small card, planned for a machine that has only the reference engine."""
    with pytest.raises(IdeoflowError) as caught:
        plan_for("nano", machine, f'[memory]\n{key} = "{waits}"\n')
    (problem,) = caught.value.diagnostics
    assert problem.code.id == "IP016" and problem.span.source.startswith(key)
    assert "fused engine" in problem.message and problem.cure == f"set {key} = 'auto' or '{plain}'"


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("rank", [8, 32, 128])
def test_an_adapter_on_the_host_leaves_what_moves(rank, passes, plan_for):
    """Beside working copies: gradients of two blocks, two buckets of four arrays; all of it on the host."""
    asked = f"[train]\naccumulation = {passes}\n[adapter]\nrank = {rank}\n"
    asked += '[memory]\nengine = "fused"\ngraphs = "off"\nactivation_budget = 0.0\n'
    asked += 'offload = "none"\nactivation_offload = "none"\noptimizer_state = "{}"\n'
    here, there = (plan_for("fp8", "h100", asked.format(state)) for state in ("float32", "offload"))
    lines = [{x.name: x.bytes for x in plan.ledger.of("train")} for plan in (here, there)]
    block = rank * (4 * 2 * 4608 + 3 * (4608 + 12288))  # numbers: q, k, v, o and w1, w2, w3, each A and B
    assert lines[0]["adapter"] == 34 * 4 * block
    assert lines[1]["gradients"] == 2 * 4 * block
    largest = rank * 12288
    assert lines[1]["optimizer state"] == 8 * 4 * max(1 << 20, largest)
    gone = {"adapter", "optimizer step"}
    assert lines[0].keys() - lines[1].keys() <= gone and not gone & lines[1].keys()
    assert all(lines[0][k] == lines[1][k] for k in ("weights", "working copies", "work buffer"))
    assert there.host_bytes - here.host_bytes == 34 * 16 * block


@pytest.mark.parametrize(
    ("machine", "asked", "words"),
    [
        ("h100", '[memory]\nengine = "reference"\n', "PEFT"),
        ("h100", '[memory]\ngraphs = "on"\n', "graphs"),
        ("h100", '[adapter]\nkind = "dora"\n[memory]\n', "dora"),
        ("h100", '[adapter]\nkind = "lokr"\n[memory]\n', "lokr"),
    ],
)
def test_where_an_adapter_cannot_be_on_the_host(machine, asked, words, plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for("fp8", machine, asked + 'optimizer_state = "offload"\n')
    (problem,) = caught.value.diagnostics
    assert problem.code.id == "IP016" and problem.span.source.startswith("optimizer_state")
    assert words in problem.message and problem.cure.startswith("set optimizer_state = ")
    # Left to the planner, it is not taken however small the card.
    small = plan_for("fp8", f"{machine}, free 2", asked)
    assert small.value("optimizer_state") != "offload"


def test_several_processes_keep_the_adapter_on_their_devices(full_base, write_recipe, summarize):
    asked = memory('optimizer_state = "offload"')
    with pytest.raises(IdeoflowError) as caught:
        make_plan(write_recipe(asked), full_base, summarize(), named_hardware("h100"), processes=2)
    assert [d.code.id for d in caught.value.diagnostics] == ["IP016"]
    alone = make_plan(write_recipe(), full_base, summarize(), named_hardware("4gb"))
    assert alone.value("optimizer_state") == "offload"
    two = make_plan(write_recipe(), full_base, summarize(), named_hardware("4gb"), processes=2)
    assert two.value("optimizer_state") != "offload"
    with pytest.raises(IdeoflowError) as caught:
        for_processes(alone, 2)
    (problem,) = caught.value.diagnostics
    assert problem.code.id == "IP016" and problem.cure == "plan again, with --processes 2"
    assert for_processes(alone, 1) == alone


def test_weights_cut_up_among_processes(plan_for):
    """Each of them has a piece of the large weights and three blocks that are gathered, and pins nothing."""
    asked = memory('engine = "fused"\nprecision = "fp8"\noffload = "{}"')
    large = 34 * (4 * 4608**2 + 3 * 4608 * 12288)
    streamed = plan_for("fp8", "h100", asked.format("stream"), processes=2)
    for processes in (2, 3, 8):
        plan = plan_for("fp8", "h100", asked.format("shard"), processes=processes)
        assert plan.processes == processes and plan.decision("offload").reason_code == "recipe"
        here, there = ({x.name: x.bytes for x in p.ledger.of("train")} for p in (streamed, plan))
        assert there["weights"] - here["weights"] == -(-large // processes)
        assert there["fetched weights"] == here["fetched weights"]
        assert there["NCCL"] == 2 * here["NCCL"], "one group for gradients, one for weights"
        # While they load, all of them are on the host, and before they came nothing was.
        assert plan.host_bytes == large and plan.value("graphs") == "off"
    alone = plan_for("fp8", "h100", asked.format("none"), processes=2)
    found = {r.value: r.reason_code for r in alone.decision("offload").rejected}
    assert found["shard"] == "only-on-request"


def test_gathering_takes_the_links_time_where_computing_does_not_hide_it(plan_for):
    """Small pictures: of two processes each fetches half of what it would from the host, of four more."""
    asked = 'engine = "fused"\nprecision = "bf16"\nactivation_offload = "none"\nactivation_budget = 1\n'
    asked = memory(asked + 'optimizer_state = "float32"\noffload = "{}"')
    asked += '[validate]\nprompts = ["a.icap"]\n'

    def waits(offload, processes):
        plan = plan_for("full", "a100-40gb", asked.format(offload), 256, processes=processes)
        return sum(p.ms for p in plan.time.parts if p.name == "fetching"), plan.time.sample_seconds

    two, four, streamed = waits("shard", 2), waits("shard", 4), waits("stream", 2)
    assert two[0] < four[0] < streamed[0] and two[1] < four[1] < streamed[1]


def test_at_every_groups_turn_host_and_device_wait_for_each_other(plan_for):
    asked = memory('engine = "reference"\nprecision = "fp8"\noffload = "{}"\n{}')

    def parts(offload, rest="", pixels=1024):
        time = plan_for("fp8", "h100", asked.format(offload, rest), pixels).time
        return {part.name: part.ms for part in time.parts}

    assert "turns" not in parts("none") and "turns" not in parts("stream")
    one, two = parts("block"), parts("block", "offload_blocks = 2")
    assert one["turns"] == pytest.approx(2 * two["turns"])
    assert "turns" not in parts("block", "offload_streams = false"), "what is fetched at once waits anyway"
    # A Linear's fetches go on while the device works; where that waits for the host, they are in its way.
    assert 0 < parts("leaf")["turns"] < two["turns"]
    assert parts("leaf", pixels=256)["launch"] > parts("none", pixels=256)["launch"]


@pytest.mark.parametrize(
    ("asked", "processes", "words"),
    [
        ("", 1, "torchrun --nproc-per-node"),
        ('graphs = "on"\n', 2, "graphs"),
        ('engine = "reference"\ncheckpointing = "off"\n', 2, "checkpointing"),
    ],
)
def test_where_weights_cannot_be_cut_up(asked, processes, words, plan_for):
    with pytest.raises(IdeoflowError) as caught:
        plan_for("fp8", "h100", memory(f'{asked}offload = "shard"'), processes=processes)
    (problem,) = caught.value.diagnostics
    assert problem.code.id == "IP016" and words in problem.cure


def test_a_plan_with_weights_cut_up_is_for_its_number_of_processes(plan_for):
    two = plan_for("fp8", "h100", memory('offload = "shard"'), processes=2)
    assert for_processes(two, 2) == two
    for processes, cure in ((1, "torchrun --nproc-per-node 2"), (4, "plan again, with --processes 4")):
        with pytest.raises(IdeoflowError) as caught:
            for_processes(two, processes)
        (problem,) = caught.value.diagnostics
        assert problem.code.id == "IP016" and cure in problem.cure
