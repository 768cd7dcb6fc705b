"""SimpleTuner's settings as recipes: the documented example, every key, odd values."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ideoflow.data.survey import read_dataset
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import recipe as codes
from ideoflow.recipe import load_recipe, parse_recipe
from ideoflow.recipe.importers import import_config
from ideoflow.recipe.importers.page import page
from ideoflow.recipe.importers.simpletuner import CONFIG
from ideoflow.recipe.importers.simpletuner_loader import LOADER

ROOT = Path(__file__).resolve().parents[3]
# The settings of SimpleTuner's own guide to Ideogram 4, and of the example that it points to.
GUIDE = {
    "model_type": "lora", "model_family": "ideogram", "model_flavour": "fp8",
    "base_model_precision": "no_change", "quantize_via": "cpu", "mixed_precision": "bf16",
    "train_batch_size": 1, "resolution": 1024, "resolution_type": "pixel_area",
    "gradient_checkpointing": True, "ideogram_auto_json": True, "ideogram_validation": True,
    "ideogram_schedule_mu": 0.0, "ideogram_schedule_std": 1.5, "validation_guidance": 3.0,
    "validation_num_inference_steps": 12, "lora_type": "standard", "lora_rank": 32, "learning_rate": 1e-4,
    "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 100, "max_train_steps": 1000,
    "max_grad_norm": 0.01, "optimizer": "optimi-lion", "seed": 42,
    "validation_prompt": "A <token> with a sign.", "validation_resolution": "1024x1024",
    "validation_seed": 42, "validation_steps": 50, "use_ema": False, "checkpoint_step_interval": 50,
    "checkpoints_total_limit": 5, "output_dir": "output/boats", "report_to": "none",
    "caption_dropout_probability": 0.1, "num_train_epochs": 0, "data_backend_config": "config/loader.json",
}  # fmt: skip
PROMPT = (
    '{"high_level_description":"A <token>.","compositional_deconstruction":'
    '{"background":"Plain.","elements":[{"type":"obj","bbox":[260,180,760,860],"desc":"<token>"}]}}'
)
LOCAL = {
    "id": "dreambooth-1024", "type": "local", "crop": True, "crop_style": "random", "crop_aspect": "square",
    "minimum_image_size": 256, "maximum_image_size": 1024, "target_downsample_size": 1024, "resolution": 1024,
    "resolution_type": "pixel_area", "metadata_backend": "discovery", "caption_strategy": "instanceprompt",
    "instance_data_dir": "datasets/subject", "instance_prompt": PROMPT, "cache_dir_vae": "cache/vae/subject",
}  # fmt: skip
TEXT = {"id": "text-embeds", "dataset_type": "text_embeds", "default": True, "type": "local",
        "cache_dir": "cache/text/ideogram"}  # fmt: skip
OTHER_KEYS_OF_THE_GUIDE = [
    "enable_group_offload", "group_offload_type", "group_offload_blocks_per_group",
    "group_offload_use_stream", "group_offload_to_disk_path", "dynamo_backend",
    "dynamo_use_regional_compilation", "dynamo_mode", "dynamo_fullgraph", "base_model_default_dtype",
    "ideogram_prompt_upsample", "ideogram_prompt_enhancer_head_id", "lycoris_config",
]  # fmt: skip


@pytest.fixture
def project(tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "datasets" / "subject").mkdir(parents=True)
    return tmp_path


def convert(project, config=None, loader=None, recipe="made.toml"):
    """The recipe of a configuration and a data loader, written and read."""
    files = []
    for name, data in (("config.json", config), ("loader.json", loader)):
        if data is not None:
            (project / "config" / name).write_text(json.dumps(data, indent=1))
            files.append(project / "config" / name)
    file = project / recipe
    made = import_config(files, file, project)
    for path, text in {file: made.text, **{file.parent / n: t for n, t in made.files.items()}}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return made


def source(project, **changes):
    """(settings, warnings) of one data backend."""
    made = convert(project, None, [{**LOCAL, **changes}])
    (settings,) = parse_recipe(made.text).tables.data.sources
    return settings, [d.message for d in made.warnings]


# The guide's example --------------------------------------------------------------------------------------


def test_the_guide(project):
    Image.new("RGB", (1500, 1200), "red").save(project / "datasets" / "subject" / "a.png")
    Image.new("RGB", (200, 200), "red").save(project / "datasets" / "subject" / "small.png")
    (project / "config" / "loader.json").write_text(json.dumps([LOCAL, TEXT]))
    made = convert(project, GUIDE)
    recipe = load_recipe(project / "made.toml")
    t = recipe.tables
    assert (t.model.base, t.adapter.kind, t.adapter.rank) == ("ideogram-ai/ideogram-4-fp8", "lora", 32)
    assert (t.train.steps, t.train.learning_rate, t.train.warmup, t.train.decay) == (
        1000,
        1e-4,
        100,
        "constant",
    )
    assert (t.train.batch, t.train.seed, t.train.max_grad_norm) == (1, 42, 0.01)
    assert (t.train.checkpoint_every, t.train.keep_checkpoints) == (50, 5)
    assert (t.train.schedule.mu, t.train.schedule.std) == (0.0, 1.5)
    assert (t.captions.wrap, t.captions.dropout) == (True, 0.1)
    assert (t.validate.guidance, t.validate.steps, t.validate.every, t.validate.seed) == (3.0, 12, 50, 42)
    assert (t.validate.width, t.validate.height) == (1024, 1024)
    assert t.memory.precision == t.memory.checkpointing == "auto"
    assert t.output.folder == "output/boats"
    assert (project / t.validate.prompts[0]).read_text() == "A <token> with a sign."
    (data,) = t.data.sources
    assert t.data.source == (), "one source is written in the short form"
    assert (data.images, data.caption, data.instance_prompt) == ("datasets/subject", "instance", PROMPT)
    assert (data.resolution, data.crop, data.aspect) == (1024, "random", "square")
    assert (data.minimum_image_size, data.maximum_image_size, data.target_downsample_size) == (
        256,
        1024,
        1024,
    )

    assert [d.message.split(" ")[0] for d in made.warnings] == ["optimizer"]
    assert made.warnings[0].span.path.endswith("config.json") and made.warnings[0].span.line > 1
    assert '# - optimizer = "optimi-lion" is not carried over' in made.text
    dataset = read_dataset(recipe)
    assert {s.size for s in dataset.samples} == {(1024, 1024)} and dataset.shares[0].pictures == 1


def test_every_key_of_the_guide_has_its_place():
    known = {row.key for row in CONFIG}
    assert set(GUIDE) | set(OTHER_KEYS_OF_THE_GUIDE) <= known
    assert set(LOCAL) | set(TEXT) <= {row.key for row in LOADER}
    for row in (*CONFIG, *LOADER):
        assert row.ours or row.words, f"{row.key}: neither a place nor a reason"


def test_the_page_is_the_generated_one():
    written = (ROOT / "docs" / "from-simpletuner.md").read_text(encoding="utf-8")
    assert written == page(), "run python -m ideoflow.recipe.importers.page"


def test_keys_of_the_page_are_keys_of_a_recipe(project):
    """What the page names on our side is there, for every setting that is carried over as it is."""
    recipe = parse_recipe("model.base = 'nano'\ndata.images = 'x'").tables
    for row in CONFIG:
        for key in (k.strip() for k in row.ours.split(",")):
            table, _, leaf = key.partition(".")
            if row.take is None and leaf:
                inner = getattr(recipe, table)
                for part in leaf.split("."):
                    assert hasattr(inner, part), key
                    inner = getattr(inner, part)


# What is not the same -------------------------------------------------------------------------------------


def test_what_is_not_carried_is_named_once_and_what_is_off_is_not(project):
    config = {**GUIDE, "dynamo_fullgraph": True, "--some_new_option": 7, "lora_dropout": 0.1,
              "use_ema": False, "push_to_hub": False, "ideogram_validation": False}  # fmt: skip
    made = convert(project, config, [LOCAL])
    named = {d.message.split(" ")[0] for d in made.warnings}
    assert named == {
        "optimizer",
        "dynamo_fullgraph",
        "some_new_option",
        "lora_dropout",
        "ideogram_validation",
    }
    assert all(d.code is codes.NOT_CARRIED and d.severity == "warning" for d in made.warnings)
    assert all(d.span.line for d in made.warnings if "validation" not in d.message)
    assert parse_recipe(made.text).tables.validate.prompts == ()


def test_memory(project):
    offload = {
        "enable_group_offload": True, "group_offload_type": "block_level", "group_offload_use_stream": True,
        "group_offload_blocks_per_group": 2, "group_offload_to_disk_path": "fast/offload",
        "base_model_precision": "nf4-bnb", "optimizer": "bnb-adamw8bit", "gradient_checkpointing": False,
    }  # fmt: skip
    made = convert(project, {**GUIDE, **offload}, [LOCAL])
    memory = parse_recipe(made.text).tables.memory
    assert (memory.offload, memory.offload_blocks, memory.offload_streams) == ("disk", 2, True)
    assert (memory.offload_folder, memory.precision, memory.quantize_via) == ("fast/offload", "nf4", "cpu")
    assert (memory.optimizer_state, memory.checkpointing) == ("8bit", "off") and made.warnings == ()
    off = {**GUIDE, **offload, "enable_group_offload": False, "optimizer": "adamw_bf16"}
    memory = parse_recipe(convert(project, off, [LOCAL]).text).tables.memory
    assert (memory.offload, memory.offload_blocks, memory.optimizer_state) == ("auto", 1, "auto")


def test_values_that_a_recipe_refuses_are_left_out_and_named(project):
    made = convert(project, {**GUIDE, "lora_rank": 5000, "lr_warmup_steps": 2000, "seed": -1}, [LOCAL])
    tables = parse_recipe(made.text).tables
    assert (tables.adapter.rank, tables.train.warmup, tables.train.seed) == (32, 0, 0)
    assert {"lora_rank", "lr_warmup_steps", "seed"} <= {d.message.split(" ")[0] for d in made.warnings}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"resolution": 1.0, "resolution_type": "area", "minimum_image_size": 0.25, "maximum_image_size": 4.0,
          "target_downsample_size": 2.0}, ("pixel_area", 1024, 512, 2048, 1536)),
        ({"resolution": 0.7, "resolution_type": "area", "minimum_image_size": 0, "maximum_image_size": None,
          "target_downsample_size": None}, ("pixel_area", 832, 0, None, None)),
        ({"resolution": 768, "resolution_type": "pixel"}, ("pixel", 768, 256, 1024, 1024)),
        ({"resolution": 1000}, ("pixel_area", 992, 256, 1024, 1024)),
    ],
)  # fmt: skip
def test_sizes(project, changes, expected):
    s, warnings = source(project, **changes)
    found = (
        s.resolution_type,
        s.resolution,
        s.minimum_image_size,
        s.maximum_image_size,
        s.target_downsample_size,
    )
    assert found == expected
    if changes["resolution"] == 0.7:
        assert s.resolution == round(math.sqrt(0.7e6) / 16) * 16 and "becomes 832" in warnings[0]


def test_crops(project):
    assert source(project, crop=False)[0].crop == "off"
    assert source(project, crop_style="corner", crop_aspect="preserve")[0].crop == "corner"
    s, warnings = source(project, crop_style="face")
    assert s.crop == "center" and "face" in warnings[0]
    buckets = [1.0, {"aspect_bucket": 0.5, "weight": 2}]
    s, _ = source(project, crop_aspect="random", crop_aspect_buckets=buckets, crop_style="center")
    assert (s.aspect, s.aspects, s.crop_variants) == ("random", (1.0, 0.5), 4)
    assert source(project, crop_aspect="closest", crop_style="center")[0].crop_variants == 1


def test_captions(project):
    plain = {"instance_prompt": None}
    assert source(project, caption_strategy="textfile", **plain)[0].caption == "sidecar"
    assert source(project, caption_strategy="filename", **plain)[0].caption == "filename"
    table = {
        "path": "datasets/list.parquet",
        "filename_column": "id",
        "caption_column": "words",
        "width_column": "w",
    }
    s, warnings = source(project, caption_strategy="parquet", parquet=table, **plain)
    assert (s.images, s.caption, s.image_column, s.caption_column) == (
        "datasets/list.parquet", "column", "id", "words")  # fmt: skip
    assert s.image_folder == LOCAL["instance_data_dir"] and warnings == []
    s, _ = source(project, type="huggingface", dataset_name="owner/boats", caption_strategy="huggingface",
                  revision="v2", caption_column="text", **plain)  # fmt: skip
    assert (s.images, s.caption_column) == ("hf://datasets/owner/boats@v2", "text")
    s, warnings = source(project, caption_strategy="textfile", prepend_instance_prompt=True)
    assert s.instance_prompt is None and "instance_prompt" in warnings[0]
    assert (
        source(project, caption_strategy="textfile", only_instance_prompt=True)[0].instance_prompt == PROMPT
    )


def test_several_sources_with_repeats_weights_and_defaults(project):
    loader = [
        {**LOCAL, "id": "a", "repeats": 9},
        {"id": "b", "instance_data_dir": "b", "caption_strategy": "textfile", "crop": True},
        {**LOCAL, "id": "off", "disabled": True}, TEXT,
        {**LOCAL, "id": "masks", "dataset_type": "conditioning"},
        {**LOCAL, "id": "far", "type": "aws"},
    ]  # fmt: skip
    made = convert(project, {**GUIDE, "resolution": 512}, loader)
    a, b = parse_recipe(made.text).tables.data.source
    assert (a.name, a.repeats, a.resolution, b.name, b.repeats, b.resolution) == ("a", 10, 1024, "b", 1, 512)
    assert {"masks:", "far:"} <= {d.message.split(" ")[0] for d in made.warnings}
    made = convert(project, None, [{**LOCAL, "id": "a", "probability": 0.7}, {**LOCAL, "id": "b"}])
    assert [s.weight for s in parse_recipe(made.text).tables.data.source] == [0.7, 1.0]
    made = convert(project, None, [{**LOCAL, "id": "a", "probability": 0.7, "repeats": 9}])
    assert parse_recipe(made.text) and not made.warnings, "of a single source they change nothing"


def test_a_recipe_in_another_folder_finds_the_pictures(project):
    Image.new("RGB", (300, 300)).save(project / "datasets" / "subject" / "a.png")
    convert(project, GUIDE, [LOCAL], recipe="recipes/deep/made.toml")
    recipe = load_recipe(project / "recipes" / "deep" / "made.toml")
    assert read_dataset(recipe).shares[0].pictures == 1


# Odd files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', '{"config": 1}'])
def test_files_that_are_none(project, text):
    (project / "config" / "x.json").write_text(text)
    try:
        made = import_config([project / "config" / "x.json"], project / "r.toml", project)
    except IdeoflowError as error:
        assert error.diagnostics[0].code is codes.NOT_A_CONFIG
    else:
        parse_recipe(made.text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=4), v, max_size=2),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from([row.key for row in CONFIG]), VALUES, max_size=6),
    st.lists(st.dictionaries(st.sampled_from([row.key for row in LOADER]), VALUES, max_size=6), max_size=2),
)
def test_whatever_the_values_the_recipe_loads(project, config, loader):
    try:
        made = convert(project, config, loader)
    except IdeoflowError as error:
        assert error.diagnostics[0].code is codes.NOT_A_CONFIG
    else:
        parse_recipe(made.text)
