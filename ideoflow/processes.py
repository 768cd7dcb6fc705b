"""Which of several processes this one is, as torchrun tells each of them; without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.processes import NOT_LAUNCHED

_VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """This one is number ``rank`` of ``ranks``, and ``local_rank`` of the ``local_ranks`` on this host."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0


def this_process(variables: Mapping[str, str] = os.environ) -> Process:
    """What torchrun's environment variables say; one process alone where there are none.

    Raises:
        IdeoflowError: when they are incomplete or no numbers.
    """
    if variables.get("WORLD_SIZE", "1") == "1":
        return Process()
    if missing := [name for name in (*_VARIABLES, *_ADDRESS) if not variables.get(name)]:
        _fail(f"WORLD_SIZE is {variables['WORLD_SIZE']}, but {', '.join(missing)} is not set")
    try:
        ranks, rank, local_rank, local_ranks = (int(variables[name]) for name in ("WORLD_SIZE", *_VARIABLES))
    except ValueError as error:
        _fail(f"WORLD_SIZE and the ranks are whole numbers: {error}")
    if not (0 <= local_rank < local_ranks <= ranks and local_rank <= rank < ranks):
        _fail(f"rank {rank} ({local_rank} of {local_ranks} on this host) of {ranks} cannot be")
    return Process(rank, ranks, local_rank, local_ranks)


def _fail(message: str) -> NoReturn:
    cure = "start it with torchrun --nproc-per-node N -m ideoflow ..., or unset WORLD_SIZE for one process"
    fail(NOT_LAUNCHED, message, cure=cure)
