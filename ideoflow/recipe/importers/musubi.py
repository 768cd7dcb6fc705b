"""musubi-tuner's TOML: its data set's configuration, and the training options of a ``--config_file``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ideoflow.recipe.importers.draft import Draft, Row
from ideoflow.recipe.importers.simpletuner import BASES
from ideoflow.recipe.sources import on_grid

_PRESETS = {"V4_QUALITY_48": "quality", "V4_DEFAULT_20": "default", "V4_TURBO_12": "turbo"}
_FLAGS = re.compile(r"\s--\w+\s+\S+")


def _optimizer(draft: Draft, value: Any) -> None:
    if str(value).lower() == "adamw8bit":
        draft.set("memory.optimizer_state", "8bit", "optimizer_type")
    elif not str(value).lower().startswith("adamw"):
        draft.lost(
            "optimizer_type", value, "training is with AdamW, whose learning rate may have to be another"
        )


def _preset(draft: Draft, value: Any) -> None:
    if value in _PRESETS:
        draft.set("validate.preset", _PRESETS[value], "sampler_preset")
    else:
        draft.lost("sampler_preset", value, "validate.preset takes quality, default or turbo")


def _prompts(draft: Draft, value: Any) -> None:
    file = draft.base / str(value)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        draft.lost("sample_prompts", value, "the file cannot be read; name prompts in validate.prompts")
        return
    texts = [_FLAGS.sub("", line).strip() for line in lines if line.strip() and not line.startswith("#")]
    for number, text in enumerate(texts, 1):
        draft.prompt(f"{number:02d}", text)


def _checkpointing(draft: Draft, value: Any) -> None:
    if value is False:
        draft.set("memory.checkpointing", "off", "gradient_checkpointing")


def _swap(draft: Draft, value: Any) -> None:
    if value:
        draft.set("memory.offload", "stream", "blocks_to_swap")


_TRAINING = (
    Row("dit", "model.base"), Row("vae", quiet=True), Row("text_encoder", quiet=True),
    Row("unconditional_dit", quiet=True), Row("use_unconditional_dit_for_lora_sampling", quiet=True),
    Row("dataset_config", quiet=True), Row("network_module", quiet=True), Row("network_dim", "adapter.rank"),
    Row("network_alpha", "adapter.alpha"), Row("network_args", words="set [adapter] by hand"),
    Row("learning_rate", "train.learning_rate"), Row("max_train_steps", "train.steps"),
    Row("max_train_epochs", words="a recipe counts steps: set train.steps to epochs * pictures / batch"),
    Row("gradient_accumulation_steps", "train.accumulation"), Row("lr_scheduler", "train.decay"),
    Row("lr_warmup_steps", "train.warmup"), Row("optimizer_type", take=_optimizer),
    Row("optimizer_args", words="AdamW's settings are train.betas and train.weight_decay"),
    Row("max_grad_norm", "train.max_grad_norm"), Row("seed", "train.seed"),
    Row("save_every_n_steps", "train.checkpoint_every"),
    Row("save_every_n_epochs", words="checkpoints are counted in steps: train.checkpoint_every"),
    Row("output_dir", "output.folder"), Row("output_name", "output.name"),
    Row("sample_prompts", take=_prompts), Row("sample_every_n_steps", "validate.every"),
    Row("sample_every_n_epochs", words="samples are counted in steps: validate.every"),
    Row("sample_at_first", quiet=True), Row("sampler_preset", take=_preset), Row("initial_sigma", quiet=True),
    Row("gradient_checkpointing", take=_checkpointing), Row("blocks_to_swap", take=_swap),
    Row("mixed_precision", quiet=True), Row("dit_dtype", quiet=True), Row("vae_dtype", quiet=True),
    Row("sdpa", quiet=True), Row("flash_attn", quiet=True), Row("xformers", quiet=True),
    Row("split_attn", quiet=True), Row("fp8_base", quiet=True), Row("fp8_scaled", quiet=True),
    Row("timestep_sampling", quiet=True), Row("weighting_scheme", quiet=True), Row("save_state", quiet=True),
    Row("persistent_data_loader_workers", quiet=True), Row("max_data_loader_n_workers", quiet=True),
    Row("log_with", words="every run writes metrics.jsonl and report.html"), Row("logging_dir", quiet=True),
)  # fmt: skip
_DATASET = (
    Row("image_directory", quiet=True), Row("image_jsonl_file", quiet=True),
    Row("caption_extension", quiet=True), Row("resolution", quiet=True), Row("num_repeats", quiet=True),
    Row("enable_bucket", quiet=True),
    Row("bucket_no_upscale", words="nothing is left out: pictures that are enlarged much are reported"),
    Row("cache_directory", quiet=True), Row("batch_size", quiet=True),
    Row("control_directory", words="no conditioning pictures"),
)  # fmt: skip


def import_musubi(draft: Draft, dataset: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Fills the draft from the data set's tables and from training options, sections of them included."""
    flat: dict[str, Any] = {}
    for key, value in training.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    draft.take(_TRAINING, flat)
    if base := flat.get("dit"):
        draft.set("model.base", draft.path(str(base)), "dit")
    draft.values["model.base"] = draft.values.get("model.base") or BASES["fp8"]
    general = dataset.get("general") or {}
    for table in dataset.get("datasets") or []:
        _source(draft, {**general, **table})


def _source(draft: Draft, table: Mapping[str, Any]) -> None:
    images = table.get("image_directory") or table.get("image_jsonl_file")
    if images is None:
        draft.lost("datasets", sorted(table), "only pictures are trained")
        return
    draft.take(_DATASET, table, "datasets: ")
    sides = table.get("resolution", 960)
    width, height = sides if isinstance(sides, list) else (sides, sides)
    made: dict[str, Any] = {
        "images": draft.path(str(images)),
        "resolution": on_grid(math.sqrt(width * height)),
    }
    if not table.get("enable_bucket", False):
        made["aspect"] = "square" if width == height else "closest"
        if width != height:
            made["aspects"] = [round(width / height, 4)]
    if int(table.get("num_repeats", 1)) > 1:
        made["repeats"] = int(table["num_repeats"])
    if table.get("batch_size", 1) > 1:
        draft.set("train.batch", int(table["batch_size"]), "batch_size")
    draft.sources.append(made)
