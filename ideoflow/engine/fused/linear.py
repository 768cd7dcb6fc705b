"""A frozen product with its low-rank adapters (LoRA: Hu et al. 2021), forward and backward written out.

For parts p that share the input x (q, k, v; w1, w3) with adapters A_p [r, K], B_p [n_p, r] and scalings s_p:

    z_p = s_p x A_p^T           one product with all A_p stacked
    y_p = x W_p^T + z_p B_p^T
    dz_p = dy_p B_p             dB_p = dy_p^T z_p             dA_p = s_p dz_p^T x
    dx = dy W + sum over p of dz_p s_p A_p

The adapters learn in float32; working copies in the activations' type are refreshed once a step. In FP8 the
adapter reads the same quantised x and dy as the frozen product: half the bytes, and nothing else to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import UNFUSED_ADAPTER
from ideoflow.engine.fused.weights import FrozenWeight, Scratch
from ideoflow.kernels.reference import Operand


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
        fp8, ops, scratch, keep_transposed: as in :class:`FrozenWeight`.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], *, dtype: torch.dtype, fp8: bool,
                 ops: SimpleNamespace, scratch: Scratch, keep_transposed: bool = False) -> None:  # fmt: skip
        bases, self.adapters = zip(*(read_adapter(layer, name) for name, layer in layers), strict=True)
        self.weight = FrozenWeight(bases, fp8=fp8, ops=ops, scratch=scratch, keep_transposed=keep_transposed)
        self.ops, self.fp8, self.fold, self.parts = ops, fp8, self.weight.fold, len(bases)
        self.rank = max((a.down.shape[0] for a in self.adapters if a), default=0)
        self.unfold = 1 / self.fold.float() if self.fold is not None and self.rank else None
        outputs, inputs = self.weight.shape
        device = self.weight.scratch.take(0, 0, dtype).device
        # Ranks that differ between parts are padded with zero rows and columns, which contribute nothing.
        self.down = torch.zeros(self.parts * self.rank, inputs, dtype=dtype, device=device)
        self.up = torch.zeros(outputs, self.rank, dtype=dtype, device=device)

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
                z = self.ops.adapter_down(x, self.down.t())
            _add_product(y, z, self.up, self.parts)
        return y, z

    def backward(self, dy: Operand, x: Operand, z: Tensor | None,
                 input_gradient: bool = True) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """dx [T, K] (None if not asked for) and the adapters' gradients in float32."""
        if not self.rank:
            return (self.weight.backward(dy) if input_gradient else None), []
        dz = self.ops.adapter_down(dy, self.up, self.parts, self.unfold)
        dup = self.ops.adapter_gradient(dy, z, self.parts, self.unfold)
        ddown = self.ops.adapter_gradient(x, dz, rank_first=True)
        gradients, start = [], 0
        for p, (adapter, width) in enumerate(zip(self.adapters, self.weight.widths, strict=True)):
            if adapter:
                r = adapter.down.shape[0]
                piece = ddown[p * self.rank : p * self.rank + r]
                gradients.append(piece * adapter.scaling if adapter.scaling != 1 else piece)
                gradients.append(dup[start : start + width, :r])
            start += width
        if not input_gradient:
            return None, gradients
        return self.weight.backward(dy).addmm_(dz, self.down), gradients


def _add_product(y: Tensor, z: Tensor, up: Tensor, parts: int) -> None:
    """y_p += z_p up_p^T in place, for parts of equal width side by side in y [T, N], one under another in up."""
    if parts == 1:
        y.addmm_(z, up.t())
        return
    tokens, outputs = y.shape
    y.view(tokens, parts, outputs // parts).transpose(0, 1).baddbmm_(
        z.view(tokens, parts, -1).transpose(0, 1), up.view(parts, outputs // parts, -1).transpose(1, 2)
    )
