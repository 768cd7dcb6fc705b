"""Where a step's time goes, from a trace: each kernel to its part, and nothing lost or counted twice."""

from typing import Any

import pytest

from ideoflow.engine import parts
from ideoflow.engine.parts import account, part_of

# Kernels as a trace of the fused engine on an H200 names them.
KERNELS = {
    "nvjet_sm90_qqtst_128x256_128x6_2x1_v_bz_coopA_TNT": parts.FROZEN,
    "nvjet_sm90_tst_128x64_64x8_1x2_h_bz_NNT": parts.FROZEN,
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_27": parts.ATTENTION_BACKWARD,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_128x64x256": parts.ATTENTION,
    "void cudnn::fusion::compute_dot_do_o<true, 128, 8, 256>": parts.ATTENTION_BACKWARD,
    "void cudnn::fusion::convert_dq_to_16bits<true, 128>": parts.ATTENTION_BACKWARD,
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackward": parts.ATTENTION_BACKWARD,
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttention": parts.ATTENTION_BACKWARD,
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_postprocessFlash_object": parts.ATTENTION_BACKWARD,
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90": parts.ATTENTION,
    "fmha_cutlassB_f32_aligned_64x64_k32_sm80": parts.ATTENTION_BACKWARD,
    "fmha_cutlassF_f32_aligned_64x64_rf_sm80": parts.ATTENTION,
    "_up": parts.ADAPTER,
    "_down": parts.ADAPTER,
    "_gradient": parts.ADAPTER,
    "_split_precision": parts.ADAPTER,
    "_qk_norm_rope": parts.POINTWISE,
    "_qk_norm_rope_backward": parts.POINTWISE,
    "_swiglu_backward": parts.POINTWISE,
    "_norm_modulate": parts.POINTWISE,
    "_gated_residual_backward": parts.POINTWISE,
    "_quantize": parts.POINTWISE,
    "triton_red_fused__to_copy_mean_mul_pow_rsqrt_3": parts.POINTWISE,
    "_transpose": parts.WEIGHTS,
    "_dequantize_bits": parts.WEIGHTS,
    "void at::native::(anonymous)::multi_tensor_apply_kernel<FusedAdamMath>": parts.OPTIMISER,
    "Memcpy HtoD (Pinned -> Device)": parts.COPIES,
    "Memcpy DtoD (Device -> Device)": parts.OTHER,
    "Memset (Device)": parts.OTHER,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": parts.OTHER,
    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>": parts.OTHER,
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_of_a_step_has_its_part(name: str) -> None:
    assert part_of(name) == KERNELS[name]


def test_what_is_around_a_kernel_decides_before_its_name() -> None:
    add, step = "void at::native::elementwise_kernel<128>", ("Optimizer.step#AdamW.step", ())
    assert part_of(add, [("aten::add_", ()), step]) == parts.OPTIMISER
    assert part_of(add, [("aten::mul", ()), step]) == parts.OPTIMISER
    assert part_of(add, [("aten::mul", ())]) == parts.POINTWISE
    inner, outer = (parts.RANGE + parts.WEIGHTS, ()), (parts.RANGE + parts.FROZEN, ())
    assert part_of("nvjet_sm90_tst_1", [inner, outer]) == parts.WEIGHTS
    assert part_of("Memcpy DtoH (Device -> Pinned)", [inner, outer]) == parts.COPIES


def test_thin_products_are_the_adapters() -> None:
    def product(*shapes: list[int]) -> str:
        return part_of("nvjet_sm90_tst_1", [("aten::mm", shapes), ("aten::linear", ())], ranks={32})

    assert product([4416, 4608], [4608, 32]) == parts.ADAPTER
    assert product([32, 4416], [4416, 4608]) == parts.ADAPTER
    assert product([4416, 4608], [4608, 4608]) == parts.FROZEN


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": args}


def launched(name: str, ts: float, dur: float, launch: float, number: int, tid: int = 1) -> list[dict]:
    return [event("cuda_runtime", "cudaLaunchKernel", launch, 5, tid, correlation=number),
            event("kernel", name, ts, dur, tid=7, correlation=number)]  # fmt: skip


def times(found: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of the parts that have any."""
    return {part["part"]: part["ms"] for part in found["parts"] if part["ms"]}


def test_kernels_belong_to_the_step_that_launched_them() -> None:
    """Two steps of 1 ms; microseconds in the trace, milliseconds a step in the table."""
    optimiser = event("user_annotation", "Optimizer.step#AdamW.step", 1800, 100)
    frozen = event("user_annotation", parts.RANGE + parts.FROZEN, 1100, 100, tid=2)  # Autograd's thread
    trace = {"traceEvents": [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", parts.STEP, 1000, 1000),
        event("user_annotation", parts.STEP, 2000, 1000),
        event("gpu_user_annotation", parts.STEP, 1000, 1500, tid=7),
        optimiser, frozen,
        *launched("before the first step", 1000, 50, 900, 1),
        *launched("of no known name", 1100, 200, 1110, 2, tid=2),
        *launched("void at::native::elementwise_kernel", 2100, 100, 1850, 3),  # runs in the second step
        # A recorded graph: one launch, all its kernels with its number.
        event("cuda_runtime", "cudaGraphLaunch", 2010, 30, correlation=4),
        event("kernel", "_swiglu", 2200, 300, tid=7, correlation=4),
        event("kernel", "_up", 2500, 100, tid=7, correlation=4),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 2550, 100, tid=8, correlation=5),  # beside it
        *launched("after the last step", 3100, 50, 3050, 6),
    ]}  # fmt: skip
    found = account(trace)
    assert (found["steps"], found["wall_ms"], found["counted"]) == (2, 1.0, "kernels")
    assert times(found) == {
        parts.FROZEN: 0.1,
        parts.OPTIMISER: 0.05,
        parts.POINTWISE: 0.15,
        parts.ADAPTER: 0.05,
        parts.COPIES: 0.05,
        parts.IDLE: pytest.approx(1.0 - (200 + 100 + 300 + 150) / 2e3),
    }
    assert found["overlap_ms"] == pytest.approx(0.025)
    assert sum(p["share"] for p in found["parts"]) == pytest.approx(1 + 0.025)


def test_on_a_cpu_each_operator_counts_without_those_that_it_calls() -> None:
    trace = {"traceEvents": [
        event("user_annotation", parts.STEP, 0, 1000),
        event("cpu_op", "aten::linear", 100, 300),
        event("cpu_op", "aten::mm", 150, 200, **{"Input Dims": [[16, 192], [192, 4]]}),
        event("cpu_op", "aten::silu", 500, 100),
        event("cpu_op", "aten::mm", 5000, 100),
    ]}  # fmt: skip
    found = account(trace, ranks={4})
    assert found["counted"] == "operators"
    assert times(found) == {parts.FROZEN: 0.1, parts.ADAPTER: 0.2, parts.POINTWISE: 0.1, parts.IDLE: 0.6}


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        account({"traceEvents": [event("kernel", "_up", 0, 1)]})
