"""Bytes of a file straight into a tensor: several threads read at once, into pinned memory for a GPU.

safetensors maps its files. Each page of a map is fetched when it is first touched, by one thread, and counts
as the process' memory; plain reads of long runs by several threads are faster from a fast disk or the page
cache.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 8 << 20
_THREADS = 4


def read_tensor(
    file: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor whose bytes begin at byte ``start`` of a file; it is there when this returns.

    Raises:
        OSError: when the file cannot be read.
        ValueError: when it ends too early.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.numel():
        _fill(file, start, out.view(-1).view(torch.uint8))
    return out


def _fill(file: Path, start: int, out: Tensor) -> None:
    """Reads as many bytes as ``out``, uint8 [N], has room for."""
    firsts = range(0, len(out), _CHUNK)
    before = torch.cuda.current_stream(out.device).record_event() if out.is_cuda else None

    def read(thread: int) -> None:
        with file.open("rb", buffering=0) as stream:
            for first in firsts[thread::_THREADS]:
                stream.seek(start + first)
                piece = out[first : first + _CHUNK]
                if before is None:
                    _read_exactly(stream, piece, file)
                else:
                    _through_pinned(stream, piece, file, before)

    if len(firsts) == 1:
        read(0)
        return
    with ThreadPoolExecutor(min(_THREADS, len(firsts)), thread_name_prefix="read") as pool:
        for _ in pool.map(read, range(min(_THREADS, len(firsts)))):
            pass


def _through_pinned(stream: FileIO, piece: Tensor, file: Path, before: torch.cuda.Event) -> None:
    # Freed pinned memory stays with torch's allocator, so that the next piece has it at once.
    host = torch.empty(len(piece), dtype=torch.uint8, pin_memory=True)
    _read_exactly(stream, host, file)
    copies = torch.cuda.Stream(piece.device)
    copies.wait_event(before)  # what had the memory before may still be in use
    with torch.cuda.stream(copies):
        piece.copy_(host, non_blocking=True)
    copies.synchronize()


def _read_exactly(stream: FileIO, out: Tensor, file: Path) -> None:
    view = memoryview(out.numpy())
    while view:
        count = stream.readinto(view)
        if not count:
            raise ValueError(f"{file} is cut short")
        view = view[count:]
