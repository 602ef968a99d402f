"""The passes: what each one does, and that none of them changes what a graph computes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparse_engine.convert.api import relative_error
from sparse_engine.convert.capture import capture
from sparse_engine.convert.graph import Dim, Graph
from sparse_engine.convert.passes import optimise
from sparse_engine.convert.passes.constancy import dimension_groups, find_facts


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def check(model: nn.Module, *shape: int, bound: float = 1e-10) -> Graph:
    """Optimise in double precision, compare, and return the optimised graph."""
    model = model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_()
    captured = capture(model, (torch.randn(*shape),))
    assert captured.reasons == {}
    graph = captured.graph.to(torch.float64)
    optimised = optimise(graph)
    for batch in (1, 3):
        x = torch.randn(batch, *shape[1:], dtype=torch.float64)
        for expected, found in zip(graph.run([x]), optimised.run([x]), strict=True):
            assert relative_error(found, expected) <= bound
    return optimised


def kill_(layer: nn.Module, *rows: int) -> nn.Module:
    """Remove whole output channels, as pruning does: weights only, the bias stays."""
    with torch.no_grad():
        layer.weight[list(rows)] = 0
    return layer


class Block(nn.Module):
    """activation(norm(conv(x)) + x), written as models write it."""

    def __init__(self, channels: int, activation: Any = functional.relu) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)) + x)


# ---- folding and fusion


def test_batch_norm_folds_into_the_operator_before() -> None:
    graph = check(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), 2, 4, 6, 6)
    assert [node.op for node in graph.nodes] == ["conv2d"]
    assert graph.nodes[0].attrs["activation"] == {"kind": "relu"}
    graph = check(nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.GELU()), 2, 4)
    assert [node.op for node in graph.nodes] == ["linear"]
    assert "bias" in graph.nodes[0].params


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_batch_norm_folds_into_the_operator_after_where_no_padding_is_between(groups: int) -> None:
    for padding, expected in ((0, 1), (1, 2)):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=padding, groups=groups))
        assert len(check(model, 2, 4, 6, 6).nodes) == expected


def test_a_scale_without_shift_folds_through_padding() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4, affine=False)
            self.conv = nn.Conv2d(4, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x))

    model = Scaled().eval()
    graph = capture(model, (torch.randn(2, 4, 5, 5),)).graph.to(torch.float64)
    assert graph.nodes[0].op == "affine"
    graph.constants[graph.nodes[0].params["scale"]].uniform_(0.5, 2)
    assert not graph.constants[graph.nodes[0].params["shift"]].any()
    optimised = optimise(graph)
    assert [node.op for node in optimised.nodes] == ["conv2d"]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert relative_error(optimised.run([x])[0], graph.run([x])[0]) <= 1e-12


def test_chains_of_scales_and_numbers_fold() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return (1 - self.norm(self.conv(x) * 2 + 0.5) / 3) * self.scale - self.scale

    assert [node.op for node in check(Chain(), 2, 3, 4, 4).nodes] == ["conv2d"]


def test_layer_scale_behind_a_permute_folds_and_the_residual_fuses() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale

    graph = check(Scaled(), 2, 4, 3, 3)
    assert set(ops(graph)) == {"linear", "permute"}


def test_residual_and_activation_fuse_in_the_right_order() -> None:
    graph = check(Block(4), 2, 4, 5, 5)
    assert [node.op for node in graph.nodes] == ["conv2d"]
    assert len(graph.nodes[0].inputs) == 2


def test_an_activation_before_the_addition_stays_before_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu() + x

    assert ops(check(Model(), 2, 4, 5, 5)) == {"conv2d": 1, "binary": 1}


def test_a_result_that_is_read_twice_is_not_fused_away() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.cat([y, self.norm(y), (y + x).relu(), y + y], 1)

    graph = check(Model(), 2, 4, 5, 5)
    assert ops(graph)["conv2d"] == 1
    assert "affine" in ops(graph)


def test_of_two_operators_that_are_added_one_takes_the_other() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + self.b(x)).relu()

    graph = check(Model(), 2, 4, 5, 5)
    assert ops(graph) == {"conv2d": 2}
    assert len(graph.nodes[1].inputs) == 2
    assert graph.nodes[1].attrs["activation"] == {"kind": "relu"}


def test_a_broadcast_addition_is_no_residual() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x.mean((2, 3), keepdim=True)

    assert ops(check(Model(), 2, 4, 5, 5)) == {"conv2d": 1, "reduce": 1, "binary": 1}


def test_shared_weights_are_folded_for_each_use() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.conv(self.first(self.conv(x)).relu()))

    graph = check(Model(), 2, 4, 5, 5)
    assert ops(graph) == {"conv2d": 2}
    assert len(graph.constants) == 4


# ---- functions that are spelled out

SPELLED = {
    "hardswish": lambda x: x * functional.relu6(x + 3) / 6,
    "hardswish inside": lambda x: x * (functional.relu6(x + 3) / 6),
    "hardswish by a factor": lambda x: (x * (x + 3).clamp(0, 6)) * (1 / 6),
    "hardswish by hardsigmoid": lambda x: functional.hardsigmoid(x) * x,
    "hardsigmoid": lambda x: functional.relu6(x + 3) / 6,
    "hardsigmoid clamped": lambda x: (x / 6 + 0.5).clamp(0, 1),
    "silu": lambda x: x * x.sigmoid(),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu other order": lambda x: x * (torch.erf(x * math.sqrt(0.5)) + 1) * 0.5,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    "gelu_tanh by products": lambda x: 0.5 * x * (1 + (0.7978845608028654 * (x + 0.044715 * x * x * x)).tanh()),
}


def spell(function: Any) -> nn.Module:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.conv(x))

    return Spelled()


@pytest.mark.parametrize("name", SPELLED)
def test_spelled_out_activations_become_one(name: str) -> None:
    graph = check(spell(SPELLED[name]), 2, 3, 4, 4, bound=1e-6 if "gelu" in name else 1e-10)
    assert [node.op for node in graph.nodes] == ["conv2d"]
    assert graph.nodes[0].attrs["activation"]["kind"] == name.split()[0]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * functional.relu6(x + 2.9) / 6,
        lambda x: x * functional.relu6(x + 3) / 5,
        lambda x: x * (x * 1.1).sigmoid(),
        lambda x: 0.4 * x * (1 + torch.erf(x / math.sqrt(2))),
        lambda x: x * functional.relu6(x.exp() + 3) / 6,
    ],
)
def test_lookalikes_are_left_alone(function: Any) -> None:
    assert len(check(spell(function), 2, 3, 4, 4).nodes) > 1


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_recognised(masked: bool) -> None:
    mask = torch.randn(4, 4)

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.unbind(2)  # [N, L, 3, D]
            scores = (q * 0.7) @ k.transpose(-2, -1) / 3
            return (scores + mask if masked else scores).softmax(-1) @ v

    graph = check(Attention(), 2, 4, 3, 5)
    assert ops(graph)["attention"] == 1
    assert ops(graph)["matmul"] == ops(graph)["softmax"] == 0
    node = next(node for node in graph.nodes if node.op == "attention")
    assert node.attrs["scale"] == pytest.approx(0.7 / 3)


def test_softmax_over_another_dimension_is_no_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(-2, -1)).softmax(-2) @ x

    assert ops(check(Attention(), 2, 4, 4))["attention"] == 0


# ---- simplification


def test_neutral_and_repeated_nodes_disappear() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = (x * 1 + 0).permute(0, 2, 1).permute(0, 2, 1).reshape(-1, 2, 6).reshape(x.shape[0], 3, 4)
            return torch.cat([y[:, 0:3], y.exp(), y.exp()], 1)[:, 1:][:, 1:8:2]

    graph = check(Model(), 2, 3, 4)
    assert ops(graph) == {"unary": 1, "concat": 1, "slice": 1}


def test_rows_are_not_merged_and_split_around_a_linear_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.transpose(0, 1).reshape(-1, 6)
            return self.linear(rows).view(4, x.shape[0], 5).transpose(0, 1)

    graph = check(Model(), 2, 4, 6)
    assert [node.op for node in graph.nodes] == ["permute", "linear", "permute"]


# ---- dead channels


def test_dead_channels_go_through_bias_norm_and_activation() -> None:
    model = nn.Sequential(
        kill_(nn.Conv2d(3, 8, 3), 1, 4, 6), nn.BatchNorm2d(8), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1)
    )
    graph = check(model, 2, 3, 8, 8)
    assert graph.values[graph.nodes[0].output].shape == (Dim(1), 5, 6, 6)


def test_a_constant_that_padding_would_cut_keeps_its_channel() -> None:
    for activation, channels in ((nn.Sigmoid(), 8), (nn.ReLU(), 7)):
        conv = kill_(nn.Conv2d(3, 8, 3), 2)
        with torch.no_grad():
            conv.bias[2] = -1.0  # relu makes it 0, which padding does not change
        graph = check(nn.Sequential(conv, activation, nn.Conv2d(8, 5, 3, padding=1)), 2, 3, 8, 8)
        assert graph.values[graph.nodes[0].output].shape[1] == channels


def test_columns_that_nobody_reads_remove_rows_upstream() -> None:
    last = nn.Conv2d(8, 5, 1)
    with torch.no_grad():
        last.weight[:, [0, 3]] = 0
    graph = check(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=8), last), 2, 3, 4, 4)
    assert [graph.values[node.output].shape[1] for node in graph.nodes] == [6, 6, 5]
    assert graph.nodes[1].attrs["groups"] == 6


def test_removal_is_repeated_until_nothing_changes() -> None:
    """A dead channel in the last layer but one makes one dead before it, and so on to the first."""
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 1)]
    for _ in range(3):
        layer = nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            layer.weight.mul_(torch.eye(4)[:, :, None, None])
        layers += [nn.ReLU(), layer]
    head = nn.Conv2d(4, 2, 1)
    with torch.no_grad():
        head.weight[:, 1] = 0
    graph = check(nn.Sequential(*layers, nn.ReLU(), head), 2, 3, 4, 4)
    assert [graph.values[node.output].shape[1] for node in graph.nodes] == [3, 3, 3, 3, 2]


def test_channels_of_a_residual_sum_stay_while_one_side_needs_them() -> None:
    stem, block, head = nn.Conv2d(3, 6, 1), Block(6), nn.Conv2d(6, 4, 1)
    kill_(block.conv, 0, 1)
    graph = check(nn.Sequential(stem, block, head), 2, 3, 5, 5)
    assert graph.values[graph.nodes[0].output].shape[1] == 6
    kill_(stem, 0)
    with torch.no_grad():
        stem.bias[0] = 0
        stem.bias[1] = 0.5
    graph = check(nn.Sequential(stem, block, head), 2, 3, 5, 5)
    assert graph.values[graph.nodes[0].output].shape[1] == 5


def test_channels_are_followed_through_concatenation_flattening_and_gates() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = kill_(nn.Conv2d(3, 6, 1), 0, 2), kill_(nn.Conv2d(3, 4, 1), 3)
            self.squeeze, self.excite = nn.Conv2d(10, 3, 1), nn.Conv2d(3, 10, 1)
            self.head = nn.Linear(10 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.a(x), self.b(x)], 1).relu()
            gate = self.excite(self.squeeze(functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
            return self.head((x * gate).flatten(1))

    model = Model()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.bias.clamp_(max=0)
    graph = check(model, 2, 3, 4, 4)
    linear = next(node for node in graph.nodes if node.op == "linear")
    assert graph.constants[linear.params["weight"]].shape == (5, 7 * 16)


def test_dead_channels_behind_a_reshape_that_cannot_be_followed_stay() -> None:
    model = nn.Sequential(kill_(nn.Conv2d(3, 8, 1), 2), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1))
    graph = check(model, 2, 3, 4, 4)
    assert graph.values[graph.nodes[0].output].shape[1] == 8
    weight = graph.constants[graph.nodes[-1].params["weight"]]
    assert not weight[:, 4].any()  # but nobody reads it: channel 2 is the fifth after shuffling


def test_a_layer_without_weights_keeps_one_channel() -> None:
    conv = nn.Conv2d(3, 4, 1)
    with torch.no_grad():
        conv.weight.zero_()
    graph = check(nn.Sequential(conv, nn.Sigmoid(), nn.Conv2d(4, 2, 1)), 2, 3, 4, 4)
    assert graph.values[graph.nodes[-1].output].shape[1] == 2


def test_outputs_keep_their_channels() -> None:
    graph = check(kill_(nn.Conv2d(3, 4, 1), 1), 2, 3, 4, 4)
    assert graph.values[graph.outputs[0]].shape[1] == 4


def test_facts_are_true() -> None:
    """Everything that is said to be constant is constant, on random inputs."""
    model = nn.Sequential(
        kill_(nn.Conv2d(3, 8, 3, padding=1), 1, 2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AvgPool2d(3, 1, 1),
        nn.ChannelShuffle(4),
        nn.Flatten(2),
        nn.ConstantPad1d(1, 0.0),
    ).eval()
    graph = capture(model, (torch.randn(2, 3, 5, 5),)).graph.to(torch.float64)
    facts = find_facts(graph)
    assert len(facts) >= 6
    every = graph.copy()
    every.outputs = list(facts)
    for x in (torch.randn(3, 3, 5, 5, dtype=torch.float64), torch.zeros(2, 3, 5, 5, dtype=torch.float64)):
        for name, result in zip(facts, every.run([x]), strict=True):
            fact = facts[name]
            known = fact.known.expand(result.shape)
            assert known.any()
            assert torch.allclose(result[known], fact.number.expand(result.shape)[known], atol=1e-12)


def test_dimension_groups() -> None:
    assert dimension_groups((Dim(1), 8, 7, 7), (Dim(1), 392)) == [([0], [0]), ([1, 2, 3], [1])]
    assert dimension_groups((Dim(1), 8, 1, 1), (Dim(1), 8)) == [([0], [0]), ([1], [1]), ([2, 3], [])]
    assert dimension_groups((Dim(4), 6), (Dim(1), 4, 6)) == [([0], [0, 1]), ([1], [2])]
    assert dimension_groups((2, 6), (3, 4)) == [([0, 1], [0, 1])]
    assert dimension_groups((2, 6), (5,)) is None


# ---- random networks


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """A random convolutional network with dead rows and columns, residuals, gates, concatenations and a head."""
    seed = draw(st.integers(0, 2**31))
    depth = draw(st.integers(2, 6))
    kinds = [
        draw(
            st.sampled_from(
                ["conv", "pointwise", "strided", "depthwise", "grouped", "norm", "activation", "pool", "average"]
                + ["residual", "concat", "gate", "permuted"]
            )
        )
        for _ in range(depth)
    ]
    activations = [draw(st.sampled_from(["relu", "sigmoid", "hardswish", "gelu", "none"])) for _ in range(depth)]
    head = draw(st.sampled_from(["flatten", "mean", "none"]))
    share = draw(st.sampled_from([0.0, 0.3, 0.7]))
    return Network(seed, list(zip(kinds, activations, strict=True)), head, share)


class Network(nn.Module):
    def __init__(self, seed: int, steps: list[tuple[str, str]], head: str, share: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.steps, self.head_kind = steps, head
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList()
        channels = 4
        for kind, _ in steps:
            layer: nn.Module = nn.Identity()
            if kind in ("conv", "residual"):
                layer = nn.Conv2d(channels, channels if kind == "residual" else 6, 3, padding=1, bias=kind == "conv")
            elif kind == "strided":
                layer = nn.Conv2d(channels, 6, (2, 3), stride=(1, 2), padding=(1, 1))
            elif kind in ("pointwise", "gate", "concat"):
                layer = nn.Conv2d(channels, channels if kind == "gate" else 4, 1)
            elif kind == "depthwise":
                layer = nn.Conv2d(channels, channels, 3, padding=int(torch.randint(2, ())), groups=channels)
            elif kind == "grouped":
                layer = nn.Conv2d(channels, channels, 1, groups=2)
            elif kind == "norm":
                layer = nn.BatchNorm2d(channels)
            elif kind == "permuted":
                layer = nn.Linear(channels, channels)
            elif kind == "pool":
                layer = nn.MaxPool2d(3, 1, 1)
            elif kind == "average":
                layer = nn.AvgPool2d(3, 1, 1, count_include_pad=bool(torch.randint(2, ())))
            self.layers.append(layer)
            channels = {"conv": 6, "strided": 6, "pointwise": 4, "concat": channels + 4}.get(kind, channels)
        self.last = nn.Conv2d(channels, 3, 1)
        self.mean_head = nn.Linear(3, 2)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.weight *= torch.rand_like(module.weight) > 0.4
                    module.weight[torch.rand(module.weight.shape[0]) < share] = 0
                    if module.bias is not None:
                        module.bias[torch.rand_like(module.bias) < 0.5] = 0
                    if module.weight.shape[1] > 1:
                        module.weight[:, torch.rand(module.weight.shape[1]) < share / 2] = 0
                elif isinstance(module, nn.BatchNorm2d):
                    module.weight[torch.rand_like(module.weight) < share] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for (kind, activation), layer in zip(self.steps, self.layers, strict=True):
            if kind == "residual":
                x = layer(x) + x
            elif kind == "concat":
                x = torch.cat([x, layer(x)], 1)
            elif kind == "gate":
                x = x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
            elif kind == "permuted":
                x = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            else:
                x = layer(x)
            x = x if activation == "none" else getattr(functional, activation)(x)
        x = self.last(x)
        if self.head_kind == "flatten":
            return x.flatten(1)
        return self.mean_head(x.mean((2, 3))) if self.head_kind == "mean" else x


@settings(max_examples=20)
@given(networks())
def test_random_networks_are_unchanged(model: nn.Module) -> None:
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    captured = capture(model, (torch.randn(2, 3, 7, 6),))
    graph = captured.graph.to(torch.float64)
    optimised = optimise(graph)
    x = torch.randn(3, 3, 7, 6, dtype=torch.float64)
    assert relative_error(optimised.run([x])[0], graph.run([x])[0]) <= 1e-10
    assert optimised.bytes() <= graph.bytes() + 1024  # folded biases may be new


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Channels in two groups, dealt out in turns; twice is the order of before where there are four."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    "rearranged",
    [
        lambda x: x.flatten(2).view(x.shape),
        lambda x: shuffled(shuffled(x)),
        lambda x: x.transpose(1, 2).transpose(1, 2),
        lambda x: x * 1 + 0,
    ],
)
def test_an_output_that_is_an_input_after_all_ends(rearranged) -> None:
    """There is nothing left to remove: an output cannot take an input's name."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rearranged(x), self.conv(x)

    model, x = Model().eval(), torch.randn(2, 4, 5, 6)
    graph = optimise(capture(model, (x,)).graph)
    for found, expected in zip(graph.run([x]), model(x), strict=True):
        torch.testing.assert_close(found, expected.detach())
