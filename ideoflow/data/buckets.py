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

    ``preserve`` takes the two nearest heights on the grid for the ideal one and, for each, the nearest width
    for the aspect; of these the pair whose aspect is closest to the picture's wins, and among equals the one
    whose area is closest. So less than one token row or column is cropped.
    """
    if aspect == "square":
        return resolution, resolution
    ratio = width / height
    ideal = resolution / math.sqrt(ratio)
    pairs = []
    for rows in (math.floor(ideal / PIXELS_PER_TOKEN), math.ceil(ideal / PIXELS_PER_TOKEN)):
        h = max(SMALLEST_SIDE, rows * PIXELS_PER_TOKEN)
        w = max(SMALLEST_SIDE, round(h * ratio / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)
        distortion = abs(math.log(w / h / ratio))
        area = abs(math.log(w * h / resolution**2))
        pairs.append((round(distortion, 6), area, (w, h)))
    return min(pairs)[2]


def center_crop(width: int, height: int, size: tuple[int, int]) -> Geometry:
    """The largest window of the picture's middle with the aspect of ``size``."""
    ratio = size[0] / size[1]
    crop_w, crop_h = min(float(width), height * ratio), min(float(height), width / ratio)
    left, top = (width - crop_w) / 2, (height - crop_h) / 2
    return Geometry(width, height, (left, top, left + crop_w, top + crop_h))
