"""`masked_linear` against fp64 on every backend, its gradients of both orders, PyTorch's own checks of the op, and
refusals."""

from __future__ import annotations

import pytest
import torch

from sparse_engine.errors import BackendError, ShapeError
from sparse_engine.ops.masked_linear import explain_masked_linear, masked_linear
from tests.helpers import assert_close_to_fp64

SHAPES = [((5,), 12, 20), ((2, 3), 7, 9), ((), 4, 6), ((0,), 3, 5), ((4,), 0, 5), ((4,), 5, 0)]


def make(leading, outputs, inputs, dtype=torch.float32):
    weight, mask = torch.randn(outputs, inputs, dtype=dtype), torch.rand(outputs, inputs) < 0.4
    weight[~mask] = float("nan")  # must have no influence
    return torch.randn(*leading, inputs, dtype=dtype), weight, mask, torch.randn(outputs, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(shape):
    x, weight, mask, bias = make(*shape)
    operands = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = masked_linear(operands[0], operands[1], mask, operands[2])
    dy = torch.randn(y.shape)
    y.backward(dy)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight.where(mask, 0), bias)]
    expected = torch.nn.functional.linear(*wide)
    expected.backward(dy.double())
    assert_close_to_fp64(y, expected.detach())
    assert_close_to_fp64(operands[0].grad, wide[0].grad)
    assert_close_to_fp64(operands[1].grad, wide[1].grad * mask)
    assert_close_to_fp64(operands[2].grad, wide[2].grad)


def test_gradients_of_gradients():
    x, weight, mask, bias = make((3,), 4, 5, torch.float64)
    weight = weight.where(mask, 0)
    operands = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
    assert torch.autograd.gradgradcheck(lambda a, w, b: masked_linear(a, w, mask, b), operands)


def test_pytorch_checks_the_op():
    x, weight, mask, bias = make((3,), 4, 6)
    weight = weight.where(mask, 0).requires_grad_()
    torch.library.opcheck(torch.ops.sparse_engine.masked_linear, (x.requires_grad_(), weight, mask, bias, "auto"))
    grad = torch.randn(3, 4)
    torch.library.opcheck(torch.ops.sparse_engine.masked_linear_input_grad, (grad, weight.detach(), mask, "auto"))
    torch.library.opcheck(torch.ops.sparse_engine.masked_linear_weight_grad, (grad, x.detach(), mask, "auto"))


def test_reasons_and_refusals():
    x, weight, mask, bias = make((3,), 4, 6)
    assert explain_masked_linear(x, weight, mask, bias).chosen == "torch"
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        masked_linear(x, weight, mask, impl="triton")
    with pytest.raises(ShapeError, match="bool mask"):
        masked_linear(x, weight, mask.float())
    with pytest.raises(ShapeError, match=r"input of shape \(3, 5\)"):
        masked_linear(x[:, :5], weight, mask)
    with pytest.raises(ShapeError, match="for 4 outputs"):
        masked_linear(x, weight, mask, bias[:3])
