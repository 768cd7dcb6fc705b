"""DoRA, LoKr and LoHa over the fused frozen path, against diffusers' modules with PEFT's own layers."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig
from test_transformer import MIXED, cosine, gradients, plain
from tiny_models import ALL, DEVICE, inputs, tiny

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.fused import FusedTransformer

KINDS = {
    "dora": lambda targets: LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=targets),
    "lokr": lambda targets: LoKrConfig(r=4, alpha=6, target_modules=targets),
    "whole lokr": lambda targets: LoKrConfig(r=160, alpha=160, decompose_factor=8, target_modules=targets),
    "loha": lambda targets: LoHaConfig(r=3, alpha=2, target_modules=targets),
}


def adapted(kind, targets=ALL, fp8=False):
    model = tiny(targets=None, fp8=fp8)
    model.add_adapter(KINDS[kind](targets))
    g = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        ours = any(part in name for part in (".lora_", ".lokr_", ".hada_"))
        parameter.requires_grad_(ours)
        if ours and "magnitude" in name:
            parameter.data = parameter.data.float() * (
                0.8 + 0.4 * torch.rand(parameter.shape, generator=g).to(DEVICE)
            )
        elif ours:
            parameter.data = torch.randn(parameter.shape, generator=g).to(DEVICE) * 0.2
    if "lokr" in kind:  # as the engine has it: one second factor for q, k and v
        for block in model.layers if set(targets) >= {"to_q", "to_k", "to_v"} else ():
            for layer in (block.attention.to_k, block.attention.to_v):
                for factor in ("lokr_w2", "lokr_w2_a", "lokr_w2_b"):
                    if "default" in getattr(layer, factor):
                        getattr(layer, factor)["default"] = getattr(block.attention.to_q, factor)["default"]
    return model


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("targets", [ALL, ["to_q", "to_v"], ["w3", "to_out.0"]], ids=["all", "qv", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_matches_peft(kind, targets, budget):
    model, data = adapted(kind, targets), inputs(MIXED)
    expected = plain(model, MIXED, *data)
    want = gradients(model, expected)
    fused = FusedTransformer(
        model, linear="bf16", attention="sdpa", dtype=torch.float32, activation_budget=budget
    )
    got = fused(*data, MIXED)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if DEVICE == "cuda" else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(got, expected, **tolerance)
    have = gradients(model, got)
    assert want.keys() == have.keys()
    for name in want:
        assert have[name].dtype == torch.float32
        torch.testing.assert_close(
            have[name], want[name], rtol=1e-3, atol=2e-4 * float(want[name].abs().max()), msg=name
        )
    with torch.no_grad():
        torch.testing.assert_close(fused(*data, MIXED), expected, **tolerance)


@pytest.mark.parametrize("linear", ["bf16", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_stays_close(kind, linear):
    model, data = adapted(kind, fp8=True), inputs(MIXED)
    expected = plain(model, MIXED, *data)
    want = gradients(model, expected)
    trained = set(want)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and name not in trained:
            parameter.data = parameter.data.bfloat16()
    got = FusedTransformer(model, linear=linear, attention="sdpa")(*data, MIXED)
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()
    assert cosine(got, expected) > (0.99 if linear == "fp8" else 0.999)
    have = gradients(model, got)
    whole_have, whole_want = (torch.cat([g[n].flatten() for n in sorted(want)]) for g in (have, want))
    assert cosine(whole_have, whole_want) > (0.97 if linear == "fp8" else 0.998)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: LoraConfig(r=4, use_dora=True, lora_dropout=0.1, target_modules=ALL), "dropout"),
        (lambda: LoKrConfig(r=4, rank_dropout=0.1, target_modules=ALL), "dropout"),
    ],
)
def test_what_is_not_computed_is_refused(change, words):
    model = tiny(targets=None)
    model.add_adapter(change())
    with pytest.raises(IdeoflowError) as caught:
        FusedTransformer(model, linear="bf16", attention="sdpa")
    assert words in caught.value.diagnostics[0].message


def test_kinds_do_not_share_an_input():
    model = tiny(targets=["to_q"])
    model.add_adapter(LoHaConfig(r=3, target_modules=["to_k"]), "other")
    with pytest.raises(IdeoflowError) as caught:
        FusedTransformer(model, linear="bf16", attention="sdpa")
    assert "another kind" in caught.value.diagnostics[0].message
