"""Whether the parts of a base belong together: each may be whole, and of another model (torch-free)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from ideoflow.diagnostics import Diagnostic
from ideoflow.diagnostics.codes.model import WRONG_WEIGHTS
from ideoflow.model.fit import Examined
from ideoflow.model.spec import PATCH, PIXELS_PER_TOKEN, TAPPED_LAYERS


def mismatches(found: Mapping[str, Examined], tokenizer: tuple[Path, int] | None = None) -> list[Diagnostic]:
    """What keeps parts that are whole from working together.

    Args:
        found: those that are there, by name; nothing is said as long as one of them has problems of its own.
        tokenizer: its file and largest id.
    """
    if any(part.problems for part in found.values()):
        return []
    cure = "take all parts from one model"
    return [Diagnostic(WRONG_WEIGHTS, message, cure=cure) for message in _messages(found, tokenizer)]


def _messages(found: Mapping[str, Examined], tokenizer: tuple[Path, int] | None) -> Iterator[str]:
    first, second = found.get("transformer"), found.get("unconditional_transformer")
    text, vae = found.get("text_encoder"), found.get("vae")
    if text:
        layers, taps = text.spec.num_hidden_layers, len(TAPPED_LAYERS)
        if layers <= TAPPED_LAYERS[-1]:
            of = f" (llm_features_dim of {first.source})" if first else ""
            needed = f"text features{of} are taken from the first {TAPPED_LAYERS[-1] + 1}"
            yield f"{text.source}: num_hidden_layers is {layers}, and {needed}"
        elif first and first.spec.llm_features_dim != taps * text.spec.hidden_size:
            yield (
                f"{first.source}: llm_features_dim is {first.spec.llm_features_dim}, and {taps} times "
                f"hidden_size of {text.source} is {taps * text.spec.hidden_size}"
            )
        if tokenizer and tokenizer[1] >= text.spec.vocab_size:
            yield (
                f"{tokenizer[0]}: ids go up to {tokenizer[1]}, and vocab_size of {text.source} is "
                f"{text.spec.vocab_size}"
            )
    if vae:
        side, channels = PATCH * vae.spec.downscale, PATCH**2 * vae.spec.latent_channels
        if side != PIXELS_PER_TOKEN:
            yield (
                f"{vae.source}: block_out_channels has {len(vae.spec.block_out_channels)} blocks, so that an "
                f"image token is {side} pixels wide, and "
                f"{f'in_channels of {first.source}' if first else 'the transformer'} stands for "
                f"{PIXELS_PER_TOKEN}"
            )
        if first and first.spec.in_channels != channels:
            yield (
                f"{first.source}: in_channels is {first.spec.in_channels}, and {PATCH**2} times "
                f"latent_channels of {vae.source} is {channels}"
            )
    if first and second:
        one, other = asdict(first.spec), asdict(second.spec)
        for key in one.keys() - {"llm_features_dim"}:  # the second sees no text
            if one[key] != other[key]:
                yield f"{second.source}: {key} is {other[key]}, and that of {first.source} is {one[key]}"
