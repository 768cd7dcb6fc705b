"""Adds up the gradients of processes that train together, while the backward pass goes on.

Each process has the gradients of its own samples, weighted by their share of the tokens of all
(:meth:`ideoflow.engine.batches.Batches.shares`), so the sum over the processes is the gradient of the batch
of all of them. An adapter is hundreds of small tensors: they travel in buckets, in the order in which the
backward pass comes by, each as soon as its last gradient is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes of a bucket: two or three blocks at rank 32. Larger ones begin later, smaller ones cost more launches.
BUCKET_BYTES = 24 << 20


class GradientExchange:
    """Sums gradients over all processes.

    Args:
        parameters: what is trained, in the model's order, the same in every process.
        overlaps: whether a pass is one backward pass whose hooks run; else everything is sent at the end.
        group: that of torch.distributed in which they travel; None for the default one.
        bucket_bytes: at least so many bytes are sent at once, while there are so many; default: 24 MiB.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        overlaps: bool,
        group: Any = None,
        bucket_bytes: int | None = None,
    ) -> None:
        self.group, least = group, bucket_bytes or BUCKET_BYTES
        self.buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(parameters):
            if sum(p.nbytes for p in self.buckets[-1]) >= least:
                self.buckets.append([])
            self.buckets[-1].append(parameter)
        self._place = {p: n for n, bucket in enumerate(self.buckets) for p in bucket}
        self._armed, self._missing = False, [0] * len(self.buckets)
        self._works: list[Any] = []
        if overlaps:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._arrived)

    def arm(self) -> None:
        """The next backward pass is the last one of this step: what it completes may leave."""
        self._armed, self._missing = True, [len(bucket) for bucket in self.buckets]

    def finish(self, loss: Tensor) -> Tensor:
        """The sum of ``loss`` over all processes; gradients are sums from here on, on the device's stream."""
        self._armed = False
        while len(self._works) < len(self.buckets):
            self._send()
        total = loss.clone()
        dist.all_reduce(total, group=self.group)
        for work in self._works:
            work.wait()
        self._works.clear()
        return total

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return
        self._missing[self._place[parameter]] -= 1
        # In every process in the same order, whichever is complete first.
        while (n := len(self._works)) < len(self.buckets) and self._missing[n] == 0:
            self._send()

    def _send(self) -> None:
        """Sends the next bucket; its gradients become views of what travels, so there is no second copy."""
        bucket = self.buckets[len(self._works)]
        with torch.no_grad():
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
        for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = part.view_as(parameter)
        self._works.append(dist.all_reduce(flat, group=self.group, async_op=True))
