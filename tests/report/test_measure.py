"""Times by layer, ceilings, traces and the facts about the machine."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine.report import environment
from sparse_engine.report.measure import Ceilings, LayerTime, measure_ceilings, measure_layers, profile_spans
from sparse_engine.report.trace import trace_events, write_trace


@pytest.fixture(scope="module")
def executable():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with torch.no_grad():
        model[2].weight.mul_(torch.rand_like(model[2].weight) < 0.25)
    return se.convert(model, (torch.randn(1, 3, 10, 10),), tune=False)


def test_each_layer_is_timed_both_ways(executable):
    x = torch.randn(2, 3, 10, 10)
    seen = []
    layers = measure_layers(executable, [x], repeats=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    weights = [layer for layer in layers if layer.sparsity is not None]
    assert [layer.op for layer in weights] == ["conv2d", "conv2d", "linear"]
    assert all(layer.ms > 0 and layer.dense_ms > 0 for layer in weights)
    first, second, last = weights
    assert first.shape == (2, 8, 8, 8)
    assert first.dense_flops == 2 * 2 * 8 * 64 * 27 == first.flops
    kept = int(torch.count_nonzero(executable.graph.constants[_weight_of(executable, second.name)]))
    assert second.flops == pytest.approx(2 * 2 * 36 * kept)
    assert second.structure == "unstructured"
    assert last.structure == "dense"


def _weight_of(executable, name):
    return next(node.params["weight"] for node in executable.graph.nodes if node.name == name)


def test_spans_follow_one_another(executable):
    spans = profile_spans(executable, [torch.randn(1, 3, 10, 10)])
    assert {"name", "kind", "thread", "start_us", "dur_us"} <= spans[0].keys()
    assert all(span["dur_us"] >= 0 and span["start_us"] >= 0 for span in spans)
    names = {node.name for node in executable.graph.nodes}
    assert any(span["name"] in names for span in spans)


def test_what_bounds_a_layer():
    ceilings = Ceilings(gflops=100.0, gbytes=10.0, threads=1)
    compute = LayerTime("a", "conv2d", (1,), 1.0, 1.0, None, None, flops=5e7, dense_flops=5e7, bytes=1e6)
    assert compute.gflops == pytest.approx(50)
    assert compute.bound(ceilings) == ("compute", pytest.approx(0.5))
    memory = LayerTime("b", "linear", (1,), 1.0, 1.0, None, None, flops=2e6, dense_flops=2e6, bytes=1e6)
    assert memory.bound(ceilings) == ("memory", pytest.approx(0.1))
    assert LayerTime("c", "linear", (1,), 0.0, 0.0, None, None, 0.0, 0.0, 0.0).bound(ceilings) == ("memory", 0.0)


def test_ceilings_are_positive():
    ceilings = measure_ceilings(seconds=0.01)
    assert ceilings.gflops > 0
    assert ceilings.gbytes > 0
    assert ceilings.cache_gbytes > 0
    assert ceilings.peak >= ceilings.gflops


def test_a_layer_that_fits_the_cache_is_held_to_the_cache():
    ceilings = Ceilings(gflops=80.0, gbytes=10.0, threads=1, peak_gflops=100.0, cache_gbytes=40.0)
    small = LayerTime("a", "linear", (1,), 1.0, 1.0, None, None, flops=2e6, dense_flops=2e6, bytes=1e6)
    assert small.bound(ceilings) == ("cache", pytest.approx(0.025))
    large = LayerTime("b", "linear", (1,), 1.0, 1.0, None, None, flops=2e8, dense_flops=2e8, bytes=1e8)
    assert large.bound(ceilings) == ("memory", pytest.approx(10.0))
    compute = LayerTime("c", "conv2d", (1,), 1.0, 1.0, None, None, flops=5e7, dense_flops=5e7, bytes=1e6)
    assert compute.bound(ceilings) == ("compute", pytest.approx(0.5))
    assert compute.share_of_peak(ceilings) == pytest.approx(0.5)


def test_trace_events(tmp_path):
    spans = [
        {"name": "conv", "kind": "conv2d", "thread": 0, "start_us": 1.5, "dur_us": 2.0, "flops": 4000, "bytes": 200},
        {"name": "conv", "kind": "conv2d", "thread": 1, "start_us": 1.0, "dur_us": 0.0, "flops": 4000},
    ]
    write_trace(tmp_path / "t.json", spans, "title")
    loaded = json.loads((tmp_path / "t.json").read_text())
    assert loaded == trace_events(spans, "title")
    events = [event for event in loaded["traceEvents"] if event["ph"] == "X"]
    assert [(event["tid"], event["ts"], event["dur"]) for event in events] == [(0, 1.5, 2.0), (1, 1.0, 0.0)]
    assert events[0]["args"] == {"flops": 4000, "GFLOP/s": 2.0, "bytes": 200, "GB/s": 0.1}
    assert "GFLOP/s" not in events[1]["args"]
    names = [event["args"]["name"] for event in loaded["traceEvents"] if event["ph"] == "M"]
    assert names == ["title", "thread 0", "thread 1"]


def test_environment_is_plain_data():
    found = environment()
    data = found.to_json()
    json.dumps(data, allow_nan=False)
    assert data["cpu"]["logical_cpus"] >= data["cpu"]["physical_cores"] >= 1
    assert 1 <= data["threads"]["available"] <= data["cpu"]["logical_cpus"]
    assert data["packages"]["torch"] == torch.__version__


def test_container_limits_are_found(monkeypatch, tmp_path):
    import sys

    module = sys.modules["sparse_engine.report.environment"]
    limit = {"/sys/fs/cgroup/cpu.max": "150000 100000"}
    monkeypatch.setattr(module, "_read", lambda path: limit.get(str(path), ""))
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: set(range(8)))
    threads = module._threads()
    assert threads["available"] == 2
    assert threads["limits"] == ["affinity 8", "container quota 1.50"]


@pytest.mark.parametrize(("load", "busy"), [(0.2, False), (7.5, True)])
def test_a_busy_machine_is_told(monkeypatch, load, busy):
    import sys

    module = sys.modules["sparse_engine.report.environment"]
    monkeypatch.setattr(module.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(module.os, "cpu_count", lambda: 2)
    assert ("load 7.5 on 2 CPUs" in module.busy_warning()) == busy
