"""Values that other trainers take and this one does not: what is wrong with each here, and what to write."""

# Ways to ask for torch.compile (Accelerate's dynamo_backend and dynamo_mode among them).
_REGIONAL = "write 'regional', or 'auto' for what pays on this card"
_WHOLE = ("compiles all blocks as one graph, for minutes, and again for other shapes", _REGIONAL)
_GRAPHS = ("replays CUDA graphs, which overwrite outputs that PEFT's layers still read", _REGIONAL)
_TUNING = ("times many kernels for each product and shape, for minutes", _REGIONAL)
COMPILE_ELSEWHERE = {
    "reduce-overhead": _GRAPHS,
    "cudagraphs": _GRAPHS,
    "max-autotune": _TUNING,
    "max-autotune-no-cudagraphs": _TUNING,
    "fullgraph": ("makes errors of what torch.compile cannot follow, and nothing faster", _REGIONAL),
    **dict.fromkeys(("whole", "full", "default", "inductor"), _WHOLE),
    **dict.fromkeys(("true", "on", "yes"), ("does not say what to compile", _REGIONAL)),
    **dict.fromkeys(("false", "no", "none", "eager"), ("is how other trainers say it", "write 'off'")),
}

# Of data loaders.
CAPTION_ELSEWHERE = {
    **dict.fromkeys(("textfile", "txt"), ("is how other trainers say it", "write 'sidecar'")),
    **dict.fromkeys(("instanceprompt", "prompt"), ("is how other trainers say it", "write 'instance'")),
    **dict.fromkeys(
        ("parquet", "jsonl", "csv", "huggingface", "metadata"),
        ("is a kind of source, which images names", "write 'column', or 'auto'"),
    ),
}
CROP_ELSEWHERE = {
    "face": ("would need something that finds faces", "write 'center', or cut the faces out beforehand"),
    "true": ("does not say which part stays", "write 'center' or 'random'"),
    "false": ("is how other trainers say it", "write 'off'"),
}

# PEFT's init_lora_weights and init_weights; globs, since PiSSA's iterations are in its name.
_START = "write 'default' or 'gaussian'"
_ROUNDED = ("changes the base's weights, and FP8 and NF4 round the change away", _START)
_PASSES = ("needs passes over the data before training", _START)
INIT_ELSEWHERE = {
    **dict.fromkeys(("pissa", "pissa_niter_*", "olora", "loftq", "corda"), _ROUNDED),
    **dict.fromkeys(("eva", "lora_ga"), _PASSES),
    "orthogonal": ("rounds both factors to the base's type, which moves a model of few bits", _START),
    "mica": (
        "freezes one factor at the base's least singular vectors: FP8's and NF4's rounding noise",
        _START,
    ),
    "true": ("is PEFT's word for 'default'", "write 'default'"),
    "false": ("leaves no factor zero, so that training would not start from the base", "write 'default'"),
}
