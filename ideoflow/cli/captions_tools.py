"""The data-set side of ``ideoflow captions``: conversion of folders, ``preview``, ``stats``, ``lsp``.

``ideoflow.cli.captions`` owns the subcommands; each function pair here adds one's arguments and runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ideoflow.cli import show
from ideoflow.diagnostics import Diagnostic, IdeoflowError

if TYPE_CHECKING:
    from ideoflow.captions.convert import Report, Target
    from ideoflow.captions.convert_item import Options


# -- compile and decompile over data sets ------------------------------------------------------------------


def add_conversion(parser: argparse.ArgumentParser, *, decompile: bool = False) -> None:
    """``-o`` and what goes with it, for ``compile`` and ``decompile``."""
    parser.add_argument("-o", "--output", help="folder for sidecars, or a .jsonl file")
    if not decompile:
        parser.add_argument(
            "--to",
            choices=["sidecars", "jsonl", "hf-imagefolder"],
            help="kind of output; -o X.jsonl means jsonl",
        )
    parser.add_argument("--force", action="store_true", help="overwrite output that exists")
    _add_reading(parser)
    parser.add_argument("--format", choices=["text", "json", "github"], default="text", help="of diagnostics")


def convert(args: argparse.Namespace, *, decompile: bool = False) -> int:
    """Converts ``args.paths`` into ``args.output``; 1 if any caption failed."""
    from ideoflow.captions.convert import convert as convert_set

    chosen = options(args, write="icap" if decompile else "json")
    target: Target = "icap" if decompile else _target(args)
    with _progress("captions") as tell:
        report = convert_set(
            args.paths,
            args.output,
            target,
            chosen,
            force=args.force,
            jobs=args.jobs,
            on_progress=lambda r: tell(r.written + r.failed, f"{r.failed} failed"),
        )
    _show_report(report, args)
    return 1 if report.failed else 0


def _target(args: argparse.Namespace) -> Target:
    if args.to is not None:
        chosen: Target = args.to
        return chosen
    return "jsonl" if args.output.lower().endswith(".jsonl") else "sidecars"


def _show_report(report: Report, args: argparse.Namespace) -> None:
    show(report.diagnostics, args.format)
    if report.resumed_after:
        print(f"resumed after {report.resumed_after:,} inputs", file=sys.stderr)
    parts = [f"{report.written:,} captions written to {args.output}"]
    if report.warned:
        parts.append(f"{report.warned:,} warnings")
    if report.failed:
        parts.append(f"{report.failed:,} failed")
    print(", ".join(parts), file=sys.stderr)
    if report.failures is not None:
        print(f"every failure, one JSON object a line: {report.failures}", file=sys.stderr)


# -- preview ----------------------------------------------------------------------------------------------


def add_preview(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders or caption files")
    parser.add_argument("-o", "--output", default="preview.html", help="the sheet (preview.html)")
    parser.add_argument(
        "--link", action="store_true", help="link to the pictures instead of embedding thumbnails"
    )
    parser.add_argument("--title", default="", help="heading of the sheet")
    _add_reading(parser)


def preview(args: argparse.Namespace) -> int:
    from ideoflow.captions.preview import write_preview

    with _progress("pictures") as tell:
        report = write_preview(args.paths, args.output, options(args), link=args.link, title=args.title,
                               jobs=args.jobs, on_progress=lambda r: tell(r.cards, ""))  # fmt: skip
    several = "caption" if report.cards == 1 else "captions"
    print(f"{report.cards:,} {several} in {args.output}, {report.errors:,} with errors, "
          f"{report.warnings:,} with warnings", file=sys.stderr)  # fmt: skip
    return 1 if report.errors else 0


# -- stats ------------------------------------------------------------------------------------------------


def add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders or caption files")
    parser.add_argument("--tokenizer", metavar="PATH", help="the base model's folder or its tokenizer.json")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    _add_reading(parser)


def stats(args: argparse.Namespace) -> int:
    from ideoflow.captions.stats import gather_stats, render_stats

    with _progress("captions") as tell:
        found = gather_stats(args.paths, options(args), tokenizer=args.tokenizer, jobs=args.jobs,
                             on_progress=lambda s: tell(s.captions, f"{s.failed} failed"))  # fmt: skip
    if args.format == "json":
        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=2))
    else:
        print(render_stats(found))
    show(found.diagnostics)
    return 1 if found.failed else 0


# -- lsp --------------------------------------------------------------------------------------------------


def add_lsp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stdio", action="store_true", help="the only transport; editors pass it by habit")


def lsp(args: argparse.Namespace) -> int:
    from ideoflow.diagnostics.codes.caption_tools import NO_PYGLS

    try:
        from ideoflow.captions.lsp import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("pygls", "lsprotocol"):
            raise
        cure = "pip install 'ideoflow[editor]'"
        raise IdeoflowError(Diagnostic(NO_PYGLS, "pygls is not installed", cure=cure)) from None
    serve()
    return 0


# -- shared -----------------------------------------------------------------------------------------------


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """How captions are read, the same for every command over a data set."""
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value of <NAME>")
    parser.add_argument(
        "--trigger",
        type=_trigger,
        metavar="WORD",
        help="put WORD where [trigger] stands, else in the description",
    )
    parser.add_argument(
        "--boxes",
        choices=["yxyx", "xyxy"],
        default="yxyx",
        help="order of the numbers in JSON captions' boxes",
    )
    parser.add_argument("--column", metavar="NAME", help="key of the caption in .jsonl, .parquet and .csv")
    parser.add_argument("--name-column", metavar="NAME", help="key of the picture's name there")
    parser.add_argument("--one-per-line", action="store_true", help="each line of a plain .txt is a caption")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="worker processes (all cores)")


def options(args: argparse.Namespace, **more: Any) -> Options:
    """What the arguments of :func:`_add_reading` say."""
    from ideoflow.captions.convert_item import Options
    from ideoflow.captions.inputs import Columns

    return Options(placeholders=tuple(pairs(args.set)), trigger=args.trigger, boxes=args.boxes,
                   columns=Columns(args.column, args.name_column), one_per_line=args.one_per_line,
                   **more)  # fmt: skip


def pairs(given: list[str]) -> list[tuple[str, str]]:
    """The placeholders of ``--set NAME=VALUE``; raises IC725 for anything else."""
    from ideoflow.diagnostics.codes.caption_tools import BAD_PLACEHOLDER

    found = []
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip("<>")
        if not equals or not name.replace("-", "_").isidentifier() or not _is_text(value):
            message = f"--set {text!r} is not NAME=VALUE"
            raise IdeoflowError(Diagnostic(BAD_PLACEHOLDER, message, cure="for example --set token=sks"))
        found.append((name, value))
    return found


def _trigger(text: str) -> str:
    if not text.strip() or not _is_text(text):
        raise argparse.ArgumentTypeError("a word of plain text")
    return text.strip()


def _is_text(text: str) -> bool:
    """Whether a command-line word is valid text: bytes that are not UTF-8 arrive as half characters."""
    return text.isprintable()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, str], None]]:
    """A progress line on a terminal, nothing elsewhere. The total is unknown: inputs are streamed."""
    if not sys.stderr.isatty() or "TERM" not in os.environ:
        yield lambda done, note: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, note: bar.update(task, completed=done, description=f"{what}  {note}")
