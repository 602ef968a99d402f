"""Tables that several commands print."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from sparse_engine.cli._common import table


def layer_table(report: Any) -> Table:
    """Layers of a conversion report: structure, sparsity, kernel, times, and the reason for the choice."""
    timed = any(layer.ms is not None for layer in report.layers)
    times = (">ms", ">dense ms") if timed else ()
    made = table("Layers", "layer", "op", ">output", "structure", ">sparsity", "kernel", *times, "why")
    for layer in report.layers:
        made.add_row(
            escape(layer.name),
            escape(layer.op),
            "×".join(map(str, layer.shape)),
            layer.structure or "",
            "" if layer.sparsity is None else f"{layer.sparsity:.1%}",
            escape(layer.kernel),
            *((milliseconds(layer.ms), milliseconds(layer.dense_ms)) if timed else ()),
            escape(layer.reason),
        )
    return made


def milliseconds(value: float | None) -> str:
    """Three significant digits or so; nothing for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
