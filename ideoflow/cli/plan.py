"""``ideoflow plan``: what fits, how long it takes and why, before anything heavy is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ideoflow.cli import show
from ideoflow.diagnostics import closest, fail
from ideoflow.diagnostics.codes.plan import (
    BAD_AXIS,
    EMPTY_OPTION,
    NO_DECISION,
    NO_RECIPE,
    NOTHING_MEASURED,
    OPTIONS_APART,
    PLAN_UNWRITABLE,
)
from ideoflow.resources import write_whole

if TYPE_CHECKING:
    from rich.console import Console

    from ideoflow.plan import Plan
    from ideoflow.plan.document import DataSummary, Hardware
    from ideoflow.recipe import Recipe


_TABLES = ("compare", "batch", "resolution", "rank")
_VIEWS = ("json", "explain", "diff")
_VALUES = ("gpu", *_TABLES, "explain", "diff", "output", "html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a recipe, or a plan.json to show")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure a few steps on this machine (of the recipe, or of the released model's size in random "
        "numbers) and keep them for later plans",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan for this card (rtx-4090, h100, 16gb), not this machine"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="plan for N processes, each on such a machine"
    )
    parser.add_argument("--compare", metavar="A,B", help="a table of these cards")
    for axis, example in (("batch", "1,2,4"), ("resolution", "512,1024"), ("rank", "8,32")):
        parser.add_argument(f"--{axis}", metavar=example, help=f"a table of these values of {axis}")
    parser.add_argument("--explain", metavar="DECISION", help="one decision with its alternatives, or all")
    parser.add_argument("--diff", metavar="PLAN", help="what differs from an earlier plan.json")
    parser.add_argument("--json", action="store_true", help="the plan as JSON")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="write the plan; ideoflow run FILE runs it exactly"
    )
    parser.add_argument("--html", metavar="FILE", help="write a page with a chart of the memory over the run")


def execute(args: argparse.Namespace) -> int:
    from ideoflow.plan import load_plan

    for name in _VALUES:
        if (given := getattr(args, name)) is not None and not given.strip():
            cure = f"give a value, or leave --{name} out: ideoflow plan --help"
            fail(EMPTY_OPTION, f"--{name} is there without a value", cure=cure)
    if args.calibrate:
        return _calibrate(args)
    if args.recipe is None:
        fail(NO_RECIPE, "there is no recipe to plan", cure="ideoflow plan RECIPE")
    _check_options(args)
    if Path(args.recipe).suffix == ".json":
        return _report(args, load_plan(args.recipe), None)
    planner = _Planner(args)
    return _report(args, planner.plan(), planner)


def _check_options(args: argparse.Namespace) -> None:
    """No option is ignored: those that would be are mistakes."""
    tables = [f"--{name}" for name in _TABLES if getattr(args, name)]
    several = ["--processes"] * (args.processes != 1)
    if args.processes < 1:
        fail(OPTIONS_APART, f"--processes {args.processes} trains nothing", cure="give 1 or more")
    views = [f"--{name}" for name in _VIEWS if getattr(args, name)]
    if Path(args.recipe).suffix == ".json" and (others := ["--gpu"] * bool(args.gpu) + several + tables):
        message = f"{args.recipe} is a finished plan, and {others[0]} makes another one"
        fail(OPTIONS_APART, message, cure="give the recipe that it was made from")
    if len(found := views + tables) > 1 and views:
        message = f"{found[0]} does not go with {', '.join(found[1:])}"
        fail(OPTIONS_APART, message, cure="ask for one after the other")


def _calibrate(args: argparse.Namespace) -> int:
    """Measures, and shows what it changed."""
    from ideoflow.plan.render import print_trials
    from ideoflow.workflow import calibrate

    given = [f"--{name}" for name in (*_VALUES, "json") if getattr(args, name)]
    given += ["--processes"] * (args.processes != 1)
    if args.recipe and Path(args.recipe).suffix == ".json":
        given.append(args.recipe)
    if given:
        cure = "ideoflow plan --calibrate, with a recipe or without"
        fail(NOTHING_MEASURED, f"--calibrate does not go with {', '.join(given)}", cure=cure)
    found = calibrate(args.recipe, lambda text: print(text, file=sys.stderr, flush=True))
    with _console() as console:
        print_trials(found, console)
    return 0


class _Planner:
    """Makes the plans of one call: for the recipe as it is, and for variants of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ideoflow.data.keys import with_encoding
        from ideoflow.data.survey import read_dataset, read_prompts
        from ideoflow.model.base import locate_base
        from ideoflow.plan import detect_hardware, named_hardware
        from ideoflow.plan.calibration import load_calibration
        from ideoflow.plan.variants import AXES
        from ideoflow.recipe import load_recipe

        self.compared = [named_hardware(name) for name in args.compare.split(",")] if args.compare else []
        self.axes = {axis: _numbers(axis, text) for axis in AXES if (text := getattr(args, axis))}
        self.recipe = load_recipe(args.recipe)
        settings = self.recipe.tables.memory
        span = self.recipe.span("memory.device")
        self.hardware = (
            named_hardware(args.gpu)
            if args.gpu
            else detect_hardware(settings.device, folder=self.recipe.output_folder, span=span)
        )
        model, at = self.recipe.tables.model, self.recipe.span("model.base")
        self.base = locate_base(
            model.base, revision=model.revision, parts=model.parts, relative_to=self.recipe.folder, span=at
        )
        dataset, prompts = read_dataset(self.recipe), read_prompts(self.recipe)
        show(dataset.warnings)
        here = None if args.gpu else self.base  # what is cached here is not on another machine
        self.data: DataSummary | None = with_encoding(dataset.summary(), self.recipe, dataset, prompts, here)
        self.prompts, self.processes = len(prompts), args.processes
        self.calibration, warnings = load_calibration()
        show(warnings)

    def plan(
        self,
        recipe: Recipe | None = None,
        data: DataSummary | None = None,
        hardware: Hardware | None = None,
        brief: bool = False,
    ) -> Plan:
        from ideoflow.plan import make_plan

        return make_plan(
            recipe or self.recipe,
            self.base,
            data or self.data,
            hardware or self.hardware,
            calibration=self.calibration,
            prompts=self.prompts,
            processes=self.processes,
            brief=brief,
        )

    def variants(self, axis: str, values: Sequence[int], hardware: Hardware) -> list[Plan]:
        """The recipe with each of ``values`` on one axis."""
        from ideoflow.plan.variants import with_axis

        plans = []
        for value in values:
            tables, data = with_axis(self.recipe.tables, self.data, axis, value)
            plans.append(self.plan(replace(self.recipe, tables=tables), data, hardware, brief=True))
        return plans


def _report(args: argparse.Namespace, plan: Plan, planner: _Planner | None) -> int:
    if args.output:
        _write(Path(args.output), plan.to_json())
    if args.html:
        from ideoflow.report.plan_page import render_plan

        _write(Path(args.html), render_plan(plan))
    if args.json:
        sys.stdout.write(plan.to_json())
    elif args.explain:
        _explain(plan, args.explain)
    elif args.diff:
        _diff(plan, args.diff)
    else:
        _page(args, plan, planner)
    return 0 if plan.fits else 2


def _page(args: argparse.Namespace, plan: Plan, planner: _Planner | None) -> None:
    from ideoflow.plan.render import print_page

    with _console() as console:
        print_page(plan, console)
        if planner:
            _tables(planner, console)
    if args.output:
        print(f"\nWrote {args.output}   run exactly this: ideoflow run {args.output}", flush=True)
    show(plan.warnings)


def _tables(planner: _Planner, console: Console) -> None:
    """One table for each axis that was asked for; a row for each card."""
    from ideoflow.plan.render import print_legend, print_table

    cards, axes = [planner.hardware, *planner.compared], planner.axes
    if planner.compared and not axes:
        rows = [(card.name, [planner.plan(hardware=card, brief=True)]) for card in cards]
        print_table("machine", ["peak, a step"], rows, console)
    for axis, values in axes.items():
        rows = [(card.name, planner.variants(axis, values, card)) for card in cards]
        print_table(axis, [str(v) for v in values], rows, console)
    if planner.compared or axes:
        print_legend(console)


def _numbers(axis: str, text: str) -> list[int]:
    limits = {"batch": (1, 4096, 1), "resolution": (64, 2048, 16), "rank": (1, 1024, 1)}
    least, most, step = limits[axis]
    words = [word.strip() for word in text.split(",")]
    values = [int(word) if word.isascii() and word.isdecimal() else -1 for word in words]
    if any(not least <= v <= most or v % step for v in values):
        multiple = f", multiples of {step}" if step > 1 else ""
        cure = (
            f"whole numbers from {least} to {most}{multiple}, for example --{axis} {least * 8},{least * 16}"
        )
        fail(BAD_AXIS, f"--{axis} {text} is not a list of values to compare", cure=cure)
    return values


def _explain(plan: Plan, name: str) -> None:
    from ideoflow.plan.render import print_decision

    known = [d.id for d in plan.decisions]
    if name == "all":
        with _console() as console:
            for decision in plan.decisions:
                print_decision(plan, decision, console)
                console.print()
        return
    if name not in known:
        near = closest(name, known)
        cure = f"did you mean {near}?" if near else f"one of: {', '.join(known)}"
        if name == "processes":
            cure = "it is decided of several, with --processes N"
        fail(NO_DECISION, f"the plan decides nothing called '{name}'", cure=cure)
    with _console() as console:
        print_decision(plan, plan.decision(name), console)


def _diff(plan: Plan, earlier: str) -> None:
    from ideoflow.plan import load_plan
    from ideoflow.plan.check import plan_changes

    changes = plan_changes(load_plan(earlier), plan)
    print("\n".join(changes) if changes else f"the same as {earlier}")


@contextmanager
def _console() -> Iterator[Console]:
    """A console of at most 80 columns that leaves no blanks at the ends of lines."""
    from rich.console import Console

    from ideoflow.plan.render import WIDTH

    console = Console(file=sys.stdout, highlight=False, no_color="NO_COLOR" in os.environ or None)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    with console.capture() as captured:
        yield console
    sys.stdout.write("\n".join(line.rstrip() for line in captured.get().split("\n")))
    sys.stdout.flush()


def _write(file: Path, text: str) -> None:
    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            file.write_text(text, encoding="utf-8")  # such as /dev/stdout, which must stay what it is
        else:
            write_whole(file, text.encode())
    except OSError as error:
        cure = "choose another file"
        fail(PLAN_UNWRITABLE, f"cannot write {file}: {error.strerror or error}", cure=cure)
