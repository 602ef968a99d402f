"""`sparse_linear` and `SparseLinear` on bfloat16: the kernels run, and are as exact as PyTorch's own products."""

from __future__ import annotations

import pytest
import torch

from sparse_engine.nn import SparseLinear
from sparse_engine.ops import Pattern, sparse_linear
from sparse_engine.ops.sparse_linear import explain_linear
from sparse_engine.packed import PackedWeight


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("structure", ["unstructured", "block(4, 1)"])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(rows, structure):
    torch.manual_seed(rows)
    kept = torch.rand(20, 150) < 0.2
    mask = kept.repeat_interleave(4, 0) if structure != "unstructured" else torch.rand(80, 150) < 0.2
    weight, x, bias, upstream = (
        torch.randn(80, 150) * mask,
        torch.randn(rows, 150),
        torch.randn(80),
        torch.randn(rows, 80),
    )
    packed = PackedWeight.from_dense(weight.bfloat16(), mask, structure)
    inputs = [packed.values, x.bfloat16(), bias.bfloat16()]
    values, rounded_x, rounded_bias = (tensor.clone().requires_grad_() for tensor in inputs)
    y = sparse_linear(rounded_x, values, Pattern.from_packed(packed), rounded_bias, impl="cpu")
    y.backward(upstream.bfloat16())
    assert {tensor.dtype for tensor in (y, values.grad, rounded_x.grad, rounded_bias.grad)} == {torch.bfloat16}

    dense = [tensor.double().requires_grad_() for tensor in (weight, x, bias)]
    exact = torch.nn.functional.linear(dense[1], dense[0], dense[2])
    exact.backward(upstream.double())
    theirs = [tensor.bfloat16().requires_grad_() for tensor in (weight, x, bias)]
    other = torch.nn.functional.linear(theirs[1], theirs[0], theirs[2])
    other.backward(upstream.bfloat16())
    assert error(y, exact) <= 2 * error(other, exact)
    assert error(rounded_x.grad, dense[1].grad) <= 3 * error(theirs[1].grad, dense[1].grad)
    found = packed.with_values(values.grad).to_dense()
    assert error(found, dense[0].grad * mask) <= 3 * error(theirs[0].grad * mask, dense[0].grad * mask)


def test_the_kernels_run():
    packed = PackedWeight.from_dense(torch.randn(8, 40).bfloat16() * (torch.rand(8, 40) < 0.3))
    pattern, x = Pattern.from_packed(packed), torch.randn(3, 40)
    assert explain_linear(x.bfloat16(), packed.values, pattern).chosen == "cpu"
    mixed = explain_linear(x, packed.values, pattern)
    assert mixed.reasons["cpu"], "one dtype at a time"


def test_shapes_without_anything_in_them():
    packed = PackedWeight.from_dense(torch.zeros(4, 6).bfloat16())
    bias = torch.ones(4).bfloat16()
    y = sparse_linear(torch.ones(2, 6).bfloat16(), packed.values, Pattern.from_packed(packed), bias, impl="cpu")
    assert torch.equal(y, torch.ones(2, 4).bfloat16())
    y = sparse_linear(torch.ones(0, 6).bfloat16(), packed.values, Pattern.from_packed(packed), impl="cpu")
    assert y.shape == (0, 4)
    assert y.dtype == torch.bfloat16


def test_new_values_are_noticed():
    packed = PackedWeight.from_dense(torch.randn(8, 40).bfloat16() * (torch.rand(8, 40) < 0.3))
    pattern, x, values = Pattern.from_packed(packed), torch.randn(1, 40).bfloat16(), packed.values.clone()
    first = sparse_linear(x, values, pattern, impl="cpu")
    assert torch.equal(sparse_linear(x, values, pattern, impl="cpu"), first)
    values.mul_(2)
    assert torch.equal(sparse_linear(x, values, pattern, impl="cpu"), 2 * first)
    wide = sparse_linear(x.float(), values.float(), pattern, impl="cpu")
    torch.testing.assert_close(wide, 2 * first.float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(sparse_linear(x, values, pattern, impl="cpu"), 2 * first)


def test_a_layer_trains_in_bfloat16():
    torch.manual_seed(0)
    layer = SparseLinear(40, 8, mask=torch.rand(8, 40) < 0.3).to(torch.bfloat16)
    x, target = torch.randn(32, 40).bfloat16(), torch.randn(32, 8).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
