"""Linear layers between rows: the caller's memory is read and written as it is, without a pass to planes or back."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_engine import _C
from sparse_engine.convert import lower, passes
from sparse_engine.convert.capture import capture
from sparse_engine.convert.graph import Graph
from sparse_engine.convert.lower import LinearChoice

NONE = ("none", 0.0, 0.0)
GUARD = 64  # floats on both sides of an output


def graph_of(model: nn.Module, *examples: Tensor) -> Graph:
    return passes.optimise(capture(model.eval(), examples).graph)


def linear(columns: int, rows: int, density: float, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=bias)
    layer.weight.data *= torch.rand_like(layer.weight) < density
    return layer


def run_guarded(plan, inputs: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Run with an output of NaN between guards that must stay as they are."""
    count = int(numpy.prod(shape))
    memory = torch.full((count + 2 * GUARD,), float("nan"))
    memory[:GUARD] = memory[-GUARD:] = 7.0
    out = memory[GUARD:-GUARD].view(shape)
    plan.run(inputs, [out])
    assert (memory[:GUARD] == 7).all()
    assert (memory[-GUARD:] == 7).all()
    return out


def check(model: nn.Module, inputs: list[Tensor], choices=None, threads: int = 1) -> lower.NativePlan:
    with torch.no_grad():
        expected = model.double()(*(x.double() for x in inputs))
    model.float()
    plan = lower._Lowering(graph_of(model, *inputs), len(inputs[0]), choices, threads).finish(threads)
    found = run_guarded(plan, inputs, tuple(expected.shape))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    return plan


def copies(plan: lower.NativePlan) -> list[str]:
    return [name for name in plan._plan.names if "layout" in name or name.startswith("output.")]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_shape_and_kernel(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(draw(0, 1 << 30))
    leading = (draw(2, 40), *data.draw(st.sampled_from([(), (), (1,), (3,), (2, 5)])))
    widths = [draw(2, 90) for _ in range(draw(2, 4))]
    density = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    layers: list[nn.Module] = []
    for columns, rows in itertools.pairwise(widths):
        layers += [
            linear(columns, rows, density, data.draw(st.booleans())),
            data.draw(st.sampled_from([nn.ReLU, nn.GELU]))(),
        ]
    model = nn.Sequential(*layers)
    kernel = data.draw(st.sampled_from(["sparse", "sparse", "dense"]))
    panel = data.draw(st.sampled_from([1, 2, 4, 8] if kernel == "sparse" else [4, 8]))
    choice = LinearChoice(kernel, panel, draw(1, 256), data.draw(st.sampled_from([0, 8, 32])), draw(1, 8))
    x = torch.randn(*leading, widths[0])
    pixels = x.numel() // widths[0]
    names = [node.name for node in graph_of(model, x).nodes if node.op == "linear"]
    choices = {name: {"choice": choice.to_json(), "pixels": pixels} for name in names}
    assert not copies(check(model, [x], choices, draw(1, 2)))


def test_a_chain_of_linear_layers_copies_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(linear(60, 50, 0.1), nn.ReLU(), linear(50, 40, 0.1), nn.ReLU(), linear(40, 10, 0.5))
    plan = check(model, [torch.randn(37, 60)])
    assert len(plan._plan.names) == 3


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(48, 33, 0.2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.layer(x) + y)


def test_a_sum_in_the_same_pass() -> None:
    torch.manual_seed(0)
    check(Sum(), [torch.randn(19, 48), torch.randn(19, 33)])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(24, 24, 0.3), linear(24, 24, 0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x)
        return y, self.second(y), self.second(x)


def test_an_output_that_is_read_again() -> None:
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(21, 24)
    graph = graph_of(model, x)
    found = lower._Lowering(graph, 21, None, 1).finish(1).run([x])
    with torch.no_grad():
        for ours, theirs in zip(found, model(x), strict=True):
            torch.testing.assert_close(ours, theirs)


class Heads(nn.Module):
    """Values in rows that the graph itself makes: what leaves an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = linear(32, 96, 0.3), linear(32, 32, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.into(x).chunk(3, 2))
        y = (q @ k.transpose(2, 3)).softmax(3) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("batch", [1, 3])
def test_attention_between_linear_layers(batch: int) -> None:
    torch.manual_seed(0)
    check(Heads(), [torch.randn(batch, 17, 32)])


def test_what_does_not_fit_is_refused() -> None:
    weight = _C.Weight.dense(numpy.ones((6, 5), dtype=numpy.float32), 4, 256, 0)
    x, out = (0, 0, [20, 5], [5, 1]), (0, 200, [20, 6], [6, 1])

    def add(x=x, out=out, bias=None, residual=None) -> None:
        _C.Plan(400, []).linear("layer", weight, bias, x, out, residual, 32, NONE, 4)

    add()
    with pytest.raises(ValueError, match="do not fit the weight"):
        add(x=(0, 0, [20, 4], [5, 1]))
    with pytest.raises(ValueError, match="do not fit the weight"):
        add(out=(0, 200, [19, 6], [6, 1]))
    with pytest.raises(ValueError, match="neither in rows nor in channel planes"):
        add(x=(0, 0, [20, 5], [6, 2]))
    with pytest.raises(ValueError, match="would touch"):
        add(out=(0, 300, [20, 6], [6, 1]))
    with pytest.raises(ValueError, match="would touch"):  # planes are written by whole vectors
        add(out=(0, 280, [20, 6], [1, 20]))
    with pytest.raises(ValueError, match="would touch"):
        add(residual=(0, 390))
    with pytest.raises(ValueError, match="bias"):
        add(bias=numpy.ones(5, dtype=numpy.float32))
