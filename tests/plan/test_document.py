"""plan.json: equal bytes for equal plans, and a clear word about a file that is no plan."""

import json
from pathlib import Path

import pytest

from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes.plan import DATA_CHANGED
from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE, BaseFacts
from ideoflow.plan.document import (
    FORMAT,
    Decision,
    Digests,
    DiskSizes,
    Hardware,
    Ledger,
    LedgerLine,
    Plan,
    Rejected,
    TimeEstimate,
    TimePart,
    load_plan,
)
from ideoflow.recipe import parse_recipe


def made():
    recipe = parse_recipe('[model]\nbase = "nano"\n[data]\nimages = "p"\n[adapter]\ntargets = ["layers.1.*"]')
    base = BaseFacts(
        "nano", Path("/c/nano"), True, NANO_TRANSFORMER, NANO_TEXT, NANO_VAE, "float32", "nano-1", True
    )
    lines = (
        LedgerLine("train", "weights", 100, False, "from the table"),
        LedgerLine("train", "gradients", 20, True, ""),
        LedgerLine("sample", "weights", 110, False, ""),
    )
    return Plan(
        FORMAT,
        "größe",
        "r.toml",
        Digests("a", None, "nano-1"),
        recipe.tables,
        base,
        ("layers.1.attention.to_q",),
        Hardware("RTX", "cuda", 120, 120, (8, 9)),
        None,
        (Decision("compile", "off", "auto", "few", "why", "", (Rejected("regional", "slow", 5, 1.5),)),),
        Ledger(lines),
        TimeEstimate(
            (TimePart("matmul", 10.5, ""), TimePart("attention", 3.0, "")), 1.0, 2.0, 3.0, 4.0, False, ""
        ),
        DiskSizes(1, 2, None, None),
        (Diagnostic(DATA_CHANGED, "m", Span("r.toml", 2, 3, 2, 5, "abc"), "cure", "label", ("n",), "note"),),
    )


def test_json_and_back_are_equal_and_the_bytes_repeat():
    plan = made()
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text == made().to_json()
    assert "größe" in text


def test_ledger_and_time_add_up():
    plan = made()
    assert (plan.ledger.peak("train"), plan.ledger.peak("sample"), plan.ledger.peak("text")) == (120, 110, 0)
    assert plan.ledger.peak_phase == "train" and plan.ledger.peak_bytes == 120 and plan.fits
    assert plan.time.step_ms == 13.5 and plan.time.total_seconds == 10


def test_values_are_looked_up_by_id():
    assert made().value("compile") == "off"
    with pytest.raises(KeyError, match="nothing called 'colour'"):
        made().value("colour")


def edit(change):
    data = json.loads(made().to_json())
    change(data)
    return json.dumps(data)


DAMAGE = {
    "not JSON": ("{", "IP002", "not JSON"),
    "a list": ("[]", "IP002", "no format version"),
    "no format": (edit(lambda d: d.pop("format")), "IP002", "no format version"),
    "other format": (edit(lambda d: d.update(format=FORMAT + 1)), "IP003", f"version {FORMAT + 1}"),
    "left over": (edit(lambda d: d.update(colour=1)), "IP002", "'colour': unknown key"),
    "missing": (edit(lambda d: d["hardware"].pop("name")), "IP002", "'hardware.name': missing"),
    "wrong type": (edit(lambda d: d.update(targets="all")), "IP002", "'targets': must be a list"),
    "wrong item": (edit(lambda d: d["targets"].append(3)), "IP002", "'targets.1': must be text"),
    "wrong choice": (edit(lambda d: d["hardware"].update(kind="tpu")), "IP002", "'tpu' is not one of"),
    "wrong length": (edit(lambda d: d["hardware"].update(compute_capability=[8])), "IP002", "2 values"),
    "true for a number": (edit(lambda d: d["sizes"].update(adapter=True)), "IP002", "'sizes.adapter'"),
    "past every float": (edit(lambda d: d["time"].update(train_seconds=10**400)), "IP002", "a finite number"),
    "no number": (edit(lambda d: d["time"].update(train_seconds=float("nan"))), "IP002", "a finite number"),
    "a code that is none": (edit(lambda d: d["warnings"][0].update(code="IP999")), "IP002", "IP999"),
    "recipe value": (edit(lambda d: d["tables"]["train"].update(steps=0)), "IP002", "tables.train.steps"),
    "recipe table": (edit(lambda d: d["tables"].pop("train")), "IP002", "'tables.train': missing"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "code", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_plan_is_a_diagnostic(text, code, words):
    with pytest.raises(IdeoflowError) as caught:
        Plan.from_json(text, "old.plan.json")
    (problem,) = caught.value.diagnostics
    assert problem.code.id == code and words in problem.message and problem.span.path == "old.plan.json"
    assert problem.cure


def test_reading_a_file(tmp_path):
    file = tmp_path / "p.plan.json"
    file.write_text(made().to_json(), encoding="utf-8")
    assert load_plan(file) == made()
    for bad in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(IdeoflowError, match="IP001"):
            load_plan(bad)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(IdeoflowError, match="not UTF-8"):
        load_plan(file)
