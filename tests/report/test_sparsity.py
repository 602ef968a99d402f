"""Sparsity by layer: counts, structures, sizes."""

from __future__ import annotations

import json

import pytest
import torch

from sparse_engine.io import write_checkpoint, write_spx
from sparse_engine.packed import PackedWeight
from sparse_engine.report import sparsity_of_file, sparsity_of_state


@pytest.fixture
def state():
    torch.manual_seed(0)
    channels = torch.randn(16, 8, 3, 3)
    channels[4:8] = 0
    channels[:, 5] = 0
    scattered = torch.randn(64, 64) * (torch.rand(64, 64) < 0.1)
    return {
        "conv.weight": channels,
        "fc.weight": scattered,
        "dense.weight": torch.ones(8, 8),
        "fc.bias": torch.zeros(64),
        "counter": torch.tensor(3),
        "table": torch.zeros(4, 4, dtype=torch.int64),
    }


def test_counts_structures_and_sizes(state):
    report = sparsity_of_state(state)
    assert [layer.name for layer in report.layers] == ["conv.weight", "fc.weight", "dense.weight"]
    conv, fc, dense = report.layers
    assert (conv.structure, conv.empty_rows, conv.empty_inputs) == ("channel", 4, 1)
    assert conv.zeros == 4 * 8 * 9 + 12 * 9
    assert fc.structure == "unstructured"
    assert fc.packed_bytes == PackedWeight.from_dense(state["fc.weight"]).nbytes < fc.dense_bytes == 4 * 64 * 64
    assert (dense.structure, dense.zeros, dense.packed_bytes) == ("dense", 0, 256)
    assert report.other_values == 64 + 1 + 16
    assert report.other_bytes == 4 * 64 + 8 + 8 * 16
    assert report.zeros == conv.zeros + fc.zeros
    assert report.weights == 16 * 8 * 9 + 64 * 64 + 64
    assert report.sparsity == pytest.approx(report.zeros / report.weights)
    assert report.sparse_layers == 2
    json.dumps(report.to_json(), allow_nan=False)


def test_files_and_executables_agree(state, tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", state)
    write_spx(tmp_path / "a.spx", {}, state)
    plain, packed = sparsity_of_file(tmp_path / "a.safetensors"), sparsity_of_file(tmp_path / "a.spx")
    expected = {layer.name: layer for layer in sparsity_of_state(state).layers}
    assert {layer.name: layer for layer in plain.layers} == expected
    assert {layer.name: layer for layer in packed.layers} == expected


def test_odd_tensors_are_counted_too():
    state = {
        "empty": torch.zeros(0, 4),
        "all zero": torch.zeros(3, 5),
        "minus zero": torch.full((2, 2), -0.0),
        "small floats": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "nine dimensions": torch.zeros((1,) * 9),
    }
    report = sparsity_of_state(state)
    zeros = {layer.name: layer.zeros for layer in report.layers}
    assert zeros == {"empty": 0, "all zero": 15, "minus zero": 4, "small floats": 16, "nine dimensions": 1}


def test_progress_reaches_the_end(state):
    seen = []
    sparsity_of_state(state, lambda done, total: seen.append((done, total)))
    assert seen == [(index, 6) for index in range(1, 7)]


def test_more_zeros_predict_more_speed():
    torch.manual_seed(0)
    weights = {
        str(density): torch.randn(64, 256) * (torch.rand(64, 256) < density) for density in (0.9, 0.3, 0.1, 0.02)
    }
    predicted = [layer.predicted_speedup for layer in sparsity_of_state(weights).layers]
    assert predicted[0] == 1.0
    assert predicted == sorted(predicted)
    assert 4 < predicted[2] < 10
