"""Which sample comes when: pure, a permutation each epoch, and the same after a resumption."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ideoflow.data.order import draw, generator, sample_index


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 2**63 - 1))
def test_every_epoch_is_a_permutation(samples, epoch, seed):
    start = epoch * samples
    assert sorted(sample_index(start + i, samples, seed) for i in range(samples)) == list(range(samples))


def test_epochs_and_seeds_differ():
    orders = [
        tuple(sample_index(epoch * 20 + i, 20, seed) for i in range(20))
        for epoch, seed in itertools.product(range(3), range(3))
    ]
    assert len(set(orders)) == 9


def test_a_run_that_goes_on_meets_the_same():
    whole = [draw(n, 4, 8, seed=3, dropout=0.3) for n in range(10)]
    torch.manual_seed(99)
    torch.randn(5)
    for n in (7, 3, 9):
        again = draw(n, 4, 8, seed=3, dropout=0.3)
        assert torch.equal(again.noise, whole[n].noise)
        assert (again.uniform, again.drop_caption) == (whole[n].uniform, whole[n].drop_caption)
        assert sample_index(n, 6, 3) == sample_index(n, 6, 3)


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draw(1, 4, 8, seed=0, dropout=0.5), sample_index(1, 5, 0)
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
