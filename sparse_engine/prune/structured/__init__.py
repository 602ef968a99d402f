"""Structured pruning: dependency analysis, exact compaction, channel criteria and targets."""

from __future__ import annotations

from .analysis import Analysis, analyse
from .capture import Program, capture
from .channels import ChannelReport, prune_channels, select_units
from .compaction import compact
from .criteria import channel_scores
from .spec import CompactionSpec, compaction_spec, load_compact, remap_optimizer_, remap_state_dict, save_compact
from .targets import Flops, Latency, Parameters, preferred_multiple
from .units import Group, find_groups, removal, zero_units_

__all__ = [
    "Analysis",
    "ChannelReport",
    "CompactionSpec",
    "Flops",
    "Group",
    "Latency",
    "Parameters",
    "Program",
    "analyse",
    "capture",
    "channel_scores",
    "compact",
    "compaction_spec",
    "find_groups",
    "load_compact",
    "preferred_multiple",
    "prune_channels",
    "remap_optimizer_",
    "remap_state_dict",
    "removal",
    "save_compact",
    "select_units",
    "zero_units_",
]
