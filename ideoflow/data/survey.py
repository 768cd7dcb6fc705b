"""What there is to train on: pictures, their captions, the size each is trained at (torch-free).

Only headers of pictures are read here; damaged pixels are found when they are decoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ideoflow.captions import to_json
from ideoflow.captions.boxes import Geometry, obstacles, transform_caption
from ideoflow.captions.pool import ordered_map
from ideoflow.data.buckets import crop, enlargement, measure, share_cut_away
from ideoflow.data.headers import Size, read_sizes
from ideoflow.data.pictures import Stored, container
from ideoflow.data.sources import find_entries
from ideoflow.data.texts import CaptionFinder, Entry, read_caption_file
from ideoflow.diagnostics import Collector, Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes.caption_tools import WORKER_DIED
from ideoflow.diagnostics.codes.data import EMPTY_DATASET, LEFT_OUT, NOT_MIRRORED, UPSCALED
from ideoflow.plan.document import Bucket, DataSummary
from ideoflow.recipe import Recipe
from ideoflow.recipe.sources import matching_files

# Characters of canonical caption JSON per token of Qwen's tokenizer, and tokens of the chat template; only
# used where the tokenizer itself is not at hand.
_CHARACTERS_PER_TOKEN, _TEMPLATE_TOKENS = 3.4, 8
# Pictures that one process looks at before it tells what it found; sets that are no larger need one process.
_PART = 4096
_PROCESSES = 8
# Warnings of one kind that are told one by one: random crops of many pictures give many of them.
_ALIKE = 3


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
        root: the folder that the names of its pictures are relative to.
    """

    name: str
    first: int
    pictures: int
    variants: int = 1
    repeats: int = 1
    weight: float | None = None
    root: Path = Path()


@dataclass(frozen=True)
class Dataset:
    """Everything that a recipe trains on, and what is worth knowing of it."""

    samples: tuple[Sample, ...]
    warnings: tuple[Diagnostic, ...]
    shares: tuple[Share, ...]

    def summary(self) -> DataSummary:
        """Counts for the plan. The digest does not change with the place where the data lies."""
        sizes: dict[tuple[int, int], list[Sample]] = {}
        tokens: list[int] = []
        digest = hashlib.sha256()
        for share in self.shares:
            facts: list[Any] = [share.pictures, share.variants, share.repeats, share.weight]
            digest.update(json.dumps(facts).encode())
            for s in self.samples[share.first : share.first + share.pictures * share.variants]:
                sizes.setdefault(s.size, []).append(s)
                tokens += map(estimate_tokens, s.captions)
                facts = [*_identity(s.picture, share.root), s.size, s.geometry.window, s.geometry.flip]
                digest.update(json.dumps([*facts, s.captions]).encode())
        return DataSummary(
            pictures=sum(share.pictures for share in self.shares),
            warnings=sum(d.severity == "warning" for d in self.warnings),
            buckets=tuple(_bucket(size, samples) for size, samples in sorted(sizes.items())),
            text_tokens=(min(tokens), int(statistics.median(tokens)), max(tokens)),
            text_tokens_estimated=True,
            digest=digest.hexdigest(),
        )


def _bucket(size: tuple[int, int], samples: Sequence[Sample]) -> Bucket:
    crops = {(s.picture, s.geometry) for s in samples}  # a crop that stands for its mirror image counts once
    cut = statistics.fmean(share_cut_away(geometry) for _, geometry in crops)
    enlarged = sum(enlargement(size, geometry) > 1 + 1e-9 for _, geometry in crops)
    return Bucket(*size, len(crops), round(cut, 6), enlarged)


def _identity(picture: Stored, root: Path) -> tuple[str, int]:
    """A picture's name within its source, and the size of the file that holds it."""
    file = container(picture)
    inside = str(picture)[len(str(file)) :]
    try:
        length = file.stat().st_size
    except OSError:
        length = 0  # told when its pixels are read
    return Path(os.path.relpath(file, root)).as_posix() + inside, length


def estimate_tokens(caption: str) -> int:
    """Tokens of a canonical caption in the chat template, from its length alone."""
    return round(len(caption) / _CHARACTERS_PER_TOKEN) + _TEMPLATE_TOKENS


def read_dataset(recipe: Recipe, say: Callable[[str], None] = lambda _: None) -> Dataset:
    """Finds every picture of every source with its captions, and cuts it to size.

    Args:
        say: told what takes long.

    Raises:
        IdeoflowError: with up to 20 problems: no pictures, unreadable ones, missing or wrong captions.
    """
    problems = Collector(alike=_ALIKE)
    samples: list[Sample] = []
    shares = []
    for number, source in enumerate(recipe.tables.data.sources):
        found = find_entries(recipe, number, problems, say)
        problems.raise_if_errors()
        first, told = len(samples), set[Diagnostic]()
        left_out = not_mirrored = 0
        for part in _read_parts(recipe, number, found.entries):
            samples += part.samples
            left_out, not_mirrored = left_out + part.left_out, not_mirrored + part.not_mirrored
            # What several crops or pictures have in common is told once.
            problems.extend(d for d in dict.fromkeys(part.problems) if d not in told)
            told.update(part.problems)
            if len(problems.errors) >= problems.limit:
                problems.raise_if_errors()
        if source.caption in ("auto", "sidecar"):
            CaptionFinder(recipe, number, problems).report_orphans(found.entries)
        problems.raise_if_errors()
        _report_counts(recipe, number, len(found.entries), left_out, not_mirrored, problems)
        variants = source.crop_variants * (2 if source.flip else 1)
        pictures = (len(samples) - first) // variants
        name = source.name or source.images
        shares.append(Share(name, first, pictures, variants, source.repeats, source.weight, found.root))
    problems.raise_if_errors()
    problems.settle()
    return Dataset(tuple(samples), tuple(problems.items), tuple(shares))


@dataclass(frozen=True)
class _Part:
    """What became of some pictures of a source."""

    samples: list[Sample]
    problems: list[Diagnostic]
    left_out: int
    not_mirrored: int


def _read_parts(recipe: Recipe, number: int, entries: Sequence[Entry]) -> Iterator[_Part]:
    """Every part in order; in several processes where there are several."""
    work, done = partial(_read_part, recipe, number), 0
    try:
        for (part,) in ordered_map(work, entries, jobs=min(_PROCESSES, os.cpu_count() or 1), chunk=_PART):
            done += 1
            yield part
    except IdeoflowError as error:
        if error.diagnostics[0].code is not WORKER_DIED:
            raise
        # Out of memory, or a script without a main guard: one process can do it as well.
        for (part,) in ordered_map(work, entries[done * _PART :], jobs=1, chunk=_PART):
            yield part


def _read_part(recipe: Recipe, number: int, entries: Sequence[Entry]) -> list[_Part]:
    """Samples of pictures of one source; runs in a process of its own where there are many."""
    problems = Collector()
    reader = _SourceReader(recipe, number, problems)
    samples: list[Sample] = []
    try:
        for entry, size in zip(entries, read_sizes([e.picture for e in entries]), strict=True):
            samples += reader.samples(entry, size)
    except IdeoflowError as error:  # enough of them
        return [_Part([], list(error.diagnostics), 0, 0)]
    return [_Part(samples, problems.items, reader.left_out, reader.not_mirrored)]


def _report_counts(
    recipe: Recipe, number: int, pictures: int, left_out: int, not_mirrored: int, problems: Collector
) -> None:
    """Tells of what was done to many pictures of a source."""
    source = recipe.tables.data.sources[number]
    if left_out:
        what = "area of a square of" if source.resolution_type == "pixel_area" else "shorter side of"
        problems.add(
            EMPTY_DATASET if left_out == pictures else LEFT_OUT,
            f"{left_out:,} of {pictures:,} pictures are left out, below the {what} "
            f"{source.minimum_image_size} pixels",
            recipe.source_span(number, "minimum_image_size"),
            cure="use larger originals, or lower minimum_image_size",
        )
    if not_mirrored:
        problems.add(
            NOT_MIRRORED,
            f"{not_mirrored:,} of {pictures:,} pictures are not mirrored: their captions hold text, or say "
            "left or right",
            recipe.source_span(number, "flip"),
        )


class _SourceReader:
    """Turns the pictures of one source into samples, and counts what is left out or left as it is."""

    def __init__(self, recipe: Recipe, number: int, problems: Collector) -> None:
        self.recipe, self.number, self.problems = recipe, number, problems
        self.source = recipe.tables.data.sources[number]
        self.captions = CaptionFinder(recipe, number, problems)
        self.left_out = self.not_mirrored = 0

    def samples(self, entry: Entry, size: Size | Diagnostic) -> list[Sample]:
        """Every variant of a picture; none where it is left out or something is wrong with it."""
        if isinstance(size, Diagnostic):
            self.problems.extend([size])
            self.captions.of(entry, None)  # what is wrong with its caption is told as well
            return []
        if measure(*size, self.source.resolution_type) < self.source.minimum_image_size:
            self.left_out += 1
            return []
        captions = self.captions.of(entry, size)
        if not captions:
            return []
        flips = [False]
        if self.source.flip:
            mirrored = Geometry(*size, flip=True)
            stays = any(obstacles(dict(caption), mirrored) for caption in captions)
            self.not_mirrored += stays
            flips = [False, not stays]
        return [
            self._crop(entry, size, captions, variant, flip)
            for variant in range(self.source.crop_variants)
            for flip in flips
        ]

    def _crop(
        self, entry: Entry, size: Size, captions: Sequence[Mapping[str, Any]], variant: int, flip: bool
    ) -> Sample:
        bucket, geometry = crop(*size, self.source, entry.name, variant, flip)
        path = str(entry.picture)
        if (scale := enlargement(bucket, geometry)) > self.source.upscale_limit and not flip:
            shown, made = (f"{w}x{h}" for w, h in (size, bucket))
            self.problems.add(
                UPSCALED,
                f"{entry.name} ({shown}) is enlarged {scale:.1f} times to {made}",
                Span(path),
                cure="use a larger original, or lower data.resolution",
            )
        texts = []
        for caption in captions:
            followed = transform_caption(dict(caption), geometry, path=path)
            self.problems.extend(followed.diagnostics if not flip else ())
            assert followed.caption is not None, "what may not be mirrored is not"
            texts.append(to_json(followed.caption))
        first, *others = dict.fromkeys(texts)
        return Sample(entry.picture, bucket, geometry, first, tuple(others))


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
