"""Variants of a caption, so that a picture is not always met with the very same words (torch-free).

Variants are edits of the caption's JSON, so each of them is valid: elements change places, and elements of
kind ``obj`` are left out now and then. Boxes stay with their elements. Elements of kind ``text`` are never
left out: a picture with words that its caption does not mention teaches the model to write unasked.

A variant is a pure function of the caption, its number and the settings, and of no seed: so runs with other
seeds find the same variants in the cache, and a greater ``captions.variants`` adds some and changes none.
Which variant a step meets is drawn by the run's seed (:mod:`ideoflow.data.order`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from ideoflow.captions import to_json
from ideoflow.recipe import CaptionSettings


def caption_variants(captions: Sequence[str], settings: CaptionSettings) -> tuple[str, ...]:
    """What a picture's captions (canonical JSON) are trained as: at most ``settings.most_variants`` different
    ones, and never fewer than the captions themselves.

    The captions as they are come first; then, in turn, edits of each.
    """
    found = dict.fromkeys(captions)
    if (most := settings.most_variants) > 1:
        # Short captions have few variants: after twice as many tries as there are places, enough was tried.
        for number in range(2 * most):
            if len(found) >= most:
                break
            found[_edited(captions[number % len(captions)], number // len(captions), settings)] = None
    return tuple(found)


def _edited(caption: str, number: int, settings: CaptionSettings) -> str:
    chance = random.Random(f"{number}/{caption}")  # seeded by the text's SHA-512, the same everywhere
    data: dict[str, Any] = json.loads(caption)
    composition = data["compositional_deconstruction"]
    elements = composition["elements"]
    # Two numbers for each element, whatever the settings, so that one setting does not change the other's.
    drawn = [(chance.random(), chance.random()) for _ in elements]
    kept = [
        (place, element)
        for (leave, place), element in zip(drawn, elements, strict=True)
        if element["type"] == "text" or leave >= settings.element_dropout
    ]
    if settings.shuffle:
        kept.sort(key=lambda pair: pair[0])
    composition["elements"] = [element for _, element in kept]
    return to_json(data)
