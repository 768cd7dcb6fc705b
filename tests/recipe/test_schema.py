"""The schema and the key reference are those of the settings, and the schema agrees with the reader."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import jsonschema
import pytest
import tomli

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import recipe as codes
from ideoflow.recipe import RecipeTables, parse_recipe
from ideoflow.recipe.reference import reference_text
from ideoflow.recipe.schema import recipe_schema, schema_text
from ideoflow.resources import schema

ROOT = Path(__file__).resolve().parents[2]
HEAD = 'model.base = "nano"\ndata.images = "pictures"\n'
VALIDATOR = jsonschema.Draft7Validator(recipe_schema())


def keys(table=RecipeTables, prefix=""):
    """(dotted key, field, annotation) of every setting."""
    hints = get_type_hints(table)
    for spec in fields(table):
        if is_dataclass(hints[spec.name]):
            yield from keys(hints[spec.name], f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", spec, hints[spec.name]


def test_the_schema_file_is_the_generated_one():
    assert schema("recipe") == schema_text(), "run python -m ideoflow.recipe.schema"


def test_the_reference_is_the_generated_one():
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == reference_text(), "run python -m ideoflow.recipe.reference"


def test_the_schema_is_valid_draft_7():
    jsonschema.Draft7Validator.check_schema(recipe_schema())


@pytest.mark.parametrize(("key", "spec", "annotation"), keys(), ids=lambda v: v if isinstance(v, str) else "")
def test_every_key_is_documented(key, spec, annotation):
    assert spec.metadata["doc"].endswith(".") and len(spec.metadata["doc"].split()) >= 3
    table, _, name = key.rpartition(".")
    section = reference_text().split(f"\n## [{table}]\n")[1].split("\n## ")[0]
    assert section.count(f"\n| `{name}` |") == 1


# One value that each key takes and one that it does not, as TOML.
VALUES = {
    "model.base": ("'owner/name'", "3"),
    "model.revision": ("'main'", "1.0"),
    "model.parts": ("'owner/name'", "1"),
    "data.images": ("''", "[]"),
    "data.caption": ("'filename'", "'none'"),
    "data.instance_prompt": ("'a'\ndata.caption = 'instance'", "['a']"),
    "data.resolution": ("2048", "1000"),
    "data.aspect": ("'square'", "1.5"),
    "data.upscale_limit": ("1", "0.99"),
    "data.caption_column": ("'words'", "1"),
    "data.image_folder": ("'pictures'", "1"),
    "data.image_column": ("'picture'", "['a']"),
    "data.resolution_type": ("'area'", "'volume'"),
    "data.aspects": ("[1, 2.0]", "['1:1']"),
    "data.crop": ("'random'", "'face'"),
    "data.crop_variants": ("8\ndata.crop = 'random'", "0"),
    "data.flip": ("true", "1"),
    "data.minimum_image_size": ("0", "-1"),
    "data.maximum_image_size": ("1024\ndata.target_downsample_size = 1024", "63"),
    "data.target_downsample_size": ("64", "'1024'"),
    "data.source": ("[{images = 'a', weight = 2}]", "[{weight = 0}]"),
    "captions.wrap": ("false", "'yes'"),
    "captions.placeholders": ("{a = 'b'}", "{a = ['b']}"),
    "captions.dropout": ("1.0", "1.01"),
    "captions.shuffle": ("true", "1"),
    "captions.element_dropout": ("0.5", "-0.1"),
    "captions.variants": ("2\ncaptions.shuffle = true", "1"),
    "captions.max_tokens": ("1", "2049"),
    "adapter.kind": ("'lokr'", "'oft'"),
    "adapter.rank": ("1024", "0"),
    "adapter.alpha": ("0.1", "0.0"),
    "adapter.targets": ("['layers.*']", "'none'"),
    "adapter.init": ("'gaussian'", "'zeros'"),
    "adapter.rslora": ("true", "1"),
    "adapter.rank_pattern": ("{'*.w2' = 8}", "{'*.w2' = 0}"),
    "adapter.alpha_pattern": ("{'*.w2' = 0.5}", "{'*.w2' = '1'}"),
    "adapter.factor": ("8\nadapter.kind = 'lokr'", "1"),
    "adapter.decompose_both": ("true\nadapter.kind = 'lokr'", "'no'"),
    "adapter.full_matrix": ("true\nadapter.kind = 'lokr'", "0"),
    "train.steps": ("1", "0"),
    "train.learning_rate": ("1", "0"),
    "train.batch": ("8", "-1"),
    "train.accumulation": ("8", "2.5"),
    "train.warmup": ("0", "-1"),
    "train.decay": ("'cosine'", "'Cosine'"),
    "train.weight_decay": ("0", "-0.1"),
    "train.betas": ("[0.9, 0.99]", "0.9"),
    "train.max_grad_norm": ("0", "-1"),
    "train.seed": ("0", "-1"),
    "train.checkpoint_every": ("1", "0"),
    "train.keep_checkpoints": ("1", "0"),
    "train.schedule.mu": ("-3.5", "'0'"),
    "train.schedule.std": ("0.01", "0"),
    "memory.device": ("'cpu'", "'cuda:0'"),
    "memory.precision": ("'bf16'", "'fp16'"),
    "memory.engine": ("'fused'", "'fast'"),
    "memory.matmul": ("'fp8'", "'int8'"),
    "memory.exact_blocks": ("6", "-1"),
    "memory.activation_budget": ("0.3", "1.1"),
    "memory.checkpointing": ("'on'", "true"),
    "memory.compile": ("'off'", "false"),
    "memory.optimizer_state": ("'8bit'", "'int8'"),
    "memory.quantize_via": ("'cpu'", "'host'"),
    "memory.offload": ("'stream'", "'host'"),
    "memory.offload_blocks": ("2\nmemory.offload = 'block'", "0"),
    "memory.offload_streams": ("false\nmemory.offload = 'block'", "'no'"),
    "memory.offload_folder": ("'x'\nmemory.offload = 'disk'", "1"),
    "memory.activation_offload": ("'inputs'", "'all'"),
    "memory.graphs": ("'on'", "true"),
    "validate.prompts": ("['a']", "'a'"),
    "validate.every": ("1\nvalidate.prompts = ['a']", "0"),
    "validate.preset": ("'turbo'\nvalidate.prompts = ['a']", "'fast'"),
    "validate.steps": ("1\nvalidate.prompts = ['a']", "0"),
    "validate.guidance": ("0\nvalidate.prompts = ['a']", "-1"),
    "validate.width": ("64\nvalidate.prompts = ['a']", "65"),
    "validate.height": ("1600\nvalidate.prompts = ['a']", "48"),
    "validate.seed": ("7\nvalidate.prompts = ['a']", "-7"),
    "cache.folder": ("'cache'", "7"),
    "output.folder": ("'out'", "0"),
    "output.format": ("'both'", "'kohya'"),
    "output.dtype": ("'float32'", "'float16'"),
    "output.name": ("'sks'", "{}"),
}


def loader_takes(text):
    try:
        parse_recipe(text)
    except IdeoflowError as error:
        shape = {codes.WRONG_TYPE, codes.BAD_VALUE, codes.OTHER_TRAINER, codes.UNKNOWN_KEY,
                     codes.MISSING_KEY}  # fmt: skip
        assert {d.code for d in error.diagnostics} <= shape
        return False
    return True


def schema_takes(text):
    return VALIDATOR.is_valid(tomli.loads(text))


def test_every_key_has_two_values_here():
    assert {key for key, _, _ in keys()} == set(VALUES)


@pytest.mark.parametrize("key", VALUES)
def test_schema_and_reader_agree(key):
    head = "".join(line + "\n" for line in HEAD.splitlines() if not line.startswith(f"{key} "))
    good, bad = VALUES[key]
    for value, expected in ((good, True), (bad, False)):
        text = f"{head}{key} = {value}\n"
        assert loader_takes(text) is expected, text
        assert schema_takes(text) is expected, text


@pytest.mark.parametrize(
    "text",
    ["", "model.base = 'nano'", HEAD + "x = 1", HEAD + "train.x = 1", HEAD + "train = 3", "model = []"],
)
def test_schema_and_reader_refuse(text):
    assert not loader_takes(text) and not schema_takes(text)


@pytest.mark.parametrize("key", [key for key, _, _ in keys()])
def test_every_default_is_a_value_that_is_taken(key):
    table, _, name = key.rpartition(".")
    node = recipe_schema()
    for part in table.split("."):
        node = node["properties"][part]
    if "default" in node["properties"][name]:
        jsonschema.Draft7Validator(node["properties"][name]).validate(node["properties"][name]["default"])


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_recipes_follow_the_schema_they_name(file):
    text = file.read_text(encoding="utf-8")
    VALIDATOR.validate(tomli.loads(text))
    first = text.splitlines()[0]
    assert first.startswith("#:schema ") and (file.parent / first.removeprefix("#:schema ")).is_file()
