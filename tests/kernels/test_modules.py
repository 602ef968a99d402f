"""What modules and ops promise on a GPU beyond right numbers: autocast, `torch.compile`, no hidden synchronisation,
CUDA graphs, streams, devices, PyTorch's determinism switch, and reasons where a GPU cannot run them.

Without a GPU the kernels are interpreted, and synchronisation is looked for in the operations that a call consists of.
"""

from __future__ import annotations

import pytest
import torch
from sparse_engine.kernels import _common
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_engine import distill, kernels
from sparse_engine.convert.cuda import convert_cuda, device_reasons
from sparse_engine.errors import BackendError, ConvertError
from sparse_engine.nn import SparseConv2d, SparseLinear
from sparse_engine.ops import Pattern, cuda_library, kd_table_rows, sparse_linear
from sparse_engine.ops.masked_linear import masked_linear
from sparse_engine.ops.sparse_linear import cast_once
from sparse_engine.packed import PackedWeight
from sparse_engine.structure import Block, Channel, Unstructured
from tests.cuda.builds import host_library
from tests.helpers import assert_close_to_fp64, random_sparse

ALL = ("sparse_linear", "sparse_conv2d", "masked_linear", "kd_rows", "kd_table_rows", "linear_kd")
TRITON = ",".join(f"{op}:triton" for op in ALL)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch):
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", TRITON)


class Net(nn.Module):
    """A convolution whose channels are pruned, and a linear layer in blocks."""

    def __init__(self):
        super().__init__()
        conv, linear = nn.Conv2d(6, 8, 3, padding=1), nn.Linear(8 * 16, 32)
        with torch.no_grad():
            conv.weight[:, [1, 4]] = 0
            conv.weight[[0, 5]] = 0
            linear.weight[:16, 32:96] = 0
        self.conv = SparseConv2d.from_dense(conv, structure=Channel())
        self.linear = SparseLinear.from_dense(linear, structure=Block((16, 32)))

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def losses(device):
    """Name → a function of logits [6, 20] that returns a loss; each is a whole training loss on the kernels."""
    y = torch.randint(0, 20, (6,)).to(device)
    y[1] = -100
    t, weights = torch.randn(6, 20).to(device), torch.rand(6).to(device)
    table, samples = torch.rand(9, 20).softmax(1).half().to(device), torch.tensor([4, 0, 8, 2, 6, 1]).to(device)
    top, index = (v.contiguous() for v in table.float().topk(4))
    top, index = top.half(), index.int()
    w, tw = torch.randn(30, 20).to(device).requires_grad_(), torch.randn(30, 20).to(device)
    labels = torch.randint(0, 30, (6,)).to(device)
    options = {"sample_weights": weights, "temperature": 4.0, "alpha": 0.7, "label_smoothing": 0.1}
    return {
        "kd": lambda z: distill.kd_loss(z, y, teacher_logits=t, **options),
        "soft targets": lambda z: distill.kd_loss(z, y, soft_targets=t.softmax(1), soft_form="ce", alpha=0.3),
        "last batch": lambda z: distill.dlb_loss(z, y, t[:2]),
        "table": lambda z: distill.kd_loss_into_table(z, y, table, samples, alpha=0.5, sample_weights=weights),
        "top-k table": lambda z: distill.kd_loss_into_table(z, y, top, samples, alpha=0.5, index=index),
        "last layer": lambda z: distill.linear_kd_loss(z, w, t, tw, labels, chunk=4, alpha=0.5),
    }


class NoSynchronisation(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU, or that copy from it: what a CUDA graph cannot hold."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "item")
    FROM_HOST = ("lift_fresh", "lift_fresh_copy")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        if name in self.WAITS or name in self.FROM_HOST:
            raise AssertionError(f"aten::{name} in a step")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise AssertionError("aten::repeat_interleave without its output's size waits for a GPU")
        if name in ("index", "index_put", "index_put_") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError(f"aten::{name} with a mask waits for a GPU")
        return func(*args, **kwargs)


def step(net, x, dy):
    net.zero_grad(set_to_none=True)
    y = net(x)
    y.backward(dy)
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


def test_training_steps_of_layers_never_wait(device):
    net, x, dy = Net().to(device), torch.randn(3, 6, 4, 4).to(device), torch.randn(3, 32).to(device)
    expected = step(net, x, dy)  # the first call derives index tables from the pattern
    with NoSynchronisation():
        found = step(net, x, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_mask_that_changes_never_waits(device):
    x, weight = torch.randn(5, 70).to(device), torch.randn(40, 70).to(device).requires_grad_()
    for seed in range(2):
        mask = (torch.rand(40, 70, generator=torch.Generator().manual_seed(seed)) < 0.3).to(device)
        weight.grad = None
        with NoSynchronisation():
            y = masked_linear(x, weight, mask)
            y.sum().backward()
        torch.testing.assert_close(y, x @ (weight * mask).T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weight.grad, mask * x.sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", losses("cpu"))
def test_losses_never_wait(name, device, monkeypatch):
    # on the CPU labels and samples are checked before; on a GPU they are not looked at
    monkeypatch.setattr(distill.functional, "_on_the_host", lambda indices: False)
    loss, z = losses(device)[name], torch.randn(6, 20).to(device).requires_grad_()
    with NoSynchronisation():
        loss(z).backward()
        kernels.scale_rows_(z.grad, torch.ones((), device=device))
    assert z.grad.isfinite().all()


def test_the_watch_sees_what_waits():
    for wait in (
        lambda: torch.ones(2).sum().item(),
        lambda: torch.ones(2).nonzero(),
        lambda: torch.ones(2)[torch.tensor([True, False])],
        lambda: torch.tensor(3.0),
    ):
        with pytest.raises(AssertionError, match="aten::"), NoSynchronisation():
            wait()


@pytest.mark.parametrize("name", losses("cpu"))
def test_losses_under_the_determinism_switch(name, device):
    """`torch.use_deterministic_algorithms` refuses nothing here, and two runs give the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            z, loss = torch.randn(6, 20).to(device).requires_grad_(), losses(device)[name]
            value = loss(z)
            value.backward()
            results.append((value.detach(), z.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.use_deterministic_algorithms(before)


def test_layers_under_the_determinism_switch(device):
    before = torch.are_deterministic_algorithms_enabled()
    net, x, dy = Net().to(device), torch.randn(3, 6, 4, 4).to(device), torch.randn(3, 32).to(device)
    plain = step(net, x, dy)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = step(net, x, dy), step(net, x, dy)
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b, c in zip(plain, first, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_compiled_layers_have_no_graph_break(device):
    torch._dynamo.reset()
    net, x, dy = Net().to(device), torch.randn(3, 6, 4, 4).to(device), torch.randn(3, 32).to(device)
    expected = step(net, x, dy)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    net.zero_grad(set_to_none=True)
    y = compiled(x)
    y.backward(dy)
    for found, reference in zip([y.detach(), *(p.grad for p in net.parameters())], expected, strict=True):
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize("name", ["kd", "soft targets", "last batch"])
def test_compiled_losses_have_no_graph_break(name, device):
    torch._dynamo.reset()
    loss, z = losses(device)[name], torch.randn(6, 20).to(device).requires_grad_()
    expected = loss(z)
    expected.backward()
    gradient, z.grad = z.grad, None
    found = torch.compile(loss, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")(z)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(z.grad, gradient)


def test_autocast(device):
    """On a GPU the products run in bfloat16; on the CPU sparse products stay in float32, masked ones do not."""
    mask = (torch.rand(2, 4) < 0.5).repeat_interleave(16, 0).repeat_interleave(16, 1)
    layer = SparseLinear.from_dense(nn.Linear(64, 32), mask, Block((16, 16))).to(device)
    x = torch.randn(5, 64).to(device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x)
        z = masked_linear(x, layer.to_dense().weight, torch.rand(32, 64).to(device) < 0.5)
    assert y.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
    assert z.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.values.grad.dtype == torch.float32


# -- the CUDA kernels behind the op ----------------------------------------------------------------------------------


@pytest.fixture
def cuda_on_the_host(monkeypatch):
    """The CUDA kernels' build for the CPU behind the ops; the real one where there is a GPU."""
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", "sparse_linear:cuda")
    if torch.cuda.is_available():
        return
    cuda_library.use(cuda_library.Library(host_library()))
    yield
    cuda_library.use(None)


def unstructured(device, dtype=torch.bfloat16):
    weight = random_sparse(40, 72, sparsity=0.7, dtype=dtype)
    packed = PackedWeight.from_dense(weight, structure=Unstructured())
    return packed.values.to(device), Pattern.from_packed(packed).to(device), weight


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unstructured_weights_run_on_the_cuda_kernel(dtype, tokens, device, cuda_on_the_host):
    values, pattern, weight = unstructured(device, dtype)
    x, bias = torch.randn(tokens, 72).to(dtype), torch.randn(40).to(dtype)
    y = sparse_linear(x.to(device), values, pattern, bias.to(device))
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_close_to_fp64(y, expected, 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11)


def test_parameters_run_on_the_cuda_kernel_where_nobody_trains(device, cuda_on_the_host, monkeypatch):
    values, pattern, _ = unstructured(device)
    values, x = values.requires_grad_(), torch.randn(3, 72).bfloat16().to(device)
    packings = []
    pack = cuda_library.pack_bitmask
    monkeypatch.setattr(cuda_library, "pack_bitmask", lambda dense: packings.append(1) or pack(dense))
    with pytest.raises(BackendError, match="being trained"):
        sparse_linear(x, values, pattern)
    with torch.no_grad():
        first = sparse_linear(x, values, pattern)
        assert torch.equal(sparse_linear(x, values, pattern), first)
        assert len(packings) == 1
        values.mul_(2)
        torch.testing.assert_close(sparse_linear(x, values, pattern), 2 * first)
    assert len(packings) == 2


def test_values_are_cast_once_until_they_change():
    values, pattern, _ = unstructured("cpu", torch.float32)
    once = cast_once(values, torch.bfloat16, pattern)
    assert cast_once(values.detach(), torch.bfloat16, pattern) is once
    values.mul_(2)
    assert torch.equal(cast_once(values, torch.bfloat16, pattern), values.bfloat16())
    other = values.clone()
    assert cast_once(other, torch.bfloat16, pattern) is not once
    with torch.inference_mode():
        made = torch.ones(pattern.num_values)
        first = cast_once(made, torch.bfloat16, pattern)
        made.mul_(3)
        assert torch.equal(cast_once(made, torch.bfloat16, pattern), 3 * first)


# -- reasons -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def turing(monkeypatch):
    """A GPU that is too old."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an old GPU")


def test_an_old_gpu_gets_reasons(turing, monkeypatch, tmp_path):
    assert device_reasons() == ["an old GPU has compute capability 7.5; 8.0 (Ampere) is needed"]
    assert device_reasons("cuda:3") == ["there are 1 GPUs, no cuda:3"]
    assert kernels.why_not() == ["compute capability 7.5 is below 8.0 (Ampere)"]
    assert not kernels.available()
    library = tmp_path / "_cuda_kernels.so"
    library.touch()
    monkeypatch.setattr(cuda_library, "_FILE", library)
    assert cuda_library.why_not() == ["compute capability 7.5 is below 8.0 (Ampere)"]
    with pytest.raises(BackendError, match=r"an old GPU has 7\.5: use impl='torch'"):
        _common.generation(torch.device("cuda"))
    with pytest.raises(ConvertError, match=r"an old GPU has compute capability 7\.5"):
        convert_cuda(nn.Linear(4, 4), torch.randn(1, 4))


def test_another_makers_gpu_gets_reasons(turing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert kernels.why_not() == ["the kernels are tuned and tested for NVIDIA GPUs only"]


def test_a_build_that_is_missing_or_older_gets_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_library, "_FILE", tmp_path / "_cuda_kernels.so")
    assert cuda_library.why_not() == ["the CUDA kernels are not built (`make build-cuda`, needs nvcc)"]
    monkeypatch.setattr(cuda_library, "_VERSION", 99)
    with pytest.raises(BackendError, match="99 is needed: run `make build-cuda`"):
        cuda_library.Library(host_library())


# -- on a GPU only ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["kd", "soft targets", "last batch", "table", "last layer"])
def test_a_training_step_replays_from_a_cuda_graph(name):
    loss, z = losses("cuda")[name], torch.randn(6, 20, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(loss(z), z)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = torch.autograd.grad(loss(z), z)[0]
    with torch.no_grad():
        z.copy_(torch.randn(6, 20, device="cuda"))
    graph.replay()
    if name != "table":  # whose rows the replay has replaced
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(z), z)[0])
    assert gradient.isfinite().all()


@pytest.mark.gpu
def test_layers_on_several_streams_and_devices():
    for index in range(torch.cuda.device_count()):
        device = f"cuda:{index}"
        net, x, dy = Net().to(device), torch.randn(3, 6, 4, 4, device=device), torch.randn(3, 32, device=device)
        expected = step(net, x, dy)
        streams = [torch.cuda.Stream(device) for _ in range(3)]
        torch.cuda.synchronize(device)
        for stream in streams:
            with torch.cuda.stream(stream):
                found = step(net, x, dy)
            stream.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_nothing_synchronises_according_to_cuda():
    net, x, dy = Net().to("cuda"), torch.randn(3, 6, 4, 4, device="cuda"), torch.randn(3, 32, device="cuda")
    expected = step(net, x, dy)
    z = torch.randn(6, 20, device="cuda", requires_grad=True)
    ready = losses("cuda")
    for loss in ready.values():
        loss(z).backward()
    z.grad = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = step(net, x, dy)
        for loss in ready.values():
            loss(z).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert z.grad.isfinite().all()


def test_a_misspelt_op_is_an_error(device, monkeypatch):
    """So everything above ran on the kernels that it names."""
    operands = torch.randn(2, 4), torch.zeros(2, dtype=torch.long), torch.rand(3, 4), torch.arange(2), torch.ones(2)
    operands = [tensor.to(device) for tensor in operands]
    kd_table_rows(*operands, alpha=0.5)
    monkeypatch.setenv("SPARSE_ENGINE_IMPL", TRITON.replace("kd_table_rows", "kd_tabel_rows"))
    with pytest.raises(BackendError, match="kd_tabel_rows"):
        kd_table_rows(*operands, alpha=0.5)
