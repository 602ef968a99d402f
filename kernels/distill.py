"""Distillation loss: cross-entropy and temperature-scaled KL in one kernel that also writes the gradient of the
student's logits.

    loss_b = hard_scale_b · CE(z_b, y_b; ε) + soft_scale_b · T² · KL(p_t ‖ softmax(z_b / T))

    row b:   z_s [C] ──┐  pass 1: maxima, and sums of exponentials rescaled as the maximum grows (online softmax)
             z_t [C] ──┘  pass 2, backwards: g = hard_scale (softmax(z) − q) + soft_scale · T (softmax(z/T) − p_t)

One program per row. Where a row fits in registers there is one pass: every logit is read once and every gradient
written once, 3·B·C numbers in all, which is the least possible: about 2–4 exponentials per 6 bytes (bf16), so the bound
is memory bandwidth. Longer rows are read twice, the second time backwards so that the end of the row still lies in the
L2 cache. Everything between load and store is fp32. exp(z) is a power of exp(z/T) for T = 1, 2, 4: the special-function
unit would otherwise be the second bound.

Scales are per row and live on the GPU, so ignored rows, weights, means and losses over parts of a batch
(`self_distill`) need no host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_engine.errors import ShapeError

from ._common import check_float, check_lengths, check_tensors, generation, on_its_device

# (GPU generation, classes in one tile, rounded up to a power of two): warps. Longer rows go through tiles of TILE.
RESIDENT_WARPS: dict[str, dict[int, int]] = {
    "sm_80": {256: 1, 512: 2, 1024: 4, 2048: 4, 4096: 8, 8192: 8},
    "sm_90": {256: 1, 512: 2, 1024: 4, 2048: 4, 4096: 8, 8192: 8},
}
TILE = {"sm_80": {"BLOCK_C": 4096, "num_warps": 8}, "sm_90": {"BLOCK_C": 8192, "num_warps": 8}}
MAX_CLASSES = 262144


@dataclass(frozen=True)
class DistillResult:
    """Per-row losses (fp32 [B], before any scale; 0 where ignored) and the gradient of Σ_b hard_scale_b·hard_b +
    soft_scale_b·soft_b."""

    hard: torch.Tensor | None
    soft: torch.Tensor | None
    gradient: torch.Tensor | None


@triton.jit
def _power(e, T_POWER: tl.constexpr):
    """exp((z − m)/T) → exp(z − m) for T = 1, 2, 4."""
    if T_POWER == 2:
        e = e * e
    elif T_POWER == 4:
        e = e * e
        e = e * e
    return e


@triton.jit
def _tile(z_row, t_row, c, inside, SOFT: tl.constexpr, LAST: tl.constexpr):
    """Student and teacher numbers of one tile in fp32; past the end −inf for logits, 0 for probabilities."""
    policy: tl.constexpr = "evict_first" if LAST else "evict_last"
    z = tl.load(z_row + c, mask=inside, other=-float("inf"), eviction_policy=policy).to(tl.float32)
    t = z
    if SOFT == "logits":
        t = tl.load(t_row + c, mask=inside, other=-float("inf"), eviction_policy=policy).to(tl.float32)
    elif SOFT == "probabilities":
        t = tl.load(t_row + c, mask=inside, other=0.0, eviction_policy=policy).to(tl.float32)
    return z, t


@triton.jit
def _gradient(
    z, t, c, y, z_max, z_sum, zt_sum, t_max, t_sum, mass, hard_scale, soft_scale, inv_t, smoothing, classes,
    HARD: tl.constexpr, SOFT: tl.constexpr, T_POWER: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile; a part whose scale is 0 adds nothing, whatever its numbers are."""
    e = tl.exp((z - z_max) * inv_t)
    g = tl.zeros_like(z)
    if HARD:
        if T_POWER == 0:
            p = tl.exp(z - z_max)
        else:
            p = _power(e, T_POWER)
        q = tl.where(c == y, 1.0 - smoothing, 0.0) + smoothing / classes
        hard = hard_scale * (p / z_sum - q)
        g += tl.where(hard_scale != 0.0, hard, 0.0)
    if SOFT != "none":
        if SOFT == "logits":
            target = tl.exp((t - t_max) * inv_t) / t_sum
        else:
            target = t
        soft = soft_scale / inv_t * (mass * e / zt_sum - target)
        g += tl.where(soft_scale != 0.0, soft, 0.0)
    return g


@triton.jit
def distill_kernel(
    z_ptr,  # [B, z_stride ≥ C] student logits
    t_ptr,  # [Bt, t_stride ≥ C] teacher logits or probabilities
    t_index_ptr,  # [B] int64: the teacher's row of each row, negative = none
    y_ptr,  # [B] int64
    hard_scale_ptr,  # [B] fp32
    soft_scale_ptr,  # [B] fp32
    hard_ptr,  # [B] fp32 out
    soft_ptr,  # [B] fp32 out
    g_ptr,  # [B, g_stride ≥ C] out; may be z_ptr
    z_stride,
    t_stride,
    g_stride,
    classes,
    inv_t,  # 1 / T
    smoothing,
    ignore_index,
    HARD: tl.constexpr,
    SOFT: tl.constexpr,  # "none", "logits", "probabilities"
    INDEXED: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GRADIENT: tl.constexpr,
    T_POWER: tl.constexpr,  # T where it is 1, 2 or 4, else 0
    KL: tl.constexpr,  # whether the soft part contains the teacher's entropy
    RESIDENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = classes
    valid = True
    if LABELS:
        label = tl.load(y_ptr + row)
        valid = label != ignore_index
        y = tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)
    hard_scale = 0.0
    soft_scale = 0.0
    if HARD:
        hard_scale = tl.where(valid, tl.load(hard_scale_ptr + row), 0.0)
    t_row = t_ptr
    paired = valid
    if SOFT != "none":
        t_of = row
        if INDEXED:
            t_of = tl.load(t_index_ptr + row)
            paired = valid & (t_of >= 0)
            t_of = tl.maximum(t_of, 0)
        soft_scale = tl.where(paired, tl.load(soft_scale_ptr + row), 0.0)
        t_row = t_ptr + t_of * t_stride
    z_row = z_ptr + row * z_stride
    z_y = 0.0
    if HARD:  # before any gradient is stored: it may replace the logits
        z_y = tl.load(z_row + tl.maximum(y, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK_C)

    z_max = -float("inf")
    z_sum = 0.0  # Σ exp(z − max)
    zt_sum = 0.0  # Σ exp((z − max) / T)
    z_total = 0.0  # Σ z, for label smoothing
    t_max = -float("inf")
    t_sum = 0.0  # Σ exp((t − max) / T)
    cross = (
        0.0  # Σ exp((t − max) / T)(t − z) / T; for probabilities Σ p (log p − z / T); without KL only the parts in z
    )
    mass = 1.0  # Σ p
    if SOFT == "probabilities":
        mass = 0.0
    if RESIDENT:
        z, t = _tile(z_row, t_row, columns, columns < classes, SOFT, True)
    for start in range(0, 1 if RESIDENT else classes, BLOCK_C):
        c = start + columns
        inside = c < classes
        if not RESIDENT:
            z, t = _tile(z_row, t_row, c, inside, SOFT, False)
        new_max = tl.maximum(z_max, tl.max(z, 0))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)  # −inf − −inf would be NaN
        fade = tl.exp((z_max - base) * inv_t)
        e = tl.exp((z - base) * inv_t)
        zt_sum = zt_sum * fade + tl.sum(e, 0)
        if HARD:
            if T_POWER == 0:
                z_sum = z_sum * tl.exp(z_max - base) + tl.sum(tl.exp(z - base), 0)
            else:
                z_sum = z_sum * _power(fade, T_POWER) + tl.sum(_power(e, T_POWER), 0)
        if SMOOTH:
            z_total += tl.sum(tl.where(inside, z, 0.0), 0)
        z_max = new_max
        if SOFT == "logits":
            new_max = tl.maximum(t_max, tl.max(t, 0))
            base = tl.where(new_max == -float("inf"), 0.0, new_max)
            fade = tl.exp((t_max - base) * inv_t)
            e_t = tl.exp((t - base) * inv_t)
            t_sum = t_sum * fade + tl.sum(e_t, 0)
            terms = (t - z) * inv_t if KL else -z * inv_t
            cross = cross * fade + tl.sum(tl.where(e_t == 0.0, 0.0, e_t * terms), 0)
            t_max = new_max
        elif SOFT == "probabilities":
            mass += tl.sum(t, 0)
            terms = tl.log(t) - z * inv_t if KL else -z * inv_t
            cross += tl.sum(tl.where(t == 0.0, 0.0, t * terms), 0)
    if HARD:
        lse = z_max + tl.log(z_sum)
        hard = lse - z_y
        if SMOOTH:
            hard = lse - (1.0 - smoothing) * z_y - smoothing * (z_total / classes)
        hard = tl.where(y < 0, float("nan"), hard)  # a label that is no class: visible, and no synchronisation
        tl.store(hard_ptr + row, tl.where(valid, hard, 0.0))
        if GRADIENT:
            hard_scale = tl.where((y < 0) & (hard_scale != 0.0), float("nan"), hard_scale)
    if SOFT != "none":
        lse_t = z_max * inv_t + tl.log(zt_sum)
        if SOFT == "logits" and not KL:
            soft = cross / t_sum + lse_t
        elif SOFT == "logits":
            # the two maxima apart, so that large logits cancel before they are rounded
            soft = cross / t_sum + (z_max - t_max) * inv_t + tl.log(zt_sum) - tl.log(t_sum)
        else:
            soft = cross + mass * lse_t
        tl.store(soft_ptr + row, tl.where(paired, soft / (inv_t * inv_t), 0.0))
    if GRADIENT:
        g_row = g_ptr + row * g_stride
        if RESIDENT:
            g = _gradient(
                z,
                t,
                columns,
                y,
                z_max,
                z_sum,
                zt_sum,
                t_max,
                t_sum,
                mass,
                hard_scale,
                soft_scale,
                inv_t,
                smoothing,
                classes,
                HARD,
                SOFT,
                T_POWER,
            )
            tl.store(g_row + columns, g.to(g_ptr.dtype.element_ty), mask=columns < classes)
        else:
            tiles = tl.cdiv(classes, BLOCK_C)
            for back in range(tiles):
                c = (tiles - 1 - back) * BLOCK_C + columns
                inside = c < classes
                z, t = _tile(z_row, t_row, c, inside, SOFT, True)
                g = _gradient(
                    z,
                    t,
                    c,
                    y,
                    z_max,
                    z_sum,
                    zt_sum,
                    t_max,
                    t_sum,
                    mass,
                    hard_scale,
                    soft_scale,
                    inv_t,
                    smoothing,
                    classes,
                    HARD,
                    SOFT,
                    T_POWER,
                )
                tl.store(g_row + c, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_rows_kernel(
    x_ptr,  # [B, x_stride ≥ C], in place
    factor_ptr,  # [1] or [B] fp32
    x_stride,
    classes,
    PER_ROW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row) if PER_ROW else tl.load(factor_ptr)
    if factor != 1.0:  # the usual upstream gradient: nothing to read, nothing to write
        for start in range(0, classes, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = tl.load(x_ptr + row * x_stride + c, mask=c < classes).to(tl.float32)
            x = tl.where(factor == 0.0, 0.0, x * factor)
            tl.store(x_ptr + row * x_stride + c, x.to(x_ptr.dtype.element_ty), mask=c < classes)


def distill_config(arch: str, classes: int) -> dict[str, int | bool]:
    """The configuration of one launch: the whole row in registers, or tiles."""
    block = max(256, triton.next_power_of_2(classes))
    warps = RESIDENT_WARPS[arch].get(block)
    if warps is not None:
        return {"RESIDENT": True, "BLOCK_C": block, "num_warps": warps, "num_stages": 1}
    return {"RESIDENT": False, **TILE[arch], "num_stages": 2}


@on_its_device
def distill_rows(
    student: torch.Tensor,
    teacher: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    hard_scale: torch.Tensor | None = None,
    soft_scale: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    soft_targets: bool = False,
    teacher_index: torch.Tensor | None = None,
    kl: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    gradient: bool = True,
    in_place: bool = False,
) -> DistillResult:
    """Per-row cross-entropy and T²·KL, and the gradient of their scaled sum, in one launch.

    Args:
        student: [B, C] logits, fp32, fp16 or bf16, at most 262,144 classes.
        teacher: [Bt, C] logits, or probabilities with soft_targets; a float type of its own. None: no soft part.
        labels: [B] int64. None: no hard part, and no row is ignored.
        hard_scale, soft_scale: [B] fp32 multipliers of the two parts in the gradient. A part without its scale is not
            computed.
        temperature: T > 0; soft targets are taken as already softened.
        teacher_index: [B] int64, the teacher's row for each row; negative: this row has no soft part.
        kl: whether the soft part contains the teacher's entropy, which changes its value but not its gradient.
        label_smoothing: ε in [0, 1): the hard target is (1−ε)·onehot + ε/C.
        ignore_index: rows with this label add nothing to either part. Any other label outside [0, C) makes its row NaN.
        gradient: whether to compute it; in_place: whether it replaces `student`'s numbers.

    Raises:
        ShapeError: sizes, types or settings that do not fit. BackendError: no GPU that can run it.
    """
    name = "distill_rows"
    device = check_tensors(name, student, teacher, labels, hard_scale, soft_scale, teacher_index)
    check_float(name, student)
    if student.dim() != 2:
        raise ShapeError(f"{name}: student logits must be [rows, classes], got {tuple(student.shape)}")
    rows, classes = student.shape
    if not 1 <= classes <= MAX_CLASSES:
        raise ShapeError(f"{name}: {classes} classes; the kernel takes 1 to {MAX_CLASSES}")
    if not temperature > 0:
        raise ShapeError(f"{name}: temperature must be above 0, got {temperature}")
    if not 0 <= label_smoothing < 1:
        raise ShapeError(f"{name}: label_smoothing must be in [0, 1), got {label_smoothing}")
    hard = labels is not None and hard_scale is not None
    soft = teacher is not None and soft_scale is not None
    if not hard and not soft:
        raise ShapeError(
            f"{name}: nothing to compute; give labels with hard_scale, or teacher with soft_scale, or both"
        )
    for what, vector in (
        ("labels", labels),
        ("hard_scale", hard_scale),
        ("soft_scale", soft_scale),
        ("teacher_index", teacher_index),
    ):
        if vector is not None:
            check_lengths(name, **{what: (vector.numel(), rows)})
    if soft and teacher is not None:
        check_float(name, teacher)
        check_lengths(name, **{"teacher classes": (teacher.shape[-1], classes)})
        if teacher_index is None:
            check_lengths(name, **{"teacher rows": (teacher.shape[0], rows)})
        teacher = teacher if teacher.stride(-1) == 1 else teacher.contiguous()
    if in_place and student.stride(-1) != 1:
        raise ShapeError(f"{name}: in_place needs contiguous classes, strides are {student.stride()}")
    student = student if student.stride(-1) == 1 else student.contiguous()
    out = (
        (student if in_place else torch.empty_like(student, memory_format=torch.contiguous_format))
        if gradient
        else None
    )
    hard_rows = torch.empty(rows, dtype=torch.float32, device=device) if hard else None
    soft_rows = torch.empty(rows, dtype=torch.float32, device=device) if soft else None
    if rows:
        target = out if out is not None else student
        config = distill_config(generation(device), classes)
        distill_kernel[(rows,)](
            student, _or(teacher, student), _long(teacher_index, student), _long(labels, student),
            _fp32(hard_scale, student), _fp32(soft_scale, student), _or(hard_rows, student), _or(soft_rows, student),
            target, student.stride(0), teacher.stride(0) if teacher is not None else 0, target.stride(0),
            classes, 1.0 / temperature, float(label_smoothing), ignore_index,
            HARD=hard, SOFT=("probabilities" if soft_targets else "logits") if soft else "none",
            INDEXED=teacher_index is not None, LABELS=labels is not None, SMOOTH=label_smoothing > 0,
            GRADIENT=gradient, T_POWER=int(temperature) if temperature in (1.0, 2.0, 4.0) else 0, KL=kl, **config,
        )  # fmt: skip
    return DistillResult(hard_rows, soft_rows, out)


def kd_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    soft_targets: bool = False,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    gradient: bool = True,
    in_place: bool = False,
) -> tuple[torch.Tensor, DistillResult]:
    """`(1−α)·CE(student, labels) + α·T²·KL(teacher ‖ student)` and its gradient.

    Args:
        student, teacher, labels, temperature, soft_targets, label_smoothing, ignore_index, gradient, in_place: as for
        `distill_rows`.
        alpha: weight of the soft part; 1 never looks at the labels' values, except ignore_index. Without labels the
            hard part is absent.
        weights: [B], multiplies each row's loss, or None.
        reduction: "mean" over the rows not ignored (0 where there is none), "sum", or "none".

    Returns:
        The loss (a scalar, or [B] for "none"), and the parts with the gradient of that loss (of its sum for "none").
    """
    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"kd_loss: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= alpha <= 1:
        raise ShapeError(f"kd_loss: alpha must be in [0, 1], got {alpha}")
    rows = student.shape[0]
    scale = (
        torch.ones(rows, dtype=torch.float32, device=student.device)
        if weights is None
        else weights.float().reshape(-1).clone()
    )
    check_lengths("kd_loss", weights=(scale.numel(), rows))
    if reduction == "mean":
        if labels is not None:
            scale = scale / (labels != ignore_index).sum().clamp(min=1)
        else:
            scale = scale / max(rows, 1)
    hard_on, soft_on = labels is not None and alpha < 1, teacher is not None and alpha > 0
    if not hard_on and not soft_on:
        raise ShapeError("kd_loss: nothing to compute; give a teacher (alpha > 0) or labels (alpha < 1)")
    result = distill_rows(
        student,
        teacher if soft_on else None,
        labels,
        scale * (1.0 - alpha) if hard_on else None,
        scale * alpha if soft_on else None,
        temperature=temperature,
        soft_targets=soft_targets,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        gradient=gradient,
        in_place=in_place,
    )
    loss = torch.zeros_like(scale)
    if result.hard is not None:
        loss = loss + (1.0 - alpha) * result.hard
    if result.soft is not None:
        loss = loss + alpha * result.soft
    loss = loss * scale
    return (loss if reduction == "none" else loss.sum()), result


@on_its_device
def scale_rows_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x · factor in place, for the upstream gradient; returns at once, without reading x, where the factor is 1.

    Args:
        x: [B, C], classes contiguous. factor: one number, or [B], on the same device.
    """
    check_tensors("scale_rows_", x, factor)
    if factor.numel() != 1:
        check_lengths("scale_rows_", factor=(factor.numel(), x.shape[0]))
    if x.numel():
        scale_rows_kernel[(x.shape[0],)](
            x, factor.reshape(-1).float().contiguous(), x.stride(0), x.shape[1], PER_ROW=factor.numel() != 1,
            BLOCK_C=min(4096, max(256, triton.next_power_of_2(x.shape[1]))), num_warps=4,
        )  # fmt: skip
    return x


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is valid though never read."""
    return other if tensor is None else tensor


def _long(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor.reshape(-1).long().contiguous()


def _fp32(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor.reshape(-1).float().contiguous()


def aot_cases(arch: str) -> list:
    """Every tile of the table, bf16 and fp32, with both parts; the other flags on one of them."""
    from .aot import AotCase

    found = []
    base = dict.fromkeys(("z_stride", "t_stride", "g_stride", "classes", "ignore_index"), "i32") | {
        "inv_t": "fp32",
        "smoothing": "fp32",
    }
    base |= {"t_index_ptr": "*i64", "y_ptr": "*i64"} | dict.fromkeys(
        ("hard_scale_ptr", "soft_scale_ptr", "hard_ptr", "soft_ptr"), "*fp32"
    )
    flags = {
        "HARD": True,
        "SOFT": "logits",
        "INDEXED": False,
        "LABELS": True,
        "SMOOTH": False,
        "GRADIENT": True,
        "T_POWER": 4,
        "KL": True,
    }
    variants = [("bf16", classes, flags) for classes in (256, 1000, 2000, 4096, 8192, 16384, 32000, 131072)]
    variants += [("fp32", classes, flags) for classes in (1000, 16384, 32000)]
    variants += [
        ("bf16", 32000, flags | {"T_POWER": 0, "SMOOTH": True, "INDEXED": True}),
        ("bf16", 1000, flags | {"SOFT": "probabilities"}),
        ("bf16", 1000, flags | {"SOFT": "probabilities", "KL": False, "T_POWER": 1}),
        ("bf16", 32000, flags | {"KL": False}),
        ("bf16", 1000, flags | {"SOFT": "none", "SMOOTH": True, "T_POWER": 1}),
        ("bf16", 32000, flags | {"GRADIENT": False}),
        ("bf16", 1000, flags | {"HARD": False, "LABELS": False}),
        ("bf16", 32000, flags | {"HARD": False, "LABELS": False, "INDEXED": True}),
        ("bf16", 32000, flags | {"SOFT": "probabilities", "T_POWER": 0}),
    ]
    for kind, classes, chosen in variants:
        config = distill_config(arch, classes)
        pointers = dict.fromkeys(("z_ptr", "t_ptr", "g_ptr"), f"*{kind}")
        changed = ", ".join(f"{key.lower()}={value}" for key, value in chosen.items() if value != flags[key])
        found.append(
            AotCase(
                name=f"{kind} {classes} classes, {'one tile' if config['RESIDENT'] else 'tiles'} of {config['BLOCK_C']}"
                + (f" {changed}" if changed else ""),
                kernel=distill_kernel,
                signature=pointers | base,
                constants=chosen | {"RESIDENT": config["RESIDENT"], "BLOCK_C": config["BLOCK_C"]},
                options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
                quick=kind == "bf16" and classes in (1000, 32000) and not changed,
            )
        )
    found.append(
        AotCase(
            name="bf16 tiles of 4096",
            kernel=scale_rows_kernel,
            signature={"x_ptr": "*bf16", "factor_ptr": "*fp32", "x_stride": "i32", "classes": "i32"},
            constants={"PER_ROW": False, "BLOCK_C": 4096},
            options={"num_warps": 4, "num_stages": 1},
        )
    )
    return found
