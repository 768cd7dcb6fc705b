"""Whether a part of a base can be trained on: form, configuration, and every tensor's name and shape against
the architecture, told from headers and small files alone (torch-free)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from ideoflow.diagnostics import Diagnostic, IdeoflowError, fail
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.model import BAD_CONFIG, UNSUPPORTED_FORM, WRONG_WEIGHTS
from ideoflow.model.configuration import check_values, read_json
from ideoflow.model.files import AGAIN, Stored, some
from ideoflow.model.forms import (
    FLOATS,
    form_of,
    infer_transformer,
    instead,
    is_original_layout,
    no_number,
    plain_name,
    readable,
)
from ideoflow.model.sides import (
    is_side,
    missing_sides,
    numbers,
    odd_four_bit,
    odd_scales,
    odd_shapes,
    weight_shapes,
)
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec

Header = Mapping[str, Stored]
Spec = TransformerSpec | TextEncoderSpec | VaeSpec
_TRANSFORMER_CLASS = "Ideogram4Transformer2DModel"
_ANOTHER = "download the model again, or give a base of Ideogram 4"
# How adapters' tensors are named, in whatever form.
_ADAPTER = re.compile(r"\.(lora_(A|B|up|down)|lokr_w|hada_w)")
# Autoencoders that are built otherwise have other tensors, which only diffusers' class knows.
_VAE_OPTIONS = {
    "decoder_block_out_channels": None,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


@dataclass(frozen=True)
class Examined:
    """A part's form and sizes, and why it cannot be trained on; ``spec`` is None where nothing tells them.

    ``source`` is the file or folder that told the sizes.
    """

    form: str
    spec: Any
    source: Path
    problems: tuple[Diagnostic, ...] = ()


def examine(part: str, place: Path, header: Header, config: Path | None) -> Examined:
    """What a part is, and everything that is wrong with it, the most fundamental alone.

    Args:
        part: its name in diffusers' layout.
        place: the folder or single file that ``header`` is of.
        config: where its config.json belongs, if anywhere; a transformer's shapes may stand in for it.
    """
    form, spec, source = form_of(header), None, place
    try:
        problems = _form_problems(part, place, header, form)
        if not problems:
            facts, source = _config(part, place, header, config)
            _check_config(part, place, facts)
            check_values(part, facts, source)
            spec = _spec(part, facts)
            _check_layers(spec, place, header, source)
            problems = _misfits(part, place, header, spec, facts) or _number_problems(part, header, form)
    except IdeoflowError as error:
        problems = list(error.diagnostics)
    except OSError as error:
        problems = [Diagnostic(BAD_CONFIG, f"{place} cannot be read: {error}", cure=AGAIN)]
    return Examined(form, spec, source, tuple(problems))


def decoder_prefix(names: Iterable[str]) -> str:
    """What the names of the text encoder's decoder begin with in its files."""
    decoder = "language_model."
    return next((n.partition(decoder)[0] for n in sorted(names) if decoder in n), "") + decoder


def beside_decoder(name: str) -> bool:
    """Whether a text encoder's tensor is of its vision tower or output head, which captions do not need."""
    return "visual." in name or "lm_head." in name


# Forms ----------------------------------------------------------------------------------------------------


def _form_problems(part: str, place: Path, header: Header, form: str) -> list[Diagnostic]:
    """Numbers that cannot be read, or not as what they were."""
    if form not in readable(part):
        return [Diagnostic(UNSUPPORTED_FORM, f"{place} is stored as {form}", cure=_cure(part, form))]
    if missing := missing_sides(header):
        return [_missing(place, header, missing)]
    odd = list(odd_four_bit(header))
    if key := no_number(header):
        odd.append((key, f"is stored as {header[key].dtype}, which no weight is read from"))
    return _odd(header, odd)


def _number_problems(part: str, header: Header, form: str) -> list[Diagnostic]:
    """Scales and statistics that nothing can be computed with, of tensors that fit."""
    if shapes := list(odd_shapes(header)):
        return _odd(header, shapes, UNSUPPORTED_FORM, _cure(part, form))
    return _odd(header, [*odd_scales(header), *(_odd_statistics(header) if part == "vae" else ())])


def _odd(
    header: Header, odd: Sequence[tuple[str, str]], code: Code = WRONG_WEIGHTS, cure: str = _ANOTHER
) -> list[Diagnostic]:
    """A diagnostic of each (name, what is wrong), the first three of many."""
    problems = [Diagnostic(code, f"{header[key].file}: {key} {what}", cure=cure) for key, what in odd]
    if len(problems) > 3:
        problems[2:] = [replace(problems[2], notes=(f"and {len(problems) - 3} more like it",))]
    return problems


def _odd_statistics(header: Header) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of the statistics that latents are normalised with."""
    for name, least in (("bn.running_mean", -math.inf), ("bn.running_var", 0.0)):
        if name not in header:  # of an autoencoder that only diffusers' class knows
            continue
        if header[name].dtype not in FLOATS:
            yield name, f"is stored as {header[name].dtype}, which is no floating point"
            continue
        values = numbers(header[name])
        if not ((values > least) & (values < math.inf)).all():
            yield name, f"holds numbers that are not finite{' or not above 0' if least == 0 else ''}"


def _cure(part: str, form: str) -> str:
    return "use the bf16 weights in diffusers' layout" if part == "vae" else instead(form)


def _missing(place: Path, header: Header, names: Iterable[str]) -> Diagnostic:
    files = {stored.file for stored in header.values()}
    where = files.pop() if len(files) == 1 else place
    return Diagnostic(WRONG_WEIGHTS, f"{where}: tensors are missing: {some(names)}", cure=_ANOTHER)


# Configurations -------------------------------------------------------------------------------------------


def _config(part: str, place: Path, header: Header, file: Path | None) -> tuple[Mapping[str, Any], Path]:
    """A part's configuration and what tells it; that of a transformer may be told by its shapes, or lie with
    its parts."""
    there = file is not None and file.exists()
    if part.endswith("transformer") and (
        file is None or place.is_file() or (not there and is_original_layout(header))
    ):
        try:
            inferred = asdict(infer_transformer(weight_shapes(header)))
        except (KeyError, ValueError) as error:
            if not there:
                _no_sizes(place, header, error)
        else:
            if file is not None and there:
                _same_sizes(part, place, inferred, file)
            return inferred, place
    assert file is not None
    return read_json(file), file


def _no_sizes(place: Path, header: Header, error: Exception) -> NoReturn:
    """Why a transformer without a config.json does not tell its sizes."""
    names = {plain_name(name) for name in header}
    if names & TransformerSpec().tensors().keys():
        if isinstance(error, KeyError):
            raise IdeoflowError(_missing(place, header, error.args)) from None
        fail(WRONG_WEIGHTS, f"{place}: {error}", cure=_ANOTHER)
    if any(_ADAPTER.search(name) for name in names):
        message = f"{place} is an adapter, not a transformer"
        fail(WRONG_WEIGHTS, message, cure=f"ideoflow adapter info {place}")
    fail(WRONG_WEIGHTS, f"{place} is no transformer of Ideogram 4", cure=_ANOTHER)


def _same_sizes(part: str, place: Path, inferred: Mapping[str, Any], file: Path) -> None:
    """A single file and the config.json among its parts must be of one model."""
    config = read_json(file)
    check_values(part, config, file)
    if other := [k for k, v in inferred.items() if k in config and config[k] != v]:
        message = f"{place} has {other[0]} = {inferred[other[0]]}, and {file} says {config[other[0]]}"
        fail(WRONG_WEIGHTS, message, cure="give model.parts of the same model as the file")


def _check_config(part: str, place: Path, config: Mapping[str, Any]) -> None:
    """Refuses quantisations that cannot be read, and transformers of other models."""
    quantisation = config.get("quantization_config")
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if quantisation and not (method == "bitsandbytes" and part != "vae"):
        message = f"{place} is quantised with {method or 'an unknown method'}"
        fail(UNSUPPORTED_FORM, message, cure=_cure(part, str(method).upper()))
    made_for = config.get("_class_name", _TRANSFORMER_CLASS)
    if part.endswith("transformer") and made_for != _TRANSFORMER_CLASS:
        message = f"{place} is a {made_for}, not a transformer of Ideogram 4"
        fail(UNSUPPORTED_FORM, message, cure="give a base of Ideogram 4")


def _check_layers(spec: Spec, place: Path, header: Header, source: Path) -> None:
    """Refuses more layers than there are tensors, before names are made for all of them."""
    for key in ("num_layers", "num_hidden_layers", "layers_per_block"):
        if (count := getattr(spec, key, 0)) > len(header):
            message = f"{source}: {key} is {count}, and {place} has {len(header)} tensors in all"
            fail(WRONG_WEIGHTS, message, cure=_ANOTHER)


def _spec(part: str, config: Mapping[str, Any]) -> Spec:
    if part == "text_encoder":
        return TextEncoderSpec.from_config(config.get("text_config", {}))
    return (VaeSpec if part == "vae" else TransformerSpec).from_config(config)


# Tensors --------------------------------------------------------------------------------------------------


def _misfits(
    part: str, place: Path, header: Header, spec: Spec, config: Mapping[str, Any]
) -> list[Diagnostic]:
    """Tensors that the architecture has and the files have not, that it has not, or of another shape."""
    wanted = spec.tensors()
    keys = {key: key for key in header if not is_side(key)}
    optional: set[str] = set()
    if isinstance(spec, VaeSpec):
        if any(config.get(option, usual) != usual for option, usual in _VAE_OPTIONS.items()):
            return []
    elif isinstance(spec, TextEncoderSpec):
        prefix = decoder_prefix(header)
        wanted = {prefix + name: shape for name, shape in wanted.items()}
        keys = {key: key for key in keys if not beside_decoder(key)}
    else:
        keys = {plain_name(key): key for key in keys}
        if is_original_layout(header):
            wanted = _fused(wanted)
        if part != "transformer":  # it sees no text
            optional = {name for name in wanted if name.startswith("llm_cond_")}
    shapes = weight_shapes(header)
    problems = []
    if missing := wanted.keys() - keys.keys() - optional:
        problems.append(_missing(place, header, missing))
    extra = {key: key for name, key in keys.items() if name not in wanted}
    odd = {
        key: f"{key} ({list(shapes[key])}, not {list(wanted[name])})"
        for name, key in keys.items()
        if name in wanted and shapes[key] != wanted[name]
    }
    for what, found in (("not known", extra), ("of the wrong shape", odd)):
        for file in sorted({header[key].file for key in found}):
            names = some(text for key, text in found.items() if header[key].file == file)
            problems.append(Diagnostic(WRONG_WEIGHTS, f"{file}: tensors are {what}: {names}", cure=_ANOTHER))
    return problems


def _fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same tensors under the original names."""
    fused = {}
    for name, shape in shapes.items():
        if ".to_q." in name:
            fused[name.replace("to_q", "qkv")] = (3 * shape[0], *shape[1:])
        elif ".to_k." not in name and ".to_v." not in name:
            fused[name.replace("to_out.0", "o")] = shape
    return fused
