"""Every form of a frozen base, and every hard shape, through the fused path: against diffusers' own modules.

The base is small and of random numbers, held as :func:`ideoflow.model.load.load_transformer` holds one.
"""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from test_transformer import cosine, gradients, plain
from tiny_models import ALL, DEVICE
from torch import nn

from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.packed import PackedLayout
from ideoflow.model.four_bit import FrozenLinear4bit
from ideoflow.model.random import random_transformer

CONFIG = {
    "in_channels": 16, "num_layers": 4, "attention_head_dim": 32, "num_attention_heads": 4, "adaln_dim": 64,
    "intermediate_size": 256, "llm_features_dim": 128, "mrope_section": (6, 5, 5),
}  # fmt: skip
MIXED = PackedLayout((5, 0, 3), ((4, 6), (3, 3), (1, 7)), multiple=16)
HARD = {
    "one token, 64 x 2048 pixels": PackedLayout((1, 1), ((4, 128), (128, 4)), multiple=64),
    "2048 tokens for a picture of one, and none": PackedLayout((2048, 0), ((1, 1), (5, 1)), multiple=64),
}
ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "lokr": lambda: LoKrConfig(r=4, alpha=6, target_modules=ALL),
    "loha": lambda: LoHaConfig(r=3, alpha=2, target_modules=ALL),
}


def base(precision, kind="lora", seed=0, **config):
    """Frozen weights in ``precision``, adapters of random numbers in float32."""
    model = random_transformer(CONFIG | config, precision=precision, device=torch.device(DEVICE), seed=seed)
    model.llm_cond_norm = model.llm_cond_proj = nn.Identity()
    model.requires_grad_(False)
    model.add_adapter(ADAPTERS[kind]())
    g = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".lora_", ".lokr_", ".hada_")):
            parameter.requires_grad_(True)
            noise = torch.randn(parameter.shape, generator=g).to(DEVICE)
            magnitude = "magnitude" in name
            parameter.data = parameter.data.float() * (1 + 0.1 * noise) if magnitude else 0.1 * noise
    if kind == "lokr":  # as the engine has it: one second factor for q, k and v
        for block in model.layers:
            for layer in (block.attention.to_k, block.attention.to_v):
                for factor in ("lokr_w2", "lokr_w2_a", "lokr_w2_b"):
                    if "default" in getattr(layer, factor):
                        getattr(layer, factor)["default"] = getattr(block.attention.to_q, factor)["default"]
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_weights_stay_where_they_were_loaded(precision):
    """Copies at set-up, one block after the other, would leave a gap in the memory for each."""
    model = base(precision)
    linears = [m for m in model.layers.modules() if isinstance(m, nn.Linear)]
    before = [linear.weight.data_ptr() for linear in linears]
    FusedTransformer(model, linear="bf16", attention="sdpa")
    assert [linear.weight.data_ptr() for linear in linears] == before


def inputs(layout, dtype=torch.bfloat16, seed=1):
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(layout.image_total, 16, generator=g).to(DEVICE, dtype)
    text = torch.randn(layout.text_total, 128, generator=g).to(DEVICE, dtype)
    return latents, torch.rand(layout.samples, generator=g).to(DEVICE), text


def widen(model):
    """What is in bf16, except frozen weights with scales, in float32: the same numbers, wider arithmetic."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.float()
    for module in model.modules():
        if isinstance(module, FrozenLinear4bit):
            module.quant_state.dtype = torch.float32
    return model


def fused(model, linear, **options):
    return FusedTransformer(model, linear=linear, attention="sdpa", **options)


def truth(precision, layout, kind="lora", **config):
    """Diffusers and PEFT over the same base in float32 arithmetic: velocities and gradients."""
    model = widen(base(precision, kind, **config))
    velocity = plain(model, layout, *inputs(layout, torch.float32))
    return velocity, gradients(model, velocity)


def all_of(found, names):
    return torch.cat([found[name].flatten() for name in sorted(names)])


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_a_base_is_read_as_diffusers_reads_it(precision):
    """In float32 arithmetic, what is left is the order of sums: the stored numbers are the same ones."""
    velocity, want = truth(precision, MIXED)
    model = widen(base(precision))
    got = fused(model, "bf16", dtype=torch.float32)(*inputs(MIXED, torch.float32), MIXED)
    torch.testing.assert_close(got, velocity, rtol=2e-4, atol=2e-4)
    have = gradients(model, got)
    assert min(cosine(have[name], want[name]) for name in want) > 1 - 1e-6


@pytest.mark.parametrize(("precision", "linear"), [("bf16", "bf16"), ("fp8", "bf16"), ("fp8", "fp8"),
                                                   ("int8", "bf16"), ("nf4", "bf16")])  # fmt: skip
def test_gradients_are_the_same_at_every_budget_over_every_base(precision, linear):
    model, data = base(precision), inputs(MIXED)
    found = []
    for budget, offload in ((0.0, ()), (0.1, ()), (0.45, ()), (1.0, ()), (0.0, ("input", "attention"))):
        engine = fused(model, linear, activation_budget=budget, offload=offload)
        found.append(gradients(model, engine(*data, MIXED)))
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())
    _, want = truth(precision, MIXED)
    floor = 0.98 if linear == "fp8" else 0.998
    assert cosine(all_of(found[0], want), all_of(want, want)) > floor


@pytest.mark.parametrize("exact", [0, 2, 4])
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_other_kinds_have_the_same_gradients_at_every_budget_in_fp8(kind, exact):
    model, data = base("fp8", kind), inputs(MIXED)
    found = [
        gradients(model, fused(model, "fp8", activation_budget=b, exact_blocks=exact)(*data, MIXED))
        for b in (0.0, 0.4, 1.0)
    ]
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())
    _, want = truth("fp8", MIXED, kind)
    assert cosine(all_of(found[0], want), all_of(want, want)) > 0.97
    if exact == 4:
        bf16 = fused(model, "bf16")(*data, MIXED)
        assert torch.equal(fused(model, "fp8", exact_blocks=4)(*data, MIXED), bf16)


@pytest.mark.parametrize("layout", HARD.values(), ids=HARD)
def test_short_and_long_captions_and_narrow_pictures(layout):
    # Attention over thousands of tokens takes its time: two blocks.
    velocity, want = truth("fp8", layout, num_layers=2)
    model = base("fp8", num_layers=2)
    for linear, near, gradients_near in (("bf16", 0.999, 0.998), ("fp8", 0.99, 0.97)):
        got = fused(model, linear, activation_budget=0.2)(*inputs(layout), layout)
        have = gradients(model, got)
        assert torch.isfinite(got).all() and all(torch.isfinite(g).all() for g in have.values())
        assert cosine(got, velocity) > near
        assert cosine(all_of(have, want), all_of(want, want)) > gradients_near


def test_outlier_channels_inside_the_model_stay_finite_and_near():
    """Trained transformers have channels a thousand times as large as the rest; rows share one scale."""
    velocities = []
    for linear in ("bf16", "fp8"):
        model = base("fp8")
        for block in model.layers:
            for norm in (block.attention_norm1, block.ffn_norm1):
                norm.weight.data[7] *= 1e3
        got = fused(model, linear, activation_budget=0.3)(*inputs(MIXED), MIXED)
        assert torch.isfinite(got).all()
        assert all(torch.isfinite(g).all() for g in gradients(model, got).values())
        velocities.append(got.detach())
    assert cosine(*velocities) > 0.97
