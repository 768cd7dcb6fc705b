"""Every kernel compiles for cards that are not at hand, at the model's sizes, within their shared memory.

Triton's compiler needs no GPU: a process of its own, without the interpreter, compiles what the operations
would launch there, down to the machine code. The oldest and the newest card get every kernel. Between them,
what depends on the card is how much shared memory the adapter's products take: these and no others, and where
the limit is the newest card's, in e4m3 only.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

# Shared memory that one block may take, in bytes: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability".
LIMITS = {86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
WHOLE = (86, 120)
HIDDEN, FFN, HEADS, HEAD = 4608, 12288, 18, 256


# Width, columns of z and parts of the adapter's products: q, k and v at rank 128, whose down matrices are
# one, and at rank 32, whose up matrices work on a part of the columns each.
PRODUCTS = ((HIDDEN, 3 * 128, 1), (3 * HIDDEN, 32, 3))


def compile_all() -> dict[int, dict[str, int]]:
    """The most shared memory of each kernel on each card."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ideoflow import kernels
    from ideoflow.kernels import adapter, quantize

    class Card:
        """What the compiler asks of a driver."""

        arch = 0

        def get_current_target(self):
            return GPUTarget("cuda", self.arch, 32)

        def get_current_device(self):
            return self.arch  # what is compiled is kept by device

        def get_current_stream(self, device=None):
            return 0

    card, run = Card(), JITFunction.run
    driver.set_active(card)
    shared: dict[int, dict[str, int]] = {arch: {} for arch in LIMITS}

    def compile_only(self, *args, warmup, **options):
        kernel = run(self, *args, warmup=True, **options)
        name, found = self.fn.__name__, shared[card.arch]
        found[name] = max(found.get(name, 0), kernel.metadata.shared)

    JITFunction.run = compile_only
    adapter.shared_memory = lambda device: LIMITS[card.arch]
    quantize._reads_e4m3 = lambda device: card.arch >= 89
    ops, eager = kernels.load("triton"), kernels.load("reference")
    tokens, bf16 = 1024, torch.bfloat16

    def zeros(*shape, dtype=bf16):
        return torch.zeros(*shape, dtype=dtype)

    weight = eager.quantize(zeros(FFN, HIDDEN))
    sample, h, factor = zeros(tokens, dtype=torch.int32), zeros(tokens, HIDDEN), zeros(1, HIDDEN)
    qkv, gate_up = zeros(tokens, 3, HEADS, HEAD), zeros(tokens, 2 * FFN)
    rope = zeros(HEAD), zeros(HEAD), zeros(tokens, HEAD // 2), zeros(tokens, HEAD // 2)

    def everything_else():
        ops.dequantize(weight.values, weight.scale, bf16)
        ops.transpose(weight.values)
        inverse = ops.qk_norm_rope(qkv, *rope, 1e-5)
        ops.gated_residual(h, h, factor, sample, 1e-5)
        ops.norm_modulate_backward(h, h, factor, sample, 1e-5, h)
        for fp8 in (False, True)[: 1 + (card.arch >= 89)]:
            if fp8:
                ops.quantize(h)
            ops.norm_modulate(h, factor, sample, 1e-5, fp8)
            ops.gated_residual_backward(h, h, factor, sample, 1e-5, zeros(HIDDEN), fp8)
            ops.swiglu(gate_up, fp8)
            ops.swiglu_backward(zeros(tokens, FFN), gate_up, zeros(2 * FFN), fp8)
            ops.qk_norm_rope_backward(*qkv.unbind(1), qkv, inverse, *rope, zeros(3 * HIDDEN), fp8)

    operands = {(width, fp8): eager.quantize(zeros(tokens, width), fp8)
                for width, _, _ in PRODUCTS for fp8 in (False, True)}  # fmt: skip
    for arch in LIMITS:
        card.arch = arch
        if arch in WHOLE:
            everything_else()
        for width, columns, parts in PRODUCTS:
            matrix, z = zeros(columns, width).t(), zeros(tokens, parts * columns)
            if arch != 89:
                ops.adapter_up(zeros(tokens, width), z, matrix, parts)
            for fp8 in (False, True)[arch == 89 : 1 + (arch >= 89)]:
                ops.adapter_down(operands[width, fp8], matrix, parts, zeros(width))
                ops.adapter_gradient(operands[width, fp8], z, parts, zeros(width))
    return shared


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_fit_the_cards(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = {int(arch): found for arch, found in json.loads(done.stdout.splitlines()[-1]).items()}
    for arch, limit in LIMITS.items():
        assert len(shared[arch]) >= (13 if arch in WHOLE else 2), arch
        assert {"_down", "_gradient", *(["_up"] if arch != 89 else [])} <= set(shared[arch]), arch
        assert {name: size for name, size in shared[arch].items() if size > limit} == {}, arch
    assert all("_swiglu_backward" in shared[arch] for arch in WHOLE)


if __name__ == "__main__":
    print(json.dumps(compile_all()))
