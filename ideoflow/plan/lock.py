"""``recipe.lock``: exactly what a run used, beside its plan.json; the same bytes for the same things.

JSON with the keys of :class:`Lock`, in their order. The plan's digests refuse another recipe, base or data;
other versions of the libraries are no mistake, but can change the numbers, so they are told.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ideoflow import __version__
from ideoflow.plan.check import changed_values
from ideoflow.plan.codec import decode, encode
from ideoflow.plan.document import Plan
from ideoflow.plan.record import engine_digest

LOCK = "recipe.lock"
FORMAT = 1
# Whatever computes, reads or writes numbers of a run; those that are not installed are left out.
PACKAGES = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy",
    "pillow", "torchao", "bitsandbytes", "triton", "flash-attn-4", "nvidia-cudnn-frontend",
    "nvidia-cudnn-cu13",
)  # fmt: skip


@dataclass(frozen=True)
class LockedBase:
    """A base: as the recipe names it, the revision it asks for, and what that was.

    ``commit`` is the hub's for what was downloaded (of the parts beside a single file), None for other bases;
    ``digest`` is of the weights themselves.
    """

    name: str
    revision: str | None
    commit: str | None
    storage: str
    digest: str


@dataclass(frozen=True)
class Lock:
    """What a run was made from and with; ``engine`` is :func:`ideoflow.plan.record.engine_digest`."""

    format: int
    base: LockedBase
    recipe: str
    captions: str | None
    seed: int
    engine: str
    versions: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"


def lock_of(plan: Plan) -> Lock:
    """The lock of a plan that is about to be run here, its base fetched."""
    base, model, digests = plan.base, plan.tables.model, plan.digests
    locked = LockedBase(base.name, model.revision, _commit(base.folder), base.storage, digests.base)
    seed = plan.tables.train.seed
    return Lock(FORMAT, locked, digests.recipe, digests.captions, seed, engine_digest(), _versions())


def _commit(folder: Path | None) -> str | None:
    """The hub's cache keeps each commit in ``models--OWNER--NAME/snapshots/COMMIT``."""
    places = [folder, *folder.parents] if folder else []
    return next((p.name for p in places if p.parent.name == "snapshots"), None)


def _versions() -> dict[str, str]:
    found = {"ideoflow": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def version_changes(file: Path, now: Lock) -> list[str]:
    """Sentences on what a run was made with (``file``, its lock) and ``now`` is not; none without a file."""
    try:
        before = decode(Lock, json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"{file} cannot be read, so versions are not compared: {error}"]
    old, new = ({"engine": lock.engine, **lock.versions} for lock in (before, now))
    changes = changed_values(old, new)
    return [f"other versions than in {file} ({', '.join(changes)}): figures may differ"] if changes else []
