"""Every kernel compiles for cards that are not at hand, at the model's sizes, within their shared memory.

Triton's compiler needs no GPU: a process of its own, without the interpreter, compiles what the operations
would launch there, down to the machine code.
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
HIDDEN, FFN, HEADS, HEAD = 4608, 12288, 18, 256


def compile_all(arch: int) -> dict[str, int]:
    """The most shared memory of each kernel; adapters of rank 32 and 128."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ideoflow import kernels
    from ideoflow.kernels import adapter, quantize

    class Card:
        """What the compiler asks of a driver."""

        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(Card())
    shared, run = {}, JITFunction.run

    def compile_only(self, *args, warmup, **options):
        kernel = run(self, *args, warmup=True, **options)
        name = self.fn.__name__
        shared[name] = max(shared.get(name, 0), kernel.metadata.shared)

    JITFunction.run = compile_only
    adapter.shared_memory = lambda device: LIMITS[arch]
    quantize._reads_e4m3 = lambda device: arch >= 89
    ops, eager = kernels.load("triton"), kernels.load("reference")
    tokens, bf16 = 1024, torch.bfloat16

    def zeros(*shape, dtype=bf16):
        return torch.zeros(*shape, dtype=dtype)

    weight = eager.quantize(zeros(FFN, HIDDEN))
    ops.dequantize(weight.values, weight.scale, bf16)
    ops.transpose(weight.values)
    sample, h, factor = zeros(tokens, dtype=torch.int32), zeros(tokens, HIDDEN), zeros(1, HIDDEN)
    qkv, gate_up = zeros(tokens, 3, HEADS, HEAD), zeros(tokens, 2 * FFN)
    rope = zeros(HEAD), zeros(HEAD), zeros(tokens, HEAD // 2), zeros(tokens, HEAD // 2)
    inverse = ops.qk_norm_rope(qkv, *rope, 1e-5)
    ops.gated_residual(h, h, factor, sample, 1e-5)
    ops.norm_modulate_backward(h, h, factor, sample, 1e-5, h)
    for fp8 in (False, True)[: 1 + (arch >= 89)]:
        if fp8:
            ops.quantize(h)
        ops.norm_modulate(h, factor, sample, 1e-5, fp8)
        ops.gated_residual_backward(h, h, factor, sample, 1e-5, zeros(HIDDEN), fp8)
        ops.swiglu(gate_up, fp8)
        ops.swiglu_backward(zeros(tokens, FFN), gate_up, zeros(2 * FFN), fp8)
        ops.qk_norm_rope_backward(*qkv.unbind(1), qkv, inverse, *rope, zeros(3 * HIDDEN), fp8)
        for rank in (32, 128)[arch != 90 :]:
            # The down matrices of q, k and v are one; the up matrices work on a part of the columns each.
            for width, columns, parts in ((HIDDEN, 3 * rank, 1), (3 * HIDDEN, rank, 3)):
                x = eager.quantize(zeros(tokens, width), fp8)
                matrix, z = zeros(columns, width).t(), zeros(tokens, parts * columns)
                ops.adapter_down(x, matrix, parts, zeros(width))
                ops.adapter_gradient(x, z, parts, zeros(width))
                ops.adapter_up(zeros(tokens, width), z, matrix, parts)
    return shared


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("arch", LIMITS)
def test_kernels_fit_the_card(arch, tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__, str(arch)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert len(shared) >= 13 and {"_down", "_up", "_gradient", "_swiglu_backward"} <= set(shared)
    assert {name: size for name, size in shared.items() if size > LIMITS[arch]} == {}


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
