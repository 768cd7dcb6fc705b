"""Names in adapter files: which tensor of which module a key is, in every form that is about.

| form | keys | q, k, v |
|---|---|---|
| comfyui | ``diffusion_model.layers.0.attention.qkv.lora_A.weight`` | one |
| diffusers | ``transformer.layers.0.attention.to_q.lora_A.weight`` | apart |
| peft | ``base_model.model.layers.0.attention.to_q.lora_A.weight``, in a folder with its config | apart |
| kohya | ``lora_unet_layers_0_attention_qkv.lora_down.weight`` | one |

A LoKr's tensors are ``lokr_w1`` ..., a LoHa's ``hada_w1_a`` ... in all of them (LyCORIS' names). A DoRA's
lengths are ``dora_scale`` [out, 1] in files of one qkv, ``lora_magnitude_vector`` [out] in PEFT's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ideoflow.model.spec import TransformerSpec

Form = Literal["comfyui", "diffusers", "peft", "kohya"]
FORMS: tuple[Form, ...] = get_args(Form)
FUSED: tuple[Form, ...] = ("comfyui", "kohya")  # those that have q, k and v as one
QKV = "attention.qkv"
PARTS = ("attention.to_q", "attention.to_k", "attention.to_v")
# Modules of a block by diffusers' names, and the fused one.
DIFFUSERS_MODULES = TransformerSpec().block_linears()
_MODULES = (*DIFFUSERS_MODULES, QKV)
_ORIGINAL = {"attention.to_out.0": "attention.o"}
ORIGINAL_MODULES = tuple(_ORIGINAL.get(name, name) for name in _MODULES if name not in PARTS)
_LEAVES = {name: name for name in _MODULES} | {
    "attention.o": "attention.to_out.0",
    "attention.to_out": "attention.to_out.0",
}
_FLAT = {name.replace(".", "_"): name for name in _LEAVES}
_PREFIXES: dict[str, Form] = {
    "diffusion_model.": "comfyui",
    "model.diffusion_model.": "comfyui",
    "conditional_transformer.": "comfyui",
    "transformer.": "diffusers",
    "base_model.model.transformer.": "peft",
    "base_model.model.": "peft",
    "lora_unet_": "kohya",
    "lora_transformer_": "kohya",
    "lycoris_": "kohya",
}
# Tensors of a module by what they are called in files.
_TENSORS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "dora_scale": "lengths",
    "lora_magnitude_vector": "lengths",
    "alpha": "alpha",
} | {f"{kind}_{part}": part for kind, parts in {
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"), "hada": ("w1_a", "w1_b", "w2_a", "w2_b"),
}.items() for part in parts}  # fmt: skip
_KEY = re.compile(
    r"(?P<prefix>|" + "|".join(re.escape(p) for p in sorted(_PREFIXES, key=len, reverse=True))
    + r")layers[._](?P<block>\d+)[._](?P<module>.+?)\.(?P<name>(?P<tensor>" + "|".join(_TENSORS)
    + r")(?:\.default)?(?:\.weight)?)"
)  # fmt: skip

_ATTENTION = re.compile(r"(layers\.\d+\.)(?:" + "|".join(map(re.escape, (*PARTS, QKV))) + ")")


@dataclass(frozen=True)
class Key:
    """What a key of an adapter file says.

    Args:
        form: None where it could be any: without a prefix, of a module that has one name in all.
        prefix, leaf, name: how the file spells it: ``transformer.``, ``attention.o``, ``lora_A.weight``.
        module: diffusers' module name, or ``layers.N.attention.qkv``.
        tensor: ``down``, ``up``, ``lengths``, ``alpha``, or a factor's name such as ``w1_a``.
        kind: ``lora``, ``lokr`` or ``loha``, as far as this key tells.
    """

    form: Form | None
    prefix: str
    leaf: str
    name: str
    module: str
    tensor: str
    kind: str | None


def read_key(key: str) -> Key | None:
    """What a key says, or None where it belongs to no adapter of this model's blocks."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    prefix, leaf, tensor = match["prefix"], match["module"], match["tensor"]
    form: Form | None = _PREFIXES.get(prefix)
    if form == "kohya":
        leaf = _FLAT.get(leaf, leaf)
    if leaf not in _LEAVES:
        return None
    if form is None and (leaf in ORIGINAL_MODULES) != (leaf in DIFFUSERS_MODULES):
        form = "comfyui" if leaf in ORIGINAL_MODULES else "diffusers"
    family = tensor.partition("_")[0]
    kind = {"lora": "lora", "dora": "lora", "lokr": "lokr", "hada": "loha"}.get(family)
    return Key(
        form, prefix, leaf, match["name"], f"layers.{match['block']}.{_LEAVES[leaf]}", _TENSORS[tensor], kind
    )


def write_key(form: Form, module: str, tensor: str, kind: str) -> str:
    """The key of a tensor in a form; the inverse of :func:`read_key`."""
    block, _, leaf = module.removeprefix("layers.").partition(".")
    prefix = {"comfyui": "diffusion_model.", "diffusers": "transformer.", "peft": "base_model.model.",
              "kohya": "lora_unet_"}[form]  # fmt: skip
    if form in FUSED:
        leaf = _ORIGINAL.get(leaf, leaf)
    place = f"layers.{block}.{leaf}"
    if form == "kohya":
        place = place.replace(".", "_")
    if tensor == "alpha":
        name = "alpha"
    elif kind == "lokr":
        name = f"lokr_{tensor}"
    elif kind == "loha":
        name = f"hada_{tensor}"
    elif tensor == "lengths":
        name = "lora_magnitude_vector" if form in ("diffusers", "peft") else "dora_scale"
    else:
        names = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
        name = f"{names[tensor == 'up']}.weight"
    return f"{prefix}{place}.{name}"


def attention_of(module: str) -> str | None:
    """``layers.N.`` where the module is one of q, k, v (or all of them), else None."""
    match = _ATTENTION.fullmatch(module)
    return match[1] if match else None
