"""Codes of plans and hardware."""

from ideoflow.diagnostics.codes import define

NO_PLAN = define(
    "IP001",
    "plan not found",
    """
    The plan file does not exist or cannot be read. `ideoflow plan RECIPE -o FILE` writes one.
    """,
)
BAD_PLAN = define(
    "IP002",
    "damaged plan",
    """
    The file is not a plan that ideoflow wrote: it is not JSON, or something in it is missing, left over or of
    another type. A plan is a record of decisions and is not meant to be edited: change the recipe, and plan
    again.
    """,
)
OTHER_FORMAT = define(
    "IP003",
    "plan of another format version",
    """
    The plan was written by a version of ideoflow with another plan format, so its decisions may mean something
    else here. Make it again from its recipe with `ideoflow plan`, or use the version that wrote it.
    """,
)
RECIPE_CHANGED = define(
    "IP004",
    "the recipe is not the one that was planned",
    """
    A plan is run exactly as it was made. The recipe has changed since, and the notes name each setting that
    differs. Plan again, or run the recipe itself.
    """,
)
DATA_CHANGED = define(
    "IP005",
    "the pictures or captions are not those that were planned",
    """
    A plan holds a digest over every picture and caption. Something was added, removed or edited since. Plan
    again to train on what is there now.
    """,
)
BASE_CHANGED = define(
    "IP006",
    "the base model is not the one that was planned",
    """
    The weights of the base model differ from those that the plan was made for. Pin `model.revision` in the
    recipe, so that a hub id always means the same files; or plan again.
    """,
)
UNKNOWN_GPU = define(
    "IP010",
    "unknown card",
    """
    `--gpu` takes the name of a card (`rtx-4090`, `l40s`, `h100`) or a memory size (`16gb`). For a card that is
    not in the table, give its memory size: the memory plan is the same, only times are not predicted.
    """,
)
NO_GPU = define(
    "IP011",
    "no GPU where one is asked for",
    """
    The recipe says `memory.device = "cuda"`, but NVML finds no NVIDIA card that is visible. Look at
    `nvidia-smi` and at the variable `CUDA_VISIBLE_DEVICES`. To plan for a machine that is not this one, name
    its card: `ideoflow plan RECIPE --gpu rtx-4090`.
    """,
)
NO_NVML = define(
    "IP012",
    "the GPU cannot be asked",
    """
    An NVIDIA driver is installed, but the small Python package that asks it for free memory, `nvidia-ml-py`,
    is not. Without it a plan would be made for the processor, so nothing is planned at all.
    """,
)
