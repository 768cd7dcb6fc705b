"""Which sample comes when, and with what noise: pure functions of the seed and a running number.

Nothing here has a state, so an interrupted run that goes on from step n meets exactly the samples, variants,
noise levels and noise that it would have met without the interruption, on as many processes as it then has.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from ideoflow.data.survey import Share

# Visits of a picture an epoch are fractions with at most this denominator.
_FINEST = 1_000_000


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the digest of ``parts``: streams of different parts are unrelated."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Order:
    """The sample at each running number.

    A picture whose source has w visits an epoch for each of its pictures comes twice an epoch for w = 2, in
    every other epoch for 0.5, and once and twice in turn for 1.5. Each epoch is a new permutation of what
    comes in it; which of its crops a visit meets is drawn each time.

    The i-th of the n pictures of a source, in an order shuffled by the seed, has come floor(e w + i / n)
    times before epoch e. So all of them together have come floor(n e w) times (Hermite's identity), and the
    epoch of a running number is found without counting through those before it.

    Args:
        shares: the sources; their weights set how the visits of an epoch, as many as ``repeats`` ask for, are
            divided among them.
        seed: of everything that is drawn.
    """

    def __init__(self, shares: Sequence[Share], seed: int) -> None:
        self.shares, self.seed = shares, seed
        plain = [Fraction(s.pictures * s.repeats) for s in shares]
        weights = [p if s.weight is None else Fraction(s.weight) for s, p in zip(shares, plain, strict=True)]
        visits = sum(plain) / sum(weights)
        self.visits = [
            (w * visits / s.pictures).limit_denominator(_FINEST) or Fraction(1, _FINEST)
            for s, w in zip(shares, weights, strict=True)
        ]
        self._of_epoch = lru_cache(maxsize=2)(self._draw)  # two, since a batch may reach into the next epoch

    def start(self, epoch: int) -> int:
        """The running number with which an epoch begins."""
        counts = (s.pictures for s in self.shares)
        return sum(n * epoch * w.numerator // w.denominator for w, n in zip(self.visits, counts, strict=True))

    def epoch(self, number: int) -> int:
        """The epoch in which a running number falls."""
        visits = sum(w * s.pictures for w, s in zip(self.visits, self.shares, strict=True))
        most = int((number + len(self.shares) + 1) / visits) + 2
        return bisect_right(range(most), number, key=self.start) - 1

    def sample(self, number: int) -> int:
        """Index of the sample with this running number."""
        epoch = self.epoch(number)
        source, picture = self._of_epoch(epoch)[number - self.start(epoch)].tolist()
        share = self.shares[source]
        return share.first + picture * share.variants + variant(number, share.variants, self.seed, "crop")

    def _draw(self, epoch: int) -> Tensor:
        """(source, picture) of each visit of an epoch, in the order in which they come."""
        visits = []
        for source, (w, share) in enumerate(zip(self.visits, self.shares, strict=True)):
            n, p, q = share.pictures, w.numerator, w.denominator
            times = torch.tensor(p).expand(n)
            if q != 1:
                place = torch.randperm(n, generator=generator("spread", self.seed, source))
                before, after = ((e * p * n + place * q) // (q * n) for e in (epoch, epoch + 1))
                times = after - before
            pictures = torch.arange(n).repeat_interleave(times)
            visits.append(torch.stack([torch.full_like(pictures, source), pictures], 1))
        together = torch.cat(visits)
        return together[torch.randperm(len(together), generator=generator("order", self.seed, epoch))]


def step_numbers(step: int, passes: int, batch: int, rank: int = 0, ranks: int = 1) -> list[range]:
    """The running numbers of one optimiser step on process ``rank`` of ``ranks``: one range a forward pass.

    All processes together take each number once, in the order in which one process with batches that are
    ``ranks`` times as large would.
    """
    firsts = ((step * passes + p) * ranks * batch + rank * batch for p in range(passes))
    return [range(first, first + batch) for first in firsts]


def variant(number: int, variants: int, seed: int, what: str) -> int:
    """Which of several variants (of ``what``) the sample with this running number is met in."""
    if variants == 1:
        return 0
    return int(torch.randint(variants, (1,), generator=generator(what, seed, number)))


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
