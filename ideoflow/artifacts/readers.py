"""Who loads an adapter file: its keys, by what the readers themselves take.

| reader | source |
|---|---|
| ComfyUI | ``comfy/lora.py`` (``model_lora_keys_unet``), ``comfy/weight_adapter/*.py`` at v0.3.77 |
| diffusers | ``Ideogram4LoraLoaderMixin``, ``_convert_non_diffusers_ideogram4_lora_to_diffusers`` at 0.42 |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ideoflow.artifacts.names import DIFFUSERS_MODULES, ORIGINAL_MODULES, QKV, Key, read_key

# Says that a file's row lengths are relative to the base's norms, as ComfyUI takes them (``weight_decompose``
# of a ``dora_scale`` [out, 1]). No file suits LyCORIS too: rows of W + B A would have to be as long as W's,
# and scaling them is no change of low rank.
BASE_NORM = "ideoflow.dora_lengths"
_COMFYUI_NAMES = re.compile(
    r"lora_[AB](\.default)?\.weight|lora_(up|down)\.weight|(lokr|hada)_w[12](_[ab])?|alpha|dora_scale"
)


@dataclass(frozen=True)
class Readers:
    """Who loads a file.

    Args:
        words: such as ``ComfyUI and diffusers``.
        remarks: what is odd about the file, each with its cure.
    """

    words: str
    remarks: tuple[str, ...] = ()


def readers(file: Path, peft: Callable[[], str] | None = None) -> Readers:
    """Who loads an adapter file.

    Args:
        peft: of a file beside PEFT's configuration, why PEFT does not load it, or "".
    """
    with safe_open(file, "pt") as opened:
        names, metadata = list(opened.keys()), opened.metadata() or {}
    keys = [key for name in names if (key := read_key(name))]
    remarks = []
    forms = sorted({key.form for key in keys if key.form})
    if len(forms) > 1:
        remarks.append(
            f"it mixes the forms {' and '.join(forms)}: ideoflow adapter convert makes one of them"
        )
    if peft and all(k.prefix == "base_model.model." and k.leaf in DIFFUSERS_MODULES for k in keys):
        if not (refused := peft()):
            return Readers("PEFT", tuple(remarks))
        cure = "ideoflow adapter convert --to peft writes a configuration that fits"
        remarks.append(f"PEFT does not load it as it is meant ({refused}): {cure}")
    comfyui, diffusers = all(map(_in_comfyui, keys)), _in_diffusers(keys)
    if comfyui and metadata.get(BASE_NORM) != "base" and any(k.name == "dora_scale" for k in keys):
        comfyui = False
        remarks.append(
            "ComfyUI would compute other weights: it takes row lengths (dora_scale) relative to the base's "
            "rows, and these are relative to the changed ones: ideoflow adapter convert --to comfyui --base"
        )
    if comfyui:
        words = "ComfyUI and diffusers" if diffusers else "ComfyUI, not in diffusers"
    elif diffusers:
        words = f"{diffusers}, not in ComfyUI"
    else:
        words = "neither ComfyUI nor diffusers"
        if not remarks:
            remarks.append("neither knows all of its keys: ideoflow adapter convert writes what they read")
    return Readers(words, tuple(remarks))


def _in_comfyui(key: Key) -> bool:
    prefixed = key.prefix in ("diffusion_model.", "lora_unet_") and key.leaf in ORIGINAL_MODULES
    return prefixed and bool(_COMFYUI_NAMES.fullmatch(key.name))


def _in_diffusers(keys: Sequence[Key]) -> str:
    """How diffusers loads all of them as they are meant; empty where it does not."""
    prefixes, names = {key.prefix for key in keys}, {key.name for key in keys}
    if "diffusion_model." in prefixes or any(key.leaf == QKV for key in keys):
        known = all(key.leaf in ORIGINAL_MODULES for key in keys)
        one = prefixes - {""} in (set(), {"diffusion_model."}, {"conditional_transformer."})
        spelt = any(
            names - {"alpha"} == {f"lora_{n}.weight" for n in pair} for pair in ("AB", ("down", "up"))
        )
        return "diffusers" if known and one and spelt else ""
    if prefixes != {"transformer."} or any(key.leaf not in DIFFUSERS_MODULES for key in keys):
        return ""
    if all(re.fullmatch(r"lokr_w[12](_[ab])?", name) for name in names):
        return "diffusers, with transformer.load_lora_adapter"
    # One configuration is made for all: modules without row lengths would become a DoRA as well.
    found = {frozenset(k.name for k in keys if k.module == module) for module in {k.module for k in keys}}
    lora = frozenset(("lora_A.weight", "lora_B.weight"))
    return "diffusers" if found in ({lora}, {lora | {"lora_magnitude_vector"}}) else ""
