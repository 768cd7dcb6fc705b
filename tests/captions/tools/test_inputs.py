"""Finding and reading captions: every layout that other trainers leave behind, and the broken ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ideoflow.captions.inputs import Columns, check_paths, clean_name, find, locate_image, read
from ideoflow.diagnostics import Diagnostic, IdeoflowError

CAPTION = {"compositional_deconstruction": {"background": "A lake.", "elements": []}}
JSON = json.dumps(CAPTION)


def harvest(*paths: Path, columns: Columns | None = None):
    """(name, form, text) of every source, and the diagnostics."""
    columns = columns or Columns()
    found = [f for item in find(paths, columns) for f in read(item, columns)]
    sources = [(f.name, f.form, f.text) for f in found if not isinstance(f, Diagnostic)]
    return sources, [f for f in found if isinstance(f, Diagnostic)]


def put(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_sidecars_take_the_pictures_names(tmp_path):
    put(tmp_path, {
        "a.jpg": b"", "a.txt": "A boat.", "b.png": b"", "b.txt": f"\ufeff  {JSON}", "c.webp": b"",
        "c.icap": "A cat.", ".hidden.txt": "no",
        "d.jpg": b"", "d.json": JSON, "e.jpg": b"", "e.jpg.txt": "A double suffix.", "f.jpeg": b"",
        "f.caption": "A fifth.", "sub/g.JPG": b"", "sub/g.txt": json.dumps(CAPTION, indent=4),
    })  # fmt: skip
    sources, problems = harvest(tmp_path)
    assert not problems
    assert [(name, form) for name, form, _ in sources] == [
        ("a.jpg", "text"), ("b.png", "json"), ("c.webp", "icap"), ("d.jpg", "json"), ("e.jpg", "text"),
        ("f.jpeg", "text"), ("sub/g.JPG", "json"),
    ]  # fmt: skip
    assert json.loads(sources[-1][2]) == CAPTION, "pretty-printed JSON in a .txt is one caption"


def test_a_folder_without_pictures_holds_captions_only(tmp_path):
    put(tmp_path, {"a.txt": "A boat.", "b.icap": "A cat."})
    assert harvest(tmp_path) == ([("a", "text", "A boat."), ("b", "icap", "A cat.")], [])


def test_notes_beside_pictures_and_second_captions_are_left_out_and_told(tmp_path):
    put(tmp_path, {"a.jpg": b"", "a.icap": "A.", "a.txt": "B.", "a.json": JSON, "README.txt": "read me",
                   "package.json": '{"name": "x", "version": 1}'})  # fmt: skip
    sources, problems = harvest(tmp_path)
    assert sources == [("a.jpg", "icap", "A.")]
    assert sorted((d.code.id, d.severity, Path(d.span.path).name) for d in problems) == [
        ("IC712", "warning", "package.json"), ("IC714", "warning", "README.txt"),
        ("IC715", "warning", "a.json"), ("IC715", "warning", "a.txt"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "expected"), [
    # musubi-tuner
    ("meta.jsonl", '{"image_path": "/far/away/a.jpg", "caption": "A."}\n', [("a.jpg", "text", "A.")]),
    # Hugging Face imagefolder, JSON as text and as an object
    ("metadata.jsonl", json.dumps({"file_name": "x/a.jpg", "text": JSON}), [("x/a.jpg", "json", JSON)]),
    ("metadata.jsonl", json.dumps({"file_name": "a.jpg", "caption": CAPTION}), [("a.jpg", "json", JSON)]),
    ("metadata.csv", 'file_name,text\r\na.jpg,"A boat, at sea"\r\n', [("a.jpg", "text", "A boat, at sea")]),
    # bare captions, one a line
    ("set.jsonl", JSON + "\n\n" + JSON, [("set-000001", "json", JSON), ("set-000003", "json", JSON)]),
    ("set.jsonl", json.dumps({**CAPTION, "file_name": "a.jpg"}), [("a.jpg", "json", JSON)]),
    # ai-toolkit's sidecar and kohya's map
    ("a.json", '{"caption": "A boat.", "caption_short": "boat"}', [("a", "text", "A boat.")]),
    ("meta.json", json.dumps({"p/a.jpg": {"caption": "A."}, "b": {"caption": CAPTION}, "c.jpg": "C."}),
     [("p/a.jpg", "text", "A."), ("b", "json", JSON), ("c.jpg", "text", "C.")]),
    ("list.json", json.dumps([CAPTION, {"image": "b.jpg", "prompt": "B."}, "C."]),
     [("list-000001", "json", JSON), ("b.jpg", "text", "B."), ("list-000003", "text", "C.")]),
    # Windows paths
    ("meta.jsonl", '{"image_path": "C:\\\\set\\\\a.jpg", "caption": "A."}', [("a.jpg", "text", "A.")]),
    ("meta.jsonl", '{"file_name": "set\\\\a.jpg", "caption": "A."}', [("set/a.jpg", "text", "A.")]),
])  # fmt: skip
def test_records_of_other_trainers(tmp_path, name, content, expected):
    put(tmp_path, {name: content})
    assert harvest(tmp_path / name) == (expected, [])
    if "far" not in content and "C:" not in content:  # names keep the folder they were found in
        put(tmp_path / "outer", {f"inner/{name}": content})
        assert [s[0] for s in harvest(tmp_path / "outer")[0]] == [f"inner/{n}" for n, _, _ in expected]


@pytest.mark.parametrize(("name", "content", "code", "line"), [
    ("m.jsonl", '{"file_name": "a", "caption": "A."}\n{"file_name": \n', "IC717", 2),
    ("m.jsonl", "[1, 2]\n", "IC717", 1),
    ("m.jsonl", '{"file_name": "a.jpg", "title": "A."}', "IC713", 1),
    ("m.jsonl", '{"file_name": "a.jpg", "text": "A.", "caption": "B."}', "IC713", 1),
    ("m.jsonl", '{"file_name": "../../etc/passwd.jpg", "text": "A."}', "IC722", 1),
    ("m.jsonl", '{"file_name": "a\\u0000.jpg", "text": "A."}', "IC722", 1),
    ("m.jsonl", '{"file_name": "a\\ud800.jpg", "text": "A."}', "IC722", 1),
    ("m.jsonl", "[" * 100_000, "IC717", 1),
    ("m.txt", b"caf\xe9", "IC711", 0),
    ("m.jsonl", b'\xef\xbb\xbf{"text": "A."}\r\n{"text": "caf\xe9"}\r\n{"text": "B."}', "IC711", 2),
    ("m.json", '{"name": "x", "version": 1}', "IC712", 0),
    ("m.json", "17", "IC712", 0),
])  # fmt: skip
def test_what_cannot_be_read_is_told_with_its_place(tmp_path, name, content, code, line):
    put(tmp_path, {name: content})
    _, problems = harvest(tmp_path / name)
    assert [(d.code.id, d.severity, d.span.line) for d in problems] == [(code, "error", line)]


def test_columns_are_the_callers_where_given(tmp_path):
    put(tmp_path, {"m.jsonl": '{"id": 7, "picture": "p.jpg", "text": "no", "cogvlm": "A boat."}'})
    columns = Columns("cogvlm", "picture")
    assert harvest(tmp_path / "m.jsonl", columns=columns)[0] == [("p.jpg", "text", "A boat.")]
    assert harvest(tmp_path / "m.jsonl", columns=Columns("cogvlm"))[0] == [("7", "text", "A boat.")]


def test_parquet_reads_only_the_two_columns(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = [{"bytes": b"\0" * 1000, "path": f"{i}.jpg"} for i in range(1200)]
    pq.write_table(
        pa.table({"image": image, "text": [f"Boat {i}." for i in range(1200)]}), tmp_path / "t.parquet"
    )
    sources, problems = harvest(tmp_path)
    assert not problems
    assert [s[::2] for s in sources] == [(f"{i}.jpg", f"Boat {i}.") for i in range(1200)]
    with pytest.raises(IdeoflowError) as raised:
        harvest(tmp_path, columns=Columns("caption"))
    assert (
        raised.value.diagnostics[0].code.id == "IC713" and "image, text" in raised.value.diagnostics[0].cure
    )
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(IdeoflowError) as raised:
        harvest(tmp_path)
    assert raised.value.diagnostics[0].code.id == "IC711"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    put(tmp_path, {"t.parquet": b"PAR1"})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(IdeoflowError) as raised:
        harvest(tmp_path)
    assert raised.value.diagnostics[0].code.id == "IC718"
    assert "ideoflow[parquet]" in raised.value.diagnostics[0].cure


def test_wrong_paths_are_told_all_at_once(tmp_path):
    put(tmp_path, {"picture.jpg": b"", "a.txt": "A."})
    check_paths([tmp_path, tmp_path / "a.txt"])
    with pytest.raises(IdeoflowError) as raised:
        check_paths([tmp_path / "gone", tmp_path / "picture.jpg", tmp_path / "a.txt"])
    assert [d.code.id for d in raised.value.diagnostics] == ["IC710", "IC712"]


@pytest.mark.parametrize(("name", "clean"), [
    ("a.jpg", "a.jpg"), ("x/./a.jpg", "x/a.jpg"), ("/abs/a.jpg", "a.jpg"), ("D:\\x\\a.jpg", "a.jpg"),
    ("..", None), ("x/../../a", None), ("", None), ("a\nb.jpg", None), ("名前.jpg", "名前.jpg"), (".", None),
])  # fmt: skip
def test_names_never_lead_outside(name, clean):
    assert clean_name(name) == clean


def test_pictures_are_found_without_their_suffix(tmp_path):
    put(tmp_path, {"a.jpg": b"", "b.v2.PNG": b"", "c.png": b""})
    assert locate_image(tmp_path / "a") == tmp_path / "a.jpg"
    assert locate_image(tmp_path / "a.txt") == tmp_path / "a.jpg"
    assert locate_image(tmp_path / "c.png") == tmp_path / "c.png"
    assert locate_image(tmp_path / "gone.jpg") is None


def test_file_names_that_are_no_text_are_told(tmp_path):
    try:
        (tmp_path / "caf\udce9.txt").write_text("A boat.")
        (tmp_path / "d\udce9").mkdir()
    except OSError:
        pytest.skip("this file system takes only valid names")
    put(tmp_path, {"a.txt": "A."})
    sources, problems = harvest(tmp_path)
    assert [s[0] for s in sources] == ["a"]
    assert [d.code.id for d in problems] == ["IC722", "IC722"]
    json.dumps([d.as_dict() for d in problems], ensure_ascii=False).encode()
    with pytest.raises(IdeoflowError) as raised:
        check_paths([tmp_path / "caf\udce9.txt"])
    assert raised.value.diagnostics[0].code.id == "IC722"


def test_symbolic_links_in_a_circle_end(tmp_path):
    put(tmp_path, {"a.txt": "A."})
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(harvest(tmp_path)[0]) == 1
