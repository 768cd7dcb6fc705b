"""The whole path on the nano base: it trains, resumes exactly, survives kills, and tells what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import Ideogram4Pipeline
from nano_runs import HEAD, three_photographs
from PIL import Image
from safetensors.torch import load_file

from ideoflow.cli import main
from ideoflow.engine.events import CheckpointSaved, Note, StepDone
from ideoflow.engine.loop import Stop
from ideoflow.plan import load_plan
from ideoflow.workflow import Result, prepare, run

RECIPE = (
    HEAD
    + """[adapter]
rank = 4
[train]
steps = 4
learning_rate = 1e-3
checkpoint_every = 2
accumulation = 2
seed = 3
[validate]
prompts = ["pictures/cat.icap"]
every = 2
preset = "turbo"
steps = 2
"""
)


def made_in(folder: Path) -> Path:
    """A recipe and three of the shipped photographs."""
    three_photographs(folder)
    (folder / "try.toml").write_text(RECIPE)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to train in, and the current one."""
    monkeypatch.chdir(made_in(tmp_path))
    return tmp_path


def train(events: list[Any] | None = None, **options: Any) -> Result:
    news = events if events is not None else []
    return run(prepare("try.toml"), on_event=news.append, **options)


def losses(events: list[Any]) -> list[float]:
    return [e.loss for e in events if isinstance(e, StepDone)]


class Plain(NamedTuple):
    """The recipe's run, which no test changes; paths in its result are relative to ``folder``."""

    folder: Path
    result: Result
    losses: list[float]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    events: list[Any] = []
    folder = made_in(tmp_path_factory.mktemp("plain"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = train(events)
        assert not Path("outputs/try/profile").exists()
        return Plain(folder, result, losses(events), load_file("outputs/try/try.safetensors"))


def test_it_trains_and_leaves_everything(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plain.folder)
    result = plain.result
    assert result.finished and result.step == 4 and len(plain.losses) == 4
    assert result.adapter == Path("outputs/try/try.safetensors")
    samples = sorted(p.relative_to("outputs/try/samples") for p in Path("outputs/try/samples").rglob("*.png"))
    assert [s.parts[0] for s in samples] == ["step-000000", "step-000002", "step-000004"]
    before, after = (Image.open("outputs/try/samples" / s).tobytes() for s in (samples[0], samples[-1]))
    assert before != after
    page = result.report.read_text(encoding="utf-8")
    assert "data:image/" in page and "A close-up photograph of a young tabby cat" in page
    plan = json.loads(Path("outputs/try/plan.json").read_text())
    assert plan["name"] == "try"
    pipe = Ideogram4Pipeline.from_pretrained(Path(os.environ["IDEOFLOW_CACHE"]) / "nano-1")
    pipe.load_lora_weights(result.adapter.parent, weight_name=result.adapter.name)
    assert len(pipe.get_active_adapters()) == 1


def test_the_same_seed_gives_the_same_run_and_another_does_not(project: Path, plain: Plain) -> None:
    first, weights = plain.losses, plain.weights
    second: list[Any] = []
    third: list[Any] = []
    train(second)
    assert first == losses(second)
    again = load_file("outputs/try/try.safetensors")
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    (project / "try.toml").write_text(RECIPE.replace("seed = 3", "seed = 4"))
    train(third, fresh=True)
    assert losses(third) != first
    old = load_file("outputs/try.old-1/try.safetensors")
    assert all(torch.equal(weights[k], old[k]) for k in weights)


def test_a_profile_is_told_everywhere_and_changes_nothing(
    project: Path, plain: Plain, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", "try.toml", "--profile"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "steps 2 to 4 on CPU" in shown and "products with frozen weights" in shown
    recorded = [json.loads(line) for line in Path("outputs/try/metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in recorded if line["kind"] == "step"] == plain.losses
    found = json.loads(Path("outputs/try/profile/profile.json").read_text())
    assert found["numbers"] == [2, 3, 4] and Path("outputs/try/profile", found["trace"]).exists()
    page = Path("outputs/try/report.html").read_text(encoding="utf-8")
    assert 'href="#profile"' in page and "attention, backward" in page


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(project: Path, plain: Plain) -> None:
    stop, first, second = Stop(), [], []

    def on_event(event: Any) -> None:
        first.append(event)
        stop.requested |= isinstance(event, StepDone) and event.step == 3

    stopped = run(prepare("try.toml"), on_event=on_event, stop=stop)
    assert not stopped.finished and stopped.adapter is None and stopped.step == 3
    assert [e.step for e in first if isinstance(e, CheckpointSaved)] == [2, 3]
    resumed = train(second)
    assert resumed.finished
    assert losses(first) + losses(second) == plain.losses
    assert not any("changed" in e.text for e in second if isinstance(e, Note))
    again = load_file("outputs/try/try.safetensors")
    assert all(torch.equal(plain.weights[k], again[k]) for k in plain.weights)


def test_a_plan_file_runs_as_planned_and_refuses_what_changed(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    prepared = prepare("try.toml")
    Path("try.plan.json").write_text(prepared.plan.to_json())
    assert main(["run", "try.plan.json", "--quiet"]) == 0
    (project / "pictures" / "cat.icap").write_text("Another cat.\n")
    assert main(["run", "try.plan.json", "--quiet"]) == 1
    assert "error[IP" in capsys.readouterr().err


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ideoflow", "run", "try.toml", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_in_the_middle_it_resumes_from_the_last_good_checkpoint(project: Path) -> None:
    steps = RECIPE.replace("steps = 4", "steps = 5000", 1).replace(
        "checkpoint_every = 2", "checkpoint_every = 1"
    )
    (project / "try.toml").write_text(steps.replace("every = 2", "every = 5000"))
    checkpoints = Path("outputs/try/checkpoints")
    process = child()
    wait_for(lambda: len(list(checkpoints.glob("step-*"))) == 2, process)
    # A checkpoint of every step means that a kill is likely to hit one that is being written.
    wait_for(lambda: list(checkpoints.glob(".writing-*")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    last = max(int(p.name[5:]) for p in checkpoints.glob("step-*"))
    (project / "try.toml").write_text(
        steps.replace("steps = 5000", f"steps = {last + 2}", 1).replace("every = 2", "every = 5000")
    )
    events: list[Any] = []
    result = train(events)
    assert result.finished
    assert [e.step for e in events if isinstance(e, StepDone)] == [last + 1, last + 2]
    changed = f"the recipe has changed since this run began: train.steps: 5000 -> {last + 2}"
    assert [e.text for e in events if isinstance(e, Note) and "changed" in e.text] == [changed]


@pytest.mark.slow
def test_ctrl_c_saves_and_stops(project: Path) -> None:
    (project / "try.toml").write_text(RECIPE.replace("steps = 4", "steps = 5000", 1))
    process = child()
    metrics = Path("outputs/try/metrics.jsonl")
    wait_for(lambda: metrics.exists() and '"kind": "step"' in metrics.read_text(), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    step = lines[-1]["step"]
    assert lines[-1] | {"seconds": 0} == {
        "kind": "end",
        "seconds": 0,
        "step": step,
        "finished": False,
        "adapter": None,
    }
    assert Path(f"outputs/try/checkpoints/step-{step:06d}/state.json").exists()
    assert f"stopped after step {step}" in out
    assert Path("outputs/try/report.html").exists()


def edit(project: Path, old: str, new: str) -> None:
    (project / "try.toml").write_text(RECIPE.replace(old, new))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


MISTAKES = {
    "missing folder": (lambda p: edit(p, '"pictures"', '"nowhere"'), "IR008"),
    "no pictures": (lambda p: [f.unlink() for f in (p / "pictures").glob("*.jpg")], "ID001"),
    "unreadable picture": (lambda p: (p / "pictures/cat.jpg").write_bytes(b"not a picture"), "ID002"),
    "truncated JPEG": (lambda p: truncate(p / "pictures/cat.jpg"), "ID002"),
    "no caption": (lambda p: (p / "pictures/coffee.icap").unlink(), "ID003"),
    "bad caption": (lambda p: (p / "pictures/coffee.icap").write_text("A cup.\nobj y0..10: A cup.\n"), "IC"),
    "other adapter": (lambda p: (train(), edit(p, "rank = 4", "rank = 8")), "IA002"),
    "output is a file": (lambda p: (p / "outputs").write_text(""), "IA001"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_diagnostics(project: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    make, code = MISTAKES[name]
    make(project)
    assert main(["run", "try.toml", "--quiet"]) == 1
    err = capsys.readouterr().err
    assert f"error[{code}" in err and "help:" in err and "Traceback" not in err


def test_a_caption_without_picture_is_only_a_warning(project: Path, capsys: pytest.CaptureFixture) -> None:
    (project / "pictures" / "lost.icap").write_text("A lost picture.\n")
    assert [w.code.id for w in prepare("try.toml").dataset.warnings] == ["ID004"]


def test_a_full_disk_is_told_and_loses_nothing(project: Path, capsys: pytest.CaptureFixture) -> None:
    disk = project / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk]).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        edit(project, "[train]", f'[output]\nfolder = "{disk}/out"\n[train]')
        (disk / "out/report.html").mkdir(parents=True)  # so that the report fails as well, after the rest
        assert main(["run", "try.toml", "--quiet"]) == 1
        err = capsys.readouterr().err
        assert "error[IA001]" in err and "Traceback" not in err
        assert "report.html" not in err, "what came first is told"
        assert not list(disk.rglob(".writing-*"))
    finally:
        subprocess.run(["umount", disk], check=True)
    edit(project, "[train]", '[output]\nfolder = "elsewhere"\n[train]')
    assert main(["run", "try.toml", "--quiet"]) == 0


def test_what_a_run_measured_is_kept_for_later_plans_or_told(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a processor nothing is kept; what is measured elsewhere is, and a full disk there stops no run."""
    kept: list[Any] = []
    monkeypatch.setattr("ideoflow.workflow.append_runs", kept.extend)
    text = RECIPE.replace("steps = 4", "steps = 1").replace('prompts = ["pictures/cat.icap"]', "")
    Path("try.toml").write_text(text[: text.index("[validate]")])
    assert train().finished and kept == []
    monkeypatch.setattr("ideoflow.workflow.RunMeter.measured", lambda meter: "figures")
    assert train(fresh=True).finished and kept == ["figures"]

    def full(runs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("ideoflow.workflow.append_runs", full)
    events: list[Any] = []
    assert train(events, fresh=True).finished
    assert any("No space left" in e.text for e in events if isinstance(e, Note))


def test_plans_of_runs_use_what_was_measured_before(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ideoflow.plan.calibration import Calibration, Measured, shipped

    name = prepare("try.toml").plan.hardware.name
    run = Measured(name, "reference", "abc", {}, False, 1000, 1000, 1.0, 2.0)
    monkeypatch.setattr(
        "ideoflow.workflow.load_calibration", lambda: (Calibration(shipped().shares, (run,)), [])
    )
    plan = prepare("try.toml").plan
    assert plan.time is not None and plan.time.calibrated


def test_a_run_leaves_a_lock_and_another_version_is_told(project: Path) -> None:
    text = RECIPE.replace("steps = 4", "steps = 1")
    Path("try.toml").write_text(text[: text.index("[validate]")])
    train()
    lock = Path("outputs/try/recipe.lock")
    locked = json.loads(lock.read_text())
    assert locked["seed"] == 3 and locked["versions"]["torch"] == torch.__version__
    lock.write_text(json.dumps(locked | {"versions": locked["versions"] | {"torch": "1.0"}}))
    events: list[Any] = []
    run(prepare("outputs/try/plan.json"), fresh=True, on_event=events.append)
    assert any("torch: 1.0 -> " in e.text for e in events if isinstance(e, Note))
    assert lock.read_text() == json.dumps(locked, indent=1) + "\n"


@pytest.mark.parametrize("more", ['kind = "lora"', 'kind = "lokr"'])
def test_lines_of_the_ledger_are_what_their_tensors_take(project: Path, more: str) -> None:
    text = RECIPE.replace("steps = 4", "steps = 1").replace("rank = 4", f"rank = 4\n{more}")
    Path("try.toml").write_text(text[: text.index("[validate]")])
    train()
    lines = [json.loads(text) for text in Path("outputs/try/metrics.jsonl").read_text().splitlines()]
    (measured,) = (line["lines"] for line in lines if line["kind"] == "lines")
    predicted = {x.name: x.bytes for x in load_plan("outputs/try/plan.json").ledger.of("train")}
    rotary = 64  # bytes of frequencies: a buffer, not a weight
    predicted["weights"] += rotary
    assert measured == {name: predicted[name] for name in ("weights", "adapter", "optimizer state")}
    page = Path("outputs/try/report.html").read_text(encoding="utf-8")
    assert f"{measured['weights'] / 2**20:.1f} MiB" in page


def test_the_log_and_the_report_say_which_line_was_wrong(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with as little free memory as the process takes: nearness is all that a CPU can show."""
    Path("try.toml").write_text(RECIPE[: RECIPE.index("[validate]")].replace("steps = 4", "steps = 1"))
    prepared = prepare("try.toml")
    hardware = replace(prepared.plan.hardware, free_bytes=prepared.plan.ledger.peak_bytes)
    events: list[Any] = []
    run(replace(prepared, plan=replace(prepared.plan, hardware=hardware)), on_event=events.append)
    told = [e.text for e in events if isinstance(e, Note) and "below the limit" in e.text]
    assert any(text.startswith("train: the peak was ") for text in told)
    assert "below the limit" in Path("outputs/try/report.html").read_text(encoding="utf-8")
