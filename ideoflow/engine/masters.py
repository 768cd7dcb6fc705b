"""An adapter's float32 masters and gradients in host memory: the device has only what it computes with.

As in ZeRO-Offload (Ren et al. 2021), but the update itself stays on the device, a bucket at a time
(:class:`ideoflow.engine.optimizer.HostAdamW`): a processor takes longer for it than the link for the numbers.

Gradients leave block by block, on a stream of their own, while the block before computes; the next block's
leave only when these are there, so those of two blocks are on the device at most. Why their memory is held
and waited for, and not left to ``Tensor.record_stream``, :mod:`ideoflow.engine.fused.offload` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Numbers of one host allocation: torch rounds pinned memory up to powers of two, which this is already.
PIECE = 16 << 20
# Numbers of one bucket on its way to the device or back.
BUCKET = 1 << 20

# What the engine multiplies with, and its factor over the master.
Copy = tuple[Tensor, float]


def runs(parameters: Sequence[nn.Parameter], most: int) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, in runs of at most ``most`` numbers and at least one parameter each."""
    run: list[nn.Parameter] = []
    for parameter in parameters:
        if run and sum(p.numel() for p in run) + parameter.numel() > most:
            yield run
            run = []
        run.append(parameter)
    yield run


def buckets(parameters: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """:func:`runs` that lie within one piece of a :class:`HostArray` each."""
    return [bucket for piece in runs(parameters, PIECE) for bucket in runs(piece, most)]


def views(flat: Tensor, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Consecutive parts of a flat tensor, shaped like the parameters."""
    start = 0
    for parameter in parameters:
        yield flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def on_stream(stream: torch.cuda.Stream | None) -> Any:
    """Work inside is queued on a stream; without one, nothing is different."""
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


class HostArray:
    """A float32 number on the host for each number of the parameters, from 0 on; pinned if asked for."""

    def __init__(self, parameters: Sequence[nn.Parameter], pinned: bool) -> None:
        self._place: dict[nn.Parameter, tuple[Tensor, int]] = {}
        for piece in runs(parameters, PIECE):
            flat, start = torch.zeros(sum(p.numel() for p in piece), pin_memory=pinned), 0
            for parameter in piece:
                self._place[parameter] = flat, start
                start += parameter.numel()

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's numbers, in its shape."""
        flat, start = self._place[parameter]
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def run(self, bucket: Sequence[nn.Parameter]) -> Tensor:
        """The numbers of one of the :func:`buckets`, flat."""
        flat, start = self._place[bucket[0]]
        return flat[start : start + sum(p.numel() for p in bucket)]


def write_copies(copies: Sequence[Copy], values: Sequence[Tensor]) -> None:
    """Brings working copies up to date in a few launches; ``values`` are float32 beside them."""
    torch._foreach_copy_([copy for copy, _ in copies], list(values))
    scaled = [(copy, factor) for copy, factor in copies if factor != 1]
    if scaled:
        torch._foreach_mul_([copy for copy, _ in scaled], [factor for _, factor in scaled])


class HostMasters:
    """Masters and gradients of an adapter on the host; the parameters themselves are put there.

    A parameter's ``grad`` is its sum on the host, or None before the first pass of a step. On a GPU the host
    may read either only after it has waited for the device.

    Args:
        parameters: what is trained, float32, in the order in which the norm and the update take them.
        device: where gradients are made and the update runs.
        copies: what the engine multiplies with, by parameter; nothing where it reads the masters.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        copies: dict[nn.Parameter, Copy] | None = None,
    ) -> None:
        self.parameters, self.device, self._copies = list(parameters), device, copies or {}
        pinned = device.type == "cuda"
        self.values, self.gradients = (HostArray(self.parameters, pinned) for _ in range(2))
        for parameter in self.parameters:
            host = self.values[parameter]
            host.copy_(parameter.detach())
            parameter.data = host
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._leaving: tuple[torch.cuda.Event, Sequence[Tensor]] | None = None
        self._before: Tensor | None = None  # a parameter's sum of the passes before, on the device
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._behind = True

    def take(self, parameters: Sequence[nn.Parameter], gradients: list[Tensor]) -> None:
        """Adds a block's gradients, float32 on the device, to those on the host, and takes their norms.

        The tensors belong to this object from here on.
        """
        if self._stream is not None:
            self._release()
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), on_stream(self._stream):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if parameter.grad is not None:
                    gradient += self._sum_so_far(parameter)
            # Of the last pass of a step, these are the whole gradients'.
            self._norms.update(zip(parameters, torch._foreach_norm(gradients), strict=True))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = self.gradients[parameter]
                parameter.grad.copy_(gradient, non_blocking=True)
            if self._stream is not None:
                self._leaving = self._stream.record_event(), gradients

    def norm(self) -> Tensor:
        """The global norm of the gradients that there are, a float32 scalar on the device."""
        self.finish()
        norms = [self._norms[p] for p in self.parameters if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms))

    def finish(self) -> None:
        """What is queued on the device from here on finds all gradients on the host."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._leaving = None

    def written(self) -> None:
        """To be called when masters were changed on the host: the working copies are behind."""
        self._behind = True

    def refresh(self) -> None:
        """Brings the working copies up to date, if masters were changed on the host."""
        if self._behind and self._copies:
            for bucket in buckets(self.parameters, BUCKET):
                there = self.values.run(bucket).to(self.device, non_blocking=True)
                self.write(bucket, list(views(there, bucket)))
        self._behind = False

    def write(self, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
        """Brings the working copies of some parameters up to date from their masters, on the device."""
        if self._copies:
            write_copies([self._copies[p] for p in parameters], values)

    def _sum_so_far(self, parameter: nn.Parameter) -> Tensor:
        host = self.gradients[parameter]
        if self._stream is None:
            return host
        if self._before is None:
            self._before = torch.empty(max(p.numel() for p in self.parameters), device=self.device)
        there = self._before[: host.numel()].view(host.shape)
        there.copy_(host, non_blocking=True)
        return there

    def _release(self) -> None:
        """Lets the gradients of the block before go, once they have left."""
        if self._leaving is not None:
            torch.cuda.current_stream(self.device).wait_event(self._leaving[0])
            self._leaving = None
