"""Frozen weights of one or several linear layers that share their input, and the two products with them.

A step multiplies with each weight twice, never differentiating it: forward by W^T, backward by W. The storage
(dense, e4m3 or int8 with row scales, 4-bit) and the precision of the product (FP8 or the activations' own
type) are independent; what does not fit together is a diagnostic. Layers that share an input (q, k, v; w1,
w3) are laid into one matrix, and the modules' own weights become views of it: no second copy, same names and
files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import UNFUSED_BASE
from ideoflow.kernels.float8 import Float8Linear, Int8Linear
from ideoflow.kernels.reference import FP8, Operand


class Scratch:
    """One buffer, grown to the largest request, that products dequantise or transpose weights into.

    Each use overwrites the last; that is safe because all work runs in order on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = rows * columns * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8, device=self._bytes.device)  # free before growing
            self._bytes = torch.empty(size, dtype=torch.uint8, device=self._bytes.device)
        return self._bytes[:size].view(dtype).view(rows, columns)


class FrozenWeight:
    """The weight [N, K] of a group of layers.

    Args:
        layers: the base layers, outputs in this order.
        fp8: multiply in FP8, backward always and forward where operands are quantised; the weights must be
            e4m3. Forward products with dense operands read the weight dequantised, as all do without ``fp8``.
        ops: kernels, from :func:`ideoflow.kernels.load`.
        scratch: shared work memory.
        keep_transposed: keep a transposed copy of e4m3 weights (as large again), not make it each time.

    Attributes:
        fold: bf16 [N], to be multiplied into the output gradient before :meth:`backward`; None if nothing is.
            Every row of the gradient reads it, so half the bytes of float32 count, and its rounding, 2^-9, is
            an eighth of the quantisation that follows.

    Raises:
        IdeoflowError: for weights of a kind, or a mixture of kinds, that is not supported.
    """

    def __init__(self, layers: Sequence[nn.Module], *, fp8: bool, ops: SimpleNamespace, scratch: Scratch,
                 keep_transposed: bool = False) -> None:  # fmt: skip
        self.ops, self.scratch, self.fp8, self.keep_transposed = ops, scratch, fp8, keep_transposed
        self.widths = [int(layer.out_features) for layer in layers]
        self.shape = (sum(self.widths), int(layers[0].in_features))
        self.scale: Tensor | None = None
        self.fold: Tensor | None = None
        self._transposed: Tensor | None = None
        self._row_scales: Tensor | None = None
        self._packed: list[Any] = []
        self._layers = list(layers)
        kinds = {_kind(layer) for layer in layers}
        if len(kinds) > 1:
            fail(UNFUSED_BASE, f"layers that share one product are stored as {', '.join(sorted(kinds))}",
                 cure="store q, k and v, and w1 and w3, alike")  # fmt: skip
        self.kind = kinds.pop()
        if fp8 and self.kind != "fp8":
            fail(UNFUSED_BASE, f"FP8 products were asked for but the base is stored as {self.kind}",
                 cure="quantise the base to FP8 first, or multiply in bf16")  # fmt: skip
        if self.kind == "nf4":
            self._packed = [layer.weight for layer in layers]
            return
        self.move(_joined([layer.weight.detach() for layer in layers]))
        if self.kind in ("fp8", "int8"):
            scale = torch.cat([layer.weight_scale.float() for layer in layers])
            self.scale = torch.where(scale > 0, scale, 1.0)
            if fp8:
                self.fold = self.scale.bfloat16()

    def move(self, values: Tensor) -> None:
        """Computes with these values [N, K] from now on; the modules' weights become views of them."""
        self.values = values
        for layer, piece in zip(self._layers, values.split(self.widths), strict=True):
            layer.weight.data = piece

    @property
    def cells(self) -> list[tuple[Tensor, Callable[[Tensor], None]]]:
        """The large tensors, and what puts a copy that lies elsewhere in place of each."""
        if self.kind == "nf4":
            return [(weight.data, partial(setattr, weight, "data")) for weight in self._packed]
        return [(self.values, self.move)]

    def forward(self, x: Operand) -> Tensor:
        """x [T, K] times the weight's transpose: [T, N]."""
        if x.scale is not None:
            return scaled_product(x, self.values, self.scale)
        return x.values @ self._dense(x.values.dtype).t()

    def backward(self, dy: Operand) -> Tensor:
        """dy [T, N] (with :attr:`fold` in it) times the weight: [T, K]."""
        if not self.fp8:
            return dy.values @ self._dense(dy.values.dtype)
        return scaled_product(dy, self._transposed_weight(self.shape[1]), None)

    def backward_with(self, dy: Operand, rows: int, write: Callable[[Tensor, Tensor], None]) -> Tensor:
        """FP8 only: :meth:`backward` with ``rows`` more outputs, [T, K + rows], in the same product.

        ``write(values, scale)`` fills the transposed weight's further rows: e4m3 [rows, N], float32 [rows].
        """
        inputs = self.shape[1]
        if self._row_scales is None or self._row_scales.numel() != inputs + rows:
            self._row_scales = torch.ones(inputs + rows, dtype=torch.float32, device=self.values.device)
        extended = self._transposed_weight(inputs + rows)
        write(extended[inputs:], self._row_scales[inputs:])
        return scaled_product(dy, extended, self._row_scales)

    def _transposed_weight(self, rows: int) -> Tensor:
        """[rows, N], of which the first K hold the transposed weight."""
        outputs, inputs = self.shape
        if not self.keep_transposed:
            result = self.scratch.take(rows, outputs, FP8)
            self.ops.transpose(self.values, result[:inputs])
            return result
        if self._transposed is None or self._transposed.shape[0] < rows:
            self._transposed = torch.empty(rows, outputs, dtype=FP8, device=self.values.device)
            self.ops.transpose(self.values, self._transposed[:inputs])
        return self._transposed[:rows]

    def _dense(self, dtype: torch.dtype) -> Tensor:
        if self.kind == "dense":
            return self.values
        out = self.scratch.take(*self.shape, dtype)
        if self.kind in ("fp8", "int8"):
            return self.ops.dequantize(self.values, self.scale, dtype, out)
        from bitsandbytes.functional import dequantize_4bit

        for weight, piece in zip(self._packed, out.split(self.widths), strict=True):
            if weight.quant_state.dtype == dtype and piece.is_cuda:  # bitsandbytes writes in place there only
                dequantize_4bit(weight.data, weight.quant_state, out=piece)
            else:
                piece.copy_(dequantize_4bit(weight.data, weight.quant_state))
        return out


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """One matrix of all rows: the same memory where they already lie one after the other, else a copy."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and weight.is_contiguous() and weight.data_ptr() == end):
            return torch.cat(list(weights))
        end += weight.nbytes
    rows = sum(weight.shape[0] for weight in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, Float8Linear):
        return "fp8"
    if isinstance(layer, Int8Linear):
        return "int8"
    if type(layer) is nn.Linear and layer.weight.dtype.is_floating_point and layer.weight.dtype.itemsize > 1:
        if layer.bias is not None:
            fail(UNFUSED_BASE, "a block's linear layer has a bias", cure="use the reference engine")
        return "dense"
    if any(kind.__name__ == "Linear4bit" for kind in type(layer).__mro__):  # bitsandbytes is not imported
        return "nf4"
    fail(UNFUSED_BASE, f"a block's linear layer is a {type(layer).__name__} of {layer.weight.dtype}",
         cure="use a bf16, FP8, int8 or NF4 base, or the reference engine")  # fmt: skip


def scaled_product(x: Operand, weight: Tensor, scale: Tensor | None) -> Tensor:
    """e4m3 x [T, K] times e4m3 weight [N, K] transposed, row scales on both: bf16 [T, N]."""
    if scale is None:
        scale = torch.ones((), dtype=torch.float32, device=weight.device).expand(weight.shape[0])
    return torch._scaled_mm(
        x.values, weight.t(), scale_a=x.scale[:, None], scale_b=scale.contiguous()[None, :],
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip
