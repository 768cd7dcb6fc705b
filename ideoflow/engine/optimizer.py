"""AdamW (Loshchilov & Hutter 2019) with its two moments where the plan wants them.

| kind | moments | arithmetic |
|---|---|---|
| float32 | float32 beside the adapter | torch's |
| cpu | float32 in pinned host memory, on the device a bucket at a time | torch's, the same bits |
| 8bit | 8-bit numbers with a float32 scale for 256 (Dettmers et al. 2022) | bitsandbytes' |
| paged | float32 in memory that the driver moves between device and host | bitsandbytes' |

Checkpoints hold ``exp_avg`` and ``exp_avg_sq`` in float32, or 8-bit codes with their scales; each kind takes
up what another one left. torchao's optimiser with offloading was rejected: it steps on the processor, which
for the 0.2 G numbers of a rank-32 adapter takes longer than moving them to the device and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import NO_OPTIMIZER
from ideoflow.model.quiet import import_library
from ideoflow.recipe import TrainSettings

_EPS = 1e-8
# Numbers of one bucket on the device; there are two, so that one is filled while the other is worked on.
BUCKET = 8 << 20
_BLOCK = 256  # numbers that share a scale, in bitsandbytes' 8-bit moments


class Optimizer:
    """One step at a time on the adapter's parameters; saved and loaded by the parameters' names.

    ``guarded``: a step that is not finite can be skipped on the device, so that nobody has to wait and see.

    Raises:
        IdeoflowError: when the library that a kind needs is missing, or it cannot run on this device.
    """

    def __init__(self, kind: str, parameters: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        self.kind, self.parameters = kind, dict(parameters)
        values = list(self.parameters.values())
        device = values[0].device
        self.guarded = device.type == "cuda" and kind in ("float32", "cpu")
        options: dict[str, Any] = {
            "lr": settings.learning_rate,
            "betas": tuple(settings.betas),
            "eps": _EPS,
            "weight_decay": settings.weight_decay,
        }
        if kind == "float32":
            self.inner: Any = torch.optim.AdamW(values, fused=device.type == "cuda", **options)
        elif kind == "cpu":
            self.inner = HostAdamW(values, **options)
        else:
            if kind == "paged" and device.type != "cuda":
                cure = "set memory.optimizer_state = 'auto'"
                fail(NO_OPTIMIZER, "paged moments are in memory that an NVIDIA driver moves", cure=cure)
            optim = import_library("bitsandbytes", f"memory.optimizer_state = '{kind}'").optim
            self.inner = (optim.PagedAdamW if kind == "paged" else optim.AdamW8bit)(values, **options)

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
        if self.kind == "cpu":
            yield from (moment for slot in self.inner.slots for moment in slot)
            return
        for state in self.inner.state.values():
            yield from (v for key, v in state.items() if key != "step" and isinstance(v, Tensor))

    def state(self) -> dict[str, Tensor]:
        """``NAME/step`` and the moments of every parameter that has been updated."""
        if self.kind == "cpu" and self.guarded:
            torch.cuda.synchronize()  # the host's copies may still be on their way
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
            if self.kind in ("float32", "cpu"):
                state = {"exp_avg": _dense(moments[0], True), "exp_avg_sq": _dense(moments[1], False)}
                state = {key: value.reshape(parameter.shape) for key, value in state.items()}
                self.inner.state[parameter] = {"step": torch.tensor(step), **state}
            else:
                self._load_library_state(parameter, index, step, moments)
        if self.kind == "float32":
            # Loading puts each value where this kind of AdamW wants it (the fused one: all on the device).
            self.inner.load_state_dict(self.inner.state_dict())
        elif self.kind == "cpu":
            self.inner.pin()

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
    """torch's AdamW whose moments wait in host memory; on a CPU device the same copies are plain ones."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self.found_inf: Tensor | None = None
        self.device = parameters[0].device
        self._buckets = list(_buckets(parameters))
        cuda = self.device.type == "cuda"
        self._in, self._out = (torch.cuda.Stream(self.device) if cuda else None for _ in range(2))
        size = max(sum(p.numel() for p in bucket) for bucket in self._buckets)
        # [which of the two][exp_avg or exp_avg_sq]
        self.slots = [[torch.empty(size, device=self.device) for _ in range(2)] for _ in range(2)]
        self._free: list[torch.cuda.Event | None] = [None, None]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.param_groups[0]["params"]:  # type: ignore[attr-defined]
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for index, whole in enumerate(self._buckets):
            bucket = [p for p in whole if p.grad is not None]
            if bucket:
                self._step(bucket, index % 2)
        if self._out is not None:
            # The next step, or whoever saves, reads the host's copies.
            torch.cuda.current_stream(self.device).wait_stream(self._out)

    def _step(self, bucket: list[nn.Parameter], which: int) -> None:
        states = [self._host(p) for p in bucket]
        exp_avgs, squares = (list(_views(slot, bucket)) for slot in self.slots[which])
        moved = [(view, s["exp_avg"]) for view, s in zip(exp_avgs, states, strict=True)]
        moved += [(view, s["exp_avg_sq"]) for view, s in zip(squares, states, strict=True)]
        with _on(self._in):
            if self._in is not None:
                if free := self._free[which]:
                    self._in.wait_event(free)
                else:
                    self._in.wait_stream(torch.cuda.current_stream(self.device))
            for view, host in moved:
                view.copy_(host, non_blocking=True)
        compute = torch.cuda.current_stream(self.device) if self._in is not None else None
        if compute is not None:
            compute.wait_stream(self._in)  # type: ignore[arg-type]
        steps = [s["step"] for s in states]
        if compute is not None:
            steps = list(torch.tensor([float(s) for s in steps]).to(self.device).unbind())
        adamw(
            bucket, [p.grad for p in bucket], exp_avgs, squares, [], steps,  # type: ignore[misc]
            fused=compute is not None, found_inf=self.found_inf, amsgrad=False,
            beta1=self.betas[0], beta2=self.betas[1],
            lr=self.param_groups[0]["lr"], weight_decay=self.weight_decay, eps=self.eps, maximize=False,
        )  # fmt: skip
        if compute is not None:
            for s in states:
                s["step"] += 1
            self._out.wait_stream(compute)  # type: ignore[union-attr]
        with _on(self._out):
            for view, host in moved:
                host.copy_(view, non_blocking=True)
            if self._out is not None:
                self._free[which] = self._out.record_event()

    def _host(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            pinned = self.device.type == "cuda"
            zeros = {
                key: torch.zeros(parameter.shape, pin_memory=pinned) for key in ("exp_avg", "exp_avg_sq")
            }
            self.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        return self.state[parameter]

    def pin(self) -> None:
        """Puts moments that were loaded into pinned memory."""
        for state in self.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].float().cpu()
                if self.device.type == "cuda":
                    state[key] = state[key].pin_memory()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of at most :data:`BUCKET` numbers, and at least one parameter each."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    yield bucket


def _views(slot: Tensor, bucket: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    start = 0
    for parameter in bucket:
        yield slot[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()


def _on(stream: torch.cuda.Stream | None) -> Any:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()
