"""`low_precision_linear` over the case table of the sparse products, on every backend that a CPU has."""

import math

import pytest
import torch

from sparse_engine.errors import BackendError, ShapeError, SparseEngineError
from sparse_engine.ops import LowPrecisionWeight, low_precision_linear, native
from sparse_engine.ops.low_precision import explain_low_precision_linear
from sparse_engine.packed import PackedWeight
from tests.cases import LINEAR_CASES
from tests.helpers import assert_close_to_fp64

BACKENDS = ("cpu", "torch")
PRECISIONS = ("bf16", "int8")


def few_rows(x):
    """At most what the kernel takes, of the same layout."""
    return x if x.dim() < 2 or x.numel() // max(1, x.shape[-1]) <= 16 else x[..., :2, :] if x.dim() == 2 else x[:1, :2]


# int8 holds finite numbers only, and a dense product multiplies the zeros with an infinity.
COMBINATIONS = [
    pytest.param(case, precision, sparse, id=f"{case.name}-{precision}-{'sparse' if sparse else 'dense'}")
    for case in LINEAR_CASES
    for precision in PRECISIONS
    for sparse in (True, False)
    if not {"nan", "infinity"} & set(case.special) or (precision == "bf16" and sparse)
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case, precision, sparse", COMBINATIONS)
def test_output_is_that_of_the_rounded_weight(case, backend, precision, sparse, poisoned_memory):
    data = case.make(torch.float32)
    x = few_rows(data.x)
    weight = LowPrecisionWeight.from_dense(data.packed, precision, sparse=sparse)
    y = low_precision_linear(x, weight, data.bias, impl=backend)
    expected = torch.nn.functional.linear(
        x.double(), weight.to_dense().double(), None if data.bias is None else data.bias.double()
    )
    assert y.is_contiguous()
    assert_close_to_fp64(y, expected)


@pytest.mark.parametrize("case", LINEAR_CASES[:8], ids=lambda case: case.name)
def test_the_weight_is_rounded_to_the_nearest(case):
    weight = case.make(torch.float32).weight
    half = LowPrecisionWeight.from_dense(weight, "bf16")
    assert torch.equal(half.to_dense(), weight.bfloat16().float())
    whole = LowPrecisionWeight.from_dense(weight, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((whole.to_dense() - weight).abs() <= step * 0.5001).all())
    assert int(whole.values.abs().max()) == 127


@pytest.mark.parametrize("shape", [(64, 256), (301, 1000)])
def test_bf16_is_at_least_as_exact_as_pytorch(shape):
    """Error against float32: at most twice that of PyTorch's bfloat16 layer. Here x stays in float32: it is less."""
    weight, x = torch.randn(shape) * (torch.rand(shape) < 0.2), torch.randn(4, shape[1])
    exact = torch.nn.functional.linear(x.double(), weight.double())
    theirs = torch.nn.functional.linear(x.bfloat16(), weight.bfloat16()).double()
    for sparse in (True, False):
        rounded = LowPrecisionWeight.from_dense(weight, "bf16", sparse=sparse)
        for ours in (low_precision_linear(x, rounded), low_precision_linear(x.bfloat16(), rounded)):
            assert (ours.double() - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert low_precision_linear(x.bfloat16(), rounded).dtype == torch.bfloat16


def test_int8_error_stays_within_its_steps():
    weight, x = torch.randn(50, 300) * (torch.rand(50, 300) < 0.3), torch.randn(3, 300)
    rounded = LowPrecisionWeight.from_dense(weight, "int8")
    exact = torch.nn.functional.linear(x.double(), weight.double())
    bound = (x.abs() @ (weight != 0).float().T) * rounded.scales / 2
    assert bool(((low_precision_linear(x, rounded) - exact).abs() <= bound * 1.0001).all())


def test_integer_arithmetic_loses_nothing_to_outliers():
    """x is held in 24 bits of its largest element: elements a thousand times smaller keep fourteen bits."""
    weight = LowPrecisionWeight.from_dense(torch.randn(40, 512), "int8", sparse=False)
    x = torch.randn(1, 512)
    x[0, 7] = 1000.0
    assert_close_to_fp64(
        low_precision_linear(x, weight), torch.nn.functional.linear(x.double(), weight.to_dense().double())
    )


@pytest.mark.parametrize("special", [0.0, math.nan, math.inf, 1e-44, 1e30])
def test_x_may_hold_anything(special):
    torch.manual_seed(1)
    dense = torch.randn(20, 70).abs() + 0.1
    for precision in PRECISIONS:
        weight = LowPrecisionWeight.from_dense(dense, precision, sparse=False)
        for x in (torch.full((1, 70), special), torch.randn(1, 70).index_fill(1, torch.tensor([3]), special)):
            expected = torch.nn.functional.linear(x.double(), weight.to_dense().double())
            y = low_precision_linear(x, weight, impl="cpu")
            assert_close_to_fp64(y, expected, 1e-5 if special != 1e-44 else 0.1)


def test_a_sparse_weight_keeps_its_pattern_where_that_reads_less():
    weight = torch.randn(64, 640)
    assert LowPrecisionWeight.from_dense(weight, "int8").cols is None
    sparse = LowPrecisionWeight.from_dense(weight * (torch.rand_like(weight) < 0.05), "int8")
    assert sparse.cols is not None
    assert sparse.sparsity == pytest.approx(0.95, abs=0.01)
    assert sparse.nbytes < 64 * 640
    packed = PackedWeight.from_dense(weight * (torch.rand_like(weight) < 0.05))
    again = LowPrecisionWeight.from_dense(packed, "bf16")
    assert torch.equal(again.to_dense(), packed.to_dense().bfloat16().float())


def test_gradients_of_x_and_bias():
    weight = LowPrecisionWeight.from_dense(torch.randn(9, 12), "int8")
    x, bias = torch.randn(2, 3, 12, requires_grad=True), torch.randn(9, requires_grad=True)
    upstream = torch.randn(2, 3, 9)
    low_precision_linear(x, weight, bias).backward(upstream)
    assert_close_to_fp64(x.grad, upstream.double() @ weight.to_dense().double())
    assert_close_to_fp64(bias.grad, upstream.double().sum((0, 1)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sparse", [True, False])
def test_opcheck(precision, sparse):
    weight = LowPrecisionWeight.from_dense(torch.randn(7, 11) * (torch.rand(7, 11) < 0.5), precision, sparse=sparse)
    inputs = (weight.values, weight.scales, torch.randn(7, requires_grad=True), weight.row_ptr, weight.cols, 7, 11)
    for backend in BACKENDS:
        x = torch.randn(3, 11, requires_grad=True)
        torch.library.opcheck(torch.ops.sparse_engine.low_precision_linear.default, (x, *inputs, backend))


def test_compile_without_graph_breaks():
    weight = LowPrecisionWeight.from_dense(torch.randn(7, 11), "int8")
    x = torch.randn(3, 11)
    compiled = torch.compile(lambda x: low_precision_linear(x * 2, weight) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), low_precision_linear(x * 2, weight) + 1)


def test_same_result_run_to_run_and_at_any_thread_count():
    from sparse_engine import _C

    x = torch.randn(3, 700)
    before = _C.get_num_threads()
    try:
        for precision in PRECISIONS:
            for sparse in (True, False):
                weight = LowPrecisionWeight.from_dense(torch.randn(300, 700), precision, sparse=sparse)
                results = []
                for threads in (1, 2, 5):
                    _C.set_num_threads(threads)
                    results.append(low_precision_linear(x, weight, impl="cpu"))
                assert all(torch.equal(results[0], result) for result in results)
    finally:
        _C.set_num_threads(before)


def test_changed_values_are_noticed():
    weight = LowPrecisionWeight.from_dense(torch.randn(5, 9), "bf16")
    x = torch.randn(1, 9)
    first = low_precision_linear(x, weight, impl="cpu")
    weight.values.mul_(2)
    torch.testing.assert_close(low_precision_linear(x, weight, impl="cpu"), first * 2)
    whole = LowPrecisionWeight.from_dense(torch.randn(5, 9), "int8")
    first = low_precision_linear(x, whole, impl="cpu")
    whole.scales.mul_(2)
    torch.testing.assert_close(low_precision_linear(x, whole, impl="cpu"), first * 2)


def test_many_rows_run_on_the_reference():
    weight = LowPrecisionWeight.from_dense(torch.randn(5, 9), "int8")
    explanation = explain_low_precision_linear(torch.randn(40, 9), weight)
    assert explanation.chosen == "torch"
    assert "40 rows" in explanation.reasons["cpu"][0]
    with pytest.raises(BackendError, match="40 rows"):
        low_precision_linear(torch.randn(40, 9), weight, impl="cpu")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda w: LowPrecisionWeight.from_dense(torch.randn(3, 4), "int4"), SparseEngineError, "'int4'"),
        (lambda w: LowPrecisionWeight.from_dense(torch.randn(3), "int8"), ShapeError, "float matrix"),
        (lambda w: LowPrecisionWeight.from_dense(torch.full((2, 2), math.inf)), SparseEngineError, "4 infinities"),
        (
            lambda w: LowPrecisionWeight.from_dense(torch.randn(3, 4), "int8", torch.ones(4, 3)),
            ShapeError,
            r"mask of shape \(4, 3\)",
        ),
        (lambda w: low_precision_linear(torch.randn(2, 5), w), ShapeError, "must be 4"),
        (lambda w: low_precision_linear(torch.randn(2, 4).double(), w), ShapeError, "float64"),
        (lambda w: low_precision_linear(torch.randn(2, 4), w, torch.randn(4)), ShapeError, "bias"),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    weight = LowPrecisionWeight.from_dense(torch.randn(3, 4), "int8")
    with pytest.raises(error, match=message):
        call(weight)


def test_the_extension_refuses_what_does_not_fit():
    make = native.extension().VectorLinear
    floats = torch.ones(6).numpy()
    with pytest.raises(ValueError, match="2x2"):
        make(None, None, torch.ones(6, dtype=torch.int8).numpy(), None, 2, 2)
    with pytest.raises(ValueError, match="layout of their own"):
        make(None, None, floats, None, 2, 3)
    with pytest.raises(ValueError, match="do not fit"):
        make(torch.tensor([0, 1]).numpy(), torch.tensor([0, 1]).int().numpy(), torch.ones(2).numpy(), None, 1, 3)
    with pytest.raises(ValueError, match="not below 3"):
        make(torch.tensor([0, 1]).numpy(), torch.tensor([3]).int().numpy(), torch.ones(1).numpy(), None, 1, 3)
    with pytest.raises(ValueError, match="3 scales for 2 rows"):
        make(None, None, torch.ones(6, dtype=torch.int8).numpy(), torch.ones(3).numpy(), 2, 3)
    with pytest.raises(ValueError, match="float32, uint16 or int8"):
        make(None, None, torch.ones(6).double().numpy(), None, 2, 3)
