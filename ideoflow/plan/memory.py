"""How much memory each phase of a run needs on the device: the ledger, from the architecture's table.

What training holds is derived in :mod:`ideoflow.plan.fused` and :mod:`ideoflow.plan.reference`, for the two
engines; ``tests/plan/test_memory.py`` holds the phases to what was measured.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from ideoflow.kernels.budget import PACKED_MULTIPLE
from ideoflow.model.base import BaseFacts
from ideoflow.model.spec import TAPPED_LAYERS, TransformerSpec, VaeSpec
from ideoflow.plan import fused
from ideoflow.plan.adapters import AdapterSize
from ideoflow.plan.document import Ledger, LedgerLine, Phase
from ideoflow.plan.reference import activations, dequantised_bytes
from ideoflow.plan.sizes import (
    ADAPTER_BYTES,
    SLOTS,
    STREAMED,
    Choice,
    Shapes,
    adapter_parameters,
    group_blocks,
    longest_side,
    state_bytes,
    streamed_bytes,
    targets_by_block,
    weight_bytes,
)

# A CUDA context with the kernels of a training step (0.8 GiB on an H200, with the most multiprocessors); a
# process with torch on a host.
_CONTEXT = {"cuda": 550 << 20, "cpu": 640 << 20}
# What libraries allocate besides: cuBLAS takes 32 MiB for each thread and stream that multiplies. Measured on
# an H200 for both engines at every size, like what recorded graphs and bitsandbytes' weights add.
_WORKSPACES, _GRAPH_WORKSPACES, _NF4_WORKSPACES = 128 << 20, 224 << 20, 80 << 20
# What the caching allocator cannot use of what it holds, at the least that a run needs: a share of what comes
# and goes, and gaps between tensors that live long. In the fused engine weights are laid together while they
# load; runs under a cap held 0.02 to 0.03 of what comes and goes, and 0.1 GiB, beyond what they allocated.
_FRAGMENTATION = {"fused": 0.03, "reference": 0.04}
_FUSED_GAPS, _RESIDENT_GAPS, _GAPS = 100 << 20, 600 << 20, 250 << 20  # bytes
# glibc's malloc keeps freed blocks below 32 MiB (mallopt(3), M_MMAP_THRESHOLD): seen as 1.4 times what came
# and went in a run on the nano base; larger tensors are given back.
_HOST_KEEPS, _HOST_KEEPS_OF = 1.4, 300 << 20
# Captions' tokens that go through a layer of the text encoder in turn, and in one call (ideoflow.model.text).
_TOKENS_AT_ONCE, _TOKENS_A_BATCH = 32768, 4096


def build_ledger(
    base: BaseFacts,
    targets: tuple[str, ...],
    rank: int,
    shapes: Shapes,
    choice: Choice,
    *,
    batch: int = 1,
    accumulation: int = 1,
    memory_factor: float = 1.0,
    calibrated_by: str = "",
    adapter: AdapterSize | None = None,
    group: tuple[int, bool] = (1, True),
    processes: int = 1,
) -> Ledger:
    """Every phase's lines for one choice.

    The ``batch`` samples of a forward pass are packed together by the fused engine, and run one after the
    other by the reference engine; the ``accumulation`` passes of an optimiser step follow one another in
    both. ``memory_factor`` scales what comes and goes (activations and workspaces), as measured by the runs
    that ``calibrated_by`` names. ``rank`` is the adapter's greatest; ``adapter`` what it is made of, by
    default a plain LoRA of this rank. ``group`` are the blocks of an offloaded group, and whether the next
    one is fetched meanwhile. ``processes`` share weights that are cut up among them.
    """
    size = adapter or AdapterSize("lora", adapter_parameters(base.transformer, targets, rank))
    lines: list[LedgerLine] = []

    def add(phase: Phase, name: str, size: float, evidence: str, *, transient: bool = False) -> None:
        if transient and calibrated_by:
            size, evidence = size * memory_factor, f"{evidence}; x {memory_factor:.2f} by {calibrated_by}"
        if size > 0:
            lines.append(LedgerLine(phase, name, int(size), transient and bool(calibrated_by), evidence))

    def finish(phase: Phase) -> None:
        moving = sum(line.bytes for line in lines if line.phase == phase and line.name in TRANSIENT)
        kind = "CUDA context" if choice.device == "cuda" else "Python and torch"
        add(phase, kind, _CONTEXT[choice.device], "usual size; depends on driver and card")
        part = _FRAGMENTATION[choice.engine]
        share, evidence = part * moving, f"{part:.0%} of what comes and goes"
        if choice.device == "cuda":
            share += _gaps(phase, choice)
            evidence = f"gaps between what stays, and {evidence}"
        if choice.device == "cpu":
            share += _HOST_KEEPS * min(moving, _HOST_KEEPS_OF)
            evidence = "what the C library's allocator keeps"
        add(phase, "fragmentation", share, evidence)

    _text(add, base, shapes, choice)
    finish("text")
    _latents(add, base.vae, shapes, choice)
    finish("latents")
    train = _train_fused if choice.engine == "fused" else _train_reference
    _weights(add, "train", base.transformer, choice, group, processes)
    train(add, base.transformer, targets, rank, size, shapes, choice, batch, accumulation)
    if choice.device == "cuda":
        libraries = _WORKSPACES + (_GRAPH_WORKSPACES if choice.graphs == "on" else 0)
        libraries += _NF4_WORKSPACES if choice.precision == "nf4" else 0
        add("train", "workspaces", libraries, "of cuBLAS and others, as measured")
    if choice.device == "cpu" and shapes.sample_tokens:
        # On a GPU these wait in the host's memory; on a CPU that is the same memory.
        waiting = base.vae.parameters() * choice.element
        waiting += _unconditional_bytes(base, choice)
        add("train", "waiting models", waiting, "what samples are made with")
    finish("train")
    if shapes.sample_tokens:
        _weights(add, "sample", base.transformer, choice, group, processes)
        _sample(add, base, targets, rank, size, shapes, choice)
        finish("sample")
    return Ledger(tuple(lines))


class _Add(Protocol):
    def __call__(
        self, phase: Phase, name: str, size: float, evidence: str, *, transient: bool = False
    ) -> None: ...


TRANSIENT = frozenset(
    {
        "activations",
        "text encoder",
        "features",
        "checkpoints",
        "recomputed block",
        "block at work",
        "dequantised weight",
        "saved activations",
        "adapter's own",
        "adapter workspace",
        "backward workspace",
        "attention mask",
        "inputs and loss",
        "optimizer step",
    }
)


def _gaps(phase: Phase, choice: Choice) -> int:
    """Bytes of gaps between what stays: few in the fused engine, and where weights come to a few slots."""
    if phase not in ("train", "sample"):
        return _GAPS
    if choice.engine == "fused":
        return _FUSED_GAPS
    return _RESIDENT_GAPS if choice.offload == "none" and choice.precision != "nf4" else _GAPS


def _text(add: _Add, base: BaseFacts, shapes: Shapes, choice: Choice) -> None:
    """The text encoder is streamed layer by layer, and what is tapped is projected at once."""
    spec, e, longest = base.text_encoder, choice.element, shapes.text_tokens
    hidden, width = base.transformer.hidden, spec.hidden_size
    weights = len(TAPPED_LAYERS) * width * hidden
    together = min(max(shapes.caption_tokens, longest), max(_TOKENS_AT_ONCE, longest))
    # States, the sums of what was tapped, rotary tables and a mask by caption.
    states = together * (e * width + 4 * hidden + 4 + 2 * e * spec.head_dim + longest)
    # Within one call: a layer's widest tensors, then a tapped state in float32 with its part of the sum.
    at_once = longest if choice.device == "cpu" else min(together, max(_TOKENS_A_BATCH, longest))
    passing = at_once * max(e * (3 * spec.intermediate_size + 6 * width), 4 * (2 * width + hidden))
    # One layer is computed with, the next one is being read.
    layer = 2 * e * spec.layer_parameters() + passing + 4 * width * hidden
    stages = {
        # The projection is read in float32, rounded, and laid out by tapped layer.
        "reading the text projection": weights * (4 + e if e < 4 else 4),
        "embedding": e * spec.vocab_size * width + together * (e * width + 8),
        "one layer at a time": layer + states,
    }
    worst = max(stages, key=lambda stage: stages[stage])
    add("text", "text projection", weights * e, f"{_count(weights)} x {e} bytes")
    features = together * hidden * e
    if worst.startswith("reading"):
        features = max(0, features - stages[worst] + max(v for k, v in stages.items() if k != worst))
    words = f"{worst}; {together} tokens in captions of up to {longest}"
    add("text", "text encoder", stages[worst], words, transient=True)
    add("text", "features", features, "of these captions, until they are cached", transient=True)


def _latents(add: _Add, spec: VaeSpec, shapes: Shapes, choice: Choice) -> None:
    e = choice.element
    add("latents", "autoencoder", spec.parameters() * e, f"{_count(spec.parameters())} x {e} bytes")
    # A residual block at full resolution: its input, norm, activation, convolution, its workspace, sum.
    held = 6 * spec.block_out_channels[0] * shapes.pixels * e
    add("latents", "activations", held, f"encoding {shapes.pixels / 1e6:.2f} megapixels", transient=True)


def _train_reference(
    add: _Add,
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    size: AdapterSize,
    shapes: Shapes,
    choice: Choice,
    batch: int,
    accumulation: int,
) -> None:
    e = choice.element
    adapter = size.parameters
    on = choice.checkpointing == "on"
    a = activations(spec, targets, rank, shapes.tokens, e, checkpointing=on, compiled=choice.compiled)
    kept = a.checkpoints + (0 if on else a.kept)
    blocks = max(1, len(targets_by_block(targets)))
    gradients = adapter * ADAPTER_BYTES
    several = batch * accumulation > 1
    # Of a single sample, gradients come as the blocks' activations go; only a second one finds them all.
    held = gradients if several else max(gradients // blocks, gradients - kept * (blocks - 1) // blocks)
    _adapter(add, "train", spec, targets, rank, adapter, choice)
    among = "of all samples" if several else "at the peak, of what comes while activations go"
    add("train", "gradients", held, f"{_count(adapter)} x {ADAPTER_BYTES} bytes; {among}")
    where = f"{shapes.tokens} tokens ({shapes.grid_tokens} image, {shapes.text_tokens} text)"
    if on:
        add("train", "checkpoints", kept, f"each block's input; {where}", transient=True)
        add("train", "recomputed block", a.kept, "one block's activations", transient=True)
    else:
        add("train", "saved activations", kept, f"{spec.num_layers} blocks; {where}", transient=True)
    dense = dequantised_bytes(spec, choice)
    add("train", "dequantised weight", dense, "the largest one, in the type of the products", transient=True)
    # Weights with scales are made dense for products; gradients are most between them.
    apart = dense if choice.precision in ("fp8", "int8") else 0
    a = replace(a, backward=max(0, a.backward - apart))
    own = size.kept(shapes.tokens, e, block=on)
    add("train", "adapter's own", own, f"what PEFT's {size.kind} keeps beyond a LoRA", transient=True)
    words = f"matrices of a weight's size that PEFT's {size.kind} makes"
    add("train", "adapter workspace", size.workspace, words, transient=True)
    words = "gradients alive at once in a block" + (", beyond that weight" if apart else "")
    add("train", "backward workspace", a.backward, words, transient=True)
    add("train", "attention mask", a.mask, "kept by the checkpoints", transient=True)
    add("train", "inputs and loss", a.ends, "last hidden state, rotary tables, velocity", transient=True)
    _optimizer_step(add, choice, gradients, held + a.total + dense + own + size.workspace)


def _train_fused(
    add: _Add,
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    size: AdapterSize,
    shapes: Shapes,
    choice: Choice,
    batch: int,
    accumulation: int,
) -> None:
    e, budget, tokens = choice.element, choice.activation_budget, batch * shapes.tokens
    adapter, fp8 = size.parameters, choice.matmul == "fp8"
    gradients = adapter * ADAPTER_BYTES
    away, graphs = choice.activation_offload, choice.graphs == "on"
    # Graphs add into gradients that are always there.
    first = accumulation == 1 and not graphs
    exact = choice.exact_blocks
    host = choice.optimizer_state == "offload"
    p = fused.peak(
        spec,
        targets,
        rank,
        tokens,
        budget,
        e,
        fp8=fp8,
        first_pass=first,
        leaving=host,
        offload=away,
        exact_blocks=exact,
    )
    _adapter(add, "train", spec, targets, rank, adapter, choice)
    options: dict[str, Any] = {"precision": choice.precision, "fp8": fp8, "exact_blocks": exact}
    copies = fused.copies_bytes(spec, targets, rank, e, **options)
    add("train", "working copies", copies, "the adapter as products read it, scales of rows")
    scratch = fused.scratch_bytes(spec, targets, rank, e, **options)
    form = "transposed" if fp8 and not exact else "dequantised"
    add("train", "work buffer", scratch, f"one weight, {form}")
    among = "at the peak, of what comes while activations go" if first else "of all passes"
    among = "where graphs add to them" if graphs else among
    among = "those of two blocks, on their way to the host" if host else among
    own = fused.foreign_bytes(spec, size, tokens, e, fp8)
    held = p.gradients if size.kind == "lora" else gradients
    add("train", "gradients", held, f"{_count(adapter)} x {ADAPTER_BYTES} bytes; {among}")
    where = f"{tokens} tokens in {batch} sample{'s' if batch > 1 else ''}"
    if graphs:
        # Latents and target in float32, text, rotary tables; the indices are less than a hundredth of that.
        images, rest = batch * shapes.grid_tokens, batch * shapes.text_tokens + PACKED_MULTIPLE
        place = images * 8 * spec.in_channels + rest * e * spec.hidden
        place += (images + rest) * e * spec.attention_head_dim
        words = f"{shapes.graphs} shapes of batches, a place for each"
        add("train", "graphs", shapes.graphs * place, words)
    waits = f", {away} on the host" if away != "none" else ""
    words = f"activation budget {budget:g}{waits}; {where}"
    add("train", "saved activations", p.saved, words, transient=True)
    add("train", "block at work", p.work, "one block's values and their gradients", transient=True)
    words = f"what PEFT's {size.kind} makes, one Linear at a time"
    add("train", "adapter workspace", own, words, transient=True)
    # Rotary tables, seven index tensors, the velocity with its target and gradient.
    ends = tokens * (e * spec.attention_head_dim + 60 + 14 * spec.in_channels)
    add("train", "inputs and loss", ends, "rotary tables, indices, velocity", transient=True)
    # Those on the host come back with the moments, a bucket at a time.
    _optimizer_step(add, choice, 0 if host else gradients, p.total - p.gradients + held + own + ends)


def _optimizer_step(add: _Add, choice: Choice, gradients: int, before: int) -> None:
    """When the activations are gone, all gradients are there; and on a processor, where AdamW is torch's
    foreach one and not a fused kernel, one temporary of the adapter's size."""
    on_gpu = choice.device == "cuda"
    words = "all gradients" if on_gpu else "all gradients and AdamW's temporary"
    needed = gradients if on_gpu else 2 * gradients
    add("train", "optimizer step", needed - before, f"{words}, beyond the rest", transient=True)


def _weights(
    add: _Add, phase: Phase, spec: TransformerSpec, choice: Choice, group: tuple[int, bool], processes: int
) -> None:
    words = {
        "fp8": "Linears of the blocks in e4m3 with a float32 scale a row, the rest in bf16",
        "int8": "Linears of the blocks in int8 with a float32 scale a row, the rest in bf16",
        "nf4": "Linears of the blocks in 4 bits with scales for 64, the rest in bf16",
        "bf16": "2 bytes each",
        "float32": "4 bytes each",
    }
    evidence = f"{_count(spec.parameters() - spec.text_projection_parameters())} parameters; "
    size, away = weight_bytes(spec, choice.precision), streamed_bytes(spec, choice.precision)
    if choice.offload == "none":
        add(phase, "weights", size, evidence + words[choice.precision])
        return
    piece, where = 0, "those of the blocks wait on the host or on disk"
    if choice.offload == "shard":
        piece, where = -(-away // processes), f"of those of the blocks a piece of {processes}"
    add(phase, "weights", size - away + piece, evidence + where)
    held = SLOTS if choice.offload in STREAMED else group_blocks(choice, *group)
    fetched = away / spec.num_layers * min(held, spec.num_layers)
    add(phase, "fetched weights", fetched, f"{held:g} blocks at once; {words[choice.precision]}")


def _sample(
    add: _Add,
    base: BaseFacts,
    targets: tuple[str, ...],
    rank: int,
    size: AdapterSize,
    shapes: Shapes,
    choice: Choice,
) -> None:
    """Denoising needs both transformers, decoding one and the autoencoder: whichever is more."""
    spec, e = base.transformer, choice.element
    h, f = spec.hidden, spec.intermediate_size
    _adapter(add, "sample", spec, targets, rank, size.parameters, choice)
    other = _unconditional_bytes(base, choice)
    cast = ADAPTER_BYTES if targets else 0
    denoise = shapes.sample_tokens * (e * (6 * h + 2 * f) + 2 * 4 * h + 3 * cast * f)
    denoise += dequantised_bytes(spec, choice) + size.workspace
    if choice.engine == "fused":
        fp8, exact = choice.matmul == "fp8", choice.exact_blocks
        options: dict[str, Any] = {"precision": choice.precision, "fp8": fp8, "exact_blocks": exact}
        copies = fused.copies_bytes(spec, targets, rank, e, **options)
        copies += fused.scratch_bytes(spec, targets, rank, e, **options)
        add("sample", "working copies", copies, "the fused engine's, with its work buffer")
    channels = base.vae.block_out_channels
    # The last upsampling works at full resolution on the channels of the level below it.
    decode = 4 * channels[min(1, len(channels) - 1)] * shapes.sample_pixels * e
    vae = base.vae.parameters() * e
    denoising = other + denoise >= vae + decode
    together = choice.device == "cpu"
    if denoising or together:
        words = "the second transformer, for guidance"
        words += ", a few blocks at once" if choice.unconditional == "streamed" else ""
        add("sample", "unconditional weights", other, words)
    if together or not denoising:
        add("sample", "autoencoder", vae, f"{_count(base.vae.parameters())} x {e} bytes")
    if denoise > decode if together else denoising:
        add("sample", "activations", denoise, f"{shapes.sample_tokens} tokens", transient=True)
    else:
        megapixels = shapes.sample_pixels / 1e6
        add("sample", "activations", decode, f"decoding {megapixels:.2f} megapixels", transient=True)


def _unconditional_bytes(base: BaseFacts, choice: Choice) -> int:
    """On the device, of the second transformer."""
    spec = base.transformer
    size, away = weight_bytes(spec, choice.precision), streamed_bytes(spec, choice.precision)
    fetched = away * min(SLOTS, spec.num_layers) // spec.num_layers
    return {"loaded": size, "streamed": size - away + fetched, "proxy": 0}[choice.unconditional]


def _adapter(
    add: _Add,
    phase: Phase,
    spec: TransformerSpec,
    targets: tuple[str, ...],
    rank: int,
    parameters: int,
    choice: Choice,
) -> None:
    size = parameters * ADAPTER_BYTES if choice.optimizer_state != "offload" else 0
    add(phase, "adapter", size, f"{_count(parameters)} x {ADAPTER_BYTES} bytes")
    words = {
        "float32": "AdamW's two moments, float32",
        "8bit": "AdamW's two moments, 8 bits with a float32 scale for 256",
        "cpu": "what is fetched at once of AdamW's two moments",
        "offload": "what is fetched at once of adapter, gradients and AdamW's two moments",
    }
    kind, largest = choice.optimizer_state, rank * longest_side(spec, targets)
    add(phase, "optimizer state", state_bytes(choice, parameters, largest), words.get(kind, kind))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"
