"""Codes of the training engine."""

from ideoflow.diagnostics.codes import define

NO_DEVICE = define(
    "IE001",
    "the plan's device is not here",
    """
    The plan says to train on a GPU, but torch finds none: no NVIDIA driver, a CPU-only build of torch, or a
    container without access to the GPU. `python -c "import torch; print(torch.version.cuda)"` prints None
    for a CPU-only build.
    """,
)
OUT_OF_MEMORY = define(
    "IE002",
    "out of memory",
    """
    The device's memory ran out. What was trained until the last checkpoint is kept, and the next
    `ideoflow run` goes on from there. `ideoflow plan` lists the cheapest changes that save memory: gradient
    checkpointing, a smaller batch with accumulation, a lower resolution or rank.
    """,
)
LOSS_EXPLODED = define(
    "IE003",
    "the loss is no longer a number",
    """
    The loss or the gradients became infinite or NaN, so every further step would train noise. The usual cause
    is a learning rate that is too high. The last checkpoint is from before.

    A loss between 0.3 and 1.3 that jumps about is normal for Ideogram 4, and no sign of this.
    """,
)
