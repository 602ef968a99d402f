"""Convolution by channel lists against PyTorch on the zeroed weight: strides, padding, dilation, rectangular
kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.errors import ShapeError
from tests.kernels.compare import DTYPES, assert_accurate

# batch, channels in, channels out, size, kernel, stride, padding, dilation
CASES = [
    (2, 12, 20, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 16, 24, (8, 8), (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 9, 11, (11, 10), (3, 2), (2, 3), (1, 0), (1, 2)),
    (1, 3, 8, (9, 9), (5, 5), (2, 2), (2, 2), (1, 1)),
    (0, 8, 8, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
]


def make(case, dtype):
    batch, c, m, size, kernel, stride, padding, dilation = case
    keep_in, keep_out = torch.rand(c) < 0.6, torch.rand(m) < 0.6
    keep_in[-1] = keep_out[0] = True
    x = torch.randn(batch, c, *size).to(dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(m, c, *kernel).to(dtype)
    kept = keep_out[:, None, None, None] & keep_in[None, :, None, None]
    return x, weight, keep_in, keep_out, kept.expand_as(weight), kernels.ConvGeometry(kernel, stride, padding, dilation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, device):
    x, weight, keep_in, keep_out, kept, geometry = make(case, dtype)
    options = {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}
    inputs, outputs = kernels.channel_list(keep_in, device), kernels.channel_list(keep_out, device)
    poisoned = torch.where(kept, weight, float("nan")).to(device)  # pruned numbers must not be read
    bias = torch.randn(weight.shape[0]).to(dtype)

    def reference(a, w, b):
        y = F.conv2d(a, torch.where(kept, w, 0), b, **options)
        return y * keep_out[:, None, None]

    y = kernels.channel_conv(x.to(device), poisoned, inputs, outputs, geometry, bias.to(device))
    assert_accurate(y, reference, x, weight, bias, name="y")
    compact = kernels.channel_conv(
        x[:, keep_in].to(device), poisoned, inputs, outputs, geometry, bias.to(device), full_output=False
    )
    assert torch.equal(compact, y[:, keep_out.to(device)])

    dy = torch.randn(y.shape).to(dtype)
    if not dy.numel():
        return

    def input_gradient(g, w):
        return torch.nn.grad.conv2d_input(x.shape, torch.where(kept, w, 0), g, **options)

    dx = kernels.channel_conv_input_gradient(dy.to(device), poisoned, inputs, outputs, geometry, tuple(x.shape[2:]))
    assert_accurate(dx, input_gradient, dy, weight, factor=3.0, name="dx")
    narrow = kernels.channel_conv_input_gradient(
        dy[:, keep_out].to(device), poisoned, inputs, outputs, geometry, tuple(x.shape[2:]), full_input=False
    )
    assert torch.equal(narrow, dx[:, keep_in.to(device)])

    def weight_gradient(g, a):
        return torch.where(kept, torch.nn.grad.conv2d_weight(a, weight.shape, g, **options), 0)

    dw = kernels.channel_conv_weight_gradient(dy.to(device), x.to(device), inputs, outputs, geometry)
    assert_accurate(dw, weight_gradient, dy, x, factor=3.0, name="dw")


@pytest.mark.parametrize("run", [1, 2, 4, 8])
def test_runs_of_channels_are_recognised_and_right(run, device):
    keep = torch.zeros(32, dtype=torch.bool)
    keep[:run] = keep[16 : 16 + run] = True
    inputs, outputs = kernels.channel_list(keep, device), kernels.channel_list(torch.ones(16, dtype=torch.bool), device)
    assert inputs.run == run
    assert outputs.run == 8
    x, weight = torch.randn(1, 32, 5, 6), torch.randn(16, 32, 3, 3)
    y = kernels.channel_conv(x.to(device), weight.to(device), inputs, outputs, kernels.ConvGeometry((3, 3)))
    assert_accurate(y, lambda a, w: F.conv2d(a, w * keep[None, :, None, None]), x, weight)


def test_refusals(device):
    full = kernels.channel_list(torch.ones(8, dtype=torch.bool), device)
    x, w = torch.randn(1, 5, 6, 6, device=device), torch.randn(8, 8, 3, 3, device=device)
    with pytest.raises(ShapeError, match="input has 5 channels"):
        kernels.channel_conv(x, w, full, full, kernels.ConvGeometry((3, 3)))
    with pytest.raises(ShapeError, match="too small"):
        kernels.channel_conv(torch.randn(1, 8, 1, 1, device=device), w, full, full, kernels.ConvGeometry((3, 3)))
