"""Random TOML documents, written by a writer of their own: every kind of string, key and table."""

import datetime
import string

from hypothesis import strategies as st

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)
BARE = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=6)


def basic(text):
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


@st.composite
def strings(draw):
    """A string in one of TOML's four forms, some with line breaks, quotes and comment signs inside."""
    text = draw(WORDS) + draw(st.sampled_from(["", "#", "]", "}", ",", "=", "'", '"', "\\"]))
    form = draw(st.sampled_from(["basic", "literal", "multi-line basic", "multi-line literal"]))
    if form == "literal" and "'" not in text:
        return f"'{text}'"
    if form == "multi-line literal" and "'" not in text:
        return "'''\n" + text + "\n# no comment ' '' \n" + draw(st.sampled_from(["", "'", "''"])) + "'''"
    if form == "multi-line basic":
        body = basic(text)[1:-1] + draw(st.sampled_from(["", "\n", "\\\n   ", '\\"""', ' "" ', '\n""#']))
        return '"""' + body + draw(st.sampled_from(["", "", '"', '""'])) + '"""'
    return basic(text)


SCALARS = st.one_of(
    st.booleans().map(lambda b: str(b).lower()),
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.sampled_from(["0xDEAD_beef", "0o17", "0b1_0", "1_000", "+7", "-0", "inf", "-nan", "6.02e-23", "1E4"]),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.dates(min_value=datetime.date(1900, 1, 1)).map(lambda d: d.isoformat()),
    st.datetimes(min_value=datetime.datetime(1900, 1, 1)).flatmap(
        lambda d: st.sampled_from([d.isoformat(), d.isoformat(" "), d.isoformat() + "Z"])
    ),
    st.times().map(lambda t: t.isoformat()),
)
BLANKS = st.sampled_from(["", " ", "\t", "\n", '  # comment, with ] and } and "\n', "\n\n "])
SPACES = st.sampled_from(["", " ", "\t "])


@st.composite
def arrays(draw, values):
    items = draw(st.lists(values, max_size=3))
    text = ",".join(draw(BLANKS) + item + draw(BLANKS) for item in items)
    return "[" + text + ("," if items and draw(st.booleans()) else "") + draw(BLANKS) + "]"


@st.composite
def inline_tables(draw, values):
    names = draw(st.lists(BARE, max_size=3, unique=True))
    pairs = [draw(keys(name)) + draw(SPACES) + "=" + draw(SPACES) + draw(values) for name in names]
    return "{" + ",".join(draw(SPACES) + pair + draw(SPACES) for pair in pairs) + "}"


VALUES = st.recursive(strings() | SCALARS, lambda v: arrays(v) | inline_tables(v), max_leaves=5)


@st.composite
def keys(draw, name):
    """``name`` as a bare or quoted key, sometimes with a dotted tail that makes it a table."""
    head = draw(st.sampled_from([name, f'"{name}"', f"'{name}'"]))
    if draw(st.integers(0, 3)):
        return head
    tail = draw(BARE | WORDS.map(basic))
    return head + draw(SPACES) + "." + draw(SPACES) + tail


@st.composite
def bodies(draw):
    """Key/value lines of one table, with unlike names, so that no key comes twice."""
    lines = []
    for name in draw(st.lists(BARE, max_size=4, unique=True)):
        value = draw(VALUES)
        comment = draw(st.sampled_from(["", " # comment", "\n\n# [no.header]"]))
        lines.append(
            draw(SPACES) + draw(keys(name)) + draw(SPACES) + "=" + draw(SPACES) + value + comment + "\n"
        )
    return "".join(lines)


@st.composite
def documents(draw):
    """A whole document. Table names carry their number, so that headers never collide with keys."""
    text = draw(bodies())
    for number in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["table", "dotted", "array"]))
        name = f"table {number}"
        space = draw(SPACES)
        if kind == "table":
            text += f"[{space}{basic(name)}{space}]\n" + draw(bodies())
        elif kind == "dotted":
            text += f"[{basic(name)}{space}.{space}'in ner'.deep] # [[not]]\n" + draw(bodies())
        else:
            for _ in range(draw(st.integers(1, 3))):
                text += f"[[{space}{basic(name)}{space}]]\n" + draw(bodies())
                if draw(st.booleans()):
                    text += f"[{basic(name)}.'sub table']\n" + draw(bodies())
                for _ in range(draw(st.integers(0, 2))):
                    text += f"[[{basic(name)}.'sub array']]\n" + draw(bodies())
    return text.replace("\n", "\r\n") if draw(st.booleans()) else text
