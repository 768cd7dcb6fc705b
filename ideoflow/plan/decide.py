"""From the chosen combination to a plan: each decision with its reason and what was rejected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ideoflow.diagnostics import Collector, fail
from ideoflow.diagnostics.codes.plan import CANNOT_BE_DONE, DEVICE_MISMATCH, NO_GPU, NO_TARGETS_IN_BASE
from ideoflow.model.base import BaseFacts
from ideoflow.plan.adapters import file_numbers
from ideoflow.plan.advise import advise, cheapest_changes
from ideoflow.plan.calibration import Calibration, shipped
from ideoflow.plan.choices import (
    DOMAINS,
    ON_REQUEST,
    attention_kernel,
    attention_kernels,
    fixed_by_recipe,
    fixed_decisions,
    refusals,
)
from ideoflow.plan.document import (
    FORMAT,
    DataSummary,
    Decision,
    Digests,
    DiskSizes,
    Hardware,
    Ledger,
    Plan,
    Rejected,
    Value,
)
from ideoflow.plan.problem import (
    NCCL,
    Evaluation,
    Problem,
    cache_dtype,
    estimate_time,
    times_known,
    with_nccl,
)
from ideoflow.plan.reasons import why, why_not
from ideoflow.plan.search import alternatives, excluded_by, solve
from ideoflow.plan.sizes import ADAPTER_BYTES, ELEMENT_BYTES, QUANTISED, Choice
from ideoflow.recipe import Recipe, RecipeTables, TrainSettings

GIB = 1 << 30


def make_plan(
    recipe: Recipe,
    base: BaseFacts,
    data: DataSummary | None,
    hardware: Hardware,
    *,
    calibration: Calibration | None = None,
    prompts: int | None = None,
    processes: int = 1,
    brief: bool = False,
) -> Plan:
    """Decides everything that a run needs to know; the same arguments give the same plan.

    Args:
        recipe: what is wanted. What it sets is kept, whether or not it fits.
        base: the base model's facts.
        data: the data set's, or None to plan for pictures of the recipe's resolution.
        hardware: the machine, at hand or by name.
        calibration: measurements to correct the formulas with; by default those that ship.
        prompts: number of validation pictures; by default one for each entry of ``validate.prompts``.
        processes: how many train together, each on such a machine.
        brief: for a table: memory, times and sizes without decisions, warnings and what would help.

    Raises:
        IdeoflowError: if the targets match nothing in this base, the device asked for is not there, or
            settings are impossible together or on this machine.
    """
    tables = recipe.tables
    count = len(tables.validate.prompts) if prompts is None else prompts
    problem = Problem(tables, base, data, hardware, calibration or shipped(), count, processes)
    _check(problem, recipe)
    best = solve(problem)
    plan = Plan(
        FORMAT,
        recipe.name,
        recipe.path.as_posix(),
        Digests(recipe.digest, data.digest if data else None, base.digest),
        tables,
        base,
        problem.targets,
        hardware,
        data,
        () if brief else tuple(_with_its_line(d, recipe) for d in _decisions(problem, best)),
        best.ledger,
        estimate_time(problem, best),
        disk_sizes(tables, base, data, problem),
        host_bytes=0 if problem.device == "cpu" else problem.host_bytes(best.choice),
    )
    if brief:
        return plan
    changes = () if plan.fits else cheapest_changes(problem, best)
    plan = _with_processes(replace(plan, changes=changes), processes)
    return replace(plan, warnings=advise(plan, problem, best, recipe))


def for_processes(plan: Plan, processes: int) -> Plan:
    """The same plan for another number of processes; of one process, a plan has no word on it.

    Raises:
        IdeoflowError: if it decides for something that so many processes cannot carry out.
    """
    if plan.processes == processes:
        return plan
    state, offload = (plan.value(name) for name in ("optimizer_state", "offload"))
    again = f"plan again, with --processes {processes}"
    if state == "offload" and processes > 1:
        message = f"the plan has optimizer_state = 'offload', which is for one process, not for {processes}"
        fail(CANNOT_BE_DONE, message, cure=again)
    if offload == "shard":
        message = f"the plan cuts the weights up among {plan.processes} processes, not {processes}"
        several = again if processes > 1 else f"start it with torchrun --nproc-per-node {plan.processes}"
        fail(CANNOT_BE_DONE, message, cure=several)
    return _with_processes(plan, processes)


def _with_processes(plan: Plan, processes: int) -> Plan:
    others = tuple(d for d in plan.decisions if d.id != "processes")
    if processes == 1:
        lines = tuple(line for line in plan.ledger.lines if line.name != NCCL.name)
        return replace(plan, decisions=others, ledger=Ledger(lines))
    train, gpus = plan.tables.train, plan.value("device") == "cuda"
    what = "GPUs" if gpus else "processes"
    product = f"{processes} x batch {train.batch} x accumulation {train.accumulation}"
    reason = f"{processes} {what}, global batch {processes * train.batch * train.accumulation} = {product}"
    decided = Decision("processes", processes, "auto", "launched", reason)
    ledger = with_nccl(plan.ledger, str(plan.value("offload"))) if gpus else plan.ledger
    return replace(plan, decisions=(*others, decided), ledger=ledger)


def _with_its_line(decision: Decision, recipe: Recipe) -> Decision:
    """What the recipe has set says where."""
    table = "train" if decision.id in ("batch", "accumulation") else "memory"
    keys = (f"{table}.{decision.id}", "memory.checkpointing" if decision.id == "activation_budget" else "")
    key = next((key for key in keys if key and recipe.is_set(key)), None)
    if key is None or decision.reason_code not in ("recipe", "default"):
        return decision
    reason = f"{decision.reason}, line {recipe.span(key).line}"
    return replace(decision, source="recipe", reason_code="recipe", reason=reason)


def _check(problem: Problem, recipe: Recipe) -> None:
    device, kind = recipe.tables.memory.device, problem.hardware.kind
    span = recipe.span("memory.device")
    if device == "cuda" and problem.device == "cpu":
        cure = "set memory.device = 'auto' or 'cpu', or plan for a named card with --gpu"
        fail(NO_GPU, f"device is 'cuda', but the machine is a {problem.hardware.name}", span, cure=cure)
    if device == "cpu" and kind in ("cuda", "rocm"):
        cure = "leave out --gpu, or set memory.device = 'auto'"
        message = f"device is 'cpu', but the plan is for a {problem.hardware.name}"
        fail(DEVICE_MISMATCH, message, span, cure=cure)
    if not problem.targets:
        blocks = problem.base.transformer.num_layers
        message = f"no Linear of the {blocks} blocks of '{problem.base.name}' matches adapter.targets"
        fail(NO_TARGETS_IN_BASE, message, recipe.span("adapter.targets"), cure="targets = 'all'")
    problems, blocks = Collector(), problem.base.transformer.num_layers
    for refusal in refusals(
        recipe.tables, problem.hardware, problem.device, problem.targets, blocks, problem.processes
    ):
        place = recipe.span(f"memory.{refusal.key}")
        problems.add(CANNOT_BE_DONE, refusal.message, place, cure=refusal.cure)
    problems.raise_if_errors()


def disk_sizes(
    tables: RecipeTables, base: BaseFacts, data: DataSummary | None, problem: Problem
) -> DiskSizes:
    """Bytes that a run writes; a checkpoint holds float32 factors and both moments."""
    spec = base.transformer
    in_file = file_numbers(tables.adapter, problem.modules, tables.output.format)
    element = ELEMENT_BYTES.get(tables.output.dtype, 4)
    latents = text = None
    if data is not None:
        area = sum(b.width * b.height * b.count for b in data.buckets)
        # float32 latents: in_channels numbers for each 16 x 16 pixels.
        latents = area * spec.in_channels * 4 // 256
        text = data.texts * data.text_tokens[1] * spec.hidden * 2
    checkpoint = 3 * problem.adapter.parameters * ADAPTER_BYTES
    return DiskSizes(in_file * element, checkpoint, latents, text)


def _decisions(problem: Problem, best: Evaluation) -> tuple[Decision, ...]:
    choice = best.choice
    searched = {name: _searched(problem, best, name) for name in DOMAINS}
    if choice.engine == "reference":
        searched["checkpointing"] = _as_checkpointing(problem, searched["activation_budget"])
        words = "the reference engine keeps all or nothing, by checkpointing"
        budget = Decision("activation_budget", choice.activation_budget, "auto", "not-used", words)
        searched["activation_budget"] = budget
    else:
        words = "the fused engine goes by activation_budget"
        on, asked = choice.checkpointing, "checkpointing" in fixed_by_recipe(problem.tables)
        source, code = ("recipe", "recipe") if asked else ("auto", "not-used")
        searched["checkpointing"] = Decision("checkpointing", on, source, code, words)  # type: ignore[arg-type]
    if choice.matmul != "fp8":
        searched["exact_blocks"] = Decision("exact_blocks", 0, "auto", "not-used", "no products are in FP8")
    order = (
        "engine",
        "precision",
        "matmul",
        "exact_blocks",
        "activation_budget",
        "checkpointing",
        "compile",
        "unconditional",
        "optimizer_state",
        "offload",
        "activation_offload",
        "graphs",
    )
    return (
        _device(problem),
        *(searched[name] for name in order),
        _attention(problem, best),
        _quantize_via(problem, choice),
        *_batch(problem, best),
        _cache_dtype(choice.precision),
        Decision(
            "text_phase",
            "streamed",
            "auto",
            "only-choice",
            "captions go through the text encoder layer by layer, so it is never there as a whole",
        ),
    )


def _attention(problem: Problem, best: Evaluation) -> Decision:
    """The kernel, and what the others would take: as if only their packages were there, or theirs too."""
    hardware, engine = problem.hardware, best.choice.engine
    kernel, code, reason = attention_kernel(hardware, engine)
    if engine == "reference":
        return Decision("attention", kernel, "auto", code, reason)
    needs: dict[str, set[str]] = {"flash4": {"flash-attn-4"}, "cudnn_varlen": {"cudnn"}, "sdpa": set()}
    every, timed = set().union(*needs.values()), times_known(problem, best.choice)
    rejected = []
    for name, missing in attention_kernels(hardware).items():
        if name == kernel:
            continue
        if missing == "unsupported":
            rejected.append(Rejected(name, missing))
            continue
        packages = (*(p for p in hardware.packages if p not in every), *sorted(needs[name]))
        with_it = Evaluation(replace(problem, hardware=replace(hardware, packages=packages)), best.choice)
        why = missing or ("slower" if with_it.step_ms > best.step_ms else "no-gain")
        rejected.append(Rejected(name, why, *_deltas(best, with_it, timed)))
    return Decision("attention", kernel, "auto", code, reason, rejected=tuple(rejected))


def _batch(problem: Problem, best: Evaluation) -> tuple[Decision, Decision]:
    """Samples of a pass and passes of a step, which the recipe says; and what others would take."""
    train, timed = problem.tables.train, times_known(problem, best.choice)

    def other(value: int, changed: TrainSettings) -> Rejected:
        found = solve(replace(problem, tables=replace(problem.tables, train=changed)))
        why = "over-memory" if not found.fits else "only-on-request"
        return Rejected(value, why, *_deltas(best, found, timed))

    several = f"{train.batch} pictures" if train.batch > 1 else "one picture"
    sizes = [n for n in (train.batch // 2, 2 * train.batch) if n] if best.fits else []
    batch = tuple(other(n, replace(train, batch=n)) for n in sizes)
    one_by_one = train.batch * train.accumulation
    # The same step, one picture a pass.
    single = replace(train, batch=1, accumulation=one_by_one)
    passes = (other(one_by_one, single),) if train.batch > 1 else ()
    words = "one pass makes a step" if train.accumulation == 1 else f"{train.accumulation} passes make a step"
    return (
        Decision("batch", train.batch, "auto", "default", f"{several} a pass", rejected=batch),
        Decision("accumulation", train.accumulation, "auto", "default", words, rejected=passes),
    )


def _cache_dtype(precision: str) -> Decision:
    """What pictures and captions are encoded in and read as."""
    value = cache_dtype(precision)
    other = "float32" if value == "bfloat16" else "bfloat16"
    rejected = (Rejected(other, "no-gain" if value == "bfloat16" else "less-exact"),)
    return Decision(
        "cache_dtype", value, "auto", "only-choice", "what the arithmetic reads", rejected=rejected
    )


def _quantize_via(problem: Problem, choice: Choice) -> Decision:
    """Where weights are rounded while they load."""
    asked = problem.tables.memory.quantize_via
    if choice.precision not in QUANTISED or choice.precision == problem.base.storage:
        reason = "the weights are not rounded"
        if asked != "auto":
            return Decision("quantize_via", asked, "recipe", "not-used", reason)
        kind = "cpu" if choice.device == "cpu" else "gpu"
        return Decision("quantize_via", kind, "auto", "not-used", reason)
    if asked != "auto":
        return Decision("quantize_via", asked, "recipe", "recipe", "you set this")
    if choice.device == "cpu":
        return Decision("quantize_via", "cpu", "auto", "only-choice", "there is no GPU")
    words = "by pieces of rows, so that no dense copy of a weight is ever there"
    return Decision("quantize_via", "gpu", "auto", "fastest", words, rejected=(Rejected("cpu", "slower"),))


def _as_checkpointing(problem: Problem, budget: Decision) -> Decision:
    """The reference engine's name for its two activation budgets."""

    def named(value: Value) -> str:
        return "off" if value == 1 else "on"

    rejected = tuple(replace(r, value=named(r.value)) for r in budget.rejected if r.value in (0, 1))
    evidence = budget.evidence.replace("0.0:", "on:").replace("1.0:", "off:")
    return replace(
        budget, id="checkpointing", value=named(budget.value), evidence=evidence, rejected=rejected
    )


def _device(problem: Problem) -> Decision:
    hardware, asked = problem.hardware, problem.tables.memory.device
    evidence = f"{hardware.name}, {hardware.free_bytes / GIB:.1f} GiB free"
    if asked != "auto":
        return Decision("device", problem.device, "recipe", "recipe", "you set this", evidence)
    if problem.device == "cuda":
        slower = (Rejected("cpu", "slower"),)
        return Decision("device", "cuda", "auto", "gpu-present", "there is a GPU", evidence, slower)
    if hardware.kind == "mps":
        reason = "Apple's GPU is not used: its float32 and attention paths are not dependable"
        return Decision(
            "device", "cpu", "auto", "not-recommended", reason, evidence, (Rejected("mps", "unsupported"),)
        )
    missing = (Rejected("cuda", "no-gpu"),)
    return Decision("device", "cpu", "auto", "no-gpu", "no NVIDIA GPU answers", evidence, missing)


def _searched(problem: Problem, best: Evaluation, name: str) -> Decision:
    """A decision that the search took, compared with what is most like it but for this one value."""
    value: Value = getattr(best.choice, name)
    fixed = fixed_decisions(problem.tables)
    timed = times_known(problem, best.choice)
    compared = alternatives(problem, best, name)
    if name == "activation_budget":
        compared = _around(float(value), compared)
    excluded = {v: setting for v in compared if (setting := excluded_by(problem, name, v))}

    def code_of(v: Value, e: Evaluation) -> str:
        if name in fixed:
            return "set-by-recipe"
        return "excluded" if v in excluded else why_not(problem, best, e, name)

    rejected = [Rejected(v, code_of(v, e), *_deltas(best, e, timed)) for v, e in compared.items()]
    if name != "activation_budget":
        waits = ON_REQUEST.get(name, ()) if problem.device == "cuda" else ()
        for v in DOMAINS[name]:
            if v != value and v not in compared:
                rejected.append(Rejected(v, "only-on-request" if v in waits else "unsupported"))
    if name in fixed:
        code, reason = "recipe", "you set this"
        if name == "activation_budget" and "checkpointing" in fixed_by_recipe(problem.tables):
            reason = f"you set checkpointing = '{best.choice.checkpointing}'"
    elif best.fits and excluded and len(excluded) == len(compared):
        code, reason = "required", f"all that can be done with {next(iter(excluded.values()))}"
    else:
        code, reason = why(problem, best, name, {str(r.value): r.reason_code for r in rejected})
    evidence = _evidence(best, name, compared, timed)
    source = "recipe" if name in fixed else "auto"
    return Decision(name, value, source, code, reason, evidence, tuple(rejected))  # type: ignore[arg-type]


def _around(value: float, compared: Mapping[str | float, Evaluation]) -> dict[str | float, Evaluation]:
    """Of many budgets the nearest on either side, and the ends."""
    others = sorted(float(v) for v in compared)
    shown = {
        *others[:1],
        *others[-1:],
        *[v for v in others if v < value][-1:],
        *[v for v in others if v > value][:1],
    }
    return {v: compared[v] for v in sorted(shown)}


def _deltas(best: Evaluation, other: Evaluation, timed: bool) -> tuple[int, float | None]:
    size = other.peak_bytes - best.peak_bytes
    return size, round(other.step_ms - best.step_ms, 1) if timed else None


def _evidence(best: Evaluation, name: str, compared: Mapping[str | float, Evaluation], timed: bool) -> str:
    """The figures behind a decision, as text."""
    rows = {getattr(best.choice, name): best} | dict(compared)
    cells = []
    for value, e in rows.items():
        time = f", {e.step_ms:.0f} ms a step" if timed else ""
        cells.append(f"{value}: {e.peak_bytes / GIB:.1f} GiB{time}")
    return "; ".join(cells)
