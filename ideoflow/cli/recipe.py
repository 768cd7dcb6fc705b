"""``ideoflow recipe``: makes a recipe from the settings of another trainer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ideoflow.cli import show
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.recipe import RECIPE_EXISTS, RECIPE_UNWRITABLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    command = actions.add_parser("import", help="settings of SimpleTuner, ai-toolkit, musubi-tuner")
    command.add_argument("config", help="config.json, a .yaml of ai-toolkit, a .toml of musubi-tuner")
    command.add_argument("dataloader", nargs="?", help="SimpleTuner's data loader, musubi-tuner's other file")
    command.add_argument(
        "-o", "--output", metavar="FILE", help="the recipe (default: CONFIG's name; - prints it)"
    )
    command.add_argument("--force", action="store_true", help="replace files that exist")


def execute(args: argparse.Namespace) -> int:
    from ideoflow.recipe.importers import import_config

    files = [args.config, *([args.dataloader] if args.dataloader else [])]
    recipe = Path(f"{Path(args.config).stem}.toml" if args.output in (None, "-") else args.output)
    made = import_config(files, recipe)
    show(made.warnings)
    if args.output == "-":
        sys.stdout.write(made.text)
        return 0
    wanted = {recipe: made.text, **{recipe.parent / name: text for name, text in made.files.items()}}
    there = [file for file in wanted if file.exists()]
    if there and not args.force:
        fail(RECIPE_EXISTS, f"{there[0]} exists already", cure="name another with -o, or add --force")
    for file, text in wanted.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as error:
            fail(
                RECIPE_UNWRITABLE, f"cannot write {file}: {error.strerror}", cure="name another file with -o"
            )
    print(f"Wrote {recipe}   what it comes to: ideoflow plan {recipe}")
    return 0
