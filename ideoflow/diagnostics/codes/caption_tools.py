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
NO_INPUT = define("IC710", "nothing to read", """
    The path does not exist, or a folder holds no caption file. Caption files are `.icap`, `.json`, `.txt`,
    `.caption`, `.jsonl`, `.parquet` and `metadata.csv`; pictures alone are not captions.
    """)  # fmt: skip
UNREADABLE = define("IC711", "file cannot be read", """
    The operating system refused the file, or its bytes are not UTF-8 text. Captions are read as UTF-8 only:
    guessing another encoding would put wrong characters into the model's text. Convert it first, for example
    with `iconv -f windows-1252 -t utf-8`.
    """)  # fmt: skip
UNKNOWN_KIND = define("IC712", "not a kind of caption file", """
    The file's ending is not one that captions come in: `.icap`, `.json`, `.txt`, `.caption`, `.jsonl`,
    `.parquet`, `.csv`. Also said of a `.json` file that holds neither a caption nor a collection of them.
    """)  # fmt: skip
NO_COLUMN = define("IC713", "no column with captions", """
    A record has no key that is known to hold a caption (`caption`, `text`, `prompt`), or several of them.
    Name the one that is meant: `--column cogvlm_caption`. The picture's name comes from `file_name`,
    `image_path`, `image`, `filename`, `path`, `key` or `id`, in this order; `--name-column` overrides it.
    """)  # fmt: skip
NO_PICTURE = define("IC714", "caption without a picture", """
    In a folder with pictures, a text file has no picture of the same name beside it, so it is probably a note
    and not a caption. It is left out. For `--to hf-imagefolder` a caption without a picture is an error,
    since the folder would then not load.
    """, severity="warning")  # fmt: skip
CAPTIONED_TWICE = define("IC715", "picture with two caption files", """
    A picture has several caption files beside it, such as `boat.icap` and `boat.txt`. One is used, in the
    order `.icap`, `.json`, `.txt`, `.caption`; the others are left out. Move them elsewhere to be rid of the
    warning.
    """, severity="warning")  # fmt: skip
SAME_OUTPUT = define("IC716", "two captions for one output file", """
    Two different captions would be written to the same file, for example because two folders were given that
    both hold `001.txt`. The first is kept. Convert the folders one by one, or give their common parent, or
    write one `.jsonl`, which can hold both.
    """)  # fmt: skip
BAD_RECORD = define("IC717", "record is not a JSON object", """
    A line of a `.jsonl` file must be one JSON object (or a JSON string that is a caption). A pretty-printed
    object over several lines is a `.json` file: rename it.
    """)  # fmt: skip
NO_PYARROW = define("IC718", "parquet needs pyarrow", """
    `.parquet` files are read with pyarrow, which is not installed with ideoflow, as most people never need
    it: `pip install 'ideoflow[parquet]'`.
    """)  # fmt: skip
OUTPUT_EXISTS = define("IC720", "output exists already", """
    The output file exists and was not written by an interrupted conversion of the same input, which would be
    resumed. Nothing is overwritten without your word: give another `-o`, or `--force`.
    """)  # fmt: skip
STARTED_OVER = define("IC721", "input changed since the interrupted run", """
    An interrupted conversion was found, but its options or the files that it had already read have changed
    since. To go on would mix two versions, so the conversion started from the beginning.
    """, severity="note")  # fmt: skip
BAD_NAME = define("IC722", "unusable picture name", """
    A record names its picture by a path that leads out of the data set (`../`), or is empty, or has
    characters that no file can have. Nothing is ever written outside the output folder.
    """)  # fmt: skip
WORKER_DIED = define("IC723", "a worker process died", """
    A worker was killed by the system, most often for memory. What was finished is kept: run the same command
    again and it goes on, with `--jobs 1` if it happens again.
    """)  # fmt: skip
TRIGGER_PLACED = define("IC724", "trigger word added to the description", """
    The caption did not have the trigger word, so it was put at the start of `high_level_description`, inside
    the JSON. Text in front of the `{` would break the caption: the model was trained on JSON that starts with
    a brace. Write `[trigger]` or `<trigger>` in a caption to say exactly where the word belongs.
    """, severity="note")  # fmt: skip
BAD_PICTURE = define("IC730", "picture cannot be shown", """
    A picture of the preview is broken or of a kind that Pillow cannot read. The caption is shown without it.
    """, severity="warning")  # fmt: skip
NO_TOKENIZER = define("IC740", "tokenizer cannot be read", """
    `--tokenizer` takes the base model's tokenizer: a `tokenizer.json`, the folder that holds one, or the
    folder of the whole base (its `tokenizer/` is then used). Without it, lengths are in characters and
    words only: an estimate in tokens would be wrong by tens of percent.
    """)  # fmt: skip
TOO_LONG = define("IC741", "caption longer than the model reads", """
    The caption, in the chat template, has more tokens than the model was trained to read (2048). Training
    stops at such a caption rather than cut it: shorten descriptions, drop small elements.
    """, severity="warning")  # fmt: skip
NO_PYGLS = define("IC750", "the editor server needs pygls", """
    `captions lsp` speaks the Language Server Protocol through pygls, which is an extra:
    `pip install 'ideoflow[editor]'`.
    """)  # fmt: skip
BAD_PLACEHOLDER = define("IC725", "not NAME=VALUE", """
    `--set` gives a placeholder its value: `--set token=sks` puts `sks` wherever a caption has `<token>`.
    The name is a word; the value may be anything, also with spaces if the shell sees it quoted.
    """)  # fmt: skip
TEXT_BEFORE_JSON = define("IC726", "text in front of a JSON caption", """
    A caption is JSON, but something stands in front of its `{`, most often a trigger word that another
    trainer put there. The model was trained on captions that begin with a brace, and whether the word means
    the subject or the style cannot be seen. `--trigger WORD` with this very word takes it off and puts it
    inside the JSON.
    """)  # fmt: skip
