"""The GPU executable's layers, candidates and choice, with the kernels interpreted; its replay needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_engine.convert import capture, optimise
from sparse_engine.convert.cuda import CudaExecutable, convert_cuda, device_reasons
from sparse_engine.errors import ConvertError, ShapeError
from sparse_engine.ops import cuda_library
from tests.cuda.builds import host_library


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.last(nn.functional.gelu(self.head(x.flatten(1))))


def model():
    net = Net().eval()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.conv.weight[:, 4:] = 0
        net.head.weight[:32, :192] = 0  # empty blocks
        net.last.weight.view(5, 2, 16, 4)[:, 0, :, 2:] = 0  # 2:4, but no column is empty
        net.last.weight.view(5, 2, 16, 4)[:, 1, :, :2] = 0
    return net


def build(device):
    net = model()
    x = torch.randn(3, 8, 4, 4)
    graph = optimise(capture(net, (x,)).graph)
    return net, x, CudaExecutable(graph, torch.device(device))


def test_each_layer_gets_its_candidates_and_they_agree(device):
    _net, x, executable = build(device)
    executable.tune(x, timer=lambda call: 1.0)
    names = {name: [c.name for c in layer.candidates] for name, layer in executable.layers.items()}
    assert any("triton channels" in found for found in names.values())
    assert any("triton blocks 32×32" in found or "triton blocks 64×64" in found for found in names.values())
    assert any("triton 2:4" in found for found in names.values())
    for layer in executable.layers.values():
        for candidate in layer.candidates:
            assert candidate.milliseconds == 1.0, (candidate.name, layer.refused)


class Wide(nn.Module):
    """Weights in 64×64 blocks, in 1:4, and with single zeros; a convolution with empty channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.blocks = nn.Linear(8 * 16, 192)
        self.groups = nn.Linear(192, 64)
        self.single = nn.Linear(64, 24)
        with torch.no_grad():
            self.conv.weight[:, 8:] = 0
            for row, column in ((0, 0), (1, 1), (2, 0)):  # no row and no column is empty: those are removed before
                self.blocks.weight[64 * row : 64 * row + 64, 64 * column : 64 * column + 64] = 0
            kept = nn.functional.one_hot(torch.randint(0, 4, (64, 48)), 4).reshape(64, 192)
            self.groups.weight.mul_(kept)
            self.single.weight[torch.rand(24, 64) < 0.6] = 0

    def forward(self, x):
        x = torch.relu(self.blocks(torch.relu(self.conv(x)).flatten(1)))
        return self.single(nn.functional.silu(self.groups(x)))


def test_candidates_in_16_bits_with_the_cuda_kernels(device):
    """The CUDA kernels are candidates too, with bias and activation, and give what the dense call gives."""
    net, x = Wide().eval(), torch.randn(3, 16, 4, 4)
    graph = optimise(capture(net, (x,)).graph)
    if device == "cpu":
        cuda_library.use(cuda_library.Library(host_library()))
    try:
        executable = CudaExecutable(graph, torch.device(device), torch.float16)
        executable.tune(x, timer=lambda call: 1.0)
    finally:
        cuda_library.use(None)
    names = {candidate.name for layer in executable.layers.values() for candidate in layer.candidates}
    wanted = {"cuda blocks 64×64", "cuda bitmask", "cuda channels", "triton 1:4", "triton channels"}
    assert wanted <= names, names
    for layer in executable.layers.values():
        for candidate in layer.candidates:
            if candidate.name.startswith(("cuda", "triton")):
                assert candidate.milliseconds == 1.0, (candidate.name, layer.refused)


def test_the_fastest_is_kept_and_the_result_is_the_models(device):
    net, x, executable = build(device)
    clock = iter(range(1000, 0, -1))
    executable.tune(x, timer=lambda call: float(next(clock)))  # every later candidate is faster
    assert all(layer.chosen == len(layer.candidates) - 1 for layer in executable.layers.values())
    with torch.no_grad():
        for batch in (x, torch.randn(5, 8, 4, 4)):
            torch.testing.assert_close(executable(batch).cpu(), net(batch), rtol=1e-4, atol=1e-5)
    report = executable.report
    assert {layer.kernel for layer in report.layers} & {"triton channels", "triton 2:4"}
    assert "triton" in str(report)


def test_a_candidate_that_is_wrong_is_refused(device):
    _, x, executable = build(device)
    layer = next(layer for layer in executable.layers.values() if len(layer.candidates) > 1)
    right = layer.candidates[1].call
    layer.candidates[1].call = lambda x, residual: right(x, residual) + 1
    executable.tune(x, timer=lambda call: 1.0)
    assert "differs from the dense call" in layer.refused[layer.candidates[1].name]
    assert layer.chosen == 0


def test_without_tuning_everything_is_dense(device):
    net, x, executable = build(device)
    assert all(layer.chosen == 0 for layer in executable.layers.values())
    with torch.no_grad():
        torch.testing.assert_close(executable(x).cpu(), net(x), rtol=1e-5, atol=1e-5)


def test_wrong_inputs(device):
    _, _, executable = build(device)
    with pytest.raises(ShapeError, match="takes 1 inputs, got 2"):
        executable(torch.randn(1, 8, 4, 4), torch.randn(1))
    with pytest.raises(ShapeError, match="input"):
        executable(torch.randn(1, 7, 4, 4))


def test_reasons_instead_of_a_crash():
    assert device_reasons("cpu") == ["cpu is not an NVIDIA GPU"]
    if not torch.cuda.is_available():
        assert "PyTorch sees no NVIDIA GPU" in device_reasons()[0]
        with pytest.raises(ConvertError, match="PyTorch sees no NVIDIA GPU"):
            convert_cuda(model(), torch.randn(1, 8, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_on_a_gpu(dtype):
    net, x = model(), torch.randn(3, 8, 4, 4)
    executable = convert_cuda(net, x, dtype=dtype)
    with torch.no_grad():
        for batch in (x, torch.randn(7, 8, 4, 4), x + 1):
            first, again = executable(batch), executable(batch)
            assert torch.equal(first, again)
            torch.testing.assert_close(first.float().cpu(), net(batch), rtol=5e-2, atol=5e-2)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        elsewhere = executable(x)
    side.synchronize()
    assert torch.equal(elsewhere, executable(x))
