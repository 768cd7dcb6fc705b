"""Merges an adapter into a base: new weights in the base's own form, written tensor by tensor.

The new files have the very headers of the old ones, since no tensor changes its type or shape, so each
tensor is written where it was: changed ones computed in float32 and rounded, all others copied. In FP8 the
weight is dequantised, changed and quantised again with the scales that fit it now, a row or a tensor each,
as they were. No more than one weight is in memory at a time, in a few copies.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from ideoflow.artifacts.adapter_file import Adapter, check_output
from ideoflow.artifacts.names import PARTS, QKV, attention_of
from ideoflow.artifacts.updates import CannotJoin, Lora, Update
from ideoflow.diagnostics import Collector, IdeoflowError, Span, fail
from ideoflow.diagnostics.codes.artifacts import CANNOT_MERGE, UNWRITABLE, WRONG_BASE
from ideoflow.diagnostics.codes.model import NOT_A_BASE
from ideoflow.kernels.reference import FP8, FP8_MAX
from ideoflow.model.base import locate_base
from ideoflow.model.checkpoint import Checkpoint
from ideoflow.model.files import Stored, part_headers
from ideoflow.model.fit import examine
from ideoflow.model.forms import plain_name
from ideoflow.model.hub import fetch_base
from ideoflow.model.load import told
from ideoflow.resources import whole_file, whole_folder

_CPU = torch.device("cpu")
_DENSE = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class BasePlace:
    """A base's transformer: a file, or a folder of safetensors; ``whole`` is all of the base.

    Args:
        header: where every tensor is, by its name in the files.
        checkpoint: the same tensors by diffusers' names.
    """

    transformer: Path
    header: Mapping[str, Stored]
    checkpoint: Checkpoint
    whole: Path | None = None


def find_base(name: str) -> BasePlace:
    """The transformer of a base: a single file, a folder, ``nano`` or a hub id.

    Raises:
        IdeoflowError: when there is none, or with what is wrong with it.
    """
    place, whole = _locate(name)
    header = part_headers(place)
    part = "unconditional_transformer" if "unconditional" in place.name else "transformer"
    config = place / "config.json"
    if problems := examine(part, place, header, config if config.exists() else None).problems:
        raise IdeoflowError(problems)
    with told(place):
        return BasePlace(place, header, Checkpoint(place), whole)


def _locate(name: str) -> tuple[Path, Path | None]:
    """(the transformer, all of the base)."""
    try:
        path = Path(name).expanduser()
        if name and path.is_file():
            return path, None
        if name and any(path.glob("*.safetensors*")) and not (path / "transformer").is_dir():
            return path, None
    except RuntimeError:  # ~ of a user that is not there
        pass
    except OSError as error:
        fail(NOT_A_BASE, f"'{name[:99]}' is no path: {error.strerror}", cure="give a base's path or hub id")
    facts = fetch_base(locate_base(name))
    assert facts.folder is not None
    return facts.files.get("transformer", facts.folder / "transformer"), facts.folder


def base_weights(base: BasePlace) -> Callable[[str], Tensor]:
    """weight(module) -> float32 [out, in], of one qkv all rows, whatever form the base has.

    Raises:
        IdeoflowError: from the call, when the base has no such module.
    """

    def weight(module: str) -> Tensor:
        attention = attention_of(module)
        if attention and module.endswith(QKV):
            return torch.cat([weight(attention + part) for part in PARTS])
        if f"{module}.weight" not in base.checkpoint:
            cure = "give the base that the adapter was trained on"
            fail(WRONG_BASE, f"{base.transformer} has no {module}", cure=cure)
        with told(base.transformer):
            return base.checkpoint.dense(f"{module}.weight", torch.float32, _CPU)

    return weight


@dataclass(frozen=True)
class Merged:
    """What merging did: weights changed, and the mean over them of |new - old| / |old| in norm."""

    place: Path
    weights: int
    change: float


def merge(adapter: Adapter, base: BasePlace, out: Path) -> Merged:
    """Writes ``base`` with the adapter in its weights to ``out``, whole or not at all.

    ``out`` becomes what the base is: a file, a folder of the transformer, or a whole base, whose other parts
    are hard links where the disk allows it.

    Raises:
        IdeoflowError: when the two do not belong together, the base's form cannot be merged into, or ``out``
            is there or cannot be written.
    """
    check_output(out, folder=not base.transformer.is_file())
    work, files = _Work(adapter, base.header), {stored.file for stored in base.header.values()}
    try:
        if base.transformer.is_file():
            with whole_file(out) as scratch:
                work.write(base.transformer, scratch)
        else:
            with whole_folder(out) as scratch:
                part = scratch / "transformer" if base.whole else scratch
                part.mkdir(exist_ok=True)
                for file in sorted(files):
                    work.write(file, part / file.name)
                _bring_along(base.transformer, part, {file.name for file in files})
                if base.whole:
                    _bring_along(base.whole, scratch, {"transformer"})
    except OSError as error:
        cure = "free some space, or choose another place"
        fail(UNWRITABLE, f"cannot write {out}: {error.strerror or error}", Span(str(out)), cure=cure)
    return Merged(out, len(work.changes), sum(work.changes.values()) / max(1, len(work.changes)))


def _bring_along(source: Path, target: Path, without: set[str]) -> None:
    for item in source.iterdir():
        if item.name in without or item.name.startswith("."):
            continue
        if item.is_dir():
            shutil.copytree(item, target / item.name, copy_function=_link)
        else:
            _link(str(item), str(target / item.name))


def _link(source: str, target: str) -> None:
    real = Path(source).resolve()  # files of the hub's cache are links themselves
    try:
        Path(target).hardlink_to(real)
    except OSError:
        shutil.copy(real, target)


class _Work:
    """The weights that change, and how each tensor of a file is written."""

    def __init__(self, adapter: Adapter, header: Mapping[str, Stored]) -> None:
        self.adapter, self.changes = adapter, dict[str, float]()
        self.scales: dict[str, Tensor] = {}
        # Plain name of a tensor -> its key in its file, and its place.
        self.tensors = {plain_name(key): (key, stored) for key, stored in header.items()}
        self.modules = {name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")}
        self._check()

    def _check(self) -> None:
        problems = Collector()
        cure = "give the base that the adapter was trained on"
        for module, update in self.adapter.updates.items():
            found = self._stored_as(module)
            if found is None:
                problems.add(WRONG_BASE, f"{self.adapter.path}: the base has no {module}", cure=cure)
                continue
            name, times = found
            key, stored = self.tensors[f"{name}.weight"]
            if stored.dtype not in (*_DENSE, "F8_E4M3"):
                message = f"{stored.file}: {key} is stored as {stored.dtype}"
                problems.add(CANNOT_MERGE, message, cure="merge into bf16 or FP8 weights")
            elif (shape := (round(update.shape[0] * times), update.shape[1])) != stored.shape:
                message = f"{module} changes {list(shape)}, and {key} is {list(stored.shape)}"
                problems.add(WRONG_BASE, f"{self.adapter.path}: {message}", cure=cure)
        problems.raise_if_errors()

    def _stored_as(self, module: str) -> tuple[str, float] | None:
        """(the base's own name of a module, how many times the module's rows its tensor has)."""
        own = module.replace("attention.to_out.0", "attention.o")
        for name in (module, own):
            if name in self.modules:
                return name, 1
        attention = attention_of(module)
        if attention is None:
            return None
        fused, parts = attention + QKV, [attention + p for p in PARTS]
        if module == fused:
            return (parts[0], 1 / 3) if set(parts) <= self.modules else None
        return (fused, 3) if fused in self.modules else None

    def write(self, source: Path, target: Path) -> None:
        """Copies a file, with the weights that change changed."""
        here = [(stored, name) for name, (_, stored) in self.tensors.items() if stored.file == source]
        with source.open("rb") as old, target.open("xb") as new:
            _copy(old, new, min(stored.start for stored, _ in here))
            for stored, name in sorted(here, key=lambda item: (item[0].start, item[0].size)):
                changed = self._changed(name)
                if changed is None:
                    old.seek(stored.start)
                    _copy(old, new, stored.size)
                else:
                    content = changed.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    assert len(content) == stored.size, f"{name} changed its size"
                    new.write(content)
            new.flush()
            os.fsync(new.fileno())

    def _changed(self, name: str) -> Tensor | None:
        """The new value of a tensor in its own type; None where it stays as it is."""
        module, is_scale = re.sub(r"\.weight(_scale)?$", "", name), name.endswith(".weight_scale")
        if not (name.endswith(".weight") or is_scale):
            return None
        pieces = list(self._updates(module))
        if not any(update for update, _ in pieces):
            return None
        if is_scale and name in self.scales:
            return self.scales[name]
        weight = self._weight(module)
        rows = zip(weight.chunk(len(pieces)), pieces, strict=True)
        new = torch.cat([_merged(part, *piece) for part, piece in rows])
        norm = float(weight.norm())
        self.changes[module] = float((new - weight).norm()) / norm if norm else 0.0
        key, stored = self.tensors[f"{module}.weight"]
        if stored.dtype != "F8_E4M3":
            values, scale = new.to(_DENSE[stored.dtype]), None
        else:
            values, scale = self._quantise(module, new)
        if not all(t.float().isfinite().all() for t in (weight, new, values)):
            _not_finite(f"{stored.file}: {key}", stored.dtype, weight, self.adapter.path)
        if scale is not None:
            self.scales[f"{module}.weight_scale"] = scale
        return scale if is_scale else values

    def _updates(self, module: str) -> Iterator[tuple[Update | None, int | None]]:
        """For each run of rows of a base's tensor: its update, and which third of that update's rows."""
        updates = self.adapter.updates
        name = re.sub(r"attention\.o$", "attention.to_out.0", module)
        attention = attention_of(name)
        if name in updates or attention is None:
            yield updates.get(name), None
        elif name.endswith(QKV):
            yield from ((updates.get(attention + part), None) for part in PARTS)
        else:
            fused = updates.get(attention + QKV)
            yield fused, PARTS.index(name.removeprefix(attention)) if fused else None

    def _weight(self, module: str) -> Tensor:
        """The base's tensor, float32."""
        values = self._tensor(f"{module}.weight").float()
        if self._is_scaled(module):
            scale = self._tensor(f"{module}.weight_scale").float().flatten()
            values *= scale[:, None] if scale.numel() > 1 else scale
        return values

    def _is_scaled(self, module: str) -> bool:
        here = self.tensors[f"{module}.weight"][1].dtype == "F8_E4M3"
        return here and f"{module}.weight_scale" in self.tensors

    def _tensor(self, name: str) -> Tensor:
        key, stored = self.tensors[name]
        with safe_open(stored.file, "pt") as opened:
            value: Tensor = opened.get_tensor(key)
        return value

    def _quantise(self, module: str, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """e4m3 values, and scales in the shape and type that the base has them; None where it has none."""
        if not self._is_scaled(module):
            return torch.where(weight.abs() <= FP8_MAX, weight, torch.nan).to(FP8), None
        old = self._tensor(f"{module}.weight_scale")
        size = weight.abs().amax(1) if old.numel() > 1 else weight.abs().amax().reshape(1)
        scale = torch.where(size > 0, size / FP8_MAX, 1.0).to(old.dtype)
        values = (weight / scale.float()[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        return values, scale.reshape(old.shape)


def _not_finite(key: str, dtype: str, old: Tensor, adapter: Path | None) -> NoReturn:
    """Which of base and adapter is to blame for numbers that are not finite."""
    if not old.isfinite().all():
        message, cure = f"{key} holds numbers that are not finite", "download the base again"
    else:
        message = f"{key} is {dtype}, and {adapter} makes numbers of it that are too large for that"
        cure = "look at its alpha (ideoflow adapter info), or merge into bf16 weights"
    fail(CANNOT_MERGE, message, cure=cure)


def _merged(weight: Tensor, update: Update | None, third: int | None) -> Tensor:
    if update is None:
        return weight
    if third is None:
        return update.merged(weight)
    try:
        return update.thirds()[third].merged(weight)
    except CannotJoin:  # a Kronecker product whose thirds are none; only a DoRA is more than a sum
        assert not isinstance(update, Lora)
        return weight + update.delta().chunk(3)[third]


def _copy(old: BinaryIO, new: BinaryIO, size: int) -> None:
    while size:
        piece = old.read(min(size, _CHUNK))
        if not piece:
            raise OSError("the base's file ends early")
        new.write(piece)
        size -= len(piece)
