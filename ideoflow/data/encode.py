"""Fills the caches: every caption through the text encoder, every picture through the autoencoder.

Each encoder is loaded only if something is missing, and is gone again before the next thing is loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
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
        progress: Progress = lambda *_: None,
    ) -> None:
        self.folder, self.base_digest, self.cache = folder, base_digest, cache
        self.dtype, self.device, self.max_tokens = dtype, device, max_tokens
        self.progress = progress

    def encode(self, samples: Iterable[Sample], captions: Iterable[str] = ()) -> list[Encoded]:
        """Makes whatever is missing for ``samples`` and for further ``captions``.

        Raises:
            IdeoflowError: with every picture that could not be decoded and every caption that is too long;
                all the others are cached by then.
        """
        samples = list(samples)
        problems: list[Diagnostic] = []
        texts = {self._text_key(c): c for c in (*(s.caption for s in samples), *captions)}
        self._encode_texts(texts, problems)
        latents = {self._latents_key(s): s for s in samples}
        self._encode_pictures(latents, problems)
        if problems:
            raise IdeoflowError(problems)
        return [
            Encoded(
                self._latents_key(s),
                self._text_key(s.caption),
                (s.size[1] // PIXELS_PER_TOKEN, s.size[0] // PIXELS_PER_TOKEN),
            )
            for s in samples
        ]

    def text_features(self, caption: str) -> Tensor:
        """Cached projected features (tokens, hidden) of a caption that was encoded before."""
        return self._get(self._text_key(caption))

    def tensors(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Cached latents (tokens, 128) float32 and text features (tokens, hidden)."""
        return self._get(encoded.latents), self._get(encoded.text)

    def _get(self, key: str) -> Tensor:
        value = self.cache.get(key)
        if value is None:
            raise KeyError(f"cache entry {key} vanished")
        return value

    def _text_key(self, caption: str) -> str:
        return cache_key("text", base=self.base_digest, dtype=dtype_name(self.dtype), caption=caption)

    def _latents_key(self, sample: Sample) -> str:
        return cache_key(
            "latents",
            base=self.base_digest,
            dtype=dtype_name(self.dtype),
            size=sample.size,
            window=sample.geometry.window,
            pixels=picture_digest(sample.picture),
        )

    def _encode_texts(self, texts: dict[str, str], problems: list[Diagnostic]) -> None:
        missing = {key: caption for key, caption in texts.items() if key not in self.cache}
        if not missing:
            return
        self.progress("captions", 0, len(missing))
        encoder = TextEncoder.load(
            self.folder, dtype=self.dtype, device=self.device, max_tokens=self.max_tokens
        )
        for done, (key, caption) in enumerate(missing.items(), 1):
            try:
                self.cache.put(key, encoder.encode(caption))
            except IdeoflowError as error:
                _keep_or_raise(error, problems)
            self.progress("captions", done, len(missing))
        del encoder
        release(self.device)

    def _encode_pictures(self, latents: dict[str, Sample], problems: list[Diagnostic]) -> None:
        missing = {key: sample for key, sample in latents.items() if key not in self.cache}
        if not missing:
            return
        self.progress("pictures", 0, len(missing))
        vae = load_vae(self.folder, dtype=self.dtype, device=self.device)
        for done, (key, sample) in enumerate(missing.items(), 1):
            try:
                self.cache.put(key, encode_pixels(vae, load_pixels(sample)[None])[0])
            except IdeoflowError as error:
                _keep_or_raise(error, problems)
            self.progress("pictures", done, len(missing))
        del vae
        release(self.device)


def _keep_or_raise(error: IdeoflowError, problems: list[Diagnostic], limit: int = 20) -> None:
    """One bad picture must not hide the next, but a full disk concerns them all."""
    from ideoflow.diagnostics.codes.data import CACHE_UNWRITABLE

    problems.extend(error.diagnostics)
    if len(problems) >= limit or any(d.code is CACHE_UNWRITABLE for d in error.diagnostics):
        raise IdeoflowError(problems) from None


def release(device: torch.device) -> None:
    """Gives the memory of what was just deleted back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
