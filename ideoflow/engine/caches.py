"""Fills the caches that training reads: on one process, or on several that each do their share.

Started by ``torchrun``, every process takes the entries whose keys fall to its rank. There is nothing to
agree on meanwhile: shares are a function of the keys, and each process writes shards of its own. Only at the
end they tell each other how it went, so that one bad picture does not stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import torch

from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoder
from ideoflow.data.keys import cache_folder, needed_keys
from ideoflow.data.survey import Dataset, Prompt
from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.events import Emit, Progress, StageDone
from ideoflow.engine.meter import Meter, memory_errors_told
from ideoflow.engine.processes import ALONE, Processes, check_device, joined
from ideoflow.engine.setup import plan_device
from ideoflow.plan.document import Plan


@dataclass(frozen=True)
class Filled:
    """How many captions and pictures were encoded; the others were there."""

    captions: int
    pictures: int


@dataclass(frozen=True)
class Built:
    """What filling the caches came to, over all processes.

    ``captions`` and ``pictures`` are how many different ones the recipe needs, ``encoded`` how many of them
    were made now.
    """

    captions: int
    pictures: int
    encoded: Filled
    processes: int
    seconds: float


def make_encoder(plan: Plan, emit: Emit, processes: Processes = ALONE) -> Encoder:
    """The encoder that the plan asks for, with its cache."""
    return Encoder(
        plan.base,
        TensorCache(cache_folder(plan.tables.cache.folder)),
        dtype=getattr(torch, str(plan.value("cache_dtype"))),
        device=plan_device(plan),
        captions=plan.tables.captions,
        progress=lambda *news: emit(Progress(*news)),
        rank=processes.rank,
        ranks=processes.ranks,
    )


def fill_caches(encoder: Encoder, dataset: Dataset, prompts: Sequence[Prompt], meter: Meter) -> Filled:
    """Encodes every caption and picture that is not cached yet, of this encoder's share.

    Raises:
        IdeoflowError: with what cannot be encoded; everything else is cached by then.
    """
    with meter.stage("captions"):
        trained = (caption for s in dataset.samples for caption in encoder.texts(s))
        captions = encoder.encode_captions(chain(trained, (p.caption for p in prompts)))
    with meter.stage("pictures"):
        pictures = encoder.encode_pictures(dataset.samples)
    return Filled(captions, pictures)


def fill_together(
    encoder: Encoder, dataset: Dataset, prompts: Sequence[Prompt], meter: Meter, processes: Processes
) -> Filled:
    """:func:`fill_caches` in all processes, each its share; waits for all, and counts what all did.

    Raises:
        IdeoflowError: with what could not be encoded by any of them.
    """
    if processes.ranks > 1:  # each picture is read for its digest by one of them, and all remember
        with suppress(IdeoflowError):  # told when it is encoded
            encoder.digests.of([s.picture for s in dataset.samples][processes.rank :: processes.ranks])
        processes.wait()
    filled = processes.agree(lambda: fill_caches(encoder, dataset, prompts, meter))
    every = processes.gather(filled)
    return Filled(sum(f.captions for f in every), sum(f.pictures for f in every))


def build_caches(plan: Plan, dataset: Dataset, prompts: Sequence[Prompt], emit: Emit) -> Built:
    """Fills the caches without training: alone, or as one of torchrun's processes.

    Raises:
        IdeoflowError: with what could not be encoded by any of them.
    """
    started = time.perf_counter()
    with memory_errors_told(plan), joined() as processes:
        processes.agree(lambda: check_device(plan_device(plan)))
        encoder = make_encoder(plan, emit, processes)
        meter = Meter(encoder.device, lambda *news: emit(StageDone(*news)))
        filled = fill_together(encoder, dataset, prompts, meter, processes)
        digests = encoder.digests.of([s.picture for s in dataset.samples])
    texts, latents = needed_keys(encoder.keys, dataset, prompts, encoder.captions, digests)
    return Built(len(texts), len(latents), filled, processes.ranks, time.perf_counter() - started)
