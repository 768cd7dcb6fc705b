"""Weights cut up among processes: what each holds, and that nothing learnt or sampled depends on it."""

import json
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import HEAD
from safetensors.torch import load_file
from test_distributed import TORCHRUN, metrics

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine import setup
from ideoflow.engine.offload import HostMemory, Shards, WeightStream
from ideoflow.engine.processes import Processes
from ideoflow.model.base import NANO_TRANSFORMER
from ideoflow.plan.document import load_plan
from ideoflow.processes import Process
from ideoflow.resources import recipes

CPU = torch.device("cpu")
WORKER = str(Path(__file__).with_name("shards_worker.py"))
RECIPE = (
    HEAD
    + """[adapter]
rank = 4
[train]
steps = 2
learning_rate = 1e-2
max_grad_norm = 0.005
[memory]
precision = "{precision}"
offload = "{offload}"
[output]
dtype = "float32"
folder = "{name}"
"""
)
SAMPLES = '[validate]\nprompts = ["pictures/*.icap"]\npreset = "turbo"\nsteps = 1\n'
SAMPLED = "fused-fp8"
WAYS = tuple(product(("reference", "fused"), ("bf16", "fp8")))


def tensors(shapes: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in shapes]


BLOCKS = [
    [((7, 3), torch.float32), ((5,), torch.bfloat16), ((4, 4), torch.float8_e4m3fn)],
    [((1,), torch.int8)],
    [((300, 11), torch.bfloat16), ((999,), torch.uint8)],
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8])
def test_pieces_are_equal_and_make_up_every_block(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of processes and any sizes; put together, the tensors are what they were."""
    blocks = [tensors(shapes, seed) for seed, shapes in enumerate(BLOCKS)]
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def cells(block: int) -> Any:
        return [(t, lambda x, key=(block, n): seen.__setitem__(key, x)) for n, t in enumerate(blocks[block])]

    streams, host = [], HostMemory(CPU)
    WeightStream([cells(b) for b in range(3)], CPU, source=host)
    for rank in range(ranks):
        streams.append(WeightStream([cells(b) for b in range(3)], CPU, source=Shards(CPU, rank, ranks)))
    for block in range(3):
        pieces = [stream.source.buffers[block] for stream in streams]
        assert len({len(piece) for piece in pieces}) == 1 and len(pieces[0]) % 256 == 0
        size = len(host.buffers[block])
        assert size <= ranks * len(pieces[0]) < size + 256 * ranks
        for n, tensor in enumerate(blocks[block]):
            rest = seen[block, n]
            assert (rest.shape, rest.dtype) == (tensor.shape, tensor.dtype)
            assert rest.untyped_storage().nbytes() == tensor.itemsize, "nothing but a place for a number"

    def gathered(out: torch.Tensor, own: torch.Tensor, group: Any) -> None:
        block = next(b for b in range(3) if own is streams[-1].source.buffers[b])
        out.copy_(torch.cat([stream.source.buffers[block] for stream in streams]))

    monkeypatch.setattr("torch.distributed.all_gather_single", gathered, raising=False)
    for block in (0, 1, 2, 1, 0):
        streams[-1].use(block, False)
        for n, tensor in enumerate(blocks[block]):
            assert torch.equal(seen[block, n].view(torch.uint8), tensor.view(torch.uint8))
    streams[-1].release()
    assert all(x.untyped_storage().nbytes() == x.itemsize for x in seen.values())


def test_gpus_without_nccl_are_a_diagnostic() -> None:
    with pytest.raises(IdeoflowError) as caught:
        setup._shards(torch.device("cuda"), Processes(Process(1, 2, 1, 2)))
    assert [d.code.id for d in caught.value.diagnostics] == ["IP016"]


@pytest.mark.slow
def test_two_processes_with_half_of_the_weights_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, adapters and pictures are, to the bit, those of processes that have all weights each."""
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for name in ("cat", "coffee", "rocket"):
        shutil.copy(recipes() / "quickstart" / f"{name}.jpg", "pictures")
        Path(f"pictures/{name}.icap").write_text(f"A {name}.\n")
    names = []
    for engine, precision in WAYS:
        for offload in ("none", "shard"):
            names.append(name := f"{engine}-{precision}-{offload}")
            text = RECIPE.format(precision=precision, offload=offload, name=name)
            Path(f"{name}.toml").write_text(text + SAMPLES * name.startswith(SAMPLED))
    done = subprocess.run(
        [*TORCHRUN, WORKER, *(f"{name}.toml" for name in names)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ranks = json.loads(Path("shards.json").read_text())
    for engine, precision in WAYS:
        whole, cut = (f"{engine}-{precision}-{offload}" for offload in ("none", "shard"))
        assert load_plan(f"{cut}/plan.json").value("offload") == "shard"
        losses = [[step["loss"] for step in metrics(name, "step")] for name in (whole, cut)]
        assert losses[0] == losses[1] and len(losses[0]) == 2
        one, other = (load_file(f"{name}/{name}.safetensors") for name in (whole, cut))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        pictures = [sorted(Path(name).rglob("samples/*/*.png")) for name in (whole, cut)]
        count = 6 * whole.startswith(SAMPLED)  # three prompts, before and after
        assert len(pictures[0]) == len(pictures[1]) == count
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True))
        # Each process has half of the large weights, and of those of other kinds all.
        spec = NANO_TRANSFORMER
        large = (4 * spec.hidden**2 + 3 * spec.hidden * spec.intermediate_size) * (2 - (precision == "fp8"))
        for held, order in ranks:
            pieces = held[cut]["pieces"]
            assert len(pieces) == spec.num_layers and all(large / 2 <= p < large / 2 + 256 for p in pieces)
            rest = held[whole]["rest"] - spec.num_layers * large
            assert rest <= held[cut]["rest"] < rest + 1024 and not held[whole]["pieces"]
            assert order[cut] == ranks[0][1][cut], "all launch the same in the same order"
        order = ranks[0][1][cut]
        buckets = [n for n, what in enumerate(order) if what.startswith("bucket")]
        assert len(buckets) >= 2 * 10
        if engine == "fused":
            assert any(what.startswith("block") for what in order[buckets[0] : buckets[9]]), "meanwhile"
