"""What a checkpoint holds, from the headers of its files alone: nothing is loaded (torch-free)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ideoflow.diagnostics import Diagnostic, fail
from ideoflow.diagnostics.codes.model import NOT_A_BASE
from ideoflow.model.base import COMPONENTS, PARTS, WEIGHTED, check_layout
from ideoflow.model.digest import sampled_digest
from ideoflow.model.files import Stored, part_headers, weight_files
from ideoflow.model.fit import Examined, examine
from ideoflow.model.forms import bytes_by_type, is_original_layout, plain_name
from ideoflow.model.sides import is_side
from ideoflow.model.together import mismatches
from ideoflow.model.tokens import largest_id


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
    """All parts of a checkpoint, the digest that plans and caches know it by, and why the parts do not belong
    together, where they do not."""

    place: str
    parts: tuple[PartReport, ...]
    digest: str
    mismatches: tuple[Diagnostic, ...] = ()

    @property
    def problems(self) -> list[Diagnostic]:
        return [*(problem for part in self.parts for problem in part.problems), *self.mismatches]


def inspect(path: Path) -> Inspection:
    """A base in diffusers' layout, one part of it, or a single file.

    Raises:
        IdeoflowError: when there is nothing there, or a file is cut or no safetensors.
    """
    if not path.exists():
        fail(NOT_A_BASE, f"there is nothing at {path}", cure="give a folder or a .safetensors file")
    names = [part for part in WEIGHTED if (path / part).exists()]
    if names:
        if (path / "model_index.json").is_file() or all((path / part).exists() for part in COMPONENTS):
            check_layout(path)
        headers = {name: part_headers(path / name) for name in names}
        found = {
            name: examine(name, path / name, header, path / name / "config.json")
            for name, header in headers.items()
        }
        parts = tuple(_report(name, path / name, headers[name], found[name]) for name in names)
        ids = largest_id(path / "tokenizer") if (path / "tokenizer").is_dir() else None
        return Inspection(str(path), parts, sampled_digest(path), tuple(mismatches(found, ids)))
    # A part alone: its own name says what it is, and a single file is a transformer.
    name, config = path.name if path.name in PARTS else "transformer", path / "config.json"
    single = {name: path} if path.is_file() else None
    header = part_headers(path)
    alone = examine(name, path, header, config if name in PARTS or config.exists() else None)
    part = _report(name, path, header, alone)
    return Inspection(str(path), (part,), sampled_digest(None if single else path, single))


def _report(name: str, place: Path, header: Mapping[str, Stored], found: Examined) -> PartReport:
    parameters = 0
    for key, tensor in header.items():
        if not is_side(key):
            packed = 2 if tensor.dtype == "U8" and f"{key}.absmax" in header else 1
            parameters += prod(tensor.shape) * packed
    dtypes = bytes_by_type(header)
    return PartReport(
        name,
        str(place),
        found.form,
        _layout(header) if name.endswith("transformer") else "as its library saves it",
        len(weight_files(place)),
        len(header),
        parameters,
        sum(dtypes.values()),
        dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        found.problems,
    )


def _layout(header: Mapping[str, Stored]) -> str:
    layout = "original (q, k, v fused)" if is_original_layout(header) else "diffusers (q, k, v apart)"
    prefix = next((n[: len(n) - len(plain_name(n))] for n in header if plain_name(n) != n), "")
    return f"{layout}, names begin with {prefix}" if prefix else layout
