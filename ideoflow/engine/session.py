"""One run: fill the caches, build the model, train, sample, write the adapter.

On one device, or on several, each with a process of its own that does its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from ideoflow.artifacts import Checkpoints
from ideoflow.artifacts.adapter_file import for_form, write_adapter
from ideoflow.artifacts.names import Form
from ideoflow.artifacts.readers import readers
from ideoflow.data.survey import Dataset, Prompt
from ideoflow.diagnostics import Diagnostic, fail
from ideoflow.diagnostics.codes.artifacts import UNWRITABLE
from ideoflow.diagnostics.codes.processes import UNLIKE_PROCESSES
from ideoflow.engine.adapt import base_weight, trained_updates
from ideoflow.engine.caches import fill_together, make_encoder
from ideoflow.engine.events import Emit, LinesMeasured, Note, Progress, RunStarted, SampleMade, StageDone
from ideoflow.engine.loop import Stop, Trainer, run_identity
from ideoflow.engine.meter import Meter, measure_lines, memory_errors_told
from ideoflow.engine.processes import ALONE, Processes, check_device
from ideoflow.engine.profile import RunProfile, capture_training
from ideoflow.engine.sampling import Sampler, write_picture
from ideoflow.engine.setup import Trainable, build, plan_device
from ideoflow.model.load import PRECISIONS
from ideoflow.plan.adapters import forms_of, rank_words
from ideoflow.plan.document import Plan


@dataclass(frozen=True)
class Outcome:
    """How a session ended; no ``adapter`` where it was stopped before the last step."""

    step: int
    finished: bool
    adapter: Path | None


def carry_out(
    plan: Plan,
    dataset: Dataset,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    emit: Emit,
    stop: Stop,
    profile: bool = False,
    processes: Processes = ALONE,
) -> Outcome:
    """Trains what the plan says on ``dataset``; goes on where an earlier run in ``folder`` stopped.

    With ``profile``, some steps are profiled (:class:`ideoflow.engine.profile.RunProfile`). Several processes
    share the work; only the first one writes.

    Raises:
        IdeoflowError: with what went wrong. Caches, checkpoints and samples made until then are kept.
    """
    with memory_errors_told(plan):
        return _Session(plan, folder, emit, stop, profile, processes).run(dataset, prompts)


class _Session:
    def __init__(
        self, plan: Plan, folder: Path, emit: Emit, stop: Stop, profile: bool, processes: Processes
    ) -> None:
        assert plan.base.folder is not None, "the base is fetched before the engine starts"
        self.plan, self.folder, self.emit, self.stop = plan, folder, emit, stop
        self.profile, self.processes = profile and processes.first, processes
        self.device = plan_device(plan)
        processes.agree(lambda: check_device(self.device))
        self.meter = Meter(self.device, lambda *news: emit(StageDone(*news)))
        self.encoder = make_encoder(plan, emit, processes)
        settings = plan.tables.train
        self.checkpoints = Checkpoints(folder / "checkpoints", run_identity(plan), settings.keep_checkpoints)

    def run(self, dataset: Dataset, prompts: Sequence[Prompt]) -> Outcome:
        checkpoint, warnings = self.processes.agree(self.checkpoints.newest)
        self._tell(warnings)
        from_step = checkpoint.step if checkpoint else 0
        if len(set(self.processes.gather(from_step))) > 1:
            cure = "put [output] folder on a file system that all hosts share"
            message = f"not every process finds the checkpoint of step {from_step} in {self.folder}"
            fail(UNLIKE_PROCESSES, message, cure=cure)
        self.emit(RunStarted(from_step, str(self.device), torch.__version__))
        fill_together(self.encoder, dataset, prompts, self.meter, self.processes)
        data = self.encoder.encoded(dataset.samples)
        self.emit(Progress("load", 0, 1))
        with self.meter.stage("load"):
            model = build(self.plan, self.processes)
            sampler = Sampler(self.plan, model) if self._own(prompts) else None
        self.emit(Progress("load", 1, 1))
        trainer = Trainer(
            self.plan,
            model,
            data,
            dataset.shares,
            self.encoder.cache,
            self.checkpoints,
            self.emit,
            self.stop,
            self.processes,
        )
        total = self.plan.tables.train.steps
        if checkpoint:
            trainer.resume(checkpoint)
            begun = f"going on from step {checkpoint.step} of {total}"
            done = (
                f"step {checkpoint.step} is done already, of train.steps = {total}: nothing is left to train"
            )
            self.emit(Note(begun if checkpoint.step < total else done))
        with ExitStack() as stack:
            if self.profile:
                capture = partial(capture_training, self.plan, model)
                profile = RunProfile(self.folder, trainer.step + 1, total, capture, self.emit)
                stack.callback(profile.close)
                trainer.around = profile.around
            self._train(trainer, sampler, prompts)
        finished = trainer.step >= self.plan.tables.train.steps
        write = finished and self.processes.first
        adapter = self._write_adapter(model, trainer.step) if write else None
        return Outcome(trainer.step, finished, adapter)

    def _train(self, trainer: Trainer, sampler: Sampler | None, prompts: Sequence[Prompt]) -> None:
        """Trains from one sampling to the next; samples before the first step and after the last."""
        total = self.plan.tables.train.steps
        every = self.plan.tables.validate.every if prompts else total
        self.stop.listening, measured = True, False
        if prompts and trainer.step == 0:
            self._sample(sampler, prompts, 0)
        while trainer.step < total and not trainer.stopping():
            until = min(total, (trainer.step // every + 1) * every)
            with self.meter.stage("train"):
                trainer.train(until)
            if not measured:
                self.emit(LinesMeasured(measure_lines(trainer.model, trainer.optimizer)))
                measured = True
            if prompts and trainer.step == until and not trainer.stopping():
                self._sample(sampler, prompts, until)
        self.stop.listening = False
        if trainer.step:
            trainer.save()

    def _own(self, prompts: Sequence[Prompt]) -> Sequence[int]:
        """Numbers, from 0, of the prompts whose pictures this process makes.

        Weights that are cut up among the processes come to all of them at once. Then each makes as many
        pictures, and the last round begins again with the first prompts, whose pictures are the same.
        """
        rank, ranks, count = self.processes.rank, self.processes.ranks, len(prompts)
        if self.plan.value("offload") != "shard":
            return range(rank, count, ranks)
        return [n % count for n in range(rank, -(-count // ranks) * ranks, ranks)]

    def _sample(self, sampler: Sampler | None, prompts: Sequence[Prompt], step: int) -> None:
        with self.meter.stage("samples"):
            self._make_samples(sampler, prompts, step)

    def _make_samples(self, sampler: Sampler | None, prompts: Sequence[Prompt], step: int) -> None:
        self.emit(Progress("samples", 0, len(prompts)))
        numbers = self._own(prompts)
        own: list[Image.Image] = []
        if sampler:
            own = sampler.sample([self.encoder.text_features(prompts[n].caption) for n in numbers], numbers)
        gathered = self.processes.gather(dict(zip(numbers, own, strict=True)))
        if sampler is None or not self.processes.first:
            return
        pictures = {n: picture for part in gathered for n, picture in part.items()}
        for done, prompt in enumerate(prompts, 1):
            file = self.folder / "samples" / f"step-{step:06d}" / f"{done:02d}-{prompt.name}.png"
            try:
                write_picture(pictures[done - 1], file)
            except OSError as error:
                fail(
                    UNWRITABLE,
                    f"cannot write {file}: {error.strerror or error}",
                    cure="free some space; the next run goes on from the last checkpoint",
                )
            seed = sampler.seed(done - 1)
            self.emit(SampleMade(step, prompt.name, file.relative_to(self.folder), seed, prompt.caption))
            self.emit(Progress("samples", done, len(prompts)))

    def _write_adapter(self, model: Trainable, step: int) -> Path:
        """The adapter in the form, or both forms, that the recipe asks for; returns the first file."""
        plan, adapter = self.plan, self.plan.tables.adapter
        metadata = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": f"ideogram-4/{adapter.kind}",
            "modelspec.title": plan.name,
            "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "modelspec.license": f"subject to the licence of the base model, {plan.base.name}",
            "ideoflow.base": plan.base.name,
            "ideoflow.base_digest": plan.digests.base,
            "ideoflow.recipe_digest": plan.digests.recipe,
            "ideoflow.steps": str(step),
            "ideoflow.kind": adapter.kind,
            "ideoflow.rank": rank_words(adapter).removeprefix("rank "),
        }

        def weight(module: str) -> torch.Tensor:
            return base_weight(model.transformer.get_submodule(module))

        # Scales are multiplied in, so a reader needs to know of no alpha.
        updates = {name: update.folded() for name, update in trained_updates(model.transformer).items()}
        files: list[Path] = []
        for form in forms_of(plan.tables.output.format):
            file = self.folder / f"{plan.name}{'.diffusers' if files else ''}.safetensors"
            arranged = for_form(updates, cast(Form, form), weight)
            write_adapter(file, arranged, cast(Form, form), PRECISIONS[plan.tables.output.dtype], metadata)
            files.append(file)
            self.emit(Note(f"{file.name} loads in {readers(file).words}"))
        return files[0]

    def _tell(self, warnings: Sequence[Diagnostic]) -> None:
        for warning in warnings:
            self.emit(Note(warning.message))
