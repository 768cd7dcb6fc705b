"""Writes ``docs/caption-grammar.md`` from ``grammar/caption.lark``: each rule with the comment above it.

::

    python -m ideoflow.captions.grammar_reference > docs/caption-grammar.md
"""

from __future__ import annotations

import re

from ideoflow import resources

_SECTION = re.compile(r"// -{10,} (.+)")
_DEFINITION = re.compile(r"([a-z_]\w*|[A-Z_]\w*|%declare)\b", re.ASCII)
HEAD = """# Grammar of the caption language

<!-- Generated from grammar/caption.lark by `python -m ideoflow.captions.grammar_reference`: edit that. -->

[captions.md](captions.md) tells the language by example. This page is the grammar itself, rule by rule, in
Lark's notation: `*` any number, `+` at least one, `|` or; rules are lower case, terminals (patterns of
characters) upper case. A rule whose name begins with `_` only groups others.
"""


def grammar_reference(grammar: str) -> str:
    """The Markdown page for the text of a grammar file.

    ``// ---- title`` becomes a section, the comment above a definition its paragraphs, lines indented by four
    spaces in a comment an example. Raises ``ValueError`` for a line that is none of these.
    """
    out = [HEAD.rstrip()]
    comments: list[str] = []
    rules: list[str] = []

    def flush() -> None:
        if rules:
            names = [name for line in rules if (name := line.partition(":")[0]) and not line.startswith("%")]
            out.extend(["", "### " + ", ".join(f"`{name}`" for name in names)] if names else [])
        out.extend(_paragraphs(comments))
        if rules:
            out.extend(["", "```lark", *rules, "```"])
        comments.clear()
        rules.clear()

    for line in grammar.splitlines():
        section = _SECTION.fullmatch(line)
        if section:
            flush()
            out.extend(["", f"## {section[1][0].upper()}{section[1][1:]}"])
        elif line.startswith("//"):
            if rules:
                flush()
            comments.append(line[3:])
        elif not line:
            flush()
        elif _DEFINITION.match(line):
            rules.append(line)
        else:
            raise ValueError(f"not understood in the grammar file: {line}")
    flush()
    return "\n".join(out) + "\n"


def _paragraphs(comments: list[str]) -> list[str]:
    lines: list[str] = []
    code = False
    for comment in comments:
        if comment.startswith("    ") != code:
            code = not code
            lines += ["", "```"] if code else ["```", ""]
        lines.append(comment[4:] if code else comment)
    if code:
        lines.append("```")
    return ["", *lines] if lines else []


if __name__ == "__main__":
    print(grammar_reference(resources.grammar("caption.lark")), end="")
