"""``report.html``: one file that shows a run, and needs no network, no script and no other file.

Sections are made in :mod:`~ideoflow.report.results`, ``training`` and ``account``; everything goes through
:mod:`~ideoflow.report.markup`, which escapes. A content security policy admits nothing but the page's own
style and script, by their digests, so that even a hole in the escaping could not run or load anything.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ideoflow import __version__
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.artifacts import UNWRITABLE
from ideoflow.plan.document import Plan
from ideoflow.report import account, results, training
from ideoflow.report.history import History, read_history
from ideoflow.report.markup import Child, Html, join, json_script, tag
from ideoflow.report.profile import profile

REPORT = "report.html"


def write_report(folder: Path, plan: Plan) -> Path:
    """Writes ``report.html`` from the ``metrics.jsonl`` and the pictures of a run's folder, and its plan.

    It can be written at any moment of a run, and replaces the one before as a whole.

    Raises:
        IdeoflowError: when the file cannot be written.
    """
    file = folder / REPORT
    part = file.with_name(f".{REPORT}.part")
    text = render(folder, plan, read_history(folder))
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        cure = "free some space, or make the folder writable; the run's other files are untouched"
        fail(UNWRITABLE, f"cannot write {file}: {error.strerror or error}", cure=cure)
    return file


def render(folder: Path, plan: Plan, history: History) -> str:
    """The page as text."""
    profiled = profile(folder)
    parts = [
        results.use_it(folder, plan, history),
        results.pictures(folder, plan, history),
        training.training(plan, history),
        account.memory(plan, history),
        account.times(plan, history),
        profiled,
        account.decisions(plan),
        account.warnings(plan, history),
        account.settings(plan),
        account.versions(plan, history),
    ]
    shown = ("profile",) if profiled else ()
    sections = ("pictures", "training", "memory", "time", *shown, "plan", "warnings", "settings")
    links = {id: id.capitalize() for id in sections}
    title = f"{plan.name}: training report"
    return page(title, results.headline(folder, plan, history), links, parts, training.readout(history))


def page(
    title: str, headline: Html, links: Mapping[str, str], parts: Sequence[Child], readout: Mapping[str, Any]
) -> str:
    """A whole document; ``links`` go to sections by id, ``readout`` is what the page's script shows."""
    style, script = (Html(_own(name)) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}"
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"ideoflow {__version__}"),
        tag("title", title),
        tag("style", style),
    )
    body = join(
        headline,
        tag("nav", [tag("a", text, href=f"#{id}") for id, text in links.items()], aria_label="Sections"),
        tag("main", parts),
        tag("footer", f"Written by ideoflow {__version__}. This file is complete: it loads nothing else."),
        json_script("readout", readout),
        tag("script", script),
    )
    return f'<!doctype html>\n<html lang="en">{tag("head", head)}{tag("body", body)}</html>\n'


def _own(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A source expression of the policy: https://www.w3.org/TR/CSP3/#grammardef-hash-source."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"
