"""From a pruned model to an executable: capture, passes, kernel choice, plan.

Example::

    executable = se.convert(model, (x,))
    y = executable(x)
    print(executable.report)
"""

from __future__ import annotations

# First: it refuses a compiled module that does not belong to this code.
import sparse_engine.ops.native
from sparse_engine.convert.api import convert, relative_error
from sparse_engine.convert.capture import Captured, capture
from sparse_engine.convert.executable import Executable, load
from sparse_engine.convert.graph import Dim, Graph, GraphError, Node, Value
from sparse_engine.convert.inputs import prepare
from sparse_engine.convert.passes import optimise
from sparse_engine.convert.report import Benchmark, LayerReport, Report

__all__ = [
    "Benchmark",
    "Captured",
    "Dim",
    "Executable",
    "Graph",
    "GraphError",
    "LayerReport",
    "Node",
    "Report",
    "Value",
    "capture",
    "convert",
    "load",
    "optimise",
    "prepare",
    "relative_error",
]
