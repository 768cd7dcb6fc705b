"""Codes of adapter files, checkpoints and outputs."""

from ideoflow.diagnostics.codes import define

UNWRITABLE = define(
    "IA001",
    "the output folder cannot be written",
    """
    Results cannot be written: the disk is full, or the folder belongs to somebody else. Checkpoints are
    written beside their place and renamed when they are complete, so the last one is always whole.
    """,
)
OTHER_RUN = define(
    "IA002",
    "the output folder holds another run",
    """
    The folder has checkpoints of a run with another base or another adapter (targets, rank, alpha), so they
    cannot be continued. `--fresh` sets the old folder aside under another name and starts anew; or give this
    recipe another `[output] folder`.
    """,
)
DAMAGED_CHECKPOINT = define(
    "IA003",
    "a checkpoint is damaged",
    """
    A checkpoint's files do not have the digests that were recorded when it was written. It is passed over and
    the one before it is used.
    """,
    "warning",
)
