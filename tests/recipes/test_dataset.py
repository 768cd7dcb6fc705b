"""The shipped photographs: small, credited, captioned, and captioned truly."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ideoflow.captions import check_captions, format_icap

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FOLDER = RECIPES / "quickstart"
PICTURES = sorted(FOLDER.glob("*.jpg"))


def test_there_are_enough_and_they_are_small():
    assert 8 <= len(PICTURES) <= 16
    assert sum(path.stat().st_size for path in PICTURES) < 1_000_000
    assert all(re.fullmatch(r"[a-z-]+\.jpg", path.name) for path in PICTURES)


def test_every_picture_is_credited_once():
    rows = re.findall(
        r"^\| ([a-z-]+\.jpg) \|.*\| ([^|]+) \|$", (FOLDER / "CREDITS.md").read_text("utf-8"), re.M
    )
    assert [name for name, _ in rows] == [path.name for path in PICTURES]
    assert all(licence.startswith(("CC0 1.0", "public domain")) for _, licence in rows)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.stem)
def test_a_picture_has_a_caption_and_nothing_hidden(picture):
    assert picture.with_suffix(".icap").is_file()
    with Image.open(picture) as image:
        assert image.format == "JPEG" and 256 <= max(image.size) <= 512
        assert not image.getexif() and "icc_profile" not in image.info


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.stem)
def test_the_colours_of_a_caption_are_in_its_picture(picture):
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"), np.int32).reshape(-1, 3)
    for colour in re.findall(r"#([0-9A-F]{6})", picture.with_suffix(".icap").read_text("utf-8")):
        near = np.abs(pixels - np.frombuffer(bytes.fromhex(colour), np.uint8)).max(axis=1) <= 16
        assert near.mean() > 0.002, f"#{colour} fills {near.mean():.2%} of {picture.name}"


def test_no_caption_here_has_a_mistake():
    assert check_captions([RECIPES], pictures=True) == []


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.icap")), ids=lambda p: p.stem)
def test_captions_are_formatted(path):
    text = path.read_text("utf-8")
    assert format_icap(text) == text
