"""Every key of a recipe, as frozen dataclasses: the one place where a key, its default, its bounds and its
documentation are written. The reader, ``schemas/recipe.schema.json`` and the docs are derived from here.

Paths of things that are read (``data.images``, ``validate.prompts``, a local ``model.base``) are relative to
the recipe's own folder; those that are written, ``output.folder`` and ``cache.folder``, to the current one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ideoflow.recipe.elsewhere import CAPTION_ELSEWHERE, COMPILE_ELSEWHERE, CROP_ELSEWHERE, INIT_ELSEWHERE


def setting(
    default: Any = ...,
    *,
    doc: str,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    multiple_of: int | None = None,
    megapixels: bool = False,
    elsewhere: Mapping[str, tuple[str, str]] | None = None,
) -> Any:
    """A dataclass field with its documentation and bounds; no default means that the key is required.

    ``above`` is an exclusive lower bound. ``megapixels`` marks a size that resolution_type = 'area' says in
    megapixels, of which the reader makes pixels. ``elsewhere`` are values that other trainers take and this
    one does not (:mod:`ideoflow.recipe.elsewhere`), by globs.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "multiple_of": multiple_of}
    metadata: dict[str, Any] = {"doc": doc} | {k: v for k, v in bounds.items() if v is not None}
    more = {"megapixels": megapixels, "elsewhere": elsewhere}
    metadata |= {k: v for k, v in more.items() if v}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The base model."""

    base: str = setting(
        doc="What to train on: 'nano' (tiny, made on first use), a folder in diffusers' layout, a hub id, or "
        "a .safetensors file with the transformer, here or on the hub ('owner/name/path/x.safetensors')."
    )
    parts: str | None = setting(
        None,
        doc="Where text encoder, tokenizer and autoencoder are when base is a single file: a folder or a hub "
        "id. Default: the file's own folder.",
    )
    revision: str | None = setting(None, doc="Commit, tag or branch of base, else of parts; pins re-runs.")


@dataclass(frozen=True, slots=True)
class PictureSettings:
    """Which pictures, which captions, and how each picture is cut to the size it is trained at."""

    images: str | None = setting(
        None,
        doc="Where the pictures are: a folder, searched with its sub-folders; a list of pictures (.jsonl, "
        ".csv or .parquet); .tar shards (WebDataset); or hf://datasets/OWNER/NAME. Globs such as "
        "'shards/*.tar' name several files.",
    )
    caption: Literal["auto", "sidecar", "instance", "filename", "column"] = setting(
        "auto",
        doc="sidecar: PICTURE.icap, .json or .txt beside each picture. column: the column of a list or "
        "table. instance: one caption for all (instance_prompt). filename: the picture's name, as prose. "
        "auto: the column of a list or table, else sidecar.",
        elsewhere=CAPTION_ELSEWHERE,
    )
    instance_prompt: str | None = setting(
        None, doc="The caption of every picture when caption = 'instance': .icap text, JSON or prose."
    )
    caption_column: str | None = setting(
        None,
        doc="Column of a list or table, or key of a .json beside a picture, that holds the caption, or a "
        "list of several. Default: caption, text or prompt.",
    )
    image_column: str | None = setting(
        None,
        doc="Column of a list or table with the picture's path or its bytes. Default: image, file_name and "
        "other usual names.",
    )
    image_folder: str | None = setting(
        None, doc="Folder that the paths in a list or table are relative to. Default: the list's own."
    )
    resolution: int = setting(
        1024,
        doc="Side in pixels of a square of the area that pictures are resized to; see resolution_type.",
        minimum=64,
        maximum=2048,
        multiple_of=16,
        megapixels=True,
    )
    resolution_type: Literal["pixel_area", "pixel", "area"] = setting(
        "pixel_area",
        doc="pixel_area: every picture gets the area of resolution squared. pixel: its shorter side is "
        "resolution, so that long pictures become larger. area: as pixel_area, and resolution and the three "
        "image sizes are written in megapixels: 1.0 is 1024.",
    )
    aspect: Literal["preserve", "square", "closest", "random"] = setting(
        "preserve",
        doc="preserve: the nearest size on the model's 16-pixel grid to the picture's own aspect. square: "
        "a square crop. closest: the nearest of aspects. random: one of aspects, drawn for each crop.",
    )
    aspects: tuple[float, ...] = setting(
        (1.0, 0.75, 1.333, 0.667, 1.5, 0.5625, 1.778),
        doc="Width by height of the crops that aspect = 'closest' and 'random' choose from.",
    )
    crop: Literal["center", "random", "corner", "off"] = setting(
        "center",
        doc="Which part is kept where the picture does not have the aspect of its size: the middle, a random "
        "part, or the lower right corner. off: all of it, stretched to the grid.",
        elsewhere=CROP_ELSEWHERE,
    )
    crop_variants: int = setting(
        1,
        doc="Crops of each picture, for crop = 'random' or aspect = 'random'; each is encoded once, with "
        "boxes of its own, and each visit of the picture trains one of them.",
        minimum=1,
        maximum=64,
    )
    flip: bool = setting(
        False,
        doc="Train half of the visits on the picture mirrored left to right. Pictures whose captions hold "
        "text, or speak of left and right, are never mirrored.",
    )
    minimum_image_size: int = setting(
        0,
        doc="Pictures below this size, measured as resolution is, are left out and counted.",
        minimum=0,
        megapixels=True,
    )
    maximum_image_size: int | None = setting(
        None,
        doc="Pictures above this size, measured as resolution is, are first scaled down to "
        "target_downsample_size; smaller ones are cut at their own scale.",
        minimum=64,
        megapixels=True,
    )
    target_downsample_size: int | None = setting(
        None,
        doc="Size that pictures above maximum_image_size are scaled to before a part of resolution is cut "
        "out. Default: as much of every picture as its size on the grid can hold.",
        minimum=64,
        megapixels=True,
    )
    upscale_limit: float = setting(
        1.5, doc="Pictures that would be enlarged by more than this factor are reported.", minimum=1.0
    )


@dataclass(frozen=True, slots=True)
class SourceSettings(PictureSettings):
    """One source of several. What it does not say is as [data] says."""

    images: str = setting("", doc="Where the pictures are, as in [data]. Default: the same.")
    name: str | None = setting(None, doc="What to call it in plans and messages. Default: images.")
    repeats: int = setting(1, doc="Visits of each of its pictures in an epoch.", minimum=1)
    weight: float | None = setting(
        None,
        doc="Its part in training against the weights of the other sources. Default: as many visits as it "
        "has pictures, times repeats.",
        above=0.0,
    )


@dataclass(frozen=True, slots=True)
class DataSettings(PictureSettings):
    """The pictures and where their captions are: one source here, or several as [[data.source]]."""

    ONE_OF: ClassVar[tuple[str, ...]] = ("images", "source")

    source: tuple[SourceSettings, ...] = setting(
        (), doc="Several sources, each a table [[data.source]]; keys of [data] are the defaults of all."
    )

    @property
    def sources(self) -> tuple[SourceSettings, ...]:
        """Every source; the short form is one."""
        if self.source:
            return self.source
        return (SourceSettings(**{f.name: getattr(self, f.name) for f in fields(PictureSettings)}),)


@dataclass(frozen=True, slots=True)
class CaptionSettings:
    """What is done with captions before they are encoded."""

    wrap: bool = setting(
        True, doc="Wrap plain-text captions into valid Ideogram JSON; false makes them an error."
    )
    placeholders: Mapping[str, str] = setting(
        {}, doc="Words for placeholders in captions: token = 'sks sailboat' fills every <token>."
    )
    dropout: float = setting(
        0.0, doc="Share of steps that train with no text at all, for guidance.", minimum=0.0, maximum=1.0
    )
    shuffle: bool = setting(
        False, doc="Vary the order of a caption's elements; boxes stay with their elements."
    )
    element_dropout: float = setting(
        0.0,
        doc="Chance of each element of kind obj to be left out of a variant. Text elements always stay: the "
        "model would learn to write unasked.",
        minimum=0.0,
        maximum=1.0,
    )
    variants: int | None = setting(
        None,
        doc="Most forms of its captions that a picture is trained with, when shuffle or element_dropout is "
        "set; each is encoded once and kept. Default: 8.",
        minimum=2,
        maximum=1024,
    )
    max_tokens: int = setting(
        2048, doc="Captions of more tokens are an error, never cut.", minimum=1, maximum=2048
    )

    @property
    def most_variants(self) -> int:
        """Forms of a caption that a picture may have; 1 where captions are not varied."""
        return (self.variants or 8) if self.shuffle or self.element_dropout else 1


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What is trained; docs/adapters.md tells the kinds apart, and who reads their files."""

    kind: Literal["lora", "dora", "lokr", "loha"] = setting(
        "lora",
        doc="lora: a product of two thin matrices. dora: the same with a learnt length for each row. lokr: a "
        "Kronecker product. loha: an elementwise product of two low-rank ones.",
    )
    rank: int = setting(32, doc="Rank of the low-rank update.", minimum=1, maximum=1024)
    alpha: float | None = setting(
        None, doc="Scale numerator: the update is multiplied by alpha / rank. Default: the rank.", above=0.0
    )
    rslora: bool = setting(
        False, doc="Divide alpha by the square root of the rank (rank-stabilised LoRA); lora and dora only."
    )
    targets: Literal["attention", "mlp", "all"] | tuple[str, ...] = setting(
        "all",
        doc="attention (to_q, to_k, to_v, to_out), mlp (w1, w2, w3), all (both), or a list of globs over "
        "module names such as 'layers.1?.attention.*'.",
    )
    rank_pattern: Mapping[str, int] = setting(
        {},
        doc="Other ranks for some of the targets: glob = rank; of several that match, the last counts.",
        minimum=1,
        maximum=1024,
    )
    alpha_pattern: Mapping[str, float] = setting(
        {},
        doc="Other alphas for some of the targets: glob = alpha; of several that match, the last counts.",
        above=0.0,
    )
    init: Literal["default", "gaussian", "lycoris"] = setting(
        "default",
        doc="How it starts, without changing the model. A lora or dora: the first factor Kaiming-uniform, or "
        "gaussian; the second is zero. A lokr: the first factor is zero, or as in LyCORIS the second.",
        elsewhere=INIT_ELSEWHERE,
    )
    factor: int | None = setting(
        None,
        doc="lokr: size of the first Kronecker factor, where it divides a side. Default: near the root.",
        minimum=2,
        maximum=1024,
    )
    decompose_both: bool = setting(False, doc="lokr: the first Kronecker factor is low-rank as well.")
    full_matrix: bool = setting(
        False, doc="lokr: both Kronecker factors are full matrices; rank and alpha have no meaning then."
    )


@dataclass(frozen=True, slots=True)
class ScheduleSettings:
    """Density of the noise levels that are trained (resolution-aware logit-normal)."""

    mu: float = setting(0.0, doc="Mean at 512 x 512; 0.5 ln(area / 512^2) is added.")
    std: float = setting(1.5, doc="Standard deviation, in logits of the noise level.", above=0.0)


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The training loop."""

    steps: int = setting(1000, doc="Optimiser steps to train for.", minimum=1)
    learning_rate: float = setting(1e-4, doc="Peak learning rate.", above=0.0)
    batch: int = setting(
        1, doc="Samples in a pass of each process; a step has batch x accumulation x processes.", minimum=1
    )
    accumulation: int = setting(1, doc="Forward passes whose gradients make one step.", minimum=1)
    warmup: int = setting(0, doc="Steps over which the learning rate rises from zero.", minimum=0)
    decay: Literal["constant", "linear", "cosine"] = setting(
        "constant", doc="Course of the learning rate after the warm-up."
    )
    weight_decay: float = setting(0.01, doc="AdamW's decoupled weight decay.", minimum=0.0)
    betas: tuple[float, ...] = setting((0.9, 0.999), doc="AdamW's two moment decays.")
    max_grad_norm: float = setting(
        1.0, doc="Gradients are scaled down to this global norm; 0 turns clipping off.", minimum=0.0
    )
    seed: int = setting(0, doc="Seeds the adapter, the order of pictures, the noise.", minimum=0)
    checkpoint_every: int = setting(
        250, doc="Steps between resumable checkpoints; the last step always makes one.", minimum=1
    )
    keep_checkpoints: int = setting(2, doc="Newest checkpoints that are kept.", minimum=1)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What the plan decides unless you do."""

    device: Literal["auto", "cuda", "cpu"] = setting("auto", doc="Where to train.")
    precision: Literal["auto", "bf16", "fp8", "int8", "nf4", "float32"] = setting(
        "auto",
        doc="Storage of the frozen base weights. fp8 (e4m3) and int8: the Linears of the blocks with a scale "
        "a row; nf4: in 4 bits by bitsandbytes, doubly quantised; all else in bf16. What is stored in the "
        "form asked for is kept exactly.",
    )
    quantize_via: Literal["auto", "gpu", "cpu"] = setting(
        "auto",
        doc="Where weights are rounded while they load. auto: on the GPU where there is one, piece by piece.",
    )
    engine: Literal["auto", "fused", "reference"] = setting(
        "auto",
        doc="fused: packed batches through kernels of our own, for NVIDIA GPUs; reference: plain diffusers "
        "and PEFT, one sample at a time.",
    )
    matmul: Literal["auto", "fp8", "bf16"] = setting(
        "auto",
        doc="Products with the frozen weights, in the fused engine. fp8 needs precision = 'fp8' and a card "
        "with FP8 units (compute capability 8.9); bf16 multiplies weights of any precision.",
    )
    exact_blocks: Literal["auto"] | int = setting(
        "auto",
        doc="With FP8 products, how many of the first blocks have their forward products in bf16: what those "
        "round goes through all the others. auto: 6 of 34 where they fit and cost little; 0 is fastest.",
        minimum=0,
    )
    activation_budget: Literal["auto"] | float = setting(
        "auto",
        doc="Share of the activations that the fused engine keeps for the backward pass: 0 recomputes every "
        "block, 1 recomputes nothing.",
        minimum=0.0,
        maximum=1.0,
    )
    checkpointing: Literal["auto", "on", "off"] = setting(
        "auto",
        doc="Recompute each block's activations in the backward pass, to save memory; in the fused engine, "
        "on is an activation budget of 0, off one of 1.",
    )
    compile: Literal["auto", "regional", "off"] = setting(
        "auto",
        doc="torch.compile, in the reference engine: regional compiles the repeated block once; off runs "
        "eagerly.",
        elsewhere=COMPILE_ELSEWHERE,
    )
    offload: Literal["auto", "none", "stream", "shard", "block", "leaf", "disk"] = setting(
        "auto",
        doc="Where the blocks' frozen weights wait. none: on the device. stream: in pinned host memory, "
        "fetched block by block ahead of the forward and the backward pass. shard: cut up among the GPUs of "
        "several processes, gathered likewise. block, leaf, disk: diffusers' group offloading, in the "
        "reference engine: blocks or Linears in host memory, blocks on disk.",
    )
    offload_blocks: int = setting(1, doc="Blocks of a group, for offload = 'block' and 'disk'.", minimum=1)
    offload_streams: bool = setting(
        True, doc="Fetch the next group while this one is at work, for offload = 'block', 'leaf' and 'disk'."
    )
    offload_folder: str | None = setting(
        None, doc="Folder for offload = 'disk', on a fast disk. Default: in ideoflow's cache."
    )
    activation_offload: Literal["auto", "none", "inputs", "outputs", "gate_up"] = setting(
        "auto",
        doc="What of every block waits in pinned host memory for the backward pass, in the fused engine. "
        "inputs: its input, exactly. outputs: with it the results of attention and of the two last products, "
        "and gate_up: with it the feed-forward's two inner products, both rounded to e4m3 but for attention.",
    )
    graphs: Literal["auto", "on", "off"] = setting(
        "auto",
        doc="on: steps of the fused engine are recorded as CUDA graphs, one for each size of picture and "
        "each 64 text tokens, and replayed, which spares the host 2,900 launches. Needs flash-attn-4.",
    )
    optimizer_state: Literal["auto", "float32", "8bit", "paged", "cpu", "offload"] = setting(
        "auto",
        doc="AdamW's moments. float32: beside the adapter. cpu: in pinned host memory, exact. offload: there "
        "with the adapter's float32 weights and gradients, exact, in the fused engine. 8bit: a quarter of "
        "the size, by bitsandbytes. paged: in memory that the driver moves when it must.",
    )


@dataclass(frozen=True, slots=True)
class ValidateSettings:
    """Pictures made before, during and after training, with the same seeds each time."""

    prompts: tuple[str, ...] = setting((), doc="Files or globs of captions (.icap, .json, .txt).")
    every: int = setting(
        250, doc="Steps between samplings; the first and the last step always sample.", minimum=1
    )
    preset: Literal["quality", "default", "turbo"] = setting(
        "default",
        doc="Sampling preset of the model's authors: 48, 20 or 12 steps with its guidance schedule.",
    )
    steps: int | None = setting(None, doc="Sampling steps, in place of the preset's.", minimum=1)
    guidance: float | None = setting(
        None, doc="Constant guidance, in place of the preset's schedule.", minimum=0.0
    )
    width: int | None = setting(
        None, doc="Width in pixels; default: data.resolution.", minimum=64, multiple_of=16
    )
    height: int | None = setting(
        None, doc="Height in pixels; default: data.resolution.", minimum=64, multiple_of=16
    )
    seed: int = setting(
        42, doc="Seed of the first prompt's noise; the next prompt takes the next.", minimum=0
    )


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where encoded pictures and captions are kept."""

    folder: str | None = setting(
        None,
        doc="Folder of the cache; several recipes, and several processes at once, may share one. Default: "
        "'encoded' in $IDEOFLOW_CACHE, else in ~/.cache/ideoflow.",
    )


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """Where results go."""

    folder: str | None = setting(None, doc="Folder of the run. Default: outputs/NAME-OF-THE-RECIPE.")
    format: Literal["comfyui", "diffusers", "both"] = setting(
        "comfyui",
        doc="Names in the adapter file. comfyui: one qkv; for lora, diffusers loads it as well. diffusers: "
        "to_q, to_k, to_v apart, not for loha. both: two files.",
    )
    dtype: Literal["bf16", "float32"] = setting(
        "bf16", doc="Type of the numbers in the adapter file; checkpoints are always float32."
    )
    name: str | None = setting(
        None, doc="Name of the adapter file, without its suffix. Default: the recipe's."
    )


@dataclass(frozen=True, slots=True)
class RecipeTables:
    """The tables of a recipe, in the order in which a reader wants them."""

    model: ModelSettings
    data: DataSettings
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    validate: ValidateSettings = field(default_factory=ValidateSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
