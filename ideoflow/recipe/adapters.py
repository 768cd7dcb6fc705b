"""Settings of [adapter] that do not go together."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from ideoflow.model.spec import match_targets
from ideoflow.recipe.settings import AdapterSettings

_QKV = ("to_q", "to_k", "to_v")


def check_adapter(
    a: AdapterSettings,
    form: str,
    is_set: Callable[[str], bool],
    contradiction: Callable[[str, str, str], None],
) -> None:
    """Reports by ``contradiction(key, message, cure)``; ``form`` is ``output.format``."""
    low_rank = a.kind in ("lora", "dora")
    if is_set("adapter.rslora") and not low_rank:
        message = f"rslora is for lora and dora, and kind is '{a.kind}'"
        contradiction("adapter.rslora", message, "remove rslora, or set kind = 'lora'")
    kinds = {"gaussian": ("lora", "dora"), "lycoris": ("lokr",)}.get(a.init, (a.kind,))
    if a.kind not in kinds:
        message = f"init = '{a.init}' is for {' and '.join(kinds)}, and kind is '{a.kind}'"
        contradiction("adapter.init", message, f"remove init, or set kind = '{kinds[0]}'")
    for key in ("factor", "decompose_both", "full_matrix"):
        if is_set(f"adapter.{key}") and a.kind != "lokr":
            message = f"{key} is for lokr, and kind is '{a.kind}'"
            contradiction(f"adapter.{key}", message, f"remove {key}, or set kind = 'lokr'")
    if a.full_matrix:
        for key in ("rank", "alpha", "rank_pattern", "alpha_pattern", "decompose_both"):
            if is_set(f"adapter.{key}"):
                message = f"{key} is set, but full_matrix leaves no factor low-rank"
                contradiction(f"adapter.{key}", message, f"remove {key}, or full_matrix")
    targets = [name for modules in match_targets(a.targets).values() for name in modules]
    for key in ("rank_pattern", "alpha_pattern"):
        for glob in getattr(a, key):
            matched = {name for name in targets if fnmatchcase(name, glob)}
            if not matched and targets:
                message = f"'{glob}' in {key} matches none of the targets"
                contradiction(f"adapter.{key}", message, "for example 'layers.*.attention.*' = 8")
            if a.kind == "lokr" and _parts_qkv(targets, matched):
                message = f"'{glob}' in {key} parts q, k and v, which share a Kronecker factor in a lokr"
                contradiction(f"adapter.{key}", message, "give to_q, to_k and to_v the same value")
    if a.kind == "loha" and form != "comfyui":
        message = f"format = '{form}', but diffusers has no reader for a loha"
        contradiction("output.format", message, "use format = 'comfyui'")


def _parts_qkv(targets: list[str], matched: set[str]) -> bool:
    """Whether in some block a part of the targeted q, k, v is matched and another is not."""
    found: dict[str, set[bool]] = {}
    for name in targets:
        parent, _, leaf = name.rpartition(".")
        if leaf in _QKV:
            found.setdefault(parent, set()).add(name in matched)
    return any(len(both) == 2 for both in found.values())
