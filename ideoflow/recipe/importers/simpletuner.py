"""SimpleTuner's config.json: what becomes of each setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ideoflow.recipe.importers.draft import Draft, Row
from ideoflow.recipe.importers.simpletuner_loader import DataBackend
from ideoflow.recipe.sources import on_grid, side_of

Take = Callable[[Draft, Any], None]

BASES = {"fp8": "ideogram-ai/ideogram-4-fp8", "nf4": "ideogram-ai/ideogram-4-nf4"}
_PRECISIONS = {"nf4-bnb": "nf4", "fp8-torchao": "fp8", "fp8-quanto": "fp8", "fp8uz-quanto": "fp8",
               "int8-torchao": "int8", "int8-quanto": "int8"}  # fmt: skip
_DECAYS = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "polynomial": "linear",
    "cosine": "cosine", "cosine_with_restarts": "cosine", "sine": "cosine",
}  # fmt: skip


def _family(draft: Draft, value: Any) -> None:
    if value != "ideogram":
        draft.say("model_family", f"the configuration is for {value}; the recipe is for Ideogram 4")


def _model_type(draft: Draft, value: Any) -> None:
    if value != "lora":
        draft.set("adapter.kind", value, "model_type")


def _flavour(draft: Draft, value: Any) -> None:
    draft.values.setdefault("model.base", BASES.get(value, BASES["fp8"]))
    if value not in BASES:
        draft.say("model_flavour", f"model_flavour = {value!r} is not known; the recipe has the FP8 release")


def _base(draft: Draft, value: Any) -> None:
    if value:
        draft.set("model.base", draft.path(value) if (draft.base / str(value)).exists() else value)


def _precision(draft: Draft, value: Any) -> None:
    if value in _PRECISIONS:
        draft.set("memory.precision", _PRECISIONS[value], "base_model_precision")
    elif value not in ("no_change", None):
        draft.lost("base_model_precision", value, "memory.precision takes fp8, int8, nf4, bf16 or float32")


def _steps(draft: Draft, value: Any) -> None:
    if value:
        draft.set("train.steps", value, "max_train_steps")


def _epochs(draft: Draft, value: Any) -> None:
    if value and "train.steps" not in draft.values:
        why = "a recipe counts steps: set train.steps to epochs * pictures / batch"
        draft.lost("num_train_epochs", value, why)


def _scheduler(draft: Draft, value: Any) -> None:
    draft.set("train.decay", _DECAYS.get(value, value), "lr_scheduler")
    if value in ("polynomial", "cosine_with_restarts", "sine"):
        draft.say("lr_scheduler", f"lr_scheduler = '{value}' is carried over as '{_DECAYS[value]}'")


def _optimizer(draft: Draft, value: Any) -> None:
    name = str(value).lower()
    if "adamw" in name and ("8bit" in name or "paged" in name):
        draft.set("memory.optimizer_state", "paged" if "paged" in name else "8bit", "optimizer")
    elif "adamw" not in name:
        why = "training is with AdamW, whose learning rate may have to be another"
        draft.lost("optimizer", value, why)


def _beta(number: int) -> Take:
    def take(draft: Draft, value: Any) -> None:
        betas = list(draft.values.get("train.betas", (0.9, 0.999)))
        betas[number] = float(value)
        draft.set("train.betas", betas, f"adam_beta{number + 1}")

    return take


def _lora_type(draft: Draft, value: Any) -> None:
    if value == "lycoris":
        draft.values.setdefault("adapter.kind", "lokr")  # what lycoris_config says comes over it


def _lycoris(draft: Draft, value: Any) -> None:
    file = draft.base / str(value)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        draft.lost("lycoris_config", value, "the file cannot be read; set [adapter] by hand")
        return
    draft.set("adapter.kind", config.get("algo"), "lycoris_config")
    full = bool(config.get("full_matrix")) or config.get("linear_dim", 0) >= 10_000
    if full and config.get("algo") == "lokr":
        draft.set("adapter.full_matrix", True, "lycoris_config")
    else:
        draft.set("adapter.rank", config.get("linear_dim"), "lycoris_config")
        draft.set("adapter.alpha", config.get("linear_alpha"), "lycoris_config")
    if config.get("algo") == "lokr" and config.get("factor", -1) > 0:
        draft.set("adapter.factor", config["factor"], "lycoris_config")
    for key in ("apply_preset", "multiplier"):
        if config.get(key) not in (None, 1, 1.0):
            draft.lost(f"lycoris_config: {key}", config[key], "set adapter.targets instead")


def _checkpointing(draft: Draft, value: Any) -> None:
    # On is what a plan does where memory asks for it, and less where there is room.
    if value is False:
        draft.set("memory.checkpointing", "off", "gradient_checkpointing")


def _offload(draft: Draft, value: Any) -> None:
    if value:
        draft.set("memory.offload", "block", "enable_group_offload")


def _with_offload(key: str, ours: str) -> Take:
    """Carries a setting over that has a meaning only where groups are offloaded."""

    def take(draft: Draft, value: Any) -> None:
        if "memory.offload" in draft.values:
            draft.set(ours, value, key)

    return take


def _offload_type(draft: Draft, value: Any) -> None:
    if "memory.offload" in draft.values and value == "leaf_level":
        draft.set("memory.offload", "leaf", "group_offload_type")


def _offload_disk(draft: Draft, value: Any) -> None:
    if "memory.offload" in draft.values and value:
        draft.set("memory.offload", "disk", "group_offload_to_disk_path")
        draft.set("memory.offload_folder", draft.path(str(value)), "group_offload_to_disk_path")


def _quantize_via(draft: Draft, value: Any) -> None:
    if "memory.precision" in draft.values:  # weights that are kept as stored are not quantised
        draft.set("memory.quantize_via", "cpu" if value == "cpu" else "gpu", "quantize_via")


def _compile(draft: Draft, value: Any) -> None:
    if value == "inductor":
        draft.set("memory.compile", "regional", "dynamo_backend")


def _validation(draft: Draft, value: Any) -> None:
    if not value:
        draft.say("ideogram_validation", "ideogram_validation is off: no prompts are carried over")


def _prompt(draft: Draft, value: Any) -> None:
    if value:
        draft.prompt("validation", str(value))


def _library(draft: Draft, value: Any) -> None:
    file = draft.base / str(value)
    try:
        prompts = json.loads(file.read_text(encoding="utf-8"))
        for name, prompt in prompts.items():
            draft.prompt(name, prompt if isinstance(prompt, str) else prompt["prompt"])
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        draft.lost("user_prompt_library", value, "the file cannot be read; name prompts in validate.prompts")


def _validation_size(draft: Draft, value: Any) -> None:
    first, *others = str(value).replace(" ", "").split(",")
    width, _, height = first.lower().partition("x")
    try:
        sides = [float(width), float(height or width)]
    except ValueError:
        draft.lost("validation_resolution", value, "write validate.width and validate.height")
        return
    if max(sides) <= 8:  # megapixels
        sides = [side_of(s) for s in sides]
    draft.set("validate.width", on_grid(sides[0]), "validation_resolution")
    draft.set("validate.height", on_grid(sides[1]), "validation_resolution")
    if others:
        draft.lost("validation_resolution", others, "validation pictures have one size")


_TRACKERS = "every run writes metrics.jsonl and report.html into its output folder"
_HUB = "nothing is uploaded; the adapter is one file that `hf upload` takes"

CONFIG: tuple[Row, ...] = (
    Row("model_family", "", "must be `ideogram`", _family),
    Row("model_type", "adapter.kind", "`lora`", _model_type),
    Row("pretrained_model_name_or_path", "model.base", "a hub id or a folder", _base),
    Row("pretrained_transformer_model_name_or_path", "model.base", "a single file", _base),
    Row("model_flavour", "model.base", "`fp8` and `nf4` are the hub ids of the releases", _flavour),
    Row("revision", "model.revision"),
    Row(
        "base_model_precision",
        "memory.precision",
        "`no_change` is `auto`; otherwise fp8, int8, nf4",
        _precision,
    ),
    Row("base_model_default_dtype", "", "bf16 where the card has it; the plan says why not", quiet=True),
    Row("quantize_via", "memory.quantize_via", "`cpu`, or `gpu` for the others", _quantize_via),
    Row("mixed_precision", "", "bf16, with float32 where the model needs it", quiet=True),
    Row(
        "lora_type", "adapter.kind", "`standard` is `lora`; `lycoris` is what lycoris_config says", _lora_type
    ),
    Row("lora_rank", "adapter.rank"),
    Row("lora_alpha", "adapter.alpha"),
    Row("lora_dropout", "", "adapters are trained without dropout"),
    Row("lora_init_type", "adapter.init"),
    Row("lycoris_config", "adapter.kind, rank, alpha, factor, full_matrix", "read from the file", _lycoris),
    Row("learning_rate", "train.learning_rate"),
    Row("lr_scheduler", "train.decay", "`constant`, `linear`, `cosine`", _scheduler),
    Row("lr_warmup_steps", "train.warmup"),
    Row("lr_end", "", "decay ends at zero", quiet=True),
    Row(
        "optimizer", "memory.optimizer_state", "AdamW; in 8 bits or paged where the name says so", _optimizer
    ),
    Row("optimizer_config", "", "AdamW's settings are train.betas and train.weight_decay"),
    Row("adam_beta1", "train.betas", "the first of the two", _beta(0)),
    Row("adam_beta2", "train.betas", "the second of the two", _beta(1)),
    Row("adam_weight_decay", "train.weight_decay"),
    Row("max_grad_norm", "train.max_grad_norm"),
    Row("max_train_steps", "train.steps", "", _steps),
    Row("num_train_epochs", "train.steps", "count steps: epochs times pictures over batch", _epochs),
    Row("train_batch_size", "train.batch"),
    Row("gradient_accumulation_steps", "train.accumulation"),
    Row("seed", "train.seed"),
    Row("caption_dropout_probability", "captions.dropout"),
    Row("ideogram_schedule_mu", "train.schedule.mu"),
    Row("ideogram_schedule_std", "train.schedule.std"),
    Row("ideogram_auto_json", "captions.wrap"),
    Row(
        "ideogram_prompt_upsample",
        "",
        "use `captions` tools on the data set instead: what is trained is seen",
    ),
    Row("ideogram_prompt_enhancer_head_id", "", "see ideogram_prompt_upsample", quiet=True),
    Row("gradient_checkpointing", "memory.checkpointing", "true is left to the plan", _checkpointing),
    Row("gradient_checkpointing_interval", "memory.activation_budget", "the plan chooses it", quiet=True),
    Row(
        "enable_group_offload", "memory.offload", "`block`; `stream` is faster, in the fused engine", _offload
    ),
    Row("group_offload_type", "memory.offload", "`block_level` or `leaf_level`", _offload_type),
    Row(
        "group_offload_blocks_per_group",
        "memory.offload_blocks",
        "",
        _with_offload("group_offload_blocks_per_group", "memory.offload_blocks"),
    ),
    Row(
        "group_offload_use_stream",
        "memory.offload_streams",
        "also with recomputing",
        _with_offload("group_offload_use_stream", "memory.offload_streams"),
    ),
    Row("group_offload_to_disk_path", "memory.offload, offload_folder", "`disk`", _offload_disk),
    Row("dynamo_backend", "memory.compile", "`inductor` compiles block by block", _compile),
    Row("dynamo_use_regional_compilation", "memory.compile", "always regional", quiet=True),
    Row("dynamo_mode", "", "left alone: CUDA graphs and adapters do not go together"),
    Row("dynamo_fullgraph", "", "left alone, for the same reason"),
    Row("ideogram_validation", "validate.prompts", "no prompts, no validation", _validation),
    Row("validation_prompt", "validate.prompts", "becomes a file beside the recipe", _prompt),
    Row("user_prompt_library", "validate.prompts", "becomes files beside the recipe", _library),
    Row("validation_prompt_library", "", "write prompts for your own subject: validate.prompts"),
    Row(
        "validation_negative_prompt",
        "",
        "guidance is against the unconditional transformer, or no text",
        quiet=True,
    ),
    Row("validation_guidance", "validate.guidance", "constant; without it, the preset's own schedule"),
    Row("validation_guidance_rescale", "", "not a part of the model's sampler"),
    Row("validation_num_inference_steps", "validate.steps"),
    Row("validation_resolution", "validate.width, validate.height", "", _validation_size),
    Row("validation_seed", "validate.seed"),
    Row("validation_steps", "validate.every"),
    Row("validation_step_interval", "validate.every"),
    Row("validation_lycoris_strength", "", "adapters are sampled as they are", quiet=True),
    Row("num_eval_images", "", "no held-out pictures", quiet=True),
    Row("checkpoint_step_interval", "train.checkpoint_every"),
    Row("checkpointing_steps", "train.checkpoint_every"),
    Row("checkpoints_total_limit", "train.keep_checkpoints"),
    Row("resume_from_checkpoint", "", "always: run the same recipe again, or --fresh", quiet=True),
    Row("output_dir", "output.folder"),
    Row("use_ema", "", "no average of the weights is kept"),
    Row("report_to", "", _TRACKERS),
    Row("tracker_project_name", "", _TRACKERS, quiet=True),
    Row("tracker_run_name", "", _TRACKERS, quiet=True),
    Row("push_to_hub", "", _HUB),
    Row("push_checkpoints_to_hub", "", _HUB),
    Row("hub_model_id", "", _HUB, quiet=True),
    Row("data_backend_config", "[[data.source]]", "the second table", lambda draft, value: None),
    Row("resolution", "data.resolution", "for sources that have none", lambda draft, value: None),
    Row("resolution_type", "data.resolution_type", "likewise", lambda draft, value: None),
    Row("minimum_image_size", "data.minimum_image_size", "likewise", lambda draft, value: None),
    Row("maximum_image_size", "data.maximum_image_size", "likewise", lambda draft, value: None),
    Row("target_downsample_size", "data.target_downsample_size", "likewise", lambda draft, value: None),
    Row("aspect_bucket_rounding", "", "sizes lie on the model's grid of 16 pixels", quiet=True),
    Row("disable_bucket_pruning", "", "no picture is dropped for the size of a batch", quiet=True),
    Row("ignore_final_epochs", "", "training is counted in steps", quiet=True),
    Row("skip_file_discovery", "", "what is known of unchanged files is kept", quiet=True),
    Row("preserve_data_backend_cache", "", "caches are kept by content", quiet=True),
    Row("compress_disk_cache", "", "latents do not compress", quiet=True),
    Row("vae_batch_size", "", "the plan's affair", quiet=True),
    Row("write_batch_size", "", "caches are written in shards", quiet=True),
    Row("text_encoder_batch_size", "", "the plan's affair", quiet=True),
)

_SHARED = (
    "resolution",
    "resolution_type",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
)


def import_simpletuner(
    draft: Draft, config: Mapping[str, Any], loader: Sequence[Mapping[str, Any]], loader_file: Path
) -> None:
    """Fills the draft from the two files' data; either may be empty."""
    config = {str(key).lstrip("-"): value for key, value in config.items()}
    # Those that others build on come first, whatever the order of the file.
    first = (
        "pretrained_model_name_or_path", "max_train_steps", "lora_type", "base_model_precision",
        "enable_group_offload", "group_offload_type",
    )  # fmt: skip
    ordered = {k: config[k] for k in (*first, *config) if k in config}
    if not config.get("ideogram_validation") and config:
        off = {k for k in ordered if k.startswith("validation") or k == "user_prompt_library"}
        ordered = {k: v for k, v in ordered.items() if k not in off}
    draft.take(CONFIG, ordered)
    draft.values["model.base"] = draft.values.get("model.base") or BASES["fp8"]
    if loader:
        draft.reading(loader_file, loader_file.read_text(encoding="utf-8-sig"))
    shared = {k: config[k] for k in _SHARED if config.get(k) is not None}
    for backend in loader:
        kind = backend.get("dataset_type", "image")
        if backend.get("disabled") or backend.get("disable") or kind in ("text_embeds", "image_embeds"):
            continue
        if kind != "image":
            draft.lost(
                "dataset_type", kind, "only pictures are trained", f"{backend.get('id', 'a source')}: "
            )
        elif made := DataBackend(draft, backend, shared).make():
            draft.sources.append(made)
    if len(draft.sources) > 1 and any("weight" in s for s in draft.sources):
        for source in draft.sources:
            source.setdefault("weight", 1.0)
            source.pop("repeats", None)
