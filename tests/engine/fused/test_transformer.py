"""The fused transformer against plain diffusers + PEFT: outputs and adapter gradients."""

import pytest
import torch
from tiny_models import ALL, DEVICE, inputs, tiny
from torch import nn

from ideoflow.data.order import Draw
from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.packed import PackedLayout
from ideoflow.engine.step import accumulate_packed, prepare
from ideoflow.kernels.float8 import Float8Linear
from ideoflow.recipe import ScheduleSettings

MIXED = PackedLayout((5, 0, 3), ((4, 6), (3, 3), (1, 7)), multiple=16)


def plain(model, layout, latents, timestep, text):
    """diffusers' own forward pass on the packed sequence, with its [L, L] mask."""
    index = layout.tensors(DEVICE)
    arguments = layout.diffusers_inputs(latents, text)
    out = model(timestep=timestep[index.sample_index.long()][None], return_dict=False, **arguments)[0]
    return out[0, index.image_index]


def gradients(model, velocity, seed=2):
    torch.manual_seed(seed)
    target = torch.randn(velocity.shape, device=DEVICE)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = (velocity.float() - target).square().mean()
    return dict(zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True))


def cosine(a, b):
    return float(nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.mark.parametrize("layout", [MIXED, PackedLayout((4, 4), ((3, 3), (1, 9)))], ids=["mixed", "equal"])
@pytest.mark.parametrize("targets", [ALL, ["to_q", "to_v"], ["w3", "to_out.0"]], ids=["all", "qv", "some"])
def test_float32_matches_diffusers(layout, targets):
    model = tiny(targets)
    data = inputs(layout)
    expected = plain(model, layout, *data)
    # FusedTransformer lays q, k, v side by side and points the modules at the pieces: the base stays itself.
    fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.float32)
    got = fused(*data, layout)
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if DEVICE == "cuda" else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(plain(model, layout, *data), expected)
    want, have = gradients(model, expected), gradients(model, got)
    assert want.keys() == have.keys()
    for name in want:
        assert have[name].dtype == torch.float32
        torch.testing.assert_close(
            have[name], want[name], rtol=1e-3, atol=1e-4 * float(want[name].abs().max())
        )
    with torch.no_grad():
        torch.testing.assert_close(fused(*data, layout), expected, **tolerance)


@pytest.mark.parametrize("linear", ["bf16", "fp8"])
def test_low_precision_stays_close(linear):
    """bf16 activations over an e4m3 base, against float32 arithmetic over the same dequantised base."""
    model = tiny(fp8=True)
    data = inputs(MIXED)
    expected = plain(model, MIXED, *data)
    want = gradients(model, expected)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    got = FusedTransformer(model, linear=linear, attention="sdpa")(*data, MIXED)
    assert got.dtype == torch.bfloat16 and torch.isfinite(got).all()
    assert cosine(got, expected) > (0.995 if linear == "fp8" else 0.9998)
    have = gradients(model, got)
    floor = 0.97 if linear == "fp8" else 0.999
    assert min(cosine(have[name], want[name]) for name in want) > floor


@pytest.mark.parametrize("linear", ["bf16", "fp8"])
def test_gradients_are_the_same_at_every_budget(linear):
    model = tiny(fp8=linear == "fp8")
    if linear == "fp8":
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    dtype = torch.bfloat16 if linear == "fp8" else torch.float32
    data = inputs(MIXED)
    results = []
    for budget in (0.0, 0.1, 0.3, 0.6, 1.0):
        fused = FusedTransformer(
            model, linear=linear, attention="sdpa", activation_budget=budget, dtype=dtype
        )
        results.append(gradients(model, fused(*data, MIXED)))
    for offload in (["input"], ["input", "attention", "ffn_output", "attention_output", "qkv", "gate_up"]):
        fused = FusedTransformer(model, linear=linear, attention="sdpa", activation_budget=0.2, dtype=dtype,
                                 offload=offload)  # fmt: skip
        with torch.no_grad():
            fused(*data, MIXED)
        fused(*data, MIXED)  # a forward pass whose backward never comes must leave nothing behind
        results.append(gradients(model, fused(*data, MIXED)))
    for other in results[1:]:
        for name, gradient in results[0].items():
            assert torch.equal(gradient, other[name]), name


def halved(model):
    """What is frozen and stored in float32, in bf16."""
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("targets", [ALL, ["to_q", "w1"]], ids=["all", "some"])
def test_exact_blocks_come_nearer_and_all_of_them_are_bf16(targets):
    model, data = halved(tiny(targets, fp8=True)), inputs(MIXED)
    bf16 = FusedTransformer(model, linear="bf16", attention="sdpa")(*data, MIXED)
    want = gradients(model, bf16)
    apart, gradients_apart = [], []
    for exact in range(4):
        got = FusedTransformer(model, linear="fp8", attention="sdpa", exact_blocks=exact)(*data, MIXED)
        apart.append(1 - cosine(got, bf16))
        have = gradients(model, got)
        gradients_apart.append(max(1 - cosine(have[name], want[name]) for name in want))
        with torch.no_grad():
            fused = FusedTransformer(model, linear="fp8", attention="sdpa", exact_blocks=exact)
            assert torch.equal(fused(*data, MIXED), got)
    assert torch.equal(got, bf16)
    assert apart[0] > 1.2 * apart[1] > 1.2 * apart[2] > apart[3] and apart[3] < 1e-12
    # Of the backward pass, gradients' rounding is all that is left.
    assert 0 < gradients_apart[3] < gradients_apart[0] < 0.03


@pytest.mark.parametrize("exact", [1, 2, 3])
def test_exact_blocks_have_the_same_gradients_at_every_budget(exact):
    model, data, found = halved(tiny(fp8=True)), inputs(MIXED), []
    every = ("input", "attention", "ffn_output", "attention_output", "qkv", "gate_up")
    for budget, offload in ((0.0, ()), (0.1, ()), (0.4, ()), (0.7, ()), (1.0, ()), (0.2, every)):
        fused = FusedTransformer(model, linear="fp8", attention="sdpa", activation_budget=budget,
                                 offload=offload, exact_blocks=exact)  # fmt: skip
        found.append(gradients(model, fused(*data, MIXED)))
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert torch.equal(gradient, other[name]), name


def test_gradients_of_an_exact_block_are_those_of_its_own_operands():
    """By autograd over dense products, with what the rounding of gradients leaves apart."""
    torch.manual_seed(0)
    model = halved(tiny(fp8=True))
    fused = FusedTransformer(model, linear="fp8", attention="sdpa", exact_blocks=1)
    fused._refresh_adapters()
    for linear in fused.blocks[0].linears:
        x = torch.randn(48, linear.weight.shape[1], device=DEVICE).bfloat16()
        dy = torch.randn(48, linear.weight.shape[0], device=DEVICE).bfloat16()
        y, z = linear.forward(fused.ops.quantize(x, False), None)
        dx, found = linear.backward(fused.ops.quantize(dy * linear.fold), fused.ops.quantize(x, False), z)
        weight = linear.weight.values.float() * linear.weight.scale[:, None]
        leaf = x.float().requires_grad_()
        masters = [p.detach().clone().requires_grad_() for p in linear.parameters]
        parts = [leaf @ down.t() @ up.t() * 1.5 for down, up in zip(masters[::2], masters[1::2], strict=True)]
        expected = leaf @ weight.t() + torch.cat(parts, 1)
        assert cosine(y, expected) > 0.9999
        wanted = torch.autograd.grad(expected, [leaf, *masters], dy.float())
        for got, want in zip([dx, *found], wanted, strict=True):
            assert cosine(got, want) > 0.998
            assert abs(got.float().norm() / want.norm() - 1) < 0.01


@pytest.mark.parametrize(("linear", "count"), [("bf16", 1), ("fp8", 4), ("fp8", -1)])
def test_exact_blocks_are_blocks_of_an_fp8_engine(linear, count):
    with pytest.raises(ValueError, match="exact blocks"):
        FusedTransformer(tiny(fp8=True), linear=linear, attention="sdpa", exact_blocks=count)


def test_rounded_values_give_nearly_the_same_gradients():
    """What waits as e4m3 is off by at most 2^-4 a value; where it waits makes no difference."""
    model = tiny()
    data = inputs(MIXED)
    results = []
    for rounded, offload in (
        (False, []),
        (True, []),
        (True, ["input", "attention", "ffn_output", "gate_up"]),
    ):
        fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.float32, rounded=rounded,
                                 offload=offload)  # fmt: skip
        results.append(gradients(model, fused(*data, MIXED)))
    exact, kept, sent = results
    assert min(cosine(kept[name], exact[name]) for name in exact) > 0.995
    assert max(float((kept[name] - exact[name]).norm() / exact[name].norm()) for name in exact) > 1e-3
    for name, gradient in kept.items():
        assert torch.equal(gradient, sent[name]), name


def test_training_works_after_inference_mode():
    model = tiny()
    layout = PackedLayout((3, 2), ((2, 5), (3, 3)))  # no other test uses it, so nothing is kept for it yet
    data = inputs(layout)
    fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.float32)
    with torch.inference_mode():
        before = fused(*data, layout)
    velocity = fused(*data, layout)
    torch.testing.assert_close(before.clone(), velocity)
    assert all(g.abs().max() > 0 for g in gradients(model, velocity).values())


def test_training_in_fp8_follows_bf16():
    """An adapter learns what another one knows: after the same steps both precisions have learnt as much."""
    teacher = tiny(fp8=True, seed=0)
    layout = PackedLayout((6, 4), ((4, 4), (3, 5)))
    cases = [inputs(layout, seed) for seed in range(12)]
    with torch.no_grad():
        targets = [plain(teacher, layout, *case) for case in cases]
    losses = {}
    for linear in ("bf16", "fp8"):
        model = tiny(fp8=True, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
            elif parameter.dtype == torch.float32 and "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=3e-3, weight_decay=0)
        fused = FusedTransformer(model, linear=linear, attention="sdpa")

        def loss(i, fused=fused):
            return nn.functional.mse_loss(fused(*cases[i], layout).float(), targets[i])

        def validation(loss=loss):
            with torch.no_grad():
                return float(sum(loss(i) for i in range(8, 12)) / 4)

        before = validation()
        for step in range(80):
            optimizer.zero_grad()
            loss(step % 8).backward()
            optimizer.step()
        losses[linear] = before, validation()
    assert losses["bf16"][1] < 0.7 * losses["bf16"][0]
    assert abs(losses["fp8"][1] / losses["bf16"][1] - 1) < 0.03, losses


def test_inert_tokens_change_nothing():
    model = tiny()
    data = inputs(MIXED)
    exact = PackedLayout(MIXED.text_lengths, MIXED.grids)
    fused = FusedTransformer(model, linear="bf16", attention="sdpa", dtype=torch.float32)
    a, b = fused(*data, exact), fused(*data, MIXED)
    torch.testing.assert_close(a, b)
    for one, two in zip(gradients(model, a).values(), gradients(model, b).values(), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("linear", ["bf16", "fp8"])
@pytest.mark.parametrize("spike", [0.0, 1e3])
def test_spikes_and_zeros_stay_finite(linear, spike):
    model = tiny(fp8=linear == "fp8").to(torch.bfloat16 if linear == "bf16" else None)
    layout = PackedLayout((1, 40), ((1, 8), (2, 2)), multiple=64)
    latents, timestep, text = inputs(layout)
    latents[::3] = spike
    text[0] = spike
    text[1:5, :3] = spike
    if linear == "fp8":
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    fused = FusedTransformer(model, linear=linear, attention="sdpa", activation_budget=0.3)
    velocity = fused(latents, timestep, text, layout)
    assert torch.isfinite(velocity).all()
    assert all(torch.isfinite(g).all() for g in gradients(model, velocity).values())


def test_many_rotary_rows_are_distinct_under_autocast():
    layout = PackedLayout((2,), ((64, 64),))
    fused = FusedTransformer(tiny(), linear="bf16", attention="sdpa", dtype=torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cos, sin = fused.rotary(layout)
    rows = torch.cat((cos, sin), 1)[2:]
    assert len(torch.unique(rows, dim=0)) == 4096


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"targets": ["to_q", "adaln_modulation"]}, "IE500"),
        ({"targets": ["to_q"], "use_dora": True, "lora_dropout": 0.1}, "IE500"),
        ({"targets": ["to_q"], "lora_dropout": 0.1}, "IE500"),
    ],
)
def test_what_is_not_covered_is_told(arguments, code):
    with pytest.raises(IdeoflowError) as caught:
        FusedTransformer(tiny(**arguments), linear="bf16", attention="sdpa", dtype=torch.float32)
    assert caught.value.diagnostics[0].code.id == code


def test_fp8_products_need_an_fp8_base():
    with pytest.raises(IdeoflowError) as caught:
        FusedTransformer(tiny(), linear="fp8", attention="sdpa")
    assert caught.value.diagnostics[0].code.id == "IE501"


def test_float8_linear_is_a_linear():
    torch.manual_seed(0)
    dense = nn.Linear(32, 48)
    layer = Float8Linear.of(dense)
    x = torch.randn(7, 32, requires_grad=True)
    weight = (layer.weight.float() * layer.weight_scale[:, None]).requires_grad_(False)
    assert (weight - dense.weight).abs().max() <= dense.weight.abs().max() * 2**-4
    y, expected = layer(x), nn.functional.linear(x, weight, dense.bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}


def steps_of_new_layouts(lengths):
    """Through the engine's own step, from pinned memory where there is a GPU, as the loader has batches."""
    fused = FusedTransformer(tiny(), linear="bf16", attention="sdpa", dtype=torch.float32)
    for length in lengths:
        batch = []
        for text, grid in ((length, (4, 6)), (7, (3, 3))):
            noise = torch.randn(grid[0] * grid[1], 16)
            sample = prepare(torch.randn_like(noise), torch.randn(text, 96), grid, Draw(0.4, noise, False),
                             ScheduleSettings())  # fmt: skip
            batch.append(sample.pinned() if torch.cuda.is_available() else sample)
        yield fused
        accumulate_packed(fused, batch, 1)


def test_few_tables_are_kept_of_many_layouts():
    """Captions differ in length, so nearly every batch of a large data set has a layout of its own."""
    *_, fused = steps_of_new_layouts(range(1, 12))
    assert len(fused._tables) <= 4


@pytest.mark.gpu
def test_a_new_layout_does_not_make_the_host_wait_for_the_gpu():
    steps = steps_of_new_layouts(range(20, 25))
    next(steps), next(steps)  # the first one compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
