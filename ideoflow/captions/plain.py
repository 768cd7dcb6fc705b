"""Plain text as a caption: wrapped into valid JSON, with nothing added that nobody wrote."""

from __future__ import annotations

import re

from ideoflow.captions.emit import placeholders_in
from ideoflow.captions.repair import wrap_text
from ideoflow.captions.result import CompiledCaption, CompileResult
from ideoflow.captions.rules import to_json
from ideoflow.diagnostics import Diagnostic, Span
from ideoflow.diagnostics.codes.caption_json import HALF_SURROGATE
from ideoflow.diagnostics.codes.caption_language import CONTROL_CHARACTER, NO_CAPTION

_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")


def read_plain_caption(text: str, *, path: str, line: int = 0) -> CompileResult:
    """One caption from plain text; never raises.

    Args:
        text: the words.
        path: the file that they come from, for messages.
        line: their line in a table of captions; 0 where the file holds nothing else.

    Returns:
        One caption, or an error: the text is empty or has characters that are not text.
    """
    wrong = _NOT_TEXT.search(text)
    if wrong is not None:
        place = Span(path, line) if line else Span.of(path, text, *wrong.span())
        if wrong[0] >= "\ud800":
            cure = "the text was cut: write it again"
            return CompileResult((), (Diagnostic(HALF_SURROGATE, "half of a character", place, cure),))
        message = f"the character U+{ord(wrong[0]):04X} is not text"
        return CompileResult((), (Diagnostic(CONTROL_CHARACTER, message, place, "delete it"),))
    caption = wrap_text(text)
    if not caption["high_level_description"]:
        empty = Diagnostic(NO_CAPTION, "the caption is empty", Span(path, line), "describe the image")
        return CompileResult((), (empty,))
    compiled = CompiledCaption(None, caption, to_json(caption), Span(path, line))
    return CompileResult((compiled,), (), frozenset(placeholders_in(caption)))
