"""``captions stats``: what a data set of captions holds, in one pass and flat memory.

Lengths are kept as 4 bytes each and contents as 8-byte hashes, so that exact quantiles and duplicates of a
million captions cost 24 MB.
"""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

from ideoflow.captions import to_json
from ideoflow.captions.convert_item import Options, compile_source
from ideoflow.captions.inputs import Item, check_paths, find, read
from ideoflow.captions.pool import ordered_map
from ideoflow.captions.tokens import LIMIT, TokenCounter
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import caption_tools as codes

SHOWN = 20  # captions over the limit, and diagnostics, that are named one by one


@dataclass(frozen=True, slots=True)
class Facts:
    """What one caption contributes; measured in a worker."""

    name: str
    text: str
    traits: frozenset[str]
    elements: int
    texts: int
    boxes: int
    words: int
    medium: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """Spread of a list of lengths; the quantiles are nearest-rank, so they are lengths that occur."""

    count: int
    minimum: int
    median: int
    p95: int
    maximum: int
    mean: float

    @classmethod
    def of(cls, values: Iterable[int]) -> Distribution | None:
        ordered = sorted(values)
        if not ordered:
            return None
        n = len(ordered)
        return cls(n, ordered[0], ordered[(n - 1) // 2], ordered[max(0, -(-95 * n // 100) - 1)], ordered[-1],
                   sum(ordered) / n)  # fmt: skip


# trait -> what it says of a caption, in the order of the report
TRAITS = {
    "description": "have a high-level description",
    "style": "have a style",
    "photo": "are styled as a photo",
    "art": "are styled as art",
    "style palette": "have a palette in the style",
    "element palette": "have a palette in an element",
    "elements": "have elements",
    "boxes": "have a box",
    "all boxes": "have a box on every element",
    "text": "have a text element",
}


@dataclass(slots=True)
class Stats:
    """Totals over a data set; :meth:`as_dict` is the report."""

    failed: int = 0
    traits: Counter[str] = field(default_factory=Counter)
    media: Counter[str] = field(default_factory=Counter)
    characters: array[int] = field(default_factory=lambda: array("I"))
    words: array[int] = field(default_factory=lambda: array("I"))
    elements: array[int] = field(default_factory=lambda: array("I"))
    tokens: array[int] = field(default_factory=lambda: array("I"))
    texts: int = 0
    boxes: int = 0
    too_long: list[tuple[str, int]] = field(default_factory=list)
    too_long_count: int = 0
    template_counted: bool = False
    diagnostics: list[Diagnostic] = field(default_factory=list)
    _hashes: array[int] = field(default_factory=lambda: array("Q"))

    @property
    def captions(self) -> int:
        return len(self.characters)

    @property
    def duplicates(self) -> int:
        """Captions that say exactly what an earlier one says (by 64-bit hashes)."""
        return sum(a == b for a, b in pairwise(sorted(self._hashes)))

    def add(self, facts: Facts) -> None:
        self.traits.update(facts.traits)
        if facts.medium:
            self.media[facts.medium] += 1
        self.characters.append(len(facts.text))
        self.words.append(facts.words)
        self.elements.append(facts.elements)
        self.texts += facts.texts
        self.boxes += facts.boxes
        digest = blake2b(facts.text.encode(errors="surrogatepass"), digest_size=8).digest()
        self._hashes.append(int.from_bytes(digest))

    def add_tokens(self, name: str, count: int) -> None:
        self.tokens.append(count)
        if count > LIMIT:
            self.too_long_count += 1
            if len(self.too_long) < SHOWN:
                self.too_long.append((name, count))

    def as_dict(self) -> dict[str, Any]:
        """Plain data; the shape is stable. Shares are of captions, between 0 and 1."""
        n = self.captions
        lengths = {"characters": self.characters, "words": self.words, "elements": self.elements,
                   "tokens": self.tokens}  # fmt: skip
        spread = {name: Distribution.of(values) for name, values in lengths.items()}
        return {
            "captions": n,
            "failed": self.failed,
            "duplicates": self.duplicates,
            "shares": {trait: self.traits[trait] / n if n else 0.0 for trait in TRAITS},
            "elements": sum(self.elements),
            "text_elements": self.texts,
            "boxes": self.boxes,
            "lengths": {
                k: {
                    "minimum": d.minimum,
                    "median": d.median,
                    "p95": d.p95,
                    "maximum": d.maximum,
                    "mean": d.mean,
                }
                for k, d in spread.items()
                if d is not None
            },
            "token_limit": LIMIT,
            "over_limit": self.too_long_count if self.tokens else None,
            "over_limit_names": [{"name": name, "tokens": count} for name, count in self.too_long],
            "chat_template_counted": self.template_counted if self.tokens else None,
            "media": dict(self.media.most_common(10)),
        }


def gather_stats(
    paths: Sequence[str | Path],
    options: Options,
    *,
    tokenizer: str | Path | None = None,
    jobs: int | None = None,
    on_progress: Callable[[Stats], None] = lambda _: None,
) -> Stats:
    """Reads every caption under ``paths`` once. Captions with errors are counted as failed.

    Raises :class:`IdeoflowError` for paths without captions or a tokenizer that cannot be read.
    """
    given = [str(p) for p in paths]
    check_paths(given)
    counter = TokenCounter(tokenizer) if tokenizer is not None else None
    stats = Stats(template_counted=bool(counter and counter.has_template))
    work = partial(measure, options=options)
    for results in ordered_map(
        work, find(given, options.columns), jobs=jobs or os.cpu_count() or 1, chunk=64
    ):
        facts = [f for f in results if isinstance(f, Facts)]
        for fact in facts:
            stats.add(fact)
        if counter and facts:
            for fact, count in zip(facts, counter.count([f.text for f in facts]), strict=True):
                stats.add_tokens(fact.name, count)
        for failures in results:
            if not isinstance(failures, Facts):
                stats.failed += 1
                stats.diagnostics += failures[: max(0, SHOWN - len(stats.diagnostics))]
        on_progress(stats)
    if not stats.captions and not stats.failed:
        where = ", ".join(given)
        raise IdeoflowError(Diagnostic(codes.NO_INPUT, f"there is no caption in {where}", Span(given[0])))
    return stats


def measure(items: list[Item], options: Options) -> list[Facts | list[Diagnostic]]:
    """The facts of every caption in some items, or its errors; runs in a worker."""
    results: list[Facts | list[Diagnostic]] = []
    for item in items:
        for found in read(item, options.columns):
            if isinstance(found, Diagnostic):
                if found.is_error:
                    results.append([found])
                continue
            captions, said = compile_source(found, options)
            results += [facts_of(c.name, c.caption, to_json(c.caption)) for c in captions]
            if errors := [d for d in said if d.is_error]:
                results.append(errors)
    return results


def facts_of(name: str, caption: dict[str, Any], text: str) -> Facts:
    """What one canonical caption holds."""
    style = caption.get("style_description", {})
    composition = caption["compositional_deconstruction"]
    elements = composition["elements"]
    boxes = sum("bbox" in e for e in elements)
    texts = sum(e["type"] == "text" for e in elements)
    present = {
        "description": bool(caption.get("high_level_description")),
        "style": bool(style),
        "photo": "photo" in style,
        "art": "art_style" in style,
        "style palette": bool(style.get("color_palette")),
        "element palette": any(e.get("color_palette") for e in elements),
        "elements": bool(elements),
        "boxes": boxes > 0,
        "all boxes": boxes == len(elements) > 0,
        "text": texts > 0,
    }
    prose = [caption.get("high_level_description", ""), composition["background"]]
    prose += [v for v in style.values() if isinstance(v, str)] + [e["desc"] for e in elements]
    words = sum(len(re.findall(r"\w+", part)) for part in prose)
    traits = frozenset(t for t, holds in present.items() if holds)
    return Facts(name, text, traits, len(elements), texts, boxes, words, style.get("medium", "")[:80])


def render_stats(stats: Stats) -> str:
    """The report as text for a terminal."""
    n = stats.captions
    lines = [f"{n:,} captions, {stats.failed:,} failed, {stats.duplicates:,} exact duplicates", ""]
    for trait, words in TRAITS.items():
        share = stats.traits[trait] / n if n else 0.0
        lines.append(f"{share:>7.1%}  {stats.traits[trait]:>9,}  {words}")
    lines += [
        "",
        f"{sum(stats.elements):,} elements, {stats.texts:,} of them text, {stats.boxes:,} with a box",
        "",
    ]
    lines.append(f"{'per caption':<12}{'min':>8}{'median':>8}{'mean':>9}{'95 %':>8}{'max':>8}")
    lengths = {"characters": stats.characters, "words": stats.words, "elements": stats.elements}
    for name, values in {**lengths, "tokens": stats.tokens}.items():
        if d := Distribution.of(values):
            lines.append(f"{name:<12}{d.minimum:>8,}{d.median:>8,}{d.mean:>9,.1f}{d.p95:>8,}{d.maximum:>8,}")
    if stats.tokens:
        template = "included" if stats.template_counted else "not found, so not included"
        lines += ["", f"{stats.too_long_count:,} over {LIMIT} tokens (chat template {template})"]
        lines += [f"  {count:,}  {name}" for name, count in stats.too_long]
    else:
        lines += ["", "no token counts: give --tokenizer and the base model's folder"]
    if stats.media:
        lines += ["", "medium"] + [f"{count:>9,}  {medium}" for medium, count in stats.media.most_common(10)]
    return "\n".join(lines)
