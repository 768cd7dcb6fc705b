"""Where each key and value of a TOML document stands.

tomli gives values without places. This scanner walks a document that tomli has already accepted, so it may
assume valid TOML (v1.0.0) and only has to find where things begin and end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import tomli

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:[^\\]|\\[\s\S])*?"""(?:"{0,2})'  # multi-line basic, may end in up to two more quotes
    r"|'''[\s\S]*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
)
_SCALAR = re.compile(r"[^,\]\}\s#](?:[^,\]\}\n#]*[^,\]\}\s#])?")


@dataclass(frozen=True, slots=True)
class Place:
    """Character offsets of a key and of its value; for a table, both are the header's name."""

    key: tuple[int, int]
    value: tuple[int, int]


def find_places(text: str) -> dict[Path, Place]:
    """Places by path: ``("train", "steps")``, ``("data", "source", 0, "images")``.

    Raises:
        RecursionError: when arrays or inline tables nest hundreds deep.
    """
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: dict[Path, Place] = {}
        self.array_lengths: dict[Path, int] = {}  # arrays of tables seen so far

    def run(self) -> dict[Path, Place]:
        table: Path = ()
        while True:
            self.skip(_BLANK)
            if self.at >= len(self.text):
                return self.places
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.key_value(table)

    def skip(self, pattern: re.Pattern[str]) -> tuple[int, int]:
        match = pattern.match(self.text, self.at)
        assert match is not None, "places of an invalid TOML document were asked for"
        self.at = match.end()
        return match.span()

    def header(self) -> Path:
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        names = self.dotted_key()
        self.at += brackets
        path = self.resolve(names[:-1])
        path += (names[-1][0],)
        if brackets == 2:
            index = self.array_lengths.get(path, 0)
            self.array_lengths[path] = index + 1
            self.places.setdefault(path, Place(names[-1][1], names[-1][1]))
            path += (index,)
        self.places[path] = Place(names[-1][1], names[-1][1])
        return path

    def resolve(self, names: list[tuple[str, tuple[int, int]]]) -> Path:
        """A header's leading names, with the index of the newest element of each array of tables."""
        path: Path = ()
        for name, span in names:
            path += (name,)
            if path in self.array_lengths:
                path += (self.array_lengths[path] - 1,)
            self.places.setdefault(path, Place(span, span))
        return path

    def key_value(self, table: Path) -> None:
        names = self.dotted_key()
        self.at += 1  # the equals sign
        self.skip(_SPACE)
        path = table
        for name, span in names[:-1]:
            path += (name,)
            self.places.setdefault(path, Place(span, span))
        path += (names[-1][0],)
        start = self.at
        self.value(path)
        self.places[path] = Place(names[-1][1], (start, self.at))

    def dotted_key(self) -> list[tuple[str, tuple[int, int]]]:
        names = []
        while True:
            self.skip(_SPACE)
            quoted = self.text[self.at] in "\"'"
            start, end = self.skip(_STRING if quoted else _BARE_KEY)
            name = self.text[start:end]
            names.append((_unquote(name) if quoted else name, (start, end)))
            self.skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return names
            self.at += 1

    def value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self.skip(_STRING)
        elif opening == "[":
            self.items(path, "]")
        elif opening == "{":
            self.items(path, "}")
        else:
            self.skip(_SCALAR)

    def items(self, path: Path, closing: str) -> None:
        self.at += 1
        index = 0
        while True:
            self.skip(_BLANK)
            if self.text[self.at] == closing:
                self.at += 1
                return
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "}":
                self.key_value(path)
            else:
                start = self.at
                self.value((*path, index))
                self.places[(*path, index)] = Place((start, self.at), (start, self.at))
                index += 1


def _unquote(text: str) -> str:
    return str(next(iter(tomli.loads(f"{text} = 0"))))
