"""PEFT's configuration for tensors that are there: the settings under which its modules have their shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ideoflow.artifacts.updates import Lokr, Update
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.artifacts import CANNOT_CONVERT
from ideoflow.plan.adapters import AdaptedModule, kronecker
from ideoflow.recipe import AdapterSettings


def config_of(updates: Mapping[str, Update]) -> dict[str, Any]:
    """``adapter_config.json`` for updates of one kind, scales multiplied in.

    Raises:
        IdeoflowError: for several kinds, or Kronecker factors that no setting of PEFT gives.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    kinds = {u.kind for u in updates.values()}
    if len(kinds) > 1:
        message = f"PEFT's form holds one kind of adapter, and this one has {', '.join(sorted(kinds))}"
        fail(CANNOT_CONVERT, message, cure="choose another form")
    kind = kinds.pop()
    options: dict[str, Any] = {}
    if kind == "lokr":
        ranks, options = _lokr({n: u for n, u in updates.items() if isinstance(u, Lokr)})
    else:
        ranks = {name: int(u.rank or 1) for name, u in updates.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != usual}
    common = {
        "r": usual,
        "target_modules": sorted(updates),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    config: Any
    if kind in ("lora", "dora"):
        config = LoraConfig(lora_alpha=usual, use_dora=kind == "dora", **common)
    else:
        config = (LoKrConfig if kind == "lokr" else LoHaConfig)(alpha=usual, **common, **options)
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}


def _lokr(updates: Mapping[str, Lokr]) -> tuple[dict[str, int], dict[str, Any]]:
    """Ranks by module, and the factor and split under which PEFT gives every module its shapes."""
    for settings in _settings(updates):
        ranks = {name: u.rank or max(u.shape) for name, u in updates.items()}
        if all(_gives(settings, name, u, ranks[name]) for name, u in updates.items()):
            factor = settings.factor or -1
            return ranks, {"decompose_factor": factor, "decompose_both": settings.decompose_both}
    fail(
        CANNOT_CONVERT,
        "no setting of PEFT's LoKr gives all of these Kronecker factors their shapes",
        cure="keep the comfyui form, or merge it into the base",
    )


def _settings(updates: Mapping[str, Lokr]) -> Iterator[AdapterSettings]:
    for factor in (None, *sorted({u.first_shape[0] for u in updates.values()})):
        for both in (False, True):
            yield AdapterSettings(kind="lokr", factor=factor, decompose_both=both)


def _gives(settings: AdapterSettings, name: str, update: Lokr, rank: int) -> bool:
    k = kronecker(settings, AdaptedModule(name, *update.shape, rank, float(rank)))
    shapes = ((k.a, k.c), (k.b, k.d)) == (update.first_shape, update.second_shape)
    return shapes and k.whole_first == (update.w1 is not None) and k.whole_second == (update.w2 is not None)
