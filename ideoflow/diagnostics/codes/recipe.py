"""Codes of recipes."""

from ideoflow.diagnostics.codes import define

NO_FILE = define(
    "IR001",
    "recipe not found",
    """
    The recipe file does not exist or cannot be read. Give its path: `ideoflow run recipes/quickstart.toml`.
    """,
)
BAD_TOML = define(
    "IR002",
    "not valid TOML",
    """
    The recipe is not a TOML document, so nothing in it can be used. The caret stands where reading stopped;
    the mistake is there or just before. The commonest: text without quotes, a missing closing quote or
    bracket, the same key twice.
    """,
)
UNKNOWN_KEY = define(
    "IR003",
    "unknown key",
    """
    The recipe has a table or key that ideoflow does not know. It is an error rather than ignored, since a
    misspelt `learnign_rate` would otherwise train with the default one.

    `docs/recipe.md` lists every key; editors that read `#:schema` complete them.
    """,
)
WRONG_TYPE = define(
    "IR004",
    "wrong type",
    """
    The key exists, but its value is of another kind: a text where a number belongs, a single value where a
    list belongs. Write numbers without quotes: `rank = 32`.
    """,
)
BAD_VALUE = define(
    "IR005",
    "value out of range",
    """
    The value is of the right type but not among those allowed: outside the key's bounds, or not one of its
    choices.
    """,
)
MISSING_KEY = define(
    "IR006",
    "required key missing",
    """
    A key without a default is missing. Every recipe needs `[model] base` and `[data] images`.
    """,
)
IMPOSSIBLE_PAIR = define(
    "IR007",
    "settings that contradict each other",
    """
    Two settings are each fine but cannot both hold, such as `caption = "instance"` without an
    `instance_prompt`. The message names both; change either.
    """,
)
NO_SUCH_PATH = define(
    "IR008",
    "a path in the recipe does not exist",
    """
    A folder or file that the recipe names is not there. Paths that are read are relative to the folder of the
    recipe itself, so that a recipe and its pictures can be moved together.
    """,
)
NO_TARGETS = define(
    "IR009",
    "adapter targets match nothing",
    """
    A glob in `adapter.targets` matches no Linear of the transformer's blocks, so nothing would be trained
    through it. Module names look like `layers.0.attention.to_q`, `layers.33.feed_forward.w2`,
    `layers.5.adaln_modulation`; `*` stands for any run of characters.
    """,
)
OTHER_TRAINER = define(
    "IR010",
    "a value that other trainers take",
    """
    The value is known from another trainer's configuration, and here it would be a trap or mean nothing. The
    message says what it would do and what to write.

    Where it is `memory.compile`, the choices are these. `regional` compiles one transformer block and uses it
    for all of them, for any length of caption and picture: seconds, once. `off` compiles nothing. `auto`
    takes what pays. The fused engine has kernels of its own and needs no torch.compile. Not offered:

    - The whole model as one graph (`true`, `whole`, `inductor`): the same kernels, after a first step of
      minutes.
    - `reduce-overhead` and `max-autotune` record CUDA graphs. A graph writes its outputs to the same memory
      each time, while PEFT's layers still hold the outputs of the call before: PyTorch stops with "accessing
      tensor output of CUDAGraphs that has been overwritten by a subsequent run". The fused engine records
      graphs of its own: `memory.graphs`.
    - `fullgraph` makes an error of every place that torch.compile cannot follow, where it would otherwise go
      on uncompiled. It makes nothing faster.
    """,
)
NOT_CARRIED = define(
    "IR020",
    "a setting was not carried over",
    """
    `ideoflow recipe import` found a setting of another trainer that a recipe has no place for, or that means
    something else here. The message and a comment at the top of the recipe say which, and what to do instead;
    `docs/from-simpletuner.md` is the whole table.
    """,
    "warning",
)
NOT_A_CONFIG = define(
    "IR021",
    "not a configuration that can be imported",
    """
    `ideoflow recipe import` reads SimpleTuner's config.json and data loader (JSON), ai-toolkit's YAML and
    musubi-tuner's TOML. The file cannot be read, or is none of them.
    """,
)
RECIPE_EXISTS = define(
    "IR022",
    "the recipe exists already",
    """
    `ideoflow recipe import` replaces no file without your word: name another with `-o`, or add `--force`.
    """,
)
RECIPE_UNWRITABLE = define(
    "IR023",
    "the recipe cannot be written",
    """
    The folder of the recipe may not be written, or the disk is full.
    """,
)
