"""The same run with one setting changed: for tables of alternatives, and for what would make a plan fit."""

from __future__ import annotations

from dataclasses import replace

from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.plan.document import Bucket, DataSummary
from ideoflow.recipe import RecipeTables

# What the command line's tables may vary, and the recipe's key for it.
AXES = {"batch": "train.batch", "resolution": "data.resolution", "rank": "adapter.rank"}


def at_resolution(data: DataSummary | None, old: int, new: int) -> DataSummary | None:
    """The same pictures, resized from an area of ``old`` squared to one of ``new`` squared."""
    if data is None or old == new:
        return data

    def scaled(length: int) -> int:
        return max(PIXELS_PER_TOKEN, round(length * new / old / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN)

    merged: dict[tuple[int, int], int] = {}
    for b in data.buckets:
        size = scaled(b.width), scaled(b.height)
        merged[size] = merged.get(size, 0) + b.count
    # What is cached was made at the old resolution.
    return replace(data, buckets=tuple(Bucket(w, h, n) for (w, h), n in merged.items()), cached=())


def with_axis(
    tables: RecipeTables, data: DataSummary | None, axis: str, value: int
) -> tuple[RecipeTables, DataSummary | None]:
    """Settings and data with one of :data:`AXES` set to ``value``."""
    if axis == "batch":
        return replace(tables, train=replace(tables.train, batch=value)), data
    if axis == "rank":
        return replace(tables, adapter=replace(tables.adapter, rank=value)), data
    changed = replace(tables, data=replace(tables.data, resolution=value))
    return changed, at_resolution(data, tables.data.resolution, value)
