"""Attention over packed sequences, forward and backward, with no mask ever built.

``sdpa`` is PyTorch's own: one call for a batch of equal lengths, one a sample otherwise. ``flash4`` is
FlashAttention-4, the fastest of the three on Hopper, which takes mixed lengths as cumulative sums and
compiles once. ``cudnn_varlen`` hands the samples' lengths to cuDNN as data (ragged offsets and a padding mask
by length), so that one plan serves every mixture of lengths below its maximum. All keep the softmax's
log-sum-exp for the backward pass (Dao et al. 2022).
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ideoflow.diagnostics import fail
from ideoflow.diagnostics.codes.engine import ATTENTION_MISSING
from ideoflow.engine.packed import PackedLayout, sent
from ideoflow.resources import user_cache

Kernel = Literal["flash4", "cudnn_varlen", "sdpa"]
_PLAN_STEP = 256  # ragged plans are built for the longest sample rounded up to a multiple of this
_CALLS_BEFORE_EXACT = 230  # 80 ms of building over the 0.35 ms that an exact plan saves at 4416 tokens


def make_attention(kernel: Kernel, device: torch.device) -> Attention:
    """The attention asked for by name.

    Raises:
        IdeoflowError: if it cannot run on this device.
    """
    if kernel == "sdpa":
        return SdpaAttention()
    if kernel == "flash4":
        return FlashAttention4(device)
    if device.type != "cuda" or importlib.util.find_spec("cudnn") is None:
        missing = "the package nvidia-cudnn-frontend" if device.type == "cuda" else "an NVIDIA GPU"
        fail(ATTENTION_MISSING, f"attention `cudnn_varlen` needs {missing}",
             cure="install ideoflow[cuda], or choose attention `sdpa`")  # fmt: skip
    return CudnnVarlenAttention()


class SdpaAttention:
    """PyTorch's attention: cuDNN on Hopper and later, flash elsewhere, memory-efficient in float32."""

    def forward(self, qkv: Tensor, layout: PackedLayout) -> tuple[Tensor, Any]:
        """qkv [T, 3, H, E] -> the output [T, H, E] and what the backward pass needs besides."""
        runs = _runs(layout)
        if len(runs) == 1 and layout.tokens == layout.total:
            result, extra = _aten_forward(*_heads_first(qkv, layout.samples))
            return result.transpose(1, 2).reshape(qkv[:, 0].shape), [extra]
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        out[layout.tokens :] = 0
        saved = []
        for start, batch, length in runs:
            rows = slice(start, start + batch * length)
            result, extra = _aten_forward(*_heads_first(qkv[rows], batch))
            out[rows].view(batch, length, *out.shape[1:]).copy_(result.transpose(1, 2))
            saved.append(extra)
        return out, saved

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Any, layout: PackedLayout
                 ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, each [T, H, E]."""
        runs = _runs(layout)
        if len(runs) == 1 and layout.tokens == layout.total:
            grads = self._backward(dout, qkv, out, saved[0], layout.samples)
            return tuple(grad.reshape(out.shape) for grad in grads)
        dqkv = torch.empty_like(qkv)
        dqkv[layout.tokens :] = 0
        for (start, batch, length), extra in zip(runs, saved, strict=True):
            rows = slice(start, start + batch * length)
            target = dqkv[rows].view(batch, length, 3, *out.shape[1:])
            for i, grad in enumerate(self._backward(dout[rows], qkv[rows], out[rows], extra, batch)):
                target[:, :, i].copy_(grad)
        return dqkv[:, 0], dqkv[:, 1], dqkv[:, 2]

    def _backward(self, dout: Tensor, qkv: Tensor, out: Tensor, extra: Any, batch: int) -> list[Tensor]:
        """Gradients of one call, each [batch, length, H, E]."""
        shape = (batch, -1, *out.shape[1:])
        grads = _aten_backward(dout.view(shape).transpose(1, 2), *_heads_first(qkv, batch),
                               out.view(shape).transpose(1, 2), extra)  # fmt: skip
        return [grad.transpose(1, 2) for grad in grads]


def _runs(layout: PackedLayout) -> list[tuple[int, int, int]]:
    """(start, samples, length) of each call: all samples at once where they are equal, else one by one."""
    if layout.equal:
        return [(0, layout.samples, layout.lengths[0])]
    lengths = zip(layout.starts, layout.lengths, strict=False)
    return [(start, 1, length) for start, length in lengths if length]


def _heads_first(qkv: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, L, E] of packed qkv [B * L, 3, H, E]."""
    x = qkv.view(batch, -1, *qkv.shape[1:])
    return x[:, :, 0].transpose(1, 2), x[:, :, 1].transpose(1, 2), x[:, :, 2].transpose(1, 2)


def _variant(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "cpu"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "efficient"
    return "cudnn" if torch.cuda.get_device_capability(q.device) >= (9, 0) else "flash"


def _aten_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Any]:
    aten, variant = torch.ops.aten, _variant(q)
    if variant == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if variant == "efficient":
        out, *extra = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
    elif variant == "cudnn":
        out, *extra, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    else:
        out, *extra, _ = aten._scaled_dot_product_flash_attention(q, k, v)
    return out, extra


def _aten_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, extra: Any) -> Any:
    aten, variant = torch.ops.aten, _variant(q)
    if variant == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, extra, 0.0, False
        )
    if variant == "efficient":
        return aten._scaled_dot_product_efficient_attention_backward(
            dout, q, k, v, None, out, *extra, 0.0, [True, True, True, False], False
        )[:3]
    lse, cum_q, cum_k, max_q, max_k, seed, offset = extra
    if variant == "cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False
        )
    return aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset
    )


class FlashAttention4:
    """FlashAttention-4 (Zadouri et al. 2026), by its functions below autograd.

    They are the package's private ones: the public function keeps its own graph, and what is kept for the
    backward pass is the activation budget's to decide. A release that changes them is told as such.
    """

    def __init__(self, device: torch.device) -> None:
        # Compiled kernels are kept between runs; the package reads these two when it is imported.
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(user_cache() / "flash-attention"))
        try:
            if device.type != "cuda":
                raise ImportError("it needs an NVIDIA GPU")
            from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
        except ImportError as error:
            fail(ATTENTION_MISSING, f"attention `flash4` cannot be used: {error}",
                 cure="pip install 'ideoflow[cuda]', or choose attention `sdpa`")  # fmt: skip
        self._forward, self._backward = _flash_attn_fwd, _flash_attn_bwd

    def forward(self, qkv: Tensor, layout: PackedLayout) -> tuple[Tensor, Any]:
        """qkv [T, 3, H, E] -> the output [T, H, E] and the log-sum-exp: [B, H, L], or [H, T] if they mix."""
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        out[layout.tokens :] = 0
        data = self._data(qkv.device, layout)
        q, k, v, o = (self._shaped(x, layout) for x in (*qkv.unbind(1), out))
        stats = self._forward(q, k, v, out=o, return_lse=True, **data)[1]
        return out, stats

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Any, layout: PackedLayout
                 ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, each [T, H, E]."""
        dqkv = torch.empty_like(qkv)
        dqkv[layout.tokens :] = 0
        q, k, v, o, do, dq, dk, dv = (
            self._shaped(x, layout) for x in (*qkv.unbind(1), out, dout, *dqkv.unbind(1))
        )
        self._backward(q, k, v, o, do, saved, dq=dq, dk=dk, dv=dv, **self._data(qkv.device, layout))
        return dqkv[:, 0], dqkv[:, 1], dqkv[:, 2]

    def _shaped(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """The rows that belong to samples: [T, H, E], or [B, L, H, E] where all are as long."""
        x = x[: layout.tokens]
        return x.unflatten(0, (layout.samples, -1)) if layout.equal else x

    def _data(self, device: torch.device, layout: PackedLayout) -> dict[str, Any]:
        if layout.equal:
            return {}
        ends, longest = layout.tensors(device).cu_seqlens, layout.max_length
        return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}


@dataclass
class _Plan:
    """A built cuDNN graph, its tensors by role, and the workspace size that it asks for."""

    graph: Any
    tensors: dict[str, Any]
    workspace: int


@dataclass
class CudnnVarlenAttention:
    """cuDNN's attention through its own front end, with two kinds of plan.

    A *ragged* plan takes all samples at once with their lengths as data: one plan for every mixture, but 12%
    slower than a plan for exactly one length, which takes 40 ms to build each way. So a length that has come
    back often enough to have wasted that time gets plans of its own, and a batch whose lengths all have
    theirs runs sample by sample (equal samples at once).
    """

    _plans: dict[tuple[Any, ...], _Plan] = field(default_factory=dict)
    _lengths: dict[PackedLayout, dict[str, Tensor]] = field(default_factory=dict)
    _seen: dict[tuple[int, int], int] = field(default_factory=dict)
    _handle: Any = None

    def forward(self, qkv: Tensor, layout: PackedLayout) -> tuple[Tensor, Any]:
        """qkv [T, 3, H, E] -> the output [T, H, E] and the log-sum-exp for the backward pass.

        The latter is one tensor [B, H, S, 1] from a ragged plan, or a list of one a run from exact plans.
        """
        out = torch.empty_like(qkv[:, 0], memory_format=torch.contiguous_format)
        out[layout.tokens :] = 0
        _, _, heads, size = qkv.shape
        if not self._exact(layout):
            plan = self._plan("forward", layout.samples, _padded(layout), heads, size, qkv.dtype, True)
            stats = torch.empty(layout.samples, heads, _padded(layout), 1, device=qkv.device)
            self._run(
                plan, q=qkv[:, 0], k=qkv[:, 1], v=qkv[:, 2], o=out, stats=stats, **self._data(qkv, layout)
            )
            return out, stats
        saved = []
        for start, batch, length in _runs(layout):
            plan = self._plan("forward", batch, length, heads, size, qkv.dtype, False)
            saved.append(torch.empty(batch, heads, length, 1, device=qkv.device))
            q, k, v = qkv[start:].unbind(1)
            self._run(plan, q=q, k=k, v=v, o=out[start:], stats=saved[-1])
        return out, saved

    def backward(self, dout: Tensor, qkv: Tensor, out: Tensor, saved: Any, layout: PackedLayout
                 ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, each [T, H, E]."""
        dqkv = torch.empty_like(qkv)
        dqkv[layout.tokens :] = 0
        _, _, heads, size = qkv.shape
        if isinstance(saved, Tensor):
            plan = self._plan("backward", layout.samples, _padded(layout), heads, size, qkv.dtype, True)
            (q, k, v), (dq, dk, dv) = qkv.unbind(1), dqkv.unbind(1)
            self._run(plan, q=q, k=k, v=v, o=out, do=dout, stats=saved, dq=dq, dk=dk, dv=dv,
                      **self._data(qkv, layout))  # fmt: skip
            return dq, dk, dv
        for (start, batch, length), stats in zip(_runs(layout), saved, strict=True):
            plan = self._plan("backward", batch, length, heads, size, qkv.dtype, False)
            (q, k, v), (dq, dk, dv) = qkv[start:].unbind(1), dqkv[start:].unbind(1)
            self._run(plan, q=q, k=k, v=v, o=out[start:], do=dout[start:], stats=stats, dq=dq, dk=dk, dv=dv)
        return dqkv[:, 0], dqkv[:, 1], dqkv[:, 2]

    def _exact(self, layout: PackedLayout) -> bool:
        """Counts this call; whether every length of the layout has earned plans of its own."""
        keys = {(batch, length) for _, batch, length in _runs(layout)}
        for key in keys:
            self._seen[key] = self._seen.get(key, 0) + 1
        return all(self._seen[key] > _CALLS_BEFORE_EXACT for key in keys)

    def _run(self, plan: _Plan, **data: Tensor) -> None:
        import cudnn

        workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=data["q"].device)
        cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        # Pointers rather than tensors: a ragged tensor's shape is the plan's, not the packed one's.
        pack = {plan.tensors[role]: value.data_ptr() for role, value in data.items()}
        plan.graph.execute(pack, workspace, handle=self._handle)

    def _data(self, qkv: Tensor, layout: PackedLayout) -> dict[str, Tensor]:
        """A layout for ragged plans: int32 lengths [B], int64 element offsets [B + 1] of qkv and output."""
        if layout not in self._lengths:
            if len(self._lengths) >= 256:
                self._lengths.clear()
            starts = torch.tensor(layout.starts, dtype=torch.int64) * qkv.shape[2] * qkv.shape[3]
            lengths = torch.tensor(layout.lengths, dtype=torch.int32)
            data = {"lengths": lengths, "qkv_offset": 3 * starts, "out_offset": starts}
            self._lengths[layout] = {name: sent(value, qkv.device) for name, value in data.items()}
        return self._lengths[layout]

    def _plan(self, *key: Any) -> _Plan:
        """The plan for (direction, batch, length, heads, head size, type, ragged), built the first time."""
        if key not in self._plans:
            self._plans[key] = self._build(*key)
        return self._plans[key]

    def _build(self, direction: str, batch: int, length: int, heads: int, size: int, dtype: torch.dtype,
               ragged: bool) -> _Plan:  # fmt: skip
        import cudnn

        if self._handle is None:
            self._handle = cudnn.create_handle()
        io = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}.get(dtype)
        if io is None:
            fail(ATTENTION_MISSING, f"cuDNN's attention takes bf16 or float16, not {dtype}",
                 cure="choose attention `sdpa`")  # fmt: skip
        graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=cudnn.data_type.FLOAT,
                              compute_data_type=cudnn.data_type.FLOAT, handle=self._handle)  # fmt: skip
        width = heads * size
        shape = [batch, heads, length, size]
        tensors: dict[str, Any] = {}
        common: dict[str, Any] = {"attn_scale": 1 / math.sqrt(size)}
        if ragged:
            for name, count, kind in (("lengths", batch, cudnn.data_type.INT32),
                                      ("qkv_offset", batch + 1, cudnn.data_type.INT64),
                                      ("out_offset", batch + 1, cudnn.data_type.INT64)):  # fmt: skip
                tensors[name] = graph.tensor(
                    name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind
                )
            lengths = tensors["lengths"]
            common |= {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}

        def placed(name: str, tensor: Any, packed: int) -> None:
            if ragged:
                tensor.set_ragged_offset(tensors["qkv_offset" if packed == 3 else "out_offset"])
            tensors[name] = tensor

        def strides(packed: int) -> list[int]:
            return [length * packed * width, size, packed * width, 1]

        def given(name: str, packed: int) -> None:
            placed(name, graph.tensor(name=name, dim=shape, stride=strides(packed), data_type=io), packed)

        def made(name: str, tensor: Any, packed: int) -> None:
            tensor.set_output(True).set_dim(shape).set_stride(strides(packed)).set_data_type(io)
            placed(name, tensor, packed)

        for name in "qkv":
            given(name, 3)
        if direction == "forward":
            out, stats = graph.sdpa(name="sdpa", q=tensors["q"], k=tensors["k"], v=tensors["v"],
                                    generate_stats=True, **common)  # fmt: skip
            made("o", out, 1)
            stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)
            tensors["stats"] = stats
        else:
            given("o", 1)
            given("do", 1)
            tensors["stats"] = graph.tensor(
                name="stats", dim=[batch, heads, length, 1], stride=[heads * length, length, 1, 1],
                data_type=cudnn.data_type.FLOAT,
            )  # fmt: skip
            roles = {name: tensors[name] for name in ("q", "k", "v", "o", "stats")}
            grads = graph.sdpa_backward(name="sdpa_backward", dO=tensors["do"], **roles, **common)
            for name, tensor in zip(("dq", "dk", "dv"), grads, strict=True):
                made(name, tensor, 3)
        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            fail(ATTENTION_MISSING, f"cuDNN has no {direction} attention for {heads} heads of {size} here",
                 cure="choose attention `sdpa`", notes=reason[:1])  # fmt: skip
        return _Plan(graph, tensors, graph.get_workspace_size())


Attention = SdpaAttention | FlashAttention4 | CudnnVarlenAttention


def _padded(layout: PackedLayout) -> int:
    return -(-layout.max_length // _PLAN_STEP) * _PLAN_STEP
