"""Frozen products whose adapters PEFT computes: DoRA, LoKr and LoHa.

The frozen product is the fused one, forward and backward. The adapter's own part is a function of the input
(and for DoRA of the frozen result), written by PEFT and differentiated by autograd; it is evaluated again in
the backward pass, so nothing of it is kept. With y0 = x W^T and a part f:

    LoKr, LoHa   y = y0 + x D^T                 D [n, K] is the dense update that PEFT makes
    DoRA         y = y0 + f(x, y0)              df/dy0 = s - 1, with s the rows' lengths over their norms

    dx = (dy + dy0) W + df/dx                   dy0 = df/dy0 dy, zero for LoKr and LoHa

In FP8 the part reads the same x and dy as the frozen product: quantised, or x dense where the forward
products are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import UNFUSED_ADAPTER
from ideoflow.engine.fused.linear import AdaptedLinear
from ideoflow.engine.fused.weights import Scratch
from ideoflow.kernels.reference import Operand


def is_foreign(layer: nn.Module) -> bool:
    """Whether a PEFT layer has an active adapter of a kind that is computed here."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return False
    if isinstance(layer, LoraLayer):
        return any(layer.lora_variant.get(key) is not None for key in layer.active_adapters)
    return isinstance(layer, LoKrLayer | LoHaLayer)


def _check(layer: nn.Module, name: str) -> None:
    """Refuses what is neither bare nor one adapter of a foreign kind without dropout."""
    wrong = None
    if hasattr(layer, "base_layer") and not is_foreign(layer):
        wrong = "of another kind than that of a Linear with the same input"
    elif hasattr(layer, "base_layer"):
        active = list(layer.active_adapters)
        if len(active) != 1:
            wrong = f"one of {len(active)} active adapters on this layer"
        elif isinstance(layer, LoraLayer):
            if active[0] not in layer.lora_magnitude_vector:
                wrong = "a variant of LoRA other than DoRA"
            elif not isinstance(layer.lora_dropout[active[0]], nn.Identity):
                wrong = "one with dropout"
        elif layer.rank_dropout[active[0]] or layer.module_dropout[active[0]]:
            wrong = "one with dropout"
    if wrong:
        fail(UNFUSED_ADAPTER, f"the adapter of {name} is {wrong}",
             cure='use one kind of adapter without dropout, or `engine = "reference"`')  # fmt: skip


class ForeignLinear(AdaptedLinear):
    """As :class:`AdaptedLinear`, with adapters that PEFT computes (one for each layer, or none)."""

    def __init__(self, layers: Sequence[tuple[str, nn.Module]], *, dtype: torch.dtype, fp8: bool,
                 ops: SimpleNamespace, scratch: Scratch, keep_transposed: bool = False,
                 joined: bool = True, exact: bool = False) -> None:  # fmt: skip
        for name, layer in layers:
            _check(layer, name)
        bases = [(name, layer.base_layer if is_foreign(layer) else layer) for name, layer in layers]
        super().__init__(bases, dtype=dtype, fp8=fp8, ops=ops, scratch=scratch,
                         keep_transposed=keep_transposed, joined=joined, exact=exact)  # fmt: skip
        self.layers = [layer if is_foreign(layer) else None for _, layer in layers]
        self.dtype = dtype
        self.unfold = 1 / self.fold.float() if self.fold is not None else None
        trained = [p for layer in self.layers if layer for p in layer.parameters() if p.requires_grad]
        self._trained = list(dict.fromkeys(trained))  # a factor that q, k and v share is there once

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, in the order in which :meth:`backward` returns their gradients."""
        return self._trained

    def copies(self) -> list[tuple[Tensor, Tensor, float]]:
        """None: PEFT reads the masters."""
        return []

    def forward(self, x: Operand, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """y [T, N]; nothing to be used again."""
        y = self.weight.forward(x)
        dense = x.dense(self.dtype)
        with torch.no_grad():
            for layer, rows in self._rows():
                y[:, rows] += _own(layer, dense, y[:, rows]).to(y.dtype)
        return y, None

    def backward(self, dy: Operand, x: Operand, z: Tensor | None,
                 input_gradient: bool = True) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """dx [T, K] (None if not asked for) and the adapters' gradients in float32."""
        scaled = any(isinstance(layer, LoraLayer) for layer in self.layers)
        upstream = dy.dense(torch.float32 if scaled else self.dtype)
        if self.unfold is not None:
            upstream = upstream * self.unfold.to(upstream.dtype)
        elif scaled and upstream is dy.values:
            upstream = upstream.clone()  # what flows into the frozen product is added in place
        frozen = self.weight.forward(x) if scaled else None
        inputs = x.dense(self.dtype).detach().requires_grad_(input_gradient)
        found: dict[nn.Parameter, Tensor] = {}
        dx = torch.zeros_like(inputs) if input_gradient else None
        for layer, rows in self._rows():
            own = [p for p in layer.parameters() if p.requires_grad]
            y0 = frozen[:, rows].detach().requires_grad_() if frozen is not None else None
            wanted = [*own, *([inputs] if input_gradient else []), *([y0] if y0 is not None else [])]
            with torch.enable_grad():
                part = _own(layer, inputs, y0)
            gradients = list(torch.autograd.grad(part, wanted, upstream[:, rows].to(part.dtype)))
            if y0 is not None:
                upstream[:, rows] += gradients.pop()
            if dx is not None:
                dx += gradients.pop()
            for parameter, gradient in zip(own, gradients, strict=True):
                known = found.get(parameter)
                found[parameter] = gradient if known is None else known + gradient
        if dx is not None:
            if scaled:
                folded = upstream if self.fold is None else upstream * self.fold
                dy = self.ops.quantize(folded.to(self.dtype).contiguous(), self.fp8)
            dx += self.weight.backward(dy)
        return dx, [found[p] for p in self._trained]

    def _rows(self) -> Iterator[tuple[nn.Module, slice]]:
        """Each adapted layer with its rows of the outputs."""
        start = 0
        for layer, width in zip(self.layers, self.weight.widths, strict=True):
            if layer is not None:
                yield layer, slice(start, start + width)
            start += width


def _own(layer: nn.Module, x: Tensor, y0: Tensor | None) -> Tensor:
    """What a layer's adapter adds to its frozen result ``y0``: [T, n]."""
    (key,) = layer.active_adapters
    if not isinstance(layer, LoraLayer):
        # PEFT would multiply in the adapter's float32, at a fifteenth of the speed.
        return functional.linear(x, layer.get_delta_weight(key).to(x.dtype))
    down, up, wide = layer.lora_A[key], layer.lora_B[key], x.to(layer.lora_A[key].weight.dtype)
    return layer.lora_magnitude_vector[key](
        wide, lora_A=down, lora_B=up, scaling=layer.scaling[key], base_layer=layer.get_base_layer(),
        base_result=y0, adapter_name=key,
    )  # fmt: skip
