"""Where the parts of a JSON text stand, for carets; run only when there is something to report."""

from __future__ import annotations

import re

from ideoflow.captions.source import Source
from ideoflow.diagnostics import Span

Place = tuple[int, int]
Where = tuple[str | int, ...]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+', re.DOTALL)
MOST_DEPTH = 32


def json_places(text: str) -> dict[Where, Place]:
    """Every value of a JSON text, by its keys and indices -> (start, end). Iterative, never raises."""
    places: dict[Where, Place] = {}
    stack: list[
        tuple[Where, int, bool]
    ] = []  # where a container is, where it starts, whether it is an object
    here: Where = ()
    key_next = False
    for token in _TOKEN.finditer(text):
        value = token.group()
        if value in "{[":
            stack.append((here, token.start(), value == "{"))
            if len(stack) > MOST_DEPTH:
                break
            key_next = value == "{"
            here = (*here, "" if key_next else 0)
        elif value in "}]":
            if not stack:
                break
            here, start, _ = stack.pop()
            places.setdefault(here, (start, token.end()))
            key_next = False
        elif value == ",":
            if not stack:
                break
            where, _, is_object = stack[-1]
            if is_object:
                key_next = True
            else:
                number = here[-1] if here else 0
                here = (*where, number + 1 if isinstance(number, int) else 0)
        elif value == ":":
            key_next = False
        elif key_next and value[0] == '"':
            here = (*here[:-1], value[1:-1])
            places.setdefault((*here, KEY), token.span())
        else:
            places.setdefault(here, token.span())
    return places


KEY = "\0key"  # appended to a path: the key itself rather than its value


class JsonOrigin:
    """Finds the parts of a caption in the JSON text that it came from."""

    __slots__ = ("_places", "offset", "source")

    def __init__(self, source: Source, offset: int = 0) -> None:
        self.source = source
        self.offset = offset
        self._places: dict[Where, Place] | None = None

    def locate(self, where: Where) -> Span | None:
        """The span of the part, or of the nearest one around it."""
        if self._places is None:
            self._places = json_places(self.source.text[self.offset :])
        while where and where not in self._places:
            where = where[:-1]
        place = self._places.get(where)
        if place is None:
            return Span(self.source.path)
        start, end = place
        opening = self.source.text[self.offset + start]
        if opening == "{" or (opening == "[" and end - start > 100):  # whole objects would be long carets
            key = where[-1] if where else 0
            start, end = self._places[(*where, KEY)] if isinstance(key, str) else (start, start + 1)
        return self.source.span(self.offset + start, self.offset + end)
