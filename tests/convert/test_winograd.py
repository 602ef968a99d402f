"""Dense convolutions with half the multiplications: exact to a few roundings, and not used where not allowed."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine import _C
from sparse_engine.convert import lower, passes
from sparse_engine.convert.capture import capture
from sparse_engine.convert.choose import candidates, choose
from sparse_engine.convert.graph import Graph
from sparse_engine.convert.lower import LinearChoice, LinearProblem, add_linear, default_choice
from sparse_engine.convert.parts import compile_parts
from sparse_engine.errors import ConvertError
from tests.convert.one_conv import problem_of, reference, run


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    across = draw(1, 2)
    kernel = (draw(1, 7), draw(3, 4) if across == 1 else draw(5, 8))
    stride = (draw(1, 3), across)
    padding = tuple(draw(0, 3) for _ in range(4))
    size = (
        max(1, kernel[0] - padding[0] - padding[2]) + draw(0, 30),
        max(1, kernel[1] - padding[1] - padding[3]) + draw(0, 60),
    )
    torch.manual_seed(draw(0, 1 << 30))
    x = torch.randn(draw(1, 3), draw(1, 6), *size)
    weight, bias = torch.randn(draw(1, 13), x.shape[1], *kernel), torch.randn(16)
    bias = bias[: weight.shape[0]]
    problem = problem_of(x, weight, stride, padding)
    assert problem.winograd
    expected = reference(x, weight, bias, stride, padding)
    found = run(problem, LinearChoice("winograd"), x, bias, ("none", 0.0, 0.0))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("activation", "function"), [(("gelu", 0.0, 0.0), nn.functional.gelu), (("clamp", 0.0, 6.0), nn.functional.relu6)]
)
def test_activations(activation, function) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 21, 35), torch.randn(10, 3, 7, 7), torch.randn(10)
    problem = problem_of(x, weight, (2, 2), (3, 3, 3, 3))
    expected = reference(x, weight, bias, (2, 2), (3, 3, 3, 3))
    found = run(problem, LinearChoice("winograd"), x, bias, activation)
    assert (found - function(expected)).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_what_is_not_finite_reaches_only_its_own_outputs(bad: float) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 2, 20, 40), torch.randn(5, 2, 3, 3), torch.randn(5)
    x[0, 1, 7, 11] = bad
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    expected = reference(x, weight, bias, (1, 1), (1, 1, 1, 1))
    found = run(problem, LinearChoice("winograd"), x, bias, ("none", 0.0, 0.0))
    usual = expected.abs() < 1e6  # false for NaN
    assert int((~usual).sum()) == 5 * 9
    assert (found - expected)[usual].abs().max() <= 1e-5 * expected[usual].abs().max()
    torch.testing.assert_close(found[~usual], expected[~usual].float(), equal_nan=True)


def test_error_is_near_that_of_the_direct_sum() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 64, 28, 28), torch.randn(64, 64, 3, 3), torch.zeros(64)
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    expected = reference(x, weight, bias, (1, 1), (1, 1, 1, 1))
    with torch.no_grad():
        plain = nn.functional.conv2d(x, weight, padding=1).flatten(2).transpose(0, 1)
    found = run(problem, LinearChoice("winograd"), x, bias, ("none", 0.0, 0.0))
    error, usual = ((y - expected).square().mean().sqrt() for y in (found, plain))
    assert error <= 8 * usual


def toom_cook(points: list[Fraction], taps: int) -> numpy.ndarray:
    """The factors of the input at each point: they exist, and do not depend on the filter."""
    outputs = 4
    size = outputs + taps - 1
    at = [[point**i for i in range(outputs)] for point in points] + [
        [Fraction(i == outputs - 1) for i in range(outputs)]
    ]
    g = [[point**j for j in range(taps)] for point in points] + [[Fraction(j == taps - 1) for j in range(taps)]]
    # y[i] = sum over p of at[p][i] · (g[p] · filter) · (b[p] · d): solve for b, which must not depend on the filter.
    rows, right = [], []
    for i in range(outputs):
        for j in range(taps):
            rows.append([float(at[p][i] * g[p][j]) for p in range(size)])
            right.append([float(d == i + j) for d in range(size)])
    solution, *_ = numpy.linalg.lstsq(numpy.array(rows), numpy.array(right), rcond=None)
    assert numpy.abs(numpy.array(rows) @ solution - numpy.array(right)).max() < 1e-9
    return solution


@pytest.mark.parametrize("taps", [3, 4])
def test_impulses_give_the_matrices_of_the_theory(taps: int) -> None:
    """One input, one tap: each output is the sum over the points of three known factors, and must be 0 or 1."""
    points = [Fraction(p) for p in (0, 1, -1, 2)] + ([Fraction(-2)] if taps == 4 else []) + [Fraction(-1, 2)]
    assert toom_cook(points, taps).shape == (taps + 3, taps + 3)
    for tap in range(taps):
        for at in range(12):
            x, weight = torch.zeros(1, 1, 1, 15), torch.zeros(1, 1, 1, taps)
            x[..., at], weight[..., tap] = 1.0, 1.0
            problem = problem_of(x, weight, (1, 1), (0, 0, 0, 0))
            found = run(problem, LinearChoice("winograd"), x, torch.zeros(1), ("none", 0.0, 0.0))
            torch.testing.assert_close(
                found, reference(x, weight, torch.zeros(1), (1, 1), (0,) * 4).float(), atol=2e-6, rtol=0
            )


# ---- where it is chosen


def dense_graph(model: nn.Module, x: Tensor) -> Graph:
    return passes.optimise(capture(model.eval(), (x,)).graph)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)
    )


def test_it_is_the_default_of_dense_convolutions_and_the_same_in_parts() -> None:
    model, x = small(), torch.randn(1, 3, 50, 61)
    graph = dense_graph(model, x)
    lowering = lower._Lowering(graph, 1, None, 1)
    lowering.emit_steps()
    kernels = [default_choice(problem).kernel for problem in lowering.problems.values()]
    assert kernels == ["winograd", "winograd", "dense"]
    alone = lower._Lowering(graph, 1, None, 1).finish(1).run([x])[0]
    parts = compile_parts(graph, 2)
    assert parts is not None
    assert torch.equal(parts.run([x])[0], alone)
    with torch.no_grad():
        assert se.convert.relative_error(alone, model(x)) <= 1e-5


def test_it_is_timed_beside_the_others_and_survives_a_file(tmp_path) -> None:
    model, x = small(), torch.randn(2, 3, 64, 64)
    graph = dense_graph(model, x)
    found = choose(graph, (x,))
    assert {entry["choice"]["kernel"] for entry in found.values()} <= {"winograd", "dense", "sparse"}
    executable = se.convert(model, (x,))
    executable.save(tmp_path / "m.spx")
    again = se.load(tmp_path / "m.spx")
    assert torch.equal(again(x), executable(x))


def test_it_is_no_candidate_where_few_weights_are_kept_or_it_does_not_apply() -> None:
    x = torch.randn(1, 4, 30, 30)

    def kernels(weight: Tensor, stride: tuple[int, int] = (1, 1)) -> set[str]:
        return {choice.kernel for choice in candidates(problem_of(x, weight, stride, (1, 1, 1, 1)), 1)}

    weight = torch.randn(8, 4, 3, 3)
    assert "winograd" in kernels(weight)
    assert "winograd" not in kernels(weight * (torch.rand(8, 4, 3, 3) > 0.9))
    assert "winograd" not in kernels(weight, (2, 2))
    assert "winograd" not in kernels(torch.randn(8, 4, 3, 1))
    for bad in (math.nan, math.inf, 1e20):
        weight[1, 2, 1, 1] = bad
        assert "winograd" not in kernels(weight)


@pytest.mark.parametrize("change", ["stride", "value"])
def test_a_choice_that_does_not_apply_is_not_taken(change: str) -> None:
    """Choices also come from files."""
    model, x = nn.Sequential(nn.Conv2d(4, 8, 3, 2 if change == "stride" else 1)), torch.randn(1, 4, 20, 20)
    if change == "value":
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] = math.nan
    graph = dense_graph(model, x)
    (name,) = (node.name for node in graph.nodes if node.op == "conv2d")
    choices = {name: {"choice": LinearChoice("winograd").to_json(), "pixels": 1}}
    (y,) = lower.compile(graph, 1, 1, choices).run([x])
    torch.testing.assert_close(y, model(x).detach(), equal_nan=True)


def test_bad_weights_and_geometries_are_refused() -> None:
    x, weight = torch.randn(1, 2, 9, 9), torch.randn(3, 2, 3, 3)
    problem = problem_of(x, weight, (1, 1), (0, 0, 0, 0))
    with pytest.raises(ValueError, match="does not fit"):
        _C.Weight.winograd(problem.weight[:, :-1].copy(), problem.geometry)
    with pytest.raises(ValueError, match="does not apply"):
        _C.Weight.winograd(problem.weight, {**problem.geometry, "stride": (1, 3)})
    other = LinearProblem("conv", problem.weight, 3, 1, {**problem.geometry, "stride": (1, 2)}, 28)
    packed = _C.Weight.winograd(problem.weight, problem.geometry)
    plan = _C.Plan(4096, [x.numel()])
    with pytest.raises(ValueError, match="does not fit"):
        add_linear(
            plan, other, LinearChoice("winograd"), packed, None, (1, 0, [1, 2, 9, 9], [162, 81, 9, 1]), (0, 0), (0, 0),
            128, None, 0, ("none", 0.0, 0.0)
        )  # fmt: skip
    with pytest.raises(ConvertError, match="kernel choice"):
        LinearChoice.from_json({**LinearChoice("winograd").to_json(), "kernel": "winograd2"})
