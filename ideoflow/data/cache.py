"""Encoded pictures and captions, kept between runs under the digest of everything they depend on.

Each entry is one safetensors file, written beside its place, synchronised, and renamed: it is there whole or
not at all, whenever the process or the machine stops, and two processes that write the same entry write the
same bytes. Whatever changes an entry (base, pixels, geometry, caption, type) changes its name, so nothing is
ever out of date and nothing needs a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.data import CACHE_LOST, CACHE_UNWRITABLE
from ideoflow.model.base import read_safetensors_header
from ideoflow.resources import write_whole

# Raise when the meaning of cached values changes.
FORMAT = 1


def cache_key(kind: str, **facts: Any) -> str:
    """SHA-256 over everything that a cached value depends on; ``facts`` must be JSON data."""
    plain = json.dumps({"kind": kind, "format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(plain.encode()).hexdigest()


class TensorCache:
    """A folder of tensors by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Whether the entry is there whole; what is left of a damaged one is removed."""
        file = self._file(key)
        try:
            return "value" in read_safetensors_header(file)
        except FileNotFoundError:
            return False
        except (OSError, ValueError):
            _remove(file)
            return False

    def get(self, key: str) -> Tensor:
        """The tensor.

        Raises:
            IdeoflowError: when the entry is not there any more, or damaged (it is removed then).
        """
        file = self._file(key)
        try:
            # Not mapped: a file that something else cuts while it is mapped stops the process (SIGBUS).
            return load(file.read_bytes())["value"]
        except (SafetensorError, LookupError, OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError):
                _remove(file)
            cure = "run again: it is made anew, and training goes on from the last checkpoint"
            fail(CACHE_LOST, f"the cached file {file} cannot be read: {error}", cure=cure)

    def put(self, key: str, value: Tensor) -> None:
        """Keeps a tensor.

        Raises:
            IdeoflowError: when the disk is full or the folder may not be written.
        """
        try:
            write_whole(self._file(key), save({"value": value.detach().cpu().contiguous()}))
        except OSError as error:
            cure = "free some space, or set IDEOFLOW_CACHE to another folder"
            fail(CACHE_UNWRITABLE, f"cannot write to {self.folder}: {error.strerror or error}", cure=cure)


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
