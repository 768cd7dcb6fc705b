"""Fills the caches: every caption through the text encoder, every picture through the autoencoder.

Each encoder is loaded only if something is missing, and is gone again before the next thing is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ideoflow.data.cache import TensorCache, cache_key, dtype_name
from ideoflow.data.pixels import load_pixels, picture_digest
from ideoflow.data.survey import Sample
from ideoflow.diagnostics import Diagnostic, IdeoflowError
from ideoflow.model.latents import encode_pixels
from ideoflow.model.load import load_vae
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.model.text import TextEncoder

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Encoded:
    """Where the encoded forms of a sample are."""

    latents: str
    text: str
    grid: tuple[int, int]


class Encoder:
    """Encodes for one base, in one type, on one device; keeps what it made in a cache."""

    def __init__(
        self,
        folder: Path,
        base_digest: str,
        cache: TensorCache,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        transformer: Path | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.transformer = transformer
        self.folder, self.base_digest, self.cache = folder, base_digest, cache
        self.dtype, self.device, self.max_tokens = dtype, device, max_tokens
        self.progress = progress

    def encode_captions(self, captions: Iterable[str]) -> None:
        """Encodes the captions (canonical JSON) that are not cached yet.

        Raises:
            IdeoflowError: with every caption that is too long; all the others are cached by then.
        """
        missing = {key: c for c in captions if (key := self._text_key(c)) not in self.cache}
        if not missing:
            return
        self.progress("captions", 0, len(missing))
        encoder = TextEncoder(
            self.folder,
            dtype=self.dtype,
            device=self.device,
            max_tokens=self.max_tokens,
            transformer=self.transformer,
        )
        tokens: dict[str, list[int]] = {}
        problems: list[Diagnostic] = []
        for key, caption in missing.items():
            try:
                tokens[key] = encoder.tokens(caption)
            except IdeoflowError as error:
                problems.extend(error.diagnostics)  # one long caption must not hide the next
        features = encoder.encode_tokens(
            list(tokens.values()), lambda done: self.progress("captions", done, len(missing))
        )
        for key, value in zip(tokens, features, strict=True):
            self.cache.put(key, value)
        del encoder
        release(self.device)
        if problems:
            raise IdeoflowError(problems[:20])

    def encode_pictures(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Encodes the pictures that are not cached yet; says where each sample's encoded forms are.

        Raises:
            IdeoflowError: with every picture that cannot be decoded; all the others are cached by then.
        """
        keys = [self._latents_key(s) for s in samples]
        missing = {key: s for key, s in zip(keys, samples, strict=True) if key not in self.cache}
        if missing:
            self._encode_missing(missing)
        return [
            Encoded(
                key, self._text_key(s.caption), (s.size[1] // PIXELS_PER_TOKEN, s.size[0] // PIXELS_PER_TOKEN)
            )
            for key, s in zip(keys, samples, strict=True)
        ]

    def _encode_missing(self, missing: Mapping[str, Sample]) -> None:
        self.progress("pictures", 0, len(missing))
        vae = load_vae(self.folder, dtype=self.dtype, device=self.device)
        problems: list[Diagnostic] = []
        for done, (key, sample) in enumerate(missing.items(), 1):
            try:
                pixels = load_pixels(sample)
            except IdeoflowError as error:
                problems.extend(error.diagnostics)  # one bad picture must not hide the next
            else:
                self.cache.put(key, encode_pixels(vae, pixels[None])[0])
            self.progress("pictures", done, len(missing))
        del vae
        release(self.device)
        if problems:
            raise IdeoflowError(problems[:20])

    def text_features(self, caption: str) -> Tensor:
        """Cached projected features (tokens, hidden) of a caption that was encoded before."""
        return self.cache.get(self._text_key(caption))

    def tensors(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Cached latents (tokens, 128) float32 and text features (tokens, hidden)."""
        return self.cache.get(encoded.latents), self.cache.get(encoded.text)

    def _text_key(self, caption: str) -> str:
        # max_tokens belongs to it: a lower limit must refuse captions that a higher one let through.
        return cache_key(
            "text",
            base=self.base_digest,
            dtype=dtype_name(self.dtype),
            max_tokens=self.max_tokens,
            caption=caption,
        )

    def _latents_key(self, sample: Sample) -> str:
        return cache_key(
            "latents",
            base=self.base_digest,
            dtype=dtype_name(self.dtype),
            size=sample.size,
            window=sample.geometry.window,
            flip=sample.geometry.flip,
            pixels=picture_digest(sample.picture),
        )


def release(device: torch.device) -> None:
    """Gives the memory of what was just deleted back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
