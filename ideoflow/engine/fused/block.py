"""One transformer block with its backward pass written out.

Shapes: T tokens, B samples, D hidden, F feed-forward, H heads of size E. The block is, with n RMSNorm,
s and g the modulation of a token's sample (diffusers' ``Ideogram4TransformerBlock``):

    h1  = h  + g_attention * n(W_o attention(rope(n(q)), rope(n(k)), v)),   q, k, v = W_qkv (n(h) * (1 + s))
    out = h1 + g_ffn * n(W_2 (silu(gate) * up)),                       gate, up = W_13 (n(h1) * (1 + s))

A forward pass is a chain of named values; each is computed from those before it by one method of
:class:`_Values`. What the budget keeps stays in the dictionary; what it does not keep is computed again by
the same method when the backward pass asks for it. So there is one definition of the forward pass, and
gradients are the same at every budget.

With ``fp8``, operands of products are e4m3 both ways; in an ``exact`` block those of the forward products are
dense, and only gradients are quantised.

With ``rounded``, some of the kept values are e4m3 with a scale a row while they wait: half the bytes, and
gradients that differ from the exact ones by the rounding (relative 2^-4 a value, unbiased).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ideoflow.engine.fused.attention import Attention
from ideoflow.engine.fused.foreign import ForeignLinear, is_foreign
from ideoflow.engine.fused.linear import AdaptedLinear
from ideoflow.engine.fused.offload import HostStore
from ideoflow.engine.fused.weights import Scratch
from ideoflow.engine.packed import PackedLayout
from ideoflow.kernels.budget import ROUNDED_GROUPS

# The values of each budget group; "z_*" are the adapters' thin products, which are always kept.
_GROUPS = {
    "input": ("input",),
    "attention": ("attended",),
    "ffn_output": ("ffn",),
    "attention_output": ("projected",),
    "qkv": ("qkv",),
    "gate_up": ("gate_up",),
    "elementwise": ("middle", "x_qkv", "x_o", "x_ffn", "x_w2"),
}
_ROUNDED = frozenset(name for group in ROUNDED_GROUPS for name in _GROUPS[group])


class Rounded(NamedTuple):
    """A kept value as e4m3 [T, N] with row scales [T]."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Batch:
    """What all blocks of one step share: the layout, sample of each token, rotary tables [T, E / 2]."""

    layout: PackedLayout
    sample: Tensor
    cos: Tensor
    sin: Tensor


class Modulation(NamedTuple):
    """What a block's four norms multiply by, [B, D]: weight * (1 + scale) in, weight * tanh(gate) out."""

    attention_in: Tensor
    attention_out: Tensor
    ffn_in: Tensor
    ffn_out: Tensor


class FusedBlock:
    """Reads a ``Ideogram4TransformerBlock`` (PEFT-wrapped or bare); holds no parameters of its own."""

    def __init__(self, name: str, block: nn.Module, *, dtype: torch.dtype, fp8: bool, ops: SimpleNamespace,
                 attention: Attention, scratch: Scratch, keep_transposed: bool,
                 rounded: bool = False, exact: bool = False) -> None:  # fmt: skip
        self.fp8, self.fp8_forward = fp8, fp8 and not exact
        self.ops, self.attention, self.rounded = ops, attention, rounded
        self.source = block
        at, ff = block.attention, block.feed_forward
        self.heads, self.size = at.num_heads, at.head_dim

        def group(*layers: tuple[str, nn.Module], joined: bool = True) -> AdaptedLinear:
            named = [(f"{name}.{part}", layer) for part, layer in layers]
            kind = ForeignLinear if any(is_foreign(layer) for _, layer in layers) else AdaptedLinear
            return kind(named, dtype=dtype, fp8=fp8, ops=ops, scratch=scratch,
                                 keep_transposed=keep_transposed, joined=joined, exact=exact)  # fmt: skip

        self.qkv = group(
            ("attention.to_q", at.to_q), ("attention.to_k", at.to_k), ("attention.to_v", at.to_v)
        )
        # Attention's backward pass wants its gradient contiguous.
        self.o = group(("attention.to_out.0", at.to_out[0]), joined=False)
        self.ffn = group(("feed_forward.w1", ff.w1), ("feed_forward.w3", ff.w3))
        self.w2 = group(("feed_forward.w2", ff.w2))
        self.linears = (self.qkv, self.o, self.ffn, self.w2)
        self.parameters = [p for linear in self.linears for p in linear.parameters]
        # Whose gradients autograd is given; nothing of it where a sink takes those of the parameters.
        self.leaves: list[Tensor] = list(self.parameters)
        self.sink: Callable[[list[Tensor]], None] | None = None
        # Told before the weights are read, and which way: where they wait on the host, it brings them here.
        self.enter: Callable[[bool], None] = lambda backward: None

    def forward(self, h: Tensor, batch: Batch, modulation: Modulation, kept: frozenset[str] | None
                ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """The block's output [T, D] and the values to keep; with ``kept`` None, for inference, none."""
        self.enter(False)
        values = _Values(self, h, batch, modulation, {})
        keep = {name for group in kept or () for name in _GROUPS[group]}
        if not self.fp8_forward:
            # It is attention's result itself, which may be on its way to the host.
            keep.discard("x_o")

        def drop(*names: str) -> None:
            for name in names:
                if name not in keep:
                    values.known.pop(name, None)
                elif self.rounded and name in _ROUNDED:
                    values.round(name)

        # Each value is dropped as soon as nothing ahead reads it, so that a block's own peak stays low.
        values["attended"]
        drop("x_qkv", "qkv")
        values["middle"]
        drop("attended", "x_o", "projected")
        values["gate_up"]
        drop("x_ffn")
        values["x_w2"]
        drop("gate_up")
        values["ffn"]
        drop("x_w2")
        out = self.ops.gated_residual(
            values["middle"], values["ffn"], modulation.ffn_out, batch.sample, self.source.ffn_norm2.eps
        )
        drop("middle", "ffn")
        return out, {} if kept is None else values.known

    def backward(self, dout: Tensor, h: Tensor, batch: Batch, modulation: Modulation, known: dict[str, Any],
                 input_gradient: bool) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """dh [T, D] (None if not asked for) and gradients in the order of :attr:`parameters`."""
        self.enter(True)
        ops, block, sample, fp8 = self.ops, self.source, batch.sample, self.fp8
        values = _Values(self, h, batch, modulation, known)
        dffn = ops.gated_residual_backward(
            dout, values["ffn"], modulation.ffn_out, sample, block.ffn_norm2.eps, self.w2.fold, fp8
        )
        values.drop("ffn")
        dinner, d_w2 = self.w2.backward(dffn, values["x_w2"], known.pop("z_w2", None))
        del dffn
        values.drop("x_w2")
        dgate_up = ops.swiglu_backward(dinner, values["gate_up"], self.ffn.fold, fp8)
        del dinner
        values.drop("gate_up")
        dx, d_ffn = self.ffn.backward(dgate_up, values["x_ffn"], known.pop("z_ffn", None))
        del dgate_up
        values.drop("x_ffn")
        dmiddle = ops.norm_modulate_backward(
            dx, values["middle"], modulation.ffn_in, sample, block.ffn_norm1.eps, dout
        )
        del dx, dout
        values.drop("middle")
        dprojected = ops.gated_residual_backward(
            dmiddle, values["projected"], modulation.attention_out, sample, block.attention_norm2.eps,
            self.o.fold, fp8,
        )  # fmt: skip
        values.drop("projected")
        dattended, d_o = self.o.backward(dprojected, values["x_o"], known.pop("z_o", None))
        del dprojected
        values.drop("x_o")
        qkv, inverse = values["qkv"]
        dq, dk, dv = self.attention.backward(
            dattended.view(-1, self.heads, self.size), qkv, *values["attended"], batch.layout
        )
        del dattended
        values.drop("attended", "qkv")
        dqkv = ops.qk_norm_rope_backward(
            dq, dk, dv, qkv, inverse, block.attention.norm_q.weight, block.attention.norm_k.weight, batch.cos,
            batch.sin, self.qkv.fold, fp8,
        )  # fmt: skip
        del dq, dk, dv, qkv
        dx, d_qkv = self.qkv.backward(dqkv, values["x_qkv"], known.pop("z_qkv", None), input_gradient)
        gradients = [*d_qkv, *d_o, *d_ffn, *d_w2]
        if dx is None:
            return None, gradients
        dh = ops.norm_modulate_backward(
            dx, h, modulation.attention_in, sample, block.attention_norm1.eps, dmiddle
        )
        return dh, gradients


class _Values:
    """The named values of one block's forward pass, each computed when first asked for."""

    def __init__(self, block: FusedBlock, h: Tensor, batch: Batch, modulation: Modulation,
                 known: dict[str, Any]) -> None:  # fmt: skip
        self.block, self.h, self.batch, self.modulation, self.known = block, h, batch, modulation, known

    def __getitem__(self, name: str) -> Any:
        if name not in self.known:
            self.known[name] = getattr(self, f"_{name}")()
        value = self.known[name]
        if isinstance(value, Rounded):
            value = self.block.ops.dequantize(value.values, value.scale, self.h.dtype)
            self.known[name] = value
        return value

    def round(self, name: str) -> None:
        """Keeps a value that is known as e4m3, from here to the backward pass."""
        self.known[name] = Rounded(*self.block.ops.quantize(self.known[name]))

    def drop(self, *names: str) -> None:
        for name in names:
            self.known.pop(name, None)

    def _linear(self, name: str, linear: AdaptedLinear) -> Tensor:
        y, z = linear.forward(self[f"x_{name}"], self.known.get(f"z_{name}"))
        if z is not None:
            self.known[f"z_{name}"] = z
        return y

    def _normed(self, h: Tensor, factor: Tensor, eps: float) -> Any:
        return self.block.ops.norm_modulate(h, factor, self.batch.sample, eps, self.block.fp8_forward)

    def _x_qkv(self) -> Any:
        return self._normed(self.h, self.modulation.attention_in, self.block.source.attention_norm1.eps)

    def _qkv(self) -> Any:
        attention = self.block.source.attention
        qkv = self._linear("qkv", self.block.qkv).view(-1, 3, self.block.heads, self.block.size)
        inverse = self.block.ops.qk_norm_rope(
            qkv, attention.norm_q.weight, attention.norm_k.weight, self.batch.cos, self.batch.sin,
            attention.norm_q.eps,
        )  # fmt: skip
        return qkv, inverse

    def _attended(self) -> Any:
        return self.block.attention.forward(self["qkv"][0], self.batch.layout)

    def _x_o(self) -> Any:
        return self.block.ops.quantize(self["attended"][0].flatten(1), self.block.fp8_forward)

    def _projected(self) -> Any:
        return self._linear("o", self.block.o)

    def _middle(self) -> Any:
        return self.block.ops.gated_residual(
            self.h, self["projected"], self.modulation.attention_out, self.batch.sample,
            self.block.source.attention_norm2.eps,
        )  # fmt: skip

    def _x_ffn(self) -> Any:
        return self._normed(self["middle"], self.modulation.ffn_in, self.block.source.ffn_norm1.eps)

    def _gate_up(self) -> Any:
        return self._linear("ffn", self.block.ffn)

    def _x_w2(self) -> Any:
        return self.block.ops.swiglu(self["gate_up"], self.block.fp8_forward)

    def _ffn(self) -> Any:
        return self._linear("w2", self.block.w2)


@dataclass(frozen=True)
class Keeping:
    """What one block keeps: groups on the device, groups on the host, and the store of the latter."""

    index: int
    device: frozenset[str]
    host: frozenset[str]
    store: HostStore | None

    def part(self, values: dict[str, Any]) -> dict[str, Any]:
        """Moves the big tensor of each host value out of ``values``; returns what stays on the device."""
        if self.store is None:
            return values
        leaving, staying = {}, {}
        for name, value in values.items():
            if name not in {n for group in self.host for n in _GROUPS[group]}:
                staying[name] = value
            elif isinstance(value, Rounded):
                leaving[name], staying[name] = value.values, value._replace(values=None)
            elif isinstance(value, tuple):
                leaving[name], staying[name] = value[0], (None, *value[1:])
            else:
                leaving[name], staying[name] = value, None
        self.store.put(self.index, leaving)
        return staying

    def join(self, values: dict[str, Any]) -> dict[str, Any]:
        """The reverse; the block before starts on its way in as well."""
        if self.store is None:
            return values
        back = self.store.take(self.index)
        self.store.start(self.index - 1)
        for name, tensor in back.items():
            old = values[name]
            if isinstance(old, Rounded):
                values[name] = old._replace(values=tensor)
            else:
                values[name] = tensor if old is None else (tensor, *old[1:])
        return values


class BlockFunction(torch.autograd.Function):
    """The autograd node of one block: apply(h, block, batch, modulation, keeping, *block.leaves)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, block: FusedBlock, batch: Batch, modulation: Modulation,
                keeping: Keeping, *leaves: Tensor) -> Tensor:  # fmt: skip
        out, known = block.forward(h, batch, modulation, keeping.device | keeping.host)
        ctx.known = keeping.part({"input": h, **known})
        ctx.block, ctx.batch, ctx.modulation, ctx.keeping = block, batch, modulation, keeping
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        if ctx.known is None:
            raise RuntimeError("a fused block's backward pass runs once: it frees what it kept")
        known, ctx.known = ctx.keeping.join(ctx.known), None
        h = known.pop("input")
        dh, gradients = ctx.block.backward(dout.contiguous(), h, ctx.batch, ctx.modulation, known,
                                           ctx.needs_input_grad[0])  # fmt: skip
        if ctx.block.sink is not None:
            ctx.block.sink(gradients)
            gradients = [None] * len(ctx.block.leaves)
        return dh, None, None, None, None, *gradients
