"""Whatever bytes a caption file holds: diagnostics or captions that follow the rules, never a traceback."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ideoflow import resources
from ideoflow.captions.convert import convert
from ideoflow.captions.convert_item import Options
from ideoflow.captions.inputs import IMAGE_SUFFIXES
from ideoflow.captions.preview import write_preview
from ideoflow.captions.stats import gather_stats
from ideoflow.diagnostics import IdeoflowError

SCHEMA = jsonschema.Draft202012Validator(json.loads(resources.schema("ideogram-caption")))

KEYS = ["caption", "text", "file_name", "image", "elements", "background", "bbox", "desc", "type", "../x",
        "compositional_deconstruction", "high_level_description"]  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(KEYS) | st.text(), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip
CONTENTS = (
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
    | JSON_VALUES.map(lambda v: json.dumps(v).encode())
    | st.lists(JSON_VALUES, max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
)
SUFFIXES = st.sampled_from([".icap", ".json", ".txt", ".caption", ".jsonl", ".csv", ".parquet"])


def survives(suffix: str, content: bytes, **options) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = root / f"in{suffix}"
        source.write_bytes(content)
        try:
            report = convert([source], root / "o.jsonl", "jsonl", Options(**options), jobs=1)
        except IdeoflowError as error:
            assert error.diagnostics
        else:
            lines = (root / "o.jsonl").read_bytes().decode().split("\n")[:-1]
            assert len(lines) == report.written and bool(report.failed) == bool(report.failures)
            for line in lines:
                SCHEMA.validate(json.loads(json.loads(line)["caption"]))
        for work in (lambda: write_preview([source], root / "p.html", Options(**options), jobs=1),
                     lambda: gather_stats([source], Options(**options), jobs=1)):  # fmt: skip
            try:
                work()
            except IdeoflowError as error:
                assert error.diagnostics


@given(SUFFIXES, CONTENTS)
@example(".jsonl", b'{"text": "half \\ud800 of a character"}')
@example(".jsonl", b'{"file_name": "\\ud800.jpg", "text": "A boat."}')
@example(".json", b'{"a\\ud800.jpg": {"caption": "A boat."}}')
@example(".json", b"[" * 100_000)
@example(".jsonl", b'{"text": ' + b"[" * 100_000)
@example(".json", b'{"caption": NaN}')
@example(".json", b'{"caption": "A", "caption": "B"}')
@example(".txt", b"A boat\x00 with a null")
@example(".csv", b'caption,file_name\r\n"never closed')
@example(".csv", b"caption\n" + b"x" * 200_000)
@example(".csv", b"caption,caption\na,b,c,d\n")
@example(".csv", b"a\x00b,caption\n1,2")
@example(".icap", b"image a\n  B\n" * 300)
@settings(max_examples=150, deadline=None)
def test_no_input_is_a_traceback(suffix, content):
    survives(suffix, content)


@given(SUFFIXES, CONTENTS)
@settings(max_examples=60, deadline=None)
def test_nor_with_every_option_on(suffix, content):
    survives(suffix, content, trigger="sks", placeholders=(("token", "x"),), boxes="xyxy", one_per_line=True)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_broken_pictures_are_no_traceback_either(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF no picture")
    (tmp_path / "a.icap").write_text("A boat.\nbackground: x\nobj y1px..2px x1px..2px: y\n")
    assert write_preview([tmp_path], tmp_path / "p.html", Options(), jobs=1).cards == 1


def test_ten_megabytes_of_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("A long boat. " * 800_000)
    assert convert([tmp_path], tmp_path / "o.jsonl", "jsonl", Options(), jobs=1).written == 1
