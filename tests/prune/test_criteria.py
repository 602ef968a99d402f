"""Criteria against their definitions, finite differences, and each other."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_engine as se
from sparse_engine.distill import (
    Batch,
    ClassWiseSelfDistillation,
    CrossEntropy,
    LastBatchSelfDistillation,
    ProgressiveSelfDistillation,
)
from sparse_engine.errors import PruneError
from sparse_engine.prune import CRITERIA, Epsd, Evidence, Grasp, Magnitude, ProsPr, Snip, SynFlow, prunable_weights


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


def batches(count: int = 5, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (5,)) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    out = []
    for i in range(count):
        x = torch.randn(8, *shape, generator=generator).to(dtype)
        out.append(Batch(x, torch.arange(8) % 3, torch.arange(8) + 8 * i, x.flip(0), x + 0.1))
    return out


def test_snip_is_weight_times_gradient():
    model, data = net(), batches(1)
    scores = Snip().scores(model, prunable_weights(model), Evidence(data))
    F.cross_entropy(model(data[0].inputs), data[0].targets).backward()
    for name, score in scores.items():
        parameter = dict(model.named_parameters())[name]
        torch.testing.assert_close(score, (parameter * parameter.grad).abs())


def test_no_inner_steps_is_snip_exactly():
    model, data = net(), batches(1)
    weights = prunable_weights(model)
    for mode in ("full", "first_order"):
        prospr = ProsPr(steps=0, mode=mode).scores(model, weights, Evidence(data))
        snip = Snip(normalise=True).scores(model, weights, Evidence(data))
        assert all(torch.equal(prospr[name], snip[name]) for name in weights)
    a, b = net(), net()
    se.prune(a, sparsity=0.7, criterion=ProsPr(steps=0), data=data)
    se.prune(b, sparsity=0.7, criterion="snip", data=data)
    assert all(torch.equal(mask, se.masks(b)[name]) for name, mask in se.masks(a).items())


@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(),
        ClassWiseSelfDistillation(),
        LastBatchSelfDistillation(),
        ProgressiveSelfDistillation(torch.arange(40) % 3, 3),
    ],
    ids=["ce", "cs_kd", "dlb", "ps_kd"],
)
def test_full_meta_gradient_equals_a_finite_difference_in_the_mask(objective):
    """dL(w_K)/dm through K steps of momentum SGD, first buffer included; targets of the soft parts are constants."""
    model, data = net(torch.float64), batches(4, torch.float64)
    weights = prunable_weights(model)
    rate, momentum = 0.3, 0.9
    criterion = ProsPr(steps=3, learning_rate=rate, momentum=momentum)
    objective.warm(model, data)
    meta = criterion.meta_gradients(model, weights, Evidence(data, objective.for_scoring()), data)

    if not isinstance(objective, CrossEntropy):
        # detached targets depend on m too, so a finite difference of the whole is another number;
        # the meta-gradient must exist and differ from that of the plain loss
        plain = criterion.meta_gradients(model, weights, Evidence(data, CrossEntropy()), data)
        assert all(torch.isfinite(g).all() for g in meta.values())
        assert any(not torch.allclose(meta[name], plain[name]) for name in weights)
        return

    def outer(name: str, index: tuple[int, ...], shift: float) -> float:
        trial = copy.deepcopy(model)
        mask = torch.ones_like(weights[name])
        mask[index] += shift
        with torch.no_grad():
            dict(trial.named_parameters())[name].mul_(mask)
        optimizer = torch.optim.SGD(trial.parameters(), lr=rate, momentum=momentum)
        for batch in data[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(trial(batch.inputs), batch.targets).backward()
            optimizer.step()
        return F.cross_entropy(trial(data[-1].inputs), data[-1].targets).item()

    for name, weight in weights.items():
        for index in [(0, 0), (1, 2), (weight.shape[0] - 1, weight.shape[1] - 1)]:
            numeric = (outer(name, index, 1e-5) - outer(name, index, -1e-5)) / 2e-5
            assert meta[name][index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


def test_first_order_treats_inner_gradients_as_constants():
    model, data = net(torch.float64), batches(3, torch.float64)
    weights = prunable_weights(model)
    criterion = ProsPr(steps=2, learning_rate=0.3, mode="first_order")
    meta = criterion.meta_gradients(model, weights, Evidence(data), data)
    trial = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trial.parameters(), lr=0.3, momentum=0.9)
    for batch in data[:-1]:
        optimizer.zero_grad()
        F.cross_entropy(trial(batch.inputs), batch.targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(trial(data[-1].inputs), data[-1].targets).backward()
    trained = dict(trial.named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(meta[name], trained[name].grad * weight.detach())


@pytest.mark.parametrize(
    "objective",
    [
        ClassWiseSelfDistillation(weight=0.0),
        ProgressiveSelfDistillation(torch.arange(40) % 3, 3, alpha=0.0),
        LastBatchSelfDistillation(weight=0.0),
    ],
    ids=["cs_kd", "ps_kd", "dlb"],
)
@pytest.mark.parametrize("mode", ["full", "first_order"])
def test_epsd_with_a_vanishing_loss_is_the_simple_combination_bit_for_bit(objective, mode):
    a, b = conv_net(), conv_net()
    data = batches(4, shape=(2, 6, 6))
    se.prune(a, sparsity=0.6, criterion=Epsd(mode=mode), data=data, loss=objective)
    se.prune(b, sparsity=0.6, criterion=Epsd(mode=mode), data=data)
    for name, mask in se.masks(a).items():
        assert torch.equal(mask, se.masks(b)[name])
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_epsd_with_the_loss_on_chooses_another_mask():
    a, b = conv_net(), conv_net()
    data = batches(4, shape=(2, 6, 6))
    se.prune(a, sparsity=0.6, criterion="epsd", data=data, loss=ClassWiseSelfDistillation(weight=3.0))
    se.prune(b, sparsity=0.6, criterion="epsd", data=data)
    assert any(not torch.equal(mask, se.masks(b)[name]) for name, mask in se.masks(a).items())


def test_grasp_is_weight_times_hessian_gradient_product():
    model, data = net(torch.float64), batches(1, torch.float64)
    weights = prunable_weights(model)
    scores = Grasp(temperature=2.0).scores(model, weights, Evidence(data))
    values = [w.detach() for w in weights.values()]

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        z = torch.func.functional_call(model, dict(zip(weights, tensors, strict=True)), (data[0].inputs,))
        return F.cross_entropy(z / 2.0, data[0].targets)

    gradient = torch.autograd.functional.jacobian(loss, tuple(values))
    _, product = torch.autograd.functional.hvp(loss, tuple(values), gradient)
    for (name, weight), hg in zip(weights.items(), product, strict=True):
        torch.testing.assert_close(scores[name], weight.detach() * hg)


def test_synflow_scores_are_conserved_between_layers_and_need_no_labels():
    """For a ReLU network without biases the scores of each layer add up to the same sum (conservation of synaptic
    flow)."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    scores = SynFlow(input_shape=(6,)).scores(model, prunable_weights(model), Evidence())
    sums = [score.sum() for score in scores.values()]
    torch.testing.assert_close(sums[0], sums[1])
    by_hand = model[2].weight.abs() @ model[0].weight.abs() @ torch.ones(6)
    torch.testing.assert_close(sums[0].float(), by_hand.sum())


def test_synflow_at_extreme_sparsity_avoids_the_collapse_of_one_round():
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(20, 20), nn.ReLU())], nn.Linear(20, 4))
    report = se.prune(model, sparsity=0.98, criterion=SynFlow(input_shape=(20,)))
    assert not report.collapsed
    assert report.kept == round(0.02 * report.total)


def test_scoring_leaves_the_model_as_it_was():
    model, data = conv_net(), batches(4, shape=(2, 6, 6))
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in CRITERIA:
        criterion = SynFlow(input_shape=(2, 6, 6)) if name == "synflow" else CRITERIA[name]()
        criterion.scores(model, prunable_weights(model), Evidence(data))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), name
        assert all(p.grad is None for p in model.parameters()), name
        assert model.training


def test_masked_weights_stay_out_of_the_inner_steps():
    """A removed weight must not come back in the inner training of a later round."""
    model, data = net(torch.float64), batches(3, torch.float64)
    se.prune(model, sparsity=0.5)
    weights = prunable_weights(model)
    evidence = Evidence(data, masks=se.masks(model))
    meta = ProsPr(steps=2, learning_rate=0.3).meta_gradients(model, weights, evidence, data)
    trial = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trial.parameters(), lr=0.3, momentum=0.9)
    hold = se.prune.hold_masks(trial, optimizer)
    for batch in data[:-1]:
        optimizer.zero_grad()
        F.cross_entropy(trial(batch.inputs), batch.targets).backward()
        optimizer.step()
    hold.remove()
    first = ProsPr(steps=2, learning_rate=0.3, mode="first_order").meta_gradients(model, weights, evidence, data)
    optimizer.zero_grad()
    F.cross_entropy(trial(data[-1].inputs), data[-1].targets).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(first[name], dict(trial.named_parameters())[name].grad * weight.detach())
        assert (meta[name][~se.masks(model)[name]] == 0).all()


def test_missing_data_and_unknown_names_are_refused():
    with pytest.raises(PruneError, match="'snip' needs data"):
        se.prune(net(), sparsity=0.5, criterion="snip")
    with pytest.raises(PruneError, match="criterion 'sinp' is not one of"):
        se.prune(net(), sparsity=0.5, criterion="sinp")
    with pytest.raises(PruneError, match="input"):
        se.prune(net(), sparsity=0.5, criterion="synflow")
    with pytest.raises(PruneError, match="NaN"):
        se.prune(net(), sparsity=0.5, criterion="snip", data=(torch.full((2, 5), float("nan")), torch.tensor([0, 1])))


def test_a_criterion_is_an_object_with_scores():
    class Smallest(Magnitude):
        def scores(self, model, weights, evidence):
            return {name: -weight.detach().abs() for name, weight in weights.items()}

    a, b = net(), net()
    se.prune(a, sparsity=0.5, criterion=Smallest())
    se.prune(b, sparsity=0.5)
    total = sum(int(m.sum()) for m in se.masks(a).values())
    assert total == sum(int(m.sum()) for m in se.masks(b).values())
    assert not any((se.masks(a)[name] & se.masks(b)[name]).any() for name in se.masks(a))
