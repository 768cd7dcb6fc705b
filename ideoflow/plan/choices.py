"""What may be chosen on a machine: which combinations there are, and why a setting cannot be carried out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from ideoflow.plan.document import Hardware
from ideoflow.plan.sizes import Choice
from ideoflow.recipe import RecipeTables

# Each decision that is searched for, with its values; a budget that the recipe sets joins those here.
BUDGETS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DOMAINS: dict[str, tuple[str | float, ...]] = {
    "engine": ("fused", "reference"),
    "precision": ("bf16", "fp8", "float32"),
    "matmul": ("fp8", "bf16", "float32"),
    "activation_budget": BUDGETS,
    "compile": ("off", "regional"),
    "unconditional": ("loaded", "proxy"),
}
# Keys of [memory] that decide something.
SETTINGS = ("engine", "precision", "matmul", "activation_budget", "checkpointing", "compile")
_FP8_UNITS = (8, 9)
# cuDNN's backward pass for heads of 256 exists for Hopper only (NVIDIA cuDNN, Attention, support matrix).
_FLASH4 = (9, 10)  # major compute capabilities with its backward pass for heads of 256
_CUDNN_ATTENTION = (9, 0)


def fixed_by_recipe(tables: RecipeTables) -> dict[str, str | float]:
    """Settings that the recipe has decided, by their key in [memory]."""
    asked = {name: getattr(tables.memory, name) for name in SETTINGS}
    return {name: value for name, value in asked.items() if value != "auto"}


def fixed_decisions(tables: RecipeTables) -> dict[str, str | float]:
    """The same as decisions: checkpointing is an activation budget of 0 or 1."""
    fixed = fixed_by_recipe(tables)
    if "checkpointing" in fixed:
        fixed["activation_budget"] = 0.0 if fixed.pop("checkpointing") == "on" else 1.0
    return fixed


def no_fused_engine(hardware: Hardware, device: str, targets: Iterable[str], kind: str = "lora") -> str:
    """Why the fused engine cannot train such an adapter on these modules, or nothing where it can."""
    if device != "cuda":
        return "the fused engine needs an NVIDIA GPU"
    if hardware.kind == "rocm":
        return "the fused engine's kernels are for NVIDIA GPUs"
    if not hardware.fast_bf16:
        return f"the fused engine needs bf16 units, and {hardware.name} has none"
    if "triton" not in hardware.packages:
        return "the fused engine needs the package triton, which is not installed"
    # It computes all blocks' modulations before the first block, outside what it differentiates.
    if any(target.endswith(".adaln_modulation") for target in targets):
        return "the fused engine has no adapters on adaln_modulation"
    if kind != "lora":
        return f"the fused engine computes plain LoRA; {kind} is left to PEFT"
    return ""


def has_fp8_units(hardware: Hardware) -> bool:
    """Whether products can be in FP8; unknown cards are taken to have no such units."""
    return hardware.kind == "cuda" and (hardware.compute_capability or (0, 0)) >= _FP8_UNITS


def attention_kernel(hardware: Hardware, engine: str) -> tuple[str, str, str]:
    """(kernel, reason code, reason)."""
    if engine == "reference":
        return "sdpa", "only-choice", "one sample at a time needs no mask"
    capability = hardware.compute_capability or (0, 0)
    if capability[0] in _FLASH4 and "flash-attn-4" in hardware.packages:
        return "flash4", "fastest", "the fastest backward pass for heads of 256, lengths mixed or equal"
    if capability != _CUDNN_ATTENTION:
        if capability[0] in _FLASH4:
            return "sdpa", "not-installed", "install flash-attn-4 for mixed lengths at full speed"
        return "sdpa", "unsupported", "the others go backward through heads of 256 on other cards only"
    if "cudnn" not in hardware.packages:
        return "sdpa", "not-installed", "install flash-attn-4 for mixed lengths at full speed"
    return "cudnn_varlen", "not-installed", "mixed lengths without a mask; flash-attn-4 would be 15% faster"


def combinations(
    hardware: Hardware,
    device: str,
    targets: Iterable[str],
    budgets: tuple[float, ...] = (),
    kind: str = "lora",
) -> Iterator[Choice]:
    """Everything that the engines can do on a machine, guidance apart (``loaded`` throughout)."""
    fused = not no_fused_engine(hardware, device, targets, kind)
    if fused:
        pairs = [("bf16", "bf16"), ("fp8", "bf16")]
        if has_fp8_units(hardware):
            pairs.append(("fp8", "fp8"))
        every = sorted({*BUDGETS, *budgets})
        for (precision, matmul), budget in product(pairs, every):
            yield Choice(device, "fused", precision, matmul, budget, "off", "loaded")
    # torch.compile makes its GPU kernels with Triton too.
    compiled = hardware.kind == "cuda" and device == "cuda" and "triton" in hardware.packages
    for precision, budget, compile in product(
        ("bf16", "fp8", "float32"), (0.0, 1.0), ("off", "regional") if compiled else ("off",)
    ):
        if precision == "fp8" and compile == "regional" and not has_fp8_units(hardware):
            continue  # Triton reads e4m3 only where there are such units
        matmul = "float32" if precision == "float32" else "bf16"
        yield Choice(device, "reference", precision, matmul, budget, compile, "loaded")


@dataclass(frozen=True)
class Refusal:
    """A setting of [memory] that cannot be carried out: why, and what to do."""

    key: str
    message: str
    cure: str


def refusals(tables: RecipeTables, hardware: Hardware, device: str, targets: Iterable[str]) -> list[Refusal]:
    """Settings that are impossible together, or on this machine; empty where the recipe can be obeyed."""
    m, found = tables.memory, []

    def refuse(key: str, message: str, cure: str) -> None:
        found.append(Refusal(key, message, cure))

    fused_only = [k for k in ("matmul", "activation_budget") if getattr(m, k) != "auto"]
    if m.matmul == "bf16" and m.engine != "fused":
        fused_only.remove("matmul")  # the reference engine multiplies in bf16 too
    if m.engine == "reference":
        for key in fused_only:
            message = f"{key} = {getattr(m, key)!r} is for the fused engine, and engine is 'reference'"
            refuse(key, message, f"remove {key}, or set engine = 'fused'")
    elif m.engine == "fused" or fused_only:
        key = "engine" if m.engine == "fused" else fused_only[0]
        if missing := no_fused_engine(hardware, device, targets, tables.adapter.kind):
            refuse(key, missing, f"set engine = 'auto', and leave {key} out")
        if m.precision == "float32":
            refuse("precision", "the fused engine computes in bf16, and precision is 'float32'",
                   "set precision = 'auto', or engine = 'reference'")  # fmt: skip
        if m.compile == "regional":
            refuse("compile", "compile = 'regional' is for the reference engine",
                   "set compile = 'auto', or engine = 'reference'")  # fmt: skip
    if m.matmul == "fp8":
        if m.precision not in ("auto", "fp8"):
            refuse("matmul", f"matmul = 'fp8' needs precision = 'fp8', not '{m.precision}'",
                   "set precision = 'auto' or 'fp8'")  # fmt: skip
        if device == "cuda" and not has_fp8_units(hardware):
            refuse("matmul", f"{hardware.name} is not known to have FP8 units (compute capability 8.9)",
                   "set matmul = 'auto' or 'bf16'; the weights may be in FP8 all the same")  # fmt: skip
    if m.matmul == "bf16" and m.precision == "float32":
        refuse("matmul", "weights in float32 are multiplied in float32", "set matmul = 'auto'")
    if m.activation_budget != "auto" and m.checkpointing != "auto":
        refuse("checkpointing", "activation_budget says the same more finely",
               "set one of the two")  # fmt: skip
    if m.compile == "regional" and not any(c.compiled for c in combinations(hardware, device, targets)):
        refuse("compile", f"torch.compile is for NVIDIA GPUs with Triton, not for {hardware.name}",
               "set compile = 'auto' or 'off'")  # fmt: skip
    return found
