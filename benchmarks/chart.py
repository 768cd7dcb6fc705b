"""A picture of step times and memory: ours against plain diffusers, a row a configuration, as one SVG file.

Dots on logarithmic axes, since a step takes 0.1 s or 10 s; bars from zero would hide the small ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ideoflow.report.markup import Html, tag
from ideoflow.report.units import number

_ROW, _LABEL, _PANEL, _GAP, _TOP = 26, 190, 330, 70, 64
_COLOURS = {"diffusers": "#9a9a9a", "fused": "#4338ca"}
_STYLE = "text { font: 12px system-ui, sans-serif; fill: #1b1a18 } .soft { fill: #68655f }"


def step_chart(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The SVG of rows as :mod:`step` writes them; of several fused rows a configuration, the fastest."""
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        key = (str(row["label"]), str(row["path"]))
        if "ms" in row and ("ms" not in best.get(key, {}) or row["ms"] < best[key]["ms"]):
            best[key] = row
        best.setdefault(key, row)
    width, height = _LABEL + 2 * _PANEL + 2 * _GAP, _TOP + _ROW * len(labels) + 40
    parts = [tag("style", _STYLE), tag("rect", width="100%", height="100%", fill="#fff"),
             _text(title, 12, 22, font_weight=600), *_legend(width)]  # fmt: skip
    for index, label in enumerate(labels):
        parts.append(_text(label, 12, _TOP + _ROW * index + 17))
    panels = (("ms", "ms a step", _LABEL), ("allocated_gib", "GiB allocated", _LABEL + _PANEL + _GAP))
    for key, name, left in panels:
        parts += _panel(best, labels, key, name, left)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{"".join(parts)}</svg>\n'
    )


def write_chart(file: str | None, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    if file:
        Path(file).write_text(step_chart(rows, title), encoding="utf-8")


def _panel(best: Mapping[tuple[str, str], Mapping[str, Any]], labels: Sequence[str], key: str, name: str,
           left: int) -> list[Html]:  # fmt: skip
    values = [row[key] for row in best.values() if row.get(key)]
    if not values:
        return []
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    high = max(high, low + 1)

    def x(value: float) -> float:
        return round(left + _PANEL * (math.log2(value) - low) / (high - low), 1)

    bottom = _TOP + _ROW * len(labels)
    parts = [_text(name, left, _TOP - 12, class_="soft")]
    for power in range(low, high + 1):
        line = {"x1": x(2.0**power), "x2": x(2.0**power), "y1": _TOP, "y2": bottom, "stroke": "#e2dfd8"}
        parts.append(tag("line", **line))
        parts.append(
            _text(number(2.0**power), x(2.0**power), bottom + 16, class_="soft", text_anchor="middle")
        )
    for index, label in enumerate(labels):
        y = _TOP + _ROW * index + 13
        both = {path: best.get((label, path), {}) for path in _COLOURS}
        shown = {path: row[key] for path, row in both.items() if row.get(key)}
        if len(shown) == 2:
            ends = [x(value) for value in shown.values()]
            parts.append(tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, stroke="#c9c5bc", stroke_width=2))
        for path, value in shown.items():
            tip = tag("title", f"{label}, {path}: {number(value)} {name}")
            parts.append(tag("circle", tip, cx=x(value), cy=y, r=5, fill=_COLOURS[path]))
        if len(shown) == 2:
            ratio = shown["diffusers"] / shown["fused"]
            parts.append(_text(f"{ratio:.2f}x", left + _PANEL + 8, y + 4))
        else:
            missing = [f"{p}: {row['failed']}" for p, row in both.items() if row.get("failed")]
            if missing and key == "ms":
                parts.append(
                    _text("; ".join(missing), left + _PANEL - 6, y + 4, class_="soft", text_anchor="end")
                )
    return parts


def _legend(width: int) -> list[Html]:
    names = {"diffusers": "plain diffusers + PEFT", "fused": "ideoflow"}
    parts, left = [], width - 300
    for path, name in names.items():
        parts.append(tag("circle", cx=left, cy=18, r=5, fill=_COLOURS[path]))
        parts.append(_text(name, left + 10, 22))
        left += 180
    return parts


def _text(words: str, x: float, y: float, **attributes: Any) -> Html:
    return tag("text", words, x=x, y=y, **attributes)
