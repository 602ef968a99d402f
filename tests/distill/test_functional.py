"""The distillation loss: its scale, its gradients, its reductions, its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.distill import KDLoss, kd_loss
from sparse_engine.errors import ShapeError, SparseEngineError


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
