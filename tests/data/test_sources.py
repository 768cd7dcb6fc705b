"""Every kind of source gives the same pictures with the same captions as a plain folder of them."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from ideoflow.data.pixels import load_pixels
from ideoflow.data.survey import read_dataset
from ideoflow.diagnostics import IdeoflowError
from ideoflow.diagnostics.codes import data as codes
from ideoflow.diagnostics.codes import model as model_codes
from ideoflow.recipe import load_recipe

CAPTION = {
    "high_level_description": "A boat.",
    "compositional_deconstruction": {
        "background": "sea",
        "elements": [{"type": "obj", "bbox": [100, 250, 900, 750], "desc": "a boat"}],
    },
}
ICAP = "description: A hut.\nbackground: snow\n"
NAMES = ("a", "b.v2", "sub/c")
WORDS = {"a": json.dumps(CAPTION), "b.v2": "words, {of} prose", "sub/c": json.dumps(CAPTION, indent=1)}


@pytest.fixture
def project(tmp_path, picture):
    """A folder of three pictures with captions beside them."""
    for n, name in enumerate(NAMES):
        file = tmp_path / "plain" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(96 + n, 64, seed=n).save(file)
        file.with_suffix(".json" if WORDS[name][0] == "{" else ".txt").write_text(WORDS[name])
    return tmp_path


def dataset(project: Path, images: str, more: str = ""):
    recipe = project / "r.toml"
    data = f"[model]\nbase = 'nano'\n[data]\nimages = '{images}'\nresolution = 64\n{more}\n"
    recipe.write_text(data)
    return read_dataset(load_recipe(recipe))


def content(made):
    """What is trained: pixels and words, whatever they are called."""
    return [(load_pixels(s).numpy().tobytes(), s.captions) for s in made.samples]


def rows(project, **columns):
    """One record a picture, with its path and caption."""
    return [
        {"file_name": f"plain/{name}.png", "text": WORDS[name], **{k: v(name) for k, v in columns.items()}}
        for name in NAMES
    ]


def write_jsonl(project, name, records):
    (project / name).write_text("".join(json.dumps(r) + "\n" for r in records))


def write_parquet(project, name, records, **options):
    parquet.write_table(pyarrow.Table.from_pylist(records), project / name, **options)


def write_tar(project, name, members):
    with tarfile.open(project / name, "w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def picture_bytes(project, name):
    return (project / "plain" / f"{name}.png").read_bytes()


# The same through every door ------------------------------------------------------------------------------


def test_a_list_of_paths(project):
    expected = content(dataset(project, "plain"))
    records = rows(project)
    write_jsonl(project, "list.jsonl", records)
    write_parquet(project, "list.parquet", records)
    with (project / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(records)
    for suffix in ("jsonl", "parquet", "csv"):
        assert content(dataset(project, f"list.{suffix}")) == expected, suffix


def test_a_list_beside_its_pictures(project):
    """Paths begin in another folder than the list's, and may lack a suffix, as in SimpleTuner's tables."""
    expected = content(dataset(project, "plain"))
    (project / "tables").mkdir()
    plain = [{**r, "file_name": r["file_name"].removeprefix("plain/")} for r in rows(project)]
    bare = [{**r, "file_name": r["file_name"].removesuffix(".png")} for r in plain]
    for records in (plain, bare):
        write_jsonl(project, "tables/list.jsonl", records)
        write_parquet(project, "tables/list.parquet", records)
        for suffix in ("jsonl", "parquet"):
            assert content(dataset(project, f"tables/list.{suffix}", "image_folder = 'plain'")) == expected
    for images, beside, says in (("plain", "plain", "no list"), ("tables/list.jsonl", "gone", "no folder")):
        with pytest.raises(IdeoflowError, match=says):
            dataset(project, images, f"image_folder = '{beside}'")


def test_pictures_in_parquet(project):
    expected = content(dataset(project, "plain"))
    records = [
        {"image": {"bytes": picture_bytes(project, n), "path": f"{n}.png"}, "text": WORDS[n]} for n in NAMES
    ]
    write_parquet(project, "hf.parquet", records, row_group_size=2)
    bare = [{"image": picture_bytes(project, n), "my_words": WORDS[n]} for n in NAMES]
    write_parquet(project, "bare.parquet", bare, row_group_size=1)
    assert content(dataset(project, "hf.parquet")) == expected
    assert content(dataset(project, "bare.parquet", "caption_column = 'my_words'")) == expected
    named = dataset(project, "hf.parquet", "caption = 'filename'")
    assert [json.loads(s.caption)["high_level_description"] for s in named.samples] == ["a", "b.v2", "c"]


def test_shards(project):
    expected = content(dataset(project, "plain"))
    members = []
    for name in NAMES:
        suffix = ".json" if WORDS[name][0] == "{" else ".txt"
        members += [(f"{name}{suffix}", WORDS[name].encode()), (f"{name}.png", picture_bytes(project, name))]
    write_tar(project, "s-000.tar", members[:2])
    write_tar(project, "s-001.tar", members[2:])
    (project / "shards").mkdir()
    for n in (0, 1):
        (project / "shards" / f"s-{n}.tar").write_bytes((project / f"s-00{n}.tar").read_bytes())
    for images in ("s-*.tar", "s-{000..001}.tar", "s-00{0,1}.tar", "shards"):
        made = dataset(project, images)
        assert content(made) == expected, images
    assert content(dataset(project, "shards")) == expected, "remembered"


def test_shards_with_other_captions(project):
    png = picture_bytes(project, "a")
    record = {"caption": "in the record", "short": ["one", "two"], "width": 96}
    members = [
        ("a.json", json.dumps(record).encode()),
        ("a.png", png),
        ("b.png", png),
        ("b.icap", ICAP.encode()),
    ]
    write_tar(project, "s.tar", members)

    def words(more):
        return [
            [json.loads(c)["high_level_description"] for c in s.captions]
            for s in dataset(project, "s.tar", more).samples
        ]

    assert words("") == [["in the record"], ["A hut."]]
    assert words("caption = 'filename'") == [["a"], ["b"]]
    with pytest.raises(IdeoflowError, match=r"b\.png has no caption"):
        words("caption = 'column'")
    write_tar(project, "s.tar", members[:2])
    assert words("caption_column = 'short'") == [["one", "two"]]


def test_a_folder_with_metadata(project):
    """Hugging Face's imagefolder; a file beside a picture is nearer than its line in the list."""
    for file in (project / "plain").rglob("*.json"):
        file.unlink()
    records = [
        {"file_name": "a.png", "text": "from the list"},
        {"file_name": "b.v2.png", "text": "never read"},
    ]
    write_jsonl(project, "plain/metadata.jsonl", records)
    write_jsonl(project, "plain/sub/metadata.jsonl", [{"file_name": "c.png", "text": "deeper"}])

    def words(more=""):
        return [
            json.loads(s.caption)["high_level_description"] for s in dataset(project, "plain", more).samples
        ]

    assert words() == ["from the list", "words, {of} prose", "deeper"]
    assert words("caption = 'column'") == ["from the list", "never read", "deeper"]


def test_pictures_that_cannot_be_read_are_counted(project):
    folder = project / "plain"
    for name in ("x.heic", "y.HEIC", "z.dng", ".hidden.heic", "notes.md"):
        (folder / name).touch()
    (told,) = (d for d in dataset(project, "plain").warnings if d.code is codes.NOT_READ)
    assert "2 .heic" in told.message and "1 .dng" in told.message and told.span.line
    write_tar(project, "s.tar", [("a.png", picture_bytes(project, "a")), ("a.txt", b"a"), ("b.heic", b"")])
    (told,) = (d for d in dataset(project, "s.tar").warnings if d.code is codes.NOT_READ)
    assert "1 .heic" in told.message


def test_several_captions_of_a_picture(project):
    """Different words, the same pixels; a caption that comes twice counts once."""
    captions = [CAPTION, "prose", json.dumps(CAPTION)]
    write_jsonl(project, "list.jsonl", [{"image": "plain/a.png", "caption": captions}])
    (sample,) = dataset(project, "list.jsonl").samples
    assert [json.loads(c)["high_level_description"] for c in sample.captions] == ["A boat.", "prose"]
    (project / "plain/a.json").write_text(json.dumps({"caption": "one", "caption_short": "two"}))
    assert '"one"' in dataset(project, "plain").samples[0].caption


def test_a_hub_data_set(project, monkeypatch):
    """Read from Hugging Face's own cache, as `hf download` leaves it; the hub itself is out of reach."""
    hub = project / "hub" / "datasets--owner--boats"
    (hub / "refs").mkdir(parents=True)
    for revision, name in (("c" * 40, "main"), ("d" * 40, "old")):
        (hub / "refs" / name).write_text(revision)
        (hub / "snapshots" / revision / "data").mkdir(parents=True)
    records = [
        {"image": {"bytes": picture_bytes(project, n), "path": f"{n}.png"}, "text": WORDS[n]} for n in NAMES
    ]
    snapshot = f"hub/datasets--owner--boats/snapshots/{'c' * 40}/data"
    write_parquet(project, f"{snapshot}/train-00000-of-00002.parquet", records[:2])
    write_parquet(project, f"{snapshot}/train-00001-of-00002.parquet", records[2:])
    write_parquet(project, f"{snapshot}/test-00000-of-00001.parquet", records[:1])
    write_parquet(project, f"hub/datasets--owner--boats/snapshots/{'d' * 40}/data/train.parquet", records[:1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(project / "hub"))
    expected = content(dataset(project, "plain"))
    name = "hf://datasets/owner/boats"
    assert content(dataset(project, name)) == expected
    assert content(dataset(project, f"{name}/data/test-*.parquet")) == expected[:1]
    assert content(dataset(project, f"{name}@old")) == expected[:1]
    for images, code in (
        ("hf://datasets/owner/huts", model_codes.NO_DOWNLOAD),
        (f"{name}/*.tar", codes.NO_HUB_DATASET),
        ("hf://datasets/a/b@@c", model_codes.NO_DOWNLOAD),
        ("hf://datasets/..", codes.NO_HUB_DATASET),
    ):
        with pytest.raises(IdeoflowError) as caught:
            dataset(project, images)
        assert caught.value.diagnostics[0].code is code, images
        assert caught.value.diagnostics[0].span.line == 4


# Several sources ------------------------------------------------------------------------------------------


def test_several_sources(project):
    records = rows(project)
    write_jsonl(project, "list.jsonl", records)
    (project / "r.toml").write_text(
        "[model]\nbase = 'nano'\n[data]\nresolution = 64\naspect = 'square'\n"
        "[[data.source]]\nimages = 'plain'\nname = 'folder'\nrepeats = 3\n"
        "[[data.source]]\nimages = 'list.jsonl'\nresolution = 128\ncrop = 'random'\ncrop_variants = 2\n"
        "flip = true\n"
    )
    made = read_dataset(load_recipe(project / "r.toml"))
    first, second = made.shares
    assert (first.name, first.first, first.pictures, first.variants, first.repeats) == ("folder", 0, 3, 1, 3)
    assert (second.name, second.first, second.pictures, second.variants) == ("list.jsonl", 3, 3, 4)
    assert {s.size for s in made.samples[:3]} == {(64, 64)} and {s.size for s in made.samples[3:]} == {
        (128, 128)
    }
    summary = made.summary()
    assert summary.pictures == 6 and {b.width: b.count for b in summary.buckets} == {64: 3, 128: 12}
    assert load_recipe(project / "r.toml").tables.data.resolution == 64


def test_the_digest_follows_what_is_trained_and_not_where_it_lies(project, tmp_path_factory):
    before = dataset(project, "plain").summary().digest
    moved = tmp_path_factory.mktemp("elsewhere") / "moved"
    (project / "plain").rename(moved)
    assert dataset(project, str(moved)).summary().digest == before
    assert dataset(project, str(moved), "flip = true").summary().digest != before
    (moved / "b.v2.txt").write_text("other words")
    assert dataset(project, str(moved)).summary().digest != before


# What is wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says", "line"),
    [
        ("{'a': 1}\n", "no JSON object", 1),
        ('{"file_name": "plain/a.png", "text": "x"}\n{"text": "y"}\n', "names no picture", 2),
        ('{"file_name": "plain/a.png", "text": "x", "caption": "y"}\n', "several columns", 1),
        ('{"file_name": "plain/a.png"}\n', "has no caption", 0),
        ('{"file_name": "gone.png", "text": "x"}\n', "gone.png cannot be decoded: No such file", 0),
        ('{"file_name": "plain/a.png", "text": {"elements": 1}}\n', "", 1),
        ("", "no pictures in list.jsonl", 4),
        ("\xff\xfe", "", 0),
    ],
)
def test_what_is_wrong_with_a_list(project, content, says, line):
    (project / "list.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(IdeoflowError) as caught:
        dataset(project, "list.jsonl")
    diagnostic = caught.value.diagnostics[0]
    assert says in diagnostic.message and diagnostic.span.line == line and diagnostic.cure


def test_what_is_wrong_with_parquet(project):
    (project / "cut.parquet").write_bytes(b"PAR1 nothing")
    write_parquet(project, "odd.parquet", [{"n": 1}])
    write_parquet(project, "mute.parquet", [{"file_name": "plain/a.png"}])
    write_parquet(project, "empty.parquet", [{"file_name": None, "text": "x"}])
    for name, says, cure in (
        ("cut", "cannot be read", "restore"),
        ("odd", "no column that names pictures", "there are n"),
        ("mute", "no column of captions", "there are file_name"),
        ("empty", "row 1 has an empty", "fill it in"),
    ):
        with pytest.raises(IdeoflowError) as caught:
            dataset(project, f"{name}.parquet")
        diagnostic = caught.value.diagnostics[0]
        assert diagnostic.code is codes.BAD_LIST and says in diagnostic.message and cure in diagnostic.cure


def test_what_is_wrong_with_shards(project):
    (project / "a.tar").write_bytes(b"no tar at all" * 100)
    with tarfile.open(project / "b.tar", "w:gz") as tar:
        tar.add(project / "plain/a.png", "a.png")
    write_tar(project, "c.tar", [("a.png", picture_bytes(project, "a")), ("a.txt", b"caf\xe9")])
    write_tar(project, "d.tar", [("a.txt", b"words")])
    for name, code in (
        ("a", codes.BAD_LIST),
        ("b", codes.BAD_LIST),
        ("c", codes.BAD_LIST),
        ("d", codes.EMPTY_DATASET),
    ):
        with pytest.raises(IdeoflowError) as caught:
            dataset(project, f"{name}.tar")
        assert caught.value.diagnostics[0].code is code, name


def test_a_list_without_pyarrow(project, monkeypatch):
    write_parquet(project, "list.parquet", rows(project))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(IdeoflowError) as caught:
        dataset(project, "list.parquet")
    assert "ideoflow[parquet]" in caught.value.diagnostics[0].cure


def test_small_pictures_are_left_out_and_counted(project):
    Image.new("RGB", (30, 200)).save(project / "plain" / "thin.png")
    (project / "plain" / "thin.txt").write_text("a line")
    made = dataset(project, "plain", "minimum_image_size = 64\nresolution_type = 'pixel'")
    assert len(made.samples) == 3 and [d.code for d in made.warnings] == [codes.LEFT_OUT]
    assert "1 of 4 pictures" in made.warnings[0].message
    made = dataset(project, "plain", "minimum_image_size = 79")
    assert [s.geometry.width for s in made.samples] == [98], (
        "by area: sqrt(97 * 64) = 78.8, sqrt(98 * 64) = 79.2"
    )
