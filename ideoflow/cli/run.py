"""``ideoflow run RECIPE``: plans, trains, samples, reports; ``torchrun`` trains on several GPUs."""

from __future__ import annotations

import argparse
import signal
import sys
from types import FrameType
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe (.toml), or a plan.json to run exactly as planned")
    parser.add_argument("--fresh", action="store_true", help="set an earlier run of this recipe aside")
    parser.add_argument("--force", action="store_true", help="run even if the plan does not fit")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace 3 steps, the 11th to 13th of this start (or the last ones, if fewer are to be done), and "
        "tell where a step's time goes: profile/ in the run's folder, and a section of its report",
    )
    parser.add_argument("--quiet", action="store_true", help="only warnings, errors and the result")


def execute(args: argparse.Namespace) -> int:
    from ideoflow.cli import show
    from ideoflow.cli.together import prepared_by_all, together
    from ideoflow.workflow import run

    with together(args.quiet) as (console, speaks):
        prepared = prepared_by_all(args.recipe, console.say)
        if speaks:
            show(prepared.dataset.warnings)
        console.plan(prepared.plan)
        console.say("loading torch, diffusers and peft")
        stop = _stop_on_interrupt(console)
        result = run(
            prepared,
            fresh=args.fresh,
            force=args.force,
            profile=args.profile,
            on_event=console.event,
            stop=stop,
        )
        if speaks:
            console.result(result, args.recipe)
    return 0 if result.finished else 130


def _stop_on_interrupt(console: Any) -> Any:
    """Ctrl-C once saves and stops after the step; twice stops at once. Outside training, once is enough."""
    from ideoflow.engine.loop import Stop

    stop = Stop()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.requested or not stop.listening:
            raise KeyboardInterrupt
        stop.requested = True
        console.say("saving and stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, on_interrupt)
    if sys.platform != "win32":
        signal.signal(signal.SIGTERM, on_interrupt)
    return stop
