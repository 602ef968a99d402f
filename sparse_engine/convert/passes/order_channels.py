"""Put channels in an order in which the kept rows of every operator lie together.

Where a residual sum keeps a channel alive that one of its branches has pruned, that branch's operator has a row of
zeros which cannot be cut out. The panel kernels read the kept inputs of 4 or 8 rows through one list, so zero
*columns* cost nothing; a zero *row* costs nothing only if its whole panel is zero. The order of channels is free as
long as everything that shares them follows it, so:

    kept rows of a, b before     a 1010 0111   b 0011 0101        after     a 1111 1000   b 0011 1000

One order serves all operators of a sum. Channels are sorted by the pattern of operators that keep them, heaviest
operator first and in Gray code, so that neighbouring patterns differ in few operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_engine.convert.graph import Dim, Graph, Node
from sparse_engine.convert.passes.dead_channels import (
    _assign_axis,
    _axis_before,
    _flattening,
    _Flow,
    _is_dense,
    _is_depthwise,
    _missing_of,
)
from sparse_engine.convert.passes.editing import Editor


def order_channels(graph: Graph) -> int:
    """Permute tied channels; returns how many sets of channels got a new order (0 the second time)."""
    flow = _Flow(graph)
    for node in graph.nodes:
        _assign_axis(flow, node)
    ties = _Ties(flow)
    for node in graph.nodes:
        ties.add(node)
    for name in graph.outputs:
        ties.freeze(name)
    writers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op in ("conv2d", "linear") and _is_dense(node) and node.output in flow.axis:
            writers.setdefault(ties.root(node.output), []).append(node)
    orders = {}
    for root, nodes in writers.items():
        if root not in ties.frozen:
            order = _order([_kept_rows(graph, node) for node in sorted(nodes, key=lambda n: -_work(graph, n))])
            if order is not None:
                orders[root] = order
    if orders:
        editor = Editor(graph)
        for node in graph.nodes:
            _permute(editor, node, flow, {name: orders.get(ties.root(name)) for name in (*node.inputs, *node.outputs)})
    return len(orders)


def _order(kept: Sequence[Tensor]) -> Tensor | None:
    """The new order of channels for the rows that each operator keeps, the heaviest first; None to leave it."""
    patterns = [rows for rows in kept if bool(rows.any()) and not bool(rows.all())]
    if not patterns:
        return None
    bits, last = [], torch.zeros_like(patterns[0])
    for rows in patterns:
        last = last ^ rows  # the rank of a Gray code, bit by bit
        bits.append(last)
    order = torch.arange(len(patterns[0]))
    for bit in reversed(bits):  # the last key first: every sort is stable
        order = order[torch.argsort(bit[order].int(), descending=True, stable=True)]
    return None if torch.equal(order, torch.arange(len(order))) else order


def _kept_rows(graph: Graph, node: Node) -> Tensor:
    """The rows of a linear operator that are not zero, [rows]."""
    weight = graph.constants[node.params["weight"]]
    return (weight.reshape(weight.shape[0], -1) != 0).any(1)


def _work(graph: Graph, node: Node) -> int:
    """About how many multiplications per sample an operator makes."""
    places = [size for size in graph.values[node.output].shape[1:] if not isinstance(size, Dim)]
    weight = graph.constants[node.params["weight"]]
    return math.prod(places) * weight[0].numel()


class _Ties:
    """Values whose channels have to be in the same order, and those whose order is fixed."""

    def __init__(self, flow: _Flow) -> None:
        self.flow = flow
        self.parent: dict[str, str] = {}
        self.frozen: set[str] = set()

    def root(self, name: str) -> str:
        while name in self.parent:
            name = self.parent[name]
        return name

    def freeze(self, name: str) -> None:
        self.frozen.add(self.root(name))

    def tie(self, first: str, second: str) -> None:
        a, b = self.root(first), self.root(second)
        if a != b:
            self.parent[b] = a
            if b in self.frozen:
                self.frozen.add(a)

    def add(self, node: Node) -> None:
        """Tie or freeze what a node reads and writes."""
        flow, out = self.flow, node.outputs[0]
        followed = out in flow.axis
        if node.op in ("conv2d", "linear"):
            self._add_operator(node)
        elif not followed or node.op == "concat" or (node.op == "reshape" and _flattening(flow, node) != 1):
            for name in (*node.inputs, *node.outputs):
                self.freeze(name)
        else:
            for name in node.inputs:
                same = name in flow.axis and (
                    flow.graph.values[name].shape[flow.axis[name]] == flow.graph.values[out].shape[flow.axis[out]]
                )
                if same and flow.axis[name] + _missing_of(flow.graph, node, name) == _axis_before(flow, node):
                    self.tie(out, name)
                else:
                    self.freeze(name)
                    if not self._broadcast(node, name):
                        self.freeze(out)

    def _add_operator(self, node: Node) -> None:
        flow, out, x = self.flow, node.output, node.inputs[0]
        axis = 1 if node.op == "conv2d" else len(flow.graph.values[x].shape) - 1
        depthwise = _is_depthwise(flow.graph, node)
        if flow.axis.get(x) != axis or not (_is_dense(node) or depthwise):
            self.freeze(x)
            if depthwise:
                self.freeze(out)
        elif depthwise:
            self.tie(out, x)
        for residual in node.inputs[1:]:
            if out in flow.axis and flow.axis.get(residual) == flow.axis[out]:
                self.tie(out, residual)
            else:
                self.freeze(residual)
                self.freeze(out)

    def _broadcast(self, node: Node, name: str) -> bool:
        """Whether an operand is the same for all channels of the output."""
        flow = self.flow
        own = flow.axis[node.output] - _missing_of(flow.graph, node, name)
        return own < 0 or flow.graph.values[name].shape[own] == 1


def _permute(editor: Editor, node: Node, flow: _Flow, orders: dict[str, Tensor | None]) -> None:
    """Bring one node's constants into the order of its input's and its output's channels."""
    out = orders[node.outputs[0]] if node.outputs[0] in flow.axis else None
    constants = editor.graph.constants
    if node.op in ("conv2d", "linear"):
        x = orders[node.inputs[0]] if node.inputs[0] in flow.axis else None
        weight = constants[node.params["weight"]]
        changed = weight if out is None else weight[out]
        if x is not None and not _is_depthwise(editor.graph, node):
            changed = changed[:, x]
        if changed is not weight:
            editor.set_param(node, "weight", changed)
        if out is not None and "bias" in node.params:
            editor.set_param(node, "bias", constants[node.params["bias"]][out])
    elif node.op == "affine" and out is not None:
        for role in ("scale", "shift"):
            editor.set_param(node, role, constants[node.params[role]][out])
