"""`convert(..., precision=...)`: rounded weights where they are faster, held to what the precision can do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine import _C
from sparse_engine.convert import choose as choosing
from sparse_engine.errors import ConvertError, VerificationError


def network(density: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 400), nn.ReLU(), nn.Linear(400, 300), nn.GELU(), nn.Linear(300, 10)).eval()
    for index in (0, 2):
        weight = model[index].weight
        weight.data *= torch.rand_like(weight) < density
    return model


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.fixture
def everything_is_large(monkeypatch):
    """The cost model rounds what does not fit the cache."""
    monkeypatch.setattr(choosing, "_cache_bytes", lambda: 0)


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_outputs_are_those_of_the_rounded_weights(precision, density, everything_is_large, tmp_path):
    model, x = network(density), torch.randn(1, 700)
    executable = se.convert(model, x, precision=precision, tune=False)
    lowered = se.nn.lower_precision_
    rounded = network(density)
    lowered(rounded, precision)
    with torch.no_grad():
        assert worst(executable(x), rounded(x)) < 1e-5
        many = torch.randn(37, 700)
        assert worst(executable(many), rounded(many)) < 1e-5, "other batch sizes use the same weights"
    executable.save(tmp_path / "model.spx")
    again = se.load(tmp_path / "model.spx")
    assert torch.equal(again(x), executable(x))
    assert again.report.precision == precision
    assert {layer.kernel for layer in again.report.layers if layer.op == "linear"} <= {
        f"vector, {precision} rows",
        f"vector, {precision} lookups",
    }
    assert f"all 3 linear layers are kept in {precision}" in str(again.report)


def test_error_is_at_most_twice_that_of_pytorch_in_bfloat16(everything_is_large):
    for seed, density in ((0, 0.1), (1, 0.3), (2, 1.0)):
        model = network(density)
        torch.manual_seed(seed)
        x = torch.randn(1, 700)
        with torch.no_grad():
            exact = network(density).double()(x.double())
            theirs = network(density).bfloat16()(x.bfloat16())
        executable = se.convert(model, x, precision="bf16", tune=False)
        assert worst(executable(x), exact) <= 2 * worst(theirs, exact)


def test_files_are_smaller(everything_is_large, tmp_path):
    x = torch.randn(1, 700)
    sizes = {
        precision: se.convert(network(), x, precision=precision, tune=False).save(tmp_path / "model.spx").file_bytes
        for precision in ("fp32", "bf16", "int8")
    }
    assert sizes["bf16"] < 0.75 * sizes["fp32"]
    assert sizes["int8"] < 0.6 * sizes["fp32"]


def test_a_file_with_rounded_weights_is_inspected_like_others(everything_is_large, tmp_path):
    from sparse_engine.report import sparsity_of_file

    executable = se.convert(network(), torch.randn(1, 700), precision="int8", tune=False)
    sizes = executable.save(tmp_path / "model.spx")
    layers = {layer.shape: layer for layer in sparsity_of_file(tmp_path / "model.spx").layers}
    first = layers[400, 700]
    assert first.coding.endswith(", int8")
    assert first.dense_bytes == 4 * 400 * 700
    assert first.packed_bytes < sizes.constant_bytes < first.dense_bytes / 4
    assert layers[10, 300].coding == "full, int8"


def test_a_layer_stays_exact_where_rounding_is_not_faster(monkeypatch):
    timed = []

    def seconds(plans, threads):
        timed.append(len(plans))
        # The first layer: rounded is twice as fast; the others: 3 % faster, which is not worth it.
        return [1.0] if len(plans) == 1 else [1.0] + [0.5 if timed.count(len(plans)) == 1 else 0.97] * (len(plans) - 1)

    monkeypatch.setattr(choosing, "_time_interleaved", seconds)
    x = torch.randn(1, 700)
    executable = se.convert(network(), x, precision="bf16")
    kernels = {layer.name: layer.kernel for layer in executable.report.layers if layer.op == "linear"}
    assert kernels["0"] == "vector, bf16 lookups"
    assert kernels["2"] == "vector"
    reasons = {layer.name: layer.reason for layer in executable.report.layers}
    assert "2.0x the float32 kernel" in reasons["0"]
    assert "bf16 takes 0.97x as long" in reasons["2"]
    weight = executable.graph.constants[next(n.params["weight"] for n in executable.graph.nodes if n.name == "2")]
    assert torch.equal(weight, network()[2].weight), "not rounded"
    assert "the others stay in float32" in str(executable.report)


@pytest.mark.parametrize("sparse_seconds, kernel", [(1.0, "vector"), (3.0, "vector, dense")])
def test_one_vector_is_multiplied_densely_where_that_is_faster(sparse_seconds, kernel, monkeypatch):
    monkeypatch.setattr(
        choosing, "_time_interleaved", lambda plans, threads: [sparse_seconds, 2.0] if len(plans) == 2 else [1.0]
    )
    model, x = network(0.4), torch.randn(1, 700)
    executable = se.convert(model, x)
    layers = {layer.name: layer for layer in executable.report.layers}
    assert layers["0"].kernel == layers["2"].kernel == kernel
    assert layers["0"].dense_ms == 2000
    assert layers["4"].kernel == "vector"
    with torch.no_grad():
        assert worst(executable(x), model(x)) < 1e-5
        several = torch.randn(5, 700)
        assert worst(executable(several), model(several)) < 1e-5


def test_timing_chooses(tmp_path):
    executable = se.convert(network(), torch.randn(1, 700), precision="int8")
    assert all(layer.ms is not None for layer in executable.report.layers if layer.op == "linear")


def test_layers_that_read_many_rows_stay_exact(everything_is_large):
    x = torch.randn(64, 700)
    executable = se.convert(network(), x, precision="int8", tune=False)
    assert "0 of 3 linear layers" in str(executable.report)
    with torch.no_grad():
        assert worst(executable(x), network()(x)) < 1e-5


def test_a_shared_weight_stays_exact(everything_is_large):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(300, 300, bias=False)
            self.b = nn.Linear(300, 300, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    executable = se.convert(Tied().eval(), torch.randn(1, 300), precision="int8", tune=False)
    assert "0 of 2 linear layers" in str(executable.report)


def test_an_infinite_weight_stays_exact(everything_is_large):
    model = network()
    model[2].weight.data[3, 5] = float("inf")
    executable = se.convert(model, torch.randn(1, 700), precision="int8", tune=False)
    assert "use bf16" in next(layer.reason for layer in executable.report.layers if layer.name == "2")


def test_the_bound_is_that_of_the_precision(everything_is_large):
    x = torch.randn(1, 700)
    assert se.convert(network(), x, tune=False).report.bound == 1e-4
    assert se.convert(network(), x, tune=False, precision="bf16").report.bound == 2e-2
    assert se.convert(network(), x, tune=False, precision="int8").report.bound == 5e-2
    with pytest.raises(VerificationError, match="bound is 1e-05"):
        se.convert(network(), x, tune=False, precision="int8", bound=1e-5)
    with pytest.raises(ConvertError, match="one of fp32, bf16, int8, not 'fp8'"):
        se.convert(network(), x, precision="fp8")


def test_a_wrong_rounded_kernel_is_noticed(everything_is_large, monkeypatch):
    """The bound of the precision alone would let an error of 1 % pass."""
    make = choosing.RoundedWeight.csr
    monkeypatch.setattr(
        choosing.RoundedWeight, "csr", lambda self: (*make(self)[:2], make(self)[2] + (make(self)[2] == 17))
    )
    with pytest.raises(VerificationError, match="on its own graph"):
        se.convert(network(0.5), torch.randn(1, 700), precision="int8", tune=False)


SCRIPT = """
import sys, torch
import sparse_engine as se
from sparse_engine import _C
from sparse_engine.convert import choose
from tests.convert.test_precision import network, worst
choose._cache_bytes = lambda: 0
for precision in ("bf16", "int8"):
    for density in (0.1, 1.0):
        x = torch.randn(1, 700)
        rounded = network(density)
        se.nn.lower_precision_(rounded, precision)
        executable = se.convert(network(density), x, precision=precision, tune=False)
        with torch.no_grad():
            for inputs in (x, x.bfloat16().float(), 1e-30 * x):
                assert worst(executable(inputs), rounded(inputs)) < 1e-5
print(_C.cpu_info()["isa"])
"""


@pytest.mark.parametrize("isa", _C.cpu_info()["available"])
def test_every_build_computes_the_same(isa):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "SPARSE_ENGINE_ISA": isa},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


def test_rounded_convolutions_of_one_pixel_are_told(everything_is_large):
    model = nn.Conv2d(700, 400, 1).eval()
    model.weight.data *= torch.rand_like(model.weight) < 0.1
    report = se.convert(model, torch.randn(1, 700, 1, 1), precision="bf16", tune=False).report
    assert "the weights of 1 convolutions that read one vector are kept in bf16" in str(report)
    assert "stay in float32" not in str(report)
