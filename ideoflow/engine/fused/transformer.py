"""The fused transformer: diffusers' modules and PEFT's adapters, computed on packed tokens.

``FusedTransformer`` owns no weights. It reads ``Ideogram4Transformer2DModel`` after adapters were injected,
so names, files and gradients stay where diffusers and PEFT put them. What is frozen and depends on shapes
alone (rotary tables) is kept per layout; modulations, also frozen, are computed once a step for all blocks.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial

import torch
from diffusers.models.transformers.transformer_ideogram4 import (
    Ideogram4Transformer2DModel,
    _sinusoidal_embedding,
)
from torch import Tensor, nn
from torch.nn import functional

from ideoflow import kernels
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import NO_FP8_UNITS, TRITON_MISSING, UNFUSED_ADAPTER
from ideoflow.engine.fused.attention import Kernel, make_attention
from ideoflow.engine.fused.block import Batch, BlockFunction, FusedBlock, Keeping, Modulation
from ideoflow.engine.fused.linear import lay_together
from ideoflow.engine.fused.offload import HostStore
from ideoflow.engine.fused.weights import Scratch
from ideoflow.engine.masters import HostMasters, write_copies
from ideoflow.engine.offload import HostMemory, Shards, WeightStream
from ideoflow.engine.packed import PackedLayout
from ideoflow.kernels.budget import HOST_GROUPS, choose_kept, group_bytes
from ideoflow.kernels.float8 import Float8Linear

# Rotary tables, 2.3 MB for 4416 tokens in bf16. Samples come back to theirs 20 times; batches seldom do, but
# for those of one length.
_TABLES_KEPT = 4


class FusedTransformer:
    """Velocities of packed batches, differentiable for the adapters.

    Args:
        transformer: the frozen base on its device, with adapters (if any) injected by PEFT.
        linear: "fp8" multiplies in FP8 both ways and needs ``Float8Linear`` blocks; "bf16" multiplies in the
            activations' own type, whatever the base is stored as.
        exact_blocks: of the first so many blocks, whose errors go through all the others, forward products
            are in the activations' own type; only with ``linear = "fp8"``.
        attention: "flash4" (the fastest; needs ``flash-attn-4``), "cudnn_varlen" (mixed lengths at full
            speed; needs ``nvidia-cudnn-frontend``) or "sdpa".
        activation_budget: 0 recomputes every block in the backward pass, 1 recomputes nothing.
        offload: groups of values (:data:`~ideoflow.kernels.budget.HOST_GROUPS`) that every block keeps
            in pinned host memory; the budget is about the rest.
        rounded: keep :data:`~ideoflow.kernels.budget.ROUNDED_GROUPS` as e4m3: half the bytes, for gradients
            that differ by that rounding.
        dtype: of the activations; bf16 in training.
        keep_transposed: in FP8, keep a second, transposed copy of the weights instead of making it as needed.

    Raises:
        IdeoflowError: if the base, an adapter or the device is not covered. Nothing falls back in silence.
    """

    def __init__(self, transformer: Ideogram4Transformer2DModel, *, linear: str = "fp8",
                 attention: Kernel = "flash4", activation_budget: float = 1.0,
                 offload: Collection[str] = (), rounded: bool = False, exact_blocks: int = 0,
                 dtype: torch.dtype = torch.bfloat16, keep_transposed: bool = False) -> None:  # fmt: skip
        self.model, self.dtype, self.budget = transformer, dtype, activation_budget
        self.offload, self.rounded = frozenset(offload), rounded
        if not self.offload <= set(HOST_GROUPS):
            raise ValueError(f"offload takes {', '.join(HOST_GROUPS)}, not {sorted(self.offload)}")
        self.fp8, self.exact_blocks = linear == "fp8", exact_blocks
        if exact_blocks and not (self.fp8 and 0 < exact_blocks <= len(transformer.layers)):
            raise ValueError(
                f"{exact_blocks} exact blocks of {len(transformer.layers)}, products in {linear}"
            )
        self.device = transformer.input_proj.weight.device
        self.ops = kernels.load(self._backend())
        choose_kept(activation_budget, [{}])  # an impossible budget is told now, not in the first step
        self._store = HostStore(self.device)
        self._scratch, kernel = Scratch(self.device), make_attention(attention, self.device)
        self.blocks = [
            FusedBlock(f"layers.{i}", block, dtype=dtype, fp8=self.fp8, ops=self.ops, attention=kernel,
                       scratch=self._scratch, keep_transposed=keep_transposed, rounded=rounded,
                       exact=i < exact_blocks)
            for i, block in enumerate(transformer.layers)
        ]  # fmt: skip
        self._weights: WeightStream | None = None
        self._masters: HostMasters | None = None
        self._check_covered()
        # Weights of the norms in the order of the modulation's parts: [blocks, 4, 1, D].
        self._norms = torch.stack([
            torch.stack([block.attention_norm1.weight, block.attention_norm2.weight, block.ffn_norm1.weight,
                         block.ffn_norm2.weight])
            for block in transformer.layers
        ]).float()[:, :, None]  # fmt: skip
        self._pieces = [
            piece
            for same in zip(*(block.linears for block in self.blocks), strict=True)
            for piece in lay_together(same)
        ]
        self._copies = [copy for block in self.blocks for part in block.linears for copy in part.copies()]
        self._tables: OrderedDict[PackedLayout, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, latents: Tensor, timestep: Tensor, text: Tensor, layout: PackedLayout,
                 tables: tuple[Tensor, Tensor] | None = None) -> Tensor:  # fmt: skip
        """Velocities x0 - noise of every image token.

        Args:
            latents: [image tokens, 128], noisy, packed over samples.
            timestep: float32 [B], 0 noise to 1 data.
            text: [text tokens, hidden], *projected* text features, packed over samples.
            layout: what the tokens are.
            tables: :meth:`rotary` of the layout, where it is at hand.

        Returns:
            [image tokens, 128] in the activations' type, in the order of ``latents``.
        """
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            self._refresh_adapters()
            index = layout.tensors(self.device)
            h = self._embed(latents, text, layout)
            conditioning = self._conditioning(timestep)
            batch = Batch(layout, index.sample_index, *(tables or self.rotary(layout)))
            modulations = self._modulations(conditioning)
        if self._weights is not None:
            self._weights.round = not torch.is_grad_enabled()
        if not torch.is_grad_enabled():
            for block, modulation in zip(self.blocks, modulations, strict=True):
                h, _ = block.forward(h, batch, modulation, None)
        else:
            for block, modulation, keeping in zip(
                self.blocks, modulations, self._keeping(layout), strict=True
            ):
                h = BlockFunction.apply(h, block, batch, modulation, keeping, *block.leaves)
        return self._project(h, conditioning, index.image_index, index.sample_index)

    def add_gradients(self, noisy: Tensor, target: Tensor, time: Tensor, text: Tensor, layout: PackedLayout,
                      parts: float | Tensor, tables: tuple[Tensor, Tensor] | None = None
                      ) -> Tensor:  # fmt: skip
        """Adds the gradients of the mean squared error, divided by ``parts``; returns it whole, detached.

        ``target`` is float32 and shaped as the velocities; the rest as :meth:`__call__` takes it.
        """
        loss = functional.mse_loss(self(noisy, time, text, layout, tables).float(), target)
        (loss / parts).backward()
        return loss.detach()

    def _refresh_adapters(self) -> None:
        """Working copies of all adapters, in a few launches rather than a few a layer."""
        if not self._copies:
            return
        if self._masters is not None:
            self._masters.refresh()
        else:
            write_copies([(c, f) for c, _, f in self._copies], [m.detach() for _, m, _ in self._copies])
        for down, (values, scale), group in self._pieces:
            self.ops.split_precision(down.t(), values, scale, group=group)

    def _embed(self, latents: Tensor, text: Tensor, layout: PackedLayout) -> Tensor:
        model, index = self.model, layout.tensors(self.device)
        rows = model.embed_image_indicator.weight.to(self.dtype)
        h = torch.zeros(layout.total, model.hidden_size, dtype=self.dtype, device=self.device)
        h.index_copy_(0, index.image_index, model.input_proj(latents.to(self.dtype)) + rows[1])
        h.index_copy_(0, index.text_index, text.to(self.dtype) + rows[0])
        return h

    def _conditioning(self, timestep: Tensor) -> Tensor:
        """silu of the projected time embedding, [B, adaLN size]; the sinusoid in float32, then cast."""
        embed = self.model.t_embedding
        position = 1e4 * (timestep.float() - embed.range_min) / (embed.range_max - embed.range_min)
        sinusoid = _sinusoidal_embedding(position, embed.dim).to(self.dtype)
        time = embed.mlp_out(functional.silu(embed.mlp_in(sinusoid)))
        return functional.silu(self.model.adaln_proj(time))

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def rotary(self, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """cos and sin [T, E / 2]; diffusers' tables repeat each half. Float32 inside: autocast is off."""
        if layout not in self._tables:
            cos, sin = self.model.rotary_emb(layout.tensors(self.device).position_ids[None])
            half = cos.shape[-1] // 2
            self._tables[layout] = tuple(x[0, :, :half].to(self.dtype).contiguous() for x in (cos, sin))
            if len(self._tables) > _TABLES_KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(layout)
        return self._tables[layout]

    def _modulations(self, conditioning: Tensor) -> list[Modulation]:
        """The four norm factors of every block, all blocks in one pass: [blocks, 4, B, D]."""
        raw = torch.stack(
            [self._adaptive(block.source.adaln_modulation, conditioning) for block in self.blocks]
        )
        raw = raw.unflatten(-1, (4, -1)).transpose(1, 2).float()
        factors = torch.empty(raw.shape, dtype=self.dtype, device=self.device)
        factors[:, 0::2] = (1 + raw[:, 0::2]) * self._norms[:, 0::2]
        factors[:, 1::2] = raw[:, 1::2].tanh() * self._norms[:, 1::2]
        return [Modulation(*four) for four in factors]

    def _adaptive(self, layer: nn.Module, conditioning: Tensor) -> Tensor:
        if not isinstance(layer, Float8Linear):
            return layer(conditioning)
        weight = self._scratch.take(*layer.weight.shape, self.dtype)
        self.ops.dequantize(layer.weight, layer.weight_scale, self.dtype, weight)
        return functional.linear(conditioning, weight, layer.bias.to(self.dtype))

    def _project(self, h: Tensor, conditioning: Tensor, image_index: Tensor, sample: Tensor) -> Tensor:
        layer = self.model.final_layer
        scale = 1 + layer.adaln_modulation(functional.silu(conditioning))
        normed = layer.norm_final(h.index_select(0, image_index))
        return layer.linear(normed * scale[sample[image_index]])

    def _keeping(self, layout: PackedLayout) -> list[Keeping]:
        """What each block keeps and where, for this layout."""
        model, store = self.model, self._store if self.offload else None
        shape = (layout.total, model.hidden_size, model.config.intermediate_size, self.dtype.itemsize)
        on_device = [
            {group: size for group, size in group_bytes(*shape, block.fp8_forward, self.rounded).items()
             if group not in self.offload}
            for block in self.blocks
        ]  # fmt: skip
        if store:
            store.clear()
        return [
            Keeping(i, kept, self.offload, store)
            for i, kept in enumerate(choose_kept(self.budget, on_device))
        ]

    def stream(self, slots: int = 3, source: HostMemory | Shards | None = None) -> WeightStream:
        """Lets the blocks' weights wait elsewhere, by default on the host; a few are here at a time."""
        cells = ([cell for linear in block.linears for cell in linear.weight.cells] for block in self.blocks)
        stream = WeightStream(cells, self.device, slots, source)
        for index, block in enumerate(self.blocks):
            block.enter = partial(stream.use, index)
        self._weights = stream
        return stream

    def masters_on_host(self, parameters: Sequence[nn.Parameter]) -> HostMasters:
        """Puts the adapters' masters and gradients on the host; the device keeps the working copies.

        Autograd gives no gradient to what is on another device, so each block hands its own over. Only for
        adapters that the engine computes itself: PEFT reads the masters.
        """
        if {p for block in self.blocks for p in block.parameters} != {
            master for _, master, _ in self._copies
        }:
            raise ValueError("an adapter that PEFT computes needs its masters beside it")
        copies = {master: (copy, factor) for copy, master, factor in self._copies}
        masters = HostMasters(parameters, self.device, copies)
        for block in self.blocks:
            if block.parameters:
                # So that autograd comes by.
                block.leaves = [torch.zeros((), device=self.device, requires_grad=True)]
                block.sink = partial(masters.take, block.parameters)
        self._masters = masters
        return masters

    def _backend(self) -> kernels.Backend:
        if self.device.type != "cuda":
            return "reference"
        if importlib.util.find_spec("triton") is None:
            fail(TRITON_MISSING, "the fused engine needs Triton on a GPU", cure="install triton, or use the "
                 "reference engine")  # fmt: skip
        if self.fp8 and torch.cuda.get_device_capability(self.device) < (8, 9):
            name = torch.cuda.get_device_name(self.device)
            fail(NO_FP8_UNITS, f"{name} has no FP8 units", cure='multiply in bf16 (`linear = "bf16"`)')
        return "triton"

    def _check_covered(self) -> None:
        """Every trainable parameter must be one that the blocks return a gradient for."""
        covered = {id(p) for block in self.blocks for p in block.parameters}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in covered:
                fail(UNFUSED_ADAPTER, f"{name} is trainable, but the fused engine has no gradient for it",
                     cure='adapt only attention and feed-forward, or use `engine = "reference"`')  # fmt: skip


def adapter_parameters(fused: FusedTransformer) -> list[nn.Parameter]:
    """The adapters' parameters in the order of the blocks."""
    return [p for block in fused.blocks for p in block.parameters]
