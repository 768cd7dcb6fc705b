"""Checks of sense: each finds what it is for, and keeps quiet about what is fine."""

import colorsys

import pytest
from PIL import Image

from ideoflow.captions import check_caption
from ideoflow.captions.checks import CHECKS
from ideoflow.captions.colours import nearest_distance


def caption(*elements, background="b", **more):
    return {**more, "compositional_deconstruction": {"background": background, "elements": list(elements)}}


def obj(desc, bbox=None, colours=None):
    box = {"bbox": bbox} if bbox else {}
    palette = {"color_palette": colours} if colours else {}
    return {"type": "obj", **box, "desc": desc, **palette}


def text(words, bbox=None, desc="headline"):
    return {"type": "text", **({"bbox": bbox} if bbox else {}), "text": words, "desc": desc}


def found(data, **known):
    return [d.code.id for d in check_caption(data, **known)]


WIDE, TALL = [400, 100, 500, 900], [100, 400, 900, 500]
LEFT, RIGHT, TOP, BOTTOM = [0, 0, 999, 300], [0, 700, 999, 999], [0, 0, 300, 999], [700, 0, 999, 999]


@pytest.mark.parametrize(
    ("data", "codes"),
    [
        (caption(obj("a boat", [1, 2, 3, 4])), []),
        (caption(obj("a boat", [1, 2, 1, 4])), ["IC601"]),
        (caption(obj("a boat", [1, 2, 3, 2])), ["IC601"]),
        (caption(obj("A tall lighthouse", WIDE)), ["IC602"]),
        (caption(obj("A tall lighthouse", TALL)), []),
        (caption(obj("A wide banner", TALL)), ["IC602"]),
        (caption(obj("A boat with a hull, deck, cabin and one tall mast", WIDE)), []),
        (caption(text("STILL WATER", TALL)), ["IC602"]),
        (caption(text("STILL WATER", TALL, "letters stacked vertically")), []),
        (caption(text("STILL WATER", WIDE)), []),
        (caption(text("静かな水面の舟", TALL)), []),
        # The box of the quickstart that several guides read as [x1, y1, x2, y2].
        (caption(obj("Sailboat on the right-third vertical", [590, 380, 720, 660])), ["IC603"]),
        (caption(obj("Sailboat on the right-third vertical", [380, 590, 660, 720])), []),
        (caption(obj("A tree at the left edge of the frame", RIGHT)), ["IC603"]),
        (caption(obj("A tree at the left edge of the frame", LEFT)), []),
        (caption(obj("A logo in the upper right corner", [0, 0, 200, 300])), ["IC603"]),
        (caption(obj("A logo in the upper right corner", [0, 700, 200, 999])), []),
        (caption(obj("A caption at the bottom of the image", TOP)), ["IC603"]),
        (caption(obj("A caption at the bottom of the image", BOTTOM)), []),
        (caption(obj("A man with his left hand raised, looking right", RIGHT)), []),
        (caption(obj("A mast with a flag at the top", BOTTOM)), []),
        (caption(text("A"), text("A")), ["IC604"]),
        (caption(text("A", LEFT), text("A", RIGHT)), []),
        (caption(text("A", LEFT), text("A", LEFT)), ["IC604"]),
        (caption(text(" ")), ["IC605"]),
        (caption(obj("A dusty blue sky with clouds")), ["IC608"]),
        (caption(obj("the ground, wet and dark", [300, 0, 1000, 1000])), ["IC608"]),
        (caption(obj("A wall clock")), []),
        (caption(obj("the ground, wet and dark", [900, 0, 1000, 300])), []),
        (caption(obj("word " * 50)), []),
        (caption(obj("word " * 51)), ["IC609"]),
        (caption(background=" "), ["IC611"]),
        (caption(obj("")), ["IC612"]),
    ],
)
def test_each_check(data, codes):
    assert found(data) == codes


def test_a_caption_against_the_rules_gets_the_rules_only():
    assert found({"compositional_deconstruction": {"elements": [obj("", [1, 2, 1, 2])]}}) == ["IC502"]
    assert found("not a caption") == ["IC406"]


def test_placeholders_and_tokens_are_looked_at_when_they_are_known():
    data = caption(obj("a photo of <token>"))
    assert found(data, placeholders=["<token>", "other"]) == []
    assert found(caption(obj("a photo")), placeholders=["token"]) == ["IC610"]
    assert found(data, count_tokens=lambda json: 2048) == []
    assert found(data, count_tokens=lambda json: 2049) == ["IC606"]


def test_colours_are_looked_for_in_the_picture_and_in_the_box():
    picture = Image.new("RGB", (200, 100), "#1B3A5C")
    picture.paste("#E1714D", (100, 0, 200, 100))
    left, right = [0, 0, 1000, 450], [0, 550, 1000, 1000]
    assert found(caption(obj("boat", right, ["#E1714D"])), image=picture) == []
    assert found(caption(obj("boat", left, ["#E1714D"])), image=picture) == ["IC607"]
    style = {
        "aesthetics": "a",
        "lighting": "l",
        "photo": "p",
        "medium": "m",
        "color_palette": ["#1C3B5E", "#00FF00"],
    }
    messages = check_caption(caption(style_description=style), image=picture)
    assert [d.message for d in messages] == ["nothing in the picture comes near #00FF00"]


def test_oklab_distances_are_those_that_are_published():
    # Black to white is 1 by construction; a grey differs from its neighbour by less than the eye sees.
    white = Image.new("RGB", (4, 4), "white")
    black, white_itself, nearly = nearest_distance(white, ["#000000", "#FFFFFF", "#FEFEFE"])
    assert (
        black == pytest.approx(1, abs=1e-4) and white_itself == pytest.approx(0, abs=1e-6) and nearly < 0.005
    )
    # Red of sRGB is L 0.627955, a 0.224863, b 0.125846 (Ottosson's reference values).
    (red,) = nearest_distance(Image.new("RGB", (1, 1), "black"), ["#FF0000"])
    assert red == pytest.approx((0.627955**2 + 0.224863**2 + 0.125846**2) ** 0.5, abs=1e-4)


def test_distance_grows_with_the_difference_of_hue():
    picture = Image.new("RGB", (1, 1), "#FF0000")
    hues = [colorsys.hsv_to_rgb(h / 360, 1, 1) for h in (0, 10, 30, 60, 120)]
    palette = ["#" + "".join(f"{round(255 * c):02X}" for c in rgb) for rgb in hues]
    distances = nearest_distance(picture, palette)
    assert distances == sorted(distances)


def test_every_check_has_a_page():
    assert all(check.__doc__ for check in CHECKS)
