"""What is counted with: a combination of alternatives, the sizes that a run works on, sizes of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import ne

from ideoflow.model.spec import TransformerSpec

# Bytes of an activation, and of every weight that is not quantised.
ELEMENT_BYTES = {"bf16": 2, "float32": 4, "fp8": 2, "int8": 2, "nf4": 2}
QUANTISED = ("fp8", "int8", "nf4")
ADAPTER_BYTES = 4  # the adapter, its gradients and AdamW's moments are float32


@dataclass(frozen=True)
class Choice:
    """The alternatives that are weighed against each other, one value for each decision.

    Args:
        engine: ``fused`` or ``reference``.
        precision: storage of the frozen weights: ``bf16``, ``fp8``, ``int8``, ``nf4`` or ``float32``.
        matmul: type of the products with them: ``fp8``, ``bf16`` or ``float32``.
        activation_budget: 0 recomputes every block, 1 recomputes nothing; the reference engine has these two,
            and calls them checkpointing.
        optimizer_state: where and how AdamW's moments are: ``float32``, ``cpu``, ``8bit`` or ``paged``; or
            ``offload``: on the host with the adapter and its gradients.
        offload: how the blocks' weights come to the device: ``none`` (they are there), ``stream`` from the
            host, ``shard`` from all processes, or by diffusers' group offloading ``block``, ``leaf`` or
            ``disk``.
        unconditional: where the second transformer comes from while samples are made: ``loaded`` to the
            device, ``streamed`` block by block, or ``proxy``, the trained one without text in its place.
        activation_offload: what of the blocks waits on the host for the backward pass: ``none``, the
            ``inputs``, or with them the ``outputs`` of attention and products, or ``gate_up``.
        graphs: whether steps are recorded as CUDA graphs, ``on`` or ``off``.
        exact_blocks: with FP8 products, how many of the first blocks have forward products in bf16.
    """

    device: str
    engine: str
    precision: str
    matmul: str
    activation_budget: float
    compile: str
    unconditional: str
    optimizer_state: str = "float32"
    offload: str = "none"
    activation_offload: str = "none"
    graphs: str = "off"
    exact_blocks: int = 0

    @property
    def savings(self) -> int:
        """How many things wait on the host, or are smaller than they might be, for want of memory."""
        plain = ("float32", "none", "none")
        return sum(map(ne, (self.optimizer_state, self.offload, self.activation_offload), plain))

    @property
    def lean(self) -> bool:
        """Whether there are any such things."""
        return self.savings > 0

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
        words = [f"fused {self.matmul}" if self.engine == "fused" else self.engine]
        words += [self.offload] if self.offload != "none" else []
        words += [self.activation_offload] if self.activation_offload != "none" else []
        words += ["graphs"] if self.graphs == "on" else []
        return " ".join(words)


@dataclass(frozen=True)
class Shapes:
    """Sizes that a run works on: the largest for memory, the mean for time.

    ``grid_tokens`` and ``text_tokens`` are the greatest numbers of image and text tokens of a sample;
    ``pixels`` its greatest area; ``sample_tokens`` and ``sample_pixels`` those of a validation picture, or 0.
    ``caption_tokens`` are those of all captions together, or 0 for a single one. ``graphs`` are the shapes of
    batches that come, as far as CUDA graphs tell them apart.
    """

    grid_tokens: int
    text_tokens: int
    pixels: int
    sample_tokens: int
    sample_pixels: int
    caption_tokens: int = 0
    graphs: int = 1

    @property
    def tokens(self) -> int:
        return self.grid_tokens + self.text_tokens


@lru_cache(maxsize=256)
def adapter_parameters(spec: TransformerSpec, targets: tuple[str, ...], rank: int) -> int:
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


@lru_cache(maxsize=64)
def longest_side(spec: TransformerSpec, targets: tuple[str, ...]) -> int:
    """The most inputs or outputs that an adapted Linear has."""
    sizes = spec.linears()
    return max((max(sizes[name]) for name in targets), default=0)


def resident_parameters(spec: TransformerSpec) -> int:
    """Parameters on the device in training: the text projection's result is cached instead."""
    return spec.parameters() - spec.text_projection_parameters()


@lru_cache(maxsize=16)
def block_weights(spec: TransformerSpec) -> int:
    """Numbers in the weights of all Linears of all blocks: what is quantised where anything is."""
    return sum(outputs * inputs for outputs, inputs in spec.linears().values())


@lru_cache(maxsize=64)
def weight_bytes(spec: TransformerSpec, precision: str) -> int:
    """The whole transformer: in fp8 and int8 a byte for each quantised number and a float32 scale for each
    row; in nf4 half a byte, a byte for 64 and a float32 for 256 of these, and two tables for each Linear."""
    resident, element = resident_parameters(spec), ELEMENT_BYTES[precision]
    if precision not in QUANTISED:
        return resident * element
    quantised, linears = block_weights(spec), spec.linears().values()
    if precision == "nf4":
        blocks = [-(-outputs * inputs // 64) for outputs, inputs in linears]
        scales = sum(count + 4 * -(-count // 256) + 4 * (16 + 256 + 1) for count in blocks)
        return element * (resident - quantised) + quantised // 2 + scales
    return element * (resident - quantised) + quantised + 4 * sum(outputs for outputs, _ in linears)


@lru_cache(maxsize=64)
def streamed_bytes(spec: TransformerSpec, precision: str) -> int:
    """The part of it that may wait on the host: attention's and the feed-forward's weights in all blocks."""
    numbers = sum(o * i for name, (o, i) in spec.linears().items() if not name.endswith("adaln_modulation"))
    return (
        numbers // 2 if precision == "nf4" else numbers * (1 if precision in QUANTISED else _DENSE[precision])
    )


_DENSE = {"bf16": 2, "float32": 4}
SLOTS = 3  # blocks on the device while weights are streamed (ideoflow.engine.offload)
STREAMED = ("stream", "shard")  # values of offload that this is done for
# Numbers of a bucket while AdamW's moments wait on the host (engine.optimizer), and while the adapter and its
# gradients do as well (engine.masters): two buckets are on the device at once, of each array one.
BUCKET, OFFLOAD_BUCKET = 8 << 20, 1 << 20


def linear_parameters(spec: TransformerSpec) -> int:
    """Parameters of the Linears that every token passes, in all blocks."""
    block = spec.block_linears()
    return spec.num_layers * sum(o * i for name, (o, i) in block.items() if "adaln" not in name)


@cache
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


def host_arrays(choice: Choice) -> int:
    """Float32 numbers that wait on the host for each of the adapter's."""
    return {"cpu": 2, "paged": 2, "offload": 4}.get(choice.optimizer_state, 0)


def state_bytes(choice: Choice, numbers: int, largest: int = 0) -> int:
    """AdamW's moments on the device: two float32 numbers for each of the adapter's, or what is left there.

    ``largest`` are the numbers of the adapter's largest tensor, of which a bucket has at least one.
    """
    if choice.optimizer_state == "offload":
        return 2 * 4 * 4 * min(numbers, max(OFFLOAD_BUCKET, largest))
    if choice.optimizer_state == "8bit":
        return numbers * 2 * (256 + 4) // 256
    if choice.optimizer_state == "cpu":
        return 4 * 4 * min(numbers, BUCKET)
    return 0 if choice.optimizer_state == "paged" else 2 * 4 * numbers


def fetched_share(choice: Choice, processes: int) -> float:
    """Of a block's large weights, what has to be fetched: what the device does not keep."""
    if choice.offload == "shard":
        return (processes - 1) / processes
    return 0.0 if choice.offload == "none" else 1.0


def group_blocks(choice: Choice, blocks: int, streams: bool) -> float:
    """Blocks whose weights are on the device at once, for one that offloads in groups of ``blocks``.

    A block that is computed again keeps its weights until its backward pass is done; the next group comes
    meanwhile.
    """
    if choice.offload == "leaf":
        return 1 + (0.4 if streams else 0.0)  # the largest Linear is three tenths of a block
    return blocks * (2 if streams else 1)
