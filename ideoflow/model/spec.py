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
from math import prod
from typing import Any

# Decoder layers of the text encoder whose outputs are the text features (diffusers'
# QWEN3_VL_ACTIVATION_LAYERS); the layer index varies fastest in the feature vector.
TAPPED_LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35)
# Latents per image token and side; and pixels: the VAE's factor 8 times these patches.
PATCH = 2
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

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by the name that transformers' ``Qwen3VLTextModel`` gives it."""
        h, d, f = self.hidden_size, self.head_dim, self.intermediate_size
        queries, keys = self.num_attention_heads * d, self.num_key_value_heads * d
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (queries, h),
            "self_attn.k_proj": (keys, h),
            "self_attn.v_proj": (keys, h),
            "self_attn.o_proj": (h, queries),
            "self_attn.q_norm": (d,),
            "self_attn.k_norm": (d,),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
        }
        shapes = {
            f"layers.{i}.{name}.weight": shape
            for i in range(self.num_hidden_layers)
            for name, shape in layer.items()
        }
        return shapes | {"embed_tokens.weight": (self.vocab_size, h), "norm.weight": (h,)}

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

    @property
    def downscale(self) -> int:
        """Pixels per latent and side: each block but the last halves both."""
        return 1 << len(self.block_out_channels) - 1

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and of the latents' statistics, by diffusers' name."""
        latent = self.latent_channels
        shapes: dict[str, tuple[int, ...]] = {}

        def layer(name: str, *shape: int) -> None:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

        def conv(name: str, i: int, o: int, k: int = 3) -> None:
            layer(name, o, i, k, k)

        def resnets(name: str, count: int, i: int, o: int) -> None:
            for resnet in (f"{name}.resnets.{n}" for n in range(count)):
                layer(f"{resnet}.norm1", i)
                conv(f"{resnet}.conv1", i, o)
                layer(f"{resnet}.norm2", o)
                conv(f"{resnet}.conv2", o, o)
                if i != o:
                    conv(f"{resnet}.conv_shortcut", i, o, 1)
                i = o

        def middle(name: str, c: int) -> None:
            resnets(name, 2, c, c)
            layer(f"{name}.attentions.0.group_norm", c)
            for linear in ("to_q", "to_k", "to_v", "to_out.0"):
                layer(f"{name}.attentions.0.{linear}", c, c)

        def half(name: str, i: int, blocks: str, count: int, channels: Sequence[int], o: int) -> None:
            previous = channels[0]
            conv(f"{name}.conv_in", i, previous)
            middle(f"{name}.mid_block", self.block_out_channels[-1])
            for n, c in enumerate(channels):
                resnets(f"{name}.{blocks}_blocks.{n}", count, previous, c)
                if n < len(channels) - 1:
                    conv(f"{name}.{blocks}_blocks.{n}.{blocks}samplers.0.conv", c, c)
                previous = c
            layer(f"{name}.conv_norm_out", previous)
            conv(f"{name}.conv_out", previous, o)

        channels, count = self.block_out_channels, self.layers_per_block
        half("encoder", 3, "down", count, channels, 2 * latent)
        half("decoder", latent, "up", count + 1, channels[::-1], 3)
        conv("quant_conv", 2 * latent, 2 * latent, 1)
        conv("post_quant_conv", latent, latent, 1)
        statistics = {"running_mean": (4 * latent,), "running_var": (4 * latent,), "num_batches_tracked": ()}
        return shapes | {f"bn.{name}": shape for name, shape in statistics.items()}

    @lru_cache(maxsize=16)  # noqa: B019 - a handful of architectures
    def parameters(self) -> int:
        """All parameters of encoder, decoder and the 1x1 convolutions between them."""
        return sum(prod(shape) for name, shape in self.tensors().items() if not name.startswith("bn."))


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
