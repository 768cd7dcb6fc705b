"""The torch-free table against the classes of diffusers and transformers, on the meta device."""

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Ideogram4Transformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from transformers import Qwen3VLConfig, Qwen3VLModel

from ideoflow.model.base import NANO_TEXT, NANO_TRANSFORMER, NANO_VAE
from ideoflow.model.spec import (
    TAPPED_LAYERS,
    TextEncoderSpec,
    TransformerSpec,
    VaeSpec,
    match_targets,
    target_modules,
)

ODD = TransformerSpec(64, 3, 48, 5, 200, 24, 130)


def count(module):
    return sum(p.numel() for p in module.parameters())


def built(make):
    with torch.device("meta"):
        return make()


def transformer(spec):
    half = spec.attention_head_dim // 2
    section = (half - 2 * (half // 3), half // 3, half // 3)
    return built(lambda: Ideogram4Transformer2DModel(**asdict(spec), mrope_section=section))


@pytest.mark.parametrize("spec", [TransformerSpec(), NANO_TRANSFORMER, ODD], ids=["full", "nano", "odd"])
def test_transformer(spec):
    model = transformer(spec)
    assert spec.parameters() == count(model)
    linears = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert spec.linears() == {n: s for n, s in linears.items() if n.startswith("layers.")}
    assert spec.text_projection_parameters() == count(model.llm_cond_norm) + count(model.llm_cond_proj)


def test_the_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        config = Ideogram4Transformer2DModel().config
    assert TransformerSpec.from_config(config) == TransformerSpec()
    assert VaeSpec.from_config(built(AutoencoderKLFlux2).config) == VaeSpec()
    assert tuple(QWEN3_VL_ACTIVATION_LAYERS) == TAPPED_LAYERS


@pytest.mark.parametrize("spec", [TextEncoderSpec(), NANO_TEXT], ids=["full", "nano"])
def test_text_encoder(spec):
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config={**asdict(spec), "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [0]},
    )
    model = built(lambda: Qwen3VLModel(config)).language_model
    assert spec.parameters() == count(model)
    assert spec.layer_parameters() == count(model.layers[7])
    assert spec.tensors() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert TextEncoderSpec.from_config(config.text_config.to_dict()) == spec


@pytest.mark.parametrize(
    "spec", [VaeSpec(), NANO_VAE, VaeSpec((8, 24, 8), 3, 16)], ids=["full", "nano", "odd"]
)
def test_autoencoder(spec):
    sizes = asdict(spec)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(spec.block_out_channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(spec.block_out_channels),
    }
    model = built(lambda: AutoencoderKLFlux2(**sizes, **blocks, norm_num_groups=8))
    assert spec.parameters() == count(model)
    assert spec.tensors() == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_specs_survive_json():
    for spec in (ODD, NANO_TEXT, VaeSpec((8, 16))):
        assert type(spec).from_config(json.loads(json.dumps(asdict(spec)))) == spec


@pytest.mark.parametrize("spec", [TransformerSpec(), NANO_TRANSFORMER], ids=["full", "nano"])
def test_targets_name_linears_of_the_model(spec):
    attention, mlp = target_modules("attention", spec), target_modules("mlp", spec)
    assert len(attention) == 4 * spec.num_layers and len(mlp) == 3 * spec.num_layers
    assert set(target_modules("all", spec)) == set(attention) | set(mlp)
    everything = target_modules(["layers.*"], spec)
    model = transformer(spec)
    assert set(everything) == {
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("layers.")
    }
    assert target_modules(["*.to_q", "*.to_q", "layers.0.attention.to_q"], spec) == target_modules(
        ["*.to_q"], spec
    )
    assert match_targets(["*.w1", "nothing"], spec)["nothing"] == ()
