"""What each block keeps for its backward pass, and what it computes again.

A block always keeps its input and the adapters' thin products. Everything else belongs to a group below; a
budget of 1 keeps all groups of all blocks, 0 none. In between, groups are kept in the order of time saved per
byte, block by block from the last one (whose backward pass comes first). Attention's output and its
log-sum-exp come first: one hidden-size tensor saves the dearest recompute.

Rejected: ``torch._functorch.config.activation_memory_budget``. Its partitioner decides on a compiled graph,
so what it keeps changes with versions and shapes, and gradients turned NaN at one budget in a prototype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Group = Literal["attention", "ffn_output", "attention_output", "qkv", "gate_up", "elementwise"]
# Groups that may be kept as e4m3 with a scale a row, at half the bytes: the backward pass reads them in
# pointwise work only. Not q, k and v, whose products must agree with the log-sum-exp that is kept, and not
# attention's output: with it, the worst cosine of an adapter's gradient fell from 0.997 to 0.994.
ROUNDED_GROUPS = ("ffn_output", "attention_output", "gate_up")
# Groups that may wait on the host; "input" is the block's own. Operands in FP8 are cheaper to recompute.
HOST_GROUPS = ("input", "attention", "ffn_output", "attention_output", "qkv", "gate_up")
# What each setting of memory.activation_offload sends there, of every block. Where the link to the host would
# be too slow for exact values, they are rounded.
AWAY: dict[str, tuple[str, ...]] = {
    "none": (),
    "inputs": ("input",),
    "outputs": ("input", "attention", "ffn_output", "attention_output"),
    "gate_up": ("input", "gate_up"),
}
ROUNDING = ("outputs", "gate_up")
# Packed lengths are rounded up to this with inert tokens: FP8 products need rows in multiples of 16, and
# fewer different lengths mean fewer plans of attention, and fewer CUDA graphs.
PACKED_MULTIPLE = 64
# Shapes of batches that get a CUDA graph of their own; further ones are launched kernel by kernel.
MOST_GRAPHS = 64


def group_bytes(tokens: int, hidden: int, intermediate: int, itemsize: int, fp8: bool,
                rounded: bool = False) -> dict[Group, int]:  # fmt: skip
    """Bytes that each group takes in one block, in the order in which groups are kept.

    Args:
        tokens: length of the packed token axis.
        hidden, intermediate: widths of the block and of its feed-forward.
        itemsize: bytes of an activation.
        fp8: whether operands of forward products are e4m3 (else they have the activations' size).
        rounded: whether :data:`ROUNDED_GROUPS` are kept as e4m3.
    """
    row = tokens * hidden * itemsize
    kept = 1 if rounded else itemsize
    operand = 1 if fp8 else itemsize
    sizes: dict[Group, int] = {
        "attention": row,
        "ffn_output": tokens * hidden * kept,
        "attention_output": tokens * hidden * kept,
        "qkv": 3 * row,
        "gate_up": 2 * tokens * intermediate * kept,
        # The residual between the halves, and the operands of the four products.
        "elementwise": row + (3 * tokens * hidden + tokens * intermediate) * operand,
    }
    # Time saved per byte on an H200, in us/MB: 11.5, 9.4, 4.3, 4.5 and 3.9; twice that for those rounded.
    if rounded:
        sizes["qkv"] = sizes.pop("qkv")
        sizes["elementwise"] = sizes.pop("elementwise")
    return sizes


def choose_kept(budget: float, sizes: Sequence[Mapping[Group, int]]) -> list[frozenset[Group]]:
    """For each block the groups that it keeps, using at most ``budget`` of the bytes that keeping all takes.

    Args:
        budget: 0 to 1.
        sizes: of each block, from :func:`group_bytes`; all with the same groups.

    Raises:
        ValueError: for a budget outside 0 to 1.
    """
    if not 0 <= budget <= 1:
        raise ValueError(f"the activation budget is {budget}, not between 0 and 1")
    left = round(budget * sum(sum(block.values()) for block in sizes))
    kept: list[set[Group]] = [set() for _ in sizes]
    for group in sizes[0]:
        for block, size in zip(reversed(kept), reversed(sizes), strict=True):
            if size[group] <= left:
                block.add(group)
                left -= size[group]
    return [frozenset(groups) for groups in kept]
