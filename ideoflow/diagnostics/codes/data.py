"""Codes of pictures, datasets and caches."""

from ideoflow.diagnostics.codes import define

EMPTY_DATASET = define(
    "ID001",
    "no pictures",
    """
    The folder in `data.images` holds no file with a picture's suffix, not even in its sub-folders, so there
    is nothing to train on.
    """,
)
BAD_PICTURE = define(
    "ID002",
    "a picture cannot be read",
    """
    The file has a picture's suffix, but its content is damaged, cut short, of an unknown kind, or so large
    that decoding it could fill the memory. Training goes on only when every picture is good: a picture that
    is silently left out changes what is learnt. What was already encoded stays in the cache.
    """,
)
NO_CAPTION = define(
    "ID003",
    "a picture has no caption",
    """
    With `caption = "sidecar"`, each picture needs PICTURE.icap, PICTURE.json or PICTURE.txt beside it, or an
    entry under its name in `captions.icap` of its folder. To train every picture on the same words, set
    `caption = "instance"` and `instance_prompt`.
    """,
)
NO_PICTURE = define(
    "ID004",
    "a caption has no picture",
    """
    A caption file lies in the dataset whose picture is not there. Nothing is trained from it; perhaps a
    picture was renamed or lost.
    """,
    "warning",
)
NOT_JSON = define(
    "ID005",
    "plain-text caption",
    """
    With `wrap = false`, every caption must be `.icap` or Ideogram JSON. With `wrap = true`, the default,
    plain text becomes a valid caption without inventing a style.
    """,
)
UPSCALED = define(
    "ID006",
    "a picture is enlarged",
    """
    The picture is smaller than the size it is trained at by more than `data.upscale_limit`, so the model
    learns from interpolated, soft pixels.
    """,
    "warning",
)
CACHE_UNWRITABLE = define(
    "ID007",
    "the cache cannot be written",
    """
    Encoded pictures and captions are kept in `cache.folder`, by default in the user's cache folder
    (`$IDEOFLOW_CACHE`, else `~/.cache/ideoflow`). It is full or may not be written. Nothing that was cached
    before is lost. `ideoflow cache stats` shows what is there, `ideoflow cache prune` makes room.
    """,
)
CACHE_LOST = define(
    "ID008",
    "a cached file is gone or damaged",
    """
    An encoded picture or caption was there when the run began and cannot be read now: something removed or
    changed files in the cache folder while it was in use, or the disk gave back other bytes than were
    written. Run again: what is missing is encoded anew. `ideoflow cache verify` checks everything.
    """,
)
