"""Remove channels that carry nothing, exactly.

Two steps, repeated until nothing changes:

1. A channel that always holds one number (an all-zero weight row is its bias; see ``constancy.py``) is added to the
   bias of the operators that read it, and their weights for it become zero. Where zero padding comes between, the
   border would see 0 instead of the number, so the channel stays unless it is 0.
2. A channel that no operator reads is cut out of everything that it passes through: rows, columns, batch norm,
   depthwise filters, residual sums, concatenations. Channels that leave the region in which this can be followed
   (reshapes other than flattening, norms over channels, matmul, outputs, fallbacks) stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_engine.convert.graph import Dim, Graph, Node, Value, size_to_json
from sparse_engine.convert.passes.constancy import Fact, column_index, find_facts
from sparse_engine.convert.passes.editing import Editor, double
from sparse_engine.convert.schema import infer


def remove_dead_channels(graph: Graph) -> int:
    """Push constants forward and cut out unread channels to a fixed point; returns how many channels were removed."""
    removed = 0
    while True:
        pushed = _push_constants(graph)
        cut = _cut(graph)
        removed += cut
        if not pushed and not cut:
            return removed


# ---- step 1


def _push_constants(graph: Graph) -> int:
    facts = find_facts(graph)
    editor = Editor(graph)
    return sum(_push_into(editor, node, facts) for node in graph.nodes if node.op in ("conv2d", "linear"))


def _push_into(editor: Editor, node: Node, facts: dict[str, Fact]) -> bool:
    """Move the contribution of constant input channels into the bias."""
    fact = facts.get(node.inputs[0])
    rank = len(editor.graph.values[node.inputs[0]].shape)
    found = None if fact is None else _along(fact, 1 if node.op == "conv2d" else rank - 1)
    if found is None:
        return False
    known, number = found
    if node.op == "conv2d" and any(node.attrs["padding"]):
        known = known & (number == 0)
    weight = editor.graph.constants[node.params["weight"]]
    channels = _channels(editor.graph, node)
    known, number = known.expand(channels), number.expand(channels)
    if not bool(known.any()):
        return False
    if _is_dense(node):
        found = _push_dense(weight, known, number)
    else:
        found = _push_grouped(weight, known, number, node.attrs["groups"])
    if found is None:
        return False
    changed, moved = found
    bias = double(editor.graph.constants[node.params["bias"]]) if "bias" in node.params else 0.0
    if bool(moved.any()):
        editor.set_param(node, "bias", bias + moved)
    editor.set_param(node, "weight", changed)
    return True


def _push_dense(weight: Tensor, known: Tensor, number: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weight without its known columns, and what they contribute to the bias; None where they are zero already."""
    columns = known.nonzero().flatten()
    taken = weight[:, columns].reshape(weight.shape[0], len(columns), -1)  # [M, known, taps]
    if not bool(taken.any()):
        return None
    changed = weight.clone()
    changed[:, columns] = 0
    return changed, double(taken).sum(2) @ number[columns]


def _push_grouped(weight: Tensor, known: Tensor, number: Tensor, groups: int) -> tuple[Tensor, Tensor] | None:
    """The same where each row reads the channels of its group."""
    columns = column_index(weight, groups)  # [M, C/g]
    taps = weight.reshape(*weight.shape[:2], -1)
    dead = known[columns] & (taps != 0).any(2)
    if not bool(dead.any()):
        return None
    moved = (double(taps).sum(2) * number[columns] * dead).sum(1)
    mask = dead.view(*dead.shape, *[1] * (weight.dim() - 2))
    return torch.where(mask, torch.zeros((), dtype=weight.dtype), weight), moved


def _along(fact: Fact, axis: int) -> tuple[Tensor, Tensor] | None:
    vector = fact.channels(axis)
    return None if vector is None else (vector.known, vector.number)


def _channels(graph: Graph, node: Node) -> int:
    shape = graph.values[node.inputs[0]].shape
    size = shape[1] if node.op == "conv2d" else shape[-1]
    assert isinstance(size, int)  # the schema has compared it with the weight
    return size


# ---- step 2


@dataclass
class _Flow:
    """For each value that has a channel axis: the axis, and which channels are needed."""

    graph: Graph
    axis: dict[str, int] = field(default_factory=dict)
    needed: dict[str, Tensor] = field(default_factory=dict)
    changed: bool = False
    reads: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def read_by(self, node: Node, rows: Tensor) -> Tensor:
        """The input channels that some rows of a linear operator have weights for."""
        if node.name not in self.reads:
            weight = self.graph.constants[node.params["weight"]]
            taps = weight.reshape(*weight.shape[:2], -1)
            nonzero = taps[:, :, 0] != 0 if taps.shape[2] == 1 else taps.any(2)  # [M, C]
            everything = torch.ones(weight.shape[0], dtype=torch.bool)
            self.reads[node.name] = nonzero, everything, nonzero.any(0)
        nonzero, last_rows, channels = self.reads[node.name]
        if not torch.equal(rows, last_rows):
            channels = nonzero[rows].any(0)
            self.reads[node.name] = nonzero, rows, channels
        return channels

    def follow(self, name: str, axis: int) -> None:
        size = self.graph.values[name].shape[axis]
        if isinstance(size, int) and size > 0:
            self.axis[name] = axis
            self.needed[name] = torch.zeros(size, dtype=torch.bool)

    def need(self, name: str, channels: Tensor | bool) -> None:
        if name in self.needed:
            merged = self.needed[name] | channels
            self.changed = self.changed or not torch.equal(merged, self.needed[name])
            self.needed[name] = merged


def _cut(graph: Graph) -> int:
    flow = _Flow(graph)
    for node in graph.nodes:
        _assign_axis(flow, node)
    for name in graph.outputs:
        flow.need(name, True)
    _spread(flow)
    for name in [name for name, needed in flow.needed.items() if not bool(needed.any())]:
        flow.need(name, torch.arange(flow.needed[name].numel()) == 0)  # tensors keep at least one channel
    _spread(flow)
    if all(bool(needed.all()) for needed in flow.needed.values()):
        return 0
    removed = sum(
        int((~flow.needed[node.output]).sum())
        for node in graph.nodes
        if node.op in ("conv2d", "linear") and node.output in flow.needed
    )
    _shrink(flow)
    return removed


def _spread(flow: _Flow) -> None:
    flow.changed = True
    while flow.changed:
        flow.changed = False
        for node in reversed(flow.graph.nodes):
            _require(flow, node)
        for node in flow.graph.nodes:
            _require(flow, node)


def _is_depthwise(graph: Graph, node: Node) -> bool:
    weight = graph.constants[node.params["weight"]]
    return node.op == "conv2d" and node.attrs["groups"] == weight.shape[0] > 1 and weight.shape[1] == 1


def _is_dense(node: Node) -> bool:
    return node.op == "linear" or node.attrs["groups"] == 1


_SAME = ("affine", "unary", "scalar", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")


def _assign_axis(flow: _Flow, node: Node) -> None:
    """Give the output a channel axis where its channels can be followed from here."""
    graph, out = flow.graph, node.outputs[0]
    if node.op in ("conv2d", "linear"):
        if _is_dense(node) or _is_depthwise(graph, node):
            flow.follow(out, 1 if node.op == "conv2d" else len(graph.values[out].shape) - 1)
        return
    axis = flow.axis.get(node.inputs[0]) if node.inputs else None
    if node.op == "binary":
        axes = {flow.axis[name] + _missing(graph, out, name) for name in node.inputs if name in flow.axis}
        axis = axes.pop() if len(axes) == 1 else None
        if axis is None or any(not _sliceable(flow, node, name, axis) for name in node.inputs):
            return
    elif node.op == "permute" and axis is not None:
        axis = node.attrs["dims"].index(axis)
    elif node.op == "reduce" and axis is not None:
        if axis in node.attrs["dims"]:
            return
        axis -= 0 if node.attrs["keepdim"] else sum(dim < axis for dim in node.attrs["dims"])
    elif node.op == "concat":
        if axis != node.attrs["dim"] or any(flow.axis.get(name) != axis for name in node.inputs):
            return
    elif node.op == "reshape":
        axis = axis if axis is not None and _flattening(flow, node) is not None else None
    elif node.op not in _SAME or (node.op == "affine" and node.attrs["axis"] != axis):
        return
    if axis is not None:
        flow.follow(out, axis)


def _missing(graph: Graph, out: str, name: str) -> int:
    return len(graph.values[out].shape) - len(graph.values[name].shape)


def _sliceable(flow: _Flow, node: Node, name: str, axis: int) -> bool:
    """True for an operand whose channels lie along the axis, whose only channel is broadcast, or that is constant."""
    graph = flow.graph
    own = axis - _missing(graph, node.output, name)
    if own < 0 or graph.values[name].shape[own] == 1:
        return graph.values[node.output].shape[axis] != 1
    return flow.axis.get(name) == own or _constant_of(graph, name) is not None


def _constant_of(graph: Graph, name: str) -> Node | None:
    return next((node for node in graph.nodes if node.op == "constant" and node.output == name), None)


def _flattening(flow: _Flow, node: Node) -> int | None:
    """How many elements each channel becomes where a reshape merges the channels with what follows them, else None."""
    old, new = flow.graph.values[node.inputs[0]].shape, flow.graph.values[node.output].shape
    axis = flow.axis[node.inputs[0]]
    inner = old[axis + 1 :]
    if len(new) == axis + 1 and new[:axis] == old[:axis] and not any(isinstance(size, Dim) for size in inner):
        repeat = math.prod(size for size in inner if isinstance(size, int))
        return repeat if repeat else None
    # Dimensions of size one that come or go behind the channels change nothing.
    if len(new) > axis and new[: axis + 1] == old[: axis + 1]:
        return 1
    return None


def _require(flow: _Flow, node: Node) -> None:
    """Let need flow through one node, in both directions: tensors that are combined must have the same channels."""
    graph = flow.graph
    out = node.outputs[0]
    if node.op in ("conv2d", "linear"):
        _require_operator(flow, node)
        return
    if out not in flow.needed:
        for name in node.inputs:
            flow.need(name, True)
        return
    if node.op == "concat":
        start = 0
        for name in node.inputs:
            stop = start + flow.needed[name].numel()
            flow.need(name, flow.needed[out][start:stop])
            merged = torch.zeros_like(flow.needed[out])
            merged[start:stop] = flow.needed[name]
            flow.need(out, merged)
            start = stop
        return
    if node.op == "reshape":
        repeat = _flattening(flow, node)
        assert repeat is not None
        flow.need(node.inputs[0], flow.needed[out].view(-1, repeat).any(1))
        flow.need(out, flow.needed[node.inputs[0]].repeat_interleave(repeat))
        return
    for name in node.inputs:
        own = flow.axis.get(name)
        if own is None:
            continue
        if flow.needed[name].numel() == flow.needed[out].numel() and own + _missing_of(
            graph, node, name
        ) == _axis_before(flow, node):
            flow.need(name, flow.needed[out])
            flow.need(out, flow.needed[name])
        else:
            flow.need(name, True)


def _missing_of(graph: Graph, node: Node, name: str) -> int:
    return _missing(graph, node.output, name) if node.op == "binary" else 0


def _axis_before(flow: _Flow, node: Node) -> int:
    """The axis that an input's channels must have to become the output's."""
    if node.op in ("permute", "reduce"):
        return flow.axis[node.inputs[0]]
    return flow.axis[node.output]


def _require_operator(flow: _Flow, node: Node) -> None:
    graph, out, x = flow.graph, node.output, node.inputs[0]
    axis = 1 if node.op == "conv2d" else len(graph.values[x].shape) - 1
    if flow.axis.get(x) != axis or out not in flow.needed:
        flow.need(x, True)
    elif _is_depthwise(graph, node):
        flow.need(x, flow.needed[out])
        flow.need(out, flow.needed[x])
    else:
        flow.need(x, flow.read_by(node, flow.needed[out]))
    if _is_depthwise(graph, node) and flow.axis.get(x) != axis:
        flow.need(out, True)  # its input can't be cut, so neither can it
    for residual in node.inputs[1:]:
        if flow.axis.get(residual) == flow.axis.get(out) and residual in flow.needed:
            flow.need(residual, flow.needed[out])
            flow.need(out, flow.needed[residual])
        else:
            flow.need(residual, True)
            flow.need(out, True)


def _shrink(flow: _Flow) -> None:
    """Cut the channels that are not needed out of constants, attributes and shapes."""
    graph = flow.graph
    editor = Editor(graph)
    keep = {name: needed.nonzero().flatten() for name, needed in flow.needed.items() if not bool(needed.all())}
    inserted: list[tuple[Node, Node]] = []
    for node in graph.nodes:
        out = node.outputs[0]
        kept_out = keep.get(out)
        if node.op in ("conv2d", "linear"):
            _shrink_operator(editor, node, keep.get(node.inputs[0]), kept_out)
        elif node.op == "affine" and kept_out is not None:
            for role in ("scale", "shift"):
                editor.set_param(node, role, graph.constants[node.params[role]][kept_out])
        elif node.op == "binary" and kept_out is not None:
            for index, name in enumerate(node.inputs):
                constant = _constant_of(graph, name)
                own = flow.axis[out] - _missing(graph, out, name)
                if constant is None or name in flow.axis or own < 0 or graph.values[name].shape[own] == 1:
                    continue
                value = graph.constants[constant.params["value"]].index_select(own, kept_out)
                fresh = graph.fresh(f"{name}.kept")
                graph.values[fresh] = Value(tuple(value.shape), graph.values[name].dtype)
                inserted.append(
                    (node, Node(fresh, "constant", [], [fresh], {"value": graph.add_constant(f"{fresh}.value", value)}))
                )
                node.inputs[index] = fresh
        elif node.op == "reshape" and kept_out is not None:
            shape = list(graph.values[out].shape)
            shape[flow.axis[out]] = kept_out.numel()
            node.attrs["shape"] = [size_to_json(size) for size in shape]
    for node, constant in inserted:
        graph.nodes.insert(graph.nodes.index(node), constant)
    for node in graph.nodes:
        if node.op != "fallback":
            params = {role: graph.constants[name] for role, name in node.params.items()}
            graph.values[node.output] = infer(node.op, [graph.values[name] for name in node.inputs], params, node.attrs)
    graph.prune()


def _shrink_operator(editor: Editor, node: Node, kept_in: Tensor | None, kept_out: Tensor | None) -> None:
    graph = editor.graph
    weight = graph.constants[node.params["weight"]]
    if _is_depthwise(graph, node):
        if kept_out is not None:
            node.attrs["groups"] = kept_out.numel()
            editor.set_param(node, "weight", weight[kept_out])
    else:
        changed = weight if kept_out is None else weight[kept_out]
        changed = changed if kept_in is None else changed[:, kept_in]
        if changed is not weight:
            editor.set_param(node, "weight", changed)
    if kept_out is not None and "bias" in node.params:
        editor.set_param(node, "bias", graph.constants[node.params["bias"]][kept_out])
