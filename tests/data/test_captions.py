"""Variants of captions: valid, bounded, the same every time, and true to what the picture shows."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ideoflow.captions import check_caption, to_json
from ideoflow.data.captions import caption_variants
from ideoflow.recipe import CaptionSettings


def caption(elements, words="A table."):
    kinds = [
        {"type": "obj", "bbox": [n, 0, n + 10, 500], "desc": f"object {n}"}
        if n % 3
        else {"type": "text", "bbox": [n, 500, n + 10, 1000], "text": f"W{n}", "desc": "a sign"}
        for n in range(elements)
    ]
    return to_json(
        {
            "high_level_description": words,
            "compositional_deconstruction": {"background": "a wall", "elements": kinds},
        }
    )


def elements_of(text):
    return json.loads(text)["compositional_deconstruction"]["elements"]


captions = st.builds(caption, st.integers(0, 9), st.sampled_from(["A table.", "Ein Tisch."]))
varied = st.builds(
    CaptionSettings,
    shuffle=st.booleans(),
    element_dropout=st.sampled_from([0.0, 0.3, 1.0]),
    variants=st.integers(2, 12),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(captions, min_size=1, max_size=3, unique=True), varied)
def test_variants_are_valid_bounded_and_lose_only_objects(given_captions, how):
    made = caption_variants(given_captions, how)
    assert made[: len(given_captions)] == tuple(given_captions)
    assert len(set(made)) == len(made) <= max(how.most_variants, len(given_captions))
    assert made == caption_variants(given_captions, how)
    originals = [json.loads(c) for c in given_captions]
    for text in made:
        variant = json.loads(text)
        assert to_json(variant) == text and not [d for d in check_caption(variant) if d.is_error]
        source = next(o for o in originals if o["high_level_description"] == variant["high_level_description"]
                      and all(e in elements_of(to_json(o)) for e in elements_of(text)))  # fmt: skip
        assert {**variant, "compositional_deconstruction": 0} == {**source, "compositional_deconstruction": 0}


@given(captions)
def test_what_each_setting_may_change(text):
    before = elements_of(text)
    for variant in caption_variants([text], CaptionSettings(shuffle=True, variants=12)):
        assert sorted(map(str, elements_of(variant))) == sorted(map(str, before))
    for variant in caption_variants([text], CaptionSettings(element_dropout=0.5, variants=12)):
        after = elements_of(variant)
        assert after == [e for e in before if e in after], "in the same order"
        assert [e for e in after if e["type"] == "text"] == [e for e in before if e["type"] == "text"]


def test_nothing_is_varied_unless_asked():
    texts = [caption(5), caption(6)]
    assert caption_variants(texts, CaptionSettings()) == tuple(texts)
    assert caption_variants([caption(0)], CaptionSettings(shuffle=True)) == (caption(0),)


def test_more_variants_keep_those_before():
    few, many = (caption_variants([caption(8)], CaptionSettings(shuffle=True, variants=n)) for n in (4, 40))
    assert many[:4] == few and len(many) == 40


def test_several_captions_get_even_parts():
    texts = [caption(8, "A."), caption(8, "B.")]
    made = caption_variants(texts, CaptionSettings(shuffle=True, variants=10))
    words = [json.loads(t)["high_level_description"] for t in made]
    assert words.count("A.") == words.count("B.") == 5


@pytest.mark.parametrize("chance", [0.2, 0.7])
def test_objects_are_left_out_as_often_as_asked(chance):
    made = caption_variants(
        [caption(60)], CaptionSettings(shuffle=True, element_dropout=chance, variants=200)
    )
    left = sum(len([e for e in elements_of(t) if e["type"] == "obj"]) for t in made[1:])
    objects = 40 * (len(made) - 1)
    assert abs(left - (1 - chance) * objects) < 4 * (objects * chance * (1 - chance)) ** 0.5


def test_known_answers():
    """These never change: caches hold what was encoded from them."""
    made = caption_variants([caption(5)], CaptionSettings(shuffle=True, element_dropout=0.4, variants=4))
    found = [[e.get("text") or e["desc"][-1] for e in elements_of(t)] for t in made]
    assert found == [
        ["W0", "1", "2", "W3", "4"],
        ["2", "W0", "1", "4", "W3"],
        ["W0", "1", "4", "W3"],
        ["W3", "W0"],
    ]
