"""`LowPrecisionLinear` and `lower_precision_`."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sparse_engine.errors import SparseEngineError
from sparse_engine.nn import LowPrecisionLinear, SparseLinear, lower_precision_
from tests.helpers import assert_close_to_fp64


def pruned(rows, columns, density=0.1):
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
    return layer


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(
    "make", [pruned, lambda r, c: SparseLinear.from_dense(pruned(r, c)), lambda r, c: nn.Linear(c, r)]
)
def test_output_is_that_of_the_rounded_weight(make, precision):
    source = make(40, 300)
    layer = LowPrecisionLinear.from_layer(source, precision)
    assert layer.bias is source.bias
    assert layer.precision in repr(layer)
    for shape in ((300,), (1, 300), (2, 3, 300), (50, 300), (0, 300)):
        x = torch.randn(shape)
        expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert_close_to_fp64(layer(x), expected)
        with torch.no_grad():
            assert_close_to_fp64(layer(x), expected)
    relative = (layer.weight - source.weight).norm() / source.weight.norm()
    assert relative < (0.003 if precision == "bf16" else 0.02)


def test_gradients_reach_x_and_bias():
    layer = LowPrecisionLinear.from_layer(nn.Linear(12, 5), "int8")
    x = torch.randn(2, 12, requires_grad=True)
    layer(x).sum().backward()
    assert_close_to_fp64(x.grad, layer.weight.double().sum(0).expand(2, 12))
    assert_close_to_fp64(layer.bias.grad, torch.full((5,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_copies_and_saved_layers_do_the_same(precision, tmp_path):
    layer = LowPrecisionLinear.from_layer(pruned(40, 300), precision).requires_grad_(False)
    x = torch.randn(1, 300)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other = LowPrecisionLinear.from_layer(pruned(40, 300, 0.05), precision).requires_grad_(False)
    other(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x), y)


def test_casts_leave_the_stored_weight_alone():
    layer = LowPrecisionLinear.from_layer(pruned(40, 300), "int8").requires_grad_(False)
    weight, x = layer.weight.clone(), torch.randn(1, 300)
    layer.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.weight, weight)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer.float()(x).shape and layer.weight, weight)


def test_a_model_is_lowered_in_place():
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    model = nn.Sequential(
        pruned(64, 100), nn.ReLU(), SparseLinear.from_dense(pruned(8, 64)), shared, tied, nn.Linear(8, 3)
    )
    model.append(model[5])  # the same module under two names: not called, only held
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 100)
    reference = model[:6](x)
    assert lower_precision_(model, "int8", ignore=["7"]) == ["0", "2", "5", "6"]
    assert [type(module) for module in model[3:5]] == [nn.Linear, nn.Linear]
    assert model[5] is model[6]
    calls.clear()
    error = (model[:6](x) - reference).abs().max() / reference.abs().max()
    assert error < 0.05
    assert calls == [1]


def test_a_model_that_cannot_be_lowered_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(SparseEngineError, match="use bf16"):
        lower_precision_(model)
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
