"""Measurements of runs: kept, read back, and used for exactly the combination that they are of."""

import dataclasses
import json

import pytest

from ideoflow.plan import make_plan, named_hardware
from ideoflow.plan.calibration import Calibration, Measured, append_runs, load_calibration, shipped, user_file
from ideoflow.plan.record import NOT_ALLOCATED, STAGE_OF, RunMeter, measured_run, wrong_lines

RUN = Measured("H200", "reference", "abc", {"torch": "2.13"}, False, 1000, 1100, 500.0, 600.0)


def known(*runs):
    return Calibration(shipped().shares, runs)


def changed(**values):
    return dataclasses.replace(RUN, **values)


def test_nothing_measured_changes_nothing():
    factors = known().factors("H200", "reference", False)
    assert (factors.memory, factors.time, factors.source) == (1.0, 1.0, "")


def test_other_devices_do_not_count():
    factors = known(changed(device="H100")).factors("H200", "reference", False)
    assert (factors.memory, factors.time, factors.source) == (1.0, 1.0, "")


@pytest.mark.parametrize("other", [changed(compiled=True), changed(engine="fused fp8")], ids=str)
def test_another_mode_or_engine_tells_how_fast_the_device_is_and_nothing_else(other):
    factors = known(other).factors("H200", "reference", False)
    assert (factors.memory, factors.time, factors.source) == (1.0, 1.2, "")


def test_memory_by_the_greatest_and_time_by_the_median():
    runs = [
        changed(measured_moving=m, measured_step_ms=t)
        for m, t in ((900, 400.0), (1200, 600.0), (1000, 650.0))
    ]
    factors = known(*runs).factors("H200", "reference", False)
    assert factors.memory == 1.2 and factors.time == 600 / 500
    assert factors.source == "3 runs on this H200"


def test_only_the_newest_engine_counts():
    runs = [changed(engine_digest="old", measured_moving=3000), changed(engine_digest="new")]
    assert known(*runs).factors("H200", "reference", False).memory == pytest.approx(1.1)


def test_a_wild_measurement_is_bounded():
    assert known(changed(measured_moving=10**9)).factors("H200", "reference", False).memory == 4.0


def test_runs_are_appended_and_read_back(tmp_path):
    file = tmp_path / "deep" / "calibration.json"
    assert load_calibration(file) == (shipped(), [])
    append_runs([RUN], file)
    append_runs([changed(device="L4")], file)
    calibration, problems = load_calibration(file)
    assert calibration.runs == (RUN, changed(device="L4")) and problems == []


def test_a_damaged_file_is_a_warning_and_is_replaced(tmp_path):
    file = tmp_path / "calibration.json"
    for text in ("{", "[]", '{"format": 9, "runs": []}', '{"format": 1, "runs": [{"device": 3}]}'):
        file.write_text(text, encoding="utf-8")
        calibration, (problem,) = load_calibration(file)
        assert calibration == shipped()
        assert problem.code.id == "IP013" and problem.severity == "warning" and problem.span.path == str(file)
    append_runs([RUN], file)
    assert load_calibration(file)[0].runs == (RUN,)


def test_the_file_does_not_grow_forever(tmp_path):
    file = tmp_path / "calibration.json"
    append_runs([RUN] * 499 + [changed(device="L4")] * 3, file)
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    assert len(runs) == 500 and runs[-1]["device"] == "L4"


def test_the_users_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("IDEOFLOW_CACHE", str(tmp_path))
    assert user_file() == tmp_path / "calibration.json"


def test_a_measured_run_makes_the_next_plan_predict_it(full_base, write_recipe, summarize):
    """Round trip: record what a run took, plan again, and the ledger and the clock say that."""
    arguments = write_recipe(), full_base, summarize(), named_hardware("h200")
    lasting = (
        "weights", "adapter", "gradients", "optimizer state", "working copies", "work buffer", "workspaces"
    )  # fmt: skip
    plan = make_plan(*arguments)
    fixed = sum(x.bytes for x in plan.ledger.of("train") if x.name in lasting)
    peak = fixed + int(0.8 * (plan.ledger.peak("train") - fixed))
    step_ms = 1.5 * plan.time.step_ms
    found = {"train_peak_bytes": peak, "step_ms": step_ms, "engine_digest": "abc", "versions": {"torch": "2"}}
    run = measured_run(plan, **found)
    again = make_plan(*arguments, calibration=known(run))
    assert [d.value for d in again.decisions] == [d.value for d in plan.decisions]
    allocated = [x for x in again.ledger.of("train") if x.calibrated or x.name in lasting]
    assert sum(x.bytes for x in allocated) == pytest.approx(peak, rel=1e-6)
    assert again.time.calibrated and again.time.step_ms == pytest.approx(step_ms, rel=1e-4)
    # Measuring the second run the same way gives the same correction: factors do not compound.
    repeated = measured_run(again, **found)
    assert repeated.predicted_moving == run.predicted_moving
    assert repeated.predicted_step_ms == pytest.approx(run.predicted_step_ms)


def test_a_run_on_a_processor_makes_its_time_known(nano_base, processor, write_recipe, summarize):
    arguments = write_recipe("", "nano", 256), nano_base, summarize(size=256), processor
    plan = make_plan(*arguments)
    assert plan.time is None
    run = measured_run(plan, train_peak_bytes=10**9, step_ms=123.0, engine_digest="abc", versions={})
    assert make_plan(*arguments, calibration=known(run)).time.step_ms == pytest.approx(123.0, rel=1e-3)


def test_a_run_is_gathered_from_its_events(full_base, write_recipe, summarize):
    from ideoflow.engine.events import RunStarted, StageDone, StepDone

    plan = make_plan(write_recipe(), full_base, summarize(), named_hardware("h200"))
    events = [RunStarted(0, "cuda", "2.13.0"), StageDone("captions", 9.0, 50 << 30)]
    # The first five steps compile; of the others the median counts.
    events += [StepDone(i, 1.0, 1e-4, 1.0, 9.0 if i <= 5 else 0.3 if i != 8 else 4.0) for i in range(1, 13)]
    events += [StageDone("train", 3.0, 30 << 30), StageDone("train", 3.0, 31 << 30)]
    meter = RunMeter(plan)
    for event in events:
        meter.see(event)
    run = meter.measured()
    assert (run.device, run.engine, run.measured_step_ms) == ("H200", "fused bf16", pytest.approx(300.0))
    assert run.versions == {"torch": "2.13.0"} and len(run.engine_digest) == 16
    steady = measured_run(
        plan, train_peak_bytes=31 << 30, step_ms=300.0, engine_digest=run.engine_digest, versions=run.versions
    )
    assert run == steady


def test_what_is_too_little_or_no_gpus_is_not_kept(full_base, nano_base, processor, write_recipe, summarize):
    from ideoflow.engine.events import StageDone, StepDone

    def measured(plan, steps, peak=1 << 30):
        meter = RunMeter(plan)
        for i in range(steps):
            meter.see(StepDone(i + 1, 1.0, 1e-4, 1.0, 0.5))
        meter.see(StageDone("train", 1.0, peak))
        return meter.measured()

    card = make_plan(write_recipe(), full_base, summarize(), named_hardware("h200"))
    assert measured(card, 10) and not measured(card, 9) and not measured(card, 10, peak=0)
    host = make_plan(write_recipe("", "nano", 256), nano_base, summarize(size=256), processor)
    assert measured(host, 10) is None


def peaks_of(plan, **factors):
    """Peaks by stage as an allocator would see them, each a multiple of what was predicted."""
    return {
        STAGE_OF[phase]: int(
            factor * sum(x.bytes for x in plan.ledger.of(phase) if x.name not in NOT_ALLOCATED)
        )
        for phase, factor in factors.items()
    }


def line(plan, name):
    return next(x.bytes for x in plan.ledger.of("train") if x.name == name)


def test_a_run_as_predicted_says_nothing(plan_for):
    plan = plan_for("full", "h200")
    weights = {"weights": line(plan, "weights")}
    assert wrong_lines(plan, peaks_of(plan, text=1.04, latents=0.5, train=1.049), weights) == []
    assert wrong_lines(plan, {}, {}) == []


def test_of_a_tiny_base_what_libraries_hold_says_nothing(nano_base, write_recipe, summarize):
    plan = make_plan(write_recipe("", "nano", 256), nano_base, summarize(size=256), named_hardware("h200"))
    peaks = {stage: peak + (100 << 20) for stage, peak in peaks_of(plan, text=1.0, train=1.0).items()}
    assert wrong_lines(plan, peaks, {}) == []
    assert len(wrong_lines(plan, {stage: peak + (100 << 20) for stage, peak in peaks.items()}, {})) == 2


@pytest.mark.parametrize("name", ["weights", "adapter", "optimizer state"])
def test_a_measured_line_that_was_wrong_is_named_with_what_it_took(plan_for, name):
    plan = plan_for("full", "h200")
    lines = {n: line(plan, n) for n in ("weights", "adapter", "optimizer state")}
    (peak,) = peaks_of(plan, train=1.06).values()
    lines[name] += peak - peaks_of(plan, train=1.0)["train"]
    (told,) = wrong_lines(plan, {"train": peak}, lines)
    taken, expected = (f"{b / 2**20:,.1f} MiB" for b in (lines[name], line(plan, name)))
    assert told.startswith("train: ") and "+6.0%" in told
    assert told.endswith(f"'{name}' took {taken}, not {expected}")


def test_what_no_line_explains_came_and_went(plan_for):
    plan = plan_for("full", "h200")
    lines = {n: line(plan, n) for n in ("weights", "adapter", "optimizer state")}
    (told,) = wrong_lines(plan, peaks_of(plan, train=1.2), lines)
    assert "'saved activations, " in told and "weights" not in told
    # The other phases have one sum each.
    (told,) = wrong_lines(plan, peaks_of(plan, latents=1.2), lines)
    assert told.startswith("latents: ") and "autoencoder" in told


def test_weights_that_were_fetched_count_with_those_that_stay(plan_for):
    plan = plan_for("full", "8gb")
    both = line(plan, "weights") + line(plan, "fetched weights")
    (told,) = wrong_lines(plan, peaks_of(plan, train=1.3), {"weights, fetched weights": both + (9 << 30)})
    assert f"'weights, fetched weights' took {(both + (9 << 30)) / 2**20:,.1f} MiB" in told


@pytest.mark.parametrize(("left", "told"), [(0.029, True), (0.031, False)])
def test_near_the_limit_something_is_said_of_an_exact_prediction_too(plan_for, left, told):
    plan = plan_for("full", "h200")
    limit = int(plan.ledger.peak("train") / (1 - left))
    tight = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, free_bytes=limit))
    found = wrong_lines(tight, peaks_of(plan, train=1.0), {"weights": line(plan, "weights")})
    assert bool(found) is told and all("no line was larger" in sentence for sentence in found)


def test_libraries_of_a_process_are_no_lines_fault(nano_base, processor, write_recipe, summarize):
    plan = make_plan(write_recipe("", "nano", 256), nano_base, summarize(size=256), processor)
    assert wrong_lines(plan, {"train": 2 * plan.ledger.peak("train")}, {}) == []
    (told,) = wrong_lines(plan, {"train": processor.free_bytes}, {"weights": line(plan, "weights")})
    assert "0.0 MiB below the limit" in told


def test_a_host_and_a_device_are_corrected_apart(full_base, write_recipe, summarize):
    """Of small pictures a slow host's launches tell, and nothing of how fast the device works."""
    eager = '[memory]\nengine = "reference"\nprecision = "bf16"\ncompile = "off"\ncheckpointing = "on"'

    def planned(size, *runs):
        arguments = (
            write_recipe(eager, resolution=size),
            full_base,
            summarize(size=size),
            named_hardware("h200"),
        )
        return make_plan(*arguments, calibration=known(*runs))

    def measured(plan, factor):
        step_ms = factor * plan.time.step_ms
        return measured_run(plan, train_peak_bytes=None, step_ms=step_ms, engine_digest="a", versions={})

    small, large = planned(256), planned(2048)
    assert "launch" in {p.name for p in small.time.parts} and "launch" not in {
        p.name for p in large.time.parts
    }
    slow_host, slow_device = measured(small, 1.5), measured(large, 1.2)
    assert slow_host.waits_for_host and not slow_device.waits_for_host
    assert planned(256, slow_host).time.step_ms == pytest.approx(1.5 * small.time.step_ms, rel=0.02)
    assert planned(2048, slow_host).time.step_ms == pytest.approx(large.time.step_ms)
    assert planned(2048, slow_device).time.step_ms == pytest.approx(1.2 * large.time.step_ms, rel=1e-3)
    assert planned(256, slow_device).time.step_ms == pytest.approx(small.time.step_ms, rel=0.02)
    both = planned(256, slow_host, slow_device), planned(2048, slow_host, slow_device)
    assert both[0].time.step_ms == pytest.approx(1.5 * small.time.step_ms, rel=0.02)
    assert both[1].time.step_ms == pytest.approx(1.2 * large.time.step_ms, rel=1e-3)
