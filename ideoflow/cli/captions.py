"""``ideoflow captions``: compile, check, fmt, decompile here; preview, stats, lsp in ``captions_tools``."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ideoflow.cli import captions_tools as tools
from ideoflow.cli import show
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    command = actions.add_parser("compile", help="captions of any kind -> the JSON that Ideogram 4 reads")
    command.add_argument("paths", nargs="+", metavar="PATH", help="folders or caption files")
    tools.add_conversion(command)
    command.set_defaults(act=compile_)

    command = actions.add_parser("check", help="find mistakes, and what looks like one")
    command.add_argument("paths", nargs="*", metavar="PATH", help="folders or caption files")
    command.add_argument("--explain", metavar="CODE", help="print the page of a code such as IC201, and stop")
    command.add_argument(
        "--pictures", action="store_true", help="look for the palettes' colours in the pictures"
    )
    command.add_argument(
        "--tokenizer", metavar="PATH", help="the base model's folder: finds captions over 2048 tokens"
    )
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value of <NAME>")
    command.add_argument("--format", choices=["text", "json", "github"], default="text")
    command.set_defaults(act=check, usage=command.error)

    command = actions.add_parser("fmt", help="bring .icap files into the one style")
    command.add_argument(
        "paths", nargs="+", metavar="PATH", help="folders or .icap files; - is standard input"
    )
    command.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file would change")
    command.add_argument("--diff", action="store_true", help="change nothing; show what would change")
    command.set_defaults(act=fmt)

    command = actions.add_parser("decompile", help="JSON captions -> the caption language")
    command.add_argument("paths", nargs="+", metavar="PATH", help="folders or caption files")
    command.add_argument(
        "--share-styles", action="store_true", help="all captions in one file, equal styles once"
    )
    tools.add_conversion(command, decompile=True)
    command.set_defaults(act=decompile)

    command = actions.add_parser("preview", help="an HTML sheet of pictures with boxes, texts and palettes")
    tools.add_preview(command)
    command.set_defaults(act=tools.preview)

    command = actions.add_parser("stats", help="counts, lengths and shares over a data set")
    tools.add_stats(command)
    command.set_defaults(act=tools.stats)

    command = actions.add_parser("lsp", help="the language server for editors")
    tools.add_lsp(command)
    command.set_defaults(act=tools.lsp)


def execute(args: argparse.Namespace) -> int:
    return int(args.act(args))


def compile_(args: argparse.Namespace) -> int:
    """With ``-o`` a whole data set; without, canonical JSON on standard output, a caption a line."""
    if args.output:
        return tools.convert(args)
    captions, problems = _read_captions(args)
    show(problems, args.format)
    from ideoflow.captions import to_json

    for _, caption in captions:
        print(to_json(caption))
    return 1 if any(d.is_error for d in problems) else 0


def check(args: argparse.Namespace) -> int:
    if args.explain:
        from ideoflow.cli import explain

        return explain.execute(argparse.Namespace(code=args.explain))
    if not args.paths:
        args.usage("at least one PATH is needed")
    from ideoflow.captions import check_captions

    count = None
    if args.tokenizer:
        from ideoflow.captions.tokens import TokenCounter

        counter = TokenCounter(args.tokenizer)

        def count(caption: str) -> int:
            return counter.count([caption])[0]

    found = check_captions(
        args.paths, placeholders=_placeholders(args.set), pictures=args.pictures, count_tokens=count
    )
    show(found, args.format)
    errors = sum(d.is_error for d in found)
    if args.format == "text":
        warnings = sum(d.severity == "warning" for d in found)
        counts = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        print(counts if found else "no mistakes found", file=sys.stderr)
    return 1 if errors else 0


def fmt(args: argparse.Namespace) -> int:
    from ideoflow.captions import format_icap

    problems: list[Diagnostic] = []
    changed = 0
    for path in _icap_files(args.paths):
        try:
            text = sys.stdin.read() if path is None else _read(path)
            result = format_icap(text, str(path or "<stdin>"))
        except IdeoflowError as error:
            problems += error.diagnostics
            continue
        if path is None and not (args.check or args.diff):
            sys.stdout.write(result)
            continue
        if result == text:
            continue
        changed += 1
        if args.diff:
            name = str(path or "<stdin>")
            lines = difflib.unified_diff(text.splitlines(True), result.splitlines(True), name, name)
            sys.stdout.writelines(lines)
        elif args.check:
            print(f"would change {path}", file=sys.stderr)
        elif path is not None:
            with path.open("w", encoding="utf-8", newline="\n") as file:
                file.write(result)
            print(f"formatted {path}", file=sys.stderr)
    show(problems)
    return 1 if problems or (changed and (args.check or args.diff)) else 0


def decompile(args: argparse.Namespace) -> int:
    """With ``-o`` a whole data set; without, one file on standard output."""
    if args.output and not args.share_styles:
        return tools.convert(args, decompile=True)
    from ideoflow.captions import decompile_caption

    captions, problems = _read_captions(args)
    show(problems, args.format)
    if captions:
        single = len(captions) == 1 and not args.share_styles
        named = [(None if single else name, caption) for name, caption in captions]
        text = decompile_caption(named, share_styles=args.share_styles)
        if args.output:
            Path(args.output).write_text(text, encoding="utf-8", newline="\n")
        else:
            sys.stdout.write(text)
    return 1 if any(d.is_error for d in problems) else 0


def _read_captions(args: argparse.Namespace) -> tuple[list[tuple[str, dict[str, Any]]], list[Diagnostic]]:
    """Every caption under the paths with its image's name, and what is wrong with them."""
    from ideoflow.captions.convert_item import compile_source
    from ideoflow.captions.inputs import check_paths, find, read

    options = tools.options(args)
    check_paths(args.paths)
    captions: list[tuple[str, dict[str, Any]]] = []
    problems: list[Diagnostic] = []
    for item in find(args.paths, options.columns):
        for source in read(item, options.columns):
            if isinstance(source, Diagnostic):
                problems.append(source)
                continue
            compiled, found = compile_source(source, options)
            problems += found
            captions += ((one.name, one.caption) for one in compiled)
    return captions, problems


def _placeholders(given: list[str]) -> dict[str, str] | None:
    return dict(tools.pairs(given)) or None


def _icap_files(paths: list[str]) -> Iterator[Path | None]:
    """The ``.icap`` files under some paths, sorted within folders; ``None`` for standard input."""
    from ideoflow.diagnostics.codes.caption_tools import NO_INPUT

    for name in paths:
        path = Path(name)
        if name == "-":
            yield None
        elif path.is_dir():
            yield from sorted(path.rglob("*.icap"))
        elif path.is_file():
            yield path
        else:
            raise IdeoflowError(
                Diagnostic(NO_INPUT, f"{name} does not exist", Span(name), "look at the path again")
            )


def _read(path: Path) -> str:
    from ideoflow.diagnostics.codes.caption_language import NOT_UTF8

    try:
        # Line ends as they are: a file with Windows line ends is formatted to plain ones.
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise IdeoflowError(
            Diagnostic(NOT_UTF8, f"{path} cannot be read: {why}", Span(str(path)), "save the file as UTF-8")
        ) from None
