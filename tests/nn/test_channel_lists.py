"""`SparseConv2d` in training where whole channels are pruned: index lists of kept inputs and outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_engine.nn import SparseConv2d
from tests.helpers import assert_close_to_fp64


def layers(
    keep_out: float, keep_in: float, bias: bool = True, channels: tuple[int, int] = (48, 40), **geometry: object
) -> tuple[nn.Conv2d, SparseConv2d]:
    """A dense layer in float64 with zeros in its pruned channels, and the sparse one."""
    torch.manual_seed(0)
    inputs, outputs = channels
    dense = nn.Conv2d(inputs, outputs, geometry.pop("kernel_size", 3), bias=bias, **geometry)
    mask = torch.ones(dense.weight.shape, dtype=torch.bool)
    mask[torch.randperm(outputs)[round(outputs * keep_out) :]] = False
    mask[:, torch.randperm(inputs)[round(inputs * keep_in) :]] = False
    sparse = SparseConv2d.from_dense(dense, mask, "channel")
    dense = copy.deepcopy(dense).double()
    dense.weight.data.masked_fill_(~mask, 0)
    return dense, sparse


GEOMETRIES = [
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"stride": 2, "padding": (2, 1), "dilation": (1, 2)},
    {"kernel_size": 1, "channels": (320, 320)},
    {"kernel_size": (3, 5), "padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
]


@pytest.mark.parametrize(("keep_out", "keep_in"), [(0.6, 0.6), (1.0, 0.5), (0.5, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_output_and_all_gradients(keep_out: float, keep_in: float, geometry: dict):
    """Against the dense layer in float64; a NaN in a channel that nobody reads stays where it is."""
    dense, sparse = layers(keep_out, keep_in, **geometry)
    x = torch.randn(3, dense.in_channels, 9, 11)
    read = sparse.mask.any(0).flatten(1).any(1)
    first, second = x.double().requires_grad_(), x.masked_fill(~read[:, None, None], float("nan")).requires_grad_()
    expected, got = dense(first), sparse(second)
    assert type(got.grad_fn).__name__ == "ListedConv2dBackward"
    assert_close_to_fp64(got, expected)
    upstream = torch.randn(expected.shape)
    expected.backward(upstream.double())
    got.backward(upstream)
    assert_close_to_fp64(second.grad, first.grad, name="input gradient")
    assert_close_to_fp64(sparse.values.grad, dense.weight.grad[sparse.mask], name="weight gradient")
    if dense.bias is not None:
        assert_close_to_fp64(sparse.bias.grad, dense.bias.grad, name="bias gradient")


@pytest.mark.parametrize("wanted", ["x", "values", "bias"])
def test_only_what_is_wanted_is_computed(wanted: str):
    _, sparse = layers(0.6, 0.6, padding=1)
    for parameter in sparse.parameters():
        parameter.requires_grad_(False)
    if wanted != "x":
        getattr(sparse, wanted).requires_grad_(True)
    x = torch.randn(2, 48, 7, 7, requires_grad=wanted == "x")
    sparse(x).sum().backward()
    tensors = {"x": x, "values": sparse.values, "bias": sparse.bias}
    assert {name for name, tensor in tensors.items() if tensor.grad is not None} == {wanted}
    assert bool(torch.isfinite(tensors[wanted].grad).all())


def test_gradients_of_gradients():
    dense, sparse = layers(0.6, 0.6, padding=1)
    x = torch.randn(2, 48, 6, 6)
    found = []
    for layer, data, weight in ((dense, x.double(), dense.weight), (sparse, x, sparse.values)):
        data = data.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(data).square().sum(), data, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), weight)[0])
    assert_close_to_fp64(found[1], found[0][sparse.mask], bound=1e-4)


def test_training_is_that_of_the_masked_dense_layer():
    dense, sparse = layers(0.5, 0.5, padding=1)
    mask = sparse.mask
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9) for layer in (dense, sparse)]
    for step in range(5):
        x = torch.randn(4, 48, 8, 8, generator=torch.Generator().manual_seed(step))
        for layer, optimizer in zip((dense, sparse), optimizers, strict=True):
            optimizer.zero_grad()
            layer(x.to(next(layer.parameters()).dtype)).square().mean().backward()
            optimizer.step()
        dense.weight.data.masked_fill_(~mask, 0)
    assert_close_to_fp64(sparse.weight, dense.weight)
    again = copy.deepcopy(sparse)
    assert torch.equal(again(x), sparse(x))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"channels": (8, 8)}, "copying would cost more than it saves"),
        ({"kernel_size": (3, 4), "padding": "same"}, "uneven padding"),
    ],
)
def test_where_lists_do_not_pay_the_kernels_read_in_place(options: dict, why: str):
    dense, sparse = layers(0.6, 0.6, **options)
    x = torch.randn(2, dense.in_channels, 8, 8)
    y = sparse(x)
    assert type(y.grad_fn).__name__ == "EagerConv2dBackward", why
    assert_close_to_fp64(y, dense(x.double()))


def test_inference_and_other_memory_orders_read_in_place():
    dense, sparse = layers(0.6, 0.6, padding=1)
    x = torch.randn(2, 48, 8, 8)
    last = sparse(x.to(memory_format=torch.channels_last))
    assert type(last.grad_fn).__name__ == "EagerConv2dBackward"
    with torch.no_grad():
        assert_close_to_fp64(sparse(x), dense(x.double()))
        assert_close_to_fp64(last, dense(x.double()))


def test_a_new_pattern_makes_new_lists():
    dense, sparse = layers(0.6, 0.6, padding=1)
    x = torch.randn(2, 48, 8, 8)
    sparse(x)
    mask = torch.ones(dense.weight.shape, dtype=torch.bool)
    mask[::2] = False
    sparse.set_pattern_(mask, "channel", fill=dense.weight.float() + 1.0)
    y = sparse(x)
    assert type(y.grad_fn).__name__ == "ListedConv2dBackward"
    expected = nn.functional.conv2d(x.double(), sparse.weight.double(), sparse.bias.double(), padding=1)
    assert_close_to_fp64(y, expected)
    sparse.set_pattern_(torch.rand(dense.weight.shape) < 0.3)
    y = sparse(x)
    assert type(y.grad_fn).__name__ == "EagerConv2dBackward"
    expected = nn.functional.conv2d(x.double(), sparse.weight.double(), sparse.bias.double(), padding=1)
    assert_close_to_fp64(y, expected)
