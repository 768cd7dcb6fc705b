"""Picture files: which there are, how they are opened, and how large they are shown (torch-free)."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.data import BAD_PICTURE

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
                              ".avif", ".jp2", ".tga", ".ppm"})  # fmt: skip
# Of telephones, cameras and programs for drawing.
UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf",
                             ".rw2", ".psd", ".xcf", ".svg", ".exr"})  # fmt: skip
_ORIENTATION_TAG = 0x0112
# What Pillow's readers raise for damaged files; none of them promises less.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError,
           AttributeError, MemoryError, struct.error)  # fmt: skip


class _Window(io.RawIOBase):
    """A stretch of an open file as a file of its own; closes the file when it is closed."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError("before the beginning")
        self.at = start + offset
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.length - self.at))
        self.file.seek(self.offset + self.at)
        content = self.file.read(wanted)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class TarMember:
    """A picture inside an uncompressed tar file, read without going through the members before it.

    ``offset`` and ``length`` are those of its bytes: ``offset_data`` and ``size`` in :mod:`tarfile`.
    """

    tar: Path
    name: str
    offset: int
    length: int

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes as a stream, read as they are asked for; OSError if the tar file is gone or shorter."""
        file = self.tar.open("rb")
        if os.fstat(file.fileno()).st_size < self.offset + self.length:
            file.close()
            raise OSError(f"{self.tar.name} has been cut since it was indexed")
        return io.BufferedReader(_Window(file, self.offset, self.length))

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A picture's bytes inside a parquet file: row ``row`` of row group ``group``, in ``column``.

    ``column`` may be a path into a structure, such as ``image.bytes``.
    """

    file: Path
    column: str
    group: int
    row: int

    @property
    def name(self) -> str:
        return f"{self.file.name}/{self.group}-{self.row}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """Its bytes as a stream; OSError if the file is gone or damaged."""
        return io.BytesIO(_column_chunk(self.file, self.column, self.group)[self.row].as_py() or b"")

    def __str__(self) -> str:
        return f"{self.file}/{self.group}-{self.row}"


# Where a picture's bytes are. All of these are picklable, have a ``name`` and can be opened in any order.
Stored = Path | TarMember | ParquetCell


def container(picture: Stored) -> Path:
    """The file that holds a picture's bytes."""
    if isinstance(picture, Path):
        return picture
    return picture.tar if isinstance(picture, TarMember) else picture.file


def stored_name(picture: Stored) -> str:
    """A name that no other picture on this machine has."""
    if isinstance(picture, TarMember):
        return f"{picture.tar.absolute()}\0{picture.offset}"
    if isinstance(picture, ParquetCell):
        return f"{picture.file.absolute()}\0{picture.column}\0{picture.group}\0{picture.row}"
    return str(picture.absolute())


@lru_cache(maxsize=2)
def _column_chunk(file: Path, column: str, group: int) -> Any:
    """One column of a row group; the next pictures are most often in the same one."""
    import pyarrow as arrow  # an extra, and it takes a while to load
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file).read_row_group(group, columns=[column])
    except arrow.ArrowException as error:
        raise OSError(str(error)) from error
    values = table.column(0).combine_chunks()
    for part in column.split(".")[1:]:
        values = values.field(part)
    return values


def find_pictures(files: Iterable[Path]) -> list[Path]:
    """Those of the files that are pictures by their suffix, sorted."""
    return sorted(p for p in files if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())


def visible_files(folder: Path) -> Iterator[Path]:
    """Files of a folder and its sub-folders, also of those that links lead to; hidden ones are left out."""
    entered = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        facts = Path(place).stat()
        if (facts.st_dev, facts.st_ino) in entered:  # a link to where one comes from
            folders.clear()
            continue
        entered.add((facts.st_dev, facts.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in files if not name.startswith("."))


class _Quiet:
    """No warnings inside of the block; unlike ``warnings.catch_warnings``, for several threads at once."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.users:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.caught.__exit__(None, None, None)


_QUIET = _Quiet()


@contextmanager
def open_picture(picture: Stored) -> Iterator[Image.Image]:
    """An open picture; damage that shows inside of the block is told, too.

    Raises:
        IdeoflowError: when the file cannot be read or decoded, or has more than 179 million pixels (twice
            Pillow's ``MAX_IMAGE_PIXELS``).
    """
    try:
        # Pillow warns of half that number already, which the best cameras have, and of broken metadata.
        with _QUIET, picture.open("rb") as stream, Image.open(stream) as image:
            yield image
    except Image.DecompressionBombError as error:
        cure = "scale it down: nothing above 2048 pixels a side is trained anyway"
        fail(BAD_PICTURE, f"{picture.name} is too large: {error}", Span(str(picture)), cure=cure)
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture that can be read"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        message = f"{picture.name} cannot be decoded: {reason}"
        fail(BAD_PICTURE, message, Span(str(picture)), cure="replace or remove the file")


def shown_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as the picture is meant to be seen: EXIF orientation applied."""
    width, height = image.size
    # Pillow has already swapped the sides of a TIFF, and turns it when it is decoded.
    turned = image.getexif().get(_ORIENTATION_TAG) in (5, 6, 7, 8) and image.format != "TIFF"
    return (height, width) if turned else (width, height)


def picture_digest(picture: Stored) -> str:
    """SHA-256 of the picture's bytes.

    Raises:
        IdeoflowError: when it cannot be read any more.
    """
    try:
        with picture.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        message = f"{picture.name} cannot be read: {error.strerror or error}"
        fail(BAD_PICTURE, message, Span(str(picture)), cure="put it back, or run again without it")
