"""Every Triton kernel against the eager truth, at odd shapes: on a GPU, or on the CPU by its interpreter.

The interpreter is chosen when Triton is imported, so without a GPU this file sets TRITON_INTERPRET itself.
"""

import os
import re
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from ideoflow import kernels
from ideoflow.kernels import quantize
from ideoflow.kernels.reference import FP8, Operand

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EAGER, FUSED = kernels.load("reference"), kernels.load("triton")
SHAPES = [(5, 48), (33, 132)]  # tokens, width
CASES = pytest.mark.parametrize(("tokens", "width"), SHAPES)
PRECISION = pytest.mark.parametrize("fp8", [False, True], ids=["dense", "fp8"])


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":
        _mend_interpreter(monkeypatch)


def _mend_interpreter(monkeypatch):
    """Three faults of Triton's interpreter, mended.

    Its cast to a narrower type drops the carry of rounding (127.9 becomes 64 in e4m3), and its dot multiplies
    the bit patterns of bf16 numbers as if they were integers: PyTorch's arithmetic does both. And NumPy no
    longer turns an array of one element, which is how it holds a loop's bound, into an index.
    """
    from triton.runtime import interpreter

    narrow = {"fp8e4nv": (FP8, torch.uint8), "bf16": (torch.bfloat16, torch.uint16)}
    cast = interpreter._convert_float

    def convert(values, source, target, rounding):
        if str(source) != "fp32" or str(target) not in narrow:
            return cast(values, source, target, rounding)
        dtype, bits = narrow[str(target)]
        return torch.from_numpy(values.astype("float32")).to(dtype).view(bits).numpy()

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (x.data if str(x.dtype.scalar) == "fp32" else _widened(x) for x in (a, b))
        return interpreter.TensorHandle(a @ b + d.data, d.dtype.scalar)

    def _widened(x):
        return (x.data.astype("uint32") << 16).view("float32")

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def samples(tokens):
    return torch.randint(0, 2, (tokens,), dtype=torch.int32, device=DEVICE)


def same(got, expected):
    """One unit in the last place of the stored type, measured against the largest number of the row."""
    if isinstance(got, Operand):
        if expected.scale is not None:
            assert got.values.dtype == FP8
            torch.testing.assert_close(got.scale, expected.scale, rtol=1e-4, atol=0)
        got, expected, step = got.dense(), expected.dense(), 2**-3 if got.scale is not None else 2**-7
    else:
        step = 2**-7 if got.dtype == torch.bfloat16 else 1e-4
        got, expected = got.float(), expected.float()
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, rtol=step, atol=float(expected.abs().max()) * min(step, 2**-8))


@CASES
def test_quantize(tokens, width):
    x = normal(tokens, width)
    x[0] = 0
    x[1] *= 1e3
    x[2] *= 1e-20
    same(FUSED.quantize(x), EAGER.quantize(x))


@CASES
def test_dequantize_and_transpose(tokens, width, monkeypatch):
    weight = EAGER.quantize(normal(tokens, width))
    args = (weight.values, weight.scale, torch.bfloat16)
    same(FUSED.dequantize(*args), EAGER.dequantize(*args))
    monkeypatch.setattr(quantize, "_reads_e4m3", lambda device: False)  # as on cards before sm_89
    same(FUSED.dequantize(*args), EAGER.dequantize(*args))
    transposed = FUSED.transpose(weight.values)
    assert transposed.is_contiguous() and torch.equal(transposed.float(), weight.values.float().t())


@CASES
def test_dequantize_int8(tokens, width):
    values = torch.randint(-127, 128, (tokens, width), dtype=torch.int8, device=DEVICE)
    scale = torch.rand(tokens, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float32):
        same(FUSED.dequantize(values, scale, dtype), EAGER.dequantize(values, scale, dtype))


def test_one_token():
    """Captions of one token, and gradients of one: every launch is of a single row."""
    h, y, factor, sample = normal(1, 40), normal(1, 40), normal(1, 40), samples(1) * 0
    for fp8 in (False, True):
        same(FUSED.quantize(h, fp8), EAGER.quantize(h, fp8))
        results = []
        for ops in (FUSED, EAGER):
            operand = ops.norm_modulate(h, factor, sample, 1e-5, fp8)
            back = ops.gated_residual_backward(h, y, factor, sample, 1e-5, None, fp8)
            results.append((
                operand, back, ops.norm_modulate_backward(y, h, factor, sample, 1e-5, h),
                ops.gated_residual(h, y, factor, sample, 1e-5), ops.swiglu(h, fp8),
                ops.swiglu_backward(y[:, :20], h, None, fp8), ops.adapter_down(operand, normal_like(h)),
            ))  # fmt: skip
        for got, expected in zip(*results, strict=True):
            same(got, expected)


def normal_like(x, rank=6):
    """The same matrix [K, rank] each time, for x [T, K]."""
    g = torch.Generator().manual_seed(x.shape[1])
    return torch.randn(rank, x.shape[1], generator=g).to(x.device, x.dtype).t()


def test_every_operation_is_held_against_the_reference():
    """Whoever adds one adds its test here."""
    text = Path(__file__).read_text(encoding="utf-8")
    missing = [op for op in kernels.OPS if not re.search(rf"\b(FUSED|ops)\.{op}\(", text)]
    assert missing == []


def test_every_e4m3_value_is_decoded_from_its_bits(monkeypatch):
    """All finite ones, subnormal numbers and both zeros included; 0x7F and 0xFF are NaN, as no weight is."""
    monkeypatch.setattr(quantize, "_reads_e4m3", lambda device: False)
    bits = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8, device=DEVICE)
    values = bits.view(FP8)[None]
    scale = torch.ones(1, device=DEVICE)
    assert torch.equal(FUSED.dequantize(values, scale, torch.float32), values.float())


@CASES
@PRECISION
def test_norm_modulate(tokens, width, fp8):
    args = normal(tokens, width), normal(2, width), samples(tokens), 1e-5
    same(FUSED.norm_modulate(*args, fp8), EAGER.norm_modulate(*args, fp8))
    dx, residual = normal(tokens, width + 16)[:, :width], normal(tokens, width)
    same(FUSED.norm_modulate_backward(dx, *args, residual), EAGER.norm_modulate_backward(dx, *args, residual))


@CASES
@PRECISION
@pytest.mark.parametrize("fold", [False, True])
def test_gated_residual(tokens, width, fp8, fold):
    h, args = (normal(tokens, width), (normal(tokens, width), normal(2, width), samples(tokens), 1e-5))
    same(FUSED.gated_residual(h, *args), EAGER.gated_residual(h, *args))
    scales = torch.rand(width, device=DEVICE).bfloat16() if fold else None
    same(
        FUSED.gated_residual_backward(h, *args, scales, fp8),
        EAGER.gated_residual_backward(h, *args, scales, fp8),
    )


@CASES
@PRECISION
@pytest.mark.parametrize("fold", [False, True])
def test_swiglu(tokens, width, fp8, fold):
    gate_up, du = 3 * normal(tokens, 2 * width), normal(tokens, width + 8)[:, :width]
    same(FUSED.swiglu(gate_up, fp8), EAGER.swiglu(gate_up, fp8))
    scales = torch.rand(2 * width, device=DEVICE).bfloat16() if fold else None
    same(FUSED.swiglu_backward(du, gate_up, scales, fp8), EAGER.swiglu_backward(du, gate_up, scales, fp8))


@PRECISION
@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 3, 12), (17, 2, 64)])
def test_qk_norm_rope(tokens, heads, size, fp8):
    angle = torch.randn(tokens, size // 2, device=DEVICE)
    args = normal(size) + 2, normal(size) - 2, angle.cos().bfloat16(), angle.sin().bfloat16()
    fused = normal(tokens, 3, heads, size)
    eager, before = fused.clone(), fused.clone()
    inverse = FUSED.qk_norm_rope(fused, *args, 1e-5)
    torch.testing.assert_close(inverse, EAGER.qk_norm_rope(eager, *args, 1e-5))
    same(fused, eager)
    assert torch.equal(fused[:, 2], before[:, 2])
    # Gradients come in whatever strides the attention kernel gave: heads before tokens here.
    dq, dk, dv = (normal(heads, tokens, size).transpose(0, 1) for _ in range(3))
    for fold in (None, torch.rand(3 * heads * size, device=DEVICE).bfloat16()):
        rest = dq, dk, dv, eager, inverse, *args, fold, fp8
        same(FUSED.qk_norm_rope_backward(*rest), EAGER.qk_norm_rope_backward(*rest))


# Less than a block, several blocks, a rank of several tiles; then sums that two programs share: over the
# width, and over the tokens.
PRODUCTS = [(*shape, parts) for shape in ((5, 48, 3), (70, 160, 32), (20, 100, 300)) for parts in (1, 3)]
PRODUCTS += [(20, 2100, 24, 3), (1030, 40, 3, 1)]


@PRECISION
@pytest.mark.parametrize(("tokens", "width", "rank", "parts"), PRODUCTS)
def test_adapter_products(tokens, width, rank, parts, fp8):
    x = EAGER.quantize(normal(tokens, parts * width), fp8)
    matrix, z = normal(rank, parts * width).t(), normal(tokens, parts * rank)
    for unfold in (None, torch.rand(parts * width, device=DEVICE) + 0.5):
        same(FUSED.adapter_down(x, matrix, parts, unfold), EAGER.adapter_down(x, matrix, parts, unfold))
        # z times the row scale is rounded to bf16 before the product, hence the wider bound.
        got, expected = (ops.adapter_gradient(x, z, parts, unfold) for ops in (FUSED, EAGER))
        assert (got - expected).norm() <= 4e-3 * expected.norm()
    fused = normal(tokens, parts * width + 16)  # rows apart by more than their width
    eager = fused.clone()
    FUSED.adapter_up(fused[:, : parts * width], z, matrix, parts)
    EAGER.adapter_up(eager[:, : parts * width], z, matrix, parts)
    same(fused, eager)
    if parts == 1:
        got, expected = (ops.adapter_gradient(x, z, rank_first=True) for ops in (FUSED, EAGER))
        assert got.is_contiguous() and (got - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("exact", [False, True], ids=["fp8", "exact"])
def test_an_adapted_layer_of_these_kernels_is_the_eager_one(exact):
    """Both passes of q, k and v as the fused engine computes them, x quantised or dense, dy quantised."""
    from torch import nn

    from ideoflow.engine.fused.linear import AdaptedLinear, Adapter
    from ideoflow.engine.fused.weights import Scratch
    from ideoflow.kernels.float8 import Float8Linear

    x, dy = normal(70, 96), normal(70, 3 * 48)
    bases = [Float8Linear.of(nn.Linear(96, 48, bias=False)).to(DEVICE) for _ in range(3)]
    down, up = normal(24, 96), 0.2 * normal(3 * 48, 8)
    results = []
    for ops in (FUSED, EAGER):
        layer = AdaptedLinear(
            [(str(i), base) for i, base in enumerate(bases)], dtype=torch.bfloat16, fp8=True, ops=ops,
            scratch=Scratch(torch.device(DEVICE)), exact=exact,
        )  # fmt: skip
        layer.rank, layer.down, layer.up = 8, down, up
        layer.unfold = 1 / layer.fold.float()
        layer.adapters = (Adapter(down[:8], up[:48], 1.0), Adapter(down[8:16], up[48:96], 1.0),
                          Adapter(down[16:], up[96:], 1.0))  # fmt: skip
        if not exact:
            layer.down_pieces = torch.zeros(48, 96, dtype=FP8, device=DEVICE), torch.ones(48, device=DEVICE)
            ops.split_precision(down.t(), *layer.down_pieces)
        operand = EAGER.quantize(x, not exact)
        y, z = layer.forward(operand, None)
        dx, gradients = layer.backward(EAGER.quantize(dy * layer.fold), operand, z)
        results.append([y, z, dx, *gradients])
    for got, expected in zip(*results, strict=True):
        assert (got.float() - expected.float()).norm() <= 6e-3 * expected.float().norm()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("width", "rank", "group"), [(48, 8, None), (132, 16, 4)])
def test_split_precision(width, rank, parts, group):
    matrix, unfold = normal(parts * width, rank), torch.rand(parts * width, device=DEVICE) + 0.5
    matrix[:, 1] = 0
    results = []
    for ops in (FUSED, EAGER):
        out = torch.full((2 * parts * rank, parts * width), 3.0, device=DEVICE).to(FP8)
        scale = torch.full((2 * parts * rank,), torch.nan, device=DEVICE)
        ops.split_precision(matrix, out, scale, parts, unfold, group)
        results.append(Operand(out, scale))
    torch.testing.assert_close(results[0].dense(), results[1].dense(), rtol=2**-7, atol=2**-9)
    # The two pieces add up to the matrix, part by part, to 2^-8.
    rows = results[0].dense().view(-1, 2, group or parts * rank, parts * width).sum(1).view(-1, parts * width)
    expected = torch.block_diag(*(matrix.float() * unfold[:, None]).split(width)).t()
    assert (rows - expected).norm() <= 2**-8 * expected.norm()


def test_unknown_backend():
    with pytest.raises(ValueError):
        kernels.load("cuda-c")
