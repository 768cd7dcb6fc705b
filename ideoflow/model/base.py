"""Which base model a recipe names, where it lies, and what is known of it without loading it (torch-free)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    vocab_size=384,
)
NANO_VAE = VaeSpec(block_out_channels=(16, 32, 32, 32), layers_per_block=1, latent_channels=32)

# What a base in diffusers' layout has, apart from the scheduler.
COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class BaseFacts:
    """A base model before it is loaded.

    Args:
        name: as the recipe names it.
        folder: where it lies on this disk, or will lie once it is made or downloaded.
        present: whether it is there now.
        storage: type of the transformer's weights in the files: ``bf16``, ``float32``, ...
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
    local = relative_to / Path(name).expanduser()
    if local.is_dir():
        return _read_folder(name, local, span)
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

    index = try_to_load_from_cache(name, "model_index.json", revision=revision)
    if isinstance(index, str):
        return _read_folder(name, Path(index).parent, span)
    # Not downloaded: the sizes of the released model, so that a plan can be made beforehand.
    return BaseFacts(
        name,
        None,
        False,
        TransformerSpec(),
        TextEncoderSpec(),
        VaeSpec(),
        "bf16",
        f"{name}@{revision or 'main'}",
        True,
    )


def _read_folder(name: str, folder: Path, span: Span | None) -> BaseFacts:
    missing = [c for c in COMPONENTS if not (folder / c).is_dir()]
    if missing or not (folder / "model_index.json").is_file():
        what = f"has no folder {', '.join(missing)}" if missing else "has no model_index.json"
        fail(
            UNSUPPORTED_FORM,
            f"{folder} {what}",
            span,
            cure="a base is a folder in diffusers' layout: model_index.json beside " + ", ".join(COMPONENTS),
        )
    transformer = _config(folder / "transformer" / "config.json", span)
    if transformer.get("quantization_config"):
        method = transformer["quantization_config"].get("quant_method", "an unknown method")
        fail(
            UNSUPPORTED_FORM,
            f"the transformer of {folder} is quantised with {method}",
            span,
            cure="use the bf16 weights in diffusers' layout",
        )
    text = _config(folder / "text_encoder" / "config.json", span)
    storage = _storage(folder / "transformer", span)
    try:
        return BaseFacts(
            name,
            folder,
            True,
            TransformerSpec.from_config(transformer),
            TextEncoderSpec.from_config(text.get("text_config", text)),
            VaeSpec.from_config(_config(folder / "vae" / "config.json", span)),
            storage,
            _sampled_digest(folder),
            (folder / "unconditional_transformer").is_dir(),
        )
    except (TypeError, ValueError) as error:
        fail(
            BAD_CONFIG,
            f"a config.json in {folder} cannot be used: {error}",
            span,
            cure="download or export the model again",
        )


def _config(file: Path, span: Span | None) -> Mapping[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        fail(BAD_CONFIG, f"{file} {reason}", span, cure="download or export the model again")
    if not isinstance(data, dict):
        fail(BAD_CONFIG, f"{file} is not a JSON object", span, cure="download or export the model again")
    return data


def read_safetensors_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: 8 bytes of little-endian length, then the JSON.

    Raises:
        ValueError: when the file is cut or is something else.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("not a safetensors file")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file")
    tensors = {k: v for k, v in header.items() if k != "__metadata__"}
    end = max((t["data_offsets"][1] for t in tensors.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"cut short: {size} bytes where its header promises {8 + length + end}")
    return tensors


_DTYPES = {"F32": "float32", "BF16": "bf16", "F16": "float16", "F8_E4M3": "fp8"}


def _storage(folder: Path, span: Span | None) -> str:
    """The type that most of the transformer's bytes have."""
    sizes: dict[str, int] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            for tensor in read_safetensors_header(file).values():
                begin, end = tensor["data_offsets"]
                sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - begin
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(
                BAD_CONFIG, f"{file} cannot be used: {error}", span, cure="download or export the model again"
            )
    if not sizes:
        fail(
            UNSUPPORTED_FORM,
            f"{folder} holds no .safetensors file",
            span,
            cure="ideoflow reads safetensors only; it never unpickles a .bin or .pt",
        )
    main = max(sizes, key=lambda k: sizes[k])
    if main not in ("F32", "BF16", "F16"):
        fail(
            UNSUPPORTED_FORM,
            f"the transformer in {folder} is stored as {_DTYPES.get(main, main)}",
            span,
            cure="use the bf16 weights in diffusers' layout",
        )
    return _DTYPES[main]


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
