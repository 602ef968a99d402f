"""Block-sparse products against fp64 over odd shapes, every block size, empty rows, and every epilogue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import PackedWeight, kernels
from sparse_engine.errors import ShapeError
from sparse_engine.structure import Block
from tests.kernels.compare import DTYPES, assert_accurate

# outputs, inputs, block, tokens, density
CASES = [
    (48, 96, (16, 16), 20, 0.5),
    (100, 150, (32, 16), 33, 0.4),
    (130, 200, (64, 64), 70, 0.5),
    (128, 256, (128, 64), 17, 0.6),
    (64, 256, (32, 128), 5, 0.5),
    (256, 256, (128, 128), 300, 0.5),
    (64, 48, (16, 16), 1, 1.0),
    (64, 64, (32, 32), 9, 0.0),
]


def make(case, dtype, device):
    outputs, inputs, block, _tokens, density = case
    kept = torch.rand(-(-outputs // block[0]), -(-inputs // block[1])) < density
    if density not in (0.0, 1.0):
        kept[0] = False  # an empty block row,
        kept[-1, 0] = True
        kept[:, -1] = False  # and an empty block column
    pattern = kernels.block_pattern(kept, block, (outputs, inputs))
    weight = torch.randn(outputs, inputs, dtype=torch.float64).to(dtype)
    values = kernels.pack_blocks(weight, pattern)
    return pattern.to(device), values.to(device), kernels.unpack_blocks(values, pattern)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, device):
    outputs, inputs, _, tokens, _ = case
    pattern, values, dense = make(case, dtype, device)
    x = torch.randn(tokens, inputs).to(dtype)
    dy = torch.randn(tokens, outputs).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    y = kernels.block_sparse_linear(x.to(device), values, pattern, bias.to(device))
    assert_accurate(y, F.linear, x, dense, bias, name="y")
    dx = kernels.block_sparse_input_gradient(dy.to(device), values, pattern)
    assert_accurate(dx, lambda g, w: g @ w, dy, dense, factor=3.0, name="dx")
    dw = kernels.block_sparse_weight_gradient(dy.to(device), x.to(device), pattern)
    on_cpu = pattern.to("cpu")
    assert_accurate(dw, lambda g, a: kernels.pack_blocks(g.T @ a, on_cpu), dy, x, factor=3.0, name="dw")


REFERENCES = {
    None: lambda v: v,
    "relu": F.relu,
    "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("activation", REFERENCES, ids=str)
def test_epilogue(activation, device):
    pattern, values, dense = make((80, 96, (16, 32), 12, 0.5), torch.float32, device)
    x, bias, residual = torch.randn(3, 4, 96), torch.randn(80), torch.randn(3, 4, 80)
    y = kernels.block_sparse_linear(
        x.to(device), values, pattern, bias.to(device), residual.to(device), activation, slope=0.2
    )
    assert_accurate(y, lambda a, w, b, r: REFERENCES[activation](F.linear(a, w, b) + r), x, dense, bias, residual)


def test_the_pattern_is_the_packed_weights(device):
    """`PackedWeight` and the kernels agree on the order of blocks and of the numbers within one."""
    weight = torch.randn(70, 90)
    weight[:32] = 0
    packed = PackedWeight.from_dense(weight, structure=Block((32, 16)))
    pattern = kernels.pattern_of(packed, device)
    values = packed.values.reshape(-1, 32, 16).to(device)
    assert torch.equal(kernels.unpack_blocks(values.cpu(), pattern.to("cpu")), packed.to_dense())
    x = torch.randn(5, 90)
    assert_accurate(kernels.block_sparse_linear(x.to(device), values, pattern), F.linear, x, weight)


def test_no_tokens_and_strided_input(device):
    pattern, values, dense = make(CASES[0], torch.float32, device)
    assert kernels.block_sparse_linear(torch.empty(0, 96, device=device), values, pattern).shape == (0, 48)
    assert (
        kernels.block_sparse_weight_gradient(
            torch.empty(0, 48, device=device), torch.empty(0, 96, device=device), pattern
        ).count_nonzero()
        == 0
    )
    wide = torch.randn(6, 200)
    assert_accurate(
        kernels.block_sparse_linear(wide.to(device)[:, :96], values, pattern), F.linear, wide[:, :96], dense
    )
    transposed = torch.randn(96, 6)
    assert_accurate(
        kernels.block_sparse_linear(transposed.to(device).T, values, pattern), F.linear, transposed.T, dense
    )


def test_special_numbers_reach_only_their_rows(device):
    pattern, values, _dense = make((32, 32, (16, 16), 4, 1.0), torch.float32, device)
    x = torch.randn(4, 32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    y = kernels.block_sparse_linear(x.to(device), values, pattern, activation="relu").cpu()
    assert y[1].isnan().all()
    assert not y[[0, 3]].isnan().any()
    assert y[2].isinf().any()


def test_split_sums_are_repeatable(device):
    pattern, _values, _dense = make((32, 32, (16, 16), 3000, 1.0), torch.float32, device)
    dy, x = torch.randn(3000, 32), torch.randn(3000, 32)
    first = kernels.block_sparse_weight_gradient(dy.to(device), x.to(device), pattern)
    again = kernels.block_sparse_weight_gradient(dy.to(device), x.to(device), pattern)
    assert torch.equal(first, again)
    on_cpu = pattern.to("cpu")
    assert_accurate(first, lambda g, a: kernels.pack_blocks(g.T @ a, on_cpu), dy, x)


def test_refusals_name_the_numbers(device):
    pattern, values, _dense = make(CASES[0], torch.float32, device)
    with pytest.raises(ShapeError, match="inputs 95, expected 96"):
        kernels.block_sparse_linear(torch.randn(2, 95, device=device), values, pattern)
    with pytest.raises(ShapeError, match="24×16"):
        kernels.block_pattern(torch.ones(2, 2, dtype=torch.bool), (24, 16))
    with pytest.raises(ShapeError, match="float16"):
        kernels.block_sparse_linear(torch.randn(2, 96, device=device).half(), values, pattern)
    with pytest.raises(ShapeError, match="swish2"):
        kernels.block_sparse_linear(torch.randn(2, 96, device=device), values, pattern, activation="swish2")
