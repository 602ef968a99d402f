"""Pruning: criterion × structure × distribution × schedule, and the masks that hold the result.

Example::

    report = se.prune(model, sparsity=0.9, criterion="magnitude")
    hold = se.prune.hold_masks(model, optimizer)
"""

from __future__ import annotations

from typing import Any

from .api import prune
from .criteria import CRITERIA, Criterion, Epsd, Evidence, Grasp, Magnitude, Movement, ProsPr, Random, Snip, SynFlow
from .distribution import layer_counts
from .dynamic import DynamicMask, GivenScores, GradualPruning, GraNet, MovementTracker, drop_and_grow, drop_fraction
from .learned import GATES, LearnedMasks
from .masks import MaskHold, apply_masks_, hold_masks, masks, prunable_weights, set_masks, squash_
from .report import LayerReport, PruneReport, sparsity_report
from .schedule import Cubic, Iterative, OneShot, Periodic, Schedule
from .select import select, top_k_mask
from .zero_init import zero_init_, zero_matrix

__all__ = [
    "CRITERIA",
    "GATES",
    "Criterion",
    "Cubic",
    "DynamicMask",
    "Epsd",
    "Evidence",
    "GivenScores",
    "GraNet",
    "GradualPruning",
    "Grasp",
    "Iterative",
    "LayerReport",
    "LearnedMasks",
    "Magnitude",
    "MaskHold",
    "Movement",
    "MovementTracker",
    "OneShot",
    "Periodic",
    "ProsPr",
    "PruneReport",
    "Random",
    "Schedule",
    "Snip",
    "SynFlow",
    "apply_masks_",
    "compact",
    "drop_and_grow",
    "drop_fraction",
    "hold_masks",
    "layer_counts",
    "masks",
    "prunable_weights",
    "prune",
    "select",
    "set_masks",
    "sparsity_report",
    "squash_",
    "top_k_mask",
    "zero_init_",
    "zero_matrix",
]


def __getattr__(name: str) -> Any:
    """``compact`` comes from the structured half, which is loaded only when used."""
    if name == "compact":
        from .structured import compact

        return compact
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
