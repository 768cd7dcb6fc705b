"""The batches of each step, read and drawn by a thread of its own while the device works on the step before.

What a step is made of is a pure function of the seed, the step's number and the number of processes
(:mod:`ideoflow.data.order`), so there is no state to save: after an interruption, asking for the next step
gives what it would have given.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoded
from ideoflow.data.order import Order, draw, step_numbers, variant
from ideoflow.data.survey import Share
from ideoflow.engine.step import TrainingSample, prepare
from ideoflow.recipe import RecipeTables

# The forward passes of a step, and the samples of each.
Step = list[list[TrainingSample]]


class Batches:
    """Gives each step its samples, noise and times included.

    Args:
        tables: the plan's settings.
        data: where the encoded forms of each sample are.
        shares: the sources, for the order.
        cache: what holds the encoded forms.
        pin: puts the samples into page-locked memory, for a GPU to fetch them without holding up anyone.
        rank, ranks: of several processes that train together, this one gets its share of each step.
    """

    def __init__(
        self,
        tables: RecipeTables,
        data: Sequence[Encoded],
        shares: Sequence[Share],
        cache: TensorCache,
        *,
        pin: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.settings, self.dropout = tables.train, tables.captions.dropout
        self.data, self.cache, self.pin = data, cache, pin
        self.rank, self.ranks = rank, ranks
        self.order = Order(shares, self.settings.seed)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.upcoming: tuple[int, Future[Step]] | None = None

    def of(self, step: int) -> Step:
        """The batches of a step; starts on those of the next one.

        Raises:
            IdeoflowError: when an entry of the cache is gone or damaged.
        """
        if self.upcoming is None or self.upcoming[0] != step:
            self.upcoming = (step, self.reader.submit(self.read, step))
        batches = self.upcoming[1].result()
        self.upcoming = None
        if step + 1 < self.settings.steps:
            self.upcoming = (step + 1, self.reader.submit(self.read, step + 1))
        return batches

    def read(self, step: int) -> Step:
        """The batches of a step, read now."""
        return [[self._sample(n) for n in part] for part in self._numbers(step, self.rank)]

    def shares(self, step: int) -> list[float]:
        """For each pass of a step, this process's part of the image tokens of all processes.

        The loss of a batch is the mean over its image tokens, so this is what the loss of this process's part
        of the batch counts for. Every process works it out for itself: the order is known to all.
        """
        if self.ranks == 1:
            return [1.0] * self.settings.accumulation
        tokens = [
            [sum(self._tokens(n) for n in numbers) for numbers in self._numbers(step, rank)]
            for rank in range(self.ranks)
        ]
        whole = [sum(part) for part in zip(*tokens, strict=True)]
        return [own / every for own, every in zip(tokens[self.rank], whole, strict=True)]

    def _numbers(self, step: int, rank: int) -> list[range]:
        return step_numbers(step, self.settings.accumulation, self.settings.batch, rank, self.ranks)

    def _tokens(self, number: int) -> int:
        rows, columns = self.data[self.order.sample(number)].grid
        return rows * columns

    def _sample(self, number: int) -> TrainingSample:
        seed = self.settings.seed
        encoded = self.data[self.order.sample(number)]
        latents = self.cache.get(encoded.latents)
        text = self.cache.get(encoded.texts[variant(number, len(encoded.texts), seed, "caption")])
        chance = draw(number, *latents.shape, seed, self.dropout)
        sample = prepare(latents, text, encoded.grid, chance, self.settings.schedule)
        return sample.pinned() if self.pin else sample
