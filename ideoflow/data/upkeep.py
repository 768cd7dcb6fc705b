"""What is in a cache, whether it is whole, and making room in it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ideoflow.data.keys import DIGESTS, DTYPES, Keys, PictureDigests, cache_folder, needed_keys
from ideoflow.data.shards import Index, Shard, join_keys, leftovers, places, read_bytes, read_shard
from ideoflow.data.survey import read_dataset, read_prompts
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.data import CACHE_UNWRITABLE
from ideoflow.model.base import locate_base
from ideoflow.recipe import load_recipe

DAY = 86400.0
# Shards below this share of a full one are put together.
_SMALL = 0.25
_READERS = 8

# progress(stage, done, total)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Holding:
    """All entries of one kind, base and type: how many in how many files, and what of it is there twice."""

    kind: str
    base: str
    dtype: str
    entries: int
    duplicates: int
    shards: int
    bytes: int
    unused_days: float


@dataclass(frozen=True)
class Stats:
    """What a cache holds; ``index_bytes`` is the memory of its index, ``damaged`` names files to remove."""

    folder: Path
    holdings: tuple[Holding, ...]
    damaged: tuple[str, ...]
    leftovers: int
    index_bytes: int


def stats(folder: Path) -> Stats:
    """Counts what is there, from the shards' headers alone."""
    index = _open(folder)
    rows, first = index.rows, index.is_first()
    counts = np.bincount(rows["shard"], minlength=len(index.shards))
    read = np.bincount(rows["shard"][first], minlength=len(index.shards))
    groups: dict[tuple[str, str, str], list[int]] = {}
    for number, shard in enumerate(index.shards):
        groups.setdefault((shard.kind, shard.base, shard.dtype), []).append(number)
    now = time.time()
    holdings = [
        Holding(
            *group,
            entries=int(read[numbers].sum()),
            duplicates=int((counts - read)[numbers].sum()),
            shards=len(numbers),
            bytes=sum(index.shards[n].size for n in numbers),
            unused_days=min(_age(folder, index.shards[n], now) for n in numbers) / DAY,
        )
        for group, numbers in sorted(groups.items())
    ]
    return Stats(folder, tuple(holdings), tuple(index.damaged), len(leftovers(folder)), index.nbytes)


@dataclass(frozen=True)
class Verified:
    """What was read; how many entries of which shards are damaged, and which files are no shards."""

    entries: int
    bytes: int
    damaged: dict[str, int]
    unreadable: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.damaged and not self.unreadable


def verify(folder: Path, *, repair: bool = False, progress: Progress = lambda *_: None) -> Verified:
    """Reads everything and compares it with its sums.

    Args:
        repair: removes what is damaged, so that it is encoded anew when it is next wanted.

    Raises:
        IdeoflowError: when something is to be removed and cannot be.
    """
    index = _open(folder)
    damaged: dict[str, int] = {}
    unreadable = list(index.damaged)
    entries = size = 0
    with ThreadPoolExecutor(_READERS) as pool:
        checked = pool.map(lambda shard: _bad_entries(folder, shard), index.shards)
        for done, (shard, bad) in enumerate(zip(index.shards, checked, strict=True), 1):
            if bad is None:
                continue  # removed meanwhile
            entries, size = entries + shard.entries, size + shard.size
            if bad:
                damaged[shard.name] = bad
            progress("verify", done, len(index.shards))
    if repair:
        from ideoflow.data.cache import rewrite_shard  # torch, which only changes need

        with _told(folder):
            for shard in index.shards:
                if shard.name in damaged:
                    rewrite_shard(folder, shard)
            for name in unreadable:
                (folder / name).unlink(missing_ok=True)
    return Verified(entries, size, damaged, tuple(unreadable))


def _bad_entries(folder: Path, shard: Shard) -> int | None:
    """How many entries of a shard are damaged; None where it is gone."""
    try:
        _, rows = read_shard(folder / shard.name)
        content = np.empty(int(rows["length"].max()), np.uint8)
        return sum(not read_bytes(folder, place, content[: place.length]) for _, place in places(shard, rows))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return shard.entries


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be; ``merged`` counts the small or thinned shards that were put together."""

    entries: int
    bytes: int
    merged: int
    leftovers: int


def prune(
    folder: Path,
    *,
    keep: Iterable[str] | None = None,
    unused_days: float | None = None,
    dry_run: bool = False,
    progress: Progress = lambda *_: None,
) -> Pruned:
    """Removes what is not wanted any more, what is there twice, and what broken-off writes have left.

    What stays is written before anything is removed, so a kill loses nothing; and whoever reads the cache
    meanwhile finds what was moved.

    Args:
        keep: keys that stay, whatever their age; None: those of shards that were used lately.
        unused_days: entries of shards that were used within so many days stay; None: age does not count, so
            everything stays if there is no ``keep`` either.
        dry_run: only counts.

    Raises:
        IdeoflowError: when the folder cannot be written.
    """
    from ideoflow.data.cache import SHARD_BYTES, TensorCache, read_entry  # torch, which only changes need

    index = _open(folder)
    rows, wanted = index.rows, index.is_first()
    if keep is not None or unused_days is not None:
        named = _named(index, keep)
        if unused_days is not None:
            now = time.time()
            lately = [_age(folder, shard, now) < unused_days * DAY for shard in index.shards]
            named |= np.array(lately, bool)[rows["shard"]]
        wanted &= named
    stays = np.bincount(rows["shard"][wanted], minlength=len(index.shards))
    thinned = {n for n, shard in enumerate(index.shards) if stays[n] < shard.entries}
    merged = thinned | _small(index, thinned, SHARD_BYTES * _SMALL)
    removed, broken_off = int((~wanted).sum()), leftovers(folder)
    size = int(rows["length"][~wanted].sum())
    if not dry_run:
        with _told(folder):
            writer = TensorCache(folder)
            by_shard = np.argsort(rows["shard"], kind="stable")
            starts = np.searchsorted(rows["shard"][by_shard], np.arange(len(index.shards) + 1))
            emptied: list[Shard] = []
            for done, number in enumerate(sorted(merged), 1):
                shard = index.shards[number]
                mine = by_shard[starts[number] : starts[number + 1]]
                mine = mine[wanted[mine]]
                for key, place in places(shard, {name: column[mine] for name, column in rows.items()}):
                    if (value := read_entry(folder, place)) is not None:
                        writer.put(key, value, kind=shard.kind, base=shard.base)
                emptied.append(shard)
                # Removed when what stays of them is on the disk, and before that holds everything twice.
                if sum(s.size for s in emptied) > 4 * SHARD_BYTES or done == len(merged):
                    writer.flush()
                    for shard in emptied:
                        (folder / shard.name).unlink(missing_ok=True)
                    emptied = []
                progress("prune", done, len(merged))
            for file in [*broken_off, *(folder / name for name in index.damaged)]:
                file.unlink(missing_ok=True)
    return Pruned(removed, size, len(merged), len(broken_off) + len(index.damaged))


def keys_of_recipe(path: str | Path) -> set[str]:
    """Keys of everything that a recipe may read from the cache, in whichever type it is planned.

    Raises:
        IdeoflowError: with everything that is wrong with the recipe or its data.
    """
    recipe = load_recipe(path)
    dataset, prompts, model = read_dataset(recipe), read_prompts(recipe), recipe.tables.model
    span, captions = recipe.span("model.base"), recipe.tables.captions
    base = locate_base(
        model.base, revision=model.revision, parts=model.parts, relative_to=recipe.folder, span=span
    )
    digests = PictureDigests(cache_folder(recipe.tables.cache.folder) / DIGESTS)
    pictures = digests.of([s.picture for s in dataset.samples])
    kinds = (Keys.of(base, dtype, captions.max_tokens) for dtype in DTYPES)
    return set().union(*(key for k in kinds for key in needed_keys(k, dataset, prompts, captions, pictures)))


def _named(index: Index, keep: Iterable[str] | None) -> np.ndarray:
    """Which rows' keys are among ``keep``."""
    if keep is None:
        return np.zeros(len(index.rows["high"]), bool)
    kept = set(keep)
    return np.fromiter((key in kept for key in join_keys(index.rows)), bool, len(index.rows["high"]))


def _small(index: Index, thinned: set[int], limit: float) -> set[int]:
    """Small shards that have others to be put together with."""
    groups: dict[tuple[str, str, str, int], list[int]] = {}
    for number, shard in enumerate(index.shards):
        if number in thinned or shard.size < limit:
            groups.setdefault((shard.kind, shard.base, shard.dtype, shard.columns), []).append(number)
    return {n for numbers in groups.values() if len(numbers) > 1 for n in numbers}


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cure = "see whose files they are, and whether the disk is full"
        fail(CACHE_UNWRITABLE, f"cannot change {folder}: {error.strerror or error}", cure=cure)


def _open(folder: Path) -> Index:
    index = Index(folder)
    index.refresh()
    return index


def _age(folder: Path, shard: Shard, now: float) -> float:
    """Seconds since a shard was written or used."""
    try:
        return max(0.0, now - (folder / shard.name).stat().st_mtime)
    except OSError:
        return 0.0
