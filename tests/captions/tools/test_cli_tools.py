"""The commands over data sets: arguments, exit codes and what is printed."""

from __future__ import annotations

import json

import pytest

from ideoflow.cli import main

JSON = '{"compositional_deconstruction":{"background":"A lake.","elements":[]}}'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.json").write_text(JSON)
    (tmp_path / "set" / "b.txt").write_text("A <token> boat.")
    return tmp_path


def test_compile_writes_what_the_name_of_the_output_says(folder, capsys):
    assert main(["captions", "compile", "set", "-o", "out.jsonl", "--set", "token=red", "--jobs", "1"]) == 0
    assert "A red boat." in (folder / "out.jsonl").read_text()
    assert main(["captions", "compile", "set", "-o", "out", "--jobs", "1"]) == 0
    assert (folder / "out" / "a.json").read_text() == JSON + "\n"
    assert "2 captions written to out" in capsys.readouterr().err


def test_a_failure_is_shown_and_is_exit_code_1(folder, capsys):
    (folder / "set" / "c.json").write_text("{")
    assert main(["captions", "compile", "set", "-o", "out", "--jobs", "1", "--format", "json"]) == 1
    printed = capsys.readouterr()
    assert any(d["severity"] == "error" for d in json.loads(printed.out))
    assert "2 captions written to out, 1 failed" in printed.err
    assert "out.failures.jsonl" in printed.err and (folder / "out.failures.jsonl").is_file()


def test_decompile_over_a_folder(folder):
    assert main(["captions", "decompile", "set", "-o", "icap", "--jobs", "1"]) == 0
    assert main(["captions", "compile", "icap", "-o", "back", "--jobs", "1"]) == 0
    assert (folder / "back" / "a.json").read_text() == JSON + "\n"


def test_preview_and_stats(folder, capsys):
    assert main(["captions", "preview", "set", "-o", "sheet.html", "--title", "Mine", "--jobs", "1"]) == 0
    assert "<title>Mine</title>" in (folder / "sheet.html").read_text()
    assert main(["captions", "stats", "set", "--jobs", "1"]) == 0
    assert "2 captions, 0 failed" in capsys.readouterr().out
    assert main(["captions", "stats", "set", "--format", "json", "--jobs", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["captions"] == 2


@pytest.mark.parametrize(("arguments", "code"), [
    (["compile", "gone", "-o", "out"], "IC710"),
    (["compile", "set", "-o", "out", "--set", "token"], "IC725"),
    (["compile", "set", "-o", "out", "--set", "token=caf\udce9"], "IC725"),
    (["compile", "set", "-o", "set/a.json"], "IC720"),
    (["preview", "gone"], "IC710"),
    (["preview", "set", "-o", "set/a.json/x.html"], "IC711"),
    (["stats", "set", "--tokenizer", "gone"], "IC740"),
])  # fmt: skip
def test_mistakes_are_diagnostics(folder, capsys, arguments, code):
    assert main(["captions", *arguments]) == 1
    assert f"error[{code}]" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_jobs_is_a_positive_number(folder, jobs, capsys):
    with pytest.raises(SystemExit):
        main(["captions", "stats", "set", "--jobs", jobs])
    assert "--jobs" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["", " ", "caf\udce9", "two\nlines"])
def test_a_trigger_is_a_word(folder, word, capsys):
    with pytest.raises(SystemExit):
        main(["captions", "compile", "set", "-o", "out", "--trigger", word])
    assert "--trigger" in capsys.readouterr().err
