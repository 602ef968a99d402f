"""RigL, SET, GraNet: truth tables, optimiser state, sparse layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_engine as se
from sparse_engine.errors import PruneError
from sparse_engine.prune import (
    Cubic,
    DynamicMask,
    GradualPruning,
    GraNet,
    MovementTracker,
    drop_and_grow,
    drop_fraction,
    hold_masks,
)


def test_drop_fraction_is_a_cosine_that_ends():
    assert drop_fraction(0, 100, 0.3) == pytest.approx(0.3)
    assert drop_fraction(50, 100, 0.3) == pytest.approx(0.15)
    assert drop_fraction(100, 100, 0.3) == 0


#   weight, kept, |gradient|, count -> kept afterwards
TRUTH = [
    # the smallest kept weight (0.1) goes, the largest gradient among the others comes
    ([0.9, 0.1, 0.5, 0.0, 0.0], [1, 1, 1, 0, 0], [0, 0, 0, 0.2, 0.7], 1, [1, 0, 1, 0, 1]),
    # signs do not matter
    ([-0.9, -0.1, 0.5, 0.0, 0.0], [1, 1, 1, 0, 0], [0, 0, 0, 0.8, 0.7], 1, [1, 0, 1, 1, 0]),
    # a dropped weight may come straight back
    ([0.9, 0.1, 0.5, 0.0, 0.0], [1, 1, 1, 0, 0], [0, 9.0, 0, 0.2, 0.7], 1, [1, 1, 1, 0, 0]),
    # the gradient of a kept weight does not count
    ([0.9, 0.1, 0.5, 0.0, 0.0], [1, 1, 1, 0, 0], [9.0, 0, 9.0, 0.2, 0.1], 1, [1, 0, 1, 1, 0]),
    # ties: the first of equal weights survives, the first of equal gradients grows
    ([0.5, 0.5, 0.5, 0.0, 0.0], [1, 1, 1, 0, 0], [0, 0, 0, 0.7, 0.7], 1, [1, 1, 0, 1, 0]),
    # nothing to do
    ([0.9, 0.1, 0.5, 0.0, 0.0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1], 0, [1, 1, 1, 0, 0]),
    # everything moves
    ([0.9, 0.1, 0.0, 0.0], [1, 1, 0, 0], [0, 0, 1, 1], 2, [0, 0, 1, 1]),
]


@pytest.mark.parametrize("weight, kept, gradient, count, want", TRUTH)
def test_drop_and_grow_truth_table(weight, kept, gradient, count, want):
    mask = torch.tensor(kept, dtype=torch.bool)[None]
    out = drop_and_grow(torch.tensor(weight)[None], mask, torch.tensor(gradient, dtype=torch.float)[None], count)
    assert out[0].int().tolist() == want


def test_blocks_move_as_a_whole():
    weight = torch.tensor([[3.0, 0.1, 0.0], [3.0, 0.1, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    gradient = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 0.0]])
    out = drop_and_grow(weight, mask, gradient, 1, se.Block((2, 1)))
    assert out.int().tolist() == [[1, 0, 1], [1, 0, 1]]


def problem(sparse: bool = False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 4))
    se.prune(model, sparsity=0.8, criterion="random", scope="layer", distribution="erk_kernel")
    if sparse:
        kept = se.masks(model)
        for index, kind in ((0, se.nn.SparseConv2d), (3, se.nn.SparseLinear)):
            model[index] = kind.from_dense(model[index], kept[f"{index}.weight"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return model, optimizer, torch.randn(12, 2, 5, 5), torch.arange(12) % 4


def run(model, optimizer, x, y, rewiring, steps):
    for step in range(1, steps + 1):
        if hasattr(rewiring, "prepare"):
            rewiring.prepare(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if not rewiring.update(step):
            optimizer.step()


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_counts_stay_and_grown_weights_start_at_zero_with_zero_state(method):
    model, optimizer, x, y = problem()
    counts = {name: int(mask.sum()) for name, mask in se.masks(model).items()}
    rewiring = DynamicMask(model, optimizer, total_steps=100, every=5, method=method)
    with hold_masks(model, optimizer):
        run(model, optimizer, x, y, rewiring, 4)
        before = {name: mask.clone() for name, mask in se.masks(model).items()}
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        momentum = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
        assert rewiring.update(5)
    moved = 0
    for name, mask in se.masks(model).items():
        parameter = dict(model.named_parameters())[name]
        buffer = optimizer.state[parameter]["momentum_buffer"]
        grown, stayed = mask & ~before[name], mask & before[name]
        moved += int(grown.sum())
        assert int(mask.sum()) == counts[name]
        assert (parameter[grown] == 0).all()
        assert (parameter[~mask] == 0).all()
        assert (buffer[grown] == 0).all()
        assert torch.equal(parameter[stayed], values[name][stayed])
        assert torch.equal(buffer[stayed], momentum[name][stayed])
    assert moved > 0
    assert moved == rewiring.moved


def test_growth_follows_the_dense_gradient():
    model, optimizer, x, y = problem()
    rewiring = DynamicMask(model, optimizer, total_steps=1000, every=1, fraction=0.3)
    before = {name: mask.clone() for name, mask in se.masks(model).items()}
    F.cross_entropy(model(x), y).backward()
    want = {
        name: drop_and_grow(p, before[name], p.grad.abs(), int(drop_fraction(1, 750) * int(before[name].sum())))
        for name, p in model.named_parameters()
        if name in before
    }
    rewiring.update(1)
    assert all(torch.equal(se.masks(model)[name], mask) for name, mask in want.items())


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_sparse_layers_move_like_masked_dense_ones(method):
    dense, sparse = problem(), problem(sparse=True)
    for model, optimizer, x, y in (dense, sparse):
        rewiring = DynamicMask(model, optimizer, total_steps=40, every=4, method=method)
        with hold_masks(model, optimizer):
            run(model, optimizer, x, y, rewiring, 20)
    for name, mask in se.masks(dense[0]).items():
        assert torch.equal(se.masks(sparse[0])[name], mask), name
    se.densify_(sparse[0])
    for a, b in zip(dense[0].parameters(), sparse[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", ["granet", "gradual"])
@pytest.mark.parametrize("options", [{}, {"scope": "layer", "distribution": "erk"}, {"ignore": ["0"]}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_sparse_layers_shrink_like_masked_dense_ones(make, options, kind):
    dense, sparse = problem(), problem(sparse=True)
    for model, _, x, y in (dense, sparse):
        optimizer = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        schedule = Cubic(0, 16, 4, initial=0.8)
        if make == "granet":
            rewiring = GraNet(model, optimizer, final=0.95, schedule=schedule, total_steps=20, **options)
        else:
            rewiring = GradualPruning(model, final=0.95, schedule=schedule, optimizer=optimizer, **options)
        values = [m.values for m in model.modules() if hasattr(m, "values")]
        with hold_masks(model, optimizer, mask_gradients=True):
            for step in range(1, 21):
                if make == "granet":
                    rewiring.prepare(step)
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if make == "gradual":
                    optimizer.step()
                    rewiring.update(step)
                elif not rewiring.update(step):
                    optimizer.step()
        # the parameters are the same objects, and so is their optimiser state
        assert [id(m.values) for m in model.modules() if hasattr(m, "values")] == list(map(id, values))
        for parameter in values:
            assert all(v.shape == parameter.shape for v in optimizer.state[parameter].values() if v.dim())
    for name, mask in se.masks(dense[0]).items():
        assert torch.equal(se.masks(sparse[0])[name], mask), name
    sizes = {
        name: mask.numel() for name, mask in se.masks(dense[0]).items() if "ignore" not in options or name[0] != "0"
    }
    kept = sum(int(se.masks(sparse[0])[name].sum()) for name in sizes)
    assert kept == round(0.05 * sum(sizes.values()))
    se.densify_(sparse[0])
    for a, b in zip(dense[0].parameters(), sparse[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_sparse_layers_cannot_shrink_by_is_named():
    model, optimizer, _, _ = problem(sparse=True)
    with pytest.raises(PruneError, match="pass optimizer="):
        GradualPruning(model, final=0.9, schedule=Cubic(0, 4, 2)).update(2)
    with pytest.raises(PruneError, match="'snip' looks at more than the weights"):
        GradualPruning(model, final=0.9, schedule=Cubic(0, 4, 2), criterion="snip", optimizer=optimizer).update(2)
    with pytest.raises(PruneError, match="matches no module"):
        GradualPruning(model, final=0.9, schedule=Cubic(0, 4, 2), optimizer=optimizer, ignore=["9"]).update(2)


def test_the_masks_rest_after_the_stop():
    model, optimizer, _, _ = problem()
    rewiring = DynamicMask(model, optimizer, total_steps=40, every=5, stop=0.5)
    assert [step for step in range(1, 41) if rewiring.due(step)] == [5, 10, 15]


def test_same_seed_same_masks():
    masks = []
    for _ in range(2):
        model, optimizer, x, y = problem()
        run(model, optimizer, x, y, DynamicMask(model, optimizer, total_steps=50, every=5, method="set", seed=3), 20)
        masks.append({name: mask.clone() for name, mask in se.masks(model).items()})
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_gradual_pruning_and_granet_reach_the_final_sparsity_exactly():
    for kind in ("gradual", "granet"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = Cubic(begin=0, end=30, every=5)
        pruning = (
            GradualPruning(model, final=0.9, schedule=schedule)
            if kind == "gradual"
            else GraNet(model, optimizer, final=0.9, schedule=schedule, total_steps=40)
        )
        sizes = []
        x, y = torch.randn(16, 10), torch.arange(16) % 4
        with hold_masks(model, optimizer):
            for step in range(1, 41):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if not (pruning.update(step) and kind == "granet"):
                    optimizer.step()
                sizes.append(sum(int(m.sum()) for m in se.masks(model).values()) or 280)
        assert sizes[-1] == round(0.1 * 280)
        assert sizes == sorted(sizes, reverse=True)


def test_movement_accumulates_along_the_path():
    model = nn.Linear(3, 2, bias=False)
    tracker = MovementTracker(model)
    want = torch.zeros(2, 3)
    for i in range(3):
        model.weight.grad = torch.full((2, 3), float(i + 1))
        tracker.observe()
        want -= model.weight.detach() * (i + 1)
    torch.testing.assert_close(tracker.total["weight"], want)
    copy.deepcopy(tracker).load_state_dict(tracker.state_dict())
    se.prune(model, sparsity=0.5, criterion=tracker.criterion())
    assert (se.masks(model)["weight"].flatten() == (want.flatten() >= want.flatten().sort().values[3])).all()


def test_misuse_is_named():
    model, optimizer, _, _ = problem()
    with pytest.raises(PruneError, match="no gradient"):
        DynamicMask(model, optimizer, total_steps=10, every=1).update(1)
    with pytest.raises(PruneError, match="'rigle'"):
        DynamicMask(model, optimizer, total_steps=10, method="rigle")
    with pytest.raises(PruneError, match="every=0"):
        DynamicMask(model, optimizer, total_steps=10, every=0)
