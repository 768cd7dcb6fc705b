"""What ``images`` of a source names, and what the keys of one source may say together."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from ideoflow.diagnostics import Collector
from ideoflow.diagnostics.codes.recipe import BAD_VALUE, IMPOSSIBLE_PAIR, MISSING_KEY, NO_SUCH_PATH
from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.recipe.convert import Report
from ideoflow.recipe.places import Path
from ideoflow.recipe.settings import SourceSettings

if TYPE_CHECKING:
    from ideoflow.recipe.load import Recipe

HUB_PREFIX = "hf://datasets/"
# Files that hold pictures or lists of them; their rows may have columns, a shard's members may have sidecars.
TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
SHARD_SUFFIX = ".tar"

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


# Megapixels that stand for the squares that people mean by them, as SimpleTuner reads them.
_SQUARES = {0.25: 512, 0.5: 768, 1.0: 1024, 2.0: 1536, 4.0: 2048}
LEAST_MEGAPIXELS, MOST_MEGAPIXELS = 0.004, 4.2
_SIZES = {f.name: f.metadata for f in fields(SourceSettings) if "megapixels" in f.metadata}


def side_of(megapixels: float) -> float:
    """The side in pixels of a square of so many megapixels."""
    for round_number, side in _SQUARES.items():
        if abs(megapixels - round_number) < 0.05:
            return side
    return math.sqrt(megapixels * 1e6)


def on_grid(side: float) -> int:
    """The nearest side that ``resolution`` may be."""
    return max(64, min(2048, round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN))


def in_pixels(table: Mapping[str, Any], kind: Any, at: Path, report: Report) -> dict[str, Any]:
    """A table of pictures' settings; where ``kind``, its resolution_type, is 'area', with sizes in pixels.

    Args:
        at: the table's place, under which sizes that are no megapixels are reported.
    """
    made = dict(table)
    if kind != "area":
        return made
    made["resolution_type"] = "pixel_area"
    for key, value in table.items():
        if key not in _SIZES or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = LEAST_MEGAPIXELS if _SIZES[key]["minimum"] else 0
        if least <= value <= MOST_MEGAPIXELS:
            made[key] = on_grid(side_of(value)) if key == "resolution" else round(side_of(value))
        else:
            message = f"'{key}' is {value} megapixels, as resolution_type = 'area' counts"
            cure = "write 1.0 for one megapixel, or resolution_type = 'pixel_area' for sides in pixels"
            report(BAD_VALUE, (*at, key), message, cure, f"from {least} to {MOST_MEGAPIXELS}")
            del made[key]
    return made


def matching_files(folder: FilePath, pattern: str) -> list[FilePath]:
    """Files that ``pattern``, a path or a glob relative to ``folder``, names; sorted.

    ``{000..012}`` and ``{a,b}`` are written out first, as in names of WebDataset shards.
    """
    with contextlib.suppress(OSError):  # too long for a name, as a list in braces may be
        if (folder / pattern).is_file():  # also a name with brackets, which a glob would read as a set
            return [folder / pattern]
    return sorted({file for plain in _without_braces(pattern) for file in _glob(folder, plain)})


def is_folder(path: FilePath) -> bool:
    """Whether a folder is there; a path that is too long names none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _glob(folder: FilePath, pattern: str) -> list[FilePath]:
    root = FilePath(pattern).anchor
    base, rest = (FilePath(root), pattern[len(root) :]) if root else (folder, pattern)
    try:
        return [p for p in base.glob(rest) if p.is_file()]
    except (ValueError, OSError):  # no pattern at all, ** inside a name, or too long for one
        return []


def _without_braces(pattern: str) -> Iterator[str]:
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, words = match.groups()
    if words is not None:
        middles = words.split(",")
    else:
        # More numbers than any data set has shards are a slip of the finger.
        numbers = range(int(first), min(int(last), int(first) + 1_000_000) + 1)
        middles = [str(n).zfill(len(first)) for n in numbers]
    for middle in middles:
        yield from _without_braces(pattern[: match.start()] + middle + pattern[match.end() :])


def check_images(recipe: Recipe, number: int, source: SourceSettings, problems: Collector) -> None:
    """Reports ``images`` that names nothing, and a wrong ``image_folder``; the hub is not asked."""
    images, beside = source.images, source.image_folder
    whole = images.startswith(HUB_PREFIX) or is_folder(recipe.folder / images)
    no_list = whole or images.endswith(SHARD_SUFFIX)
    if beside is not None and (no_list or not is_folder(recipe.folder / beside)):
        message = "image_folder is set, but images is no list" if no_list else f"'{beside}' is no folder"
        cure = "image_folder is where the paths in a list begin, relative to the recipe's own folder"
        code = IMPOSSIBLE_PAIR if no_list else NO_SUCH_PATH
        problems.add(code, message, recipe.source_span(number, "image_folder"), cure=cure)
    if whole:
        return
    span = recipe.source_span(number, "images")
    files = matching_files(recipe.folder, images)
    if not files:
        many = any(c in images for c in "*?[{")
        message = f"no file matches '{images}'" if many else f"{recipe.folder / images} does not exist"
        cure = "paths in a recipe are relative to the recipe's own folder"
        problems.add(NO_SUCH_PATH, message, span, cure=cure)
    elif odd := [f for f in files if f.suffix.lower() not in (*TABLE_SUFFIXES, SHARD_SUFFIX)]:
        message = f"{odd[0]} is a file, not a folder, a list of pictures or a shard of them"
        cure = f"lists are {', '.join(TABLE_SUFFIXES)}, shards {SHARD_SUFFIX} files"
        problems.add(NO_SUCH_PATH, message, span, cure=cure)
    elif len({f.suffix.lower() == SHARD_SUFFIX for f in files}) > 1:
        cure = "make two sources of them: [[data.source]]"
        problems.add(NO_SUCH_PATH, f"'{images}' names shards and lists alike", span, cure=cure)


def check_source(recipe: Recipe, number: int, source: SourceSettings, problems: Collector) -> None:
    """Reports keys of one source that contradict each other."""

    def contradiction(key: str, message: str, cure: str) -> None:
        span = recipe.source_span(number, key)
        if not any(d.span == span and d.message == message for d in problems):  # a default of many sources
            problems.add(IMPOSSIBLE_PAIR, message, span, cure=cure)

    if source.caption == "instance" and not source.instance_prompt:
        contradiction(
            "caption",
            "caption = 'instance' needs an instance_prompt",
            "add instance_prompt = ..., or use caption = 'sidecar'",
        )
    if source.caption != "instance" and source.instance_prompt is not None:
        contradiction(
            "instance_prompt",
            f"instance_prompt is set, but caption = '{source.caption}' takes captions from elsewhere",
            "set caption = 'instance', or remove it",
        )
    if source.caption == "filename" and not recipe.tables.captions.wrap:
        problems.add(
            IMPOSSIBLE_PAIR,
            "names of files are plain text, which wrap = false makes an error",
            recipe.span("captions.wrap"),
            cure="set wrap = true, or data.caption = 'sidecar'",
        )
    if source.caption_column is not None and source.caption in ("instance", "filename"):
        contradiction(
            "caption_column",
            f"caption_column is set, but caption = '{source.caption}' takes captions from elsewhere",
            "set caption = 'column', or remove it",
        )
    if source.crop_variants > 1 and source.crop != "random" and source.aspect != "random":
        contradiction(
            "crop_variants",
            f"{source.crop_variants} crops of each picture would all be the same",
            "set crop = 'random' or aspect = 'random', or remove crop_variants",
        )
    if source.crop == "off" and source.aspect != "preserve":
        contradiction(
            "crop",
            f"without a crop, aspect = '{source.aspect}' would distort the pictures",
            "use crop = 'center', or aspect = 'preserve'",
        )
    if source.maximum_image_size is not None and source.target_downsample_size is None:
        contradiction(
            "maximum_image_size",
            "maximum_image_size needs target_downsample_size, the size to scale larger pictures down to",
            f"add target_downsample_size = {source.resolution}",
        )
    if source.target_downsample_size is not None and source.crop == "off":
        contradiction(
            "target_downsample_size",
            "target_downsample_size cuts a part out of each picture, and crop = 'off' keeps all of it",
            "remove it, or set crop = 'center'",
        )
    if not source.aspects or not all(1 / 16 <= a <= 16 for a in source.aspects):
        span = recipe.source_span(number, "aspects")
        cure = "for example aspects = [1.0, 0.75, 1.5]"
        problems.add(BAD_VALUE, "aspects must be numbers from 1/16 to 16", span, cure=cure)


def check_shares(recipe: Recipe, problems: Collector) -> None:
    """Reports what the sources may not say beside each other."""
    data = recipe.tables.data
    weighted = [n for n, s in enumerate(data.source) if s.weight is not None]
    for number, source in enumerate(data.source):
        if not source.images:
            problems.add(
                MISSING_KEY,
                f"source {number + 1} has no images",
                recipe.span(f"data.source.{number}"),
                cure="add images = ... to it, or to [data] for all",
            )
        if weighted and source.weight is None:
            problems.add(
                IMPOSSIBLE_PAIR,
                f"source {number + 1} has no weight, and source {weighted[0] + 1} has one",
                recipe.span(f"data.source.{number}"),
                cure="give every source a weight, or none",
            )
        if source.weight is not None and source.repeats > 1:
            problems.add(
                IMPOSSIBLE_PAIR,
                "weight says how much a source is trained, and so do repeats",
                recipe.source_span(number, "repeats"),
                cure="use one of them",
            )
    names = [s.name or s.images for s in data.source]
    for number, name in enumerate(names):
        if name in names[:number]:
            problems.add(
                BAD_VALUE,
                f"two sources are called '{name}'",
                recipe.span(f"data.source.{number}"),
                cure="give each a name of its own: name = ...",
            )
