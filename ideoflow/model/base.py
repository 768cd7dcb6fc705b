"""Which base model a recipe names, where it lies, and what is known of it without loading it (torch-free)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import (
    BAD_CONFIG,
    NO_PARTS,
    NO_REVISION,
    NOT_A_BASE,
    UNSUPPORTED_FORM,
    WRONG_WEIGHTS,
)
from ideoflow.model.digest import sampled_digest
from ideoflow.model.forms import (
    form_of,
    infer_transformer,
    instead,
    is_original_layout,
    lost_half,
    no_number,
    odd_scale,
    readable,
    unread_file,
)
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
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
# What a single file leaves out: all but the transformers.
PARTS = ("text_encoder", "tokenizer", "vae")
WEIGHTED = ("transformer", "text_encoder", "vae", "unconditional_transformer")
_TRANSFORMER_CLASS = "Ideogram4Transformer2DModel"
_AGAIN = "download or export the model again"


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
    single file with a transformer. The other parts of the latter are in the base that ``parts`` names, or
    beside it; ``revision`` is of the hub id, whichever of the two it is.

    Raises:
        IdeoflowError: when it is none of these, or its files cannot be used.
    """
    file = _local(name, relative_to)
    single = file.is_file()
    if parts is not None and not single:
        fail(
            NO_PARTS,
            f"'{name}' is no single file, and needs no model.parts",
            span,
            cure="remove model.parts, or give a .safetensors file as model.base",
        )
    if revision is not None and not _is_hub_id(parts or "" if single else name, relative_to):
        cure = "remove model.revision: only what comes from the hub has revisions"
        fail(
            NO_REVISION, f"revision is '{revision}', and nothing of '{name}' is from the hub", span, cure=cure
        )
    if single:
        return _single_file(name, file, parts, revision, relative_to, span)
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
        cure="write 'nano', a folder, a .safetensors file, or a hub id such as 'owner/name'",
    )


def _local(name: str, relative_to: Path) -> Path:
    try:
        return relative_to / Path(name).expanduser()
    except RuntimeError:  # ~ of a user that is not there
        return relative_to / name


def _is_hub_id(name: str, relative_to: Path) -> bool:
    plain = name.count("/") == 1 and not name.startswith((".", "~", "/"))
    return plain and not _local(name, relative_to).exists()


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
        fail(
            NO_PARTS,
            f"{file} holds the transformer alone, and text encoder, tokenizer and autoencoder are needed too",
            span,
            cure=f"set model.parts to a base that has them, such as 'ideogram-ai/ideogram-4-fp8', or put the "
            f"folders {', '.join(PARTS)} beside the file",
        )
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
    header = part_headers(file, span)
    storage = _storage("transformer", file, header, span)
    try:
        spec = infer_transformer(header)
    except (LookupError, ValueError):  # 4-bit weights have no shapes; the parts bring a config.json
        spec = companion.transformer
    return replace(
        companion,
        name=name,
        transformer=spec,
        storage=storage,
        digest=f"{sampled_digest(None, files)}+{companion.digest}",
        has_unconditional=len(files) > 1,
        files=files,
        parts=parts,
    )


def _look_in_hub_cache(
    name: str, revision: str | None, span: Span | None, only: tuple[str, ...] = ()
) -> BaseFacts:
    """A hub id, present if all of it, or of the parts ``only``, was downloaded before."""
    # huggingface_hub costs 0.3 s to import and is only needed for hub ids.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    except HFValidationError:
        fail(
            NOT_A_BASE,
            f"'{name}' is neither a folder nor a hub id",
            span,
            cure="a hub id is 'owner/name' of letters, digits and . - _",
        )
    folder = Path(index).parent if isinstance(index, str) else None
    here = folder is not None and _is_complete(folder, only)
    if here and folder is not None and not only:
        return read_base(name, folder, span)
    # Not (all) downloaded: the sizes of the released model, so that a plan can be made beforehand.
    return BaseFacts(
        name,
        folder if here else None,
        here,
        TransformerSpec(),
        TextEncoderSpec(),
        VaeSpec(),
        # Published names say in which form the weights are.
        next((form for form in ("fp8", "nf4") if form in name.lower()), "bf16"),
        f"{name}@{revision or 'main'}",
        True,
    )


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


def weight_files(part: Path) -> list[Path]:
    """The weight files of a part: those that its index names, else those that are there; or itself."""
    if part.is_file():
        return [part]
    for index in part.glob("*.safetensors.index.json"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({part / name for name in names})
    return sorted(part.glob("*.safetensors"))


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
    missing = [c for c in COMPONENTS if c not in files and not (folder / c).is_dir()]
    if missing or not (files or (folder / "model_index.json").is_file()):
        what = f"has no folder {', '.join(missing)}" if missing else "has no model_index.json"
        fail(
            UNSUPPORTED_FORM,
            f"{folder} {what}",
            span,
            cure="a base is a folder in diffusers' layout: model_index.json beside " + ", ".join(COMPONENTS),
        )
    # Beside single files, a second transformer from somewhere else would be of another model.
    second = () if files and "unconditional_transformer" not in files else ("unconditional_transformer",)
    places = {part: files.get(part, folder / part) for part in (*WEIGHTED[:3], *second)}
    places = {part: place for part, place in places.items() if place.exists()}
    headers = {part: part_headers(place, span) for part, place in places.items()}
    configs = {part: _config(part, place, headers[part], folder, span) for part, place in places.items()}
    for part, config in configs.items():
        _check_form(part, places[part], config, span)
    text = configs["text_encoder"]
    try:
        specs = (
            TransformerSpec.from_config(configs["transformer"]),
            TextEncoderSpec.from_config(dict(text.get("text_config", text))),
            VaeSpec.from_config(configs["vae"]),
        )
    except (TypeError, ValueError, AttributeError) as error:
        fail(BAD_CONFIG, f"a config.json in {folder} cannot be used: {error}", span, cure=_AGAIN)
    storage = {part: _storage(part, place, headers[part], span) for part, place in places.items()}
    return BaseFacts(
        name,
        folder,
        True,
        *specs,
        storage["transformer"],
        sampled_digest(folder, files, PARTS if files else ()),
        "unconditional_transformer" in configs,
        dict(files),
        parts,
    )


def _check_form(part: str, place: Path, config: Mapping[str, Any], span: Span | None) -> None:
    """Refuses quantisations that cannot be read, and transformers of other models."""
    quantisation = config.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if quantisation and not (method == "bitsandbytes" and part != "vae"):
        fail(
            UNSUPPORTED_FORM,
            f"{place} is quantised with {method or 'an unknown method'}",
            span,
            cure=_cure(part, str(method).upper()),
        )
    made_for = config.get("_class_name", _TRANSFORMER_CLASS)
    if part.endswith("transformer") and made_for != _TRANSFORMER_CLASS:
        fail(
            UNSUPPORTED_FORM,
            f"{place} is a {made_for}, not a transformer of Ideogram 4",
            span,
            cure="give a base of Ideogram 4",
        )


def _cure(part: str, form: str) -> str:
    return "use the bf16 weights in diffusers' layout" if part == "vae" else instead(form)


def _config(
    part: str, place: Path, header: Mapping[str, Any], folder: Path, span: Span | None
) -> Mapping[str, Any]:
    """A part's configuration; that of a transformer may be told by its shapes, or lie with its parts."""
    file = folder / part / "config.json"
    if place.is_file() or (not file.exists() and part.endswith("transformer") and is_original_layout(header)):
        try:
            inferred = asdict(infer_transformer(header))
        except (LookupError, ValueError) as error:
            if not (place.is_file() and file.exists()):
                missing = f"{place} comes without a config.json" if place.is_file() else f"{file} is missing"
                message = f"{missing}, and the shapes of the weights do not tell the sizes: {error}"
                fail(BAD_CONFIG, message, span, cure=_AGAIN)
        else:
            if place.is_file() and file.exists():
                _same_sizes(place, inferred, file, span)
            return inferred
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        fail(BAD_CONFIG, f"{file} {reason}", span, cure=_AGAIN)
    if not isinstance(data, dict):
        fail(BAD_CONFIG, f"{file} is not a JSON object", span, cure=_AGAIN)
    return data


def _same_sizes(place: Path, inferred: Mapping[str, Any], file: Path, span: Span | None) -> None:
    """A single file and the config.json among its parts must be of one model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        other = [k for k, v in inferred.items() if k in config and config[k] != v]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        fail(BAD_CONFIG, f"{file} cannot be read: {error}", span, cure=_AGAIN)
    if other:
        message = f"{place} has {other[0]} = {inferred[other[0]]}, and {file} says {config[other[0]]}"
        fail(WRONG_WEIGHTS, message, span, cure="give model.parts of the same model as the file")


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """What the header of a safetensors file says of its tensors; raises like :func:`safetensors_header`."""
    return safetensors_header(file)[0]


def safetensors_header(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a safetensors file: 8 bytes of little-endian length, then JSON.

    Raises:
        ValueError: when the file is cut or is something else.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("not a safetensors file, or cut short")
        try:
            header = json.loads(stream.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            tensors = dict(header)
            end = max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError):
            raise ValueError("not a safetensors file") from None
    if 8 + length + end != size:
        raise ValueError(f"cut short: {size} bytes where its header promises {8 + length + end}")
    return tensors, metadata


def data_start(file: Path, tensors: Mapping[str, Any]) -> int:
    """The byte from which a header's offsets count, given what :func:`safetensors_header` tells."""
    return file.stat().st_size - max((int(t["data_offsets"][1]) for t in tensors.values()), default=0)


def part_headers(place: Path, span: Span | None = None) -> dict[str, Any]:
    """Type, shape and place of every tensor of a part, from the headers of its files.

    Raises:
        IdeoflowError: when there are none, or one is cut or no safetensors.
    """
    tensors: dict[str, Any] = {}
    file = place
    try:
        for file in weight_files(place):
            if unread := unread_file(file):
                fail(UNSUPPORTED_FORM, f"{file} is {unread[0]}", span, cure=unread[1])
            tensors |= read_safetensors_header(file)
    except FileNotFoundError:
        fail(BAD_CONFIG, f"{file} is missing", span, cure=_AGAIN)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(BAD_CONFIG, f"{file} cannot be used: {error}", span, cure=_AGAIN)
    if not tensors:
        fail(
            UNSUPPORTED_FORM,
            f"{place} holds no .safetensors file",
            span,
            cure="ideoflow reads safetensors only; it never unpickles a .bin or .pt",
        )
    return tensors


def _storage(part: str, place: Path, header: Mapping[str, Any], span: Span | None) -> str:
    """The form that most of a part's bytes have.

    Raises:
        IdeoflowError: when it cannot be read, or scales do not belong to their weights.
    """
    try:
        form, odd, untyped, lost = form_of(header), odd_scale(header), no_number(header), lost_half(header)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        fail(BAD_CONFIG, f"a weight file in {place} cannot be used: {error}", span, cure=_AGAIN)
    if form not in readable(part):
        what = "the transformer in " if part.endswith("transformer") else ""
        fail(UNSUPPORTED_FORM, f"{what}{place} is stored as {form}", span, cure=_cure(part, form))
    if lost:
        fail(WRONG_WEIGHTS, f"{place}: tensors are missing: {lost}", span, cure=_AGAIN)
    if odd:
        message = f"{place}: {odd} has the shape {header[odd]['shape']}, which is no scale a row or a tensor"
        fail(UNSUPPORTED_FORM, message, span, cure=_cure(part, form))
    if untyped:
        message = f"{place}: {untyped} is stored as {header[untyped]['dtype']}, which is no floating point"
        fail(WRONG_WEIGHTS, message, span, cure=_AGAIN)
    return form
