"""Brings a base onto this disk: makes nano, downloads a hub id, leaves folders as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ideoflow.diagnostics import Span
from ideoflow.model.base import NANO, PARTS, BaseFacts, read_base
from ideoflow.model.download import snapshot

_EVERYTHING = ["*.json", "*.safetensors", "tokenizer/*"]
# Beside a single file: the transformers' configurations, but not their gigabytes.
_PARTS_ONLY = ["*.json", *(f"{part}/*" for part in PARTS), "scheduler/*"]


def fetch_base(
    facts: BaseFacts,
    revision: str | None = None,
    *,
    span: Span | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> BaseFacts:
    """The same base with ``present`` true.

    Raises:
        IdeoflowError: when it cannot be had: gated, unknown, offline, disk full.
    """
    if facts.present:
        return facts
    source = facts.parts or facts.name
    if source == NANO:
        from ideoflow.model.nano import ensure_nano

        assert facts.folder is not None
        folder = ensure_nano(facts.folder, say)
        if facts.parts is None:
            return replace(facts, present=True)
    elif facts.parts is None:
        say(f"downloading {source}")
        folder = snapshot(source, revision, kind="model", patterns=_EVERYTHING, span=span)
    else:
        say(f"downloading {', '.join(PARTS)} of {source}")
        folder = snapshot(source, revision, kind="model", patterns=_PARTS_ONLY, span=span)
    return read_base(facts.name, folder, span, files=facts.files, parts=facts.parts)
