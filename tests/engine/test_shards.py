"""Weights cut up among processes: their pieces. test_distributed.py shows that nothing learnt hangs on it."""

from typing import Any

import pytest
import torch

from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine import setup
from ideoflow.engine.offload import HostMemory, Shards, WeightStream
from ideoflow.engine.processes import Processes
from ideoflow.processes import Process

CPU = torch.device("cpu")


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
