"""Pieces that every section of the page is made of."""

from __future__ import annotations

from collections.abc import Sequence

from ideoflow.plan.document import Plan
from ideoflow.report.markup import Child, Html, tag
from ideoflow.report.units import without_home

NOTHING = "\N{EN DASH}"


def section(id: str, title: str, *children: Child) -> Html:
    return tag("section", tag("h2", title, id=f"{id}-title"), *children, id=id, aria_labelledby=f"{id}-title")


def remark(*children: Child) -> Html:
    return tag("p", *children, class_="remark")


def table(head: Sequence[str], rows: Sequence[Sequence[Child]], figures: Sequence[int] = ()) -> Html:
    """A table that scrolls sideways on narrow screens; the columns in ``figures`` are set right."""

    def cell(name: str, index: int, child: Child) -> Html:
        return tag(name, child, class_="figure" if index in figures else None)

    body = [tag("tr", [cell("td", i, child) for i, child in enumerate(row)]) for row in rows]
    heads = [
        tag("th", text, scope="col", class_="figure" if i in figures else None) for i, text in enumerate(head)
    ]
    inside = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body))
    return tag("div", inside, class_="scroll", tabindex="0")


def masthead(kicker: str, plan: Plan, status: str, style: str, tiles: Sequence[tuple[str, str, str]]) -> Html:
    """The head of a page: what it is, of which run, how it stands, and tiles of (name, value, note)."""
    facts = [tag("div", tag("dt", name), tag("dd", value, tag("small", note))) for name, value, note in tiles]
    return tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", plan.name),
        tag(
            "p",
            tag("span", status, class_=f"status {style}"),
            tag("span", "base ", tag("b", without_home(plan.base.name))),
            tag("span", "on ", tag("b", plan.hardware.name)),
            class_="line",
        ),
        tag("dl", facts, class_="tiles"),
    )
