"""Captions stay true to the pixels: rectangles are painted on photographs, and looked for where captions say.

The photographs are grey and the rectangles are not, so that they are found in the pixels by colour alone.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ideoflow.data.pixels import load_pixels
from ideoflow.data.survey import read_dataset
from ideoflow.diagnostics.codes import caption_tools as tools
from ideoflow.diagnostics.codes import data as codes
from ideoflow.recipe import parse_recipe
from ideoflow.resources import recipes

COLOURS = {"magenta": (255, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255)}
# Fractions of the picture: y_min, x_min, y_max, x_max.
PLACES = {"magenta": (0.1, 0.05, 0.45, 0.3), "yellow": (0.55, 0.4, 0.9, 0.55), "cyan": (0.2, 0.7, 0.6, 0.95)}
WAYS = {
    "as it is": "",
    "square": "aspect = 'square'",
    "random squares": "aspect = 'square'\ncrop = 'random'\ncrop_variants = 4",
    "corner": "aspect = 'square'\ncrop = 'corner'",
    "random aspects": "aspect = 'random'\naspects = [0.5, 1.0, 2.0]\ncrop = 'random'\ncrop_variants = 4",
    "parts": "target_downsample_size = 320\ncrop = 'random'\ncrop_variants = 4",
    "stretched": "crop = 'off'",
    "mirrored": "flip = true\ncrop = 'random'\naspect = 'square'\ncrop_variants = 2",
}


def paint(name: str, folder: Path, orientation: int | None = None) -> dict:
    """A grey photograph with three rectangles, and its caption; perhaps stored on its side."""
    with Image.open(recipes() / "quickstart" / f"{name}.jpg") as photograph:
        picture = photograph.convert("L").convert("RGB").resize((450, 300))
    draw = ImageDraw.Draw(picture)
    elements = []
    for colour, (top, left, bottom, right) in PLACES.items():
        corners = (round(left * 450), round(top * 300), round(right * 450) - 1, round(bottom * 300) - 1)
        draw.rectangle(corners, COLOURS[colour])
        box = [round(1000 * f) for f in (top, left, bottom, right)]
        elements.append({"type": "obj", "bbox": box, "desc": colour})
    exif = Image.Exif()
    if orientation:
        picture = picture.transpose(Image.Transpose.ROTATE_90)  # what orientation 6 turns back
        exif[0x0112] = orientation
    picture.save(folder / f"{name}.png", exif=exif)
    return {
        "high_level_description": "Rectangles.",
        "compositional_deconstruction": {"background": "A photograph.", "elements": elements},
    }


def found(pixels: np.ndarray, colour: str) -> tuple[float, ...] | None:
    """(y_min, x_min, y_max, x_max) of a colour, as fractions of the picture."""
    distance = abs((pixels + 1) * 127.5 - np.array(COLOURS[colour])[:, None, None]).max(0)
    rows, columns = np.nonzero(distance < 100)
    if not len(rows):
        return None
    height, width = distance.shape
    return rows.min() / height, columns.min() / width, (rows.max() + 1) / height, (columns.max() + 1) / width


def dataset(tmp_path: Path, data: str):
    text = f"[model]\nbase = 'nano'\n[data]\nimages = 'pictures'\nresolution = 192\n{data}\n"
    return read_dataset(parse_recipe(text, tmp_path / "r.toml"))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, orientation in (("cat", None), ("rocket", None), ("coffee", 6)):
        (folder / f"{name}.json").write_text(json.dumps(paint(name, folder, orientation)))
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
def test_boxes_are_where_the_captions_say(pictures, way):
    made = dataset(pictures, WAYS[way])
    seen = dropped = 0
    for sample in made.samples:
        pixels = load_pixels(sample).numpy()
        elements = json.loads(sample.caption)["compositional_deconstruction"]["elements"]
        boxes = {e["desc"]: e["bbox"] for e in elements}
        for colour in COLOURS:
            place = found(pixels, colour)
            if colour not in boxes:
                dropped += 1
                # Less than a quarter of it is in the crop: at least a quarter of a side's length is gone.
                assert place is None or max(place[0] == 0, place[1] == 0, place[2] == 1, place[3] == 1)
                continue
            seen += 1
            assert place == pytest.approx([b / 1000 for b in boxes[colour]], abs=1.6 / min(pixels.shape[1:]))
    assert seen >= 3 * len(made.samples) / 2 and seen + dropped == 3 * len(made.samples)
    assert len(made.samples) == 3 * made.shares[0].variants
    if dropped:
        assert tools.ELEMENT_DROPPED in {d.code for d in made.warnings}


def test_each_variant_has_its_own_pixels_and_words(pictures):
    made = dataset(pictures, WAYS["random squares"])
    cat = [s for s in made.samples if s.picture.stem == "cat"]
    assert len({s.geometry for s in cat}) == 4 and len({s.caption for s in cat}) == 4
    assert [s.picture.stem for s in made.samples] == ["cat"] * 4 + ["coffee"] * 4 + ["rocket"] * 4
    again = dataset(pictures, WAYS["random squares"] + "\n[train]\nseed = 7")
    assert again.samples == made.samples, "another seed trains on the same crops"
    more = dataset(pictures, WAYS["random squares"].replace("4", "5"))
    assert more.samples[:4] == made.samples[:4], "a further crop changes none of the others"


def test_text_and_sides_are_never_mirrored(pictures):
    caption = json.loads((pictures / "pictures" / "cat.json").read_text())
    elements = caption["compositional_deconstruction"]["elements"]
    elements.append({"type": "text", "bbox": [0, 0, 100, 100], "text": "MENU", "desc": "chalk"})
    (pictures / "pictures" / "cat.json").write_text(json.dumps(caption))
    (pictures / "pictures" / "rocket.json").unlink()
    (pictures / "pictures" / "rocket.txt").write_text("a rocket on the left")
    made = dataset(pictures, "flip = true")
    assert {(s.picture.stem, s.geometry.flip) for s in made.samples} == {
        ("cat", False), ("rocket", False), ("coffee", False), ("coffee", True)}  # fmt: skip
    assert [s.picture.stem for s in made.samples] == ["cat", "cat", "coffee", "coffee", "rocket", "rocket"]
    assert made.samples[0] == made.samples[1], "the plain crop in the place of the mirrored one"
    (note,) = (d for d in made.warnings if d.code is codes.NOT_MIRRORED)
    assert note.severity == "note" and "2 of 3 pictures" in note.message and note.span.path.endswith("r.toml")
    assert sum(b.count for b in made.summary().buckets) == 4, "what is encoded"
