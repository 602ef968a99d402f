"""The schema's shapes against PyTorch's, for random attributes; and the less obvious ops against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.convert.graph import Dim, GraphError, Value, shape_at
from sparse_engine.convert.reference import activate, evaluate
from sparse_engine.convert.schema import ACTIVATIONS, infer
from tests.helpers import assert_close_to_fp64

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(list)


def _same_shape(op: str, inputs: list[torch.Tensor], params: dict[str, torch.Tensor], attrs: dict[str, Any]) -> None:
    """Either both refuse, or the shape is the same, for a batch dimension that is a number and one that is not."""
    values = [Value(tuple(tensor.shape)) for tensor in inputs]
    symbolic = [Value((Dim(1), *tensor.shape[1:])) for tensor in inputs]
    try:
        expected = tuple(evaluate(op, inputs, params, attrs).shape)
    except RuntimeError:
        with pytest.raises(GraphError):
            infer(op, values, params, attrs)
        return
    assert infer(op, values, params, attrs).shape == expected
    assert shape_at(infer(op, symbolic, params, attrs).shape, inputs[0].shape[0]) == expected


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
)
def test_conv2d_shapes(size: Any, kernel: Any, stride: Any, dilation: Any, padding: Any, groups: int) -> None:
    x, weight = torch.randn(2, 4, *size), torch.randn(8, 4 // groups, *kernel)
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "activation": None}
    _same_shape("conv2d", [x], {"weight": weight}, attrs)


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=pairs,
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(list),
    dilation=pairs,
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    ceil_mode=st.booleans(),
    op=st.sampled_from(["max_pool2d", "avg_pool2d"]),
)
def test_pool_shapes(
    size: Any, kernel: Any, stride: Any, dilation: Any, padding: Any, ceil_mode: bool, op: str
) -> None:
    attrs = {
        "kernel": kernel,
        "stride": stride,
        "padding": [*padding, *padding],
        "dilation": dilation if op == "max_pool2d" else [1, 1],
        "ceil_mode": ceil_mode,
        "count_include_pad": True,
        "divisor": None,
    }
    _same_shape(op, [torch.randn(2, 3, *size)], {}, attrs)


@given(start=st.integers(0, 6), stop=st.integers(0, 6), step=st.integers(1, 4))
def test_slice_shapes(start: int, stop: int, step: int) -> None:
    attrs = {"dim": 1, "start": start, "stop": stop, "step": step}
    if start > stop:
        with pytest.raises(GraphError):
            infer("slice", [Value((2, 6))], {}, attrs)
        return
    x = torch.arange(12.0).reshape(2, 6)
    assert torch.equal(evaluate("slice", [x], {}, attrs), x[:, start:stop:step])
    _same_shape("slice", [x], {}, attrs)


@given(
    a=st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=4),
    b=st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=4),
    kind=st.sampled_from(["add", "sub", "mul", "div", "maximum", "minimum", "pow"]),
)
def test_binary_shapes(a: list[int], b: list[int], kind: str) -> None:
    x, y = torch.rand(a) + 1, torch.rand(b) + 1
    attrs = {"kind": kind, "activation": None}
    try:
        expected = evaluate("binary", [x, y], {}, attrs)
    except RuntimeError:
        with pytest.raises(GraphError, match="do not broadcast"):
            infer("binary", [Value(tuple(a)), Value(tuple(b))], {}, attrs)
        return
    assert infer("binary", [Value(tuple(a)), Value(tuple(b))], {}, attrs).shape == tuple(expected.shape)


FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "clamp": lambda x: min(max(x, -0.5), 1.5),
    "leaky_relu": lambda x: x if x > 0 else 0.1 * x,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "hardsigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": math.tanh,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "softplus": lambda x: math.log1p(math.exp(x)) if x < 20 else x,
    "exp": math.exp,
    "sqrt": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    "rsqrt": lambda x: 1 / math.sqrt(x) if x > 0 else math.nan,
    "neg": lambda x: -x,
    "abs": abs,
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x * x,
    "log": lambda x: math.log(x) if x > 0 else math.nan,
    "erf": math.erf,
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_are_their_formulas(kind: str) -> None:
    arguments = {"clamp": {"min": -0.5, "max": 1.5}, "leaky_relu": {"slope": 0.1}}.get(kind, {})
    x = torch.linspace(-7.03, 6.9, 200, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[kind](float(item)) for item in x], dtype=torch.float64)
    assert_close_to_fp64(activate(x, {"kind": kind, **arguments}), expected, 1e-12, kind)


def test_attention_is_scaled_dot_product_attention() -> None:
    q, k, v = (torch.randn(2, 3, length, 8, dtype=torch.float64) for length in (5, 7, 7))
    mask = torch.randn(3, 5, 7, dtype=torch.float64)
    for causal, more in ((False, []), (True, []), (False, [mask])):
        found = evaluate("attention", [q, k, v, *more], {}, {"scale": 0.3, "causal": causal})
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, more[0] if more else None, is_causal=causal, scale=0.3
        )
        assert_close_to_fp64(found, expected, 1e-12)


def test_residual_comes_before_the_activation() -> None:
    x, residual = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = evaluate("linear", [x, residual], {"weight": weight, "bias": bias}, {"activation": {"kind": "relu"}})
    assert_close_to_fp64(found, (x @ weight.T + bias + residual).relu(), 1e-12)
