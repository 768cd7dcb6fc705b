"""CUDA graphs of whole training steps: forward, loss and backward recorded once a shape, then replayed.

A step is about 2,900 launches, for which a host takes 120 ms however few tokens there are: on a fast card, a
picture of 512 x 512 waits for them. A replay launches everything at once.

A graph's shapes and addresses are fixed, so batches are copied into a :class:`Place` of their shape. Captions
differ in length from picture to picture; what a graph is recorded for is only the grids of image tokens and
the packed length, a multiple of 64. Text rows that a caption does not need fall on the inert tokens at the
end, and those are a sample of their own in attention's cumulative lengths, which are data. So a set of
pictures needs a graph for each bucket and for each step of 64 text tokens, not for each caption.

Gradients are added into buffers that live as long as the graphs. All graphs share one pool of memory, of
which nothing is in use between two replays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import GRAPH_FAILED
from ideoflow.engine.fused.transformer import FusedTransformer
from ideoflow.engine.packed import PackedLayout
from ideoflow.kernels.budget import MOST_GRAPHS

_EAGER_STEPS = 2  # a shape that comes back this often will come back more


class Place:
    """Device memory for batches of one shape; to the engine and its attention, it is their layout.

    Attributes:
        noisy, target: float32 [image tokens, channels].
        time: float32 [B].
        text: [total - image tokens, hidden], zero where a batch has fewer text tokens.
        tables: cos and sin of the rotary embedding, [total, E / 2] each.
        loss: float32 scalar, of the last replay.
        parts: float32 scalar, by which the loss's gradients are divided.
        lengths: tokens of each sample of the batch that is loaded, and of the inert tokens as the last.
    """

    equal = False

    def __init__(self, layout: PackedLayout, channels: int, tables: tuple[Tensor, Tensor],
                 text: Tensor) -> None:  # fmt: skip
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=text.device)

        self.total, self.samples = layout.total, layout.samples + 1
        images, slots = layout.image_total, layout.total - layout.image_total
        # Every length that can come: attention's grid is made for the longest.
        self.max_length = max(layout.image_lengths) + slots
        self.noisy, self.target = empty(images, channels), empty(images, channels)
        self.time, self.loss = empty(layout.samples), empty()
        self.text = empty(slots, text.shape[1], dtype=text.dtype)
        self.tables = (torch.empty_like(tables[0]), torch.empty_like(tables[1]))
        self.index = SimpleNamespace(
            sample_index=empty(self.total, dtype=torch.int32),
            image_index=empty(images, dtype=torch.int64),
            text_index=empty(slots, dtype=torch.int64),
            cu_seqlens=empty(self.samples + 1, dtype=torch.int32),
        )
        self.parts, self._parts = empty(), 0.0
        self.lengths: tuple[int, ...] = ()

    def divide_by(self, parts: float) -> None:
        """Sets :attr:`parts`: of several processes, each one's differ from batch to batch."""
        if parts != self._parts:
            self.parts.fill_(parts)
            self._parts = parts

    @property
    def tokens(self) -> int:
        """Tokens that belong to a sample: all, as the inert ones are a sample too."""
        return self.total

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each sample starts, and where the last one ends."""
        return tuple(accumulate(self.lengths, initial=0))

    def tensors(self, device: torch.device | str = "cpu") -> SimpleNamespace:
        """The index tensors that the engine reads, as :meth:`PackedLayout.tensors` names them."""
        return self.index

    def load(self, layout: PackedLayout, noisy: Tensor, target: Tensor, time: Tensor, text: Tensor,
             tables: tuple[Tensor, Tensor]) -> None:  # fmt: skip
        """Copies a batch in; it must have this place's grids and packed length."""
        index, here = layout.tensors(text.device), self.index
        self.lengths = (*layout.lengths, layout.total - layout.tokens)
        rows = text.shape[0]
        self.text[rows:].zero_()
        here.text_index[rows:] = torch.arange(layout.tokens, layout.total, device=text.device)
        here.cu_seqlens[-1] = layout.total
        pairs = [
            (self.noisy, noisy), (self.target, target), (self.time, time), (self.text[:rows], text),
            (self.tables[0], tables[0]), (self.tables[1], tables[1]),
            (here.sample_index, index.sample_index), (here.image_index, index.image_index),
            (here.text_index[:rows], index.text_index), (here.cu_seqlens[:-1], index.cu_seqlens),
        ]  # fmt: skip
        for into, source in pairs:
            into.copy_(source, non_blocking=True)


class GraphedSteps:
    """Adds the gradients of packed batches, by a recorded graph where the shape has one.

    Args:
        fused: the engine; its attention must take lengths as data (``flash4``), and it must not offload.
        parameters: what is trained; their ``grad`` is set to buffers of this object.
    """

    def __init__(self, fused: FusedTransformer, parameters: Sequence[nn.Parameter]) -> None:
        self.fused, self.parameters = fused, list(parameters)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._graphs: dict[tuple[object, ...], tuple[Place, torch.cuda.CUDAGraph]] = {}
        self._gradients: list[Tensor] = []
        self._pool: object | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, noisy: Tensor, target: Tensor, time: Tensor, text: Tensor, layout: PackedLayout,
                 parts: float) -> Tensor:  # fmt: skip
        """As :meth:`FusedTransformer.add_gradients`, with everything on the device."""
        self._attach()
        key = (layout.grids, layout.total)
        batch = (noisy, target, time, text, self.fused.rotary(layout))
        if key in self._graphs:
            place, graph = self._graphs[key]
            place.load(layout, *batch)
            place.divide_by(parts)
            graph.replay()
            return place.loss.clone()
        self._seen[key] += 1
        if self._seen[key] <= _EAGER_STEPS or len(self._graphs) >= MOST_GRAPHS:
            return self.fused.add_gradients(noisy, target, time, text, layout, parts, batch[-1])
        return self._record(key, layout, batch, parts)

    def in_place(self, place: Place, parts: float | Tensor) -> None:
        """What is recorded: the step of the batch in a place, launch by launch."""
        data = (place.noisy, place.target, place.time, place.text)
        place.loss.copy_(self.fused.add_gradients(*data, place, parts, place.tables))

    def release(self) -> None:
        """Gives the graphs' memory back, for a phase that needs it; shapes are recorded again later."""
        self._graphs.clear()
        self._gradients.clear()
        self._pool = None

    def _attach(self) -> None:
        """Sees to it that gradients are added into this object's buffers."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self.parameters]
        elif all(p.grad is None for p in self.parameters):
            torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is not gradient:
                if parameter.grad is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def _record(self, key: tuple[object, ...], layout: PackedLayout, batch: tuple, parts: float) -> Tensor:
        """Runs the batch once in its new place, which compiles what is new there, then records the step."""
        place = Place(layout, batch[0].shape[1], batch[-1], batch[3])
        place.load(layout, *batch)
        place.divide_by(parts)
        self._stream = self._stream or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self.in_place(place, place.parts)
        current.wait_stream(self._stream)
        loss = place.loss.clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's pool takes the place of what the steps before it used
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            # The thread that reads the next batch may go on pinning memory meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                self.in_place(place, place.parts)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            fail(GRAPH_FAILED, f"a step of {layout.total} tokens cannot be recorded",
                 cure='set memory.graphs = "off"', notes=str(error).strip().splitlines()[:1])  # fmt: skip
        self._graphs[key] = (place, graph)
        return loss
