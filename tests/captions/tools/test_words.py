"""Trigger words go inside the JSON, and nothing but the place they belong to changes."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from ideoflow.captions.words import insert_trigger, swap_box_axes


def caption(description=None, desc="A boat", text="SALE", background="A lake."):
    elements = [{"type": "obj", "bbox": [1, 2, 3, 4], "desc": desc},
                {"type": "text", "text": text, "desc": "A sign", "color_palette": ["#AABBCC"]}]  # fmt: skip
    parts = {} if description is None else {"high_level_description": description}
    return {**parts, "compositional_deconstruction": {"background": background, "elements": elements}}


def test_marks_are_replaced_wherever_they_stand():
    result, chosen = insert_trigger(caption("[trigger] at sea", "A <trigger>", "[trigger]!"), "sks")
    assert not chosen
    assert result == caption("sks at sea", "A sks", "sks!")


def test_a_caption_that_has_the_word_is_left_alone():
    for there in (
        caption("A photo of SKS, at sea"),
        caption(desc="The (sks) boat"),
        caption(background="sks"),
    ):
        assert insert_trigger(there, "sks") == (there, False)


def test_otherwise_the_word_opens_the_description():
    assert insert_trigger(caption("A boat"), "sks") == (caption("sks, A boat"), True)
    result, chosen = insert_trigger(caption(), "sks")
    assert chosen and next(iter(result)) == "high_level_description" and result == caption("sks")
    # a part of a word, or a word that is only in the picture, is not the trigger
    assert insert_trigger(caption("A sksophone", text="sks"), "sks")[1]


@given(st.text(), st.text(), st.text(min_size=1))
def test_only_descriptions_can_change(description, desc, word):
    before = caption(description, desc)
    after, _ = insert_trigger(before, word)
    assert list(after) == list(before)
    text = json.dumps(after)
    assert text.startswith("{"), "a caption begins with its brace"
    if not any(mark in json.dumps(before) for mark in ("[trigger]", "<trigger>")):
        assert after["compositional_deconstruction"] == before["compositional_deconstruction"]


def test_swapping_axes_twice_changes_nothing():
    before = caption()
    once = swap_box_axes(before)
    assert once["compositional_deconstruction"]["elements"][0]["bbox"] == [2, 1, 4, 3]
    assert swap_box_axes(once) == before
