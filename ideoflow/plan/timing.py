"""How long a step takes: the work of each kind over the rate at which a card does that kind (a roofline).

The kinds are kept apart because cards differ in each: matrix products with the frozen weights, the adapter's
own, attention, pointwise work (which is bound by memory bandwidth), launching kernels, the optimiser, and
transfers from the host. Rates are a data sheet's peaks times the share of them that was measured
(:mod:`ideoflow.plan.calibration`). Work, for T tokens of one sample and one forward pass:

* frozen Linears: 2 T x parameters; the backward pass computes input gradients only, so as much again;
* attention: 4 T^2 h a block, backward 2.5 times that (Dao 2023, FlashAttention-2, section 4.1);
* adapter: 2 T x its parameters, backward twice that; the fused engine's thin products also wait for the rows
  that they read, whatever the rank;
* pointwise: bytes read and written, counted from the modules' own code; backward twice that.

Checkpointing adds one forward pass of every block that is adapted or lies behind one that is; the fused
engine adds the forward work of what its activation budget does not keep (:mod:`ideoflow.plan.fused`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ideoflow.kernels.budget import AWAY, ROUNDING
from ideoflow.model.spec import TransformerSpec
from ideoflow.plan import fused
from ideoflow.plan.adapters import AdapterSize
from ideoflow.plan.calibration import Shares
from ideoflow.plan.choices import attention_kernel
from ideoflow.plan.document import Hardware, Rates, TimePart
from ideoflow.plan.sizes import (
    ADAPTER_BYTES,
    QUANTISED,
    SLOTS,
    STREAMED,
    Choice,
    adapter_parameters,
    block_weights,
    fetched_share,
    host_arrays,
    linear_parameters,
    pointwise_bytes,
    streamed_bytes,
    targets_by_block,
)

# Only to rank alternatives where a device's speed is unknown: a middling card, a middling processor.
_UNKNOWN = {"cuda": Rates(70, 35, 900, 20, 140), "cpu": Rates(0.4, 0.4, 40, 40)}
# Milliseconds a block in which the fused engine's kernels of both passes follow one another: an H200 took 12
# for 34 blocks, whatever the number of tokens.
_BLOCK_GAPS_MS = 0.35
# What a host launches more, as shares of a block's usual launches (fitted to launching.json and to rows of
# plan-accuracy.json that are not held out). The fused engine: to compute all of a block again; to make
# weights dense, or to round operands to FP8, in each pass. bitsandbytes' kernels are called one by one.
_AGAIN = 0.17
_DENSE, _ROUNDED = {"nf4": 0.26, "fp8": 0.07, "int8": 0.07}, 0.05
# For values that go to the host and come back, some of them rounded: 4, 12 and 16 launches beside some 85.
_AWAY = {"none": 0.0, "inputs": 0.13, "outputs": 0.21, "gate_up": 0.20}
# The reference engine: to dequantise in each pass, but compiled what is not called; and what checkpointing
# takes beside the pass that it repeats: torch saves and restores the state of random numbers at every block.
_DEQUANTISING, _CHECKPOINTING = {"nf4": 0.42, "fp8": 0.28, "int8": 0.28}, 0.325
# Neither host nor device takes equally long in all parts of a step and in every step: where both take about
# as long, the step takes longer than either, as a norm of this order of the two does.
_ALIKE = 10
# Where weights are offloaded in groups, host and device wait for each other at every group's turn: shares of
# a block's launches, for a group of blocks, and for all Linears of a block. Of memory.json's plain rows.
_TURNS = {"block": 0.085, "disk": 0.085, "leaf": 0.035}
# Bytes moved to make a number of a stored weight dense by one kernel.
_DENSE_BYTES = {"fp8": 3, "int8": 3, "nf4": 2.5}
# bitsandbytes' 8-bit AdamW waits for every tensor: with the shipped launching, 28 ms for 476 of them.
_8BIT_TENSOR_MS = 0.058
# Moments on the host come in by buckets while others go out: an H200 waited 26 ms for 95 M, 64 for 380 M.
_BUCKETS_MS = 10.0
# Of the rate of a copy alone, what fetching reaches beside a step: one of launching.json's that streams takes
# 573 ms by that rate, and took 575 and 614 on two machines.
_LINK = 0.965
# Bytes a second from a disk: a usual NVMe drive's, well below its data sheet's.
DISK = 2e9


@dataclass(frozen=True)
class Load:
    """What one optimiser step works on.

    ``lengths`` are (image tokens, text tokens, share of the samples) for each size of picture; ``samples``
    are those of one step, batch times accumulation. ``together`` samples share one pass, ``masked`` says that
    attention gets a mask, and ``adapter`` is the size of the adapter's numbers: the reference engine runs one
    sample a pass, unmasked, with a float32 adapter. ``passes`` are those of the fused engine, which packs all
    samples of a pass.
    """

    lengths: tuple[tuple[int, int, float], ...]
    samples: int
    together: int = 1
    masked: bool = False
    adapter: int = ADAPTER_BYTES
    passes: int = 1

    @property
    def tokens(self) -> float:
        """Tokens of a sample, on average."""
        return sum((image + text) * share for image, text, share in self.lengths)

    @property
    def squares(self) -> float:
        """Their squares, on average: what attention works on."""
        return sum((image + text) ** 2 * share for image, text, share in self.lengths)

    def sent(self, spec: TransformerSpec, element: int) -> float:
        """Bytes of a sample from the host: noisy latents and target in float32, text features."""
        latents, features = 8 * spec.in_channels, element * spec.hidden
        return sum((image * latents + text * features) * share for image, text, share in self.lengths)


@dataclass(frozen=True)
class Speed:
    """Rates that are really reached: work per second by kind, in FLOP/s and bytes/s.

    ``matmul_bf16`` is the rate of the fused engine's exact blocks, beside FP8 products.
    """

    matmul: float
    adapter: float
    adapter_rows: float
    attention_forward: float
    attention_backward: float
    pointwise: float
    memory: float
    host: float
    block_seconds: float
    launching: float  # times the usual
    matmul_bf16: float = math.inf

    @classmethod
    def of(cls, hardware: Hardware, choice: Choice, shares: Shares, load: Load, host: float = 1.0) -> Speed:
        """A device's peaks times the measured shares of them, and ``host`` times the usual launching."""
        kind = "cuda" if choice.device == "cuda" else "cpu"
        rates = hardware.rates if hardware.rates and hardware.kind != "cpu" else None
        rates = rates or _UNKNOWN[kind]
        share: Mapping[str, float] = shares.efficiency
        if choice.engine == "fused":
            return cls._of_fused(hardware, rates, choice, shares, host)
        peak = rates.fp32_tflops if choice.precision == "float32" else rates.bf16_tflops
        if choice.precision == "bf16" and not hardware.fast_bf16:
            peak = 0.4 * rates.fp32_tflops  # converted to float32 and back around every product
        same = load.adapter == choice.element
        adapter = peak if same else rates.fp32_tflops
        adapter *= share["adapter_bf16" if same and choice.element == 2 else "adapter_float32"]
        mode = "compiled" if choice.compiled else "eager"
        # Without a mask, PyTorch's own attention goes through cuDNN from Hopper on.
        cudnn = (hardware.compute_capability or (0, 0)) >= (9, 0)
        kernel = "masked_" if load.masked else "cudnn_" if cudnn else ""
        return cls(
            1e12 * peak * share["matmul"],
            1e12 * adapter,
            math.inf,
            1e12 * peak * share[f"{kernel}attention_forward"],
            1e12 * peak * share[f"{kernel}attention_backward"],
            1e9 * rates.memory_gbps * share[f"elementwise_{mode}"],
            1e9 * rates.memory_gbps * share["elementwise_compiled"],
            1e9 * rates.host_gbps * _LINK,
            1e-3 * shares.block_ms[mode] * host,
            host,
        )

    @classmethod
    def _of_fused(
        cls, hardware: Hardware, rates: Rates, choice: Choice, shares: Shares, host: float
    ) -> Speed:
        share, bf16 = shares.efficiency, 1e12 * rates.bf16_tflops
        fp8 = 1e12 * (rates.fp8_tflops or rates.bf16_tflops)
        kernel = kind = attention_kernel(hardware, "fused")[0]
        if kernel != "flash4":  # PyTorch's own attention goes through cuDNN from Hopper on
            kind = "cudnn" if (hardware.compute_capability or (0, 0)) >= (9, 0) else "sdpa"
        return cls(
            fp8 * share["matmul_fp8"] if choice.matmul == "fp8" else bf16 * share["matmul_bf16"],
            bf16 * share["adapter"],
            1e9 * rates.memory_gbps * share["adapter_rows"],
            bf16 * share[f"{kind}_attention_forward"],
            bf16 * share[f"{kind}_attention_backward"],
            1e9 * rates.memory_gbps * share["elementwise"],
            1e9 * rates.memory_gbps * share["weights"],
            1e9 * rates.host_gbps * _LINK,
            1e-3 * shares.block_ms[kernel] * host,
            host,
            bf16 * share["matmul_bf16"],
        )


def step_parts(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    load: Load,
    choice: Choice,
    speed: Speed,
    adapter: AdapterSize | None = None,
    group: tuple[int, bool] = (1, True),
    processes: int = 1,
) -> tuple[TimePart, ...]:
    """Milliseconds of one optimiser step by kind of work; ``adapter`` is by default a LoRA of this rank.

    ``group`` and ``processes`` are as in the ledger.
    """
    size = adapter or AdapterSize("lora", adapter_parameters(spec, targets, rank))
    engine = _fused_parts if choice.engine == "fused" else _reference_parts
    parts = engine(spec, targets, rank, size, load, choice, speed)
    if not choice.lean:
        return parts
    numbers = size.parameters
    waiting = _waiting_parts(spec, targets, numbers, load, choice, speed, group, processes, parts)
    return (*parts, *waiting)


def _waiting_parts(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    numbers: int,
    load: Load,
    choice: Choice,
    speed: Speed,
    group: tuple[int, bool],
    processes: int,
    parts: tuple[TimePart, ...],
) -> Iterator[TimePart]:
    """What computing waits for: weights, inputs and moments on their way from the host and back.

    Both passes overlap with their transfers, so only what is longer than they are counts. What comes from
    other GPUs is taken to come at the rate of the link to the host: nothing is known of one between them.
    """
    e = choice.element
    # The reference engine passes over the weights for each sample by itself.
    passes = load.passes if choice.engine == "fused" else load.samples
    # Forward, twice that backward, and what is computed again: all of a forward pass, or with the larger
    # values on the host about half of one.
    again = {"on": 1.0, "off": 0.0}[choice.checkpointing]
    again *= 0.5 if choice.activation_offload in ROUNDING else 1.0
    forward = sum(part.ms for part in parts) / passes / (3e3 + 1e3 * again)
    # One Linear is fetched ahead of the one at work, so while gradients are computed none is.
    backward = forward * (again if choice.offload == "leaf" else 2 + again)
    away = streamed_bytes(spec, choice.precision)
    fetched = fetched_share(choice, processes) * away
    if choice.offload in STREAMED:  # but for what is in the slots at each turn
        fetched *= 1 - SLOTS / spec.num_layers
    link = speed.host if choice.offload != "disk" else min(speed.host, DISK)
    weights = fetched / link
    if choice.offload in ("block", "leaf", "disk") and not group[1]:
        # Nothing overlaps, and without a stream diffusers copies the weights back as well.
        copies = 1 if choice.offload == "disk" else 2
        yield TimePart("fetching", round(2e3 * copies * passes * weights, 3), "weights, one after the other")
    else:
        inputs = 0.0
        if choice.activation_offload != "none":
            waits = fused.away_bytes(spec, e, choice.activation_offload)
            inputs = load.tokens * load.samples / passes * waits * spec.num_layers / speed.host
        # Gradients go the other way: out in every pass, and in again for every pass that adds to them.
        out = 4 * numbers * (2 - 1 / passes) / speed.host if choice.optimizer_state == "offload" else 0.0
        wait = max(0.0, max(weights, inputs) - forward) + max(0.0, max(weights + inputs, out) - backward)
        moved = 2 * (fetched + inputs * speed.host) + out * speed.host
        if wait:
            yield TimePart(
                "fetching", round(1e3 * passes * wait, 3), f"{moved / 1e9:.0f} GB a pass, not hidden"
            )
        if choice.offload in _TURNS:
            turns = 2 * passes * spec.num_layers / (1 if choice.offload == "leaf" else group[0])
            ms = 1e3 * turns * _TURNS[choice.offload] * speed.block_seconds
            yield TimePart("turns", round(ms, 3), "from group to group, at which host and device meet")
    if arrays := host_arrays(choice):
        # Of those that come in, all but the gradients go out again, and meanwhile.
        one_way = 4 * arrays * numbers / speed.host
        seconds = 4 * one_way if choice.optimizer_state == "paged" else one_way + 1e-3 * _BUCKETS_MS
        yield TimePart("moments", round(1e3 * seconds, 3), f"{4 * arrays * numbers / 1e9:.1f} GB in and out")
    if choice.optimizer_state == "8bit":
        tensors = 2 * len(targets)
        ms = _8BIT_TENSOR_MS * speed.launching * tensors
        yield TimePart("moments", round(ms, 3), f"{tensors} tensors, one by one")


def _reference_parts(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    size: AdapterSize,
    load: Load,
    choice: Choice,
    speed: Speed,
) -> tuple[TimePart, ...]:
    """Plain diffusers and PEFT, a sample at a time."""
    blocks, e = targets_by_block(targets), choice.element
    # Blocks in front of the first adapted one run forward only.
    live = 1 - min(blocks, default=spec.num_layers) / spec.num_layers
    again = live if choice.checkpointing == "on" else 0.0
    forwards, backwards = 1 + again, live
    moved = sum(
        pointwise_bytes(spec, blocks.get(i, frozenset()), e, compiled=choice.compiled, adapter=load.adapter)
        for i in range(spec.num_layers)
    )
    tokens, squares = load.tokens, load.squares
    sent = load.sent(spec, e)

    dense = 2 * tokens * linear_parameters(spec)
    attention = 4 * squares * spec.hidden * spec.num_layers
    own = 2 * tokens * size.multiplied
    # Dense matrices of float32 are written and read about six times a pass, and again going backward.
    built = 4 * 6 * size.built * (1 + (again > 0) + 1)
    seconds = {
        "matmul": dense * (forwards + backwards) / speed.matmul,
        "adapter": own * (1 + (again > 0) + 2) / speed.adapter + built / speed.memory,
        "attention": attention * forwards / speed.attention_forward
        + 2.5 * attention * backwards / speed.attention_backward,
        "pointwise": tokens * moved * (forwards + 2 * backwards) / speed.pointwise,
        "transfer": sent / speed.host,
    }
    if choice.precision in QUANTISED:  # each weight for each product
        moved_of_weights = block_weights(spec) * _DENSE_BYTES[choice.precision]
        seconds["dequantise"] = moved_of_weights * (forwards + backwards) / speed.pointwise
    # The host launches kernel after kernel while the device works: it is waited for where that takes longer.
    called = not choice.compiled or choice.precision == "nf4"
    launches = (1 + backwards + again) / 3 * (1 + _DEQUANTISING.get(choice.precision, 0.0) * called)
    launches += _CHECKPOINTING * again
    if choice.offload == "leaf":  # the same fetches as a block's at its turn, but while the device works
        launches += 2 * _TURNS["block"]
    launching = speed.block_seconds * spec.num_layers * launches
    launching /= load.together
    seconds["launch"] = _waited(launching, sum(seconds.values()))
    evidence = {
        "matmul": f"{dense * (forwards + backwards) / 1e12:.0f} TFLOP a sample",
        "adapter": f"{size.multiplied / 1e6:.0f} M numbers, {'float32' if load.adapter == 4 else 'bf16'}",
        "attention": f"{attention * (forwards + 2.5 * backwards) / 1e12:.0f} TFLOP a sample",
        "pointwise": f"{tokens * moved * (forwards + 2 * backwards) / 1e9:.0f} GB moved a sample",
        "launch": f"{1e3 * launching:.0f} ms of the host a sample, of which the device waits for the rest",
        "transfer": f"{sent / 1e6:.0f} MB a sample",
        "dequantise": "every weight for every product",
    }
    parts = [
        TimePart(name, round(1e3 * load.samples * value, 3), evidence[name])
        for name, value in seconds.items()
        if value
    ]
    return (*parts, _optimizer_part(size.parameters, speed))


def _foreign_seconds(
    size: AdapterSize, tokens: float, share_again: float, fp8: bool, speed: Speed, load: Load
) -> float:
    """A sample's share of adapters that PEFT computes over the fused frozen products.

    A LoKr or LoHa is a product with a dense update, forward once more than a frozen weight (nothing is kept)
    and backward for both factors; a DoRA has thin products in float32, and the frozen one once more. Dense
    matrices of float32 are written and read about six times each time that they are made.
    """
    rate = speed.matmul / 2 if fp8 else speed.matmul  # of bf16
    passes = 2 + share_again
    built = 4 * 6 * size.built * (passes + 1) / speed.memory * load.passes / load.samples
    if size.kind == "dora":
        thin = 2 * tokens * size.parameters * (passes + 2) / (speed.adapter / 3)
        return thin + 2 * tokens * size.weights / rate + built
    return 2 * tokens * size.multiplied * (passes + 2) / rate + built


def _waited(host: float, device: float) -> float:
    """Seconds that a step takes longer than the device's work, because of the host's launching."""
    more = (host**_ALIKE + device**_ALIKE) ** (1 / _ALIKE) - device
    return more if more > 0.01 * device else 0.0


def waits_for_host(parts: tuple[TimePart, ...]) -> bool:
    """Whether launching a step's kernels takes the host longer than the device needs for them."""
    waited = sum(part.ms for part in parts if part.name == "launch")
    return waited > (2 ** (1 / _ALIKE) - 1) * (sum(part.ms for part in parts) - waited)


def _optimizer_part(adapter: int, speed: Speed) -> TimePart:
    """AdamW reads the weight, its gradient and two moments, and writes three of them; clipping reads once."""
    return TimePart("optimizer", round(1e3 * adapter * 4 * 9 / speed.memory, 3), "once a step")


def _fused_parts(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    size: AdapterSize,
    load: Load,
    choice: Choice,
    speed: Speed,
) -> tuple[TimePart, ...]:
    """The fused engine's step: all samples of a pass at once, and only what was not kept computed again."""
    h, f, layers = spec.hidden, spec.intermediate_size, spec.num_layers
    e, fp8 = choice.element, choice.matmul == "fp8"
    o = 1 if fp8 else e
    blocks = targets_by_block(targets)
    first = min(blocks, default=layers)
    live = 1 - first / layers
    tokens, squares = load.tokens, load.squares
    away = choice.activation_offload
    groups_of = fused.kept_groups(
        spec,
        int(tokens),
        choice.activation_budget,
        e,
        fp8=fp8,
        offload=away,
        exact_blocks=choice.exact_blocks,
    )
    kept = [g | frozenset(AWAY[away]) for g in groups_of[first:]]
    alike = Counter(kept)

    def again(group: str) -> float:
        """Share of all blocks that compute a group a second time."""
        return sum(count for groups, count in alike.items() if group not in groups) / layers

    sizes = fused.products(spec, frozenset(), rank, fp8)
    widths = {name: p.inputs * p.outputs for name, p in sizes.items()}
    groups = {"qkv": "qkv", "o": "attention_output", "ffn": "gate_up", "w2": "ffn_output"}
    recomputed = sum(widths[name] * again(group) for name, group in groups.items())
    dense = 2 * tokens * layers * (sum(widths.values()) * (1 + live) + recomputed)
    share_again = recomputed / sum(widths.values())
    # Of the first blocks forward products may be exact: numbers of their weights, each time that one is read.
    exact = sum(
        width * (1 + (i >= first and groups[name] not in kept[i - first]))
        for i in range(choice.exact_blocks)
        for name, width in widths.items()
    )
    forward = 4 * squares * h * layers * (1 + again("attention"))
    backward = 10 * squares * h * layers * live
    adapter = size.parameters
    if size.kind == "lora":
        thin = [p for n in blocks.values() for p in fused.products(spec, n, rank, fp8).values() if p.rank]
        rows_read = sum((2 + 0.5 * share_again) * p.inputs + 2 * p.outputs for p in thin)
        own = 2 * tokens * adapter * (3 + 0.5 * share_again) / speed.adapter
        own += tokens * rows_read / speed.adapter_rows
    else:
        own = _foreign_seconds(size, tokens, share_again, fp8, speed, load)
    # Reads and writes: norms, attention's operand, rotary, gated residuals, SwiGLU; adapters add to results.
    ends = 2 * e * (5 * h + 2 * f) if adapter else 0
    there = 2 * (e + o) * h + (e + o) * h + 4 * e * h + 6 * e * h + (2 * e + o) * f + ends
    back = 2 * (2 * e + o) * h + (3 * e + 2 * o) * f + 8 * e * h + (5 * e + 3 * o) * h
    back += o * (8 * h + 3 * f) + 2 * e * (3 * h + f) if adapter else 0
    elementwise = again("elementwise") * (there - ends) + share_again * ends
    moved = tokens * layers * (there + back * live + elementwise)
    if away in ROUNDING:  # once to e4m3 and once back
        widths_of = {"ffn_output": h, "attention_output": h, "gate_up": 2 * f}
        moved += 2 * (e + 1) * tokens * layers * sum(w * (live - again(g)) for g, w in widths_of.items())
    # An exact block writes wider operands and does not quantise attention's result.
    moved += tokens * choice.exact_blocks * ((e - o) * (2 * h + f) - (e + o) * h)
    # In every pass each weight is transposed for the backward product, or dequantised for every product.
    weights = 0.0
    if choice.precision in QUANTISED:
        moved_once = _DENSE_BYTES[choice.precision]
        weights = block_weights(spec) * (2 * live if fp8 else moved_once * (1 + live + share_again))
        weights += moved_once * exact
    sent = load.sent(spec, e)
    rows = (
        (
            "matmul",
            load.samples
            * ((dense - 2 * tokens * exact) / speed.matmul + 2 * tokens * exact / speed.matmul_bf16),
            f"{dense / 1e12:.0f} TFLOP a sample",
        ),
        ("adapter", load.samples * own, f"{adapter / 1e6:.0f} M numbers"),
        (
            "attention",
            load.samples * (forward / speed.attention_forward + backward / speed.attention_backward),
            f"{(forward + backward) / 1e12:.0f} TFLOP a sample",
        ),
        ("pointwise", load.samples * moved / speed.pointwise, f"{moved / 1e9:.0f} GB moved a sample"),
        (
            "transpose" if fp8 else "dequantise",
            load.passes * weights / speed.memory,
            f"{weights / 1e9:.0f} GB moved a pass",
        ),
        ("transfer", load.samples * sent / speed.host, f"{sent / 1e6:.0f} MB a sample"),
        (
            "gaps",
            load.passes * layers * 1e-3 * _BLOCK_GAPS_MS * (live + share_again / 2),
            "between the kernels of each block",
        ),
    )
    launches = (1 + live) / 2 + _AGAIN * share_again + _AWAY[away]
    launches += (_ROUNDED if fp8 else _DENSE.get(choice.precision, 0.0)) * (1 + live + share_again)
    launching = load.passes * layers * speed.block_seconds * launches
    waiting = _waited(launching, sum(seconds for _, seconds, _ in rows)) if choice.graphs == "off" else 0.0
    words = f"{1e3 * launching:.0f} ms of the host, of which the device waits for the rest"
    parts = [
        TimePart(name, round(1e3 * seconds, 3), evidence)
        for name, seconds, evidence in (*rows, ("launch", waiting, words))
        if seconds
    ]
    return (*parts, _optimizer_part(size.parameters, speed))
