"""Codes of base models."""

from ideoflow.diagnostics.codes import define

NOT_A_BASE = define(
    "IM001",
    "base model not found",
    """
    `model.base` is neither `nano`, nor a folder, nor a single `.safetensors` file, nor a Hugging Face hub id
    of the form `owner/name`, nor a file on the hub, `owner/name/path/file.safetensors`. Relative folders and
    files are looked for beside the recipe.
    """,
)
UNSUPPORTED_FORM = define(
    "IM002",
    "form of checkpoint not supported",
    """
    The files are not in a form that can be trained on. Supported: a folder in diffusers' layout
    (`model_index.json`, `transformer/`, `text_encoder/`, `tokenizer/`, `vae/`) whose weights are safetensors
    in bf16, float16 or float32; its transformers may also be FP8 (e4m3 with a scale a row or a tensor) or
    bitsandbytes' NF4, with q, k and v apart or fused. A transformer may also be a single `.safetensors` file
    in one of these forms, as ComfyUI has them; of several in one folder, name one.

    GGUF, SDNQ, NVFP4, third parties' INT8 and ComfyUI's older FP8 (`scaled_fp8`, with scales called
    `scale_weight`) are not read: they are made for inference, in layouts of their own. Take the official
    release in FP8 or NF4; `memory.precision` holds any base in int8, if that is what you want. Pickled files
    (`.bin`, `.pt`, `.ckpt`) are never opened: unpickling runs whatever code the file holds. `ideoflow model
    inspect PATH` tells the form of a file or folder.
    """,
)
BAD_CONFIG = define(
    "IM003",
    "a file of the base model is damaged",
    """
    A `config.json` is missing or unreadable or has a value that the part cannot be built with, the tokenizer
    lacks its words or its chat template, or a weight file is cut short or its header or index says what is
    not so. The message names the file, and the key where there is one. The usual cause is a download that
    was interrupted: remove the file and download again.
    """,
)
NO_ACCESS = define(
    "IM004",
    "the hub refused the base model",
    """
    Ideogram's repositories on the Hugging Face hub are gated. You need a token, and you must have accepted
    the licence on the model's page with the same account:

    1. open https://huggingface.co/MODEL and accept the licence;
    2. `hf auth login`, or set `HF_TOKEN`.
    """,
)
NO_DOWNLOAD = define(
    "IM005",
    "the base model could not be downloaded",
    """
    The hub did not answer, the network is off, the revision does not exist, or the disk is full. What was
    downloaded is kept: the next try goes on from there. Offline, give a local folder as `model.base`.
    """,
)
WRONG_WEIGHTS = define(
    "IM006",
    "weights do not fit the model",
    """
    A tensor is missing, left over, or of another shape than the configuration asks for; or what stands
    beside quantised weights does not belong to them: FP8 has a scale beside each weight, and bitsandbytes'
    NF4 has `absmax`, `quant_map` and `quant_state`, whose lengths follow from the weight's shape, and whose
    numbers are finite. The message names the file and the tensor. The usual cause is a download that was put
    together from two revisions: remove the file and download again.

    Or the parts are whole, and of different models, as when `model.parts` names another one than the file's:
    `llm_features_dim` of the transformer is 13 times `hidden_size` of the text encoder, which has at least
    36 layers and a word for every id of the tokenizer; `in_channels` is 4 times `latent_channels` of the
    autoencoder, whose latents are 8 pixels wide; and the second transformer has the sizes of the first. The
    message names both files and keys.

    All of it is told from the files' headers, before anything is encoded; `ideoflow model inspect PATH` tells
    the same of a file or folder. Nothing is trained on a model that is partly random.
    """,
)
TOO_LONG = define(
    "IM007",
    "caption too long",
    """
    The text encoder takes 2048 tokens with the chat template. A longer caption is never cut, because half a
    JSON caption is no caption. Shorten descriptions, or leave out the least important elements.
    """,
)
NO_PARTS = define(
    "IM008",
    "the parts beside a single file",
    """
    A single file, such as ComfyUI's `ideogram4_fp8_scaled.safetensors`, holds the transformer alone. Training
    also needs the text encoder, the tokenizer and the autoencoder: say where they are with

    ```toml
    [model]
    base = "ideogram4_fp8_scaled.safetensors"
    parts = "ideogram-ai/ideogram-4-fp8"     # or a folder in diffusers' layout
    ```

    or put the folders `text_encoder`, `tokenizer` and `vae` beside the file. From the hub only those parts
    are downloaded, not the transformers. A second transformer, for true guidance, is found beside the file
    under its published name, `ideogram4_unconditional_fp8_scaled.safetensors`.

    The file may be on the hub itself: `base = "owner/name/path/ideogram4_fp8_scaled.safetensors"` downloads
    that file and no other of its repository. `model.revision` is then of that repository, and `parts` are
    those of their own repository's main branch.
    """,
)
NO_REVISION = define(
    "IM009",
    "a revision of something that is not on the hub",
    """
    `model.revision` is a commit, tag or branch of a repository on the Hugging Face hub. Folders and files
    have none; the plan tells them apart by their digests.
    """,
)
NO_LIBRARY = define(
    "IM010",
    "a library is missing or broken",
    """
    Some settings need a library that the others do not: NF4 weights and 8-bit or paged moments need
    bitsandbytes. It comes with ideoflow's own dependencies, but it brings native code that not every machine
    can load. Install it again, or choose another `memory.precision` or `memory.optimizer_state`.
    """,
)
UNEVEN_ROWS = define(
    "IM011",
    "rows that blocks of 4-bit numbers do not fill",
    """
    With `memory.precision = "nf4"` bitsandbytes multiplies with weights whose numbers have a scale for each
    block, 64 as a rule. That is right on every machine only where the rows of a weight hold whole blocks: on
    processors with AVX-512 its kernel begins each row with a scale of its own. The released models have such
    rows. Another base, also one that is stored in NF4, can be held in any other precision: its 4-bit numbers
    are then looked up in one run, whatever the rows' length.
    """,
)
NOT_FINITE = define(
    "IM012",
    "the base model gives numbers that are not finite",
    """
    A caption's features or a picture's latents came out as NaN or infinite. Nothing of the kind is cached, so
    that a repaired base encodes it anew. The weights of the part that the message names are damaged: remove
    its files and download them again.
    """,
)
