"""Other trainers' settings as a recipe: SimpleTuner, ai-toolkit, musubi-tuner.

Each reader fills a draft from tables of what becomes of which setting. The draft writes the recipe, has the
recipe's own reader check it, and names everything that could not be carried over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
import yaml

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.recipe import NOT_A_CONFIG
from ideoflow.recipe.importers.aitoolkit import import_aitoolkit
from ideoflow.recipe.importers.draft import ODD, Draft, Imported
from ideoflow.recipe.importers.musubi import import_musubi
from ideoflow.recipe.importers.simpletuner import import_simpletuner

__all__ = ["Imported", "import_config"]

_CURE = "give SimpleTuner's config.json (and data loader), ai-toolkit's .yaml, or musubi-tuner's .toml"


def import_config(files: Sequence[str | Path], recipe: str | Path, base: str | Path = ".") -> Imported:
    """A recipe from the settings of another trainer.

    Args:
        files: one or two configuration files, in any order.
        recipe: where the recipe will be written; paths in it become relative to that folder.
        base: the folder that the other trainer is started in, to which its own paths are relative.

    Raises:
        IdeoflowError: when a file cannot be read, or is of no trainer that is known.
    """
    draft = Draft(Path(recipe), Path(base))
    found = [(Path(file), _read(Path(file))) for file in files]
    file = found[0][0]
    draft.reading(file, file.read_text(encoding="utf-8-sig"))
    try:
        found = _fill(draft, found)
    except ODD as error:
        message = f"{file}: a value is not of the kind that belongs there: {error}"
        fail(NOT_A_CONFIG, message, Span(str(file)), cure=_CURE)
    if not draft.sources:
        draft.sources.append({"images": "pictures"})
        draft.say("datasets", "no source of pictures was found: set [data] images")
    return draft.finish(" and ".join(file.name for file, _ in found))


def _fill(draft: Draft, found: list[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """Carries over what the files say; the files that were read, one more where the first names it."""
    file, data = found[0]
    if file.suffix == ".json":
        config, loader = _simpletuner(found, draft.base)
        import_simpletuner(draft, config[1], loader[1], loader[0])
        return list(dict([config, loader]).items())
    if file.suffix == ".toml":
        tables: dict[str, Any] = {"dataset": {}, "training": {}}
        for _, each in found:
            tables["dataset" if "datasets" in each else "training"] = each
        import_musubi(draft, tables["dataset"], tables["training"])
    elif isinstance(data, dict) and isinstance(data.get("config"), dict):
        import_aitoolkit(draft, data)
    else:
        message = f"{file} is no configuration of a trainer that is known"
        fail(NOT_A_CONFIG, message, Span(str(file)), cure=_CURE)
    return found


def _simpletuner(found: Sequence[tuple[Path, Any]], base: Path) -> tuple[tuple[Path, Any], tuple[Path, Any]]:
    """((file, configuration), (file, data loader)); the first names the second where only it is given."""
    first = found[0][0]
    config: tuple[Path, Any] = (first, {})
    loader: tuple[Path, Any] = (first, [])
    for file, data in found:
        if isinstance(data, dict):
            config = (file, data)
        else:
            loader = (file, data)
    named = config[1].get("data_backend_config", config[1].get("--data_backend_config"))
    if not loader[1] and named:
        places = (base / str(named), config[0].parent / Path(str(named)).name)
        if there := [p for p in places if p.is_file()]:
            loader = (there[0], _read(there[0]))
    if not isinstance(loader[1], list) or not all(isinstance(b, dict) for b in loader[1]):
        fail(NOT_A_CONFIG, f"{loader[0]} is no list of data backends", Span(str(loader[0])), cure=_CURE)
    return config, loader


def _read(file: Path) -> Any:
    """The data in a JSON, YAML or TOML file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        fail(NOT_A_CONFIG, f"cannot read {file}: {reason}", Span(str(file)), cure=_CURE)
    readers = {".json": json.loads, ".toml": tomli.loads, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        fail(NOT_A_CONFIG, f"{file.name} is no .json, .yaml or .toml file", Span(str(file)), cure=_CURE)
    try:
        return reader(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        fail(NOT_A_CONFIG, f"{file} cannot be read: {reason}", Span(str(file)), cure="mend the file")
