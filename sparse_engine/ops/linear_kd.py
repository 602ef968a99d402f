"""`linear_kd`: the last linear layer and the distillation loss together, a chunk of rows at a time, so that the logits
are never stored as a whole.

    z = h Wᵀ + b    z_t = h_t W_tᵀ + b_t    loss = Σ_n scale_n · ((1 − α) hard_n + α soft_n)        as in `kd_rows`

and the gradients of the loss: dz is made chunk by chunk over the logits' own memory, dh = dz W, dW = Σ dzᵀ h,
db = Σ dz.
"""

from typing import Any, NamedTuple

import torch

from sparse_engine import kernels
from sparse_engine.errors import ShapeError
from sparse_engine.ops import registry
from sparse_engine.ops.kd_loss import kd_rows

__all__ = ["LinearKD", "linear_kd"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")


class LinearKD(NamedTuple):
    """What `linear_kd` returns; gradients are empty tensors where they were not asked for."""

    loss: torch.Tensor  # [] float32, or float64 for float64 operands
    hidden: torch.Tensor  # [N, H]
    weight: torch.Tensor  # [C, H]
    bias: torch.Tensor  # [C]


def linear_kd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    teacher_bias: torch.Tensor | None,
    labels: torch.Tensor | None,
    scale: torch.Tensor,
    *,
    temperature: float = 1.0,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    chunk: int | None = None,
    gradient: bool = False,
    impl: str = "auto",
) -> LinearKD:
    """Compute the loss and, on request, the gradients of the student's hidden state, weight and bias.

    Example:
        >>> h, w = torch.ones(2, 3), torch.zeros(4, 3)
        >>> linear_kd(h, w, None, h, w, None, torch.tensor([0, 3]), torch.full((2,), 0.5), alpha=0.0).loss
        tensor(1.3863)

    Args:
        hidden: [N, H]. weight: [C, H]. bias: [C] or None.
        teacher_hidden: [N, H_t]. teacher_weight: [C, H_t]. teacher_bias: [C] or None. Constants.
        labels: int64 [N]; None: no hard part, and no row is ignored.
        scale: [N] factors of the rows' losses; rows whose label is `ignore_index` count 0 whatever it is.
        temperature, label_smoothing, ignore_index: as for `kd_rows`. alpha: weight of the soft part.
        chunk: rows at a time; None: a sixteenth of them, at least 256.
        gradient: whether to compute the gradients.

    Raises:
        ShapeError: when sizes do not fit. BackendError: when the backend asked for cannot run the call.
    """
    rows, classes = hidden.shape[0], weight.shape[0]
    for name, tensor, shape in (
        ("weight", weight, (classes, hidden.shape[-1])),
        ("bias", bias, (classes,)),
        ("teacher_hidden", teacher_hidden, (rows, teacher_hidden.shape[-1])),
        ("teacher_weight", teacher_weight, (classes, teacher_hidden.shape[-1])),
        ("teacher_bias", teacher_bias, (classes,)),
        ("labels", labels, (rows,)),
        ("scale", scale, (rows,)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"linear_kd: {name} has shape {tuple(tensor.shape)}, {shape} expected")
    if chunk is not None and chunk < 1:
        raise ShapeError(f"linear_kd: chunk is {chunk}; at least 1 row expected")
    if not 0 <= alpha <= 1 or not temperature > 0 or not 0 <= label_smoothing <= 1:
        raise ShapeError(
            f"linear_kd: alpha {alpha} and label_smoothing {label_smoothing} must lie in 0..1, temperature "
            f"{temperature} above 0"
        )
    operands = (hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, scale)
    settings = (float(temperature), float(alpha), float(label_smoothing), int(ignore_index), chunk, bool(gradient))
    return LinearKD(*torch.ops.sparse_engine.linear_kd(*operands, *settings, impl))


def rows_at_once(rows: int, chunk: int | None) -> int:
    """How many rows a chunk has."""
    return min(chunk or max(256, -(-rows // 16)), max(rows, 1))


# -- op: schema, choice of the backend, shapes -------------------------------------------------------------------------

_library.define(
    "linear_kd(Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? teacher_bias, Tensor? labels, Tensor scale, float temperature, float alpha, float label_smoothing, "
    "int ignore_index, int? chunk, bool gradient, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _dispatch(*inputs: Any) -> tuple[torch.Tensor, ...]:
    *operands, impl = inputs
    return registry.choose("linear_kd", impl, *operands).run(*operands)


_library.impl("linear_kd", _dispatch, "CompositeExplicitAutograd")


def _outputs(hidden, weight, bias, gradient) -> list[torch.Tensor]:
    """Memory for the gradients, or empty tensors."""
    if not gradient:
        return [hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)]
    return [
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(0 if bias is None else bias.shape),
    ]


@torch.library.register_fake("sparse_engine::linear_kd", lib=_library)
def _fake(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, scale, temperature, alpha,
    label_smoothing, ignore_index, chunk, gradient, impl,
):  # fmt: skip
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((), dtype=exact), *_outputs(hidden, weight, bias, gradient)


# -- torch: products of PyTorch's, losses by `kd_rows` -----------------------------------------------------------------


@registry.register("linear_kd", "torch", why_not=lambda *inputs: [])
def reference(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, scale, temperature, alpha,
    label_smoothing, ignore_index, chunk, gradient,
):  # fmt: skip
    """Chunk by chunk; runs on any device and in any type."""
    hidden, weight = hidden.detach(), weight.detach()
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden.shape[0]
    size = rows_at_once(rows, chunk)
    loss = torch.zeros((), dtype=exact, device=hidden.device)
    d_hidden = torch.zeros_like(hidden)
    d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
    d_bias = torch.zeros(weight.shape[0], dtype=exact, device=weight.device)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        z = torch.nn.functional.linear(hidden[part], weight, None if bias is None else bias.detach())  # [R, C]
        teacher = None
        if alpha > 0:
            teacher = torch.nn.functional.linear(teacher_hidden[part], teacher_weight, teacher_bias).to(z.dtype)
        factor = scale[part].to(exact)
        found = kd_rows(
            z, None if labels is None else labels[part], teacher, hard_scale=factor * (1 - alpha),
            soft_scale=factor * alpha, temperature=temperature, hard=alpha < 1, label_smoothing=label_smoothing,
            ignore_index=ignore_index, gradient=gradient,
        )  # fmt: skip
        loss = loss + (factor * ((1 - alpha) * found.hard + alpha * found.soft)).sum()
        if gradient:
            d_hidden[part] = found.gradient @ weight
            d_weight += (found.gradient.t() @ hidden[part]).to(exact)
            d_bias += found.gradient.sum(0, dtype=exact)
    if not gradient:
        return loss, *_outputs(hidden, weight, bias, False)
    return loss, d_hidden, d_weight.to(weight.dtype), weight.new_empty(0) if bias is None else d_bias.to(bias.dtype)


# -- triton: the loss of a chunk in one launch, its gradient over the logits -------------------------------------------


def _why_not_triton(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, scale, temperature, alpha,
    label_smoothing, ignore_index, chunk, gradient,
):  # fmt: skip
    interpreted = registry.forced("linear_kd") == "triton" and not torch.cuda.is_available()
    wanted = "cpu" if interpreted else "cuda"
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "teacher_hidden": teacher_hidden}
    tensors |= {"teacher_weight": teacher_weight, "teacher_bias": teacher_bias, "labels": labels, "scale": scale}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    reasons = [
        f"{name} is on {t.device}, not on an NVIDIA GPU" for name, t in present.items() if t.device.type != wanted
    ]
    if reasons:
        return reasons
    reasons = kernels.why_not()
    reasons += [f"{name} is {t.dtype}" for name, t in present.items() if t.dtype == torch.float64]
    for what, some in (
        ("student's", (hidden, weight, bias)),
        ("teacher's", (teacher_hidden, teacher_weight, teacher_bias)),
    ):
        kinds = {tensor.dtype for tensor in some if tensor is not None}
        if len(kinds) > 1:
            reasons.append(f"the {what} operands have different dtypes: {', '.join(sorted(map(str, kinds)))}")
    if label_smoothing == 1:
        reasons.append("label smoothing of 1")
    if not 1 <= weight.shape[0] <= 262144:
        reasons.append(f"{weight.shape[0]} classes; the kernel takes 1 to 262144")
    if labels is None and alpha == 0:
        reasons.append("no part of the loss is left")
    return reasons


@registry.register("linear_kd", "triton", why_not=_why_not_triton)
def _triton(
    hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, labels, scale, temperature, alpha,
    label_smoothing, ignore_index, chunk, gradient,
):  # fmt: skip
    biases = {"bias": bias, "teacher_bias": teacher_bias}
    loss, found = kernels.linear_kd_loss(
        hidden.detach(), weight.detach(), teacher_hidden.detach(), teacher_weight.detach(), labels,
        **{name: None if tensor is None else tensor.detach() for name, tensor in biases.items()}, scale=scale,
        temperature=temperature, alpha=alpha, label_smoothing=label_smoothing, ignore_index=ignore_index, chunk=chunk,
        gradient=gradient,
    )  # fmt: skip
    if not gradient:
        return loss, *_outputs(hidden, weight, bias, False)
    return loss, found.hidden, found.weight, weight.new_empty(0) if found.bias is None else found.bias
