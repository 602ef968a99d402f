"""From a pruned model to an executable: capture, passes, kernel choice, plan."""

from __future__ import annotations

from sparse_engine.convert.capture import Captured, capture
from sparse_engine.convert.graph import Dim, Graph, GraphError, Node, Value
from sparse_engine.convert.passes import optimise

__all__ = ["Captured", "Dim", "Graph", "GraphError", "Node", "Value", "capture", "optimise"]
