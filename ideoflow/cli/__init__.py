"""The command line: commands and exit codes only, no logic.

Each command is a module of this package with ``HELP``, ``add_arguments(parser)`` and
``execute(args) -> exit code``. Only the module of the command that was asked for is imported, so that
``ideoflow --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

from ideoflow import __version__
from ideoflow.diagnostics import IdeoflowError, render_github, render_json, render_text

# name -> one line of help; the module is ideoflow.cli.NAME
COMMANDS = {
    "run": "train what a recipe (or a plan.json) says; started by torchrun, on several GPUs",
    "plan": "say beforehand what fits, how long it takes and why",
    "cache": "encode beforehand, check and prune what is encoded",
    "captions": "compile, check and convert captions",
    "recipe": "make a recipe from another trainer's settings",
    "model": "say what a checkpoint holds, without loading it",
    "adapter": "look into adapter files; convert, merge and resize them",
    "explain": "the page behind a diagnostic code",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0 for success, 1 for diagnostics, 2 for "does not fit", 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "--explain":
        argv = ["explain", *argv[1:]]
    parser = argparse.ArgumentParser(
        prog="ideoflow",
        description="Fine-tune Ideogram 4: recipes, captions, plans and a fused engine.",
        epilog="ideoflow COMMAND --help tells more. ideoflow explain CODE explains a diagnostic.",
    )
    parser.add_argument("--version", action="version", version=f"ideoflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((a for a in argv if not a.startswith("-")), None)
    for name, help_line in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line.capitalize() + ".")
        if name == wanted:
            module = import_module(f"ideoflow.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(execute=module.execute)
    args = parser.parse_args(argv)
    try:
        return int(args.execute(args))
    except IdeoflowError as error:
        show(error.diagnostics, getattr(args, "format", "text"))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`ideoflow ... | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def show(diagnostics, format: str = "text") -> None:  # type: ignore[no-untyped-def]
    """Prints diagnostics: text to stderr, JSON and GitHub annotations to stdout."""
    diagnostics = list(diagnostics)
    if format == "json":
        print(render_json(diagnostics))
    elif format == "github":
        print(render_github(diagnostics))
    elif diagnostics:
        colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        print(render_text(diagnostics, colour=colour), file=sys.stderr)
