"""The distillation loss: one definition of its scale, one function through which every loss of this package goes.

For student logits z, labels y, teacher probabilities q and a temperature T, sample by sample::

    hard = (1 − ε) · −log p_y  +  ε/C · Σ_c −log p_c                     p = softmax(z)
    soft = T² · Σ_c q_c · (log q_c − log softmax(z/T)_c)                 a sum over classes, never a mean
    loss = hard_weight · hard + soft_weight · soft

and the mean runs over the valid samples only. The teacher's side is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_engine.errors import ShapeError, SparseEngineError
from sparse_engine.ops import native
from sparse_engine.ops.kd_loss import fused_kd_loss, kd_rows, reference, scale_gradient, scales_in_place
from sparse_engine.ops.kd_table import TOP_K, kd_table_rows, past_predictions, runs_in_one_pass, store_predictions
from sparse_engine.ops.linear_kd import linear_kd

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
    loss, hard, soft = _SoftmaxLoss.apply(logits, targets, teacher, class_weights, sample_weights, options, None)
    return LossParts(loss, hard, soft) if return_parts else loss


def kd_loss_into_table(
    logits: Tensor,
    targets: Tensor,
    table: Tensor,
    samples: Tensor,
    *,
    alpha: float,
    index: Tensor | None = None,
    ignore_index: int = -100,
    sample_weights: Tensor | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Cross entropy against ``(1 − α) · onehot + α · table[samples]``, which then holds ``softmax(logits)``: the loss
    of PS-KD with its table of past predictions (arXiv 2006.12000).

    Example::

        table = torch.nn.functional.one_hot(labels, 10).float()
        loss = kd_loss_into_table(model(x), y, table, indices, alpha=0.8)
        loss.backward()

    A contiguous float32 table on the CPU, and any contiguous one on a GPU (best in float16), is read and replaced in
    the same pass that computes loss and gradient; others by operations of PyTorch's.

    Args:
        logits: [B, C] of the student.
        targets: int64 [B] labels. Rows equal to ``ignore_index`` have no loss; what they predict is stored all the
            same.
        table: [N, C] floating point, changed in place; or, with ``index``, the k largest probabilities of each sample,
            [N, k], the rest of the mass being spread evenly over the other classes.
        samples: int64 [B], the rows of the table. On a GPU they are not looked at beforehand: each may come once only,
            and the loss of a sample that the table does not have is NaN.
        index: int32 [N, k], the classes of a top-k table (-1: unused), changed in place; k is 1, 2, 4, 8 or 16.
        alpha: share of the past predictions, 0..1.
        ignore_index, sample_weights, reduction, return_parts: as for ``kd_loss``.

    Returns:
        As ``kd_loss``. The past predictions are gone afterwards, so the gradient cannot be differentiated again
        (``create_graph=True``): use ``kd_loss(…, soft_targets=table[samples], soft_form="ce")`` for that.

    Raises:
        ShapeError: when shapes do not fit.
        SparseEngineError: for settings out of range, or samples that the table does not have.
    """
    options = _checked(
        logits, targets, None, None, 1.0, alpha, 1.0, 1.0, "ce", 0.0, ignore_index, None, sample_weights, reduction,
    )  # fmt: skip
    width = logits.shape[1:] if index is None else index.shape[1:]
    if logits.dim() != 2 or not table.is_floating_point() or table.shape[1:] != width:
        raise ShapeError(
            f"logits {tuple(logits.shape)} and the table, {table.dtype} {tuple(table.shape)}: floats [B, C] and "
            f"{'[N, C]' if index is None else f'{tuple(index.shape)} as of its index'} expected"
        )
    if index is not None and (index.dtype != torch.int32 or index.shape != table.shape or table.shape[1] not in TOP_K):
        raise ShapeError(f"index is {index.dtype} {tuple(index.shape)}; int32 [N, k] with k of {TOP_K} expected")
    if samples.shape != targets.shape or samples.dtype != torch.int64:
        raise ShapeError(f"samples are {samples.dtype} {tuple(samples.shape)}; int64 {tuple(targets.shape)} expected")
    if _on_the_host(samples) and samples.numel():
        first, last = int(samples.min()), int(samples.max())
        if first < 0 or last >= len(table):
            raise SparseEngineError(f"samples run from {first} to {last}, but the table has {len(table)} rows")
    loss, hard, soft = _SoftmaxLoss.apply(
        logits, targets, None, None, sample_weights, options, _Table(table.detach(), samples, index)
    )
    return LossParts(loss, hard, soft) if return_parts else loss


def dlb_loss(
    logits: Tensor,
    targets: Tensor,
    last_logits: Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 3.0,
    sample_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy of all rows plus ``weight · T² · KL`` from ``last_logits`` to the last rows, in one pass: the loss
    of DLB (arXiv 2203.16172).

    Example::

        both = model(torch.cat([x, last_x]))
        loss = dlb_loss(both, torch.cat([y, last_y]), last_logits)

    Args:
        logits: [B + n, C]: this batch, then the n samples of the last one again.
        targets: int64 [B + n] labels.
        last_logits: [n, C], what the model said about the last n rows then. Never differentiated.
        weight: α. temperature: T.
        sample_weights: [B + n], a factor on each row's whole loss.

    Returns:
        A scalar: the mean over all rows of the hard part plus that over the last n of the soft part.

    Raises:
        ShapeError: when shapes do not fit.
    """
    options = _checked(
        logits, targets, None, None, temperature, None, 1.0, weight, "kl", 0.0, -100, None, sample_weights, "mean",
    )  # fmt: skip
    first = len(logits) - len(last_logits)
    if logits.dim() != 2 or last_logits.dim() != 2 or first < 0 or last_logits.shape[1] != logits.shape[1]:
        raise ShapeError(
            f"logits {tuple(logits.shape)} and last_logits {tuple(last_logits.shape)}: [B + n, C] and [n, C] expected"
        )
    options = replace(options, teacher_is_logits=True, teacher_from=first)
    return _SoftmaxLoss.apply(logits, targets, last_logits.detach(), None, sample_weights, options, None)[0]


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    sample_weights: Tensor | None = None,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """``kd_loss(hidden @ weight.T, targets, teacher_logits=teacher_hidden @ teacher_weight.T)`` a chunk of rows at a
    time: neither logits matrix is ever stored as a whole.

    Example::

        loss = linear_kd_loss(student.body(x), student.head.weight, teacher.body(x), teacher.head.weight, y, alpha=0.9)
        loss.backward()

    Args:
        hidden: [..., H], the student's last hidden state. weight: [C, H]. bias: [C] or None. The gradients of these
            three are computed with the loss, as far as they are wanted.
        teacher_hidden: [..., H_t]. teacher_weight: [C, H_t]. teacher_bias: [C] or None. Never differentiated.
        targets: int64 [...] labels; may be None with alpha = 1.
        temperature, alpha, label_smoothing, ignore_index, sample_weights: as for ``kd_loss``.
        reduction: ``"mean"`` over valid samples, or ``"sum"``.
        chunk: rows at a time; by default a sixteenth of them, at least 256.

    Returns:
        A scalar, in float32 at least. It can be differentiated once.

    Raises:
        ShapeError: when shapes do not fit. SparseEngineError: for settings out of range.
    """
    if reduction not in ("mean", "sum"):
        raise SparseEngineError(f"reduction is {reduction!r}; 'mean' or 'sum' expected")
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise SparseEngineError(
            f"alpha is {alpha} and has to lie in 0..1; temperature is {temperature}, positive expected"
        )
    if targets is None and alpha < 1:
        raise SparseEngineError(f"alpha={alpha} needs targets for the hard part; give them, or alpha=1")
    if hidden.shape[:-1] != teacher_hidden.shape[:-1] or hidden.dim() < 1:
        raise ShapeError(
            f"hidden {tuple(hidden.shape)} and teacher_hidden {tuple(teacher_hidden.shape)}: same samples expected"
        )
    rows = hidden.reshape(-1, hidden.shape[-1])
    theirs = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1])
    labels = None if targets is None else targets.reshape(-1).long()
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = rows.new_ones(len(rows), dtype=exact)
    if sample_weights is not None:
        scale = scale * sample_weights.detach().reshape(-1)
    if reduction == "mean":
        scale = scale / (max(len(rows), 1) if labels is None else (labels != ignore_index).sum().clamp(min=1))
    constants = (
        theirs,
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        labels,
        scale,
    )
    settings = (float(temperature), float(alpha), float(label_smoothing), int(ignore_index), chunk)
    return _LinearLoss.apply(rows, weight, bias, constants, settings)


class _LinearLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the chunks; the backward pass only scales."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, constants: Any, settings: Any) -> Tensor:
        temperature, alpha, label_smoothing, ignore_index, chunk = settings
        wanted = any(ctx.needs_input_grad[:3])
        found = linear_kd(
            hidden, weight, bias, *constants, temperature=temperature, alpha=alpha, label_smoothing=label_smoothing,
            ignore_index=ignore_index, chunk=chunk, gradient=wanted,
        )  # fmt: skip
        ctx.save_for_backward(found.hidden, found.weight, found.bias)
        return found.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [
            (gradient * upstream).to(gradient.dtype) if wanted else None
            for gradient, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
        ]
        return *gradients, None, None


class _Table(NamedTuple):
    """Past predictions and the rows of them that a batch uses."""

    values: Tensor  # [N, C], or [N, k]
    samples: Tensor  # [B]
    index: Tensor | None = None  # [N, k]


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
    teacher_from: int = 0  # rows before it have no teacher


class _SoftmaxLoss(torch.autograd.Function):
    """Loss and gradient in one pass over the logits: by one call into C++ where that can run it, else by the op
    ``kd_rows`` with the reduction's factors in its scales.

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
        table: _Table | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        classes = logits.shape[-1]
        exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
        rows = logits.detach().reshape(-1, classes)
        labels = None if targets is None else targets.reshape(-1).long()
        theirs = None if teacher is None else teacher.reshape(-1, classes).to(rows.dtype)
        weights = None if class_weights is None else class_weights.detach().to(exact)
        factors = None if sample_weights is None else sample_weights.detach().reshape(-1).to(exact)
        if labels is None and theirs is None:
            raise SparseEngineError("the loss has no part left: give targets, teacher_logits or soft_targets")
        ctx.options, ctx.exact, ctx.overwritten = options, exact, False

        def fuse(table: _Table | None) -> tuple[Tensor, ...] | None:
            if torch.compiler.is_compiling():
                return None
            return fused_kd_loss(
                rows, labels, theirs, table=None if table is None else (table.values, table.samples),
                teacher_from=options.teacher_from, class_weights=weights, sample_weights=factors,
                temperature=options.temperature,
                soft_targets=not options.teacher_is_logits, kl=options.soft_form == "kl",
                hard_weight=options.hard_weight if labels is not None else 0.0,
                soft_weight=options.soft_weight if theirs is not None or table is not None else 0.0,
                label_smoothing=options.label_smoothing, ignore_index=options.ignore_index,
                reduction=options.reduction, gradient=ctx.needs_input_grad[0],
            )  # fmt: skip

        fused = fuse(table) if table is None or table.index is None else None
        if table is not None:
            ctx.overwritten = fused is not None
            if fused is None:
                scale, _ = _scales(rows, labels, weights, factors, options, exact)
                call = (rows, labels, table.values, table.index, table.samples, scale, options.soft_weight)
                if not torch.compiler.is_compiling() and runs_in_one_pass(*call, options.ignore_index):
                    hard, soft, ctx.gradient = kd_table_rows(
                        rows, labels, table.values, table.samples, scale, alpha=options.soft_weight, index=table.index,
                        ignore_index=options.ignore_index, gradient=ctx.needs_input_grad[0],
                    )  # fmt: skip
                    ctx.overwritten = True
                    ctx.save_for_backward(logits, labels, None, weights, factors)
                    return _reduced(ctx, hard * scale, soft * scale, options, logits.shape[:-1])
                theirs = past_predictions(table.values, table.index, table.samples, classes).to(rows.dtype)
                store_predictions(table.values, table.index, table.samples, torch.softmax(rows.to(exact), 1))
                fused = fuse(None)
        if fused is not None:
            loss, hard, soft, ctx.gradient = fused
            ctx.save_for_backward(logits, labels, theirs, weights, factors)
            if options.reduction == "none" and logits.dim() != 2:
                loss, hard, soft = (part.reshape(logits.shape[:-1]) for part in (loss, hard, soft))
            ctx.mark_non_differentiable(hard, soft)
            return loss, hard, soft
        hard_scale, soft_scale = _scales(rows, labels, weights, factors, options, exact)
        hard, soft, gradient = kd_rows(
            rows, labels, _padded(theirs, options), class_weights=weights, hard_scale=hard_scale * options.hard_weight,
            soft_scale=soft_scale * options.soft_weight, gradient=ctx.needs_input_grad[0],
            **_settings(options),
        )  # fmt: skip
        if options.teacher_from:
            soft = torch.cat([torch.zeros_like(soft[: options.teacher_from]), soft[options.teacher_from :]])
        if not torch.compiler.is_compiling() and scales_in_place(gradient):
            ctx.gradient = gradient  # given away, and scaled where it lies, in the backward pass
            ctx.save_for_backward(logits, labels, theirs, weights, factors)
        else:
            ctx.save_for_backward(logits, labels, theirs, weights, factors, gradient)
        return _reduced(ctx, hard * hard_scale, soft * soft_scale, options, logits.shape[:-1])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        options, none = ctx.options, (None,) * 6
        logits, labels, theirs, weights, factors, *kept = ctx.saved_tensors
        if options.reduction == "none":
            upstream = upstream.unsqueeze(-1)
        if ctx.overwritten:
            if torch.is_grad_enabled():
                raise SparseEngineError(
                    "the gradient of kd_loss_into_table cannot be differentiated again: the past predictions are "
                    'overwritten; use kd_loss(…, soft_targets=table[samples], soft_form="ce")'
                )
            # It could not be computed again, so it is kept.
            same = upstream.numel() == 1 and native.is_plain_input(upstream) and upstream.item() == 1
            return (ctx.gradient if same else (upstream * ctx.gradient).to(logits.dtype), *none)
        if not torch.is_grad_enabled() and not kept and ctx.gradient is not None:
            # The fused gradient's memory is given away: the largest tensor of the step is neither copied nor scaled
            # elsewhere. Whoever comes again (retain_graph=True) has it computed anew.
            gradient, ctx.gradient = ctx.gradient.view(logits.shape), None
            if not native.is_plain_input(upstream) or not native.is_plain_input(gradient):
                return (scale_gradient(gradient, upstream), *none)
            return (gradient if upstream.numel() == 1 and upstream.item() == 1 else gradient.mul_(upstream), *none)
        gradient = kept[0] if kept else None
        if torch.is_grad_enabled() or gradient is None:
            rows = logits.reshape(-1, logits.shape[-1])
            hard_scale, soft_scale = _scales(rows, labels, weights, factors, options, ctx.exact)
            scales = (hard_scale * options.hard_weight, soft_scale * options.soft_weight)
            inputs = (rows, labels, _padded(theirs, options), weights, *scales, *_settings(options).values(), True)
            if torch.is_grad_enabled():  # create_graph=True
                *_, gradient = reference(*inputs)
            else:
                *_, gradient = torch.ops.sparse_engine.kd_rows(*inputs, "auto")
        return ((upstream * gradient.view(logits.shape)).to(logits.dtype), *none)


def _on_the_host(indices: Tensor) -> bool:
    """Whether looking at the numbers costs nothing."""
    return indices.device.type == "cpu"


def _reduced(
    ctx: Any, hard: Tensor, soft: Tensor, options: _Options, samples: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hard and soft part from the scaled losses of the rows."""
    hard, soft = hard.view(samples), soft.view(samples)
    if options.reduction != "none":
        hard, soft = hard.sum(), soft.sum()
    ctx.mark_non_differentiable(hard, soft)
    if options.hard_weight == 0:
        return options.soft_weight * soft, hard, soft
    return options.hard_weight * hard + options.soft_weight * soft, hard, soft


def _padded(theirs: Tensor | None, options: _Options) -> Tensor | None:
    """The teacher with rows of zeros before its first, for which the scale of the soft part is 0."""
    if theirs is None or not options.teacher_from:
        return theirs
    return torch.cat([theirs.new_zeros(options.teacher_from, theirs.shape[1]), theirs])


def _settings(options: _Options) -> dict[str, Any]:
    """What the op ``kd_rows`` takes, in its order."""
    return {
        "temperature": options.temperature,
        "soft_targets": not options.teacher_is_logits,
        "kl": options.soft_form == "kl",
        "hard": options.hard_weight != 0,
        "label_smoothing": options.label_smoothing,
        "ignore_index": options.ignore_index,
    }


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
        factor = factor * sample_weights
    taught = torch.arange(len(rows), device=rows.device) >= options.teacher_from if options.teacher_from else None
    soft_factor = factor if taught is None else factor * taught
    if options.reduction != "mean":
        return factor, soft_factor
    valid = rows.new_ones(len(rows), dtype=torch.bool) if labels is None else labels != options.ignore_index
    count = valid.sum().clamp(min=1).to(exact)
    soft_scale = soft_factor / (count if taught is None else (valid & taught).sum().clamp(min=1).to(exact))
    if class_weights is None or labels is None:
        return factor / count, soft_scale
    of_labels = (class_weights[labels.where(valid, torch.zeros_like(labels))] * valid).sum()
    return factor / of_labels.where(of_labels > 0, torch.ones_like(of_labels)), soft_scale


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
    readable = targets is not None and _on_the_host(targets) and not torch.compiler.is_compiling()
    if targets is not None and readable and targets.numel() and hard_weight:
        first, last = targets.aminmax()
        real = targets if int(first) >= 0 and int(last) < logits.shape[-1] else targets[targets != ignore_index]
        if real is not targets and real.numel() and not (int(real.min()) >= 0 and int(real.max()) < logits.shape[-1]):
            raise SparseEngineError(
                f"labels run from {int(real.min())} to {int(real.max())}, but there are {logits.shape[-1]} classes "
                f"(0 to {logits.shape[-1] - 1}); ignore_index is {ignore_index}"
            )
    return _Options(
        float(temperature), float(hard_weight), float(soft_weight), teacher_logits is not None, soft_form,
        float(label_smoothing), int(ignore_index), reduction,
    )  # fmt: skip
