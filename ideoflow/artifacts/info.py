"""What an adapter file holds, for people and programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ideoflow.artifacts.adapter_file import digest, files_of, read_adapter
from ideoflow.artifacts.readers import readers
from ideoflow.artifacts.saved_config import refusal


@dataclass(frozen=True)
class AdapterInfo:
    """Facts about an adapter.

    Args:
        readers, remarks: who loads it, and what is odd about it (:mod:`ideoflow.artifacts.readers`).
        targets: the modules within a block that are changed anywhere.
        ranks: how many modules have each rank; ``full`` for a LoKr of whole factors.
        scales: how many modules have each alpha / rank.
        parameters: numbers in the file's matrices and row lengths.
        digest: SHA-256 of the files.
    """

    path: Path
    form: str
    kinds: list[str]
    readers: str
    remarks: tuple[str, ...]
    modules: int
    blocks: int
    targets: list[str]
    ranks: dict[str, int]
    scales: dict[float, int]
    dtype: str
    parameters: int
    bytes: int
    digest: str
    metadata: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            **asdict(self),
            "path": str(self.path),
            "scales": {f"{k:g}": v for k, v in self.scales.items()},
        }


def describe(path: Path) -> AdapterInfo:
    """Reads an adapter and counts it.

    Raises:
        IdeoflowError: when it cannot be read.
    """
    adapter = read_adapter(path)
    files = files_of(path)
    updates = adapter.updates
    blocks = {module.split(".")[1] for module in updates}
    tensors = [t for u in updates.values() for t in vars(u).values() if isinstance(t, Tensor)]
    peft = None
    if adapter.config and len(files) > 1:
        peft = partial(refusal, files[-1].parent, adapter.config, updates)
    loads = readers(files[-1], peft)
    return AdapterInfo(
        path,
        adapter.form,
        adapter.kinds,
        loads.words,
        loads.remarks,
        len(updates),
        len(blocks),
        sorted({module.split(".", 2)[2] for module in updates}),
        dict(sorted(Counter("full" if u.rank is None else str(u.rank) for u in updates.values()).items())),
        dict(sorted(Counter(round(u.scale, 6) for u in updates.values()).items())),
        str(adapter.dtype).removeprefix("torch."),
        sum(t.numel() for t in tensors),
        sum(file.stat().st_size for file in files),
        digest(files),
        adapter.metadata,
    )
