"""Checking whole folders and tables: every form is read, and every message names its place."""

import json

import pytest
from PIL import Image

from ideoflow import check_captions
from ideoflow.captions import to_json, wrap_text
from ideoflow.diagnostics import IdeoflowError

BAD = {
    "compositional_deconstruction": {
        "background": "b",
        "elements": [{"type": "obj", "bbox": [1, 2, 1, 3], "desc": "d"}],
    }
}


def places(found):
    return [(d.code.id, d.span.path.rpartition("/")[2], d.span.line, d.span.column) for d in found]


def test_every_form_is_read(tmp_path):
    (tmp_path / "a.icap").write_text("A lake.\nbackground: b\nobj y1..1 x2..3: d\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(to_json(BAD), encoding="utf-8")
    (tmp_path / "c.txt").write_text("A plain caption.", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text(
        json.dumps({"file_name": "x.png", "text": "words"})
        + "\n"
        + json.dumps({"file_name": "y.png", "text": to_json(BAD)}),
        encoding="utf-8",
    )
    column = to_json(BAD).index("[1,2,1,3]") + 1
    assert places(check_captions([tmp_path])) == [
        ("IC601", "a.icap", 3, 5),
        ("IC601", "b.json", 1, column),
        ("IC611", "c.txt", 0, 1),
        ("IC611", "d.jsonl", 1, 1),
        ("IC601", "d.jsonl", 2, 1),
    ]


def test_the_set_as_a_whole_must_use_each_placeholder(tmp_path):
    for name, text in (("a", "A <one>."), ("b", "A lake.")):
        (tmp_path / f"{name}.icap").write_text(f"{text}\nbackground: b\n", encoding="utf-8")
    found = check_captions([tmp_path], placeholders={"one": "1", "two": "2"})
    assert [d.message for d in found] == ["no caption uses <two>"]


def test_pictures_are_turned_as_they_are_shown(tmp_path):
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter, clockwise: red is on top, 20 wide and 40 high
    picture.save(tmp_path / "a.png", exif=exif)
    text = "background: b\nobj y0px..10px x0px..20px {}: d\n"
    (tmp_path / "a.icap").write_text(text.format("#FF0000"), encoding="utf-8")
    assert check_captions([tmp_path], pictures=True) == []
    (tmp_path / "a.icap").write_text(text.format("#0000FF"), encoding="utf-8")
    assert [d.code.id for d in check_captions([tmp_path], pictures=True)] == ["IC607"]


def test_long_captions_are_found_with_a_counter(tmp_path):
    (tmp_path / "a.json").write_text(to_json({**wrap_text("x"), **BAD}), encoding="utf-8")
    found = check_captions([tmp_path], count_tokens=lambda caption: 100 * len(caption))
    assert "IC606" in [d.code.id for d in found if d.is_error]


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(IdeoflowError) as raised:
        check_captions([tmp_path / "absent"])
    assert "does not exist" in str(raised.value)
