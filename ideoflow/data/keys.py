"""Under which keys a sample's encoded forms are cached (torch-free)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ideoflow.data.captions import caption_variants
from ideoflow.data.memory import FileMemory, stamps
from ideoflow.data.pictures import Stored, container, picture_digest, stored_name
from ideoflow.data.survey import Dataset, Prompt, Sample
from ideoflow.model.base import NANO, BaseFacts
from ideoflow.model.digest import sampled_digest, samples
from ideoflow.model.files import data_start, read_safetensors_header, weight_files
from ideoflow.plan.document import Cached, DataSummary
from ideoflow.recipe import CaptionSettings, Recipe
from ideoflow.resources import user_cache

# Raise when the meaning of cached values changes.
FORMAT = 2
# Types that anything is encoded in: the arithmetic's, whatever the precision of the weights.
DTYPES = ("float32", "bfloat16")
# Where a cache keeps the digests of the pictures that it has met.
DIGESTS = "pictures.sqlite"

# Files that decide what becomes of a caption: weights, configurations, vocabularies, chat templates.
_TEXT_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
_READERS = 8
# Pictures that are read anew after a kill, at most.
_REMEMBERED_TOGETHER = 2048
# Captions with their variants that a plan looks up.
_LOOK_AT_MOST = 50_000


def cache_key(kind: str, **facts: Any) -> str:
    """128 bits of SHA-256, as 32 digits, over all that a value depends on; ``facts`` must be JSON data."""
    plain = json.dumps({"kind": kind, "format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def cache_folder(asked: str | None) -> Path:
    """The folder that ``cache.folder`` names; by default the one that all recipes of a user share."""
    return Path(asked).expanduser() if asked else user_cache() / "encoded"


@dataclass(frozen=True)
class Keys:
    """Names what is encoded by one base, in one type.

    Args:
        vae: digest of what encodes pictures.
        text: digest of what encodes captions.
        dtype: as torch calls it, such as ``bfloat16``.
        max_tokens: of a caption.
    """

    vae: str
    text: str
    dtype: str
    max_tokens: int

    @classmethod
    def of(cls, base: BaseFacts, dtype: str, max_tokens: int) -> Keys:
        """Those of a base that is there, or of one that is not yet."""
        return cls(*encoder_digests(base), dtype, max_tokens)

    def caption(self, caption: str) -> str:
        """Key of the projected features of a caption (canonical JSON)."""
        # max_tokens belongs to it: a lower limit must refuse captions that a higher one let through.
        return cache_key(
            "text", base=self.text, dtype=self.dtype, max_tokens=self.max_tokens, caption=caption
        )

    def latents(self, sample: Sample, digest: str) -> str:
        """Key of the latents of a sample, whose picture's file has this digest."""
        return cache_key(
            "latents",
            base=self.vae,
            dtype=self.dtype,
            size=sample.size,
            window=sample.geometry.window,
            flip=sample.geometry.flip,
            pixels=digest,
        )


def encoder_digests(base: BaseFacts) -> tuple[str, str]:
    """(of what encodes pictures, of what encodes captions): all that cached values depend on in a base.

    Captions are projected by three tensors of the transformer; its other weights, and the second transformer,
    change nothing that is cached.

    Raises:
        IdeoflowError: when the base cannot be read any more.
    """
    if not base.present or base.folder is None or base.name == NANO:
        return base.digest, base.digest
    encoder = sampled_digest(base.folder, only=("text_encoder", "tokenizer"), suffixes=_TEXT_FILES)
    text = hashlib.sha256(encoder.encode())
    for file in weight_files(base.files.get("transformer", base.folder / "transformer")):
        tensors = read_safetensors_header(file)
        data = data_start(file, tensors)
        for name in sorted(n for n in tensors if "llm_cond_" in n):
            begin, end = tensors[name].pop("data_offsets")
            text.update(f"{name[name.index('llm_cond_') :]} {tensors[name]}".encode())
            for sample in samples(file, data + begin, end - begin):
                text.update(sample)
    return sampled_digest(base.folder, only=("vae",)), text.hexdigest()


def share_of(key: str, rank: int, ranks: int) -> bool:
    """Whether encoding this is the part of process ``rank`` of ``ranks``: even shares, without any talk."""
    return int(key[-8:], 16) % ranks == rank


def needed_keys(
    keys: Keys, dataset: Dataset, prompts: Sequence[Prompt], captions: CaptionSettings, digests: Sequence[str]
) -> tuple[set[str], set[str]]:
    """Keys of every caption, in all its variants, and of every picture that a run reads.

    ``digests`` are those of the samples' pictures; an empty one is of a picture that is not known yet.
    """
    texts = {keys.caption(c) for s in dataset.samples for c in caption_variants(s.captions, captions)}
    texts |= {keys.caption(p.caption) for p in prompts}
    latents = {keys.latents(s, digest) for s, digest in zip(dataset.samples, digests, strict=True)}
    return texts, latents


def with_encoding(
    summary: DataSummary, recipe: Recipe, dataset: Dataset, prompts: Sequence[Prompt], base: BaseFacts | None
) -> DataSummary:
    """The summary of a data set with how much there is to encode, and what of it is cached.

    ``base`` is None where the cache is to be left aside. Reads no picture: one whose digest is not remembered
    counts as not cached. Sets so large that looking would take seconds are only counted.
    """
    captions, samples = recipe.tables.captions, dataset.samples
    if len(samples) * captions.most_variants > _LOOK_AT_MOST:
        return replace(summary, captions=sum(max(len(s.captions), captions.most_variants) for s in samples))
    texts = {c for s in samples for c in caption_variants(s.captions, captions)}
    summary = replace(summary, captions=len(texts))
    folder = cache_folder(recipe.tables.cache.folder)
    if base is None or not any(folder.glob("*.safetensors")):
        return summary
    from ideoflow.data.shards import Index  # numpy, which plans otherwise do without

    index = Index(folder)
    index.refresh()
    digests = PictureDigests(folder / DIGESTS).known([s.picture for s in samples])
    texts |= {p.caption for p in prompts}
    keys, found = Keys.of(base, "", captions.max_tokens), []
    for dtype in DTYPES:
        keys = replace(keys, dtype=dtype)
        latents = {keys.latents(s, digest) for s, digest in zip(samples, digests, strict=True) if digest}
        counts = (int(index.has(wanted).sum()) for wanted in (list(map(keys.caption, texts)), list(latents)))
        found.append(Cached(dtype, *counts))
    return replace(summary, cached=tuple(c for c in found if c.captions or c.crops))


class PictureDigests:
    """Digests of pictures' bytes, remembered between runs: no picture is read twice."""

    def __init__(self, memory: Path) -> None:
        self.memory = FileMemory("digest", memory)

    def known(self, pictures: Sequence[Stored]) -> list[str | None]:
        """Digests of those pictures that are remembered; opens none of them."""
        return self.memory.get([stored_name(p) for p in pictures], stamps(map(container, pictures)))

    def of(self, pictures: Sequence[Stored]) -> list[str]:
        """Digests of the pictures.

        Raises:
            IdeoflowError: when one cannot be read any more.
        """
        versions = dict(zip(pictures, stamps(map(container, pictures)), strict=True))
        names = {p: stored_name(p) for p in versions}
        known = dict(zip(names, self.memory.get(list(names.values()), list(versions.values())), strict=True))
        unknown = [p for p, digest in known.items() if digest is None]
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(unknown), _REMEMBERED_TOGETHER):
                part = unknown[start : start + _REMEMBERED_TOGETHER]
                known.update(zip(part, pool.map(picture_digest, part), strict=True))
                self.memory.put((names[p], versions[p], known[p]) for p in part)
        return [known[p] for p in pictures]
