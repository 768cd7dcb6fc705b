"""ai-toolkit's YAML: what its first process shares with a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ideoflow.recipe.importers.draft import Draft, Row
from ideoflow.recipe.importers.simpletuner import BASES
from ideoflow.recipe.sources import on_grid

_PRECISIONS = {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "int8": "int8", "nf4": "nf4"}
_DTYPES = {"float16": "bf16", "fp16": "bf16", "bf16": "bf16", "bfloat16": "bf16", "float32": "float32"}


def _precision(draft: Draft, value: Any) -> None:
    if value in _PRECISIONS:
        draft.set("memory.precision", _PRECISIONS[value], "qtype")
    else:
        draft.lost("qtype", value, "memory.precision takes fp8, int8, nf4, bf16 or float32")


def _optimizer(draft: Draft, value: Any) -> None:
    if str(value).lower() == "adamw8bit":
        draft.set("memory.optimizer_state", "8bit", "optimizer")
    elif not str(value).lower().startswith("adamw"):
        draft.lost("optimizer", value, "training is with AdamW, whose learning rate may have to be another")


def _optimizer_params(draft: Draft, value: Any) -> None:
    rows = (Row("weight_decay", "train.weight_decay"), Row("betas", "train.betas"))
    draft.take(rows, value or {}, "optimizer_params: ")


def _scheduler(draft: Draft, value: Any) -> None:
    name = str(value).removesuffix("_with_warmup")
    if name in ("constant", "linear", "cosine"):
        draft.set("train.decay", name, "lr_scheduler")
    else:
        draft.lost("lr_scheduler", value, "train.decay takes constant, linear or cosine")


def _rate(draft: Draft, value: Any) -> None:
    draft.set("train.learning_rate", float(value), "lr")  # YAML 1.1 reads 1e-4 as a text


def _checkpointing(draft: Draft, value: Any) -> None:
    if value is False:
        draft.set("memory.checkpointing", "off", "gradient_checkpointing")


def _dtype(draft: Draft, value: Any) -> None:
    draft.set("output.dtype", _DTYPES.get(str(value), value), "dtype")


def _kind(draft: Draft, value: Any) -> None:
    draft.set("adapter.kind", value, "type")


_NETWORK = (
    Row("type", take=_kind), Row("linear", "adapter.rank"), Row("linear_alpha", "adapter.alpha"),
    Row("rank", "adapter.rank"), Row("alpha", "adapter.alpha"), Row("lokr_factor", "adapter.factor"),
    Row("lokr_full_rank", "adapter.full_matrix"), Row("conv", quiet=True), Row("conv_alpha", quiet=True),
    Row("network_kwargs", words="set adapter.targets instead"),
)  # fmt: skip
_SAVE = (
    Row("dtype", take=_dtype), Row("save_every", "train.checkpoint_every"),
    Row("max_step_saves_to_keep", "train.keep_checkpoints"), Row("save_format", quiet=True),
    Row("push_to_hub", words="nothing is uploaded"), Row("hf_repo_id", quiet=True),
    Row("hf_private", quiet=True),
)  # fmt: skip
_TRAIN = (
    Row("batch_size", "train.batch"), Row("steps", "train.steps"),
    Row("gradient_accumulation_steps", "train.accumulation"),
    Row("gradient_accumulation", "train.accumulation"), Row("lr", take=_rate),
    Row("lr_scheduler", take=_scheduler), Row("optimizer", take=_optimizer),
    Row("optimizer_params", take=_optimizer_params), Row("max_grad_norm", "train.max_grad_norm"),
    Row("gradient_checkpointing", take=_checkpointing), Row("seed", "train.seed"),
    Row("train_unet", quiet=True), Row("train_text_encoder", words="the text encoder stays as it is"),
    Row("noise_scheduler", quiet=True), Row("dtype", quiet=True), Row("cache_text_embeddings", quiet=True),
    Row("unload_text_encoder", quiet=True),
    Row("skip_first_sample", words="the first pictures show what there was to learn"),
    Row("disable_sampling", quiet=True), Row("ema_config", quiet=True),
    Row("timestep_type", words="noise levels are drawn as the model's authors do: train.schedule"),
    Row("content_or_style", words="see train.schedule"), Row("linear_timesteps", words="see train.schedule"),
)  # fmt: skip
_MODEL = (
    Row("arch", quiet=True), Row("quantize", quiet=True), Row("qtype", take=_precision),
    Row("quantize_te", quiet=True), Row("low_vram", quiet=True), Row("name_or_path", "model.base"),
    Row("layer_offloading", words="the plan chooses: memory.offload", quiet=True),
    Row("layer_offloading_text_encoder_percent", quiet=True),
    Row("layer_offloading_transformer_percent", quiet=True),
)  # fmt: skip
_SAMPLE = (
    Row("sample_every", "validate.every"), Row("width", "validate.width"), Row("height", "validate.height"),
    Row("seed", "validate.seed"), Row("walk_seed", quiet=True), Row("guidance_scale", "validate.guidance"),
    Row("sample_steps", "validate.steps"), Row("sampler", quiet=True), Row("sample_start_step", quiet=True),
    Row("neg", quiet=True), Row("prompts", quiet=True), Row("samples", quiet=True),
)  # fmt: skip
_DATASET = (
    Row("folder_path", quiet=True), Row("dataset_path", quiet=True), Row("caption_ext", quiet=True),
    Row("resolution", quiet=True), Row("num_repeats", quiet=True), Row("caption_dropout_rate", quiet=True),
    Row("default_caption", quiet=True), Row("flip_x", quiet=True), Row("random_crop", quiet=True),
    Row("cache_latents", quiet=True), Row("cache_latents_to_disk", quiet=True),
    Row("cache_text_embeddings", quiet=True), Row("buckets", quiet=True), Row("bucket_tolerance", quiet=True),
    Row("shuffle_tokens", words="commas in JSON are no tags; captions.shuffle shuffles its elements"),
    Row("flip_y", words="pictures are not turned upside down"),
    Row("is_reg", words="no regularisation pictures"), Row("network_weight", words="use weight"),
)  # fmt: skip


def import_aitoolkit(draft: Draft, data: Mapping[str, Any]) -> None:
    """Fills the draft from the first process of the file."""
    config = data.get("config") or {}
    first, *others = config.get("process") or [{}]
    for number, other in enumerate(others, 2):
        draft.lost(f"process {number}", other.get("type"), "a recipe is one run")
    name = config.get("name")
    if name:
        draft.set("output.name", name, "name")
    if folder := first.get("training_folder"):
        draft.set("output.folder", f"{folder}/{name}" if name else folder, "training_folder")
    if word := first.get("trigger_word"):
        why = "write <token> where the captions say [trigger], and set captions.placeholders"
        draft.lost("trigger_word", word, why)
    draft.take(_MODEL, first.get("model") or {}, "model: ")
    draft.values["model.base"] = draft.values.get("model.base") or BASES["fp8"]
    draft.take(_NETWORK, first.get("network") or {}, "network: ")
    draft.take(_TRAIN, first.get("train") or {}, "train: ")
    draft.take(_SAVE, first.get("save") or {}, "save: ")
    _samples(draft, first)
    for dataset in first.get("datasets") or []:
        _dataset(draft, dataset)
    known = {"type", "name", "training_folder", "device", "trigger_word", "model", "network", "train", "save",
             "sample", "datasets", "performance_log_every", "log_dir"}  # fmt: skip
    for key in first.keys() - known:
        draft.lost(key, first[key], "ideoflow does not know this setting")


def _samples(draft: Draft, process: Mapping[str, Any]) -> None:
    sample = process.get("sample") or {}
    texts = [*(sample.get("prompts") or []), *(s.get("prompt") for s in sample.get("samples") or [])]
    if (process.get("train") or {}).get("disable_sampling") or not texts:
        return
    word = process.get("trigger_word")
    for number, text in enumerate((t for t in texts if t), 1):
        draft.prompt(f"{number:02d}", str(text).replace("[trigger]", word or "[trigger]"))
    draft.take(_SAMPLE, sample, "sample: ")


def _dataset(draft: Draft, dataset: Mapping[str, Any]) -> None:
    draft.take(_DATASET, dataset, "datasets: ")
    images = dataset.get("folder_path") or dataset.get("dataset_path") or "."
    resolutions = dataset.get("resolution") or 512
    for side in resolutions if isinstance(resolutions, list) else [resolutions]:
        made: dict[str, Any] = {"images": draft.path(str(images)), "resolution": on_grid(float(side))}
        if (isinstance(resolutions, list) and len(resolutions) > 1) or len(draft.sources):
            made["name"] = f"{images} at {made['resolution']}"
        if text := dataset.get("default_caption"):
            draft.lost("default_caption", text, "every picture needs a caption, or caption = 'instance'")
        if int(dataset.get("num_repeats", 1)) > 1:
            made["repeats"] = int(dataset["num_repeats"])
        if dataset.get("flip_x"):
            made["flip"] = True
        if dataset.get("random_crop"):
            made["crop"], made["crop_variants"] = "random", 4
        draft.sources.append(made)
    if (rate := dataset.get("caption_dropout_rate")) and rate > draft.values.get("captions.dropout", 0):
        draft.set("captions.dropout", rate, "caption_dropout_rate")  # one for all sources
