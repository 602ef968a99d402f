"""The fused distillation loss against PyTorch in fp64: values, gradients, ignored rows, extreme logits, long rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparse_engine import kernels
from sparse_engine.errors import ShapeError


def reference(
    z, t, y, temperature, alpha, smoothing=0.0, weights=None, reduction="mean", soft_targets=False, ignore=-100
):
    """(loss, gradient of its sum) in fp64."""
    z = z.detach().double().requires_grad_()
    rows = z.new_zeros(z.shape[0])
    valid = (y != ignore) if y is not None else torch.ones(z.shape[0], dtype=torch.bool)
    if y is not None and alpha < 1:
        rows = rows + (1 - alpha) * F.cross_entropy(
            z, y, reduction="none", label_smoothing=smoothing, ignore_index=ignore
        )
    if t is not None and alpha > 0:
        p = t.double() if soft_targets else F.softmax(t.double() / temperature, 1)
        kl = (torch.special.xlogy(p, p) - p * F.log_softmax(z / temperature, 1)).sum(1)
        rows = rows + alpha * temperature**2 * torch.where(valid, kl, 0.0)
    if weights is not None:
        rows = rows * weights.double()
    loss = rows if reduction == "none" else rows.sum()
    if reduction == "mean":
        loss = loss / valid.sum().clamp(min=1)
    loss.sum().backward()
    return loss.detach(), z.grad


def assert_same(actual, expected, bound=1e-5):
    scale = max(float(expected.abs().max()), 1e-2)
    assert actual.shape == expected.shape
    worst = float((actual.cpu().double() - expected).abs().max())
    assert worst <= bound * scale, f"error {worst:.3g} at scale {scale:.3g}"


@pytest.mark.parametrize("classes", [1, 10, 257, 1000, 20011])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("soft_targets", [False, True])
def test_loss_and_gradient(classes, temperature, soft_targets, device):
    z, t = torch.randn(4, classes) * 5, torch.randn(4, classes) * 5
    t = F.softmax(t, 1) if soft_targets else t
    y = torch.randint(0, classes, (4,))
    y[1] = -100
    weights = torch.rand(4)
    loss, parts = kernels.kd_loss(
        z.to(device),
        t.to(device),
        y.to(device),
        temperature=temperature,
        alpha=0.7,
        label_smoothing=0.1,
        weights=weights.to(device),
        soft_targets=soft_targets,
    )
    expected, gradient = reference(z, t, y, temperature, 0.7, 0.1, weights, soft_targets=soft_targets)
    assert_same(loss, expected)
    assert_same(parts.gradient, gradient)
    assert parts.gradient[1].count_nonzero() == 0


@pytest.mark.parametrize("soft_targets", [False, True])
@pytest.mark.parametrize("classes", [30, 9000])
def test_without_the_teachers_entropy(classes, soft_targets, device):
    z, t = torch.randn(3, classes) * 4, torch.randn(3, classes) * 4
    t = F.softmax(t, 1) if soft_targets else t
    one = torch.ones(3, device=device)
    settings = {"soft_scale": one, "temperature": 3.0, "soft_targets": soft_targets}
    parts = kernels.distill_rows(z.to(device), t.to(device), kl=False, **settings)
    p = t.double() if soft_targets else F.softmax(t.double() / 3, 1)
    assert_same(parts.soft, -9 * (p * F.log_softmax(z.double() / 3, 1)).sum(1))
    with_entropy = kernels.distill_rows(z.to(device), t.to(device), **settings)
    assert torch.equal(parts.gradient, with_entropy.gradient)


@pytest.mark.parametrize("kind", ["logits", "labels only", "probabilities"])
def test_as_many_classes_as_there_may_be(kind, device):
    """262,144 classes: 32 tiles; the label, and the largest logit, in the last one."""
    classes = 262144
    z, t, y = torch.randn(1, classes), torch.randn(1, classes), torch.tensor([classes - 1])
    z[0, -1] = t[0, -1] = 12.0
    t = F.softmax(t, 1) if kind == "probabilities" else t
    teacher = None if kind == "labels only" else t
    alpha = 0.0 if teacher is None else 0.5
    loss, parts = kernels.kd_loss(
        z.to(device), None if teacher is None else teacher.to(device), y.to(device), temperature=2.0, alpha=alpha,
        soft_targets=kind == "probabilities", label_smoothing=0.1,
    )  # fmt: skip
    expected, gradient = reference(z, teacher, y, 2.0, alpha, 0.1, soft_targets=kind == "probabilities")
    assert_same(loss, expected)
    assert_same(parts.gradient, gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_logits_are_computed_in_fp32(dtype, device):
    z, t = (torch.randn(5, 9000) * 4).to(dtype), (torch.randn(5, 9000) * 4).to(dtype)
    y = torch.randint(0, 9000, (5,))
    loss, parts = kernels.kd_loss(z.to(device), t.to(device), y.to(device), temperature=4.0, alpha=0.5)
    expected, gradient = reference(z, t, y, 4.0, 0.5)
    assert_same(loss, expected)  # no rounding but the logits' own
    assert parts.gradient.dtype == dtype
    # one rounding of the result; the interpreter rounds towards zero
    assert_same(parts.gradient, gradient, bound=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction, device):
    z, t, y = torch.randn(6, 50), torch.randn(6, 50), torch.randint(0, 50, (6,))
    y[0] = 7
    loss, parts = kernels.kd_loss(
        z.to(device), t.to(device), y.to(device), alpha=0.3, reduction=reduction, ignore_index=7
    )
    expected, gradient = reference(z, t, y, 4.0, 0.3, reduction=reduction, ignore=7)
    assert_same(loss, expected)
    assert_same(parts.gradient, gradient)


@pytest.mark.parametrize("classes", [300, 20011])
def test_in_place_gives_the_same(classes, device):
    z, t, y = torch.randn(3, classes), torch.randn(3, classes), torch.randint(0, classes, (3,))
    loss, parts = kernels.kd_loss(z.to(device), t.to(device), y.to(device))
    logits = z.clone().to(device)
    again, in_place = kernels.kd_loss(logits, t.to(device), y.to(device), in_place=True)
    assert in_place.gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(loss, again)
    assert torch.equal(parts.gradient, in_place.gradient)


def test_alpha_one_never_looks_at_labels(device):
    z, t = torch.randn(4, 30).to(device), torch.randn(4, 30).to(device)
    one, first = kernels.kd_loss(z, t, torch.tensor([0, 1, 2, 3], device=device), alpha=1.0)
    two, second = kernels.kd_loss(z, t, torch.tensor([9, 999, -5, 29], device=device), alpha=1.0)
    assert torch.equal(one, two)
    assert torch.equal(first.gradient, second.gradient)


def test_every_row_ignored_is_zero(device):
    z, t, y = torch.randn(3, 20), torch.randn(3, 20), torch.full((3,), -100)
    z[0, 0] = float("inf")
    loss, parts = kernels.kd_loss(z.to(device), t.to(device), y.to(device))
    assert loss.item() == 0
    assert parts.gradient.count_nonzero() == 0


def test_a_label_that_is_no_class_is_visible(device):
    z, y = torch.randn(2, 20), torch.tensor([3, 20])
    loss, parts = kernels.kd_loss(z.to(device), None, y.to(device), alpha=0.0, reduction="none")
    assert not loss[0].isnan()
    assert loss[1].isnan()
    assert not parts.gradient[0].isnan().any()


@pytest.mark.parametrize("classes", [100, 20011])
def test_huge_and_missing_logits(classes, device):
    z, t = torch.randn(4, classes) * 10, torch.randn(4, classes) * 10
    z[0] += 1e4
    t[1] -= 1e4
    z[2, 5:9] = t[2, 5:9] = -float("inf")  # classes masked out on both sides
    z[3, 2] = 1e4
    y = torch.tensor([1, 2, 3, 2])
    loss, parts = kernels.kd_loss(
        z.to(device), t.to(device), y.to(device), temperature=2.0, alpha=0.5, reduction="none"
    )
    z64, t64 = z.double(), t.double()
    p, q = F.softmax(t64 / 2, 1), F.log_softmax(z64 / 2, 1)
    kl = torch.where(p == 0, 0.0, p * (p.log() - q)).sum(1)
    expected = 0.5 * F.cross_entropy(z64, y, reduction="none") + 0.5 * 4 * kl
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=4e-3)  # 1e4 has 1e-3 of rounding in fp32
    gradient = 0.5 * (F.softmax(z64, 1) - F.one_hot(y, classes)) + 0.5 * 2 * (F.softmax(z64 / 2, 1) - p)
    torch.testing.assert_close(parts.gradient.cpu().double(), gradient, rtol=1e-3, atol=1e-6)


def test_kl_of_equal_logits_is_zero(device):
    z = torch.randn(3, 20011).to(device) * 8
    _, parts = kernels.kd_loss(z, z.clone(), None, alpha=1.0)
    assert float(parts.soft.abs().max()) < 1e-4
    assert float(parts.gradient.abs().max()) < 1e-8


def test_rows_with_their_own_teacher(device):
    """Row i is compared with teacher row index[i]; a negative index means no soft part."""
    z, t, y = torch.randn(4, 40), torch.randn(2, 40), torch.randint(0, 40, (4,))
    index = torch.tensor([1, -1, 0, 1])
    hard, soft = torch.tensor([0.5, 1.0, 0.0, 0.25]), torch.tensor([1.0, 1.0, 2.0, 0.5])
    result = kernels.distill_rows(
        z.to(device),
        t.to(device),
        y.to(device),
        hard.to(device),
        soft.to(device),
        temperature=3.0,
        teacher_index=index.to(device),
    )
    z64 = z.double().requires_grad_()
    ce = F.cross_entropy(z64, y, reduction="none")
    p = F.softmax(t.double()[index.clamp(min=0)] / 3, 1)
    kl = 9 * (p * (p.log() - F.log_softmax(z64 / 3, 1))).sum(1) * (index >= 0)
    (hard * ce + soft * kl).sum().backward()
    assert_same(result.hard, ce.detach())
    assert_same(result.soft, kl.detach())
    assert_same(result.gradient, z64.grad)


def test_scale_rows(device):
    x = torch.randn(3, 5000)
    one = kernels.scale_rows_(x.clone().to(device), torch.tensor(1.0, device=device))
    assert torch.equal(one.cpu(), x)
    factor = torch.tensor([0.0, 1.0, -2.5])
    x[0, 0] = float("nan")  # a row that is not wanted
    scaled = kernels.scale_rows_(x.clone().to(device), factor.to(device)).cpu()
    assert torch.equal(scaled[1:], x[1:] * factor[1:, None])
    assert scaled[0].count_nonzero() == 0


def test_refusals(device):
    z = torch.randn(2, 5, device=device)
    with pytest.raises(ShapeError, match="teacher classes 6, expected 5"):
        kernels.kd_loss(z, torch.randn(2, 6, device=device))
    with pytest.raises(ShapeError, match="temperature"):
        kernels.kd_loss(z, z, temperature=0.0)
    with pytest.raises(ShapeError, match="nothing to compute"):
        kernels.kd_loss(z, None)
    with pytest.raises(ShapeError, match="262145 classes"):
        kernels.kd_loss(torch.empty(1, 262145, device=device), None, torch.zeros(1, dtype=torch.long, device=device))
