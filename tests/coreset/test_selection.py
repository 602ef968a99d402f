"""Selection is exact and balanced; the dynamic sampler is unbiased."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.coreset import InfoBatchOrder, default_alpha, select
from sparse_engine.errors import SparseEngineError


@given(st.integers(5, 80), st.floats(0.2, 1.0), st.sampled_from(["hard", "easy", "random"]), st.booleans())
def test_the_count_is_exact_and_indices_are_unique(n, fraction, keep, balance):
    torch.manual_seed(n)
    labels = torch.randint(4, (n,))
    kept = select(torch.randint(5, (n,)).float(), fraction, keep=keep, labels=labels, balance=balance)
    assert len(kept) == round(fraction * n)
    assert len(kept.unique()) == len(kept)
    assert torch.equal(kept, kept.sort().values)
    if balance:
        share = torch.bincount(labels[kept], minlength=4) - fraction * torch.bincount(labels, minlength=4)
        assert share.abs().max() <= 1.5


def test_hard_easy_and_ties():
    scores = torch.tensor([3.0, 1.0, 2.0, 3.0])
    assert select(scores, 0.25, balance=False).tolist() == [0]
    assert select(scores, 0.5, balance=False).tolist() == [0, 3]
    assert select(scores, 0.25, keep="easy", balance=False).tolist() == [1]


def test_balance_saves_the_easy_classes():
    labels = torch.arange(100) % 10
    scores = labels.float()  # class 9 is the hardest
    assert len(labels[select(scores, 0.1, balance=False)].unique()) == 1
    assert len(labels[select(scores, 0.1, labels=labels)].unique()) == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fraction": 0.0, "balance": False}, "keeps 0"),
        ({"fraction": 1.5, "balance": False}, "1.5"),
        ({"fraction": 0.5}, "labels"),
        ({"fraction": 0.5, "keep": "best", "balance": False}, "'best'"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(SparseEngineError, match=message):
        select(torch.rand(10), **options)
    with pytest.raises(SparseEngineError, match="1 of 2 scores are NaN"):
        select(torch.tensor([1.0, float("nan")]), 0.5, balance=False)


def test_default_alpha_falls_with_the_fraction():
    values = [default_alpha(f) for f in (0.05, 0.1, 0.3, 0.5, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] >= 0.9
    assert values[-1] <= 0.2


def test_dynamic_pruning_keeps_the_expected_sum():
    """Over many epochs the weighted sum of any per-sample quantity is that of the full data."""
    torch.manual_seed(0)
    n = 200
    order = InfoBatchOrder(n, epochs=2000, ratio=0.6, annealing=1.0)
    order.observe(torch.arange(n), torch.rand(n))
    quantity = torch.randn(n).double() + 1
    sums, visited = [], 0
    for epoch in range(600):
        positions, weights = order(epoch, torch.Generator().manual_seed(epoch))
        assert len(positions.unique()) == len(positions)
        sums.append((quantity[positions] * weights).sum())
        visited += len(positions)
    estimate = torch.stack(sums)
    error = (estimate.mean() - quantity.sum()).abs()
    assert error < 4 * estimate.std() / 600**0.5
    assert visited < 0.75 * 600 * n


def test_dynamic_pruning_ends_with_all_data_and_starts_with_all():
    order = InfoBatchOrder(10, epochs=8, ratio=0.9)
    assert len(order(0, torch.Generator())[0]) == 10  # nothing is known yet
    order.observe(torch.arange(10), torch.arange(10.0))
    assert len(order(1, torch.Generator())[0]) < 10
    positions, weights = order(7, torch.Generator())
    assert len(positions) == 10
    assert (weights == 1).all()


def test_dynamic_pruning_as_a_plain_sampler():
    order = InfoBatchOrder(30, epochs=4, ratio=0.5)
    order.observe(torch.arange(30), torch.arange(30.0))
    loader = torch.utils.data.DataLoader(list(range(30)), batch_size=8, sampler=order.as_sampler())
    seen = torch.cat(list(loader))
    assert 15 <= len(seen) < 30
    assert (order.weights[seen] >= 1).all()
    copy = InfoBatchOrder(30, epochs=4, ratio=0.5)
    copy.load_state_dict(order.state_dict())
    assert torch.equal(copy(1, torch.Generator())[0], order(1, torch.Generator())[0])
