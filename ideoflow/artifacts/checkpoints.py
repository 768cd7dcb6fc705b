"""What a run leaves behind to go on from: checkpoints with the exact float32 state, for ideoflow alone."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from ideoflow.diagnostics import Diagnostic, Span, fail
from ideoflow.diagnostics.codes.artifacts import DAMAGED_CHECKPOINT, OTHER_RUN, UNWRITABLE
from ideoflow.resources import write_whole


def _write(file: Path, content: bytes) -> None:
    try:
        write_whole(file, content)
    except OSError as error:
        cure = "choose another [output] folder, or make this one writable"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = "free some space or choose another [output] folder; the last checkpoint is whole"
        fail(UNWRITABLE, f"cannot write {file}: {error.strerror or error}", cure=cure)


def prepare_output(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes small text files that describe the run, and so finds out early whether results can be kept.

    Raises:
        IdeoflowError: when they cannot.
    """
    for name, text in texts.items():
        _write(folder / name, text.encode())


@dataclass(frozen=True)
class Checkpoint:
    """The state after ``step`` optimiser steps: tensors on the CPU, by name."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """Checkpoints of one run, a folder each: ``step-000250``.

    A folder gets its name only after every file in it has been written and synchronised, so a checkpoint is
    complete or not there, whenever the process dies. Digests tell whether the disk kept it.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int) -> None:
        self.folder, self.identity, self.keep = folder, dict(identity), keep

    def save(
        self,
        step: int,
        adapter: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        facts: Mapping[str, Any],
    ) -> Path:
        """Writes a checkpoint and removes those that are more than ``keep`` old.

        Raises:
            IdeoflowError: when it cannot be written; earlier checkpoints are untouched.
        """
        place = self.folder / f"step-{step:06d}"
        scratch = self.folder / f".writing-{step:06d}-{os.getpid()}"
        contents = {
            "adapter.safetensors": save(_on_cpu(adapter)),
            "optimizer.safetensors": save(_on_cpu(optimizer)),
        }
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        state = {"step": step, "identity": self.identity, "digests": digests, "facts": dict(facts)}
        contents["state.json"] = json.dumps(state, indent=1).encode()
        try:
            if scratch.exists():
                shutil.rmtree(scratch)
            for name, content in contents.items():
                write_whole(scratch / name, content)
            if place.exists():
                shutil.rmtree(place)
            scratch.rename(place)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            cure = "free some space; the next `ideoflow run` goes on from the last whole checkpoint"
            fail(UNWRITABLE, f"cannot write {place}: {error.strerror or error}", cure=cure)
        self._remove_old()
        return place

    def _all(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def _remove_old(self) -> None:
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        for unfinished in self.folder.glob(".writing-*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def newest(self) -> tuple[Checkpoint | None, list[Diagnostic]]:
        """The last whole checkpoint, and a warning for each newer one that is damaged.

        Raises:
            IdeoflowError: when it belongs to a run with another base or adapter.
        """
        warnings = []
        for place in reversed(self._all()):
            try:
                return self._read(place), warnings
            except (OSError, ValueError, KeyError) as error:
                warnings.append(
                    Diagnostic(
                        DAMAGED_CHECKPOINT,
                        f"{place} is damaged: {error}",
                        Span(str(place)),
                        cure="it can be removed",
                        severity="warning",
                    )
                )
        return None, warnings

    def _read(self, place: Path) -> Checkpoint:
        state = json.loads((place / "state.json").read_bytes())
        other = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
        if other:
            cure = "run with --fresh to set the old run aside, or choose another [output] folder"
            notes = [f"{k}: {state['identity'].get(k)} there, {self.identity[k]} here" for k in other]
            fail(
                OTHER_RUN,
                f"{place.parent.parent} holds a run with another {', '.join(other)}",
                Span(str(place)),
                cure=cure,
                notes=notes,
            )
        contents = {}
        for name, digest in state["digests"].items():
            contents[name] = (place / name).read_bytes()
            if hashlib.sha256(contents[name]).hexdigest() != digest:
                raise ValueError(f"{name} does not have its digest")
        return Checkpoint(
            int(state["step"]),
            load(contents["adapter.safetensors"]),
            load(contents["optimizer.safetensors"]),
            state["facts"],
        )


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; folders cannot be opened for this on Windows."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def set_aside(folder: Path) -> Path | None:
    """Renames an existing output folder to the first free ``NAME.old-N``, so that nothing is lost."""
    if not folder.exists():
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return folder.rename(aside)
