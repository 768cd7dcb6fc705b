"""Encoded pictures and captions, kept between runs; :mod:`ideoflow.data.shards` says how they stay whole."""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ideoflow.data.shards import (
    Arrays,
    Index,
    Place,
    Shard,
    leftovers,
    mark_used,
    new_shard_name,
    places,
    read_bytes,
    read_shard,
    shard_metadata,
)
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.data import CACHE_LOST, CACHE_UNWRITABLE
from ideoflow.resources import whole_file

# What a shard holds at most, and after how long it is closed whatever it holds.
SHARD_BYTES = 512 << 20
SHARD_SECONDS = 60.0
# Bytes that may wait for the disk: closing a shard takes no longer than these.
_UNSYNCED_BYTES = 32 << 20
# What an entry takes in the header at most, and the most room that is left for a header.
_ENTRY_WORDS, _LARGEST_ROOM = 128, 1 << 20

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# What the entries of a shard have in common: kind, digest of the encoder, type, columns.
Group = tuple[str, str, str, int]


class TensorCache:
    """A folder of tensors (rows, columns) by key.

    What is put is written by a thread of its own into the shard that is being filled, and :meth:`flush` waits
    until all of it is on the disk. No shard is begun before the one that was closed last is there, so that a
    kill costs one of them at most. One thread at a time may put; while nothing is put, several may get. Any
    number of processes may use the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = Index(folder)
        self.index.refresh()
        self._filling: dict[Group, _Filling] = {}
        self._closing: list[Future[tuple[Shard, Arrays]]] = []
        self._writer: ThreadPoolExecutor | None = None

    def missing(self, keys: Sequence[str]) -> list[bool]:
        """Which keys are not there, after a look at the folder; what is there counts as used today."""
        self.flush()
        self.index.refresh()
        mark_used(self.folder, self.index.used(keys))
        return [not found for found in self.index.has(keys)]

    def __contains__(self, key: str) -> bool:
        return not self.missing([key])[0]

    def get(self, key: str) -> Tensor:
        """The tensor, checked against its sum.

        Raises:
            IdeoflowError: when the entry is not there any more, or damaged (it is forgotten then).
        """
        if self._filling or self._closing:
            self.flush()
        for attempt in range(2):
            place = self.index.find(key)
            reason = "it is not there"
            if place is not None:
                try:
                    value = read_entry(self.folder, place)
                except OSError as error:
                    reason = error.strerror or str(error)
                else:
                    if value is not None:
                        return value
                    reason = "its content is damaged"
                    with contextlib.suppress(OSError):  # a disk that is full, or only read
                        rewrite_shard(self.folder, place.shard)
            if attempt == 0:
                self.index.refresh()  # another process may have moved the entry
        cure = "run again: it is made anew, and training goes on from the last checkpoint"
        fail(CACHE_LOST, f"a cached entry in {self.folder} cannot be read: {reason}", cure=cure)

    def put(self, key: str, value: Tensor, *, kind: str, base: str) -> None:
        """Keeps a tensor (rows, columns), soon.

        Raises:
            IdeoflowError: when the disk is full or the folder may not be written.
        """
        # A copy, so that it may be changed by whoever gave it.
        value = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        group = (kind, base, _NAMES[value.dtype], value.shape[1])
        if group not in self._filling:
            self.wait()
            if self._writer is None:  # what earlier kills left behind may be large
                with contextlib.suppress(OSError):
                    for file in leftovers(self.folder):
                        file.unlink()
            self._filling[group] = _Filling(ShardWriter(self.folder, kind, base, value.nbytes))
        filling = self._filling[group]
        if key not in filling.keys:
            filling.keys.add(key)
            filling.size += value.nbytes
            self._thread().submit(filling.shard.write, key, value)
        if filling.is_full(value.nbytes):
            self._close(group)
            self.wait()

    def close(self) -> None:
        """Has the shards that are being filled closed, without waiting for the disk."""
        for group in list(self._filling):
            self._close(group)

    def wait(self) -> None:
        """Waits until every shard that was closed is on the disk; raises like :meth:`put`."""
        while self._closing:
            try:
                self.index.add(*self._closing.pop(0).result())
            except OSError as error:
                cure = "free some space, or name another folder in cache.folder or IDEOFLOW_CACHE"
                fail(CACHE_UNWRITABLE, f"cannot write to {self.folder}: {error.strerror or error}", cure=cure)

    def flush(self) -> None:
        """Waits until everything that was put is on the disk; raises like :meth:`put`."""
        self.close()
        self.wait()

    def _close(self, group: Group) -> None:
        self._closing.append(self._thread().submit(self._filling.pop(group).shard.finish))

    def _thread(self) -> ThreadPoolExecutor:
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="cache")
        return self._writer


class ShardWriter:
    """A shard that takes one entry after the other, in a file that nobody else sees before it is whole.

    safetensors' own writer wants all of them at once. This one leaves room for the header, so that what is
    written goes to the disk meanwhile; spaces fill the room up, as the format allows.
    """

    def __init__(self, folder: Path, kind: str, base: str, entry_bytes: int) -> None:
        self.file, self.kind, self.base = folder / new_shard_name(kind), kind, base
        self.most = min(_LARGEST_ROOM // _ENTRY_WORDS, SHARD_BYTES // max(1, entry_bytes) + 8)
        self.error: OSError | None = None
        self._room = (self.most + 8) * _ENTRY_WORDS
        self._tensors: dict[str, dict[str, object]] = {}
        self._sums: dict[str, int] = {}
        self._size = self._unsynced = 0
        self._open = contextlib.ExitStack()
        self._stream: FileIO | None = None

    def write(self, key: str, value: Tensor) -> None:
        """Adds an entry; after an error, which :meth:`finish` raises, nothing more is added."""
        if self.error:
            return
        content = _bytes(value)
        try:
            if self._stream is None:
                scratch = self._open.enter_context(whole_file(self.file))
                self._stream = self._open.enter_context(FileIO(scratch, "x+"))
                self._stream.write(bytes(8 + self._room))  # taken now, so that a full disk leaves the header
            _write_all(self._stream, content)
            self._unsynced += len(content)
            if self._unsynced >= _UNSYNCED_BYTES:
                os.fsync(self._stream.fileno())
                self._unsynced = 0
        except OSError as error:
            self.error = error
            return
        end = self._size + len(content)
        offsets = [self._size, end]
        self._tensors[key] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": offsets,
        }
        self._sums[key], self._size = zlib.crc32(content), end

    def finish(self) -> tuple[Shard, Arrays]:
        """Puts the shard into its place; returns what :func:`ideoflow.data.shards.read_shard` says of it.

        Raises:
            OSError: the folder cannot be written or the disk is full. What was written before that is kept.
        """
        with self._open:  # renames what is written, or removes it
            if self._stream is not None and self._tensors:
                self._write_header(self._stream)
            elif self.error:
                raise self.error
        if self.error:
            raise self.error
        return read_shard(self.file)

    def _write_header(self, stream: FileIO) -> None:
        metadata = shard_metadata(self.kind, self.base, self._sums)
        words = json.dumps({"__metadata__": metadata, **self._tensors}, separators=(",", ":")).encode()
        room = self._room
        if room > self._size // 64 or room < len(words):  # a small shard, or one of very many entries
            stream.seek(8 + room)
            content = stream.readall()[: self._size]
            room = -(-len(words) // 8) * 8
            stream.seek(8 + room)
            _write_all(stream, content)
        stream.truncate(8 + room + self._size)
        stream.seek(0)
        _write_all(stream, room.to_bytes(8, "little") + words.ljust(room))


@dataclass
class _Filling:
    """A shard on its way, as the thread that puts knows it."""

    shard: ShardWriter
    keys: set[str] = field(default_factory=set)
    size: int = 0
    began: float = field(default_factory=time.monotonic)

    def is_full(self, entry_bytes: int) -> bool:
        """Whether another entry like the last one is for the next shard."""
        if self.size + entry_bytes > SHARD_BYTES or len(self.keys) >= self.shard.most or self.shard.error:
            return True
        return time.monotonic() - self.began > SHARD_SECONDS


def write_shard(folder: Path, kind: str, base: str, entries: Mapping[str, Tensor]) -> tuple[Shard, Arrays]:
    """Writes one shard, whole; returns what :func:`ideoflow.data.shards.read_shard` says of it.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    shard = ShardWriter(folder, kind, base, SHARD_BYTES // len(entries))
    for key, value in entries.items():
        shard.write(key, value)
    return shard.finish()


def _write_all(stream: FileIO, content: memoryview | bytes) -> None:
    """Writes all of it, whatever the operating system takes at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[stream.write(rest) :]


def _bytes(value: Tensor) -> memoryview:
    return memoryview(value.view(torch.uint8).numpy()).cast("B")


def read_entry(folder: Path, place: Place) -> Tensor | None:
    """An entry's tensor; None where its bytes are not those that were written.

    Raises:
        OSError: its file is gone or cannot be read.
    """
    content = torch.empty(place.length, dtype=torch.uint8)
    if not read_bytes(folder, place, content.numpy()):
        return None
    return content.view(_DTYPES[place.shard.dtype]).view(-1, place.shard.columns)


def rewrite_shard(folder: Path, shard: Shard, keep: Container[str] | None = None) -> tuple[int, int]:
    """Removes a shard's damaged entries, and those that are not in ``keep`` (None: keeps every one).

    What stays is in a new shard before the old one goes.

    Returns:
        How many entries stay, and how many were damaged.

    Raises:
        OSError: the folder cannot be read or written.
    """
    try:
        _, rows = read_shard(folder / shard.name)
    except (FileNotFoundError, ValueError):
        rows = None
    kept: dict[str, Tensor] = {}
    damaged = 0
    for key, place in places(shard, rows) if rows else ():
        if keep is None or key in keep:
            value = read_entry(folder, place)
            if value is None:
                damaged += 1
            else:
                kept[key] = value
    if kept:
        write_shard(folder, shard.kind, shard.base, kept)
    (folder / shard.name).unlink(missing_ok=True)
    return len(kept), damaged


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
