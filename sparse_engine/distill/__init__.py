"""Distillation: teacher, class-wise, progressive and last-batch, through one loss function with one definition of its
scale.

Example::

    loss = se.distill.kd_loss(student(x), y, teacher_logits=teacher(x), alpha=0.9, temperature=4.0)
    se.prune(model, sparsity=0.95, criterion="epsd", data=batches, loss=se.distill.ClassWiseSelfDistillation())
"""

from __future__ import annotations

from . import functional
from .batch import Batch, as_batch, as_batches
from .functional import LossParts, dlb_loss, kd_loss, kd_loss_into_table, linear_kd_loss
from .modules import KDLoss
from .objectives import (
    ClassWiseSelfDistillation,
    CrossEntropy,
    LastBatchSelfDistillation,
    Objective,
    ProgressiveSelfDistillation,
    Smoothed,
    Supervised,
    TeacherDistillation,
    as_objective,
)
from .samplers import PairSampler

__all__ = [
    "Batch",
    "ClassWiseSelfDistillation",
    "CrossEntropy",
    "KDLoss",
    "LastBatchSelfDistillation",
    "LossParts",
    "Objective",
    "PairSampler",
    "ProgressiveSelfDistillation",
    "Smoothed",
    "Supervised",
    "TeacherDistillation",
    "as_batch",
    "as_batches",
    "as_objective",
    "dlb_loss",
    "functional",
    "kd_loss",
    "kd_loss_into_table",
    "linear_kd_loss",
]
