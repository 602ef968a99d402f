"""`kd_rows` against PyTorch's own cross entropy and KL divergence in float64, on every backend that a CPU has."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn import functional

from sparse_engine.errors import BackendError, ShapeError
from sparse_engine.ops import kd_loss, kd_rows, native
from sparse_engine.ops.kd_loss import explain_kd_rows
from tests.helpers import assert_close_to_fp64

BACKENDS = ["torch"] if native.why_not_extension("kd_rows") else ["cpu", "torch"]


@dataclass(frozen=True)
class LossCase:
    name: str
    rows: int = 9
    classes: int = 23
    teacher: str = "logits"  # "logits", "probabilities", "one class" or ""
    targets: bool = True
    settings: dict = field(default_factory=dict)
    weights: bool = False
    scales: bool = True
    ignored: tuple[int, ...] = ()
    spread: float = 1.0  # of the logits
    wide: bool = False  # rows lie further apart than they are long

    def make(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(self.rows * 1000 + self.classes)

        def randn(*shape):
            return (torch.randn(shape, generator=generator) * self.spread).to(dtype)

        def laid_out(x):
            return torch.cat([x, torch.full_like(x[:, :3], math.nan)], 1)[:, : x.shape[1]] if self.wide else x

        logits = laid_out(randn(self.rows, self.classes))
        teacher = None
        if self.teacher == "logits":
            teacher = laid_out(randn(self.rows, self.classes))
        elif self.teacher == "probabilities":
            teacher = torch.softmax(randn(self.rows, self.classes).float(), 1).to(dtype)
        elif self.teacher == "one class":
            teacher = functional.one_hot(torch.arange(self.rows) % self.classes, self.classes).to(dtype)
        targets = None
        if self.targets:
            targets = torch.randint(0, max(self.classes, 1), (self.rows,), generator=generator)
            for row in self.ignored:
                targets[row] = self.settings.get("ignore_index", -100)
        scalar = torch.float64 if dtype == torch.float64 else torch.float32
        scales = [torch.rand(self.rows, generator=generator).to(scalar) if self.scales else None for _ in range(2)]
        if self.scales and self.rows > 2:
            scales[0][1] = scales[1][2] = 0.0
        weights = torch.rand(self.classes, generator=generator).to(scalar) if self.weights else None
        settings = {**self.settings, "soft_targets": self.teacher not in ("logits", "")}
        return logits, targets, teacher, {"class_weights": weights, **settings}, scales


CASES = [
    LossCase("both parts"),
    LossCase("temperature", settings={"temperature": 4.0}),
    LossCase("odd temperature", settings={"temperature": 2.7}),
    LossCase("small temperature", settings={"temperature": 0.5}),
    LossCase("soft targets", teacher="probabilities", settings={"temperature": 3.0}),
    LossCase("soft targets of one class", teacher="one class"),
    LossCase("cross entropy to the teacher", settings={"kl": False, "temperature": 2.0}),
    LossCase("cross entropy to soft targets", teacher="probabilities", settings={"kl": False}),
    LossCase("hard only", teacher=""),
    LossCase("soft only", targets=False),
    LossCase("labels only say what is ignored", settings={"hard": False}, ignored=(0, 4)),
    LossCase("label smoothing", settings={"label_smoothing": 0.1}),
    LossCase("full label smoothing", settings={"label_smoothing": 1.0}),
    LossCase("class weights", weights=True),
    LossCase("class weights and smoothing", weights=True, settings={"label_smoothing": 0.2, "temperature": 4.0}),
    LossCase("ignored rows", ignored=(0, 3, 8)),
    LossCase("another ignore index", ignored=(0, 3), settings={"ignore_index": 5}),
    LossCase("all rows ignored", rows=3, ignored=(0, 1, 2)),
    LossCase("no scales", scales=False),
    LossCase("one class", classes=1),
    LossCase("two classes", classes=2),
    *(LossCase(f"{classes} classes", classes=classes, settings={"temperature": 4.0}) for classes in (15, 16, 17, 1000)),
    LossCase("one row", rows=1),
    LossCase("no rows", rows=0),
    LossCase("large logits", spread=100.0),
    LossCase("large logits, low temperature", spread=50.0, settings={"temperature": 0.5}),
    LossCase("wide rows", wide=True),
]


def reference(logits, targets, teacher, settings, scales):
    """Both losses by PyTorch's own functions in float64, and the gradient of their scaled sum by autograd."""
    z = logits.double().requires_grad_()
    temperature, ignored = settings.get("temperature", 1.0), settings.get("ignore_index", -100)
    hard = soft = torch.zeros(len(z), dtype=torch.float64)
    weights = settings["class_weights"]
    if targets is not None and settings.get("hard", True):
        hard = functional.cross_entropy(
            z,
            targets,
            None if weights is None else weights.double(),
            ignore_index=ignored,
            label_smoothing=settings.get("label_smoothing", 0.0),
            reduction="none",
        )
    if teacher is not None:
        q = teacher.double() if settings["soft_targets"] else torch.softmax(teacher.double() / temperature, 1)
        log_p = torch.log_softmax(z / temperature, 1)
        if settings.get("kl", True):
            soft = temperature**2 * functional.kl_div(log_p, q, reduction="none").sum(1)
        else:
            soft = -(temperature**2) * (q * log_p).sum(1)
        if targets is not None:
            soft = soft.where(targets != ignored, 0.0)
    total = sum(
        (part if scale is None else part * scale.double()).sum()
        for part, scale in zip((hard, soft), scales, strict=True)
    )
    gradient = torch.autograd.grad(total, z)[0] if total.requires_grad else torch.zeros_like(z)
    return hard.detach(), soft.detach(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_losses_and_gradient(case, backend, poisoned_memory):
    logits, targets, teacher, settings, scales = case.make()
    before = logits.clone()
    result = kd_rows(
        logits, targets, teacher, **settings, hard_scale=scales[0], soft_scale=scales[1], gradient=True, impl=backend
    )
    hard, soft, gradient = reference(logits, targets, teacher, settings, scales)
    assert_close_to_fp64(result.hard, hard, name="hard loss")
    assert_close_to_fp64(result.soft, soft, 2e-5, name="soft loss")
    assert_close_to_fp64(result.gradient, gradient, name="gradient")
    assert torch.equal(logits, before)
    alone = kd_rows(logits, targets, teacher, **settings, impl=backend)
    assert alone.gradient.shape == (0, case.classes)
    assert torch.equal(alone.hard, result.hard)
    assert torch.equal(alone.soft, result.soft)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:16:3], ids=lambda case: case.name)
def test_autograd_agrees_with_the_fused_gradient(case, backend):
    logits, targets, teacher, settings, scales = case.make()
    logits.requires_grad_()
    result = kd_rows(logits, targets, teacher, **settings, impl=backend)
    (result.hard * scales[0] + result.soft * scales[1]).sum().backward()
    *_, gradient = reference(logits.detach(), targets, teacher, settings, scales)
    assert_close_to_fp64(logits.grad, gradient)


@pytest.mark.parametrize("case", CASES[:16], ids=lambda case: case.name)
def test_gradients_of_any_order(case):
    small = LossCase(**{**case.__dict__, "rows": 9 if case.ignored else 4, "classes": 6})
    logits, targets, teacher, settings, scales = small.make(torch.float64)
    logits.requires_grad_()

    def function(z):
        result = kd_rows(z, targets, teacher, **settings)
        return (result.hard * (1 + scales[0])).sum() + (result.soft * (1 + scales[1])).sum()

    assert torch.autograd.gradcheck(function, logits)
    assert torch.autograd.gradgradcheck(function, logits, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_computed_in_float32(dtype):
    logits, targets, teacher, settings, scales = LossCase("", settings={"temperature": 4.0}).make(dtype)
    result = kd_rows(logits, targets, teacher, **settings, hard_scale=scales[0], soft_scale=scales[1], gradient=True)
    hard, soft, gradient = reference(logits, targets, teacher, settings, scales)
    assert result.hard.dtype == torch.float32
    assert result.gradient.dtype == dtype
    assert_close_to_fp64(result.hard, hard)
    assert_close_to_fp64(result.soft, soft)
    # The gradient is rounded once, to the logits' type.
    assert_close_to_fp64(result.gradient, gradient, torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_that_are_no_class_show_as_nan(backend):
    logits = torch.randn(4, 5)
    targets = torch.tensor([0, 5, -1, -100])
    result = kd_rows(logits, targets, gradient=True, impl=backend)
    assert result.hard.isnan().tolist() == [False, True, True, False]
    assert result.gradient.isnan().all(1).tolist() == [False, True, True, False]
    assert not result.gradient[3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_may_hold_anything(backend):
    logits = torch.randn(3, 5)
    logits[1] = math.nan
    result = kd_rows(logits, torch.tensor([0, -100, 1]), torch.randn(3, 5), gradient=True, impl=backend)
    assert result.hard[1] == result.soft[1] == 0
    assert not result.gradient[1].any()
    assert result.gradient[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_classes(backend):
    """Logits of −∞ on both sides: classes that cannot occur add nothing."""
    logits, teacher = torch.randn(4, 6), torch.randn(4, 6)
    logits[:, 2], teacher[:, 2] = -math.inf, -math.inf
    targets = torch.tensor([0, 1, 3, 4])
    result = kd_rows(logits, targets, teacher, temperature=2.0, gradient=True, impl=backend)
    keep = [0, 1, 3, 4, 5]
    alone = kd_rows(logits[:, keep], torch.tensor([0, 1, 2, 3]), teacher[:, keep], temperature=2.0, gradient=True)
    torch.testing.assert_close(result.hard, alone.hard)
    torch.testing.assert_close(result.soft, alone.soft)
    torch.testing.assert_close(result.gradient[:, keep], alone.gradient)
    assert not result.gradient[:, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_that_is_the_student_costs_nothing(backend):
    logits = torch.randn(50, 1000) * 5
    result = kd_rows(logits, None, logits.clone(), temperature=4.0, gradient=True, impl=backend)
    assert result.soft.abs().max() < 1e-4
    assert result.gradient.abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_result_run_to_run(backend):
    logits, targets, teacher, settings, _ = LossCase("", rows=200, classes=1000).make()
    first, second = (kd_rows(logits, targets, teacher, **settings, gradient=True, impl=backend) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("what", ["everything", "no labels", "no teacher"])
def test_the_reference_takes_a_few_rows_at_a_time(what, gradient, monkeypatch):
    logits, targets, teacher, settings, scales = LossCase("", weights=True, ignored=(1,)).make()
    given = (logits, None if what == "no labels" else targets, None if what == "no teacher" else teacher)
    settings |= {"hard_scale": scales[0], "soft_scale": scales[1], "gradient": gradient, "impl": "torch"}
    whole = kd_rows(*given, **settings)
    monkeypatch.setattr(kd_loss, "CHUNK", 4 * logits.shape[1])
    for ours, theirs in zip(kd_rows(*given, **settings), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(backend, gradient):
    logits, targets, teacher, settings, scales = LossCase("", weights=True, ignored=(1,)).make()
    inputs = (
        logits.requires_grad_(), targets, teacher, settings["class_weights"], *scales, 4.0, False, True, True, 0.1,
        -100, gradient, backend,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sparse_engine.kd_rows.default, inputs)


def test_compile_without_graph_breaks():
    logits, targets, teacher, settings, _ = LossCase("", ignored=(2,)).make()

    def function(z):
        result = kd_rows(z * 2, targets, teacher, **settings)
        return (result.hard + 3 * result.soft).mean()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        z = logits.clone().requires_grad_()
        call(z).backward()
        results.append(z.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets has shape \(3,\), \(9,\) expected"),
        ({"targets": torch.zeros(9)}, "torch.int64 expected"),
        ({"teacher": torch.zeros(9, 3)}, "teacher has shape"),
        ({"class_weights": torch.ones(3)}, "class_weights"),
        ({"hard_scale": torch.ones(1)}, "hard_scale"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"targets": None, "teacher": None}, "no loss"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    logits, targets, teacher, _, _ = CASES[0].make()
    with pytest.raises(ShapeError, match=message):
        kd_rows(logits, **{"targets": targets, "teacher": teacher, **change})


def test_logits_must_be_a_float_matrix():
    with pytest.raises(ShapeError, match="rows, classes"):
        kd_rows(torch.randn(2, 3, 4), torch.zeros(2, dtype=torch.int64))


def test_explain_and_refuse():
    logits, targets, *_ = CASES[0].make(torch.float64)
    explanation = explain_kd_rows(logits, targets, temperature=2.0)
    assert explanation.chosen == "torch"
    assert explanation.reasons["cpu"]
    with pytest.raises(BackendError, match="cpu"):
        kd_rows(logits, targets, impl="cpu")


@given(
    st.integers(0, 6), st.integers(1, 70), st.floats(0.3, 8.0), st.floats(0.0, 1.0), st.booleans(), st.integers(0, 999)
)
@example(1, 2, 2.0, 0.0, False, 0)  # teacher and student nearly agree
def test_any_shape_and_setting(rows, classes, temperature, smoothing, weights, seed):
    torch.manual_seed(seed)
    settings = {"temperature": temperature, "label_smoothing": smoothing}
    logits, targets, teacher, settings, scales = LossCase("", rows, classes, settings=settings, weights=weights).make()
    hard, _, gradient = reference(logits, targets, teacher, settings, scales)
    for backend in BACKENDS:
        result = kd_rows(
            logits,
            targets,
            teacher,
            **settings,
            hard_scale=scales[0],
            soft_scale=scales[1],
            gradient=True,
            impl=backend,
        )
        assert_close_to_fp64(result.hard, hard)
        assert_close_to_fp64(result.gradient, gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [2, 3, 40, 1000])
@pytest.mark.parametrize("what", ["teacher", "label", "smoothing", "parts"])
def test_a_gradient_that_all_but_cancels_keeps_its_precision(what, classes, backend):
    """Each row is compared at its own scale: its largest element, far below the terms it is the difference of."""
    for gap in (1e-1, 1e-2, 1e-3, 1e-5):
        logits = torch.randn(8, classes)
        targets, teacher, settings, scales = None, None, {"temperature": 3.0}, [torch.rand(8) + 0.5 for _ in range(2)]
        if what == "teacher":
            teacher = logits * (1 + gap)
        elif what == "label":
            targets = torch.arange(8) % classes
            logits[torch.arange(8), targets] += 8 - math.log(gap)
        elif what == "smoothing":
            logits, targets, settings["label_smoothing"] = logits * gap, torch.zeros(8, dtype=torch.int64), 1.0
        else:  # the hard part asks for what the soft part forbids, but for a remainder
            logits, targets, settings = logits * 0, torch.zeros(8, dtype=torch.int64), {"temperature": 1.0}
            teacher = torch.full((8, classes), 1 / (classes - 1))
            teacher[:, 0] = 0
            scales = [torch.full((8,), 1 / classes), torch.full((8,), (1 + gap) * (1 - 1 / classes) ** 2)]
        settings |= {"soft_targets": what == "parts", "class_weights": None}
        *_, gradient = reference(logits, targets, teacher, settings, scales)
        settings |= {"hard_scale": scales[0], "soft_scale": scales[1], "gradient": True}
        result = kd_rows(logits, targets, teacher, **settings, impl=backend)
        for ours, exact in zip(result.gradient, gradient, strict=True):
            assert_close_to_fp64(ours, exact)
