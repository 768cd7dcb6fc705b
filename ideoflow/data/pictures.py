"""Picture files: which there are, how they are opened, and how large they are shown (torch-free)."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.data import BAD_PICTURE

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
_ORIENTATION_TAG = 0x0112
# What Pillow's readers raise for damaged files; none of them promises less.
_DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError,
           AttributeError, MemoryError, struct.error)  # fmt: skip


def find_pictures(folder: Path) -> list[Path]:
    """Every picture in a folder and its sub-folders, sorted; hidden files and folders are left out."""

    def hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(folder).parts)

    files = (p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(p for p in files if p.is_file() and not hidden(p))


@contextmanager
def open_picture(picture: Path) -> Iterator[Image.Image]:
    """An open picture; damage that shows inside of the block is told, too.

    Raises:
        IdeoflowError: when the file cannot be read or decoded, or has more than 179 million pixels (twice
            Pillow's ``MAX_IMAGE_PIXELS``).
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of half that number already, which the best cameras have, and of broken metadata.
            warnings.simplefilter("ignore")
            with Image.open(picture) as image:
                yield image
    except Image.DecompressionBombError as error:
        cure = "scale it down: nothing above 2048 pixels a side is trained anyway"
        fail(BAD_PICTURE, f"{picture.name} is too large: {error}", Span(str(picture)), cure=cure)
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
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
