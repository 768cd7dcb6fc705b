"""The table of diagnostic codes, one module a domain; each entry is its own documentation page.

| prefix | domain | module |
|---|---|---|
| IC | captions | ``codes.caption_language``, ``codes.caption_json``, ``codes.caption_tools`` |
| IR | recipes | ``codes.recipe`` |
| IP | plans and hardware | ``codes.plan`` |
| IM | base models | ``codes.model`` |
| ID | pictures, datasets, caches | ``codes.data`` |
| IE | training engine | ``codes.engine``, ``codes.processes`` |
| IA | adapter files, checkpoints, outputs | ``codes.artifacts`` |

A page says what the check does, why it matters, an example where one helps, and what to write instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from inspect import cleandoc
from typing import Any, Literal

DOMAINS = {
    "IC": ("caption_language", "caption_json", "caption_tools"),
    "IR": ("recipe",),
    "IP": ("plan",),
    "IM": ("model",),
    "ID": ("data",),
    "IE": ("engine", "processes"),
    "IA": ("artifacts",),
}


@dataclass(frozen=True, slots=True)
class Code:
    """A stable identifier with its title, default severity and explanation (Markdown)."""

    id: str
    title: str
    explanation: str
    severity: Literal["error", "warning", "note"] = "error"

    def __str__(self) -> str:
        return self.id

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return find_code, (self.id,)  # from another process it is still the one in the table


_TABLE: dict[str, Code] = {}


def define(
    id: str, title: str, explanation: str, severity: Literal["error", "warning", "note"] = "error"
) -> Code:
    """Adds a code to the table. Ids are never reused."""
    if id in _TABLE:
        raise ValueError(f"diagnostic code {id} is defined twice")
    _TABLE[id] = Code(id, title, cleandoc(explanation), severity)
    return _TABLE[id]


def all_codes() -> dict[str, Code]:
    """Every code, by id."""
    for modules in DOMAINS.values():
        for module in modules:
            import_module(f"{__name__}.{module}")
    return dict(sorted(_TABLE.items()))


def find_code(id: str) -> Code | None:
    """The code with this id, in any letter case, or ``None``."""
    return all_codes().get(id.upper())
