"""Sparse convolutions on tiles of image rows: right at any size, and with bits that do not depend on the cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_engine import _C
from sparse_engine.convert import lower, passes
from sparse_engine.convert.capture import capture
from sparse_engine.convert.choose import candidates
from sparse_engine.convert.lower import LinearChoice, make_weight
from sparse_engine.convert.parts import compile_parts
from sparse_engine.errors import ConvertError
from tests.convert.one_conv import problem_of, reference, run

NONE = ("none", 0.0, 0.0)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    kernel = data.draw(st.sampled_from([(3, 3), (3, 3), (1, 3), (3, 1), (5, 5), (2, 4), (7, 7)]))
    padding = tuple(draw(0, 3) for _ in range(4))
    size = (
        max(1, kernel[0] - padding[0] - padding[2]) + draw(0, 30),
        max(1, kernel[1] - padding[1] - padding[3]) + draw(0, 60),
    )
    torch.manual_seed(draw(0, 1 << 30))
    x = torch.randn(draw(1, 3), draw(1, 9), *size)
    weight, bias = torch.randn(draw(1, 13), x.shape[1], *kernel), torch.randn(16)
    weight *= torch.rand_like(weight) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    bias = bias[: weight.shape[0]]
    problem = problem_of(x, weight, (1, 1), padding)
    assert problem.row_tiles
    expected = reference(x, weight, bias, (1, 1), padding)
    residual = torch.randn(expected.shape) if data.draw(st.booleans()) else None
    if residual is not None:
        expected = expected + residual
    choice = LinearChoice("row_tiles", 1, draw(1, 256), 0, draw(1, 8))
    found = run(problem, choice, x, bias, NONE, residual, draw(1, 2))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("size", [(8, 16), (9, 24), (17, 40), (15, 8), (7, 7), (30, 56), (1, 24), (2, 8)])
@pytest.mark.parametrize("height", [1, 4, 7, 8])
def test_last_columns_of_two_rows_share_a_vector(size: tuple[int, int], height: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 5, *size), torch.randn(6, 5, 3, 3), torch.randn(6)
    weight *= torch.rand_like(weight) < 0.4
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    residual = torch.randn(6, 2, size[0] * size[1])
    expected = (reference(x, weight, bias, (1, 1), (1, 1, 1, 1)) + residual).clamp(0, 6)
    found = run(problem, LinearChoice("row_tiles", 1, 18, 0, height), x, bias, ("clamp", 0.0, 6.0), residual)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (("gelu", 0.0, 0.0), nn.functional.gelu),
        (("hardswish", 0.0, 0.0), nn.functional.hardswish),
        (("clamp", 0.0, math.inf), torch.relu),
    ],
)
def test_activations(activation, function) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 21, 35), torch.randn(10, 3, 3, 3), torch.randn(10)
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    expected = reference(x, weight, bias, (1, 1), (1, 1, 1, 1))
    found = run(problem, LinearChoice("row_tiles", 1, 256, 0, 8), x, bias, activation)
    assert (found - function(expected)).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.0])
def test_what_is_not_finite_reaches_only_its_own_outputs(bad: float) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 2, 20, 40), torch.randn(5, 2, 3, 3), torch.randn(5)
    x[0, 1, 7, 11] = bad
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    expected = reference(x, weight, bias, (1, 1), (1, 1, 1, 1))
    found = run(problem, LinearChoice("row_tiles", 1, 18, 0, 8), x, bias, NONE)
    assert int((~expected.isfinite()).sum()) == (0 if bad == 0 else 5 * 9)
    torch.testing.assert_close(found, expected.float(), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_bits_do_not_depend_on_the_height() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 16, 23, 40), torch.randn(12, 16, 3, 3), torch.randn(12)
    weight *= torch.rand_like(weight) < 0.2
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    found = [run(problem, LinearChoice("row_tiles", 1, 72, 0, height), x, bias, NONE) for height in (1, 3, 7, 8)]
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_in_bands_of_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand_like(parameter) > 0.7)
    x = torch.randn(1, 3, 40, 56)
    graph = passes.optimise(capture(model, (x,)).graph)
    tiles = LinearChoice("row_tiles", 1, 144, 0, 7).to_json()
    choices = {node.name: {"choice": tiles, "pixels": 1} for node in graph.nodes[:2]}
    whole = lower.compile(graph, 1, 1, choices).run([x])[0]
    assert (whole - model(x)).abs().max() <= 1e-5
    plan = compile_parts(graph, 2, choices)
    assert plan is not None
    assert torch.equal(plan.run([x])[0], whole)


def test_where_they_are_offered() -> None:
    def kernels(weight: torch.Tensor, stride: int = 1, size: int = 32) -> set[str]:
        padding = tuple(2 * [(weight.shape[2] - 1) // 2, (weight.shape[3] - 1) // 2])
        x = torch.empty(1, weight.shape[1], size, size)
        return {choice.kernel for choice in candidates(problem_of(x, weight, (stride, stride), padding), 1)}

    sparse = torch.randn(8, 4, 3, 3) * (torch.rand(8, 4, 3, 3) > 0.8)
    assert "row_tiles" in kernels(sparse)
    assert "row_tiles" not in kernels(sparse, stride=2)
    assert "row_tiles" not in kernels(sparse, size=lower.LANES // 2 - 1)
    assert "row_tiles" not in kernels(torch.randn(8, 4, 3, 3))
    assert "row_tiles" not in kernels(sparse[:, :, :1, :1])


def test_refusals() -> None:
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(3, 4, 3, 3)
    problem = problem_of(x, weight, (1, 1), (1, 1, 1, 1))
    arrays = problem.csr()
    for part, height, message in [(8, 4, "one channel"), (257, 4, "256"), (36, 0, "1 to 8"), (36, 9, "1 to 8")]:
        with pytest.raises(ValueError, match=message):
            _C.Weight.row_tiles(*arrays, problem.geometry, part, height)
    with pytest.raises(ValueError, match="do not apply"):
        _C.Weight.row_tiles(*arrays, {**problem.geometry, "stride": (2, 1)}, 36, 4)
    with pytest.raises(ValueError, match="is out of order"):
        _C.Weight.row_tiles(arrays[0], arrays[1][::-1].copy(), arrays[2], problem.geometry, 36, 4)
    packed = make_weight(problem, LinearChoice("row_tiles", 1, 36, 0, 4))
    assert packed.stored == weight.numel()
    assert packed.nbytes > 4 * weight.numel()
    plan = _C.Plan(4096, [4096])
    other = {**problem.geometry, "r": 1, "s": 9, "padding": (0, 4, 0, 4)}
    with pytest.raises(ValueError, match="does not fit"):
        plan.conv("conv", other, packed, None, (1, 0, [1, 4, 9, 9], [324, 81, 9, 1]), (0, 0), (0, 0), 96, None, 0,
                  NONE, 4)  # fmt: skip
    with pytest.raises(ConvertError, match="vectors"):
        LinearChoice.from_json({**LinearChoice("row_tiles").to_json(), "vectors": 9})
