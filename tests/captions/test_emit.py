"""Shared parts, placeholders and places: what one caption takes from elsewhere."""

import json

import pytest

from ideoflow.captions import compile_caption, fill_placeholders

STYLE = """style {name}
  aesthetics: {name} aesthetics
  lighting: {name} lighting
  photo: {name} photo
  medium: {name} medium
  palette: {colour}
"""
A, B = STYLE.format(name="a", colour="#AAAAAA"), STYLE.format(name="b", colour="#BBBBBB")


def codes(result):
    return [d.code.id for d in result.diagnostics]


def style_of(text, **more):
    result = compile_caption(text, **more)
    assert result.diagnostics == ()
    return result.captions[-1].caption.get("style_description")


def test_the_nearest_place_wins():
    defaults = "defaults\n  style: a\n  lighting: defaults\n"
    base = A + B + defaults
    assert style_of(base + "image x\n  background: b\n")["lighting"] == "defaults"
    assert style_of(base + "image x\n  background: b\n")["photo"] == "a photo"
    assert style_of(base + "image x\n  style: b\n  background: b\n")["lighting"] == "b lighting"
    assert style_of(base + "image x\n  lighting: own\n  style: b\n  background: b\n")["lighting"] == "own"
    assert style_of(base + "image x\n  palette: #111111\n  background: b\n")["color_palette"] == ["#111111"]
    assert "color_palette" not in style_of(base + "image x\n  palette: none\n  background: b\n")


def test_the_other_kind_of_style_replaces_and_keys_stand_in_their_order():
    style = style_of(A + "image x\n  style: a\n  art_style: ink\n  background: b\n")
    assert list(style) == ["aesthetics", "lighting", "medium", "art_style", "color_palette"]


def test_no_style_is_invented():
    assert style_of("A lake.\nbackground: b\n") is None
    assert style_of("A lake.\npalette: none\nbackground: b\n") is None
    assert codes(compile_caption("A lake.\npalette: #111111\nbackground: b\n")) == ["IC309"]


def test_background_and_description_have_defaults_too():
    result = compile_caption("defaults\n  A lake.\n  background: b\nimage x\n  obj: d\nimage y\n  A pier.\n")
    assert result.diagnostics == ()
    x, y = (one.caption for one in result.captions)
    assert x["high_level_description"] == "A lake." and y["high_level_description"] == "A pier."
    assert y["compositional_deconstruction"] == {"background": "b", "elements": []}


def test_used_files_give_styles_and_palettes_of_the_files_they_use(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "inner.icap").write_text(A + "palette p: #CCCCCC #DDDDDD\n", encoding="utf-8")
    (tmp_path / "outer.icap").write_text("use sub/inner.icap\n" + B, encoding="utf-8")
    text = "use outer.icap\nuse sub/inner.icap\nstyle: a\npalette: @p #EEEEEE\nbackground: b\n"
    result = compile_caption(text, path=str(tmp_path / "x.icap"))
    assert result.diagnostics == () and [p.name for p in result.files] == ["outer.icap", "inner.icap"]
    assert result.captions[0].caption["style_description"]["color_palette"] == [
        "#CCCCCC",
        "#DDDDDD",
        "#EEEEEE",
    ]


def test_a_used_file_is_read_again_when_it_changes(tmp_path):
    file = tmp_path / "styles.icap"
    text = "use styles.icap\nstyle: a\nbackground: b\n"
    file.write_text(A, encoding="utf-8")
    assert style_of(text, base_dir=tmp_path)["photo"] == "a photo"
    file.write_text(A.replace("a photo", "another photo"), encoding="utf-8")
    assert style_of(text, base_dir=tmp_path)["photo"] == "another photo"


def test_files_that_use_each_other_and_files_that_are_wrong(tmp_path):
    (tmp_path / "a.icap").write_text("use b.icap\n", encoding="utf-8")
    (tmp_path / "b.icap").write_text("use a.icap\n", encoding="utf-8")
    (tmp_path / "bad.icap").write_text("style x:\n  photo: p\n", encoding="utf-8")
    (tmp_path / "latin.icap").write_bytes("style é\n".encode("latin-1"))
    (tmp_path / "full.icap").write_text("A lake.\nbackground: b\n" + A, encoding="utf-8")
    assert codes(compile_caption("use a.icap\nbackground: b\n", base_dir=tmp_path)) == ["IC304"]
    found = compile_caption("use bad.icap\nbackground: b\n", base_dir=tmp_path)
    assert codes(found) == ["IC310", "IC119"] and found.diagnostics[1].span.path.endswith("bad.icap")
    for name in ("none.icap", "latin.icap", ".", "nul\\u0000"):
        assert codes(compile_caption(f'use "{name}"\nbackground: b\n', base_dir=tmp_path)) == ["IC305"]
    assert codes(compile_caption("use full.icap\nbackground: b\n", base_dir=tmp_path)) == ["IC311"]


def test_two_files_with_a_style_of_one_name(tmp_path):
    (tmp_path / "a.icap").write_text(A, encoding="utf-8")
    result = compile_caption("use a.icap\n" + A + "image x\n  style: a\n  background: b\n", base_dir=tmp_path)
    assert codes(result) == ["IC307"]


def test_placeholders_are_filled_inside_the_strings():
    text = 'A photo of <token>.\nbackground: by <place>\ntext "<token> <html>": a <token>\n'
    assert compile_caption(text).captions[0].caption["high_level_description"] == "A photo of <token>."
    result = compile_caption(text, placeholders={"token": 'a "sks"', "<place>": "<token>"})
    caption = json.loads(result.captions[0].json)
    assert caption["high_level_description"] == 'A photo of a "sks".'
    assert caption["compositional_deconstruction"]["background"] == "by <token>"
    assert caption["compositional_deconstruction"]["elements"][0]["text"] == 'a "sks" <html>'
    assert result.placeholders == {"token", "place", "html"}


def test_an_unknown_placeholder_is_an_error_under_its_name():
    result = compile_caption(
        "A photo.\nbackground: b\nobj: one\nobj: two <tokn>\n", placeholders={"token": "sks"}
    )
    (found,) = result.diagnostics
    assert found.code.id == "IC308" and "<token>" in found.cure
    assert (found.span.line, found.span.column, found.span.end_column) == (4, 10, 16)


def test_filling_does_not_change_its_argument():
    caption = compile_caption("<a>\nbackground: <a>\nobj: <a>\n").captions[0].caption
    before = json.dumps(caption)
    assert "<a>" not in json.dumps(fill_placeholders(caption, {"a": "x"}))
    assert json.dumps(caption) == before


IN_ELEMENTS = ("compositional_deconstruction", "elements")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (("high_level_description",), "A lake."),
        (("style_description", "lighting"), "lighting: soft"),
        (("style_description", "photo"), "style: a"),
        (("style_description", "color_palette", 0), "palette: #111111"),
        ((*IN_ELEMENTS, 0), "obj: one"),
        ((*IN_ELEMENTS, 1, "bbox"), "y1..20 x300..400"),
        ((*IN_ELEMENTS, 1, "text"), '"T"'),
        ((*IN_ELEMENTS, 1, "color_palette", 1), "#333333"),
        ((*IN_ELEMENTS, 1, "desc"), 'text y1..20 "T" x300..400 #222222 #333333: d'),
        (("nothing", "known"), "image x"),
    ],
)
def test_parts_of_a_caption_are_found_in_its_text(where, expected):
    text = A + "image x\n  A lake.\n  lighting: soft\n  palette: #111111\n  style: a\n  background: b\n"
    text += '  obj: one\n  text y1..20 "T" x300..400 #222222 #333333: d\n'
    span = compile_caption(text).captions[0].locate(where)
    found = text.splitlines()[span.line - 1][span.column - 1 : span.end_column - 1]
    # A box is found from its first to its last part, whatever stands between.
    assert found.replace('"T" ', "") == expected if where[-1] == "bbox" else found == expected


def test_captions_with_errors_are_left_out_and_the_others_stay():
    text = "image a\n  background b\nimage b\n  background: b\nimage c\n  obj y1..2: d\nimage d\n\tphoto: x\n"
    result = compile_caption(text)
    assert [one.name for one in result.captions] == ["b"]
    assert codes(result) == ["IC104", "IC202", "IC123", "IC101"] or set(codes(result)) >= {
        "IC104",
        "IC202",
        "IC101",
    }


@pytest.mark.parametrize("line", ["\tbackground: x", "  background x", "  obj y2..1 x1..2: d"])
def test_beyond_twenty_errors_nothing_is_told_and_nothing_is_taken_for_right(line):
    result = compile_caption("".join(f"image {n}\n{line}\n" for n in range(50)))
    assert result.captions == () and len(result.errors) == 20
