"""Self-distillation losses: class-wise pairs (CS-KD), the last batch (DLB), the last epoch's predictions (PS-KD).

CS-KD and DLB are `distill_rows` with the right scales and teacher rows: one launch each. PS-KD has a kernel of its own:

    q_b = (1 − α)·onehot(y_b) + α·table[i_b]        loss_b = −Σ_c q_b,c · log softmax(z_b)_c
    table[i_b] ← softmax(z_b)

    row b:  z [C], table[i_b] [C]  →  loss, gradient [C], table[i_b] [C]

The table's row is gathered, mixed into the target and replaced in the kernel: 2 reads and 2 writes per class (an fp16
table), where separate operations take about 12. A top-k table keeps k probabilities and class numbers per sample; the
remaining mass is spread evenly over the other classes. Rows that do not fit in registers find their k largest logits
tile by tile while the sums are made: the k largest of a tile replace smaller ones of a list in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_engine.errors import ShapeError

from ._common import check_float, check_lengths, check_tensors, generation, on_its_device
from .distill import DistillResult, distill_config, distill_rows

MAX_TOP_K = 16


@dataclass(frozen=True)
class PredictionTable:
    """The predictions of the last epoch, one row per training sample, in fp16 on the GPU.

    Attributes:
        values: [N, C] probabilities, or [N, k] of the k most probable classes, falling.
        index: [N, k] int32 class of each value, −1 where unused; None for a full table.
        classes: C.
    """

    values: torch.Tensor
    index: torch.Tensor | None
    classes: int

    @classmethod
    def one_hot(cls, labels: torch.Tensor, classes: int, top_k: int | None = None) -> PredictionTable:
        """The table before the first epoch: each sample's label with probability 1.

        Args:
            labels: [N] int64. classes: C.
            top_k: keep only this many probabilities per sample: 1, 2, 4, 8 or 16. None: all of them.
        """
        if top_k is None:
            values = torch.zeros(labels.numel(), classes, dtype=torch.float16, device=labels.device)
            values.scatter_(1, labels.reshape(-1, 1), 1.0)
            return cls(values, None, classes)
        if top_k not in (1, 2, 4, 8, MAX_TOP_K) or top_k >= classes:
            raise ShapeError(f"top_k must be 1, 2, 4, 8 or 16 and below the {classes} classes, got {top_k}")
        values = torch.zeros(labels.numel(), top_k, dtype=torch.float16, device=labels.device)
        index = torch.full((labels.numel(), top_k), -1, dtype=torch.int32, device=labels.device)
        values[:, 0] = 1.0
        index[:, 0] = labels
        return cls(values, index, classes)

    def dense(self, rows: torch.Tensor) -> torch.Tensor:
        """The probabilities of some samples, fp32 [len(rows), C]."""
        values = self.values[rows].float()
        if self.index is None:
            return values
        top_k = values.shape[1]
        rest = (1.0 - values.sum(1, keepdim=True)) / (self.classes - top_k)
        full = rest.repeat(1, self.classes + 1)  # one more column takes the unused entries
        index = self.index[rows].long()
        full.scatter_(1, torch.where(index < 0, self.classes, index), values)
        return full[:, : self.classes].contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.values.nbytes + (self.index.nbytes if self.index is not None else 0)


@triton.jit
def _previous(table_row, index_row, c, inside, rest, TOP_K: tl.constexpr):
    """The table's probabilities of one tile of classes, fp32."""
    if TOP_K == 0:
        p = tl.load(table_row + c, mask=inside, other=0.0).to(tl.float32)
    else:
        p = tl.where(inside, rest, 0.0)
        for j in tl.static_range(TOP_K):
            p = tl.where(c == tl.load(index_row + j), tl.load(table_row + j).to(tl.float32), p)
    return p


@triton.jit
def _keep_largest(best, best_class, z, c, TOP_K: tl.constexpr):
    """Takes the TOP_K largest of one tile into the list of the largest so far; of equal ones the lowest class stays.
    Tiles come in rising order."""
    places = tl.arange(0, TOP_K)
    for _ in tl.static_range(TOP_K):
        largest = tl.max(z, 0)
        where = tl.min(tl.where(z == largest, c, 2147483647), 0)
        least = tl.min(best, 0)
        # of equal ones the highest class gives way, of empty places the first
        out_class = tl.max(tl.where(best == least, best_class, -1), 0)
        out_place = tl.min(tl.where((best == least) & (best_class == out_class), places, TOP_K), 0)
        takes = places == tl.where(largest > least, out_place, TOP_K)
        best = tl.where(takes, largest, best)
        best_class = tl.where(takes, where, best_class)
        z = tl.where(c == where, -float("inf"), z)
    return best, best_class


@triton.jit
def ps_kd_kernel(
    z_ptr,  # [B, z_stride ≥ C]
    y_ptr,  # [B] int64
    sample_ptr,  # [B] int64: row of the table
    table_ptr,  # [N, C] or [N, TOP_K], read and written
    index_ptr,  # [N, TOP_K] int32, read and written
    scale_ptr,  # [B] fp32
    loss_ptr,  # [B] fp32 out
    hard_ptr,  # [B] fp32 out: cross-entropy with the label
    soft_ptr,  # [B] fp32 out: cross-entropy with the past prediction
    g_ptr,  # [B, g_stride ≥ C] out; may be z_ptr
    z_stride,
    g_stride,
    classes,
    samples,  # N
    alpha,
    ignore_index,
    TOP_K: tl.constexpr,
    GRADIENT: tl.constexpr,
    UPDATE: tl.constexpr,
    UPDATE_IGNORED: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(y_ptr + row)
    valid = label != ignore_index
    sample = tl.load(sample_ptr + row)
    there = (sample >= 0) & (sample < samples)  # another number is seen in the loss, and nothing is read or written
    sample = tl.where(there, sample, 0)
    inside_classes = (label >= 0) & (label < classes)
    y = tl.where(inside_classes, label, -1).to(tl.int32)
    scale = tl.where(valid, tl.load(scale_ptr + row), 0.0)
    z_row = z_ptr + row * z_stride
    table_row = table_ptr + sample * (classes if TOP_K == 0 else TOP_K)
    index_row = index_ptr + sample * TOP_K
    z_y = tl.load(z_row + tl.maximum(y, 0)).to(tl.float32)
    rest = 0.0
    if TOP_K > 0:
        kept = tl.load(table_row + tl.arange(0, TOP_K)).to(tl.float32)
        rest = (1.0 - tl.sum(kept, 0)) / (classes - TOP_K)
    columns = tl.arange(0, BLOCK_C)

    z_max = -float("inf")
    z_sum = 0.0
    mass = 0.0  # Σ p, 1 but for fp16 rounding
    cross = 0.0  # Σ p z
    if TOP_K > 0:
        largest = tl.full((TOP_K,), -float("inf"), tl.float32)
        largest_class = tl.full((TOP_K,), -1, tl.int32)
    if RESIDENT:
        z = tl.load(z_row + columns, mask=columns < classes, other=-float("inf")).to(tl.float32)
        p = _previous(table_row, index_row, columns, columns < classes, rest, TOP_K)
    for start in range(0, 1 if RESIDENT else classes, BLOCK_C):
        c = start + columns
        inside = c < classes
        if not RESIDENT:
            z = tl.load(z_row + c, mask=inside, other=-float("inf")).to(tl.float32)
            p = _previous(table_row, index_row, c, inside, rest, TOP_K)
        new_max = tl.maximum(z_max, tl.max(z, 0))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)
        z_sum = z_sum * tl.exp(z_max - base) + tl.sum(tl.exp(z - base), 0)
        z_max = new_max
        mass += tl.sum(p, 0)
        cross += tl.sum(tl.where(p == 0.0, 0.0, p * z), 0)
        if TOP_K > 0 and UPDATE and not RESIDENT:
            largest, largest_class = _keep_largest(largest, largest_class, z, c, TOP_K)
    target_mass = 1.0 - alpha + alpha * mass
    lse = z_max + tl.log(z_sum)
    hard = tl.where(inside_classes, lse - z_y, float("nan"))
    soft = tl.where(there, mass * lse - cross, float("nan"))
    if alpha < 1.0:
        loss = (1.0 - alpha) * hard + alpha * soft
    else:
        loss = alpha * soft  # labels have no influence
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0))
    tl.store(hard_ptr + row, tl.where(valid, hard, 0.0))
    tl.store(soft_ptr + row, tl.where(valid, soft, 0.0))
    scale = tl.where((loss != loss) & (scale != 0.0), float("nan"), scale)
    writes = there if UPDATE_IGNORED else there & valid
    writable = tl.where(writes, classes, 0)

    if RESIDENT:
        inside = columns < classes
        share = tl.exp(z - z_max) / z_sum
        if GRADIENT:
            g = target_mass * share - alpha * p - tl.where(columns == y, 1.0 - alpha, 0.0)
            g = tl.where(scale != 0.0, scale * g, 0.0)
            tl.store(g_ptr + row * g_stride + columns, g.to(g_ptr.dtype.element_ty), mask=inside)
        if UPDATE:
            if TOP_K == 0:
                tl.store(table_row + columns, share.to(table_ptr.dtype.element_ty), mask=columns < writable)
            else:
                left = tl.where(inside, share, -1.0)
                for j in tl.static_range(TOP_K):
                    best = tl.max(left, 0)
                    where = tl.min(tl.where(left == best, columns, BLOCK_C), 0)  # ties: the lowest class
                    tl.store(table_row + j, best.to(table_ptr.dtype.element_ty), mask=writable > 0)
                    tl.store(index_row + j, where, mask=writable > 0)
                    left = tl.where(columns == where, -1.0, left)
    else:
        tiles = tl.cdiv(classes, BLOCK_C)
        for back in range(tiles):
            c = (tiles - 1 - back) * BLOCK_C + columns
            inside = c < classes
            z = tl.load(z_row + c, mask=inside, other=-float("inf")).to(tl.float32)
            p = _previous(table_row, index_row, c, inside, rest, TOP_K)
            share = tl.exp(z - z_max) / z_sum
            if GRADIENT:
                g = target_mass * share - alpha * p - tl.where(c == y, 1.0 - alpha, 0.0)
                g = tl.where(scale != 0.0, scale * g, 0.0)
                tl.store(g_ptr + row * g_stride + c, g.to(g_ptr.dtype.element_ty), mask=inside)
            if UPDATE and TOP_K == 0:
                tl.store(table_row + c, share.to(table_ptr.dtype.element_ty), mask=c < writable)
        if UPDATE and TOP_K > 0:
            for j in tl.static_range(TOP_K):
                best = tl.max(largest, 0)
                where = tl.min(tl.where(largest == best, largest_class, 2147483647), 0)  # ties: the lowest class
                share = tl.where(best == -float("inf"), 0.0, tl.exp(best - z_max) / z_sum)
                tl.store(table_row + j, share.to(table_ptr.dtype.element_ty), mask=writable > 0)
                tl.store(index_row + j, where, mask=writable > 0)
                largest = tl.where((largest == best) & (largest_class == where), -float("inf"), largest)
                largest_class = tl.where((largest == -float("inf")) & (largest_class == where), -1, largest_class)


def cs_kd_loss(
    logits: torch.Tensor,
    pair_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    weight: float = 1.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
    in_place: bool = False,
) -> tuple[torch.Tensor, DistillResult]:
    """Class-wise self-distillation: `CE(z, y) + weight · T² · KL(softmax(z′/T) ‖ softmax(z/T))`, mean over the rows.

    Args:
        logits: [B, C]. pair_logits: [B, C], of another sample of the same class, a constant.
        labels: [B] int64. weight: λ. in_place: write the gradient over `logits`.

    Returns:
        The scalar loss, and the parts with its gradient.

    Source: Yun et al., CVPR 2020 (arXiv 2003.13964).
    """
    scale = _mean_scale(labels, ignore_index)
    result = distill_rows(
        logits,
        pair_logits,
        labels,
        scale,
        scale * weight,
        temperature=temperature,
        ignore_index=ignore_index,
        in_place=in_place,
    )
    return ((result.hard + weight * result.soft) * scale).sum(), result


def dlb_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    last_logits: torch.Tensor | None,
    *,
    weight: float = 1.0,
    temperature: float = 3.0,
    in_place: bool = False,
) -> tuple[torch.Tensor, DistillResult]:
    """Self-distillation from the last batch.

    `CE over all rows + weight · T² · KL(softmax(z_last/T) ‖ softmax(z_now/T))`, the second part over the last L rows of
    `logits`, each part a mean over its own rows.

    Args:
        logits: [B + L, C]: this batch, then the second view of the last batch.
        labels: [B + L] int64.
        last_logits: [L, C], what the last step predicted for its batch; None in the first step (plain cross-entropy).

    Source: Shen et al., CVPR 2022 (arXiv 2203.16172).
    """
    rows = logits.shape[0]
    last = 0 if last_logits is None else last_logits.shape[0]
    if last > rows:
        raise ShapeError(f"dlb_loss: {last} rows of the last batch, but only {rows} rows of logits")
    hard = torch.full((rows,), 1.0 / max(rows, 1), device=logits.device)
    if last_logits is None or last == 0:
        result = distill_rows(logits, None, labels, hard, in_place=in_place)
        return (result.hard * hard).sum(), result
    index = torch.arange(rows, device=logits.device) - (rows - last)
    soft = torch.full((rows,), weight / last, device=logits.device)
    result = distill_rows(
        logits,
        last_logits,
        labels,
        hard,
        soft,
        temperature=temperature,
        teacher_index=index,
        in_place=in_place,
    )
    return (result.hard * hard + result.soft * soft).sum(), result


@on_its_device
def ps_kd_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    samples: torch.Tensor,
    table: PredictionTable,
    *,
    alpha: float,
    ignore_index: int = -100,
    scale: torch.Tensor | None = None,
    update: bool = True,
    update_ignored: bool = False,
    gradient: bool = True,
    in_place: bool = False,
) -> tuple[torch.Tensor, DistillResult]:
    """Progressive self-distillation: cross-entropy against a mix of the label and the table's prediction.

    Args:
        logits: [B, C]. labels: [B] int64, rows with `ignore_index` count in neither loss nor table.
        samples: [B] int64, each sample's row of the table; no sample twice in a batch. One that the table does not
            have makes its row NaN, and nothing is written for it.
        table: read, and replaced by these predictions where `update`; `update_ignored`: also of ignored rows.
        alpha: α_t of this epoch, in [0, 1].
        scale: [B] fp32 factor of each row's loss; None: 1 / number of rows that are not ignored.

    Returns:
        Σ scale · loss (the mean, where no scale was given), and the per-row losses (`hard`) with the gradient of that
        sum. `ps_kd_rows` gives the two parts.

    Raises:
        ShapeError: sizes that do not fit.

    Source: Kim et al., ICCV 2021 (arXiv 2006.12000).
    """
    scale = _mean_scale(labels, ignore_index) if scale is None else scale.float().reshape(-1)
    rows = ps_kd_rows(
        logits, labels, samples, table, scale, alpha=alpha, ignore_index=ignore_index, update=update,
        update_ignored=update_ignored, gradient=gradient, in_place=in_place,
    )  # fmt: skip
    return (rows.loss * scale).sum(), DistillResult(rows.loss, None, rows.gradient)


@dataclass(frozen=True)
class TableRows:
    """Per-row losses of PS-KD, fp32 [B] before any scale and 0 where ignored: the mixed loss, its part with the label
    and its part with the past prediction; and the gradient of Σ scale · loss."""

    loss: torch.Tensor
    hard: torch.Tensor
    soft: torch.Tensor
    gradient: torch.Tensor | None


@on_its_device
def ps_kd_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    samples: torch.Tensor,
    table: PredictionTable,
    scale: torch.Tensor,
    *,
    alpha: float,
    ignore_index: int = -100,
    update: bool = True,
    update_ignored: bool = False,
    gradient: bool = True,
    in_place: bool = False,
) -> TableRows:
    """The launch behind `ps_kd_loss`; arguments as there, `scale` fp32 [B]."""
    name = "ps_kd_loss"
    device = check_tensors(name, logits, labels, samples, table.values, table.index, scale)
    check_float(name, logits)
    check_float(name, table.values)
    rows, classes = logits.shape
    check_lengths(
        name,
        labels=(labels.numel(), rows),
        samples=(samples.numel(), rows),
        scale=(scale.numel(), rows),
        classes=(table.classes, classes),
    )
    if not 0 <= alpha <= 1:
        raise ShapeError(f"{name}: alpha must be in [0, 1], got {alpha}")
    if not table.values.is_contiguous() or (table.index is not None and not table.index.is_contiguous()):
        raise ShapeError(f"{name}: the table is written in place and must be contiguous")
    config = distill_config(generation(device), classes)
    top_k = 0 if table.index is None else table.values.shape[1]
    if in_place and logits.stride(-1) != 1:
        raise ShapeError(f"{name}: in_place needs contiguous classes, strides are {logits.stride()}")
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = (logits if in_place else torch.empty_like(logits)) if gradient else None
    losses = torch.empty(3, rows, dtype=torch.float32, device=device)
    if rows:
        target = logits if out is None else out
        ps_kd_kernel[(rows,)](
            logits, labels.reshape(-1).long().contiguous(), samples.reshape(-1).long().contiguous(), table.values,
            table.values if table.index is None else table.index, scale.contiguous(), losses[0], losses[1], losses[2],
            target, logits.stride(0), target.stride(0), classes, table.values.shape[0], float(alpha), ignore_index,
            TOP_K=top_k, GRADIENT=gradient, UPDATE=update, UPDATE_IGNORED=update_ignored, **config,
        )  # fmt: skip
    return TableRows(losses[0], losses[1], losses[2], out)


def _mean_scale(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """[B] fp32: 1 / number of rows that count, computed on the device."""
    valid = (labels != ignore_index).reshape(-1).float()
    return valid / valid.sum().clamp(min=1)


def aot_cases(arch: str) -> list:
    """The PS-KD kernel, full and top-k, in one tile and in many."""
    from .aot import AotCase

    found = []
    signature = {"z_ptr": "*bf16", "y_ptr": "*i64", "sample_ptr": "*i64", "table_ptr": "*fp16", "index_ptr": "*i32"}
    signature |= {"scale_ptr": "*fp32", "loss_ptr": "*fp32", "g_ptr": "*bf16", "alpha": "fp32"}
    signature |= dict.fromkeys(("hard_ptr", "soft_ptr"), "*fp32")
    signature |= dict.fromkeys(("z_stride", "g_stride", "classes", "samples", "ignore_index"), "i32")
    for classes, top_k in ((100, 0), (1000, 0), (8192, 0), (32000, 0), (1000, 8), (8192, 16), (32000, 4), (32000, 16)):
        config = distill_config(arch, classes)
        found.append(
            AotCase(
                name=f"bf16 {classes} classes, {f'top-{top_k}' if top_k else 'full'} table",
                kernel=ps_kd_kernel,
                signature=signature,
                constants={"TOP_K": top_k, "GRADIENT": True, "UPDATE": True, "UPDATE_IGNORED": False}
                | {"RESIDENT": config["RESIDENT"], "BLOCK_C": config["BLOCK_C"]},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                quick=classes == 1000,
            )
        )
    return found
