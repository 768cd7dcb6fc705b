"""A run's history: resumptions, repeated and undone steps, lines that were cut off or hold no numbers."""

import json

import pytest

from ideoflow.report.history import read_history
from ideoflow.report.record import Recorder, read_metrics


@pytest.fixture
def write(tmp_path):
    return Recorder(tmp_path).write


def test_what_a_resumption_undid_is_gone(write, tmp_path):
    write("run", from_step=0, version="1", torch="2", device="cpu", seed=3)
    for step in range(1, 16):
        write("step", step=step, loss=float(step), learning_rate=1.0, grad_norm=1.0, seconds=1.0)
    write("checkpoint", step=10, file="c")
    write("sample", step=15, prompt="p", file="f")
    write("run", from_step=10, version="1", torch="2", device="cpu", seed=3)
    write("step", step=11, loss=0.5, learning_rate=1.0, grad_norm=1.0, seconds=1.0)
    history = read_history(tmp_path)
    assert [s.step for s in history.steps] == list(range(1, 12))
    assert history.steps[-1].loss == 0.5 and history.samples == () and history.checkpoint == 10
    assert history.resumed_at == (10,) and history.step == 11 and history.ending == "open"


def test_the_last_start_decides_how_it_ended(write, tmp_path):
    assert read_history(tmp_path).ending == "open"
    write("run", from_step=0)
    write("end", step=5, finished=False, adapter=None, seconds=2.0)
    assert read_history(tmp_path).ending == "stopped"
    write("run", from_step=5)
    assert read_history(tmp_path).ending == "open"
    write("end", step=9, finished=True, adapter="a.safetensors", seconds=3.0)
    history = read_history(tmp_path)
    assert (history.ending, history.step, history.seconds, history.adapter) == (
        "finished",
        9,
        5.0,
        "a.safetensors",
    )


def test_stages_add_up_over_starts(write, tmp_path):
    write("stage", stage="train", seconds=2.0, peak_bytes=None)
    write("stage", stage="train", seconds=3.0, peak_bytes=7)
    write("stage", stage="train", seconds=1.0, peak_bytes=5)
    (stage,) = read_history(tmp_path).stages
    assert (stage.seconds, stage.peak_bytes, stage.passes) == (6.0, 7, 3)


def test_what_is_no_number_is_none(write, tmp_path):
    write("step", step=1, loss=float("inf"), learning_rate="fast", grad_norm=True)
    (step,) = read_history(tmp_path).steps
    assert (step.loss, step.learning_rate, step.grad_norm, step.seconds) == (None, None, None, None)


def test_notes_are_told_once(write, tmp_path):
    for _ in range(3):
        write("note", text="same")
    assert read_history(tmp_path).notes == ("same",)


@pytest.mark.parametrize("text", ["größe", "猫", "\ud800", "a\u2028b\x85c", "line\nline"])
def test_any_text_comes_back_and_a_cut_line_spoils_nothing_else(write, tmp_path, text):
    write("note", text=text)
    write("note", text=text * 20)
    file = tmp_path / "metrics.jsonl"
    assert [line["text"] for line in read_metrics(tmp_path)] == [text, text * 20]
    whole = file.read_bytes()
    for cut in range(1, 60):
        file.write_bytes(whole[:-cut])
        assert read_metrics(tmp_path)[0]["text"] == text
        assert len(read_metrics(tmp_path)) == (2 if cut == 1 else 1)


def test_every_line_is_one_json_object(write, tmp_path):
    write("note", text="a\u2028b")
    write("step", step=1, loss=float("nan"))
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["note", "step"]
    assert json.loads(lines[1])["loss"] is None
