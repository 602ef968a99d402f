"""Every operator that the analysis has a rule for, in a network whose zeros are compacted away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.prune.structured import analyse, analysis, capture, compact
from sparse_engine.prune.structured.capture import operator_name

from .conftest import EveryOperator, OtherOperators, randomise_, zero_rows_

# what is done to (N, L, 6) between two linear layers; the last dimension is the layers' and stays
SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.sum(1),
    "prod": lambda h: h.prod(1),
    "var": lambda h: h.var(1),
    "std_mean": lambda h: torch.std_mean(h, 1)[0],
    "aminmax": lambda h: torch.aminmax(h, dim=1)[1],
    "median": lambda h: h.median(1)[0],
    "max": lambda h: h.max(1)[0],
    "min": lambda h: h.min(1)[0],
    "norm": lambda h: h.norm(dim=1),
    "linalg_vector_norm": lambda h: torch.linalg.vector_norm(h, dim=1),
    "any": lambda h: (h > 0).any(1).to(h),
    "all": lambda h: (h > 0).all(1).to(h),
    "argmax": lambda h: h.argmax(1).to(h),
    "argmin": lambda h: h.argmin(1).to(h),
    "argsort": lambda h: h.argsort(1).to(h),
    "cumprod": lambda h: h.cumprod(1),
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "log_softmax": lambda h: h.log_softmax(1),
    "softmin": lambda h: F.softmin(h, 1),
    "triu": lambda h: h.mT.unflatten(-1, (2, 2)).triu().flatten(2).mT,
    "dropout": lambda h: F.dropout(h, training=False),
    "alpha_dropout": lambda h: F.alpha_dropout(h, training=False),
    "feature_dropout": lambda h: F.dropout1d(h, training=False),
    "detach": lambda h: h.detach() + h,
    "clone": lambda h: h.clone(),
    "to": lambda h: h.to(torch.float64, copy=True),
    "type_as": lambda h: h.type_as(h.abs()),
    "zeros_like": lambda h: torch.maximum(torch.zeros_like(h), h),
    "ones_like": lambda h: torch.ones_like(h) + h,
    "full_like": lambda h: torch.full_like(h, 2.0) * h,
    "new_zeros": lambda h: h + h.new_zeros(4, 1),
    "new_ones": lambda h: h + h.new_ones(4, 1),
    "new_full": lambda h: h + h.new_full((4, 1), 0.5),
    "expand_as": lambda h: h[:, :1].expand_as(h) + h,
    "view_as": lambda h: h.contiguous().view_as(h),
    "adjoint": lambda h: torch.tanh(h.adjoint()).mT,
    "concatenate": lambda h: torch.concatenate([h, h.abs()], 1),
    "split": lambda h: torch.cat(h.split(3, -1)[::-1], -1),
    "index_put": lambda h: h.index_put((torch.tensor([1]),), torch.zeros((), dtype=h.dtype)),  # has no rule: stays
}
# one has no rule, the other's part size stands in the code
KEPT = ("index_put", "split")
# Spellings that an exported graph does not hold: export writes another, or the operator's value is random.
NEVER = frozenset([
    "_log_softmax", "_softmax", "_to_copy", "alias", "constant_pad_nd", "convolution", "double", "empty_like", "float",
    "grid_sampler_2d", "lift_fresh_copy", "native_channel_shuffle", "native_layer_norm", "new_empty", "norm",
    "rand_like", "softmin",
])  # fmt: skip


class Applied(nn.Module):
    """One operator between two layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.first, self.second = name, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(SINGLE[self.name](self.first(x)))


class EveryDecomposed(EveryOperator):
    """A write through a view makes export fall back to operators in their decomposed spelling."""

    def forward(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        image = image.clone()
        image[:, :1] += 1
        return super().forward(image, words)


def example(kind: type[nn.Module]) -> tuple[Tensor, ...]:
    if issubclass(kind, EveryOperator):
        return torch.randn(2, 3, 16, 16).double(), torch.randint(11, (2, 6))
    return torch.randn(2, 3, 8, 8).double(), torch.randn(2, 2, 4, 4, 4).double(), torch.randint(9, (2, 2))


def check(model: nn.Module, *inputs: Tensor) -> nn.Module:
    small = compact(model, inputs)
    others = tuple(torch.randn_like(x) * 2 if x.is_floating_point() else x for x in inputs)
    leaves = torch.utils._pytree.tree_leaves
    with torch.no_grad():
        for expected, got in zip(leaves(model(*others)), leaves(small(*others)), strict=True):
            assert got.shape == expected.shape
            assert float((got - expected).abs().max()) <= 1e-12 * max(float(expected.abs().max()), 1e-30)
    return small


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", [OtherOperators, EveryDecomposed])
def test_networks_of_many_operators(kind: type[nn.Module], seed: int):
    torch.manual_seed(seed)
    model = zero_rows_(randomise_(kind()), 0.5, seed).double()
    small = check(model, *example(kind))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SINGLE)
def test_one_operator(name: str):
    """Features 1 and 4 are read by nobody: they go wherever the operator has a rule, and nothing changes."""
    torch.manual_seed(0)
    model = randomise_(Applied(name)).double()
    model.first.weight.data[[1, 4]] = 0
    model.first.bias.data[[1, 4]] = 0
    model.second.weight.data[:, [1, 4]] = 0
    small = check(model, torch.randn(2, 4, 5).double())
    assert small.first.out_features == (6 if name in KEPT else 4)


def test_no_rule_is_left_out():
    """Every operator with a rule is run by one of these networks, and what is said never to be exported is not."""
    networks = [EveryOperator(), EveryDecomposed(), OtherOperators()]
    programs = [capture(randomise_(net).double(), example(type(net))) for net in networks]
    programs += [capture(Applied(name).double().eval(), torch.randn(2, 4, 5).double()) for name in SINGLE]
    reached = {operator_name(node) for program in programs for node in program.nodes}
    rules = {*analysis._RULES, *analysis._SAME, *analysis._REDUCTIONS, *analysis._RESHAPES}
    assert sorted(rules - reached) == sorted(NEVER)


def test_an_operator_without_a_rule_is_named():
    model = randomise_(Applied("index_put")).double()
    assert analyse(capture(model, torch.randn(2, 4, 5).double())).kept_whole == ["model: index_put"]
