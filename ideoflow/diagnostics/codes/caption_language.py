"""Codes of the caption language: lines (IC1xx), boxes and colours (IC2xx), names and files (IC3xx)."""

from ideoflow.diagnostics.codes import define

NOT_UNDERSTOOD = define(
    "IC100",
    "a line is not understood",
    """
    The line is none of the statements of the caption language: `key: prose`, `obj ...: prose`,
    `text ... "WORDS": prose`, `style: name`, `palette: colours`, `size: WxH`, or the first line of a block
    (`style name`, `defaults`, `image name`). The message says what was expected at the caret.""",
)

TAB = define(
    "IC101",
    "tab in the indentation",
    """
    Indentation decides which lines belong together, and a tab has no width of its own: two editors show the
    same file in two shapes. Indent with spaces; `ideoflow captions fmt` does it.""",
)

INDENTATION = define(
    "IC102",
    "indentation fits no line above",
    """
    Lines of one block begin in the same column; a line indented deeper continues the prose above it. A line
    in between belongs to neither, and guessing would move words into the wrong place.""",
)

MISSING_COLON = define(
    "IC104",
    "a colon is missing",
    """
    Between a key and its prose, and between an element's box and its description, stands a colon:

        background: A wide lake.
        obj y380..660 x590..720: A sailboat.

    A description of the whole image that begins with such a word is written with its key:
    `description: photo of a dog`.""",
)

UNKNOWN_KEY = define(
    "IC105",
    "unknown key",
    """
    A line that begins with a word and a colon is a statement, and this word is none of the keys:
    description, aesthetics, lighting, photo, art_style, medium, palette, style, background, size.
    Where the line is prose, write the key it belongs to in front: `description: Portrait: a woman`.""",
)

UNQUOTED_WORDS = define(
    "IC106",
    "the words of a text element are not quoted",
    """
    What is written in the image is given character by character, so it stands in straight double quotes,
    in front of the colon: `text y40..120 x80..920 "STILL WATER": Thin headline.` Inside, `\\n` is a line
    break, `\\"` a quote and `\\\\` a backslash.""",
)

UNCLOSED_QUOTE = define(
    "IC107",
    "a quote is not closed",
    """
    A value that begins with a double quote ends with one, on the same line or on its continuation lines.
    Inside, a quote is written `\\"` and a line break `\\n`.""",
)

SMART_QUOTES = define(
    "IC108",
    "typographic quotes around words",
    """
    Word processors turn straight quotes into curly ones. Verbatim words stand in straight double quotes
    (`"`), since the curly ones are themselves characters that an image can show.""",
)

PASTED_JSON = define(
    "IC109",
    "JSON in a caption file",
    """
    The file holds JSON, not the caption language. Name it .json, or turn it into the caption language with
    `ideoflow captions decompile`.""",
)

SWALLOWED = define(
    "IC110",
    "a statement is indented into the prose above it",
    """
    A line indented deeper than the statement above continues that statement's prose. This one reads like a
    statement of its own, and would silently become part of the prose. Move it to the column of the lines
    around it; where it really is prose, break the line at another word or quote the whole value.""",
)

REPEATED = define(
    "IC111",
    "a key is given twice",
    """
    Each key stands once in a caption and once in a style. One of the two is surely a leftover.""",
)

PHOTO_AND_ART = define(
    "IC112",
    "both photo and art_style",
    """
    A style is either a photograph (`photo: 35mm film still`) or something made (`art_style: flat vector`).
    The model was trained with exactly one of the two, and their places in the JSON differ. A caption may
    name the other kind than the style or the defaults it takes over: the nearer one wins.""",
)

CONTROL_CHARACTER = define(
    "IC114",
    "a character that does not belong in text",
    """
    Control characters (NUL and the like), lone carriage returns and half surrogates are not text. They
    usually come from a wrong encoding. Inside quotes a control character can be written `\\u0007`.""",
)

NOT_UTF8 = define(
    "IC115",
    "the file is not UTF-8",
    """
    Caption files are UTF-8. Convert the file: `iconv -f WINDOWS-1252 -t UTF-8 old > new`, or save it as
    UTF-8 from the editor. UTF-16 files are recognised and named in the message.""",
)

BAD_ESCAPE = define(
    "IC117",
    "unknown escape",
    r"""
    Inside quotes a backslash begins one of JSON's escapes: `\n`, `\t`, `\"`, `\\`, `\/`, `\b`, `\f`,
    `\r`, or `\u` with four hexadecimal digits. A backslash itself is `\\`.""",
)

MISPLACED = define(
    "IC118",
    "a statement does not belong here",
    """
    A style holds aesthetics, lighting, photo or art_style, medium, palette, and a style to start from.
    Defaults hold these and description, background and size. Elements (`obj`, `text`) belong to an image;
    `use`, `defaults`, `style NAME` and `image NAME` begin in the first column.""",
)

HEADER_COLON = define(
    "IC119",
    "a block's first line takes no colon",
    """
    `style dusk-film`, `image sailboat.jpg` and `defaults` begin a block and have no colon; its lines stand
    below, indented. With a colon, `style: dusk-film` is the line that uses a style.""",
)

EMPTY_VALUE = define(
    "IC120",
    "nothing behind the colon",
    """
    A key without a value is more often a slip than a wish. An empty value is written as an empty pair of
    quotes: `background: ""`.""",
)

MIXED_FILE = define(
    "IC121",
    "caption lines beside image blocks",
    """
    A file is either the caption of one image (a sidecar) or holds blocks, `image NAME`, for many. Lines
    that stand outside the blocks belong to no image. What all images share goes under `defaults`.""",
)

EMPTY_BLOCK = define(
    "IC122",
    "nothing below a block's first line",
    """
    `style NAME`, `defaults` and `image NAME` are followed by lines that are indented. A caption that begins
    with one of these words is written with its key: `description: image of a dog`.""",
)

NO_BACKGROUND = define("IC123", "a caption has no background", """
    The caption format requires a background. Where none is written the compiled caption holds an empty
    one. Describe what is behind the elements; `background: ""` says that it is left out on purpose.""",
    severity="warning")  # fmt: skip

NO_CAPTION = define("IC124", "the file holds no caption", """
    The file is empty, or has nothing but comments. (A file that only defines styles or palettes, to be
    taken over with `use`, is fine.)""", severity="warning")  # fmt: skip

FORMATTER_DISAGREES = define(
    "IC125",
    "the formatter would have changed the caption",
    """
    The formatter reads its own output again and compares: same tree, same comments, and nothing left to
    format. Here the two differ, so nothing was written. This is a bug of ideoflow; please report the
    file.""",
)

COMPILED_AGAINST_RULES = define(
    "IC126",
    "a caption was compiled against the rules",
    """
    Everything that is compiled is checked against the rules of the caption format before it is used. This
    caption failed, so it was left out. This is a bug of ideoflow; please report the file.""",
)

PASTED_BOX = define(
    "IC201",
    "a box pasted from JSON",
    """
    Four bare numbers do not say which is x and which is y, and the order of Ideogram's boxes,
    `[y_min, x_min, y_max, x_max]`, is the one that everybody gets wrong. Here the axes are named:
    `[380, 590, 660, 720]` is `y380..660 x590..720`.""",
)

ONE_AXIS = define(
    "IC202",
    "a box with one axis",
    """
    A box has two sides: `y380..660 x590..720`. For the full width write `x0..1000`; a region such as
    `left-third` or `bottom-half` names both sides by itself.""",
)

AXIS_TWICE = define(
    "IC203",
    "an axis is given twice",
    """
    Each axis stands once. Usually one of the two should have been the other letter.""",
)

REVERSED_RANGE = define(
    "IC204",
    "a range runs backwards",
    """
    `y380..660` runs from the smaller to the larger number; y grows downwards, x to the right.""",
)

OUT_OF_RANGE = define(
    "IC205",
    "a box reaches out of the image",
    """
    Coordinates without a unit run from 0 to 1000, percent from 0 to 100, pixels from 0 to the size of the
    image, origin top left. Whole numbers, unless they are percent.""",
)

NO_IMAGE_SIZE = define(
    "IC206",
    "pixels without an image size",
    """
    Pixel coordinates mean something only together with the size of the image that they were measured on.
    Compile next to the image, or say the size: `size: 1536x1024` (width x height).""",
)

PLACE_WITHOUT_SIZE = define(
    "IC207",
    "a place and a size must come together",
    """
    `center` alone does not say how large the box is, and `w40% h30%` alone not where. Write
    `center w40% h30%`. Regions such as `left-third` or `top-half` have their size by themselves.""",
)

BAD_BOX = define(
    "IC208",
    "not a box",
    """
    A box is written `y380..660 x590..720` (0..1000), `y38%..66%`, `y120px..480px`, `center w40% h30%`, or
    as a region: full, left-half, right-half, top-half, bottom-half, left-third, center-third, right-third,
    top-third, middle-third, bottom-third.""",
)

BAD_SIZE = define(
    "IC209",
    "an image size that cannot be",
    """
    `size: WIDTHxHEIGHT` tells on what picture pixel boxes were measured: in pixels, both from 1 to 65536, as
    in `size: 1536x1024`. Boxes in 0..1000 or in per cent need no size.""",
)

BAD_COLOUR = define(
    "IC251",
    "not a colour",
    """
    Colours are written `#RRGGBB`, six hexadecimal digits: `#FFF` is `#FFFFFF`. A named palette is written
    `@name`.""",
)

COLOUR_IN_PROSE = define("IC253", "a colour at the end of prose", """
    What stands behind the colon is prose, to the last character, so this colour is read as a word of the
    description and not as the palette. An element's colours stand in front of the colon:
    `obj y380..660 x590..720 #5B3A1E: Lone wooden sailboat`; an image's stand on a line `palette: #1B3A5C`.
    Where the code is meant as a word, quote the whole value.""", severity="warning")  # fmt: skip

TOO_MANY_COLOURS = define(
    "IC252",
    "too many colours",
    """
    The caption format takes at most 16 colours for the style and 5 for an element. Keep those that cover
    the most area.""",
)

UNKNOWN_STYLE = define(
    "IC301",
    "unknown style",
    """
    `style: NAME` refers to a block `style NAME` of this file, or of a file that it takes over with `use`.""",
)

UNKNOWN_PALETTE = define(
    "IC302",
    "unknown palette",
    """
    `@NAME` refers to a line `palette NAME: colours` of this file, or of a file taken over with `use`.""",
)

STYLE_CYCLE = define(
    "IC303",
    "styles that start from each other",
    """
    A style may start from another (`style: other` inside its block), but not, by any way round, from
    itself.""",
)

USE_CYCLE = define(
    "IC304",
    "files that use each other in a circle",
    """
    `use` takes over the styles and palettes of another file, and of the files used there. Move what both
    need into a third file.""",
)

CANNOT_USE = define(
    "IC305",
    "a used file cannot be read",
    """
    `use PATH` is relative to the file that it stands in. The message says why it could not be read.""",
)

SAME_IMAGE = define(
    "IC306",
    "two captions for one image",
    """
    Each image has one caption; of two, the trainer could only ignore one.""",
)

SAME_NAME = define(
    "IC307",
    "a name is defined twice",
    """
    Two styles, or two palettes, of one name, in this file or through `use`: which one is meant?""",
)

UNKNOWN_PLACEHOLDER = define(
    "IC308",
    "unknown placeholder",
    """
    `<name>` in prose stands for a word that the recipe fills in, under `[captions.placeholders]`. This
    name is not among them, so the model would learn the angle brackets themselves. Where they are meant,
    define a placeholder that has them as its value.""",
)

INCOMPLETE_STYLE = define(
    "IC309",
    "a style lacks a part",
    """
    A style is complete with aesthetics, lighting, medium, and one of photo and art_style: the caption
    format requires all of them. A caption without any style is allowed.""",
)

USED_FILE_HAS_ERRORS = define(
    "IC310",
    "a used file has errors",
    """
    The file taken over with `use` is itself wrong; its own diagnostics follow.""",
)

USED_FILE_HAS_CAPTIONS = define("IC311", "a used file holds captions", """
    `use` takes over styles and palettes only. Captions and defaults of the other file stay there, so a
    file made to be used holds none.""", severity="warning")  # fmt: skip
