"""Rewrites of a graph that keep what it computes.

Each pass is one function ``pass(graph) -> int``: it changes the graph in place and returns how many rewrites it made.
`optimise` runs them in order on a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from sparse_engine.convert.graph import Graph
from sparse_engine.convert.passes.dead_channels import remove_dead_channels
from sparse_engine.convert.passes.fold_affine import fold_affine
from sparse_engine.convert.passes.fuse import fuse
from sparse_engine.convert.passes.order_channels import order_channels
from sparse_engine.convert.passes.recognise import recognise
from sparse_engine.convert.passes.simplify import fold_constants, share_repeated, simplify

__all__ = [
    "fold_affine",
    "fold_constants",
    "fuse",
    "optimise",
    "order_channels",
    "recognise",
    "remove_dead_channels",
    "share_repeated",
    "simplify",
]

# In this order; those of one group are repeated until none of them finds anything.
_GROUPS: tuple[dict[str, Callable[[Graph], int]], ...] = (
    {
        "neutral nodes": simplify,
        "constants": fold_constants,
        "repeated nodes": share_repeated,
        "functions recognised": recognise,
        "scales and shifts folded": fold_affine,
        "dead channels": remove_dead_channels,
    },
    {"residuals and activations fused": fuse, "neutral nodes": simplify, "repeated nodes": share_repeated},
    {"channels ordered": order_channels},
)


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
    for group in _GROUPS:
        changed = True
        while changed:
            changed = False
            for name, rewrite in group.items():
                count = rewrite(result)
                changed = changed or count > 0
                if counts is not None:
                    counts[name] += count
    result.prune()
    result.validate()
    return result
