"""Hypothesis strategies: canonical captions, syntax trees, and text that is nearly a caption file."""

from hypothesis import strategies as st

from ideoflow.captions.nodes import (
    Block,
    Colour,
    Document,
    Element,
    Field,
    Mark,
    PaletteBlock,
    PaletteLine,
    SizeLine,
    StyleLine,
    Use,
)
from ideoflow.captions.parser import normalised
from ideoflow.captions.regions import PLACES, REGIONS

# Pieces that the language gives a meaning to, so that prose made of them is as awkward as prose can be.
AWKWARD = [
    *("obj", "text", "style", "image", "use", "palette", "background:", "background", "#", "#1B3A5C", "#FFF"),
    *("@dusk", ":", "<", "{", "<token>", "y380..660", "a"),
    *("description: x", "obj y1..2 x3..4:", "# note", '"', '"quoted"', "[380, 590, 660, 720]", "“STILL”"),
    *(" ", "  ", "\t", "\n", "\r", "\r\n", "\0", "\x7f", "\x85", "\u2028", "\ufeff", "\xa0", "\u3000"),
    *("\\", "\\n", "夕暮れ", "غروب", "🎞️", "e\u0301"),
]
words = st.lists(st.sampled_from(AWKWARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
                 max_size=8)  # fmt: skip
sentence = st.lists(st.sampled_from(["a", "boat", "obj", "text", "#1", "lake:", "background:", "with",
                                     "y1..2", "sail"]), min_size=15, max_size=60).map(" ".join)  # fmt: skip
prose = st.one_of(words.map("".join), words.map(" ".join), sentence)
colours = st.integers(0, 0xFFFFFF).map(lambda n: f"#{n:06X}")


@st.composite
def boxes(draw):
    y, x = (sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2))) for _ in "yx")
    return [y[0], x[0], y[1], x[1]]


@st.composite
def styles(draw):
    photo = draw(st.booleans())
    keys = (
        ["aesthetics", "lighting", "photo", "medium"]
        if photo
        else ["aesthetics", "lighting", "medium", "art_style"]
    )
    style = {key: draw(prose) for key in keys}
    if draw(st.booleans()):
        style["color_palette"] = draw(st.lists(colours, min_size=1, max_size=16))
    return style


@st.composite
def json_elements(draw):
    kind = draw(st.sampled_from(["obj", "text"]))
    element = {"type": kind}
    if draw(st.booleans()):
        element["bbox"] = draw(boxes())
    if kind == "text":
        element["text"] = draw(prose)
    element["desc"] = draw(prose)
    if draw(st.booleans()):
        element["color_palette"] = draw(st.lists(colours, min_size=1, max_size=5))
    return element


@st.composite
def json_captions(draw):
    caption = {}
    if draw(st.booleans()):
        caption["high_level_description"] = draw(prose)
    if draw(st.booleans()):
        caption["style_description"] = draw(styles())
    caption["compositional_deconstruction"] = {
        "background": draw(prose),
        "elements": draw(st.lists(json_elements(), max_size=4)),
    }
    return caption


# Trees ----------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-zé][\w.-]{0,8}", fullmatch=True)
comments = st.lists(
    st.sampled_from(["", "# a note", "#", "## obj y1..2: no", "# #1B3A5C", "#!"]), max_size=3
).map(lambda lines: tuple(line for i, line in enumerate(lines) if line or not i or lines[i - 1]))
numbers = st.integers(0, 2000).map(str)
measures = st.one_of(numbers, numbers.map(lambda n: n + "px"), st.tuples(numbers, numbers).map(
    lambda p: f"{p[0]}.{p[1].rstrip('0') or '5'}%"))  # fmt: skip
ranges = st.tuples(measures, measures).map("..".join)
palette_colours = st.lists((colours | names.map("@{}".format)).map(Colour), min_size=1, max_size=20).map(
    tuple
)
marks = st.one_of(
    st.builds(Mark, st.sampled_from("yx"), ranges),
    st.builds(Mark, st.sampled_from("hw"), measures),
    st.builds(Mark, st.just("place"), st.sampled_from([*PLACES, *REGIONS])),
    st.builds(Mark, st.just("colour"), colours | names.map("@{}".format)),
    st.builds(Mark, st.just("words"), prose),
)
ORDER = ["place", "y", "x", "h", "w", "colour", "words"]
sorted_marks = st.lists(marks, max_size=5).map(
    lambda m: tuple(sorted(m, key=lambda mark: ORDER.index(mark.kind)))
)
keys = st.sampled_from(
    ["description", "aesthetics", "lighting", "photo", "medium", "art_style", "background"]
)
statements = st.one_of(
    st.builds(Field, keys, prose, comments),
    st.builds(StyleLine, names, comments),
    st.builds(PaletteLine, palette_colours | st.just((Colour("none"),)), comments),
    st.builds(SizeLine, st.integers(0, 99999), st.integers(0, 99999), comments),
    st.builds(Element, st.sampled_from(["obj", "text"]), sorted_marks, prose, comments),
)
bodies = st.lists(statements, min_size=1, max_size=4).map(tuple)
paths = prose.filter(bool)
blocks = st.one_of(
    st.builds(Block, st.just("style"), names, bodies, comments, comments),
    st.builds(Block, st.just("defaults"), st.just(""), bodies, comments, comments),
    st.builds(Block, st.just("image"), paths, bodies, comments, comments),
)
items = st.one_of(
    statements,
    blocks,
    st.builds(Use, paths, comments),
    st.builds(PaletteBlock, names, palette_colours, comments),
)
documents = st.builds(Document, st.lists(items, max_size=4).map(tuple), comments).map(normalised)

# Raw text -------------------------------------------------------------------------------------------------

FRAGMENTS = r"""
style dusk
style dusk:
style: dusk
style:
image a.jpg
image
defaults
use x.icap
palette p: #123456
palette: #FFF red
obj y1..2 x3..4: boat
obj y1..2: boat
obj [1, 2, 3, 4]: boat
text "HI": sign
text HI: sign
text “HI”: sign
background: lake
background lake
background:
photo: film
art_style: flat
size: 10x20
obj center w40% h30%: x
obj left-third y9..1: x
foo: bar
A lake.
"unclosed
# note
{
}
"""
fragments = st.sampled_from([*FRAGMENTS.strip().split("\n"), "\0", "\r"])
indents = st.sampled_from(["", "", "  ", "    ", "\t", " "])
lines = st.tuples(indents, fragments | prose, st.sampled_from(["\n", "\r\n", "\n\n"])).map("".join)
raw_text = st.lists(lines, max_size=12).map("".join) | st.text(max_size=60)
