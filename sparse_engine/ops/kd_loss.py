"""`kd_rows`: cross entropy and distillation loss per row, and the gradient of their weighted sum, in one pass over the
logits.

For student logits z [C], label y, teacher probabilities q (given, or softmax(t / T) of teacher logits t), p =
softmax(z), p_T = softmax(z / T), class weights w (1 where not given) and label smoothing ε:

    hard     = (1 − ε) w_y · −log p_y  +  ε/C · Σ_c w_c · −log p_c
    soft     = T² · Σ_c q_c (log q_c − log p_T,c)                          with kl=False without the term q log q
    gradient = hard_scale · ((1 − ε) w_y (p − e_y) + ε/C (p Σ_c w_c − w))  +  soft_scale · T (p_T Σ_c q_c − q)

Rows whose label is `ignore_index` have hard = soft = 0 and gradient 0. A label outside 0..C−1 makes its row NaN:
visible, and without a check that would have to wait for a GPU. Means, weights and reductions are the caller's: they are
vectors of scales.
"""

from typing import Any, NamedTuple

import torch

from sparse_engine.errors import ShapeError
from sparse_engine.ops import native, registry

__all__ = ["KDRows", "explain_kd_rows", "kd_rows"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")


class KDRows(NamedTuple):
    """What `kd_rows` returns."""

    hard: torch.Tensor  # [B] float32, or float64 for float64 logits
    soft: torch.Tensor  # [B]
    gradient: torch.Tensor  # [B, C] in the logits' dtype, or [0, C] when not asked for


def kd_rows(
    logits: torch.Tensor,
    targets: torch.Tensor | None = None,
    teacher: torch.Tensor | None = None,
    *,
    class_weights: torch.Tensor | None = None,
    hard_scale: torch.Tensor | None = None,
    soft_scale: torch.Tensor | None = None,
    temperature: float = 1.0,
    soft_targets: bool = False,
    kl: bool = True,
    hard: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gradient: bool = False,
    impl: str = "auto",
) -> KDRows:
    """Compute both losses of every row and, on request, the gradient of their weighted sum.

    Example:
        >>> rows = kd_rows(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.tensor([[0.0, 0.0]]), temperature=2.0)
        >>> rows.hard, rows.soft
        (tensor([0.1269]), tensor([0.4805]))

    Args:
        logits: [B, C] of the student; float32, float64, or float16/bfloat16 with arithmetic in float32.
        targets: int64 [B] labels, or None for no hard part and no ignored row.
        teacher: [B, C] teacher logits, or probabilities with `soft_targets`; None for no soft part. Never
            differentiated.
        class_weights: [C] of the hard part.
        hard_scale, soft_scale: [B] factors of the parts in `gradient`; None is 1.
        temperature: T > 0. Soft targets are taken as they are.
        kl: whether the soft part contains the teacher's entropy, which changes its value but not its gradient.
        hard: False leaves the hard part out although targets say which rows are ignored.
        label_smoothing: ε in 0..1.
        ignore_index: the label of rows that do not count.
        gradient: whether to compute the gradient in the same pass.
        impl: "auto", or a backend's name.

    Returns:
        `KDRows`. `hard` and `soft` are differentiable in `logits`, to any order; `gradient` is a constant.

    Raises:
        ShapeError: when sizes or settings do not fit.
        BackendError: when the backend asked for cannot run the call; it lists every backend and its reasons.

    Source: Hinton et al., arXiv 1503.02531.
    """
    inputs = _inputs(
        logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
        label_smoothing, ignore_index, gradient,
    )  # fmt: skip
    return KDRows(*torch.ops.sparse_engine.kd_rows(*inputs, impl))


def explain_kd_rows(logits: torch.Tensor, *operands: Any, **settings: Any) -> registry.Explanation:
    """Say which backend `kd_rows` takes for these inputs and why not the others."""
    named = dict(zip(("targets", "teacher"), operands, strict=False)) | settings
    defaults: dict[str, Any] = {
        "targets": None, "teacher": None, "class_weights": None, "hard_scale": None, "soft_scale": None,
        "temperature": 1.0, "soft_targets": False, "kl": True, "hard": True, "label_smoothing": 0.0,
        "ignore_index": -100, "gradient": False,
    }  # fmt: skip
    return registry.explain("kd_rows", *_inputs(logits, *(defaults | named).values()))


def _inputs(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient,
):  # fmt: skip
    """Check what the user gave; return the op's inputs."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ShapeError(f"kd_rows: logits are {logits.dtype} {tuple(logits.shape)}; floats [rows, classes] expected")
    rows, classes = logits.shape
    for name, tensor, shape in (
        ("targets", targets, (rows,)),
        ("teacher", teacher, (rows, classes)),
        ("class_weights", class_weights, (classes,)),
        ("hard_scale", hard_scale, (rows,)),
        ("soft_scale", soft_scale, (rows,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"kd_rows: {name} has shape {tuple(tensor.shape)}, {shape} expected")
    if targets is not None and targets.dtype != torch.int64:
        raise ShapeError(f"kd_rows: targets are {targets.dtype}, torch.int64 expected")
    if targets is None and teacher is None:
        raise ShapeError("kd_rows: neither targets nor teacher were given, so there is no loss")
    if not temperature > 0:
        raise ShapeError(f"kd_rows: temperature is {temperature}; a positive number expected")
    if not 0 <= label_smoothing <= 1:
        raise ShapeError(f"kd_rows: label_smoothing is {label_smoothing}; a number in 0..1 expected")
    if teacher is not None:
        teacher = teacher.detach()
    return (
        logits, targets, teacher, class_weights, hard_scale, soft_scale, float(temperature), bool(soft_targets),
        bool(kl), bool(hard), float(label_smoothing), int(ignore_index), bool(gradient),
    )  # fmt: skip


# -- op: schema, choice of the backend, shapes, gradients --------------------------------------------------------------

_library.define(
    "kd_rows(Tensor logits, Tensor? targets, Tensor? teacher, Tensor? class_weights, Tensor? hard_scale, "
    "Tensor? soft_scale, float temperature, bool soft_targets, bool kl, bool hard, float label_smoothing, "
    "int ignore_index, bool gradient, str impl) -> (Tensor, Tensor, Tensor)"
)


def _dispatch(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *operands, impl = inputs
    return registry.choose("kd_rows", impl, *operands).run(*operands)


_library.impl("kd_rows", _dispatch, "CompositeExplicitAutograd")


def _arithmetic(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("sparse_engine::kd_rows", lib=_library)
def _fake(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient, impl,
):  # fmt: skip
    rows, classes = logits.shape
    losses = [logits.new_empty((rows,), dtype=_arithmetic(logits)) for _ in range(2)]
    return losses[0], losses[1], logits.new_empty((rows if gradient else 0, classes))


def _setup(ctx, inputs, output):
    logits, targets, teacher, class_weights, _, _, *ctx.settings, _, ctx.impl = inputs
    ctx.save_for_backward(logits, targets, teacher, class_weights)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, hard_grad, soft_grad, _):
    logits, targets, teacher, class_weights = ctx.saved_tensors
    like = hard_grad if hard_grad is not None else soft_grad
    none = [None] * 13
    if like is None:
        return None, *none
    scales = [torch.zeros_like(like) if grad is None else grad for grad in (hard_grad, soft_grad)]
    inputs = (logits, targets, teacher, class_weights, *scales, *ctx.settings, True)
    if torch.is_grad_enabled():
        # Gradients of gradients: the same formula with autograd on.
        return reference(*inputs)[2], *none
    return torch.ops.sparse_engine.kd_rows(*inputs, ctx.impl)[2], *none


torch.library.register_autograd("sparse_engine::kd_rows", _backward, setup_context=_setup, lib=_library)

# -- torch: the reference ----------------------------------------------------------------------------------------------


def _why_not_torch(logits, targets, teacher, class_weights, hard_scale, soft_scale, *settings):
    tensors = (logits, targets, teacher, class_weights, hard_scale, soft_scale)
    places = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    return [f"operands are on different devices: {', '.join(places)}"] if len(places) > 1 else []


@registry.register("kd_rows", "torch", why_not=_why_not_torch)
def reference(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient,
):  # fmt: skip
    """The formulas of the module's docstring, line by line; differentiable in the logits."""
    z = logits.to(_arithmetic(logits))  # [B, C]
    rows, classes = z.shape
    hard_loss, soft_loss, total = z.new_zeros(rows), z.new_zeros(rows), torch.zeros_like(z)
    valid = torch.ones(rows, dtype=torch.bool, device=z.device) if targets is None else targets != ignore_index  # [B]

    if hard and targets is not None:
        exists = (targets >= 0) & (targets < classes)
        label = targets.where(exists, 0)
        weights = z.new_ones(classes) if class_weights is None else class_weights.to(z)  # [C]
        log_p = torch.log_softmax(z, dim=1)  # [B, C]
        mass = (1 - label_smoothing) * weights[label]  # [B]
        spread = label_smoothing / max(classes, 1) * weights  # [C]
        hard_loss = -mass * log_p.gather(1, label[:, None])[:, 0] - _sum_where(log_p, spread)
        hard_loss = hard_loss.where(exists, torch.nan).where(valid, 0.0)
        if gradient:
            part = log_p.exp() * (mass + spread.sum())[:, None] - spread
            part = part - mass[:, None] * torch.nn.functional.one_hot(label, max(classes, 1)).to(z)
            part = part.where(exists[:, None], torch.nan)
            total = total + _scaled(part, hard_scale, valid)

    if teacher is not None:
        log_pt = torch.log_softmax(z / temperature, dim=1)
        if soft_targets:
            q = teacher.to(z)
            entropy = torch.xlogy(q, q)
        else:
            log_q = torch.log_softmax(teacher.to(z) / temperature, dim=1)
            q = log_q.exp()
            entropy = (q * log_q).where(q > 0, 0.0)
        cross = (q * log_pt).where(q > 0, 0.0)
        soft_loss = temperature**2 * ((entropy - cross) if kl else -cross).sum(1)
        soft_loss = soft_loss.where(valid, 0.0)
        if gradient:
            part = temperature * (log_pt.exp() * q.sum(1, keepdim=True) - q)
            total = total + _scaled(part, soft_scale, valid)

    return hard_loss, soft_loss, total.to(logits.dtype) if gradient else logits.new_empty((0, classes))


def _sum_where(log_p: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Σ_c spread_c log p_c, where 0 · −∞ counts as 0."""
    return (log_p * spread).where(spread != 0, 0.0).sum(1)


def _scaled(part: torch.Tensor, scale: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """Rows times their scale; exactly zero where the scale is, or where the row is ignored, whatever the row holds."""
    if scale is None:
        return part.where(valid[:, None], 0.0)
    scale = scale.to(part)
    # Emptied before the product as well: the gradient of the scale would meet a NaN there.
    counts = (valid & (scale != 0))[:, None]
    return (part.where(valid[:, None], 0.0) * scale[:, None]).where(counts, 0.0)


# -- cpu: the C++ kernel -----------------------------------------------------------------------------------------------


def _why_not_cpu(logits, targets, teacher, class_weights, hard_scale, soft_scale, *settings):
    reasons = native.why_not_extension("kd_rows")
    return reasons + native.why_not_float32_cpu(
        None, logits=logits, teacher=teacher, class_weights=class_weights, hard_scale=hard_scale, soft_scale=soft_scale
    )


@registry.register("kd_rows", "cpu", why_not=_why_not_cpu)
def _cpu(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient,
):  # fmt: skip
    rows, classes = logits.shape
    losses = torch.empty((2, rows))
    result = torch.empty((rows if gradient else 0, classes))
    if rows and classes:
        z, t = _adjacent(logits), None if teacher is None else _adjacent(teacher)
        vectors = [None if v is None else v.contiguous() for v in (targets, class_weights, hard_scale, soft_scale)]
        native.extension().kd_rows(
            z.data_ptr(), z.stride(0), rows, classes,
            _pointer(vectors[0]), _pointer(t), 0 if t is None else t.stride(0), *map(_pointer, vectors[1:]),
            temperature, soft_targets, kl, hard, label_smoothing, ignore_index,
            losses[0].data_ptr(), losses[1].data_ptr(), result.data_ptr() if gradient else 0, classes,
        )  # fmt: skip
    else:
        losses.zero_()
    return losses[0].clone(), losses[1].clone(), result


def _adjacent(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
