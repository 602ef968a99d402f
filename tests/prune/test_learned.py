"""Learned gates and the ZerO initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_engine as se
from sparse_engine.errors import PruneError
from sparse_engine.prune import GATES, GivenScores, LearnedMasks, zero_init_, zero_matrix
from sparse_engine.prune.zero_init import hadamard


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("kind", list(GATES))
def test_gates_train_and_fold_back_to_the_same_parameters(kind):
    model = net()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    keys = list(model.state_dict())
    gates = LearnedMasks(model, kind, size_penalty=1e-3, variance_penalty=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(12, 6), torch.arange(12) % 3
    start = [p.detach().clone() for p in gates.parameters()]
    for step in range(5):
        gates.set_progress(step / 5)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + gates.penalty()).backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(start, gates.parameters(), strict=True))
    scores = gates.fold_()
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    assert list(model.state_dict()) == keys
    report = se.prune(model, sparsity=0.75, criterion=GivenScores(scores), keep_one=True)
    assert report.kept == round(0.25 * (96 + 48))


def test_bernoulli_gates_pass_the_gradient_straight_through():
    model = nn.Linear(4, 3, bias=False)
    gates = LearnedMasks(model, "bernoulli", initial=0.6)
    model.train()
    x = torch.randn(5, 4)
    weight = model.parametrizations.weight.original
    logits = gates.gates["weight"].logits
    torch.manual_seed(1)
    out = model(x)
    out.sum().backward()
    torch.manual_seed(1)
    p = logits.detach().sigmoid()
    mask = (torch.rand_like(p) < p).float()
    torch.testing.assert_close(out, F.linear(x, weight.detach() * mask))
    upstream = torch.ones(5, 3).T @ x  # ∂L/∂(w ⊙ m)
    torch.testing.assert_close(weight.grad, upstream * mask)
    torch.testing.assert_close(logits.grad, upstream * weight.detach() * p * (1 - p))


def test_the_two_term_penalty():
    model = nn.Linear(4, 3, bias=False)
    gates = LearnedMasks(model, "bernoulli", initial=0.8, variance_penalty=0.5, size_penalty=0.25)
    assert gates.penalty().item() == pytest.approx(12 * (0.5 * 0.8 * 0.2 + 0.25 * 0.8), rel=1e-5)
    warm = LearnedMasks(nn.Linear(4, 3), "bernoulli", initial=0.8, size_penalty=1.0, penalty_warmup=0.5)
    assert warm.penalty().item() == 0
    warm.set_progress(0.25)
    half = warm.penalty().item()
    warm.set_progress(1.0)
    assert half == pytest.approx(warm.penalty().item() / 2)


def test_continuous_gates_start_at_one_and_harden():
    model = nn.Linear(4, 3, bias=False)
    gates = LearnedMasks(model, "continuous", initial=0.9)
    gate = gates.gates["weight"]
    torch.testing.assert_close(gate.gate(), torch.ones(3, 4))
    with torch.no_grad():
        gate.logits[0] = -0.1
    gates.set_progress(1.0)
    assert gate.gate()[0].max() < 1e-6
    assert gate.gate()[1].min() > 1


def test_hard_concrete_is_exactly_zero_or_one_sometimes():
    gate = LearnedMasks(nn.Linear(100, 100), "hard_concrete", initial=0.5).gates["weight"]
    values = gate.gate()
    assert (values == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (values == 1).any()
    assert gate.openness().mean().item() == pytest.approx(0.5, abs=1e-5)


def test_soft_threshold_shrinks_and_cuts():
    model = nn.Linear(50, 50, bias=False)
    LearnedMasks(model, "str", initial=0.7)
    assert (model.weight != 0).float().mean().item() == pytest.approx(0.7, abs=0.02)


def test_zero_initialised_weights_give_their_gates_no_gradient():
    """Why ZerO and a learned mask collapse together: at w = 0 only the penalty moves the gate."""
    model = zero_init_(nn.Linear(8, 8, bias=False))
    gates = LearnedMasks(model, "bernoulli", size_penalty=0.0, variance_penalty=0.0)
    model(torch.randn(4, 8)).square().sum().backward()
    gradient = gates.gates["weight"].logits.grad
    assert (gradient[~torch.eye(8, dtype=torch.bool)] == 0).all()
    assert (gradient[torch.eye(8, dtype=torch.bool)] != 0).any()


def test_unknown_gates_are_refused():
    with pytest.raises(PruneError, match="'beta'"):
        LearnedMasks(net(), "beta")


@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (5, 3), (8, 3), (1, 1), (6, 4)])
def test_zero_matrix_is_the_definition(shape):
    m, n = shape
    matrix = zero_matrix(m, n)
    assert matrix.shape == shape
    if m <= n:
        assert torch.equal(matrix, torch.eye(m, n))
    else:
        p = 2 ** (m - 1).bit_length()
        want = torch.eye(m, p) @ (hadamard(p) / p**0.5) @ torch.eye(p, n)
        torch.testing.assert_close(matrix, want)


def test_hadamard_rows_are_orthogonal():
    matrix = hadamard(16)
    assert torch.equal(matrix @ matrix.T, 16 * torch.eye(16))


def test_zero_init_puts_the_matrix_at_the_kernel_centre():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, (1, 5)), nn.Linear(4, 4))
    zero_init_(model)
    assert torch.equal(model[0].weight[:, :, 1, 1], torch.eye(4))
    assert model[0].weight.abs().sum() == 4
    torch.testing.assert_close(model[2].weight[:, :, 0, 2], zero_matrix(6, 4))
    assert torch.equal(model[1].weight, torch.ones(4))
    assert all((m.bias == 0).all() for m in model if m.bias is not None)
