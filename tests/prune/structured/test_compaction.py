"""Masked output = compacted output, and what goes and what stays."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine.errors import CaptureError, PruneError
from sparse_engine.prune.structured import compact, compaction_spec
from sparse_engine.prune.structured.attention import CompactMultiheadAttention

from .conftest import Attention, EveryOperator, GroupedQueryAttention, Shuffle, conv_bn, randomise_, zero_rows_


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model(*inputs))


def check(model: nn.Module, *inputs: Tensor, **options: object) -> nn.Module:
    """Compact in float64 and compare on other inputs of the same kind; the bound is float64 rounding."""
    model = model.double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    small = compact(model, inputs, **options)
    others = tuple(torch.randn_like(x) * 2 if x.is_floating_point() else x for x in inputs)
    for expected, got in zip(outputs(model, *others), outputs(small, *others), strict=True):
        assert got.shape == expected.shape
        assert float((got - expected).abs().max()) <= 1e-12 * max(float(expected.abs().max()), 1e-30)
    assert type(small) is type(model)
    return small


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("seed", range(2))
def test_every_operator(seed: int):
    torch.manual_seed(seed)
    model = zero_rows_(randomise_(EveryOperator()), 0.5, seed)
    small = check(model, torch.randn(2, 3, 16, 16), torch.randint(11, (2, 6)))
    assert size(small) < size(model)


def test_float32_stays_within_the_bound():
    model = zero_rows_(randomise_(EveryOperator()), 0.5, 7)
    inputs = (torch.randn(2, 3, 16, 16), torch.randint(11, (2, 6)))
    small = compact(model, inputs)
    for expected, got in zip(outputs(model, *inputs), outputs(small, *inputs), strict=True):
        assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.Hardswish()])
def test_constants_go_into_the_next_bias(bias: bool, activation: nn.Module):
    """A zero row yields its bias, batch norm makes of it another constant, the activation too; all must arrive."""
    model = randomise_(
        nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5), activation, nn.Conv2d(5, 4, 3, bias=bias))
    )
    model[0].weight.data[[0, 3, 4]] = 0
    small = check(model, torch.randn(2, 3, 9, 9))
    assert small[0].weight.shape == (2, 3, 3, 3)
    assert small[1].num_features == 2
    assert (small[3].in_channels, small[3].out_channels) == (2, 4)
    assert small[3].bias is not None  # the constants need one
    assert compaction_spec(small).biases == ({} if bias else {"3": 4})


def test_batch_norm_with_scale_zero_is_a_constant():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)))
    model[1].weight.data[1:4] = 0
    assert check(model, torch.randn(1, 3, 8, 8))[0].weight.shape[0] == 3


def test_zero_padding_keeps_a_channel_whose_constant_is_not_zero():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1)))
    model[0].weight.data[:2] = 0
    model[0].bias.data[:2] = torch.tensor([0.7, -0.7])  # after ReLU: 0.7 varies at the border, 0 does not
    small = check(model, torch.randn(1, 3, 8, 8))
    assert small[0].weight.shape[0] == 3
    model[2].weight.data[:, 0, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # only the centre tap is left
    assert check(model, torch.randn(1, 3, 8, 8))[0].weight.shape[0] == 2


def test_a_constant_that_varies_stays_even_where_everything_behind_it_is_known():
    """Row 0 of the padded convolution reads only a constant: what follows is known, but not the same everywhere."""
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1)
    )
    randomise_(model)
    model[0].weight.data[0] = 0
    model[1].weight.data[0, 1:] = 0
    small = check(model, torch.randn(1, 3, 6, 6))
    assert small[0].out_channels == 3
    assert small[1].in_channels == 3


def test_reflection_padding_does_not_vary():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")))
    model[0].weight.data[:2] = 0
    assert check(model, torch.randn(1, 3, 8, 8))[0].weight.shape[0] == 2


def test_rows_that_sum_to_zero_are_not_dead():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data.copy_(torch.tensor([[1.0, -1, 2, -2], [0, 0, 0, 0], [3, -3, 0, 0], [0, 1, 0, -1]]))
    assert check(model, torch.randn(3, 4))[0].out_features == 3


def test_negative_zeros_are_zeros():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight.data[1] = -0.0
    assert check(model, torch.randn(3, 4))[0].out_features == 3


def test_outputs_that_nobody_reads_go():
    """Not constant at all, but every consumer's weights for them are zero; and what fed only them goes too."""
    model = randomise_(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)))
    model[4].weight.data[:, :4] = 0
    model[2].weight.data[4:, :5] = 0
    small = check(model, torch.randn(2, 6))
    assert small[2].out_features == 3
    assert small[0].out_features == 3


def test_a_layer_that_vanishes_leaves_one_channel_and_the_same_function():
    model = randomise_(nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3)))
    model[0].weight.data.zero_()
    small = check(model, torch.randn(1, 2, 8, 8))
    assert small[0].weight.shape[0] == 1


class _Block(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(channels, inner), nn.Conv2d(inner, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


def test_a_residual_block_whose_branch_is_zero_goes():
    model = randomise_(nn.Sequential(conv_bn(3, 5), _Block(5, 4), _Block(5, 7), nn.Conv2d(5, 2, 1)))
    model[1].body[2].weight.data.zero_()
    model[1].body[2].bias.data.zero_()
    small = check(model, torch.randn(1, 3, 8, 8))
    assert isinstance(small[1], nn.Identity)
    assert not isinstance(small[2], nn.Identity)
    whole = check(model, torch.randn(1, 3, 8, 8), blocks=False)
    assert isinstance(whole[1], _Block)


def test_a_residual_block_with_a_constant_branch_stays():
    model = randomise_(nn.Sequential(conv_bn(3, 5), _Block(5, 4), nn.Conv2d(5, 2, 1)))
    model[1].body[2].weight.data.zero_()  # its shift is left
    small = check(model, torch.randn(1, 3, 8, 8))
    assert isinstance(small[1], _Block)
    assert small[1].body[0][0].out_channels == 1


def test_a_residual_sum_ties_its_channels():
    model = randomise_(nn.Sequential(conv_bn(3, 6), _Block(6, 4), _Block(6, 4), nn.Conv2d(6, 2, 1)))
    for norm in (model[0][1], model[1].body[2]):
        norm.weight.data[2] = 0
        norm.bias.data[2] = 0
    assert check(model, torch.randn(1, 3, 8, 8))[0][0].out_channels == 6  # the last block still feeds channel 2
    model[2].body[2].weight.data[2] = 0  # now what it feeds is a constant, its shift
    small = check(model, torch.randn(1, 3, 8, 8))
    assert small[0][0].out_channels == 5
    assert small[3].in_channels == 5


class _OptionA(nn.Module):
    """Shortcut without parameters: channels padded with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(self.second(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def test_zero_padded_channels_of_a_shortcut():
    model = randomise_(_OptionA())
    model.first.weight.data[1] = 0
    model.first.bias.data[1] = 0
    model.second.weight.data[[0, 3]] = 0  # 3 is where channel 1 of the shortcut lands, 0 is padding
    model.second.bias.data[[0, 3]] = 0
    small = check(model, torch.randn(1, 3, 8, 8))
    assert small.first.out_channels == 3
    assert small.second.out_channels == 7  # the padding is written in the code, so index 0 stays


@pytest.mark.parametrize(("groups", "gone", "left"), [(4, [0, 1, 6, 7], 2), (4, [0, 1, 2], 3), (2, [0, 4], 2)])
def test_grouped_convolution(groups: int, gone: list[int], left: int):
    """Whole groups go, and positions that are free in every group."""
    model = randomise_(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups), nn.ReLU(), nn.Conv2d(8, 2, 1))
    )
    for layer in (model[0], model[2]):
        layer.weight.data[gone] = 0
        layer.bias.data[gone] = 0
    small = check(model, torch.randn(1, 3, 8, 8))
    assert small[2].groups == left
    assert small[2].out_channels == (6 if groups == 2 else 2 * left)


def test_depthwise_and_transposed_convolution():
    model = randomise_(
        nn.Sequential(
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.ConvTranspose2d(6, 5, 3, 2),
            nn.ConvTranspose2d(5, 5, 2, groups=5),
            nn.Conv2d(5, 2, 1),
        )
    )
    for layer in (model[0], model[1]):
        layer.weight.data[[1, 2]] = 0
        layer.bias.data[[1, 2]] = 0
    model[2].weight.data[:, 3] = 0
    model[2].bias.data[3] = 0  # a transposed convolution spreads a constant unevenly
    small = check(model, torch.randn(1, 3, 8, 8))
    assert (small[1].groups, small[1].in_channels, small[2].in_channels) == (4, 4, 4)
    assert (small[2].out_channels, small[3].groups, small[3].in_channels, small[4].in_channels) == (4, 4, 4, 4)


def test_group_norm_loses_whole_groups_and_layer_norm_nothing():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)))
    model[1].weight.data[[0, 1, 2]] = 0
    model[1].bias.data[[0, 1, 2]] = 0
    small = check(model, torch.randn(1, 3, 8, 8))
    assert (small[1].num_groups, small[1].num_channels, small[0].out_channels) == (2, 4, 4)
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)))
    model[0].weight.data[:2] = 0
    assert check(model, torch.randn(2, 4))[0].out_features == 6


class _Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1)
        self.head = nn.Linear(9 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1).flatten(1))


def test_concatenation_and_flattening():
    model = randomise_(_Concatenated())
    model.a.weight.data[2] = 0
    model.b.weight.data[[0, 4]] = 0
    small = check(model, torch.randn(2, 3, 2, 2))
    assert (small.a.out_channels, small.b.out_channels, small.head.in_features) == (3, 3, 24)


def test_channel_shuffle():
    model = randomise_(nn.Sequential(conv_bn(3, 12), Shuffle(12), Shuffle(12), nn.Conv2d(12, 2, 1)))
    for module in model.modules():  # one position of each half, all the way
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d) and module.weight.shape[0] == 6:
            module.weight.data[2] = 0
            if module.bias is not None:
                module.bias.data[2] = 0
    small = check(model, torch.randn(1, 3, 8, 8))
    assert small[1].branch[0][0].out_channels < 6


@pytest.mark.parametrize("fused", [True, False])
def test_heads_go_from_attention_that_reads_its_number_of_heads(fused: bool):
    attention = Attention(12, 4) if fused else GroupedQueryAttention(12, 4, 2)
    model = randomise_(nn.Sequential(nn.Linear(5, 12), attention, nn.Linear(12, 3)))
    if fused:
        for start in (0, 12, 24):
            attention.qkv.weight.data[start + 3 : start + 6] = 0
            attention.qkv.bias.data[start + 3 : start + 6] = 0
    else:  # key head 1 and its two query heads
        for layer, rows in ((attention.q, slice(6, 12)), (attention.k, slice(3, 6)), (attention.v, slice(3, 6))):
            layer.weight.data[rows] = 0
    small = check(model, torch.randn(2, 4, 5))
    assert small[1].proj.in_features == 9 if fused else small[1].out.in_features == 6
    assert small[1].num_heads == 3 if fused else (small[1].heads, small[1].key_heads) == (2, 1)


def test_a_head_with_constant_values_goes_into_the_bias():
    """Attention weights sum to one: zero value rows with a bias come out as that bias."""
    attention = GroupedQueryAttention(12, 4, 4)
    attention.v = nn.Linear(12, 12)
    model = randomise_(nn.Sequential(nn.Linear(5, 12), attention))
    attention.v.weight.data[:3] = 0
    assert check(model, torch.randn(2, 4, 5))[1].out.in_features == 9


def test_heads_of_torch_attention():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            plain = self.attention(x, x, x, need_weights=False)[0]
            return plain, self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    model = randomise_(Model())
    for start in (0, 12, 24):
        model.attention.in_proj_weight.data[start + 3 : start + 9] = 0
        model.attention.in_proj_bias.data[start + 3 : start + 9] = 0
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
    small = check(model, torch.randn(2, 5, 12), mask)
    assert isinstance(small.attention, CompactMultiheadAttention)
    assert small.attention.num_heads == 2
    assert small.attention.out_proj.weight.shape == (12, 6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_compact_attention_is_torch_attention_while_nothing_is_removed(batch_first: bool, average: bool):
    reference = nn.MultiheadAttention(12, 4, batch_first=batch_first)
    ours = copy.deepcopy(reference)
    ours.__class__ = CompactMultiheadAttention
    query, key = torch.randn(3, 5, 12), torch.randn(3, 7, 12)
    if not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    mask = torch.rand(5, 7) < 0.3
    mask[:, 0] = False
    options = {"key_padding_mask": padding, "attn_mask": mask, "average_attn_weights": average}
    for got, expected in zip(ours(query, key, key, **options), reference(query, key, key, **options), strict=True):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ours(query, query, query)[0], reference(query, query, query)[0])


class _Tied(nn.Module):
    """An embedding that is also the output layer, and one convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(7, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(self.embedding(words))))))


def test_shared_weights_stay_shared():
    model = randomise_(_Tied())
    model.inner.weight.data[2] = 0
    model.inner.weight.data[:, 2] = 0
    model.inner.bias.data[2] = 0
    model.embedding.weight.data[:, 2] = 0
    small = check(model, torch.randint(7, (2, 4)))
    assert small.out.weight is small.embedding.weight
    assert small.inner.weight.shape == (5, 5)
    assert small.embedding.embedding_dim == 5


def test_code_that_counts_on_a_size_keeps_it_and_says_so():
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).view(-1, 3, 4).transpose(1, 2).reshape(-1, 12))

    model = randomise_(Literal())
    model.first.weight.data[:4] = 0
    small = check(model, torch.randn(5, 4))
    assert small.first.out_features == 12
    assert any("kept" in note for note in compaction_spec(small).notes)


def test_keep_and_its_errors():
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)))
    for layer in (model[0], model[2]):
        layer.weight.data[:3] = 0
    small = check(model, torch.randn(2, 4), keep=["0"])
    assert (small[0].out_features, small[2].out_features) == (6, 3)
    with pytest.raises(PruneError, match="'nothing'"):
        compact(model, torch.randn(2, 4).double(), keep=["nothing"])


def test_the_model_is_left_alone_and_modes_survive():
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
    model[0].weight.data[:3] = 0
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    small = se.compact(model, torch.randn(2, 4))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [module.training for module in small.modules()] == [True, True, False, True]
    assert small[0].weight.requires_grad


def test_masks_shrink_with_their_weights():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[:3] = False
    mask[3, 1] = False
    se.prune.set_masks(model, {"0.weight": mask})
    model[0].bias.data[:3] = 0
    small = compact(model, torch.randn(2, 4))
    assert torch.equal(se.masks(small)["0.weight"], mask[3:])


def test_frozen_layers_stay_frozen():
    model = randomise_(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    model[0].weight.data[:3] = 0
    model.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in compact(model, torch.randn(2, 4)).parameters())


def test_a_model_that_cannot_be_captured():
    class Dynamic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="Dynamic"):
        compact(Dynamic(), torch.randn(2, 4))
    with pytest.raises(CaptureError, match="int"):
        compact(nn.Linear(4, 2), 3)


@pytest.mark.parametrize("blocks", [60, pytest.param(290, marks=pytest.mark.slow)])
def test_deep_networks_need_no_deep_stack(blocks: int):
    """The recursion limit is lowered around the analysis: nothing in it may grow with depth."""
    from sparse_engine.prune.structured import analyse, capture, find_groups

    layers = [nn.Conv2d(2, 4, 1)]
    for _ in range(blocks):
        layers += [_Block(4, 3)]
    model = randomise_(nn.Sequential(*layers, nn.Conv2d(4, 2, 1)))
    program = capture(model, torch.randn(1, 2, 4, 4))
    assert len(program.nodes) > 6.9 * blocks
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(__import__("inspect").stack()) + 60)
    try:
        groups = find_groups(analyse(program))
    finally:
        sys.setrecursionlimit(limit)
    assert len(groups) == blocks + 1
