"""Which sample comes when, and with what noise: pure functions of the seed and a running number.

Nothing here has a state, so an interrupted run that goes on from step n meets exactly the samples, noise
levels and noise that it would have met without the interruption.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the digest of ``parts``: streams of different parts are unrelated."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_index(number: int, samples: int, seed: int) -> int:
    """The sample with running number ``number``: each epoch is a new permutation of all samples."""
    epoch, place = divmod(number, samples)
    return int(_permutation(samples, seed, epoch)[place])


@lru_cache(maxsize=2)
def _permutation(samples: int, seed: int, epoch: int) -> Tensor:
    # Drawn once an epoch, not once a sample; two, since a batch may reach into the next epoch.
    return torch.randperm(samples, generator=generator("order", seed, epoch))


@dataclass(frozen=True)
class Draw:
    """The chance in one training sample.

    Args:
        uniform: float64 in (0, 1), turned into the noise level by the schedule.
        noise: (tokens, channels) standard normal, float32.
        drop_caption: whether this sample is trained without its text.
    """

    uniform: float
    noise: Tensor
    drop_caption: bool


def draw(number: int, tokens: int, channels: int, seed: int, dropout: float) -> Draw:
    """The chance for the sample with running number ``number``."""
    g = generator("draw", seed, number)
    uniform, drop = torch.rand(2, generator=g, dtype=torch.float64).tolist()
    return Draw(uniform, torch.randn(tokens, channels, generator=g), drop < dropout)
