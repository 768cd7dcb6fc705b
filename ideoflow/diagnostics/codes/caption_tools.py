"""Codes of the caption tools: geometry, conversion, preview, statistics, editor (IC700-IC799)."""

from ideoflow.diagnostics.codes import define

ELEMENT_DROPPED = define("IC701", "element dropped: outside the crop", """
    A crop left too little of an element in the picture, so the element was taken out of the caption. To keep
    it would teach the model to paint what is not there.

    An element stays when at least a quarter of its box is still visible (`min_visible`); its box is then
    clipped to the picture. Elements without a box always stay, since nobody can say where they were.
    """, severity="warning")  # fmt: skip
TEXT_CUT = define("IC702", "text element dropped: the crop cuts its words", """
    A text element promises every character of its `text`. A crop that cuts off part of the box leaves
    `STILL WA` in the picture where the caption says `STILL WATER`, so text elements need nine tenths of their
    box to be visible (`min_visible_text`), and are dropped otherwise.

    Where this is frequent, add buckets with more shapes, so that less is cropped, or turn random crops off.
    """, severity="warning")  # fmt: skip
MIRROR_REFUSED = define("IC703", "flip or rotation contradicts the caption", """
    The picture was to be mirrored or rotated, but the caption has words that would then be wrong: a text
    element (its letters would be mirrored), quoted words inside a description, or `left`, `right`,
    `clockwise` (for rotations also `top`, `bottom`, `above`, `below`).

    Boxes can be remapped, words cannot. Turn flips off for this set, or force the flip if you know that
    the words do not matter here; a forced flip is reported as a warning.
    """)  # fmt: skip
