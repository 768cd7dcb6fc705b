"""Whether a base's tokenizer can be used, told from its small files (torch-free)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Span, fail
from ideoflow.diagnostics.codes.model import BAD_CONFIG
from ideoflow.model.configuration import read_json, read_text
from ideoflow.model.files import AGAIN


def largest_id(folder: Path, span: Span | None = None) -> tuple[Path, int]:
    """The file of a tokenizer's vocabulary, and the largest id in it.

    Raises:
        IdeoflowError: when there is none, or the files beside it are damaged.
    """
    settings: dict[str, Any] = {}
    if (config := folder / "tokenizer_config.json").exists():
        settings = read_json(config, span)
    _check_template(folder, config, settings, span)
    file = folder / "tokenizer.json"
    if file.exists() or not (folder / "vocab.json").exists():
        facts = read_json(file, span)
        ids = _ids(facts)
    else:
        file = folder / "vocab.json"
        ids = list(read_json(file, span).values())
    if not ids or not all(type(number) is int and number >= 0 for number in ids):
        fail(BAD_CONFIG, f"{file} has no vocabulary of words and their ids", span, cure=AGAIN)
    return file, max(ids)


def _check_template(folder: Path, config: Path, settings: dict[str, Any], span: Span | None) -> None:
    """Refuses a chat template that is missing, or no template; loading the tokenizer tries it out."""
    template: Any
    own, older = folder / "chat_template.jinja", folder / "chat_template.json"
    if own.exists():
        file, template = own, read_text(own, span)
    elif older.exists():
        file, template = older, read_json(older, span).get("chat_template")
    else:
        file, template = config, settings.get("chat_template")
    if not template:
        fail(BAD_CONFIG, f"{own} is missing: the tokenizer has no chat template", span, cure=AGAIN)
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            template if isinstance(template, str) else ""
        )
    except TemplateSyntaxError as error:
        if "unknown tag" not in str(error.message):  # transformers has tags of its own
            message = f"{file}: the chat template is none, in line {error.lineno}: {error.message}"
            fail(BAD_CONFIG, message, span, cure=AGAIN)


def _ids(facts: dict[str, Any]) -> list[Any]:
    """The ids in a tokenizer.json; none where it has another form."""
    try:
        return [*facts["model"]["vocab"].values(), *(token["id"] for token in facts["added_tokens"])]
    except (LookupError, TypeError, AttributeError):
        return []
