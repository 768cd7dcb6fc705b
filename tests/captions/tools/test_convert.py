"""Whole data sets: what comes out, in what order, after a kill, and what is said of failures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ideoflow.captions.convert import convert
from ideoflow.captions.convert_item import Options
from ideoflow.captions.inputs import Columns
from ideoflow.captions.pool import ordered_map
from ideoflow.diagnostics import IdeoflowError

BOAT = {"type": "obj", "bbox": [380, 590, 660, 720], "desc": "A boat, varnished"}
WORDS = {"type": "text", "text": "STILL,\nWATER", "desc": "A headline"}
CAPTION = {
    "high_level_description": "A boat.",
    "compositional_deconstruction": {"background": "A lake, still.", "elements": [BOAT, WORDS]},
}
JSON = json.dumps(CAPTION, ensure_ascii=False, separators=(",", ":"))
ICAP = """\
A boat.
background: A lake, still.
obj y380..660 x590..720: A boat, varnished
text "STILL,\\nWATER": A headline
"""


def put(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def rows(path: Path) -> list[tuple[str, dict]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["file_name"], json.loads(r["caption"])) for r in records]


def run(source: Path, out: Path, to: str, *, force: bool = False, **options):
    return convert([source], out, to, Options(**options), force=force, jobs=1)


def convert_text(tmp_path: Path, name: str, content: str, **options):
    """One file through the whole conversion: captions by name, and the report."""
    put(tmp_path / "in", {name: content})
    report = run(tmp_path / "in", tmp_path / "out.jsonl", "jsonl", force=True, **options)
    return rows(tmp_path / "out.jsonl"), report


def test_sidecars_of_every_kind_become_canonical_json(tmp_path):
    pictures = dict.fromkeys(("a.jpg", "b.jpg", "sub/c.png", "sub/d.png"), b"")
    pretty = json.dumps(CAPTION, indent=2)
    texts = {"a.icap": ICAP, "b.txt": pretty, "sub/c.json": JSON, "sub/d.txt": "A plain {boat}."}
    put(tmp_path / "in", {**pictures, **texts})
    report = run(tmp_path / "in", tmp_path / "out", "sidecars")
    assert (report.written, report.failed) == (4, 0)
    out = tmp_path / "out"
    for name in ("a.json", "b.json", "sub/c.json"):
        assert (out / name).read_text() == JSON + "\n", name
    assert json.loads((out / "sub/d.json").read_text()) == {
        "high_level_description": "A plain {boat}.",
        "compositional_deconstruction": {"background": "", "elements": []},
    }
    assert sorted(p.name for p in out.rglob("*")) == ["a.json", "b.json", "c.json", "d.json", "sub"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"], "no journal, no failures file"


def test_jsonl_keeps_the_caption_as_the_models_own_text(tmp_path):
    put(tmp_path / "in", {"a.jpg": b"", "a.json": JSON})
    run(tmp_path / "in", tmp_path / "o.jsonl", "jsonl")
    assert json.loads((tmp_path / "o.jsonl").read_text()) == {"file_name": "a.jpg", "caption": JSON}


def test_an_imagefolder_round_trips_and_needs_every_picture(tmp_path):
    gone = '{"file_name": "gone.jpg", "text": "A."}'
    put(tmp_path / "in", {"x/a.jpg": b"picture", "x/a.json": JSON, "m.jsonl": gone})
    report = run(tmp_path / "in", tmp_path / "out", "hf-imagefolder")
    assert (report.written, report.failed) == (1, 1)
    assert [(d.code.id, d.severity) for d in report.diagnostics] == [("IC714", "error")]
    assert (tmp_path / "out/x/a.jpg").read_bytes() == b"picture"
    assert rows(tmp_path / "out/metadata.jsonl") == [("x/a.jpg", CAPTION)]
    run(tmp_path / "out", tmp_path / "again.jsonl", "jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out/metadata.jsonl").read_bytes()


def test_datasets_loads_the_imagefolder(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    put(tmp_path / "in", {"a.json": JSON, "b.txt": "Two."})
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"in/{name}.png")
    run(tmp_path / "in", tmp_path / "out", "hf-imagefolder")
    folder, cache = str(tmp_path / "out"), str(tmp_path / "cache")
    loaded = datasets.load_dataset("imagefolder", data_dir=folder, cache_dir=cache)
    assert loaded["train"]["caption"][0] == JSON


def test_decompile_over_a_folder_and_back_is_exact(tmp_path):
    put(tmp_path / "in", {"x/a.jpg": b"", "x/a.json": JSON, "b.txt": "Plain."})
    run(tmp_path / "in", tmp_path / "icap", "icap", write="icap")
    assert sorted(p.name for p in (tmp_path / "icap").rglob("*.icap")) == ["a.icap", "b.icap"]
    run(tmp_path / "icap", tmp_path / "json", "sidecars")
    assert (tmp_path / "json/x/a.json").read_text() == JSON + "\n"


MANY = """\
image cats/a.jpg
  A cat.
  background: x
image b.jpg
  B.
  background: y
  obj [1,2,3,4]: no
image c.jpg
  C.
  background: z
"""


def test_many_in_one_file_take_their_own_names(tmp_path):
    found, report = convert_text(tmp_path, "set/all.icap", MANY)
    names = [name for name, _ in found]
    assert names == ["set/cats/a.jpg", "set/c.jpg"], "a good caption outlives a bad neighbour"
    assert report.failed == 1


@pytest.mark.parametrize("content", [JSON, f"sks, {JSON}", f"[trigger] {json.dumps(CAPTION, indent=2)}"])
def test_trigger_words_go_inside_never_in_front(tmp_path, content):
    found, report = convert_text(tmp_path, "a.txt", content, trigger="sks")
    assert found == [("a", {**CAPTION, "high_level_description": "sks, A boat."})]
    assert "IC724" in [d.code.id for d in report.diagnostics]


def test_text_in_front_of_json_is_never_taken_for_prose(tmp_path):
    found, report = convert_text(tmp_path, "b.txt", f"sks, {JSON}")
    assert not found and [d.code.id for d in report.diagnostics] == ["IC726"]


@pytest.mark.parametrize(("name", "content"), [
    ("a.txt", "A <token> boat"),
    ("a.icap", "A <token> boat\nbackground: x\n"),
    ("a.json", JSON.replace("A boat.", "A <token> boat")),
])  # fmt: skip
def test_placeholders_are_filled_in_every_form(tmp_path, name, content):
    found, _ = convert_text(tmp_path, name, content, placeholders=(("token", 'a "red" sks'),))
    assert found[0][1]["high_level_description"] == 'A a "red" sks boat'


@pytest.mark.parametrize(("name", "content", "box"), [
    ("a.json", JSON, [590, 380, 720, 660]),
    ("a.icap", ICAP, [380, 590, 660, 720]),  # its axes are named: nothing to swap
])  # fmt: skip
def test_boxes_xyxy_swaps_json_but_not_the_caption_language(tmp_path, name, content, box):
    found, _ = convert_text(tmp_path, name, content, boxes="xyxy")
    assert found[0][1]["compositional_deconstruction"]["elements"][0]["bbox"] == box


def test_one_per_line_is_the_callers_word(tmp_path):
    text = "First boat.\n\nSecond boat.\r\n"
    assert len(convert_text(tmp_path / "1", "a.txt", text)[0]) == 1
    found, _ = convert_text(tmp_path / "2", "a.txt", text, one_per_line=True)
    assert [c["high_level_description"] for _, c in found] == ["First boat.", "Second boat."]
    found, _ = convert_text(tmp_path / "3", "a.txt", json.dumps(CAPTION, indent=1), one_per_line=True)
    assert found == [("a", CAPTION)], "JSON is one caption however many lines it has"


def test_columns_reach_the_workers(tmp_path):
    content = '{"id": 3, "cogvlm": "A boat.", "text": "no"}\n'
    found, _ = convert_text(tmp_path, "m.jsonl", content, columns=Columns("cogvlm", "id"))
    assert [(n, c["high_level_description"]) for n, c in found] == [("3", "A boat.")]


def test_failures_are_counted_and_all_of_them_listed(tmp_path):
    lines = [json.dumps({"file_name": f"{i}.jpg", "text": "Boat." if i % 2 else " "}) for i in range(100)]
    put(tmp_path, {"m.jsonl": "\n".join(lines).replace('" "', '"\\ufeff"')})
    report = run(tmp_path / "m.jsonl", tmp_path / "o.jsonl", "jsonl")
    assert (report.written, report.failed, len(report.diagnostics)) == (50, 50, 20)
    listed = [json.loads(line) for line in report.failures.read_text().splitlines()]
    assert [d["place"]["line"] for d in listed] == list(range(1, 100, 2))


def test_nothing_is_overwritten_without_a_word(tmp_path):
    put(tmp_path, {"in/a.txt": "New.", "out/a.json": "precious", "out.jsonl": "precious"})
    source, out = tmp_path / "in", tmp_path / "out"
    report = run(source, out, "sidecars")
    assert report.failed == 1 and report.diagnostics[0].code.id == "IC720"
    for to in ("jsonl", "sidecars"):
        with pytest.raises(IdeoflowError) as raised:
            run(source, tmp_path / "out.jsonl", to)
        assert raised.value.diagnostics[0].code.id == "IC720"
    assert (out / "a.json").read_text() == (tmp_path / "out.jsonl").read_text() == "precious"
    assert run(source, out, "sidecars", force=True).failed == 0
    assert run(source, out, "sidecars").failed == 0, "the same content again is no conflict"


def test_two_captions_for_one_sidecar_are_told(tmp_path):
    put(tmp_path, {"1/a.txt": "One.", "2/a.txt": "Two."})
    report = convert([tmp_path / "1", tmp_path / "2"], tmp_path / "out", "sidecars", Options(), jobs=1)
    assert (report.written, [d.code.id for d in report.diagnostics if d.is_error]) == (1, ["IC716"])
    assert "One." in (tmp_path / "out/a.json").read_text()


@pytest.mark.parametrize("name", ["empty", "gone"])
def test_an_empty_folder_and_a_missing_one(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(IdeoflowError) as raised:
        run(tmp_path / name, tmp_path / "o.jsonl", "jsonl")
    assert raised.value.diagnostics[0].code.id == "IC710"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def big_set(tmp_path: Path, count: int) -> Path:
    lines = (json.dumps({"file_name": f"{i}.jpg", "caption": f"Boat {i}."}) for i in range(count))
    return put(tmp_path, {"m.jsonl": "\n".join(lines)}) / "m.jsonl"


def test_workers_keep_the_order(tmp_path):
    source = big_set(tmp_path, 1000)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    convert([source], one, "jsonl", Options(), jobs=1)
    convert([source], two, "jsonl", Options(), jobs=2)
    assert one.read_bytes() == two.read_bytes()
    assert [name for name, _ in rows(one)] == [f"{i}.jpg" for i in range(1000)]


def double(numbers: list[int]) -> list[int]:
    return [2 * n for n in numbers]


def test_the_pool_never_reads_far_ahead():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = ordered_map(double, endless(), jobs=2, chunk=10)
    for number in range(30):
        assert next(results) == [2 * n for n in range(10 * number + 1, 10 * number + 11)]
        assert taken <= 10 * (number + 1 + 5), "memory would grow with the input"
    results.close()


KILLED = """
import sys, time
import ideoflow.captions.convert as c
from ideoflow.captions.convert_item import Options
c.CHECKPOINT_SECONDS = 0.0
def slow(report):
    if report.written > 300:
        print("now", flush=True)
        time.sleep(60)
c.convert([sys.argv[1]], sys.argv[2], sys.argv[3], Options(), jobs=1, on_progress=slow)
"""


@pytest.mark.parametrize("to", ["jsonl", "sidecars"])
def test_a_killed_conversion_goes_on_where_it_was(tmp_path, to):
    source, out = big_set(tmp_path, 600), tmp_path / ("out.jsonl" if to == "jsonl" else "out")
    with subprocess.Popen([sys.executable, "-c", KILLED, source, out, to], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert not out.is_file(), "an unfinished output has another name"
    report = run(source, out, to)
    assert (report.written, report.failed) == (600, 0) and report.resumed_after > 300
    whole = tmp_path / "whole" / out.name
    run(source, whole, to)
    if to == "jsonl":
        assert out.read_bytes() == whole.read_bytes()
    else:
        contents = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (out, whole)]
        assert contents[0] == contents[1]
    assert not list(tmp_path.glob("*progress*")) and not list(tmp_path.glob("*.part"))


MANY_WORKERS = """
import os, sys
from ideoflow.captions.pool import ordered_map
def identify(items):
    return [os.getpid()]
if __name__ == "__main__":
    results = ordered_map(identify, iter(int, 1), jobs=2, chunk=1)
    print(*{next(results)[0] for _ in range(50)}, flush=True)
    sys.stdin.read()
"""


def test_workers_of_a_killed_run_end_too(tmp_path):
    (tmp_path / "main.py").write_text(MANY_WORKERS)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, tmp_path / "main.py"], **pipes) as process:
        workers = [psutil.Process(int(number)) for number in process.stdout.readline().split()]
        assert workers and process.pid not in [worker.pid for worker in workers]
        process.kill()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def interrupt(source: Path, out: Path) -> None:
    class Stop(Exception):
        pass

    def stop(report):
        if report.written > 300:
            raise Stop

    with pytest.raises(Stop):
        convert([source], out, "jsonl", Options(), jobs=1, on_progress=stop)


def test_changed_input_starts_over(tmp_path):
    source, out = big_set(tmp_path, 600), tmp_path / "out.jsonl"
    interrupt(source, out)
    time.sleep(0.01)
    source.write_text(source.read_text().replace("Boat 5.", "Ship 5."))
    report = run(source, out, "jsonl")
    assert report.resumed_after == 0 and report.diagnostics[0].code.id == "IC721"
    assert rows(out)[5][1]["high_level_description"] == "Ship 5." and len(rows(out)) == 600


def test_other_options_start_over(tmp_path):
    source, out = big_set(tmp_path, 600), tmp_path / "out.jsonl"
    interrupt(source, out)
    report = run(source, out, "jsonl", trigger="sks")
    assert report.resumed_after == 0
    assert all("sks" in c["high_level_description"] for _, c in rows(out))


@pytest.mark.parametrize(("out", "to"), [("out", "sidecars"), ("all.jsonl", "jsonl"), ("x", "icap")])
def test_output_inside_of_the_input_is_not_read_back(tmp_path, out, to):
    put(tmp_path, {"a.jpg": b"", "a.txt": "A boat.", "sub/b.txt": "Two."})
    write = "icap" if to == "icap" else "json"
    for _ in range(3):
        report = run(tmp_path, tmp_path / out, to, force=True, write=write)
        assert (report.written, report.failed) == (2, 0)


def test_sidecars_may_go_beside_the_pictures(tmp_path):
    put(tmp_path, {"a.jpg": b"", "a.txt": "A boat.", "sub/b.txt": "Two."})
    first = run(tmp_path, tmp_path, "sidecars")
    written = {p.name: p.read_bytes() for p in tmp_path.rglob("*.json")}
    second = run(tmp_path, tmp_path, "sidecars")
    assert (first.written, first.failed, second.failed) == (2, 0, 0) and set(written) == {"a.json", "b.json"}
    assert {p.name: p.read_bytes() for p in tmp_path.rglob("*.json")} == written
