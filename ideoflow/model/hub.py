"""Brings a base onto this disk: makes nano, downloads a hub id, leaves folders as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ideoflow.diagnostics import Span
from ideoflow.model.base import NANO, PARTS, BaseFacts, check_components, hub_file, locate_base, read_base
from ideoflow.model.download import repository_files, single_file, snapshot

_EVERYTHING = ["*.json", "*.safetensors", "tokenizer/*"]
# Beside a single file: the transformers' configurations, but not their gigabytes.
_PARTS_ONLY = ["*.json", *(f"{part}/*" for part in PARTS), "scheduler/*"]


def fetch_base(
    facts: BaseFacts,
    revision: str | None = None,
    *,
    relative_to: Path = Path(),
    span: Span | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> BaseFacts:
    """The same base with ``present`` true; arguments as for :func:`ideoflow.model.base.locate_base`.

    Raises:
        IdeoflowError: when it cannot be had: gated, unknown, offline, disk full, or no base at all.
    """
    if facts.present:
        return facts
    remote = hub_file(facts.name, relative_to)
    if remote and not facts.files:
        say(f"downloading {facts.name}")
        single_file(*remote, revision, span=span)
        facts = locate_base(
            facts.name, revision=revision, parts=facts.parts, relative_to=relative_to, span=span
        )
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
        _check_layout(source, revision, span)
        say(f"downloading {source}")
        folder = snapshot(source, revision, kind="model", patterns=_EVERYTHING, span=span)
    else:
        say(f"downloading {', '.join(PARTS)} of {source}")
        of_parts = None if remote else revision
        folder = snapshot(source, of_parts, kind="model", patterns=_PARTS_ONLY, span=span)
    return read_base(facts.name, folder, span, files=facts.files, parts=facts.parts)


def _check_layout(name: str, revision: str | None, span: Span | None) -> None:
    """Refuses a repository that is no base, before its gigabytes are downloaded."""
    files, cure = repository_files(name, revision, span=span), ""
    names = {file.partition("/")[0] for file in files}
    singles = [file for file in files if file.endswith(".safetensors")]
    if singles and "transformer" not in names:
        # Published names say which file is the transformer, and which the second.
        best = min(singles, key=lambda f: ("ideogram" not in Path(f).name, "unconditional" in f, f))
        cure = f"name a file of it, such as '{name}/{best}', as model.base, and set model.parts"
    check_components(name, names, span=span, cure=cure)
