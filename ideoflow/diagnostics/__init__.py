"""Everything a person can get wrong is told through one type, :class:`Diagnostic`.

A diagnostic has a stable code (``IR003``), a place (file, line, column, span), what was found, what
was expected and how to mend it. Renderers turn a list of them into text with carets, JSON or GitHub
annotations; none of them knows where a diagnostic came from. A traceback is a bug.
"""

from ideoflow.diagnostics.render import render_github, render_json, render_text
from ideoflow.diagnostics.types import Collector, Diagnostic, IdeoflowError, Severity, Span, closest, fail

__all__ = [
    "Collector",
    "Diagnostic",
    "IdeoflowError",
    "Severity",
    "Span",
    "closest",
    "fail",
    "render_github",
    "render_json",
    "render_text",
]
