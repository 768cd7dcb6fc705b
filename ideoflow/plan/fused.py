"""What the fused engine holds in memory: values of each block by activation budget, copies, work space.

A block's forward pass is a chain of named values (:mod:`ideoflow.engine.fused.block`). It always keeps its
input and the adapters' thin products; the other values belong to groups, of which the budget keeps some.
Bytes a token, with ``h`` hidden and ``f`` feed-forward width, ``e`` bytes of an activation, ``o`` bytes of an
operand (1 in FP8, with 4 more for its row scale, else ``e``; that too in FP8's exact blocks), and heads of
which each has float32 statistics:

| group | values | bytes a token |
|---|---|---|
| always | input, thin products of the adapters | e h + e x ranks |
| attention | attention's result, its log-sum-exp | e h + 4 heads |
| ffn_output, attention_output | the two halves' last products | e h each |
| qkv | q, k, v and the inverse norms of q and k | 3 e h + 8 heads |
| gate_up | the feed-forward's two inner products | 2 e f |
| elementwise | the middle state, and the operands of the four products | e h + o (3 h + f) |

The backward pass goes from the last block to the first, computing what was not kept. :func:`block_bytes`
walks through both passes as the engine does and notes the most that is alive; :func:`peak` lets the blocks
follow one another. ``tests/plan/test_fused.py`` holds this to the engine's own choice of groups, to the bytes
that its blocks keep, and to the most that is alive in a whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from ideoflow.kernels.budget import AWAY, ROUNDED_GROUPS, ROUNDING, Group, choose_kept
from ideoflow.kernels.budget import group_bytes as budget_groups
from ideoflow.model.spec import PRODUCTS, TransformerSpec
from ideoflow.plan.adapters import AdapterSize
from ideoflow.plan.sizes import QUANTISED, targets_by_block

GROUPS = {
    "attention": ("attended",),
    "ffn_output": ("ffn",),
    "attention_output": ("projected",),
    "qkv": ("qkv",),
    "gate_up": ("gate_up",),
    "elementwise": ("middle", "x_qkv", "x_o", "x_ffn", "x_w2"),
}
# Each value and the one that it is computed from, apart from the block's input.
_CHAIN = ("x_qkv", "qkv", "attended", "x_o", "projected", "middle", "x_ffn", "gate_up", "x_w2", "ffn")
# The adapter's thin product that comes with a value.
_THIN = {"qkv": "z_qkv", "projected": "z_o", "gate_up": "z_ffn", "ffn": "z_w2"}
_FP8_RANK = 8  # ranks are padded to multiples of this where products are in FP8


@dataclass(frozen=True)
class Product:
    """Linears that share an input, as one product: how many, and inputs, all outputs and adapter rank."""

    parts: int
    inputs: int
    outputs: int
    rank: int


@lru_cache(maxsize=256)
def products(spec: TransformerSpec, adapted: frozenset[str], rank: int, fp8: bool) -> Mapping[str, Product]:
    """The four products of a block; the rank is 0 where none of the Linears is adapted."""
    sizes, found = spec.block_linears(), {}
    padded = -(-rank // _FP8_RANK) * _FP8_RANK if fp8 else rank
    for name, linears in PRODUCTS.items():
        outputs = sum(sizes[linear][0] for linear in linears)
        inputs = sizes[linears[0]][1]
        found[name] = Product(len(linears), inputs, outputs, padded if adapted.intersection(linears) else 0)
    return found


def group_bytes(
    spec: TransformerSpec, tokens: int, element: int, fp8: bool, offload: str = "none"
) -> dict[Group, int]:
    """What the budget counts a block's groups as, in the order in which they are kept.

    ``offload`` is the plan's activation_offload: what it sends to the host is not counted.
    """
    rounded, away = offload in ROUNDING, AWAY[offload]
    sizes = budget_groups(tokens, spec.hidden, spec.intermediate_size, element, fp8, rounded)
    return {group: size for group, size in sizes.items() if group not in away}


@lru_cache(maxsize=2048)  # the search asks for the same under many other decisions
def kept_groups(
    spec: TransformerSpec,
    tokens: int,
    budget: float,
    element: int,
    *,
    fp8: bool,
    offload: str = "none",
    exact_blocks: int = 0,
) -> tuple[frozenset[Group], ...]:
    """What the engine keeps on the device of each block for its backward pass, by activation budget."""
    sizes = {of: group_bytes(spec, tokens, element, of, offload) for of in (False, fp8)}
    of_blocks = [sizes[fp8 and i >= exact_blocks] for i in range(spec.num_layers)]
    return tuple(choose_kept(budget, of_blocks))


def _rounded_bytes(spec: TransformerSpec) -> dict[str, int]:
    """Bytes a token of the values that may be kept as e4m3, with a scale a row."""
    widths = {"ffn": spec.hidden, "projected": spec.hidden, "gate_up": 2 * spec.intermediate_size}
    return {name: widths[name] + 4 for group in ROUNDED_GROUPS for name in GROUPS[group]}


def away_bytes(spec: TransformerSpec, element: int, offload: str) -> int:
    """Bytes a token of each block that wait on the host."""
    value = value_bytes(spec, element, False) | {"input": element * spec.hidden}
    if offload in ROUNDING:
        value |= _rounded_bytes(spec)
    names = [name for group in AWAY[offload] for name in GROUPS.get(group, ("input",))]
    return sum(value[name] for name in names)


@dataclass(frozen=True)
class BlockBytes:
    """Bytes a token of one block: kept between its passes, and the most that is alive in each of them."""

    kept: int
    forward: int
    backward: int


class _Alive:
    """Named tensors that are alive, and the most that they ever took."""

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.most = sum(sizes.values())

    def hold(self, **sizes: int) -> None:
        self.sizes |= sizes
        self.most = max(self.most, sum(self.sizes.values()))

    def drop(self, *names: str) -> None:
        for name in names:
            self.sizes.pop(name, None)


def value_bytes(spec: TransformerSpec, element: int, fp8: bool) -> dict[str, int]:
    """Bytes a token of every value of a block."""
    h, f, e, heads = spec.hidden, spec.intermediate_size, element, spec.num_attention_heads

    def operand(width: int) -> int:
        return width + 4 if fp8 else e * width

    return {
        "x_qkv": operand(h),
        "qkv": 3 * e * h + 8 * heads,
        "attended": e * h + 4 * heads,
        "x_o": operand(h) if fp8 else 0,  # attention's result itself
        "projected": e * h,
        "middle": e * h,
        "x_ffn": operand(h),
        "gate_up": 2 * e * f,
        "x_w2": operand(f),
        "ffn": e * h,
    }


@lru_cache(maxsize=4096)
def block_bytes(
    spec: TransformerSpec,
    adapted: frozenset[str],
    rank: int,
    element: int,
    fp8: bool,
    kept: frozenset[str],
    rounded: bool = False,
    exact: bool = False,
) -> BlockBytes:
    """Walks through a block's two passes, in the order of the engine's code.

    ``rounded``: values of :data:`ROUNDED_GROUPS` wait as e4m3. ``exact``: forward operands are dense in spite
    of ``fp8``.
    """
    e, h, f = element, spec.hidden, spec.intermediate_size
    quantised = fp8 and not exact
    value, product = value_bytes(spec, element, quantised), products(spec, adapted, rank, fp8)
    keeps = {name for group in kept for name in GROUPS[group]}
    thin = {f"z_{name}": e * p.parts * p.rank for name, p in product.items()}
    small = _rounded_bytes(spec) if rounded else {}

    def operand(width: int) -> int:
        return width + 4 if fp8 else e * width

    def gradient(name: str, *, joined: bool = True) -> int:
        """An input's gradient; in FP8 the gradient of the thin product is further columns of it."""
        p = product[name]
        return e * (p.inputs + (2 * p.parts * p.rank if fp8 and joined else 0))

    alive = _Alive(input=e * h)
    dropped = {
        "attended": ("x_qkv", "qkv"),
        "middle": ("attended", "x_o", "projected"),
        "gate_up": ("x_ffn",),
        "x_w2": ("gate_up",),
        "ffn": ("x_w2",),
    }
    for name in _CHAIN:
        alive.hold(**{name: value[name]})
        if z := _THIN.get(name):
            alive.hold(pieces=2 * thin[z] if quantised else 0, **{z: thin[z]})
            alive.drop("pieces")
        for x in dropped.get(name, ()):
            _leave(alive, x, keeps, small)
    alive.hold(out=e * h)
    forward = alive.most
    for x in ("middle", "ffn"):
        _leave(alive, x, keeps, small)
    alive.drop("out")

    total = sum(alive.sizes.values())
    alive = _Alive(**alive.sizes)

    def need(name: str) -> None:
        if name in small and name in alive.sizes:
            alive.hold(rounded=alive.sizes.pop(name), **{name: value[name]})
            alive.drop("rounded")
        if name not in alive.sizes:
            before = _CHAIN.index(name)
            if before:
                need(_CHAIN[before - 1])
            alive.hold(**{name: value[name]})

    alive.hold(dout=e * h)
    need("ffn")
    alive.hold(dffn=operand(h))
    alive.drop("ffn")
    need("x_w2")
    alive.hold(dinner=gradient("w2"), dz=thin["z_w2"])
    alive.drop("dffn", "dz", "x_w2", "z_w2")
    need("gate_up")
    alive.hold(dgate_up=operand(2 * f))
    alive.drop("dinner", "gate_up")
    need("x_ffn")
    alive.hold(dx=gradient("ffn"), dz=thin["z_ffn"])
    alive.drop("dgate_up", "dz", "x_ffn", "z_ffn")
    need("middle")
    alive.hold(dmiddle=e * h)
    alive.drop("dx", "middle")
    need("projected")
    alive.hold(dprojected=operand(h))
    alive.drop("projected")
    need("x_o")
    alive.hold(dattended=gradient("o", joined=False), dz=thin["z_o"])
    alive.drop("dprojected", "dz", "x_o", "z_o")
    need("qkv")
    need("attended")
    # Attention kernels add up the gradient of q in float32 where activations are narrower.
    alive.hold(dqkv=3 * e * h, workspace=4 * h if e < 4 else 0)
    alive.drop("dattended", "attended", "workspace")
    alive.hold(dprojections=operand(3 * h))
    alive.drop("dqkv", "qkv")
    need("x_qkv")
    alive.hold(dx=gradient("qkv"), dz=thin["z_qkv"])
    alive.drop("dz", "z_qkv")
    alive.hold(dinput=e * h)
    return BlockBytes(total, forward, alive.most)


def _leave(alive: _Alive, name: str, keeps: set[str], small: Mapping[str, int]) -> None:
    """A value that nothing ahead reads: it goes, or waits, perhaps in its smaller form."""
    if name not in keeps:
        alive.drop(name)
    elif name in small and name in alive.sizes:
        alive.hold(rounded=small[name])
        alive.drop("rounded")
        alive.sizes[name] = small[name]


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a pass: kept by the blocks before the one at work, alive in it, and gradients."""

    saved: int
    work: int
    gradients: int

    @property
    def total(self) -> int:
        return self.saved + self.work + self.gradients


@lru_cache(maxsize=2048)
def peak(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    tokens: int,
    budget: float,
    element: int,
    *,
    fp8: bool,
    first_pass: bool = True,
    leaving: bool = False,
    offload: str = "none",
    exact_blocks: int = 0,
) -> Peak:
    """The most that a forward and backward pass over ``tokens`` packed tokens holds.

    ``first_pass``: the adapter has no gradients yet; they come as the blocks' values go. ``leaving``: they
    go to the host, each block's while the one before it computes, so those of two blocks are there at most.
    ``offload``: what waits on the host, but for that of two blocks, which is on its way. ``exact_blocks``:
    the first so many have dense forward operands.
    """
    blocks = targets_by_block(targets)
    kept = kept_groups(spec, tokens, budget, element, fp8=fp8, offload=offload, exact_blocks=exact_blocks)
    elsewhere, rounded = frozenset(AWAY[offload]) - {"input"}, offload in ROUNDING
    first = min(blocks, default=spec.num_layers)
    held = [
        block_bytes(
            spec,
            blocks.get(i, frozenset()),
            rank,
            element,
            fp8,
            kept[i] | elsewhere,
            rounded,
            i < exact_blocks,
        )
        for i in range(first, spec.num_layers)
    ]
    own = _gradient_bytes(spec, targets, rank)
    away = away_bytes(spec, element, offload)
    lighter = {block: replace(block, kept=block.kept - away) for block in set(held)}
    held = [lighter[block] for block in held]
    staying = (0,) * len(own) if leaving else own
    moments = _moments(held, staying, tokens, first_pass, 2 * away)
    most = Peak(*max(moments, key=sum, default=(0, 0, 0)))
    return replace(most, gradients=min(sum(own), 2 * max(own, default=0))) if leaving else most


@lru_cache(maxsize=64)
def _gradient_bytes(spec: TransformerSpec, targets: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """The adapter's gradients of each block, from the first that has any."""
    blocks, sizes = targets_by_block(targets), spec.block_linears()
    first = min(blocks, default=spec.num_layers)
    return tuple(
        4 * rank * sum(sum(sizes[name]) for name in blocks.get(i, ())) for i in range(first, spec.num_layers)
    )


def _moments(
    held: list[BlockBytes], own: tuple[int, ...], tokens: int, first_pass: bool, moving: int
) -> Iterator[tuple[int, int, int]]:
    """What makes a :class:`Peak`: of each block's forward pass, then of each one's backward pass.

    ``moving`` bytes a token are on their way.
    """
    saved, before = moving, 0 if first_pass else sum(own)
    for block in held:
        yield tokens * saved, tokens * block.forward, before
        saved += block.kept
    come = 0
    for block, gradient in zip(reversed(held), reversed(own), strict=True):
        saved -= block.kept
        come += gradient
        yield tokens * saved, tokens * block.backward, before + gradient if before else come


def foreign_bytes(spec: TransformerSpec, size: AdapterSize, tokens: int, element: int, fp8: bool) -> int:
    """The most that adapters which PEFT computes add to a pass, beside gradients: nothing of it is kept.

    Their dense matrices, and of each token the operands and gradients of the product at work in their own
    types: in FP8 an operand of the feed-forward is dequantised by way of float32, and a DoRA computes in it.
    Constants are the least that cover what was alive in the engine (``tests/plan/test_fused.py``).
    """
    h, f = spec.hidden, spec.intermediate_size
    if size.kind == "lora":
        return 0
    if size.kind == "dora":
        return tokens * (28 * f + 2 * h) + size.workspace
    return tokens * (2 * element * h + (10 * f if fp8 else 0)) + size.workspace + 4 * size.largest


@lru_cache(maxsize=64)
def copies_bytes(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    element: int,
    *,
    precision: str,
    fp8: bool,
    exact_blocks: int = 0,
) -> int:
    """The engine's own lasting tensors: the adapters in the activations' type, scales and norms' weights.

    In FP8 also both e4m3 pieces of the down-projections, but in exact blocks, and the row scales to fold in
    and out.
    """
    blocks, total = targets_by_block(targets), 0
    for i in range(spec.num_layers):
        total += 4 * 4 * spec.hidden
        for p in products(spec, blocks.get(i, frozenset()), rank, fp8).values():
            down, up = p.parts * p.rank * p.inputs, p.outputs * p.rank
            total += element * (down + up) + (4 * p.outputs if precision in ("fp8", "int8") else 0)
            if fp8:
                total += 2 * p.outputs + (4 * p.outputs if p.rank else 0)
                total += 2 * down + 8 * p.parts * p.rank if i >= exact_blocks else 0
    return total


def scratch_bytes(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    element: int,
    *,
    precision: str,
    fp8: bool,
    exact_blocks: int = 0,
) -> int:
    """The buffer that weights are transposed (FP8 products) or dequantised (others) into, the largest use."""
    if precision not in QUANTISED:
        return 0
    adapted = frozenset().union(*targets_by_block(targets).values())
    sizes = [4 * spec.hidden * spec.adaln_dim * element]
    for name, p in products(spec, adapted, rank, fp8).items():
        rows = p.inputs if name == "o" else p.inputs + 2 * p.parts * p.rank
        sizes += [p.outputs * rows] if fp8 else []
        sizes += [p.outputs * p.inputs * element] if exact_blocks or not fp8 else []
    return max(sizes)
