"""A recipe file into a :class:`Recipe`: TOML, types, bounds, contradictions, paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path as FilePath
from typing import Any, get_type_hints

import tomli

from ideoflow.diagnostics import Collector, Span, fail
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes.recipe import (
    BAD_TOML,
    BAD_VALUE,
    IMPOSSIBLE_PAIR,
    MISSING_KEY,
    NO_FILE,
    NO_SUCH_PATH,
    NO_TARGETS,
    UNKNOWN_KEY,
)
from ideoflow.model.spec import match_targets
from ideoflow.recipe.adapters import check_adapter
from ideoflow.recipe.convert import Report, from_plain, to_plain
from ideoflow.recipe.places import Path, Place, find_places
from ideoflow.recipe.settings import PictureSettings, RecipeTables, SourceSettings
from ideoflow.recipe.sources import check_images, check_shares, check_source, in_pixels, matching_files


@dataclass(frozen=True)
class Recipe:
    """A recipe that has been read and found consistent.

    Args:
        path: the file, as it was named.
        tables: every setting, defaults filled in.
        places: where each key that was written stands.
        text: the file's text.
    """

    path: FilePath
    tables: RecipeTables
    text: str = field(repr=False)
    places: Mapping[Path, Place] = field(repr=False, compare=False, default_factory=dict)

    @property
    def name(self) -> str:
        """The adapter's name: ``output.name``, or the file's own."""
        return self.tables.output.name or self.path.stem

    @property
    def folder(self) -> FilePath:
        """The folder that paths in the recipe are relative to."""
        return self.path.parent

    @property
    def output_folder(self) -> FilePath:
        return FilePath(self.tables.output.folder or FilePath("outputs") / self.name)

    @property
    def digest(self) -> str:
        """SHA-256 over every setting, defaults included; comments and layout do not count."""
        plain = json.dumps(to_plain(self.tables), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(plain.encode()).hexdigest()

    def is_set(self, key: str) -> bool:
        """Whether the recipe itself has the dotted ``key``, rather than its default."""
        return _path_of(key) in self.places

    def span(self, key: str) -> Span:
        """The place of the value of dotted ``key``, or of its table, or the file as a whole.

        A number in it counts the items of a list: ``validate.prompts.0``.
        """
        return span_of(str(self.path), self.text, self.places, _path_of(key))

    def source_span(self, number: int, key: str) -> Span:
        """The place of ``key`` of one of ``tables.data.sources``: its own, or the default in [data]."""
        own = f"data.source.{number}"
        inherited = not self.is_set(f"{own}.{key}") and self.is_set(f"data.{key}")
        return self.span(f"data.{key}" if inherited or not self.is_set(own) else f"{own}.{key}")


def _path_of(key: str) -> Path:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def span_of(file: str, text: str, places: Mapping[Path, Place], path: Path, *, key: bool = False) -> Span:
    """The span of the longest written prefix of ``path``; ``key`` points at the key instead of the value."""
    for end in range(len(path), 0, -1):
        place = places.get(path[:end])
        if place is not None:
            start, stop = place.key if key and end == len(path) else place.value
            return Span.of(file, text, start, stop)
    return Span(file)


def load_recipe(path: str | FilePath) -> Recipe:
    """Reads a recipe file.

    Raises:
        IdeoflowError: with every problem found, each at its line.
    """
    file = FilePath(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = sorted(str(p) for p in file.parent.glob("*.toml")) if file.parent.is_dir() else []
        cure = f"recipes here: {', '.join(near[:5])}" if near else "give the path of a .toml recipe"
        fail(NO_FILE, f"there is no recipe {file}", cure=cure)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        cure = "give the path of a .toml recipe, in UTF-8"
        fail(NO_FILE, f"cannot read {file}: {reason}", cure=cure)
    recipe = parse_recipe(text, file)
    _check_paths(recipe)
    return recipe


def parse_recipe(text: str, path: str | FilePath = "recipe.toml") -> Recipe:
    """A recipe from its text; the paths in it are not looked up.

    Raises:
        IdeoflowError: with every problem found, each at its line.
    """
    file = FilePath(path)
    text = text.replace("\r\n", "\n")
    try:
        data = tomli.loads(text)
        places = find_places(text)
    except tomli.TOMLDecodeError as error:
        at = min(error.pos, len(text))
        span = Span.of(str(file), text, at, at + 1)
        message = error.msg[:1].lower() + error.msg[1:]
        cure = "texts need quotes, lists need [ ], and each key may come once in a table"
        fail(BAD_TOML, f"not valid TOML: {message}", span, cure=cure)
    except RecursionError:
        fail(BAD_TOML, "nested too deeply", Span(str(file)), cure="a recipe has tables of keys, no deeper")
    except ValueError:  # Python's own limit on digits
        fail(BAD_TOML, "a number has thousands of digits", Span(str(file)), cure="shorten it")
    problems = Collector()

    def report(code: Code, at: Path, message: str, cure: str, label: str) -> None:
        if at[:2] == ("data", "source") and at not in places and code is not MISSING_KEY:
            return  # a default of [data], reported there
        span = span_of(str(file), text, places, at, key=code is UNKNOWN_KEY)
        if code is UNKNOWN_KEY and (homes := _tables_with(at[-1])):
            cure = f"'{at[-1]}' belongs in {' or '.join(homes)}"
        if code is MISSING_KEY and not at:
            span = Span(str(file))
        problems.add(code, message, span, cure=cure, label=label)

    tables = from_plain(RecipeTables, _with_defaults(data, report), report)
    if tables is not None:
        recipe = Recipe(file, tables, text, places)
        _check_pairs(recipe, problems)
    problems.items.sort(key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0))
    problems.raise_if_errors()
    return recipe


def _with_defaults(data: Mapping[str, Any], report: Report) -> Mapping[str, Any]:
    """The recipe's data with the keys of [data] filled in where a [[data.source]] leaves them out.

    Sizes that are written in megapixels are pixels from here on.
    """
    table = data.get("data")
    if not isinstance(table, Mapping):
        return data
    sources, kind = table.get("source"), table.get("resolution_type")
    table = in_pixels(table, kind, ("data",), report)
    if not isinstance(sources, list) or not all(isinstance(s, Mapping) for s in sources):
        return {**data, "data": table}
    sources = [
        in_pixels(s, s.get("resolution_type", kind), ("data", "source", n), report)
        for n, s in enumerate(sources)
    ]
    known = {f.name for f in fields(PictureSettings)}
    shared = {key: value for key, value in table.items() if key in known}
    filled: dict[str, Any] = {**table, "source": [{**shared, **source} for source in sources]}
    sizes = [s["resolution"] for s in filled["source"] if isinstance(s.get("resolution"), int)]
    if sizes and "resolution" not in table:
        filled["resolution"] = max(sizes)  # what plans and validation pictures go by
    return {**data, "data": filled}


def _tables_with(key: str | int) -> list[str]:
    """Headers of the tables that know ``key``."""
    tables = {f"[{name}]": table for name, table in get_type_hints(RecipeTables).items()}
    tables["[[data.source]]"] = SourceSettings
    homes = [header for header, table in tables.items() if key in {f.name for f in fields(table)}]
    return [home for home in homes if home != "[[data.source]]" or "[data]" not in homes]


def _check_pairs(recipe: Recipe, problems: Collector) -> None:
    t = recipe.tables

    def contradiction(key: str, message: str, cure: str) -> None:
        problems.add(IMPOSSIBLE_PAIR, message, recipe.span(key), cure=cure)

    for number, source in enumerate(t.data.sources):
        check_source(recipe, number, source, problems)
    check_shares(recipe, problems)
    if t.train.warmup >= t.train.steps and t.train.warmup:
        contradiction(
            "train.warmup",
            f"a warm-up of {t.train.warmup} never ends within {t.train.steps} steps",
            "make train.warmup smaller than train.steps",
        )
    if len(t.train.betas) != 2 or not all(0 <= b < 1 for b in t.train.betas):
        problems.add(
            BAD_VALUE,
            "betas must be two numbers, each at least 0 and below 1",
            recipe.span("train.betas"),
            cure="for example betas = [0.9, 0.999]",
        )
    _check_names(recipe, problems)
    if t.captions.variants is not None and t.captions.most_variants == 1:
        contradiction(
            "captions.variants",
            "captions.variants is set, but nothing varies them",
            "set shuffle = true or element_dropout = 0.1, or remove it",
        )
    if not t.validate.prompts:
        for key in ("every", "preset", "steps", "guidance", "width", "height", "seed"):
            if recipe.is_set(f"validate.{key}"):
                contradiction(
                    f"validate.{key}",
                    f"validate.{key} is set, but there are no validate.prompts",
                    "add prompts = ['prompts/*.icap'], or remove the key",
                )
    if t.memory.device == "cpu" and t.memory.compile == "regional":
        contradiction(
            "memory.compile",
            "compile = 'regional' is for GPUs; device is 'cpu'",
            "use compile = 'auto' or 'off'",
        )
    check_adapter(t.adapter, t.output.format, recipe.is_set, contradiction)
    unmatched = [glob for glob, modules in match_targets(t.adapter.targets).items() if not modules]
    for glob in unmatched:
        problems.add(
            NO_TARGETS,
            f"the target '{glob}' matches no Linear of a block",
            recipe.span("adapter.targets"),
            cure="for example 'layers.*.attention.*', or targets = 'all'",
        )
    if t.adapter.targets == ():
        problems.add(
            NO_TARGETS,
            "targets is an empty list",
            recipe.span("adapter.targets"),
            cure="targets = 'all' trains every Linear of the blocks",
        )


def _check_names(recipe: Recipe, problems: Collector) -> None:
    """Reports names that no file, folder or revision can have."""
    model, output = recipe.tables.model, recipe.tables.output
    if output.name is not None and (output.name in ("", "..") or FilePath(output.name).name != output.name):
        message = f"output.name is the name of a file, and '{output.name}' is none"
        cure = "leave out folders, or put them in output.folder"
        problems.add(BAD_VALUE, message, recipe.span("output.name"), cure=cure)
    if model.revision == "":
        cure = "remove it for what the hub has now, or write a commit, tag or branch"
        problems.add(BAD_VALUE, "model.revision is empty", recipe.span("model.revision"), cure=cure)
    paths = {"model.base": model.base, "model.parts": model.parts, "output.folder": output.folder}
    for key, text in (paths | {"output.name": output.name}).items():
        # Names that results and scratch files get are longer than output.name.
        most = 255 if key in paths else 200
        if text and (len(text.encode()) > 4000 or any(len(p.encode()) > most for p in text.split("/"))):
            cure = f"a name has at most {most} bytes, a path 4000"
            problems.add(BAD_VALUE, f"{key} is too long for a file system", recipe.span(key), cure=cure)


def _check_paths(recipe: Recipe) -> None:
    problems = Collector()
    for number, source in enumerate(recipe.tables.data.sources):
        check_images(recipe, number, source, problems)
    for index, pattern in enumerate(recipe.tables.validate.prompts):
        if not matching_files(recipe.folder, pattern):
            problems.add(
                NO_SUCH_PATH,
                f"no file matches the prompt '{pattern}'",
                recipe.span(f"validate.prompts.{index}"),
                cure="name a caption file or a glob, relative to the recipe's folder",
            )
    problems.raise_if_errors()


def load_tables(data: Mapping[str, Any], report: Any) -> RecipeTables | None:
    """Tables from plain data, for plan files."""
    made: RecipeTables | None = from_plain(RecipeTables, data, report)
    return made
