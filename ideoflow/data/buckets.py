"""Sizes on the model's grid, and the crops that bring a picture to one (torch-free).

Only geometry is decided here. What chance decides is drawn from the picture's own name and the number of the
crop, not from ``train.seed``: another seed trains in another order on the same crops, which stay cached.
"""

from __future__ import annotations

import hashlib
import math

from ideoflow.captions.boxes import Geometry
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.recipe import PictureSettings

SMALLEST_SIDE = 64
# Error of the area, as a logarithm, at which a picture that lies on the grid already is left alone. The sizes
# that pictures are often prepared at for a megapixel, such as 1536 x 640, are up to 0.065 off.
_AREA_TOLERANCE = 0.08
_MASK = (1 << 53) - 1


def bucket_size(ratio: float, resolution: int, kind: str = "pixel_area") -> tuple[int, int]:
    """The (width, height) to train pictures of aspect ``ratio`` (width by height) at: multiples of 16.

    The kind ``pixel_area`` wants an area of ``resolution`` squared, ``pixel`` a shorter side of it. Each side
    is rounded to the grid by itself, in proportion. With both errors counted as logarithms, that is the size
    with the least sum of squares of the error in aspect, which is cropped away, and of the error in area: to
    hold one of them exactly would cost the other a third of its value below 128 pixels.
    """
    across = resolution * math.sqrt(ratio) if kind == "pixel_area" else resolution * max(1.0, ratio)
    return _on_grid(across), _on_grid(across / ratio)


def _on_grid(side: float) -> int:
    """The multiple of 16, at least 64, with the least quotient to ``side``."""
    below = max(1, math.floor(side / PIXELS_PER_TOKEN)) * PIXELS_PER_TOKEN
    above = below + PIXELS_PER_TOKEN
    return max(SMALLEST_SIDE, below if side * side < below * above else above)


def measure(width: int, height: int, kind: str) -> float:
    """A picture's size as ``resolution`` counts it: the side of a square of its area, or its shorter side."""
    return math.sqrt(width * height) if kind == "pixel_area" else float(min(width, height))


def crop(
    width: int, height: int, settings: PictureSettings, name: str = "", variant: int = 0, flip: bool = False
) -> tuple[tuple[int, int], Geometry]:
    """The size that a picture is trained at, and the part of it that is brought to that size.

    Args:
        width, height: of the picture as it is shown.
        settings: of its source.
        name: of the picture within its source; with ``variant`` it decides what is drawn by chance.
        variant: number of the crop.
        flip: whether the crop is mirrored.
    """
    chance = _Chance(f"{name}\0{variant}")
    ratio = width / height
    if settings.aspect == "square":
        ratio = 1.0
    elif settings.aspect == "closest":
        ratio = min(settings.aspects, key=lambda a: (abs(math.log(a / (width / height))), a))
    elif settings.aspect == "random":
        ratio = settings.aspects[int(chance.uniform() * len(settings.aspects))]
    size = bucket_size(ratio, settings.resolution, settings.resolution_type)
    if settings.aspect == "preserve" and _fits_as_it_is(width, height, settings):
        size = width, height
    if settings.crop == "off":
        return size, Geometry(width, height, None, flip=flip)
    return size, Geometry(width, height, _window(width, height, size, settings, chance), flip=flip)


def _fits_as_it_is(width: int, height: int, settings: PictureSettings) -> bool:
    """Whether a picture lies on the grid and has about the area that is wanted: then no pixel is changed."""
    on_grid = all(side % PIXELS_PER_TOKEN == 0 and side >= SMALLEST_SIDE for side in (width, height))
    off = measure(width, height, settings.resolution_type) / settings.resolution
    return on_grid and abs(2 * math.log(off)) <= _AREA_TOLERANCE


def center_crop(width: int, height: int, size: tuple[int, int]) -> Geometry:
    """The largest window of the picture's middle with the aspect of ``size``."""
    return Geometry(width, height, _placed(width, height, _largest(width, height, size), 0.5, 0.5))


def _window(
    width: int, height: int, size: tuple[int, int], settings: PictureSettings, chance: _Chance
) -> tuple[float, float, float, float]:
    largest = _largest(width, height, size)
    scale = size[0] / largest[0]
    if settings.target_downsample_size is not None:
        own, target = measure(width, height, settings.resolution_type), settings.target_downsample_size
        # A picture that is not scaled down keeps its own scale, and a part of ``size`` is cut out of it.
        limit = settings.maximum_image_size or target
        scale = max(scale, target / own if own > limit else 1.0)
    across, down = size[0] / scale, size[1] / scale
    if scale == size[0] / largest[0]:
        across, down = largest  # exactly, so that rounding loses no pixel
    if settings.crop == "random":
        return _placed(width, height, (across, down), chance.uniform(), chance.uniform())
    place = 1.0 if settings.crop == "corner" else 0.5
    return _placed(width, height, (across, down), place, place)


def _largest(width: int, height: int, size: tuple[int, int]) -> tuple[float, float]:
    ratio = size[0] / size[1]
    return min(float(width), height * ratio), min(float(height), width / ratio)


def _placed(
    width: int, height: int, window: tuple[float, float], x: float, y: float
) -> tuple[float, float, float, float]:
    """A window of (width, height) in the picture; ``x`` and ``y`` from 0 to 1 place it."""
    left, top = (width - window[0]) * x, (height - window[1]) * y
    return left, top, min(left + window[0], width), min(top + window[1], height)


def enlargement(size: tuple[int, int], geometry: Geometry) -> float:
    """How many times the pixels are enlarged; below 1 they are reduced."""
    left, top, right, bottom = geometry.window
    return max(size[0] / (right - left), size[1] / (bottom - top))


def share_cut_away(geometry: Geometry) -> float:
    """The part of the picture's area, 0..1, that lies outside the crop."""
    left, top, right, bottom = geometry.window
    return 1 - (right - left) * (bottom - top) / (geometry.width * geometry.height)


class _Chance:
    """Numbers that are the same for the same text on every machine."""

    def __init__(self, text: str) -> None:
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogateescape"))

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        self.digest.update(b"next")
        return (int.from_bytes(self.digest.digest()[:8], "little") & _MASK) / (_MASK + 1)
