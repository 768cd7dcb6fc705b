"""What may be chosen on a machine: which combinations there are, and why a setting cannot be carried out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from ideoflow.kernels.budget import ROUNDING
from ideoflow.plan.document import Hardware
from ideoflow.plan.sizes import Choice
from ideoflow.recipe import RecipeTables

# Each decision that is searched for, with its values; a budget that the recipe sets joins those here.
# The first hundredths save most time a byte (attention's results), so budgets lie closer there.
BUDGETS = (
    *(0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    *(0.6, 0.7, 0.8, 0.9, 1.0),
)
DOMAINS: dict[str, tuple[str | float, ...]] = {
    "engine": ("fused", "reference"),
    "precision": ("bf16", "fp8", "int8", "nf4", "float32"),
    "matmul": ("fp8", "bf16", "float32"),
    "activation_budget": BUDGETS,
    "compile": ("off", "regional"),
    "unconditional": ("loaded", "streamed", "proxy"),
    "optimizer_state": ("float32", "cpu", "offload", "8bit", "paged"),
    "offload": ("none", "stream", "shard", "block", "leaf", "disk"),
    "activation_offload": ("none", "inputs", "outputs", "gate_up"),
    "graphs": ("off", "on"),
    "exact_blocks": (0,),  # and a share of the base's blocks
}
# What is weighed where the recipe leaves it open; the other values are slower than these for the same memory.
_OPEN = {
    "optimizer_state": ("float32", "cpu", "offload", "8bit"),
    "offload": ("none", "stream"),
    "activation_offload": ("none", "inputs", "outputs", "gate_up"),
}
# Those: never chosen by the planner.
ON_REQUEST = {name: tuple(v for v in DOMAINS[name] if v not in values) for name, values in _OPEN.items()}
GROUPED = ("block", "leaf", "disk")
# Values that only the fused engine carries out, and what there is instead.
_FUSED_ONLY = {
    "activation_offload": (("inputs", *ROUNDING), "none"),
    "optimizer_state": (("offload",), "float32"),
}
# Keys of [memory] that decide something.
SETTINGS = (
    "engine",
    "precision",
    "matmul",
    "activation_budget",
    "checkpointing",
    "compile",
    "optimizer_state",
    "offload",
    "activation_offload",
    "graphs",
    "exact_blocks",
)
# Of the blocks, the first ones: with their forward products exact, 1 - cosine of the velocity is 6.9e-4, else
# 12.7e-4 (benchmarks/fidelity.py --size mid), for a few percent of a step.
_EXACT_SHARE = 6 / 34
_FP8_UNITS = (8, 9)
_FLASH4 = (9, 10)  # major compute capabilities with its backward pass for heads of 256
# cuDNN's backward pass for heads of 256 exists for Hopper only (NVIDIA cuDNN, Attention, support matrix).
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


def exact_block_counts(blocks: int, fixed: Mapping[str, str | float]) -> tuple[int, ...]:
    """How many of a base's first blocks may be exact: none, the usual share, what the recipe asks for."""
    return tuple(sorted({0, round(_EXACT_SHARE * blocks), int(fixed.get("exact_blocks", 0))}))


def no_fused_engine(hardware: Hardware, device: str, targets: Iterable[str]) -> str:
    """Why the fused engine cannot train adapters on these modules, or nothing where it can."""
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
    return ""


def has_fp8_units(hardware: Hardware) -> bool:
    """Whether products can be in FP8; unknown cards are taken to have no such units."""
    return hardware.kind == "cuda" and (hardware.compute_capability or (0, 0)) >= _FP8_UNITS


def attention_kernels(hardware: Hardware) -> dict[str, str]:
    """The fused engine's attention kernels, the fastest first: reason code why one cannot be had, or ""."""

    def missing(cards: bool, package: str) -> str:
        return "unsupported" if not cards else "" if package in hardware.packages else "not-installed"

    capability = hardware.compute_capability or (0, 0)
    return {
        "flash4": missing(capability[0] in _FLASH4, "flash-attn-4"),
        "cudnn_varlen": missing(capability == _CUDNN_ATTENTION, "cudnn"),
        "sdpa": "",
    }


def attention_kernel(hardware: Hardware, engine: str) -> tuple[str, str, str]:
    """(kernel, reason code, reason)."""
    if engine == "reference":
        return "sdpa", "only-choice", "one sample at a time needs no mask"
    missing = attention_kernels(hardware)
    if not missing["flash4"]:
        return "flash4", "fastest", "the fastest backward pass for heads of 256, lengths mixed or equal"
    if not missing["cudnn_varlen"]:
        return "cudnn_varlen", "not-installed", "mixed lengths without a mask; flash-attn-4 would be faster"
    if missing["flash4"] == "not-installed":
        return "sdpa", "not-installed", "install flash-attn-4 for mixed lengths at full speed"
    return "sdpa", "only-choice", "PyTorch's own: the others have no backward pass for heads of 256 here"


@dataclass(frozen=True)
class Series:
    """Combinations that differ in the activation budget alone: the one with the least, and all budgets."""

    first: Choice
    budgets: tuple[float, ...]

    def at(self, budget: float) -> Choice:
        """The combination with this budget."""
        return (
            self.first
            if budget == self.first.activation_budget
            else replace(self.first, activation_budget=budget)
        )

    def with_budget(self, budget: float) -> Series | None:
        """The same with this one budget, where it is among those that it has."""
        return Series(self.at(budget), (budget,)) if budget in self.budgets else None

    def has(self, decision: str, value: str | float) -> bool:
        """Whether any of them decides so."""
        if decision == "activation_budget":
            return value in self.budgets
        return bool(getattr(self.first, decision) == value)


def combinations(
    hardware: Hardware,
    device: str,
    targets: Iterable[str],
    fixed: Mapping[str, str | float],
    kind: str = "lora",
    exact: Iterable[int] = (0,),
    processes: int = 1,
) -> Iterator[Series]:
    """Everything that the engines can do on a machine, guidance apart (``loaded`` throughout).

    ``fixed`` are the recipe's decisions: unusual values are there only if they are asked for. ``kind`` is the
    adapter's, ``exact`` are the numbers of exact blocks beside FP8 products, ``processes`` train together.
    """
    budgets = tuple(sorted({*BUDGETS, *(float(v) for k, v in fixed.items() if k == "activation_budget")}))
    # On a processor, host memory is the device's own.
    open_to = {name: values if device == "cuda" else values[:1] for name, values in _OPEN.items()}
    if not has_fp8_units(hardware):
        open_to["activation_offload"] = open_to["activation_offload"][:2]
    unusual = {name: tuple(dict.fromkeys((*values, str(fixed.get(name, values[0])))))
               for name, values in open_to.items()}  # fmt: skip
    if not no_fused_engine(hardware, device, targets):
        kinds = [(precision, "bf16", 0) for precision in ("bf16", "fp8", "int8", "nf4")]
        if has_fp8_units(hardware):
            kinds += [("fp8", "fp8", count) for count in exact]
        for precision, matmul, count in kinds:
            plain = Choice(device, "fused", precision, matmul, 0.0, "off", "loaded", exact_blocks=count)
            yield from _lean(plain, budgets, unusual, kind, processes)
            if attention_kernel(hardware, "fused")[0] == "flash4":
                recorded = replace(plain, graphs="on")
                here = {name: values[:1] for name, values in unusual.items() if name != "optimizer_state"}
                yield from _lean(recorded, budgets, {**unusual, **here}, kind, processes)
    # torch.compile makes its GPU kernels with Triton too.
    compiled = hardware.kind == "cuda" and device == "cuda" and "triton" in hardware.packages
    for precision, compile in product(
        ("bf16", "fp8", "int8", "nf4", "float32"), ("off", "regional") if compiled else ("off",)
    ):
        if precision == "fp8" and compile == "regional" and not has_fp8_units(hardware):
            continue  # Triton reads e4m3 only where there are such units
        matmul = "float32" if precision == "float32" else "bf16"
        plain = Choice(device, "reference", precision, matmul, 0.0, compile, "loaded")
        # Compiled blocks whose weights are fetched are right, but nobody measured their speed.
        asked = compile == "off" or {"compile", "offload"} <= fixed.keys()
        every = _lean(plain, (0.0, 1.0), unusual, kind, processes)
        yield from (s for s in every if s.first.offload == "none" or asked)


def _lean(
    plain: Choice,
    budgets: tuple[float, ...],
    values: Mapping[str, tuple[str, ...]],
    kind: str,
    processes: int,
) -> Iterator[Series]:
    """A combination, and those that do the same in less memory on the device and more time."""
    for state, offload, inputs in product(*(values[name] for name in _OPEN)):
        choice = replace(plain, optimizer_state=state, offload=offload, activation_offload=inputs)
        # Nothing but "none" and "some" of a budget decides what can be done.
        some = replace(choice, activation_budget=budgets[-1])
        ends = [_possible(c, kind, processes) for c in (choice, some)]
        if ends[0]:
            yield Series(choice, budgets if ends[1] else (0.0,))


def _possible(choice: Choice, kind: str, processes: int) -> bool:
    return not any(_impossible(choice, kind, processes))


def _impossible(choice: Choice, kind: str, processes: int) -> Iterator[tuple[str, str, str]]:
    """(setting, why it cannot be carried out with the others or the kind of adapter, what to do)."""
    if why := _no_offloaded_adapter(choice, kind, processes):
        yield "optimizer_state", f"optimizer_state = 'offload' {why[0]}", f"set optimizer_state = {why[1]}"
    offload, fused = choice.offload, choice.engine == "fused"
    if offload == "shard" and processes == 1:
        yield (
            "offload",
            "offload = 'shard' cuts the weights up among several processes, and this is one alone",
            "start it with torchrun --nproc-per-node N (plan: --processes N), or set offload = 'stream'",
        )
    if fused and offload in GROUPED:
        yield (
            "offload",
            f"offload = '{offload}' hangs on modules that the fused engine never calls",
            "set offload = 'stream', or engine = 'reference'",
        )
    if not fused and offload != "none":
        if choice.activation_budget > 0:
            yield (
                "offload",
                f"without checkpointing, autograd keeps the weights that offload = '{offload}' sends away",
                "set checkpointing = 'on' or 'auto', or offload = 'none'",
            )
        if choice.compiled and offload in GROUPED:
            yield (
                "offload",
                f"offload = '{offload}' hooks into the modules of a block, which breaks up a compiled one",
                "set compile = 'off', or offload = 'stream' or 'none'",
            )
    if choice.graphs == "on":
        waits = [s for s in ("offload", "activation_offload") if getattr(choice, s) != "none"]
        if not fused or waits:
            what = f"{waits[0]} = '{getattr(choice, waits[0])}'" if waits else "the reference engine"
            yield (
                "graphs",
                f"graphs = 'on' records the fused engine's steps as they are on the device, without {what}",
                "set graphs = 'auto' or 'off'",
            )
    if not fused and choice.activation_offload != "none":
        yield (
            "activation_offload",
            "activation_offload is for the fused engine: autograd decides what the reference engine keeps",
            "set activation_offload = 'none', or engine = 'fused'",
        )
    if kind == "dora" and offload != "none":
        yield (
            "offload",
            f"a dora measures rows of the frozen weights at moments when offload = '{offload}' has them away",
            "set offload = 'none', or adapter.kind = 'lora'",
        )
    if kind != "lora" and choice.graphs == "on":
        yield (
            "graphs",
            f"graphs = 'on' records the engine's own launches, and PEFT computes part of a {kind}",
            "set graphs = 'auto' or 'off', or adapter.kind = 'lora'",
        )
    if kind in ("lokr", "loha") and choice.precision == "nf4":
        yield (
            "precision",
            f"PEFT takes the sizes of a {kind} from the weight, and 4-bit weights are packed flat",
            "set precision = 'fp8' or 'int8', or adapter.kind = 'lora'",
        )
    if choice.device == "cpu" and choice.optimizer_state == "paged":
        yield (
            "optimizer_state",
            "paged moments are in memory that an NVIDIA driver moves, and this runs on a processor",
            "set optimizer_state = 'auto', 'float32' or '8bit'",
        )


def _no_offloaded_adapter(choice: Choice, kind: str, processes: int) -> tuple[str, str] | None:
    """Why an adapter cannot be on the host with its gradients, and what to set instead."""
    if choice.optimizer_state != "offload":
        return None
    if choice.engine != "fused":
        return (
            "leaves the adapter on the host, where PEFT cannot compute with it",
            "'cpu', or engine = 'fused'",
        )
    if kind != "lora":
        return f"leaves the adapter on the host, and PEFT computes part of a {kind}", "'auto' or 'cpu'"
    if choice.graphs == "on":
        return "sends gradients away that graphs = 'on' adds to", "'cpu', or graphs = 'off'"
    if processes > 1:
        return f"is for one process, and {processes} add up gradients on their devices", "'auto' or 'cpu'"
    return None


@dataclass(frozen=True)
class Refusal:
    """A setting of [memory] that cannot be carried out: why, and what to do."""

    key: str
    message: str
    cure: str


def refusals(
    tables: RecipeTables,
    hardware: Hardware,
    device: str,
    targets: Iterable[str],
    blocks: int,
    processes: int = 1,
) -> list[Refusal]:
    """Settings that are impossible together, on this machine, in so many processes, or with so many blocks.

    Empty where the recipe can be obeyed.
    """
    m, found = tables.memory, []
    exact = m.exact_blocks not in ("auto", 0)  # some, which is about FP8 products

    def refuse(key: str, message: str, cure: str) -> None:
        found.append(Refusal(key, message, cure))

    fused_only = [k for k in ("matmul", "activation_budget") if getattr(m, k) != "auto"]
    if m.matmul == "bf16" and m.engine != "fused":
        fused_only.remove("matmul")  # the reference engine multiplies in bf16 too
    fused_only += ["exact_blocks"] if exact else []
    if m.engine == "reference":
        for key in fused_only:
            message = f"{key} = {getattr(m, key)!r} is for the fused engine, and engine is 'reference'"
            refuse(key, message, f"remove {key}, or set engine = 'fused'")
    elif m.engine == "fused" or fused_only:
        key = "engine" if m.engine == "fused" else fused_only[0]
        if missing := no_fused_engine(hardware, device, targets):
            others = [k for k in fused_only if k != key]
            remove = f", and remove {' and '.join(others)}" if others else ""
            if key == "engine":
                refuse(key, missing, f"set engine = 'auto'{remove}")
            else:
                refuse(key, f"{key} is for the fused engine, and {missing}", f"remove {key}{remove}")
        if m.precision == "float32":
            refuse("precision", "the fused engine computes in bf16, and precision is 'float32'",
                   "set precision = 'auto', or engine = 'reference'")  # fmt: skip
        if m.compile == "regional":
            refuse("compile", "compile = 'regional' is for the reference engine",
                   "set compile = 'auto', or engine = 'reference'")  # fmt: skip
    if m.matmul == "bf16" and exact:
        refuse("exact_blocks", f"exact_blocks = {m.exact_blocks} is about FP8 products, and matmul is 'bf16'",
               "remove exact_blocks, or set matmul = 'fp8'")  # fmt: skip
    elif m.matmul == "fp8" or exact:
        key, value = ("matmul", "'fp8'") if m.matmul == "fp8" else ("exact_blocks", m.exact_blocks)
        if m.precision not in ("auto", "fp8"):
            refuse(key, f"{key} = {value} needs precision = 'fp8', not '{m.precision}'",
                   "set precision = 'auto' or 'fp8'")  # fmt: skip
        if device == "cuda" and not has_fp8_units(hardware):
            refuse(key, f"{hardware.name} is not known to have FP8 units (compute capability 8.9)",
                   f"leave {key} out; the weights may be in FP8 all the same")  # fmt: skip
    if exact and int(m.exact_blocks) > blocks:
        refuse("exact_blocks", f"exact_blocks = {m.exact_blocks}, and the base has {blocks} blocks",
               f"set exact_blocks = {blocks} or less, or 'auto'")  # fmt: skip
    for key, message, cure in _contradictions(tables, hardware, device, targets, processes):
        refuse(key, message, cure)
    if m.matmul == "bf16" and m.precision == "float32":
        refuse("matmul", "weights in float32 are multiplied in float32", "set matmul = 'auto'")
    if m.activation_budget != "auto" and m.checkpointing != "auto":
        refuse("checkpointing", "activation_budget says the same more finely",
               "set one of the two")  # fmt: skip
    if m.compile == "regional" and not any(
        s.first.compiled for s in combinations(hardware, device, targets, {})
    ):
        refuse("compile", f"torch.compile is for NVIDIA GPUs with Triton, not for {hardware.name}",
               "set compile = 'auto' or 'off'")  # fmt: skip
    return found or list(_never_together(tables, hardware, device, tuple(targets), blocks, processes))


def _never_together(
    tables: RecipeTables,
    hardware: Hardware,
    device: str,
    targets: tuple[str, ...],
    blocks: int,
    processes: int,
) -> Iterator[Refusal]:
    """The settings of which no combination has all, where nothing above says it better: the fewest."""
    fixed, kind = fixed_decisions(tables), tables.adapter.kind
    exact = exact_block_counts(blocks, fixed)
    every = list(combinations(hardware, device, targets, fixed, kind, exact, processes))

    def possible(names: Iterable[str], among: Iterable[Series] = every) -> bool:
        wanted = [(name, fixed[name]) for name in names]
        return any(all(series.has(name, value) for name, value in wanted) for series in among)

    if possible(fixed):
        return
    fewest = list(fixed)
    for name in fixed:
        if not possible(others := [n for n in fewest if n != name]):
            fewest = others
    m = tables.memory
    keys = [
        "checkpointing" if name == "activation_budget" and m.checkpointing != "auto" else name
        for name in fewest
    ]
    asked = [f"{key} = {getattr(m, key)!r}" for key in keys]
    where = f" on {hardware.name}"
    if kind != "lora":
        plain = combinations(hardware, device, targets, fixed, "lora", exact, processes)
        where += f" with adapter.kind = '{kind}'" if possible(fewest, plain) else ""
    together = f"{', '.join(asked[:-1])} and {asked[-1]}" if len(asked) > 1 else asked[0]
    message = f"{together} cannot be carried out{' together' if len(asked) > 1 else ''}{where}"
    cure = f"remove {keys[0]}" if len(keys) == 1 else f"remove one of {', '.join(keys)}"
    yield Refusal(keys[-1], message, cure)


def _contradictions(
    tables: RecipeTables, hardware: Hardware, device: str, targets: Iterable[str], processes: int
) -> Iterator[tuple[str, str, str]]:
    """Settings about what waits on the host that cannot be carried out together, or mean nothing."""
    m, fixed = tables.memory, fixed_decisions(tables)
    engine, instead = m.engine, {}
    if engine == "auto":
        away = {k: plain for k, (values, plain) in _FUSED_ONLY.items() if getattr(m, k) in values}
        # Only the reference engine has these, and only the fused one has those.
        grouped = m.offload in GROUPED or m.compile == "regional"
        engine = "fused" if away or m.graphs == "on" or not grouped else "reference"
        if missing := no_fused_engine(hardware, device, targets):
            engine, instead = "reference", away
            for key, plain in away.items():
                what = f"{key} = '{getattr(m, key)}' is for the fused engine, and {missing}"
                yield key, what, f"set {key} = 'auto' or '{plain}'"
    budget = float(fixed.get("activation_budget", 0.0))
    text = {name: str(fixed.get(name, DOMAINS[name][0])) for name in (*_OPEN, "graphs")}
    compile = str(fixed.get("compile", "off"))
    precision = str(fixed.get("precision", "bf16"))
    choice = Choice(device, engine, precision, "bf16", budget, compile, "proxy", **text)  # type: ignore[arg-type]
    choice = replace(choice, **instead)  # type: ignore[arg-type]  # what is said already
    yield from _impossible(choice, tables.adapter.kind, processes)
    if (
        m.activation_offload in ROUNDING
        and engine == "fused"
        and device == "cuda"
        and not has_fp8_units(hardware)
    ):
        yield (
            "activation_offload",
            f"activation_offload = '{m.activation_offload}' rounds to e4m3, which {hardware.name} has not",
            "set activation_offload = 'inputs'",
        )
    if m.graphs == "on" and engine == "fused" and attention_kernel(hardware, "fused")[0] != "flash4":
        yield (
            "graphs",
            "graphs = 'on' needs attention that takes lengths as data, from flash-attn-4",
            "set graphs = 'auto' or 'off'",
        )
    if m.quantize_via == "gpu" and device == "cpu":
        yield "quantize_via", "quantize_via = 'gpu', and there is none", "set quantize_via = 'auto' or 'cpu'"
    elif m.quantize_via != "auto" and m.precision in ("bf16", "float32"):
        yield (
            "quantize_via",
            f"quantize_via is about weights that are rounded, and precision = '{m.precision}' rounds none",
            "remove quantize_via, or set precision = 'fp8', 'int8' or 'nf4'",
        )
    grouping = {
        "offload_blocks": (m.offload_blocks != 1, ("block", "disk")),
        "offload_streams": (not m.offload_streams, GROUPED),
        "offload_folder": (m.offload_folder is not None, ("disk",)),
    }
    for key, (set_here, kinds) in grouping.items():
        if set_here and m.offload not in kinds:
            wanted = " or ".join(f"'{kind}'" for kind in kinds)
            yield key, f"{key} means something only with offload = {wanted}", f"remove {key}, or set offload"
