"""`sparse_conv2d` over the case table, on every backend that a CPU has, and as PyTorch's own tools see it."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_engine.errors import BackendError, ShapeError
from sparse_engine.ops import sparse_conv2d
from sparse_engine.ops.sparse_conv2d import explain_conv2d, resolve_padding
from sparse_engine.structure import Block, Unstructured
from tests.cases import CONV_CASES, ConvCase, dense_conv2d
from tests.helpers import assert_close_to_fp64

BACKENDS = ("cpu", "torch")
op = torch.ops.sparse_engine


def dense_gradients(data, case):
    """Outputs and gradients of PyTorch's dense convolution in float64."""
    x, weight = data.x.double().requires_grad_(), data.weight.double().requires_grad_()
    bias = None if data.bias is None else data.bias.double().requires_grad_()
    y = dense_conv2d(x, weight, bias, case)
    y.backward(data.upstream.double())
    dvalues = data.packed.with_values(data.packed.values.double()).gather(weight.grad)
    return y, x.grad, dvalues, None if bias is None else bias.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_output_and_gradients(case, backend, poisoned_memory):
    data = case.make(torch.float32)
    x, values = data.x.detach().requires_grad_(), data.packed.values.clone().requires_grad_()
    bias = None if data.bias is None else data.bias.clone().requires_grad_()
    y = sparse_conv2d(x, values, data.pattern, bias, **case.arguments, impl=backend)
    y.backward(data.upstream)
    expected, dx, dvalues, dbias = dense_gradients(data, case)
    assert_close_to_fp64(y, expected)
    assert_close_to_fp64(x.grad, dx, name="input gradient")
    assert_close_to_fp64(values.grad, dvalues, name="weight gradient")
    if bias is not None:
        assert_close_to_fp64(bias.grad, dbias, name="bias gradient")


@pytest.mark.parametrize(
    "case",
    [
        ConvCase("plain", 3, 2, (2, 2), (3, 4), 1, padding=1),
        ConvCase("all at once", 4, 2, (2, 2), (4, 3), 1, (2, 1), (1, 2, 0, 1), (1, 2), 2, density=0.5),
        ConvCase("blocks", 3, 2, (2, 2), (3, 3), 1, structure=Block((2, 3)), density=0.5),
        ConvCase("depthwise", 2, 2, (2, 3), (3, 3), 1, padding="same", groups=2, density=0.5),
    ],
    ids=lambda case: case.name,
)
def test_the_reference_has_right_gradients_of_any_order(case):
    data = case.make(torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (data.x, data.packed.values, data.bias)]

    def function(x, values, bias):
        return sparse_conv2d(x, values, data.pattern, bias, **case.arguments)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_on_the_reference(dtype):
    data = CONV_CASES[0].make(dtype)
    y = sparse_conv2d(data.x, data.packed.values, data.pattern, data.bias, padding=1)
    assert y.dtype == dtype
    expected = dense_conv2d(data.x.double(), data.weight.double(), data.bias.double(), CONV_CASES[0])
    assert_close_to_fp64(y, expected, bound={torch.float64: 1e-14, torch.bfloat16: 1e-1}[dtype])


def test_same_result_run_to_run_and_at_any_thread_count():
    from sparse_engine import _C

    case = ConvCase("", 40, 24, (3, 3), (17, 19), 3, padding=1, seed=9)
    data = case.make()
    before = _C.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 1):
            _C.set_num_threads(threads)
            x, values = data.x.clone().requires_grad_(), data.packed.values.clone().requires_grad_()
            y = sparse_conv2d(x, values, data.pattern, data.bias, padding=1, impl="cpu")
            y.backward(data.upstream)
            results.append((y.detach(), x.grad, values.grad))
    finally:
        _C.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_one_pattern_serves_several_geometries_and_sizes():
    data = CONV_CASES[0].make()
    values, pattern = data.packed.values, data.pattern
    for stride, padding, size in [(1, 1, 8), (2, 1, 8), (1, 0, 5), (1, 1, 12), (2, 2, 9), (1, 1, 8)]:
        x = torch.randn(2, 16, size, size)
        y = sparse_conv2d(x, values, pattern, data.bias, stride=stride, padding=padding, impl="cpu")
        expected = torch.nn.functional.conv2d(
            x.double(), data.weight.double(), data.bias.double(), stride=stride, padding=padding
        )
        assert_close_to_fp64(y, expected)


@pytest.mark.parametrize(
    "structure, backend", [(Unstructured(), "auto"), (Block((4, 3)), "cpu"), (Unstructured(), "torch")], ids=str
)
def test_opcheck(structure, backend):
    case = ConvCase("", 6, 4, (2, 3), (7, 6), 2, (2, 1), (1, 2, 0, 1), (1, 2), 2, structure)
    data = case.make()
    p = data.pattern
    rest = (p.row_ptr, p.cols, [6, 2, 2, 3], [2, 1], [1, 2, 0, 1], [1, 2], 2, list(p.block), backend)
    x, values, bias = (t.clone().requires_grad_() for t in (data.x, data.packed.values, data.bias))
    torch.library.opcheck(op.sparse_conv2d.default, (x, values, bias, *rest))
    torch.library.opcheck(op.sparse_conv2d.default, (x, values, None, *rest))
    dy = data.upstream.clone().requires_grad_()
    torch.library.opcheck(op.sparse_conv2d_input_grad.default, (dy, values, [7, 6], *rest))
    torch.library.opcheck(op.sparse_conv2d_weight_grad.default, (dy, x, *rest))


def test_compile_without_graph_breaks():
    case = ConvCase("", 6, 4, (2, 3), (7, 6), 2, padding="same", groups=2)
    data = case.make()

    def function(x, values, bias):
        return torch.relu(sparse_conv2d(x * 2, values, data.pattern, bias, **case.arguments)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for call in (function, compiled):
        inputs = [t.clone().requires_grad_() for t in (data.x, data.packed.values, data.bias)]
        call(*inputs).backward()
        results.append([t.grad for t in inputs])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_autocast_keeps_the_cpu_in_float32():
    data = CONV_CASES[0].make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_conv2d(data.x.bfloat16(), data.packed.values, data.pattern, data.bias)
    assert y.dtype == torch.float32


# -- what is refused, and how ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"padding": "reflect"}, "same"),
        ({"padding": "same", "stride": 2}, "stride 1"),
        ({"padding": -1}, "padding is -1"),
        ({"padding": (1, 2, 3)}, "one, two or four"),
        ({"stride": 0}, "stride is 0"),
        ({"dilation": (1, 2, 3)}, "dilation"),
        ({"groups": 3}, "do not divide into groups=3"),
        ({"groups": 2}, "and 2 groups"),
        ({"dilation": 9}, "smaller than the kernel"),
    ],
)
def test_geometries_that_do_not_fit(change, message):
    data = CONV_CASES[0].make()
    with pytest.raises(ShapeError, match=message):
        sparse_conv2d(data.x, data.packed.values, data.pattern, data.bias, **change)


def test_shapes_that_do_not_fit():
    data = CONV_CASES[0].make()
    values, pattern, bias = data.packed.values, data.pattern, data.bias
    with pytest.raises(ShapeError, match=r"input of shape \(2, 15, 8, 8\) for a weight of shape \(32, 16, 3, 3\)"):
        sparse_conv2d(data.x[:, 1:], values, pattern, bias)
    with pytest.raises(ShapeError, match="input of shape"):
        sparse_conv2d(data.x[0, 0], values, pattern, bias)
    with pytest.raises(ShapeError, match="values"):
        sparse_conv2d(data.x, values[1:], pattern, bias)
    with pytest.raises(ShapeError, match="bias"):
        sparse_conv2d(data.x, values, pattern, bias[1:])


def test_a_backend_that_cannot_run_says_why():
    data = CONV_CASES[0].make(torch.float64)
    with pytest.raises(BackendError, match=r"(?s)'cpu' cannot run.*x is torch.float64"):
        sparse_conv2d(data.x, data.packed.values, data.pattern, data.bias, impl="cpu")
    assert explain_conv2d(data.x, data.packed.values, data.pattern, data.bias).chosen == "torch"


@pytest.mark.parametrize(
    "padding, kernel, dilation, expected",
    [
        (2, (3, 3), (1, 1), [2, 2, 2, 2]),
        ((1, 2), (3, 3), (1, 1), [1, 2, 1, 2]),
        ((1, 2, 3, 4), (3, 3), (1, 1), [1, 2, 3, 4]),
        ("valid", (3, 3), (1, 1), [0, 0, 0, 0]),
        ("same", (4, 5), (1, 2), [1, 4, 2, 4]),
    ],
)
def test_resolve_padding(padding, kernel, dilation, expected):
    assert resolve_padding(padding, kernel, (1, 1), dilation) == expected


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 12), st.integers(1, 40)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([(1, 1), (4, 1), (2, 3)]),
    st.floats(0.0, 1.0),
    st.integers(0, 2**16),
)
def test_any_geometry(channels, kernel, size, stride, padding, dilation, groups, batch, block, density, seed):
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(size[0] + padding[0] + padding[2] >= reach[0])
    assume(size[1] + padding[1] + padding[3] >= reach[1])
    structure = Unstructured() if block == (1, 1) else Block(block)
    case = ConvCase(
        "", channels[0] * groups, channels[1] * groups, kernel, size, batch, stride, padding, dilation, groups,
        structure, density, seed=seed,
    )  # fmt: skip
    data = case.make()
    expected, dx, dvalues, _ = dense_gradients(data, case)
    for backend in BACKENDS:
        x, values = data.x.clone().requires_grad_(), data.packed.values.clone().requires_grad_()
        y = sparse_conv2d(x, values, data.pattern, data.bias, **case.arguments, impl=backend)
        y.backward(data.upstream)
        for actual, reference in ((y, expected), (x.grad, dx), (values.grad, dvalues)):
            assert_close_to_fp64(actual, reference)
