"""``ideoflow cache build|stats|verify|prune``: encoded pictures and captions, and what keeping them takes."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from typing import Any

HELP = {
    "build": "encode what a recipe needs, without training; torchrun shares it among processes",
    "stats": "what is cached, in how many files",
    "verify": "read everything and compare it with its sums",
    "prune": "remove what is not wanted any more, put small files together",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {}
    for name, line in HELP.items():
        made[name] = commands.add_parser(name, help=line, description=line.capitalize() + ".")
        made[name].add_argument("--json", action="store_true", help="the result as JSON")
        if name != "build":
            made[name].add_argument(
                "--folder", metavar="FOLDER", help="the cache; default: the recipes' own, else the shared one"
            )
    made["build"].add_argument("recipe", help="a recipe (.toml), or a plan.json")
    made["build"].add_argument("--quiet", action="store_true", help="only warnings, errors and the result")
    repair = "remove what is damaged; it is encoded anew when it is next wanted"
    made["verify"].add_argument("--repair", action="store_true", help=repair)
    made["prune"].add_argument("recipe", nargs="*", help="keep only what these recipes need")
    unused = "keep what was used in the last DAYS days (with recipes: that as well)"
    made["prune"].add_argument("--unused-days", type=float, metavar="DAYS", help=unused)
    made["prune"].add_argument("--dry-run", action="store_true", help="only say what would be removed")


def execute(args: argparse.Namespace) -> int:
    actions = {"build": _build, "stats": _stats, "verify": _verify, "prune": _prune}
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> int:
    from ideoflow.cli import show
    from ideoflow.cli.together import prepared_by_all, together
    from ideoflow.workflow import build_cache

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is encoded is written
    with together(args.quiet) as (console, speaks):
        prepared = prepared_by_all(args.recipe, console.say)
        if speaks:
            show(prepared.dataset.warnings)
        console.say("loading torch, diffusers and peft")
        built = build_cache(prepared, on_event=console.event)
    if speaks:
        words = (
            f"cached  {built.captions} captions, {built.pictures} pictures; encoded now: "
            f"{built.encoded.captions} and {built.encoded.pictures}, in {built.seconds:.1f} s"
        )
        several = f", by {built.processes} processes" if built.processes > 1 else ""
        _print(args, asdict(built), words + several)
    return 0


def _stats(args: argparse.Namespace) -> int:
    from ideoflow.data.keys import cache_folder
    from ideoflow.data.upkeep import stats
    from ideoflow.plan.render import disk

    found = stats(cache_folder(args.folder))
    rows = [
        (
            h.kind,
            h.base[:12],
            h.dtype,
            str(h.entries),
            str(h.duplicates),
            str(h.shards),
            disk(h.bytes),
            f"{h.unused_days:.0f}",
        )
        for h in found.holdings
    ]
    columns = ("kind", "encoder", "type", "entries", "twice", "files", "size", "days unused")
    words = f"{found.folder}: {disk(sum(h.bytes for h in found.holdings))}"
    words += f"; the index takes {disk(found.index_bytes)} of memory"
    if found.damaged or found.leftovers:
        words += f"; {len(found.damaged)} damaged files and {found.leftovers} left by broken-off writes, "
        words += "which prune removes"
    _print(args, asdict(found), words, columns, rows)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ideoflow.cli.console import Console
    from ideoflow.data.keys import cache_folder
    from ideoflow.data.upkeep import verify
    from ideoflow.plan.render import disk

    folder = cache_folder(args.folder)
    with Console(quiet=args.json) as console:
        found = verify(folder, repair=args.repair, progress=console.progress_of)
    rows = [(name, f"{count} damaged entries") for name, count in found.damaged.items()]
    rows += [(name, "unreadable") for name in found.unreadable]
    words = f"{found.entries} entries, {disk(found.bytes)}: "
    if found.good:
        words += "all as they were written"
    else:
        words += "removed what is damaged" if args.repair else "damaged; --repair removes what is"
    _print(args, asdict(found), words, ("file", "what is wrong"), rows)
    return 0 if found.good or args.repair else 1


def _prune(args: argparse.Namespace) -> int:
    from ideoflow.cli.console import Console
    from ideoflow.data.keys import cache_folder
    from ideoflow.data.upkeep import keys_of_recipe, prune
    from ideoflow.plan.render import disk
    from ideoflow.recipe import load_recipe

    with Console(quiet=args.json) as console:
        keep = {key for recipe in args.recipe for key in keys_of_recipe(recipe)} if args.recipe else None
        asked = {load_recipe(recipe).tables.cache.folder for recipe in args.recipe} or {None}
        done = [
            prune(
                cache_folder(folder),
                keep=keep,
                unused_days=args.unused_days,
                dry_run=args.dry_run,
                progress=console.progress_of,
            )
            for folder in ({args.folder} if args.folder else asked)
        ]
    total = {name: sum(getattr(d, name) for d in done) for name in asdict(done[0])}
    would = "would remove" if args.dry_run else "removed"
    words = (
        f"{would} {total['entries']} entries ({disk(total['bytes'])}) and {total['leftovers']} broken files; "
    )
    words += f"{total['merged']} files {'would be ' if args.dry_run else ''}written anew"
    _print(args, total, words)
    return 0


def _print(args: argparse.Namespace, data: dict[str, Any], words: str,
           columns: tuple[str, ...] = (), rows: list[tuple[str, ...]] | None = None) -> None:  # fmt: skip
    if args.json:
        print(json.dumps(data, indent=1, default=str))
        return
    if rows:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=box.SIMPLE)
        for row in rows:
            table.add_row(*row)
        Console(file=sys.stdout, highlight=False).print(table)
    print(words)
