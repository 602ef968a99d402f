"""CS-KD, DLB, PS-KD and the chunked last layer against plain PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.errors import ShapeError


def kl(teacher, student, temperature):
    p = F.softmax(teacher / temperature, 1)
    return temperature**2 * (p * (p.log() - F.log_softmax(student / temperature, 1))).sum(1)


def close(actual, expected, bound=1e-5):
    torch.testing.assert_close(
        actual.cpu().double(), expected.detach(), rtol=bound, atol=bound * float(expected.abs().max())
    )


def test_class_wise_pairs(device):
    z, pair, y = torch.randn(6, 100) * 3, torch.randn(6, 100) * 3, torch.randint(0, 100, (6,))
    loss, parts = kernels.cs_kd_loss(z.to(device), pair.to(device), y.to(device), weight=3.0, temperature=4.0)
    z64 = z.double().requires_grad_()
    expected = F.cross_entropy(z64, y) + 3.0 * kl(pair.double(), z64, 4.0).mean()
    expected.backward()
    close(loss, expected)
    close(parts.gradient, z64.grad)


def test_last_batch(device):
    z, last, y = torch.randn(7, 40) * 3, torch.randn(3, 40) * 3, torch.randint(0, 40, (7,))
    loss, parts = kernels.dlb_loss(z.to(device), y.to(device), last.to(device), weight=1.5, temperature=3.0)
    z64 = z.double().requires_grad_()
    expected = F.cross_entropy(z64, y) + 1.5 * kl(last.double(), z64[4:], 3.0).mean()
    expected.backward()
    close(loss, expected)
    close(parts.gradient, z64.grad)
    first, _ = kernels.dlb_loss(z.to(device), y.to(device), None)
    close(first, F.cross_entropy(z.double(), y))
    with pytest.raises(ShapeError, match="8 rows of the last batch"):
        kernels.dlb_loss(z.to(device), y.to(device), torch.randn(8, 40, device=device))


@pytest.mark.parametrize("classes", [10, 1000, 20011])
def test_last_epoch_in_a_full_table(classes, device):
    labels = torch.randint(0, classes, (9,))
    table = kernels.PredictionTable.one_hot(labels.to(device), classes)
    samples = torch.tensor([4, 0, 7, 2])
    for alpha in (0.0, 0.4, 0.8):  # three epochs: each sees what the last one wrote
        z = torch.randn(4, classes) * 4
        y = labels[samples].clone()
        y[3] = -100
        previous = table.dense(samples.to(device)).cpu().double()
        loss, parts = kernels.ps_kd_loss(z.to(device), y.to(device), samples.to(device), table, alpha=alpha)
        z64 = z.double().requires_grad_()
        target = (1 - alpha) * F.one_hot(y.clamp(min=0), classes) + alpha * previous
        rows = -(target * F.log_softmax(z64, 1)).sum(1)[:3]
        rows.mean().backward()
        close(loss, rows.mean())
        close(parts.gradient, z64.grad)
        now = table.dense(samples.to(device)).cpu().double()
        torch.testing.assert_close(now[:3], F.softmax(z.double(), 1)[:3], rtol=1e-3, atol=1e-7)  # fp16
        assert torch.equal(now[3], previous[3])  # an ignored row keeps its prediction
    untouched = table.dense(torch.tensor([1, 3, 5, 6, 8], device=device)).cpu()
    assert torch.equal(untouched, F.one_hot(labels[[1, 3, 5, 6, 8]], classes).float())


def test_last_epoch_in_a_top_k_table(device):
    labels = torch.randint(0, 50, (5,))
    table = kernels.PredictionTable.one_hot(labels.to(device), 50, top_k=4)
    samples = torch.arange(5)
    assert torch.equal(table.dense(samples.to(device)).cpu(), F.one_hot(labels, 50).float())
    for alpha in (0.3, 0.7):
        z = torch.randn(5, 50) * 2
        previous = table.dense(samples.to(device)).cpu().double()
        loss, parts = kernels.ps_kd_loss(z.to(device), labels.to(device), samples.to(device), table, alpha=alpha)
        z64 = z.double().requires_grad_()
        target = (1 - alpha) * F.one_hot(labels, 50) + alpha * previous
        expected = -(target * F.log_softmax(z64, 1)).sum(1).mean()
        expected.backward()
        close(loss, expected)
        close(parts.gradient, z64.grad)
        values, index = F.softmax(z, 1).topk(4)
        assert torch.equal(table.index.cpu().long(), index)
        torch.testing.assert_close(table.values.cpu().float(), values, rtol=1e-3, atol=1e-7)
    assert torch.allclose(table.dense(samples.to(device)).sum(1).cpu(), torch.ones(5), atol=1e-3)


def test_top_k_refusals(device):
    labels = torch.zeros(2, dtype=torch.long, device=device)
    with pytest.raises(ShapeError, match="top_k must be"):
        kernels.PredictionTable.one_hot(labels, 50, top_k=3)
    table = kernels.PredictionTable(torch.rand(4, 2, device=device).half().T, None, 4)
    with pytest.raises(ShapeError, match="contiguous"):
        kernels.ps_kd_loss(torch.randn(2, 4, device=device), labels, torch.arange(2, device=device), table, alpha=0.5)


@pytest.mark.parametrize("classes", [50, 20000])
def test_equal_predictions_keep_the_lowest_classes(classes, device):
    labels = torch.zeros(2, dtype=torch.long, device=device)
    table = kernels.PredictionTable.one_hot(labels, classes, top_k=4)
    z = torch.zeros(2, classes)
    z[1, [7, classes - 1, 3, 30]] = 1.0
    kernels.ps_kd_loss(z.to(device), labels, torch.arange(2, device=device), table, alpha=0.5)
    assert table.index.cpu().tolist() == [[0, 1, 2, 3], [3, 7, 30, classes - 1]]


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_last_layer_in_chunks(chunk, device):
    h, w, b = torch.randn(11, 16), torch.randn(30, 16), torch.randn(30)
    th, tw = torch.randn(11, 24), torch.randn(30, 24)
    y = torch.randint(0, 30, (11,))
    y[[2, 10]] = -100
    loss, gradients = kernels.linear_kd_loss(
        *(v.to(device) for v in (h, w, th, tw, y)),
        bias=b.to(device),
        temperature=2.0,
        alpha=0.6,
        label_smoothing=0.1,
        chunk=chunk,
    )
    h64, w64, b64 = (v.double().requires_grad_() for v in (h, w, b))
    z = F.linear(h64, w64, b64)
    hard = F.cross_entropy(z, y, label_smoothing=0.1)
    valid = y != -100
    expected = 0.4 * hard + 0.6 * kl(F.linear(th.double(), tw.double()), z, 2.0)[valid].mean()
    expected.backward()
    close(loss, expected)
    close(gradients.hidden, h64.grad)
    close(gradients.weight, w64.grad)
    close(gradients.bias, b64.grad)


def test_last_layer_low_precision_sums_in_fp32(device):
    h, w, th, tw = (torch.randn(*shape).bfloat16() for shape in ((32, 32), (50, 32), (32, 32), (50, 32)))
    one = kernels.linear_kd_loss(*(v.to(device) for v in (h, w, th, tw)), alpha=1.0, chunk=32)
    many = kernels.linear_kd_loss(*(v.to(device) for v in (h, w, th, tw)), alpha=1.0, chunk=8)
    torch.testing.assert_close(one[0], many[0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one[1].weight, many[1].weight, rtol=2e-2, atol=1e-3)
