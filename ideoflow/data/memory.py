"""What was found out about files, remembered between runs while a file's size and times stay the same.

Nothing depends on it: where the memory (an SQLite file in the user's cache) cannot be used, files are read
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ideoflow.resources import user_cache

# As in git: a file that was written so shortly before may be written again without its times showing it.
_RACY_NS = 2_000_000_000


class FileMemory:
    """JSON values by name, each of one kind of fact and of one version of the file that it was read from."""

    def __init__(self, kind: str, file: Path | None = None) -> None:
        self.kind = kind
        self.file = file or user_cache() / "files.sqlite"

    def get(self, wanted: Sequence[tuple[str, Path]]) -> list[Any]:
        """The value of each (name, file), None where it is not known of the file as it is now."""
        if not self.file.exists():
            return [None] * len(wanted)
        stamp = _stamps()
        query = "SELECT value FROM facts WHERE kind = ? AND name = ? AND stamp = ?"
        try:
            with contextlib.closing(sqlite3.connect(self.file)) as memory:
                rows = [
                    memory.execute(query, (self.kind, os.fsencode(name), stamp(file))).fetchone()
                    for name, file in wanted
                ]
                return [json.loads(row[0]) if row else None for row in rows]
        except (sqlite3.Error, ValueError):
            return [None] * len(wanted)

    def put(self, facts: Sequence[tuple[str, Path, Any]]) -> None:
        """Remembers (name, file, value); a file that has just been written is left out."""
        stamp, now = _stamps(), time.time_ns()
        rows = [
            (self.kind, os.fsencode(name), stamped, json.dumps(value))
            for name, file, value in facts
            if (stamped := stamp(file)) and now - int(stamped.split()[0]) > _RACY_NS
        ]
        if not rows:
            return
        with contextlib.suppress(sqlite3.Error, OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.file)) as memory, memory:
                memory.execute(
                    "CREATE TABLE IF NOT EXISTS facts (kind, name, stamp, value, PRIMARY KEY (kind, name))"
                )
                memory.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)


def _stamps() -> Callable[[Path], str]:
    """stamp(file) -> times, size and inode of a file, empty where it is gone; each file is asked once."""
    known: dict[Path, str] = {}

    def stamp(file: Path) -> str:
        if file not in known:
            try:
                s = file.stat()
                known[file] = f"{max(s.st_mtime_ns, s.st_ctime_ns)} {s.st_mtime_ns} {s.st_size} {s.st_ino}"
            except OSError:
                known[file] = ""
        return known[file]

    return stamp
