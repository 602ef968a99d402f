"""Channels of a sum are ordered so that zero rows lie together, and nothing else changes."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor, nn

from sparse_engine.convert.choose import _channel_lists
from sparse_engine.convert.graph import Graph
from sparse_engine.convert.lower import LinearProblem
from sparse_engine.convert.passes import order_channels
from sparse_engine.convert.passes.order_channels import _order
from tests.convert.test_passes import check, kill_


class Stream(nn.Module):
    """A sum of three branches that keep different channels, with a depthwise layer and a head that read it."""

    def __init__(
        self, channels: int = 16, pruned: bool = True, head: bool = True, cut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.cut = cut
        self.head = nn.Linear(channels, 5) if head else None
        if pruned:
            kill_(self.first, *range(0, channels, 2))
            kill_(self.second, *(c for c in range(channels) if c % 4 < 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.norm(self.first(x))).relu()
        x = (x + self.second(x)).relu()
        x = self.depthwise(x) if self.cut is None else self.cut(self.depthwise(x))
        return x if self.head is None else self.head(x.mean((2, 3)))


def changes(graph: Graph) -> list[int]:
    """For each operator with zero rows: how often kept and zero rows take turns."""
    found = []
    for node in graph.nodes:
        if node.op in ("conv2d", "linear"):
            weight = graph.constants[node.params["weight"]]
            kept = (weight.reshape(weight.shape[0], -1) != 0).any(1)
            if not bool(kept.all()):
                found.append(int((kept[1:] != kept[:-1]).sum()))
    return found


def test_kept_rows_of_every_branch_lie_together() -> None:
    graph = check(Stream(), 2, 3, 6, 6)
    assert sorted(changes(graph)) == [1, 2]  # the heavier one in one piece, the other in two: Gray code


def test_a_second_time_changes_nothing() -> None:
    graph = check(Stream(), 2, 3, 6, 6)
    assert order_channels(graph.copy()) == 0


@pytest.mark.parametrize("pruned", [False, True])
def test_an_output_keeps_its_order(pruned: bool) -> None:
    graph = check(Stream(pruned=pruned, head=False), 2, 3, 6, 6)
    assert changes(graph) == ([15, 7] if pruned else [])


@pytest.mark.parametrize(
    "cut",
    [nn.Softmax(1), nn.GroupNorm(2, 16), nn.PixelShuffle(2), nn.Conv2d(16, 16, 1, groups=4)],
    ids=lambda module: type(module).__name__,
)
def test_what_mixes_channels_fixes_their_order(cut: nn.Module) -> None:
    model = Stream(cut=cut)
    if isinstance(cut, nn.PixelShuffle):
        model.head = nn.Linear(4, 5)
    assert changes(check(model, 2, 3, 6, 6)) == [15, 7]


def test_a_concatenation_fixes_the_order() -> None:
    class Twice(Stream):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + self.second(x)
            return torch.cat([x, x.tanh()], 1).mean((2, 3))

    assert changes(check(Twice(), 2, 3, 6, 6)) == [7]


def test_linear_layers_are_ordered_too() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 12), kill_(nn.Linear(12, 12), 0, 3, 4, 9), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).tanh()
            return self.c((x + self.b(x)).tanh())

    assert changes(check(Residual(), 4, 6)) == [1]


def test_the_report_says_which_channels_are_listed() -> None:
    geometry = {"n": 1, "c": 4, "h": 3, "w": 3, "r": 3, "s": 3}
    weight = numpy.ones((6, 4, 9), dtype=numpy.float32)
    weight[[0, 5]] = 0
    weight[:, 2] = 0
    problem = LinearProblem("layer", weight.reshape(6, 36), 6, 1, geometry, 9)
    assert (
        _channel_lists(LinearProblem("layer", weight[1:5, [0, 1, 3]].reshape(4, 27), 4, 1, {**geometry, "c": 3}, 9))
        == ""
    )
    assert _channel_lists(problem) == "; channels listed: 3 of 4 in, 4 of 6 out"
    problem.weight[1, 0] = 0
    assert _channel_lists(problem) == ""


def test_the_order_is_that_of_a_gray_code() -> None:
    patterns = [torch.tensor([bool(i >> bit & 1) for i in range(8)]) for bit in range(3)]
    order = _order(patterns)
    assert order is not None
    rows = torch.stack([pattern[order] for pattern in patterns])
    assert int((rows[:, 1:] != rows[:, :-1]).sum()) == 7  # neighbours differ in one operator
    assert _order([pattern[order] for pattern in patterns]) is None
    assert _order([torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)]) is None
