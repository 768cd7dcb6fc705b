"""The architecture of Ideogram 4 as a table, without torch.

Shapes are those of ``diffusers.Ideogram4Transformer2DModel``, ``AutoencoderKLFlux2`` and the text body of
Qwen3-VL, read from their ``config.json`` files; a test counts the parameters of diffusers' own classes
against this table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

# Decoder layers of the text encoder whose outputs are the text features (diffusers'
# QWEN3_VL_ACTIVATION_LAYERS); the layer index varies fastest in the feature vector.
TAPPED_LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)
# Pixels per image token and side: the VAE's factor 8 times the 2 x 2 patches.
PIXELS_PER_TOKEN = 16
MAX_TEXT_TOKENS = 2048
# A block's products: what each is called, and the Linears that share its input.
PRODUCTS = {
    "qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "o": ("attention.to_out.0",),
    "ffn": ("feed_forward.w1", "feed_forward.w3"),
    "w2": ("feed_forward.w2",),
}

_ATTENTION = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
_MLP = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
TARGET_SETS: Mapping[str, tuple[str, ...]] = {"attention": _ATTENTION, "mlp": _MLP, "all": _ATTENTION + _MLP}


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Sizes of the transformer; the defaults are the released model."""

    in_channels: int = 128
    num_layers: int = 34
    attention_head_dim: int = 256
    num_attention_heads: int = 18
    intermediate_size: int = 12288
    adaln_dim: int = 512
    llm_features_dim: int = 53248

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> TransformerSpec:
        """From a diffusers ``transformer/config.json``; absent keys take the released model's sizes."""
        return cls(**{k: int(str(config[k])) for k in cls.__slots__ if k in config})

    @property
    def hidden(self) -> int:
        return self.attention_head_dim * self.num_attention_heads

    def block_linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each Linear in one block."""
        h, f = self.hidden, self.intermediate_size
        sizes = dict.fromkeys(_ATTENTION, (h, h))
        sizes |= {"feed_forward.w1": (f, h), "feed_forward.w2": (h, f), "feed_forward.w3": (f, h)}
        return sizes | {"adaln_modulation": (4 * h, self.adaln_dim)}

    @lru_cache(maxsize=16)  # noqa: B019 - a handful of architectures
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every Linear in all blocks, by diffusers' module name."""
        block = self.block_linears()
        return {f"layers.{i}.{name}": size for i in range(self.num_layers) for name, size in block.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by diffusers' name."""
        h, a, c, f = self.hidden, self.adaln_dim, self.in_channels, self.llm_features_dim
        linears = {
            "input_proj": (h, c),
            "llm_cond_proj": (h, f),
            "t_embedding.mlp_in": (h, h),
            "t_embedding.mlp_out": (h, h),
            "adaln_proj": (a, h),
            "final_layer.linear": (c, h),
            "final_layer.adaln_modulation": (h, a),
        }
        biased = linears | {n: s for n, s in self.linears().items() if n.endswith("adaln_modulation")}
        norms = {"attention.norm_q": self.attention_head_dim, "attention.norm_k": self.attention_head_dim}
        norms |= dict.fromkeys(("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), h)
        shapes: dict[str, tuple[int, ...]] = {
            f"{n}.weight": s for n, s in (linears | dict(self.linears())).items()
        }
        shapes |= {f"{name}.bias": (size[0],) for name, size in biased.items()}
        shapes |= {
            f"layers.{i}.{name}.weight": (size,)
            for i in range(self.num_layers)
            for name, size in norms.items()
        }
        return shapes | {"llm_cond_norm.weight": (f,), "embed_image_indicator.weight": (2, h)}

    def text_projection_parameters(self) -> int:
        """``llm_cond_norm`` and ``llm_cond_proj``: not needed once their result is cached."""
        return self.llm_features_dim + (self.llm_features_dim + 1) * self.hidden

    def parameters(self) -> int:
        """All parameters, embeddings, biases and norms included."""
        h, a, c = self.hidden, self.adaln_dim, self.in_channels
        norms = 4 * h + 2 * self.attention_head_dim
        block = sum(o * i for o, i in self.block_linears().values()) + 4 * h + norms
        outer = (c + 1) * h + 2 * (h + 1) * h + (h + 1) * a + 2 * h
        final = (h + 1) * c + (a + 1) * h
        return self.num_layers * block + self.text_projection_parameters() + outer + final


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """Sizes of the text encoder's decoder; the defaults are Qwen3-VL-8B-Instruct."""

    hidden_size: int = 4096
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 12288
    vocab_size: int = 151936

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> TextEncoderSpec:
        """From the ``text_config`` of a ``text_encoder/config.json``."""
        return cls(**{k: int(str(config[k])) for k in cls.__slots__ if k in config})

    def layer_parameters(self) -> int:
        """Attention with grouped key/value heads and per-head q/k norms, SwiGLU, two RMSNorms."""
        h, d = self.hidden_size, self.head_dim
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return h * d * heads + 2 * d + 3 * h * self.intermediate_size + 2 * h

    def parameters(self) -> int:
        """Embedding, decoder layers and final norm; the vision tower is not counted."""
        return (
            self.vocab_size * self.hidden_size
            + self.num_hidden_layers * self.layer_parameters()
            + self.hidden_size
        )


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """Sizes of ``AutoencoderKLFlux2``; the defaults are the released model."""

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> VaeSpec:
        """From a diffusers ``vae/config.json``."""
        known: dict[str, Any] = {k: int(str(config[k])) for k in cls.__slots__[1:] if k in config}
        if "block_out_channels" in config:
            known["block_out_channels"] = tuple(map(int, config["block_out_channels"]))  # type: ignore[call-overload]
        return cls(**known)

    @lru_cache(maxsize=16)  # noqa: B019 - a handful of architectures
    def parameters(self) -> int:
        """All parameters of encoder, decoder and the 1x1 convolutions between them."""
        channels, latent = self.block_out_channels, self.latent_channels

        def conv(i: int, o: int, k: int = 3) -> int:
            return i * o * k * k + o

        def resnet(i: int, o: int) -> int:
            shortcut = conv(i, o, 1) if i != o else 0
            return 2 * i + conv(i, o) + 2 * o + conv(o, o) + shortcut

        def middle(c: int) -> int:
            return 2 * resnet(c, c) + 2 * c + 4 * (c * c + c)

        encoder = conv(3, channels[0])
        previous = channels[0]
        for index, c in enumerate(channels):
            encoder += resnet(previous, c) + (self.layers_per_block - 1) * resnet(c, c)
            encoder += conv(c, c) if index < len(channels) - 1 else 0
            previous = c
        encoder += middle(previous) + 2 * previous + conv(previous, 2 * latent)

        reverse = channels[::-1]
        decoder = conv(latent, reverse[0]) + middle(reverse[0])
        previous = reverse[0]
        for index, c in enumerate(reverse):
            decoder += resnet(previous, c) + self.layers_per_block * resnet(c, c)
            decoder += conv(c, c) if index < len(reverse) - 1 else 0
            previous = c
        decoder += 2 * previous + conv(previous, 3)
        return encoder + decoder + conv(2 * latent, 2 * latent, 1) + conv(latent, latent, 1)


def match_targets(
    targets: str | Sequence[str], spec: TransformerSpec | None = None
) -> dict[str, tuple[str, ...]]:
    """Modules that each target names, by target: a set's name (attention, mlp, all) or globs over names."""
    names = (spec or TransformerSpec()).linears()
    if isinstance(targets, str):
        wanted = TARGET_SETS[targets]
        return {targets: tuple(n for n in names if n.split(".", 2)[2] in wanted)}
    return {glob: tuple(n for n in names if fnmatchcase(n, glob)) for glob in targets}


def target_modules(targets: str | Sequence[str], spec: TransformerSpec | None = None) -> tuple[str, ...]:
    """Every module that the targets name, once each, in the model's order."""
    chosen = {n for modules in match_targets(targets, spec).values() for n in modules}
    return tuple(n for n in (spec or TransformerSpec()).linears() if n in chosen)
