"""Copies between layouts, and how many samples a pass takes where more would mean permuting."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch
from torch import nn

import sparse_engine as se

_C = pytest.importorskip("sparse_engine._C")
lower = pytest.importorskip("sparse_engine.convert.lower")


def strides_in_order(sizes: tuple[int, ...], order: tuple[int, ...], gap: int) -> tuple[list[int], int]:
    """Strides of an array whose dimensions lie in memory in this order, the outermost with a gap behind each entry."""
    strides, step = [0] * len(sizes), 1
    for place in reversed(order):
        strides[place] = step
        step = step * sizes[place] + (gap if place == order[1 % len(order)] else 0)
    return strides, step


@pytest.mark.parametrize(
    "sizes", [(2, 12, 19, 16), (197, 2, 48), (3, 17, 5), (2, 2, 2), (1, 40, 3), (33, 18), (64, 3, 30, 30), (0, 3, 4)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_any_order_of_dimensions(sizes: tuple[int, ...], threads: int) -> None:
    rng = numpy.random.default_rng(0)
    orders = list(itertools.permutations(range(len(sizes))))
    for source_order, target_order in itertools.product(orders, orders[:: max(1, len(orders) // 6)]):
        from_strides, room = strides_in_order(sizes, source_order, 3)
        to_strides, to_room = strides_in_order(sizes, target_order, 2)
        x = rng.standard_normal(max(1, room), dtype=numpy.float32)
        y = numpy.full(max(1, to_room) + 16, numpy.nan, dtype=numpy.float32)
        plan = _C.Plan(16, [x.size, y.size])
        plan.copy("copy", (1, 0, list(sizes), from_strides), (2, 0, list(sizes), to_strides))
        plan.run([x.ctypes.data, y.ctypes.data], threads)
        byte = [4 * step for step in from_strides]
        expected = numpy.full_like(y, numpy.nan)
        numpy.lib.stride_tricks.as_strided(expected, sizes, [4 * step for step in to_strides])[...] = (
            numpy.lib.stride_tricks.as_strided(x, sizes, byte)
        )
        numpy.testing.assert_array_equal(y, expected)
        assert numpy.isnan(y).sum() == y.size - math.prod(sizes)


class TokensFirst(nn.Module):
    """Attention as nn.MultiheadAttention computes it: tokens before samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 64, 4, 4)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens.mean(1))


def test_samples_that_would_have_to_be_permuted_are_taken_one_by_one() -> None:
    torch.manual_seed(0)
    model = TokensFirst().eval()
    x = torch.randn(6, 3, 32, 32)
    executable = se.convert(model, x, tune=False)
    plan = executable.compile(6)
    low = lower._Lowering(executable.graph, 1, None)
    low.emit_steps()
    moved = []
    for samples in (1, 2, 4):
        several = lower._Lowering(executable.graph, samples, None)
        several.emit_steps()
        moved.append(several.copied / samples)
    assert min(moved[1:]) > moved[0]  # else this model would show nothing
    assert lower._share(executable.graph, 6, None, 2) == 1
    torch.testing.assert_close(plan.run([x])[0], model(x), rtol=1e-4, atol=1e-5)


def sparse_conv(channels: int, rows: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, rows, kernel, padding=kernel // 2).eval()
    with torch.no_grad():
        conv.weight.mul_(torch.rand_like(conv.weight) < 0.3)
    return conv


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "direct"),
    [(28, 28, True), (12, 20, True), (8, 8, True), (32, 32, False), (7, 7, False), (14, 14, False)],
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_outputs_are_written_where_the_caller_wants_them(
    kernel: int, height: int, width: int, direct: bool, threads: int
) -> None:
    """Nothing before and behind them is touched, and no copy is made where whole vectors end with each plane."""
    torch.manual_seed(0)
    model = nn.Sequential(sparse_conv(5, 7, kernel), nn.ReLU())
    room = torch.randn(5 * height * width + 8)
    x = room[3 : 3 + 5 * height * width].view(1, 5, height, width)  # begins anywhere in a cache line
    executable = se.convert(model, (x,), tune=False, threads=threads)
    expected = model(x).detach()
    for given in (x, x.clone()):
        assert se.convert.relative_error(executable(given), expected) <= 1e-5
    plan = lower._Lowering(executable.graph, 1, None, threads).finish(threads)
    names = [name for name, _ in plan.profile([x])]
    assert any(name.startswith("output.") for name in names) != direct
    masked = height * width > lower._MASKED_FROM and height * width % lower.LANES
    assert any(name.endswith(".layout") for name in names) == (kernel == 1 and not direct and not masked)
    count = 7 * height * width
    around = torch.full((count + 64,), float("nan"))
    (y,) = plan.run([x], [around[32 : 32 + count].view(1, 7, height, width)])
    assert se.convert.relative_error(y, expected) <= 1e-5
    assert around[:32].isnan().all()
    assert around[32 + count :].isnan().all()


def test_an_output_that_is_read_again_or_twice_is_copied() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_conv(3, 4, 3), sparse_conv(4, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.a(x)
            z = self.b(y) + y
            return y, z, z

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(1, 3, 20, 12)
    for threads in (1, 2):
        executable = se.convert(model, (x,), tune=False, threads=threads)
        for found, expected in zip(executable(x), model(x), strict=True):
            assert se.convert.relative_error(found, expected.detach()) <= 1e-5


def test_a_sum_does_not_overwrite_what_its_other_input_lies_in() -> None:
    """A part of a concatenation is convolved and added to the whole, whose memory it shares."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = sparse_conv(3, 9, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            part = x.relu() + x
            return (self.conv(part) + torch.cat([x.relu(), part, x], 1)).relu()[:, 5:]

    torch.manual_seed(0)
    model = Part().eval()
    for batch, threads in itertools.product((1, 3), (1, 2)):
        x = torch.randn(batch, 3, 26, 28)
        executable = se.convert(model, (x,), tune=False, threads=threads)
        assert se.convert.relative_error(executable(x), model(x).detach()) <= 1e-5


ONE_PIXEL = [
    (nn.Conv2d(64, 64, 3, padding=1), (64, 1, 1)),
    (nn.Conv2d(64, 64, 3, 2, 1), (64, 2, 2)),
    (nn.Conv2d(64, 64, 1, groups=4), (64, 1, 1)),
    (nn.Conv2d(8, 64, 5), (8, 5, 5)),
    (nn.Conv2d(96, 96, 3, padding=1, groups=96), (96, 1, 1)),
]


@pytest.mark.parametrize(("layer", "shape"), ONE_PIXEL)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_convolution_with_one_output_pixel(layer: nn.Conv2d, shape: tuple[int, ...], precision: str) -> None:
    """Its kernels store whole vectors: each channel has room for one."""
    torch.manual_seed(0)
    layer.weight.data *= torch.rand_like(layer.weight) < 0.3
    for batch, threads in itertools.product((1, 2), (1, 2)):
        x = torch.randn(batch, *shape)
        executable = se.convert(layer.eval(), (x,), tune=False, threads=threads, precision=precision)
        for given in (x, torch.randn(1, *shape)):
            error = se.convert.relative_error(executable(given), layer(given).detach())
            assert error <= (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize(("layer", "shape"), ONE_PIXEL)
def test_a_sparse_layer_with_one_output_pixel(layer: nn.Conv2d, shape: tuple[int, ...]) -> None:
    layer.weight.data *= torch.rand_like(layer.weight) < 0.3
    sparse = se.nn.SparseConv2d.from_dense(layer)
    x = torch.randn(1, *shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = sparse(ours), layer(theirs)
    torch.testing.assert_close(y, expected)
    expected.sum().backward()
    y.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    "sizes", [(1, 40, 14, 14), (1, 700, 7, 7), (2, 30, 3, 5), (1, 64, 196), (1, 9, 1, 1), (0, 4, 5)]
)
@pytest.mark.parametrize("offset", [0, 3])
def test_copies_past_the_cache(sizes: tuple[int, ...], offset: int) -> None:
    """Planes with room behind them, to rows that follow each other wherever they begin."""
    rng = numpy.random.default_rng(0)
    pixels = math.prod(sizes[2:])
    strides = [sizes[1] * (pixels + 5), pixels + 5, *numpy.cumprod([1, *sizes[:2:-1]])[::-1].tolist()]
    x = rng.standard_normal(max(1, sizes[0] * strides[0]), dtype=numpy.float32)
    y = numpy.full(math.prod(sizes) + 32, numpy.nan, dtype=numpy.float32)
    plan = _C.Plan(16, [x.size, y.size])
    target = numpy.empty(sizes, dtype=numpy.float32).strides
    plan.copy(
        "c", (1, 0, list(sizes), strides), (2, offset, list(sizes), [step // 4 for step in target]), past_cache=True
    )
    plan.run([x.ctypes.data, y.ctypes.data], 2)
    expected = numpy.lib.stride_tricks.as_strided(x, sizes, [4 * step for step in strides])
    assert numpy.array_equal(y[offset : offset + expected.size].reshape(sizes), expected)
    assert numpy.isnan(numpy.delete(y, slice(offset, offset + expected.size))).all()


def test_large_outputs_of_batches_go_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(lower, "_KEPT", 1 << 20)
    layer = nn.Conv2d(16, 90, 1)
    layer.weight.data *= torch.rand_like(layer.weight) < 0.2
    x = torch.randn(9, 16, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(se.convert(layer, (x,), tune=False)(x), layer(x))
