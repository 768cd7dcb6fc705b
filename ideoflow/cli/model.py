"""``ideoflow model inspect PATH``: what a checkpoint holds, without loading it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ideoflow.model.inspect import Inspection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    help_line = "form, sizes, types and digest of a base, a part of it, or a single file"
    inspect = commands.add_parser("inspect", help=help_line, description=help_line.capitalize() + ".")
    inspect.add_argument("path", type=Path, help="a folder, a .safetensors file, or nano")
    inspect.add_argument("--json", action="store_true", help="the same as JSON")


def execute(args: argparse.Namespace) -> int:
    from ideoflow.cli import show
    from ideoflow.model.base import NANO
    from ideoflow.model.inspect import inspect

    path = args.path
    if str(path) == NANO and not path.exists():
        path = _nano()
    found = inspect(path)
    if args.json:
        data = asdict(found)
        for part, report in zip(data["parts"], found.parts, strict=True):
            part["problems"] = [problem.as_dict() for problem in report.problems]
        data["mismatches"] = [problem.as_dict() for problem in found.mismatches]
        print(json.dumps(data, indent=1))
    else:
        print(_page(found))
        show(found.problems)
    return 1 if found.problems else 0


def _nano() -> Path:
    """The nano base's folder, as a run would find or make it."""
    from ideoflow.model.base import NANO, locate_base
    from ideoflow.model.hub import fetch_base

    folder = fetch_base(locate_base(NANO), say=lambda text: print(text, file=sys.stderr)).folder
    assert folder is not None
    return folder


def _page(found: Inspection) -> str:
    lines = [found.place, f"  digest {found.digest}"]
    for part in found.parts:
        files = f"{part.files} file{'s' if part.files > 1 else ''}"
        lines += [
            f"  {part.name}: {part.form}, {part.layout}",
            f"    {part.parameters / 1e9:.3f} G parameters, {part.bytes / 2**30:.2f} GiB, {part.tensors} "
            f"tensors in {files}",
            "    " + ", ".join(f"{dtype} {size / 2**30:.3f} GiB" for dtype, size in part.dtypes.items()),
        ]
    return "\n".join(lines)
