"""Errors of form in people's words: each known mistake has its own code and cure.

The parser knows only that a token did not fit. :func:`explain` looks at the line, from the most particular
mistake to the least; what nothing recognises is told as "expected one of".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ideoflow.captions.lexer import CONTROL, LOOKS_LIKE_STATEMENT, Tok
from ideoflow.captions.source import Source
from ideoflow.diagnostics import Diagnostic, closest
from ideoflow.diagnostics.codes import Code
from ideoflow.diagnostics.codes import caption_language as codes

LIMIT = 20
KEYS = (
    "description",
    "aesthetics",
    "lighting",
    "photo",
    "art_style",
    "medium",
    "palette",
    "style",
    "background",
    "size",
)
BLOCKS = ("image", "style", "defaults", "palette", "use")
# Keys of the JSON form, and other spellings, that closeness alone would not find.
OTHER_NAMES = {
    "high_level_description": "description",
    "caption": "description",
    "prompt": "description",
    "summary": "description",
    "color_palette": "palette",
    "colour_palette": "palette",
    "colors": "palette",
    "colours": "palette",
    "color": "palette",
    "colour": "palette",
    "bg": "background",
    "light": "lighting",
    "artstyle": "art_style",
    "art-style": "art_style",
    "art": "art_style",
    "photograph": "photo",
    "style_description": "style",
    "object": "obj",
    "element": "obj",
    "dimensions": "size",
}
EXPECTED = {
    "_NL": "the end of the line",
    "COLON": "a colon",
    "PROSE": "prose",
    "BARE": "a description",
    "NAME": "a name",
    "PATH": "a file name",
    "COLOUR": "a colour such as #1B3A5C",
    "PALETTE_NAME": "a palette such as @dusk",
    "AXIS": "a side of the box such as y380..660",
    "EXTENT": "a size such as w40%",
    "STRING": 'words in quotes such as "STILL WATER"',
    "DIMENSIONS": "a size such as 1536x1024",
    "_INDENT": "indented lines below",
}

_BOX = re.compile(r"(?:bbox\s*[:=]?\s*)?[\[(]\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*[\])]")
_SMART = re.compile(r"[“”„‟«»″＂‘’]([^“”„‟«»″＂‘’\"]*)[“”„‟«»″＂‘’\"]?")
_HEX = re.compile(r"#[0-9A-Za-z]*")
_FIRST = re.compile(r"([^\W\d][\w-]*)[ \t]*(:?)")


def unreadable(source: Source) -> list[Diagnostic]:
    """What makes the text as a whole no caption file: control characters, or JSON."""
    text = source.text
    found: list[Diagnostic] = []
    match = CONTROL.search(text)
    while match and len(found) < LIMIT:
        name = f"U+{ord(match.group()[0]):04X}"
        cure = "delete it; inside quotes a control character is written \\u and four digits"
        if match.group() == "\r":
            cure = "end lines with \\n or \\r\\n"
        found.append(
            _at(
                source,
                codes.CONTROL_CHARACTER,
                f"the character {name} is not text",
                match.start(),
                match.end(),
                cure,
            )
        )
        match = CONTROL.search(text, match.end())
    if not found and text.lstrip()[:1] == "{":
        start = text.index("{")
        cure = "name the file .json, or convert it with `ideoflow captions decompile`"
        found.append(_at(source, codes.PASTED_JSON, "this file holds JSON", start, start + 1, cure))
    return found


def explain(
    source: Source, tokens: Sequence[Tok], line_at: int, at: int, expected: Iterable[str]
) -> Diagnostic:
    """The diagnostic for ``tokens[at]``, misfit of the line that begins with ``tokens[line_at]``."""
    token, first = tokens[at], tokens[line_at]
    if set(expected) == {"_INDENT"}:
        return _empty_block(source, tokens, line_at)
    stop = at
    while tokens[stop].type not in ("_NL", "TAIL"):
        stop += 1
    line_end = tokens[stop].end
    if first.type == "UNKNOWN":
        return _unknown_line(source, first)
    if first.type in ("USE", "DEFAULTS", "IMAGE") and line_at and not _in_first_column(source, first):
        return _at(
            source,
            codes.MISPLACED,
            f"`{first.value}` cannot stand inside a block",
            first.start,
            first.end,
            "move it to the first column",
        )
    if token.type == "UNKNOWN":
        known = _unknown_piece(source, token, first)
        if known:
            return known
    if token.type == "COLON":
        if first.type in ("STYLE", "IMAGE", "DEFAULTS"):
            return _header_colon(source, tokens, line_at, at, line_end)
    elif token.type == "_NL" and at > line_at:
        previous = tokens[at - 1]
        if first.type == "STYLE" and tokens[at + 1].type == "_INDENT":
            return _header_colon(source, tokens, line_at, at - 1, line_end)
        if previous.type in ("COLON", "FIELD"):
            what = "a description" if first.type == "ELEMENT" else f"the value of `{_word(first)}`"
            return _at(
                source,
                codes.EMPTY_VALUE,
                f"{what} is missing",
                previous.end - 1,
                previous.end,
                'write it behind the colon, or `""` if it is empty on purpose',
            )
    if first.type == "STYLE" and not _in_first_column(source, first) and token.type != "UNKNOWN":
        name = source.text[first.end : line_end].strip(" \t:")
        return _missing_colon(source, first, f"write `style: {name}`" if name else "write `style: NAME`")
    if first.type in ("PALETTE", "SIZE") and not any(t.type == "COLON" for t in tokens[line_at:stop]):
        return _missing_colon(source, first, f"write `{first.value}: ...`")
    if first.type == "ELEMENT" and not any(t.type == "COLON" for t in tokens[line_at:stop]):
        last = tokens[at - 1]
        words = [t for t in tokens[line_at + 1 : stop] if t.type == "NAME"]
        cure = "put a colon between the box and the description"
        if words:
            cure += f"; for a description of the image write `description: {first.value} ...`"
        where = words[0].start if words else last.end
        return _at(
            source,
            codes.MISSING_COLON,
            f"`{first.value}` has no colon",
            where,
            where + 1,
            cure,
            "a colon is missing before this",
        )
    return _generic(source, token, expected)


def finished(
    source: Source, diagnostics: list[Diagnostic], problems: Iterable[tuple[str, int, int]]
) -> tuple[Diagnostic, ...]:
    """All diagnostics of a file in reading order, at most :data:`LIMIT`; ``problems`` are the lexer's."""
    text = source.text
    for kind, start, end in problems:
        if kind == "tab":
            found = _at(source, codes.TAB, "a tab in the indentation", start, end, "indent with spaces")
        elif kind == "indent":
            found = _at(
                source,
                codes.INDENTATION,
                "this indentation fits no line above",
                start,
                end,
                "begin the line in the column of the lines around it",
            )
        elif kind == "swallowed":
            found = _at(
                source,
                codes.SWALLOWED,
                "this line would become part of the prose above",
                start,
                end,
                "move it to the column of the statements around it",
            )
        elif kind == "surrogate":
            found = _at(
                source,
                codes.CONTROL_CHARACTER,
                "half a surrogate pair is no character",
                start,
                end,
                "write both halves, or the character itself",
            )
        else:
            found = _at(
                source,
                codes.BAD_ESCAPE,
                f"`{text[start:end]}` is no escape",
                start,
                end,
                "write a backslash as two: \\\\",
            )
        diagnostics.append(found)
        if len(diagnostics) > 4 * LIMIT:
            break
    diagnostics.sort(key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0))
    return tuple(diagnostics[:LIMIT])


def unknown_key_cure(word: str) -> str:
    """How to mend an unknown key."""
    near = OTHER_NAMES.get(word.casefold()) or closest(word.casefold(), (*KEYS, "obj", "text"))
    if near:
        return f"did you mean `{near}`?"
    return f"where this is prose, write the key in front: `description: {word}: ...`"


def _unknown_line(source: Source, first: Tok) -> Diagnostic:
    """A line that begins with nothing known."""
    text = first.value
    if text[0] == '"' and not re.match(r'"[^"]*"\s*:', text):
        return _unclosed(source, first)
    if _BOX.match(text):
        return _pasted_box(source, first)
    match = _FIRST.match(text)
    if match is None:
        return _at(
            source,
            codes.PASTED_JSON,
            "this line looks like JSON",
            first.start,
            first.end,
            "write `key: value` lines, without braces and quotes",
        )
    word, colon = match.groups()
    start = first.start + match.start(1)
    if colon:
        return _at(
            source,
            codes.UNKNOWN_KEY,
            f"unknown key `{word}`",
            start,
            start + len(word),
            unknown_key_cure(word),
        )
    if word in KEYS:
        rest = text[match.end() :].strip()
        cure = f"write `{word}: {_short(rest)}`, or `description: {_short(text)}` if it describes the image"
        return _at(
            source,
            codes.MISSING_COLON,
            f"`{word}` has no colon",
            start,
            start + len(word),
            cure,
            "a colon is missing after this",
        )
    near = closest(word, BLOCKS)
    cure = f"did you mean `{near}`?" if near else "write `key: value`"
    return _at(source, codes.NOT_UNDERSTOOD, "this line is not understood", first.start, first.end, cure)


def _unknown_piece(source: Source, token: Tok, first: Tok) -> Diagnostic | None:
    """A piece before the colon (or of a list) that is no terminal."""
    value = token.value
    if value[0] == '"':
        return _unclosed(source, token)
    line_end = source.text.find("\n", token.start)
    rest = source.text[token.start : line_end if line_end >= 0 else len(source.text)]
    if _BOX.match(rest):
        return _pasted_box(source, token)
    smart = _SMART.match(rest)
    if smart:
        words = smart.group(1).strip()
        return _at(
            source,
            codes.SMART_QUOTES,
            "these are typographic quotes",
            token.start,
            token.start + smart.end(),
            f'write straight ones: "{words}"',
        )
    if value[0] == "#":
        return bad_colour(source, value, token.start)
    if first.type == "ELEMENT" and first.value == "obj" and re.match(r"-?\d|[\[(]", value):
        return _at(
            source,
            codes.BAD_BOX,
            f"`{_short(value)}` is no part of a box",
            token.start,
            token.end,
            "name the axes: `y380..660 x590..720`",
        )
    if first.type == "ELEMENT" and first.value == "text":
        return _at(
            source,
            codes.UNQUOTED_WORDS,
            f"`{_short(value)}` stands outside of quotes",
            token.start,
            token.end,
            f'put the words in quotes: "{_short(value)}"',
        )
    return None


def bad_colour(source: Source, value: str, start: int) -> Diagnostic:
    """The diagnostic for something that stands where a colour should."""
    match = _HEX.match(value)
    digits = match.group()[1:] if match else ""
    end = start + (len(match.group()) if match else len(value))
    cure = "write six hexadecimal digits: #1B3A5C"
    if len(digits) in (3, 4) and all(c in "0123456789abcdefABCDEF" for c in digits):
        cure = f"write six digits: #{''.join(2 * c for c in digits[:3]).upper()}"
    elif len(digits) == 8:
        cure = f"captions know no transparency: #{digits[:6].upper()}"
    elif match is None:
        cure = f"write its number, #RRGGBB, or `@{value}` if it is the name of a palette"
    return _at(source, codes.BAD_COLOUR, f"`{_short(value)}` is not a colour", start, end, cure)


def _pasted_box(source: Source, token: Tok) -> Diagnostic:
    match = _BOX.match(source.text, token.start)
    assert match is not None
    a, b, c, d = match.groups()
    return _at(
        source,
        codes.PASTED_BOX,
        "these four numbers do not say which is x and which is y",
        match.start(),
        match.end(),
        f"from Ideogram's JSON it is y{a}..{c} x{b}..{d}; as [x1, y1, x2, y2] it would be "
        f"y{b}..{d} x{a}..{c}",
    )


def _unclosed(source: Source, token: Tok) -> Diagnostic:
    return _at(
        source,
        codes.UNCLOSED_QUOTE,
        "this quote is not closed",
        token.start,
        token.start + 1,
        'close it with ", and write a quote inside it as \\"',
    )


def _header_colon(source: Source, tokens: Sequence[Tok], line_at: int, at: int, line_end: int) -> Diagnostic:
    first, token = tokens[line_at], tokens[at]
    if first.type == "STYLE" and at == line_at + 1:
        return _at(
            source,
            codes.NOT_UNDERSTOOD,
            "a style is missing its name",
            first.start,
            token.end,
            "`style NAME` begins a style; `style: NAME` uses one",
        )
    name = source.text[token.end : line_end].strip()
    head = source.text[first.start : token.start].rstrip()
    return _at(
        source,
        codes.HEADER_COLON,
        "a block's first line takes no colon",
        token.start,
        token.end,
        f"write `{head} {name}`" if name else f"write `{head}`",
    )


def _empty_block(source: Source, tokens: Sequence[Tok], line_at: int) -> Diagnostic:
    at = line_at - 1
    while at and tokens[at - 1].type not in ("_NL", "DEDENT", "_INDENT"):
        at -= 1
    first, last = tokens[at], tokens[line_at - 1]
    line = source.text[first.start : last.end]
    return _at(
        source,
        codes.EMPTY_BLOCK,
        f"nothing stands below `{_short(line)}`",
        first.start,
        last.end,
        f"indent its lines below it, or write `description: {_short(line)}` if it describes the image",
    )


def _missing_colon(source: Source, first: Tok, cure: str) -> Diagnostic:
    return _at(
        source,
        codes.MISSING_COLON,
        f"`{first.value}` has no colon",
        first.start,
        first.end,
        cure,
        "a colon is missing after this",
    )


def _generic(source: Source, token: Tok, expected: Iterable[str]) -> Diagnostic:
    names = sorted({EXPECTED[name] for name in expected if name in EXPECTED})
    found = "the line ends here" if token.type == "_NL" else f"`{_short(token.value)}` is not understood here"
    cure = ("expected " + " or ".join(names)) if 0 < len(names) <= 6 else "write `key: value`"
    return _at(source, codes.NOT_UNDERSTOOD, found, token.start, token.end, cure)


def _in_first_column(source: Source, token: Tok) -> bool:
    return token.start == 0 or source.text[token.start - 1] == "\n"


def _word(token: Tok) -> str:
    return token.value.rstrip(": \t")


def _short(text: str, limit: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit].rstrip() + "..."


def _at(
    source: Source, code: Code, message: str, start: int, end: int, cure: str, label: str = ""
) -> Diagnostic:
    return Diagnostic(code, message, source.span(start, end), cure, label, severity=code.severity)


def looks_like_statement(text: str, start: int = 0) -> bool:
    """Whether a continuation line that begins at ``start`` would be reported as a swallowed statement."""
    return LOOKS_LIKE_STATEMENT.match(text, start) is not None
