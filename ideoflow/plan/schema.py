"""``schemas/plan.schema.json``, generated from the plan's dataclasses.

JSON Schema draft 2020-12. ``python -m ideoflow.plan.schema`` writes the file; a test holds the two equal.
"""

from __future__ import annotations

import json
from typing import Any

from ideoflow.plan.codec import json_schema
from ideoflow.plan.document import FORMAT, Plan
from ideoflow.recipe import RecipeTables
from ideoflow.recipe.schema import recipe_schema

SCHEMA_ID = f"https://ideoflow.dev/schemas/plan-{FORMAT}.schema.json"


def plan_schema() -> dict[str, Any]:
    """The schema as plain data."""
    recipe = {k: v for k, v in recipe_schema().items() if not k.startswith("$") and k != "title"}
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "ideoflow plan",
    }
    schema = json_schema(Plan, {RecipeTables: _with_nulls(recipe)})
    schema["properties"]["format"] = {"const": FORMAT}
    return head | schema


def _with_nulls(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's schema for a plan: every key is written, and what is not set is null (TOML has none).

    The keys' documentation stays in the recipe's own schema.
    """
    properties = {}
    for name, described in recipe["properties"].items():
        schema = {k: v for k, v in described.items() if k != "description"}
        if "properties" in schema:
            properties[name] = _with_nulls(schema)
        elif "default" not in schema and name not in recipe.get("required", ()):
            properties[name] = {"anyOf": [schema, {"type": "null"}]}
        else:
            properties[name] = schema
    return recipe | {"properties": properties, "required": list(properties)}


def schema_text() -> str:
    """The exact content of ``schemas/plan.schema.json``."""
    return json.dumps(plan_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from ideoflow.resources import data_root

    (data_root() / "schemas" / "plan.schema.json").write_text(schema_text(), encoding="utf-8")
