"""Loads the parts of a base from a folder in diffusers' layout; whatever is wrong with the files is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Ideogram4Transformer2DModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, WRONG_WEIGHTS
from ideoflow.kernels.float8 import Float8Linear, quantize_weight
from ideoflow.model.base import read_safetensors_header, weight_files
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.forms import infer_transformer
from ideoflow.model.quiet import disable_progress_bars

# Type of everything that is not quantised, and of the arithmetic.
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}

T = TypeVar("T")


@contextmanager
def told(part: Path) -> Iterator[None]:
    """Turns the libraries' errors about files into diagnostics, and keeps their progress bars quiet."""
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cure = "download or export the model again"
        fail(BAD_CONFIG, f"{part} cannot be loaded: {reason}", cure=cure)


def complete(part: Path, missing: Iterable[str], extra: Iterable[str], mismatched: Iterable[Any]) -> None:
    for what, names in (("missing", missing), ("not known", extra), ("of the wrong shape", mismatched)):
        listed = sorted(n if isinstance(n, str) else str(n[0]) for n in names)
        if listed:
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            message = f"{part}: tensors are {what}: {', '.join(listed[:3])}{more}"
            fail(WRONG_WEIGHTS, message, cure="the weights and config.json belong to different models")


def load_transformer(
    folder: Path, part: str = "transformer", *, precision: str, device: torch.device, file: Path | None = None
) -> Ideogram4Transformer2DModel:
    """The frozen transformer, ready for *projected* text features.

    Args:
        folder: a base in diffusers' layout, and ``part`` a folder in it.
        file: a single file that holds the weights instead; a config.json in ``folder`` still counts.
        precision: ``bf16`` or ``float32`` throughout; or ``fp8``, the Linears of the blocks as e4m3 with a
            scale a row (kept exactly where they are stored so) and all else in bf16.

    Each tensor goes straight from its file to its final form on ``device``, so host and device never hold
    much more than the final size. ``llm_cond_norm`` and ``llm_cond_proj`` become identities, since what they
    compute is cached; and the time embedding takes float32 times with weights of any type: the sinusoid is
    computed in float32 and cast before the first Linear (diffusers casts to the time's type, which raises
    for float32 times with bf16 weights, and loses precision for bf16 times).
    """
    place = file or folder / part
    with told(place):
        config = _transformer_config(folder, part, place)
        # The rotary frequencies are a buffer that no file holds: they must be computed, not left empty.
        with init_empty_weights(include_buffers=False):
            model = Ideogram4Transformer2DModel.from_config(config)
            model.llm_cond_norm = nn.Identity()
            model.llm_cond_proj = nn.Identity()
            if precision == "fp8":
                for block in model.layers:
                    _make_float8(block)
        checkpoint = Checkpoint(place)
        _check_names(place, model, checkpoint)
        _fill(place, model, checkpoint, PRECISIONS[precision], device)
    model.t_embedding.mlp_in.register_forward_pre_hook(_cast_to_weight)
    return model.requires_grad_(False).eval().to(device)


def _transformer_config(folder: Path, part: str, place: Path) -> Any:
    """What ``config.json`` says; the original layout and single files may come without one."""
    for name in (part, "transformer") if place.is_file() else (part,):
        if (folder / name / "config.json").exists():
            return Ideogram4Transformer2DModel.load_config(folder / name)
    return asdict(
        infer_transformer({k: v for f in weight_files(place) for k, v in read_safetensors_header(f).items()})
    )


def _make_float8(block: nn.Module) -> None:
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                bias = child.bias is not None
                setattr(
                    parent, name, Float8Linear(child.in_features, child.out_features, bias, device="meta")
                )


def _check_names(part: Path, model: nn.Module, checkpoint: Checkpoint) -> None:
    wanted = dict(model.named_parameters())
    extra = [n for n in checkpoint.names() if n not in wanted and not n.startswith("llm_cond_")]
    complete(part, wanted.keys() - set(checkpoint.names()), extra, ())


@torch.no_grad()
def _fill(
    part: Path, model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> None:
    for name, empty in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if isinstance(module, Float8Linear) and leaf == "weight":
            stored = checkpoint.float8(name, device)
            value, scale = stored or quantize_weight(checkpoint.dense(name, torch.float32, device))
            module.weight_scale = scale
        else:
            value = checkpoint.dense(name, dtype, device)
        if value.shape != empty.shape:
            complete(part, (), (), [f"{name} ({list(value.shape)}, not {list(empty.shape)})"])
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _cast_to_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype),)


def _load(read: Callable[[], tuple[T, dict[str, Any]]], part: Path) -> T:
    with told(part):
        model, info = read()
    complete(part, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
    return model.requires_grad_(False).eval()  # type: ignore[attr-defined,no-any-return]


def load_vae(folder: Path, *, dtype: torch.dtype, device: torch.device) -> AutoencoderKLFlux2:
    """The frozen autoencoder."""
    model = _load(
        lambda: AutoencoderKLFlux2.from_pretrained(
            folder, subfolder="vae", torch_dtype=dtype, output_loading_info=True, use_safetensors=True
        ),
        folder / "vae",
    )
    return model.to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template."""
    with told(folder / "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer")
    if not tokenizer.chat_template:
        fail(BAD_CONFIG, f"the tokenizer in {folder} has no chat template", cure="download the model again")
    return tokenizer


def read_tensors(
    part: Path, names: Iterable[str], *, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Single tensors of a transformer by diffusers' names, dense, whatever form they are stored in."""
    with told(part):
        checkpoint = Checkpoint(part)
        complete(part, [n for n in names if n not in checkpoint], (), ())
        return {name: checkpoint.dense(name, dtype, device) for name in names}
