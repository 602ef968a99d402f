"""Self-distillation: what each objective computes, and the state it carries."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_engine.distill import (
    Batch,
    ClassWiseSelfDistillation,
    CrossEntropy,
    LastBatchSelfDistillation,
    PairSampler,
    ProgressiveSelfDistillation,
    TeacherDistillation,
    as_objective,
)
from sparse_engine.errors import SparseEngineError
from sparse_engine.ops.kd_table import store_predictions


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(n: int = 6, start: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(start + 1)
    x, y = torch.randn(n, 4, generator=generator), torch.arange(n) % 3
    return Batch(x, y, torch.arange(start, start + n), x + 0.1, x - 0.1)


def kl(target: torch.Tensor, z: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = (target / temperature).softmax(1), (z / temperature).softmax(1)
    return temperature**2 * (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize(
    "objective",
    [
        ClassWiseSelfDistillation(weight=0.0),
        ProgressiveSelfDistillation(torch.arange(6) % 3, 3, alpha=0.0),
        LastBatchSelfDistillation(weight=0.0),
    ],
)
def test_weight_zero_is_cross_entropy_bit_for_bit(objective):
    model = net()
    for _ in range(2):
        ours = objective(model, batch())
        theirs = CrossEntropy()(model, batch())
        assert torch.equal(ours, theirs)
        for a, b in zip(
            torch.autograd.grad(ours, model.parameters()), torch.autograd.grad(theirs, model.parameters()), strict=True
        ):
            assert torch.equal(a, b)


def test_class_wise_distils_from_the_pair_without_gradient():
    model, b = net(), batch()
    loss = ClassWiseSelfDistillation(weight=2.0, temperature=4.0)(model, b)
    with torch.no_grad():
        theirs = model(b.pair_inputs)
    want = F.cross_entropy(model(b.inputs), b.targets) + 2 * kl(theirs, model(b.inputs), 4.0)
    torch.testing.assert_close(loss, want)
    got = torch.autograd.grad(loss, model.parameters())
    for a, g in zip(torch.autograd.grad(want, model.parameters()), got, strict=True):
        torch.testing.assert_close(a, g)


def test_class_wise_without_pairs_says_what_is_missing():
    with pytest.raises(SparseEngineError, match="pair_inputs"):
        ClassWiseSelfDistillation()(net(), Batch(torch.randn(2, 4), torch.tensor([0, 1])))


def test_progressive_uses_the_predictions_of_the_previous_epoch():
    model, b = net(), batch()
    objective = ProgressiveSelfDistillation(b.targets, 3, alpha=0.8)
    objective.start_epoch(0, 2)
    assert objective.current == pytest.approx(0.4)
    # the table is one-hot at first: plain cross entropy
    torch.testing.assert_close(objective(model, b), F.cross_entropy(model(b.inputs), b.targets))
    objective.end_epoch()
    before = model(b.inputs).detach().softmax(1)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    objective.start_epoch(1, 2)
    z = model(b.inputs)
    mixture = 0.2 * F.one_hot(b.targets, 3) + 0.8 * before
    torch.testing.assert_close(objective(model, b), -(mixture * F.log_softmax(z, 1)).sum(1).mean())
    torch.testing.assert_close(objective.table, z.detach().softmax(1))


def test_progressive_state_round_trip_and_warm_table():
    model, b = net(), batch()
    objective = ProgressiveSelfDistillation(b.targets, 3)
    objective.warm(model, [b])
    torch.testing.assert_close(objective.table, model(b.inputs).detach().softmax(1))
    other = ProgressiveSelfDistillation(b.targets, 3)
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.table, objective.table)
    with pytest.raises(SparseEngineError, match=r"\(6, 3\)"):
        ProgressiveSelfDistillation(torch.zeros(4, dtype=torch.long), 3).load_state_dict(objective.state_dict())


def test_progressive_with_a_top_k_table():
    model, b = net(), batch()
    objective = ProgressiveSelfDistillation(b.targets, 3, alpha=0.8, top_k=2)
    objective.start_epoch(0, 1)
    torch.testing.assert_close(objective(model, b), F.cross_entropy(model(b.inputs), b.targets))
    before = model(b.inputs).detach().softmax(1)
    values, index = before.topk(2)
    torch.testing.assert_close(objective.table, values)
    assert torch.equal(objective.index.long(), index)
    past = (1 - values.sum(1, keepdim=True)).repeat(1, 3).scatter(1, index, values)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    mixture = 0.2 * F.one_hot(b.targets, 3) + 0.8 * past
    want = -(mixture * F.log_softmax(model(b.inputs), 1)).sum(1).mean()
    other = ProgressiveSelfDistillation(b.targets, 3, alpha=0.8, top_k=2)
    other.load_state_dict(objective.state_dict())
    for each in (objective, other):
        loss = each(model, b)
        torch.testing.assert_close(loss, want)
        for mine, theirs in zip(
            torch.autograd.grad(loss, model.parameters()),
            torch.autograd.grad(want, model.parameters(), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)
    objective.warm(net(), [b])
    with pytest.raises(SparseEngineError, match="the other a full one"):
        objective.load_state_dict({"table": objective.table, "current": 0.8})
    with pytest.raises(SparseEngineError, match="top_k is 3"):
        ProgressiveSelfDistillation(b.targets, 9, top_k=3)


def test_last_batch_repeats_the_last_batch_in_its_second_view():
    model, first, second = net(), batch(), batch(4, start=6)
    objective = LastBatchSelfDistillation(weight=0.5, temperature=3.0)
    torch.testing.assert_close(objective(model, first), F.cross_entropy(model(first.inputs), first.targets))
    then = model(first.inputs).detach()
    with torch.no_grad():
        model[0].weight.mul_(1.2)
    loss = objective(model, second)
    both = model(torch.cat([second.inputs, first.second_view]))
    want = F.cross_entropy(both, torch.cat([second.targets, first.targets])) + 0.5 * kl(then, both[4:], 3.0)
    torch.testing.assert_close(loss, want)


def test_last_batch_is_carried_by_the_state_dict():
    model = net()
    objective = LastBatchSelfDistillation()
    objective(model, batch())
    copy = LastBatchSelfDistillation()
    copy.load_state_dict(objective.state_dict())
    torch.testing.assert_close(copy(model, batch(4, 6)), objective(model, batch(4, 6)))


def test_scoring_copies_leave_the_state_alone():
    objective = LastBatchSelfDistillation()
    objective.for_scoring()(net(), batch())
    assert objective.last is None
    table = ProgressiveSelfDistillation(torch.arange(6) % 3, 3)
    before = table.table.clone()
    table.for_scoring()(net(), batch())
    assert torch.equal(table.table, before)


def test_a_scoring_copy_has_second_derivatives():
    model, b = net(), batch()
    objective = ProgressiveSelfDistillation(b.targets, 3).for_scoring()
    objective.warm(net(), [b])
    loss = objective(model, b)
    first = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), model[0].weight)[0]
    assert second.isfinite().all()
    assert second.any()


def test_teacher_stays_frozen_and_in_evaluation_mode():
    teacher = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    objective = TeacherDistillation(teacher, alpha=1.0, temperature=2.0)
    teacher.train()
    model, b = net(), batch()
    loss = objective(model, b)
    loss.backward()
    torch.testing.assert_close(loss, kl(teacher(b.inputs), model(b.inputs), 2.0))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_label_smoothing_anneals_linearly():
    objective = CrossEntropy(0.1, 0.0)
    seen = []
    for epoch in range(3):
        objective.start_epoch(epoch, 3)
        seen.append(objective.current)
    assert seen == pytest.approx([0.1, 0.05, 0.0])


@pytest.mark.parametrize("make", [ClassWiseSelfDistillation, lambda **o: TeacherDistillation(net(), 0.5, **o)])
def test_smoothed_labels_go_with_distillation_and_anneal(make):
    torch.manual_seed(0)
    model, b = net(), batch()
    objective = make(label_smoothing=0.2, final_label_smoothing=0.0)
    plain = copy.deepcopy(objective)
    plain.first = plain.last = plain.current = 0.0
    hard = 0.5 if isinstance(objective, TeacherDistillation) else 1.0

    def difference() -> float:
        return (objective(model, b) - plain(model, b)).item()

    z = model(b.inputs)
    smooth, sharp = F.cross_entropy(z, b.targets, label_smoothing=0.2), F.cross_entropy(z, b.targets)
    want = hard * (smooth - sharp).item()
    assert difference() == pytest.approx(want, rel=1e-4)
    objective.start_epoch(1, 3)
    assert objective.current == pytest.approx(0.1)
    objective.start_epoch(2, 3)
    assert difference() == 0


def test_sample_weights_scale_each_sample():
    model, b = net(), batch()
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0])
    weighted = Batch(b.inputs, b.targets, b.indices, weights=weights)
    want = (F.cross_entropy(model(b.inputs), b.targets, reduction="none") * weights).mean()
    torch.testing.assert_close(CrossEntropy()(model, weighted), want)
    torch.testing.assert_close(as_objective(F.cross_entropy)(model, weighted), want)


def test_pairs_are_of_the_same_class_another_sample_and_uniform():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0])
    sampler = PairSampler(labels, seed=3)
    indices = torch.arange(7).repeat(300)
    partners = sampler.partners(indices)
    assert torch.equal(labels[partners], labels[indices])
    assert (partners != indices)[indices != 3].all()  # sample 3 is alone in its class
    counts = torch.bincount(partners[indices == 0], minlength=7)
    assert counts[[2, 5, 6]].min() > 60
    assert counts[0] == 0


def test_pairs_repeat_from_a_saved_state():
    sampler = PairSampler(torch.arange(20) % 4, seed=1)
    sampler.partners(torch.arange(20))
    state = sampler.state_dict()
    want = sampler.partners(torch.arange(20))
    sampler.load_state_dict(state)
    assert torch.equal(sampler.partners(torch.arange(20)), want)


def test_something_that_is_no_loss_is_refused():
    with pytest.raises(SparseEngineError, match="loss is a str"):
        as_objective("cross_entropy")


def test_processes_share_a_top_k_table_at_the_end_of_an_epoch(monkeypatch):
    """Two threads stand for two processes; of a sample that both saw, the higher rank's predictions stay."""
    rank, barrier, parts = threading.local(), threading.Barrier(2), {}

    def all_reduce(tensor, op=torch.distributed.ReduceOp.SUM):
        parts[rank.number] = tensor.clone()
        barrier.wait(20)
        both = torch.stack([parts[0], parts[1]])
        barrier.wait(20)
        tensor.copy_(both.sum(0) if op == torch.distributed.ReduceOp.SUM else both.max(0).values)

    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank.number)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    labels, seen = torch.arange(6) % 5, {0: torch.tensor([0, 1, 2]), 1: torch.tensor([2, 3])}
    objectives = {number: ProgressiveSelfDistillation(labels, 5, top_k=2) for number in seen}
    predictions = {number: torch.rand(len(where), 5).softmax(1) for number, where in seen.items()}

    def process(number):
        rank.number = number
        objective = objectives[number]
        store_predictions(objective.table, objective.index, seen[number], predictions[number])
        objective.seen[seen[number]] = True
        objective.end_epoch()

    threads = [threading.Thread(target=process, args=(number,)) for number in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = ProgressiveSelfDistillation(labels, 5, top_k=2)
    for number, where in seen.items():
        store_predictions(expected.table, expected.index, where, predictions[number])
    for objective in objectives.values():
        torch.testing.assert_close(objective.table, expected.table)
        assert torch.equal(objective.index, expected.index)
        assert not objective.seen.any()
