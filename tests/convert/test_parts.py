"""One image in bands of rows: the same outputs as with one thread, whatever the layers, sizes and number of bands."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.convert import lower, passes
from sparse_engine.convert.capture import capture
from sparse_engine.convert.graph import Graph
from sparse_engine.convert.parts import PartedPlan, _PartLowering, compile_parts, find_cut, rows_of
from sparse_engine.convert.strips import window


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) > 0.6)
    return passes.optimise(capture(model.eval(), (x,)).graph)


def check(model: nn.Module, x: Tensor, parts: int) -> PartedPlan:
    graph = graph_of(model, x)
    plan = compile_parts(graph, parts)
    assert plan is not None, "this model can be cut"
    alone = lower._Lowering(graph, 1, None, 1).finish(1).run([x])
    for _ in range(2):  # the second call finds the memory used
        found = plan.run([x])
        assert len(found) == len(alone)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one, other)
    expected = model(x)
    for one, other in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert se.convert.relative_error(one, other.detach()) <= 1e-5
    return plan


class Residual(nn.Module):
    """A small residual network: strides, a projection, a residual that is the layer's own input."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 7, 2, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, 2 * channels, 1, 2)
        self.c = nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.d = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.head = nn.Linear(2 * channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x).relu())
        x = (self.b(self.a(x).relu()) + x).relu()
        x = (self.norm(self.d(self.c(x).relu())) + self.down(x)).relu()
        x = (self.d(x) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("size", [(75, 71), (80, 50), (97, 33), (112, 112)])
def test_residual_network(size: tuple[int, int], parts: int) -> None:
    torch.manual_seed(0)
    check(Residual(), torch.randn(1, 3, *size), parts)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("height", [24, 25, 27, 31])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 5, padding=2, dilation=1),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2),
        nn.Conv2d(4, 6, (5, 1), padding=(2, 0)),
        nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 2, stride=2),
        nn.Conv2d(4, 6, 3, stride=(1, 2), padding=1),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.MaxPool2d(3, 1, 1),
        nn.AvgPool2d(2, 2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.Hardswish(),
    ],
    ids=str,
)
def test_layers(layer: nn.Module, height: int, parts: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(_channels(layer), 5, 1))
    check(model, torch.randn(1, 3, height, 19), parts)


def _channels(layer: nn.Module) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else 4


class SeveralOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 6, 5, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.a(x)
        z = self.b(y) * y
        return y, z, z.flatten(2).softmax(-1)


def test_several_values_leave_the_parts() -> None:
    torch.manual_seed(0)
    plan = check(SeveralOutputs(), torch.randn(1, 3, 33, 17), 2)
    assert any(name.endswith(".halo") for name, _ in plan.profile([torch.randn(1, 3, 33, 17)]))


@pytest.mark.parametrize("size", [(16, 16), (33, 20), (64, 64), (28, 28)])
@pytest.mark.parametrize("first", [1, 3])
def test_an_input_that_is_copied_first(first: int, size: tuple[int, int]) -> None:
    """A copy of the input as large as the layer's output must not take its place, which has room for a halo."""
    torch.manual_seed(0)
    last = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)]
    check(nn.Sequential(nn.Conv2d(8, 8, first, padding=first // 2), *last), torch.randn(1, 8, *size), 2)
    check(nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(3, 1, 1), last[0]), torch.randn(1, 8, *size), 3)


def test_a_window_wider_than_a_neighbours_band() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, (15, 3), padding=(7, 1)), nn.ReLU())
    check(model, torch.randn(1, 2, 12, 9), 4)


def test_windows_tile_the_image() -> None:
    assert [rows_of(7, part, 2) for part in range(2)] == [(0, 4), (4, 7)]
    graph = graph_of(nn.Sequential(nn.MaxPool2d(3, 2, 1)), torch.randn(1, 3, 16, 8))
    node = graph.nodes[0]
    assert window(node, 0, 4, 16) == (0, 8, 1, 0)
    assert window(node, 4, 8, 16) == (7, 16, 0, 0)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.body(x)


def test_graphs_that_need_whole_images_early_are_not_cut() -> None:
    x = torch.randn(1, 3, 32, 32)
    assert find_cut(graph_of(Gate(), x), 2) is None
    assert find_cut(graph_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), x), 2) is None
    small = torch.randn(1, 3, 5, 5)
    assert find_cut(graph_of(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), small), 2) is None


def test_bands_pay_between_layers() -> None:
    """One convolution alone reads and writes the caller's memory: bands would only copy."""
    x = torch.randn(1, 16, 64, 64)
    one, two = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    assert find_cut(graph_of(nn.Sequential(one), x), 2) is None
    assert find_cut(graph_of(nn.Sequential(one, nn.ReLU(), two), x), 2) is not None


def test_an_executable_of_one_image_runs_in_parts_from_several_threads() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(1, 3, 64, 64)
    executable = se.convert(model, (x,), tune=False, threads=2)
    expected = executable(x)
    assert isinstance(next(iter(executable._plans.values()))[0], PartedPlan)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: executable(x), range(40)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("parts", [2, 3])
def test_what_neighbours_still_read_is_not_written(parts: int) -> None:
    """Rows laid out for the next stage must not lie where a neighbour may still be reading those of this one."""
    torch.manual_seed(0)
    graph = graph_of(Residual(), torch.randn(1, 3, 128, 128))
    cut = find_cut(graph, parts)
    assert cut is not None
    body = replace(graph, outputs=cut.passed, nodes=graph.nodes[: cut.nodes])
    lowerings = [_PartLowering(body, None, cut, part, parts) for part in range(parts)]
    stages = 0
    for lowering in lowerings:
        lowering.others = lowerings
        lowering.emit_steps()
        by_stage: dict[int, list[tuple[int, int]]] = {}
        for box in lowering.outboxes.values():
            (filled,) = (index for index, step in enumerate(lowering.steps) if any(p is box for p in step.writes))
            stage = sum(mark <= filled for mark in lowering.marks)
            by_stage.setdefault(stage, []).append((box.at()[1], box.at()[1] + box.storage.floats))
        for stage, boxes in by_stage.items():
            stages += 1
            for begin, end in boxes:  # read by others in the stage after, while those of the stage after are filled
                for other_begin, other_end in by_stage.get(stage + 1, []):
                    assert end <= other_begin or other_end <= begin
    assert stages >= 2 * parts


def test_the_arenas_are_as_small_as_with_one_thread() -> None:
    torch.manual_seed(0)
    graph = graph_of(Residual(), torch.randn(1, 3, 128, 128))
    alone, parted = lower._Lowering(graph, 1, None, 1).finish(1), compile_parts(graph, 2)
    assert parted is not None
    assert parted.arena_bytes <= 1.35 * alone.arena_bytes
