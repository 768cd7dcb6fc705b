"""Frozen layers of 8-bit weights against the same products in float64."""

import pytest
import torch
from torch import nn

from ideoflow.kernels.float8 import Float8Linear, Int8Linear

KINDS = pytest.mark.parametrize("kind", [Float8Linear, Int8Linear])
# Half a unit in the last place, relative; of float32 a few of them, since sums are computed in it too.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-22}


def layer(kind, dtype, bias=False):
    torch.manual_seed(0)
    dense = nn.Linear(96, 160, bias=bias).to(dtype)
    dense.weight.data *= torch.logspace(-3, 1, 160)[:, None]  # rows of very different sizes
    dense.weight.data[7] = 0
    return kind.of(dense)


def exact(linear):
    return linear.weight.double() * linear.weight_scale.double()[:, None]


@KINDS
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_weight_is_multiplied_in_float32_and_rounded_once(kind, dtype):
    held = layer(kind, dtype)
    ones = torch.eye(96, dtype=dtype)
    products = held.weight.float() * held.weight_scale[:, None]
    assert torch.equal(held(ones), products.to(dtype).t())
    assert torch.equal(held.dequantize(), products)


@KINDS
@pytest.mark.parametrize("dtype", ROUNDING)
def test_products_and_gradients(kind, dtype):
    held = layer(kind, dtype, bias=True)
    x = torch.randn(3, 5, 96).to(dtype).requires_grad_()
    y = held(x)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    for found, expected in (
        (y, x.detach().double() @ exact(held).t() + held.bias.double()),
        (x.grad, grad.double() @ exact(held)),
    ):
        assert found.dtype == dtype
        assert (found.double() - expected).norm() < 2 * ROUNDING[dtype] * expected.norm()


@KINDS
def test_what_is_saved_outlives_the_parameters_memory(kind):
    """As when weights are offloaded between the passes: the gradient reads what the forward pass read."""
    held = layer(kind, torch.float32)
    x = torch.randn(4, 96, requires_grad=True)
    y, expected = held(x), exact(held).float()
    held.weight.data = torch.zeros_like(held.weight.data)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(4, 96))


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_gpus_own_kernel_gives_the_same_bits(kind, dtype):
    results = []
    for device in ("cpu", "cuda"):
        held = layer(kind, dtype).to(device)
        x = torch.eye(96, dtype=dtype, device=device).requires_grad_()
        y = held(x)
        y.backward(torch.eye(96, 160, dtype=dtype, device=device))  # a product by it is a part of the weight
        results.append((y.detach().cpu(), x.grad.cpu(), held.dequantize().cpu()))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
