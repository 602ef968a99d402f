"""The CUDA kernels through their Python functions, on the CPU build: formats, shapes, refusals."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F

from sparse_engine.errors import BackendError, ShapeError
from sparse_engine.ops import cuda_library
from tests.cuda.builds import host_library
from tests.helpers import random_sparse

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def library():
    return cuda_library.Library(host_library())


def close(actual, reference, dtype):
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    torch.testing.assert_close(actual.double(), reference, rtol=unit, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(40, 200), (16, 64), (1, 8), (33, 72)], ids=str)
def test_python_and_cpp_pack_the_same(shape, dtype, library):
    weight = random_sparse(*shape, sparsity=0.7, dtype=dtype)
    weight[0, 0] = -0.0
    packed = cuda_library.pack_bitmask(weight)
    assert torch.equal(packed.to_dense(), weight)
    start = torch.zeros_like(packed.start)
    function = library._functions.se_cuda_bitmask_pack
    function.restype = ctypes.c_int64
    records = torch.zeros_like(packed.records)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (weight, start, records)]
    units = function(pointers[0], shape[0], shape[1], pointers[1], pointers[2])
    assert units * 16 == packed.records.numel()
    assert torch.equal(start, packed.start)
    assert torch.equal(records, packed.records)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 11, 40])
def test_bitmask_linear(tokens, dtype, library):
    weight, bias = random_sparse(70, 136, sparsity=0.8, dtype=dtype), torch.randn(70).to(dtype)
    x = torch.randn(1, tokens, 136).to(dtype)
    y = library.bitmask_linear(x, cuda_library.pack_bitmask(weight), bias, "gelu")
    assert y.shape == (1, tokens, 70)
    if tokens:
        close(y, F.gelu(F.linear(x.double(), weight.double(), bias.double())), dtype)


def test_block_linear_reads_the_same_pattern_as_triton(library):
    from sparse_engine import kernels

    kept = torch.tensor([[True, False, True], [False, True, False]])
    pattern = kernels.block_pattern(kept, (64, 64), (120, 184))
    weight = torch.randn(120, 184).half()
    values = kernels.pack_blocks(weight, pattern)
    x = torch.randn(10, 184).half()
    y = library.block_linear(x, values, pattern.row_ptr, pattern.cols, pattern.row_order, (120, 184))
    close(y, F.linear(x.double(), kernels.unpack_blocks(values, pattern).double()), torch.float16)


def test_gather_conv(library):
    from sparse_engine import kernels

    keep_in, keep_out = torch.zeros(16, dtype=torch.bool), torch.rand(12) < 0.6
    keep_in[4:12] = True
    inputs, outputs = kernels.channel_list(keep_in), kernels.channel_list(keep_out)
    assert inputs.run == 4
    x, weight = torch.randn(2, 16, 7, 6).bfloat16(), torch.randn(12, 16, 3, 3).bfloat16()
    y = library.gather_conv(
        x.to(memory_format=torch.channels_last),
        cuda_library.gather_weight(weight, inputs.index, outputs.index),
        inputs.index,
        outputs.index,
        inputs.run,
        12,
        (3, 3),
        stride=(2, 1),
        padding=(1, 1),
    )
    zeroed = weight.double() * keep_in[:, None, None] * keep_out[:, None, None, None]
    close(y, F.conv2d(x.double(), zeroed, stride=(2, 1), padding=(1, 1)), torch.bfloat16)


def test_refusals(library, tmp_path):
    packed = cuda_library.pack_bitmask(random_sparse(16, 63, dtype=torch.float16))
    with pytest.raises(BackendError, match="sizes that the kernel does not take"):
        library.bitmask_linear(torch.randn(1, 63).half(), packed)
    with pytest.raises(ShapeError, match="must share bf16 or fp16"):
        library.bitmask_linear(torch.randn(1, 63), packed)
    with pytest.raises(ShapeError, match="relu6"):
        library.bitmask_linear(torch.randn(1, 63).half(), packed, activation="relu6")
    with pytest.raises(ShapeError, match="bf16 or fp16 matrix"):
        cuda_library.pack_bitmask(torch.randn(4, 4))
    with pytest.raises(BackendError, match="cannot be loaded"):
        cuda_library.Library(tmp_path / "missing.so")
