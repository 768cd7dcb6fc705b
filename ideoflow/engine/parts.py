"""Where a step's time goes, by part of the model: read from a trace of torch's profiler.

On a GPU the kernels are counted, on a CPU the operators' own time (without that of the operators they call).
Each belongs to the innermost range of :mod:`ideoflow.engine.profile` around its launch; where there is none
(in a CUDA graph, or in the reference engine), the operator that launched it and then its own name decide, by
the one table below.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STEP = "ideoflow step"  # the range of one whole step
RANGE = "ideoflow: "  # what the ranges of parts begin with

ATTENTION = "attention, forward"
ATTENTION_BACKWARD = "attention, backward"
FROZEN = "products with frozen weights"
ADAPTER = "products of the adapter"
POINTWISE = "norms, rotary, SwiGLU, quantising"
WEIGHTS = "transposing and dequantising weights"
OPTIMISER = "optimiser and clipping"
COPIES = "copies from and to the host"
OTHER = "everything else"
IDLE = "idle"
PARTS = (
    ATTENTION, ATTENTION_BACKWARD, FROZEN, ADAPTER, POINTWISE, WEIGHTS, OPTIMISER, COPIES, OTHER, IDLE
)  # fmt: skip

# The first pattern that is found in a name decides. Seen on an H200 with torch 2.11 (cuBLAS: nvjet; cuDNN;
# FlashAttention-4: cutlass; Inductor: triton_*_fused; our own Triton kernels by the names of their functions)
# and, for operators, on a CPU with torch 2.13.
_NAMES = [
    (part, re.compile(pattern))
    for part, pattern in (
        (ATTENTION_BACKWARD, r"sdpa\w*bprop|compute_dot_do_o|convert_dq_to_16bits|attention\w*backward"),
        (ATTENTION_BACKWARD, r"flash\w*_bwd|fmha_cutlassB"),
        (ATTENTION, r"sdpa\w*fprop|flash\w*_fwd|fmha_cutlassF|scaled_dot_product|_flash_attention"),
        (OPTIMISER, r"Optimizer\.step|FusedOptimizer|multi_tensor_apply|aten::_(fused_adam|foreach)"),
        (ADAPTER, r"^_(up|down|gradient|split_precision)\b"),
        (WEIGHTS, r"^_(transpose|dequantize)"),
        (POINTWISE, r"^_(qk_norm_rope|swiglu|norm_modulate|gated_residual|quantize)"),
        (POINTWISE, r"^triton_\w*fused|Torch-Compiled Region|CompiledFunction"),
        (POINTWISE, r"aten::(mul|silu|sigmoid|rsqrt|pow|mean|neg|cat|tanh|rms_norm|_fused_rms_norm)"),
        (FROZEN, r"nvjet|gemm|cutlass|aten::(mm|addmm|bmm|_scaled_mm|matmul|linear)|mkldnn"),
        (COPIES, r"pin_memory"),
    )
]
_PRODUCT = re.compile(r"aten::(mm|addmm|bmm|matmul|linear)\b")
_COMPILED = ("Torch-Compiled Region", "CompiledFunction")  # with torch.compile's own kernels inside
_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_SHOWN = 8  # the longest kernels or operators of a part that are listed


@dataclass
class Part:
    """The time of one part in all steps of a trace: microseconds, launches, and time by name."""

    microseconds: float = 0.0
    calls: int = 0
    names: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, microseconds: float) -> None:
        self.microseconds += microseconds
        self.calls += 1
        self.names[name] += microseconds


@dataclass
class _Event:
    name: str
    start: float
    end: float
    thread: Any
    shapes: Sequence[Any]
    correlation: Any
    outer: _Event | None = None
    inner: float = 0.0  # time of the operators that it calls

    def outwards(self) -> Iterator[_Event]:
        event: _Event | None = self
        while event:
            yield event
            event = event.outer


def part_of(name: str, launch: Iterable[tuple[str, Sequence[Any]]] = (), ranks: Collection[int] = ()) -> str:
    """The part that a kernel or operator belongs to.

    Args:
        name: of the kernel, or of the operator itself.
        launch: (name, shapes of its inputs) of every operator and range around it, innermost first.
        ranks: the adapter's ranks; a product with such a side, outside all ranges, is the adapter's.
    """
    if name.startswith(("Memcpy HtoD", "Memcpy DtoH")):
        return COPIES
    around = list(launch)
    for outer, _ in around:
        if outer.startswith(RANGE):
            return outer.removeprefix(RANGE)
    # A kernel's own name tells more than its operator's, except where kernels serve every purpose.
    candidates = [name, *(outer for outer, _ in around)]
    for candidate in candidates:
        found = next((part for part, pattern in _NAMES if pattern.search(candidate)), None)
        if found == FROZEN and any(_thin(outer, shapes, ranks) for outer, shapes in around):
            return ADAPTER
        if found:
            return _within_optimiser(found, candidates)
    return OTHER


def _within_optimiser(found: str, names: Sequence[str]) -> str:
    """Elementwise work inside the optimiser's step is the optimiser's."""
    inside = found == POINTWISE and any("Optimizer.step" in name for name in names)
    return OPTIMISER if inside else found


def _thin(name: str, shapes: Sequence[Any], ranks: Collection[int]) -> bool:
    return bool(_PRODUCT.search(name)) and any(
        isinstance(side, int) and side in ranks
        for shape in shapes
        if isinstance(shape, list)
        for side in shape
    )


def account(trace: Mapping[str, Any], ranks: Collection[int] = ()) -> dict[str, Any]:
    """A step's time by part, mean of the steps in a trace (Chrome's format, as torch's profiler exports it).

    Returns:
        ``steps``, how many; ``wall_ms``, from the start to the end of a step; ``counted``, "kernels" or
        "operators"; and ``parts``, each with its name, ``ms``, ``share`` of the wall time, ``calls`` and the
        ``longest`` kernels or operators. The last part is idle time: on a GPU when no kernel ran, on a CPU
        when no operator did. ``overlap_ms`` is time in which two kernels ran at once, counted twice.

    Raises:
        ValueError: if the trace holds no step.
    """
    events = [e for e in trace.get("traceEvents", ()) if e.get("ph") == "X"]
    windows = sorted((e["ts"], e["ts"] + e["dur"]) for e in events
                     if e.get("cat") == "user_annotation" and e["name"] == STEP)  # fmt: skip
    if not windows:
        raise ValueError("the trace holds no step")
    host = _nested([_event(e) for e in events if e.get("cat") in _HOST])
    kernels = [_event(e) for e in events if e.get("cat") in _DEVICE]
    parts = {name: Part() for name in PARTS}
    busy = _kernels(kernels, host, windows, parts, ranks) if kernels else None
    if busy is None:
        busy = _operators(host, windows, parts, ranks)
    steps, wall = len(windows), sum(end - start for start, end in windows)
    summed = sum(part.microseconds for part in parts.values())
    parts[IDLE].microseconds = max(wall - busy, 0.0)

    def ms(microseconds: float) -> float:
        return round(microseconds / steps / 1e3, 4)

    return {
        "steps": steps,
        "wall_ms": ms(wall),
        "counted": "kernels" if kernels else "operators",
        "overlap_ms": ms(max(summed - busy, 0.0)),
        "parts": [
            {
                "part": name,
                "ms": ms(part.microseconds),
                "share": round(part.microseconds / wall, 4),
                "calls": round(part.calls / steps, 1),
                "longest": [
                    {"name": kernel, "ms": ms(time)}
                    for kernel, time in sorted(part.names.items(), key=lambda item: -item[1])[:_SHOWN]
                ],
            }
            for name, part in parts.items()
        ],
    }


def _event(e: Mapping[str, Any]) -> _Event:
    args = e.get("args", {})
    return _Event(e["name"], e["ts"], e["ts"] + e.get("dur", 0), (e.get("pid"), e.get("tid")),
                  args.get("Input Dims", ()), args.get("correlation"))  # fmt: skip


def _nested(events: list[_Event]) -> list[_Event]:
    """Sets each event's ``outer`` and the time of its inner operators; sorted by start."""
    events.sort(key=lambda e: (e.start, -e.end))
    open_by_thread: dict[Any, list[_Event]] = defaultdict(list)
    for event in events:
        stack = open_by_thread[event.thread]
        while stack and stack[-1].end <= event.start:
            stack.pop()
        if stack:
            event.outer = stack[-1]
            stack[-1].inner += event.end - event.start
        stack.append(event)
    return events


def _around(event: _Event | None) -> list[tuple[str, Sequence[Any]]]:
    return [(e.name, e.shapes) for e in event.outwards()] if event else []


def _kernels(
    kernels: list[_Event],
    host: list[_Event],
    windows: list[tuple[float, float]],
    parts: Mapping[str, Part],
    ranks: Collection[int],
) -> float:
    """Adds up the kernels that the steps launched; returns how long at least one of them ran."""
    launches = {e.correlation: e for e in host if e.correlation is not None}
    counted = []
    for kernel in kernels:
        launch = launches.get(kernel.correlation)
        if _inside(launch.start if launch else kernel.start, windows):
            around = _around(launch.outer if launch else None)
            parts[part_of(kernel.name, around, ranks)].add(kernel.name, kernel.end - kernel.start)
            counted.append((kernel.start, kernel.end))
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(counted):
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy


def _operators(
    host: list[_Event], windows: list[tuple[float, float]], parts: Mapping[str, Part], ranks: Collection[int]
) -> float:
    """Adds up the operators' own time in the steps; returns their sum."""
    total = 0.0
    for event in host:
        if event.name == STEP or not _inside(event.start, windows):
            continue
        own = event.end - event.start - event.inner
        if not _works(event.name):
            continue
        around = _around(event)
        parts[part_of(event.name, around, ranks)].add(event.name, own)
        total += own
    return total


def _works(name: str) -> bool:
    """Whether an event's own time is an operator's, not Python's in a range or an autograd function."""
    return name.startswith(_COMPILED) or ("::" in name and not name.startswith(("autograd::", "Optimizer.")))


def _inside(time: float, windows: list[tuple[float, float]]) -> bool:
    at = bisect_right(windows, (time, float("inf"))) - 1
    return at >= 0 and time <= windows[at][1]
