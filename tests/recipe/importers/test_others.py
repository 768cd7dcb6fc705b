"""ai-toolkit's YAML and musubi-tuner's TOML as recipes."""

import pytest
import tomli
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import recipe as codes
from ideoflow.recipe import parse_recipe
from ideoflow.recipe.importers import import_config

AI_TOOLKIT = """
job: extension
config:
  name: "boats"
  process:
    - type: 'sd_trainer'
      training_folder: "output"
      device: cuda:0
      trigger_word: "b0at"
      network: {type: "lora", linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: "pictures"
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          flip_x: true
          num_repeats: 3
          resolution: [512, 1000]
      train:
        batch_size: 2
        steps: 2000
        gradient_accumulation_steps: 1
        train_unet: true
        gradient_checkpointing: true
        noise_scheduler: "flowmatch"
        optimizer: "adamw8bit"
        lr: 2e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        timestep_type: sigmoid
        dtype: bf16
      model: {name_or_path: "ideogram-ai/ideogram-4-fp8", arch: ideogram4, quantize: true, qtype: qfloat8}
      sample:
        sampler: "flowmatch"
        sample_every: 250
        width: 1024
        height: 768
        prompts: ["a [trigger] at sea", '{"compositional_deconstruction":{"background":"x","elements":[]}}']
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: '1.0'}
"""
DATASET = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true
[[datasets]]
image_directory = "pictures"
cache_directory = "cache"
num_repeats = 2
[[datasets]]
image_jsonl_file = "list.jsonl"
resolution = [1024, 768]
enable_bucket = false
[[datasets]]
video_directory = "films"
"""
TRAINING = """
dit = "models/ideogram4_fp8_scaled.safetensors"
network_module = "networks.lora_ideogram4"
network_dim = 16
network_alpha = 8
learning_rate = 2e-4
max_train_steps = 800
optimizer_type = "adamw8bit"
lr_scheduler = "cosine"
save_every_n_steps = 100
output_dir = "out"
output_name = "i4"
sample_prompts = "prompts.txt"
sample_every_n_steps = 100
sampler_preset = "V4_TURBO_12"
blocks_to_swap = 20
[extra]
seed = 3
timestep_sampling = "ideogram4_shift"
max_train_epochs = 4
"""


@pytest.fixture
def convert(tmp_path):
    """convert({"a.yaml": text}) -> (settings, what is not carried, files beside the recipe)"""

    def make(files):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        made = import_config([tmp_path / name for name in files], tmp_path / "made.toml", tmp_path)
        named = {d.message.rpartition(": ")[2].split(" ")[0] for d in made.warnings}
        return parse_recipe(made.text).tables, named, made.files

    return make


def test_ai_toolkit(convert):
    t, named, files = convert({"a.yaml": AI_TOOLKIT})
    assert (t.model.base, t.memory.precision) == ("ideogram-ai/ideogram-4-fp8", "fp8")
    assert (t.adapter.rank, t.adapter.alpha) == (16, 8)
    assert (t.train.steps, t.train.batch, t.train.accumulation) == (2000, 2, 1)
    assert (t.output.name, t.output.folder, t.output.dtype) == ("boats", "output/boats", "bf16")
    assert (t.train.checkpoint_every, t.train.keep_checkpoints, t.captions.dropout) == (250, 4, 0.05)
    assert (t.validate.width, t.validate.height, t.validate.guidance, t.validate.steps) == (
        1024,
        768,
        4.0,
        20,
    )
    low, high = t.data.source
    assert (low.images, low.resolution, low.repeats, low.flip) == ("pictures", 512, 3, True)
    assert (high.images, high.resolution) == ("pictures", 992)
    assert next(iter(files.values())) == "a b0at at sea" and [f[-5:] for f in files] == ["1.txt", ".json"]
    assert t.train.learning_rate == 2e-4, "which YAML 1.1 reads as a text"
    assert named == {"trigger_word", "timestep_type"}


def test_musubi(convert, tmp_path):
    (tmp_path / "prompts.txt").write_text("# comment\na boat --w 1024 --h 768 --s 20\n\na hut --d 42\n")
    t, named, files = convert({"dataset.toml": DATASET, "training.toml": TRAINING})
    a, b = t.data.source
    assert (a.images, a.repeats, a.resolution, a.aspect) == ("pictures", 2, 720, "preserve")
    assert (b.images, b.repeats, b.resolution, b.aspect, b.aspects) == (
        "list.jsonl", 1, 880, "closest", (1.3333,))  # fmt: skip
    assert (t.model.base, t.adapter.rank, t.adapter.alpha) == (
        "models/ideogram4_fp8_scaled.safetensors", 16, 8)  # fmt: skip
    assert (t.train.steps, t.train.learning_rate, t.train.decay, t.train.seed) == (800, 2e-4, "cosine", 3)
    assert (t.train.batch, t.train.checkpoint_every, t.validate.preset) == (2, 100, "turbo")
    assert list(files.values()) == ["a boat", "a hut"]
    assert {"datasets", "max_train_epochs"} <= named
    swapped, _, _ = convert({"training.toml": TRAINING, "dataset.toml": DATASET})
    assert swapped == t, "in any order"


def test_a_data_set_alone(convert):
    t, _, _ = convert({"dataset.toml": DATASET})
    assert len(t.data.source) == 2 and t.train.steps == 1000


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "a: [1"), ("a.yaml", "- 1"), ("a.yaml", "config: 3"), ("a.toml", "a ="), ("a.txt", "x"),
     ("a.yaml", "config: {process: [3]}"), ("a.toml", "datasets = 3")],
)  # fmt: skip
def test_files_that_are_none(convert, name, text):
    with pytest.raises(IdeoflowError) as caught:
        convert({name: text})
    assert caught.value.diagnostics[0].code is codes.NOT_A_CONFIG


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(IdeoflowError) as caught:
        import_config([tmp_path / "gone.json"], tmp_path / "r.toml")
    assert caught.value.diagnostics[0].code is codes.NOT_A_CONFIG


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.lists(st.integers())
)


def replaced(data, path, value):
    """The data with one value of it replaced; ``path`` chooses which, by a number at each level."""
    if not path or not isinstance(data, dict | list) or not data:
        return value
    keys = sorted(data) if isinstance(data, dict) else range(len(data))
    at = keys[path[0] % len(keys)]
    changed = replaced(data[at], path[1:], value)
    if isinstance(data, dict):
        return {**data, at: changed}
    return [*data[:at], changed, *data[at + 1 :]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), min_size=5, max_size=6), VALUES)
def test_whatever_a_value_is_the_recipe_loads_or_the_file_is_refused(tmp_path, path, value):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(replaced(yaml.safe_load(AI_TOOLKIT), path, value)))
    try:
        made = import_config([tmp_path / "a.yaml"], tmp_path / "made.toml", tmp_path)
    except IdeoflowError as error:
        assert error.diagnostics[0].code is codes.NOT_A_CONFIG
    else:
        assert tomli.loads(made.text)["model"]["base"] and parse_recipe(made.text)
