"""Pictures of the report."""

import base64
import io

import numpy as np
from PIL import Image

from ideoflow.report.pictures import embed


def test_noise_can_be_embedded():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    picture = embed(Image.fromarray(noise), 256)
    data = base64.b64decode(picture.uri.partition(",")[2])
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (picture.width, picture.height) == (256, 256)
