"""The profile of a run, if it has one: where a step's time went, for the terminal and for the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ideoflow.report.markup import Html, tag
from ideoflow.report.parts import remark, section, table
from ideoflow.report.units import number

PROFILE = Path("profile") / "profile.json"
_NAME = 90  # characters of a kernel's name that are shown


def heading(profile: Mapping[str, Any]) -> str:
    """What was measured, in a sentence."""
    numbers = profile.get("numbers") or []
    which = f"steps {numbers[0]} to {numbers[-1]}" if numbers else f"{profile['steps']} steps"
    return f"{which} on {profile['device']}: {number(profile['wall_ms'])} ms a step, by part"


def terminal_table(profile: Mapping[str, Any]) -> Table:
    """The parts as a table for rich."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("part", no_wrap=True)
    for column in ("ms", "share", profile["counted"]):
        shown.add_column(column, justify="right", no_wrap=True)
    for part in profile["parts"]:
        shown.add_row(part["part"], f"{part['ms']:.2f}", f"{part['share']:.1%}", f"{part['calls']:.0f}")
    return shown


def profile(folder: Path) -> Html | None:
    """The page's section; None where the run was not profiled, or its profile cannot be read."""
    try:
        found = json.loads((folder / PROFILE).read_text(encoding="utf-8"))
        return _section(found)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _section(found: Mapping[str, Any]) -> Html:
    counted = str(found["counted"])
    how = (
        "Time of the GPU's kernels; idle is when none ran"
        if counted == "kernels"
        else "The operators' own time on the processor; idle is Python between them"
    )
    overlap = float(found["overlap_ms"])
    twice = (
        f"; {number(overlap)} ms in which two kernels ran at once are counted twice" if overlap > 0.01 else ""
    )
    rows = [
        (
            part["part"],
            number(part["ms"]),
            f"{100 * part['share']:.1f} %",
            f"{part['calls']:,.0f}",
            [tag("div", f"{number(k['ms'])} ms  {str(k['name'])[:_NAME]}") for k in part["longest"][:3]],
        )
        for part in found["parts"]
    ]
    return section(
        "profile",
        "Profile",
        remark(f"{heading(found).capitalize()}. {how}{twice}. The trace, for ",
               tag("code", "ui.perfetto.dev"), ", is ", tag("code", f"profile/{found['trace']}"), "."),
        table(["part", "ms", "share", counted, "longest"], rows, figures=(1, 2, 3)),
    )  # fmt: skip
