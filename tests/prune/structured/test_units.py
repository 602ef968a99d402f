"""Removal units and the criteria that rank them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparse_engine.errors import PruneError
from sparse_engine.prune.structured import analyse, capture, channel_scores, compact, find_groups, removal, zero_units_
from sparse_engine.prune.structured.units import Group

from .conftest import EveryOperator, Shuffle, conv_bn, randomise_


def groups_of(model: nn.Module, *inputs: torch.Tensor) -> list[Group]:
    return find_groups(analyse(capture(model, inputs)))


def chain() -> nn.Module:
    return randomise_(
        nn.Sequential(
            conv_bn(3, 6),
            nn.Conv2d(6, 8, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(8, 5, 1),
            nn.Flatten(),
            nn.Linear(5 * 16, 2),
        )
    )


def test_groups_of_a_chain():
    found = {group.name: (len(group), group.kind) for group in groups_of(chain(), torch.randn(1, 3, 4, 4))}
    assert found == {
        "0.0.weight": (2, "channels"),
        "3.weight": (5, "channels"),
    }  # the grouped convolution goes by groups


def test_members_of_a_group():
    groups = groups_of(chain(), torch.randn(1, 3, 4, 4))
    last = {(m.name, m.dim): (m.index.shape, m.produces) for m in groups[1].members}
    assert last == {("3.weight", 0): ((5, 1), True), ("3.bias", 0): ((5, 1), False), ("5.weight", 1): ((5, 16), False)}


def test_heads_are_units():
    groups = groups_of(randomise_(EveryOperator()), torch.randn(2, 3, 16, 16), torch.randint(11, (2, 6)))
    heads = {group.name: len(group) for group in groups if group.kind == "heads"}
    assert heads == {"attention.qkv.weight": 3, "gqa.q.weight": 3, "torch_attention.in_proj_weight": 4}


def test_a_shuffle_ties_both_halves():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 1), Shuffle(8), nn.Conv2d(8, 2, 1)))
    groups = groups_of(model, torch.randn(1, 3, 4, 4))
    assert "1.branch.0.0.weight" in {group.name for group in groups}
    for group in groups:
        gone = [np.zeros(len(g), dtype=bool) for g in groups]
        gone[groups.index(group)][0] = True
        zeroed = randomise_(nn.Sequential(nn.Conv2d(3, 8, 1), Shuffle(8), nn.Conv2d(8, 2, 1)))
        zero_units_(zeroed, groups, gone)
        small = compact(zeroed, torch.randn(1, 3, 4, 4))
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in zeroed.parameters())


@pytest.mark.parametrize("seed", range(2))
def test_random_units_zeroed_then_compacted(seed: int):
    """The property that everything rests on: what is zeroed as units can be removed, all of it, and nothing changes."""
    torch.manual_seed(seed)
    model = randomise_(EveryOperator()).double()
    inputs = (torch.randn(2, 3, 16, 16).double(), torch.randint(11, (2, 6)))
    analysis = analyse(capture(model, inputs))
    groups = find_groups(analysis)
    generator = np.random.default_rng(seed)
    gone = []
    for group in groups:
        vector = generator.random(len(group)) < 0.5
        vector[generator.integers(len(group))] = False
        gone.append(vector)
    zero_units_(model, groups, gone)
    small = compact(model, inputs)
    removed = removal(analysis, groups, gone)
    for name, tensor in small.named_parameters():
        kept = [int((~removed[axis]).sum()) for axis in analysis.tensor_axes(name)]
        assert all(have <= allowed for have, allowed in zip(tensor.shape, kept, strict=True)), name
    with torch.no_grad():
        for a, b in zip(model(*inputs).values(), small(*inputs).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_ignore_and_its_error():
    analysis = analyse(capture(chain(), torch.randn(1, 3, 4, 4)))
    assert [group.name for group in find_groups(analysis, ["3"])] == ["0.0.weight"]
    with pytest.raises(PruneError, match="'nine'"):
        find_groups(analysis, ["nine"])


def test_criteria_against_their_definitions():
    model = randomise_(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)))
    groups = groups_of(model, torch.randn(2, 4))
    weight = model[0].weight.detach().double()

    def scores(criterion: str, **options: object) -> torch.Tensor:
        return channel_scores(model, groups, criterion, normaliser="none", **options)[0]

    torch.testing.assert_close(scores("l1"), weight.abs().mean(1))
    torch.testing.assert_close(scores("l2"), weight.square().mean(1).sqrt())
    torch.testing.assert_close(scores("bn_scale"), model[1].weight.detach().double().abs())
    torch.testing.assert_close(scores("geometric_median"), torch.cdist(weight, weight).mean(1))
    assert torch.equal(scores("random", seed=3), scores("random", seed=3))
    assert not torch.equal(scores("random", seed=3), scores("random", seed=4))


def test_taylor_is_the_first_order_effect_of_removal():
    """Against the derivative of the loss in a factor on everything that a unit owns."""
    torch.manual_seed(1)
    model = randomise_(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))).double()
    groups = groups_of(model, torch.randn(2, 4).double())
    batches = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(2)]

    def slope(unit: int, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        factor = torch.ones(5, dtype=torch.double, requires_grad=True)
        state = {"0.weight": model[0].weight * factor[:, None], "0.bias": model[0].bias * factor}
        state |= {"1.weight": model[1].weight * factor, "1.bias": model[1].bias * factor}
        loss = nn.functional.cross_entropy(torch.func.functional_call(model, state, (batch[0],)), batch[1])
        return float(torch.autograd.grad(loss, factor)[0][unit])

    each = torch.tensor([[slope(unit, batch) for batch in batches] for unit in range(5)])
    taylor = channel_scores(model, groups, "taylor", normaliser="none", data=batches)[0]
    torch.testing.assert_close(taylor.float(), each.mean(1).square())
    fisher = channel_scores(model, groups, "fisher", normaliser="none", data=batches)[0]
    torch.testing.assert_close(fisher.float(), each.square().mean(1))


def test_hessian_is_the_second_order_effect_of_removal():
    """Against the full Hessian in the factors: exact for few units, and by probes where the Hessian is diagonal."""
    torch.manual_seed(2)
    model = randomise_(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    groups = groups_of(model, torch.randn(2, 4).double())
    batches = [(torch.randn(6, 4).double(), torch.randint(3, (6,))) for _ in range(2)]
    expected = torch.zeros(5, dtype=torch.double)
    for x, y in batches:

        def loss(factor: torch.Tensor, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            state = {"0.weight": model[0].weight * factor[:, None], "0.bias": model[0].bias * factor}
            return nn.functional.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

        ones = torch.ones(5, dtype=torch.double)
        curvature, slope = torch.func.hessian(loss)(ones).diagonal(), torch.func.grad(loss)(ones)
        expected += (curvature / 2 - slope) / 2
    scores = channel_scores(model, groups, "hessian", normaliser="none", data=batches)[0]
    torch.testing.assert_close(scores, expected.abs())

    wide = randomise_(nn.Sequential(nn.Linear(4, 50), nn.Linear(50, 50, bias=False))).double()
    wide[1].weight.data.copy_(torch.eye(50))
    groups, x = groups_of(wide, torch.randn(2, 4).double()), torch.randn(6, 4).double()
    scores = channel_scores(
        wide, groups, "hessian", normaliser="none", data=(x, x), loss=lambda outputs, _: outputs.square().sum()
    )[0]
    torch.testing.assert_close(scores, wide(x).square().sum(0).detach())  # g = 2 Σ y², h = 2 Σ y²


def test_scoring_leaves_the_model_alone():
    model = randomise_(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))).train()
    groups = groups_of(model.eval(), torch.randn(2, 4))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    channel_scores(model, groups, "taylor", data=(torch.randn(6, 4), torch.randint(3, (6,))))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("normaliser", "expected"),
    [("none", [1.0, 2, 3]), ("mean", [0.5, 1, 1.5]), ("max", [1 / 3, 2 / 3, 1]), ("sum", [1 / 6, 2 / 6, 3 / 6])],
)
def test_normalisers(normaliser: str, expected: list[float]):
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
    model[0].weight.data.copy_(torch.tensor([[1.0], [2], [3]]))
    scores = channel_scores(model, groups_of(model, torch.randn(2, 1)), "l1", normaliser=normaliser)[0]
    assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reduction", "expected"), [("mean", 3.0), ("sum", 6.0), ("max", 4.0), ("product", 8**0.5), ("first", 2.0)]
)
def test_reductions(reduction: str, expected: float):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False), nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    model = Sum()
    model.a.weight.data.fill_(2.0)
    model.b.weight.data.fill_(-4.0)
    scores = channel_scores(model, groups_of(model, torch.randn(2, 1)), "l1", normaliser="none", reduction=reduction)[0]
    assert scores.tolist() == pytest.approx([expected, expected])


def test_errors_of_the_criteria():
    model = randomise_(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    groups = groups_of(model, torch.randn(2, 4))
    with pytest.raises(PruneError, match="l1, l2"):
        channel_scores(model, groups, "biggest")
    with pytest.raises(PruneError, match="needs data"):
        channel_scores(model, groups, "taylor")
    with pytest.raises(PruneError, match="bn_scale"):
        channel_scores(model, groups, "bn_scale")
    for criterion in ("fisher", "hessian"):
        with pytest.raises(PruneError, match="without a single batch"):
            channel_scores(model, groups, criterion, data=[])
    with pytest.raises(PruneError, match="needs data"):
        channel_scores(model, groups, "hessian")
