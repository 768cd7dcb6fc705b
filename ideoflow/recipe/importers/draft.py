"""A recipe that is being made from another trainer's settings, and what could not be carried into it."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span, fail
from ideoflow.diagnostics.codes.recipe import NOT_A_CONFIG, NOT_CARRIED
from ideoflow.recipe.load import parse_recipe
from ideoflow.recipe.settings import RecipeTables

# What reading a value raises that is not of the kind that the other trainer documents.
ODD = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of one setting of the other trainer.

    Args:
        key: the other trainer's.
        ours: the recipe's keys, as documentation; where ``take`` is missing, the one key that gets the value.
        words: what there is to say about it.
        take: puts the value into the draft in another way.
        quiet: it is seen to elsewhere, or nothing is lost without it.
    """

    key: str
    ours: str = ""
    words: str = ""
    take: Callable[[Draft, Any], None] | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Imported:
    """A recipe's text, the files that it needs beside it (by path from its folder), and what is not in it."""

    text: str
    files: Mapping[str, str]
    warnings: tuple[Diagnostic, ...]


@dataclass
class Draft:
    """Values by dotted key, sources, prompts; the other trainer's paths are relative to ``base``.

    Args:
        recipe: where the recipe will be written.
        base: the folder that the other trainer is started in.
    """

    recipe: Path
    base: Path
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, tuple[str, Span]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    warnings: list[Diagnostic] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    _config: Path = Path()
    _text: str = ""

    def reading(self, config: Path, text: str) -> None:
        """What is reported from here on stands in this file."""
        self._config, self._text = config, text

    def take(self, rows: Iterable[Row], settings: Mapping[str, Any], where: str = "") -> None:
        """Carries every setting over that a row knows; the others are reported."""
        known = {row.key: row for row in rows}
        for key, value in settings.items():
            row = known.get(key)
            if row is None:
                self.lost(key, value, "ideoflow does not know this setting", where)
            elif row.take:
                try:
                    row.take(self, value)
                except ODD as error:
                    self.lost(key, value, f"the value is not as expected: {error}", where)
            elif row.quiet:
                continue
            elif row.ours:
                self.set(row.ours, value, key)
            else:
                self.lost(key, value, row.words, where)

    def set(self, key: str, value: Any, origin: str = "") -> None:
        """Sets a dotted key of the recipe."""
        if value is not None:
            self.values[key] = value
            self.origins[key] = origin or key, self._place(origin)

    def lost(self, key: str, value: Any, why: str, where: str = "", place: Span | None = None) -> None:
        """Reports a setting that is not carried; one that is off anyway is no loss."""
        if value in (None, False, "", 0, [], {}, "none", "None"):
            return
        shown = json.dumps(value, ensure_ascii=False, default=str)
        message = f"{where}{key} = {shown if len(shown) <= 60 else shown[:57] + '...'} is not carried over"
        span = place or self._place(key)
        self.warnings.append(Diagnostic(NOT_CARRIED, message, span, why, severity="warning"))
        self.comments.append(f"{message}: {why}")

    def say(self, key: str, what: str) -> None:
        """Reports that a setting means something else here."""
        self.warnings.append(Diagnostic(NOT_CARRIED, what, self._place(key), severity="warning"))
        self.comments.append(what)

    def _place(self, key: str) -> Span:
        at = key and re.search(rf"""(?<![\w-])(?:--)?{re.escape(key)}(?=["']?\s*[:=])""", self._text)
        return Span.of(str(self._config), self._text, *at.span()) if at else Span(str(self._config))

    def path(self, name: str) -> str:
        """A path of the other trainer's as the recipe has to write it."""
        if Path(name).is_absolute():
            return name
        return Path(os.path.relpath(self.base / name, self.recipe.parent)).as_posix()

    def prompt(self, name: str, text: str) -> None:
        """A caption to sample pictures of, in a file of its own."""
        suffix = ".json" if text.lstrip().startswith("{") else ".txt"
        clean = re.sub(r"[^\w-]+", "-", name).strip("-") or "prompt"
        file = f"{self.recipe.stem}-prompts/{clean}{suffix}"
        self.files[file] = text
        prompts = self.values.setdefault("validate.prompts", [])
        if file not in prompts:
            prompts.append(file)

    def finish(self, made_from: str) -> Imported:
        """The recipe. What its own reader refuses is taken out, and reported like everything else.

        Raises:
            IdeoflowError: when what is left is no recipe.
        """
        names: Counter[str] = Counter()
        if len(self.sources) == 1:  # a part of what is trained, and this is all: training is counted in steps
            self.sources[0] = {k: v for k, v in self.sources[0].items() if k not in ("repeats", "weight")}
        for source in self.sources:
            name = str(source.get("name") or source["images"])
            names[name] += 1
            source["name"] = name if names[name] == 1 else f"{name} {names[name]}"
        while True:
            text, lines = self._write(made_from)
            try:
                parse_recipe(text, self.recipe)
            except IdeoflowError as error:
                lines_of = ((d, lines.get(d.span.line)) for d in error.diagnostics if d.span)
                refused = [(d, *place) for d, place in lines_of if place]
                if not refused:
                    message = f"no recipe comes of it: {error.diagnostics[0].message}"
                    fail(NOT_A_CONFIG, message, Span(str(self._config)), cure="mend the configuration")
                for diagnostic, table, key in refused:
                    origin, place = self.origins.get(key, (key, self._place(key)))
                    self.lost(origin, table.pop(key, None), diagnostic.message, place=place)
                continue
            return Imported(text, dict(self.files), tuple(self.warnings))

    def _write(self, made_from: str) -> tuple[str, dict[int, tuple[dict[str, Any], str]]]:
        """The recipe's text, and the key that stands on each of its lines."""
        lines = [f"# Made from {made_from} by `ideoflow recipe import`."]
        if self.comments:
            lines += ["#", "# What is not as it was there:"]
            lines += [f"# - {' '.join(comment.split())}" for comment in dict.fromkeys(self.comments)]
        places: dict[int, tuple[dict[str, Any], str]] = {}

        def table(header: str, keys: Mapping[str, tuple[dict[str, Any], str]]) -> None:
            lines.extend(["", header])
            for name, (owner, key) in keys.items():
                for number, line in enumerate(f"{name} = {toml(owner[key])}".split("\n")):
                    lines.append(line)
                    if not number:
                        places[len(lines)] = owner, key

        def own(prefix: str) -> dict[str, tuple[dict[str, Any], str]]:
            keys = (k for k in self.values if k.rpartition(".")[0] == prefix)
            return {k.rpartition(".")[2]: (self.values, k) for k in keys}

        for name, settings in get_type_hints(RecipeTables).items():
            keys = own(name)
            if name == "data":
                if len(self.sources) == 1:
                    short = {k: (self.sources[0], k) for k in self.sources[0] if k != "name"}
                    keys = {"images": short.pop("images"), **keys, **short} if "images" in short else {}
                if keys:
                    table("[data]", keys)
                for source in self.sources if len(self.sources) > 1 else ():
                    table("[[data.source]]", {k: (source, k) for k in source})
                continue
            if keys:
                table(f"[{name}]", keys)
            for inner, annotation in get_type_hints(settings).items():
                if is_dataclass(annotation) and (keys := own(f"{name}.{inner}")):
                    table(f"[{name}.{inner}]", keys)
        return "\n".join(lines) + "\n", places


def toml(value: Any) -> str:
    """A value as TOML; long texts over several lines where TOML can hold them unescaped."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + " }"
    if not isinstance(value, str):
        return str(value)
    if '"' in value and "'" not in value and value.isprintable():
        return f"'{value}'"
    # JSON's escapes are TOML's, but for the control characters that JSON may leave as they are.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
