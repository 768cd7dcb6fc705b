"""Profiles of real steps on the CPU, held against torch's own sums; and failures, which cost a note."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ideoflow.engine import parts
from ideoflow.engine.events import Note, Profiled
from ideoflow.engine.fused import FusedTransformer
from ideoflow.engine.fused.weights import FrozenWeight
from ideoflow.engine.packed import PackedLayout
from ideoflow.engine.profile import STEPS, WARM_UP, Capture, RunProfile
from ideoflow.engine.setup import build

CPU = torch.device("cpu")
LAYOUT = PackedLayout((9, 20), ((4, 6), (8, 8)), 16)


@pytest.fixture(scope="module")
def fused(plan_of: Any) -> FusedTransformer:
    model = build(plan_of(**{"adapter.rank": 4, "memory.precision": "fp8"}))
    return FusedTransformer(model.transformer, linear="bf16", attention="sdpa", dtype=torch.bfloat16)


def step(fused: FusedTransformer) -> None:
    width = fused.model.config.in_channels
    data = torch.randn(LAYOUT.image_total, width), torch.randn(LAYOUT.image_total, width)
    fused.add_gradients(
        *data, torch.rand(2), torch.randn(LAYOUT.text_total, fused.model.hidden_size), LAYOUT, 1
    )


def test_all_of_a_fused_step_is_accounted_for(fused: FusedTransformer) -> None:
    forward = FrozenWeight.forward
    step(fused)
    capture = Capture(CPU, fused, {4})
    for n in range(2):
        with capture.step(last=n == 1):
            step(fused)
    trace = capture.finish()
    assert FrozenWeight.forward is forward and "forward" not in vars(fused.blocks[0].attention)
    found = capture.account(trace)
    milliseconds = {part["part"]: part["ms"] for part in found["parts"]}
    assert found["steps"] == 2 and found["counted"] == "operators"
    assert sum(milliseconds.values()) == pytest.approx(found["wall_ms"], rel=1e-3)
    here = {parts.ATTENTION, parts.ATTENTION_BACKWARD, parts.FROZEN, parts.ADAPTER, parts.POINTWISE,
            parts.WEIGHTS}  # fmt: skip
    assert all(milliseconds[part] > 0 for part in here)
    # torch's own tables of the same trace: self time of attention's operator, and of all operators.
    own = {e.key: e.self_cpu_time_total / 2e3 for e in capture._profile.key_averages()}
    attention = next(part for part in found["parts"] if part["part"] == parts.ATTENTION)
    flash = "aten::_scaled_dot_product_flash_attention_for_cpu"
    listed = {item["name"]: item["ms"] for item in attention["longest"]}
    assert listed[flash] == pytest.approx(own[flash], rel=0.01, abs=1e-3)
    operators = sum(time for name, time in own.items() if name.startswith("aten::"))
    counted = sum(ms for part, ms in milliseconds.items() if part != parts.IDLE)
    assert counted == pytest.approx(operators, rel=0.05)


def run(folder: Path, first: int, last: int, work: Any, capture: Any = None) -> list[Any]:
    """The events of a run of steps ``first`` to ``last``."""
    events: list[Any] = []
    made = RunProfile(folder, first, last, capture or (lambda: Capture(CPU, None, ())), events.append)
    for number in range(first, last + 1):
        with made.around(number):
            work(number)
    made.close()
    return events


def multiply(_: int) -> None:
    torch.ones(8, 8) @ torch.ones(8, 8)


@pytest.mark.parametrize(
    ("first", "last", "numbers"),
    [
        (1, 100, [WARM_UP + 1, WARM_UP + 2, WARM_UP + 3]),
        (51, 100, [51 + WARM_UP + n for n in range(STEPS)]),
        (1, 12, [10, 11, 12]),
        (8, 9, [8, 9]),
        (10, 9, []),
    ],
)
def test_steps_after_the_warm_up_or_the_last_ones(
    tmp_path: Path, first: int, last: int, numbers: list[int]
) -> None:
    events = run(tmp_path, first, last, multiply)
    if not numbers:
        assert events == [] and not (tmp_path / "profile").exists()
        return
    (profiled,) = events
    assert isinstance(profiled, Profiled) and profiled.table["numbers"] == numbers
    assert json.loads((tmp_path / "profile/profile.json").read_text()) == profiled.table
    names = [e["name"] for e in json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]]
    assert names.count(parts.STEP) == len(numbers) == names.count("aten::mm")


def test_large_traces_are_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ideoflow.engine.profile._LARGE", 100)
    (profiled,) = run(tmp_path, 1, 3, multiply)
    assert profiled.table["trace"] == "trace.json.gz"
    with gzip.open(tmp_path / "profile/trace.json.gz") as stream:
        assert json.load(stream)["traceEvents"]


def test_a_run_that_is_stopped_keeps_the_steps_it_profiled(tmp_path: Path) -> None:
    events: list[Any] = []
    made = RunProfile(tmp_path, 1, 50, lambda: Capture(CPU, None, ()), events.append)
    for number in range(1, WARM_UP + 3):
        with made.around(number):
            multiply(number)
    made.close()
    assert events[0].table["numbers"] == [WARM_UP + 1, WARM_UP + 2]


def test_a_profile_that_cannot_be_written_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    done: list[int] = []
    (note,) = run(tmp_path, 1, 5, done.append)
    assert isinstance(note, Note) and "could not be finished" in note.text
    assert done == [1, 2, 3, 4, 5]


def test_a_profile_that_cannot_be_started_is_a_note(tmp_path: Path) -> None:
    """torch allows one profiler at a time; a second one fails as a missing CUPTI would."""
    done: list[int] = []

    def refuse() -> Capture:
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED\nmore")

    (note,) = run(tmp_path, 1, 5, done.append, refuse)
    assert note == Note("the profile could not be started: CUPTI_ERROR_NOT_INITIALIZED")
    assert done == [1, 2, 3, 4, 5]


def test_a_gpu_profile_without_kernels_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu() -> Capture:
        made = Capture(CPU, None, ())
        made.device = torch.device("cuda")
        monkeypatch.setattr(made, "_synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
        return made

    note, profiled = run(tmp_path, 1, 3, multiply, on_a_gpu)
    assert "CUPTI" in note.text and profiled.table["counted"] == "operators"
