"""What a checkpoint holds, from the headers of its files alone: nothing is loaded (torch-free)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Diagnostic, fail
from ideoflow.diagnostics.codes.model import NOT_A_BASE, UNSUPPORTED_FORM, WRONG_WEIGHTS
from ideoflow.model.base import NANO, PARTS, WEIGHTED, part_headers, weight_files
from ideoflow.model.digest import sampled_digest
from ideoflow.model.forms import (
    DENSE,
    form_of,
    infer_transformer,
    instead,
    is_original_layout,
    lost_half,
    no_number,
    plain_name,
    readable,
)
from ideoflow.model.spec import TransformerSpec

_SIDE = re.compile(r"\.(weight_scale(_2)?|comfy_quant|input_scale|weight\.\w+.*)$")
# How adapters' tensors are named, in whatever form.
_ADAPTER = re.compile(r"\.(lora_(A|B|up|down)|lokr_w|hada_w)")


@dataclass(frozen=True)
class PartReport:
    """One part: where it is, its form and layout, and what it holds.

    ``parameters`` are numbers of the model, however many a byte holds; ``dtypes`` are bytes by the type that
    safetensors gives. ``problems`` say why it cannot be trained on, and are empty where it can.
    """

    name: str
    place: str
    form: str
    layout: str
    files: int
    tensors: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    problems: tuple[Diagnostic, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """All parts of a checkpoint, and the digest that plans and caches know it by."""

    place: str
    parts: tuple[PartReport, ...]
    digest: str

    @property
    def problems(self) -> list[Diagnostic]:
        return [problem for part in self.parts for problem in part.problems]


def inspect(path: Path) -> Inspection:
    """A base in diffusers' layout, one part of it, or a single file.

    Raises:
        IdeoflowError: when there is nothing there, or a file is cut or no safetensors.
    """
    if not path.exists():
        cure = "give a folder or a .safetensors file"
        if str(path) == NANO:
            cure = "nano is made when it is first used, and the run then says where: give that folder"
        fail(NOT_A_BASE, f"there is nothing at {path}", cure=cure)
    names = [part for part in WEIGHTED if (path / part).is_dir()]
    if names:
        return Inspection(str(path), tuple(_report(n, path / n) for n in names), sampled_digest(path))
    # A part alone: its own name says what it is, and a single file is a transformer.
    name = path.name if path.name in PARTS else "transformer"
    single = {name: path} if path.is_file() else None
    return Inspection(str(path), (_report(name, path),), sampled_digest(None if single else path, single))


def _report(name: str, place: Path) -> PartReport:
    header = part_headers(place)
    dtypes: dict[str, int] = {}
    parameters = 0
    for key, tensor in header.items():
        begin, end = tensor["data_offsets"]
        dtypes[tensor["dtype"]] = dtypes.get(tensor["dtype"], 0) + end - begin
        if not _SIDE.search(key):
            packed = 2 if tensor["dtype"] == "U8" and f"{key}.absmax" in header else 1
            parameters += prod(tensor["shape"]) * packed
    form, transformer = form_of(header), name.endswith("transformer")
    problems = _transformer_problems(place, header, form) if transformer else []
    if lost := lost_half(header):
        problems.append(Diagnostic(WRONG_WEIGHTS, f"{place}: tensors are missing: {lost}", cure=_ANOTHER))
    if untyped := no_number(header):
        stored = header[untyped]["dtype"]
        message = f"{place}: {untyped} is stored as {stored}, which is no floating point"
        problems.append(Diagnostic(WRONG_WEIGHTS, message, cure=_ANOTHER))
    if form not in readable(name):
        message = f"{place} is stored as {form}"
        problems = [Diagnostic(UNSUPPORTED_FORM, message, cure=instead(form))]
    return PartReport(
        name,
        str(place),
        form,
        _layout(header) if transformer else "as its library saves it",
        len(weight_files(place)),
        len(header),
        parameters,
        sum(dtypes.values()),
        dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        tuple(problems),
    )


def _layout(header: Mapping[str, Any]) -> str:
    layout = "original (q, k, v fused)" if is_original_layout(header) else "diffusers (q, k, v apart)"
    prefix = next((n[: len(n) - len(plain_name(n))] for n in header if plain_name(n) != n), "")
    return f"{layout}, names begin with {prefix}" if prefix else layout


def _transformer_problems(place: Path, header: Mapping[str, Any], form: str) -> list[Diagnostic]:
    """Tensors that the model's architecture has and the file has not, or that are of another shape."""
    shapes = {plain_name(k): tuple(t["shape"]) for k, t in header.items() if not _SIDE.search(k)}
    try:
        spec = infer_transformer(header)
    except (LookupError, ValueError):
        if any(_ADAPTER.search(name) for name in header):
            message = f"{place} is an adapter, not a transformer"
            return [Diagnostic(WRONG_WEIGHTS, message, cure=f"ideoflow adapter info {place}")]
        if form in DENSE or form == "fp8":
            return [Diagnostic(WRONG_WEIGHTS, f"{place} is no transformer of Ideogram 4", cure=_ANOTHER)]
        # 4-bit weights are flat: only their names can be compared.
        spec = TransformerSpec(num_layers=len({n.split(".")[1] for n in shapes if n.startswith("layers.")}))
    wanted = spec.tensors()
    if is_original_layout(header):
        wanted = _fused(wanted)
    wrong = {
        "missing": wanted.keys() - shapes.keys(),
        "not known": shapes.keys() - wanted.keys(),
        "of the wrong shape": {
            n for n in wanted.keys() & shapes.keys() if shapes[n] != wanted[n] and form != "nf4"
        },
    }
    return [
        Diagnostic(WRONG_WEIGHTS, f"{place}: tensors are {what}: {_some(names)}", cure=_ANOTHER)
        for what, names in wrong.items()
        if names
    ]


_ANOTHER = "download the model again, or give a base of Ideogram 4"


def _fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same tensors under the original names."""
    fused = {}
    for name, shape in shapes.items():
        if ".to_q." in name:
            fused[name.replace("to_q", "qkv")] = (3 * shape[0], *shape[1:])
        elif ".to_k." not in name and ".to_v." not in name:
            fused[name.replace("to_out.0", "o")] = shape
    return fused


def _some(names: set[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
