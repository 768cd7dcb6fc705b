"""What commands that torchrun starts in several processes share: they join, and only the first one speaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from ideoflow.cli import show
from ideoflow.processes import this_process

if TYPE_CHECKING:
    from ideoflow.cli.console import Console
    from ideoflow.workflow import Prepared

T = TypeVar("T")


@contextmanager
def together(quiet: bool) -> Iterator[tuple[Console, bool]]:
    """The console, silent in all processes but the first, and whether this is the first.

    An error of any process ends all; the first one shows it. A process alone does not load torch for this.
    """
    from ideoflow.cli.console import Console

    process = this_process()
    with Console(quiet=quiet or not process.first) as console:
        if process.ranks == 1:
            yield console, True
            return
        from ideoflow.engine.processes import joined

        with joined(show):
            yield console, process.first


def prepared_by_all(recipe: str, say: Callable[[str], None]) -> Prepared:
    """The recipe, read and planned by every process; the first one first, since it may have to download."""
    from ideoflow.workflow import prepare

    if this_process().ranks == 1:
        return prepare(recipe, say)
    from ideoflow.engine.processes import joined

    with joined() as processes:
        return processes.first_then_others(lambda: prepare(recipe, say))
