"""Batches of steps: the same whenever they are asked for, whole epochs over all processes, read ahead."""

import pytest
import torch

from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoded
from ideoflow.data.keys import cache_key
from ideoflow.data.survey import Share
from ideoflow.diagnostics import IdeoflowError
from ideoflow.engine.batches import Batches
from ideoflow.recipe import parse_recipe

TEXT = "model.base = 'nano'\ndata.images = 'x'\n[train]\nsteps = 20\nbatch = 2\naccumulation = 2\n"
SAMPLES, VARIANTS = 24, 3
WHOLE = (Share("x", 0, SAMPLES),)


@pytest.fixture
def stored(tmp_path):
    """A cache in which sample n has latents of n, and variant v of its caption n + 1 rows of v."""
    cache, data = TensorCache(tmp_path), []
    for n in range(SAMPLES):
        latents = cache_key("latents", number=n)
        cache.put(latents, torch.full((4, 8), float(n)), kind="latents", base="b")
        texts = tuple(cache_key("text", number=n, variant=v) for v in range(VARIANTS))
        for v, key in enumerate(texts):
            cache.put(key, torch.full((n + 1, 6), float(v)), kind="text", base="b")
        data.append(Encoded(latents, texts, (2, 2)))
    cache.flush()
    return cache, data


def batches(stored, text=TEXT, shares=WHOLE, **options):
    cache, data = stored
    return Batches(parse_recipe(text).tables, data, shares, cache, **options)


def sample_of(s):
    """Which sample it was: noisy - (1 - sigma) latents = sigma noise, and target = latents - noise."""
    latents = s.noisy + (1 - s.time) * s.target
    return round(latents.mean().item())


def variant_of(s):
    return int(s.text[0, 0])


def same(a, b):
    return all(
        torch.equal(getattr(x, name), getattr(y, name))
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
        for name in ("noisy", "target", "time", "text")
    )


def test_a_run_that_goes_on_gets_the_same_steps(stored):
    whole, later = batches(stored), batches(stored)
    steps = [whole.of(step) for step in range(20)]
    for step in (13, 14, 15, 3, 19):  # also out of turn
        assert same(later.of(step), steps[step])


MIXTURES = {
    "weights": (Share("a", 0, 4, variants=3, weight=0.7), Share("b", 12, 6, variants=2, weight=0.3)),
    "repeats": (Share("a", 0, 4, variants=3, repeats=2), Share("b", 12, 12)),
}


@pytest.mark.parametrize("shares", MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_that_is_broken_off_within_an_epoch_meets_what_it_would_have_met(stored, shares, ranks):
    """Crops, weights, repeats, several captions and dropped ones, on each of several processes."""
    text = TEXT + "[captions]\ndropout = 0.3\n"
    for rank in range(ranks):
        where = {"shares": shares, "rank": rank, "ranks": ranks}
        whole = batches(stored, text, **where)
        steps = [whole.of(step) for step in range(20)]
        for broken_off in (1, 5, 12):
            first, torch_state = batches(stored, text, **where), torch.get_rng_state()
            for step in range(broken_off):
                assert same(first.of(step), steps[step])
            torch.manual_seed(broken_off)  # what else goes on in a process changes nothing
            later = batches(stored, text, **where)
            assert all(same(later.of(step), steps[step]) for step in range(broken_off, 20))
            torch.set_rng_state(torch_state)


@pytest.mark.parametrize("shares", MIXTURES.values(), ids=MIXTURES)
def test_several_processes_meet_what_one_would(stored, shares):
    """Two of batch 2 take, in each step, the samples, crops, captions and noise of one of batch 4."""
    alone = batches(stored, TEXT.replace("batch = 2", "batch = 4"), shares)
    both = [batches(stored, shares=shares, rank=rank, ranks=2) for rank in range(2)]
    for step in range(20):
        parts = [reader.of(step) for reader in both]
        assert same([a + b for a, b in zip(*parts, strict=True)], alone.of(step))


def test_a_step_is_so_many_passes_of_so_many_samples(stored):
    (first, second) = batches(stored).of(0)
    assert len(first) == len(second) == 2


def test_an_epoch_meets_every_sample_and_all_variants(stored):
    reader, met, variants = batches(stored), [], set()
    for step in range(18):
        for part in reader.of(step):
            met += [sample_of(s) for s in part]
            variants |= {(sample_of(s), variant_of(s)) for s in part}
            assert all(s.text.shape[0] == sample_of(s) + 1 for s in part)
    for epoch in range(3):
        assert sorted(met[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))
    assert {v for _, v in variants} == {0, 1, 2} and len(variants) > SAMPLES


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_share_an_epoch_without_overlap(stored, ranks):
    parts = [batches(stored, rank=rank, ranks=ranks) for rank in range(ranks)]
    met = [
        [sample_of(s) for step in range(SAMPLES // (4 * ranks)) for part in p.of(step) for s in part]
        for p in parts
    ]
    assert sorted(n for one in met for n in one) == list(range(SAMPLES))


def test_a_dropped_caption_has_no_tokens_at_all(stored):
    reader = batches(stored, TEXT + "[captions]\ndropout = 1.0\n")
    assert all(s.text.shape == (0, 6) for step in range(5) for part in reader.of(step) for s in part)


def test_what_is_gone_is_told_when_its_step_comes(stored):
    cache, _ = stored
    reader = batches(stored)
    reader.of(0)
    for file in cache.folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(IdeoflowError):
        for step in range(1, 4):
            reader.of(step)


def test_nothing_is_read_beyond_the_last_step(stored):
    reader = batches(stored)
    reader.of(19)
    assert reader.upcoming is None


@pytest.mark.gpu
def test_pinned_samples_are_the_same(stored):
    pinned, plain = batches(stored, pin=True).of(3), batches(stored).of(3)
    assert same(pinned, plain) and pinned[0][0].noisy.is_pinned()
