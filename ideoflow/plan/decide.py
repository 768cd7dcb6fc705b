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
    fixed_by_recipe,
    fixed_decisions,
    no_fused_engine,
    refusals,
)
from ideoflow.plan.document import (
    FORMAT,
    DataSummary,
    Decision,
    Digests,
    DiskSizes,
    Hardware,
    Plan,
    Rejected,
    Value,
)
from ideoflow.plan.search import Evaluation, Problem, alternatives, estimate_time, solve, times_known
from ideoflow.plan.sizes import ADAPTER_BYTES, ELEMENT_BYTES, QUANTISED, Choice
from ideoflow.recipe import Recipe, RecipeTables

GIB = 1 << 30


def make_plan(
    recipe: Recipe,
    base: BaseFacts,
    data: DataSummary | None,
    hardware: Hardware,
    *,
    calibration: Calibration | None = None,
    prompts: int | None = None,
) -> Plan:
    """Decides everything that a run needs to know; the same arguments give the same plan.

    Args:
        recipe: what is wanted. What it sets is kept, whether or not it fits.
        base: the base model's facts.
        data: the data set's, or None to plan for pictures of the recipe's resolution.
        hardware: the machine, at hand or by name.
        calibration: measurements to correct the formulas with; by default those that ship.
        prompts: number of validation pictures; by default one for each entry of ``validate.prompts``.

    Raises:
        IdeoflowError: if the targets match nothing in this base, the device asked for is not there, or
            settings are impossible together or on this machine.
    """
    tables = recipe.tables
    count = len(tables.validate.prompts) if prompts is None else prompts
    problem = Problem(tables, base, data, hardware, calibration or shipped(), count)
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
        _decisions(problem, best),
        best.ledger,
        estimate_time(problem, best),
        disk_sizes(tables, base, data, problem),
    )
    changes = () if plan.fits else cheapest_changes(problem, best)
    plan = replace(plan, changes=changes)
    return replace(plan, warnings=advise(plan, problem, best, recipe))


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
    problems = Collector()
    for refusal in refusals(recipe.tables, problem.hardware, problem.device, problem.targets):
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
    attention, code, reason = attention_kernel(problem.hardware, choice.engine)
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
    order = (
        "engine",
        "precision",
        "matmul",
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
        Decision("attention", attention, "auto", code, reason),
        _quantize_via(problem, choice),
        Decision(
            "text_phase",
            "streamed",
            "auto",
            "only-choice",
            "captions go through the text encoder layer by layer, so it is never there as a whole",
        ),
    )


def _quantize_via(problem: Problem, choice: Choice) -> Decision:
    """Where weights are rounded while they load."""
    asked = problem.tables.memory.quantize_via
    if choice.precision not in QUANTISED or choice.precision == problem.base.storage:
        reason = "the weights are not rounded"
        kind = "cpu" if choice.device == "cpu" else "gpu"
        return Decision("quantize_via", kind if asked == "auto" else asked, "auto", "not-used", reason)
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
    rejected = [
        Rejected(
            v,
            "set-by-recipe" if name in fixed else _why_not(problem, best, e, name),
            *_deltas(best, e, timed),
        )
        for v, e in compared.items()
    ]
    if name != "activation_budget":
        waits = ON_REQUEST.get(name, ()) if problem.device == "cuda" else ()
        for v in DOMAINS[name]:
            if v != value and v not in compared:
                rejected.append(Rejected(v, "only-on-request" if v in waits else "unsupported"))
    if name in fixed:
        code, reason = "recipe", "you set this"
        if name == "activation_budget" and "checkpointing" in fixed_by_recipe(problem.tables):
            reason = f"you set checkpointing = '{best.choice.checkpointing}'"
    else:
        code, reason = _why(problem, best, name, {str(r.value): r.reason_code for r in rejected})
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
    size = other.ledger.peak_bytes - best.ledger.peak_bytes
    return size, round(other.step_ms - best.step_ms, 1) if timed else None


def _why_not(problem: Problem, best: Evaluation, other: Evaluation, name: str) -> str:
    if other.ledger.peak_bytes > problem.hardware.free_bytes:
        return "over-memory"
    if not other.fits:
        return "over-host-memory"
    if other.tight and not best.tight:
        return "tight"
    if name == "unconditional":
        return "slower" if other.choice.unconditional == "streamed" else "less-exact"
    if other.run_seconds > 1.03 * best.run_seconds:
        return "slower-to-compile" if other.step_ms < best.step_ms else "slower"
    return "no-gain"


def _why(problem: Problem, best: Evaluation, name: str, rejected: Mapping[str, str]) -> tuple[str, str]:
    """Reason code and sentence for what was chosen."""
    value, fused = getattr(best.choice, name), best.choice.engine == "fused"
    if not best.fits:
        return "least-memory", "needs least, though it does not fit"
    over = bool({"over-memory", "tight"} & set(rejected.values()))
    if name == "precision":
        return _precision_reason(problem, best, over, rejected.get("bf16"))
    if name == "activation_budget":
        return _budget_reason(best, over)
    if name == "engine" and not fused:
        if missing := no_fused_engine(problem.hardware, problem.device, problem.targets):
            return "only-choice", missing
        return "fastest-that-fits", "plain diffusers and PEFT are as fast here"
    if name == "matmul" and value != "fp8":
        if best.choice.precision != "fp8":
            return "only-choice", f"weights in {best.choice.precision} are multiplied so"
        if not fused:
            return "only-choice", "the reference engine dequantises the weights"
        if rejected.get("fp8") == "unsupported":
            return "unsupported", "no FP8 units: weights are dequantised for each product"
        return "fastest-that-fits", "as fast here, and more exact"
    if name == "compile":
        if fused:
            return "not-used", "the fused engine brings its own kernels"
        if value == "off" and rejected.get("regional") == "unsupported":
            return "unsupported", "only for NVIDIA GPUs with Triton"
        if value == "off" and over:
            return "needs-memory", "compiled blocks do not fit"
    if name in ("optimizer_state", "offload", "activation_offload"):
        return _waiting_reason(name, str(value))
    if name == "graphs" and rejected.get("on") == "unsupported":
        return "unsupported", "needs the fused engine and flash-attn-4"
    if name == "unconditional" and not problem.prompts:
        return "no-prompts", "no validate.prompts, nothing is sampled"
    if name == "unconditional" and value == "proxy" and not problem.base.has_unconditional:
        return "not-in-base", "the base has no second transformer"
    sentences: dict[tuple[str, str], tuple[str, str]] = {
        ("engine", "fused"): ("fastest-that-fits", "packed samples, kernels of our own"),
        ("matmul", "fp8"): ("fastest-that-fits", "this card has FP8 units"),
        ("compile", "regional"): ("fastest-that-fits", "compiling is repaid by faster steps"),
        ("compile", "off"): ("not-repaid", "compiling would take longer than it saves"),
        ("graphs", "on"): ("fastest-that-fits", "the GPU would wait for the host's launches"),
        ("graphs", "off"): ("not-repaid", "the GPU is busy for longer than launching takes"),
        ("unconditional", "loaded"): ("exact", "samples get true asymmetric guidance"),
        ("unconditional", "streamed"): ("needs-memory", "true guidance, its blocks fetched from the host"),
        ("unconditional", "proxy"): ("needs-memory", "no room for the second transformer"),
    }
    return sentences[name, value]


def _waiting_reason(name: str, value: str) -> tuple[str, str]:
    return {
        "float32": ("fastest-that-fits", "AdamW's moments fit beside the adapter, exact"),
        "cpu": ("needs-memory", "AdamW's moments wait on the host: exact, and they leave the card free"),
        "8bit": ("needs-memory", "AdamW's moments in a quarter of their size"),
        "stream": ("needs-memory", "the blocks' weights wait on the host, fetched ahead of both passes"),
        "inputs": ("needs-memory", "the blocks' inputs wait on the host for the backward pass"),
        "outputs": ("needs-memory", "inputs and products of the blocks wait on the host, rounded to e4m3"),
        "gate_up": ("needs-memory", "inputs and gate and up wait on the host, rounded to e4m3"),
        "none": (
            "fastest-that-fits",
            "the weights stay on the device" if name == "offload" else "what is kept stays on the device",
        ),
    }[value]


def _budget_reason(best: Evaluation, over: bool) -> tuple[str, str]:
    if best.choice.checkpointing == "off":
        return "fastest-that-fits", "all activations fit, nothing is recomputed"
    if not over:
        return "fastest-that-fits", "leaves room for what is worth more"
    if best.choice.activation_budget == 0:
        return "needs-memory", "activations of all blocks leave no room"
    return "needs-memory", "as much as there is room for, the dearest to recompute first"


def _precision_reason(problem: Problem, best: Evaluation, over: bool, bf16: str | None) -> tuple[str, str]:
    value, storage = best.choice.precision, problem.base.storage
    if value == storage and value in QUANTISED:
        return "lossless", "the weights are stored so, nothing is lost"
    if value in QUANTISED and storage == "fp8":
        return "needs-memory", f"weights in FP8 do not fit, so they are rounded to {value}"
    if value in QUANTISED:
        found = "leave too little room" if bf16 == "tight" else "do not fit"
        return "needs-memory", f"weights in bf16 {found}, so they are rounded"
    if value == "float32":
        return "exact", "as fast here, and exact"
    if storage == "float32":
        if over:
            return "needs-memory", "float32 weights do not fit"
        return "fastest-that-fits", "half the memory, faster products"
    if storage == "fp8":
        return "fastest-that-fits", "all that can be done here"
    return "lossless", "nothing of the stored weights is lost"


def _evidence(best: Evaluation, name: str, compared: Mapping[str | float, Evaluation], timed: bool) -> str:
    """The figures behind a decision, as text."""
    rows = {getattr(best.choice, name): best} | dict(compared)
    cells = []
    for value, e in rows.items():
        time = f", {e.step_ms:.0f} ms a step" if timed else ""
        cells.append(f"{value}: {e.ledger.peak_bytes / GIB:.1f} GiB{time}")
    return "; ".join(cells)
