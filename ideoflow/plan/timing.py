"""How long a step takes: the work of each kind over the rate at which a card does that kind (a roofline).

The kinds are kept apart because cards differ in each: matrix products with the frozen weights, the adapter's
own, attention, pointwise work (which is bound by memory bandwidth), launching kernels, the optimiser, and
transfers from the host. Rates are a data sheet's peaks times the share of them that was measured
(:mod:`ideoflow.plan.calibration`). Work, for T tokens of one sample and one forward pass:

* frozen Linears: 2 T x parameters; the backward pass computes input gradients only, so as much again;
* attention: 4 T^2 h a block, backward 2.5 times that (Dao 2023, FlashAttention-2, section 4.1);
* adapter: 2 T x its parameters, backward twice that;
* pointwise: bytes read and written, counted from the modules' own code; backward twice that.

Checkpointing adds one forward pass of every block that is adapted or lies behind one that is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ideoflow.model.base import BaseFacts
from ideoflow.model.spec import TransformerSpec, VaeSpec
from ideoflow.plan.calibration import Shares
from ideoflow.plan.document import Hardware, Rates, TimePart
from ideoflow.plan.memory import ADAPTER_BYTES, Choice, adapter_parameters, targets_by_block

# Only to rank alternatives where a device's speed is unknown: a middling card, a middling processor.
_UNKNOWN = {"cuda": Rates(70, 35, 900, 20), "cpu": Rates(0.4, 0.4, 40, 40)}
# torch.compile on a repeated block, forward and backward, on a usual processor.
COMPILE_SECONDS = 40.0
SAMPLING_STEPS = {"quality": 48, "default": 20, "turbo": 12}


@dataclass(frozen=True)
class Load:
    """What one optimiser step works on.

    ``lengths`` are (image tokens, text tokens, share of the samples) for each size of picture; ``samples``
    are those of one step, batch times accumulation. ``together`` samples share one pass, ``masked`` says that
    attention gets a mask, and ``adapter`` is the size of the adapter's numbers: the reference engine runs one
    sample a pass, unmasked, with a float32 adapter.
    """

    lengths: tuple[tuple[int, int, float], ...]
    samples: int
    together: int = 1
    masked: bool = False
    adapter: int = ADAPTER_BYTES


@dataclass(frozen=True)
class Speed:
    """Rates that are really reached: work per second by kind, in FLOP/s and bytes/s."""

    matmul: float
    adapter: float
    attention_forward: float
    attention_backward: float
    pointwise: float
    memory: float
    host: float
    block_seconds: float

    @classmethod
    def of(cls, hardware: Hardware, choice: Choice, shares: Shares, load: Load) -> Speed:
        """A device's peaks times the shares of them that were measured."""
        kind = "cuda" if choice.device == "cuda" else "cpu"
        rates = hardware.rates if hardware.rates and hardware.kind != "cpu" else None
        rates = rates or _UNKNOWN[kind]
        share: Mapping[str, float] = shares.efficiency
        peak = rates.fp32_tflops if choice.precision == "float32" else rates.bf16_tflops
        if choice.precision == "bf16" and not hardware.fast_bf16:
            peak = 0.4 * rates.fp32_tflops  # converted to float32 and back around every product
        same = load.adapter == choice.element
        adapter = peak if same else rates.fp32_tflops
        adapter *= share["adapter_bf16" if same and choice.element == 2 else "adapter_float32"]
        mode = "compiled" if choice.compiled else "eager"
        mask = "masked_" if load.masked else ""
        return cls(
            1e12 * peak * share["matmul"],
            1e12 * adapter,
            1e12 * peak * share[f"{mask}attention_forward"],
            1e12 * peak * share[f"{mask}attention_backward"],
            1e9 * rates.memory_gbps * share[f"elementwise_{mode}"],
            1e9 * rates.memory_gbps * share["elementwise_compiled"],
            1e9 * rates.host_gbps,
            1e-3 * shares.block_ms[mode],
        )


def linear_parameters(spec: TransformerSpec) -> int:
    """Parameters of the Linears that every token passes, in all blocks."""
    block = spec.block_linears()
    return spec.num_layers * sum(o * i for name, (o, i) in block.items() if "adaln" not in name)


def pointwise_bytes(
    spec: TransformerSpec, adapted: frozenset[str], element: int, *, compiled: bool, adapter: int
) -> int:
    """Bytes a token that one block's pointwise work moves, forward.

    Eager: six RMSNorms in float32 (cast, square, mean, scale, cast, weight), two modulations, two rotary
    embeddings (two products, a rotated copy, a sum), two gated residuals, SwiGLU; and for each adapter its
    input's cast, its factors' ends, the scale, the sum and the cast back. Compiled: what such chains read and
    write at their ends.
    """
    h, f, e = spec.hidden, spec.intermediate_size, element
    sizes = {name: size for name, size in spec.block_linears().items() if name in adapted}
    into, out = sum(i for _, i in sizes.values()), sum(o for o, _ in sizes.values())
    if compiled:
        ends = e * into + 4 * e * out if adapter == e else (e + 8) * into + (8 + 2 * e) * out
        return 14 * e * h + 3 * e * f + ends
    norms = 6 * h * (5 * e + 24 if e < 4 else 28)
    ends = e * into + 6 * e * out if adapter == e else (e + 8) * into + (24 + 2 * e) * out
    return norms + 4 * e * h + 20 * e * h + 10 * e * h + 5 * e * f + ends


def step_parts(
    spec: TransformerSpec, targets: tuple[str, ...], rank: int, load: Load, choice: Choice, speed: Speed
) -> tuple[TimePart, ...]:
    """Milliseconds of one optimiser step by kind of work."""
    blocks, e = targets_by_block(targets), choice.element
    # Blocks in front of the first adapted one run forward only.
    live = 1 - min(blocks, default=spec.num_layers) / spec.num_layers
    again = live if choice.checkpointing == "on" else 0.0
    forwards, backwards = 1 + again, live
    adapter = adapter_parameters(spec, targets, rank)
    moved = sum(
        pointwise_bytes(spec, blocks.get(i, frozenset()), e, compiled=choice.compiled, adapter=load.adapter)
        for i in range(spec.num_layers)
    )
    tokens = sum((image + text) * share for image, text, share in load.lengths)
    squares = sum((image + text) ** 2 * share for image, text, share in load.lengths)
    sent = sum((image * spec.in_channels * 8 + text * spec.hidden * e) * s for image, text, s in load.lengths)

    dense = 2 * tokens * linear_parameters(spec)
    attention = 4 * squares * spec.hidden * spec.num_layers
    own = 2 * tokens * adapter
    seconds = {
        "matmul": dense * (forwards + backwards) / speed.matmul,
        "adapter": own * (1 + (again > 0) + 2) / speed.adapter,
        "attention": attention * forwards / speed.attention_forward
        + 2.5 * attention * backwards / speed.attention_backward,
        "pointwise": tokens * moved * (forwards + 2 * backwards) / speed.pointwise,
        "launch": speed.block_seconds * spec.num_layers * (forwards + backwards) / 3 / load.together,
        "transfer": sent / speed.host,
    }
    evidence = {
        "matmul": f"{dense * (forwards + backwards) / 1e12:.0f} TFLOP a sample",
        "adapter": f"{adapter / 1e6:.0f} M numbers, {'float32' if load.adapter == 4 else 'bf16'}",
        "attention": f"{attention * (forwards + 2.5 * backwards) / 1e12:.0f} TFLOP a sample",
        "pointwise": f"{tokens * moved * (forwards + 2 * backwards) / 1e9:.0f} GB moved a sample",
        "launch": "kernels of each block, as measured",
        "transfer": f"{sent / 1e6:.0f} MB a sample",
    }
    parts = [
        TimePart(name, round(1e3 * load.samples * value, 3), evidence[name])
        for name, value in seconds.items()
    ]
    # AdamW reads the weight, its gradient and two moments, and writes three of them; clipping reads once.
    update = adapter * 4 * 9 / speed.memory
    parts.append(TimePart("optimizer", round(1e3 * update, 3), "once a step"))
    return tuple(parts)


def sampling_seconds(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    tokens: int,
    text: int,
    steps: int,
    choice: Choice,
    speed: Speed,
) -> float:
    """One validation picture: two forward passes a step, with text and without it."""
    blocks, seconds = targets_by_block(targets), 0.0
    for length in (tokens + text, tokens):
        moved = sum(
            pointwise_bytes(
                spec,
                blocks.get(i, frozenset()),
                choice.element,
                compiled=choice.compiled,
                adapter=ADAPTER_BYTES,
            )
            for i in range(spec.num_layers)
        )
        seconds += 2 * length * linear_parameters(spec) / speed.matmul
        seconds += 4 * length**2 * spec.hidden * spec.num_layers / speed.attention_forward
        seconds += length * moved / speed.pointwise + speed.block_seconds * spec.num_layers / 3
    return steps * seconds


def encoding_seconds(base: BaseFacts, captions: int, text: int, pixels: float, speed: Speed) -> float:
    """Every caption through the text encoder, and ``pixels`` in all through the autoencoder."""
    words = 2 * base.text_encoder.parameters() * text * captions / speed.matmul
    # Small convolutions reach less of the peak than large products do.
    pictures = _encoder_flop(base.vae) * pixels / (0.5 * speed.matmul)
    return words + pictures


def _encoder_flop(spec: VaeSpec) -> float:
    """FLOP a pixel of the encoder: two 3x3 convolutions (2 x 9 c^2) a residual block, a quarter a level."""
    channels = spec.block_out_channels
    return sum(36.0 * spec.layers_per_block * c * c * 0.25**level for level, c in enumerate(channels))
