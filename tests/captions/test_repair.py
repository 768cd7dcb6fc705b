"""JSON captions from the wild: what is repaired, what is reported, and that nothing is guessed."""

import json

import pytest
from verifier import verify

from ideoflow.captions import read_json_caption, to_json, wrap_text

STYLE = {"aesthetics": "a", "lighting": "l", "photo": "p", "medium": "m"}
OBJ = {"type": "obj", "bbox": [380, 590, 660, 720], "desc": "boat"}


def caption(style=STYLE, elements=(OBJ,), **more):
    data = {**more, "style_description": style} if style is not None else dict(more)
    return {**data, "compositional_deconstruction": {"background": "b", "elements": list(elements)}}


def read(data, **how):
    how.setdefault("separators", (",", ":"))
    return read_json_caption(data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, **how))


def codes(result):
    return [d.code.id for d in result.diagnostics]


def test_canonical_captions_pass_in_silence():
    data = caption(high_level_description="静か “x” \u0007")
    result = read(data)
    assert result.diagnostics == () and result.captions[0].caption == data
    assert result.captions[0].json == to_json(data) and verify(result.captions[0].json) == []


@pytest.mark.parametrize(
    ("given", "code", "expected"),
    [
        (caption({"medium": "m", "photo": "p", "lighting": "l", "aesthetics": "a"}), "IC410", caption()),
        (caption({**STYLE, "color_palette": ["#1b3a5c", "#FFF", "5B8FB9"]}), "IC411",
         caption({**STYLE, "color_palette": ["#1B3A5C", "#FFFFFF", "#5B8FB9"]})),
        (caption({**STYLE, "colour_palette": ["#111111"]}), "IC412",
         caption({**STYLE, "color_palette": ["#111111"]})),
        (caption(elements=[{"Type": "obj", "Bounding-Box": [1, 2, 3, 4], "description": "d"}]), "IC412",
         caption(elements=[{"type": "obj", "bbox": [1, 2, 3, 4], "desc": "d"}])),
        (caption(elements=[{**OBJ, "bbox": [380.0, "590", 660, 720]}]), "IC414", caption()),
        (caption(high_level_description=None), "IC415", caption()),
        (caption(style={**STYLE, "art_style": ""}), "IC415", caption()),
        (caption(elements=[{**OBJ, "text": "", "color_palette": []}]), "IC415", caption()),
        (caption(style={}), "IC415", caption(style=None)),
        (caption(elements=[{**OBJ, "type": "Object"}]), "IC416", caption()),
    ],
)  # fmt: skip
def test_repairs(given, code, expected):
    result = read(given)
    assert codes(result) == [code] and result.diagnostics[0].severity == "note"
    assert result.captions[0].caption == expected and verify(result.captions[0].json) == []


@pytest.mark.parametrize("form", ["{}", "\ufeff{}", "\n\n {} \r\n", "```json\n{}\n```", "```\n{}\n```"])
@pytest.mark.parametrize("indent", [None, 2])
def test_layouts(form, indent):
    data = caption(high_level_description="é")
    text = form.replace("{}", json.dumps(data, indent=indent))
    result = read(text)
    assert codes(result) == ["IC413"] and result.captions[0].caption == data


def test_raw_line_breaks_in_strings_are_kept_as_line_breaks():
    result = read(
        json.dumps(caption(high_level_description="A\nB\tC")).replace("\\n", "\n").replace("\\t", "\t")
    )
    assert codes(result) == ["IC413"]
    assert result.captions[0].caption["high_level_description"] == "A\nB\tC"


@pytest.mark.parametrize(
    ("given", "code", "place"),
    [
        (caption(elements=[{**OBJ, "bbox": [0.1, 0.2, 0.5, 0.6]}]), "IC420", "[0.1,0.2,0.5,0.6]"),
        (caption(elements=[{**OBJ, "bbox": [100, 200, 1500, 600]}]), "IC420", "[100,200,1500,600]"),
        (caption(elements=[{**OBJ, "bbox": [660, 590, 380, 720]}]), "IC420", "[660,590,380,720]"),
        (caption(elements=[{**OBJ, "text": "WORDS"}]), "IC420", '"WORDS"'),
        (caption(style={**STYLE, "palette": ["#111111"], "color_palette": ["#222222"]}), "IC420",
         '["#111111"]'),
        (caption(style={**STYLE, "art_style": "ink"}), "IC505", '"style_description"'),
        (caption(style={"aesthetics": "a"}), "IC505", '"style_description"'),
        (caption(elements=[{**OBJ, "type": "thing"}]), "IC508", '"thing"'),
        (caption(elements=[{**OBJ, "color_palette": ["red"]}]), "IC506", '"red"'),
        (caption(elements=[{**OBJ, "bbox": [1, 2, 3]}]), "IC507", "[1,2,3]"),
        (caption(elements=["boat"]), "IC503", '"boat"'),
        (caption(aspect_ratio="16:9"), "IC501", '"16:9"'),
        (caption(elements=[{"type": "text", "desc": "d"}]), "IC502", "{"),
    ],
)  # fmt: skip
def test_what_is_not_repaired_is_reported_at_its_place(given, code, place):
    text = json.dumps(given, separators=(",", ":"))
    result = read(text)
    assert result.captions == () and code in codes(result)
    found = next(d for d in result.diagnostics if d.code.id == code)
    assert text[found.span.column - 1 : found.span.end_column - 1] == place
    assert found.cure


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "IC401"),
        ("A plain sentence.", "IC401"),
        ('{"compositional_deconstruction":{"background":"b","elements":[]', "IC401"),
        ('{"compositional_deconstruction":{"background":"b","elements":[],}}', "IC401"),
        ('{"compositional_deconstruction":{"background":"b","elements":[]}}{}', "IC401"),
        ('{"compositional_deconstruction":{"background":"b","background":"c","elements":[]}}', "IC402"),
        (
            '{"compositional_deconstruction":{"background":"b","elements":[{"type":"obj","bbox":[NaN,1,2,3]}]}}',
            "IC403",
        ),
        ('{"compositional_deconstruction":{"background":"\\ud83d","elements":[]}}', "IC404"),
        ('{"\\ud83d":1,"compositional_deconstruction":{"background":"","elements":[]}}', "IC404"),
        ("[" * 50 + "]" * 50, "IC405"),
        ("[" * 200_000, "IC405"),
        ('{"compositional_deconstruction":' * 40 + "1" + "}" * 40, "IC405"),
        ("[]", "IC406"),
        ('"{\\"compositional_deconstruction\\":1}"', "IC406"),
        ("1" * 10_000, "IC406"),
        ('{"prompt":"A lake."}', "IC406"),
        ('{"compositional_deconstruction":{"background":"a\0b","elements":[]}}', "IC114"),
        ('{"compositional_deconstruction":{"background":1e999,"elements":[]}}', "IC503"),
        ('{"compositional_deconstruction":null}', "IC503"),
    ],
)
def test_what_is_no_caption(text, code):
    result = read(text)
    assert result.captions == () and codes(result)[0] == code


def test_the_same_key_with_the_same_value_is_merged():
    text = to_json(caption(high_level_description="A"))
    doubled = '{"high_level_description":"A",' + text[1:]
    result = read(doubled)
    assert result.captions[0].json == text and codes(result) == ["IC413"]


def test_escaped_control_characters_and_pairs_are_text():
    text = to_json(caption(high_level_description="\0 🎞")).replace("🎞", "\\ud83c\\udf9e")
    assert read(text).captions[0].caption["high_level_description"] == "\0 🎞"


def test_commas_and_words_in_strings_stay():
    words = "A,B ,  C, #fff, screenshot, a shot\nof {x}"
    result = read(caption(high_level_description=words))
    assert result.captions[0].caption["high_level_description"] == words and result.diagnostics == ()
    assert (
        "style_description" not in read(caption(style=None, high_level_description=words)).captions[0].caption
    )


def test_wrapped_text():
    assert wrap_text("\ufeff A lake,\r\nstill. \n") == {
        "high_level_description": "A lake,\nstill.",
        "compositional_deconstruction": {"background": "", "elements": []},
    }
