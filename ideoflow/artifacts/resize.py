"""Makes a LoRA of lower rank from an adapter of any kind: the nearest of that rank, by singular values.

The best approximation of a matrix by one of rank k keeps its k largest singular values (Eckart and Young
1936); what is kept of the squared Frobenius norm is their share of the sum of squares. A weight update is
never made as a whole: it is written as a thin product up down, whose singular values are those of the small
R_up R_down^T of the two QR decompositions. A Hadamard product of two products of rank r is one of rank r^2
(columns of the factors multiplied pair by pair), and the singular values of a Kronecker product are the
products of its factors' (Horn and Johnson, Topics in Matrix Analysis, 4.2 and 5.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ideoflow.artifacts.updates import Loha, Lokr, Lora, Update
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.artifacts import CANNOT_CONVERT


@dataclass(frozen=True)
class Resized:
    """A module after resizing: its old rank (None for a LoKr of whole factors), its new one, and how much of
    the squared norm is kept."""

    module: str
    before: int | None
    after: int
    kept: float


def resize(
    updates: Mapping[str, Update], *, rank: int | None = None, energy: float | None = None
) -> tuple[dict[str, Update], list[Resized]]:
    """LoRAs of at most ``rank``, or of the least rank that keeps the share ``energy`` of the squared norm.

    A DoRA keeps its row lengths. Factors come in float32.

    Raises:
        IdeoflowError: when a module's numbers are too large to be decomposed.
    """
    made: dict[str, Update] = {}
    report = []
    for module, update in updates.items():
        try:
            u, s, v = decompose(update)
            finite = bool(s.isfinite().all())
        except torch.linalg.LinAlgError:
            finite = False
        if not finite:
            message = f"the change of {module} is too large for float32"
            fail(CANNOT_CONVERT, message, cure="look at its alpha (ideoflow adapter info)")
        squares = s.double().square()
        total = float(squares.sum())
        shares = squares.cumsum(0) / total if total else torch.ones(len(s), dtype=torch.float64)
        if energy is not None:
            count = int((shares < energy - 1e-12).sum()) + 1
        else:
            assert rank is not None
            count = rank
        count = max(1, min(count, int((s > 0).sum()), len(s)))
        root = s[:count].sqrt()
        lengths, base_norm = None, False
        if isinstance(update, Lora):
            lengths, base_norm = update.lengths, update.base_norm
        made[module] = Lora(root[:, None] * v[:, :count].T, u[:, :count] * root, 1.0, lengths, base_norm)
        report.append(Resized(module, update.rank, count, float(shares[count - 1])))
    return made, report


def decompose(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """(u [out, k], s [k] falling, v [in, k]) with update = u diag(s) v^T, float32."""
    if isinstance(update, Lokr):
        return _of_kronecker(update)
    if isinstance(update, Loha):
        rows, columns = update.shape
        up = (update.w1_a.float()[:, :, None] * update.w2_a.float()[:, None]).reshape(rows, -1)
        down = (update.w1_b.float()[:, None] * update.w2_b.float()[None]).reshape(-1, columns)
    else:
        up, down = update.up.float(), update.down.float()
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T * update.scale, full_matrices=False)
    return q_up @ u, s, q_down @ vt.T


def _of_kronecker(update: Lokr) -> tuple[Tensor, Tensor, Tensor]:
    (u1, s1, v1), (u2, s2, v2) = (
        torch.linalg.svd(factor, full_matrices=False) for factor in (update.first, update.second)
    )
    products = (s1[:, None] * s2).flatten() * abs(update.scale)
    order = products.argsort(descending=True)
    order = order[: min(update.shape)][products[order[: min(update.shape)]] > 0]
    if not len(order):  # an update of nothing
        order = products.argsort()[:1]
    i, j = order // len(s2), order % len(s2)
    sign = 1.0 if update.scale >= 0 else -1.0
    u = torch.einsum("ak,bk->abk", u1[:, i], u2[:, j]).flatten(0, 1) * sign
    v = torch.einsum("ck,dk->cdk", v1.T[:, i], v2.T[:, j]).flatten(0, 1)
    return u, products[order], v
