"""Tells checkpoints apart without reading all of them (torch-free)."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def sampled_digest(
    folder: Path | None,
    single: Mapping[str, Path] | None = None,
    only: Collection[str] = (),
    suffixes: Collection[str] = (".safetensors", ".json"),
) -> str:
    """SHA-256 over names, sizes and evenly spaced samples of every file.

    Hashing 40 GB takes a minute; two checkpoints that differ do so in their headers, sizes or, after further
    training, everywhere, so 16 samples of 64 KiB a file tell them apart.

    Args:
        folder: all weights and configurations below it count.
        single: single files that count as well, by a name.
        only: the sub-folders that count, if not all do.
        suffixes: of the files that count.
    """
    digest = hashlib.sha256()
    files = dict(single or {})
    for file in folder.rglob("*") if folder else ():
        name = file.relative_to(folder or file).as_posix()
        counts = not only or name.partition("/")[0] in only
        if counts and file.suffix in suffixes and file.is_file():
            files[name] = file
    for name, file in sorted(files.items()):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        for sample in samples(file, 0, file.stat().st_size):
            digest.update(sample)
    return digest.hexdigest()


def samples(file: Path, begin: int, size: int) -> Iterator[bytes]:
    """Evenly spaced samples of ``size`` bytes of a file; all of them where they are few."""
    with file.open("rb") as stream:
        for i in range(_SAMPLES):
            start = i * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1)
            stream.seek(begin + start)
            yield stream.read(min(size - start, _SAMPLE_BYTES))
            if size <= _SAMPLE_BYTES:
                return
