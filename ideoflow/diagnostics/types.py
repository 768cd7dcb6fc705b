"""The diagnostic itself, the span it points at, and the collector that gathers several."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from ideoflow.diagnostics.codes import Code

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Span:
    """A place in a text file.

    ``line`` and ``column`` count from 1, in characters; the end column is exclusive. ``line == 0`` means
    the file as a whole. ``source`` is the text of the first line, kept so that carets can be drawn
    without opening the file again.
    """

    path: str
    line: int = 0
    column: int = 1
    end_line: int = 0
    end_column: int = 0
    source: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, path: str, text: str, start: int, end: int) -> Span:
        """The span of ``text[start:end]``, offsets in characters; an empty range points at one character."""
        end = max(end, start)
        line = text.count("\n", 0, start) + 1
        line_start = text.rfind("\n", 0, start) + 1
        line_end = text.find("\n", line_start)
        source = text[line_start:] if line_end < 0 else text[line_start:line_end]
        end_line = line + text.count("\n", start, end)
        end_line_start = text.rfind("\n", 0, end) + 1
        return cls(
            path, line, start - line_start + 1, end_line, end - end_line_start + 1, source.rstrip("\r")
        )

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}" if self.line else self.path


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing that is wrong, or worth knowing.

    Args:
        code: what kind it is; ``ideoflow explain CODE`` prints the whole page.
        message: what was found, one sentence without a full stop.
        span: where; ``None`` where there is no file to point at.
        cure: how to mend it, in the imperative.
        label: a few words under the caret.
        notes: further facts, a line each.
        severity: overrides the code's own.
    """

    code: Code
    message: str
    span: Span | None = None
    cure: str = ""
    label: str = ""
    notes: tuple[str, ...] = ()
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if not isinstance(self.code, Code):
            raise TypeError(f"a Diagnostic takes a Code, not {self.code!r}")

    @property
    def is_error(self) -> bool:
        return self.severity == "error"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the shape is stable."""
        place = None
        if self.span is not None:
            s = self.span
            place = {
                "path": s.path,
                "line": s.line,
                "column": s.column,
                "end_line": s.end_line,
                "end_column": s.end_column,
            }
        return {
            "code": self.code.id,
            "severity": self.severity,
            "title": self.code.title,
            "message": self.message,
            "place": place,
            "cure": self.cure,
            "label": self.label,
            "notes": list(self.notes),
        }


class IdeoflowError(Exception):
    """Stops the work with diagnostics to show; the command line prints them and exits with 1."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]) -> None:
        items = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = items
        super().__init__("; ".join(f"{d.code.id} {d.message}" for d in items))


def fail(
    code: Code,
    message: str,
    span: Span | None = None,
    *,
    cure: str = "",
    label: str = "",
    notes: Iterable[str] = (),
) -> NoReturn:
    """Raises :class:`IdeoflowError` with this one diagnostic, and without the exception that led here."""
    raise IdeoflowError(Diagnostic(code, message, span, cure, label, tuple(notes))) from None


class Collector:
    """Gathers diagnostics so that a person sees several at once; stops at ``limit`` errors.

    Of warnings with the same code, at most ``alike`` are kept; :meth:`settle` says how many more there were.
    """

    def __init__(self, limit: int = 20, alike: int | None = None) -> None:
        self.limit, self.alike = limit, alike
        self.items: list[Diagnostic] = []
        self._counts: Counter[Code] = Counter()

    def add(
        self,
        code: Code,
        message: str,
        span: Span | None = None,
        *,
        cure: str = "",
        label: str = "",
        notes: Iterable[str] = (),
        severity: Severity | None = None,
    ) -> None:
        """Adds one; raises :class:`IdeoflowError` when the limit of errors is reached."""
        self._keep(Diagnostic(code, message, span, cure, label, tuple(notes), severity or code.severity))
        if sum(d.is_error for d in self.items) >= self.limit:
            raise IdeoflowError(self.items)

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        for diagnostic in diagnostics:
            self._keep(diagnostic)

    def _keep(self, diagnostic: Diagnostic) -> None:
        if not diagnostic.is_error:
            self._counts[diagnostic.code] += 1
            if self.alike is not None and self._counts[diagnostic.code] > self.alike:
                return
        self.items.append(diagnostic)

    def settle(self) -> None:
        """Adds a line for each code of which more was found than is kept."""
        for code, count in self._counts.items():
            if more := count - sum(d.code is code and not d.is_error for d in self.items):
                message = f"and {more:,} more like this: {code.title}"
                self.items.append(Diagnostic(code, message, severity=code.severity))

    @property
    def errors(self) -> list[Diagnostic]:
        return [d for d in self.items if d.is_error]

    @property
    def warnings(self) -> list[Diagnostic]:
        return [d for d in self.items if not d.is_error]

    def raise_if_errors(self) -> None:
        """Raises with everything gathered (warnings too) if any of it is an error."""
        if self.errors:
            raise IdeoflowError(self.items)

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self.items)


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` was probably meant to be, or ``None``."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None
