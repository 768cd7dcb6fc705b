"""Values kept for the backward pass on pinned host memory, copied on a stream of their own.

Forward: block i's values go out while block i + 1 computes; before block i + 2 the compute stream waits for
that copy and only then lets the memory go. Backward: block i - 1's values come in while block i computes.

Rejected: ``Tensor.record_stream``. The host runs far ahead of the GPU, so the allocator would see every copy
as unfinished and take new memory instead of using the old again: offloading would save nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


class HostStore:
    """Tensors of numbered blocks on the host; on a CPU device they are simply held."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[tuple[int, str], Tensor] = {}
        self._held: dict[int, dict[str, Tensor]] = {}
        self._leaving: list[tuple[torch.cuda.Event, dict[str, Tensor]]] = []
        self._coming: dict[int, tuple[torch.cuda.Event | None, dict[str, Tensor]]] = {}

    def put(self, block: int, values: dict[str, Tensor]) -> None:
        """Starts to copy out the values of a block; the last but one block's memory is released."""
        if self._stream is None:
            self._held[block] = values
            return
        self._release(1)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        held = {}
        with torch.cuda.stream(self._stream):
            for name, value in values.items():
                held[name] = self._buffer(block, name, value)
                held[name].copy_(value, non_blocking=True)
            done = self._stream.record_event()
        self._held[block] = held
        self._leaving.append((done, values))

    def start(self, block: int) -> None:
        """Starts to copy a block's values back in; nothing happens for a block that put none."""
        if block not in self._held or block in self._coming:
            return
        held = self._held.pop(block)
        if self._stream is None:
            self._coming[block] = (None, held)
            return
        self._release(0)
        values = {name: torch.empty_like(value, device=self._device) for name, value in held.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, value in values.items():
                value.copy_(held[name], non_blocking=True)
            self._coming[block] = (self._stream.record_event(), values)

    def take(self, block: int) -> dict[str, Tensor]:
        """A block's values, on the device and safe to use on the current stream."""
        self.start(block)
        done, values = self._coming.pop(block)
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
        return values

    def clear(self) -> None:
        """Forgets a step that was not finished; host buffers are kept."""
        if self._stream is not None:
            self._release(0)
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._held.clear()
        self._coming.clear()

    def _release(self, keep: int) -> None:
        while len(self._leaving) > keep:
            done, _ = self._leaving.pop(0)
            torch.cuda.current_stream(self._device).wait_event(done)

    def _buffer(self, block: int, name: str, value: Tensor) -> Tensor:
        size = value.numel() * value.element_size()
        buffer = self._buffers.get((block, name))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._buffers[block, name] = buffer
        return buffer[:size].view(value.dtype).view(value.shape)
