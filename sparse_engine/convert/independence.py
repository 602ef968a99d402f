"""Whether the samples of a batch stay apart, so that a batch may be computed a few samples at a time."""

from __future__ import annotations

from sparse_engine.convert.graph import Dim, Graph, Node, Value
from sparse_engine.convert.passes.constancy import dimension_groups


def samples_are_independent(graph: Graph) -> bool:
    """True when every output sample depends on its own input sample only.

    Every value that depends on the input must have one dimension that the samples lie along, and no op may combine
    entries along it. Fallback nodes are taken to combine them.

    Example::

        samples_are_independent(capture(resnet, (x,)).graph)       # True
        samples_are_independent(capture(CentreBatch(), (x,)).graph)      # x - x.mean(0): False

    Args:
        graph: a validated graph.
    """
    axes: dict[str, int] = {}
    for name in graph.inputs:
        axis = _batch_axis(graph.values[name])
        if axis is not None:
            axes[name] = axis
    if any(graph.values[name].shape[axis] != Dim(1) or axis for name, axis in axes.items()):
        return False
    for node in graph.nodes:
        if not any(name in axes for name in node.inputs) and not any(
            _varies(graph.values[name]) for name in node.outputs
        ):
            continue
        found = _batch_axis(graph.values[node.outputs[0]])
        if found is None or _follow(graph, node, axes) != found:
            return False
        axes[node.outputs[0]] = found
    return all(axes.get(name) == 0 and graph.values[name].shape[0] == Dim(1) for name in graph.outputs)


def _varies(value: Value) -> bool:
    return any(isinstance(size, Dim) for size in value.shape)


def _batch_axis(value: Value) -> int | None:
    """The only dimension that depends on the batch size, when it is a multiple of it."""
    dims = [axis for axis, size in enumerate(value.shape) if isinstance(size, Dim)]
    if len(dims) != 1:
        return None
    size = value.shape[dims[0]]
    return dims[0] if isinstance(size, Dim) and size.plus == 0 else None


def _follow(graph: Graph, node: Node, axes: dict[str, int]) -> int | None:
    """The axis that samples lie along in the output when the node keeps them apart, else None."""
    attrs = node.attrs
    rank = len(graph.values[node.outputs[0]].shape)
    read = [axes.get(name) for name in node.inputs]
    ranks = [len(graph.values[name].shape) for name in node.inputs]
    if node.op == "expand" and read[0] is None:
        return _batch_axis(graph.values[node.output])  # the same for every sample
    along = {axis for axis in read if axis is not None}
    # Tensors that are combined must have their samples along the same axis, counted from the front of the result.
    if len(along) != 1 or any(
        axis is not None and own < rank for axis, own in zip(read, ranks, strict=True) if node.op in _BROADCAST
    ):
        return None
    (axis,) = along
    if node.op == "reshape":
        return _reshaped(graph, node, axis)
    if node.op == "permute":
        return attrs["dims"].index(axis)
    if node.op == "reduce":
        if axis in attrs["dims"]:
            return None
        return axis if attrs["keepdim"] else axis - sum(dim < axis for dim in attrs["dims"])
    return axis if _keeps_apart(node, axis, rank, read) else None


_BROADCAST = ("binary", "matmul", "attention", "expand")


def _keeps_apart(node: Node, axis: int, rank: int, read: list[int | None]) -> bool:
    attrs = node.attrs
    if node.op in ("unary", "scalar", "binary", "expand"):
        return True
    if node.op == "conv2d" or node.op in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "group_norm"):
        return axis == 0
    if node.op == "linear":
        return axis < rank - 1
    if node.op == "matmul":
        # A matrix per sample, or rows of samples times one matrix.
        return axis < rank - 2 or (axis == rank - 2 and read[1] is None)
    if node.op == "attention":
        return axis < rank - 2
    if node.op == "affine":
        return attrs["axis"] != axis
    if node.op in ("softmax", "concat", "slice"):
        return attrs["dim"] != axis
    if node.op == "layer_norm":
        return axis < rank - attrs["dims"]
    if node.op == "pad":
        pair = 2 * (rank - 1 - axis)
        return not any(attrs["pad"][pair : pair + 2])
    return False


def _reshaped(graph: Graph, node: Node, axis: int) -> int | None:
    """Samples stay apart when theirs is the outermost of the dimensions that are merged or split with it."""
    old, new = graph.values[node.inputs[0]].shape, graph.values[node.output].shape
    for before, after in dimension_groups(old, new) or []:
        if axis in before:
            first = next((dim for dim in after if new[dim] != 1), None)
            if all(old[dim] == 1 for dim in before if dim < axis) and first is not None and isinstance(new[first], Dim):
                return first
    return None
