"""Under which keys a sample's encoded forms are cached (torch-free)."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ideoflow.data.captions import caption_variants
from ideoflow.data.pictures import ParquetCell, Stored, TarMember, picture_digest
from ideoflow.data.shards import cache_key
from ideoflow.data.survey import Dataset, Prompt, Sample
from ideoflow.recipe import CaptionSettings

# Types that anything is encoded in: the arithmetic's, whatever the precision of the weights.
DTYPES = ("float32", "bfloat16")
# Where a cache keeps the digests of the pictures that it has met.
DIGESTS = "pictures.sqlite"

# A file that was written so shortly before may be written again without its times showing it.
_RACY_NS = 2_000_000_000
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
    """Digests of pictures' files, remembered between runs while a file's size, times and inode stay the same.

    What is remembered saves reading every picture at every start, and nothing depends on it: where the memory
    (an SQLite file) cannot be used, every file is read. As in git, files changed in the last two seconds are
    not remembered, since a further change might not show in their times.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory

    def known(self, pictures: Sequence[Stored]) -> list[str | None]:
        """Digests of those pictures that are remembered; opens none of them."""
        if not self.memory.exists():
            return [None] * len(pictures)
        query = "SELECT digest FROM pictures WHERE path = ? AND stamp = ?"
        try:
            with contextlib.closing(sqlite3.connect(self.memory)) as memory:
                rows = [memory.execute(query, (_name(p), _stamp(p))).fetchone() for p in pictures]
        except sqlite3.Error:
            return [None] * len(pictures)
        return [row[0] if row else None for row in rows]

    def of(self, pictures: Sequence[Stored]) -> list[str]:
        """Digests of the pictures.

        Raises:
            IdeoflowError: when one cannot be read any more.
        """
        known = dict(zip(pictures, self.known(pictures), strict=True))
        unknown = [p for p, digest in known.items() if digest is None]
        stamps = [_stamp(p) for p in unknown]
        with ThreadPoolExecutor(_READERS) as pool:
            found = dict(zip(unknown, pool.map(picture_digest, unknown), strict=True))
        self._remember([(_name(p), stamp, found[p]) for p, stamp in zip(unknown, stamps, strict=True)])
        return [known[p] or found[p] for p in pictures]

    def _remember(self, rows: Sequence[tuple[bytes, str, str]]) -> None:
        now = time.time_ns()
        settled = [row for row in rows if row[1] and now - int(row[1].split()[0]) > _RACY_NS]
        if not settled:
            return
        with contextlib.suppress(sqlite3.Error, OSError):
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.memory)) as memory, memory:
                memory.execute("CREATE TABLE IF NOT EXISTS pictures (path PRIMARY KEY, stamp, digest)")
                memory.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?)", settled)


def _name(picture: Stored) -> bytes:
    if isinstance(picture, TarMember):
        return _name(picture.tar) + b"\0%d" % picture.offset
    if isinstance(picture, ParquetCell):
        return _name(picture.file) + b"\0%s %d %d" % (os.fsencode(picture.column), picture.group, picture.row)
    return os.fsencode(picture.absolute())


def _stamp(picture: Stored) -> str:
    """Time of the last change, size and inode of the file that holds a picture; nothing where it is gone."""
    file: Path = getattr(picture, "tar", None) or getattr(picture, "file", None) or picture
    try:
        s = file.stat()
    except OSError:
        return ""
    return f"{max(s.st_mtime_ns, s.st_ctime_ns)} {s.st_mtime_ns} {s.st_size} {s.st_ino}"
