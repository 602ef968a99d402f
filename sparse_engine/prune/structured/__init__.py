"""Structured pruning: dependency analysis, exact compaction, channel criteria and targets."""

from __future__ import annotations

from .compaction import compact
from .spec import CompactionSpec, compaction_spec, load_compact, remap_optimizer_, remap_state_dict, save_compact

__all__ = [
    "CompactionSpec",
    "compact",
    "compaction_spec",
    "load_compact",
    "remap_optimizer_",
    "remap_state_dict",
    "save_compact",
]
