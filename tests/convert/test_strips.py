"""Layers that run strip by strip: the same bits as one after the other, whatever the layers, sizes and strips."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.convert import lower, strips
from sparse_engine.convert.choose import choose
from sparse_engine.convert.graph import Graph, shape_at
from sparse_engine.convert.parts import PartedPlan, compile_parts
from tests.convert.test_parts import graph_of


def chains_of(graph: Graph) -> list[list[str]]:
    found = strips.find_chains(graph, {name: shape_at(value.shape, 1) for name, value in graph.values.items()})
    return [[node.name for node in graph.nodes[chain.first : chain.last]] for chain in found.values()]


def always(monkeypatch: pytest.MonkeyPatch, rows: int, longest: int = 6) -> None:
    """Chains wherever they are possible, as long as possible, in strips of so many rows."""

    def best_rows(
        graph: Graph, first: int, last: int, shapes: dict[str, tuple[int, ...]], kept: dict[str, int]
    ) -> tuple[int, float]:
        nodes = graph.nodes[first:last]
        heights = {name: shapes[name][2] for node in nodes for name in (node.inputs[0], node.output)}
        fits = last - first <= longest and strips.reads_something(
            graph, nodes, heights, rows, 0, heights[nodes[-1].output]
        )
        return rows, float((last - first) ** 2) if fits else 0.0

    monkeypatch.setattr(strips, "_best_rows", best_rows)


def choices_of(graph: Graph) -> dict[str, dict[str, Any]]:
    """One kernel for each layer: small strips would get others, which add in another order."""
    lowering = lower._Lowering(graph, 1, None, 2)
    lowering.emit_steps()
    return {
        name: {"choice": lower.default_choice(problem, 1).to_json(), "pixels": problem.pixels}
        for name, problem in lowering.problems.items()
    }


def check(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, rows: int, longest: int = 6) -> Graph:
    graph = graph_of(model, x)
    choices = choices_of(graph)
    whole = lower.compile(graph, 1, 1, choices).run([x])
    expected = model(x)
    always(monkeypatch, rows, longest)
    assert chains_of(graph), "this model has a chain"
    plans = [lower.compile(graph, 1, 1, choices)]
    parted = compile_parts(graph, 2, choices)
    if parted is not None:
        plans.append(parted)
    for plan in plans:
        for _ in range(2):  # the second call finds the memory used
            for one, other in zip(plan.run([x]), whole, strict=True):
                assert torch.equal(one, other)
    for one, other in zip(whole, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert se.convert.relative_error(one, other.detach()) <= 1e-5
    return graph


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("height", [24, 26, 27])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 5, padding=2),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2),
        nn.Conv2d(4, 6, (5, 1), padding=(2, 0)),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 2, stride=2),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(2, 2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(5, 1, 2),
        nn.AvgPool2d(5, 2, 2, ceil_mode=True),
        nn.AvgPool2d(5, 1, 2, divisor_override=7),
    ],
    ids=str,
)
def test_layers(layer: nn.Module, height: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    channels = layer.out_channels if isinstance(layer, nn.Conv2d) else 4
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(channels, 5, 3, padding=1))
    check(model, torch.randn(1, 3, height, 19), monkeypatch, rows)


@pytest.mark.parametrize("height", [17, 19, 33])
def test_images_of_one_column_are_not_cut(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, (3, 1), padding=(1, 0)), nn.ReLU(), nn.Conv2d(6, 5, 1))
    x = torch.randn(1, 3, height, 1)
    graph = graph_of(model, x)
    always(monkeypatch, 4)
    assert chains_of(graph) == []
    for threads in (1, 2):
        (found,) = lower.compile(graph, 1, threads).run([x])
        assert se.convert.relative_error(found, model(x).detach()) <= 1e-5


def test_windows_in_the_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1, padding=1))
    x = torch.randn(1, 3, 64, 20)
    graph = graph_of(model, x)
    always(monkeypatch, 8)
    for threads in (1, 2):
        (found,) = lower.compile(graph, 1, threads).run([x])
        assert se.convert.relative_error(found, model(x).detach()) <= 1e-5


class Blocks(nn.Module):
    """Residual blocks: the sum's other side is the chain's own input, or comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 1, 2)
        self.c = nn.Conv2d(8, 12, 3, 2, 1)
        self.d = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        x = (self.b(self.a(x).relu()) + x).relu()
        y = (self.d(self.c(x).relu()) + self.down(x)).relu()
        return self.head(y.mean((2, 3))), x


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [(31, 17), (32, 32), (40, 23)])
def test_residual_blocks(size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    graph = check(Blocks(), torch.randn(1, 3, *size), monkeypatch, rows)
    assert ["a", "b"] in chains_of(graph)


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(draw.randint(2, 6)):
        if draw.random() < 0.25:
            layers.append(nn.MaxPool2d(draw.choice([2, 3]), draw.choice([1, 2]), padding=1))
            continue
        out, kernel = draw.randint(1, 20), draw.choice([1, 3, 5])
        layers.append(
            nn.Conv2d(channels, out, kernel, draw.choice([1, 1, 2]), padding=kernel // 2, bias=draw.random() < 0.5)
        )
        layers.append(draw.choice([nn.ReLU(), nn.Hardswish(), nn.GELU(), nn.Identity()]))
        channels = out
    layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 3, 1)]
    x = torch.randn(1, 3, draw.randint(20, 45), draw.randint(8, 40))
    check(nn.Sequential(*layers), x, monkeypatch, draw.randint(1, 9), draw.randint(2, 6))


def test_not_a_number_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1))
    x = torch.randn(1, 3, 24, 24)
    x[0, 1, 11, 7], x[0, 2, 3, 3] = float("nan"), -0.0
    graph = graph_of(model, x)
    choices = choices_of(graph)
    whole = lower.compile(graph, 1, 1, choices).run([x])[0]
    always(monkeypatch, 4)
    found = lower.compile(graph, 1, 1, choices).run([x])[0]
    assert torch.equal(found.isnan(), whole.isnan())
    assert torch.equal(found.nan_to_num(7.0), whole.nan_to_num(7.0))
    assert whole.isnan().any()
    assert not whole.isnan().all()


class Early(nn.Module):
    """The first layers of VGG-16, with fewer channels behind them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 64, 3, padding=1)
        self.b = nn.Conv2d(64, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.c = nn.Conv2d(64, 8, 3, padding=1)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.pool(self.b(self.a(x).relu()).relu()))


def test_large_values_are_kept_in_strips() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 224, 224)
    graph = graph_of(Early(224), x)
    assert ["a", "b", "pool"] in chains_of(graph)
    choices = choices_of(graph)
    whole, strip = lower._Lowering(graph, 1, choices, 2), lower._Lowering(graph, 1, choices, 1)
    whole.emit_steps()
    strip.emit_steps()
    assert strip.arena < 0.6 * whole.arena
    plan = compile_parts(graph, 2, choices)
    assert isinstance(plan, PartedPlan)
    both = whole.finish(2)
    for image in x:
        (one,), (other,) = plan.run([image[None]]), both.run([image[None]])
        assert torch.equal(one, other)
    # A batch, image by image: one thread each.
    (batched,) = lower.compile(graph, 2, 2, choices).run([x])
    assert torch.equal(batched[:1], plan.run([x[:1]])[0])
    assert {"a", "b", "pool", "c"} <= {name for name, _ in plan.profile([x[:1]])}


def test_small_values_are_not_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    assert chains_of(graph_of(model, torch.randn(1, 3, 32, 32))) == []


def test_a_value_with_two_readers_ends_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    graph = graph_of(Blocks(), torch.randn(1, 3, 32, 32))
    always(monkeypatch, 4)
    assert chains_of(graph) == [["a", "b"], ["c", "d"]] or chains_of(graph)[0] == ["a", "b"]
    assert all("stem" not in chain for chain in chains_of(graph))


def test_times_of_a_layer_are_of_all_its_strips() -> None:
    torch.manual_seed(0)
    graph = graph_of(Early(224), torch.randn(1, 3, 224, 224))
    lowering = lower._Lowering(graph, 1, None, 1)
    lowering.emit_steps()
    problem = lowering.problems["b"]
    assert problem.times > 1
    assert problem.times * problem.pixels >= 224 * 224
    found = choose(graph, [torch.randn(1, 3, 224, 224)], threads=1)
    seconds = dict(lower.compile(graph, 1, 1, found).profile([torch.randn(1, 3, 224, 224)]))
    assert 0.3 < found["b"]["ms"] / (seconds["b"] * 1e3) < 3
