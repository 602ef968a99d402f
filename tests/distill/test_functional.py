"""The distillation loss: its scale, its gradients, its reductions, its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.distill import KDLoss, dlb_loss, kd_loss, kd_loss_into_table
from sparse_engine.errors import ShapeError, SparseEngineError
from tests.helpers import assert_close_to_fp64


def make(n: int = 6, classes: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n * 31 + classes)
    z = (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    t = (3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).to(dtype)
    return z, t, torch.randint(classes, (n,), generator=generator)


def reference(z, t, y, alpha, temperature, smoothing=0.0):
    """Sum over classes, mean over the batch, T²: the scale of RepDistiller's KL term."""
    soft = F.kl_div(F.log_softmax(z / temperature, 1), F.softmax(t / temperature, 1), reduction="sum") / len(z)
    return (1 - alpha) * F.cross_entropy(z, y, label_smoothing=smoothing) + alpha * temperature**2 * soft


@given(
    st.integers(1, 9),
    st.integers(2, 12),
    st.floats(0, 1),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.sampled_from([0.0, 0.2]),
)
def test_value_and_gradient_have_the_scale_of_the_definition(n, classes, alpha, temperature, smoothing):
    z, t, y = make(n, classes)
    ours = kd_loss(z, y, teacher_logits=t, alpha=alpha, temperature=temperature, label_smoothing=smoothing)
    theirs = reference(z, t, y, alpha, temperature, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, z)[0], torch.autograd.grad(theirs, z)[0], rtol=1e-9, atol=1e-12
    )


def test_the_mean_runs_over_samples_and_not_over_classes():
    z, t, y = make(4, 100)
    loss = kd_loss(z, y, teacher_logits=t, alpha=1.0, temperature=2.0)
    over_classes = 4 * F.kl_div(F.log_softmax(z / 2, 1), F.softmax(t / 2, 1), reduction="none").mean()
    torch.testing.assert_close(loss, 100 * over_classes)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_first_and_second_derivatives(reduction, with_teacher):
    z, t, y = make(3, 4)
    y[1] = -100
    weights = torch.rand(4, dtype=torch.float64) + 0.1

    def loss(z):
        return kd_loss(
            z, y, teacher_logits=t if with_teacher else None, temperature=3.0, hard_weight=0.7, soft_weight=0.4,
            label_smoothing=0.1, class_weights=weights, sample_weights=torch.arange(3.0), reduction=reduction,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (z,))
    assert torch.autograd.gradgradcheck(loss, (z,))


def test_hard_part_equals_cross_entropy_with_weights_smoothing_and_ignored_samples():
    z, _, y = make(8)
    y[[0, 3]] = -100
    weights = torch.rand(5, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        options = {"label_smoothing": 0.2, "reduction": reduction}
        ours = kd_loss(z, y, class_weights=weights, **options)
        theirs = F.cross_entropy(z, y, weight=weights, **options)
        torch.testing.assert_close(ours, theirs)


def test_ignored_samples_do_not_count_even_when_they_are_infinite():
    z, t, y = make(6)
    y[2] = -100
    kept = torch.tensor([0, 1, 3, 4, 5])
    want = kd_loss(z[kept], y[kept], teacher_logits=t[kept], alpha=0.6, temperature=2.0)
    spoiled = z.detach().clone()
    spoiled[2] = float("inf")
    spoiled.requires_grad_()
    got = kd_loss(spoiled, y, teacher_logits=t, alpha=0.6, temperature=2.0)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, spoiled)
    assert (gradient[2] == 0).all()
    assert torch.isfinite(gradient).all()


def test_no_valid_sample_gives_zero_and_not_nan():
    z, t, y = make(3)
    y[:] = -100
    loss = kd_loss(z, y, teacher_logits=t, alpha=0.5)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, z)[0] == 0).all()


def test_alpha_one_ignores_the_labels_exactly():
    z, t, y = make()
    first = kd_loss(z, y, teacher_logits=t, alpha=1.0, temperature=4.0)
    second = kd_loss(z, (y + 1) % 5, teacher_logits=t, alpha=1.0, temperature=4.0)
    third = kd_loss(z, None, teacher_logits=t, alpha=1.0, temperature=4.0)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_soft_targets_of_the_cross_entropy_form_have_the_same_gradient():
    z, t, y = make()
    q = t.softmax(1)
    kl = kd_loss(z, y, soft_targets=q, alpha=0.3)
    ce = kd_loss(z, y, soft_targets=q, alpha=0.3, soft_form="ce")
    torch.testing.assert_close(torch.autograd.grad(kl, z)[0], torch.autograd.grad(ce, z)[0])
    mixture = 0.7 * F.one_hot(y, 5) + 0.3 * q
    torch.testing.assert_close(ce, -(mixture * F.log_softmax(z, 1)).sum(1).mean())


def test_a_one_hot_soft_target_has_no_nan():
    z, _, y = make()
    loss = kd_loss(z, y, soft_targets=F.one_hot(y, 5).double(), alpha=0.5)
    torch.testing.assert_close(loss, F.cross_entropy(z, y))
    assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_the_teacher_gets_no_gradient():
    z, t, y = make()
    t.requires_grad_()
    kd_loss(z, y, teacher_logits=t, alpha=0.5).backward()
    assert t.grad is None


def test_unreduced_gradients_are_those_of_each_sample():
    z, t, y = make()
    losses = kd_loss(z, y, teacher_logits=t, alpha=0.5, temperature=2.0, reduction="none")
    for i in range(len(z)):
        alone = z[i : i + 1].detach().requires_grad_()
        loss = kd_loss(alone, y[i : i + 1], teacher_logits=t[i : i + 1], alpha=0.5, temperature=2.0)
        torch.testing.assert_close(losses[i], loss)
        (want,) = torch.autograd.grad(loss, alone)
        (got,) = torch.autograd.grad(losses[i], z, retain_graph=True)
        torch.testing.assert_close(got[i : i + 1], want)
        assert (got[torch.arange(len(z)) != i] == 0).all()


def test_parts_add_up():
    z, t, y = make()
    parts = kd_loss(z, y, teacher_logits=t, alpha=0.3, temperature=2.0, return_parts=True)
    torch.testing.assert_close(parts.loss, 0.7 * parts.hard + 0.3 * parts.soft)
    assert not parts.hard.requires_grad


def test_low_precision_logits_are_computed_in_float32():
    z, t, y = make(8, 50, torch.bfloat16)
    exact = reference(z.detach().double(), t.double(), y, 0.5, 4.0)
    loss = kd_loss(z, y, teacher_logits=t, alpha=0.5, temperature=4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert z.grad.dtype == torch.bfloat16


def test_leading_dimensions_are_samples():
    z, t, y = make(6)
    flat = kd_loss(z, y, teacher_logits=t, alpha=0.5)
    shaped = kd_loss(z.view(2, 3, 5), y.view(2, 3), teacher_logits=t.view(2, 3, 5), alpha=0.5)
    torch.testing.assert_close(flat, shaped)


def test_without_gradients_or_with_large_logits():
    z, t, y = make()
    with torch.no_grad():
        assert torch.isfinite(kd_loss(z * 1e4, y, teacher_logits=t * 1e4, alpha=0.5))


def test_the_module_is_the_function():
    z, t, y = make()
    criterion = KDLoss(alpha=0.4, temperature=3.0, class_weights=torch.rand(5))
    want = kd_loss(z, y, teacher_logits=t, alpha=0.4, temperature=3.0, class_weights=criterion.class_weights)
    assert torch.equal(criterion(z, y, t), want)


def test_it_compiles_in_one_graph():
    z, t, y = make(6, 5, torch.float32)

    def loss(z: torch.Tensor) -> torch.Tensor:
        return kd_loss(z, y, teacher_logits=t, alpha=0.5, temperature=2.0)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(z)
    torch.testing.assert_close(compiled, loss(z))
    torch.testing.assert_close(torch.autograd.grad(compiled, z)[0], torch.autograd.grad(loss(z), z)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"soft_form": "js"}, "soft_form is 'js'"),
        ({"soft_targets": torch.rand(6, 5)}, "not both"),
        ({"teacher_logits": torch.rand(6, 4)}, r"\(6, 4\).*\(6, 5\)"),
        ({"sample_weights": torch.rand(5)}, r"sample_weights has shape \(5,\)"),
        ({"targets": torch.full((6,), 5)}, "labels run from 5 to 5, but there are 5 classes"),
        ({"targets": torch.rand(6)}, "labels have to be integers"),
    ],
)
def test_bad_input_is_named_with_its_numbers(change, message):
    z, t, y = make()
    options = {"targets": y, "teacher_logits": t, "temperature": 2.0, **change}
    with pytest.raises(SparseEngineError, match=message):
        kd_loss(z, options.pop("targets"), **options)
    assert issubclass(ShapeError, SparseEngineError)


FUSED = [
    {"alpha": 0.9, "temperature": 4.0},
    {"temperature": 4.0, "soft_weight": 3.0},
    {"alpha": 0.5, "temperature": 2.7, "label_smoothing": 0.1},
    {"temperature": 3.0, "hard_weight": 0.0, "soft_weight": 2.0},
    {"temperature": 2.0, "soft_form": "ce", "alpha": 0.3},
    {"soft_targets": True, "alpha": 0.7, "soft_form": "ce"},
    {"soft_targets": True, "temperature": 2.0},
    {"no teacher": True, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("settings", FUSED, ids=str)
def test_the_fused_loss_agrees_with_float64(settings, weights, reduction):
    """Forward and backward in one call for float32 on the CPU, against the op's formulas in float64."""
    settings = dict(settings)
    z, t, y = make(40, 70, torch.float32)
    y[::7] = -100
    if settings.pop("soft_targets", False):
        settings["soft_targets"] = t.softmax(1)
    elif not settings.pop("no teacher", False):
        settings["teacher_logits"] = t
    if weights:
        settings |= {"class_weights": torch.rand(70) + 0.1, "sample_weights": torch.rand(40)}
    wide = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}
    exact = z.detach().double().requires_grad_()
    ours = kd_loss(z, y, reduction=reduction, return_parts=True, **settings)
    theirs = kd_loss(exact, y, reduction=reduction, return_parts=True, **wide)
    upstream = torch.rand(40) if reduction == "none" else torch.tensor(0.7)
    ours.loss.backward(upstream)
    theirs.loss.backward(upstream.double())
    for name, own, reference in zip(("loss", "hard", "soft"), ours, theirs, strict=True):
        assert_close_to_fp64(own, reference.detach(), 2e-5, name=name)
    assert_close_to_fp64(z.grad, exact.grad, name="gradient")


def test_the_fused_gradient_may_be_asked_for_again():
    """Its memory is given away the first time; what became of it there must not show in later ones."""
    z, t, y = make(20, 30, torch.float32)
    for upstream in (1.0, 2.5):
        z.grad = None
        loss = kd_loss(z, y, teacher_logits=t, temperature=4.0, alpha=0.9)
        for times in range(1, 4):
            loss.backward(torch.tensor(upstream), retain_graph=True)
            exact = z.detach().double().requires_grad_()
            kd_loss(exact, y, teacher_logits=t.double(), temperature=4.0, alpha=0.9).backward()
            assert_close_to_fp64(z.grad, exact.grad * upstream * times)
            z.grad.data.add_(0.0)
    again = torch.autograd.grad(loss, z, retain_graph=True)[0]
    again.zero_()
    assert_close_to_fp64(torch.autograd.grad(loss, z)[0], exact.grad)


def test_a_gradient_larger_than_the_cache_is_written_past_it():
    z, t, y = make(300, 32001, torch.float32)
    kd_loss(z, y, teacher_logits=t, temperature=4.0, alpha=0.9).backward()
    exact = z.detach()[::50].double().requires_grad_()
    kd_loss(exact, y[::50], teacher_logits=t[::50].double(), temperature=4.0, alpha=0.9, reduction="sum").backward()
    assert_close_to_fp64(z.grad[::50] * 300, exact.grad)


def past_predictions(
    n: int, classes: int, samples: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n, C], labels, a table [samples, C] and the rows of it, in float32.

    The logits rise along the classes, so that the largest so far changes from block to block; one row predicts what the
    table says already (the gradient all but cancels), one is ignored.
    """
    generator = torch.Generator().manual_seed(n * classes)
    samples = 2 * n if samples is None else samples
    z = torch.randn(n, classes, generator=generator) + torch.linspace(0, 3, classes)
    y = torch.randint(0, classes, (n,), generator=generator)
    table = torch.randn(samples, classes, generator=generator).mul(2).softmax(1)
    where = torch.randperm(samples, generator=generator)[:n]
    table[where[0]] = (z[0] * 1.0001).softmax(0)
    y[n // 2] = -100
    return z, y, table, where


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("classes", [1, 2, 17, 1000, 2100])
def test_past_predictions_are_used_and_replaced(classes, reduction, alpha):
    z, y, table, where = past_predictions(12, classes)
    weights, past, upstream = (
        torch.rand(12) + 0.5,
        table.clone().double(),
        torch.rand(12 if reduction == "none" else ()),
    )
    exact = z.double().requires_grad_()
    mixture = alpha * past[where] + (1 - alpha) * F.one_hot(y.clamp(min=0), classes)
    rows = -(mixture * exact.log_softmax(1)).sum(1) * weights.double() * (y != -100)
    want = {"mean": rows.sum() / 11, "sum": rows.sum(), "none": rows}[reduction]
    want.backward(upstream.double())

    z.requires_grad_()
    loss = kd_loss_into_table(z, y, table, where, alpha=alpha, sample_weights=weights, reduction=reduction)
    loss.backward(upstream)
    assert_close_to_fp64(loss, want, name="loss")
    assert_close_to_fp64(z.grad, exact.grad, name="gradient")
    past[where] = exact.detach().softmax(1)
    assert_close_to_fp64(table, past, name="table")
    untouched = torch.ones(len(table), dtype=torch.bool)
    untouched[where] = False
    assert torch.equal(table[untouched].double(), past[untouched])


def test_a_gradient_that_all_but_cancels_is_right_although_its_row_of_the_table_is_replaced():
    z, y, table, where = past_predictions(12, 40)
    past = table[where].double()
    z.requires_grad_()
    kd_loss_into_table(z, y, table, where, alpha=1.0, reduction="sum").backward()
    exact = z.detach().double().softmax(1) * past.sum(1, keepdim=True) - past
    assert_close_to_fp64(z.grad[0], exact[0])


@pytest.mark.parametrize("what", ["double table", "half table", "transposed table", "twice the same sample", "float64"])
def test_tables_that_the_kernel_does_not_take(what):
    z, y, table, where = past_predictions(8, 30)
    if what == "double table":
        table = table.double()
    elif what == "half table":
        table = table.half()
    elif what == "transposed table":
        table = table.t().contiguous().t()
    elif what == "twice the same sample":
        where[3] = where[1]
        z[3] = z[1]  # whichever prediction it keeps
    else:
        z = z.double()
    past = table[where].to(z.dtype)
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = kd_loss_into_table(ours, y, table, where, alpha=0.7)
    want = kd_loss(theirs, y, soft_targets=past, alpha=0.7, soft_form="ce")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, ours)[0], torch.autograd.grad(want, theirs)[0])
    torch.testing.assert_close(
        table[where], z.softmax(1).to(table.dtype), rtol=1e-3 if what == "half table" else 1e-5, atol=0
    )


def test_the_gradient_into_a_table_may_be_asked_for_again_but_not_differentiated():
    z, y, table, where = past_predictions(8, 30)
    w = torch.tensor(2.0, requires_grad=True)
    loss = kd_loss_into_table(z * w, y, table, where, alpha=0.7)
    first = torch.autograd.grad(loss, w, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(2 * loss, w, retain_graph=True)[0], 2 * first)
    with pytest.raises(SparseEngineError, match="overwritten"):
        torch.autograd.grad(loss, w, create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"table": torch.rand(16, 7)}, r"\(16, 7\)"),
        ({"samples": torch.zeros(3, dtype=torch.int64)}, r"samples are torch.int64 \(3,\)"),
        ({"samples": torch.full((8,), 16)}, "samples run from 16 to 16, but the table has 16 rows"),
        ({"alpha": 1.5}, "alpha is 1.5"),
    ],
)
def test_tables_and_samples_that_do_not_fit(change, message):
    z, y, table, where = past_predictions(8, 30)
    with pytest.raises(SparseEngineError, match=message):
        kd_loss_into_table(z, y, **{"table": table, "samples": where, "alpha": 0.5, **change})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, last", [(9, 4), (4, 9), (5, 0), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_with_the_last_batch_is_the_sum_of_its_halves(dtype, n, last, weighted):
    z, t, y = make(n + last, 70, dtype)
    y[:: n + last - 1] = -100
    weights = torch.rand(n + last, dtype=dtype) if weighted else None
    exact = z.detach().double().requires_grad_()
    wide = None if weights is None else weights.double()
    hard = kd_loss(exact, y, sample_weights=wide)
    soft = kd_loss(
        exact[n:], y[n:], teacher_logits=t[n:].double(), temperature=3.0, hard_weight=0.0, soft_weight=0.6,
        sample_weights=None if wide is None else wide[n:],
    )  # fmt: skip
    (hard + soft).backward()
    loss = dlb_loss(z, y, t[n:], weight=0.6, temperature=3.0, sample_weights=weights)
    assert_close_to_fp64(loss, (hard + soft).detach())
    loss.backward()
    assert_close_to_fp64(z.grad, exact.grad)


def test_the_loss_with_the_last_batch_has_second_derivatives():
    z, t, y = make(5, 4)
    assert torch.autograd.gradcheck(lambda z: dlb_loss(z, y, t[2:], weight=0.6), z)
    assert torch.autograd.gradgradcheck(lambda z: dlb_loss(z, y, t[2:], weight=0.6), z)


def test_a_last_batch_that_does_not_fit():
    z, t, y = make(5, 4)
    with pytest.raises(ShapeError, match=r"\(5, 4\) and last_logits \(5, 3\)"):
        dlb_loss(z, y, t[:, :3])
