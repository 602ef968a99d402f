"""How much arithmetic a node is, counted densely: the measure of what share of a model runs natively."""

from __future__ import annotations

import math

from sparse_engine.convert.graph import Graph, Node, shape_at

_MOVEMENT = frozenset({"reshape", "permute", "expand", "slice", "concat", "pad", "constant"})
_CONVOLUTIONS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
)
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")


def node_flops(graph: Graph, node: Node, batch: int) -> int:
    """Floating-point operations of one node as if it were dense.

    A multiply-add counts as two, an elementwise op as one per element.

    Args:
        graph: the graph that the node is from.
        node: one of its nodes.
        batch: the batch size.
    """
    outputs = sum(math.prod(shape_at(graph.values[name].shape, batch)) for name in node.outputs)
    if node.op in _MOVEMENT:
        return 0
    if node.op in ("conv2d", "linear"):
        weight = graph.constants[node.params["weight"]]
        return 2 * outputs * (weight.numel() // max(weight.shape[0], 1))
    shapes = [shape_at(graph.values[name].shape, batch) for name in node.inputs]
    if node.op == "matmul":
        return 2 * outputs * shapes[0][-1]
    if node.op == "attention":
        keys = shapes[1][-2]
        return 2 * outputs * keys + 2 * math.prod(shapes[0]) * keys
    if node.op in ("max_pool2d", "avg_pool2d"):
        return outputs * math.prod(node.attrs["kernel"])
    if node.op in ("adaptive_avg_pool2d", "reduce"):
        return math.prod(shapes[0])
    if node.op == "fallback":
        name = node.attrs["target"].split(".")[1]
        if name in _CONVOLUTIONS and len(shapes) > 1:
            return 2 * outputs * (math.prod(shapes[1]) // max(shapes[1][0], 1))
        if name in _PRODUCTS and shapes and shapes[0]:
            return 2 * outputs * shapes[0][-1]
    return outputs


def moves_only(node: Node) -> bool:
    """True for ops that compute nothing."""
    return node.op in _MOVEMENT
