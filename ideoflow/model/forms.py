"""In which form weights are stored, told from the headers of their files alone (torch-free).

A *header* is what :func:`ideoflow.model.files.part_headers` gives: type, shape and place of every tensor by
name. Forms that are not read have a name here as well, and a word on what to use instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING

from ideoflow.model.spec import TransformerSpec

if TYPE_CHECKING:
    from ideoflow.model.files import Stored

DENSE = ("float32", "bf16", "float16")
FLOATS = ("F64", "F32", "BF16", "F16")
READABLE = (*DENSE, "fp8", "nf4")
_DTYPES = {"F32": "float32", "BF16": "bf16", "F16": "float16", "F8_E4M3": "fp8", "I8": "int8"}
_OFFICIAL = "the official release in FP8 (ideogram-ai/ideogram-4-fp8) or NF4 (ideogram-ai/ideogram-4-nf4)"
_OLD_COMFY = "ComfyUI's older FP8 (scaled_fp8)"
# What a form that is not read is called, and why it is not.
_UNREAD = {
    "NVFP4": "its 4-bit numbers have scales for 16 at a time, made for inference on Blackwell",
    "INT8": "8-bit integers come in many layouts of scales",
    "SDNQ": "its numbers are packed in a way of its own",
    _OLD_COMFY: "its scales are called scale_weight, where later files say weight_scale",
    "FP4": "bitsandbytes' NF4 is the 4-bit form that is read",
    "GGUF": "its blocks of mixed precision are made for inference",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def readable(part: str) -> tuple[str, ...]:
    """The forms in which a part is read. The official releases store text encoder and transformers alike, in
    FP8 or NF4, and the autoencoder in bf16."""
    return DENSE if part == "vae" else READABLE


def bytes_by_type(header: Mapping[str, Stored]) -> dict[str, int]:
    """Bytes of the tensors by the type that safetensors gives them."""
    sizes: dict[str, int] = {}
    for tensor in header.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return sizes


def form_of(header: Mapping[str, Stored]) -> str:
    """The form that most bytes have: one of :data:`READABLE`, or the name of one that is not read."""
    sizes = bytes_by_type(header)
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
    if main == "F8_E4M3" and has(".scale_weight"):
        return _OLD_COMFY
    if main == "I8" and has(".zero_point"):
        return "SDNQ"
    return _DTYPES.get(main, main)


def no_number(header: Mapping[str, Stored]) -> str | None:
    """The first plain weight, bias or scale whose type cannot hold it, such as an integer."""
    for name, tensor in header.items():
        plain = name.endswith((".weight", ".bias", "_scale")) and f"{name}.absmax" not in header
        if plain and tensor.dtype not in (*FLOATS, "F8_E4M3"):
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


def is_original_layout(header: Mapping[str, Stored]) -> bool:
    """Whether q, k and v are one tensor, as the model's authors store them."""
    return any(".attention.qkv." in name for name in header)


def infer_transformer(shapes: Mapping[str, tuple[int, ...]]) -> TransformerSpec:
    """The sizes that the shapes of a transformer's tensors tell, given by their names in the files.

    Where blocks do not agree, most of them are right: so one damaged tensor is told from all others.

    Raises:
        KeyError: with the name of a tensor that is needed and not there.
        ValueError: when one has an impossible shape.
    """
    shapes = {plain_name(name): shape for name, shape in shapes.items()}
    blocks = {int(match[1]) for n in shapes if (match := re.match(r"layers\.(\d+)\.", n))}

    def sizes(name: str, dimensions: int) -> tuple[int, ...]:
        names = [name.replace("*", str(block)) for block in sorted(blocks or {0})]
        found = [shapes[n] for n in names if n in shapes]
        if not found:
            raise KeyError(names[0])
        shape = mode(found)
        if len(shape) != dimensions or not all(shape):
            raise ValueError(f"{name} has the impossible shape {list(shape)}")
        return shape

    (hidden,) = sizes("layers.*.attention_norm1.weight", 1)
    (head,) = sizes("layers.*.attention.norm_q.weight", 1)
    intermediate, _ = sizes("layers.*.feed_forward.w1.weight", 2)
    _, adaln = sizes("layers.*.adaln_modulation.weight", 2)
    _, channels = sizes("input_proj.weight", 2)
    _, features = sizes("llm_cond_proj.weight", 2)
    return TransformerSpec(channels, len(blocks), head, hidden // head, intermediate, adaln, features)
