"""Loads the parts of a base from a folder in diffusers' layout; whatever is wrong with the files is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Ideogram4Transformer2DModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, UNEVEN_ROWS, WRONG_WEIGHTS
from ideoflow.kernels.float8 import Float8Linear, Int8Linear, ScaledLinear
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.files import AGAIN, part_headers, some
from ideoflow.model.forms import infer_transformer
from ideoflow.model.quiet import disable_progress_bars, import_library
from ideoflow.model.sides import weight_shapes
from ideoflow.model.spec import PRODUCTS, TransformerSpec

# Type of everything that is not quantised, and of the arithmetic.
PRECISIONS = {"float32": torch.float32, **dict.fromkeys(("bf16", "fp8", "int8", "nf4"), torch.bfloat16)}

# What libraries raise about files that they cannot use.
_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
           SafetensorError)  # fmt: skip

T = TypeVar("T")


@contextmanager
def told(part: Path) -> Iterator[None]:
    """Turns the libraries' errors about files into diagnostics, and keeps their progress bars quiet."""
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _ERRORS as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fail(BAD_CONFIG, f"{part} cannot be loaded: {reason}", cure=AGAIN)


def complete(part: Path, missing: Iterable[str], extra: Iterable[str], mismatched: Iterable[Any]) -> None:
    for what, names in (("missing", missing), ("not known", extra), ("of the wrong shape", mismatched)):
        listed = [n if isinstance(n, str) else str(n[0]) for n in names]
        if listed:
            message = f"{part}: tensors are {what}: {some(listed)}"
            fail(WRONG_WEIGHTS, message, cure="the weights and config.json belong to different models")


def load_transformer(
    folder: Path,
    part: str = "transformer",
    *,
    precision: str,
    device: torch.device,
    file: Path | None = None,
    quantize_on: torch.device | None = None,
    streamed: bool = False,
) -> Ideogram4Transformer2DModel:
    """The frozen transformer, ready for *projected* text features.

    Args:
        folder: a base in diffusers' layout, and ``part`` a folder in it.
        file: a single file that holds the weights instead; a config.json in ``folder`` still counts.
        precision: ``bf16`` or ``float32`` throughout; or ``fp8`` (e4m3 with a scale a row), ``int8`` (with a
            scale a row) or ``nf4`` (bitsandbytes, double quantisation) for the Linears of the blocks and bf16
            for all else. What is stored in the form asked for is kept exactly.
        quantize_on: where weights are rounded that are stored otherwise; by default on ``device``.
        streamed: leave the large weights of the blocks in host memory, for
            :class:`ideoflow.engine.offload.WeightStream`.

    Each tensor goes straight from its file to its final form on ``device``, large ones by pieces, so host and
    device never hold much more than the final size. ``llm_cond_norm`` and ``llm_cond_proj`` become
    identities, since what they compute is cached; and the time embedding takes float32 times with weights of
    any type: the sinusoid is computed in float32 and cast before the first Linear (diffusers casts to the
    time's type, which raises for float32 times with bf16 weights, and loses precision for bf16 times).
    """
    place = file or folder / part
    with told(place):
        config = _transformer_config(folder, part, place)
        return assemble(
            config,
            partial(_checkpoint, place),
            precision=precision,
            device=device,
            quantize_on=quantize_on,
            streamed=streamed,
        )


class Tensors(Protocol):
    """Where a transformer's tensors come from, as :class:`ideoflow.model.checkpoint.Checkpoint` has them."""

    def place(self, name: str) -> str: ...
    def shape(self, name: str) -> tuple[int, ...] | None: ...
    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor: ...
    def pieces(
        self, name: str, dtype: torch.dtype, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]: ...
    def float8(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None: ...
    def four_bit(self, name: str, device: torch.device) -> tuple[Tensor, dict[str, Tensor]] | None: ...


def assemble(
    config: Any,
    tensors_of: Callable[[Mapping[str, tuple[int, ...]]], Tensors],
    *,
    precision: str,
    device: torch.device,
    quantize_on: torch.device | None = None,
    streamed: bool = False,
) -> Ideogram4Transformer2DModel:
    """The transformer of diffusers' configuration, as :func:`load_transformer` says; ``tensors_of`` is given
    the shapes of all its tensors by name."""
    # The rotary frequencies are a buffer that no file holds: they must be computed, not left empty.
    with init_empty_weights(include_buffers=False):
        model = Ideogram4Transformer2DModel.from_config(config)
        model.llm_cond_norm = nn.Identity()
        model.llm_cond_proj = nn.Identity()
    tensors = tensors_of({name: tuple(p.shape) for name, p in model.named_parameters()})
    host = torch.device("cpu")
    filler = _Filler(tensors, precision, quantize_on or device)
    for name, module in list(model.named_modules()):
        waits = streamed and type(module) is nn.Linear and is_streamed(name)
        filler.fill(name, module, host if waits else device)
        if name.startswith("layers.") and type(module) is nn.Linear and precision in _QUANTISED:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, filler.quantised(name, module, device, streamed))
        _join_rows(model, name)
    model.t_embedding.mlp_in.register_forward_pre_hook(_cast_to_weight)
    model.requires_grad_(False).eval()
    model.rotary_emb.to(device)
    return model


# Linears that share their input, by the last of them to be loaded.
_SHARING = {linears[-1]: linears for linears in PRODUCTS.values() if len(linears) > 1}


def _join_rows(model: nn.Module, name: str) -> None:
    """Once the last of several Linears that share their input is there, puts their weights into one matrix.

    The fused engine multiplies with all of them at once. If it joined them when the whole model is there,
    every block would leave a gap: on an H200 3.4 GiB of them, of which 1 GiB stayed of no use.
    """
    last = _in_block(name)
    if last not in _SHARING:
        return
    layers = [model.get_submodule(name.removesuffix(last) + linear) for linear in _SHARING[last]]
    if all(layer.weight.shape[1] == layer.in_features for layer in layers):  # not of packed 4-bit codes
        joined = torch.cat([layer.weight.data for layer in layers])
        for layer, piece in zip(layers, joined.split([x.out_features for x in layers]), strict=True):
            layer.weight.data = piece


def is_streamed(name: str) -> bool:
    """Whether a module's weight is one of the large ones of a block, which may wait in host memory.

    The modulations of all blocks are computed before the first block, so they stay.
    """
    return _in_block(name).startswith(("attention.", "feed_forward."))


def _in_block(name: str) -> str:
    """A module's name within its block of the transformer; "" for what is in none."""
    return name.split(".", 2)[2] if name.startswith("layers.") and name.count(".") > 1 else ""


def _transformer_config(folder: Path, part: str, place: Path) -> Any:
    """What ``config.json`` says; the original layout and single files may come without one."""
    for name in (part, "transformer") if place.is_file() else (part,):
        if (folder / name / "config.json").exists():
            return Ideogram4Transformer2DModel.load_config(folder / name)
    spec = infer_transformer(weight_shapes(part_headers(place)))
    if spec.attention_head_dim != TransformerSpec().attention_head_dim:
        # How a head is divided among the axes of the rotary embedding is in no shape.
        cure = "download or export it with its config.json"
        fail(BAD_CONFIG, f"{place} is not of the released sizes, and has no config.json", cure=cure)
    return asdict(spec)


def _checkpoint(part: Path, wanted: Mapping[str, tuple[int, ...]]) -> Checkpoint:
    checkpoint = Checkpoint(part)
    extra = [n for n in checkpoint.names() if n not in wanted and not n.startswith("llm_cond_")]
    complete(part, wanted.keys() - set(checkpoint.names()), extra, ())
    return checkpoint


_QUANTISED: dict[str, type[ScaledLinear] | None] = {"fp8": Float8Linear, "int8": Int8Linear, "nf4": None}


class _Filler:
    """Puts a checkpoint's tensors into modules that were made without memory."""

    def __init__(self, checkpoint: Tensors, precision: str, quantize_on: torch.device) -> None:
        self.checkpoint, self.precision, self.quantize_on = checkpoint, precision, quantize_on
        self.dtype = PRECISIONS[precision]

    @torch.no_grad()
    def fill(self, name: str, module: nn.Module, device: torch.device) -> None:
        """The module's own parameters, dense; all but the weights that will be quantised."""
        quantised = name.startswith("layers.") and type(module) is nn.Linear and self.precision in _QUANTISED
        for leaf, empty in list(module.named_parameters(recurse=False)):
            if not (quantised and leaf == "weight"):
                self._check(f"{name}.{leaf}", self.checkpoint.shape(f"{name}.{leaf}"), empty.shape)
                value = self.checkpoint.dense(f"{name}.{leaf}", self.dtype, device)
                self._check(f"{name}.{leaf}", value.shape, empty.shape)
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    @torch.no_grad()
    def quantised(self, name: str, empty: nn.Linear, device: torch.device, streamed: bool) -> nn.Linear:
        """A Linear with its weight in the form asked for, whatever it is stored in."""
        weight, into = f"{name}.weight", device
        if streamed and is_streamed(name):
            into = torch.device("cpu")
        self._check(weight, self.checkpoint.shape(weight), empty.weight.shape)
        cls = _QUANTISED[self.precision]
        if cls is None:
            return self._four_bit(name, empty, into, device)
        stored = self.checkpoint.float8(weight, into) if cls is Float8Linear else None
        values, scale = stored or self._rows(cls, weight, empty, into)
        layer = cls(empty.in_features, empty.out_features, empty.bias is not None, "meta", self.dtype)
        layer.weight = nn.Parameter(values, requires_grad=False)
        layer.weight_scale = scale.to(device)
        layer.bias = empty.bias
        return layer

    def _rows(
        self, cls: type[ScaledLinear], weight: str, empty: nn.Linear, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        values = torch.empty(empty.weight.shape, dtype=cls.storage, device=device)
        scale = torch.empty(empty.out_features, dtype=torch.float32, device=device)
        for rows, piece in self.checkpoint.pieces(weight, torch.float32, self.quantize_on):
            self._check(weight, (len(values), *piece.shape[1:]), values.shape)
            values[rows], scale[rows] = (part.to(device) for part in cls.quantize(piece))
        return values, scale

    def _four_bit(self, name: str, empty: nn.Linear, into: torch.device, device: torch.device) -> nn.Linear:
        """The codes go ``into`` where weights wait, their scales and tables to the device in any case."""
        import_library("bitsandbytes", "weights in NF4")
        from ideoflow.model.four_bit import linear_4bit, packed_pieces, stored_state

        weight = f"{name}.weight"
        if stored := self.checkpoint.four_bit(weight, into):
            packed, state = stored[0], stored_state(stored[1], self.dtype, device)
        else:
            pieces = self.checkpoint.pieces(weight, self.dtype, self.quantize_on)
            packed, state = packed_pieces(pieces, empty.weight.shape, into)
            state.to(device)
        self._check(weight, state.shape, empty.weight.shape)
        if empty.in_features % state.blocksize:
            uneven = f"rows of {empty.in_features} numbers do not fill blocks of {state.blocksize}"
            cure = "set memory.precision = 'fp8', 'int8' or 'bf16'"
            fail(UNEVEN_ROWS, f"{self.checkpoint.place(weight)}: {uneven}", cure=cure)
        return linear_4bit(empty, packed, state)

    def _check(self, name: str, found: Sequence[int] | None, wanted: torch.Size) -> None:
        if found is not None and tuple(found) != tuple(wanted):
            file, _, key = self.checkpoint.place(name).partition(": ")
            complete(Path(file), (), (), [f"{key} ({list(found)}, not {list(wanted)})"])


def _cast_to_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype),)


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device) -> AutoencoderKLFlux2:
    """The frozen autoencoder."""
    part = folder / "vae"
    with told(part):
        with init_empty_weights(include_buffers=False):
            model = AutoencoderKLFlux2.from_config(AutoencoderKLFlux2.load_config(part))
        empty = model.state_dict()
        checkpoint = Checkpoint(part)
        names = set(checkpoint.names())
        complete(part, empty.keys() - names, names - empty.keys(), ())
        state = {
            name: checkpoint.dense(name, dtype if value.is_floating_point() else value.dtype, device)
            for name, value in empty.items()
        }
        odd = [
            f"{n} ({list(v.shape)}, not {list(empty[n].shape)})"
            for n, v in state.items()
            if v.shape != empty[n].shape
        ]
        complete(part, (), (), odd)
        model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval().to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template.

    Raises:
        IdeoflowError: when its files cannot be used, or a caption gets lost in its template or its words.
    """
    part = folder / "tokenizer"
    with told(part):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(part)
    if not tokenizer.chat_template:
        fail(BAD_CONFIG, f"the tokenizer in {folder} has no chat template", cure=AGAIN)
    caption = '{"a caption":"of words"}'
    try:
        text = in_template(tokenizer, caption)
    except Exception as error:  # a template is a program, and raises what it likes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fail(BAD_CONFIG, f"the chat template in {part} cannot be used: {reason}", cure=AGAIN)
    if caption not in text:
        fail(BAD_CONFIG, f"the chat template in {part} leaves the caption out of the text", cure=AGAIN)
    with told(part):
        words = tokenizer.decode(tokenizer(caption, add_special_tokens=False)["input_ids"])
    if words != caption:
        fail(BAD_CONFIG, f"the tokenizer in {part} makes {words!r} of {caption!r}", cure=AGAIN)
    return tokenizer


def in_template(tokenizer: PreTrainedTokenizerBase, caption: str) -> str:
    """The text that a caption is encoded as."""
    messages = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return text


def read_tensors(
    part: Path, names: Iterable[str], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Single tensors of a transformer by diffusers' names, dense, whatever form they are stored in."""
    with told(part):
        checkpoint = Checkpoint(part)
        complete(part, [n for n in names if n not in checkpoint], (), ())
        return {name: checkpoint.dense(name, dtype, device) for name in names}
