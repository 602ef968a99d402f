"""`linear_kd` and the loss on top of it against fp64, its gradients, memory, PyTorch's own checks, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_engine.distill import kd_loss, linear_kd_loss
from sparse_engine.errors import BackendError, ShapeError, SparseEngineError
from sparse_engine.ops.linear_kd import linear_kd
from tests.helpers import assert_close_to_fp64


def operands(rows=11, dtype=torch.float32):
    h, w, b = torch.randn(rows, 16, dtype=dtype), torch.randn(30, 16, dtype=dtype), torch.randn(30, dtype=dtype)
    theirs = torch.randn(rows, 24, dtype=dtype), torch.randn(30, 24, dtype=dtype), torch.randn(30, dtype=dtype)
    y = torch.randint(0, 30, (rows,))
    y[1::7] = -100
    return (h, w, b), theirs, y


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_loss_and_gradients_are_those_of_the_two_layers(alpha, reduction, chunk):
    ours, (th, tw, tb), y = operands()
    weights = torch.rand(11)
    settings = {"temperature": 2.0, "alpha": alpha, "label_smoothing": 0.1, "reduction": reduction}
    wide = [tensor.double().requires_grad_() for tensor in ours]
    teacher = F.linear(th.double(), tw.double(), tb.double())
    want = kd_loss(F.linear(*wide), y, teacher_logits=teacher, sample_weights=weights.double(), **settings)
    want.backward(torch.tensor(1.5, dtype=torch.float64))
    h, w, b = (tensor.requires_grad_() for tensor in ours)
    loss = linear_kd_loss(h, w, th, tw, y, bias=b, teacher_bias=tb, sample_weights=weights, chunk=chunk, **settings)
    loss.backward(torch.tensor(1.5))
    assert_close_to_fp64(loss, want.detach())
    for tensor, reference in zip((h, w, b), wide, strict=True):
        assert_close_to_fp64(tensor.grad, reference.grad)


def test_leading_dimensions_and_no_labels():
    (h, w, _), (th, tw, _), _ = operands(12)
    loss = linear_kd_loss(h.view(3, 4, 16).requires_grad_(), w, th.view(3, 4, 24), tw, alpha=1.0)
    want = kd_loss(F.linear(h.double(), w.double()), teacher_logits=F.linear(th.double(), tw.double()), alpha=1.0)
    assert_close_to_fp64(loss, want)


def test_no_rows():
    (h, w, b), (th, tw, _), y = operands(0)
    loss = linear_kd_loss(h.requires_grad_(), w.requires_grad_(), th, tw, y, bias=b)
    loss.backward()
    assert loss.item() == 0
    assert w.grad.count_nonzero() == 0


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_no_logits_matrix_is_ever_stored_as_a_whole():
    h, w, th, tw = torch.randn(640, 4), torch.randn(100, 4), torch.randn(640, 4), torch.randn(100, 4)
    scale = torch.full((640,), 1 / 640)
    inputs = (h, w, None, th, tw, None, None, scale, 1.0, 1.0, 0.0, -100, 32, True)
    from sparse_engine.ops.linear_kd import reference

    with Largest() as watch:
        reference(*inputs)
    assert 32 * 100 <= watch.largest < 640 * 100 / 10


def test_pytorch_checks_the_op():
    (h, w, b), (th, tw, tb), y = operands()
    scale = torch.rand(11)
    for gradient in (False, True):
        inputs = (h, w, b, th, tw, tb, y, scale, 2.0, 0.5, 0.0, -100, 4, gradient, "auto")
        torch.library.opcheck(torch.ops.sparse_engine.linear_kd, inputs)


def test_refusals():
    (h, w, b), (th, tw, _), y = operands()
    with pytest.raises(ShapeError, match=r"teacher_weight has shape \(29, 24\), \(30, 24\) expected"):
        linear_kd_loss(h, w, th, tw[:29], y)
    with pytest.raises(ShapeError, match="chunk is 0"):
        linear_kd_loss(h, w, th, tw, y, chunk=0)
    with pytest.raises(ShapeError, match="same samples"):
        linear_kd_loss(h, w, th[:3], tw, y)
    with pytest.raises(SparseEngineError, match="needs targets"):
        linear_kd_loss(h, w, th, tw)
    with pytest.raises(SparseEngineError, match="reduction is 'none'"):
        linear_kd_loss(h, w, th, tw, y, reduction="none")
    with pytest.raises(BackendError, match="not on an NVIDIA GPU"):
        linear_kd(h, w, b, th, tw, None, y, torch.rand(11), impl="triton")
