"""Fills the caches: every caption through the text encoder, every picture through the autoencoder.

Each encoder is loaded only if something is missing, and is gone again before the next thing is loaded. The
pictures that come next are decoded by threads while the device works, and shards are written by another.
"""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from ideoflow.data.cache import SHARD_BYTES, TensorCache, dtype_name
from ideoflow.data.captions import caption_variants
from ideoflow.data.keys import DIGESTS, Keys, PictureDigests, share_of
from ideoflow.data.pixels import load_pixels
from ideoflow.data.survey import Sample
from ideoflow.diagnostics import Diagnostic, IdeoflowError, fail
from ideoflow.diagnostics.codes.model import NOT_FINITE
from ideoflow.model.base import BaseFacts
from ideoflow.model.latents import encode_pixels
from ideoflow.model.load import load_vae
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.model.text import TextEncoder
from ideoflow.recipe import CaptionSettings

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]

T = TypeVar("T")

_DECODERS = min(16, os.cpu_count() or 1)
# Captions whose token ids are held at once.
_CAPTIONS_AT_ONCE = 8192


@dataclass(frozen=True)
class Encoded:
    """Under which keys the encoded forms of a sample are.

    Args:
        latents: of its picture.
        texts: of its caption's variants; each visit meets one of them.
        grid: (rows, columns) of image tokens.
    """

    latents: str
    texts: tuple[str, ...]
    grid: tuple[int, int]


class Encoder:
    """Encodes for one base, in one type, on one device; keeps what it made in a cache.

    Args:
        base: one that is there.
        captions: how captions are varied, and how long they may be.
        rank, ranks: of several processes that fill one cache, this one encodes only its share.
    """

    def __init__(
        self,
        base: BaseFacts,
        cache: TensorCache,
        *,
        dtype: torch.dtype,
        device: torch.device,
        captions: CaptionSettings,
        progress: Progress = lambda *_: None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        assert base.folder is not None, "the base is fetched before the engine starts"
        self.folder, self.transformer = base.folder, base.files.get("transformer")
        self.cache, self.captions = cache, captions
        self.dtype, self.device = dtype, device
        self.progress, self.rank, self.ranks = progress, rank, ranks
        self.keys = Keys.of(base, dtype_name(dtype), captions.max_tokens)
        self.digests = PictureDigests(cache.folder / DIGESTS)

    def texts(self, sample: Sample) -> tuple[str, ...]:
        """The captions (canonical JSON) that a sample is trained with."""
        return caption_variants(sample.captions, self.captions)

    def encode_captions(self, captions: Iterable[str]) -> int:
        """Encodes the captions (canonical JSON) that are not cached yet; says how many they were.

        Raises:
            IdeoflowError: with every caption that is too long; all the others are cached by then. With the
                first whose features are not finite.
        """
        missing = self._missing({self.keys.caption(c): c for c in captions})
        if not missing:
            return 0
        self.progress("captions", 0, len(missing))
        encoder = TextEncoder(
            self.folder,
            dtype=self.dtype,
            device=self.device,
            max_tokens=self.captions.max_tokens,
            transformer=self.transformer,
        )
        problems: list[Diagnostic] = []
        try:
            for start, part in _parts(missing, _CAPTIONS_AT_ONCE):
                problems.extend(self._encode_captions(encoder, part, start, len(missing)))
        finally:
            self.cache.flush()
        del encoder
        release(self.device)
        if problems:
            raise IdeoflowError(problems[:20])
        return len(missing)

    def _encode_captions(
        self, encoder: TextEncoder, captions: Mapping[str, str], before: int, total: int
    ) -> list[Diagnostic]:
        tokens: dict[str, list[int]] = {}
        problems: list[Diagnostic] = []
        for key, caption in captions.items():
            try:
                tokens[key] = encoder.tokens(caption)
            except IdeoflowError as error:
                problems.extend(error.diagnostics)  # one long caption must not hide the next
        groups = encoder.encode_tokens(
            list(tokens.values()),
            lambda done: self.progress("captions", before + done, total),
            before_results=self.cache.wait,  # so that no more than one shard is encoded and not on the disk
            result_bytes=SHARD_BYTES,
        )
        keys = iter(tokens)
        for features in groups:
            for value in features:
                key = next(keys)
                _refuse_odd(value, f"the caption {captions[key][:80]}", encoder.part)
                self.cache.put(key, value, kind="text", base=self.keys.text)
            self.cache.close()  # and is written while the next ones are encoded
        return problems

    def encode_pictures(self, samples: Sequence[Sample]) -> int:
        """Encodes the pictures that are not cached yet; says how many they were.

        Raises:
            IdeoflowError: with every picture that cannot be decoded; all the others are cached by then. With
                the first whose latents are not finite.
        """
        missing = self._missing(dict(zip(self._latents_keys(samples), samples, strict=True)))
        if not missing:
            return 0
        self.progress("pictures", 0, len(missing))
        vae = load_vae(self.folder, dtype=self.dtype, device=self.device)
        problems: list[Diagnostic] = []
        try:
            pictures = _ahead(partial(_load, device=self.device), missing)
            for done, (key, latents) in enumerate(encode_in_turn(vae, pictures), 1):
                if isinstance(latents, IdeoflowError):
                    problems.extend(latents.diagnostics)  # one bad picture must not hide the next
                else:
                    _refuse_odd(latents, f"the picture {missing[key].picture}", self.folder / "vae")
                    self.cache.put(key, latents, kind="latents", base=self.keys.vae)
                self.progress("pictures", done, len(missing))
        finally:
            self.cache.flush()
        del vae
        release(self.device)
        if problems:
            raise IdeoflowError(problems[:20])
        return len(missing)

    def encoded(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Under which keys the encoded forms of each sample are, whether or not they are there."""
        return [
            Encoded(
                key,
                tuple(self.keys.caption(c) for c in self.texts(s)),
                (s.size[1] // PIXELS_PER_TOKEN, s.size[0] // PIXELS_PER_TOKEN),
            )
            for key, s in zip(self._latents_keys(samples), samples, strict=True)
        ]

    def text_features(self, caption: str) -> Tensor:
        """Cached projected features (tokens, hidden) of a caption that was encoded before."""
        return self.cache.get(self.keys.caption(caption))

    def _latents_keys(self, samples: Sequence[Sample]) -> list[str]:
        digests = self.digests.of([s.picture for s in samples])
        return [self.keys.latents(s, digest) for s, digest in zip(samples, digests, strict=True)]

    def _missing(self, wanted: dict[str, T]) -> dict[str, T]:
        """What of this process's share is not cached."""
        mine = [key for key in wanted if share_of(key, self.rank, self.ranks)]
        return {key: wanted[key] for key, gone in zip(mine, self.cache.missing(mine), strict=True) if gone}


def _refuse_odd(value: Tensor, what: str, part: Path) -> None:
    """What is not finite is never cached: a repaired base need not have another digest."""
    if not value.isfinite().all():
        message = f"{what} came out of {part} as numbers that are not finite"
        fail(NOT_FINITE, message, cure=f"remove the files in {part} and download them again")


def encode_in_turn(
    vae: AutoencoderKLFlux2, pictures: Iterable[tuple[str, Future[Tensor]]]
) -> Iterator[tuple[str, Tensor | IdeoflowError]]:
    """Latents (tokens, 128) on the host of each picture, or why it could not be decoded.

    A GPU is given the next picture before the latents of the last one are waited for.
    """
    under_way: deque[tuple[str, Tensor, torch.cuda.Event | None]] = deque()

    def fetched() -> tuple[str, Tensor]:
        key, latents, copied = under_way.popleft()
        if copied is not None:
            copied.synchronize()
        return key, latents

    for key, pixels in pictures:
        try:
            on_device = pixels.result().to(vae.device, non_blocking=True)
        except IdeoflowError as error:
            yield key, error
            continue
        latents = encode_pixels(vae, on_device[None])[0]
        if vae.device.type == "cuda":
            host = torch.empty(latents.shape, pin_memory=True).copy_(latents, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            under_way.append((key, host, event))
        else:
            under_way.append((key, latents, None))
        while len(under_way) > (vae.device.type == "cuda"):
            yield fetched()
    while under_way:
        yield fetched()


def _load(sample: Sample, device: torch.device) -> Tensor:
    """Pixels of a sample, where a GPU can fetch them without holding up anyone."""
    pixels = load_pixels(sample)
    return pixels.pin_memory() if device.type == "cuda" else pixels


def _parts(items: Mapping[str, T], size: int) -> Iterator[tuple[int, dict[str, T]]]:
    """Runs of at most ``size`` items, each with the number of those before it."""
    rest = iter(items.items())
    start = 0
    while part := dict(islice(rest, size)):
        yield start, part
        start += len(part)


def _ahead(
    load: Callable[[Sample], Tensor], samples: Mapping[str, Sample]
) -> Iterator[tuple[str, Future[Tensor]]]:
    """Loads samples in threads, in order, a few ahead of whoever asks."""
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[str, Future[Tensor]]] = deque()
        try:
            for key, sample in samples.items():
                waiting.append((key, pool.submit(load, sample)))
                if len(waiting) > 2 * _DECODERS:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)


def release(device: torch.device) -> None:
    """Gives the memory of what was just deleted back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
