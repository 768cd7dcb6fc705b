"""Encoded pictures and captions, kept between runs; :mod:`ideoflow.data.shards` says how they stay whole."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ideoflow.data.shards import (
    Arrays,
    Index,
    Place,
    Shard,
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

# A shard is closed when it is this large, or this old: a kill costs no more than that.
SHARD_BYTES = 256 << 20
SHARD_SECONDS = 60.0

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# What the entries of a shard have in common: kind, digest of the base, type, columns.
Group = tuple[str, str, torch.dtype, int]


class TensorCache:
    """A folder of tensors (rows, columns) by key.

    What is put is buffered and written in shards by a thread of its own; :meth:`flush` waits until all of it
    is on the disk. One thread at a time may put; while nothing is put, several may get. Any number of
    processes may use the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = Index(folder)
        self.index.refresh()
        self._pending: dict[Group, dict[str, Tensor]] = {}
        self._since: dict[Group, float] = {}
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[tuple[Shard, Arrays]] | None = None

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
        if any(key in entries for entries in self._pending.values()) or self._writing:
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
        # A copy, so that it may be changed by whoever gave it, and shares no memory with other entries.
        value = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        group = (kind, base, value.dtype, value.shape[1])
        entries = self._pending.setdefault(group, {})
        self._since.setdefault(group, time.monotonic())
        entries[key] = value
        if (
            sum(v.nbytes for v in entries.values()) >= SHARD_BYTES
            or time.monotonic() - self._since[group] > SHARD_SECONDS
        ):
            self._close(group)

    def flush(self) -> None:
        """Waits until everything that was put is on the disk; raises like :meth:`put`."""
        for group in list(self._pending):
            self._close(group)
        self._wait()

    def _close(self, group: Group) -> None:
        """Has a shard written; one at a time, so that no more than two are held."""
        entries = self._pending.pop(group)
        del self._since[group]
        self._wait()
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._writing = self._writer.submit(write_shard, self.folder, group[0], group[1], entries)

    def _wait(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                self.index.add(*writing.result())
            except OSError as error:
                cure = "free some space, or name another folder in cache.folder or IDEOFLOW_CACHE"
                fail(CACHE_UNWRITABLE, f"cannot write to {self.folder}: {error.strerror or error}", cure=cure)


def write_shard(folder: Path, kind: str, base: str, entries: Mapping[str, Tensor]) -> tuple[Shard, Arrays]:
    """Writes one shard, whole; returns what :func:`ideoflow.data.shards.read_shard` says of it.

    Raises:
        OSError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    sums = {key: zlib.crc32(_bytes(value)) for key, value in entries.items()}
    file = folder / new_shard_name(kind)
    with whole_file(file) as scratch:
        scratch.touch()
        mode = scratch.stat().st_mode
        try:
            save_file(dict(entries), scratch, shard_metadata(kind, base, sums))
        except SafetensorError as error:  # what the operating system said is only in its words
            raise OSError(str(error)) from None
        scratch.chmod(mode)  # safetensors makes files that only their owner may read
    return read_shard(file)


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
