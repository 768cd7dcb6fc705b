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
    The file is not a plan that ideoflow wrote: it is not JSON, or something in it is missing, left over or
    of another type. A plan is a record of decisions and is not meant to be edited: change the recipe, and
    plan again.
    """,
)
OTHER_FORMAT = define(
    "IP003",
    "plan of another format version",
    """
    The plan was written by a version of ideoflow with another plan format, so its decisions may mean
    something else here. Make it again from its recipe with `ideoflow plan`, or use the version that wrote
    it.
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
    `--gpu` takes the name of a card (`rtx-4090`, `l40s`, `h100`) or a memory size (`16gb`). For a card that
    is not in the table, give its memory size: the memory plan is the same, only times are not predicted.
    """,
)
NO_GPU = define(
    "IP011",
    "no GPU where one is asked for",
    """
    The recipe says `memory.device = "cuda"`, but NVML finds no NVIDIA card that is visible. Look at
    `nvidia-smi` and at the variable `CUDA_VISIBLE_DEVICES`. To plan for a machine that is not this one,
    name its card: `ideoflow plan RECIPE --gpu rtx-4090`.
    """,
)
NO_NVML = define(
    "IP012",
    "the GPU cannot be asked",
    """
    An NVIDIA driver is installed, but the small Python package that asks it for free memory,
    `nvidia-ml-py`, is not. Without it a plan would be made for the processor, so nothing is planned at all.
    """,
)
BAD_CALIBRATION = define(
    "IP013",
    "measurements of earlier runs cannot be used",
    """
    `calibration.json` in ideoflow's cache folder, which runs append to, is damaged or of another version.
    Plans fall back on what ships with the package. Remove the file; the next runs make a new one.
    """,
    severity="warning",
)
NO_TARGETS_IN_BASE = define(
    "IP014",
    "adapter targets match nothing in this base",
    """
    The globs in `adapter.targets` match modules of the released model, but none of the base that the recipe
    names, which may have fewer blocks. `targets = "all"` works for every base.
    """,
)
DEVICE_MISMATCH = define(
    "IP015",
    "the recipe's device is not the machine's",
    """
    `memory.device` says `cpu`, but the plan is made for a graphics card (`--gpu`). Leave one of the two
    out.
    """,
)
CANNOT_BE_DONE = define(
    "IP016",
    "a memory setting that cannot be carried out",
    """
    What `[memory]` asks for is impossible together, or on this machine:

    - `engine = "fused"` needs an NVIDIA GPU with bf16 units (compute capability 8.0 or newer), the package
      `triton`, and weights in anything but float32; `activation_budget`, `activation_offload`, `graphs`,
      `exact_blocks` and `matmul = "fp8"` belong to it;
    - `matmul = "fp8"` needs `precision = "fp8"` and FP8 units (compute capability 8.9: RTX 40, L4, H100 and
      newer);
    - `exact_blocks` above 0 is about FP8 products, and needs what `matmul = "fp8"` needs;
    - `optimizer_state = "offload"` belongs to the fused engine too, for a plain LoRA in one process, without
      graphs;
    - `compile = "regional"` belongs to the reference engine, on NVIDIA GPUs with Triton, and so do
      `offload = "block"`, `"leaf"` and `"disk"`, on any;
    - `offload = "shard"` cuts the weights up among the processes that torchrun starts, so there must be two
      or more (`ideoflow plan --processes N` plans for them); a plan.json is for as many as it was made for;
    - `activation_budget` and `checkpointing` say the same thing: set one;
    - `quantize_via` says where weights are rounded, and `precision = "bf16"` or `"float32"` rounds none.

    Nothing is replaced in silence. Leave a key at "auto" and the planner takes what the machine can do.
    """,
)
DOES_NOT_FIT = define(
    "IP020",
    "the run does not fit",
    """
    The predicted peak is above the memory that is free on the device. What the recipe sets is never changed
    in silence: the plan lists the changes that save most for the least, in order of their cost, and
    `ideoflow plan` exits with 2.
    """,
    severity="warning",
)
TIGHT = define(
    "IP021",
    "the run only just fits",
    """
    The predicted peak is within 5 % of the free memory. The prediction is not exact, and other programs on
    the same card may need more at any time. Close what uses the card, or make one of the changes that the
    plan lists for smaller cards.
    """,
    severity="warning",
)
NOT_RECOMMENDED = define(
    "IP022",
    "device not recommended",
    """
    Ideogram 4 trains best on NVIDIA cards with bf16 units (compute capability 8.0 or newer). Elsewhere:

    - **AMD (ROCm)**: torch runs the reference path; nothing here was measured on such a card.
    - **Apple**: the run uses the processor, since float32 rotary positions and the attention kernels are
      not dependable on the GPU there; the nano base is fine, the full model takes days.
    - **NVIDIA before Ampere (T4, V100, RTX 20)**: no bf16 units, so products are many times slower.
    - **Processors**: right for the nano base and for tests; the full model takes days.
    """,
    severity="warning",
)
LARGE_ADAPTER = define(
    "IP023",
    "large adapter file",
    """
    The adapter's file will be over 1 GB. A LoRA of rank 16 to 64 holds most subjects and styles; each
    doubling of the rank doubles the file. Lower `adapter.rank`, or train fewer modules: `targets =
    "attention"`.
    """,
    severity="warning",
)
DISK_SHORT = define(
    "IP024",
    "little disk space",
    """
    Caches, checkpoints and the adapter need more disk space than is free. Free some, lower
    `train.keep_checkpoints`, or set `output.folder` and the variable `IDEOFLOW_CACHE` to another disk.
    """,
    severity="warning",
)
HOST_SHORT = define(
    "IP025",
    "little host memory",
    """
    Every model passes through the host's memory on its way to the GPU, and less of that is free than the
    largest one needs. The system will swap, or stop the run. Close other programs, or add swap space.
    """,
    severity="warning",
)
CARD_SHARED = define(
    "IP026",
    "other programs use the card",
    """
    Other processes hold memory on the card, so the plan has less to work with than the card has.
    `nvidia-smi` names them; close what you do not need and plan again.
    """,
    severity="note",
)
PROXY_GUIDANCE = define(
    "IP027",
    "samples are made with proxy guidance",
    """
    True asymmetric guidance needs the second, unconditional transformer, and there is no room for it in the
    host's memory, where it waits, or on the card, not even for a few of its blocks at once. The samples use
    the trained transformer without text in its place: good enough to follow a training, but not what the
    released pipeline makes.
    """,
    severity="note",
)
NO_DECISION = define(
    "IP007",
    "no such decision",
    """
    `--explain` takes the name of a decision, as the page lists them in its first column: `precision`,
    `checkpointing`, `compile` and so on.
    """,
)
BAD_AXIS = define(
    "IP008",
    "not a list of values to compare",
    """
    `--batch`, `--resolution` and `--rank` take whole numbers with commas between, within the bounds of the
    recipe's key of that name: `--batch 1,2,4`, `--resolution 512,1024`, `--rank 8,32,128`.
    """,
)
PLAN_UNWRITABLE = define(
    "IP009",
    "the plan cannot be written",
    """
    The file that `-o` or `--html` names cannot be written: a folder of that name is there, the disk is
    full, or permission is missing.
    """,
)
NOTHING_MEASURED = define(
    "IP028",
    "nothing can be measured",
    """
    `ideoflow plan --calibrate` runs a few steps on the device of this machine, so it takes no other card, no
    plan.json and no table. A base of the released model's size needs an NVIDIA GPU; on a processor only small
    bases such as `nano` are measured. What it finds goes into `calibration.json` in ideoflow's cache folder
    (`$IDEOFLOW_CACHE`), which must be writable.
    """,
)
NO_RECIPE = define(
    "IP029",
    "no recipe to plan",
    """
    `ideoflow plan` takes the path of a recipe or of a plan.json. Only `--calibrate` may go without one.
    """,
)
OPTIONS_APART = define(
    "IP030",
    "options that do not go together",
    """
    `ideoflow plan` shows one thing at a time: the page with its tables (`--compare`, `--batch`,
    `--resolution`, `--rank`), the plan as JSON (`--json`), a decision (`--explain`) or what differs
    (`--diff`). `-o` and `--html` go with each of them. A plan.json is a finished plan: for another card, or a
    table of variants, give the recipe.
    """,
)
EMPTY_OPTION = define(
    "IP032",
    "an option without a value",
    """
    An option of `ideoflow plan` has an empty text for its value, as an unset variable of a shell script gives
    (`--gpu "$CARD"`). Give a value, or leave the option out.
    """,
)
WITHOUT_EFFECT = define(
    "IP033",
    "a setting without effect",
    """
    `memory.quantize_via` says where weights are rounded while they load, and the plan rounds none: they are
    used as they are stored, or in bf16 or float32. With `precision = "auto"` this depends on the base and the
    card, so it is no error. Remove the key, or say the precision that is meant.
    """,
    severity="warning",
)
