"""Under which keys a sample's encoded forms are cached (torch-free)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ideoflow.data.captions import caption_variants
from ideoflow.data.memory import FileMemory, stamps
from ideoflow.data.pictures import Stored, container, picture_digest, stored_name
from ideoflow.data.shards import cache_key
from ideoflow.data.survey import Dataset, Prompt, Sample
from ideoflow.recipe import CaptionSettings

# Types that anything is encoded in: the arithmetic's, whatever the precision of the weights.
DTYPES = ("float32", "bfloat16")
# Where a cache keeps the digests of the pictures that it has met.
DIGESTS = "pictures.sqlite"

_READERS = 8


@dataclass(frozen=True)
class Keys:
    """Names what is encoded by one base, in one type; ``dtype`` as torch calls it, such as ``bfloat16``."""

    base: str
    dtype: str
    max_tokens: int

    def text(self, caption: str) -> str:
        """Key of the projected features of a caption (canonical JSON)."""
        # max_tokens belongs to it: a lower limit must refuse captions that a higher one let through.
        return cache_key(
            "text", base=self.base, dtype=self.dtype, max_tokens=self.max_tokens, caption=caption
        )

    def latents(self, sample: Sample, digest: str) -> str:
        """Key of the latents of a sample, whose picture's file has this digest."""
        return cache_key(
            "latents",
            base=self.base,
            dtype=self.dtype,
            size=sample.size,
            window=sample.geometry.window,
            flip=sample.geometry.flip,
            pixels=digest,
        )


def share_of(key: str, rank: int, ranks: int) -> bool:
    """Whether encoding this is the part of process ``rank`` of ``ranks``: even shares, without any talk."""
    return int(key[-8:], 16) % ranks == rank


def needed_keys(
    keys: Keys, dataset: Dataset, prompts: Sequence[Prompt], captions: CaptionSettings, digests: Sequence[str]
) -> tuple[set[str], set[str]]:
    """Keys of every caption, in all its variants, and of every picture that a run reads.

    ``digests`` are those of the samples' pictures; an empty one is of a picture that is not known yet.
    """
    texts = {keys.text(c) for s in dataset.samples for c in caption_variants(s.captions, captions)}
    texts |= {keys.text(p.caption) for p in prompts}
    latents = {keys.latents(s, digest) for s, digest in zip(dataset.samples, digests, strict=True)}
    return texts, latents


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
            known.update(zip(unknown, pool.map(picture_digest, unknown), strict=True))
        self.memory.put((names[p], versions[p], known[p]) for p in unknown)
        return [known[p] for p in pictures]
