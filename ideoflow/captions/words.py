"""Edits to whole captions that keep them captions: trigger words and the order of a box's numbers.

Other trainers put a trigger word in front of the caption, which for JSON means in front of the ``{``; there
it breaks the caption. Here words go into the strings of the JSON, and nothing else is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ideoflow.captions.emit import prose_of

TRIGGER_MARKS = ("[trigger]", "<trigger>")

Caption = dict[str, Any]


def insert_trigger(caption: Caption, word: str) -> tuple[Caption, bool]:
    """Puts a trigger word where the caption wants it; the flag tells whether a place had to be chosen.

    ``[trigger]`` and ``<trigger>`` are replaced wherever they stand. A caption whose descriptions then have
    the word is left alone. Otherwise the word opens ``high_level_description``, which is created if it is
    missing.
    """
    caption = _map_strings(caption, lambda text: _replace_marks(text, word))
    if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", "\n".join(_descriptions(caption)), re.IGNORECASE):
        return caption, False
    description = caption.get("high_level_description", "").strip()
    opened = f"{word}, {description}" if description else word
    return {"high_level_description": opened, **{k: v for k, v in caption.items()
                                                 if k != "high_level_description"}}, True  # fmt: skip


def swap_box_axes(caption: Caption) -> Caption:
    """Turns boxes written as ``[x1, y1, x2, y2]`` into the model's ``[y_min, x_min, y_max, x_max]``."""
    composition = caption["compositional_deconstruction"]
    elements = [
        {**e, "bbox": [e["bbox"][1], e["bbox"][0], e["bbox"][3], e["bbox"][2]]} if "bbox" in e else e
        for e in composition["elements"]
    ]
    return {**caption, "compositional_deconstruction": {**composition, "elements": elements}}


def _replace_marks(text: str, word: str) -> str:
    for mark in TRIGGER_MARKS:
        text = text.replace(mark, word)
    return text


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_strings(v, change) for key, v in value.items()}
    if isinstance(value, list):
        return [_map_strings(v, change) for v in value]
    return value


def _descriptions(caption: Caption) -> list[str]:
    """Every string that a person reads as prose: not the verbatim texts, colours and types."""
    return [text for where, text in prose_of(caption) if where[-1] != "text"]
