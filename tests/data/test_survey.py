"""Datasets: which caption belongs to which picture, and everything that can be wrong with either."""

import json
import os

import pytest

from ideoflow.captions import decompile_caption
from ideoflow.data import survey as survey_module
from ideoflow.data.headers import read_sizes
from ideoflow.data.survey import estimate_tokens, read_dataset, read_prompts
from ideoflow.diagnostics import Diagnostic, IdeoflowError
from ideoflow.diagnostics.codes import data as codes
from ideoflow.diagnostics.codes.caption_tools import WORKER_DIED

CAPTION = {
    "high_level_description": "A boat.",
    "compositional_deconstruction": {
        "background": "sea",
        "elements": [{"type": "obj", "bbox": [100, 250, 900, 750], "desc": "a boat"}],
    },
}


@pytest.fixture
def add(folder, picture):
    """add("a.jpg", txt="words", width=96) -> a picture with captions beside it."""

    def make(name, *, width=96, height=64, **captions):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(width, height).save(file)
        for suffix, text in captions.items():
            file.with_suffix(f".{suffix}").write_text(text, encoding="utf-8")
        return file

    return make


def captions_of(recipe):
    return [json.loads(s.caption) for s in read_dataset(recipe).samples]


def refused(recipe):
    with pytest.raises(IdeoflowError) as caught:
        read_dataset(recipe)
    return caught.value.diagnostics


def told(diagnostics):
    return [(d.code, d.span.path.rpartition("/")[2]) for d in diagnostics]


# Captions -------------------------------------------------------------------------------------------------


def test_a_json_caption_however_it_is_written(add, recipe):
    plain = json.dumps(CAPTION)
    add("a.png", json=plain)
    add("b.png", txt=plain)
    add("c.png", txt=json.dumps(CAPTION, indent=2), height=96, width=64)
    add("d.png", txt="\ufeff\n" + json.dumps(CAPTION, indent=4).replace("\n", "\r\n"))
    found = captions_of(recipe("aspect = 'square'"))
    assert len(found) == 4, "pretty-printed JSON is one caption"
    assert {c["high_level_description"] for c in found} == {"A boat."}
    assert all(c["compositional_deconstruction"]["background"] == "sea" for c in found)


def test_the_order_of_sidecars(add, recipe):
    add("a.png", json=json.dumps(CAPTION), txt="words")
    add("b.png", txt="words")
    assert [c["high_level_description"] for c in captions_of(recipe())] == ["A boat.", "words"]


def test_prose_is_wrapped_and_nothing_is_invented(add, recipe):
    add("a.png", txt="first line, with <b>, {braces}\nsecond line\n")
    (caption,) = captions_of(recipe())
    assert caption == {
        "high_level_description": "first line, with <b>, {braces}\nsecond line",
        "compositional_deconstruction": {"background": "", "elements": []},
    }


def test_boxes_follow_the_crop(add, recipe):
    """96 x 64 cropped to its middle 64 x 64: x runs from 16 to 80, so 24 -> 1/8 and 72 -> 7/8; y stays."""
    add("a.png", json=json.dumps(CAPTION))
    dataset = read_dataset(recipe("aspect = 'square'"))
    (sample,) = dataset.samples
    assert sample.size == (64, 64) and sample.geometry.window == (16, 0, 80, 64)
    (element,) = json.loads(sample.caption)["compositional_deconstruction"]["elements"]
    assert element["bbox"] == [100, 125, 900, 875]


def test_what_is_cropped_away_is_told(add, recipe):
    caption = json.loads(json.dumps(CAPTION))
    caption["compositional_deconstruction"]["elements"][0]["bbox"] = [0, 0, 1000, 100]
    add("a.png", json=json.dumps(caption))
    dataset = read_dataset(recipe("aspect = 'square'"))
    assert json.loads(dataset.samples[0].caption)["compositional_deconstruction"]["elements"] == []
    assert len(dataset.warnings) == 1 and dataset.warnings[0].span.path.endswith("a.png")


def test_one_file_for_a_folder(add, recipe, folder):
    add("a.png")
    add("b.png", txt="its own")
    text = decompile_caption([("a.png", CAPTION), ("gone.png", CAPTION)])
    (folder / "captions.icap").write_text(text, encoding="utf-8")
    dataset = read_dataset(recipe("aspect = 'square'"))
    assert [json.loads(s.caption)["high_level_description"] for s in dataset.samples] == [
        "A boat.",
        "its own",
    ]
    assert [(d.code, "gone.png" in d.message) for d in dataset.warnings] == [(codes.NO_PICTURE, True)]


def test_placeholders_are_filled_in_every_kind(add, recipe):
    json_caption = json.dumps(CAPTION).replace("a boat", "a <token> <other>")
    add("a.png", json=json_caption)
    add("b.png", txt="a <token> at sea")
    tables = "[captions]\nplaceholders = {token = 'sks \"boat\"'}"
    a, b = captions_of(recipe("", tables))
    assert a["compositional_deconstruction"]["elements"][0]["desc"] == 'a sks "boat" <other>'
    assert b["high_level_description"] == 'a sks "boat" at sea'
    (instance,) = {s.caption for s in read_dataset(
        recipe("caption = 'instance'\ninstance_prompt = 'a <token>'", tables)).samples}  # fmt: skip
    assert json.loads(instance)["high_level_description"] == 'a sks "boat"'


def test_names_as_captions(add, recipe):
    add("a_red-boat.png")
    (caption,) = captions_of(recipe("caption = 'filename'"))
    assert caption["high_level_description"] == "a red boat"


def test_a_name_that_is_no_text(add, recipe, folder):
    file = add("a.png")
    try:
        file.rename(folder / b"caf\xe9.png".decode("utf-8", "surrogateescape"))
    except OSError:
        pytest.skip("this disk takes UTF-8 names only")
    (diagnostic,) = refused(recipe("caption = 'filename'"))
    assert diagnostic.code is codes.NO_CAPTION and "caf?" in diagnostic.message


@pytest.mark.parametrize("prompt", ["a cat", json.dumps(CAPTION)])
def test_one_caption_for_all(add, recipe, prompt):
    for name in ("a.png", "b.png"):
        add(name, txt="ignored")
    captions = captions_of(recipe(f"caption = 'instance'\ninstance_prompt = '{prompt}'"))
    assert len(captions) == 2 and captions[0]["high_level_description"] in ("a cat", "A boat.")


def test_a_faulty_prompt_is_told_once_at_its_place(add, recipe):
    for n in range(5):
        add(f"{n}.png", width=64 + 16 * n)
    diagnostics = refused(recipe("caption = 'instance'\ninstance_prompt = '{\"a\": 1}'"))
    assert len(diagnostics) == 1
    assert diagnostics[0].span.path.endswith("r.toml") and diagnostics[0].span.line == 7


# Sizes ----------------------------------------------------------------------------------------------------


def test_the_summary_counts(add, recipe, folder):
    for name, width, height in (("a.png", 64, 64), ("b.png", 128, 128), ("c/d.png", 128, 64)):
        add(name, width=width, height=height, txt=f"words of {name}")
    summary = read_dataset(recipe()).summary()
    assert summary.pictures == 3 and summary.warnings == 0
    assert {(b.width, b.height): b.count for b in summary.buckets} == {(64, 64): 2, (96, 64): 1}
    low, middle, high = summary.text_tokens
    assert low <= middle <= high and summary.text_tokens_estimated
    assert read_dataset(recipe()).summary().digest == summary.digest
    (folder / "a.txt").write_text("other words")
    assert read_dataset(recipe()).summary().digest != summary.digest


def test_enlarging_is_told(add, recipe):
    add("a.png", width=40, height=40, txt="x")
    add("b.png", width=64, height=64, txt="x")
    (warning,) = read_dataset(recipe()).warnings
    assert warning.code is codes.UPSCALED and "1.6 times" in warning.message and "a.png" in warning.message
    assert read_dataset(recipe("upscale_limit = 2")).warnings == ()


def test_more_text_is_more_tokens():
    assert estimate_tokens("x" * 3400) > estimate_tokens("x" * 34) > 8


# What is wrong --------------------------------------------------------------------------------------------


def test_an_empty_folder(recipe, folder):
    (folder / "readme.txt").write_text("nothing")
    (diagnostic,) = refused(recipe())
    assert diagnostic.code is codes.EMPTY_DATASET and diagnostic.span.line == 4


def test_a_folder_that_has_gone(recipe, folder):
    folder.rmdir()
    assert refused(recipe())[0].code is codes.EMPTY_DATASET


def test_everything_that_is_wrong_is_told_at_once(add, recipe, folder):
    add("a.png")
    add("b.png", txt="fine")
    add("c.png", json="{")
    (folder / "d.png").write_bytes(b"no picture")
    (folder / "d.txt").write_text("words")
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes()[:20])
    add("f.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    add("g.png", icap="")
    found = told(refused(recipe()))
    assert found[:2] == [(codes.NO_CAPTION, "a.png"), (found[1][0], "c.json")]
    assert (codes.BAD_PICTURE, "d.png") in found and (codes.BAD_PICTURE, "e.png") in found
    assert (codes.NO_CAPTION, "f.txt") in found and any(name == "g.icap" for _, name in found)
    assert not any(name.startswith("b.") for _, name in found)


def test_captions_without_pictures_are_told(add, recipe, folder):
    add("a.png", txt="fine")
    (folder / "gone.txt").write_text("words")
    (folder / "gone.json").write_text(json.dumps(CAPTION))
    (folder / "settings.json").write_text('{"learning_rate": 1}')
    (folder / "sub").mkdir()
    (folder / "sub" / "prompt.txt").write_text("in a folder without pictures")
    dataset = read_dataset(recipe())
    assert told(dataset.warnings) == [(codes.NO_PICTURE, "gone.json"), (codes.NO_PICTURE, "gone.txt")]
    assert len(dataset.samples) == 1


def test_prose_without_wrapping(add, recipe):
    add("a.png", txt="words")
    add("b.png", json=json.dumps(CAPTION))
    (diagnostic,) = refused(recipe("", "[captions]\nwrap = false"))
    assert diagnostic.code is codes.NOT_JSON and diagnostic.span.path.endswith("a.txt")


def test_no_more_than_a_screenful(add, recipe):
    for n in range(30):
        add(f"{n}.png", width=16, height=16)
    assert len(refused(recipe())) == 20


# Prompts --------------------------------------------------------------------------------------------------


def test_prompts_come_in_order_and_once(recipe, folder):
    prompts = folder.parent / "prompts"
    prompts.mkdir()
    for name in ("b.txt", "a.json", "c.txt"):
        (prompts / name).write_text(json.dumps(CAPTION) if name == "a.json" else name)
    found = read_prompts(recipe("", "[validate]\nprompts = ['prompts/c.txt', 'prompts/*']"))
    assert [p.name for p in found] == ["c", "a", "b"]
    assert json.loads(found[1].caption)["high_level_description"] == "A boat."


def test_every_prompt_that_is_wrong_is_told(recipe, folder):
    prompts = folder.parent / "prompts"
    prompts.mkdir()
    (prompts / "a.json").write_text("{")
    (prompts / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(IdeoflowError) as caught:
        read_prompts(recipe("", "[validate]\nprompts = ['prompts/*']"))
    assert {d.span.path.rpartition("/")[2] for d in caught.value.diagnostics} == {"a.json", "b.txt"}


# Many pictures --------------------------------------------------------------------------------------------


def test_several_processes_find_the_same_in_the_same_order(add, recipe, folder, monkeypatch):
    for n in range(7):
        add(f"{n}.png", width=40, height=40, txt=f"picture {n}")
    add("7.png", width=20, height=300, json=json.dumps(CAPTION))
    made = recipe("minimum_image_size = 10\naspect = 'square'\nflip = true")
    alone = read_dataset(made)
    monkeypatch.setattr(survey_module, "_PART", 3)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    together = read_dataset(made)
    assert together == alone and len(alone.samples) == 16
    assert {d.code for d in together.warnings} >= {codes.UPSCALED}, "codes are those of the table"
    for n in (1, 5):
        (folder / f"{n}.txt").write_bytes(b"\xff")
    errors = [d for d in refused(made) if d.is_error]
    assert told(errors) == [(codes.NO_CAPTION, "1.txt"), (codes.NO_CAPTION, "5.txt")]


def test_a_killed_process_is_made_up_for(add, recipe, monkeypatch):
    for n in range(4):
        add(f"{n}.png", txt=f"picture {n}")
    alone = read_dataset(recipe())

    def dies(work, items, *, jobs, chunk):
        for part in range(0, len(items), chunk):
            if jobs > 1 and part:
                raise IdeoflowError(Diagnostic(WORKER_DIED, "killed"))
            yield work(items[part : part + chunk])

    monkeypatch.setattr(survey_module, "_PART", 2)
    monkeypatch.setattr(survey_module, "ordered_map", dies)
    assert read_dataset(recipe()) == alone


def test_many_warnings_alike_are_counted(add, recipe):
    for n in range(14):
        add(f"{n:02d}.png", width=16, height=16, txt="x")
    warnings = read_dataset(recipe()).warnings
    assert [d.code for d in warnings] == [codes.UPSCALED] * 4
    assert warnings[-1].message.startswith("and 11 more like this") and warnings[-1].severity == "warning"


def test_sizes_are_remembered_until_a_file_changes(add, folder, picture, monkeypatch):
    file = add("a.png", width=96, height=64)
    os.utime(file, ns=(0, 0))
    changed = file.stat().st_ctime_ns
    monkeypatch.setattr("time.time_ns", lambda: changed + 3_000_000_000)
    assert read_sizes([file]) == [(96, 64)]
    monkeypatch.setattr(
        "ideoflow.data.headers.open_picture", lambda _: pytest.fail("read although it is known")
    )
    assert read_sizes([file]) == [(96, 64)]
    monkeypatch.undo()
    picture(64, 96).save(file)
    os.utime(file, ns=(0, 0))
    assert read_sizes([file]) == [(64, 96)], "same time, another size of the file"


def test_a_memory_that_is_damaged_or_unusable_is_done_without(add, tmp_path, monkeypatch):
    file = add("a.png")
    for damage in (b"", b"no database at all", None):
        cache = tmp_path / f"cache-{damage and len(damage)}"
        monkeypatch.setenv("IDEOFLOW_CACHE", str(cache))
        if damage is None:
            cache.write_text("a file in the way")
        else:
            cache.mkdir()
            (cache / "files.sqlite").write_bytes(damage)
        assert read_sizes([file, file]) == [(96, 64)] * 2
