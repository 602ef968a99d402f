"""The CUDA kernels on a GPU, against fp64; needs one, and the library built (`make build-cuda` or `python -m
bench.gpu`)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.ops import cuda_library

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def close(actual, reference):
    torch.testing.assert_close(actual.double(), reference, rtol=2.0**-7, atol=1e-3 * float(reference.abs().max()))


@pytest.mark.parametrize("tokens", [1, 8, 16, 100, 513])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_bitmask_linear(tokens, sparsity):
    weight = torch.where(torch.rand(1000, 2056) >= sparsity, torch.randn(1000, 2056), 0).bfloat16().cuda()
    x, bias = torch.randn(tokens, 2056).bfloat16().cuda(), torch.randn(1000).bfloat16().cuda()
    y = cuda_library.library().bitmask_linear(x, cuda_library.pack_bitmask(weight), bias, "relu")
    close(y, F.linear(x.double(), weight.double(), bias.double()).relu())


def test_block_linear():
    pattern = kernels.block_pattern(torch.rand(10, 12) < 0.4, (64, 128)).to("cuda")
    values = torch.randn(pattern.blocks, 64, 128).bfloat16().cuda()
    x = torch.randn(300, 1536).bfloat16().cuda()
    y = cuda_library.library().block_linear(x, values, pattern.row_ptr, pattern.cols, pattern.row_order, (640, 1536))
    close(y, F.linear(x.double(), kernels.unpack_blocks(values, pattern).double()))


@pytest.mark.parametrize("run", [1, 2, 4, 8])
def test_gather_conv(run):
    keep_in = (torch.rand(96 // run) < 0.5).repeat_interleave(run)
    keep_out = torch.rand(80) < 0.5
    keep_in[:run] = keep_out[0] = True
    inputs, outputs = kernels.channel_list(keep_in, "cuda"), kernels.channel_list(keep_out, "cuda")
    x, weight = torch.randn(2, 96, 17, 15).half().cuda(), torch.randn(80, 96, 3, 3).half().cuda()
    y = cuda_library.library().gather_conv(
        x, cuda_library.gather_weight(weight, inputs.index, outputs.index), inputs.index, outputs.index, run,
        80, (3, 3), padding=(1, 1),
    )  # fmt: skip
    kept = keep_in.cuda()[:, None, None] & keep_out.cuda()[:, None, None, None]
    close(y, F.conv2d(x.double(), weight.double() * kept, padding=1))
