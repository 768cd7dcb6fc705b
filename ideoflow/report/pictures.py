"""Pictures inside the page: as data URIs, no larger than they are shown."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageChops, ImageStat

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A picture ready for an ``img``: its data URI, and its size in pixels as embedded."""

    uri: str
    width: int
    height: int


def open_picture(folder: Path, file: str) -> Image.Image | str:
    """The picture ``file`` of a run's folder as RGB, or why there is none, in a few words.

    Only files inside the folder are opened: a metrics file that was edited cannot pull others into a page
    that is going to be shown around.
    """
    path = folder / file
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return "lies outside the run's folder"
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"cannot be read ({type(error).__name__})"


def embed(picture: Image.Image, side: int) -> Picture:
    """JPEG of at most ``side`` pixels on the longer side, never enlarged."""
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    # Full colour resolution (4:4:4): fine lettering in red would smear otherwise.
    small.save(stream, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{data}", small.width, small.height)


def mean_change(before: Image.Image, after: Image.Image) -> float | None:
    """Mean absolute difference over pixels and channels, 0 to 1; None where the sizes differ."""
    if before.size != after.size:
        return None
    means: list[float] = ImageStat.Stat(ImageChops.difference(before, after)).mean
    return sum(means) / len(means) / 255


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, evenly over the sequence, with the first and the last."""
    if len(items) <= count:
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]
