"""The whole program in one place: recipe -> captions -> plan -> cache -> engine -> artifacts -> report.

:func:`prepare` needs no torch, so mistakes in a recipe, a caption or a picture are told at once; torch is
imported when the engine starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ideoflow import __version__
from ideoflow.data.keys import with_encoding
from ideoflow.data.survey import Dataset, Prompt, read_dataset, read_prompts
from ideoflow.diagnostics import IdeoflowError, fail
from ideoflow.diagnostics.codes.engine import DOES_NOT_FIT
from ideoflow.diagnostics.codes.plan import NOTHING_MEASURED
from ideoflow.diagnostics.codes.processes import UNLIKE_PROCESSES
from ideoflow.model.base import NANO, BaseFacts, locate_base
from ideoflow.model.hub import fetch_base
from ideoflow.model.quiet import hush_libraries
from ideoflow.model.spec import TextEncoderSpec, TransformerSpec, VaeSpec
from ideoflow.plan import check_digests, detect_hardware, make_plan
from ideoflow.plan.calibration import append_runs, load_calibration
from ideoflow.plan.check import changed_since, changed_values
from ideoflow.plan.codec import encode
from ideoflow.plan.decide import for_processes
from ideoflow.plan.document import DataSummary, Hardware, Plan, load_plan
from ideoflow.plan.lock import LOCK, lock_of, version_changes
from ideoflow.plan.problem import Evaluation
from ideoflow.plan.record import RunMeter, engine_digest, measured_run, predict
from ideoflow.plan.variants import trials
from ideoflow.processes import this_process
from ideoflow.recipe import Recipe, load_recipe, parse_recipe
from ideoflow.report.html import write_report
from ideoflow.report.record import Recorder

if TYPE_CHECKING:
    from ideoflow.engine.caches import Built
    from ideoflow.engine.processes import Processes

# Names of the engine's events in metrics.jsonl.
_KINDS = {
    "RunStarted": "run",
    "StageDone": "stage",
    "LinesMeasured": "lines",
    "StepDone": "step",
    "SampleMade": "sample",
    "CheckpointSaved": "checkpoint",
    "Note": "note",
}


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before the first tensor is touched.

    ``lock`` is where the versions of an earlier run are, if a plan.json of one is to be run again.
    """

    recipe: Recipe
    dataset: Dataset
    prompts: tuple[Prompt, ...]
    plan: Plan
    lock: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a run left behind; no ``adapter`` where it was stopped before the last step."""

    folder: Path
    step: int
    finished: bool
    adapter: Path | None
    report: Path


def prepare(path: str | Path, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Reads a recipe (or the recipe of a plan.json), its data and its base, and plans the run.

    Raises:
        IdeoflowError: with everything that is wrong; for a plan.json also when what it was made from changed.
    """
    hush_libraries()
    planned = load_plan(path) if Path(path).suffix == ".json" else None
    recipe = load_recipe(planned.recipe_path if planned else path)
    dataset, prompts = read_dataset(recipe, say), read_prompts(recipe)
    model, span = recipe.tables.model, recipe.span("model.base")
    base = locate_base(
        model.base, revision=model.revision, parts=model.parts, relative_to=recipe.folder, span=span
    )
    base = fetch_base(base, model.revision, relative_to=recipe.folder, span=span, say=say)
    summary = with_encoding(dataset.summary(), recipe, dataset, prompts, base)
    if planned is None:
        hardware = detect_hardware(recipe.tables.memory.device, span=recipe.span("memory.device"))
        calibration, _ = load_calibration()
        plan = make_plan(
            recipe, base, summary, hardware, calibration=calibration, prompts=len(prompts),
            processes=this_process().ranks,
        )  # fmt: skip
        return Prepared(recipe, dataset, prompts, plan)
    if changed := check_digests(planned, recipe, base, summary):
        raise IdeoflowError(changed)
    again = for_processes(replace(planned, base=base), this_process().ranks)
    return Prepared(recipe, dataset, prompts, again, Path(path).with_name(LOCK))


# Measured without a recipe: on a GPU random numbers in the released model's size, on a processor nano.
_MEASURED = '[model]\nbase = "{base}"\n[data]\nimages = "none"\nresolution = {side}\n[memory]\n{memory}'
_ON_GPU = [_MEASURED.format(base="random", side=1024, memory=f'precision = "{p}"') for p in ("bf16", "fp8")]
_ON_CPU = [_MEASURED.format(base=NANO, side=128, memory='device = "cpu"')]
_RELEASED = BaseFacts(
    "random", None, False, TransformerSpec(), TextEncoderSpec(), VaeSpec(), "bf16", "random", False
)
_LARGE = 10**9  # parameters that are too many for a processor


@dataclass(frozen=True)
class Trial:
    """A few steps that were measured: ``before`` and ``after`` are its predictions without and with them.

    ``peak_bytes`` is what was allocated at most; None on a CPU.
    """

    name: str
    before: Evaluation
    after: Evaluation
    peak_bytes: int | None
    step_ms: float


def calibrate(path: str | Path | None, say: Callable[[str], None] = lambda _: None) -> list[Trial]:
    """Measures a few steps of a recipe, or of the released model, here, and keeps them for later plans.

    Raises:
        IdeoflowError: when nothing can be measured, with what is wrong. What was measured until then is kept.
    """
    hush_libraries()
    calibration, _ = load_calibration()
    planned = []
    for recipe, base, data, hardware in _calibrated(path, say):
        for name, (variant, pictures) in trials(recipe, data).items():
            plan = make_plan(variant, base, pictures, hardware, calibration=calibration)
            name = f"{plan.value('precision')}, {name}"
            if plan.value("device") == "cpu" and base.transformer.parameters() > _LARGE:
                cure = "run it on a machine with an NVIDIA GPU, or give a recipe with the base 'nano'"
                message = f"no GPU is used, and '{base.name}' is too large for a processor"
                fail(NOTHING_MEASURED, message, recipe.span("model.base"), cure=cure)
            if plan.fits:
                planned.append((name, plan))
            else:
                say(f"{name}: does not fit, not measured")
    if not planned:
        fail(
            NOTHING_MEASURED, "none of the trials fits", cure="free memory on the device, or take less of it"
        )
    measured = []
    for name, plan in planned:
        say(f"measuring {name}")
        measured.append(_measure(plan))
    after, _ = load_calibration()
    return [
        Trial(name, predict(plan, calibration), predict(plan, after), *found)
        for (name, plan), found in zip(planned, measured, strict=True)
    ]


def _calibrated(
    path: str | Path | None, say: Callable[[str], None]
) -> Iterator[tuple[Recipe, BaseFacts, DataSummary, Hardware]]:
    """What is measured: a recipe, or those that stand for one on this machine."""
    gpu = path is None and detect_hardware().kind == "cuda"
    texts = _ON_GPU if gpu else _ON_CPU
    for recipe in [load_recipe(path)] if path else map(parse_recipe, texts):
        model, span = recipe.tables.model, recipe.span("model.base")
        base = _RELEASED
        if not gpu:
            base = locate_base(
                model.base, revision=model.revision, parts=model.parts, relative_to=recipe.folder, span=span
            )
        if base.name == NANO:
            base = fetch_base(base, span=span, say=say)
        data = DataSummary(1, 0, (), (320,) * 3, False, "random")
        if path:
            data = read_dataset(recipe, say).summary()
        yield recipe, base, data, detect_hardware(recipe.tables.memory.device)


def _measure(plan: Plan) -> tuple[int | None, float]:
    """(allocated at the peak, milliseconds of a step), kept for later plans."""
    from importlib.metadata import version

    from ideoflow.engine.calibrate import measure_steps

    peak, ms = measure_steps(plan)
    versions = {"torch": version("torch")}
    found = measured_run(
        plan, train_peak_bytes=peak, step_ms=ms, engine_digest=engine_digest(), versions=versions
    )
    try:
        append_runs([found])
    except OSError as error:
        message = f"cannot keep what was measured: {error.strerror or error}"
        fail(NOTHING_MEASURED, message, cure="make $IDEOFLOW_CACHE a folder that can be written to")
    return peak, ms


def build_cache(prepared: Prepared, *, on_event: Callable[[Any], None] = lambda _: None) -> Built:
    """Encodes all that a prepared run needs, and trains nothing; ``torchrun`` shares it among processes.

    Raises:
        IdeoflowError: with what cannot be encoded; everything else is cached by then.
    """
    from ideoflow.engine.caches import build_caches

    return build_caches(prepared.plan, prepared.dataset, prepared.prompts, on_event)


def run(
    prepared: Prepared,
    *,
    fresh: bool = False,
    force: bool = False,
    profile: bool = False,
    on_event: Callable[[Any], None] = lambda _: None,
    stop: Any = None,
) -> Result:
    """Carries a prepared run out, or goes on with what an interrupted one left in the output folder.

    Started by ``torchrun``, every process calls this, and all train together; the first one alone writes, and
    gets the events.

    Args:
        fresh: sets an earlier run's folder aside instead of continuing it.
        force: tries a plan that does not fit.
        profile: traces a few steps and tells where their time goes.
        on_event: gets every event of :mod:`ideoflow.engine.events`.
        stop: an :class:`ideoflow.engine.loop.Stop`; when requested, the run saves and ends.

    Raises:
        IdeoflowError: with what went wrong; what was made until then is kept and reported.
    """
    from ideoflow.engine.processes import joined

    with joined() as processes:
        return _Run(prepared, processes, on_event).carry_out(fresh, force, profile, stop)


class _Run:
    """A run, in one process or as one of several: only the first of them writes and tells."""

    def __init__(self, prepared: Prepared, processes: Processes, on_event: Callable[[Any], None]) -> None:
        self.prepared, self.processes, self.on_event = prepared, processes, on_event
        self.folder = prepared.recipe.output_folder
        # The first one's device decides for all; where the base lies, each knows for itself.
        self.plan = replace(processes.of_first(prepared.plan), base=prepared.plan.base)

    def carry_out(self, fresh: bool, force: bool, profile: bool, stop: Any) -> Result:
        from ideoflow.engine.events import Note
        from ideoflow.engine.loop import Stop
        from ideoflow.engine.session import carry_out

        prepared, plan, folder, started = self.prepared, self.plan, self.folder, perf_counter()
        self.processes.agree(lambda: self._check(force))
        changes = self.processes.agree(lambda: self._begin(fresh) if self.processes.first else [])
        stop = stop or Stop()
        if not self.processes.first:
            outcome = carry_out(
                plan, prepared.dataset, prepared.prompts, folder, emit=lambda _: None, stop=stop,
                processes=self.processes,
            )  # fmt: skip
            return Result(folder, outcome.step, outcome.finished, None, folder / "report.html")
        recorder, meter = Recorder(folder), RunMeter(plan)

        def emit(event: Any) -> None:
            meter.see(event)
            if kind := _KINDS.get(type(event).__name__):
                recorder.write(kind, **asdict(event), **({"version": __version__} if kind == "run" else {}))
            self.on_event(event)

        for change in changes:
            emit(Note(change))
        outcome = None

        def closed() -> Path:
            for sentence in meter.wrong_lines():
                emit(Note(sentence))
            end = asdict(outcome) if outcome else {"finished": False}
            recorder.write("end", seconds=perf_counter() - started, **end)
            return write_report(folder, plan)

        try:
            outcome = carry_out(
                plan, prepared.dataset, prepared.prompts, folder, emit=emit, stop=stop, profile=profile,
                processes=self.processes,
            )  # fmt: skip
            # Steps of several processes hold what they wait for each other, which is not the card's.
            alone = self.processes.ranks == 1
            if alone and outcome.finished and (measured := meter.measured()):
                try:
                    append_runs([measured])
                except OSError as error:
                    emit(Note(f"what was measured is not kept for later plans: {error}"))
        except BaseException:
            with suppress(IdeoflowError):  # the first error is the one to tell
                closed()
            raise
        report = closed()
        return Result(folder, outcome.step, outcome.finished, outcome.adapter, report)

    def _check(self, force: bool) -> None:
        """Whether this process can do what the plan says: its own device may have less free."""
        plan, own = self.plan, self.prepared.plan
        if plan.digests != own.digests:
            notes = changed_values(encode(plan.digests), encode(own.digests))
            message = f"process {self.processes.rank} has another recipe, data or base than the first"
            cure = "give all of them the same files"
            fail(UNLIKE_PROCESSES, message, cure=cure, notes=notes)
        peak, free = plan.ledger.peak_bytes, own.hardware.free_bytes
        if peak > free and not force:
            cure = "`ideoflow plan` lists changes that make it fit; --force tries it all the same"
            message = f"the run needs {peak / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
            fail(DOES_NOT_FIT, message, cure=cure)

    def _begin(self, fresh: bool) -> list[str]:
        """Prepares the output folder; says what an earlier run there was made with and this one is not."""
        from ideoflow.artifacts import prepare_output, set_aside

        plan, lock = self.plan, lock_of(self.plan)
        # An earlier run's: of the plan.json that is run again, or of the one that goes on.
        earlier = self.prepared.lock or (None if fresh else self.folder / LOCK)
        changes = version_changes(earlier, lock) if earlier else []
        if fresh:
            set_aside(self.folder)
        elif any((self.folder / "checkpoints").glob("step-*")):
            changes += changed_since(self.folder / "plan.json", plan)
        recipe = self.prepared.recipe.text
        prepare_output(
            self.folder, {"plan.json": plan.to_json(), "recipe.toml": recipe, LOCK: lock.to_json()}
        )
        return changes
