"""Weight updates of the four kinds of adapter: what they add, and how q, k and v become one matrix and back.

For a Linear with weight W [out, in] and a factor ``scale``:

| kind | new weight | source |
|---|---|---|
| Lora | W + scale up down | Hu et al. 2021 |
| Lora with lengths m (DoRA) | rows of V = W + scale up down, each as m V / norm(V) | Liu et al. 2024 |
| Loha | W + scale (w1_a w1_b) * (w2_a w2_b), elementwise | Hyeon-Woo et al. 2022 |
| Lokr | W + scale kron(w1, w2) | LyCORIS |

Checkpoints in the original layout have the rows of q, k and v in one matrix. An update of that matrix parts
into three by rows; three updates become one exactly, except for Kronecker products that share no factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

_LEAST = 1e-12  # no division by the norm of a row of zeros


class CannotJoin(ValueError):
    """Updates of q, k and v (or an update of their fused matrix) have no exact form in the other layout."""


@dataclass(frozen=True)
class Lora:
    """down [rank, in], up [out, rank]; for DoRA ``lengths`` [out], else None.

    ``base_norm``: the lengths are relative to norm(W), not norm(V), as ComfyUI computes: m norm(W) / norm(V).
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    lengths: Tensor | None = None
    base_norm: bool = False

    @property
    def kind(self) -> str:
        return "lora" if self.lengths is None else "dora"

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def delta(self) -> Tensor:
        """What is added to the weight, [out, in] float32; of a DoRA, before rows are scaled."""
        return self.up.float() @ self.down.float() * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The new weight, float32."""
        changed = weight.float() + self.delta()
        if self.lengths is None:
            return changed
        against = weight.float() if self.base_norm else changed
        return changed * (self.lengths.float() / against.norm(dim=1).clamp_min(_LEAST))[:, None]

    def folded(self) -> Lora:
        """The same with ``scale`` multiplied into ``up``, float32."""
        return self if self.scale == 1 else replace(self, up=self.up.float() * self.scale, scale=1.0)

    def thirds(self) -> list[Lora]:
        """The updates of q, k and v, without the part of the rank that adds nothing to them.

        Three adapters that were joined come apart with the ranks that they had.
        """
        lengths = [None] * 3 if self.lengths is None else self.lengths.chunk(3)
        parts = []
        for up, m in zip(self.up.chunk(3), lengths, strict=True):
            used = up.any(0)
            used = used if used.any() else torch.ones_like(used)  # one that was never trained keeps its rank
            parts.append(replace(self, down=self.down[used], up=up[:, used], lengths=m))
        return parts

    def with_norms(self, weight: Tensor, *, base_norm: bool) -> Lora:
        """A DoRA with its lengths relative to the other norm; ``weight`` is the base's."""
        if self.lengths is None or self.base_norm == base_norm:
            return self
        ratio = weight.float().norm(dim=1) / (weight.float() + self.delta()).norm(dim=1).clamp_min(_LEAST)
        lengths = self.lengths.float() * ratio if base_norm else self.lengths.float() / ratio
        return replace(self, lengths=lengths, base_norm=base_norm)


@dataclass(frozen=True)
class Loha:
    """w1_a, w2_a [out, rank]; w1_b, w2_b [rank, in]."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0
    kind = "loha"

    @property
    def shape(self) -> tuple[int, int]:
        return self.w1_a.shape[0], self.w1_b.shape[1]

    @property
    def rank(self) -> int:
        return int(self.w1_b.shape[0])

    def delta(self) -> Tensor:
        """[out, in] float32."""
        first, second = self.w1_a.float() @ self.w1_b.float(), self.w2_a.float() @ self.w2_b.float()
        return first * second * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The new weight, float32."""
        return weight.float() + self.delta()

    def folded(self) -> Loha:
        """The same with ``scale`` multiplied into ``w1_a``, float32."""
        return self if self.scale == 1 else replace(self, w1_a=self.w1_a.float() * self.scale, scale=1.0)

    def thirds(self) -> list[Loha]:
        """The updates of q, k and v."""
        parts = zip(self.w1_a.chunk(3), self.w2_a.chunk(3), strict=True)
        return [replace(self, w1_a=a, w2_a=b) for a, b in parts]


@dataclass(frozen=True)
class Lokr:
    """w1 [a, c] and w2 [b, d], out = a b, in = c d; each whole, or as two matrices of its rank."""

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    scale: float = 1.0
    kind = "lokr"

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.first_shape, self.second_shape
        return first[0] * second[0], first[1] * second[1]

    @property
    def first_shape(self) -> tuple[int, int]:
        return _shape(self.w1, self.w1_a, self.w1_b)

    @property
    def second_shape(self) -> tuple[int, int]:
        return _shape(self.w2, self.w2_a, self.w2_b)

    @property
    def rank(self) -> int | None:
        """The rank that alpha is divided by (LyCORIS: w2's, else w1's); None where both are whole."""
        factor = self.w2_b if self.w2_b is not None else self.w1_b
        return None if factor is None else int(factor.shape[0])

    @property
    def first(self) -> Tensor:
        """w1 [a, c], float32."""
        return _whole(self.w1, self.w1_a, self.w1_b)

    @property
    def second(self) -> Tensor:
        """w2 [b, d], float32."""
        return _whole(self.w2, self.w2_a, self.w2_b)

    def delta(self) -> Tensor:
        """[out, in] float32."""
        return torch.kron(self.first, self.second) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The new weight, float32."""
        return weight.float() + self.delta()

    def folded(self) -> Lokr:
        """The same with ``scale`` multiplied into the first factor, float32."""
        if self.scale == 1:
            return self
        if self.w1 is not None:
            return replace(self, w1=self.w1.float() * self.scale, scale=1.0)
        assert self.w1_a is not None
        return replace(self, w1_a=self.w1_a.float() * self.scale, scale=1.0)

    def thirds(self) -> list[Lokr]:
        """The updates of q, k and v.

        Raises:
            CannotJoin: if a third of the rows is no Kronecker product: rows of w1 go by whole blocks of w2's.
        """
        if self.first_shape[0] % 3:
            raise CannotJoin(f"its first factor has {self.first_shape[0]} rows, which three do not divide")
        if self.w1 is not None:
            return [replace(self, w1=part) for part in self.w1.chunk(3)]
        assert self.w1_a is not None
        return [replace(self, w1_a=part) for part in self.w1_a.chunk(3)]


Update: TypeAlias = Lora | Loha | Lokr


def join(parts: Sequence[Update | None]) -> Update:
    """One update of the fused matrix from those of q, k, v, in this order; None leaves its rows as they are.

    Raises:
        CannotJoin: where there is none.
    """
    given = [p for p in parts if p is not None]
    kinds = {p.kind for p in given}
    if len({p.shape for p in given}) != 1 or len(kinds) != 1:
        raise CannotJoin("the updates of q, k and v differ in shape or kind")
    if len({p.scale for p in given}) > 1:
        parts = [p and p.folded() for p in parts]
        given = [p for p in parts if p is not None]
    if kinds == {"lokr"}:
        return _join_lokr(parts)  # type: ignore[arg-type]
    outputs, scale = given[0].shape[0], given[0].scale
    if kinds == {"loha"}:
        (first_b, second_b), (first_a, second_a) = _stack(
            [p and (p.w1_b, p.w2_b) for p in parts],  # type: ignore[union-attr]
            [p and (p.w1_a, p.w2_a) for p in parts],  # type: ignore[union-attr]
            outputs,
        )
        return Loha(first_a, first_b, second_a, second_b, scale)
    (down,), (up,) = _stack(
        [p and (p.down,) for p in parts],  # type: ignore[union-attr]
        [p and (p.up,) for p in parts],  # type: ignore[union-attr]
        outputs,
    )
    lengths, relative = [p and p.lengths for p in parts], {p.base_norm for p in given}  # type: ignore[union-attr]
    if all(m is None for m in lengths):
        return Lora(down, up, scale)
    if any(m is None for m in lengths) or len(relative) > 1:
        raise CannotJoin("a row length is missing: DoRA has one for every row of q, k and v")
    return Lora(down, up, scale, torch.cat([m for m in lengths if m is not None]), relative.pop())


def _stack(
    inner: Sequence[tuple[Tensor, ...] | None], outer: Sequence[tuple[Tensor, ...] | None], outputs: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Inner factors [r, in] stacked, outer ones [out, r] in the rows of their part and the columns of their
    inner factors; equal inner factors are there once, so that parting and joining gives back what was."""
    distinct: list[tuple[Tensor, ...]] = []
    places = []
    for part in inner:
        if part is None:
            places.append(None)
            continue
        same = (i for i, d in enumerate(distinct) if all(map(_equal, d, part)))
        place = next(same, len(distinct))
        if place == len(distinct):
            distinct.append(part)
        places.append(place)
    ranks = [d[0].shape[0] for d in distinct]
    stacked = [torch.cat([d[i] for d in distinct]) for i in range(len(distinct[0]))]
    spread = []
    for i, like in enumerate(stacked):
        whole = like.new_zeros(len(inner) * outputs, sum(ranks))
        for number, (part, place) in enumerate(zip(outer, places, strict=True)):
            if part is not None and place is not None:
                start = sum(ranks[:place])
                rows = slice(number * outputs, (number + 1) * outputs)
                whole[rows, start : start + ranks[place]] = part[i]
        spread.append(whole)
    return stacked, spread


def _join_lokr(parts: Sequence[Lokr | None]) -> Lokr:
    given = [p for p in parts if p is not None]
    like = given[0]
    for other in given[1:]:
        if other.second_shape != like.second_shape or not _equal(other.second, like.second):
            raise CannotJoin("their second Kronecker factors differ, and ComfyUI reads one product a matrix")
    shared = all(p.w1_b is not None and _equal(p.w1_b, like.w1_b) for p in given)
    rows = [(p.w1_a if shared else p.first if p.w1 is None else p.w1) if p else None for p in parts]
    sample = next(r for r in rows if r is not None)
    first = torch.cat([torch.zeros_like(sample) if r is None else r for r in rows])
    if shared:
        return replace(like, w1_a=first)
    return replace(like, w1=first, w1_a=None, w1_b=None)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


def _whole(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return whole.float()
    assert a is not None and b is not None
    return a.float() @ b.float()


def _shape(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[int, int]:
    if whole is not None:
        return int(whole.shape[0]), int(whole.shape[1])
    assert a is not None and b is not None
    return int(a.shape[0]), int(b.shape[1])
