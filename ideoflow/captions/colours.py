"""How far a palette's colours are from the colours of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 96  # the picture is looked at this small: a colour that vanishes by then covers too little to matter


def oklab(rgb: Any) -> Any:
    """sRGB in 0..1, shape (..., 3), to OKLab (Ottosson 2020, https://bottosson.github.io/posts/oklab/)."""
    import numpy as np

    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ to_lms.T) @ to_lab.T


def nearest_distance(image: Image, palette: Sequence[str], box: Sequence[int] | None = None) -> list[float]:
    """For each ``#RRGGBB`` the OKLab distance to the nearest pixel, inside ``box`` (thousandths) if given."""
    import numpy as np

    picture = image.convert("RGB")
    if box is not None and box[0] < box[2] and box[1] < box[3]:
        width, height = picture.size
        left, top = box[1] * width // 1000, box[0] * height // 1000
        right, bottom = -(-box[3] * width // 1000), -(-box[2] * height // 1000)
        picture = picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    picture = picture.resize((min(_SIDE, picture.width), min(_SIDE, picture.height)))
    pixels = oklab(np.asarray(picture, dtype=np.float64).reshape(-1, 3) / 255)
    wanted = oklab(np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in palette]))
    return [float(np.sqrt(((pixels - colour) ** 2).sum(axis=1).min())) for colour in wanted]
