"""Which sample comes when: pure, a permutation each epoch, and the same after a resumption."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ideoflow.data.order import Order, draw, generator, step_numbers, variant
from ideoflow.data.survey import Share

sources = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 3), st.none() | st.floats(0.05, 9.0)),
    min_size=1,
    max_size=4,
)


def shares_of(rows):
    shares, first = [], 0
    for n, (pictures, variants, repeats, weight) in enumerate(rows):
        shares.append(Share(str(n), first, pictures, variants, repeats, weight))
        first += pictures * variants
    return shares


def one(pictures):
    return shares_of([(pictures, 1, 1, None)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(pictures, epoch, seed):
    order = Order(one(pictures), seed)
    start = epoch * pictures
    assert sorted(order.sample(start + i) for i in range(pictures)) == list(range(pictures))


@settings(max_examples=60, deadline=None)
@given(sources, st.integers(0, 99))
def test_epochs_follow_each_other_without_a_gap(rows, seed):
    order = Order(shares_of(rows), seed)
    for number in (*range(60), 12_345):
        epoch = order.epoch(number)
        assert order.start(epoch) <= number < order.start(epoch + 1)
        assert len(order._draw(epoch)) == order.start(epoch + 1) - order.start(epoch)
        assert 0 <= order.sample(number) < sum(s.pictures * s.variants for s in order.shares)


@settings(max_examples=30, deadline=None)
@given(sources, st.integers(0, 99))
def test_pictures_come_as_often_as_asked(rows, seed):
    """Over many epochs: each picture of a source as often as any other, to one; sources by their weights."""
    shares = shares_of(rows)
    order = Order(shares, seed)
    plain = [s.pictures * s.repeats for s in shares]
    weights = [p if s.weight is None else s.weight for s, p in zip(shares, plain, strict=True)]
    visits = Counter(tuple(v) for epoch in range(20) for v in order._draw(epoch).tolist())
    for n, (share, weight) in enumerate(zip(shares, weights, strict=True)):
        counts = [visits[n, picture] for picture in range(share.pictures)]
        assert max(counts) - min(counts) <= 1
        assert abs(sum(counts) - 20 * sum(plain) * weight / sum(weights)) <= 1 + 1e-4 * sum(counts)


def test_repeats_are_visits_in_every_epoch():
    order = Order(shares_of([(3, 1, 1, None), (2, 1, 3, None)]), seed=1)
    for epoch in range(3):
        met = Counter(order.sample(9 * epoch + i) for i in range(9))
        assert met == {0: 1, 1: 1, 2: 1, 3: 3, 4: 3}


def test_a_half_comes_every_other_epoch_and_not_always_the_same_half():
    order = Order(shares_of([(10, 1, 1, 0.5), (10, 1, 1, 0.5), (1, 1, 1, 20.0)]), seed=0)
    assert order.visits[0] == Fraction(21, 10) / 42
    order = Order(shares_of([(100, 1, 1, 1.0), (100, 1, 1, 3.0)]), seed=0)
    first, second = ({p for s, p in order._draw(e).tolist() if s == 0} for e in (0, 1))
    assert len(first) == 50 and first | second == set(range(100)) and not first & second
    assert first not in (set(range(50)), set(range(50, 100)))


def test_visits_meet_all_crops_of_a_picture_evenly():
    order = Order(shares_of([(4, 5, 1, None)]), seed=3)
    met = Counter(order.sample(n) for n in range(4000))
    assert set(met) == set(range(20)) and all(abs(met[s] - 200) < 5 * 200**0.5 for s in met)
    for epoch in range(3):
        assert sorted(order.sample(4 * epoch + i) // 5 for i in range(4)) == [0, 1, 2, 3]


def test_epochs_and_seeds_differ():
    orders = [
        tuple(Order(one(20), seed).sample(epoch * 20 + i) for i in range(20))
        for epoch, seed in itertools.product(range(3), range(3))
    ]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_processes_share_every_epoch(ranks):
    """Together they take each number once, in steps of the same total batch."""
    taken = [
        [n for step in range(6) for part in step_numbers(step, 2, 3, rank, ranks) for n in part]
        for rank in range(ranks)
    ]
    assert sorted(itertools.chain(*taken)) == list(range(6 * 2 * 3 * ranks))
    alone = [sorted(itertools.chain(*step_numbers(step, 2, 3 * ranks))) for step in range(6)]
    together = [
        sorted(n for rank in range(ranks) for part in step_numbers(step, 2, 3, rank, ranks) for n in part)
        for step in range(6)
    ]
    assert together == alone


def test_variants_are_drawn_evenly_and_again():
    met = Counter(variant(n, 4, 7, "caption") for n in range(2000))
    assert set(met) == {0, 1, 2, 3} and all(abs(c - 500) < 5 * 500**0.5 for c in met.values())
    assert [variant(n, 4, 7, "caption") for n in range(50)] == [
        variant(n, 4, 7, "caption") for n in range(50)
    ]
    assert [variant(n, 4, 7, "caption") for n in range(50)] != [variant(n, 4, 7, "crop") for n in range(50)]
    assert variant(5, 1, 7, "caption") == 0


def test_a_run_that_goes_on_meets_the_same():
    whole = [draw(n, 4, 8, seed=3, dropout=0.3) for n in range(10)]
    order = Order(shares_of([(6, 2, 1, 1.0), (3, 1, 2, 2.0)]), 3)
    met = [order.sample(n) for n in range(100)]
    torch.manual_seed(99)
    torch.randn(5)
    for n in (7, 3, 9):
        again = draw(n, 4, 8, seed=3, dropout=0.3)
        assert torch.equal(again.noise, whole[n].noise)
        assert (again.uniform, again.drop_caption) == (whole[n].uniform, whole[n].drop_caption)
    for n in (99, 0, 50):
        assert Order(order.shares, 3).sample(n) == met[n]


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draw(1, 4, 8, seed=0, dropout=0.5), Order(one(5), 0).sample(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_draws_have_their_distributions():
    draws = [draw(n, 16, 8, seed=1, dropout=0.25) for n in range(2000)]
    uniforms = torch.tensor([d.uniform for d in draws], dtype=torch.float64).sort().values
    # Kolmogorov-Smirnov: the 0.1 % quantile of sqrt(n) D is 1.95.
    expected = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert (uniforms - expected).abs().max() * 2000**0.5 < 1.95
    noise = torch.stack([d.noise for d in draws])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    dropped = sum(d.drop_caption for d in draws)
    assert abs(dropped - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5
    assert not any(draw(n, 1, 1, seed=1, dropout=0.0).drop_caption for n in range(200))
    assert all(draw(n, 1, 1, seed=1, dropout=1.0).drop_caption for n in range(200))


def test_streams_of_unlike_parts_are_unlike():
    parts = [("a", 1), ("a", 2), ("b", 1), ("a", 1, 0)]
    assert len({torch.rand(1, generator=generator(*p)).item() for p in parts}) == len(parts)
    assert torch.equal(torch.rand(3, generator=generator("a", 1)), torch.rand(3, generator=generator("a", 1)))
