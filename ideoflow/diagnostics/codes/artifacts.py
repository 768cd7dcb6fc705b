"""Codes of adapter files, checkpoints and outputs."""

from ideoflow.diagnostics.codes import define

UNWRITABLE = define(
    "IA001",
    "the output folder cannot be written",
    """
    Results cannot be written: the disk is full, or the folder belongs to somebody else. Checkpoints are
    written beside their place and renamed when they are complete, so the last one is always whole.

    `ideoflow adapter` replaces nothing that is there: choose another name, or remove the old file. Adapters
    are files named `.safetensors`, since none of another name is opened.
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
NOT_AN_ADAPTER = define(
    "IA004",
    "not an adapter file",
    """
    What was named is not there, holds nothing, or is a pickle (`.pt`, `.bin`, `.ckpt`). Pickles run whatever
    their maker put in them, so ideoflow never opens one: save the adapter as safetensors with the program
    that it comes from. A folder is read as PEFT saves it, `adapter_config.json` beside
    `adapter_model.safetensors`.
    """,
)
DAMAGED_ADAPTER = define(
    "IA005",
    "a damaged or foreign adapter file",
    """
    An adapter file does not hold together: it is cut short, a tensor has no partner (`lora_A` without
    `lora_B`), shapes do not fit, numbers are integers (alpha may be one) or not finite, PEFT's configuration
    gives no rank and alpha, or keys do not belong to the blocks of Ideogram 4. The message names the file and
    the key.

    Get the file again from where it came from. Where the keys are those of another model, the adapter was
    trained for that model and cannot be used here; adapters that also change modules outside the blocks
    (`input_proj`, `llm_cond_proj`) are not supported.
    """,
)
CANNOT_CONVERT = define(
    "IA006",
    "an adapter has no exact form there",
    """
    The form that was asked for cannot hold this adapter exactly, so nothing was written:

    - A LoKr whose q, k and v were trained apart has three Kronecker products that share no factor; ComfyUI
      reads one for each matrix, and there q, k and v are one matrix. LoKr adapters that ideoflow trains share
      the second factor, so they do convert.
    - A DoRA stores the length of each row. ComfyUI takes it relative to the base's rows (forms `comfyui` and
      `kohya`), PEFT and LyCORIS relative to the changed ones; converting needs the base: `--base`.
    - diffusers has no reader for a LoHa.
    - Forms without alpha (`diffusers`, `peft`) have it multiplied in, which may be too large for float16.

    `ideoflow adapter resize` makes a LoRA of any kind, which every form holds; `ideoflow adapter merge` needs
    no adapter file at all.
    """,
)
WRONG_BASE = define(
    "IA007",
    "an adapter and a base do not belong together",
    """
    A module of the adapter is not in the base, or has another size there. Adapters fit the model that they
    were trained on: one for `nano` does not fit the released Ideogram 4, nor the other way round.
    """,
)
CANNOT_MERGE = define(
    "IA008",
    "this base cannot be merged into",
    """
    Merging writes new weights in the base's own form: bf16, float16 or float32, or FP8 (e4m3 with scales),
    in diffusers' names or the original ones, in one file or several. Weights in other forms (bitsandbytes'
    NF4, int8) would be rounded again from an already rounded weight with nothing gained: merge into the bf16
    or FP8 release instead, and quantise that.

    Nothing is written either where a new weight is too large for the base's type (float16 ends at 65504), or
    where the base itself holds numbers that are not finite.
    """,
)
