"""A frozen product with its low-rank adapters (LoRA: Hu et al. 2021), forward and backward written out.

For parts p that share the input x (q, k, v; w1, w3) with adapters A_p [r, K], B_p [n_p, r] and scalings s_p:

    z_p = s_p x A_p^T           one product with all A_p stacked
    y_p = x W_p^T + z_p B_p^T
    dz_p = dy_p B_p             dB_p = dy_p^T z_p             dA_p = s_p dz_p^T x
    dx = dy W + sum over p of dz_p s_p A_p

The adapters learn in float32; working copies in the activations' type are refreshed once a step. In FP8 the
adapter reads the same quantised x and dy as the frozen product: half the bytes, and nothing else to save.
There A_p and B_p become two e4m3 pieces each (a number and what its rounding lost, 2^-8 together, as fine as
bf16), which makes x A^T a product on the FP8 units and dy B further columns of the product dy W. Where the
forward products are exact, x is dense and x A^T as it is without FP8; the backward pass stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import UNFUSED_ADAPTER
from ideoflow.engine.fused.weights import FrozenWeight, Scratch, scaled_product
from ideoflow.kernels.reference import FP8, Operand


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair: down [r, K] and up [n, r] as PEFT holds them, and its scaling alpha / r."""

    down: nn.Parameter
    up: nn.Parameter
    scaling: float


def read_adapter(layer: nn.Module, name: str) -> tuple[nn.Module, Adapter | None]:
    """The base layer under a PEFT layer and its one active adapter; a bare layer has none.

    Raises:
        IdeoflowError: if the adapter is of a kind that the fused engine does not compute.
    """
    if not hasattr(layer, "base_layer"):
        return layer, None
    active = [key for key in layer.active_adapters if key in getattr(layer, "lora_A", {})]
    wrong = None
    if getattr(layer, "disable_adapters", False):
        return layer.base_layer, None
    if layer.merged:
        wrong = "merged into the base"
    elif len(active) != 1:
        wrong = f"one of {len(active)} active LoRA adapters on this layer"
    elif getattr(layer, "lora_variant", {}).get(active[0]) is not None:
        wrong = "a variant of LoRA (DoRA or another)"
    elif not isinstance(layer.lora_dropout[active[0]], nn.Identity):
        wrong = "one with dropout"
    elif layer.lora_B[active[0]].bias is not None:
        wrong = "one with a bias"
    if wrong:
        fail(UNFUSED_ADAPTER, f"the adapter of {name} is {wrong}",
             cure='use plain LoRA without dropout, or `engine = "reference"`')  # fmt: skip
    key = active[0]
    return layer.base_layer, Adapter(layer.lora_A[key].weight, layer.lora_B[key].weight, layer.scaling[key])


class AdaptedLinear:
    """A group of linear layers with one input, their adapters, and both passes.

    Args:
        layers: (name, module) of each part, PEFT-wrapped or bare.
        dtype: of the activations and of the adapters' working copies.
        exact: with ``fp8``, forward products are in the activations' type; operands come dense.
        joined: whether dx may come as columns of a wider tensor, which saves reading dy once more in FP8.
        fp8, ops, scratch, keep_transposed: as in :class:`FrozenWeight`.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], *, dtype: torch.dtype, fp8: bool,
                 ops: SimpleNamespace, scratch: Scratch, keep_transposed: bool = False,
                 joined: bool = True, exact: bool = False) -> None:  # fmt: skip
        bases, self.adapters = zip(*(read_adapter(layer, name) for name, layer in layers), strict=True)
        self.weight = FrozenWeight(bases, fp8=fp8, ops=ops, scratch=scratch, keep_transposed=keep_transposed)
        self.ops, self.fp8, self.joined, self.parts = ops, fp8, joined, len(bases)
        self.fold = self.weight.fold
        self.rank = max((a.down.shape[0] for a in self.adapters if a), default=0)
        if fp8:
            self.rank = -(-self.rank // 8) * 8  # the FP8 units want multiples of 16, and there are two pieces
        self.unfold = 1 / self.fold.float() if self.fold is not None and self.rank else None
        outputs, inputs = self.weight.shape
        device = self.weight.scratch.take(0, 0, dtype).device
        # Ranks that differ between parts are padded with zero rows and columns, which contribute nothing.
        self.down = torch.zeros(self.parts * self.rank, inputs, dtype=dtype, device=device)
        self.up = torch.zeros(outputs, self.rank, dtype=dtype, device=device)
        self.down_pieces = (
            torch.zeros(2 * self.down.shape[0], inputs, dtype=FP8, device=device),
            torch.ones(2 * self.down.shape[0], dtype=torch.float32, device=device),
        ) if fp8 and not exact else None  # fmt: skip

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Down and up of each adapter, in the order in which :meth:`backward` returns their gradients."""
        return [p for adapter in self.adapters if adapter for p in (adapter.down, adapter.up)]

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        """(working copy, master, factor) of every adapter weight, to be refreshed before a step."""
        result, start = [], 0
        for p, (adapter, width) in enumerate(zip(self.adapters, self.weight.widths, strict=True)):
            if adapter:
                r = adapter.down.shape[0]
                down = self.down[p * self.rank : p * self.rank + r]
                result.append((down, adapter.down, adapter.scaling))
                result.append((self.up[start : start + width, :r], adapter.up, 1.0))
            start += width
        return result

    def forward(self, x: Operand, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y [T, N] and z [T, parts * r]; a z from an earlier call with the same x is used again."""
        y = self.weight.forward(x)
        if self.rank:
            if z is None:
                z = self._down(x)
            self.ops.adapter_up(y, z, self.up, self.parts)
        return y, z

    def backward(self, dy: Operand, x: Operand, z: Tensor | None,
                 input_gradient: bool = True) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """dx [T, K] (None if not asked for) and the adapters' gradients in float32."""
        if not self.rank:
            return (self.weight.backward(dy) if input_gradient else None), []
        dx = None
        if not input_gradient:
            dz = self.ops.adapter_down(dy, self.up, self.parts, self.unfold)
        elif self.fp8 and self.joined:
            dx, dz = self._products(dy)
        else:
            dz = self.ops.adapter_down(dy, self.up, self.parts, self.unfold)
            dx = self.weight.backward(dy)
        dup = self.ops.adapter_gradient(dy, z, self.parts, self.unfold)
        ddown = self.ops.adapter_gradient(x, dz, rank_first=True)
        if dx is not None:
            self.ops.adapter_up(dx, dz, self.down.t())
        gradients, start = [], 0
        for p, (adapter, width) in enumerate(zip(self.adapters, self.weight.widths, strict=True)):
            if adapter:
                r = adapter.down.shape[0]
                piece = ddown[p * self.rank : p * self.rank + r]
                gradients.append(piece * adapter.scaling if adapter.scaling != 1 else piece)
                gradients.append(dup[start : start + width, :r].contiguous())
            start += width
        return dx, gradients

    def _down(self, x: Operand) -> Tensor:
        """z = x A^T [T, parts * r], scaling included."""
        if self.down_pieces is None:
            return self.ops.adapter_down(x, self.down.t())
        high, low = scaled_product(x, *self.down_pieces).chunk(2, 1)
        return high + low

    def _products(self, dy: Operand) -> tuple[Tensor, Tensor]:
        """dy W [T, K], rows apart by more than K, and dz [T, parts * r], from one FP8 product."""

        def write(values: Tensor, scale: Tensor) -> None:
            self.ops.split_precision(self.up, values, scale, self.parts, self.unfold)

        rows, inputs = self.parts * self.rank, self.weight.shape[1]
        both = self.weight.backward_with(dy, 2 * rows, write)
        return both[:, :inputs], both[:, inputs : inputs + rows] + both[:, inputs + rows :]


def lay_together(linears: Sequence[AdaptedLinear]) -> list[tuple[Tensor, tuple[Tensor, Tensor], int]]:
    """Puts the down-projections of one layer of all blocks into one tensor, of which each keeps its view.

    Exact layers have no pieces and keep a tensor of their own.

    Returns:
        (down-projections, their e4m3 pieces and scales, rows of a block): the arguments of the few
        ``split_precision`` launches that bring the pieces up to date; none without FP8 or adapters.
    """
    linears = [linear for linear in linears if linear.down_pieces is not None]
    if not linears:
        return []
    if len({linear.down.shape for linear in linears}) != 1:  # ranks differ between blocks
        return [(x.down, x.down_pieces, x.down.shape[0]) for x in linears if x.rank and x.down_pieces]
    rows, inputs = linears[0].down.shape
    if not rows:
        return []
    down = linears[0].down.new_zeros(len(linears) * rows, inputs)
    values = torch.zeros(2 * len(down), inputs, dtype=FP8, device=down.device)
    scale = torch.ones(2 * len(down), dtype=torch.float32, device=down.device)
    for i, linear in enumerate(linears):
        linear.down = down[i * rows : (i + 1) * rows]
        pieces = slice(2 * i * rows, 2 * (i + 1) * rows)
        linear.down_pieces = (values[pieces], scale[pieces])
    return [(down, (values, scale), rows)]
