"""The Triton kernels over the case table that the CPU kernels are tested over (`tests/cases.py`).

A linear case runs through `masked_linear`, whose mask fits any structure, and, in blocks of a size that there is a
kernel for, through `sparse_linear`; a convolution's channels are pruned instead of single weights. Everything else
about the case stays: shapes, batches, memory orders, empty rows, infinities and NaNs, negative zeros.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.ops import registry, sparse_conv2d, sparse_linear
from sparse_engine.ops.masked_linear import masked_linear
from sparse_engine.structure import NM, Block, Channel
from tests.cases import CONV_CASES, LINEAR_CASES, dense_conv2d
from tests.helpers import assert_close_to_fp64

BLOCKS = (Block((16, 16)), Block((64, 32)), Block((16, 128)))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` hands out NaN, so that an output element that a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def in_blocks():
    """Every case once: those in blocks as they are, others in one of the blocks that there are kernels for. Rows that
    are emptied one by one would cut blocks; `masked_linear` has those."""
    for number, case in enumerate(LINEAR_CASES):
        if "empty rows" in case.special:
            continue
        own = isinstance(case.structure, Block) and set(case.structure.shape) <= set(kernels.BLOCK_SIZES)
        # what is special about a weight needs a block that is kept: smaller ones are more
        ours = BLOCKS[0] if case.special else BLOCKS[number % len(BLOCKS)]
        yield case if own else replace(case, structure=ours)


def of_channels():
    """Cases that the kernel takes: no groups, the same padding on both sides. Large batches say nothing new to a kernel
    that counts pixels, and are slow."""
    for case in CONV_CASES:
        even = not isinstance(case.padding, tuple) or len(case.padding) == 2
        if case.groups == 1 and even and "same" not in case.name and case.batch != 0:
            large = (case.batch or 0) >= 16 or case.size[0] * case.size[1] * case.kernel[0] * case.kernel[1] > 10000
            changed = replace(case, structure=Channel())
            yield pytest.param(changed, marks=pytest.mark.slow if large else (), id=case.name)


def on(device, *tensors):
    return [None if tensor is None else tensor.detach().to(device).requires_grad_() for tensor in tensors]


def dense(function, data):
    """Output and gradients in float64."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (data.x, data.weight, data.bias)]
    y = function(*wide)
    y.backward(data.upstream.double())
    return y, *(None if tensor is None else tensor.grad for tensor in wide)


@pytest.mark.parametrize("case", in_blocks(), ids=lambda case: case.name)
def test_block_sparse_linear(case, device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_linear:triton")
    data = case.make()
    x, values, bias = on(device, data.x, data.packed.values, data.bias)
    y = sparse_linear(x, values, data.pattern.to(device), bias)
    y.backward(data.upstream.to(device))
    expected, dx, dw, dbias = dense(F.linear, data)
    assert y.is_contiguous()
    assert_close_to_fp64(y, expected)
    assert_close_to_fp64(x.grad, dx, name="input gradient")
    dvalues = data.packed.with_values(data.packed.values.double()).gather(dw)
    assert_close_to_fp64(values.grad, dvalues, name="weight gradient")
    if bias is not None:
        assert_close_to_fp64(bias.grad, dbias, name="bias gradient")


@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
def test_masked_linear(case, device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "masked_linear:triton")
    data = case.make()
    mask = data.packed.with_values(torch.ones_like(data.packed.values)).to_dense() != 0
    x, weight, bias = on(device, data.x, data.weight.where(mask, torch.nan), data.bias)
    y = masked_linear(x, weight, mask.to(device), bias)
    y.backward(data.upstream.to(device))
    expected, dx, dw, dbias = dense(lambda a, w, b: F.linear(a, w.where(mask, 0), b), data)
    assert_close_to_fp64(y, expected)
    assert_close_to_fp64(x.grad, dx, name="input gradient")
    assert_close_to_fp64(weight.grad, dw, name="weight gradient")
    if bias is not None:
        assert_close_to_fp64(bias.grad, dbias, name="bias gradient")


@pytest.mark.parametrize("case", [case for case in LINEAR_CASES if isinstance(case.structure, NM)], ids=str)
def test_nm_linear(case, device):
    n, m = case.structure.n, case.structure.m
    data = replace(case, in_features=-(-case.in_features // m) * m).make()
    values, bits = kernels.pack_nm(data.weight, n, m)
    y = kernels.nm_linear(data.x.to(device), values.to(device), bits.to(device), n, m, data.bias.to(device))
    assert_close_to_fp64(y, F.linear(data.x.double(), data.weight.double(), data.bias.double()))


@pytest.mark.parametrize("case", of_channels())
def test_channel_convolution(case, device, monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_conv2d:triton")
    data = case.make()
    x, values, bias = on(device, data.x, data.packed.values, data.bias)
    y = sparse_conv2d(x, values, data.pattern.to(device), bias, **case.arguments)
    y.backward(data.upstream.to(device))
    expected, dx, dw, dbias = dense(lambda a, w, b: dense_conv2d(a, w, b, case), data)
    assert_close_to_fp64(y, expected)
    found = x.grad.cpu()
    if case.special in (("nan",), ("infinity",)):
        # pixels that a tap does not reach meet it as a zero, and 0 · ∞ is NaN (docs/kernels/conv.md); nothing that is
        # not finite gets lost, and what is finite is right
        assert not (found.isfinite() & ~dx.isfinite()).any()
        dx, found = dx.where(found.isfinite(), 0), found.where(found.isfinite(), 0)
    assert_close_to_fp64(found, dx, name="input gradient")
    dvalues = data.packed.with_values(data.packed.values.double()).gather(dw)
    assert_close_to_fp64(values.grad, dvalues, name="weight gradient")
    if bias is not None:
        assert_close_to_fp64(bias.grad, dbias, name="bias gradient")


def test_the_kernels_were_what_ran(monkeypatch):
    """The environment variable names the backend, and another one is then an error, not a substitute."""
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_linear:triton")
    assert registry.forced("sparse_linear_weight_grad") == "triton"
    assert len(list(in_blocks())) == len(LINEAR_CASES) - 2
    assert len(list(of_channels())) > 60
