"""The last linear layer and the distillation loss together, in chunks of rows: the logits are never stored as a whole.

    for each chunk of R rows:   z_s = h_s Wᵀ [R, C]   z_t = h_t W_tᵀ [R, C]      two products
                                z_s ← gradient         in place, one launch      `distill_rows`
                                dh  = z_s W [R, H]     dW += z_sᵀ h_s [C, H]     two products

Peak memory is two chunks of logits instead of two full matrices and their softmaxes and gradients; the products are
cuBLAS's and their operations the same as without chunks, so time is the same as long as R fills the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparse_engine.errors import ShapeError

from ._common import check_float, check_lengths, check_tensors
from .distill import distill_rows


@dataclass(frozen=True)
class LinearKDResult:
    """The gradients of the loss; None where not asked for."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def linear_kd_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    gradient: bool = True,
) -> tuple[torch.Tensor, LinearKDResult]:
    """Distillation loss of `hidden · weightᵀ` against `teacher_hidden · teacher_weightᵀ`: the sum of scale ·
    loss over the rows, by default the mean over those that count.

    Example:
        >>> loss, gradients = linear_kd_loss(h, w, h_t, w_t, labels, temperature=2.0)   # doctest: +SKIP

    Args:
        hidden: [N, H] student's last hidden state; weight: [C, H]; bias: [C] or None.
        teacher_hidden: [N, H_t]; teacher_weight: [C, H_t]; teacher_bias: [C] or None: constants.
        labels: [N] int64, or None: no hard part.
        scale: [N] fp32 factor of each row's loss; None: 1 / number of rows that are not ignored.
        alpha: weight of the soft part; the hard part has 1 − α.
        chunk: rows at a time; None: a sixteenth of the rows, at least 256.
        gradient: whether to compute the gradients of hidden, weight and bias.

    Returns:
        The scalar loss, and its gradients. The weight's gradient is summed over chunks in fp32 and rounded once.

    Raises:
        ShapeError: sizes that do not fit.
    """
    name = "linear_kd_loss"
    device = check_tensors(name, hidden, weight, teacher_hidden, teacher_weight, labels, bias, teacher_bias)
    dtype = check_float(name, hidden, weight)
    check_float(name, teacher_hidden, teacher_weight)
    rows, width = hidden.shape
    classes = weight.shape[0]
    check_lengths(
        name,
        **{
            "weight inputs": (weight.shape[1], width),
            "teacher rows": (teacher_hidden.shape[0], rows),
            "teacher classes": (teacher_weight.shape[0], classes),
            "teacher weight inputs": (teacher_weight.shape[1], teacher_hidden.shape[1]),
        },
    )
    if labels is not None:
        check_lengths(name, labels=(labels.numel(), rows))
    if chunk is not None and chunk < 1:
        raise ShapeError(f"{name}: chunk must be at least 1 row, got {chunk}")
    size = min(chunk or max(256, -(-rows // 16)), max(rows, 1))
    if scale is None:
        valid = torch.ones(rows, device=device) if labels is None else (labels != ignore_index).reshape(-1).float()
        scale = valid / valid.sum().clamp(min=1)
    check_lengths(name, scale=(scale.numel(), rows))
    hard_on = labels is not None and alpha < 1
    soft_on = alpha > 0
    loss = torch.zeros((), device=device)
    d_hidden = torch.empty_like(hidden) if gradient else None
    d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device) if gradient else None
    d_bias = torch.zeros(classes, dtype=torch.float32, device=device) if gradient and bias is not None else None
    student_buffer = hidden.new_empty(size, classes)
    teacher_buffer = teacher_hidden.new_empty(size, classes)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        count = part.stop - start
        student = torch.mm(hidden[part], weight.t(), out=student_buffer[:count])
        teacher = torch.mm(teacher_hidden[part], teacher_weight.t(), out=teacher_buffer[:count])
        if bias is not None:
            student += bias
        if teacher_bias is not None:
            teacher += teacher_bias
        result = distill_rows(
            student,
            teacher if soft_on else None,
            labels[part] if labels is not None else None,
            scale[part] * (1 - alpha) if hard_on else None,
            scale[part] * alpha if soft_on else None,
            temperature=temperature,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            gradient=gradient,
            in_place=gradient,
        )
        if result.hard is not None:
            loss = loss + (1 - alpha) * (result.hard * scale[part]).sum()
        if result.soft is not None:
            loss = loss + alpha * (result.soft * scale[part]).sum()
        if d_hidden is not None and d_weight is not None:
            torch.mm(student, weight, out=d_hidden[part])
            if dtype == torch.float32:
                d_weight.addmm_(student.t(), hidden[part])
            else:
                d_weight += student.t() @ hidden[part]
            if d_bias is not None:
                d_bias += student.sum(0, dtype=torch.float32)
    return loss, LinearKDResult(
        d_hidden,
        None if d_weight is None else d_weight.to(dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )
