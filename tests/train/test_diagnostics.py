"""Diagnostics against cases whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine.distill import Batch
from sparse_engine.errors import SparseEngineError
from sparse_engine.train.diagnostics import (
    gradient_flow,
    loss_surface,
    mask_overlap,
    mean_jacobian_singular_value,
    plot_density,
    plot_surface,
)


def batch() -> Batch:
    return Batch(torch.randn(10, 4), torch.arange(10) % 3, torch.arange(10))


def test_mean_singular_value_of_a_linear_map_is_that_of_its_matrix():
    model = nn.Linear(4, 3)
    want = torch.linalg.svdvals(model.weight.detach()).mean()
    assert mean_jacobian_singular_value(model, torch.randn(5, 4)) == pytest.approx(float(want), rel=1e-5)
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    assert mean_jacobian_singular_value(orthogonal, torch.randn(2, 4)) == pytest.approx(1, abs=1e-5)
    with pytest.raises(SparseEngineError, match="at least one sample"):
        mean_jacobian_singular_value(model, torch.empty(0, 4))


def test_the_centre_of_the_loss_surface_is_the_loss_and_the_model_is_left_alone(tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    se.prune(model, sparsity=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    b = batch()
    axis, losses = loss_surface(model, b, points=5)
    want = nn.functional.cross_entropy(model(b.inputs), b.targets)
    torch.testing.assert_close(losses[2, 2], want.detach())
    assert losses.std() > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert plot_surface(axis, losses, tmp_path / "s.png").stat().st_size > 1000


def test_mask_overlap_counts_intersection_over_union():
    a = {"w": torch.tensor([1, 1, 0, 0], dtype=torch.bool)}
    b = {"w": torch.tensor([1, 0, 1, 0], dtype=torch.bool)}
    assert mask_overlap(a, b) == {"w": pytest.approx(1 / 3), "total": pytest.approx(1 / 3)}
    assert mask_overlap(a, a)["total"] == 1
    with pytest.raises(SparseEngineError, match="different layers"):
        mask_overlap(a, {"v": a["w"]})


def test_gradient_flow_is_the_norm_over_kept_weights():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    se.prune(model, sparsity=0.5)
    b = batch()
    flow = gradient_flow(model, b)
    nn.functional.cross_entropy(model(b.inputs), b.targets).backward()
    want = model[0].weight.grad[model[0].weight != 0].norm()
    assert flow["0.weight"] == pytest.approx(float(want), rel=1e-5)
    assert flow["total"] > flow["0.weight"]


def test_gradient_flow_of_sparse_layers_is_that_of_masked_dense_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    se.prune(model, sparsity=0.5)
    b = batch()
    dense = gradient_flow(model, b)
    se.sparsify_(model, force=True)
    assert any(type(m).__name__ == "SparseLinear" for m in model.modules())
    sparse = gradient_flow(model, b)
    assert dense.keys() == sparse.keys() == {"0.weight", "3.weight", "total"}
    assert all(sparse[name] == pytest.approx(dense[name], rel=1e-5) for name in dense)
    assert model.training


def test_density_plot(tmp_path):
    assert plot_density({"a": 0.5, "b": 0.0}, tmp_path / "d.png").stat().st_size > 1000
