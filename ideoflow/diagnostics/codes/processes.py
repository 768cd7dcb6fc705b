"""Codes of work that several processes share."""

from ideoflow.diagnostics.codes import define

NOT_LAUNCHED = define(
    "IE600",
    "several processes, but not by torchrun",
    """
    `WORLD_SIZE` says that several processes work together, but the other variables that torchrun sets
    (`RANK`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) are missing or cannot be right.
    Start all of them with

        torchrun --nproc-per-node 2 -m ideoflow run portrait.toml

    or, for one process alone, without `WORLD_SIZE`. Some job schedulers set it for whatever they start.
    """,
)
TOO_FEW_GPUS = define(
    "IE601",
    "more processes than GPUs",
    """
    Every process that torchrun starts on a host trains on a GPU of its own, `cuda:LOCAL_RANK`. Two on one GPU
    would take turns, need twice the memory and be no faster, and NCCL refuses it. Start as many as there are
    GPUs (`nvidia-smi -L` lists them, `CUDA_VISIBLE_DEVICES` hides some), or one with more accumulation: the
    global batch is `train.batch` x `train.accumulation` x processes.
    """,
)
PROCESS_LOST = define(
    "IE602",
    "one of the processes ended",
    """
    Several processes train together, and one of them ended, or could no longer be reached, without saying
    why: killed for the host's memory, by hand or by a scheduler, or a broken network. The others cannot go on
    without it. Its own output, if any, is on the same terminal; torchrun's summary names its exit code or
    signal.

    The next run goes on from the last checkpoint. `torchrun --max-restarts N` starts the next run by itself.
    """,
)
UNLIKE_PROCESSES = define(
    "IE603",
    "the processes do not see the same",
    """
    Processes that train together must start from the same recipe, pictures, base and checkpoint. On several
    hosts this means that the output folder, and whatever the recipe reads, are on a file system that all of
    them share. What differs is in the message.
    """,
)
