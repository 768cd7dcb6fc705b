"""Where each cached entry lies: shards of many entries, and an index over them (torch-free).

A *shard* is one safetensors file of encoded pictures or captions, each under its key, with a CRC-32 of each
in the file's metadata. A *key* is a digest of everything that the entry depends on, so an entry is never out
of date: whatever changes makes another key.

How this stays whole, whoever writes and whenever the process or the machine stops:

- A shard is written beside its place, synchronised, and renamed: it is there whole or not at all. After that
  it is never changed, only removed. None is begun before the one before it is there, so what a kill can cost
  is the one shard that was being filled.
- The headers of the shards *are* the index. There is no second file that could disagree with them, and
  nothing to repair after a kill: opening a cache is reading the headers that are not known yet.
- Every writer makes shards of its own, with names that nobody else chooses, and takes no lock. Two processes
  that encode the same thing at once both keep it; the older shard is read, and pruning empties the other.
- Repairing and pruning write what is kept into a new shard before they remove the old one. A reader that
  finds a shard gone looks at the folder again.
- For very many shards, reading their headers takes minutes. So the index is written down as a *snapshot*,
  which is only a short cut: what it says of a shard counts while a file of that name and size is there, and a
  damaged or missing snapshot costs nothing but that time.

In memory the index is a few sorted arrays: 32 bytes an entry.

Rejected: one SQLite database for all, which is not dependable on the network file systems where large data
sets lie, and which can disagree with the files; a journal appended to by all, which needs locks there; one
file an entry, which is 20 million files for 10 million pictures.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ideoflow.data.keys import FORMAT
from ideoflow.model.files import safetensors_header
from ideoflow.resources import whole_file

SUFFIX = ".safetensors"
_SNAPSHOT = "index.npz"
# Headers read in one go that are worth a snapshot.
_SNAPSHOT_AFTER = 256
# A shard is closed after a minute: a scratch file that is older than this belongs to nobody any more.
_SCRATCH_SECONDS = 3600.0
# Bytes that are read at a time.
_PIECE = 256 << 10
_COLUMNS = {"high": "<u8", "low": "<u8", "shard": "<u4", "begin": "<u4", "length": "<u4", "crc": "<u4"}

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of entries that have everything but their keys and lengths in common.

    Args:
        name: of the file, within the cache's folder.
        size: of the file, in bytes.
        kind: ``latents`` or ``text``.
        base: digest of the part of the base that encoded them.
        dtype: as safetensors writes it, such as ``BF16``.
        columns: numbers in each row of an entry.
        entries: how many there are.
    """

    name: str
    size: int
    kind: str
    base: str
    dtype: str
    columns: int
    entries: int


class Place(NamedTuple):
    """Where an entry's bytes are, and their CRC-32."""

    shard: Shard
    begin: int
    length: int
    crc: int


def new_shard_name(kind: str) -> str:
    """A name that no other writer chooses; older shards sort first."""
    return f"{kind}-{time.time_ns():016x}-{secrets.token_hex(4)}{SUFFIX}"


def mark_used(folder: Path, shards: Iterable[Shard]) -> None:
    """Sets the time of shards' files, so that pruning knows when they were last of use."""
    for shard in shards:
        with contextlib.suppress(OSError):  # somebody else's files, or gone
            os.utime(folder / shard.name)


def leftovers(folder: Path) -> list[Path]:
    """Scratch files that nobody writes any more."""
    if not folder.is_dir():
        return []
    old = time.time() - _SCRATCH_SECONDS
    return [p for p in folder.iterdir() if p.name.startswith(".") and p.is_file() and p.stat().st_mtime < old]


def read_shard(file: Path) -> tuple[Shard, Arrays]:
    """A shard and where its entries are, from its header alone; ``shard`` numbers are left 0.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or no shard of this format.
    """
    tensors, metadata = safetensors_header(file)
    try:
        names = sorted(tensors)
        if metadata["format"] != str(FORMAT) or not names:
            raise ValueError(f"not a shard of format {FORMAT}")
        if (size := file.stat().st_size) >= 1 << 32:
            raise ValueError("a shard ends before 4 GiB")
        offsets = np.array([tensors[n]["data_offsets"] for n in names], dtype=np.int64)
        sums = [int(word, 16) for word in metadata["crc32"].split()]
        first = tensors[names[0]]
        shard = Shard(file.name, size, metadata["kind"], metadata["base"], first["dtype"], first["shape"][1],
                      len(names))  # fmt: skip
        start = size - int(offsets.max())
        rows = _empty(len(names))
        rows["high"], rows["low"] = split_keys(names)
        rows["begin"][:], rows["length"][:] = start + offsets[:, 0], offsets[:, 1] - offsets[:, 0]
        rows["crc"][:] = sums
    except (LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"not a shard: {error}") from None
    return shard, rows


def shard_metadata(kind: str, base: str, sums: Mapping[str, int]) -> dict[str, str]:
    """A shard's metadata; ``sums`` holds each key's CRC-32."""
    words = " ".join(f"{sums[key]:08x}" for key in sorted(sums))
    return {"format": str(FORMAT), "kind": kind, "base": base, "crc32": words}


def split_keys(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """High and low 64 bits of keys."""
    pairs = np.frombuffer(bytes.fromhex("".join(keys)), ">u8").reshape(-1, 2)
    return pairs[:, 0].astype("<u8"), pairs[:, 1].astype("<u8")


def places(shard: Shard, rows: Arrays) -> Iterator[tuple[str, Place]]:
    """Key and place of each entry of one shard."""
    columns = (rows[name].tolist() for name in ("begin", "length", "crc"))
    for key, *place in zip(join_keys(rows), *columns, strict=True):
        yield key, Place(shard, *place)


def read_bytes(folder: Path, place: Place, into: np.ndarray) -> bool:
    """Reads an entry into an array of ``place.length`` bytes; whether they are those that were written.

    Raises:
        OSError: its file is gone or cannot be read.
    """
    # Not mapped: a file that something else cuts while it is mapped stops the process (SIGBUS).
    with (folder / place.shard.name).open("rb", buffering=0) as stream:
        stream.seek(place.begin)
        content, crc = memoryview(into), 0
        for start in range(0, place.length, _PIECE):
            piece = content[start : start + _PIECE]
            if stream.readinto(piece) != len(piece):
                return False
            crc = zlib.crc32(piece, crc)  # while it is in the processor's cache, and the disk reads ahead
    return crc == place.crc


def join_keys(rows: Arrays) -> list[str]:
    """The keys of rows, as they were given to :func:`split_keys`."""
    digits = np.stack([rows["high"], rows["low"]], 1).astype(">u8").tobytes().hex()
    return [digits[i : i + 32] for i in range(0, len(digits), 32)]


class Index:
    """Every entry of a folder of shards. Reading it changes nothing in the folder but the snapshot."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards: list[Shard] = []
        self.damaged: list[str] = []  # names of files that are no shards
        self._numbers: dict[str, int] = {}  # shard name -> its place in ``shards``
        self._rows = _empty(0)
        self._fresh: dict[str, Place] = {}  # entries of this process's own newest shards
        self._opened = False

    def __len__(self) -> int:
        """Entries; those that lie in several shards count once."""
        return int(self.is_first().sum())

    @property
    def nbytes(self) -> int:
        """Memory that the sorted arrays take."""
        return sum(column.nbytes for column in self._rows.values())

    def is_first(self) -> np.ndarray:
        """Which of the rows are read: of rows with the same key, those of the oldest shard."""
        high, low = self.rows["high"], self.rows["low"]
        first = np.ones(len(high), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        return first

    @property
    def rows(self) -> Arrays:
        """The arrays, sorted by key, then by age of the shard."""
        self._merge_fresh()
        return self._rows

    def refresh(self) -> None:
        """Follows the folder: takes in the shards that are new, forgets those that are gone or changed."""
        present = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as listing:
            for entry in listing:
                if entry.name.endswith(SUFFIX) and not entry.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        present[entry.name] = entry.stat().st_size
        if not self._opened:
            self._opened = True
            if len(present) >= _SNAPSHOT_AFTER:
                self._read_snapshot()
        self._merge_fresh()
        self._keep({s.name for s in self.shards if present.get(s.name) == s.size})
        self.damaged = []
        read: list[tuple[Shard, Arrays]] = []
        for name in sorted(present.keys() - self._numbers.keys()):
            try:
                read.append(read_shard(self.folder / name))
            except FileNotFoundError:
                continue
            except (OSError, ValueError):
                self.damaged.append(name)
        self._take(read)
        if len(read) >= _SNAPSHOT_AFTER:
            self._write_snapshot()

    def find(self, key: str) -> Place | None:
        """Where an entry is; None if there is none."""
        if (fresh := self._fresh.get(key)) is not None:
            return fresh
        high, low = (column[0] for column in split_keys([key]))
        at = int(np.searchsorted(self._rows["high"], high))
        while at < len(self._rows["high"]) and self._rows["high"][at] == high:
            if self._rows["low"][at] == low:
                shard, begin, length, crc = (int(self._rows[n][at]) for n in list(_COLUMNS)[2:])
                return Place(self.shards[shard], begin, length, crc)
            at += 1
        return None

    def has(self, keys: Sequence[str]) -> np.ndarray:
        """Which of many keys are there, as booleans."""
        self._merge_fresh()
        if not keys or not len(self._rows["high"]):
            return np.zeros(len(keys), bool)
        high, low = split_keys(keys)
        at = np.searchsorted(self._rows["high"], high).clip(max=len(self._rows["high"]) - 1)
        found = (self._rows["high"][at] == high) & (self._rows["low"][at] == low)
        # Two keys that share their first 64 bits are next to never there, but would be looked for singly.
        for i in np.flatnonzero((self._rows["high"][at] == high) & ~found):
            found[i] = self.find(keys[i]) is not None
        return found

    def used(self, keys: Sequence[str]) -> list[Shard]:
        """The shards in which any of these keys is."""
        self._merge_fresh()
        if not keys or not len(self._rows["high"]):
            return []
        high, _ = split_keys(keys)
        at = np.searchsorted(self._rows["high"], high).clip(max=len(self._rows["high"]) - 1)
        there = at[self._rows["high"][at] == high]
        return [self.shards[n] for n in np.unique(self._rows["shard"][there]).tolist()]

    def add(self, shard: Shard, rows: Arrays) -> None:
        """Takes in a shard that this process has written."""
        self._numbers[shard.name] = len(self.shards)
        self.shards.append(shard)
        for key, begin, length, crc in zip(
            join_keys(rows), *(rows[n].tolist() for n in ("begin", "length", "crc")), strict=True
        ):
            self._fresh.setdefault(key, Place(shard, begin, length, crc))
        # Folding sorts everything, so the more there is, the more must have come together.
        if len(self._fresh) > max(1 << 16, len(self._rows["high"]) // 8):
            self._merge_fresh()

    def _merge_fresh(self) -> None:
        if self._fresh:
            rows = _empty(len(self._fresh))
            rows["high"], rows["low"] = split_keys(list(self._fresh))
            rows["shard"][:] = [self._numbers[p.shard.name] for p in self._fresh.values()]
            for column in ("begin", "length", "crc"):
                rows[column][:] = [getattr(p, column) for p in self._fresh.values()]
            self._fresh = {}
            self._rows = _sorted([self._rows, rows])

    def _keep(self, names: set[str]) -> None:
        if len(names) == len(self.shards):
            return
        stays = np.array([s.name in names for s in self.shards], bool)
        renumbered = np.cumsum(stays) - 1
        rows = stays[self._rows["shard"]] if len(self.shards) else np.zeros(0, bool)
        self._rows = {name: column[rows] for name, column in self._rows.items()}
        self._rows["shard"] = renumbered[self._rows["shard"]].astype("<u4")
        self.shards = [s for s, stay in zip(self.shards, stays, strict=True) if stay]
        self._numbers = {s.name: n for n, s in enumerate(self.shards)}

    def _take(self, read: Iterable[tuple[Shard, Arrays]]) -> None:
        parts = [self._rows]
        for shard, rows in read:
            rows["shard"][:] = len(self.shards)
            self._numbers[shard.name] = len(self.shards)
            self.shards.append(shard)
            parts.append(rows)
        if len(parts) > 1:
            self._rows = _sorted(parts)

    def _read_snapshot(self) -> None:
        try:
            with np.load(self.folder / _SNAPSHOT, allow_pickle=False) as file:  # a zip, with sums of its own
                shards = [Shard(**fields) for fields in json.loads(file["shards"].tobytes())]
                rows = {name: file[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile):
            return
        if len({len(column) for column in rows.values()}) == 1 and rows["shard"].max(initial=0) < len(shards):
            self.shards, self._rows = shards, rows
            self._numbers = {s.name: n for n, s in enumerate(shards)}

    def _write_snapshot(self) -> None:
        fields = [{name: getattr(s, name) for name in Shard.__slots__} for s in self.shards]
        table = np.frombuffer(json.dumps(fields).encode(), np.uint8)
        # Only a short cut: where it cannot be written, the headers are read again next time.
        with (
            contextlib.suppress(OSError),
            whole_file(self.folder / _SNAPSHOT) as scratch,
            scratch.open("xb") as stream,
        ):
            np.savez(stream, shards=table, **self._rows)


def _empty(count: int) -> Arrays:
    return {name: np.zeros(count, kind) for name, kind in _COLUMNS.items()}


def _sorted(parts: Sequence[Arrays]) -> Arrays:
    """All parts' rows by key; rows with the same key in the order of the parts."""
    rows = {name: np.concatenate([p[name] for p in parts]) for name in _COLUMNS}
    order = np.lexsort((rows["low"], rows["high"]))  # stable
    return {name: column[order] for name, column in rows.items()}
