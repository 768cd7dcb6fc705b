"""The training loop of the reference path: steps, checkpoints, samples; stops and goes on exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideoflow.artifacts import Checkpoint, Checkpoints
from ideoflow.data.cache import TensorCache
from ideoflow.data.encode import Encoded
from ideoflow.data.survey import Share
from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import LOSS_EXPLODED
from ideoflow.engine.batches import Batches
from ideoflow.engine.events import CheckpointSaved, Emit, Progress, StepDone
from ideoflow.engine.exchange import GradientExchange
from ideoflow.engine.optimizer import Optimizer
from ideoflow.engine.processes import ALONE, Processes
from ideoflow.engine.schedule import learning_rate_factor
from ideoflow.engine.setup import Trainable
from ideoflow.plan.document import Plan


@dataclass
class Stop:
    """Asks training to save and stop after the step, or the sampling, that it is in."""

    requested: bool = False
    # Whether training is under way, so that a request is heard.
    listening: bool = False


class _Reading:
    """A step's loss and gradient norm, on their way from the device."""

    def __init__(self, step: int, rate: float, values: Tensor) -> None:
        self.step, self.rate, self._values = step, rate, values
        self._ready: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record()

    def values(self) -> list[float]:
        """Both, as soon as the device has come so far."""
        if self._ready:
            self._ready.synchronize()
        result: list[float] = self._values.tolist()
        return result


def run_identity(plan: Plan) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    adapter = asdict(plan.tables.adapter)
    del adapter["init"]  # a checkpoint has what became of it
    return {"base": plan.digests.base, **adapter, "targets": list(plan.targets)}


class Trainer:
    """Trains a :class:`Trainable` as the plan says; ``around`` gives what each step, by number, runs in."""

    around: Callable[[int], AbstractContextManager[None]] = staticmethod(nullcontext)

    def __init__(
        self,
        plan: Plan,
        model: Trainable,
        data: Sequence[Encoded],
        shares: Sequence[Share],
        cache: TensorCache,
        checkpoints: Checkpoints,
        emit: Emit,
        stop: Stop,
        processes: Processes = ALONE,
    ) -> None:
        self.plan, self.model, self.processes = plan, model, processes
        self.checkpoints, self.emit, self.stop = checkpoints, emit, stop
        self.settings = plan.tables.train
        pin = model.transformer.device.type == "cuda"
        rank, ranks = processes.rank, processes.ranks
        self.batches = Batches(plan.tables, data, shares, cache, pin=pin, rank=rank, ranks=ranks)
        self.step = 0
        self.saved_at: int | None = None
        kind = str(plan.value("optimizer_state"))
        self.optimizer = Optimizer(kind, model.parameters, self.settings, model.masters)
        self.exchange: GradientExchange | None = None
        if ranks > 1:
            trained = list(model.parameters.values())
            processes.copy_from_first(trained)
            group = processes.group(trained[0].device)
            self.exchange = GradientExchange(trained, overlaps=model.overlaps, group=group)
        self._asked_at, self._agreed = -1, False
        self._unreported: _Reading | None = None
        self._told_at = 0.0

    def resume(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's state in place."""
        for name, parameter in self.model.parameters.items():
            parameter.data.copy_(checkpoint.adapter[name])
        if self.model.masters:
            self.model.masters.written()
        self.optimizer.load(checkpoint.optimizer)
        self.step = self.saved_at = checkpoint.step

    def train(self, until: int) -> None:
        """Runs to step ``until``, or to the step in which a stop is requested; saves as the plan says.

        Raises:
            IdeoflowError: when the loss stops being a number, or a checkpoint cannot be written.
        """
        self.model.transformer.train()
        total = self.settings.steps
        self.emit(Progress("train", self.step, total))
        self._told_at = time.perf_counter()
        while self.step < until and not self.stopping():
            with self.around(self.step + 1):
                self._one_step()
                self.emit(Progress("train", self.step, total))
            if self.step == total or self.step % self.settings.checkpoint_every == 0 or self.stopping():
                self.save()
        self._report()

    def stopping(self) -> bool:
        """Whether a stop was requested, of any process: they ask each other once a step and stop together."""
        if self.processes.ranks == 1:
            return self.stop.requested
        if self._asked_at != self.step:
            self._asked_at, self._agreed = self.step, self.processes.any(self.stop.requested)
        return self._agreed

    def _one_step(self) -> None:
        """Queues a step on the device, and reads what the one before it came to.

        Waiting for a step's loss before the next is queued would leave a GPU idle in between. So the
        optimiser is told on the device to skip a step that is not finite, and the host learns of it while
        the next step's gradients are computed, before they are applied.
        """
        factor = learning_rate_factor(
            self.step, self.settings.steps, self.settings.warmup, self.settings.decay
        )
        rate = self.settings.learning_rate * factor
        loss, norm = self._gradients(), self._gradient_norm()
        outcome = _Reading(self.step + 1, rate, torch.stack((loss, norm.to(loss.dtype))))
        if self.optimizer.guarded:
            self._report()
            self.optimizer.step(rate, skip=(~(loss + norm).isfinite()).float())
        else:
            self._check(outcome)
            self.optimizer.step(rate)
        self.step += 1
        self._unreported = outcome
        if not self.optimizer.guarded:
            self._report()

    def _gradients(self) -> Tensor:
        """The step's loss; its gradients, of all processes, are the parameters' then."""
        parts, batches = self.settings.accumulation, self.batches.of(self.step)
        if self.exchange is None:
            return torch.stack([self.model.gradients(batch, parts) for batch in batches]).mean()
        losses = []
        for number, (batch, share) in enumerate(zip(batches, self.batches.shares(self.step), strict=True), 1):
            if number == parts:
                self.exchange.arm()
            losses.append(self.model.gradients(batch, parts / share) * share)
        return self.exchange.finish(torch.stack(losses).mean())

    def _report(self) -> None:
        """Tells of the last step that was queued, if it was not told yet.

        Raises:
            IdeoflowError: if its loss or gradient is not a number.
        """
        if self._unreported is None:
            return
        outcome, self._unreported = self._unreported, None
        loss, norm = self._check(outcome)
        now = time.perf_counter()
        self.emit(StepDone(outcome.step, loss, outcome.rate, norm, now - self._told_at))
        self._told_at = now

    def _check(self, outcome: _Reading) -> list[float]:
        """Loss and gradient norm of a step that went well."""
        loss, norm = outcome.values()
        if math.isfinite(loss) and math.isfinite(norm):
            return [loss, norm]
        message = f"at step {outcome.step} the loss is {loss} and the gradient norm {norm}"
        if outcome.step == 1:  # before any update
            note = (
                "nothing has been learnt yet: the base, or what is cached, holds numbers that are not finite"
            )
            cure = "download the base again; if that does not help, name another cache.folder"
            fail(LOSS_EXPLODED, message, cure=cure, notes=[note])
        kept = (
            f"the last checkpoint is of step {self.saved_at}"
            if self.saved_at
            else "there is no checkpoint yet"
        )
        fail(LOSS_EXPLODED, message, cure="lower train.learning_rate, or add a train.warmup", notes=[kept])

    def _gradient_norm(self) -> Tensor:
        """The global norm before clipping; clips if the plan asks for it."""
        return self.optimizer.clip(self.settings.max_grad_norm or math.inf)

    def save(self) -> Path | None:
        """Writes a checkpoint of the present step, unless there is one; of several processes, the first."""
        self._report()  # a step that went wrong must not be saved
        if self.saved_at == self.step:
            return None
        if not self.processes.first:
            self.saved_at = self.step
            return None
        folder = self.checkpoints.save(
            self.step,
            self.model.parameters,
            self.optimizer.state(),
            {"recipe": self.plan.digests.recipe, "captions": self.plan.digests.captions},
        )
        self.saved_at = self.step
        self.emit(CheckpointSaved(self.step, folder))
        return folder
