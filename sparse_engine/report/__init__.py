"""Facts as tables, JSON, plots and one HTML page: the machine, sparsity by layer, where the time goes."""

from __future__ import annotations

from sparse_engine.report.environment import Environment, Verdict, environment, machine_line
from sparse_engine.report.sparsity import LayerSparsity, SparsityReport, sparsity_of_file, sparsity_of_state

__all__ = [
    "Environment",
    "LayerSparsity",
    "SparsityReport",
    "Verdict",
    "environment",
    "machine_line",
    "sparsity_of_file",
    "sparsity_of_state",
]
