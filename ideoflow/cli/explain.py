"""``ideoflow explain CODE``."""

from __future__ import annotations

import argparse
import sys

from ideoflow.diagnostics import closest
from ideoflow.diagnostics.codes import all_codes, find_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("code", nargs="?", help="a code such as IR003; without it, all are listed")


def execute(args: argparse.Namespace) -> int:
    if args.code is None:
        for code in all_codes().values():
            print(f"{code.id}  {code.severity:7}  {code.title}")
        return 0
    code = find_code(args.code)
    if code is None:
        near = closest(args.code.upper(), all_codes())
        hint = f"; did you mean {near}?" if near else ""
        print(f"there is no code {args.code}{hint} (ideoflow explain lists them all)", file=sys.stderr)
        return 1
    print(f"{code.id}: {code.title} ({code.severity})\n\n{code.explanation}")
    return 0
