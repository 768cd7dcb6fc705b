"""What the reference engine holds while it trains, from what autograd keeps.

Plain diffusers modules with PEFT adapters, one sample at a time, no padding, no mask. Notation, per token and
block: ``h`` hidden width, ``f`` feed-forward width, ``e`` bytes of an activation (4 for float32, else 2).

**Kept by an eager block** besides its input:

| what | bytes a token |
|---|---|
| float32 copies that the six RMSNorms square (bf16 only) | 6 x 4h |
| inputs of the norms of q, k, attention's and feed-forward's results, and of the middle norm | 5 e h |
| q, k, v and the result of attention | 4 e h |
| w1's result, its SiLU, w3's result | 3 e f |
| inputs of adapted Linears; PEFT casts each to the adapter's type, so nothing is shared in bf16 | 4 x width |
| results of the adapters' first factors | 4 x rank |
| statistics: a number a norm (one a head for q and k), and attention's log-sum-exp a head | 16 + 12 x heads |

Frozen Linears keep nothing: the gradient of a frozen weight is not computed. **Kept by a compiled block** is
what is not pointwise from something kept: inputs of adapters, q and k before and after their norm, v, the
results of attention, of its projection and of the feed-forward, and w1's and w3's results: 8 e h + 2 e f, and
the statistics. Inputs of adapters count once each: in the adapter's type where PEFT casts to it, else in
``e`` bytes, and then the middle hidden state as well.

With **checkpointing** each block keeps only its input (and all share diffusers' mask of tokens^2 bytes, which
the reference engine then ignores), and one block at a time is recomputed in full. While a block goes
backward, gradients are alive: three of the feed-forward's width and one of hidden width in bf16, two of the
feed-forward's width in float32; in a compiled block, which also recomputes into them, six of each in bf16.
The backward workspace of attention comes later, when the feed-forward's tensors are gone, and is smaller.

``tests/plan/test_memory.py`` holds the table to what autograd really saves for diffusers' block, to the byte,
the peak to what the allocator saw, and both to what plain diffusers was measured to take on an H200.
Linears stored in FP8 or int8 keep nothing more: each weight is made dense for each product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ideoflow.model.spec import TransformerSpec
from ideoflow.plan.sizes import ADAPTER_BYTES, Choice, targets_by_block


@cache
def kept_by_block(
    spec: TransformerSpec,
    adapted: frozenset[str],
    rank: int,
    element: int,
    *,
    compiled: bool,
    adapter: int = ADAPTER_BYTES,
) -> int:
    """Bytes a token that autograd keeps of one block besides its input; the module's docstring has the table.

    ``adapter`` is the size of the adapter's numbers: where it is not ``element``, PEFT casts its inputs.
    """
    h, f = spec.hidden, spec.intermediate_size
    widths = {name: size[1] for name, size in spec.block_linears().items() if "adaln" not in name}
    inputs = {name: width for name, width in widths.items() if name in adapted}
    rest = len(inputs) * rank * adapter + 4 * 4 + 3 * 4 * spec.num_attention_heads
    if compiled:
        shared = {_input_of(name): width for name, width in inputs.items()}
        if adapter != element:
            return element * (8 * h + 2 * f) + adapter * sum(shared.values()) + rest
        # Attention's result and the product of the feed-forward are kept, or pointwise from what is.
        extra = sum(width for source, width in shared.items() if source in ("norm1", "ffn_norm1"))
        return element * (9 * h + extra + 2 * f) + rest
    upcast = 6 * 4 * h if element < 4 else 0
    if adapter != element:
        copies = adapter * sum(inputs.values())
    else:
        shared = {_input_of(name): width for name, width in inputs.items() if _input_of(name) != "attention"}
        copies = element * sum(shared.values())
    return upcast + element * (9 * h + 3 * f) + copies + rest


def _input_of(module: str) -> str:
    """What feeds a Linear; those with one source share one tensor."""
    sources = {"attention.to_out.0": "attention", "feed_forward.w2": "product"}
    return sources.get(module, "norm1" if module.startswith("attention") else "ffn_norm1")


def backward_workspace(spec: TransformerSpec, element: int, *, compiled: bool) -> int:
    """Bytes a token of gradients that are alive at once while a block goes backward."""
    h, f = spec.hidden, spec.intermediate_size
    if compiled:
        return element * 6 * (h + f)
    return element * (3 * f + h) if element < 4 else element * 2 * f


@dataclass(frozen=True)
class Activations:
    """Bytes at the peak of one forward and backward pass."""

    checkpoints: int
    kept: int
    backward: int
    mask: int
    ends: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.kept + self.backward + self.mask + self.ends


def activations(
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    tokens: int,
    element: int,
    *,
    checkpointing: bool,
    compiled: bool,
    adapter: int = ADAPTER_BYTES,
    mask_bytes: int = 0,
) -> Activations:
    """What a pass over ``tokens`` tokens (of all samples together) holds at its peak.

    ``mask_bytes`` are those of an attention mask beside diffusers' own boolean one.
    """
    blocks = targets_by_block(targets)
    kept = [
        kept_by_block(spec, blocks.get(i, frozenset()), rank, element, compiled=compiled, adapter=adapter)
        for i in range(spec.num_layers)
    ]
    # Blocks before the first adapted one carry no gradient, so nothing of them is kept.
    first = min(blocks, default=spec.num_layers)
    kept = kept[first:]
    # The last hidden state, cosines and sines, and the velocity with its target and gradient.
    ends = element * spec.hidden + 2 * element * spec.attention_head_dim + 14 * spec.in_channels
    return Activations(
        checkpoints=tokens * len(kept) * element * spec.hidden,
        kept=tokens * (max(kept, default=0) if checkpointing else sum(kept)),
        backward=tokens * backward_workspace(spec, element, compiled=compiled),
        mask=mask_bytes + (tokens * tokens if checkpointing else 0),
        ends=tokens * ends,
    )


def dequantised_bytes(spec: TransformerSpec, choice: Choice) -> int:
    """What the reference engine's quantised Linears need at once: a copy of the largest weight in the type of
    the products, for 4-bit ones with the scales' own."""
    largest = spec.hidden * spec.intermediate_size
    return largest * {"fp8": 2, "int8": 2, "nf4": 3}.get(choice.precision, 0)
