"""The distillation loss: one definition of its scale, one function through which every loss of this package goes.

For student logits z, labels y, teacher probabilities q and a temperature T, sample by sample::

    hard = (1 − ε) · −log p_y  +  ε/C · Σ_c −log p_c                     p = softmax(z)
    soft = T² · Σ_c q_c · (log q_c − log softmax(z/T)_c)                 a sum over classes, never a mean
    loss = hard_weight · hard + soft_weight · soft

and the mean runs over the valid samples only. The teacher's side is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_engine.errors import ShapeError, SparseEngineError
from sparse_engine.ops.kd_loss import kd_rows, reference

REDUCTIONS = ("mean", "sum", "none")


class LossParts(NamedTuple):
    """The loss and its two parts, unweighted, reduced the same way; the parts carry no gradient."""

    loss: Tensor
    hard: Tensor
    soft: Tensor


def kd_loss(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    soft_targets: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float | None = None,
    hard_weight: float = 1.0,
    soft_weight: float = 1.0,
    soft_form: str = "kl",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    class_weights: Tensor | None = None,
    sample_weights: Tensor | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Cross entropy with hard labels plus ``T² · KL`` to a teacher, in one pass and with the gradient in closed form.

    Example::

        loss = kd_loss(student(x), y, teacher_logits=teacher(x), temperature=4.0, alpha=0.9)
        loss.backward()

    Args:
        logits: student logits, [..., C], float32, float64, or float16/bfloat16 (the arithmetic is then float32).
        targets: labels, int64 [...]; may be None when the hard weight is 0. Samples equal to ``ignore_index`` are not
            valid: they have loss 0, gradient 0, and do not count in the mean.
        teacher_logits: [..., C]; the teacher's probabilities are ``softmax(teacher_logits / T)``. Never differentiated.
        soft_targets: [..., C], probabilities instead of teacher logits (at the temperature T already).
        temperature: T > 0, for both sides of the soft part.
        alpha: shorthand for ``hard_weight = 1 − alpha, soft_weight = alpha``. With alpha = 1 the labels have no
            influence at all.
        hard_weight, soft_weight: factors of the two parts. A part with weight 0 (or without its inputs) is not
            computed.
        soft_form: ``"kl"``, or ``"ce"`` for the cross entropy ``−T² Σ q log p``: the same gradient, the value larger by
            ``T² H(q)``.
        label_smoothing: ε in 0..1, of the hard part.
        ignore_index: the label of samples that do not count.
        class_weights: [C], of the hard part, with the meaning they have in ``torch.nn.functional.cross_entropy`` (its
            mean divides by the sum of the weights of the labels).
        sample_weights: [...], a factor on each sample's whole loss; the mean still divides by the number of valid
            samples.
        reduction: ``"mean"`` over valid samples, ``"sum"``, or ``"none"`` for [...] with right per-sample gradients.
        return_parts: return ``LossParts(loss, hard, soft)``.

    Returns:
        A scalar, or [...] for ``reduction="none"``, in float32 at least; 0 when no sample is valid.

    Raises:
        ShapeError: when shapes do not fit.
        SparseEngineError: for settings out of range or a part whose inputs are missing.

    Source: Hinton et al., arXiv 1503.02531; the same scale as RepDistiller's ``KL(..., reduction="sum") · T² / N``.
    """
    options = _checked(
        logits, targets, teacher_logits, soft_targets, temperature, alpha, hard_weight, soft_weight, soft_form,
        label_smoothing, ignore_index, class_weights, sample_weights, reduction,
    )  # fmt: skip
    teacher = teacher_logits if teacher_logits is not None else soft_targets
    teacher = None if teacher is None or options.soft_weight == 0 else teacher.detach()
    loss, hard, soft = _SoftmaxLoss.apply(logits, targets, teacher, class_weights, sample_weights, options)
    return LossParts(loss, hard, soft) if return_parts else loss


@dataclass(frozen=True)
class _Options:
    temperature: float
    hard_weight: float
    soft_weight: float
    teacher_is_logits: bool
    soft_form: str
    label_smoothing: float
    ignore_index: int
    reduction: str


class _SoftmaxLoss(torch.autograd.Function):
    """Loss and gradient in one pass over the logits, by the op ``kd_rows``: the reduction's factors go into its scales.

    When a second derivative is wanted (meta-gradients) the backward pass evaluates the op's formula on the saved logits
    with autograd on.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor | None,
        teacher: Tensor | None,
        class_weights: Tensor | None,
        sample_weights: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        classes = logits.shape[-1]
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.detach().reshape(-1, classes)
        labels = None if targets is None else targets.reshape(-1).long()
        theirs = None if teacher is None else teacher.reshape(-1, classes).to(rows.dtype)
        weights = None if class_weights is None else class_weights.detach().to(exact)
        hard_scale, soft_scale = _scales(rows, labels, weights, sample_weights, options, exact)
        ctx.settings = (
            options.temperature, not options.teacher_is_logits, options.soft_form == "kl", options.hard_weight != 0,
            options.label_smoothing, options.ignore_index,
        )  # fmt: skip
        names = ("temperature", "soft_targets", "kl", "hard", "label_smoothing", "ignore_index")
        if labels is None and theirs is None:
            raise SparseEngineError("the loss has no part left: give targets, teacher_logits or soft_targets")
        hard, soft, gradient = kd_rows(
            rows, labels, theirs, class_weights=weights, hard_scale=hard_scale * options.hard_weight,
            soft_scale=soft_scale * options.soft_weight, gradient=ctx.needs_input_grad[0],
            **dict(zip(names, ctx.settings, strict=True)),
        )  # fmt: skip
        hard, soft = (
            (part * scale).view(logits.shape[:-1]) for part, scale in ((hard, hard_scale), (soft, soft_scale))
        )
        if options.reduction != "none":
            hard, soft = hard.sum(), soft.sum()
        ctx.save_for_backward(
            logits,
            labels,
            theirs,
            weights,
            hard_scale * options.hard_weight,
            soft_scale * options.soft_weight,
            gradient,
        )
        ctx.reduction = options.reduction
        ctx.mark_non_differentiable(hard, soft)
        return options.hard_weight * hard + options.soft_weight * soft, hard, soft

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, labels, theirs, weights, hard_scale, soft_scale, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            rows = logits.reshape(-1, logits.shape[-1])
            *_, gradient = reference(rows, labels, theirs, weights, hard_scale, soft_scale, *ctx.settings, True)
        if ctx.reduction == "none":
            upstream = upstream.unsqueeze(-1)
        return (upstream * gradient.view(logits.shape)).to(logits.dtype), None, None, None, None, None


def _scales(
    rows: Tensor,
    labels: Tensor | None,
    class_weights: Tensor | None,
    sample_weights: Tensor | None,
    options: _Options,
    exact: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The factor on each row's hard and soft loss: its sample weight over what the mean divides by."""
    factor = rows.new_ones(len(rows), dtype=exact)
    if sample_weights is not None:
        factor = factor * sample_weights.detach().reshape(-1).to(exact)
    if options.reduction != "mean":
        return factor, factor
    if labels is None:
        return factor / max(1, len(rows)), factor / max(1, len(rows))
    valid = labels != options.ignore_index
    count = valid.sum().clamp(min=1).to(exact)
    if class_weights is None:
        return factor / count, factor / count
    of_labels = (class_weights[labels.where(valid, torch.zeros_like(labels))] * valid).sum()
    return factor / of_labels.where(of_labels > 0, torch.ones_like(of_labels)), factor / count


def _checked(
    logits: Tensor,
    targets: Tensor | None,
    teacher_logits: Tensor | None,
    soft_targets: Tensor | None,
    temperature: float,
    alpha: float | None,
    hard_weight: float,
    soft_weight: float,
    soft_form: str,
    label_smoothing: float,
    ignore_index: int,
    class_weights: Tensor | None,
    sample_weights: Tensor | None,
    reduction: str,
) -> _Options:
    if alpha is not None:
        if not 0 <= alpha <= 1:
            raise SparseEngineError(f"alpha is {alpha}; it has to lie in 0..1 (1 = teacher only)")
        hard_weight, soft_weight = 1 - alpha, alpha
    if not logits.is_floating_point() or logits.dim() < 1:
        raise ShapeError(f"logits are {logits.dtype} {tuple(logits.shape)}; expected floating point [..., classes]")
    if not temperature > 0:
        raise SparseEngineError(f"temperature is {temperature}; it has to be positive")
    if not 0 <= label_smoothing <= 1:
        raise SparseEngineError(f"label_smoothing is {label_smoothing}; it has to lie in 0..1")
    if reduction not in REDUCTIONS:
        raise SparseEngineError(f"reduction is {reduction!r}; it has to be one of {', '.join(REDUCTIONS)}")
    if soft_form not in ("kl", "ce"):
        raise SparseEngineError(f"soft_form is {soft_form!r}; it has to be 'kl' or 'ce'")
    if teacher_logits is not None and soft_targets is not None:
        raise SparseEngineError("give teacher_logits or soft_targets, not both")
    if targets is None and hard_weight and alpha is not None:
        raise SparseEngineError(f"alpha={alpha} needs targets for the hard part; give them, or alpha=1")
    samples = tuple(logits.shape[:-1])
    for name, tensor, shape in (
        ("targets", targets, samples),
        ("teacher_logits", teacher_logits, tuple(logits.shape)),
        ("soft_targets", soft_targets, tuple(logits.shape)),
        ("sample_weights", sample_weights, samples),
        ("class_weights", class_weights, (logits.shape[-1],)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(
                f"{name} has shape {tuple(tensor.shape)}, but logits {tuple(logits.shape)} ask for {shape} "
                "(classes last)"
            )
    if targets is not None and (targets.is_floating_point() or targets.dtype == torch.bool):
        raise ShapeError(f"targets are {targets.dtype}; labels have to be integers (probabilities go to soft_targets)")
    # reading labels costs a synchronisation on a GPU and a graph break under torch.compile; there the gather checks
    # them
    readable = targets is not None and targets.device.type == "cpu" and not torch.compiler.is_compiling()
    if targets is not None and readable and targets.numel() and hard_weight:
        real = targets[targets != ignore_index]
        if real.numel() and not (int(real.min()) >= 0 and int(real.max()) < logits.shape[-1]):
            raise SparseEngineError(
                f"labels run from {int(real.min())} to {int(real.max())}, but there are {logits.shape[-1]} classes "
                f"(0 to {logits.shape[-1] - 1}); ignore_index is {ignore_index}"
            )
    return _Options(
        float(temperature), float(hard_weight), float(soft_weight), teacher_logits is not None, soft_form,
        float(label_smoothing), int(ignore_index), reduction,
    )  # fmt: skip
