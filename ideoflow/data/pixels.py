"""Decodes pictures: orientation, colour, transparency, depth; crops and resizes them."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from ideoflow.data.pictures import open_picture
from ideoflow.data.survey import Sample

_SRGB = ImageCms.createProfile("sRGB")
_WHITE = (255, 255, 255, 255)


def load_pixels(sample: Sample) -> Tensor:
    """The sample's pixels, (3, height, width) float32 in [-1, 1], cropped and resized as its geometry says.

    Raises:
        IdeoflowError: when the file is damaged.
    """
    with open_picture(sample.picture) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # copies nothing where nothing is turned
        picture = to_srgb(image)
    # Lanczos averages over the whole source area of each pixel, so that shrinking does not alias.
    resized = picture.resize(sample.size, Image.Resampling.LANCZOS, box=sample.geometry.window)
    if sample.geometry.flip:
        resized = ImageOps.mirror(resized)
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    return values.float() / 127.5 - 1


def to_srgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit sRGB: embedded profiles applied, 16 bits scaled, transparency laid on white."""
    profile = image.info.get("icc_profile")
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, dtype=np.float64)
        # Single-channel pictures of more than 8 bits; float ones are taken to run from 0 to 1.
        scale = 255.0 if image.mode == "F" else 255.0 / 65535.0
        return Image.fromarray(np.clip(values * scale, 0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        colours = _apply_profile(image.convert("RGB"), profile).convert("RGBA")
        colours.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), colours).convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("RGB")
    return _apply_profile(image, profile)


def _apply_profile(image: Image.Image, profile: bytes | None) -> Image.Image:
    try:
        if image.mode == "LAB":  # no plain conversion exists
            source = (
                ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
            )
        elif profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        else:
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
        if converted is not None:
            return converted
    except (ImageCms.PyCMSError, OSError):
        pass  # A broken profile, or one of another colour space: the plain values are the best there is.
    return image.convert("RGB")
