"""The fused operations of a training step, by name; this module imports neither torch nor Triton.

Every operation exists twice under one name and signature: in :mod:`ideoflow.kernels.reference` as the eager
truth, and as a Triton kernel in the module that the table names. :func:`load` gives one of the two sets. An
implementation asked for by name runs or fails; nothing falls back in silence.

A *packed* tensor has one row a token ([T, ...], see :mod:`ideoflow.engine.packed`). An *operand* is what a
matrix product reads: plain values, or e4m3 values with one float32 scale a row.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Literal

Backend = Literal["triton", "reference"]

# operation -> the module of this package that holds its Triton kernel
OPS: dict[str, str] = {
    "quantize": "quantize",
    "dequantize": "quantize",
    "transpose": "quantize",
    "norm_modulate": "norm",
    "norm_modulate_backward": "norm",
    "gated_residual": "norm",
    "gated_residual_backward": "norm",
    "qk_norm_rope": "rotary",
    "qk_norm_rope_backward": "rotary",
    "swiglu": "swiglu",
    "swiglu_backward": "swiglu",
    "adapter_down": "adapter",
    "adapter_up": "adapter",
    "adapter_gradient": "adapter",
    "split_precision": "adapter",
}


def load(backend: Backend) -> SimpleNamespace:
    """All operations of one backend as attributes.

    Raises:
        ImportError: for "triton" where Triton is not installed.
        ValueError: for an unknown backend.
    """
    if backend not in ("triton", "reference"):
        raise ValueError(f"unknown kernel backend {backend!r}")
    return SimpleNamespace(
        backend=backend,
        **{
            op: getattr(
                import_module(f"ideoflow.kernels.{module if backend == 'triton' else 'reference'}"), op
            )
            for op, module in OPS.items()
        },
    )
