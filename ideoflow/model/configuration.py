"""What the configurations of a base's parts may say, of all that is used of them (torch-free)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, UNSUPPORTED_FORM
from ideoflow.model.files import AGAIN
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec

# What a value must be, and whether it is.
Rule = tuple[str, Callable[[Any], bool]]


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _list_of(good: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    def is_list(value: Any) -> bool:
        return (
            isinstance(value, list) and length in (None, len(value)) and bool(value) and all(map(good, value))
        )

    return is_list


def _one_of(*known: Any) -> Rule:
    return " or ".join(map(json.dumps, known)), lambda value: any(
        type(value) is type(one) and value == one for one in known
    )


_COUNT: Rule = "a whole number above 0", _is_count
_POSITIVE: Rule = "a number above 0", _is_positive
_COUNTS: Rule = "a list of whole numbers above 0", _list_of(_is_count)
_AXES: Rule = "a list of three whole numbers above 0", _list_of(_is_count, 3)
_SILU = _one_of("silu", "swish")
_TRANSFORMER: Mapping[str, Rule] = {
    **dict.fromkeys(TransformerSpec.__slots__, _COUNT),
    "norm_eps": _POSITIVE,
    "rope_theta": _POSITIVE,
    "mrope_section": _AXES,
}
_TEXT: Mapping[str, Rule] = {
    **dict.fromkeys(TextEncoderSpec.__slots__, _COUNT),
    "rms_norm_eps": _POSITIVE,
    "hidden_act": _SILU,
}
_ROPE: Mapping[str, Rule] = {"rope_theta": _POSITIVE, "mrope_section": _AXES}
_VAE: Mapping[str, Rule] = {
    **dict.fromkeys(("in_channels", "out_channels"), _one_of(3)),  # red, green, blue
    **dict.fromkeys(
        ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), _one_of(True, False)
    ),
    "patch_size": _one_of([2, 2]),
    **dict.fromkeys(("latent_channels", "layers_per_block", "norm_num_groups"), _COUNT),
    "batch_norm_eps": _POSITIVE,
    "act_fn": _SILU,
    "block_out_channels": _COUNTS,
    "decoder_block_out_channels": (_COUNTS[0], lambda value: value is None or _COUNTS[1](value)),
    "down_block_types": (
        "a list of DownEncoderBlock2D",
        _list_of(lambda value: value == "DownEncoderBlock2D"),
    ),
    "up_block_types": ("a list of UpDecoderBlock2D", _list_of(lambda value: value == "UpDecoderBlock2D")),
}
_TEXT_MODEL = "qwen3_vl"
_GROUPS = 32  # norm_num_groups of an autoencoder that does not say


def read_text(file: Path, span: Span | None = None) -> str:
    """The text in a file.

    Raises:
        IdeoflowError: when there is none.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        fail(BAD_CONFIG, f"{file} {reason}", span, cure=AGAIN)


def read_json(file: Path, span: Span | None = None) -> dict[str, Any]:
    """The JSON object in a file; raises like :func:`read_text`."""
    try:
        data = json.loads(read_text(file, span))
    except (ValueError, RecursionError) as error:
        fail(BAD_CONFIG, f"{file} cannot be read: {error}", span, cure=AGAIN)
    if not isinstance(data, dict):
        fail(BAD_CONFIG, f"{file} is not a JSON object", span, cure=AGAIN)
    return data


def check_values(part: str, config: Mapping[str, Any], file: Path) -> None:
    """Refuses values that the part cannot be built with, or that would fail only in the midst of training.

    Raises:
        IdeoflowError: naming ``file`` and the key.
    """
    if part == "text_encoder":
        _check_text_encoder(config, file)
    elif part == "vae":
        _check(config, _VAE, file)
        _check_vae(config, file)
    else:
        _check(config, _TRANSFORMER, file)


def _check(config: Mapping[str, Any], rules: Mapping[str, Rule], file: Path, within: str = "") -> None:
    for key, (wanted, good) in rules.items():
        if key in config and not good(config[key]):
            _refuse(file, within + key, config[key], wanted)


def _refuse(file: Path, key: str, value: Any, wanted: str) -> None:
    shown = json.dumps(value)
    shown = shown if len(shown) < 100 else f"{shown[:100]}..."
    fail(BAD_CONFIG, f"{file}: {key} is {shown}, and must be {wanted}", cure=AGAIN)


def _check_text_encoder(config: Mapping[str, Any], file: Path) -> None:
    if (made_for := config.get("model_type")) != _TEXT_MODEL:
        message = f"{file}: model_type is {json.dumps(made_for)}, and Ideogram 4's is {_TEXT_MODEL}"
        fail(UNSUPPORTED_FORM, message, cure="give the text encoder of Ideogram 4")
    text = config.get("text_config", {})
    if not isinstance(text, dict):
        _refuse(file, "text_config", text, "a JSON object")
    _check(text, _TEXT, file, "text_config.")
    for rope in ("rope_parameters", "rope_scaling"):
        if isinstance(facts := text.get(rope) or {}, dict):
            _check(facts, _ROPE, file, f"text_config.{rope}.")
        else:
            _refuse(file, f"text_config.{rope}", facts, "a JSON object")


def _check_vae(config: Mapping[str, Any], file: Path) -> None:
    blocks = config.get("block_out_channels", [])
    groups = config.get("norm_num_groups", _GROUPS)
    if any(channels % groups for channels in blocks):
        _refuse(file, "norm_num_groups", groups, f"a divisor of all block_out_channels, {blocks}")
    for key in ("down_block_types", "up_block_types"):
        if blocks and key in config and len(config[key]) != len(blocks):
            _refuse(file, key, config[key], f"as many as block_out_channels, {len(blocks)}")
