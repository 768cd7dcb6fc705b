"""AdamW (Loshchilov & Hutter 2019) with its two moments where the plan wants them.

| kind | moments | arithmetic |
|---|---|---|
| float32 | float32 beside the adapter | torch's |
| cpu | float32 in pinned host memory, on the device a bucket at a time | torch's, the same bits |
| offload | the same, and so are masters and gradients (:mod:`ideoflow.engine.masters`) | the same |
| 8bit | 8-bit numbers with a float32 scale for 256 (Dettmers et al. 2022) | bitsandbytes' |
| paged | float32 in memory that the driver moves between device and host | bitsandbytes' |

Checkpoints hold ``exp_avg`` and ``exp_avg_sq`` in float32, or 8-bit codes with their scales; each kind takes
up what another one left. torchao's optimiser with offloading was rejected: it steps on the processor, which
for the 0.2 G numbers of a rank-32 adapter takes longer than moving them to the device and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import NO_OPTIMIZER
from ideoflow.engine import masters as host
from ideoflow.engine.masters import HostArray, HostMasters, on_stream
from ideoflow.model.quiet import import_library
from ideoflow.recipe import TrainSettings

_EPS = 1e-8
# Numbers of one bucket on the device; there are two, so that one is filled while the other is worked on.
BUCKET = 8 << 20
_BLOCK = 256  # numbers that share a scale, in bitsandbytes' 8-bit moments


class Optimizer:
    """One step at a time on the adapter's parameters; saved and loaded by the parameters' names.

    ``guarded``: a step that is not finite can be skipped on the device, so that nobody has to wait and see.
    ``masters`` are the parameters' own where the kind is "offload", and only there.

    Raises:
        IdeoflowError: when the library that a kind needs is missing, or it cannot run on this device.
    """

    def __init__(
        self,
        kind: str,
        parameters: Mapping[str, nn.Parameter],
        settings: TrainSettings,
        masters: HostMasters | None = None,
    ) -> None:
        if (kind == "offload") != (masters is not None):
            raise ValueError(f"masters on the host are for 'offload' and for it alone, not for '{kind}'")
        self.kind, self.parameters, self.masters = kind, dict(parameters), masters
        values = list(self.parameters.values())
        self.device = device = masters.device if masters else values[0].device
        self.guarded = device.type == "cuda" and kind in ("float32", "cpu", "offload")
        options: dict[str, Any] = {
            "lr": settings.learning_rate,
            "betas": tuple(settings.betas),
            "eps": _EPS,
            "weight_decay": settings.weight_decay,
        }
        if kind == "float32":
            self.inner: Any = torch.optim.AdamW(values, fused=device.type == "cuda", **options)
        elif kind in ("cpu", "offload"):
            self.inner = HostAdamW(values, masters=masters, **options)
        else:
            if kind == "paged" and device.type != "cuda":
                cure = "set memory.optimizer_state = 'auto'"
                fail(NO_OPTIMIZER, "paged moments are in memory that an NVIDIA driver moves", cure=cure)
            optim = import_library("bitsandbytes", f"memory.optimizer_state = '{kind}'").optim
            self.inner = (optim.PagedAdamW if kind == "paged" else optim.AdamW8bit)(values, **options)

    def clip(self, limit: float) -> Tensor:
        """The gradients' global norm before clipping, a scalar on the device; the next step's are clipped."""
        if self.masters is None:
            return torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), limit)
        norm = self.masters.norm()
        # As torch.nn.utils.clip_grad_norm_ has it.
        self.inner.factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        return norm

    def step(self, rate: float, skip: Tensor | None = None) -> None:
        """Updates the parameters at this learning rate, and forgets their gradients.

        Args:
            skip: on a guarded optimiser, a float32 scalar on the device; where it is 1, nothing is updated.
        """
        for group in self.inner.param_groups:
            group["lr"] = rate
        if skip is not None:
            self.inner.found_inf = skip
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)

    def device_tensors(self) -> Iterator[Tensor]:
        """What it keeps on the device between steps, without the counters of steps."""
        if isinstance(self.inner, HostAdamW):
            yield from (array for slot in self.inner.slots for array in slot)
            return
        for state in self.inner.state.values():
            yield from (v for key, v in state.items() if key != "step" and isinstance(v, Tensor))

    def state(self) -> dict[str, Tensor]:
        """``NAME/step`` and the moments of every parameter that has been updated.

        What else is on the host, as masters are, may be read afterwards too.
        """
        if isinstance(self.inner, HostAdamW) and self.guarded:
            torch.cuda.synchronize(self.device)  # the host's copies may still be on their way
        saved = {}
        for name, parameter in self.parameters.items():
            state = self.inner.state.get(parameter) or {}
            for key, value in state.items():
                if key in ("qmap1", "qmap2"):  # the same for all, and never changed
                    continue
                plain = _PLAIN.get(key, key) if "absmax1" not in state else key
                saved[f"{name}/{plain}"] = torch.as_tensor(
                    value, dtype=None if key != "step" else torch.float32
                )
        return saved

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Takes up what :meth:`state` of any kind gave.

        Raises:
            KeyError: when a parameter's moments are not there.
        """
        for index, (name, parameter) in enumerate(self.parameters.items()):
            step = float(saved[f"{name}/step"])
            moments = [_moment(saved, name, parameter, n) for n in (1, 2)]
            if self.kind in ("float32", "cpu", "offload"):
                state = {"exp_avg": _dense(moments[0], True), "exp_avg_sq": _dense(moments[1], False)}
                state = {key: value.reshape(parameter.shape) for key, value in state.items()}
                self.inner.state[parameter] = {"step": torch.tensor(step), **state}
            else:
                self._load_library_state(parameter, index, step, moments)
        if self.kind == "float32":
            # Loading puts each value where this kind of AdamW wants it (the fused one: all on the device).
            self.inner.load_state_dict(self.inner.state_dict())
        elif isinstance(self.inner, HostAdamW):
            self.inner.take_up()

    def _load_library_state(
        self, parameter: nn.Parameter, index: int, step: float, moments: list[tuple[Tensor, ...]]
    ) -> None:
        functional = import_library("bitsandbytes.functional", "its optimisers")
        self.inner.init_state(self.inner.param_groups[0], parameter, 0, index)
        state = self.inner.state[parameter]
        state["step"] = int(step)
        for n, moment in enumerate(moments, 1):
            if f"absmax{n}" not in state:
                state[f"state{n}"].copy_(_dense(moment, n == 1))
                continue
            if len(moment) == 1:
                codes, rounded = functional.quantize_blockwise(
                    moment[0].to(parameter.device), code=state[f"qmap{n}"], blocksize=_BLOCK
                )
                moment = codes, rounded.absmax
            state[f"state{n}"].copy_(moment[0])
            state[f"absmax{n}"].copy_(moment[1])


_PLAIN = {"state1": "exp_avg", "state2": "exp_avg_sq"}


def _moment(saved: Mapping[str, Tensor], name: str, parameter: nn.Parameter, n: int) -> tuple[Tensor, ...]:
    """A moment's float32 values, or its 8-bit codes and their scales."""
    if f"{name}/absmax{n}" in saved:
        return saved[f"{name}/state{n}"], saved[f"{name}/absmax{n}"]
    return (saved[f"{name}/{_PLAIN[f'state{n}']}"].reshape(parameter.shape).clone(),)


def _dense(moment: tuple[Tensor, ...], signed: bool) -> Tensor:
    """In float32; of 8-bit codes only the second moment's have no sign."""
    if len(moment) == 1:
        return moment[0]
    functional = import_library("bitsandbytes.functional", "a checkpoint with 8-bit moments")
    codes, absmax = moment
    code = functional.create_dynamic_map(signed=signed)
    dense: Tensor = functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=_BLOCK)
    return dense


class HostAdamW:
    """torch's AdamW whose moments wait in host memory; on a CPU device the same copies are plain ones.

    With ``masters``, parameters and gradients come with the moments, and the parameters go back with them.
    ``factor``, a scalar on the device, is what the next step multiplies those gradients by.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, masters: HostMasters | None = None,
    ) -> None:  # fmt: skip
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.found_inf: Tensor | None = None
        self.factor: Tensor | None = None
        self.masters = masters
        self.device = masters.device if masters else parameters[0].device
        self._buckets = host.buckets(parameters, host.BUCKET if masters else BUCKET)
        cuda = self.device.type == "cuda"
        self._in, self._out = (torch.cuda.Stream(self.device) if cuda else None for _ in range(2))
        self._moments = {key: HostArray(parameters, cuda) for key in ("exp_avg", "exp_avg_sq")}
        self._arrays = list(self._moments.values())
        if masters:
            self._arrays += [masters.values, masters.gradients]
        size = max(sum(p.numel() for p in bucket) for bucket in self._buckets)
        # [which of the two][which of the arrays]
        self.slots = [[torch.empty(size, device=self.device) for _ in self._arrays] for _ in range(2)]
        self._free: list[torch.cuda.Event | None] = [None, None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        if self.masters:
            self.masters.finish()
        if self._in is not None and (self.masters or None in self._free):
            # Gradients are there, or nobody else uses the slots' memory; else moments may come at once.
            self._in.wait_stream(torch.cuda.current_stream(self.device))
        steps = self._steps()
        for index, bucket in enumerate(self._buckets):
            if any(p.grad is not None for p in bucket):
                self._step(bucket, index % 2, steps)
        self.factor = None
        if self._out is not None:
            # The next step, or whoever saves, reads the host's copies.
            torch.cuda.current_stream(self.device).wait_stream(self._out)

    def _steps(self) -> dict[nn.Parameter, Tensor]:
        """The counters of what has a gradient, where AdamW wants them: it counts them up."""
        live = [p for bucket in self._buckets for p in bucket if p.grad is not None]
        counters = [self._state(p)["step"] for p in live]
        if self._in is None:
            return dict(zip(live, counters, strict=True))
        # From pinned memory, so that the host does not wait for what is queued.
        there = torch.tensor([float(c) for c in counters], pin_memory=True).to(self.device, non_blocking=True)
        for counter in counters:
            counter += 1
        return dict(zip(live, there.unbind(), strict=True))

    def _step(self, bucket: list[nn.Parameter], which: int, steps: Mapping[nn.Parameter, Tensor]) -> None:
        away = [array.run(bucket) for array in self._arrays]
        here = [slot[: away[0].numel()] for slot in self.slots[which]]
        with on_stream(self._in):
            if self._in is not None and (free := self._free[which]):
                self._in.wait_event(free)
            for slot, array in zip(here, away, strict=True):
                slot.copy_(array, non_blocking=True)
        compute = torch.cuda.current_stream(self.device) if self._in is not None else None
        if compute is not None:
            compute.wait_stream(self._in)  # type: ignore[arg-type]
        live = [n for n, p in enumerate(bucket) if p.grad is not None]
        shaped = [[array[n] for n in live] for array in (list(host.views(slot, bucket)) for slot in here)]
        trained = [bucket[n] for n in live]
        values, gradients = trained, [p.grad for p in trained]
        if self.masters:
            values, gradients = shaped[2:]  # type: ignore[assignment]
            if self.factor is not None:
                torch._foreach_mul_(gradients, self.factor)
        adamw(
            values, gradients, shaped[0], shaped[1], [], [steps[p] for p in trained],  # type: ignore[arg-type]
            fused=compute is not None, found_inf=self.found_inf, amsgrad=False,
            beta1=self.betas[0], beta2=self.betas[1],
            lr=self.param_groups[0]["lr"], weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip
        if self.masters:
            self.masters.write(trained, values)
        if compute is not None:
            self._out.wait_stream(compute)  # type: ignore[union-attr]
        with on_stream(self._out):
            for slot, array in zip(here[:3], away[:3], strict=True):  # all but the gradients
                array.copy_(slot, non_blocking=True)
            if self._out is not None:
                self._free[which] = self._out.record_event()

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            moments = {key: array[parameter] for key, array in self._moments.items()}
            self.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return self.state[parameter]

    def take_up(self) -> None:
        """Puts moments that were loaded where they wait."""
        for parameter, state in self.state.items():
            for key, array in self._moments.items():
                state[key] = array[parameter].copy_(state[key])  # type: ignore[index]
