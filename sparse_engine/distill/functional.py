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
    """Loss and gradient in one pass over the logits.

    Per sample, with p = softmax(z), p_T = softmax(z/T), q the teacher's probabilities::

        ∂hard/∂z = (1 − ε) w_y (p − e_y) + ε/C (p Σ_c w_c − w)
        ∂soft/∂z = T (p_T − q)

    When a second derivative is wanted (meta-gradients) the backward pass evaluates the same formula on the saved logits
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
        need_gradient = ctx.needs_input_grad[0]
        hard, soft, gradient = _evaluate(
            logits.detach(), targets, teacher, class_weights, sample_weights, options, need_gradient
        )
        total, hard, soft = _combine(hard, soft, targets, class_weights, sample_weights, options)
        ctx.save_for_backward(logits, targets, teacher, class_weights, sample_weights, gradient)
        ctx.options = options
        ctx.mark_non_differentiable(hard, soft)
        return total, hard, soft

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, targets, teacher, class_weights, sample_weights, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            *_, gradient = _evaluate(logits, targets, teacher, class_weights, sample_weights, ctx.options, True)
        if ctx.options.reduction == "none":
            upstream = upstream.unsqueeze(-1)
        return (upstream * gradient).to(logits.dtype), None, None, None, None, None


def _evaluate(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    class_weights: Tensor | None,
    sample_weights: Tensor | None,
    options: _Options,
    need_gradient: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per-sample hard and soft loss (unweighted) and the gradient of the *reduced* loss, in float32 or float64."""
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    classes = z.shape[-1]
    valid = _valid(targets, options)
    hard_count, soft_count = _denominators(z[..., 0], targets, valid, class_weights, options)
    factor = (
        torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device) if sample_weights is None else sample_weights.to(z)
    )
    if valid is not None:
        factor = factor * valid
    hard = soft = None
    parts: list[Tensor] = []
    if options.hard_weight and targets is not None:
        log_p = torch.log_softmax(z, -1)
        label = targets if valid is None else targets.where(valid, torch.zeros_like(targets))
        weight = None if class_weights is None else class_weights.to(z)
        at_label = log_p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        of_label = torch.ones_like(at_label) if weight is None else weight[label]
        epsilon = options.label_smoothing
        hard = -(1 - epsilon) * of_label * at_label
        if epsilon:
            hard = hard - epsilon / classes * (log_p if weight is None else log_p * weight).sum(-1)
        if valid is not None:
            hard = hard.where(valid, torch.zeros_like(hard))
        if need_gradient:
            p = log_p.exp()
            mass = (1 - epsilon) * of_label
            part = p * (mass if not epsilon else mass + epsilon / classes * _weight_sum(weight, classes)).unsqueeze(-1)
            part = part.scatter_add(-1, label.unsqueeze(-1), -mass.unsqueeze(-1).to(part.dtype))
            if epsilon:
                part = part - epsilon / classes * (1.0 if weight is None else weight)
            parts.append(part * (factor * (options.hard_weight / hard_count)).unsqueeze(-1))
    if teacher is not None:
        temperature = options.temperature
        log_pt = torch.log_softmax(z / temperature, -1)
        if options.teacher_is_logits:
            log_q = torch.log_softmax(teacher.to(z.dtype) / temperature, -1)
            q = log_q.exp()
            own = q * log_q
        else:
            q = teacher.to(z.dtype)
            own = torch.xlogy(q, q)
        cross = q * log_pt
        terms = (own - cross if options.soft_form == "kl" else -cross).where(q > 0, torch.zeros_like(q))
        soft = temperature**2 * terms.sum(-1)
        if valid is not None:
            soft = soft.where(valid, torch.zeros_like(soft))
        if need_gradient:
            total = q.sum(-1, keepdim=True) if not options.teacher_is_logits else 1.0
            part = temperature * (log_pt.exp() * total - q)
            parts.append(part * (factor * (options.soft_weight / soft_count)).unsqueeze(-1))
    if not need_gradient:
        return hard, soft, None
    gradient = parts[0] if len(parts) == 1 else parts[0] + parts[1] if parts else torch.zeros_like(z)
    if valid is not None:  # 0 · inf of an ignored sample would be NaN
        gradient = gradient.where(valid.unsqueeze(-1), torch.zeros_like(gradient))
    return hard, soft, gradient


def _combine(
    hard: Tensor | None,
    soft: Tensor | None,
    targets: Tensor | None,
    class_weights: Tensor | None,
    sample_weights: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and reduction, as the gradient has them."""
    known = hard if hard is not None else soft
    if known is None:
        raise SparseEngineError("the loss has no part left: give targets, teacher_logits or soft_targets, and a weight")
    hard_count, soft_count = _denominators(known, targets, _valid(targets, options), class_weights, options)
    pieces = []
    for part, count in ((hard, hard_count), (soft, soft_count)):
        if part is None:
            pieces.append(torch.zeros_like(known if options.reduction == "none" else known.sum()))
            continue
        part = part if sample_weights is None else part * sample_weights.to(part)
        pieces.append(part if options.reduction == "none" else part.sum() / count)
    if hard is None or soft is None:
        weight = options.soft_weight if hard is None else options.hard_weight
        total = pieces[hard is None] * weight
    else:
        total = options.hard_weight * pieces[0] + options.soft_weight * pieces[1]
    return total, pieces[0], pieces[1]


def _valid(targets: Tensor | None, options: _Options) -> Tensor | None:
    return None if targets is None else targets != options.ignore_index


def _denominators(
    like: Tensor, targets: Tensor | None, valid: Tensor | None, class_weights: Tensor | None, options: _Options
) -> tuple[Tensor | float, Tensor | float]:
    """What the sums of the hard and the soft part are divided by; ``like`` has one entry per sample."""
    if options.reduction != "mean":
        return 1.0, 1.0
    count: Tensor | float = float(max(1, like.numel())) if valid is None else valid.sum().clamp(min=1).to(like.dtype)
    if class_weights is None or targets is None or valid is None:
        return count, count
    of_label = class_weights.to(like)[targets.where(valid, torch.zeros_like(targets))] * valid
    total = of_label.sum()
    return total.where(total > 0, torch.ones_like(total)), count


def _weight_sum(weight: Tensor | None, classes: int) -> Tensor | float:
    return float(classes) if weight is None else weight.sum()


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
    if targets is not None and targets.device.type == "cpu" and targets.numel() and hard_weight:
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
