"""Times by layer, ceilings, traces and the facts about the machine."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine.report import environment
from sparse_engine.report.measure import Ceilings, LayerTime, measure_ceilings, measure_layers, profile_call
from sparse_engine.report.trace import trace_events, write_trace


@pytest.fixture(scope="module")
def executable():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with torch.no_grad():
        model[2].weight.mul_(torch.rand_like(model[2].weight) < 0.25)
    return se.convert(model, (torch.randn(1, 3, 10, 10),), tune=False, threads=1)


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


def _two_blocks():
    """Large enough to be cut in bands, with a halo, a stride, a residual and a tail."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
            self.second = nn.Conv2d(16, 16, 3, padding=1)
            self.third = nn.Conv2d(16, 16, 1)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            x = torch.relu(self.first(x))
            x = torch.relu(self.third(self.second(x)) + x)
            return self.head(x.mean((2, 3)))

    return Net().eval()


@pytest.fixture(scope="module")
def in_bands():
    return se.convert(_two_blocks(), (torch.randn(1, 3, 40, 40),), tune=False, threads=2)


def _check_spans(executable, batch, profile):
    spans = profile.spans
    keys = {"name", "kind", "thread", "band", "pass", "start_us", "dur_us", "busy_us", "items"}
    assert all(keys <= span.keys() for span in spans)
    assert all(span["dur_us"] >= span["busy_us"] >= 0 and span["start_us"] >= 0 for span in spans)
    assert min(span["thread"] for span in spans) == 0
    # Every node that computes something is there, and its spans together do its work.
    measured = {layer.name: layer for layer in measure_layers(executable, [torch.randn(*batch)], repeats=1)}
    names = {span["name"] for span in spans}
    for node in executable.graph.nodes:
        if node.op in ("conv2d", "linear"):
            assert node.name in names
            own = [span for span in spans if span["name"] == node.name]
            assert sum(span["flops"] for span in own) == pytest.approx(measured[node.name].flops)
            assert sum(span["bytes"] for span in own) == pytest.approx(measured[node.name].bytes)
            assert {span["kind"] for span in own} == {node.op}
    # A thread does one thing at a time, and all of it within the call.
    for thread in {span["thread"] for span in spans}:
        own = [span for span in spans if span["thread"] == thread]
        for before, after in itertools.pairwise(own):
            assert before["start_us"] + before["dur_us"] <= after["start_us"] + 1e-3
        assert sum(span["dur_us"] for span in own) <= profile.wall_us
    assert max(span["start_us"] + span["dur_us"] for span in spans) <= profile.wall_us


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_spans_of_one_plan_and_of_passes(executable, batch):
    profile = profile_call(executable, [torch.randn(batch, 3, 10, 10)])
    _check_spans(executable, (batch, 3, 10, 10), profile)
    assert {span["band"] for span in profile.spans} == {None}


def test_spans_of_bands_and_their_tail(in_bands):
    profile = profile_call(in_bands, [torch.randn(1, 3, 40, 40)])
    _check_spans(in_bands, (1, 3, 40, 40), profile)
    by_kind = {}
    for span in profile.spans:
        by_kind.setdefault(span["kind"], []).append(span)
    for kind in ("conv2d", "halo", "gather"):
        assert {span["band"] for span in by_kind[kind]} == {0, 1}
    assert {span["band"] for span in by_kind["linear"]} == {None}
    names = [node.name for node in in_bands.graph.nodes if node.op == "conv2d"]
    assert sorted(span["name"] for span in by_kind["conv2d"]) == sorted(2 * names)


@pytest.mark.parametrize("batch", [1, 3])
def test_spans_of_strips(batch, monkeypatch):
    from sparse_engine.convert import strips

    monkeypatch.setattr(strips, "_best_rows", lambda graph, first, last, shapes, kept: (4, float(last - first)))
    monkeypatch.setattr("sparse_engine.convert.lower._share", lambda graph, batch, choices, threads: 1)
    executable = se.convert(_two_blocks(), (torch.randn(1, 3, 40, 40),), tune=False, threads=2)
    profile = profile_call(executable, [torch.randn(batch, 3, 40, 40)])
    names = [span["name"] for span in profile.spans if span["kind"] == "conv2d"]
    assert any(names.count(name) > 2 * batch for name in names)
    _check_spans(executable, (batch, 3, 40, 40), profile)


def test_spans_of_a_batch_in_passes(monkeypatch):
    monkeypatch.setattr("sparse_engine.convert.lower._share", lambda graph, batch, choices, threads: min(batch, 2))
    executable = se.convert(_two_blocks(), (torch.randn(1, 3, 40, 40),), tune=False, threads=2)
    profile = profile_call(executable, [torch.randn(7, 3, 40, 40)])
    _check_spans(executable, (7, 3, 40, 40), profile)
    # Three passes of two images, and one image that is left.
    for node in executable.graph.nodes:
        if node.op == "conv2d":
            passes = [span["pass"] for span in profile.spans if span["name"] == node.name]
            assert {0, 1, 2} <= set(passes)
            assert passes.count(None) in (1, 2)
            flops = {span["pass"]: span["flops"] for span in profile.spans if span["name"] == node.name}
            assert flops[0] == flops[1] == flops[2]
    # The classifier takes the whole batch at once.
    assert {span["pass"] for span in profile.spans if span["kind"] == "linear"} == {None}


def test_several_threads_show_in_the_trace(in_bands):
    # Whether the second thread gets to work in a call is the system's choice.
    calls = (profile_call(in_bands, [torch.randn(1, 3, 40, 40)]) for _ in range(200))
    assert any({span["thread"] for span in profile.spans} > {0} for profile in calls)


def test_a_trace_leaves_results_and_later_calls_alone(in_bands):
    x = torch.randn(1, 3, 40, 40)
    outputs = []
    before = in_bands(x)
    recorded = se.convert.trace.trace_call(lambda: outputs.append(in_bands(x)))
    assert recorded.spans
    assert torch.equal(outputs[0], before)
    assert torch.equal(in_bands(x), before)
    # Nothing is recorded but what runs inside.
    assert se.convert.trace.trace_call(lambda: None).spans == []


def test_a_call_that_fails_leaves_no_trace_behind(in_bands):
    with pytest.raises(se.errors.ShapeError):
        in_bands.trace(torch.randn(1, 4, 40, 40))
    assert se.convert.trace.trace_call(lambda: None).spans == []


def test_what_torch_runs_in_between_is_one_span():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return torch.cumsum(self.conv(x), dim=-1)

    executable = se.convert(Net().eval(), (torch.randn(1, 3, 10, 10),), tune=False, threads=1)
    kinds = [span["kind"] for span in profile_call(executable, [torch.randn(1, 3, 10, 10)]).spans]
    assert kinds.count("fallback") == 1


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
    before = torch.get_num_threads()
    assert measure_ceilings(seconds=0.01, threads=1).threads == 1
    assert torch.get_num_threads() == before


def test_a_layer_that_fits_the_cache_is_held_to_the_cache():
    ceilings = Ceilings(gflops=80.0, gbytes=10.0, threads=1, peak_gflops=100.0, cache_gbytes=40.0)
    small = LayerTime("a", "linear", (1,), 1.0, 1.0, None, None, flops=2e6, dense_flops=2e6, bytes=1e6)
    assert small.bound(ceilings) == ("cache", pytest.approx(0.025))
    large = LayerTime("b", "linear", (1,), 1.0, 1.0, None, None, flops=2e8, dense_flops=2e8, bytes=1e8)
    assert large.bound(ceilings) == ("memory", pytest.approx(10.0))
    passes = LayerTime("d", "linear", (1,), 1.0, 1.0, None, None, 2e8, 2e8, bytes=1e8, working_set=1e6)
    assert passes.bound(ceilings) == ("cache", pytest.approx(2.5))
    compute = LayerTime("c", "conv2d", (1,), 1.0, 1.0, None, None, flops=5e7, dense_flops=5e7, bytes=1e6)
    assert compute.bound(ceilings) == ("compute", pytest.approx(0.5))
    assert compute.share_of_peak(ceilings) == pytest.approx(0.5)
    halves = LayerTime("e", "conv2d", (1,), 1.0, 1.0, None, None, 5e7, 5e7, bytes=1e6, products=2)
    assert halves.share_of_peak(ceilings) == pytest.approx(0.25)
    assert halves.bound(ceilings) == ("compute", pytest.approx(0.25))


def test_layers_in_bfloat16_are_held_to_its_peak(monkeypatch):
    from sparse_engine import _C

    monkeypatch.setattr(_C, "pair_products", lambda: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    for parameter in model.parameters():
        parameter.data *= torch.rand_like(parameter) < 0.2
    x = torch.randn(2, 3, 16, 16)
    executable = se.convert(model, x, precision="bf16", tune=False)
    assert [layer.products for layer in measure_layers(executable, [x], repeats=2) if layer.op == "conv2d"] == [2, 2]


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
    assert "otherData" not in loaded
    more = {**spans[0], "band": 1, "pass": 0, "items": 3, "busy_us": 1.5}
    trace = trace_events([more], "t", wall_us=9.0)
    assert trace["traceEvents"][-1]["args"] == {
        **events[0]["args"],
        "band": 1,
        "pass": 0,
        "items": 3,
        "busy_us": 1.5,
    }
    assert trace["otherData"] == {"wall_us": 9.0}
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
