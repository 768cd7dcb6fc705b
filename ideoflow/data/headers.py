"""How large pictures are shown, from their headers: in parallel, and once for each version of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice

from ideoflow.data.memory import FileMemory, stamps
from ideoflow.data.pictures import ParquetCell, Stored, container, open_picture, shown_size, stored_name
from ideoflow.diagnostics import Diagnostic, IdeoflowError
from ideoflow.resources import user_cache

_READERS = 8
_CHUNK = 64

Size = tuple[int, int]


def read_sizes(pictures: Sequence[Stored]) -> list[Size | Diagnostic]:
    """(width, height) of each picture as it is meant to be seen, or what is wrong with it."""
    memory = FileMemory("size", user_cache() / "files.sqlite")
    names, versions = [stored_name(p) for p in pictures], stamps(map(container, pictures))
    sizes: dict[int, Size | Diagnostic] = {
        n: (int(known[0]), int(known[1])) for n, known in enumerate(memory.get(names, versions)) if known
    }
    unknown = [n for n in range(len(pictures)) if n not in sizes]
    with ThreadPoolExecutor(_READERS) as pool:
        chunks = _chunks([pictures[n] for n in unknown])
        found = [size for part in pool.map(_read, chunks) for size in part]
    sizes.update(zip(unknown, found, strict=True))
    memory.put((names[n], versions[n], sizes[n]) for n in unknown if not isinstance(sizes[n], Diagnostic))
    return [sizes[n] for n in range(len(pictures))]


def _chunks(pictures: Sequence[Stored]) -> Iterator[list[Stored]]:
    """Pictures to read one after the other: those of a row group, which is loaded whole, stay together."""

    def group(picture: Stored) -> object:
        return (picture.file, picture.group) if isinstance(picture, ParquetCell) else None

    for together, members in groupby(pictures, group):
        while part := list(islice(members, None if together else _CHUNK)):
            yield part


def _read(pictures: Sequence[Stored]) -> list[Size | Diagnostic]:
    return [_size(picture) for picture in pictures]


def _size(picture: Stored) -> Size | Diagnostic:
    try:
        with open_picture(picture) as image:
            return shown_size(image)
    except IdeoflowError as error:
        return error.diagnostics[0]
