"""Weights that wait on the host: the same gradients as without, in the order that training needs them."""

from functools import partial

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig
from torch._dynamo.utils import counters

from ideoflow.data.order import Draw
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.offload import WeightStream, offload_groups, stream_blocks
from ideoflow.engine.setup import compile_blocks
from ideoflow.engine.step import accumulate, accumulate_packed, predict_velocity, prepare
from ideoflow.model.load import is_streamed, load_transformer
from ideoflow.model.random import random_transformer
from ideoflow.recipe import ScheduleSettings

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU


def samples(count=2):
    g = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        draw = Draw(0.4, torch.randn(16, 128, generator=g), False)
        latents, text = torch.randn(16, 128, generator=g), torch.randn(5, 192, generator=g)
        made.append(prepare(latents, text, (4, 4), draw, ScheduleSettings()))
    return made


def adapted(nano, precision="float32", streamed=False):
    model = load_transformer(nano.folder, precision=precision, device=DEVICE, streamed=streamed)
    torch.manual_seed(0)
    model.add_adapter(
        LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_out.0", "w1", "w2"])
    )
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.float().to(DEVICE)
    return model


def gradients(model, step):
    """Of two steps with an update between them, so that stale weights or adapters would show."""
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    optimizer, kept = torch.optim.SGD(trained.values(), lr=0.1), {}
    for index, sample in enumerate(samples()):
        step([sample])
        kept |= {f"{index} {n}": p.grad.clone() for n, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    return kept


def reference_step(model):
    model.enable_gradient_checkpointing()
    model.train()
    return lambda batch: accumulate(model, batch, 1)


@pytest.fixture(scope="module")
def plain(nano):
    model = adapted(nano)
    return gradients(model, reference_step(model))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_streamed_blocks_give_the_same_gradients(nano, plain):
    model = adapted(nano, streamed=True)
    stream = stream_blocks(model, DEVICE)
    assert same(gradients(model, reference_step(model)), plain)
    # Two steps over six blocks and back with three slots: at each turn three blocks are there already.
    assert stream.fetched == 6 + 3 * 3


def test_streamed_blocks_may_be_compiled(nano, plain, monkeypatch):
    """With the backend that only traces, which computes with the very same operators."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = adapted(nano, streamed=True)
    stream = stream_blocks(model, DEVICE)
    counters.clear()
    compile_blocks(model)
    assert same(gradients(model, reference_step(model)), plain)
    assert stream.fetched == 6 + 3 * 3
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"], "shared by all blocks"


@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_groups_give_the_same_gradients(nano, plain, level, disk, tmp_path):
    model = adapted(nano)
    folder = tmp_path if disk else None
    offload_groups(model, DEVICE, level, blocks=2 if level == "block" else 1, folder=folder)
    assert same(gradients(model, reference_step(model)), plain)
    if disk:
        assert len(list(tmp_path.glob("*.safetensors"))) == (3 if level == "block" else 6 * 7)


@pytest.mark.parametrize("level", ["block", "leaf"])
def test_groups_hold_no_part_of_the_adapter(nano, level, tmp_path):
    """On disk what waits is empty, so a trained weight among it would be lost."""
    model = adapted(nano)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    offload_groups(model, CPU, level, folder=tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "nf4"])
def test_weights_of_every_precision_may_wait(nano, precision):
    """In the reference engine, whose backward pass reads what was saved of them."""
    model = adapted(nano, precision)
    expected = gradients(model, reference_step(model))
    model = adapted(nano, precision, streamed=True)
    stream_blocks(model, DEVICE)
    assert same(gradients(model, reference_step(model)), expected)
    for level in ("block", "leaf"):
        model = adapted(nano, precision)
        offload_groups(model, DEVICE, level)
        assert same(gradients(model, reference_step(model)), expected)


@pytest.mark.parametrize("blocks", [1, 2])
def test_groups_leave_before_the_next_ones_come_going_backward_too(nano, blocks, monkeypatch):
    """Checkpointing breaks off computing a block again before it returns, so hooks after it are not run."""
    there, most = set(), []

    def onload(group, plain=ModuleGroup.onload_):
        there.add(group)
        most.append(len(there))
        plain(group)

    def offload(group, plain=ModuleGroup.offload_):
        there.discard(group)
        plain(group)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    model = adapted(nano)
    offload_groups(model, DEVICE, "block", blocks=blocks, streams=False)
    step = reference_step(model)
    step(samples(1))
    step(samples(1))
    groups = 6 // blocks
    assert len(most) == 4 * groups and max(most) == 1  # each, both ways, in both steps


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["block", "leaf"])
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp8", "int8", "nf4"])
def test_no_more_groups_are_fetched_than_the_plan_counts(precision, level):
    """However slow the GPU: a host that launched on would fetch them into new memory."""
    device, wide = torch.device("cuda"), {"num_attention_heads": 8, "attention_head_dim": 128}
    config = {"num_layers": 12, "intermediate_size": 4096, "adaln_dim": 64, "llm_features_dim": 192,
              "mrope_section": (24, 20, 20), **wide}  # fmt: skip
    model = random_transformer(config, precision=precision, device=device)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "w2"]))
    block = sum(p.nbytes for n, p in model.layers[0].named_parameters()
                if is_streamed("layers.0." + n) and "lora" not in n and "norm" not in n)  # fmt: skip
    assert block >= 8 << 20
    offload_groups(model, device, level)
    for layer in model.layers:
        layer.attention_norm1.register_forward_pre_hook(lambda *_: torch.cuda._sleep(30_000_000))  # 15 ms
    step = reference_step(model)
    latents, text = torch.randn(16, 128), torch.randn(5, 1024)
    draw = Draw(0.4, torch.randn(16, 128), False)
    batch = [prepare(latents, text, (4, 4), draw, ScheduleSettings())]
    step(batch)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(batch)
    # By the plan 2 blocks and 1.4, and one Linear's dense weight; activations are small beside them.
    dense = 0 if precision in ("float32", "bf16") else 3 * 4 * 1024 * 4096
    most = {"block": 2.3, "leaf": 1.7}[level] * block + dense
    assert torch.cuda.max_memory_allocated() - before < most


@pytest.mark.parametrize("precision", ["float32", "fp8", "int8", "nf4", "bf16"])
def test_the_fused_engine_streams(nano, precision):
    results = []
    for slots in (None, 2, 3):
        model = adapted(nano, precision, streamed=slots is not None)
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        fused = FusedTransformer(model, linear="bf16", attention="sdpa", activation_budget=0.3, dtype=dtype)
        stream = fused.stream(slots) if slots else None
        results.append(gradients(model, lambda batch, fused=fused: accumulate_packed(fused, batch, 1)))
        assert same(results[-1], results[0])
        assert stream is None or stream.fetched == 6 + 3 * (6 - slots)


@pytest.mark.parametrize("exact", [0, 2, 6])
def test_fp8_products_on_streamed_weights(nano, exact):
    results = []
    for streamed in (False, True):
        model = adapted(nano, "fp8", streamed)
        fused = FusedTransformer(model, linear="fp8", attention="sdpa", activation_budget=0.0,
                                 exact_blocks=exact)  # fmt: skip
        if streamed:
            fused.stream()
        results.append(gradients(model, lambda batch, fused=fused: accumulate_packed(fused, batch, 1)))
    assert same(*results)


def test_pictures_between_steps_change_nothing(nano, plain):
    """Sampling goes forward only, and round and round."""
    model = adapted(nano, streamed=True)
    stream = stream_blocks(model, DEVICE)
    alone = adapted(nano)
    noisy, text = torch.randn(16, 128), torch.randn(5, 192)
    with torch.no_grad():
        for _ in range(3):
            got = predict_velocity(model, noisy, torch.tensor([0.4]), text, (4, 4))
    with torch.no_grad():
        assert torch.equal(got, predict_velocity(alone, noisy, torch.tensor([0.4]), text, (4, 4)))
    assert stream.fetched == 3 * 6 + 2  # the next pass' first blocks are on their way
    assert same(gradients(model, reference_step(model)), plain)


def test_what_comes_next_is_fetched_ahead():
    """While a block is at work, those that follow it are there already."""
    blocks = [[(torch.full((4,), float(i)), lambda t: None)] for i in range(6)]
    stream = WeightStream(blocks, CPU, slots=3)
    for block in range(6):
        stream.use(block, False)
        assert set(range(block, min(block + 3, 6))) <= set(stream._owner)
    for block in reversed(range(6)):
        stream.use(block, True)
        assert set(range(max(block - 2, 0), block + 1)) <= set(stream._owner)
    assert stream.fetched == 6 + 3


def test_tensors_of_all_types_come_back_as_they_were():
    tensors = [torch.randn(7, 3), torch.randn(5).bfloat16(), torch.arange(9, dtype=torch.uint8),
               torch.randn(4, 4).to(torch.float8_e4m3fn)]  # fmt: skip
    seen = [None] * 4
    cells = [[(t, lambda x, i=i: seen.__setitem__(i, x)) for i, t in enumerate(tensors)]]
    WeightStream(cells, CPU).use(0, False)
    for tensor, found in zip(tensors, seen, strict=True):
        assert found.dtype == tensor.dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))
