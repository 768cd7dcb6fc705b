"""A transformer of random numbers: for measuring speed and memory where no base is on the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from diffusers import Ideogram4Transformer2DModel
from torch import Tensor

from ideoflow.model.load import assemble

_PIECE = 1 << 23  # numbers that are made at once


def random_transformer(
    config: Mapping[str, Any],
    *,
    precision: str,
    device: torch.device,
    quantize_on: torch.device | None = None,
    streamed: bool = False,
    seed: int = 0,
) -> Ideogram4Transformer2DModel:
    """What :func:`ideoflow.model.load.load_transformer` gives, of random numbers made on the device.

    Weights are N(0, 1 / inputs) and norms near 1, so that activations keep their size through the depth.

    Args:
        config: diffusers' configuration; keys that are absent take the released model's values.
    """
    return assemble(
        dict(config),
        partial(_RandomNumbers, seed, device),
        precision=precision,
        device=device,
        quantize_on=quantize_on,
        streamed=streamed,
    )


class _RandomNumbers:
    """Stands in for a checkpoint; ``device`` makes what stays in host memory too, a hundred times faster."""

    def __init__(self, seed: int, device: torch.device, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.seed, self.device, self.shapes = seed, device, shapes
        self.generators: dict[torch.device, torch.Generator] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def place(self, name: str) -> str:
        return f"random numbers: {name}"

    def dense(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        out = torch.empty(self.shapes[name], dtype=dtype, device=device)
        for rows, piece in self.pieces(name, dtype, self.device):
            out[rows] = piece
        return out

    def pieces(self, name: str, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        shape, generator = self.shapes[name], self._generator(device)
        count = max(1, _PIECE // prod(shape[1:]))
        for first in range(0, shape[0], count):
            rows = slice(first, min(first + count, shape[0]))
            piece = torch.empty(rows.stop - first, *shape[1:], device=device)
            if len(shape) > 1:
                piece.normal_(0, shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                piece.zero_()
            else:
                piece.normal_(1, 0.05, generator=generator)
            yield rows, piece.to(dtype)

    def float8(self, name: str, device: torch.device) -> None:
        """Nothing is stored; it is rounded, like a base in bf16."""

    def four_bit(self, name: str, device: torch.device) -> None:
        """As :meth:`float8`."""

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]
