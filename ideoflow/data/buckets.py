"""Sizes on the model's grid, and the crop that brings a picture to one (torch-free)."""

from __future__ import annotations

import math
from typing import Literal

from ideoflow.captions.boxes import Geometry
from ideoflow.model.spec import PIXELS_PER_TOKEN

SMALLEST_SIDE = 64


def bucket_size(
    width: int, height: int, resolution: int, aspect: Literal["preserve", "square"]
) -> tuple[int, int]:
    """The (width, height) to train a picture at: multiples of 16, area near ``resolution`` squared.

    ``preserve`` takes the two nearest lengths on the grid for the ideal shorter side and, for each, the
    nearest longer side for the aspect; of these the pair whose aspect is closest to the picture's wins, and
    among equals the one whose area is closest. So no more than half a token row or column is cropped.
    """
    if aspect == "square":
        return resolution, resolution
    ratio = max(width, height) / min(width, height)
    ideal = resolution / math.sqrt(ratio)
    pairs = []
    for tokens in (math.floor(ideal / PIXELS_PER_TOKEN), math.ceil(ideal / PIXELS_PER_TOKEN)):
        short = max(SMALLEST_SIDE, tokens * PIXELS_PER_TOKEN)
        long = round(short * ratio / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN
        distortion = abs(math.log(long / short / ratio))
        area = abs(math.log(long * short / resolution**2))
        pairs.append((round(distortion, 6), area, long, short))
    _, _, long, short = min(pairs)
    return (long, short) if width >= height else (short, long)


def center_crop(width: int, height: int, size: tuple[int, int]) -> Geometry:
    """The largest window of the picture's middle with the aspect of ``size``."""
    ratio = size[0] / size[1]
    crop_w, crop_h = min(float(width), height * ratio), min(float(height), width / ratio)
    left, top = (width - crop_w) / 2, (height - crop_h) / 2
    return Geometry(width, height, (left, top, left + crop_w, top + crop_h))
