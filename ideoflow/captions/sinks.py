"""Where converted captions go: sidecars, one JSONL, or a Hugging Face imagefolder.

Every sink can be killed at any moment: files appear whole or not at all, and a sink's :meth:`state` is enough
to go on from the last checkpoint. Writing the same caption twice is harmless, so a few may be done again.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from ideoflow.captions.inputs import IMAGE_SUFFIXES, locate_image
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_tools as codes


@dataclass(frozen=True, slots=True)
class Made:
    """One converted caption: the picture's name in the data set, where it should lie, and the text to
    write."""

    name: str
    image: str
    text: str


class Sink(Protocol):
    """Takes converted captions in order. ``write`` returns what went wrong with this one, if anything."""

    def open(self, state: dict[str, Any] | None) -> None: ...
    def write(self, made: Made) -> Diagnostic | None: ...
    def state(self) -> dict[str, Any]: ...
    def close(self, *, finished: bool) -> None: ...


class JsonlSink:
    """One object a line: ``file_name`` and ``caption``, the latter the canonical JSON as a *string*.

    A string, since readers that build tables (pyarrow, datasets) turn nested objects into columns: they fill
    absent keys with null and lose the key order, and both matter to the model.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        self.path, self.force = path, force
        self.part = path.with_name(path.name + ".part")
        self._file: BinaryIO | None = None

    def open(self, state: dict[str, Any] | None) -> None:
        if self.path.exists() and not self.force:
            raise IdeoflowError(
                _problem(
                    codes.OUTPUT_EXISTS, f"{self.path} exists", str(self.path), "give another -o, or --force"
                )
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.part.open("r+b" if state and self.part.exists() else "wb")
        self._file.truncate(state["offset"] if state else 0)
        self._file.seek(0, os.SEEK_END)

    def write(self, made: Made) -> Diagnostic | None:
        assert self._file is not None
        line = json.dumps({"file_name": made.name, "caption": made.text}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        return None

    def state(self) -> dict[str, Any]:
        assert self._file is not None
        self._file.flush()
        return {"offset": self._file.tell()}

    def close(self, *, finished: bool) -> None:
        if self._file is not None:
            self._file.close()
            if finished:
                self.part.replace(self.path)


class SidecarSink:
    """One file a caption, under the picture's name: ``cats/tom.jpg`` becomes ``cats/tom.json``."""

    def __init__(self, folder: Path, suffix: str = ".json", *, force: bool = False) -> None:
        self.folder, self.suffix, self.force = folder, suffix, force
        self._started = 0

    def open(self, state: dict[str, Any] | None) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise IdeoflowError(
                _problem(
                    codes.OUTPUT_EXISTS,
                    f"{self.folder} is a file",
                    str(self.folder),
                    "sidecars need a folder; for one file, end its name in .jsonl",
                )
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._started = state["started"] if state else time.time_ns()

    def write(self, made: Made) -> Diagnostic | None:
        target = self.folder / sidecar_name(made.name, self.suffix)
        data = made.text.encode() + b"\n"
        try:
            if target.exists():
                if target.read_bytes() == data:
                    return None
                # Written since this run began: by another caption of this run. A second of slack for the
                # clocks of network file systems would only blur the message, so there is none.
                if target.stat().st_mtime_ns >= self._started:
                    return _problem(
                        codes.SAME_OUTPUT,
                        f"{target} is written by two captions",
                        made.image,
                        "convert the folders one by one, or give their common parent",
                    )
                if not self.force:
                    return _problem(codes.OUTPUT_EXISTS, f"{target} exists with another content", str(target),
                                    "give another -o, or --force")  # fmt: skip
            _write_whole(target, data)
        except OSError as error:
            return _unwritable(target, error)
        return None

    def state(self) -> dict[str, Any]:
        return {"started": self._started}

    def close(self, *, finished: bool) -> None:
        """Nothing is open between two writes."""


class ImageFolderSink:
    """What ``datasets.load_dataset("imagefolder")`` reads: the pictures and a ``metadata.jsonl`` beside
    them."""

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.folder = folder
        self._table = JsonlSink(folder / "metadata.jsonl", force=force)

    def open(self, state: dict[str, Any] | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._table.open(state)

    def write(self, made: Made) -> Diagnostic | None:
        image = locate_image(made.image)
        if image is None:
            return Diagnostic(codes.NO_PICTURE, f"there is no picture for {made.name}", Span(made.image),
                              "an imagefolder needs every picture")  # fmt: skip
        name = made.name
        if PurePosixPath(name).suffix.lower() not in IMAGE_SUFFIXES:
            name += image.suffix
        target = self.folder / name
        try:
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.part")
                shutil.copyfile(image, part)
                part.replace(target)
            elif target.stat().st_size != image.stat().st_size:
                return _problem(codes.SAME_OUTPUT, f"{target} is another picture of this name", str(image),
                                "convert the folders one by one, or give their common parent")  # fmt: skip
        except OSError as error:
            return _unwritable(target, error)
        return self._table.write(Made(name, made.image, made.text))

    def state(self) -> dict[str, Any]:
        return self._table.state()

    def close(self, *, finished: bool) -> None:
        self._table.close(finished=finished)


def sidecar_name(name: str, suffix: str) -> str:
    """The sidecar of a picture: its suffix is replaced if it is a picture's, so ``v1.2`` keeps its ``.2``."""
    path = PurePosixPath(name)
    stem = path.stem if path.suffix.lower() in IMAGE_SUFFIXES else path.name
    return str(path.with_name(stem + suffix))


def _write_whole(target: Path, data: bytes) -> None:
    """Writes a file so that a kill leaves it whole or absent.

    Unlike ``resources.write_whole`` it does not wait for the disk: 100,000 sidecars would take that many
    waits, and after a power cut the conversion can be run again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name[:100]}.part")
    part.write_bytes(data)
    part.replace(target)


def _unwritable(target: Path, error: OSError) -> Diagnostic:
    return _problem(codes.UNREADABLE, f"{target} cannot be written: {error.strerror or error}", str(target))


def _problem(code: Code, message: str, path: str, cure: str = "") -> Diagnostic:
    return Diagnostic(code, message, Span(path), cure, severity=code.severity)
