"""Pruning to a target, and the costs that targets are about."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sparse_engine as se
from sparse_engine.errors import PruneError
from sparse_engine.prune.structured import Flops, Latency, Parameters, analyse, capture, compact, prune_channels
from sparse_engine.prune.structured.targets import nothing_removed, preferred_multiple, time_layer
from sparse_engine.train.stp import executable_time

from .conftest import EveryOperator, conv_bn, randomise_


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs)
    return counter.get_total_flops()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def network() -> nn.Module:
    return randomise_(
        nn.Sequential(
            conv_bn(3, 12),
            conv_bn(12, 16, 3, groups=4),
            conv_bn(16, 20, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(20, 5),
        )
    )


def test_flops_and_parameters_against_independent_counters():
    model, inputs = randomise_(EveryOperator()), (torch.randn(2, 3, 16, 16), torch.randint(11, (2, 6)))
    analysis = analyse(capture(model, inputs))
    everything = nothing_removed(analysis)
    assert Flops()(analysis, everything) == counted(model, *inputs)
    assert Parameters()(analysis, everything) == parameters(model)


@pytest.mark.parametrize("cost", ["flops", "parameters"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_target_is_met_and_nearly_used_up(cost: str, scope: str):
    model, x = network(), torch.randn(2, 3, 8, 8)
    before = counted(model, x) if cost == "flops" else parameters(model)
    report = prune_channels(model, x, target=0.5, cost=cost, scope=scope)
    small = compact(model, x)
    after = counted(small, x) if cost == "flops" else parameters(small)
    assert report.cost_before == before
    assert report.cost_after == after
    assert 0.35 * before < after <= 0.5 * before
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
    assert "0.0.weight" in str(report)


def test_what_goes_is_the_least_important():
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    model[0].weight.data.copy_(torch.arange(6.0, 0, -1)[:, None].expand(6, 4))
    prune_channels(model, torch.randn(1, 4), target=0.5, cost="parameters", criterion="l1")
    assert [bool(row.any()) for row in model[0].weight] == [True] * 2 + [False] * 4
    assert not model[2].weight[:, 2:].any()
    assert torch.equal(se.masks(model)["0.weight"], model[0].weight != 0)


def test_local_scope_takes_the_same_share_everywhere():
    model = network()
    model[0][0].weight.data.mul_(100)
    kept = prune_channels(model, torch.randn(1, 3, 8, 8), target=0.5, scope="local").kept
    shares = [have / total for have, total in kept.values()]
    assert max(shares) - min(shares) <= 0.26


def test_minimum_multiple_and_ignore():
    model = network()
    report = prune_channels(
        model, torch.randn(1, 3, 8, 8), target=0.8, cost="parameters", minimum=2, multiple=4, ignore=["0"]
    )
    assert set(report.kept) == {"2.0.weight"}
    assert report.kept["2.0.weight"][0] % 4 == 0
    with pytest.raises(PruneError, match="out of reach"):
        prune_channels(network(), torch.randn(1, 3, 8, 8), target=0.01)


def test_groups_that_the_code_cannot_shrink_are_left_alone():
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 12), nn.Linear(12, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(torch.relu(self.second(self.first(x).view(-1, 3, 4).flatten(1))))

    report = prune_channels(randomise_(Literal()), torch.randn(2, 4), target=0.7, cost="parameters")
    assert set(report.kept) == {"second.weight"}
    assert report.notes


def test_latency_target_follows_its_table():
    """With a made-up machine whose time is a known function of the sizes, the chosen network meets the limit on it."""

    def measure(layer: nn.Module, x: torch.Tensor) -> float:
        calls.append(layer)
        return layer.weight.shape[0] * layer.weight.shape[1] * 0.01 + 0.1

    calls: list[nn.Module] = []
    model, x = network(), torch.randn(1, 3, 8, 8)
    cost = Latency(measure=measure, rounding=4)
    analysis = analyse(capture(model, x))
    dense = cost(analysis, nothing_removed(analysis))
    measured = len(calls)
    cost(analysis, nothing_removed(analysis))
    assert len(calls) == measured  # the table remembers
    report = prune_channels(model, x, target=dense * 0.6, cost=cost)
    assert report.unit == "ms"
    assert 0.4 * dense < report.cost_after <= 0.6 * dense
    real = analyse(capture(compact(model, x), x))
    assert Latency(measure=measure, rounding=1)(real, nothing_removed(real)) == pytest.approx(
        report.cost_after, rel=0.05
    )


def test_a_latency_target_is_met_by_the_whole_network():
    """A network takes longer than its layers: what counts is its own time, measured on what is left."""

    def layer(module: nn.Module, x: torch.Tensor) -> float:
        return module.weight.numel() * 1e-3

    def whole(model: nn.Module, x: torch.Tensor) -> float:
        timed.append(sum(layer(m, x) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)) * 1.7 + 0.3)
        return timed[-1]

    timed: list[float] = []
    layers = [nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Conv2d(32, 2, 1)]
    model, x = randomise_(nn.Sequential(*layers)), torch.randn(1, 3, 8, 8)
    dense = whole(model, x)
    report = prune_channels(model, x, target=0.5 * dense, cost=Latency(measure=layer, whole=whole, rounding=1))
    assert 0.9 * 0.5 * dense <= report.measured <= 0.5 * dense
    assert (report.cost_before, report.cost_after) == (dense, report.measured)
    assert whole(compact(model, x), x) == pytest.approx(report.measured)
    with pytest.raises(PruneError, match=r"none of 6 networks met|out of reach"):
        prune_channels(network(), x, target=0.31, cost=Latency(measure=layer, whole=whole))


@pytest.mark.parametrize("likes", [1, 4, 8])
def test_rounding_follows_what_the_kernels_like(likes: int):
    """On a machine whose time goes up in steps of so many channels, groups keep multiples of that, and nothing else."""

    def clock(layer: nn.Module, x: torch.Tensor) -> float:
        whole = [-(-size // likes) * likes for size in layer.weight.shape[:2]]
        return whole[0] * whole[1] * x.shape[-1] * 1e-4 + 0.1

    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 48, 3),
        nn.ReLU(),
        nn.Conv2d(48, 64, 3),
        nn.ReLU(),
        nn.Conv2d(64, 96, 1),
        nn.Conv2d(96, 2, 1),
    ]
    model, x = randomise_(nn.Sequential(*layers)), torch.randn(1, 3, 12, 12)
    assert preferred_multiple(analyse(capture(model, x)), Latency(measure=clock)) == likes
    report = prune_channels(model, x, target=0.4, multiple=Latency(measure=clock))
    assert report.multiple == likes
    assert all(kept % likes == 0 for kept, _ in report.kept.values())
    assert report.cost_after <= 0.4 * report.cost_before
    real = Latency(measure=executable_time)
    assert preferred_multiple(
        analyse(capture(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)).eval(), x[0, 0, :, :6])), real
    )
    assert real.table


def test_time_layer_returns_milliseconds():
    assert 0 < time_layer(nn.Linear(4, 4), torch.randn(1, 4), runs=3) < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "above 0"),
        ({"target": 1.5}, "at most 1"),
        ({"target": 0.5, "scope": "some"}, "'global' or 'local'"),
        ({"target": 0.5, "cost": "joules"}, "parameters, flops, latency"),
        ({"target": 0.5, "minimum": 0}, "1 or more"),
    ],
)
def test_errors(options: dict, message: str):
    with pytest.raises(PruneError, match=message):
        prune_channels(network(), torch.randn(1, 3, 8, 8), **options)
