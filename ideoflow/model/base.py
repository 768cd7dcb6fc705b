"""Which base model a recipe names, where it lies, and what is known of it without loading it (torch-free)."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span, fail
from ideoflow.diagnostics.codes.model import NO_PARTS, NO_REVISION, NOT_A_BASE, UNSUPPORTED_FORM
from ideoflow.model.configuration import read_json
from ideoflow.model.digest import sampled_digest
from ideoflow.model.files import part_headers, weight_files
from ideoflow.model.fit import Examined, examine
from ideoflow.model.forms import unread_file
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.model.together import mismatches
from ideoflow.model.tokens import largest_id
from ideoflow.resources import user_cache

NANO = "nano"
NANO_VERSION = 1
NANO_TRANSFORMER = TransformerSpec(
    in_channels=128,
    num_layers=6,
    attention_head_dim=32,
    num_attention_heads=6,
    intermediate_size=512,
    adaln_dim=64,
    llm_features_dim=13 * 32,
)
NANO_TEXT = TextEncoderSpec(
    hidden_size=32,
    num_hidden_layers=36,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    intermediate_size=64,
    vocab_size=1024,
)
NANO_VAE = VaeSpec(block_out_channels=(16, 32, 32, 32), layers_per_block=1, latent_channels=32)

# What a base in diffusers' layout has, apart from the scheduler; the second transformer may be absent.
COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae")
PIPELINE = "Ideogram4Pipeline"
# What a single file leaves out: all but the transformers.
PARTS = ("text_encoder", "tokenizer", "vae")
# An id that huggingface_hub takes without question; of others it says itself what is wrong.
_WORDS = r"[A-Za-z0-9]+(?:[-_.][A-Za-z0-9]+)*"
_HUB_ID = re.compile(rf"(?!.*\.git$){_WORDS}/{_WORDS}")
WEIGHTED = ("transformer", "text_encoder", "vae", "unconditional_transformer")


@dataclass(frozen=True)
class BaseFacts:
    """A base model before it is loaded.

    Args:
        name: as the recipe names it.
        folder: where it lies on this disk, or will lie once it is made or downloaded.
        present: whether it is there now.
        storage: form of the transformer's weights in the files: ``bf16``, ``float16``, ``float32``, ``fp8``
            (e4m3 with scales) or ``nf4`` (bitsandbytes).
        digest: changes when the weights change.
        has_unconditional: whether the second transformer, for true asymmetric guidance, is there.
        files: single files that take the place of a part's folder.
        parts: where the parts beside a single file come from, as the recipe says; None for a whole base.
    """

    name: str
    folder: Path | None
    present: bool
    transformer: TransformerSpec
    text_encoder: TextEncoderSpec
    vae: VaeSpec
    storage: str
    digest: str
    has_unconditional: bool
    files: Mapping[str, Path] = field(default_factory=dict)
    parts: str | None = None


def locate_base(
    name: str,
    *,
    revision: str | None = None,
    parts: str | None = None,
    relative_to: Path = Path(),
    span: Span | None = None,
) -> BaseFacts:
    """Finds a base and reads its configuration; downloads and makes nothing.

    ``name`` is ``nano``, a folder (absolute, or relative to ``relative_to``), a hub id ``owner/name``, or a
    single file with a transformer, here or on the hub (``owner/name/path/x.safetensors``). The other parts of
    the latter are in the base that ``parts`` names, or beside it; ``revision`` is of what is from the hub, of
    ``name`` if both are.

    Raises:
        IdeoflowError: when it is none of these, or its files cannot be used.
    """
    file = _local(name, relative_to)
    remote = hub_file(name, relative_to)
    if remote:
        file = _cached(*remote, revision, name, span) or file
    single = file.is_file() or remote is not None
    if parts is not None and not single:
        fail(
            NO_PARTS,
            f"'{name}' is no single file, and needs no model.parts",
            span,
            cure="remove model.parts, or give a .safetensors file as model.base",
        )
    if revision is not None and not (remote or _is_hub_id(parts or "" if single else name, relative_to)):
        cure = "remove model.revision: only what comes from the hub has revisions"
        fail(
            NO_REVISION, f"revision is '{revision}', and nothing of '{name}' is from the hub", span, cure=cure
        )
    if file.is_file():
        return _single_file(name, file, parts, None if remote else revision, relative_to, span)
    if remote:
        if parts is None:
            _no_parts(name, span)
        if not (_local(parts, relative_to).is_dir() or _is_hub_id(parts, relative_to)):
            locate_base(parts, relative_to=relative_to, span=span)
        digest = f"{name}@{revision or 'main'}+{parts}"
        return replace(_released(name, digest), has_unconditional=False, parts=parts)
    if name == NANO:
        folder = user_cache() / f"nano-{NANO_VERSION}"
        present = (folder / "model_index.json").is_file()
        return BaseFacts(
            NANO,
            folder,
            present,
            NANO_TRANSFORMER,
            NANO_TEXT,
            NANO_VAE,
            "float32",
            f"nano-{NANO_VERSION}",
            True,
        )
    if name and file.is_dir():
        return read_base(name, file, span)
    if _is_hub_id(name, relative_to):
        return _look_in_hub_cache(name, revision, span)
    fail(
        NOT_A_BASE,
        f"there is no base model '{name}'",
        span,
        cure="write 'nano', a folder, a .safetensors file, a hub id such as 'owner/name', or a file on the "
        "hub such as 'owner/name/file.safetensors'",
    )


def _local(name: str, relative_to: Path) -> Path:
    try:
        return relative_to / Path(name).expanduser()
    except RuntimeError:  # ~ of a user that is not there
        return relative_to / name


def _is_hub_id(name: str, relative_to: Path) -> bool:
    plain = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    return plain and not _local(name, relative_to).exists()


def hub_file(name: str, relative_to: Path) -> tuple[str, str] | None:
    """(repository, file in it) of ``owner/name/path/x.safetensors``; None for what is not so, or is here."""
    owner, repository, file = (*name.split("/", 2), "", "")[:3]
    if not (owner and repository and file.endswith((".safetensors", ".sft"))) or name.startswith((".", "~")):
        return None
    return None if _local(name, relative_to).exists() else (f"{owner}/{repository}", file)


def _single_file(
    name: str, file: Path, parts: str | None, revision: str | None, relative_to: Path, span: Span | None
) -> BaseFacts:
    """A transformer in one file, with the other parts of another base, or of the file's own folder."""
    if unread := unread_file(file):
        fail(UNSUPPORTED_FORM, f"{file} is {unread[0]}", span, cure=unread[1])
    files = {"transformer": file}
    other = file.with_name(re.sub(r"(?i)^(ideogram-?_?4)", r"\1_unconditional", file.name))
    if other != file and other.is_file():
        files["unconditional_transformer"] = other
    beside = all((file.parent / part).is_dir() for part in PARTS)
    if parts is None and not beside:
        _no_parts(str(file), span)
    if parts is None:
        return read_base(name, file.parent, span, files=files)
    if parts and _local(parts, relative_to).is_dir():
        return read_base(name, _local(parts, relative_to), span, files=files, parts=parts)
    companion = (
        _look_in_hub_cache(parts, revision, span, PARTS)
        if _is_hub_id(parts, relative_to)
        else locate_base(parts, relative_to=relative_to, span=span)
    )
    if companion.present and companion.folder is not None:
        return read_base(name, companion.folder, span, files=files, parts=parts)
    found = _examined(files, None, span)
    if companion.folder is not None:  # nano, which is not made yet
        for part, spec in (("text_encoder", companion.text_encoder), ("vae", companion.vae)):
            found[part] = Examined(companion.storage, spec, companion.folder / part / "config.json")
        _refuse(mismatches(found), span)
    transformer = found["transformer"]
    return replace(
        companion,
        name=name,
        transformer=transformer.spec,
        storage=transformer.form,
        digest=f"{sampled_digest(None, files)}+{companion.digest}",
        has_unconditional=len(files) > 1,
        files=files,
        parts=parts,
    )


def _no_parts(file: str, span: Span | None) -> NoReturn:
    fail(
        NO_PARTS,
        f"{file} holds the transformer alone, and text encoder, tokenizer and autoencoder are needed too",
        span,
        cure=f"set model.parts to a base that has them, such as 'ideogram-ai/ideogram-4-fp8', or put the "
        f"folders {', '.join(PARTS)} beside the file",
    )


def _look_in_hub_cache(
    name: str, revision: str | None, span: Span | None, only: tuple[str, ...] = ()
) -> BaseFacts:
    """A hub id, present if all of it, or of the parts ``only``, was downloaded before."""
    index = _cached(name, "model_index.json", revision, name, span)
    folder = index.parent if index and _is_complete(index.parent, only) else None
    if folder is not None and not only:
        return read_base(name, folder, span)
    released = _released(name, f"{name}@{revision or 'main'}")
    return replace(released, folder=folder, present=folder is not None)


def _cached(repository: str, file: str, revision: str | None, name: str, span: Span | None) -> Path | None:
    """A file of a repository that was downloaded before; ``name`` is how the recipe says it."""
    # huggingface_hub costs 0.3 s to import, so it is only asked about what it might have.
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    if len(repository) < 96 and _HUB_ID.fullmatch(repository) and not folder.exists():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, file, revision=revision)
    except HFValidationError:
        fail(
            NOT_A_BASE,
            f"'{name}' is neither here nor a hub id",
            span,
            cure="a hub id is 'owner/name' of letters, digits and . - _",
        )
    return Path(found) if isinstance(found, str) else None


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads: its ``constants.HF_HUB_CACHE``, without importing it."""
    if settled := sys.modules.get("huggingface_hub.constants"):
        return Path(settled.HF_HUB_CACHE)
    home = os.environ.get("HF_HOME", f"{os.environ.get('XDG_CACHE_HOME', '~/.cache')}/huggingface")
    folder = os.environ.get("HF_HUB_CACHE", os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(folder)).expanduser()


def _released(name: str, digest: str) -> BaseFacts:
    """A base that is not (all) here, with the released model's sizes, so that it can be planned."""
    # Published names say in which form the weights are.
    form = next((form for form in ("fp8", "nf4") if form in name.lower()), "bf16")
    sizes = TransformerSpec(), TextEncoderSpec(), VaeSpec()
    return BaseFacts(name, None, False, *sizes, form, digest, has_unconditional=True)


def _is_complete(folder: Path, only: tuple[str, ...] = ()) -> bool:
    """Whether every part that ``model_index.json`` names is there; an interrupted download has only some."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = {part for part, classes in index.items() if isinstance(classes, list) and any(classes)}
        named = named.intersection(only) if only else named
        weighted = named.intersection(WEIGHTED)
        shards = {part: weight_files(folder / part) for part in weighted}
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return all((folder / part).is_dir() for part in named) and all(
        files and all(file.is_file() for file in files) for files in shards.values()
    )


def read_base(
    name: str,
    folder: Path,
    span: Span | None = None,
    *,
    files: Mapping[str, Path] | None = None,
    parts: str | None = None,
) -> BaseFacts:
    """What is known of the base in ``folder``, a folder in diffusers' layout.

    Args:
        files: single files in place of some of the parts' folders.
        parts: as in :class:`BaseFacts`.

    Raises:
        IdeoflowError: when a part is missing, damaged, or in a form that cannot be trained on.
    """
    files = files or {}
    check_layout(folder, files, span)
    # Beside single files, a second transformer from somewhere else would be of another model.
    second = () if files and "unconditional_transformer" not in files else ("unconditional_transformer",)
    places = {part: files.get(part, folder / part) for part in (*WEIGHTED[:3], *second)}
    places = {part: place for part, place in places.items() if place.exists()}
    found = _examined(places, folder, span)
    _refuse(mismatches(found, largest_id(folder / "tokenizer", span)), span)
    transformer, text_encoder, vae = (found[part] for part in WEIGHTED[:3])
    return BaseFacts(
        name,
        folder,
        True,
        transformer.spec,
        text_encoder.spec,
        vae.spec,
        transformer.form,
        sampled_digest(folder, files, PARTS if files else ()),
        "unconditional_transformer" in found,
        dict(files),
        parts,
    )


def check_components(
    place: Path | str,
    names: Collection[str],
    files: Collection[str] = (),
    span: Span | None = None,
    cure: str = "",
) -> None:
    """Refuses what lacks a part of a base in diffusers' layout, told from the names in it.

    Args:
        place: a folder or hub id, for the message.
        names: of its folders and files.
        files: the parts that single files stand for.
        cure: what to do instead of giving a base in diffusers' layout.

    Raises:
        IdeoflowError: naming what is not there.
    """
    missing = [part for part in COMPONENTS if part not in files and part not in names]
    if missing or not (files or "model_index.json" in names):
        what = f"has no folder {', '.join(missing)}" if missing else "has no model_index.json"
        layout = "a base is a folder in diffusers' layout: model_index.json beside " + ", ".join(COMPONENTS)
        fail(UNSUPPORTED_FORM, f"{place} {what}", span, cure=cure or layout)


def check_layout(folder: Path, files: Collection[str] = (), span: Span | None = None) -> None:
    """Refuses a folder that is no base, as :func:`check_components` says, or of another pipeline."""
    names = {path.name for path in folder.iterdir() if path.is_dir() or path.name == "model_index.json"}
    check_components(folder, names, files, span)
    index = folder / "model_index.json"
    if index.name in names:
        made_for = str(read_json(index, span).get("_class_name", PIPELINE))
        if not made_for.startswith("Ideogram4"):
            message = f"{index}: _class_name is {made_for}, and a base of Ideogram 4 has {PIPELINE}"
            fail(UNSUPPORTED_FORM, message, span, cure="give a base of Ideogram 4")
    if (scheduler := folder / "scheduler" / "scheduler_config.json").exists():
        read_json(scheduler, span)  # it is built in the midst of training, for the first samples


def _examined(places: Mapping[str, Path], folder: Path | None, span: Span | None) -> dict[str, Examined]:
    """All parts, each with its configuration in ``folder`` if it needs one.

    Raises:
        IdeoflowError: with everything that keeps them from being trained on.
    """
    found = {
        part: examine(part, place, part_headers(place, span), folder and folder / part / "config.json")
        for part, place in places.items()
    }
    _refuse([problem for part in found.values() for problem in part.problems], span)
    return found


def _refuse(problems: Sequence[Diagnostic], span: Span | None) -> None:
    if problems:
        raise IdeoflowError([replace(problem, span=span) for problem in problems])
