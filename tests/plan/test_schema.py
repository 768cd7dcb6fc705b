"""plan.schema.json is what the dataclasses say, and admits plans and nothing else."""

import json

import pytest
from jsonschema import Draft202012Validator

from ideoflow.plan import make_plan, named_hardware
from ideoflow.plan.schema import SCHEMA_ID, schema_text
from ideoflow.resources import schema

VALIDATOR = Draft202012Validator(json.loads(schema("plan")))


def test_the_file_is_generated_and_valid():
    assert schema("plan") == schema_text(), "run python -m ideoflow.plan.schema"
    Draft202012Validator.check_schema(VALIDATOR.schema)
    assert VALIDATOR.schema["$id"] == SCHEMA_ID


@pytest.fixture(params=["rtx-4090", "16gb", "mi300x", "m3-max"])
def plan(request, full_base, write_recipe, summarize):
    recipe = write_recipe(
        '[validate]\nprompts = ["a.icap"]\n[adapter]\ntargets = ["layers.1?.attention.*"]\n'
    )
    return make_plan(recipe, full_base, summarize(), named_hardware(request.param))


def test_plans_are_admitted(plan):
    VALIDATOR.validate(json.loads(plan.to_json()))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(format=99),
        lambda d: d.pop("ledger"),
        lambda d: d.update(colour="blue"),
        lambda d: d["hardware"].update(kind="tpu"),
        lambda d: d["decisions"][0].update(source="dice"),
        lambda d: d["tables"]["train"].update(steps=0),
        lambda d: d["tables"].pop("train"),
        lambda d: d["ledger"]["lines"][0].update(bytes="many"),
    ],
)
def test_what_from_json_refuses_the_schema_refuses_too(damage, full_base, write_recipe):
    data = json.loads(make_plan(write_recipe(), full_base, None, named_hardware("h100")).to_json())
    assert VALIDATOR.is_valid(data)
    damage(data)
    assert not VALIDATOR.is_valid(data)
