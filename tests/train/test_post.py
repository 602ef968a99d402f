"""Annealed helpers: at the end the network is the plain one, with identical outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparse_engine as se
from sparse_engine.errors import SparseEngineError
from sparse_engine.train import PostPruning, build
from sparse_engine.train.post import SoftReLU


def networks():
    return [
        build("mlp", in_features=12, hidden=(16, 16, 8)),
        build("vgg11_cifar", width=0.125),
        build("resnet8"),
        nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1352, 5)
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(4))
def test_the_network_afterwards_is_the_plain_one_with_identical_outputs(index):
    model = networks()[index].eval()
    x = torch.randn(2, 3, 2, 2) if index == 0 else torch.randn(2, 3, 32, 32)
    plain = model(x)
    untouched = copy.deepcopy(model)
    types = [type(m) for m in model.modules()]
    helpers = PostPruning(model, until=0.5)
    helped = model(x)
    assert not torch.allclose(helped, plain)
    helpers.set_progress(0.25)
    assert not torch.allclose(model(x), helped)
    helpers.set_progress(0.5)
    annealed = model(x)
    helpers.remove_()
    assert torch.equal(annealed, model(x))
    assert torch.equal(model(x), untouched(x))
    assert [type(m) for m in model.modules()] == types
    assert not any(m._forward_hooks for m in model.modules())


def test_helpers_leave_parameters_masks_and_names_alone():
    model = build("mlp", in_features=12, hidden=(16, 16))
    se.prune(model, sparsity=0.5)
    names, ids = list(model.state_dict()), [id(p) for p in model.parameters()]
    masks = {n: m.clone() for n, m in se.masks(model).items()}
    helpers = PostPruning(model)
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(m, se.masks(model)[n]) for n, m in masks.items())
    helpers.remove_()


def test_gradients_flow_around_an_empty_layer_while_the_skip_lasts():
    model = build("mlp", in_features=8, hidden=(8, 8))
    with torch.no_grad():
        model.fc2.weight.zero_()
    helpers = PostPruning(model, activations=False)
    model(torch.randn(4, 8)).sum().backward()
    assert model.fc1.weight.grad.abs().sum() > 0
    helpers.set_progress(1.0)
    model.zero_grad()
    model(torch.randn(4, 8)).sum().backward()
    assert model.fc1.weight.grad.abs().sum() == 0


def test_soft_relu_runs_from_half_to_relu():
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(SoftReLU(0.0)(x), x / 2)
    torch.testing.assert_close(SoftReLU(1.0)(x), nn.functional.silu(x))
    assert torch.equal(SoftReLU(float("inf"))(x), x.relu())


def test_bad_share():
    with pytest.raises(SparseEngineError, match="until is 2"):
        PostPruning(build("mlp"), until=2)
