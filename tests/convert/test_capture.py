"""Capture: each PyTorch function becomes the native ops it should, with the same results at every batch size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_engine.convert.api import relative_error
from sparse_engine.convert.capture import capture
from sparse_engine.convert.executable import Executable
from sparse_engine.convert.graph import build_structure
from sparse_engine.convert.passes import optimise
from sparse_engine.errors import CaptureError
from tests.helpers import assert_close_to_fp64


class Function(nn.Module):
    """A module around a function; further modules it uses are given by name."""

    def __init__(self, function: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs) if list(self.children()) else self.function(*inputs)


def wrap(function: Callable[..., Any]) -> nn.Module:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return function(x)

    return Wrapped()


IMAGE, TOKENS, ROWS = (3, 8, 6, 5), (3, 7, 8), (3, 8)
TABLE = torch.randn(8)

# function or module, shape of the input, the native ops it becomes
NATIVE: dict[str, tuple[Callable[..., Any] | nn.Module, Sequence[int], str]] = {
    "conv": (nn.Conv2d(8, 4, 3, 2, 1), IMAGE, "conv2d"),
    "conv same": (nn.Conv2d(8, 4, (2, 4), padding="same", dilation=(1, 2)), IMAGE, "conv2d"),
    "conv valid": (nn.Conv2d(8, 4, 2, padding="valid", groups=2), IMAGE, "conv2d"),
    "conv reflect": (nn.Conv2d(8, 4, 3, padding=1, padding_mode="zeros", bias=False), IMAGE, "conv2d"),
    "depthwise": (nn.Conv2d(8, 16, 3, groups=8), IMAGE, "conv2d"),
    "conv1d": (nn.Conv1d(7, 4, 3, padding=1), TOKENS, "reshape conv2d reshape"),
    "linear": (nn.Linear(8, 4), ROWS, "linear"),
    "linear on tokens": (nn.Linear(8, 4, bias=False), TOKENS, "linear"),
    "matmul with a weight": (lambda x: x @ torch.ones(8, 3), TOKENS, "linear"),
    "addmm": (lambda x: torch.addmm(torch.ones(3), x, torch.ones(8, 3)), ROWS, "linear"),
    "bilinear tokens": (lambda x: x @ x.mT, TOKENS, "permute matmul"),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), TOKENS, "permute matmul"),
    "attention": (lambda x: functional.scaled_dot_product_attention(x, x, x), TOKENS, "attention"),
    "causal": (lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), TOKENS, "attention"),
    "masked": (
        lambda x: functional.scaled_dot_product_attention(x, x, x, torch.ones(7, 7).tril().bool()),
        TOKENS,
        "constant attention",
    ),
    "batch norm": (nn.BatchNorm2d(8), IMAGE, "affine"),
    "batch norm 1d": (nn.BatchNorm1d(8), ROWS, "affine"),
    "batch norm bare": (nn.BatchNorm2d(8, affine=False), IMAGE, "affine"),
    "layer norm": (nn.LayerNorm((7, 8)), TOKENS, "layer_norm"),
    "layer norm bare": (nn.LayerNorm(8, elementwise_affine=False), TOKENS, "layer_norm"),
    "group norm": (nn.GroupNorm(2, 8), IMAGE, "group_norm"),
    "instance norm": (nn.InstanceNorm2d(8), IMAGE, "group_norm"),
    "rms norm": (nn.RMSNorm(8), TOKENS, "unary reduce scalar unary binary constant binary"),
    "relu": (nn.ReLU(inplace=True), IMAGE, "unary"),
    "relu6": (nn.ReLU6(), IMAGE, "unary"),
    "hardtanh": (nn.Hardtanh(-2, 3), IMAGE, "unary"),
    "clamp": (lambda x: x.clamp(max=1.5), IMAGE, "unary"),
    "leaky relu": (nn.LeakyReLU(0.2), IMAGE, "unary"),
    "gelu": (nn.GELU(), IMAGE, "unary"),
    "gelu tanh": (nn.GELU("tanh"), IMAGE, "unary"),
    "silu": (nn.SiLU(), IMAGE, "unary"),
    "mish": (nn.Mish(), IMAGE, "unary unary binary"),
    "hardswish": (nn.Hardswish(inplace=True), IMAGE, "unary"),
    "elu": (nn.ELU(), IMAGE, "unary"),
    "softplus": (nn.Softplus(), IMAGE, "unary"),
    "square": (lambda x: x**2, IMAGE, "unary"),
    "power": (lambda x: x**3, IMAGE, "scalar"),
    "exponential": (lambda x: 2**x, IMAGE, "scalar"),
    "arithmetic": (lambda x: 1 - (2 * x + 3) / 4, IMAGE, "scalar scalar scalar scalar"),
    "reverse division": (lambda x: 1 / (x.abs() + 1), IMAGE, "unary scalar unary scalar"),
    "alpha": (lambda x: torch.add(x, x.exp(), alpha=2), IMAGE, "unary scalar binary"),
    "rsub": (lambda x: torch.rsub(x, x.exp(), alpha=2), IMAGE, "unary scalar binary"),
    "table": (lambda x: x * TABLE, TOKENS, "constant binary"),
    "maximum": (lambda x: torch.maximum(x, -x), IMAGE, "unary binary"),
    "scale by a 0-d tensor": (lambda x: x * torch.tensor(3.0), IMAGE, "scalar"),
    "max pool": (nn.MaxPool2d(3, 2, 1), IMAGE, "max_pool2d"),
    "max pool ceil": (nn.MaxPool2d(2, 2, ceil_mode=True), IMAGE, "max_pool2d"),
    "max pool dilated": (nn.MaxPool2d(2, 1, dilation=2), IMAGE, "max_pool2d"),
    "average pool": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE, "avg_pool2d"),
    "average pool divisor": (nn.AvgPool2d(2, divisor_override=3), IMAGE, "avg_pool2d"),
    "average pool 1d": (nn.AvgPool1d(2), TOKENS, "reshape avg_pool2d reshape"),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 2)), IMAGE, "adaptive_avg_pool2d"),
    "adaptive keeps": (nn.AdaptiveAvgPool2d((None, 1)), IMAGE, "adaptive_avg_pool2d"),
    "adaptive max": (nn.AdaptiveMaxPool2d(1), IMAGE, "max_pool2d"),
    "mean": (lambda x: x.mean([2, 3]), IMAGE, "reduce"),
    "sum": (lambda x: x.sum(-1, keepdim=True), IMAGE, "reduce"),
    "amax": (lambda x: x.amax((1, 2)), IMAGE, "reduce"),
    "normalised": (
        lambda x: functional.normalize(x, dim=-1),
        TOKENS,
        "unary reduce unary unary expand binary",
    ),
    "largest magnitude": (lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1), TOKENS, "unary reduce"),
    "softmax": (lambda x: x.softmax(1), IMAGE, "softmax"),
    "log softmax": (lambda x: x.log_softmax(-1), ROWS, "reduce binary unary reduce unary binary"),
    "dropout": (nn.Dropout(0.5), IMAGE, ""),
    "flatten": (nn.Flatten(), IMAGE, "reshape"),
    "unflatten": (nn.Unflatten(1, (2, 4)), IMAGE, "reshape"),
    "squeeze": (lambda x: x[:, :1].squeeze(1).unsqueeze(-1), IMAGE, "slice reshape reshape"),
    "permute": (lambda x: x.permute(0, 2, 3, 1).contiguous(), IMAGE, "permute"),
    "movedim": (lambda x: x.movedim(1, -1), IMAGE, "permute"),
    "expand": (lambda x: x[:, :1].expand(-1, 4, -1, -1), IMAGE, "slice expand"),
    "repeat": (lambda x: x.repeat(1, 2, 1), TOKENS, "reshape expand reshape"),
    "concat": (lambda x: torch.cat([x, x * 2], 1), IMAGE, "scalar concat"),
    "stack": (lambda x: torch.stack([x, x * 2], 1), ROWS, "scalar reshape reshape concat"),
    "select": (lambda x: x[:, -1], TOKENS, "slice reshape"),
    "slices": (lambda x: x[:, 1:6:2, ..., :-1], IMAGE, "slice slice"),
    "chunk": (lambda x: torch.cat(x.chunk(3, 1)[::-1], 1), IMAGE, "slice slice slice concat"),
    "split": (lambda x: x.split([1, 6], 1)[1], TOKENS, "slice"),
    "unbind": (lambda x: x.unbind(1)[2], TOKENS, "slice reshape"),
    "pad": (lambda x: functional.pad(x, (1, 2, 0, 1), value=0.5), IMAGE, "pad"),
    "crop": (lambda x: functional.pad(x, (-1, 1)), IMAGE, "slice pad"),
    "zero pad": (nn.ZeroPad2d((1, 0, 0, 2)), IMAGE, "pad"),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), IMAGE, "slice slice concat slice slice concat"),
    "channel shuffle": (nn.ChannelShuffle(2), IMAGE, "reshape permute reshape"),
    "pixel shuffle": (nn.PixelShuffle(2), IMAGE, "reshape permute reshape"),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (3, 2, 4, 6), "reshape permute reshape"),
    "upsample": (nn.Upsample(scale_factor=2), IMAGE, "reshape expand reshape"),
    "class token": (
        lambda x: torch.cat([torch.ones(1, 1, 8).expand(x.shape[0], -1, -1), x], 1),
        TOKENS,
        "constant expand concat",
    ),
    "zeros of the batch": (lambda x: torch.cat([x.new_zeros(x.shape[0], 1), x], 1), ROWS, "constant expand concat"),
    "split heads": (lambda x: x.view(x.shape[0], -1, 2, 4).transpose(1, 2), TOKENS, "reshape permute"),
    "windows": (
        lambda x: x.view(x.shape[0], 8, 3, 2, 5).permute(0, 2, 1, 3, 4).reshape(x.shape[0] * 3, 8, 10),
        IMAGE,
        "reshape permute reshape",
    ),
    "in place on a view": (lambda x: _in_place_on_a_view(x), ROWS, "slice scalar slice scalar concat"),
}


def _in_place_on_a_view(x: Tensor) -> Tensor:
    parts = (x * 1).chunk(2, 1)
    return torch.cat([parts[0].add(1), parts[1] - 1], 1)


@pytest.mark.parametrize("name", NATIVE)
def test_native_functions(name: str) -> None:
    function, shape, ops = NATIVE[name]
    module = function if isinstance(function, nn.Module) else wrap(function)
    module.eval()
    with torch.no_grad():
        for buffer_name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5) if "var" in buffer_name else buffer.normal_()
    captured = capture(module, (torch.randn(*shape),))
    assert captured.batch_reason is None, captured.batch_reason
    assert captured.reasons == {}
    expected_ops = Counter(ops.split())
    if name == "in place on a view":
        expected_ops += Counter(["scalar"])
    found = Counter(node.op for node in captured.graph.nodes)
    assert set(found) == set(expected_ops), found
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape[1:])
        expected = module(x.clone())
        (result,) = captured.graph.run([x])
        assert result.shape == expected.shape
        assert relative_error(result, expected) <= 1e-6


@pytest.mark.parametrize("name", NATIVE)
def test_native_kernels_agree_with_the_reference(name: str) -> None:
    """The plan of every function, not optimised and optimised, against the same graph in double precision."""
    function, shape, _ = NATIVE[name]
    module = function if isinstance(function, nn.Module) else wrap(function)
    graph = capture(module.eval(), (torch.randn(*shape),)).graph
    reference = graph.to(torch.float64)
    for executable in (Executable(graph), Executable(optimise(graph))):
        for batch in (1, 2, 5, 18):
            x = torch.randn(batch, *shape[1:])
            expected = reference.run([x.double()])[0]
            assert_close_to_fp64(executable(x), expected, 1e-5, f"{name} at batch size {batch}")


FALLBACK: dict[str, tuple[Callable[..., Any] | nn.Module, Sequence[int], str]] = {
    "cumsum": (lambda x: x.cumsum(1), TOKENS, "aten.cumsum.default"),
    "median": (lambda x: x.median(1).values, TOKENS, "aten.median.dim"),
    "transposed": (nn.ConvTranspose2d(8, 4, 2), IMAGE, "aten.conv_transpose2d.input"),
    "bilinear": (nn.Upsample(scale_factor=1.5, mode="bilinear"), IMAGE, "aten.upsample_bilinear2d.vec"),
    "reflect": (nn.ReflectionPad2d(1), IMAGE, "aten.pad.default"),
    "comparison": (lambda x: torch.where(x > 0, x, x.sin()), IMAGE, "aten.where.self"),
    "flip": (lambda x: x.flip(1), IMAGE, "aten.flip.default"),
    "topk": (lambda x: x.topk(2)[0], ROWS, "aten.topk.default"),
    "first rows": (lambda x: x - x[:1], TOKENS, "aten.slice.Tensor"),
    "statistics": (lambda x: torch.var_mean(x, 1)[0] + x.std(1), TOKENS, "aten.var_mean.dim"),
    "recurrent": (nn.GRU(8, 4, batch_first=True), TOKENS, "aten.gru.input"),
    "einsum": (lambda x: torch.einsum("bij,bkj->bik", x, x), TOKENS, "aten.einsum.default"),
    "half precision": (lambda x: (x.half() * 2).float(), TOKENS, "aten.to.dtype"),
    "batch size": (lambda x: x / x.shape[0], TOKENS, "aten.div.Tensor"),
    "prelu": (nn.PReLU(8), IMAGE, "aten.prelu.default"),
}


@pytest.mark.parametrize("name", FALLBACK)
def test_everything_else_calls_pytorch(name: str) -> None:
    function, shape, target = FALLBACK[name]
    module = function if isinstance(function, nn.Module) else wrap(function)
    captured = capture(module.eval(), (torch.randn(*shape),))
    targets = [node.attrs["target"] for node in captured.graph.nodes if node.op == "fallback"]
    assert target in targets
    assert set(captured.reasons) == {node.name for node in captured.graph.nodes if node.op == "fallback"}
    for batch in (1, 4):
        x = torch.randn(batch, *shape[1:])
        result, expected = captured.graph.run([x])[0], module(x)
        assert relative_error(result, expected[0] if isinstance(expected, tuple) else expected) <= 1e-6


def test_in_place_functions_keep_their_meaning() -> None:
    """What an in-place call does to other names of the same memory is kept."""

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            view = y[:, :2]
            view.add_(1)
            z = y.exp()
            y.relu_()
            return y + z + view.sum(1, keepdim=True)

    captured = capture(InPlace(), (torch.randn(3, 4),))
    x = torch.randn(5, 4)
    assert relative_error(captured.graph.run([x])[0], InPlace()(x)) <= 1e-6


def test_weights_that_are_computed_become_constants() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))
            self.mask = nn.Parameter(torch.rand(4, 8) > 0.5, requires_grad=False)
            self.table = nn.Parameter(torch.randn(10, 4))
            self.register_buffer("index", torch.arange(4))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.table[self.index].sum(0)
            return functional.linear(x, self.weight * self.mask, bias)

    module = Computed()
    captured = capture(module, (torch.randn(2, 8),))
    assert [node.op for node in captured.graph.nodes] == ["linear"]
    weight = captured.graph.constants[captured.graph.nodes[0].params["weight"]]
    assert torch.equal(weight == 0, ~module.mask)


def test_constants_are_the_models_own_tensors() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = capture(module, (torch.randn(2, 4),)).graph
    assert set(graph.constants) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert graph.constants["0.weight"].data_ptr() == module[0].weight.data_ptr()


def test_shared_weights_are_stored_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    graph = capture(Shared(), (torch.randn(2, 4),)).graph
    assert len(graph.constants) == 2
    assert len({node.name for node in graph.nodes}) == 3


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x, x + 1),
        lambda x: [x + 1, (x, x)],
        lambda x: {"a": x, "b": {"c": (x * 2, None)}},
        lambda x: Pair(x, x * 2),
        lambda x: x,
    ],
)
def test_output_structures(function: Callable[[Tensor], Any]) -> None:
    captured = capture(wrap(function), (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    found, expected = build_structure(captured.graph.structure, captured.graph.run([x])), function(x)
    assert str(found) == str(tuple(expected) if isinstance(expected, Pair) else expected)


def test_several_inputs_share_the_batch_size() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor, table: Tensor) -> Tensor:
            return x @ y.mT + table

    captured = capture(Two(), (torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(5)))
    x, y, table = torch.randn(7, 3, 4), torch.randn(7, 5, 4), torch.randn(5)
    assert captured.batch_reason is None
    assert relative_error(captured.graph.run([x, y, table])[0], x @ y.mT + table) <= 1e-6


def test_a_model_that_needs_its_batch_size_is_captured_for_it() -> None:
    def forward(x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[0] * 4).reshape(2, 4) * 0 if x.shape[0] == 2 else x

    captured = capture(wrap(forward), (torch.randn(2, 4),))
    assert captured.graph.fixed_batch == 2
    assert captured.batch_reason


def test_a_model_that_does_not_trace_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=r"test_capture\.py:\d+ in .*traceable"):
        capture(wrap(lambda x: x if x.sum() > 0 else -x), (torch.randn(2, 4),))
    assert capfd.readouterr().err == ""  # PyTorch would print the program up to that line


def test_a_model_that_changes_itself_is_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return x + self.calls

    with pytest.raises(CaptureError, match="calls"):
        capture(Counting(), (torch.randn(2, 4),))


def test_what_no_executable_may_call_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"aten\.bernoulli"):
        capture(wrap(torch.bernoulli), (torch.rand(2, 4),))


def test_transformer_encoder_is_native() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    captured = capture(model, (torch.randn(2, 5, 16),))
    assert captured.reasons == {}
    assert captured.batch_reason is None
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert relative_error(captured.graph.run([x])[0], model(x)) <= 1e-5
