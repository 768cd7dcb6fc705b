"""Frozen weights that wait elsewhere and come to the device block by block.

:class:`WeightStream` is our own: the large weights of each block are one row of bytes, and two or more
slots on the device are filled ahead of the block at work, in forward order while going forward and in
backward order while going backward. Checkpointing recomputes a block just before its backward pass, so both
find the weights in the same slot. What is in the slots at the turn, and at the end of a step, is not fetched
again. The bytes wait in pinned host memory (:class:`HostMemory`), or cut into pieces on the GPUs of all
processes that train together (:class:`Shards`).

:func:`offload_groups` uses diffusers' group offloading, whose own prefetching follows the order of the first
forward pass: going backward it would fetch the blocks behind, and keep them. Its hooks are told here which
way training goes; so streams stay on with checkpointing. Groups hold frozen weights only: the adapter stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingHook,
    GroupOffloadingType,
    ModuleGroup,
)
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor, nn

from ideoflow.model.load import is_streamed

# A tensor that may live elsewhere, and what puts it back where computation reads it.
Cell = tuple[Tensor, Callable[[Tensor], None]]
_ALIGNMENT = 256  # bytes; what torch's own allocator gives


@dataclass(frozen=True)
class _Piece:
    start: int
    size: int
    dtype: torch.dtype
    shape: torch.Size

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.start : self.start + self.size].view(self.dtype).view(self.shape)


class HostMemory:
    """Each block's bytes in a buffer of host memory, pinned where a GPU fetches them."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self.buffers: list[Tensor] = []

    def keep(self, pieces: Sequence[_Piece], tensors: Sequence[Tensor]) -> None:
        """Takes the next block's tensors."""
        buffer = torch.empty(_size(pieces), dtype=torch.uint8, pin_memory=self._pinned)
        _fill(buffer, pieces, tensors)
        self.buffers.append(buffer)

    def slot_bytes(self, block: int) -> int:
        """What the block takes of a slot."""
        return len(self.buffers[block])

    def at_rest(self, block: int, piece: _Piece) -> Tensor:
        """What stands for one of the block's tensors while it is in no slot."""
        return piece.view(self.buffers[block])

    def fetch(self, block: int, slot: Tensor) -> None:
        """Fills a slot, on the current stream."""
        buffer = self.buffers[block]
        slot[: len(buffer)].copy_(buffer, non_blocking=True)


class Shards:
    """Each block's bytes cut into as many equal pieces as there are processes, each on its own device.

    A block is fetched by all processes at once, so all must use the same blocks in the same order.

    Args:
        device: where this process keeps its pieces.
        rank, ranks: this process's number, and how many there are.
        group: that of torch.distributed in which pieces travel; None for the default one.
    """

    def __init__(self, device: torch.device, rank: int, ranks: int, group: Any = None) -> None:
        self.device, self.rank, self.ranks, self.group = device, rank, ranks, group
        self.buffers: list[Tensor] = []

    def keep(self, pieces: Sequence[_Piece], tensors: Sequence[Tensor]) -> None:
        """Takes this process's piece of the next block's tensors, wherever they are."""
        size = _aligned(-(-_size(pieces) // self.ranks))
        whole = torch.zeros(size * self.ranks, dtype=torch.uint8, device=tensors[0].device)
        _fill(whole, pieces, tensors)
        own = whole[size * self.rank : size * (self.rank + 1)]
        self.buffers.append(own.to(self.device, copy=True))

    def slot_bytes(self, block: int) -> int:
        """What the block takes of a slot, with what makes its pieces equal."""
        return self.ranks * len(self.buffers[block])

    def at_rest(self, block: int, piece: _Piece) -> Tensor:
        """A tensor of the right shape and type without memory: nobody has the block's numbers then."""
        return torch.empty((), dtype=piece.dtype, device=self.device).expand(piece.shape)

    def fetch(self, block: int, slot: Tensor) -> None:
        """Fills a slot from all processes: on a GPU on the current stream, else before this returns."""
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its older name
        gather(slot[: self.slot_bytes(block)], self.buffers[block], group=self.group)


class WeightStream:
    """Large weights of numbered blocks that wait elsewhere, and slots for a few blocks on the device.

    Args:
        blocks: for each block its tensors with their setters; each block's memory is free once it is taken.
        device: where they are needed; on a CPU the same is done without a stream of its own.
        slots: blocks on the device at once: the one at work, and those that come next.
        source: where they wait; by default in host memory.
    """

    def __init__(
        self,
        blocks: Iterable[Sequence[Cell]],
        device: torch.device,
        slots: int = 3,
        source: HostMemory | Shards | None = None,
    ) -> None:
        self.device, self.source = device, source or HostMemory(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._setters: list[list[Callable[[Tensor], None]]] = []
        self._pieces: list[list[_Piece]] = []
        for cells in blocks:
            pieces = _lay_out([tensor for tensor, _ in cells])
            self.source.keep(pieces, [tensor for tensor, _ in cells])
            self._setters.append([put for _, put in cells])
            self._pieces.append(pieces)
            self._rest(len(self._pieces) - 1)
        self.count = len(self._pieces)
        self._wanted = min(slots, self.count)
        self._slots: list[Tensor] = []
        self.release()
        self.round = False  # whether a forward pass is followed by another one, as while sampling
        self._clock = self.fetched = 0

    def release(self) -> None:
        """Gives the slots' memory back, once all work with them was launched; the next use makes new ones."""
        if self._slots:
            for block in range(self.count):
                self._rest(block)
            if self._stream is not None:
                # What is still being fetched must not land in memory that is someone else's by then.
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._slots = []
        self._owner: list[int | None] = [None] * self._wanted  # block in each slot
        self._used = [0] * self._wanted  # when, to find the slot that was left longest ago
        self._ready: list[torch.cuda.Event | None] = [None] * self._wanted
        self._done: list[torch.cuda.Event | None] = [None] * self._wanted
        self._at: int | None = None  # slot of the block at work

    def _rest(self, block: int) -> None:
        for piece, put in zip(self._pieces[block], self._setters[block], strict=True):
            put(self.source.at_rest(block, piece))

    def _make_slots(self) -> None:
        largest = max(self.source.slot_bytes(block) for block in range(self.count))
        self._slots = [
            torch.empty(largest, dtype=torch.uint8, device=self.device) for _ in range(self._wanted)
        ]

    @property
    def slot_bytes(self) -> int:
        return sum(len(slot) for slot in self._slots)

    def use(self, block: int, backward: bool | None = None) -> None:
        """Puts a block's weights in place for work that is launched next, and starts on those that follow.

        Args:
            backward: which way the blocks go; by default as autograd's engine is at work or not.
        """
        backward = going_backward() if backward is None else backward
        if not self._slots:
            self._make_slots()
        slot = self._slot_of(block)
        if slot != self._at:
            if self._at is not None and self._stream is not None:
                # All work on the block before has been launched: its slot is free when that is done.
                self._done[self._at] = torch.cuda.current_stream(self.device).record_event()
            self._at = slot
            if (ready := self._ready[slot]) is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
            for piece, put in zip(self._pieces[block], self._setters[block], strict=True):
                put(piece.view(self._slots[slot]))
        self._touch(slot)
        for ahead in range(1, len(self._slots)):
            following = block - ahead if backward else block + ahead
            if not backward and self.round:
                following %= self.count
            if 0 <= following < self.count:
                self._touch(self._slot_of(following))

    def _slot_of(self, block: int) -> int:
        """The slot that holds a block, or will hold it when a copy that starts now is done.

        Which one, and whether anything is fetched, depends on the blocks used so far and on nothing else: of
        several processes all fetch the same in the same order.
        """
        if block in self._owner:
            return self._owner.index(block)
        slot = min(
            (s for s in range(len(self._slots)) if s != self._at), key=lambda s: self._used[s], default=0
        )
        self._owner[slot] = block
        self.fetched += 1
        if self._stream is None:
            self.source.fetch(block, self._slots[slot])
            return slot
        if (done := self._done[slot]) is not None:
            self._stream.wait_event(done)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self.source.fetch(block, self._slots[slot])
            self._ready[slot] = self._stream.record_event()
        return slot

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock


def _lay_out(tensors: Sequence[Tensor]) -> list[_Piece]:
    pieces, start = [], 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        pieces.append(_Piece(start, size, tensor.dtype, tensor.shape))
        start += _aligned(size)
    return pieces


def _size(pieces: Sequence[_Piece]) -> int:
    return pieces[-1].start + pieces[-1].size if pieces else 0


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _fill(buffer: Tensor, pieces: Sequence[_Piece], tensors: Sequence[Tensor]) -> None:
    for piece, tensor in zip(pieces, tensors, strict=True):
        piece.view(buffer).copy_(tensor)


def going_backward() -> bool:
    """Whether autograd's engine is at work, as it is while a checkpointed block is computed again."""
    return bool(torch._C._current_graph_task_id() != -1)


def stream_blocks(
    transformer: nn.Module, device: torch.device, source: HostMemory | Shards | None = None
) -> WeightStream:
    """Streams the blocks of a plain model; its blocks must be recomputed in the backward pass.

    What autograd keeps of a product is a view of the weight's memory, which has another block's weights in it
    by the time of the backward pass, unless the block is computed again just before.
    """
    cells = (_cells(block) for block in transformer.layers)
    stream = WeightStream(cells, device, source=source)
    for index, block in enumerate(transformer.layers):
        block.register_forward_pre_hook(partial(_before, stream, index))
    return stream


def move_unstreamed(transformer: nn.Module, device: torch.device) -> None:
    """Moves what :func:`stream_blocks` leaves where it is: small weights, buffers, scales of 4-bit codes."""
    streamed = {id(layer.weight) for block in transformer.layers for layer in _large(block)}
    for parameter in transformer.parameters():
        if id(parameter) not in streamed:
            parameter.data = parameter.data.to(device)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)
    for module in transformer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _before(stream: WeightStream, index: int, module: nn.Module, args: Any) -> None:
    stream.round = not torch.is_grad_enabled()
    stream.use(index)


def _cells(block: nn.Module) -> list[Cell]:
    return [(layer.weight.data, partial(setattr, layer.weight, "data")) for layer in _large(block)]


def _large(block: nn.Module) -> list[nn.Linear]:
    """The frozen Linears with large weights, in the order in which a block computes them."""
    layers = [
        module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and is_streamed(f"layers.0.{name}")
    ]
    order = ("to_q", "to_k", "to_v", "to_out", "w1", "w3", "w2")
    names = {id(m): n for n, m in block.named_modules()}
    return sorted(layers, key=lambda m: next(i for i, part in enumerate(order) if part in names[id(m)]))


class _Pace:
    """Keeps the host from launching groups far ahead of the device.

    What a group held can be used again when the device is done with it (``record_stream``), and the host is
    held up by no more than copies, which take a third of a block's backward pass: launching on regardless,
    it would fetch group after group into new memory.

    Args:
        ahead: groups whose work may still go on when the next but one is fetched.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        self.device, self.ahead = device, ahead
        self._begun: deque[torch.cuda.Event] = deque()

    def __call__(self) -> None:
        """Waits, at a group's beginning, until the device has come close enough."""
        self._begun.append(torch.cuda.current_stream(self.device).record_event())
        if len(self._begun) > self.ahead:
            self._begun.popleft().synchronize()


class _TrainingHook(GroupOffloadingHook):
    """diffusers' hook, but for the direction that training goes: what comes first, and which group is next.

    Going backward, the blocks of a group are computed again from the last to the first. Checkpointing breaks
    that off as soon as it has what the backward pass needs, before the block returns, so its group, the one
    ``after`` this, is sent away when this one's turn comes.
    """

    ends: tuple[nn.Module, nn.Module]
    pace: _Pace | None = None
    before: ModuleGroup | None = None
    after: ModuleGroup | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        backward = going_backward()
        first, last = reversed(self.ends) if backward else self.ends
        self.group.onload_leader, self.group.offload_leader = first, last
        following = self.before if backward else self.after
        # One that is on the device already must not be fetched into new memory.
        self.next_group = None if following is None or _is_there(following) else following
        if module is first:
            if self.pace:
                self.pace()
            # Within a block Linears run forward both ways: what comes after one is the next, not the last.
            if backward and self.after is not None and self.after is not following:
                self.after.offload_()
        return super().pre_forward(module, *args, **kwargs)


def _is_there(group: ModuleGroup) -> bool:
    return bool(group.parameters[0].device.type != group.offload_device.type)


def offload_groups(
    transformer: nn.Module,
    device: torch.device,
    level: str,
    *,
    blocks: int = 1,
    streams: bool = True,
    folder: Path | None = None,
) -> None:
    """Offloads the blocks' large weights by diffusers' group offloading.

    Args:
        level: ``block``, or ``leaf`` for every Linear by itself.
        blocks: of a group, at level ``block``.
        streams: fetch the next group on a stream of its own.
        folder: keep the weights on disk, here, and not in host memory.
    """
    stream = torch.cuda.Stream(device) if streams and device.type == "cuda" else None
    host = torch.device("cpu")
    config = GroupOffloadingConfig(
        onload_device=device, offload_device=host, offload_type=GroupOffloadingType(f"{level}_level"),
        non_blocking=stream is not None, record_stream=stream is not None, low_cpu_mem_usage=False,
        num_blocks_per_group=blocks,
        offload_to_disk_path=str(folder) if folder else None, stream=stream,
    )  # fmt: skip
    layers = list(transformer.layers)
    if level == "leaf":
        # Going backward, blocks come in reverse, but within one it is computed again in forward order.
        runs = [[[layer] for layer in _large(block)] for block in layers]
    else:
        runs = [[layers[i : i + blocks]] for i in range(0, len(layers), blocks)]
    hooks = [[_hook(modules, level, config, f"{i}_{j}") for j, modules in enumerate(run)]
             for i, run in enumerate(runs)]  # fmt: skip
    for run in hooks:
        for one, other in pairwise(run):
            one.after = one.before = other.group
    for run, following in pairwise(hooks):
        run[-1].after = following[0].group
        following[-1].before = run[0].group
    if stream is not None:
        # A block's launches are few beside its work. A Linear's work is as short as a launch, and small.
        pace = _Pace(device, 1 if level == "leaf" else 0)
        for hook in chain.from_iterable(hooks):
            hook.pace = pace


def _hook(modules: list[nn.Module], level: str, config: GroupOffloadingConfig, name: str) -> _TrainingHook:
    frozen = [layer.weight for m in modules for layer in ([m] if level == "leaf" else _large(m))]
    group = ModuleGroup(
        modules=[], parameters=frozen, offload_leader=modules[-1], onload_leader=modules[0],
        offload_device=config.offload_device, onload_device=config.onload_device,
        non_blocking=config.non_blocking, stream=config.stream, record_stream=config.record_stream,
        onload_self=config.stream is None, offload_to_disk_path=config.offload_to_disk_path, group_id=name,
    )  # fmt: skip
    hook = _TrainingHook(group, config=config)
    hook.ends = modules[0], modules[-1]
    for module in dict.fromkeys((modules[0], modules[-1])):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "group_offloading")
    return hook
