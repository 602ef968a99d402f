"""Data pruning: scores of training samples, the choice of a part of them, and a sampler that prunes as it goes.

Example::

    scores = se.coreset.el2n(logits, labels)
    kept = se.coreset.select(scores, 0.3, keep="hard", labels=labels)
"""

from __future__ import annotations

from .sampler import InfoBatchOrder
from .scores import (
    ForgettingTracker,
    el2n,
    grand,
    grand_last_layer,
    herding,
    k_centre,
    load_scores,
    margin,
    penultimate,
    save_scores,
)
from .selection import default_alpha, select

__all__ = [
    "ForgettingTracker",
    "InfoBatchOrder",
    "default_alpha",
    "el2n",
    "grand",
    "grand_last_layer",
    "herding",
    "k_centre",
    "load_scores",
    "margin",
    "penultimate",
    "save_scores",
    "select",
]
