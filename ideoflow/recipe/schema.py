"""``schemas/recipe.schema.json``, generated from the settings dataclasses.

JSON Schema draft 7, which TOML editors (Taplo, Even Better TOML) read. ``python -m ideoflow.recipe.schema``
writes the file; a test holds the two equal.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ideoflow.recipe.convert import to_plain
from ideoflow.recipe.settings import RecipeTables
from ideoflow.recipe.sources import MOST_MEGAPIXELS

SCHEMA_ID = "https://ideoflow.dev/schemas/recipe-1.schema.json"
_KEYWORDS = {
    "minimum": "minimum",
    "maximum": "maximum",
    "above": "exclusiveMinimum",
    "multiple_of": "multipleOf",
}
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


def recipe_schema() -> dict[str, Any]:
    """The schema as plain data."""
    head = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": SCHEMA_ID,
        "title": "ideoflow recipe",
    }
    return head | _table(RecipeTables)


def _table(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    schema: dict[str, Any] = {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": {f.name: _key(hints[f.name], f) for f in fields(cls)},
        "additionalProperties": False,
    }
    if one_of := getattr(cls, "ONE_OF", ()):
        schema["anyOf"] = [{"required": [name]} for name in one_of]
    return schema | ({"required": required} if required else {})


def _key(annotation: Any, spec: Field[Any]) -> dict[str, Any]:
    if is_dataclass(annotation):
        return _table(annotation)
    schema = {"description": spec.metadata["doc"]} | _type(annotation)
    bounded = schema.get("additionalProperties", schema)  # of a table, each value
    bounded |= {_KEYWORDS[k]: v for k, v in spec.metadata.items() if k in _KEYWORDS}
    if "megapixels" in spec.metadata:
        pixels = {key: schema.pop(key) for key in tuple(schema) if key != "description"}
        area = {"type": "number", "minimum": 0, "maximum": MOST_MEGAPIXELS}
        schema["anyOf"] = [pixels, {"description": "Megapixels, with resolution_type = 'area'."} | area]
    default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
    return schema if default in (MISSING, None) else schema | {"default": to_plain(default)}


def _type(annotation: Any) -> dict[str, Any]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        options = [_type(a) for a in get_args(annotation) if a is not type(None)]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is Literal:
        return {"enum": list(get_args(annotation))}
    if origin is tuple:
        item: Any = get_args(annotation)[0]
        return {"type": "array", "items": _table(item) if is_dataclass(item) else _type(item)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(get_args(annotation)[1])}
    return {"type": _SCALARS[annotation]}


def schema_text() -> str:
    """The exact content of ``schemas/recipe.schema.json``."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    from ideoflow.resources import data_root

    (data_root() / "schemas" / "recipe.schema.json").write_text(schema_text(), encoding="utf-8")
