"""Layers that compute in bfloat16: every geometry, either precision outside, whole executables."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparse_engine as se
from sparse_engine import _C
from sparse_engine.convert import lower, passes
from sparse_engine.convert.capture import capture
from sparse_engine.convert.lower import LinearChoice, LinearProblem, make_weight
from sparse_engine.convert.parts import compile_parts
from sparse_engine.errors import FileFormatError
from tests.convert.one_conv import reference

NONE, SWISH = ("none", 0.0, 0.0), ("hardswish", 0.0, 0.0)
hardswish = nn.functional.hardswish
HALF = torch.bfloat16


def rounded(x: Tensor) -> Tensor:
    return x.to(HALF).float()


def worst(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def planes_of(values: Tensor, half: bool) -> tuple[Tensor, int]:
    """Channels of pixels in memory that is NaN between them, and the distance from one to the next."""
    channels, pixels = values.shape
    stride = _C.padded_half_pixels(pixels) if half else _C.padded_pixels(pixels)
    memory = torch.full((channels * stride + 64,), math.nan, dtype=HALF if half else torch.float32)
    memory[: channels * stride].view(channels, stride)[:, :pixels] = values
    return memory, stride


def problem_of(x: Tensor, weight: Tensor, groups: int = 1, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1)):
    n, c, h, w = x.shape
    rows, _, r, s = weight.shape
    geometry = {
        "n": n, "c": c, "h": h, "w": w, "r": r, "s": s, "stride": stride, "padding": padding, "dilation": dilation
    }  # fmt: skip
    height = (h + padding[0] + padding[2] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    width = (w + padding[1] + padding[3] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return LinearProblem("conv", weight.flatten(1).numpy(), rows, groups, geometry, n * height * width)


def run(
    problem: LinearProblem,
    choice: LinearChoice,
    x: Tensor,
    bias: Tensor | None,
    activation: tuple[str, float, float] = NONE,
    residual: Tensor | None = None,
    half: tuple[bool, bool, bool] = (False, False, False),
    threads: int = 2,
) -> Tensor:
    """[rows, pixels], computed on memory full of NaN. A residual, of the same shape, is added in place."""
    n, c, h, w = x.shape
    given, step = planes_of(x.transpose(0, 1).reshape(c, -1), half[0])
    start = torch.full((problem.rows, problem.pixels), math.nan) if residual is None else residual
    out, out_step = planes_of(start, half[1])
    in_place = residual is not None and half[1] == half[2]
    added, added_step = planes_of(start, half[2])
    workspace = _C.phase_floats(problem.geometry, half=True)
    sizes = [memory.numel() * memory.element_size() // 4 for memory in (given, out, added)]
    plan = _C.Plan(workspace + 64, sizes)
    plan.fill("poison", (0, 0, [workspace + 64], [1]), math.nan)
    plan.pairs(
        problem.name, problem.geometry, make_weight(problem, choice), None if bias is None else bias.numpy(),
        (1, 0, [n, c, h, w], [h * w, step, w, 1]), half[0], (0, 0), ((2, 0), out_step, half[1]),
        None if residual is None else ((2 if in_place else 3, 0), added_step, half[2]), activation, choice.vectors
    )  # fmt: skip
    plan.run([given.data_ptr(), out.data_ptr(), added.data_ptr()], threads)
    return out[: problem.rows * out_step].view(problem.rows, out_step)[:, : problem.pixels].float()


def expected_of(problem: LinearProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    g = problem.geometry
    top, left, bottom, right = g["padding"]
    padded = nn.functional.pad(rounded(x).double(), (left, right, top, bottom))
    y = nn.functional.conv2d(
        padded, rounded(weight).double(), None if bias is None else bias.double(), g["stride"], 0, g["dilation"],
        problem.groups
    )  # fmt: skip
    return y.transpose(0, 1).flatten(1)


def close(found: Tensor, expected: Tensor, half: bool) -> None:
    scale = expected.abs().max().clamp(min=1) if expected.numel() else 1.0
    slack = 1e-5 * scale + (2.0**-8 * expected.abs() if half else 0)
    assert found.isfinite().all()
    assert ((found - expected).abs() <= slack).all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    flag = lambda: data.draw(st.booleans())  # noqa: E731
    kernel = data.draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (3, 3), (1, 3), (5, 5), (2, 4), (7, 7)]))
    stride = data.draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1), (3, 3)]))
    dilation = data.draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 3)]))
    padding = tuple(draw(0, 3) for _ in range(4))
    reach = [dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
    size = (
        max(1, reach[0] - padding[0] - padding[2]) + draw(0, 20),
        max(1, reach[1] - padding[1] - padding[3]) + draw(0, 60),
    )
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    torch.manual_seed(draw(0, 1 << 30))
    x = torch.randn(draw(1, 3), groups * draw(1, 5), *size)
    weight = torch.randn(groups * draw(1, 6), x.shape[1] // groups, *kernel)
    weight *= torch.rand_like(weight) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    bias = torch.randn(weight.shape[0]) if flag() else None
    problem = problem_of(x, weight, groups, stride, padding, dilation)
    if not problem.pairs:
        return
    half = (flag(), flag(), flag())
    expected = expected_of(problem, x, weight, bias)
    residual = torch.randn(expected.shape) if flag() else None
    if residual is not None:
        expected = expected + (rounded(residual) if half[2] else residual)
    choice = LinearChoice("pairs", 1, draw(1, 256), data.draw(st.sampled_from([0, 0, 4])), draw(1, 4))
    close(run(problem, choice, x, bias, NONE, residual, half, draw(1, 2)), expected, half[1])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_depthwise_shape(data: st.DataObject) -> None:
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    flag = lambda: data.draw(st.booleans())  # noqa: E731
    kernel = data.draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 3), (2, 2), (1, 1)]))
    stride = data.draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    padding = tuple(draw(0, 2) for _ in range(4))
    size = tuple(max(1, kernel[i] - padding[i] - padding[i + 2]) + draw(0, 50) for i in (0, 1))
    torch.manual_seed(draw(0, 1 << 30))
    x = torch.randn(draw(1, 3), draw(1, 9), *size)
    weight = torch.randn(x.shape[1] * draw(1, 2), 1, *kernel)
    bias = torch.randn(weight.shape[0]) if flag() else None
    problem = problem_of(x, weight, x.shape[1], stride, padding)
    if not (problem.pairs and problem.depthwise):
        return
    half = (flag(), flag(), flag())
    activation, function = data.draw(
        st.sampled_from([(NONE, lambda y: y), (("clamp", 0.0, 6.0), nn.functional.relu6), (SWISH, hardswish)])
    )
    expected = expected_of(problem, x, weight, bias)
    residual = torch.randn(expected.shape) if flag() else None
    if residual is not None:
        expected = expected + (rounded(residual) if half[2] else residual)
    choice = LinearChoice("depthwise_pairs")
    close(run(problem, choice, x, bias, activation, residual, half, draw(1, 2)), function(expected), half[1])


@pytest.mark.parametrize("half", [(False, False, False), (True, True, True), (True, False, True), (False, True, False)])
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (("gelu", 0.0, 0.0), nn.functional.gelu),
        (SWISH, hardswish),
        (("clamp", 0.0, 6.0), nn.functional.relu6),
    ],
)
@pytest.mark.parametrize("part", [27, 256])
def test_activations(activation, function, half, part) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 9, 11, 15), torch.randn(10, 9, 3, 3), torch.randn(10)
    weight *= torch.rand_like(weight) < 0.3
    problem = problem_of(x, weight, padding=(1, 1, 1, 1))
    residual = rounded(torch.randn(10, problem.pixels))
    expected = function(expected_of(problem, x, weight, bias) + residual)
    found = run(problem, LinearChoice("pairs", 1, part, 0, 2), x, bias, activation, residual, half)
    close(found, expected, half[1])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.0])
def test_what_is_not_finite_reaches_only_its_own_outputs(bad: float, half: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 3, 20, 40), torch.randn(5, 3, 3, 3), torch.randn(5)
    weight[1, 1] = 0
    x[0, 1, 7, 11] = bad
    problem = problem_of(x, weight, padding=(1, 1, 1, 1))
    expected = reference(rounded(x), rounded(weight), bias, (1, 1), (1, 1, 1, 1)).flatten(1)
    found = run(problem, LinearChoice("pairs", 1, 256, 0, 2), x, bias, half=(half, False, False))
    # A zero that was pruned is not multiplied; PyTorch multiplies it, which makes NaN of an infinity.
    assert found[1].isfinite().all()
    keep = [0, 2, 3, 4]
    assert int((~found.isfinite()).sum()) == (0 if bad == 0 else 4 * 9)
    torch.testing.assert_close(found[keep], expected[keep].float(), equal_nan=True, rtol=1e-5, atol=1e-5)


def test_an_infinity_at_the_last_of_an_odd_number_of_entries_stays_one() -> None:
    x = torch.ones(1, 3, 2, 4)
    x[0, 2, 1, 1] = math.inf
    problem = problem_of(x, torch.ones(1, 3, 1, 1))
    found = run(problem, LinearChoice("pairs"), x, None)
    assert found[0, 5] == math.inf
    assert (found[0, [0, 1, 2, 3, 4, 6, 7]] == 3).all()


def test_rounding_is_to_nearest_and_even() -> None:
    x = torch.tensor([1.0, 1.00390625, 1.01171875, 1.005, -1.00390625, 3.4e38, 0.0, -0.0] * 5).view(1, 1, 1, 40)
    problem = problem_of(x, torch.ones(1, 1, 1, 1))
    found = run(problem, LinearChoice("pairs"), x, None, half=(False, True, False))
    assert torch.equal(found[0], rounded(x.flatten()))


def test_bits_do_not_depend_on_the_tile_or_on_threads() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 40, 13, 17), torch.randn(24, 40, 3, 3), torch.randn(24)
    weight *= torch.rand_like(weight) < 0.2
    problem = problem_of(x, weight, padding=(1, 1, 1, 1))
    found = [
        run(problem, LinearChoice("pairs", 1, 90, block, lines), x, bias, threads=threads)
        for lines in (1, 2, 3, 4)
        for block in (0, 8)
        for threads in (1, 2)
    ]
    for other in found[1:]:
        assert torch.equal(found[0], other)


def test_refusals() -> None:
    x, weight = torch.randn(1, 4, 9, 9), torch.randn(3, 4, 3, 3)
    problem = problem_of(x, weight, padding=(1, 1, 1, 1))
    packed = make_weight(problem, LinearChoice("pairs"))
    assert packed.stored == weight.numel()
    assert 3 * weight.numel() < packed.nbytes < 4 * weight.numel()
    plan = _C.Plan(4096, [])
    view = (0, 0, [1, 4, 9, 9], [324, 81, 9, 1])
    call = lambda **given: plan.pairs(  # noqa: E731
        **{
            "name": "conv", "geometry": problem.geometry, "weight": packed, "bias": None, "x": view, "x_half": False,
            "workspace": (0, 0), "out": ((0, 400), 96, False), "residual": None, "activation": NONE, "lines": 2,
        } | given
    )  # fmt: skip
    call()
    for changed, message in [
        ({"out": ((0, 4000), 96, False)}, "would touch"),
        ({"out": ((0, 400), 97, True)}, "whole lines"),
        ({"x_half": True}, "whole lines"),
        ({"x_half": True, "x": (0, 4090, [1, 4, 9, 9], [324, 96, 9, 1])}, "would touch"),
        ({"x": (0, 0, [1, 4, 9, 9], [324, 1, 36, 4])}, "planes"),
        ({"x": (0, 0, [1, 4, 9, 8], [324, 81, 9, 1])}, "geometry"),
        ({"bias": torch.zeros(4).numpy()}, "bias"),
        ({"geometry": {**problem.geometry, "r": 1, "s": 1}}, "weight does not fit"),
        ({"residual": ((0, 4090), 96, False)}, "would touch"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**changed)
    with pytest.raises(ValueError, match="256"):
        _C.Weight.pairs(*problem.csr(), 36, 257, 0)


# ---- executables


class Residual(nn.Module):
    """Enough of a residual network: a stem, sums, a stride of two, a group convolution, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first, self.second = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 16, 3, padding=1)
        self.down, self.skip = nn.Conv2d(16, 32, 3, 2, 1), nn.Conv2d(16, 32, 1, 2)
        self.grouped, self.last = nn.Conv2d(32, 32, 3, padding=1, groups=4), nn.Conv2d(32, 20, 1)
        self.depthwise, self.strided = nn.Conv2d(32, 64, 3, 1, 1, groups=32), nn.Conv2d(64, 64, 3, 2, 1, groups=64)
        self.back = nn.Conv2d(64, 32, 1)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        x = (self.skip(x) + self.down(x)).relu()
        x = self.back(self.strided(self.depthwise(x).relu()).relu())
        x = self.last(nn.functional.gelu(self.grouped(x)))
        return self.head(x.mean((2, 3)))


def pruned(model: nn.Module, density: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) < density
    return model.eval()


def network() -> nn.Module:
    torch.manual_seed(1)
    return pruned(Residual())


def all_in_pairs(graph) -> dict:
    choices = {}
    for node in graph.nodes:
        if node.op in ("conv2d", "linear"):
            depthwise = node.name in ("depthwise", "strided")
            choice = LinearChoice("depthwise_pairs" if depthwise else "pairs", 1, 128, 0, 2)
            choices[node.name] = {"choice": choice.to_json(), "pixels": 1}
    return choices


@pytest.mark.parametrize("batch", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [(18, 22), (7, 9), (1, 1)])
def test_a_network(batch: int, size: tuple[int, int]) -> None:
    model, x = network(), torch.randn(batch, 3, *size)
    graph = passes.optimise(capture(model, (x,)).graph)
    choices = all_in_pairs(graph)
    for threads in (1, 2):
        (found,) = lower.compile(graph, batch, threads, choices).run([x])
        with torch.no_grad():
            exact, theirs = network().double()(x.double()), network().bfloat16()(x.bfloat16())
        assert worst(found, exact) <= 2 * worst(theirs, exact)


def test_values_between_such_layers_are_kept_in_bfloat16() -> None:
    model, x = network(), torch.randn(4, 3, 40, 40)
    graph = passes.optimise(capture(model, (x,)).graph)
    exact, pairs = lower._Lowering(graph, 4, None, 1), lower._Lowering(graph, 4, all_in_pairs(graph), 1)
    exact.emit_steps(), pairs.emit_steps()
    convolutions = [node.output for node in graph.nodes if node.op == "conv2d"]
    assert pairs.half == set(convolutions[:-1]), "the last one's output is averaged"
    assert pairs.arena < 0.62 * exact.arena
    one = all_in_pairs(graph)
    del one[graph.nodes[1].name]
    some = lower._Lowering(graph, 4, one, 1)
    some.emit_steps()
    assert some.half == set(convolutions[1:-1]) - {graph.nodes[1].output}, "it reads floats and writes floats"


class Mixed(nn.Module):
    """Convolutions and linear layers that read each other's images, and sums of single channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.again = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(11, 11), nn.Conv2d(4, 6, 3)
        self.one, self.other, self.last = nn.Conv2d(4, 1, 3, padding=1), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        z = self.linear(y).relu()
        single = (self.one(z) + self.other(y)).relu()
        return self.again(z + y), self.conv(self.linear(x)), self.last(single), single.amax((2, 3))


def test_linear_layers_and_convolutions_keep_channels_in_other_places() -> None:
    torch.manual_seed(2)
    model, x = pruned(Mixed(), 0.6), torch.randn(3, 4, 9, 11)
    graph = passes.optimise(capture(model, (x,)).graph)
    for threads in (1, 2):
        found = lower.compile(graph, 3, threads, all_in_pairs(graph)).run([x])
        for y, expected in zip(found, model(x), strict=True):
            assert worst(y, expected) < 2e-2


def test_in_bands_and_strips(monkeypatch) -> None:
    from sparse_engine.convert import strips

    torch.manual_seed(0)
    model = pruned(
        nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)
        )
    )
    x = torch.randn(1, 3, 40, 56)
    graph = passes.optimise(capture(model, (x,)).graph)
    choices = all_in_pairs(graph)
    choices.pop(graph.nodes[0].name)  # so that nothing is kept in bfloat16, which bands do not do
    whole = lower.compile(graph, 1, 1, choices).run([x])[0]
    assert worst(whole, model(x)) < 1e-2
    plan = compile_parts(graph, 2, choices)
    assert plan is not None
    assert worst(plan.run([x])[0], whole) < 1e-2
    monkeypatch.setattr(strips, "_best_rows", lambda graph, first, last, shapes, kept: (5, float((last - first) ** 2)))
    assert worst(lower.compile(graph, 1, 1, all_in_pairs(graph)).run([x])[0], whole) < 1e-2


@pytest.fixture(autouse=True)
def instructions(monkeypatch):
    """As on a processor that has them: other instruction sets compute the same, slowly."""
    monkeypatch.setattr(_C, "pair_products", lambda: True)


def test_converted_saved_and_loaded(tmp_path, instructions) -> None:
    model, x = network(), torch.randn(4, 3, 18, 22)
    executable = se.convert(model, x, precision="bf16", tune=False)
    report = executable.report
    kernels = {layer.name: layer.kernel for layer in report.layers}
    assert kernels["second"] == kernels["down"] == kernels["grouped"] == "sparse, bf16"
    assert "layers compute in bfloat16, with sums in float32" in str(report)
    with torch.no_grad():
        assert 1e-5 < worst(executable(x), model(x)) < 2e-2
    sizes = executable.save(tmp_path / "model.spx")
    again = se.load(tmp_path / "model.spx")
    assert torch.equal(again(x), executable(x))
    assert {layer.name: layer.kernel for layer in again.report.layers} == kernels
    exact = se.convert(model, x, tune=False).save(tmp_path / "exact.spx")
    assert sizes.file_bytes < exact.file_bytes
    for batch in (1, 7):  # other batch sizes use the same weights
        other = torch.randn(batch, 3, 18, 22)
        with torch.no_grad():
            assert worst(again(other), model(other)) < 2e-2


def test_a_transformer_block(instructions) -> None:
    torch.manual_seed(0)
    model = pruned(nn.TransformerEncoderLayer(48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True))
    x = torch.randn(2, 17, 48)
    executable = se.convert(model, x, precision="bf16", tune=False)
    assert "sparse, bf16" in {layer.kernel for layer in executable.report.layers}
    with torch.no_grad():
        exact, theirs = model.double()(x.double()), model.bfloat16()(x.bfloat16())
    assert worst(executable(x), exact) <= 2 * worst(theirs, exact)


def test_timed_and_taken_only_where_faster(monkeypatch, instructions) -> None:
    from sparse_engine.convert import choose as choosing

    def seconds(plans, threads):
        return [1.0] + [0.97] * (len(plans) - 1)

    monkeypatch.setattr(choosing, "_time_interleaved", seconds)
    executable = se.convert(network(), torch.randn(4, 3, 18, 22), precision="bf16")
    assert "sparse, bf16" not in {layer.kernel for layer in executable.report.layers}, "3 % are not worth rounding"
    reasons = {layer.name: layer.reason for layer in executable.report.layers}
    assert "bf16 takes 0.97x as long" in reasons["second"]
    assert "in bfloat16" not in str(executable.report)


def test_without_instructions_nothing_is_rounded(monkeypatch) -> None:
    monkeypatch.setattr(_C, "pair_products", lambda: False)
    executable = se.convert(network(), torch.randn(4, 3, 18, 22), precision="bf16", tune=False)
    assert "sparse, bf16" not in {layer.kernel for layer in executable.report.layers}


def test_files_with_rounded_convolutions_are_checked(tmp_path, instructions) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "model.spx"
    se.convert(network(), torch.randn(4, 3, 18, 22), precision="bf16", tune=False).save(path)
    with safe_open(path, "pt") as file:
        tensors, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    values = next(name for name, tensor in tensors.items() if tensor.dtype == HALF)
    tensors[values] = tensors[values].float()
    save_file(tensors, path, meta)
    with pytest.raises(FileFormatError):
        se.load(path)


@pytest.mark.parametrize("isa", [name for name in _C.cpu_info()["available"] if name != "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    command += ["-k", "test_activations or test_any or test_what_is_not or infinity or test_rounding"]
    done = subprocess.run(command, env={**os.environ, "SPARSE_ENGINE_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
