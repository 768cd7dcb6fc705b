"""Resizing against the singular values of the dense update."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ideoflow.artifacts.resize import decompose, resize
from ideoflow.artifacts.updates import Loha, Lokr, Lora
from ideoflow.engine.adapt import trained_updates

KINDS = {
    "lora": 'rank = 6\nalpha = 3\ntargets = ["layers.0.*"]',
    "dora": 'kind = "dora"\nrank = 6\ntargets = ["layers.0.attention.*"]',
    "loha": 'kind = "loha"\nrank = 3\nalpha = 2\ntargets = ["layers.0.*"]',
    "lokr": 'kind = "lokr"\nrank = 3\nalpha = 2\ntargets = ["layers.0.*"]',
    "full": 'kind = "lokr"\nfull_matrix = true\ntargets = ["layers.0.attention.*"]',
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_best_of_its_rank(adapted: Any, kind: str) -> None:
    updates = trained_updates(adapted(KINDS[kind]))
    made, report = resize(updates, rank=4)
    for one in report:
        delta, lora = updates[one.module].delta(), made[one.module]
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
        assert isinstance(lora, Lora) and lora.rank == one.after == 4
        torch.testing.assert_close(lora.delta(), best, rtol=1e-3, atol=1e-3 * float(s[0]) / 10)
        left = float((delta - lora.delta()).square().sum() / delta.square().sum())
        assert one.kept == pytest.approx(1 - left, abs=1e-4)
        _, found, _ = decompose(updates[one.module])
        torch.testing.assert_close(found[:8], s[:8][: len(found)], rtol=1e-3, atol=1e-4)
    if kind == "dora":
        assert all(torch.equal(made[m].lengths, updates[m].lengths) for m in made)


@pytest.mark.parametrize("kind", KINDS)
def test_energy_takes_the_least_rank_that_keeps_it(adapted: Any, kind: str) -> None:
    updates = trained_updates(adapted(KINDS[kind]))
    _, report = resize(updates, energy=0.9)
    for one in report:
        s = torch.linalg.svdvals(updates[one.module].delta()).double().square()
        shares = s.cumsum(0) / s.sum()
        assert one.kept >= 0.9 - 1e-6
        assert one.after == 1 or shares[one.after - 2] < 0.9 + 1e-4
    made, report = resize(updates, energy=1.0)
    for one in report:
        whole = updates[one.module].delta()
        torch.testing.assert_close(made[one.module].delta(), whole, rtol=1e-3, atol=1e-4)


def test_an_update_of_nothing_has_one_rank_of_nothing() -> None:
    zero, some = torch.zeros(6, 2), torch.randn(2, 4)
    for update in (Lora(some, zero), Loha(zero, some, zero, some), Lokr(w1=torch.zeros(2, 2), w2=some)):
        made, (one,) = resize({"layers.0.x": update}, energy=0.5)
        assert one.after == 1 and not made["layers.0.x"].delta().any()
        assert made["layers.0.x"].delta().shape == update.delta().shape
