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
from ideoflow.recipe.convert import from_plain, to_plain
from ideoflow.recipe.places import Path, Place, find_places
from ideoflow.recipe.settings import RecipeTables


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
        return tuple(key.split(".")) in self.places

    def span(self, key: str) -> Span:
        """The place of the value of dotted ``key``, or of its table, or the file as a whole.

        A number in it counts the items of a list: ``validate.prompts.0``.
        """
        path = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
        return span_of(str(self.path), self.text, self.places, path)


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
        span = span_of(str(file), text, places, at, key=code is UNKNOWN_KEY)
        if code is UNKNOWN_KEY and (homes := _tables_with(at[-1])):
            cure = f"'{at[-1]}' belongs in {' or '.join(homes)}"
        if code is MISSING_KEY and not at:
            span = Span(str(file))
        problems.add(code, message, span, cure=cure, label=label)

    tables = from_plain(RecipeTables, data, report)
    if tables is not None:
        recipe = Recipe(file, tables, text, places)
        _check_pairs(recipe, problems)
    problems.items.sort(key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0))
    problems.raise_if_errors()
    return recipe


def _tables_with(key: str | int) -> list[str]:
    """Headers of the tables that know ``key``."""
    tables = get_type_hints(RecipeTables)
    return [f"[{name}]" for name, table in tables.items() if key in {f.name for f in fields(table)}]


def _check_pairs(recipe: Recipe, problems: Collector) -> None:
    t = recipe.tables

    def contradiction(key: str, message: str, cure: str) -> None:
        problems.add(IMPOSSIBLE_PAIR, message, recipe.span(key), cure=cure)

    if t.data.caption == "instance" and not t.data.instance_prompt:
        contradiction(
            "data.caption",
            "caption = 'instance' needs an instance_prompt",
            "add instance_prompt = ..., or use caption = 'sidecar'",
        )
    if t.data.caption != "instance" and t.data.instance_prompt is not None:
        contradiction(
            "data.instance_prompt",
            f"instance_prompt is set, but caption = '{t.data.caption}' takes captions from elsewhere",
            "set caption = 'instance', or remove it",
        )
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
    name = t.output.name
    if name is not None and (name in ("", "..") or FilePath(name).name != name):
        problems.add(
            BAD_VALUE,
            f"output.name is the name of a file, and '{name}' is none",
            recipe.span("output.name"),
            cure="leave out folders, or put them in output.folder",
        )
    if t.data.caption == "filename" and not t.captions.wrap:
        contradiction(
            "captions.wrap",
            "names of files are plain text, which wrap = false makes an error",
            "set wrap = true, or data.caption = 'sidecar'",
        )
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


def _check_paths(recipe: Recipe) -> None:
    problems = Collector()
    images = recipe.folder / recipe.tables.data.images
    if not images.is_dir():
        what = "is a file, not a folder" if images.exists() else "does not exist"
        problems.add(
            NO_SUCH_PATH,
            f"the folder of pictures {images} {what}",
            recipe.span("data.images"),
            cure="paths in a recipe are relative to the recipe's own folder",
        )
    for index, pattern in enumerate(recipe.tables.validate.prompts):
        if not matching_files(recipe.folder, pattern):
            problems.add(
                NO_SUCH_PATH,
                f"no file matches the prompt '{pattern}'",
                recipe.span(f"validate.prompts.{index}"),
                cure="name a caption file or a glob, relative to the recipe's folder",
            )
    problems.raise_if_errors()


def matching_files(folder: FilePath, pattern: str) -> list[FilePath]:
    """Files that ``pattern``, a path or a glob relative to ``folder``, names; sorted."""
    if (folder / pattern).is_file():  # also a name with brackets, which a glob would read as a set
        return [folder / pattern]
    root = FilePath(pattern).anchor
    base, rest = (FilePath(root), pattern[len(root) :]) if root else (folder, pattern)
    try:
        return sorted(p for p in base.glob(rest) if p.is_file())
    except ValueError:  # no pattern at all, or ** inside a name
        return []


def load_tables(data: Mapping[str, Any], report: Any) -> RecipeTables | None:
    """Tables from plain data, for plan files."""
    made: RecipeTables | None = from_plain(RecipeTables, data, report)
    return made
