"""The examples in docs/data.md are read, and do what the page says."""

import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from ideoflow.data.survey import read_dataset
from ideoflow.recipe import PictureSettings, load_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
TABLE = re.findall(r"^\| (`\"[^|]*) \|", PAGE, re.MULTILINE)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Every file that the page's examples name."""
    (tmp_path / "boats" / "deep").mkdir(parents=True)
    stream = io.BytesIO()
    Image.new("RGB", (1600, 1200), "navy").save(stream, "png")
    for name in ("sail", "deep/row"):
        (tmp_path / "boats" / f"{name}.png").write_bytes(stream.getvalue())
        (tmp_path / "boats" / f"{name}.txt").write_text("A boat.")
    (line,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "list.jsonl").write_text(line)
    (tmp_path / "list.csv").write_text("file_name,caption\nboats/sail.png,A boat.\n")
    rows = [{"photo": {"bytes": stream.getvalue(), "path": "a.png"}, "words": ["A boat.", "A ship."]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "shards" / f"boats-{number:06d}.tar", "w") as tar:
            tar.add(tmp_path / "boats" / "sail.png", f"{number}.png")
            tar.add(tmp_path / "boats" / "sail.txt", f"{number}.txt")
    snapshot = tmp_path / "hub" / "datasets--owner--boats" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "sail.png").write_bytes(stream.getvalue())
    (snapshot / "sail.txt").write_text("A boat.")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def dataset(project, text):
    (project / "r.toml").write_text(f"model.base = 'nano'\n{text}")
    return read_dataset(load_recipe(project / "r.toml"))


def test_every_example_is_read(project):
    made = [dataset(project, example) for example in EXAMPLES]
    plain, table, instance, repeats, weights, twice, closest, crops, flip = made
    assert [s.size for s in plain.samples] == [(1184, 880)] * 2, "as the page's plan shows"
    assert [len(s.captions) for s in table.samples] == [2]
    assert all("sks sailboat" in s.caption for s in instance.samples)
    assert [(s.name, s.repeats) for s in repeats.shares] == [("boats", 3), ("lists", 1)]
    assert [s.size for s in repeats.samples] == [(1184, 880), (1184, 880), (592, 448)]
    assert [s.weight for s in weights.shares] == [0.7, 0.3]
    assert [(s.name, s.pictures) for s in twice.shares] == [("large", 2), ("small", 2)]
    assert {s.size for s in closest.samples} == {(944, 624)}
    assert crops.shares[0].variants == 4 and len({s.geometry for s in crops.samples}) == 8
    assert {round(s.geometry.window[2] - s.geometry.window[0]) for s in crops.samples} == {1024}
    assert [s.geometry.flip for s in flip.samples] == [False, True] * 2


def test_every_kind_of_source_of_the_table_is_read(project):
    images = [name for row in TABLE for name in re.findall(r'`"([^"]+)"`', row)]
    assert len(images) == 6
    for name in images:
        names = "image_column = 'photo'\ncaption_column = 'words'" if "parquet" in name else ""
        made = dataset(project, f"[data]\nimages = '{name}'\n{names}")
        assert made.samples and made.warnings == (), name


def test_the_sentences_hold(project):
    settings = PictureSettings()
    assert settings.upscale_limit == 1.5 and settings.resolution == 1024 and settings.caption == "auto"
    assert 2 * Image.MAX_IMAGE_PIXELS // 10**6 in (178, 179)
    caption = json.loads(dataset(project, EXAMPLES[0]).samples[0].caption)
    assert caption["high_level_description"] == "A boat."
