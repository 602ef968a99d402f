"""Depthwise convolutions: the kernel that shares one load between the taps of a row, beside the general one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import sparse_engine as se


class Depthwise(nn.Module):
    def __init__(self, channels: int, multiplier: int, dilation: int, residual: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.conv = nn.Conv2d(
            channels, channels * multiplier, 3, padding=(dilation, 1), dilation=(dilation, 1), groups=channels
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.conv(x)
        return (y + x if self.residual else y).clamp(-2, 2)


@pytest.mark.parametrize("size", [(3, 5), (7, 7), (14, 14), (20, 33), (57, 16), (40, 112)])
@pytest.mark.parametrize(
    ("channels", "multiplier", "dilation", "residual"),
    [(1, 1, 1, False), (2, 1, 1, True), (9, 1, 1, True), (5, 3, 1, False), (6, 1, 2, False)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_agrees_with_the_model(
    size: tuple[int, int], channels: int, multiplier: int, dilation: int, residual: bool, threads: int
) -> None:
    torch.manual_seed(0)
    model = Depthwise(channels, multiplier, dilation, residual).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model.double()(x.double()).float()
    executable = se.convert(model.float(), (x,), tune=False, threads=threads)
    for n in (1, 2):
        assert se.convert.relative_error(executable(x[:n]), expected[:n]) <= 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (0, 19), (7, 8), (15, 0), (15, 19)])
def test_what_is_not_finite_stays_with_its_neighbours(bad: float, place: tuple[int, int]) -> None:
    """Whole lines are loaded, of other rows and planes too: none of that may come through the masks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(7, 7, 3, padding=1, groups=7)).eval()
    x = torch.randn(1, 7, 16, 20)
    x[0, 3, place[0], place[1]] = bad
    executable = se.convert(model, (torch.randn(1, 7, 16, 20),), tune=False)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(executable(x), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert int((~expected.isfinite()).sum()) in (4, 6, 9)
