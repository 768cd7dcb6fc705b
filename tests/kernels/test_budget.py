"""The activation budget: what is kept, in which order, and never more than allowed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ideoflow.engine.fused.block import _GROUPS
from ideoflow.kernels.budget import HOST_GROUPS, ROUNDED_GROUPS, choose_kept, group_bytes

SIZES = group_bytes(4416, 4608, 12288, 2, True)


def total(kept, sizes=SIZES):
    return sum(sizes[group] for groups in kept for group in groups)


def test_ends():
    assert choose_kept(0, [SIZES] * 3) == [frozenset()] * 3
    assert choose_kept(1, [SIZES] * 3) == [frozenset(SIZES)] * 3
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError):
            choose_kept(wrong, [SIZES] * 3)


@given(st.floats(0, 1), st.integers(1, 40))
def test_never_more_than_allowed(budget, blocks):
    assert total(choose_kept(budget, [SIZES] * blocks)) <= budget * blocks * sum(SIZES.values()) + 1


def test_attention_of_the_last_blocks_comes_first():
    one = SIZES["attention"] / (4 * sum(SIZES.values()))
    kept = choose_kept(2 * one, [SIZES] * 4)
    assert kept == [frozenset(), frozenset(), *[frozenset({"attention"})] * 2]


@given(st.floats(0, 1))
def test_blocks_of_different_sizes_share_one_budget(budget):
    sizes = [group_bytes(4416, 4608, 12288, 2, fp8) for fp8 in (False, False, True, True, True)]
    kept, whole = choose_kept(budget, sizes), sum(sum(block.values()) for block in sizes)
    used = sum(block[group] for block, groups in zip(sizes, kept, strict=True) for group in groups)
    assert used <= budget * whole + 1
    assert (used == whole) == (budget >= 1 - 1 / whole)


def test_bytes_are_those_of_the_tensors():
    row = 4416 * 4608
    assert SIZES["attention"] == 2 * row and SIZES["qkv"] == 6 * row
    assert SIZES["gate_up"] == 2 * 2 * 4416 * 12288
    assert group_bytes(4416, 4608, 12288, 2, False)["elementwise"] == 8 * row + 2 * 4416 * 12288


def test_rounded_groups_take_half():
    rounded = group_bytes(4416, 4608, 12288, 2, True, rounded=True)
    assert {g: SIZES[g] / rounded[g] for g in SIZES} == {g: 2 if g in ROUNDED_GROUPS else 1 for g in SIZES}


def test_every_group_names_values_of_the_block():
    assert set(_GROUPS) == set(SIZES) | {"input"} and set(HOST_GROUPS) <= set(_GROUPS)
