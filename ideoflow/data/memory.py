"""What was found out about files, remembered between runs while a file's size, times and inode stay the same.

Nothing depends on it: where the memory (an SQLite file) cannot be used, files are read again. As in git,
files changed in the last two seconds are not remembered: a further change might not show in their times.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_RACY_NS = 2_000_000_000
_TABLE = "CREATE TABLE IF NOT EXISTS facts (kind, name, stamp, value, PRIMARY KEY (kind, name))"


class FileMemory:
    """JSON values by name, each of one kind of fact and of one version of the file that it was read from."""

    def __init__(self, kind: str, file: Path) -> None:
        self.kind, self.file = kind, file

    def get(self, names: Sequence[str], stamps: Sequence[str]) -> list[Any]:
        """The value of each name with that stamp; None where it is not known."""
        if not self.file.exists():
            return [None] * len(names)
        query = "SELECT value FROM facts WHERE kind = ? AND name = ? AND stamp = ?"
        try:
            with contextlib.closing(sqlite3.connect(self.file)) as memory:
                keys = ((self.kind, os.fsencode(n), s) for n, s in zip(names, stamps, strict=True))
                rows = [memory.execute(query, key).fetchone() for key in keys]
            return [json.loads(row[0]) if row else None for row in rows]
        except (sqlite3.Error, ValueError):
            return [None] * len(names)

    def put(self, facts: Iterable[tuple[str, str, Any]]) -> None:
        """Remembers (name, stamp, value); the stamps are from before the files were read."""
        now = time.time_ns()
        rows = [
            (self.kind, os.fsencode(name), stamp, json.dumps(value))
            for name, stamp, value in facts
            if stamp and now - int(stamp.split()[0]) > _RACY_NS
        ]
        if not rows:
            return
        with contextlib.suppress(sqlite3.Error, OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.file)) as memory, memory:
                memory.execute(_TABLE)
                memory.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?, ?, ?)", rows)


def stamps(files: Iterable[Path]) -> list[str]:
    """Time of the last change, size and inode of each file; empty where it is gone. Asks for each once."""
    known: dict[Path, str] = {}
    found = []
    for file in files:
        if file not in known:
            try:
                s = file.stat()
                known[file] = f"{max(s.st_mtime_ns, s.st_ctime_ns)} {s.st_mtime_ns} {s.st_size} {s.st_ino}"
            except OSError:
                known[file] = ""
        found.append(known[file])
    return found
