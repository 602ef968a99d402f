"""`kd_table_rows`: the per-row losses of PS-KD, whose target is a mix of the label and what the model said last time,
and whose table of predictions is replaced in the same pass.

For logits z [C] of sample i, label y and the table's row p of that sample:

    hard     = −log softmax(z)_y                soft = −Σ_c p_c · log softmax(z)_c
    gradient = scale · ((1 − α) (softmax(z) − e_y) + α (softmax(z) Σ_c p_c − p))
    p        ← softmax(z)

A full table is [N, C]. A top-k table is [N, k] probabilities with their classes in an int32 index [N, k], −1 where
unused; what is left of the mass is spread evenly over the other C − k classes. The rows of one call must be different
samples.
"""

from typing import Any, NamedTuple

import torch

from sparse_engine import kernels
from sparse_engine.errors import ShapeError
from sparse_engine.ops import registry

__all__ = ["TOP_K", "TableRows", "kd_table_rows", "past_predictions", "runs_in_one_pass", "store_predictions"]

_library = torch.library.Library("sparse_engine", "FRAGMENT")

TOP_K = (1, 2, 4, 8, 16)


class TableRows(NamedTuple):
    """What `kd_table_rows` returns."""

    hard: torch.Tensor  # [B] float32, or float64 for float64 logits; 0 where ignored
    soft: torch.Tensor  # [B]
    gradient: torch.Tensor  # [B, C] in the logits' dtype, or [0, C] when not asked for


def kd_table_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    table: torch.Tensor,
    samples: torch.Tensor,
    scale: torch.Tensor,
    *,
    alpha: float,
    index: torch.Tensor | None = None,
    ignore_index: int = -100,
    gradient: bool = False,
    impl: str = "auto",
) -> TableRows:
    """Compute both losses of every row against the table's predictions, and replace those by softmax(logits).

    Example:
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> z, y, sample, scale = torch.zeros(1, 2), torch.tensor([1]), torch.tensor([1]), torch.ones(1)
        >>> rows = kd_table_rows(z, y, table, sample, scale, alpha=0.5)
        >>> rows.soft, table
        (tensor([0.6931]), tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]]))

    Args:
        logits: [B, C]. targets: int64 [B]. samples: int64 [B], the rows of the table, each at most once.
        table: [N, C] probabilities, or [N, k] of a top-k table; floating point, contiguous, changed in place.
        index: int32 [N, k], the classes of a top-k table, changed in place; None for a full one.
        scale: [B], the factor of each row's mixed loss in `gradient`.
        alpha: share of the past predictions, 0..1.
        ignore_index: rows with this label have no loss; what they predict is stored all the same.
        gradient: whether to compute it.

    Raises:
        ShapeError: when sizes do not fit. BackendError: when the backend asked for cannot run the call.

    Source: Kim et al., arXiv 2006.12000.
    """
    rows, classes = logits.shape
    width = classes if index is None else index.shape[-1]
    for name, tensor, shape in (
        ("targets", targets, (rows,)),
        ("samples", samples, (rows,)),
        ("scale", scale, (rows,)),
        ("table", table, (len(table), width)),
        ("index", index, (len(table), width)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ShapeError(f"kd_table_rows: {name} has shape {tuple(tensor.shape)}, {shape} expected")
    if index is not None and (index.dtype != torch.int32 or width not in TOP_K or width >= classes):
        raise ShapeError(
            f"kd_table_rows: index is {index.dtype} {tuple(index.shape)}; int32 with {TOP_K} columns, fewer than the "
            f"{classes} classes, expected"
        )
    inputs = (logits, targets, table, index, samples, scale, float(alpha), int(ignore_index), bool(gradient))
    return TableRows(*torch.ops.sparse_engine.kd_table_rows(*inputs, impl))


def runs_in_one_pass(
    logits: torch.Tensor,
    targets: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor | None,
    samples: torch.Tensor,
    scale: torch.Tensor,
    alpha: float,
    ignore_index: int,
) -> bool:
    """Say whether a kernel takes this call; otherwise the reference does, in several passes."""
    inputs = (logits, targets, table, index, samples, scale, alpha, ignore_index, True)
    return registry.choose("kd_table_rows", "auto", *inputs).backend != "torch"


# -- op: schema, choice of the backend, shapes -------------------------------------------------------------------------

_library.define(
    "kd_table_rows(Tensor logits, Tensor targets, Tensor(a!) table, Tensor(b!)? index, Tensor samples, Tensor scale, "
    "float alpha, int ignore_index, bool gradient, str impl) -> (Tensor, Tensor, Tensor)"
)


def _dispatch(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *operands, impl = inputs
    return registry.choose("kd_table_rows", impl, *operands).run(*operands)


_library.impl("kd_table_rows", _dispatch, "CompositeExplicitAutograd")


@torch.library.register_fake("sparse_engine::kd_table_rows", lib=_library)
def _fake(logits, targets, table, index, samples, scale, alpha, ignore_index, gradient, impl):
    rows, classes = logits.shape
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = [logits.new_empty((rows,), dtype=exact) for _ in range(2)]
    return losses[0], losses[1], logits.new_empty((rows if gradient else 0, classes))


# -- torch: the reference ----------------------------------------------------------------------------------------------


def past_predictions(
    table: torch.Tensor, index: torch.Tensor | None, samples: torch.Tensor, classes: int
) -> torch.Tensor:
    """The probabilities of some samples as a matrix [B, C], in float32 at least."""
    values = table[samples]
    values = values if values.dtype == torch.float64 else values.float()
    if index is None:
        return values
    place = index[samples].long()  # [B, k]
    rest = (1.0 - values.sum(1, keepdim=True)) / (classes - values.shape[1])
    full = rest.repeat(1, classes + 1)  # one more column takes the unused entries
    return full.scatter(1, place.where(place >= 0, classes), values)[:, :classes]


def store_predictions(
    table: torch.Tensor, index: torch.Tensor | None, samples: torch.Tensor, predictions: torch.Tensor
) -> None:
    """Replaces rows of the table by probabilities [B, C]; of equal ones a top-k table keeps the lowest classes."""
    if index is None:
        table[samples] = predictions.to(table.dtype)
        return
    place = torch.argsort(predictions, dim=1, descending=True, stable=True)[:, : index.shape[1]]  # [B, k]
    table[samples] = predictions.gather(1, place).to(table.dtype)
    index[samples] = place.to(index.dtype)


@registry.register("kd_table_rows", "torch", why_not=lambda *inputs: [])
def reference(logits, targets, table, index, samples, scale, alpha, ignore_index, gradient):
    """The formulas of the module's docstring, line by line."""
    classes = logits.shape[1]
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_p = torch.log_softmax(logits.detach().to(exact), 1)  # [B, C]
    past = past_predictions(table, index, samples, classes).to(exact)
    store_predictions(table, index, samples, log_p.exp())
    valid = targets != ignore_index
    exists = (targets >= 0) & (targets < classes)
    label = targets.where(exists, 0)[:, None]
    hard = (-log_p.gather(1, label)[:, 0]).where(exists, torch.nan).where(valid, 0.0)
    soft = (-(past * log_p).where(past != 0, 0.0).sum(1)).where(valid, 0.0)
    if not gradient:
        return hard, soft, logits.new_empty((0, classes))
    p = log_p.exp()
    missed = p.scatter_add(1, label, torch.full_like(p[:, :1], -1)).where(exists[:, None], torch.nan)  # p − e_y
    part = alpha * (p * past.sum(1, keepdim=True) - past)
    if alpha < 1:
        part = part + (1 - alpha) * missed
    part = (part * scale.to(exact)[:, None]).where((valid & (scale != 0))[:, None], 0.0)
    return hard, soft, part.to(logits.dtype)


# -- triton: one pass --------------------------------------------------------------------------------------------------


def _why_not_triton(logits, targets, table, index, samples, scale, alpha, ignore_index, gradient):
    interpreted = registry.forced("kd_table_rows") == "triton" and not torch.cuda.is_available()
    wanted = "cpu" if interpreted else "cuda"
    tensors = {"logits": logits, "targets": targets, "table": table, "index": index, "samples": samples, "scale": scale}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    reasons = [
        f"{name} is on {t.device}, not on an NVIDIA GPU" for name, t in present.items() if t.device.type != wanted
    ]
    if reasons:
        return reasons
    reasons = kernels.why_not()
    reasons += [f"{name} is {t.dtype}" for name, t in present.items() if t.dtype == torch.float64]
    reasons += [
        f"{name} is not contiguous"
        for name in ("table", "index")
        if name in present and not present[name].is_contiguous()
    ]
    if not 1 <= logits.shape[1] <= 262144:
        reasons.append(f"{logits.shape[1]} classes; the kernel takes 1 to 262144")
    return reasons


@registry.register("kd_table_rows", "triton", why_not=_why_not_triton)
def _triton(logits, targets, table, index, samples, scale, alpha, ignore_index, gradient):
    rows = kernels.ps_kd_rows(
        logits.detach(), targets, samples, kernels.PredictionTable(table, index, logits.shape[1]), scale.float(),
        alpha=alpha, ignore_index=ignore_index, update_ignored=True, gradient=gradient,
    )  # fmt: skip
    # the two losses lie in one piece of memory, and outputs of an op must not share theirs
    empty = logits.new_empty((0, logits.shape[1]))
    return rows.hard.clone(), rows.soft.clone(), empty if rows.gradient is None else rows.gradient
