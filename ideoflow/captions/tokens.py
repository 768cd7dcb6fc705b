"""Token counts as the model sees them: the base's own tokenizer and chat template, without torch.

Ideogram 4 reads ``[{"role": "user", "content": [{"type": "text", "text": CAPTION}]}]`` through Qwen3-VL's
chat template with a generation prompt, tokenised without further special tokens. The template adds some
tokens to every caption, and they count towards the limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes.caption_tools import NO_TOKENIZER

LIMIT = 2048  # tokens that the model was trained to read


class TokenCounter:
    """Counts tokens of captions.

    Args:
        path: ``tokenizer.json``, its folder, or a base model's folder that has ``tokenizer/``.

    Attributes:
        has_template: whether a chat template was found and is counted in.

    Raises :class:`IdeoflowError` (IC740) where there is no usable tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer

        file = _tokenizer_file(Path(path))
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(file))
            self._render = _template(file.parent)
        except Exception as error:  # tokenizers raises bare Exception; jinja2 its own kinds
            raise _unusable(file, f"{file} is not a usable tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.has_template = self._render is not None

    def count(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, chat template included."""
        render = self._render
        texts = [render(c) for c in captions] if render else list(captions)
        # A lone surrogate has no UTF-8 form; the replacement character costs about the same.
        texts = [t.encode("utf-8", "replace").decode() for t in texts]
        return [len(e.ids) for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]


def _tokenizer_file(path: Path) -> Path:
    for candidate in (path, path / "tokenizer.json", path / "tokenizer" / "tokenizer.json"):
        if candidate.is_file():
            return candidate
    raise _unusable(path, f"there is no tokenizer.json at {path}")


def _template(folder: Path) -> Callable[[str], str] | None:
    """A function from a caption to the templated text; ``None`` where the folder has no chat template."""
    source = _template_source(folder)
    if source is None:
        return None
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The settings in which transformers renders chat templates.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)

    def render(caption: str) -> str:
        content = [{"type": "text", "text": caption}]
        return template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)

    render("{}")  # a template that cannot be rendered is found here, not at the first caption
    return render


def _template_source(folder: Path) -> str | None:
    """The template's text, from the places where transformers keeps it, newest first."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        if file.is_file():
            template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, list):  # several named templates
                template = next((t["template"] for t in template if t.get("name") == "default"), None)
            if isinstance(template, str):
                return template
    return None


def _unusable(path: Path, message: str) -> IdeoflowError:
    cure = "give the base model's folder, its tokenizer folder or a tokenizer.json"
    return IdeoflowError(Diagnostic(NO_TOKENIZER, message, Span(str(path)), cure))
