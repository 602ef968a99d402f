"""Scores of samples against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_engine.coreset import (
    ForgettingTracker,
    el2n,
    grand,
    grand_last_layer,
    herding,
    k_centre,
    load_scores,
    margin,
    penultimate,
    save_scores,
)
from sparse_engine.distill import Batch
from sparse_engine.errors import FileFormatError, SparseEngineError


def data(n: int = 9):
    torch.manual_seed(1)
    return torch.randn(n, 4), torch.arange(n) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def test_el2n_and_margin_by_hand():
    z = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
    y = torch.tensor([0, 0])
    torch.testing.assert_close(el2n(z, y), torch.tensor([0.5**0.5, 2**0.5]))
    torch.testing.assert_close(margin(z, y), torch.tensor([1.0, 2.0]))


def test_grand_is_the_norm_of_each_samples_own_gradient():
    model, (x, y) = net(), data()
    scores = grand(model, [Batch(x[:5], y[:5], torch.arange(5)), Batch(x[5:], y[5:], torch.arange(5, 9))], 9, chunk=2)
    model.eval()
    for i in range(9):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        want = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        torch.testing.assert_close(scores[i], want)


def test_grand_leaves_the_mode_and_marks_what_it_never_saw():
    model, (x, y) = net().train(), data()
    scores = grand(model, [Batch(x[:2], y[:2], torch.arange(2))], 4)
    assert model.training
    assert scores.isnan().tolist() == [False, False, True, True]
    with pytest.raises(SparseEngineError, match="indices"):
        grand(model, [Batch(x, y)], 9)


@pytest.mark.parametrize("bias", [True, False])
def test_grand_of_the_last_layer_in_closed_form(bias):
    (x, y) = data()
    layer = nn.Linear(4, 3, bias=bias)
    scores = grand_last_layer(x, layer(x), y, bias=bias)
    for i in range(len(x)):
        layer.zero_grad()
        F.cross_entropy(layer(x[i : i + 1]), y[i : i + 1]).backward()
        want = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
        torch.testing.assert_close(scores[i], want)


def test_forgetting_counts_transitions_and_the_never_learned_come_first():
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    histories = {0: [1, 1, 1, 1], 1: [1, 0, 1, 0], 2: [0, 0, 0, 0], 3: [0, 1, 1, 0], 4: [0, 0, 0, 1]}
    tracker = ForgettingTracker(5)
    for epoch in range(4):
        for index, history in histories.items():
            tracker.observe(torch.tensor([index]), right if history[epoch] else wrong, torch.tensor([0]))
    scores = tracker.scores()
    assert scores[[0, 1, 3, 4]].tolist() == [0, 2, 1, 0]
    assert scores[2] > scores[[0, 1, 3, 4]].max()
    copy = ForgettingTracker(5)
    copy.load_state_dict(tracker.state_dict())
    assert torch.equal(copy.scores(), scores)


def test_herding_follows_the_class_mean():
    torch.manual_seed(0)
    features, labels = torch.randn(40, 5), torch.arange(40) % 2
    scores = herding(features, labels)
    unit = F.normalize(features, dim=1)
    for label in (0, 1):
        members = (labels == label).nonzero().flatten()
        first = members[scores[members].argsort(descending=True)[:5]]
        mean = unit[members].mean(0)
        drawn = [(unit[members[torch.randperm(20)[:5]]].mean(0) - mean).norm() for _ in range(50)]
        assert (unit[first].mean(0) - mean).norm() < torch.stack(drawn).min()
        assert len(scores[members].unique()) == 20


def test_k_centre_takes_the_farthest_next():
    features = torch.tensor([[0.0], [0.1], [10.0], [5.0], [-0.1]])
    order = k_centre(features, torch.zeros(5, dtype=torch.long)).argsort(descending=True).tolist()
    assert order[0] == 3  # nearest the mean
    assert set(order[1:3]) == {2, 4}


def test_penultimate_features_are_the_inputs_of_the_last_linear_layer():
    model, (x, _) = net().eval(), data()
    features = penultimate(model, lambda: [model(x[:4]), model(x[4:])])
    torch.testing.assert_close(features, torch.tanh(model[0](x)).detach())
    with pytest.raises(SparseEngineError, match="no linear layer"):
        penultimate(nn.Tanh(), lambda: None)


def test_scores_are_saved_by_index(tmp_path):
    scores = torch.rand(7)
    save_scores(tmp_path / "s.npz", scores, score="el2n")
    assert torch.equal(load_scores(tmp_path / "s.npz"), scores)
    (tmp_path / "bad.npz").write_bytes(b"no numpy file")
    with pytest.raises(FileFormatError):
        load_scores(tmp_path / "bad.npz")
    with pytest.raises(SparseEngineError, match="does not exist"):
        load_scores(tmp_path / "none.npz")
