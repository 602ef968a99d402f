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

from sparse_engine import kernels
from sparse_engine.errors import ShapeError
from sparse_engine.ops import native, registry

__all__ = ["KDRows", "explain_kd_rows", "fused_kd_loss", "kd_rows", "scale_gradient", "scales_in_place"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")

CHUNK = 2**17  # logits that the reference takes at once on the CPU: its temporaries then stay in the cache


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
        logits: [B, C] of the student; float32, float64, or float16/bfloat16 with arithmetic in float32 at least.
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
        On the CPU its error stays below 1e-5 of its largest element, also where student and teacher nearly agree.

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


def reference(
    logits, targets, teacher, class_weights, hard_scale, soft_scale, temperature, soft_targets, kl, hard,
    label_smoothing, ignore_index, gradient,
):  # fmt: skip
    """The formulas of the module's docstring, line by line; differentiable in the logits.

    In float64 whatever the logits are: the gradient is a difference of probabilities, and where student and teacher (or
    the two parts) all but agree, little would be left of it in float32.
    """
    rows, classes = logits.shape
    valid = torch.ones(rows, dtype=torch.bool, device=logits.device) if targets is None else targets != ignore_index
    z = logits.double().where(valid[:, None], 0.0)  # [B, C]; an ignored row may hold anything
    hard_loss, soft_loss, parts = z.new_zeros(rows), z.new_zeros(rows), []

    if hard and targets is not None:
        exists = (targets >= 0) & (targets < classes)
        label = targets.where(exists, 0)
        weights = z.new_ones(classes) if class_weights is None else class_weights.to(z)  # [C]
        log_p = torch.log_softmax(z, dim=1)  # [B, C]
        mass = ((1 - label_smoothing) * weights[label]).where(exists | ~valid, torch.nan)  # [B]
        spread = label_smoothing / max(classes, 1) * weights  # [C]
        hard_loss = -mass * log_p.gather(1, label[:, None])[:, 0]
        if label_smoothing:
            hard_loss = hard_loss - (log_p * spread).where(spread != 0, 0.0).sum(1)
        if gradient:
            p = log_p.exp()
            missed = p.scatter_add(1, label[:, None], torch.full_like(p[:, :1], -1))  # p − e_y
            part = missed * mass[:, None]
            if label_smoothing:
                part = part + (p * spread.sum() - spread)
            parts.append(_scaled(part, hard_scale, 1.0, valid))

    if teacher is not None:
        log_pt = torch.log_softmax(z / temperature, dim=1)
        t = teacher.to(z).where(valid[:, None], 0.0)
        if soft_targets:
            q, log_q = t, t.log()
        else:
            log_q = torch.log_softmax(t / temperature, dim=1)
            q = log_q.exp()
        terms = q * (log_q - log_pt) if kl else -q * log_pt
        soft_loss = temperature**2 * terms.where(q != 0, 0.0).sum(1)
        if gradient:
            part = log_pt.exp() * q.sum(1, keepdim=True) - q
            parts.append(_scaled(part, soft_scale, temperature, valid))

    losses = (loss.where(valid, 0.0).to(_arithmetic(logits)) for loss in (hard_loss, soft_loss))
    if not gradient:
        return *losses, logits.new_empty((0, classes))
    return *losses, (sum(parts) if parts else torch.zeros_like(z)).to(logits.dtype)


def _scaled(part: torch.Tensor, scale: torch.Tensor | None, factor: float, valid: torch.Tensor) -> torch.Tensor:
    """Rows times their scale and the factor; exactly zero where the scale is, whatever the row holds, or the row is
    ignored."""
    if scale is None:
        return (part * factor).where(valid[:, None], 0.0)
    scale = scale.to(part)
    return (part * (scale * factor)[:, None]).where((valid & (scale != 0))[:, None], 0.0)


@registry.register("kd_rows", "torch", why_not=_why_not_torch)
def _torch(logits, targets, teacher, class_weights, hard_scale, soft_scale, *settings):
    """The reference; on the CPU a few rows at a time: new memory for whole matrices costs more than the arithmetic."""
    rows, classes = logits.shape
    step = max(1, CHUNK // max(classes, 1))
    if logits.device.type != "cpu" or rows <= step:
        return reference(logits, targets, teacher, class_weights, hard_scale, soft_scale, *settings)
    by_row = (logits, targets, teacher, hard_scale, soft_scale)
    chunks = zip(*([None] * rows if x is None else x.split(step) for x in by_row), strict=False)
    parts = [reference(z, y, t, class_weights, *scales, *settings) for z, y, t, *scales in chunks]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


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
    result = native.empty(rows if gradient else 0, classes)
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


def fused_kd_loss(
    logits: torch.Tensor,
    targets: torch.Tensor | None,
    teacher: torch.Tensor | None,
    *,
    class_weights: torch.Tensor | None,
    sample_weights: torch.Tensor | None,
    temperature: float,
    soft_targets: bool,
    kl: bool,
    hard_weight: float,
    soft_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    gradient: bool,
    table: tuple[torch.Tensor, torch.Tensor] | None = None,
    teacher_from: int = 0,
) -> tuple[torch.Tensor, ...] | None:
    """Compute a reduced loss and its gradient in one call into C++, without an operation of PyTorch's around it.

    Example:
        >>> fused = fused_kd_loss(logits, labels, teacher, **settings)          # doctest: +SKIP
        >>> loss, hard, soft, gradient = fused                                  # doctest: +SKIP

    Args:
        logits, targets, teacher, class_weights, temperature, soft_targets, kl, label_smoothing, ignore_index, gradient:
            as for `kd_rows`.
        sample_weights: [B] factors of each row's loss, or None.
        hard_weight, soft_weight: factors of the parts; the hard part is left out where its factor is 0.
        reduction: "none", "sum", or "mean" over the rows that are not ignored (with class weights, of the hard part:
            over the weights of their labels).
        table: [N, C] probabilities and int64 [B]: instead of a teacher, row b's probabilities are the table's row of
            that number, which becomes softmax(logits). At temperature 1 only.
        teacher_from: rows before it have no soft part: the teacher is [B − teacher_from, C].

    Returns:
        Loss (the weighted sum), hard and soft, each [] or [B], and the gradient [B, C] of the (summed) loss, or [0, C];
        None, with the table as it was, where the kernel cannot take the call, which `kd_rows` then can.
    """
    values, samples = (None, None) if table is None else table
    tensors = (logits, teacher, class_weights, sample_weights, values)
    if (
        native.why_not_extension("kd_loss")
        or not all(tensor is None or native.is_plain_input(tensor) for tensor in tensors)
        or not all(index is None or (type(index) is torch.Tensor and index.is_cpu) for index in (targets, samples))
        or not (values is None or values.is_contiguous())
        or 0 in logits.shape
    ):
        return None
    rows, classes = logits.shape
    z, t = _adjacent(logits), None if teacher is None else _adjacent(teacher)
    vectors = [None if v is None else v.contiguous() for v in (samples, targets, class_weights, sample_weights)]
    losses = [torch.empty(rows if reduction == "none" else (), dtype=torch.float32) for _ in range(3)]
    result = native.empty(rows if gradient else 0, classes)
    done = native.extension().kd_loss(
        z.data_ptr(), z.stride(0), rows, classes, _pointer(vectors[1]), _pointer(t), 0 if t is None else t.stride(0),
        teacher_from, _pointer(values), 0 if values is None else len(values), _pointer(vectors[0]),
        *map(_pointer, vectors[2:]),
        temperature, soft_targets, kl, hard_weight, soft_weight, label_smoothing, ignore_index, reduction,
        *map(_pointer, losses), result.data_ptr() if gradient else 0, classes,
    )  # fmt: skip
    return (*losses, result) if done else None


def scales_in_place(tensor: torch.Tensor) -> bool:
    """Say whether `scale_gradient` multiplies such a gradient where it lies: on a GPU, and nothing traces or transforms
    the call."""
    wanted = "cpu" if registry.forced("kd_rows") == "triton" and not torch.cuda.is_available() else "cuda"
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == wanted
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and native.is_untraced()
        and not kernels.why_not()
    )


def scale_gradient(gradient: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """gradient · upstream, for the last step of a loss's backward pass.

    On a GPU the gradient is overwritten, or left alone without being read where upstream is 1, as it nearly always is:
    the largest tensor of the step is then not moved once more.

    Args:
        gradient: [..., C], not used by anyone else. upstream: one number, or [..., 1].
    """
    if not (scales_in_place(gradient) and scales_in_place(upstream.float()) and gradient.is_contiguous()):
        return (upstream * gradient).to(gradient.dtype)
    kernels.scale_rows_(gradient.view(-1, gradient.shape[-1]), upstream.float().reshape(-1))
    return gradient


def _adjacent(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] else rows.contiguous()


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
