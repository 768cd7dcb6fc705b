"""Which base model a recipe names, where it lies, and what is known of it without loading it (torch-free)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG, NOT_A_BASE, UNSUPPORTED_FORM
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
_WEIGHTED = ("transformer", "text_encoder", "vae", "unconditional_transformer")
_TRANSFORMER_CLASS = "Ideogram4Transformer2DModel"
_AGAIN = "download or export the model again"
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class BaseFacts:
    """A base model before it is loaded.

    Args:
        name: as the recipe names it.
        folder: where it lies on this disk, or will lie once it is made or downloaded.
        present: whether it is there now.
        storage: form of the transformer's weights in the files: ``bf16``, ``float16``, ``float32``, ``fp8``
            (e4m3 with scales) or ``nf4`` (bitsandbytes).
        digest: changes when the weights change; keys the caches.
        has_unconditional: whether the second transformer, for true asymmetric guidance, is there.
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


def locate_base(
    name: str, *, revision: str | None = None, relative_to: Path = Path(), span: Span | None = None
) -> BaseFacts:
    """Finds a base and reads its configuration; downloads and makes nothing.

    ``name`` is ``nano``, a folder (absolute, or relative to ``relative_to``), or a hub id ``owner/name``.

    Raises:
        IdeoflowError: when it is none of these, or its files cannot be used.
    """
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
    try:
        local = relative_to / Path(name).expanduser()
    except RuntimeError:  # ~ of a user that is not there
        local = relative_to / name
    if name and local.is_dir():
        return read_base(name, local, span)
    if local.is_file():
        fail(
            UNSUPPORTED_FORM,
            f"{local} is a single file",
            span,
            cure="use a folder in diffusers' layout, with model_index.json",
        )
    if name.count("/") == 1 and not name.startswith((".", "~", "/")):
        return _look_in_hub_cache(name, revision, span)
    fail(
        NOT_A_BASE,
        f"there is no base model '{name}'",
        span,
        cure="write 'nano', a folder, or a hub id such as 'owner/name'",
    )


def _look_in_hub_cache(name: str, revision: str | None, span: Span | None) -> BaseFacts:
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
    if isinstance(index, str) and _is_complete(Path(index).parent):
        return read_base(name, Path(index).parent, span)
    # Not (all) downloaded: the sizes of the released model, so that a plan can be made beforehand.
    return BaseFacts(
        name,
        None,
        False,
        TransformerSpec(),
        TextEncoderSpec(),
        VaeSpec(),
        # Published names say in which form the weights are.
        next((form for form in ("fp8", "nf4") if form in name.lower()), "bf16"),
        f"{name}@{revision or 'main'}",
        True,
    )


def _is_complete(folder: Path) -> bool:
    """Whether every part that ``model_index.json`` names is there; an interrupted download has only some."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = {part for part, classes in index.items() if isinstance(classes, list) and any(classes)}
        weighted = named.intersection(_WEIGHTED)
        shards = {part: weight_files(folder / part) for part in weighted}
    except (OSError, ValueError, AttributeError, TypeError):
        return False
    return all((folder / part).is_dir() for part in named) and all(
        files and all(file.is_file() for file in files) for files in shards.values()
    )


def weight_files(part: Path) -> list[Path]:
    """The weight files of a part: those that its index names, else those that are there."""
    for index in part.glob("*.safetensors.index.json"):
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({part / name for name in names})
    return sorted(part.glob("*.safetensors"))


def read_base(name: str, folder: Path, span: Span | None = None) -> BaseFacts:
    """What is known of the base in ``folder``, a folder in diffusers' layout.

    Raises:
        IdeoflowError: when a part is missing, damaged, or in a form that cannot be trained on.
    """
    missing = [c for c in COMPONENTS if not (folder / c).is_dir()]
    if missing or not (folder / "model_index.json").is_file():
        what = f"has no folder {', '.join(missing)}" if missing else "has no model_index.json"
        fail(
            UNSUPPORTED_FORM,
            f"{folder} {what}",
            span,
            cure="a base is a folder in diffusers' layout: model_index.json beside " + ", ".join(COMPONENTS),
        )
    parts = [part for part in _WEIGHTED if (folder / part).is_dir()]
    headers = {part: _headers(folder / part, span) for part in parts}
    configs = {part: _config(folder / part, headers[part], span) for part in parts}
    for part, config in configs.items():
        _check_form(folder / part, config, span)
    text = configs["text_encoder"]
    try:
        specs = (
            TransformerSpec.from_config(configs["transformer"]),
            TextEncoderSpec.from_config(dict(text.get("text_config", text))),
            VaeSpec.from_config(configs["vae"]),
        )
    except (TypeError, ValueError, AttributeError) as error:
        fail(BAD_CONFIG, f"a config.json in {folder} cannot be used: {error}", span, cure=_AGAIN)
    storage = {part: _storage(folder / part, headers[part], span) for part in parts}
    return BaseFacts(
        name,
        folder,
        True,
        *specs,
        storage["transformer"],
        _sampled_digest(folder),
        "unconditional_transformer" in configs,
    )


def _check_form(part: Path, config: Mapping[str, Any], span: Span | None) -> None:
    """Refuses quantisations that cannot be read, and transformers of other models."""
    quantisation = config.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if quantisation and not (method == "bitsandbytes" and _is_transformer(part)):
        fail(
            UNSUPPORTED_FORM,
            f"{part} is quantised with {method or 'an unknown method'}",
            span,
            cure=_cure(part),
        )
    made_for = config.get("_class_name", _TRANSFORMER_CLASS)
    if _is_transformer(part) and made_for != _TRANSFORMER_CLASS:
        fail(
            UNSUPPORTED_FORM,
            f"{part} is a {made_for}, not a transformer of Ideogram 4",
            span,
            cure="give a base of Ideogram 4",
        )


def _is_transformer(part: Path) -> bool:
    return part.name.endswith("transformer")


def _cure(part: Path) -> str:
    if _is_transformer(part):
        return "use weights in bf16, in FP8 (e4m3 with scales), or in bitsandbytes' NF4"
    return "use the bf16 weights in diffusers' layout"


def _config(part: Path, header: Mapping[str, Any], span: Span | None) -> Mapping[str, Any]:
    file = part / "config.json"
    if not file.exists() and _is_transformer(part) and is_original_layout(header):
        try:
            return asdict(infer_transformer(header))
        except (LookupError, ValueError) as error:
            message = f"{file} is missing, and the shapes of the weights do not tell the sizes: {error}"
            fail(BAD_CONFIG, message, span, cure=_AGAIN)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        fail(BAD_CONFIG, f"{file} {reason}", span, cure=_AGAIN)
    if not isinstance(data, dict):
        fail(BAD_CONFIG, f"{file} is not a JSON object", span, cure=_AGAIN)
    return data


def is_original_layout(header: Mapping[str, Any]) -> bool:
    """Whether q, k and v are one tensor, as the model's authors store them."""
    return any(".attention.qkv." in name for name in header)


def infer_transformer(header: Mapping[str, Any]) -> TransformerSpec:
    """The sizes that the shapes of a transformer's dense or FP8 tensors tell.

    Raises:
        LookupError, ValueError: when a tensor that is needed is not there, or of an impossible shape.
    """
    shapes = {re.sub(r"^(?:model\.)?diffusion_model\.", "", n): t["shape"] for n, t in header.items()}
    blocks = {int(match[1]) for n in shapes if (match := re.match(r"layers\.(\d+)\.", n))}
    hidden, channels = shapes["input_proj.weight"]
    (head,) = shapes["layers.0.attention.norm_q.weight"]
    intermediate, _ = shapes["layers.0.feed_forward.w1.weight"]
    _, adaln = shapes["layers.0.adaln_modulation.weight"]
    _, features = shapes["llm_cond_proj.weight"]
    return TransformerSpec(channels, len(blocks), head, hidden // head, intermediate, adaln, features)


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


_DTYPES = {"F32": "float32", "BF16": "bf16", "F16": "float16", "F8_E4M3": "fp8", "I8": "int8"}
_DENSE = ("float32", "bf16", "float16")
_READABLE = (*_DENSE, "fp8", "nf4")
_NF4_MARK = ".weight.quant_state.bitsandbytes__nf4"


def _headers(part: Path, span: Span | None) -> dict[str, Any]:
    """Type, shape and place of every tensor of a part, from the headers of its files."""
    tensors: dict[str, Any] = {}
    file = part
    try:
        for file in weight_files(part):
            tensors |= read_safetensors_header(file)
    except FileNotFoundError:
        fail(BAD_CONFIG, f"{file} is missing", span, cure=_AGAIN)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(BAD_CONFIG, f"{file} cannot be used: {error}", span, cure=_AGAIN)
    if not tensors:
        fail(
            UNSUPPORTED_FORM,
            f"{part} holds no .safetensors file",
            span,
            cure="ideoflow reads safetensors only; it never unpickles a .bin or .pt",
        )
    return tensors


def _storage(part: Path, header: Mapping[str, Any], span: Span | None) -> str:
    """The form that most of a part's bytes have.

    Raises:
        IdeoflowError: when it cannot be read, or scales do not belong to their weights.
    """
    sizes: dict[str, int] = {}
    try:
        for tensor in header.values():
            begin, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
        odd = [name for name in header if name.endswith(".weight_scale") and not _is_scale(name, header)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        fail(BAD_CONFIG, f"a weight file in {part} cannot be used: {error}", span, cure=_AGAIN)
    main = max(sizes, key=lambda k: sizes[k])
    form = _DTYPES.get(main, main)
    if main == "U8" and any(name.endswith(_NF4_MARK) for name in header):
        form = "nf4"
    if form not in (_READABLE if _is_transformer(part) else _DENSE):
        what = "the transformer in " if _is_transformer(part) else ""
        fail(UNSUPPORTED_FORM, f"{what}{part} is stored as {form}", span, cure=_cure(part))
    if odd:
        message = (
            f"{part}: {odd[0]} has the shape {header[odd[0]]['shape']}, which is no scale a row or a tensor"
        )
        fail(UNSUPPORTED_FORM, message, span, cure=_cure(part))
    return form


def _is_scale(name: str, header: Mapping[str, Any]) -> bool:
    """Whether a scale's shape is [], [1], [out] or [out, 1] of the weight that it stands beside."""
    shape, weight = header[name]["shape"], header.get(name.removesuffix("_scale"), {}).get("shape")
    return prod(shape) == 1 or (bool(weight) and prod(shape) == shape[0] == weight[0])


def _sampled_digest(folder: Path) -> str:
    """SHA-256 over names, sizes and evenly spaced samples of every file.

    Hashing 40 GB takes a minute; two checkpoints that differ do so in their headers, sizes or, after further
    training, everywhere, so 16 samples of 64 KiB a file tell them apart.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json") and p.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()


def _samples(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        for i in range(_SAMPLES):
            start = i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1)
            stream.seek(start)
            yield stream.read(_SAMPLE_BYTES)
            if size <= _SAMPLE_BYTES:
                return
