"""Adapter files: reads every form that is about, writes each; damage is told with the file and the key.

Only safetensors is read. A pickle can run anything that its maker wanted, so none is ever opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ideoflow import __version__
from ideoflow.artifacts.names import FUSED, PARTS, QKV, Form, attention_of, read_key, write_key
from ideoflow.artifacts.readers import BASE_NORM
from ideoflow.artifacts.saved_config import METADATA_KEY, PEFT_FILES, SavedConfig, config_in, read_config
from ideoflow.artifacts.updates import CannotJoin, Loha, Lokr, Lora, Update, join
from ideoflow.diagnostics import Collector, Span, fail
from ideoflow.diagnostics.codes.artifacts import CANNOT_CONVERT, DAMAGED_ADAPTER, NOT_AN_ADAPTER, UNWRITABLE
from ideoflow.model.files import read_safetensors_header
from ideoflow.model.forms import unread_file
from ideoflow.resources import whole_folder, write_whole

_FLOATS = {torch.float32, torch.bfloat16, torch.float16, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}  # torch.tensor(16) is one
_REQUIRED = {"lora": {"down", "up"}, "loha": {"w1_a", "w1_b", "w2_a", "w2_b"}}


@dataclass(frozen=True)
class Adapter:
    """An adapter, whatever it was stored as.

    Args:
        updates: by diffusers' module name, or ``layers.N.attention.qkv`` where q, k, v are one.
        form: of the file it came from.
        dtype: of most of its numbers.
        metadata: the file's own.
        config: PEFT's configuration, where one came with it.
    """

    updates: dict[str, Update]
    form: Form
    dtype: torch.dtype
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    config: SavedConfig | None = None

    @property
    def kinds(self) -> list[str]:
        return sorted({u.kind for u in self.updates.values()})


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter file, or PEFT's folder of one.

    Raises:
        IdeoflowError: naming the file and every key that is wrong.
    """
    *beside, file = files_of(path)
    config = read_config(beside[0]) if beside else None
    tensors, metadata = _read_tensors(file)
    config = config or config_in(metadata, file)
    problems = Collector()
    grouped: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    forms: dict[Form, int] = {}
    spelt: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = read_key(name)
        if key is None:
            cure = "adapters for Ideogram 4 have keys like diffusion_model.layers.0.attention.o.lora_A.weight"
            problems.add(DAMAGED_ADAPTER, f"{file}: the key {name} is not known", Span(str(file)), cure=cure)
            continue
        spelt[key.module] = name.removesuffix(f".{key.name}")
        if key.form:
            forms[key.form] = forms.get(key.form, 0) + 1
        if tensor.dtype not in (_FLOATS | _INTEGERS if key.tensor == "alpha" else _FLOATS):
            kind = str(tensor.dtype).removeprefix("torch.")
            _damaged(problems, file, f"{name} holds {kind}, not floating-point numbers")
        elif key.tensor in grouped.setdefault(key.module, {}):
            _damaged(problems, file, f"{name} is there twice, under another name")
        elif not torch.isfinite(tensor).all():
            _damaged(problems, file, f"{name} holds numbers that are not finite")
        if key.kind and kinds.setdefault(key.module, key.kind) != key.kind:
            _damaged(problems, file, f"{name} is of a {key.kind}, and {key.module} has a {kinds[key.module]}")
        grouped.setdefault(key.module, {})[key.tensor] = tensor
    problems.raise_if_errors()
    if not tensors:
        fail(NOT_AN_ADAPTER, f"{file} holds no tensors", Span(str(file)), cure="give an adapter's file")
    base_norm = metadata.get(BASE_NORM) == "base"
    updates = {}
    for module, parts in grouped.items():
        kind = kinds.get(module, "lora")
        if wrong := _wrong(kind, parts):
            _damaged(problems, file, f"{spelt[module]}: {wrong}")
            continue
        try:
            scale = config.scale(module) if config and "alpha" not in parts else None
        except ValueError as error:
            assert config is not None
            message = f"{config.name} gives {spelt[module]} no rank and alpha: {error}"
            _damaged(problems, config.file, message)
            break  # and most others with it
        updates[module] = _update(kind, parts, scale, base_norm)
        rows = updates[module].shape[0]
        if module.endswith(QKV) and rows % 3:
            _damaged(problems, file, f"{spelt[module]} changes {rows} rows, which q, k and v cannot share")
    for module in updates:
        if module.endswith(QKV) and any(f"{attention_of(module)}{p}" in updates for p in PARTS):
            _damaged(problems, file, f"{module} is there as one and in parts")
    problems.raise_if_errors()
    types: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            types[tensor.dtype] = types.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(types, key=lambda t: types[t])
    form = max(forms, key=lambda f: forms[f], default="diffusers")
    return Adapter(dict(sorted(updates.items(), key=_in_order)), form, dtype, metadata, path, config)


def files_of(path: Path) -> list[Path]:
    """An adapter's files, the tensors last: PEFT's configuration lies beside its own.

    Raises:
        IdeoflowError: when the path cannot be looked up.
    """
    try:
        file = path / PEFT_FILES[1] if path.is_dir() else path
        config = file.with_name(PEFT_FILES[0])
        return [config, file] if path.is_dir() or (file.name == PEFT_FILES[1] and config.exists()) else [file]
    except OSError as error:
        cure = "give an adapter's .safetensors file"
        fail(NOT_AN_ADAPTER, f"{path} cannot be read: {error.strerror}", Span(str(path)), cure=cure)


def _in_order(item: tuple[str, Any]) -> tuple[int, str]:
    _, block, leaf = item[0].split(".", 2)
    return int(block), leaf


def _damaged(problems: Collector, file: Path, message: str) -> None:
    cure = "get the file again, or export it again from where it was trained"
    problems.add(DAMAGED_ADAPTER, f"{file}: {message}", Span(str(file)), cure=cure)


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    span = Span(str(file))
    try:
        if unread := unread_file(file):
            cure = "save it as .safetensors with the program that it comes from"
            fail(NOT_AN_ADAPTER, f"{file} is {unread[0]}, which is not opened", span, cure=cure)
        read_safetensors_header(file)
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            return tensors, dict(opened.metadata() or {})
    except FileNotFoundError:
        fail(NOT_AN_ADAPTER, f"there is no adapter {file}", span, cure="give an adapter's .safetensors file")
    except (OSError, ValueError, SafetensorError) as error:
        fail(DAMAGED_ADAPTER, f"{file}: {error}", span, cure="get the file again; it must be safetensors")


def _wrong(kind: str, parts: Mapping[str, Tensor]) -> str:
    """What is wrong with the tensors of a module, in words; empty where nothing is."""
    names = parts.keys() - {"alpha", "lengths"}
    if kind == "lokr":
        missing = []
        for factor in ("w1", "w2"):
            halves = {f"{factor}_a", f"{factor}_b"} & names
            if factor in names and halves:
                return f"{factor} is there as one and in two"
            if factor not in names and len(halves) < 2:
                missing += sorted({f"{factor}_a", f"{factor}_b"} - halves) if halves else [factor]
    else:
        missing = sorted(_REQUIRED[kind] - names)
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if "alpha" in parts and parts["alpha"].numel() != 1:
        return f"alpha has the shape {list(parts['alpha'].shape)}, and is one number"
    odd = [n for n in names if parts[n].ndim != 2 or 0 in parts[n].shape]
    if odd:
        return f"{odd[0]} has the shape {list(parts[odd[0]].shape)}, and is a matrix"
    pairs = {"lora": [("up", "down")], "loha": [("w1_a", "w1_b"), ("w2_a", "w2_b")],
             "lokr": [(f"{w}_a", f"{w}_b") for w in ("w1", "w2") if f"{w}_a" in names]}[kind]  # fmt: skip
    for a, b in pairs:
        if parts[a].shape[1] != parts[b].shape[0]:
            return f"{a} {list(parts[a].shape)} and {b} {list(parts[b].shape)} do not fit together"
    if kind == "loha" and parts["w1_a"].shape[0] != parts["w2_a"].shape[0]:
        return "w1_a and w2_a differ in their rows"
    if kind == "loha" and parts["w1_b"].shape[1] != parts["w2_b"].shape[1]:
        return "w1_b and w2_b differ in their columns"
    if "lengths" in parts:
        if kind != "lora":
            return f"row lengths (dora_scale) beside a {kind} are not supported"
        if parts["lengths"].shape not in ((parts["up"].shape[0],), (parts["up"].shape[0], 1)):
            return f"row lengths have the shape {list(parts['lengths'].shape)}: one number a row is needed"
    return ""


def _update(kind: str, parts: dict[str, Tensor], scale: float | None, base_norm: bool) -> Update:
    alpha = parts.pop("alpha", None)
    lengths = parts.pop("lengths", None)
    made: Update
    if kind == "lora":
        made = Lora(parts["down"], parts["up"])
    else:
        made = Lokr(**parts) if kind == "lokr" else Loha(**parts)
    if alpha is not None and made.rank is not None:  # a LoKr of whole matrices has no rank: readers take 1
        made = replace(made, scale=float(alpha) / made.rank)
    if scale is not None:
        made = replace(made, scale=scale)
    if lengths is not None and isinstance(made, Lora):
        made = replace(made, lengths=lengths.flatten(), base_norm=base_norm)
    return made


# Writing --------------------------------------------------------------------------------------------------


def for_form(
    updates: Mapping[str, Update], form: Form, weight_of: Callable[[str], Tensor] | None = None
) -> dict[str, Update]:
    """The updates with a DoRA's row lengths as a form takes them; others as they are.

    Args:
        weight_of: the base's weight [out, in] by module name; of one qkv, all its rows.

    Raises:
        IdeoflowError: if the base is needed and not there.
    """
    want, made = form in FUSED, dict(updates)

    def weight(module: str) -> Tensor:
        if weight_of is None:
            cure = "give the base that it was trained on: --base PATH"
            fail(CANNOT_CONVERT, f"the row lengths of {module} (DoRA) depend on the base's", cure=cure)
        return weight_of(module)

    for module, update in updates.items():
        if not isinstance(update, Lora) or update.lengths is None:
            continue
        if update.base_norm != want:
            made[module] = update.with_norms(weight(module), base_norm=want)
        attention = attention_of(module)
        if form in FUSED and attention and not module.endswith(QKV):
            for part in (attention + p for p in PARTS):
                if part not in updates:  # its rows keep their own lengths
                    nothing = replace(update, down=update.down[:0], up=update.up[:, :0], base_norm=want)
                    made[part] = replace(nothing, lengths=weight(part).float().norm(dim=1))
    return made


def arrange(adapter: Mapping[str, Update], form: Form, place: str = "the adapter") -> dict[str, Update]:
    """The updates as a form has them: q, k and v as one, or apart.

    Raises:
        IdeoflowError: where there is no exact way.
    """
    arranged: dict[str, Update] = {}
    one = form in FUSED
    for module, update in adapter.items():
        attention = attention_of(module)
        fused = module.endswith(QKV)
        if attention is None or fused == one:
            arranged[module] = update
            continue
        try:
            if fused:
                arranged |= dict(zip((attention + p for p in PARTS), update.thirds(), strict=True))
            elif attention + QKV not in arranged:
                arranged[attention + QKV] = join([adapter.get(attention + p) for p in PARTS])
        except CannotJoin as error:
            to = "one qkv" if one else "q, k and v apart"
            cure = "merge it into the base (ideoflow adapter merge), or make a LoRA of it (adapter resize)"
            fail(CANNOT_CONVERT, f"{place}: {module} cannot be written with {to}: {error}", cure=cure)
    return arranged


def state_dict(updates: Mapping[str, Update], form: Form, dtype: torch.dtype) -> dict[str, Tensor]:
    """Names and tensors of a file; ``updates`` must be arranged for the form.

    Forms of diffusers and PEFT carry no alpha, so a scale is multiplied in; so is that of a LoKr of whole
    matrices, for which readers ignore alpha. In the others ``alpha`` is scale times rank.
    """
    state: dict[str, Tensor] = {}
    for module, update in updates.items():
        if form in ("diffusers", "peft") or update.rank is None:
            update = update.folded()
        tensors = {n: t for n, t in vars(update).items() if isinstance(t, Tensor)}
        for name, tensor in tensors.items():
            if name == "lengths":  # few, and each scales a whole row: kept in full
                tensor = tensor.float()[:, None] if form in FUSED else tensor.float()
            else:
                tensor = tensor.to(dtype)
            # A copy each: q, k and v may share a factor, which safetensors does not store twice.
            state[write_key(form, module, name, update.kind)] = tensor.detach().cpu().contiguous().clone()
        if update.scale != 1 or form == "kohya":
            if update.rank is None:
                continue
            alpha = torch.tensor(update.scale * update.rank, dtype=torch.float32)
            state[write_key(form, module, "alpha", update.kind)] = alpha
    return dict(sorted(state.items()))


def check_output(out: Path, *, folder: bool) -> None:
    """Refuses to write what is there already, or a file that ideoflow would not open.

    Raises:
        IdeoflowError: before anything is read or computed.
    """
    span, cure = Span(str(out)), "choose another name, or remove it"
    try:
        there = out.exists() or out.is_symlink()
    except OSError as error:
        fail(UNWRITABLE, f"cannot write {out}: {error.strerror}", span, cure=cure)
    if there:
        fail(UNWRITABLE, f"{out} is there already", span, cure=cure)
    if not folder and out.suffix not in (".safetensors", ".sft"):
        cure = "end the name with .safetensors: files of another name are not opened"
        fail(UNWRITABLE, f"{out} is no name of a safetensors file", span, cure=cure)


def write_adapter(
    path: Path,
    updates: Mapping[str, Update],
    form: Form,
    dtype: torch.dtype,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter, whole or not at all; in PEFT's form a folder with its configuration.

    Raises:
        IdeoflowError: when the form cannot hold it, or it cannot be written.
    """
    if form == "diffusers" and any(isinstance(u, Loha) for u in updates.values()):
        cure = "use the comfyui, peft or kohya form, or make a LoRA of it with ideoflow adapter resize"
        fail(CANNOT_CONVERT, "diffusers has no reader for a LoHa", Span(str(path)), cure=cure)
    arranged = arrange(updates, form, str(path))
    relative = {u.base_norm for u in arranged.values() if isinstance(u, Lora) and u.lengths is not None}
    if relative and (len(relative) > 1 or (relative == {True} and form not in FUSED)):
        raise ValueError("row lengths must be made relative to the form's norm first")
    facts = {"format": "pt", "ideoflow.version": __version__, **(metadata or {})}
    facts.pop(BASE_NORM, None)
    facts.pop(METADATA_KEY, None)  # of the file that this one comes from
    if relative == {True}:
        facts[BASE_NORM] = "base"
    state = state_dict(arranged, form, dtype)
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            kind = str(tensor.dtype).removeprefix("torch.")
            message = f"{key} would hold numbers that are not finite, or too large for {kind}"
            cure = "use a form that keeps alpha (comfyui, kohya), and look at alpha (ideoflow adapter info)"
            fail(CANNOT_CONVERT, message, Span(str(path)), cure=cure)
    try:
        if form == "peft":
            from ideoflow.artifacts.peft_config import config_of

            config = json.dumps(config_of(arranged), indent=2, sort_keys=True).encode()
            with whole_folder(path) as scratch:
                for name, content in zip(PEFT_FILES, (config, save(state, facts)), strict=True):
                    write_whole(scratch / name, content)
        else:
            write_whole(path, save(state, facts))
    except OSError as error:
        cure = "free some space, or choose another place"
        fail(UNWRITABLE, f"cannot write {path}: {error.strerror or error}", cure=cure)
    return path


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the contents."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 20), b""):
                found.update(chunk)
    return found.hexdigest()
