"""PEFT's configuration that comes with an adapter: the strength it gives, and whether PEFT loads the tensors.

It lies beside the tensors (``adapter_config.json``) or, where diffusers saved the file, in its metadata.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import safe_open
from torch import nn

from ideoflow.artifacts.updates import Update
from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.artifacts import DAMAGED_ADAPTER, NOT_AN_ADAPTER

METADATA_KEY = "lora_adapter_metadata"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Starts under which PEFT leaves the base's weights as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "lycoris")


@dataclass(frozen=True)
class SavedConfig:
    """What PEFT's configuration says; ``file`` and ``name`` say where."""

    file: Path
    name: str
    values: Mapping[str, Any]

    def scale(self, module: str) -> float:
        """What PEFT multiplies a module's update by.

        Raises:
            ValueError: when rank or alpha are no numbers, or make none.
        """
        rank = self._number(module, "rank_pattern", "r")
        alpha = self._number(module, "alpha_pattern", "lora_alpha", "alpha")
        if rank <= 0:
            raise ValueError(f"its rank is {rank:g}")
        scale = alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)
        if not math.isfinite(scale):
            raise ValueError(f"alpha {alpha:g} and rank {rank:g} make no finite number")
        return scale

    def _number(self, module: str, patterns: str, *names: str) -> float:
        from peft.utils.other import get_pattern_key

        table = self.values.get(patterns) or {}
        if not isinstance(table, dict):
            raise ValueError(f"its {patterns} is no table")
        given = next((self.values[n] for n in names if self.values.get(n) is not None), 8)
        try:
            value = table.get(get_pattern_key(table, module), given)
        except re.error as error:
            raise ValueError(f"its {patterns} has a key that is no regular expression: {error}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"its {names[0]} is {json.dumps(value)[:40]}")
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"its {names[0]} is too large for a number") from None


def read_config(file: Path) -> SavedConfig:
    """``adapter_config.json`` as PEFT saves it.

    Raises:
        IdeoflowError: when it cannot be read.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        cure = "a folder is read as PEFT saves it: adapter_config.json beside adapter_model.safetensors"
        why = error.strerror if isinstance(error, OSError) else error
        fail(NOT_AN_ADAPTER, f"{file} cannot be read: {why}", Span(str(file)), cure=cure)
    if not isinstance(values, dict):
        fail(NOT_AN_ADAPTER, f"{file} is not a JSON object", Span(str(file)), cure="save it with PEFT again")
    return SavedConfig(file, file.name, values)


def config_in(metadata: Mapping[str, str], file: Path) -> SavedConfig | None:
    """The configuration in the metadata of a file that diffusers saved; None where there is none.

    Raises:
        IdeoflowError: when it cannot be read.
    """
    if METADATA_KEY not in metadata:
        return None
    try:
        saved = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        cure = "save it again with diffusers, or remove this entry of its metadata"
        fail(DAMAGED_ADAPTER, f"{file}: {METADATA_KEY} is not a JSON object", Span(str(file)), cure=cure)
    values = {name.removeprefix("transformer."): value for name, value in saved.items()}
    return SavedConfig(file, METADATA_KEY, values)


def refusal(folder: Path, config: SavedConfig, updates: Mapping[str, Update]) -> str:
    """Why PEFT does not load a folder as it is meant; empty where it does.

    PEFT itself is asked, with a model of the same Linears without numbers; but never for what may run code.
    """
    from peft import PeftModel, get_peft_model_state_dict

    kind = config.values.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        return f"its peft_type is {json.dumps(kind)}"
    if config.values.get("megatron_config"):  # PEFT would import whatever module megatron_core names
        return "it is for Megatron"
    start = config.values.get("init_lora_weights", config.values.get("init_weights"))
    if start not in _PLAIN_STARTS:
        return f"with the start {json.dumps(start)} it changes the base's weights"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(
                _skeleton(updates), str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
    except Exception as error:  # whatever PEFT raises for what a file may say
        return "it raises " + shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    with safe_open(folder / PEFT_FILES[1], "pt") as opened:
        there = set(opened.keys())
    wanted = set(get_peft_model_state_dict(loaded))
    if odd := sorted(wanted ^ there):
        return f"it misses {odd[0]}" if odd[0] in wanted else f"it passes over {odd[0]}"
    scaling = {name: loaded.base_model.model.get_submodule(name).scaling["default"] for name in updates}
    odd = [name for name, update in updates.items() if not math.isclose(scaling[name], update.scale)]
    return f"it multiplies {odd[0]} by {scaling[odd[0]]:g}, not {updates[odd[0]].scale:g}" if odd else ""


def _skeleton(updates: Mapping[str, Update]) -> nn.Module:
    """The Linears that are changed, by their names in the model, without memory."""
    model = nn.Module()
    for name, update in updates.items():
        place = model
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in dict(place.named_children()):
                place.add_module(parent, nn.Module())
            place = place.get_submodule(parent)
        rows, columns = update.shape
        place.add_module(leaf, nn.Linear(columns, rows, bias=False, device="meta"))
    return model
