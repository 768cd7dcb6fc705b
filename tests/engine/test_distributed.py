"""Several processes train as one: the numbers of one with a larger batch, one output, one word on errors."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import planned
from nano_runs import HEAD, three_photographs
from safetensors.torch import load_file
from torch import nn
from torch.distributed import HashStore

from ideoflow.data.survey import Share
from ideoflow.diagnostics import Diagnostic, IdeoflowError, Span
from ideoflow.diagnostics.codes import processes as codes
from ideoflow.engine import processes as joining
from ideoflow.engine.batches import Batches
from ideoflow.engine.events import StepDone
from ideoflow.engine.setup import plan_device
from ideoflow.model.base import NANO_TRANSFORMER
from ideoflow.plan.document import load_plan
from ideoflow.processes import Process, this_process
from ideoflow.recipe import parse_recipe
from ideoflow.workflow import prepare, run

RECIPE = (
    HEAD
    + """[adapter]
rank = 4
[train]
steps = {steps}
batch = {batch}
learning_rate = 1e-3
accumulation = 2
max_grad_norm = 0.005
checkpoint_every = {every}
seed = 3
[output]
folder = "{folder}"
"""
)
CUT = '[memory]\noffload = "shard"\n'
# Weights whole and cut up: engine and precision; the second makes samples.
CUT_UP = (("reference", "bf16"), ("fused", "fp8"))
SHORT = (
    HEAD.replace("pictures", "short")
    + """[adapter]
rank = 4
[train]
steps = 2
learning_rate = 1e-2
max_grad_norm = 0.005
[memory]
precision = "{precision}"
offload = "{offload}"
[output]
dtype = "float32"
folder = "{name}"
"""
)
SAMPLES = '[validate]\nprompts = ["short/*.icap"]\npreset = "turbo"\nsteps = 1\n'
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WORKER = str(Path(__file__).with_name("distributed_worker.py"))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three pictures of different shapes, and the current one."""
    three_photographs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, more: str = "", *, batch: int = 1, every: int = 100, steps: int = 3) -> str:
    text = RECIPE.format(batch=batch, every=every, steps=steps, folder=name)
    Path(f"{name}.toml").write_text(text + more)
    return f"{name}.toml"


def start(trouble: str, *names: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *options, WORKER, trouble, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def metrics(folder: str, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def write_short() -> list[str]:
    """Recipes of short captions, with the weights whole and cut up."""
    Path("short").mkdir()
    for name in ("cat", "coffee", "rocket"):
        shutil.copy(f"pictures/{name}.jpg", "short")
        Path(f"short/{name}.icap").write_text(f"A {name}.\n")
    names = []
    for engine, precision in CUT_UP:
        for offload in ("none", "shard"):
            names.append(f"{engine}-{precision}-{offload}.toml")
            text = SHORT.format(precision=precision, offload=offload, name=names[-1].removesuffix(".toml"))
            Path(names[-1]).write_text(text + SAMPLES * (engine == "fused"))
    return names


def check_cut_up(engine: str, precision: str) -> None:
    """Losses, adapters and pictures are, to the bit, those of processes that have all weights each."""
    whole, cut = (f"{engine}-{precision}-{offload}" for offload in ("none", "shard"))
    assert load_plan(f"{cut}/plan.json").value("offload") == "shard"
    losses = [[step["loss"] for step in metrics(name, "step")] for name in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    one, other = (load_file(f"{name}/{name}.safetensors") for name in (whole, cut))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    pictures = [sorted(Path(name).rglob("samples/*/*.png")) for name in (whole, cut)]
    count = 6 * (engine == "fused")  # three prompts, before and after
    assert len(pictures[0]) == len(pictures[1]) == count
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*pictures, strict=True))
    # Each process has half of the large weights, and of those of other kinds all.
    spec = NANO_TRANSFORMER
    large = (4 * spec.hidden**2 + 3 * spec.hidden * spec.intermediate_size) * (2 - (precision == "fp8"))
    ranks = [json.loads(Path(f"ran-{rank}.json").read_text()) for rank in range(2)]
    for ran in ranks:
        pieces = ran[cut]["pieces"]
        assert len(pieces) == spec.num_layers and all(large / 2 <= p < large / 2 + 256 for p in pieces)
        rest = ran[whole]["rest"] - spec.num_layers * large
        assert rest <= ran[cut]["rest"] < rest + 1024 and not ran[whole]["pieces"]
        assert ran[cut]["order"] == ranks[0][cut]["order"], "all launch the same in the same order"
    order = ranks[0][cut]["order"]
    buckets = [n for n, what in enumerate(order) if what.startswith("bucket")]
    assert len(buckets) >= 2 * 10
    if engine == "fused":
        assert any(what.startswith("block") for what in order[buckets[0] : buckets[9]]), "meanwhile"


@pytest.mark.slow
def test_two_processes_learn_what_one_with_twice_the_batch_does(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both engines, with weights whole or cut up; when one of the latter is interrupted, both stop."""
    validate = '[validate]\nprompts = ["pictures/*.icap"]\nevery = 100\npreset = "turbo"\nsteps = 1\n'
    names = write("reference", validate), write("fused"), *write_short(), write("long", CUT, steps=5000)
    process = start("none", *names)
    end = time.monotonic() + 200
    while not (Path("long/metrics.jsonl").exists() and metrics("long", "step")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # torchrun passes it on
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err.split("torch/distributed/elastic")[0], err
    (last,) = metrics("long", "end")
    assert Path(f"long/checkpoints/step-{last['step']:06d}/state.json").exists() and not last["finished"]
    assert (
        f"stopped after step {last['step']}; go on with: torchrun --nproc-per-node 2 -m ideoflow run" in out
    ), err
    assert out.count("adapter  ") == 6 and err.count("training: 3 of 3") == 2
    assert "2 processes, global batch 4 = 2 x batch 1 x accumulation 2" in " ".join(err.split())
    assert len(list(Path("reference/samples").rglob("*.png"))) == 6
    for engine, precision in CUT_UP:
        check_cut_up(engine, precision)
    monkeypatch.setattr("ideoflow.workflow.make_plan", planned)
    for name in ("reference", "fused"):
        assert len(metrics(name, "run")) == len(metrics(name, "end")) == 1
        there = [line["loss"] for line in metrics(name, "step")]
        Path(name).rename(f"two-{name}")
        events: list[Any] = []
        run(prepare(write(name, batch=2, steps=4, every=3)), on_event=events.append)
        *here, after = [e for e in events if isinstance(e, StepDone)]
        assert there == pytest.approx([e.loss for e in here], rel=2e-6)
        assert here[0].grad_norm > 0.005, "gradients are clipped by the norm of all processes"
        checkpoint = "checkpoints/step-000003/adapter.safetensors"
        two, one = (load_file(Path(folder, checkpoint)) for folder in (f"two-{name}", name))
        assert two.keys() == one.keys()
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=2e-5, msg=f"{name}: {key}")
        # One process goes on where two stopped, with the same samples.
        again: list[Any] = []
        run(prepare(write(f"two-{name}", batch=2, steps=4)), on_event=again.append)
        (step,) = [e for e in again if isinstance(e, StepDone)]
        assert step.step == 4 and step.loss == pytest.approx(after.loss, rel=1e-4)


@pytest.mark.slow
def test_a_restart_goes_on_after_a_kill_and_an_error_of_one_process_is_told_once(project: Path) -> None:
    """The second process is killed in the fourth step, and after the restart has trouble in the sixth."""
    process = start("kill", write("r", every=1, steps=300), options=("--max-restarts", "1"))
    _, err = process.communicate(timeout=200)
    killed, failed = err.split("going on from step 3 of 300")
    assert killed.count("error[IE602]") == 1, "the process that is left says why it stops"
    assert process.returncode == 1
    assert failed.count("the second process finds an entry damaged") == 1 and "error[ID" in failed
    assert "Traceback" not in failed.split("torch/distributed/elastic")[0], failed
    assert [line["from_step"] for line in metrics("r", "run")] == [0, 3]
    assert [line["step"] for line in metrics("r", "step")] == [1, 2, 3, 4, 5]
    assert metrics("r", "end")[-1]["finished"] is False and Path("r/report.html").exists()
    assert not list(Path("r/checkpoints").glob(".writing-*"))


# Without processes ----------------------------------------------------------------------------------------

LAUNCHED = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "here", "MASTER_PORT": "1"}  # fmt: skip


def test_a_process_knows_which_one_it_is() -> None:
    assert this_process({}) == Process() and this_process({"WORLD_SIZE": "1", "RANK": "7"}).first
    assert this_process(LAUNCHED) == Process(3, 4, 1, 2)


@pytest.mark.parametrize(
    "changed", [{"RANK": ""}, {"MASTER_PORT": ""}, {"RANK": "4"}, {"LOCAL_RANK": "two"}, {"LOCAL_RANK": "2"}]
)
def test_incomplete_variables_are_a_diagnostic(changed: dict[str, str]) -> None:
    with pytest.raises(IdeoflowError) as caught:
        this_process(LAUNCHED | changed)
    assert [d.code for d in caught.value.diagnostics] == [codes.NOT_LAUNCHED]


def test_a_word_to_the_others_carries_whole_diagnostics() -> None:
    span = Span("p/ü.toml", 3, 5, 4, 9, 'rank = "猫"')
    whole = Diagnostic(codes.NOT_LAUNCHED, "m", span, "cure", "label", ("one", "two"), "warning")
    for value in (whole, span):
        assert all(getattr(value, f.name) != f.default for f in fields(value)), "no field is as it would be"
    store, plain = HashStore(), Diagnostic(codes.PROCESS_LOST, "no more than this")
    assert joining._word_of(store) == ()
    joining._leave_word(joining.Processes(store=store), whole, plain)
    found = joining._word_of(store)
    assert found == (whole, plain) and found[0].code is whole.code
    assert found[0].span is not None and found[0].span.source == span.source
    joining._leave_word(joining.Processes(store=store), plain)
    assert joining._word_of(store) == found, "the first word stays"


@pytest.mark.parametrize(
    "word",
    [b"", b"\x80\x04.", b"[[", b"{}", b"7", b"[null]", b'[{"code": "IE601"}]',
     b'[{"code": "IE000", "message": "m"}]', b'[{"code": "IE601", "message": "m", "notes": "n"}]',
     b'[{"code": "IE601", "message": "m", "more": 1}]'],
)  # fmt: skip
def test_a_malformed_word_is_none(word: bytes) -> None:
    store = HashStore()
    store.set("failed", word)
    assert joining._word_of(store) == ()


def test_more_processes_than_gpus_are_a_diagnostic(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    joining.check_device(torch.device("cpu"))
    with pytest.raises(IdeoflowError) as caught:
        joining.check_device(torch.device("cuda"))
    assert [d.code for d in caught.value.diagnostics] == [codes.TOO_FEW_GPUS]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    joining.check_device(torch.device("cuda"))


def test_each_process_has_a_gpu_of_its_own(plan_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(plan), "value", lambda plan, id: "cuda")
    assert plan_device(plan) == torch.device("cuda")
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert plan_device(plan) == torch.device("cuda", 1)


def test_shares_are_of_the_tokens_of_all_processes() -> None:
    tables = parse_recipe(
        '[model]\nbase = "nano"\n[data]\nimages = "p"\n[train]\nbatch = 2\naccumulation = 3\n'
    ).tables

    class Sized:
        def __init__(self, side: int) -> None:
            self.grid = (side, 2)

    data = [Sized(n + 1) for n in range(7)]
    every = [
        Batches(tables, data, [Share("x", 0, 7)], None, rank=rank, ranks=3)  # type: ignore[arg-type]
        for rank in range(3)
    ]
    for step in range(4):
        shares = [batches.shares(step) for batches in every]
        assert [sum(part) for part in zip(*shares, strict=True)] == pytest.approx([1, 1, 1])
        tokens = [
            [sum(2 * (b.order.sample(n) + 1) for n in part) for part in b._numbers(step, b.rank)]
            for b in every
        ]
        for part in range(3):
            ratio = tokens[0][part] / tokens[1][part]
            assert shares[0][part] / shares[1][part] == pytest.approx(ratio)


def test_buckets_hold_each_parameter_once_from_the_last_to_the_first() -> None:
    from ideoflow.engine.exchange import GradientExchange

    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 50, 7, 1, 30)]
    exchange = GradientExchange(parameters, overlaps=False, bucket_bytes=100)
    assert [p for bucket in exchange.buckets for p in bucket] == parameters[::-1]
    assert [[p.numel() for p in bucket] for bucket in exchange.buckets] == [[30], [1, 7, 50], [5]]
