"""Linears in bitsandbytes' NF4 (Dettmers et al. 2023, QLoRA), made without a dense copy of the whole weight.

Numbers are rounded in blocks of 64 to 16 quantiles of a normal distribution; the blocks' scales are rounded
again, to 8 bits in blocks of 256 ("double quantisation"). Importing bitsandbytes takes seconds, so this
module is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

_BLOCK, _NESTED = 64, 256


def packed_pieces(
    pieces: Iterable[tuple[slice, Tensor]], shape: torch.Size, device: torch.device
) -> tuple[Tensor, QuantState]:
    """Codes on ``device`` [numbers / 2, 1] and their state, of a weight that comes by runs of rows.

    The same bytes as ``quantize_4bit`` of the whole: its blocks run along the rows, whose length must be a
    multiple of 64, and the scales are rounded together at the end.
    """
    packed, scales, code = [], [], None
    dtype = torch.bfloat16
    for _, piece in pieces:
        codes, state = quantize_4bit(piece, blocksize=_BLOCK, quant_type="nf4", compress_statistics=False)
        packed.append(codes.to(device))
        scales.append(state.absmax)
        code, dtype = state.code, piece.dtype
    absmax = torch.cat(scales)
    offset = absmax.mean()
    rounded, nested = quantize_blockwise(absmax - offset, blocksize=_NESTED)
    whole = QuantState(
        absmax=rounded, shape=shape, dtype=dtype, blocksize=_BLOCK, code=code, quant_type="nf4",
        offset=offset, state2=nested,
    )  # fmt: skip
    whole.to(device)
    return torch.cat(packed) if len(packed) > 1 else packed[0], whole


def stored_state(sides: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> QuantState:
    """The state that a checkpoint holds beside a weight; its numbers will be looked up as ``dtype``."""
    state = QuantState.from_dict({f"weight.{side}": value for side, value in sides.items()}, device=device)
    state.dtype = dtype
    return state


class _Product(torch.autograd.Function):
    """bitsandbytes' product, with its codes among what autograd saves.

    bitsandbytes keeps them as an attribute, where checkpointing does not find them: of blocks whose weights
    are offloaded, the forward pass's copies would all stay on the device until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
        # An alias, since an offloaded parameter's own memory is elsewhere by the time of the backward pass.
        ctx.save_for_backward(codes.detach())
        ctx.state = state
        product: Tensor = matmul_4bit(x, codes, quant_state=state, bias=bias)
        return product

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (codes,) = ctx.saved_tensors
        return grad @ dequantize_4bit(codes, ctx.state).to(grad.dtype), None, None, None


class FrozenLinear4bit(Linear4bit):
    """A frozen ``nn.Linear`` [K -> N] of NF4 codes [N K / 2, 1], computed in the type of its state."""

    def forward(self, x: Tensor) -> Tensor:
        state = self.weight.quant_state
        return _Product.apply(x.to(state.dtype), self.weight, state, self.bias).to(x.dtype)  # type: ignore[no-any-return]


def linear_4bit(empty: nn.Linear, packed: Tensor, state: QuantState) -> FrozenLinear4bit:
    """A frozen layer of these codes, with the bias of ``empty``."""
    bias = empty.bias is not None
    layer = FrozenLinear4bit(
        empty.in_features, empty.out_features, bias, compute_dtype=state.dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    layer.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=state.blocksize, quant_type="nf4",
        compress_statistics=state.nested, module=layer, bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
    layer.bias = empty.bias
    # Its CPU kernel would repack the weight in place for inference, and training reads the plain order.
    layer.support_avx512bf16_for_cpu = False
    return layer
