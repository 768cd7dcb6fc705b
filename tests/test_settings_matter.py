"""Every setting that training reads changes what is learnt; none is accepted and then ignored."""

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ideoflow.recipe import (
    AdapterSettings,
    CacheSettings,
    CaptionSettings,
    DataSettings,
    OutputSettings,
    ScheduleSettings,
    TrainSettings,
)
from ideoflow.resources import recipes
from ideoflow.workflow import prepare, run

BASE = {
    "model": {"base": '"nano"'},
    "data": {"images": '"pictures"', "resolution": "64"},
    "captions": {"placeholders": '{ token = "a cup" }'},
    "adapter": {"rank": "2"},
    "train": {"steps": "3", "learning_rate": "1e-2"},
    "output": {"dtype": '"float32"'},
}
CHANGES = {
    "data.resolution": "128",
    "data.aspect": '"square"',
    "data.resolution_type": '"pixel"',
    "data.crop": '"corner"',
    "data.flip": "true",
    "data.target_downsample_size": "128",
    "data.caption": '"filename"',
    "captions.dropout": "1.0",
    "captions.shuffle": "true",
    "captions.element_dropout": "0.5",
    "captions.placeholders": '{ token = "a very tall rocket" }',
    "adapter.kind": '"loha"',
    "adapter.rank": "3",
    "adapter.rslora": "true",
    "adapter.rank_pattern": '{ "*.w2" = 1 }',
    "adapter.alpha_pattern": '{ "*.w2" = 1 }',
    "adapter.alpha": "1.0",
    "adapter.targets": '"attention"',
    "adapter.init": '"gaussian"',
    "train.steps": "2",
    "train.learning_rate": "1e-3",
    "train.batch": "2",
    "train.accumulation": "2",
    "train.warmup": "2",
    "train.decay": '"linear"',
    "train.weight_decay": "5.0",
    "train.betas": "[0.5, 0.9]",
    "train.max_grad_norm": "1e-3",
    "train.seed": "1",
    "train.schedule.mu": "2.0",
    "train.schedule.std": "0.3",
    "memory.precision": '"bf16"',
    "output.dtype": '"bf16"',
    "output.format": '"diffusers"',
}
CAPTION = "A photograph of <token>, a {}.\nobj: A table.\nobj: A window.\nobj: A lamp.\n"
# The same for a LoKr.
LOKR = {
    "adapter.factor": "8",
    "adapter.init": '"lycoris"',
    "adapter.decompose_both": "true",
    "adapter.full_matrix": "true",
}
# What these do is tested where they act: on files, on reports, on where things go.
ELSEWHERE = {
    "data.images", "data.source", "data.instance_prompt", "data.caption_column", "data.image_column",
    "data.image_folder",
    "data.aspects", "data.crop_variants", "data.minimum_image_size", "data.maximum_image_size",
    "data.upscale_limit", "captions.wrap", "captions.variants",
    "captions.max_tokens", "cache.folder", "train.checkpoint_every",
    "train.keep_checkpoints", "train.schedule", "output.folder", "output.name",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(recipes() / "styles", folder / "styles")
    (folder / "pictures").mkdir()
    for name in ("coffee", "rocket"):
        shutil.copy(recipes() / "quickstart" / f"{name}.jpg", folder / "pictures")
        (folder / "pictures" / f"{name}.icap").write_text(CAPTION.format(name))
    return folder


def adapter(project: Path, name: str, changes: dict[str, str] | None = None) -> dict[str, Tensor]:
    """The adapter of a run with these settings changed."""
    tables = {table: dict(keys) for table, keys in BASE.items()}
    tables["output"]["folder"] = f'"{project / name}"'
    for key, value in (changes or {}).items():
        table, _, leaf = key.rpartition(".")
        tables.setdefault(table, {})[leaf] = value
    if "full_matrix" in tables["adapter"]:
        del tables["adapter"]["rank"]
    recipe = project / f"{name}.toml"
    recipe.write_text("\n".join(
        f"[{table}]\n" + "\n".join(f"{k} = {v}" for k, v in keys.items()) for table, keys in tables.items()
    ))  # fmt: skip
    made = run(prepare(recipe)).adapter
    assert made is not None
    return load_file(made)


@pytest.fixture(scope="module")
def plain(project: Path) -> dict[str, Tensor]:
    return adapter(project, "plain")


@pytest.mark.parametrize("key", CHANGES)
def test_it_changes_what_is_learnt(project: Path, plain: dict[str, Tensor], key: str) -> None:
    changed = adapter(project, key.replace(".", "-"), {key: CHANGES[key]})
    assert not same(changed, plain)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def test_settings_of_a_lokr_change_it(project: Path) -> None:
    lokr = {"adapter.kind": '"lokr"'}
    plain = adapter(project, "lokr", lokr)
    for key, value in LOKR.items():
        assert not same(adapter(project, f"lokr-{key}", lokr | {key: value}), plain)


def test_the_same_settings_learn_the_same(project: Path, plain: dict[str, Tensor]) -> None:
    again = adapter(project, "again")
    assert all(torch.equal(again[k], plain[k]) for k in plain)


def test_no_setting_of_training_is_left_out() -> None:
    tables = {"data": DataSettings, "captions": CaptionSettings, "cache": CacheSettings,
              "adapter": AdapterSettings, "train": TrainSettings,
              "train.schedule": ScheduleSettings, "output": OutputSettings}  # fmt: skip
    known = {f"{table}.{f.name}" for table, cls in tables.items() for f in fields(cls)}
    assert known <= set(CHANGES) | set(LOKR) | ELSEWHERE
