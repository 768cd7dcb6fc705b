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

    In the very first step nothing has been learnt yet, so no learning rate is the cause: the base's weights,
    or what is cached of captions and pictures, hold numbers that are not finite. Download the base again; if
    that does not help, name another `cache.folder`, and everything is encoded anew.

    A loss between 0.3 and 1.3 that jumps about is normal for Ideogram 4, and no sign of this.
    """,
)

UNFUSED_ADAPTER = define(
    "IE500",
    "adapter not covered by the fused engine",
    """
    The fused engine computes plain LoRA on the linear layers of the transformer's blocks (`to_q`, `to_k`,
    `to_v`, `to_out.0`, `w1`, `w2`, `w3`): one active adapter, no dropout, no bias, no DoRA, not merged.
    Anything else that is trainable, such as `adaln_modulation`, would silently get no gradient, so the engine
    stops instead. The reference engine trains all of it, slower.
    """,
)
UNFUSED_BASE = define(
    "IE501",
    "base weights not covered by the fused engine",
    """
    The fused engine reads dense weights (bf16, float16, float32), e4m3 weights with row scales
    (`Float8Linear`) and bitsandbytes' 4-bit weights. Layers that share one product (q, k and v; w1 and w3)
    must be stored alike. FP8 products need e4m3 weights.
    """,
)
NO_FP8_UNITS = define(
    "IE502",
    "this card has no FP8 units",
    """
    FP8 matrix products need compute capability 8.9 or higher (Ada, Hopper, Blackwell). On older cards keep
    the base in FP8 to save memory and multiply in bf16: the weights are dequantised as they are used.
    """,
)
ATTENTION_MISSING = define(
    "IE503",
    "the attention kernel asked for is not available",
    """
    `flash4` is FlashAttention-4 (package `flash-attn-4`), for Hopper and data-centre Blackwell cards;
    `cudnn_varlen` is cuDNN's attention (package `nvidia-cudnn-frontend`), for Hopper cards. Both take the
    samples' lengths as data, so mixed lengths cost no padding and no mask; the extra `cuda` installs them.
    `sdpa` runs everywhere: PyTorch's own attention, once for a batch of equal lengths, otherwise once a
    sample.
    """,
)
TRITON_MISSING = define(
    "IE504",
    "Triton is not installed",
    """
    On a GPU the fused engine's operations are Triton kernels. Triton comes with PyTorch's CUDA wheels for
    Linux; on other systems install it by itself or use the reference engine.
    """,
)
GRAPH_FAILED = define(
    "IE505",
    "a training step cannot be recorded as a CUDA graph",
    """
    With `graphs = "on"` the fused engine records each shape of batch once and then launches the whole step at
    once, which spares the host 2,900 launches. Something in the step refused to be recorded: an attention
    package or a driver of another version, most likely. `memory.graphs = "off"` launches one by one.
    """,
)
DOES_NOT_FIT = define(
    "IE004",
    "the run does not fit",
    """
    The plan predicts more memory than the device has free, so the run would end in the middle with an
    out-of-memory error. `ideoflow plan RECIPE` lists the cheapest changes that make it fit. `--force` runs it
    all the same.
    """,
)
NO_OPTIMIZER = define(
    "IE005",
    "this kind of optimiser state needs a GPU",
    """
    `memory.optimizer_state = "paged"` keeps AdamW's moments in memory that an NVIDIA driver moves between
    card and host. Elsewhere there is none; "float32" keeps them beside the adapter, "8bit" in a quarter of
    that, "cpu" on the host.
    """,
)
NO_SCRATCH = define(
    "IE006",
    "no place for weights on disk",
    """
    `memory.offload = "disk"` writes the blocks' weights to a folder of their own, below
    `memory.offload_folder` or ideoflow's cache, and removes them when the run ends. The disk must have room
    for them (9 GB in FP8) and should be a fast one: every pass reads all of them.
    """,
)
