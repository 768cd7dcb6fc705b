"""Why something was chosen and why not: a code for programs and a sentence for people."""

from __future__ import annotations

from collections.abc import Mapping

from ideoflow.plan.choices import no_fused_engine
from ideoflow.plan.problem import Evaluation, Problem
from ideoflow.plan.search import cost, rounded
from ideoflow.plan.sizes import QUANTISED


def why_not(problem: Problem, best: Evaluation, other: Evaluation, name: str) -> str:
    """Reason code for an alternative ``other`` to the decision ``name`` that was not taken.

    One of over-memory, over-host-memory, tight, less-exact, little-gain, slower, slower-to-compile, no-gain.
    """
    if other.peak_bytes > problem.hardware.free_bytes:
        return "over-memory"
    if not other.fits:
        return "over-host-memory"
    if other.tight and not best.tight:
        return "tight"
    if name == "unconditional":
        return "slower" if other.choice.unconditional == "streamed" else "less-exact"
    storage = problem.base.storage
    if rounded(other.choice, storage) > rounded(best.choice, storage):
        return "less-exact"
    faster = best.run_seconds / other.run_seconds
    if faster > 1.03 or (faster > 1 and cost(other) > cost(best)):
        return "little-gain"
    if other.run_seconds > 1.03 * best.run_seconds:
        return "slower-to-compile" if other.step_ms < best.step_ms else "slower"
    return "no-gain"


def why(problem: Problem, best: Evaluation, name: str, rejected: Mapping[str, str]) -> tuple[str, str]:
    """Reason code and sentence for what was chosen."""
    value, fused = getattr(best.choice, name), best.choice.engine == "fused"
    if not best.fits:
        return "least-memory", "needs least"
    over = bool({"over-memory", "tight"} & set(rejected.values()))
    if name == "precision":
        return _precision_reason(problem, best, over, rejected.get("bf16"))
    if name == "activation_budget":
        return _budget_reason(best, over, rejected)
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
        return _waiting_reason(name, str(value), rejected)
    if name == "exact_blocks":
        return _exact_reason(best.choice.exact_blocks, rejected, over)
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


def _waiting_reason(name: str, value: str, rejected: Mapping[str, str]) -> tuple[str, str]:
    plain = "float32" if name == "optimizer_state" else "none"
    forced = value != plain and rejected.get(plain) in ("over-memory", "tight")
    words = {
        "float32": "AdamW's moments fit beside the adapter, exact",
        "cpu": "AdamW's moments wait on the host: exact, and they leave the card free",
        "offload": "adapter, gradients and moments wait on the host, exact",
        "8bit": "AdamW's moments in a quarter of their size",
        "stream": "the blocks' weights wait on the host, fetched ahead of both passes",
        "inputs": "the blocks' inputs wait on the host for the backward pass",
        "outputs": "inputs and products of the blocks wait on the host, rounded to e4m3",
        "gate_up": "inputs and gate and up wait on the host, rounded to e4m3",
        "none": "the weights stay on the device" if name == "offload" else "what is kept stays on the device",
    }[value]
    if value != plain and not forced:
        words += ": faster than computing more again"
    return "needs-memory" if forced else "fastest-that-fits", words


def _exact_reason(count: int, rejected: Mapping[str, str], over: bool) -> tuple[str, str]:
    if count:
        return "exact", "first blocks multiply in bf16 going forward: their rounding reaches all others"
    if over:
        return "needs-memory", "no room for a dequantised weight and wider operands"
    if rejected:
        return "fastest-that-fits", "exact blocks would take too long here"
    return "only-choice", "too few blocks for a share of them"


def _budget_reason(best: Evaluation, over: bool, rejected: Mapping[str, str]) -> tuple[str, str]:
    if not rejected and best.choice.offload != "none":
        return "only-choice", "autograd would keep the weights that are fetched"
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
