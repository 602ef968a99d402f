"""Layers whose values do not fit the cache, computed strip by strip: a few rows of the last one at a time.

Between two layers of 64 channels of 224×224 lie 13 MB, which go to memory and come back. Where each value has one
reader, the layers of such a *chain* can take turns instead: some rows of the first, what they give of the second, and
so on, then the next rows. What lies between them is then small, always in the same place, and stays in the cache.

    conv1 ─ conv2 ─ pool      as      conv1 ─ conv2 ─ pool   rows 0 to 15
                                      conv1 ─ conv2 ─ pool   rows 16 to 31
                                      …

A window needs rows that the strip before has computed too; these are computed again, so a chain ends where that would
cost more than it saves. With the same kernels results have the same bits as without strips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparse_engine import _C
from sparse_engine.convert.constants import constant_nonzeros, constant_shape
from sparse_engine.convert.graph import Graph, Node

_WINDOWS = ("conv2d", "max_pool2d", "avg_pool2d")
# Of a value that leaves the cache and comes back: written, fetched before that, and read.
_FLOATS_PER_SECOND = 4e9
_FLOATS_PER_SECOND_OF_LARGE = 2e9  # of one that takes more than its share of the last cache
_PRODUCTS_PER_SECOND = 4e10  # on one core
_STRIP_SECONDS = 2e-6  # what a node costs beside its arithmetic
_SHARE = 0.6  # of the L2 for what two neighbouring layers read and write in a strip
_LONGEST = 6  # layers of a chain


@dataclass(frozen=True)
class Rows:
    """Of one node in a strip: the rows that it makes, those it reads, and the padding rows above and below them."""

    out: tuple[int, int]
    read: tuple[int, int]
    above: int
    below: int


@dataclass(frozen=True)
class Chain:
    """Nodes [first, last) of a graph that run strip by strip.

    Args:
        first, last: indices of nodes that follow each other.
        rows: of the last one's output in a strip.
    """

    first: int
    last: int
    rows: int


def window(node: Node, first: int, last: int, height: int) -> tuple[int, int, int, int]:
    """The input rows [low, high) behind output rows [first, last), and the padding rows above and below them."""
    stride, dilation = node.attrs["stride"][0], node.attrs.get("dilation", (1, 1))[0]
    kernel = node.attrs["kernel"][0]
    low = first * stride - node.attrs["padding"][0]
    high = (last - 1) * stride - node.attrs["padding"][0] + dilation * (kernel - 1) + 1
    return max(low, 0), min(high, height), max(-low, 0), max(high - height, 0)


def with_kernel(graph: Graph, node: Node) -> Node:
    """The node with its kernel's size among the attributes, which convolutions have in their weight's shape."""
    if node.op != "conv2d":
        return node
    return replace(node, attrs={**node.attrs, "kernel": constant_shape(graph, node.params["weight"])[2:]})


def padded(node: Node, rows: Rows) -> Node:
    """The node as it computes some rows: with the padding that these have above and below."""
    _, left, bottom, right = node.attrs["padding"]
    # The divisor of an average depends on how far the padding goes, not on how far windows reach.
    below = min(rows.below, bottom) if node.op == "avg_pool2d" else rows.below
    return replace(node, attrs={**node.attrs, "padding": (rows.above, left, below, right)})


def rows_in_chain(graph: Graph, nodes: Sequence[Node], heights: Mapping[str, int], first: int, last: int) -> list[Rows]:
    """What each of the nodes of a chain makes and reads for rows [first, last) of the last one's output."""
    found = []
    for node in reversed(nodes):
        low, high, above, below = window(with_kernel(graph, node), first, last, heights[node.inputs[0]])
        found.append(Rows((first, last), (low, high), above, below))
        first, last = low, high
    return found[::-1]


def find_chains(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> dict[int, Chain]:
    """The chains of a graph, for one image on one thread, by their first node's index.

    Example::

        find_chains(graph, shapes)[0].last      # VGG-16: 3, the first two convolutions and a pooling

    Args:
        graph: optimised, computing in float32.
        shapes: of every value, for one image.
    """
    readers: dict[str, int] = dict.fromkeys(graph.outputs, 1)
    for node in graph.nodes:
        for name in node.inputs:
            readers[name] = readers.get(name, 0) + 1
    count = len(graph.nodes)
    # The best way to cut nodes [i, count) into chains and single nodes, from the last one backwards.
    gains = [0.0] * (count + 1)
    best: list[Chain | None] = [None] * count
    kept = {node.name: constant_nonzeros(graph, node.params["weight"]) for node in graph.nodes if node.op == "conv2d"}
    for first in reversed(range(count)):
        gains[first] = gains[first + 1]
        for last in range(first + 1, min(count, first + _LONGEST) + 1):
            if not _joins(graph, graph.nodes[last - 1], shapes, first == last - 1):
                break
            if last - first > 1:
                rows, gain = _best_rows(graph, first, last, shapes, kept)
                if gain > 0 and gain + gains[last] > gains[first]:
                    gains[first], best[first] = gain + gains[last], Chain(first, last, rows)
            following = graph.nodes[last] if last < count else None
            made = graph.nodes[last - 1].output
            if following is None or readers[made] != 1 or following.inputs[:1] != [made]:
                break
            if len(graph.nodes[last - 1].inputs) > 1:
                break  # a sum ends a chain
    chains, index = {}, 0
    while index < count:
        chain = best[index]
        if chain is not None:
            chains[index] = chain
        index = chain.last if chain is not None else index + 1
    return chains


def _joins(graph: Graph, node: Node, shapes: Mapping[str, tuple[int, ...]], first: bool) -> bool:
    if node.op not in _WINDOWS or len(node.outputs) != 1:
        return False
    sizes = shapes[node.output]
    # A strip of a single pixel would get the kernel for vectors, which knows no planes.
    if (
        len(sizes) != 4
        or sizes[0] != 1
        or sizes[3] < 2
        or math.prod(sizes) == 0
        or graph.values[node.output].dtype != "float32"
    ):
        return False
    if first and (len(shapes[node.inputs[0]]) != 4 or graph.values[node.inputs[0]].dtype != "float32"):
        return False
    return all(shapes[name] == sizes and name not in graph.inputs for name in node.inputs[1:])


def _best_rows(
    graph: Graph, first: int, last: int, shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, int]
) -> tuple[int, float]:
    """Rows of a strip, and the seconds that strips of so many rows save; 0 or less where they do not pay.

    kept: non-zeros of each convolution, by its name.
    """
    nodes = graph.nodes[first:last]
    floats = {name: math.prod(shapes[name]) for node in nodes for name in (node.inputs[0], node.output)}
    heights = {name: shapes[name][2] for name in floats}
    cache = _C.cpu_info()["l2"] // 4  # floats: what is smaller stays there, or near, by itself
    between = [floats[node.output] for node in nodes[:-1] if floats[node.output] > cache]
    share = _C.cpu_info()["l3"] // 32
    saved = sum(count / (_FLOATS_PER_SECOND if count <= share else _FLOATS_PER_SECOND_OF_LARGE) for count in between)
    if not saved:
        return 0, 0.0
    products = [_products(node, shapes, kept) for node in nodes]
    weights = sum(kept.get(node.name, 0) for node in nodes)
    height, width = shapes[nodes[-1].output][2:]
    found: list[tuple[float, int]] = []
    for strips in range(2, height + 1):
        rows = -(-height // strips)
        if -(-height // rows) != strips:
            continue
        middle = rows_in_chain(graph, nodes, heights, (height - rows) // 2, (height - rows) // 2 + rows)
        fits = all(
            _per_row(floats, heights, node.inputs[0]) * (of.read[1] - of.read[0])
            + _per_row(floats, heights, node.output) * (of.out[1] - of.out[0])
            <= _SHARE * cache
            for node, of in zip(nodes, middle, strict=True)
        )
        if not fits:
            continue
        again = sum(
            work * (strips * (of.out[1] - of.out[0]) / heights[node.output] - 1)
            for node, of, work in zip(nodes, middle, products, strict=True)
        )
        cost = max(0.0, again) / _PRODUCTS_PER_SECOND + strips * (
            len(nodes) * _STRIP_SECONDS + 1.5 * weights / _FLOATS_PER_SECOND
        )
        # A strip that ends inside a vector of pixels is begun again by the next one.
        if rows * width % 16:
            cost += 0.02 * sum(products) / _PRODUCTS_PER_SECOND
        if saved > cost:
            found.append((saved - cost, rows))
    for gain, rows in sorted(found, reverse=True):
        if reads_something(graph, nodes, heights, rows, 0, height):
            return rows, gain
    return 0, 0.0


def reads_something(
    graph: Graph, nodes: Sequence[Node], heights: Mapping[str, int], rows: int, begin: int, end: int
) -> bool:
    """Whether every strip of the rows [begin, end) has rows to read: windows can lie in the padding altogether."""
    strips = (rows_in_chain(graph, nodes, heights, r, min(end, r + rows)) for r in range(begin, end, rows))
    return all(of.read[0] < of.read[1] for strip in strips for of in strip)


def _per_row(floats: Mapping[str, int], heights: Mapping[str, int], name: str) -> float:
    return floats[name] / heights[name]


def _products(node: Node, shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, int]) -> float:
    if node.op == "conv2d":
        return float(kept[node.name] * math.prod(shapes[node.output][2:]))
    return float(math.prod(shapes[node.output]))


__all__ = ["Chain", "Rows", "find_chains", "padded", "reads_something", "rows_in_chain", "window", "with_kernel"]
