"""A plan's own page: the chart, the changes that would help, and nothing from elsewhere."""

import xml.etree.ElementTree as ElementTree
from html import escape

import pytest

from ideoflow.model.base import locate_base
from ideoflow.plan import make_plan, named_hardware
from ideoflow.recipe import parse_recipe
from ideoflow.report.plan_page import render_plan

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def plan_on():
    def make(card, name="barn"):
        recipe = parse_recipe(
            '[model]\nbase = "owner/full"\n[data]\nimages = "p"\n[validate]\nprompts = ["a.icap"]\n'
            f"[output]\nname = '{name}'\n",
            "barn.toml",
        )
        return make_plan(recipe, locate_base("owner/full"), None, named_hardware(card))

    return make


@pytest.mark.parametrize(("card", "fits"), [("h200", True), ("4gb", False)])
def test_it_shows_every_phase_and_what_would_help(card, fits, plan_on):
    plan = plan_on(card)
    text = render_plan(plan)
    assert text.startswith("<!doctype html>") and text.count("<svg") >= 1
    for word in ("Encoding captions", "Encoding pictures", "Training", "Sampling", plan.hardware.name):
        assert word in text
    assert ("What would make it fit" in text) == (not fits)
    # Nothing has run: no row, column or colour is kept for what was measured.
    assert "not measured" not in text and ">measured<" not in text.split("The ledger, line by line")[0]
    for change in plan.changes:
        assert escape(change.words) in text
    for decision in plan.decisions:
        assert escape(decision.reason) in text or escape(decision.reason, quote=True) in text


def test_its_chart_is_good_xml_and_the_page_loads_nothing(plan_on):
    text = render_plan(plan_on("rtx-4090"))
    start = text.index("<svg")
    ElementTree.fromstring(text[start : text.index("</svg>") + len("</svg>")])
    assert "http://" not in text.replace("http://www.w3.org/", "") and "src=" not in text


def test_names_are_escaped(plan_on):
    assert HOSTILE not in render_plan(plan_on("h200", HOSTILE))
