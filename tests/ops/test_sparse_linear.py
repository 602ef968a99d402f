"""`sparse_linear` over the case table, on every backend that a CPU has, and as PyTorch's own tools see it."""

import math
import os
import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_engine.errors import BackendError, ShapeError
from sparse_engine.ops import Pattern, native, registry, sparse_linear
from sparse_engine.ops.sparse_linear import EagerLinear, explain_linear, product
from sparse_engine.packed import PackedWeight
from sparse_engine.structure import Block, Unstructured
from tests.cases import LINEAR_CASES, LinearCase
from tests.helpers import assert_close_to_fp64

BACKENDS = ("cpu", "torch")
op = torch.ops.sparse_engine
# `SparseLinear` leaves the others to the op.
COMPUTED_CASES = [c for c in LINEAR_CASES if c.density and c.in_features and c.out_features and math.prod(c.leading)]


def test_the_extension_is_there():
    """Everything below asks for the cpu backend by name; this says in one line why it fails where it is not built."""
    assert native.why_not_extension("Linear", "Conv2d") == []


def dense_gradients(data):
    """Outputs and gradients of PyTorch's dense layer in float64."""
    x, weight = data.x.double().requires_grad_(), data.weight.double().requires_grad_()
    bias = None if data.bias is None else data.bias.double().requires_grad_()
    y = torch.nn.functional.linear(x, weight, bias)
    y.backward(data.upstream.double())
    dvalues = data.packed.with_values(data.packed.values.double()).gather(weight.grad)
    return y, x.grad, dvalues, None if bias is None else bias.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LINEAR_CASES, ids=lambda case: case.name)
def test_output_and_gradients(case, backend, poisoned_memory):
    data = case.make(torch.float32)
    x, values = data.x.detach().requires_grad_(), data.packed.values.clone().requires_grad_()
    bias = None if data.bias is None else data.bias.clone().requires_grad_()
    y = sparse_linear(x, values, data.pattern, bias, impl=backend)
    y.backward(data.upstream)
    expected, dx, dvalues, dbias = dense_gradients(data)
    assert y.is_contiguous()
    assert_close_to_fp64(y, expected)
    assert_close_to_fp64(x.grad, dx, name="input gradient")
    assert_close_to_fp64(values.grad, dvalues, name="weight gradient")
    if bias is not None:
        assert_close_to_fp64(bias.grad, dbias, name="bias gradient")


@pytest.mark.parametrize("upstream", ["as it is", "expanded", "transposed"])
@pytest.mark.parametrize("case", COMPUTED_CASES, ids=lambda case: case.name)
def test_a_step_without_the_dispatcher(case, upstream, poisoned_memory):
    """What `SparseLinear` calls: all gradients at once or each alone, whatever the incoming one's memory order."""
    data = case.make(torch.float32)
    if upstream == "expanded":
        data = replace(data, upstream=data.upstream.flatten()[:1].expand(data.upstream.shape))
    elif upstream == "transposed":
        data = replace(data, upstream=data.upstream.T.contiguous().T if data.upstream.dim() == 2 else data.upstream)
    pattern = data.pattern
    native_linear = product(pattern.row_ptr, pattern.cols, pattern.rows, pattern.columns, pattern.block)
    y, *expected = dense_gradients(data)
    for wanted in (7, 1, 2, 4):
        tensors = [
            data.x.detach().clone(),
            data.packed.values.clone(),
            None if data.bias is None else data.bias.clone(),
        ]
        wants = [tensor is not None and bool(wanted >> place & 1) for place, tensor in enumerate(tensors)]
        if not any(wants):
            continue
        for tensor, want in zip(tensors, wants, strict=True):
            if tensor is not None:
                tensor.requires_grad_(want)
        found = EagerLinear.apply(*tensors, pattern, native_linear)
        assert_close_to_fp64(found, y)
        found.backward(data.upstream)
        for tensor, want, reference in zip(tensors, wants, expected, strict=True):
            assert tensor is None or (tensor.grad is not None) == want
            if want:
                assert_close_to_fp64(tensor.grad, reference)


def test_a_step_with_a_gradient_that_is_only_marked_negative():
    """The imaginary part of a conjugate has its sign in a bit of the tensor, not in memory."""
    data = LinearCase("", 1, 30, (1,), seed=4).make()
    pattern = data.pattern
    native_linear = product(pattern.row_ptr, pattern.cols, pattern.rows, pattern.columns, pattern.block)
    upstream = torch.randn(1, 1, dtype=torch.cfloat).conj().imag
    assert upstream.is_neg()
    tensors = [data.x.clone(), data.packed.values.clone(), data.bias.clone()]
    EagerLinear.apply(*(tensor.requires_grad_() for tensor in tensors), pattern, native_linear).backward(upstream)
    _, *expected = dense_gradients(replace(data, upstream=upstream.resolve_neg()))
    for tensor, reference in zip(tensors, expected, strict=True):
        assert_close_to_fp64(tensor.grad, reference)


@pytest.mark.parametrize("case", LINEAR_CASES[:24:5], ids=lambda case: case.name)
def test_the_reference_has_right_gradients_of_any_order(case):
    data = LinearCase(case.name, 5, 7, (2,), case.structure, seed=2).make(torch.float64)
    inputs = [tensor.clone().requires_grad_() for tensor in (data.x, data.packed.values, data.bias)]

    def function(x, values, bias):
        return sparse_linear(x, values, data.pattern, bias)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_run_on_the_reference(dtype):
    data = LINEAR_CASES[0].make(dtype)
    y = sparse_linear(data.x, data.packed.values, data.pattern, data.bias)
    assert y.dtype == dtype
    expected = torch.nn.functional.linear(data.x.double(), data.weight.double(), data.bias.double())
    assert_close_to_fp64(y, expected, bound={torch.float64: 1e-14, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype])


def test_gradients_where_only_some_are_wanted():
    data = LINEAR_CASES[0].make()
    _, dx, dvalues, dbias = dense_gradients(data)
    for backend in BACKENDS:
        for wanted in range(1, 8):
            tensors = [data.x.clone(), data.packed.values.clone(), data.bias.clone()]
            for place, tensor in enumerate(tensors):
                tensor.requires_grad_(bool(wanted >> place & 1))
            sparse_linear(tensors[0], tensors[1], data.pattern, tensors[2], impl=backend).backward(data.upstream)
            for tensor, reference in zip(tensors, (dx, dvalues, dbias), strict=True):
                assert (tensor.grad is not None) == tensor.requires_grad
                if tensor.grad is not None:
                    assert_close_to_fp64(tensor.grad, reference)


class LargestFloat(TorchDispatchMode):
    """Remembers the size of the largest float tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("structure", [Unstructured(), Block((4, 1)), Block((3, 5))], ids=str)
def test_the_weight_gradient_is_never_dense(structure, monkeypatch):
    """The reference works in panels: no tensor as large as the dense weight is made."""
    monkeypatch.setattr(sys.modules["sparse_engine.ops.sparse_linear"], "_PANEL_ENTRIES", 500)
    data = LinearCase("", 61, 53, (8,), structure).make(torch.float64)
    *_, dvalues, _ = dense_gradients(data)
    inputs = (data.upstream, data.x, data.pattern.row_ptr, data.pattern.cols, 61, 53, list(data.pattern.block))
    with LargestFloat() as watch:
        result = registry.choose("sparse_linear_weight_grad", "torch", *inputs).run(*inputs)
    assert_close_to_fp64(result, dvalues, 1e-14)
    assert watch.largest < 61 * 53 / 2


@pytest.mark.parametrize(
    "case",
    [LinearCase("tiles", 130, 257, (70,), seed=9)]
    + [LinearCase(f"lanes, {n} rows", 900, 800, (n,), density=0.01, seed=9) for n in (64, 128, 512)]
    + [LinearCase("single entries", 900, 800, (1000,), density=0.0002, seed=9)],
    ids=lambda case: case.name,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_result_run_to_run_and_at_any_thread_count(backend, case):
    from sparse_engine import _C

    data = case.make()
    before = _C.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 1):
            _C.set_num_threads(threads)
            x, values = data.x.clone().requires_grad_(), data.packed.values.clone().requires_grad_()
            y = sparse_linear(x, values, data.pattern, data.bias, impl=backend)
            y.backward(data.upstream)
            results.append((y.detach(), x.grad, values.grad))
    finally:
        _C.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


# -- the C++ object is shared by calls: never with another call's values or pattern -----------------------------------


def run(data, values):
    return sparse_linear(data.x, values, data.pattern, data.bias, impl="cpu")


def check(data, values):
    weight = data.packed.with_values(values.detach().double()).to_dense()
    expected = torch.nn.functional.linear(data.x.double(), weight, data.bias.double())
    assert_close_to_fp64(run(data, values), expected)


def test_edited_values_are_noticed():
    data = LINEAR_CASES[0].make()
    values = data.packed.values.clone()
    check(data, values)
    values.mul_(2)
    check(data, values)
    values.data.mul_(3)
    check(data, values)
    values[0] = 100.0
    check(data, values)
    values.data = torch.randn_like(values)
    check(data, values)
    with torch.inference_mode():
        values.data.add_(1)
    check(data, values)


def test_other_values_at_the_same_address_are_noticed():
    data = LINEAR_CASES[0].make()
    for _ in range(20):
        # Freed and made anew at every turn: the allocator gives the same address with the same version number.
        check(data, torch.randn(data.packed.values.numel()))


def test_strided_values_at_the_same_address_are_noticed():
    data = LINEAR_CASES[0].make()
    count = data.packed.values.numel()
    buffer = torch.randn(2 * count)
    check(data, buffer[:count])
    check(data, buffer[::2])
    check(data, buffer[:count])


def test_values_made_in_inference_mode_are_read_anew():
    data = LINEAR_CASES[0].make()
    with torch.inference_mode():
        values = torch.randn(data.packed.values.numel())
        first = run(data, values)
        values[3] += 1
        second = run(data, values)
    assert not torch.equal(first, second)


def test_patterns_at_the_same_address_are_told_apart():
    for seed in range(20):
        data = LinearCase("", 20, 30, (4,), seed=seed).make()
        weight = data.packed.to_dense().double()
        expected = torch.nn.functional.linear(data.x.double(), weight, data.bias.double())
        assert_close_to_fp64(run(data, data.packed.values), expected)
        del data, weight


def test_what_belongs_to_dead_patterns_is_forgotten():
    entries = sys.modules["sparse_engine.ops.pattern"]._entries
    for seed in range(10):
        data = LinearCase("", 20, 30, (4,), seed=seed).make()
        run(data, data.packed.values)
    count = len(entries)
    for seed in range(50):
        data = LinearCase("", 20, 30, (4,), seed=seed).make()
        run(data, data.packed.values)
    assert len(entries) <= count + 1


def test_two_patterns_and_two_threads():
    datas = [LinearCase("", 64, 64, (16,), seed=seed).make() for seed in range(2)]
    pool = [(data, torch.randn(data.packed.values.numel())) for data in datas for _ in range(2)]
    expected = [run(data, values).clone() for data, values in pool]
    failures = []

    def work(start):
        for turn in range(200):
            place = (start + turn) % len(pool)
            if not torch.equal(run(*pool[place]), expected[place]):
                failures.append(place)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -- as PyTorch's tools see it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure, backend", [(Unstructured(), "auto"), (Block((4, 3)), "cpu"), (Unstructured(), "torch")], ids=str
)
def test_opcheck(structure, backend):
    data = LinearCase("", 9, 11, (2, 3), structure).make()
    p = data.pattern
    rest = (p.row_ptr, p.cols, p.rows, p.columns, list(p.block), backend)
    x, values, bias = (t.clone().requires_grad_() for t in (data.x, data.packed.values, data.bias))
    torch.library.opcheck(op.sparse_linear.default, (x, values, bias, *rest))
    torch.library.opcheck(op.sparse_linear.default, (x, values, None, *rest))
    dy = data.upstream.clone().requires_grad_()
    torch.library.opcheck(op.sparse_linear_input_grad.default, (dy, values, *rest))
    torch.library.opcheck(op.sparse_linear_weight_grad.default, (dy, x, *rest))


def test_compile_without_graph_breaks():
    data = LINEAR_CASES[0].make()

    def function(x, values, bias):
        return torch.relu(sparse_linear(x * 2, values, data.pattern, bias)).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for call in (function, compiled):
        inputs = [t.clone().requires_grad_() for t in (data.x, data.packed.values, data.bias)]
        call(*inputs).backward()
        results.append([t.grad for t in inputs])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_meta_tensors_give_shapes():
    data = LINEAR_CASES[0].make()
    pattern = data.pattern.to("meta")
    y = sparse_linear(data.x.to("meta"), data.packed.values.to("meta"), pattern, data.bias.to("meta"))
    assert y.shape == (32, 48)
    assert y.is_meta


def test_autocast_keeps_the_cpu_in_float32():
    data = LINEAR_CASES[0].make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(data.x.bfloat16(), data.packed.values, data.pattern, data.bias)
    assert y.dtype == torch.float32


# -- what is refused, and how ------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit():
    data = LINEAR_CASES[0].make()
    values, pattern, bias = data.packed.values, data.pattern, data.bias
    with pytest.raises(ShapeError, match=r"input of shape \(32, 63\) for a weight of 48 x 64"):
        sparse_linear(data.x[:, :63], values, pattern, bias)
    with pytest.raises(ShapeError, match="values"):
        sparse_linear(data.x, values[1:], pattern, bias)
    with pytest.raises(ShapeError, match="bias"):
        sparse_linear(data.x, values, pattern, bias[1:])


def test_a_backend_that_cannot_run_says_why():
    data = LINEAR_CASES[0].make(torch.float64)
    with pytest.raises(BackendError, match=r"(?s)'cpu' cannot run.*x is torch.float64.*torch +can run"):
        sparse_linear(data.x, data.packed.values, data.pattern, data.bias, impl="cpu")
    with pytest.raises(BackendError, match="tpu"):
        sparse_linear(data.x, data.packed.values, data.pattern, data.bias, impl="tpu")
    with pytest.raises(BackendError, match="different dtypes"):
        sparse_linear(data.x.float(), data.packed.values, data.pattern, data.bias)


def test_explain():
    data = LINEAR_CASES[0].make()
    explanation = explain_linear(data.x, data.packed.values, data.pattern, data.bias)
    assert explanation.chosen == "cpu"
    assert explanation.reasons["torch"] == []
    double = LINEAR_CASES[0].make(torch.float64)
    explanation = explain_linear(double.x, double.packed.values, double.pattern, double.bias)
    assert explanation.chosen == "torch"
    assert "float64" in str(explanation)


def test_environment_override(monkeypatch):
    data = LINEAR_CASES[0].make()
    monkeypatch.setitem(os.environ, "SPARSE_ENGINE_IMPL", "sparse_linear:torch")
    assert explain_linear(data.x, data.packed.values, data.pattern, data.bias).chosen == "torch"
    monkeypatch.setitem(os.environ, "SPARSE_ENGINE_IMPL", "sparse_linear:gpu")
    with pytest.raises(BackendError, match="SPARSE_ENGINE_IMPL"):
        sparse_linear(data.x, data.packed.values, data.pattern, data.bias)


@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 20),
    st.sampled_from([(1, 1), (1, 4), (4, 1), (2, 3), (16, 16)]),
    st.floats(0.0, 1.0),
    st.integers(0, 2**16),
)
def test_any_shape_and_pattern(rows, columns, batch, block, density, seed):
    structure = Unstructured() if block == (1, 1) else Block(block)
    data = LinearCase("", rows, columns, (batch,), structure, density, seed=seed).make()
    expected, dx, dvalues, _ = dense_gradients(data)
    for backend in BACKENDS:
        x, values = data.x.clone().requires_grad_(), data.packed.values.clone().requires_grad_()
        y = sparse_linear(x, values, data.pattern, data.bias, impl=backend)
        y.backward(data.upstream)
        for actual, reference in ((y, expected), (x.grad, dx), (values.grad, dvalues)):
            assert_close_to_fp64(actual, reference)


def test_pattern_of_a_packed_weight_moves_and_counts():
    packed = PackedWeight.from_dense(torch.ones(5, 7), structure=Block((2, 3)))
    pattern = Pattern.from_packed(packed)
    assert pattern.num_values == packed.values.numel() == 9 * 6
    assert pattern.to("cpu") is pattern
    assert pattern.to("meta").cols.is_meta
