"""What a run takes beside its steps: compiling, encoding captions and pictures, making samples."""

from __future__ import annotations

from ideoflow.model.base import BaseFacts
from ideoflow.model.spec import TransformerSpec, VaeSpec
from ideoflow.plan.sizes import (
    ADAPTER_BYTES,
    Choice,
    fetched_share,
    linear_parameters,
    pointwise_bytes,
    streamed_bytes,
    targets_by_block,
)
from ideoflow.plan.timing import DISK, Speed

# torch.compile on a repeated block, both passes, on a usual processor; and the fused engine's kernels
# with its attention's plans.
_COMPILE_SECONDS, _KERNEL_SECONDS = 40.0, 15.0
SAMPLING_STEPS = {"quality": 48, "default": 20, "turbo": 12}


def starting_seconds(choice: Choice, shapes: int) -> float:
    """What is compiled or planned before the first step, for one or several (2) shapes of input.

    torch.compile makes kernels for the first shape as it is, and symbolic ones for the second.
    """
    if choice.engine == "fused":
        return _KERNEL_SECONDS
    return _COMPILE_SECONDS * shapes if choice.compiled else 0.0


def sampling_seconds(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    tokens: int,
    text: int,
    steps: int,
    choice: Choice,
    speed: Speed,
    processes: int = 1,
) -> float:
    """One validation picture: two forward passes a step, with text and without it.

    Weights that are not on the device are fetched meanwhile, in every pass.
    """
    blocks, seconds = targets_by_block(targets), 0.0
    away, link = fetched_share(choice, processes), speed.host
    link = min(link, DISK) if choice.offload == "disk" else link
    second = away if choice.unconditional == "proxy" else float(choice.unconditional == "streamed")
    for length, fetched in ((tokens + text, away), (tokens, second)):
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
        computing = 2 * length * linear_parameters(spec) / speed.matmul
        computing += 4 * length**2 * spec.hidden * spec.num_layers / speed.attention_forward
        computing += length * moved / speed.pointwise
        computing = max(computing, speed.block_seconds * spec.num_layers / 3)
        seconds += max(computing, fetched * streamed_bytes(spec, choice.precision) / link)
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
