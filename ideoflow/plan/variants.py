"""The same run with one setting changed: for tables of alternatives, and for what would make a plan fit."""

from __future__ import annotations

from dataclasses import replace

from ideoflow.model.spec import PIXELS_PER_TOKEN
from ideoflow.plan.document import Bucket, DataSummary
from ideoflow.recipe import Recipe, RecipeTables

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


def trials(recipe: Recipe, data: DataSummary) -> dict[str, tuple[Recipe, DataSummary]]:
    """Short runs that tell how fast a device is with a recipe, by name: at its resolution and at half of it,
    with single pictures and with its batch; squares, with captions of the median length."""
    side, batch = recipe.tables.data.resolution, recipe.tables.train.batch
    half = max(PIXELS_PER_TOKEN, side // 2 // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN)
    found = {}
    for size in dict.fromkeys((side, half)):
        for many in dict.fromkeys((1, batch)):
            tables, _ = with_axis(recipe.tables, None, "resolution", size)
            tables, _ = with_axis(tables, None, "batch", many)
            square = Bucket(size, size, max(data.crops, 1))
            tokens = (data.text_tokens[1],) * 3
            chosen = replace(
                data, buckets=(square,), text_tokens=tokens, text_tokens_estimated=False, cached=()
            )
            found[f"{size} px, batch {many}"] = replace(recipe, tables=tables), chosen
    return found


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
