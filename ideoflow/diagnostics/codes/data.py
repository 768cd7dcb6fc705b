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
BAD_LIST = define(
    "ID020",
    "a list or shard of pictures cannot be used",
    """
    `data.images` names a list (`.jsonl`, `.csv`, `.parquet`) or a WebDataset shard (`.tar`), and the file, a
    row of it or a column is not as expected. A list needs a column of paths (relative to the list itself) or,
    in parquet, of the pictures' bytes, and one of captions: `data.image_column` and `data.caption_column` are
    for those that are not called as usual (`image`, `file_name`, `image_path`; `caption`, `text`, `prompt`).
    Shards are plain, uncompressed tar files, so that each picture can be read without those before it.
    """,
)
NO_HUB_DATASET = define(
    "ID021",
    "no such data set on the hub",
    """
    `data.images = "hf://datasets/OWNER/NAME"` is downloaded once into Hugging Face's cache and read from
    there. `OWNER/NAME@REVISION` pins a version, and `OWNER/NAME/data/train-*.parquet` takes only those files.
    Private data sets need `hf auth login`.
    """,
)
LEFT_OUT = define(
    "ID022",
    "pictures were left out for their size",
    """
    Pictures below `data.minimum_image_size` are not trained. The size is measured as `data.resolution_type`
    says: with `pixel_area` as the side of a square of the picture's area, with `pixel` as its shorter side.
    """,
    "warning",
)
NOT_MIRRORED = define(
    "ID023",
    "pictures are not mirrored",
    """
    With `data.flip = true`, half of the visits of a picture train its mirror image. That is never right where
    the caption holds text, which would be read backwards, or words such as "left", which would be untrue.
    Those pictures are trained as they are.
    """,
    "note",
)
NOT_READ = define(
    "ID024",
    "pictures of a kind that is not read",
    """
    Some files of the source are pictures by their suffix, such as `.heic` of a telephone or the raw files of
    a camera, and of a kind that is not read. They are left out of training; make JPEG, PNG or WebP of them,
    or take them away.
    """,
    "warning",
)
