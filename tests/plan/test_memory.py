"""The ledger's formulas against autograd, the allocator, and what diffusers was measured to take."""

import dataclasses
from functools import partial

import pytest

from ideoflow.model.spec import TransformerSpec, match_targets, target_modules
from ideoflow.plan import fused
from ideoflow.plan.calibration import shipped
from ideoflow.plan.memory import build_ledger
from ideoflow.plan.record import NOT_ALLOCATED
from ideoflow.plan.reference import activations, kept_by_block
from ideoflow.plan.sizes import Choice, Shapes, adapter_parameters, targets_by_block

GIB = 1 << 30
SMALL = TransformerSpec(
    in_channels=16,
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=4,
    intermediate_size=448,
    adaln_dim=32,
    llm_features_dim=64,
)
TARGETS = {
    "all": "all",
    "attention": "attention",
    "mlp": "mlp",
    "w2": ["layers.1.feed_forward.w2"],
    "q and w1": ["layers.1.attention.to_q", "layers.1.feed_forward.w1"],
}
TYPES = [("bf16", "float32"), ("bf16", "bf16"), ("float32", "float32")]


def adapted_model(spec, targets, base, adapter, rank=4):
    """Diffusers' transformer with PEFT's layers, as the reference engine makes it."""
    import torch
    from diffusers import Ideogram4Transformer2DModel
    from peft import LoraConfig

    from ideoflow.engine.setup import UnpaddedAttention

    types = {"bf16": torch.bfloat16, "float32": torch.float32}
    model = Ideogram4Transformer2DModel(**dataclasses.asdict(spec), mrope_section=(6, 5, 5)).to(types[base])
    model.set_attn_processor(UnpaddedAttention())
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(types[adapter])
    return model.train()


def saved_bytes(given, run):
    """Bytes of all tensors that the backward pass of ``run`` needs, apart from those that were there."""
    import torch

    known, found = {t.untyped_storage().data_ptr() for t in given}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(("base", "adapter"), TYPES)
def test_kept_by_a_block_is_what_autograd_saves_to_the_byte(targets, base, adapter):
    import torch

    names = target_modules(targets, SMALL)
    model = adapted_model(SMALL, names, base, adapter)

    def saved(tokens):
        given = {"dtype": model.dtype}
        hidden = torch.randn(1, tokens, SMALL.hidden, requires_grad=True, **given)
        rotary = torch.randn(1, tokens, 32, **given), torch.randn(1, tokens, 32, **given)
        modulation = torch.randn(1, 1, 32, **given)
        given = (*model.parameters(), hidden, *rotary)
        return saved_bytes(given, lambda: model.layers[1](hidden, None, rotary, modulation))

    size = {"bf16": 2, "float32": 4}
    predicted = kept_by_block(
        SMALL, targets_by_block(names)[1], 4, size[base], compiled=False, adapter=size[adapter]
    )
    assert (saved(40) - saved(24)) / 16 == predicted


@pytest.mark.slow
def test_kept_by_a_compiled_block_is_what_the_partitioner_saves_to_the_byte():
    """A float32 adapter on an FP8 base, without its dense weights; by all of Inductor but its code."""
    import torch
    from diffusers import Ideogram4Transformer2DModel
    from peft import LoraConfig
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    from ideoflow.engine.setup import UnpaddedAttention
    from ideoflow.kernels.float8 import quantize_blocks

    spec = dataclasses.replace(SMALL, num_layers=2, num_attention_heads=6, intermediate_size=512)
    names = target_modules("all", spec)
    model = Ideogram4Transformer2DModel(**dataclasses.asdict(spec), mrope_section=(6, 5, 5)).bfloat16()
    quantize_blocks(model)
    model.set_attn_processor(UnpaddedAttention())
    model.requires_grad_(False).add_adapter(LoraConfig(r=8, target_modules=list(names)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    block = model.train().layers[1]
    as_it_is = partial(compile_fx, inner_compile=lambda graph, *_, **__: make_boxed_func(graph.forward))
    block.compile(backend=as_it_is)

    def saved(tokens):
        hidden = torch.randn(1, tokens, spec.hidden, dtype=torch.bfloat16, requires_grad=True)
        rotary = tuple(torch.randn(1, tokens, 32).bfloat16() for _ in range(2))
        modulation = torch.randn(1, 1, spec.adaln_dim).bfloat16()
        given = (*model.parameters(), *model.buffers(), hidden, *rotary)
        return saved_bytes(given, lambda: block(hidden, None, rotary, modulation))

    first, second = (saved(tokens) for tokens in (128, 192))
    per_token = kept_by_block(spec, targets_by_block(names)[1], 8, 2, compiled=True, adapter=4)
    assert (second - first) / 64 == per_token
    modulations = 2 * 4 * spec.hidden
    assert first - 128 * per_token == modulations


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize(("base", "adapter"), TYPES)
def test_the_peak_of_a_step_is_what_the_allocator_saw(base, adapter, checkpointing):
    import torch
    from torch.profiler import ProfilerActivity, profile

    spec = dataclasses.replace(SMALL, num_layers=4, num_attention_heads=6, intermediate_size=512)
    names, tokens = target_modules("all", spec), 256
    model = adapted_model(spec, names, base, adapter)
    model.llm_cond_norm = model.llm_cond_proj = torch.nn.Identity()
    model.t_embedding.mlp_in.register_forward_pre_hook(lambda _, args: (args[0].to(model.dtype),))
    if checkpointing:
        model.enable_gradient_checkpointing()
    inputs = {
        "hidden_states": torch.randn(1, tokens, 16).to(model.dtype),
        "encoder_hidden_states": torch.zeros(1, tokens, spec.hidden, dtype=model.dtype),
        "position_ids": torch.zeros(1, tokens, 3, dtype=torch.long),
        "segment_ids": torch.zeros(1, tokens, dtype=torch.long),
        "indicator": torch.full((1, tokens), 2),
        "timestep": torch.tensor([0.5]),
    }

    def step():
        velocity = model(**inputs, return_dict=False)[0]
        velocity.float().square().mean().backward()

    step()  # so that gradients are there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    size = {"bf16": 2, "float32": 4}
    options = {"checkpointing": checkpointing, "compiled": False, "adapter": size[adapter]}
    predicted = activations(spec, names, 4, tokens, size[base], **options).total
    assert 0.99 < predicted / peak < 1.06


# Plain diffusers + PEFT on an H200, 4096 image and 320 text tokens, rank 32 on every block Linear, adapter in
# bf16, checkpointing on, diffusers' mask (boolean, and in bf16 inside the kernel): samples, compiled, GiB
# that torch.cuda.max_memory_allocated said.
MEASURED = [(1, False, 20.9), (4, False, 29.8), (1, True, 20.7), (4, True, 29.0)]


@pytest.mark.parametrize(("batch", "compiled", "gib"), MEASURED)
def test_plain_diffusers_as_measured(batch, compiled, gib):
    spec, tokens = TransformerSpec(), batch * 4416
    names = target_modules("all", spec)
    adapter = adapter_parameters(spec, names, 32)
    passing = activations(
        spec,
        names,
        32,
        tokens,
        2,
        checkpointing=True,
        compiled=compiled,
        adapter=2,
        # One mask a sample, [4416, 4416]; the formula's own square counts the packed sequence.
        mask_bytes=batch * 3 * 4416**2 - tokens**2,
    )
    # Weights, adapter and moments; the gradients, set to None each step, come when the activations go.
    predicted = spec.parameters() * 2 + adapter * 2 * 3 + passing.total
    assert predicted / GIB == pytest.approx(gib, rel=0.01)


def test_adapter_size_against_the_published_count():
    # Rank x (in + out) over 34 blocks of four 4608 x 4608, two 12288 x 4608 and one 4608 x 12288 Linear.
    expected = 32 * 34 * (4 * (4608 + 4608) + 3 * (12288 + 4608))
    assert adapter_parameters(TransformerSpec(), target_modules("all"), 32) == expected


def choice(**changes):
    values = {
        "device": "cuda",
        "engine": "reference",
        "precision": "bf16",
        "matmul": "bf16",
        "activation_budget": 0.0,
        "compile": "off",
        "unconditional": "proxy",
    }
    return Choice(**values | changes)


SHAPES = Shapes(4096, 320, 1024 * 1024, 4096, 1024 * 1024)


def train_peak(full_base, targets="all", rank=32, shapes=SHAPES, **changes):
    names = tuple(n for modules in match_targets(targets).values() for n in modules)
    return build_ledger(full_base, names, rank, shapes, choice(**changes)).peak("train")


def test_what_costs_more_memory_costs_more_in_the_ledger(full_base):
    usual = train_peak(full_base)
    assert train_peak(full_base, rank=64) > usual > train_peak(full_base, rank=8)
    assert train_peak(full_base, targets="attention") < usual
    assert train_peak(full_base, precision="float32") > 1.75 * usual
    assert train_peak(full_base, activation_budget=1.0) > 2 * usual
    assert train_peak(full_base, activation_budget=1.0, compile="regional") < train_peak(
        full_base, activation_budget=1.0
    )
    assert train_peak(full_base, shapes=dataclasses.replace(SHAPES, grid_tokens=1024)) < usual


def test_blocks_before_the_first_adapter_keep_nothing(full_base):
    late = train_peak(full_base, targets=["layers.33.*"], activation_budget=1.0)
    early = train_peak(full_base, targets=["layers.0.attention.to_q"], activation_budget=1.0)
    assert late < early


def test_phases_of_a_full_run(full_base):
    names = target_modules("all")
    ledger = build_ledger(full_base, names, 32, SHAPES, choice(unconditional="loaded"))
    # Two bf16 transformers of 9.05 G parameters are together in the sampling phase only.
    assert ledger.peak_phase == "sample" and ledger.peak("sample") > 2 * 2 * 9.05e9
    # The text encoder is streamed: its 16 GB are never there, the projection's 245 M numbers are.
    assert 3 * 2 * 245e6 < ledger.peak("text") < 4 * GIB
    proxy = build_ledger(full_base, names, 32, SHAPES, choice())
    assert proxy.peak("sample") < ledger.peak("sample") - 15 * GIB
    streamed = build_ledger(full_base, names, 32, SHAPES, choice(unconditional="streamed"))
    (second,) = (line.bytes for line in streamed.of("sample") if line.name.startswith("unconditional"))
    block = 2 * (4 * 4608**2 + 3 * 4608 * 12288)
    rest = 2 * (34 * (18432 * 513 + 4 * 4608 + 2 * 256) + 2 * 4608 * 128 + 4 * 4608 * 4608)
    assert 3 * block < second < 3 * block + rest, "three blocks' weights, and what is not streamed"
    none = build_ledger(full_base, names, 32, dataclasses.replace(SHAPES, sample_tokens=0), choice())
    assert none.peak("sample") == 0 and not none.of("sample")


def test_the_optimizers_step_counts_only_where_it_is_the_peak(full_base):
    def names_of(rank, side, device="cpu"):
        shapes = Shapes(side * side // 256, 64, side * side, 0, 0)
        ledger = build_ledger(full_base, target_modules("all"), rank, shapes, choice(device=device))
        return {line.name for line in ledger.of("train")}

    assert "optimizer step" not in names_of(32, 1024)
    assert "optimizer step" in names_of(1024, 256)
    # The fused AdamW of a GPU makes no temporary, and its gradients come while activations go.
    assert "optimizer step" not in names_of(256, 512, "cuda") and "optimizer step" in names_of(256, 512)


def test_gradients_come_as_activations_go(full_base):
    """The peak of one backward pass over the blocks, against a simulation of it block by block."""
    names, gib = target_modules("all"), {}
    for rank, side in ((32, 1024), (1024, 256)):
        shapes = Shapes(side * side // 256, 64, side * side, 0, 0)
        one = build_ledger(full_base, names, rank, shapes, choice())
        many = build_ledger(full_base, names, rank, shapes, choice(), batch=2)
        line = {x.name: x.bytes for x in one.of("train")}
        whole = next(x.bytes for x in many.of("train") if x.name == "gradients")
        checkpoint, gradient = line["checkpoints"] / 34, whole / 34
        peak = max((34 - done) * checkpoint + (done + 1) * gradient for done in range(34))
        assert line["checkpoints"] + line["gradients"] == pytest.approx(peak, rel=1e-6)
        assert whole == adapter_parameters(full_base.transformer, names, rank) * 4
        gib[rank] = line["gradients"] / whole
    assert gib[32] < 0.05 and gib[1024] > 0.5


def test_calibration_scales_what_comes_and_goes_and_says_so(full_base):
    names = target_modules("all")
    plain = build_ledger(full_base, names, 32, SHAPES, choice())
    scaled = build_ledger(full_base, names, 32, SHAPES, choice(), memory_factor=1.5, calibrated_by="2 runs")
    for before, after in zip(plain.lines, scaled.lines, strict=True):
        assert not before.calibrated
        if after.calibrated:
            assert after.bytes == pytest.approx(1.5 * before.bytes, rel=1e-6) and "2 runs" in after.evidence
        elif after.name != "fragmentation":
            assert after.bytes == before.bytes
    assert {line.name for line in scaled.lines if line.calibrated} >= {"checkpoints", "recomputed block"}


def test_the_fused_engines_batch_is_packed_and_its_passes_follow_one_another(full_base):
    names = target_modules("all")

    def peak(batch, accumulation, **changes):
        options = {"engine": "fused", "precision": "fp8", "matmul": "fp8", "activation_budget": 1.0}
        picked = choice(**options | changes)
        ledger = build_ledger(full_base, names, 32, SHAPES, picked, batch=batch, accumulation=accumulation)
        return ledger.peak("train")

    one = peak(1, 1)
    assert peak(4, 1) > one + 3 * 20 * GIB
    assert one < peak(1, 4) < one + GIB
    assert peak(1, 1, precision="bf16", matmul="bf16") > one + 8 * GIB
    assert peak(1, 1, activation_budget=0.0) < one - 15 * GIB
    reference = {"engine": "reference", "precision": "bf16", "matmul": "bf16", "activation_budget": 0.0}
    assert peak(4, 1, **reference) == peak(1, 4, **reference)


@pytest.mark.parametrize("row", shipped().shares["fused"].rows, ids=str)
def test_the_fused_engine_as_measured(full_base, row):
    """What an H200's allocator held at the peak of a step; nothing was fitted to it."""
    spec, names, batch = full_base.transformer, target_modules("all"), int(row["batch"])
    picked = choice(engine="fused", precision="fp8", matmul="fp8", activation_budget=float(row["budget"]))
    shapes = dataclasses.replace(SHAPES, text_tokens=int(row["text"]))
    ledger = build_ledger(full_base, names, 32, shapes, picked, batch=batch)
    found = sum(x.bytes for x in ledger.of("train") if x.name not in NOT_ALLOCATED)
    if row["transposed"]:  # each weight a second time, with room for the adapters' columns
        blocks = fused.products(spec, frozenset(n.split(".", 2)[2] for n in names), 32, True)
        extra = {name: 0 if name == "o" else 2 * p.parts * p.rank for name, p in blocks.items()}
        found += spec.num_layers * sum((p.inputs + extra[name]) * p.outputs for name, p in blocks.items())
        found -= next(x.bytes for x in ledger.of("train") if x.name == "work buffer")
    assert found / GIB == pytest.approx(row["gib"], rel=0.02)


def test_fp8_in_the_reference_engine_is_smaller_by_half_of_the_blocks(full_base):
    saved = train_peak(full_base) - train_peak(full_base, precision="fp8")
    # A byte for each of 8.98 G numbers, less what dequantising takes beyond a block's gradients.
    assert saved / GIB == pytest.approx(8.98e9 / GIB - 0.1, abs=0.1)
