"""Codes of JSON captions: reading and repair (IC4xx), the official rules (IC5xx), checks of sense (IC6xx)."""

from ideoflow.diagnostics.codes import define

NOT_JSON = define(
    "IC401",
    "not valid JSON",
    """
    The caption begins like JSON but is not. Nothing is guessed: a caption that was cut or edited by hand
    may have lost words. The caret stands where reading stopped.""",
)

DUPLICATE_KEY = define(
    "IC402",
    "a key stands twice in one object",
    """
    JSON readers differ in which of the two they keep. Delete one. (Two equal values are merged and
    reported.)""",
)

NOT_A_NUMBER = define(
    "IC403",
    "a number that JSON does not have",
    """
    NaN, Infinity and -Infinity are no JSON. A coordinate that is not a number must be measured again.""",
)

HALF_SURROGATE = define(
    "IC404",
    "half a character",
    """
    A `\\ud83d` without its other half is no character and cannot be written as UTF-8. The text was cut in
    the middle of a character, usually an emoji.""",
)

TOO_DEEP = define(
    "IC405",
    "nested too deep",
    """
    A caption nests five levels deep. Input that nests further than 32 is no caption.""",
)

NOT_A_CAPTION = define(
    "IC406",
    "JSON, but not a caption",
    """
    A caption is a JSON object with the key `compositional_deconstruction`. Lists of captions belong in a
    .jsonl file, one on a line.""",
)

REPAIRED_ORDER = define("IC410", "keys were put in order", """
    The model was trained with one order of keys, and the order is part of the text that it reads. No word
    was changed.""", severity="note")  # fmt: skip

REPAIRED_COLOUR = define("IC411", "colours were written in capitals", """
    `#1b3a5c` became `#1B3A5C`, `#FFF` became `#FFFFFF`: the same colour, as the model saw it in
    training.""", severity="note")  # fmt: skip

REPAIRED_KEY = define("IC412", "a key was renamed", """
    A known misspelling of a key (`colour_palette`, `description` in an element, `bounding_box`) was
    replaced. No value was changed.""", severity="note")  # fmt: skip

REPAIRED_LAYOUT = define("IC413", "the layout of the JSON was undone", """
    Pretty printing, a byte order mark, a Markdown fence, or escapes of characters that need none: removed,
    since captions are learned on one line. No word was changed.""", severity="note")  # fmt: skip

REPAIRED_NUMBER = define("IC414", "numbers were written as integers", """
    `380.0` and `"380"` became `380`. Numbers with a fraction are reported, not rounded.""",
    severity="note")  # fmt: skip

REPAIRED_EMPTY = define("IC415", "an empty part was left out", """
    An optional part that was null, or a palette without colours, carries nothing and was left out.""",
    severity="note")  # fmt: skip

REPAIRED_TYPE = define("IC416", "an element's type was renamed", """
    `object` became `obj`, the name that the model was trained with. Nothing is lost by it;
    `ideoflow captions compile` writes the file in good form.""", severity="note")  # fmt: skip

AMBIGUOUS = define(
    "IC420",
    "could be repaired in more than one way",
    """
    The caption breaks a rule, and more than one repair is possible, so none is made: a wrong guess would
    teach the model something that nobody wrote. The message says what the choices are.""",
)

UNKNOWN_MEMBER = define(
    "IC501",
    "a key that captions do not have",
    """
    The model was trained on captions with a fixed set of keys. What is new to it belongs in the prose of
    a description; a key such as `aspect_ratio` that is no part of the caption is deleted.""",
)

MISSING_MEMBER = define(
    "IC502",
    "a required key is missing",
    """
    Required: `compositional_deconstruction` with `background` and `elements`; in a style `aesthetics`,
    `lighting`, `medium` and one of `photo` and `art_style`; in an element `type` and `desc`, and `text`
    in a text element. `style_description` as a whole and `high_level_description` are optional.""",
)

WRONG_TYPE = define(
    "IC503",
    "a value of the wrong kind",
    """
    Descriptions and texts are strings, `elements` and palettes lists, coordinates whole numbers.""",
)

KEY_ORDER = define(
    "IC504",
    "keys out of order",
    """
    The order of keys is part of the text that the model reads, and it was trained with one:
    high_level_description, style_description, compositional_deconstruction; aesthetics, lighting, photo,
    medium, color_palette for photographs and aesthetics, lighting, medium, art_style, color_palette
    otherwise; background, elements; type, bbox, text, desc, color_palette.""",
)

STYLE_KIND = define(
    "IC505",
    "neither or both of photo and art_style",
    """
    A style has exactly one of `photo` and `art_style`. Which one to delete, or what to write, only the
    author knows.""",
)

PALETTE = define(
    "IC506",
    "a palette against the rules",
    """
    At least one colour and at most 16 in a style, 5 in an element; each `#RRGGBB` with capital letters.""",
)

BBOX = define(
    "IC507",
    "a box against the rules",
    """
    `bbox` is `[y_min, x_min, y_max, x_max]`: four whole numbers from 0 to 1000, origin top left, each
    minimum not above its maximum. The order is y first: many captions have it the other way round, which
    no rule can see but IC602 and IC603 try.""",
)

ELEMENT_TYPE = define(
    "IC508",
    "an element of unknown type",
    """
    `type` is `obj` or `text`: the model was trained with no others. What shows words is a `text`, with the
    words under its `text` key; everything else is an `obj`.""",
)

ZERO_AREA = define("IC601", "a box without area", """
    The box's sides coincide: it covers nothing, so the model learns that the element is nowhere. Usually
    two numbers were mixed up, or a tiny box was rounded away.""", severity="warning")  # fmt: skip

SWAPPED_BOX = define("IC602", "a box that looks swapped", """
    The words say tall and the box is wide, or the other way round, and with x and y exchanged it would
    fit. Boxes are `[y_min, x_min, y_max, x_max]`. If the whole set is swapped, convert it with
    `ideoflow captions compile --boxes xyxy`.""", severity="warning")  # fmt: skip

WORDS_AGAINST_BOX = define("IC603", "the words and the box disagree", """
    The description says left, right, top or bottom (of the image), and the box lies on the other side.
    One of the two is wrong; if many captions show this, the boxes are probably stored as
    `[x_min, y_min, x_max, y_max]`.""", severity="warning")  # fmt: skip

SAME_TEXT = define("IC604", "the same text twice", """
    Two text elements hold the same words in the same place or without a box. The model learns to write
    the words twice.""", severity="warning")  # fmt: skip

TEXT_WITHOUT_WORDS = define("IC605", "a text element without its words", """
    `text` is empty. The words in the image must be given, character by character, for the model to learn
    to write; a text that cannot be read is better described as an `obj`.""", severity="warning")  # fmt: skip

TOO_LONG = define(
    "IC606",
    "a caption longer than the model reads",
    """
    The model reads at most 2048 tokens, the chat template included. A longer caption is an error in
    training, never cut silently. Shorten the descriptions, or leave out minor elements.""",
)

COLOUR_NOT_IN_IMAGE = define("IC607", "a palette colour that the image does not have", """
    No part of the image comes near this colour (nearest distance above 0.15 in OKLab). A palette teaches
    colours only where the image shows them.""", severity="warning")  # fmt: skip

BACKGROUND_AS_ELEMENT = define("IC608", "ground or sky as an element", """
    Ground, sky, walls and water that fill the image behind everything belong in `background`; elements
    are what stands in front. This element names such a surface and covers most of the image, or has no
    box.""", severity="warning")  # fmt: skip

LONG_DESCRIPTION = define("IC609", "a description of more than 50 words", """
    Element descriptions in the model's training captions are short. Beyond about 50 words the details
    compete; describe a complex thing as several elements.""", severity="warning")  # fmt: skip

UNUSED_PLACEHOLDER = define("IC610", "a placeholder is never used", """
    The recipe defines a placeholder, and no caption has it: the word that should carry what is learned
    never reaches the model. Write `<name>` where the subject is named in the prose.""",
    severity="warning")  # fmt: skip

EMPTY_BACKGROUND = define("IC611", "the background is empty", """
    The background says nothing. The caption is valid, and plain text captions are wrapped like this, but
    a described background trains better.""", severity="note")  # fmt: skip

EMPTY_DESCRIPTION = define("IC612", "an element without a description", """
    `desc` is empty, so the box teaches nothing but itself. Say in a few words what stands there, or take the
    element out.""", severity="warning")  # fmt: skip
