"""What is counted with: a combination of alternatives, the sizes that a run works on, sizes of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ideoflow.model.spec import TransformerSpec

# Bytes of an activation, and of every weight that is not quantised.
ELEMENT_BYTES = {"bf16": 2, "float32": 4, "fp8": 2}
ADAPTER_BYTES = 4  # the adapter, its gradients and AdamW's moments are float32


@dataclass(frozen=True)
class Choice:
    """The alternatives that are weighed against each other, one value for each decision.

    Args:
        engine: ``fused`` or ``reference``.
        precision: storage of the frozen weights: ``fp8``, ``bf16`` or ``float32``.
        matmul: type of the products with them: ``fp8``, ``bf16`` or ``float32``.
        activation_budget: 0 recomputes every block, 1 recomputes nothing; the reference engine has these two,
            and calls them checkpointing.
    """

    device: str
    engine: str
    precision: str
    matmul: str
    activation_budget: float
    compile: str
    unconditional: str

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return ELEMENT_BYTES[self.precision]

    @property
    def compiled(self) -> bool:
        return self.compile != "off"

    @property
    def checkpointing(self) -> str:
        return "off" if self.activation_budget == 1 else "on"

    @property
    def path(self) -> str:
        """The code that a step goes through, as measurements are kept by it."""
        return f"fused {self.matmul}" if self.engine == "fused" else self.engine


@dataclass(frozen=True)
class Shapes:
    """Sizes that a run works on: the largest for memory, the mean for time.

    ``grid_tokens`` and ``text_tokens`` are the greatest numbers of image and text tokens of a sample;
    ``pixels`` its greatest area; ``sample_tokens`` and ``sample_pixels`` those of a validation picture, or 0.
    ``caption_tokens`` are those of all captions together, or 0 for a single one.
    """

    grid_tokens: int
    text_tokens: int
    pixels: int
    sample_tokens: int
    sample_pixels: int
    caption_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.grid_tokens + self.text_tokens


def adapter_parameters(spec: TransformerSpec, targets: Iterable[str], rank: int) -> int:
    """Numbers in the adapter: rank x (in + out) for each target."""
    sizes = spec.linears()
    return sum(rank * sum(sizes[name]) for name in targets)


@lru_cache(maxsize=64)
def targets_by_block(targets: tuple[str, ...]) -> Mapping[int, frozenset[str]]:
    """Names of the adapted Linears within each block that has any."""
    blocks: dict[int, set[str]] = {}
    for name in targets:
        _, index, module = name.split(".", 2)
        blocks.setdefault(int(index), set()).add(module)
    return {index: frozenset(modules) for index, modules in blocks.items()}


def resident_parameters(spec: TransformerSpec) -> int:
    """Parameters on the device in training: the text projection's result is cached instead."""
    return spec.parameters() - spec.text_projection_parameters()


def block_weights(spec: TransformerSpec) -> int:
    """Numbers in the weights of all Linears of all blocks: what is quantised where anything is."""
    return sum(outputs * inputs for outputs, inputs in spec.linears().values())


def weight_bytes(spec: TransformerSpec, precision: str) -> int:
    """The resident transformer: in fp8 a byte for each quantised number and a float32 scale for each row."""
    resident, element = resident_parameters(spec), ELEMENT_BYTES[precision]
    if precision != "fp8":
        return resident * element
    quantised = block_weights(spec)
    rows = sum(outputs for outputs, _ in spec.linears().values())
    return element * (resident - quantised) + quantised + 4 * rows
