"""In which form weights are stored, told from the headers of their files alone (torch-free).

A *header* is what :func:`ideoflow.model.base.read_safetensors_header` gives: type, shape and place of every
tensor by name. Forms that are not read have a name here as well, and a word on what to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ideoflow.model.spec import TransformerSpec

DENSE = ("float32", "bf16", "float16")
READABLE = (*DENSE, "fp8", "nf4")
_DTYPES = {"F32": "float32", "BF16": "bf16", "F16": "float16", "F8_E4M3": "fp8", "I8": "int8"}
_OFFICIAL = "the official release in FP8 (ideogram-ai/ideogram-4-fp8) or NF4 (ideogram-ai/ideogram-4-nf4)"
# What a form that is not read is called, and why it is not.
_UNREAD = {
    "NVFP4": "its 4-bit numbers have scales for 16 at a time, made for inference on Blackwell",
    "INT8": "8-bit integers come in many layouts of scales",
    "SDNQ": "its numbers are packed in a way of its own",
    "FP4": "bitsandbytes' NF4 is the 4-bit form that is read",
    "GGUF": "its blocks of mixed precision are made for inference",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def readable(part: str) -> tuple[str, ...]:
    """The forms in which a part is read. The official releases store text encoder and transformers alike, in
    FP8 or NF4, and the autoencoder in bf16."""
    return DENSE if part == "vae" else READABLE


def form_of(header: Mapping[str, Any]) -> str:
    """The form that most bytes have: one of :data:`READABLE`, or the name of one that is not read.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: for a header that makes no sense.
    """
    sizes: dict[str, int] = {}
    for tensor in header.values():
        begin, end = tensor["data_offsets"]
        sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
    main = max(sizes, key=lambda k: sizes[k])

    def has(ending: str) -> bool:
        return any(name.endswith(ending) for name in header)

    if main == "U8":
        if has(".weight.quant_state.bitsandbytes__nf4"):
            return "nf4"
        if has(".weight.quant_state.bitsandbytes__fp4"):
            return "FP4"
        if has(".weight_scale_2"):
            return "NVFP4"
        if has(".zero_point") or has(".scale"):
            return "SDNQ"
    if main == "I8" and has(".zero_point"):
        return "SDNQ"
    return _DTYPES.get(main, main)


def odd_scale(header: Mapping[str, Any]) -> str | None:
    """The first scale whose shape is not [], [1], [out] or [out, 1] of the weight that it stands beside."""

    def fits(name: str) -> bool:
        shape, weight = header[name]["shape"], header.get(name.removesuffix("_scale"), {}).get("shape")
        return prod(shape) == 1 or (bool(weight) and prod(shape) == shape[0] == weight[0])

    return next((name for name in header if name.endswith(".weight_scale") and not fits(name)), None)


def lost_half(header: Mapping[str, Any]) -> str | None:
    """The name of the first FP8 weight or scale that is missing beside the other.

    Without its scale a weight is far too large. None is missed where no weight has one.
    """
    scaled = {name.removesuffix("_scale") for name in header if name.endswith(".weight_scale")}
    eight = {n for n, t in header.items() if t["dtype"] == "F8_E4M3" and n.endswith(".weight")}
    bare = eight - scaled if scaled else set()
    return min((scaled - header.keys()) | {f"{name}_scale" for name in bare}, default=None)


def no_number(header: Mapping[str, Any]) -> str | None:
    """The first plain weight, bias or scale whose type cannot hold it, such as an integer."""
    for name, tensor in header.items():
        plain = name.endswith((".weight", ".bias", "_scale")) and f"{name}.absmax" not in header
        if plain and tensor["dtype"] not in ("F64", "F32", "BF16", "F16", "F8_E4M3"):
            return name
    return None


def unread_file(file: Path) -> tuple[str, str] | None:
    """(what it is, what to use instead) of a file that is no safetensors; None for one that may be.

    Only the first bytes are looked at; nothing is unpickled.
    """
    with file.open("rb") as stream:
        magic = stream.read(9)
    if magic[8:] == b"{" and file.suffix in (".safetensors", ".sft"):
        return None  # the length before the brace may begin like a pickle
    if magic[:4] == b"GGUF" or file.suffix == ".gguf":
        return "GGUF", instead("GGUF")
    if file.suffix in _PICKLES or magic[:2] == b"PK" or magic[:1] == b"\x80":
        return ("a pickle", "use the .safetensors of the same model: unpickling runs any code in a file")
    if file.suffix not in (".safetensors", ".sft"):
        return f"a {file.suffix or 'nameless'} file", "give a .safetensors file, a folder or a hub id"
    return None


def instead(form: str) -> str:
    """What to use in place of a form that is not read."""
    name = {"int8": "INT8"}.get(form, form)
    why = f"{_UNREAD[name]}; " if name in _UNREAD else ""
    return f"{why}use bf16, FP8 (e4m3 with a scale a row or a tensor) or NF4: {_OFFICIAL}"


def plain_name(name: str) -> str:
    """A tensor's name without what ComfyUI puts in front of it."""
    return re.sub(r"^(?:model\.)?diffusion_model\.", "", name)


def is_original_layout(header: Mapping[str, Any]) -> bool:
    """Whether q, k and v are one tensor, as the model's authors store them."""
    return any(".attention.qkv." in name for name in header)


def infer_transformer(header: Mapping[str, Any]) -> TransformerSpec:
    """The sizes that the shapes of a transformer's dense or FP8 tensors tell.

    Raises:
        LookupError, ValueError: when a tensor that is needed is not there, or of an impossible shape.
    """
    shapes = {plain_name(n): t["shape"] for n, t in header.items()}
    blocks = {int(match[1]) for n in shapes if (match := re.match(r"layers\.(\d+)\.", n))}
    if any(name.endswith(".weight.absmax") for name in shapes):
        raise ValueError("4-bit weights are packed flat")
    hidden, channels = shapes["input_proj.weight"]
    (head,) = shapes["layers.0.attention.norm_q.weight"]
    intermediate, _ = shapes["layers.0.feed_forward.w1.weight"]
    _, adaln = shapes["layers.0.adaln_modulation.weight"]
    _, features = shapes["llm_cond_proj.weight"]
    return TransformerSpec(channels, len(blocks), head, hidden // head, intermediate, adaln, features)
