"""Loads the parts of a base from a folder in diffusers' layout; whatever is wrong with the files is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLFlux2, Ideogram4Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, WRONG_WEIGHTS
from ideoflow.model.quiet import disable_progress_bars

T = TypeVar("T")


@contextmanager
def _told(part: Path) -> Iterator[None]:
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


def _complete(part: Path, missing: Iterable[str], extra: Iterable[str], mismatched: Iterable[Any]) -> None:
    for what, names in (("missing", missing), ("not known", extra), ("of the wrong shape", mismatched)):
        listed = sorted(n if isinstance(n, str) else str(n[0]) for n in names)
        if listed:
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            message = f"{part}: tensors are {what}: {', '.join(listed[:3])}{more}"
            fail(WRONG_WEIGHTS, message, cure="the weights and config.json belong to different models")


def load_transformer(
    folder: Path, part: str = "transformer", *, dtype: torch.dtype, device: torch.device
) -> Ideogram4Transformer2DModel:
    """The frozen transformer, ready for *projected* text features.

    ``llm_cond_norm`` and ``llm_cond_proj`` are replaced by identities, since what they compute is cached; and
    the time embedding takes float32 times with weights of any type: the sinusoid is computed in float32 and
    cast before the first Linear (diffusers casts to the time's type, which raises for float32 times with bf16
    weights, and loses precision for bf16 times).
    """
    model = _load(
        lambda: Ideogram4Transformer2DModel.from_pretrained(
            folder, subfolder=part, torch_dtype=dtype, output_loading_info=True, use_safetensors=True
        ),
        folder / part,
    )
    model.llm_cond_norm = nn.Identity()
    model.llm_cond_proj = nn.Identity()
    model.t_embedding.mlp_in.register_forward_pre_hook(_cast_to_weight)
    return model.to(device)


def _cast_to_weight(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].to(module.weight.dtype),)


def _load(read: Callable[[], tuple[T, dict[str, Any]]], part: Path) -> T:
    with _told(part):
        model, info = read()
    _complete(part, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
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


def load_text_encoder(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The frozen Qwen3-VL model whose language model makes the text features."""
    model = _load(
        lambda: AutoModel.from_pretrained(
            folder, subfolder="text_encoder", dtype=dtype, output_loading_info=True, use_safetensors=True
        ),
        folder / "text_encoder",
    )
    return model.to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template."""
    with _told(folder / "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "tokenizer")
    if not tokenizer.chat_template:
        fail(BAD_CONFIG, f"the tokenizer in {folder} has no chat template", cure="download the model again")
    return tokenizer


def read_tensors(part: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Single tensors by name from a part's safetensors files, sharded or not."""
    wanted, found = set(names), {}
    with _told(part):
        for file in sorted(part.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for name in wanted & set(tensors.keys()):
                    found[name] = tensors.get_tensor(name)
    _complete(part, wanted - set(found), (), ())
    return found
