"""Frozen linear layers with 8-bit weights and a float32 scale a row: e4m3, as FP8 checkpoints have it; int8.

The module keeps names and files (``weight``, ``weight_scale``) and runs anywhere by dequantising; the fused
engine reads its two tensors and never calls it.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ideoflow.kernels.reference import FP8, FP8_MAX

_HAS_TRITON = find_spec("triton") is not None  # there is none for some systems that have CUDA


class _DequantisedLinear(torch.autograd.Function):
    """x @ (weight * scale)^T whose backward pass keeps no dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        # An alias, since an offloaded parameter's own memory is elsewhere by the time of the backward pass.
        ctx.save_for_backward(weight.detach(), scale)
        return functional.linear(x, _dense(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            return grad @ _dense(weight, scale, grad.dtype), None, None, None
        # The compiler keeps a product's operand that the forward pass has made already, two bytes for every
        # number. So the gradient's columns take the scales, and the weight is cast, which is exact, to a type
        # that no forward pass casts it to.
        scaled = torch.mul(grad, scale, out=torch.empty_like(grad))  # computed in float32
        return scaled @ weight.to(grad.dtype), None, None, None


def _dense(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * scale, multiplied in float32 and rounded once: 8-bit values are exact in ``dtype``.

    PyTorch's eager kernels for it, which mix types, reach a quarter of an H200's memory bandwidth and take
    eight times as long as the one of :mod:`ideoflow.kernels.quantize`. The compiler makes its own.
    """
    if torch.compiler.is_compiling():
        # Not the cast of the backward pass, which the compiler would keep.
        wide = torch.float16 if dtype == torch.float32 else torch.float32
        return (weight.to(wide) * scale[:, None]).to(dtype)
    if weight.is_cuda and _HAS_TRITON:
        from ideoflow.kernels.quantize import dequantize

        with torch.cuda.device_of(weight):  # Triton launches on the current device
            return dequantize(weight, scale, dtype)
    return weight.to(dtype).mul_(scale[:, None])


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as e4m3 values and row scales [N]; a row of zeros gets the scale 1."""
    scale = weight.float().abs().amax(1) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as integers from -127 to 127 and row scales [N]; a row of zeros gets the scale 1."""
    scale = weight.float().abs().amax(1) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class ScaledLinear(nn.Linear):
    """A frozen ``nn.Linear`` [K -> N] stored as 8-bit values [N, K] and float32 row scales [N].

    It is a subclass so that PEFT adapts it like any linear layer. ``weight`` needs no gradient; the bias, if
    there is one, keeps its own type. Subclasses say how a number is stored and how it is rounded.
    """

    storage: torch.dtype
    weight_scale: Tensor
    # PEFT makes adapters in this type (it asks bitsandbytes' layers for it), and not in the weight's e4m3.
    compute_dtype = torch.float32

    @property
    def W_q(self) -> Tensor:
        """PEFT takes a module with this name for quantised, and asks :meth:`dequantize` for its weight."""
        return self.weight

    def dequantize(self) -> Tensor:
        """The weight [N, K], float32."""
        return _dense(self.weight.detach(), self.weight_scale, torch.float32)

    def __init__(self, in_features: int, out_features: int, bias: bool = False,
                 device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias=bias, device="meta", dtype=dtype)
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=self.storage, device=device), requires_grad=False
        )
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=dtype, device=device), requires_grad=False
            )

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """A weight [N, K] as values and row scales [N]; each row for itself."""
        raise TypeError("a subclass says how numbers are rounded")

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """A dense layer, quantised row by row."""
        result = cls(linear.in_features, linear.out_features, linear.bias is not None,
                     linear.weight.device, linear.weight.dtype)  # fmt: skip
        values, scale = cls.quantize(linear.weight.detach())
        result.weight.data, result.weight_scale = values, scale
        if linear.bias is not None:
            result.bias.data = linear.bias.detach()
        return result

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _DequantisedLinear.apply(x, self.weight, self.weight_scale, self.bias)
        return result


class Float8Linear(ScaledLinear):
    """Stored as e4m3: the relative error of a weight is at most 2^-4."""

    storage = FP8
    quantize = staticmethod(quantize_weight)


class Int8Linear(ScaledLinear):
    """Stored as int8: the error of a weight is at most 2^-8 of the largest in its row.

    For normally distributed rows that is a third of e4m3's error at the same size; there are no products in
    it, so weights are dequantised for each. torchao's weight-only int8 tensors were rejected: PEFT wraps them
    in a layer of its own, they cannot be filled row by row, and the fused engine would have to unwrap them.
    """

    storage = torch.int8
    quantize = staticmethod(quantize_int8)


def quantize_blocks(transformer: nn.Module) -> int:
    """Replaces each dense linear layer inside ``transformer.layers`` by a :class:`Float8Linear`, one by one.

    Call it before adapters are injected. Returns how many layers were replaced.
    """
    count = 0
    for parent in transformer.layers.modules():
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Float8Linear.of(child))
                count += 1
    return count
