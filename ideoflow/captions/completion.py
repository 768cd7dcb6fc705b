"""What an editor offers in a caption file: completions and hover texts, as pure functions of text and place.

Lines are read by patterns rather than by the parser, since a file that is being typed is never whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ideoflow.captions.regions import PLACES, REGIONS

# word -> (snippet to insert, what it is); kept beside the grammar's first words of lines
BLOCKS = {
    "style": ("style ${1:name}\n  ", "a named style that captions share"),
    "palette": ("palette ${1:name}: #", "named colours, written @name wherever colours stand"),
    "defaults": ("defaults\n  ", "what every caption of this file takes over"),
    "image": ("image ${1:name.jpg}\n  ", "one caption, under the name of its image"),
    "use": ("use ", "takes over the styles and palettes of another file"),
}
STATEMENTS = {
    "description": ("description: ", "the whole image in a sentence or two"),
    "style": ("style: ", "the named style of this caption"),
    "aesthetics": ("aesthetics: ", "mood and character of the image"),
    "lighting": ("lighting: ", "where the light comes from, how hard, how warm"),
    "photo": ("photo: ", "camera, lens, film: makes the style a photograph"),
    "medium": ("medium: ", "Photograph, oil painting, vector illustration, ..."),
    "art_style": ("art_style: ", "school or technique: makes the style art; never with photo"),
    "palette": ("palette: #", "at most 16 colours of the whole image"),
    "background": ("background: ", "everything behind the elements; every caption needs it"),
    "size": ("size: ${1:1024}x${2:1024}", "pixels, width x height, that px boxes were measured on"),
    "obj": ("obj y${1:0}..${2:1000} x${3:0}..${4:1000}: ", "a thing with its box"),
    "text": ('text y${1:0}..${2:1000} x${3:0}..${4:1000} "${5:WORDS}": ', "verbatim words in the image"),
}
MARKS = {
    "y": ("y${1:0}..${2:1000} ", "top and bottom edge, 0..1000 from the top, or in % or px"),
    "x": ("x${1:0}..${2:1000} ", "left and right edge, 0..1000 from the left, or in % or px"),
}
_NAME = r"[^\W\d][\w.-]*"
_USE_DEPTH = 8  # files that use files; the compiler reports cycles, an editor only must not hang


@dataclass(frozen=True, slots=True)
class Offer:
    """One completion: the word, what is inserted (a snippet), what it is, and its LSP kind by name."""

    label: str
    insert: str
    about: str
    kind: str


def complete(text: str, line: int, column: int, path: Path | None) -> list[Offer]:
    """What may stand at a place; ``line`` and ``column`` count from 0, in characters."""
    lines = text.split("\n")
    before = lines[line][:column] if line < len(lines) else ""
    if re.search(rf"@(?:{_NAME})?$", before):
        return [Offer(f"@{n}", n, "palette", "color") for n in defined("palette", text, path)]
    if re.match(r"[ \t]*style[ \t]*:[ \t]*[^\s]*$", before):
        return [Offer(n, n, "style", "class") for n in defined("style", text, path)]
    if re.match(r"[ \t]*use[ \t]+[^\s]*$", before):
        return _files(path, {".icap"})
    if re.match(r"image[ \t]+[^\s]*$", before):
        from ideoflow.captions.inputs import IMAGE_SUFFIXES

        return _files(path, set(IMAGE_SUFFIXES))
    if re.match(r"[ \t]*\w*$", before):
        offers = [Offer(w, s, about, "keyword") for w, (s, about) in STATEMENTS.items()]
        if not before[:1].isspace():
            offers += [Offer(f"{w} ", s, about, "snippet") for w, (s, about) in BLOCKS.items()]
        return offers
    if re.match(r"[ \t]*(?:obj|text)[ \t][^:\"]*$", before):
        offers = [Offer(w, s, about, "field") for w, (s, about) in MARKS.items() if f" {w}" not in before]
        offers += [Offer(n, f"{n} ", "a region of the picture", "constant") for n in REGIONS]
        return offers + [Offer(n, f"{n} ", "a place, with h and w", "constant") for n in PLACES]
    return []


def describe(text: str, line: int, column: int) -> str:
    """What the word at a place means, or an empty string."""
    lines = text.split("\n")
    source = lines[line] if line < len(lines) else ""
    match = re.match(r"[ \t]*([a-z_]+)", source)
    if not match or not match.start(1) <= column <= match.end(1):
        return ""
    word = match.group(1)
    is_statement = source[match.end() :].lstrip().startswith(":") or word in ("obj", "text")
    found = (STATEMENTS if is_statement else BLOCKS).get(word)
    return f"`{word}`: {found[1]}" if found else ""


def defined(kind: str, text: str, path: Path | None, depth: int = 0) -> list[str]:
    """Names of the ``style`` or ``palette`` blocks of a file and of the files it uses, in order."""
    pattern = rf"^{kind}[ \t]+({_NAME})[ \t]*" + (":" if kind == "palette" else "(?:#.*)?\r?$")
    names = re.findall(pattern, text, re.MULTILINE)
    if path is not None and depth < _USE_DEPTH:
        for used in re.findall(r"^use[ \t]+(.+?)[ \t\r]*$", text, re.MULTILINE):
            other = path.parent / used.strip('"')
            try:
                names += defined(kind, other.read_text(encoding="utf-8-sig"), other, depth + 1)
            except (OSError, ValueError):
                continue  # the compiler reports it
    return list(dict.fromkeys(names))


def _files(path: Path | None, suffixes: set[str]) -> list[Offer]:
    if path is None or not path.parent.is_dir():
        return []
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in suffixes and p != path)
    return [Offer(n, n, "file", "file") for n in names[:1000]]
