"""N:M packing, bit for bit, and the product against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.errors import ShapeError, StructureError
from tests.kernels.compare import DTYPES, assert_accurate

PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 16), (1, 2), (16, 16)]


def make(rows, inputs, n, m, dtype=torch.float32):
    weight = torch.randn(rows, inputs)
    rank = torch.rand(rows, inputs // m, m).argsort(-1).argsort(-1)
    weight = torch.where((rank < n).reshape(rows, inputs), weight, 0).to(dtype)
    weight[0] = 0  # fewer than n
    return weight


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_packing_is_exact(pattern):
    n, m = pattern
    weight = make(7, 48, n, m)
    values, bits = kernels.pack_nm(weight, n, m)
    assert values.shape == (7, 48 // m * n)
    assert torch.equal(kernels.unpack_nm(values, bits, n, m), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_product(pattern, dtype, device):
    n, m = pattern
    weight, x, bias = make(70, 176, n, m, dtype), torch.randn(19, 176).to(dtype), torch.randn(70).to(dtype)
    values, bits = kernels.pack_nm(weight, n, m)
    y = kernels.nm_linear(x.to(device), values.to(device), bits.to(device), n, m, bias.to(device), activation="silu")
    assert_accurate(y, lambda a, w, b: F.silu(F.linear(a, w, b)), x, weight, bias)


def test_a_full_group_is_refused_with_its_place():
    weight = torch.zeros(3, 8)
    weight[1, 4:7] = 1
    with pytest.raises(StructureError, match="row 1, inputs 4 to 7 hold 3"):
        kernels.pack_nm(weight, 2, 4)
    with pytest.raises(StructureError, match="2:3"):
        kernels.pack_nm(weight, 2, 3)


def test_wrong_sizes(device):
    values, bits = kernels.pack_nm(make(4, 16, 2, 4), 2, 4)
    with pytest.raises(ShapeError, match="inputs 15, expected 16"):
        kernels.nm_linear(torch.randn(2, 15, device=device), values.to(device), bits.to(device), 2, 4)
