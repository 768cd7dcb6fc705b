"""What there is to train on: pictures, their captions, the size each is trained at (torch-free).

Only headers of pictures are read here; damaged pixels are found when they are decoded.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ideoflow.captions import (
    CompiledCaption,
    CompileResult,
    check_caption,
    compile_caption,
    fill_placeholders,
    read_json_caption,
    to_json,
    wrap_text,
)
from ideoflow.captions.boxes import Geometry, transform_caption
from ideoflow.data.buckets import bucket_size, center_crop
from ideoflow.data.pictures import (
    PICTURE_SUFFIXES,
    Stored,
    find_pictures,
    open_picture,
    shown_size,
    stored_identity,
)
from ideoflow.diagnostics import Collector, Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes.data import EMPTY_DATASET, NO_CAPTION, NO_PICTURE, NOT_JSON, UPSCALED
from ideoflow.plan.document import Bucket, DataSummary
from ideoflow.recipe import Recipe
from ideoflow.recipe.load import matching_files

CAPTION_SUFFIXES = (".icap", ".json", ".txt")
# One caption file for a whole folder, each caption under its picture's name.
FOLDER_CAPTIONS = "captions.icap"
# Characters of canonical caption JSON per token of Qwen's tokenizer, and tokens of the chat template; only
# used where the tokenizer itself is not at hand.
_CHARACTERS_PER_TOKEN, _TEMPLATE_TOKENS = 3.4, 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture in one crop, with its caption, at the size it is trained at.

    Args:
        picture: where its bytes are.
        size: (width, height) in pixels after cropping and resizing.
        geometry: what happens to the pixels; the boxes of every caption have already followed it.
        caption: canonical JSON.
        alternatives: further captions of the same crop.
    """

    picture: Stored
    size: tuple[int, int]
    geometry: Geometry
    caption: str
    alternatives: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption of this crop."""
        return (self.caption, *self.alternatives)


@dataclass(frozen=True, slots=True)
class Share:
    """The samples of one source, and how often they are drawn.

    Sample ``first + picture * variants + variant`` is crop number ``variant`` of picture number ``picture``.
    One that may not be mirrored has its plain crop in the place of the mirrored one, so that every picture of
    a source has as many variants and none is drawn less than another.

    Args:
        name: the source's, as the recipe gives it.
        first: its first sample.
        pictures: how many pictures it has.
        variants: crops of each; one visit of a picture trains one of them.
        repeats: visits of each picture in an epoch.
        weight: its part in training against the weights of the others; None: its pictures times ``repeats``.
    """

    name: str
    first: int
    pictures: int
    variants: int = 1
    repeats: int = 1
    weight: float | None = None


@dataclass(frozen=True)
class Dataset:
    """Everything that a recipe trains on, and what is worth knowing of it."""

    samples: tuple[Sample, ...]
    warnings: tuple[Diagnostic, ...]
    shares: tuple[Share, ...]

    def summary(self, folder: Path) -> DataSummary:
        """Counts for the plan; ``folder`` makes the digest independent of where the data lies."""
        sizes = Counter(s.size for s in self.samples)
        tokens = sorted(estimate_tokens(s.caption) for s in self.samples)
        digest = hashlib.sha256()
        for s in self.samples:
            name, size = stored_identity(s.picture, folder)
            digest.update(
                json.dumps([name, size, s.size, s.geometry.window, s.geometry.flip, s.captions]).encode()
            )
        return DataSummary(
            pictures=len(self.samples),
            warnings=len(self.warnings),
            buckets=tuple(Bucket(w, h, n) for (w, h), n in sorted(sizes.items())),
            text_tokens=(tokens[0], int(statistics.median(tokens)), tokens[-1]),
            text_tokens_estimated=True,
            digest=digest.hexdigest(),
        )


def estimate_tokens(caption: str) -> int:
    """Tokens of a canonical caption in the chat template, from its length alone."""
    return round(len(caption) / _CHARACTERS_PER_TOKEN) + _TEMPLATE_TOKENS


def survey(recipe: Recipe) -> DataSummary:
    """Counts of the recipe's dataset, for the plan.

    Raises:
        IdeoflowError: when there is nothing to train on, or something in it is wrong.
    """
    return read_dataset(recipe).summary(recipe.folder / recipe.tables.data.images)


def read_dataset(recipe: Recipe) -> Dataset:
    """Finds every picture with its caption.

    Raises:
        IdeoflowError: with up to 20 problems: no pictures, unreadable ones, missing or wrong captions.
    """
    folder = recipe.folder / recipe.tables.data.images
    pictures = find_pictures(folder)
    problems = Collector()
    if not pictures:
        known = ", ".join(sorted(PICTURE_SUFFIXES))
        problems.add(
            EMPTY_DATASET,
            f"there are no pictures in {folder}",
            recipe.span("data.images"),
            cure=f"put pictures there ({known}), or name another folder",
        )
        problems.raise_if_errors()
    captions = _Captions(recipe, problems)
    samples = []
    for picture in pictures:
        size = _picture_size(picture, problems)
        caption = captions.of(picture, size)
        if size is not None and caption is not None:
            samples.append(_sample(recipe, picture, size, caption, problems))
    if recipe.tables.data.caption == "sidecar":
        _report_orphans(recipe, pictures, captions, problems)
    problems.raise_if_errors()
    share = Share(recipe.tables.data.images, 0, len(samples))
    return Dataset(tuple(samples), tuple(problems.items), (share,))


def _picture_size(picture: Path, problems: Collector) -> tuple[int, int] | None:
    try:
        with open_picture(picture) as image:
            return shown_size(image)
    except IdeoflowError as error:
        problems.extend(error.diagnostics)
        return None


def _sample(
    recipe: Recipe, picture: Path, size: tuple[int, int], caption: Mapping[str, Any], problems: Collector
) -> Sample:
    data = recipe.tables.data
    bucket = bucket_size(*size, data.resolution, data.aspect)
    geometry = center_crop(*size, bucket)
    left, _, right, _ = geometry.window
    scale = bucket[0] / (right - left)
    if scale > data.upscale_limit:
        problems.add(
            UPSCALED,
            f"{picture.name} ({size[0]}x{size[1]}) is enlarged {scale:.1f} times to {bucket[0]}x{bucket[1]}",
            Span(str(picture)),
            cure="use a larger original, or lower data.resolution",
        )
    followed = transform_caption(dict(caption), geometry, path=str(picture))
    problems.extend(followed.diagnostics)
    assert followed.caption is not None, "a crop alone is never refused"
    return Sample(picture, bucket, geometry, to_json(followed.caption))


class _Captions:
    """Finds the caption of each picture, as ``data.caption`` says."""

    def __init__(self, recipe: Recipe, problems: Collector) -> None:
        self.recipe, self.problems = recipe, problems
        self.named: set[Path] = set()  # pictures that a captions.icap names
        self._folders: dict[Path, dict[str, CompiledCaption]] = {}
        self._instances: dict[tuple[int, int] | None, CompileResult] = {}
        self._told: set[Diagnostic] = set()

    def of(self, picture: Path, size: tuple[int, int] | None) -> Mapping[str, Any] | None:
        way = self.recipe.tables.data.caption
        if way == "instance":
            return self._instance(size)
        if way == "filename":
            words = picture.stem.replace("_", " ").replace("-", " ")
            if any("\ud800" <= c <= "\udfff" for c in words):  # Python's stand-ins for other encodings
                shown = words.encode("utf-8", "replace").decode()
                message = f"the name '{shown}' is no valid UTF-8, and so no caption"
                self.problems.add(NO_CAPTION, message, Span(str(picture.parent)), cure="rename the picture")
                return None
            return self._only(
                read_caption(words, str(picture), ".txt", self.recipe, size), Span(str(picture))
            )
        return self._sidecar(picture, size)

    def _instance(self, size: tuple[int, int] | None) -> Mapping[str, Any] | None:
        span = self.recipe.span("data.instance_prompt")
        if size not in self._instances:
            text = self.recipe.tables.data.instance_prompt or ""
            result = read_caption(
                text, str(self.recipe.path), _kind_of(text), self.recipe, size, self.recipe.folder
            )
            # Lines of the prompt are no lines of the recipe: what is wrong stands at the prompt as a whole.
            found = tuple(replace(d, span=span) for d in result.diagnostics)
            self._instances[size] = replace(result, diagnostics=found)
        return self._only(self._instances[size], span)

    def _sidecar(self, picture: Path, size: tuple[int, int] | None) -> Mapping[str, Any] | None:
        for suffix in CAPTION_SUFFIXES:
            file = picture.with_suffix(suffix)
            if file.is_file():
                return self._only(read_caption_file(file, self.recipe, size), Span(str(file)))
        shared = self.of_folder(picture.parent).get(picture.name)
        if shared is not None:
            return shared.caption
        cure = f"write {picture.stem}.icap (or .json, .txt) beside it, or set data.caption"
        self.problems.add(NO_CAPTION, f"{picture.name} has no caption", Span(str(picture)), cure=cure)
        return None

    def of_folder(self, folder: Path) -> dict[str, CompiledCaption]:
        """The captions in a folder's captions.icap, by picture."""
        if folder not in self._folders:
            file = folder / FOLDER_CAPTIONS
            found: dict[str, CompiledCaption] = {}
            if file.is_file():
                result = read_caption_file(file, self.recipe, None)
                self._report(result.diagnostics)
                found = {c.name: c for c in result.captions if c.name}
                self.named |= {folder / name for name in found}
            self._folders[folder] = found
        return self._folders[folder]

    def _only(self, result: CompileResult, span: Span) -> Mapping[str, Any] | None:
        self._report(result.diagnostics)
        if len(result.captions) == 1:
            return result.captions[0].caption
        if not any(d.is_error for d in result.diagnostics):
            message = f"one caption was expected here, not {len(result.captions)}"
            cure = f"captions of several pictures go into {FOLDER_CAPTIONS}, each under its picture's name"
            self.problems.add(NO_CAPTION, message, span, cure=cure)
        return None

    def _report(self, diagnostics: tuple[Diagnostic, ...]) -> None:
        # One caption serves many pictures with data.caption = 'instance': its faults are told once.
        # Notes, which say how a caption could be better, are for `captions check`.
        self.problems.extend(d for d in diagnostics if d not in self._told and d.severity != "note")
        self._told.update(diagnostics)
        if len(self.problems.errors) >= self.problems.limit:
            self.problems.raise_if_errors()


def _kind_of(text: str) -> str:
    """How to read a caption that has no suffix: JSON, caption language, or prose."""
    if text.lstrip().startswith("{"):
        return ".json"
    return ".icap" if "\n" in text.strip() else ".txt"


def read_caption_file(file: Path, recipe: Recipe, size: tuple[int, int] | None) -> CompileResult:
    """Captions of one file, by its suffix."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        message = f"{file} cannot be read: {reason}"
        problem = Diagnostic(NO_CAPTION, message, Span(str(file)), "save it as UTF-8 text")
        return CompileResult((), (problem,))
    kind = ".json" if text.lstrip().startswith("{") else file.suffix.lower()
    return read_caption(text, str(file), kind, recipe, size, file.parent)


def read_caption(
    text: str,
    path: str,
    kind: str,
    recipe: Recipe,
    size: tuple[int, int] | None,
    base_dir: Path | None = None,
) -> CompileResult:
    """Captions of one text: ``.icap``, ``.json``, or ``.txt`` for prose."""
    placeholders = recipe.tables.captions.placeholders
    if kind == ".json":
        return _filled(read_json_caption(text, path=path), placeholders)
    if kind == ".icap":
        return compile_caption(text, path=path, placeholders=placeholders, image_size=size, base_dir=base_dir)
    if not recipe.tables.captions.wrap:
        problem = Diagnostic(
            NOT_JSON,
            f"{path} is plain text, and captions.wrap is off",
            Span(path),
            cure="write it as .icap or JSON, or set wrap = true in [captions]",
        )
        return CompileResult((), (problem,))
    caption = wrap_text(text)
    problems = check_caption(caption, path=path)
    compiled = CompiledCaption(None, caption, to_json(caption), Span(path))
    return _filled(CompileResult((compiled,), tuple(problems)), placeholders)


def _filled(result: CompileResult, placeholders: Mapping[str, str]) -> CompileResult:
    """The captions with the recipe's placeholders filled in, as compiling does it for caption language."""
    filled = (fill_placeholders(c.caption, placeholders) for c in result.captions)
    captions = (replace(c, caption=f, json=to_json(f)) for c, f in zip(result.captions, filled, strict=True))
    return replace(result, captions=tuple(captions))


def _report_orphans(recipe: Recipe, pictures: list[Path], captions: _Captions, problems: Collector) -> None:
    """Reports captions without a picture, in the folders that hold pictures."""
    stems = {p.with_suffix("") for p in pictures}
    for folder in sorted({p.parent for p in pictures}):
        captions.of_folder(folder)
        for file in sorted(p for p in folder.iterdir() if p.suffix in CAPTION_SUFFIXES and p.is_file()):
            if file.name == FOLDER_CAPTIONS or file.with_suffix("") in stems:
                continue
            # A file of shared styles has no caption of its own, and not every .json is one.
            if read_caption_file(file, recipe, None).captions:
                problems.add(
                    NO_PICTURE,
                    f"{file.name} has no picture of that name",
                    Span(str(file)),
                    cure="rename it after its picture, or remove it",
                )
    for picture in sorted(captions.named - set(pictures)):
        problems.add(
            NO_PICTURE,
            f"{FOLDER_CAPTIONS} names {picture.name}, which is not there",
            Span(str(picture.parent / FOLDER_CAPTIONS)),
            cure="add the picture, or remove its caption",
        )


@dataclass(frozen=True)
class Prompt:
    """A caption to sample pictures of."""

    name: str
    caption: str


def read_prompts(recipe: Recipe) -> tuple[Prompt, ...]:
    """The captions that ``validate.prompts`` names, in order.

    Raises:
        IdeoflowError: when a file cannot be read or compiled.
    """
    problems = Collector()
    files = {
        f: None for pattern in recipe.tables.validate.prompts for f in matching_files(recipe.folder, pattern)
    }
    found: list[Prompt] = []
    for file in files:
        result = read_caption_file(file, recipe, None)
        problems.extend(result.diagnostics)
        found += [Prompt(c.name or file.stem, c.json) for c in result.captions]
    problems.raise_if_errors()
    counts = Counter(p.name for p in found)
    return tuple(
        Prompt(f"{p.name}-{number}", p.caption) if counts[p.name] > 1 else p
        for number, p in enumerate(found, 1)
    )
