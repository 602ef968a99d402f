"""The masked product against fp64, with masks in tiles, random masks, empty rows of tiles, and a mask that changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.errors import ShapeError
from tests.kernels.compare import DTYPES, assert_accurate

# outputs, inputs, tokens, tile, share of tiles kept
CASES = [
    (130, 200, 33, (64, 32), 0.4),
    (256, 192, 70, (128, 64), 0.5),
    (48, 64, 1, (16, 16), 0.0),
    (64, 130, 5, (32, 64), 1.0),
]


def make(case, dtype):
    outputs, inputs, tokens, tile, share = case
    tiles = torch.rand(-(-outputs // tile[0]), -(-inputs // tile[1])) < share
    mask = tiles.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)[:outputs, :inputs].contiguous()
    mask &= torch.rand(outputs, inputs) < 0.7
    return (
        mask,
        torch.randn(outputs, inputs).to(dtype),
        torch.randn(tokens, inputs).to(dtype),
        torch.randn(tokens, outputs).to(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case, dtype, device):
    mask, weight, x, dy = make(case, dtype)
    bias = torch.randn(case[0]).to(dtype)
    poisoned = torch.where(mask, weight, float("nan"))  # what is masked out must not be seen
    lists = kernels.tile_lists(mask.to(device), case[3])
    w, m = poisoned.to(device), mask.to(device)
    y = kernels.masked_linear(x.to(device), w, m, lists, bias.to(device), activation="relu")
    assert_accurate(y, lambda a, v, b: F.linear(a, torch.where(mask, v, 0), b).relu(), x, weight, bias, name="y")
    dx = kernels.masked_input_gradient(dy.to(device), w, m, lists)
    assert_accurate(dx, lambda g, v: g @ torch.where(mask, v, 0), dy, weight, factor=3.0, name="dx")
    dw = kernels.masked_weight_gradient(dy.to(device), x.to(device), m, lists)
    assert_accurate(dw, lambda g, a: torch.where(mask, g.T @ a, 0), dy, x, factor=3.0, name="dw")


def test_lists_name_the_tiles_that_hold_anything(device):
    mask = torch.zeros(100, 150, dtype=torch.bool)
    mask[5, 140] = mask[40, 3] = mask[99, 149] = True
    lists = kernels.tile_lists(mask.to(device), (32, 64))
    assert lists.flags.cpu().tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert lists.row_counts.cpu().tolist() == [1, 1, 0, 1]
    assert [lists.by_row[i, 0].item() for i in (0, 1, 3)] == [2, 0, 2]
    assert lists.column_counts.cpu().tolist() == [1, 0, 2]
    assert lists.by_column[2, :2].cpu().tolist() == [0, 3]


def test_zeros_in_the_weight_instead_of_a_mask(device):
    mask, weight, x, _ = make(CASES[0], torch.float32)
    zeroed = torch.where(mask, weight, -0.0)  # −0.0 is a zero
    lists = kernels.tile_lists(zeroed.to(device), (64, 32))
    assert torch.equal(lists.flags, kernels.tile_lists(mask.to(device), (64, 32)).flags)
    assert_accurate(kernels.masked_linear(x.to(device), zeroed.to(device), None, lists), F.linear, x, zeroed)


def test_a_mask_that_changes_every_step(device):
    weight, x = torch.randn(64, 96), torch.randn(7, 96)
    for step in range(3):
        mask = torch.rand(64, 96, generator=torch.Generator().manual_seed(step)) < 0.05
        lists = kernels.tile_lists(mask.to(device), (16, 16))
        y = kernels.masked_linear(x.to(device), weight.to(device), mask.to(device), lists)
        assert_accurate(y, lambda a, w, mask=mask: F.linear(a, torch.where(mask, w, 0)), x, weight)


def test_the_dense_gradient_for_growing(device):
    mask, _, x, dy = make(CASES[0], torch.float32)
    lists = kernels.tile_lists(mask.to(device), (64, 32))
    dw = kernels.masked_weight_gradient(dy.to(device), x.to(device), mask.to(device), lists, everywhere=True)
    assert_accurate(dw, lambda g, a: g.T @ a, dy, x)


def test_refusals(device):
    mask = torch.ones(32, 32, dtype=torch.bool, device=device)
    lists = kernels.tile_lists(mask, (16, 16))
    with pytest.raises(ShapeError, match="mask must be bool"):
        kernels.masked_linear(
            torch.randn(2, 32, device=device), torch.randn(32, 32, device=device), mask.float(), lists
        )
    with pytest.raises(ShapeError, match="inputs 31, expected 32"):
        kernels.masked_linear(torch.randn(2, 31, device=device), torch.randn(32, 32, device=device), mask, lists)
    with pytest.raises(ShapeError, match="24"):
        kernels.tile_lists(mask, (24, 16))
