"""Fuse what follows a linear operator into it: ``activation(op(x) + bias + residual)``.

An addition becomes the residual where the operator's result is read by nothing else, has no activation yet, and both
sides have the same shape. Of two operators that are added, the later one takes the other as its residual. An activation
follows; elementwise nodes take activations too. A permute between operator and addition is moved behind it (activations
are stored channel-major, so it costs nothing).
"""

from __future__ import annotations

from sparse_engine.convert.graph import Graph, Node, Value
from sparse_engine.convert.passes.editing import Editor

_OPERATORS = ("conv2d", "linear")


def fuse(graph: Graph) -> int:
    """Fuse residuals and activations until nothing changes; returns how many nodes disappeared."""
    total = 0
    while count := _sweep(graph):
        total += count
    return total


def _sweep(graph: Graph) -> int:
    editor, count = Editor(graph), 0
    for node in list(graph.nodes):
        if node.op == "unary":
            count += _activation(editor, node) or _activation_before_permute(editor, node)
        elif node.op == "binary" and node.attrs["kind"] == "add":
            count += _residual(editor, node) or _residual_before_permute(editor, node)
    return count


def _activation(editor: Editor, node: Node) -> bool:
    before = editor.source(node.inputs[0], *_OPERATORS, "affine", "binary")
    if before is None or before.attrs["activation"] is not None:
        return False
    before.attrs["activation"] = node.attrs["activation"]
    editor.take_over(before, node)
    return True


def _activation_before_permute(editor: Editor, node: Node) -> bool:
    permute = editor.source(node.inputs[0], "permute")
    before = None if permute is None else editor.source(permute.inputs[0], *_OPERATORS)
    if permute is None or before is None or before.attrs["activation"] is not None:
        return False
    before.attrs["activation"] = node.attrs["activation"]
    editor.take_over(permute, node)
    return True


def _residual(editor: Editor, node: Node) -> bool:
    candidates = []
    for index in range(2):
        before = editor.source(node.inputs[index], *_OPERATORS)
        other = node.inputs[1 - index]
        if before is None or not _open(before) or editor.graph.values[other] != editor.graph.values[node.inputs[index]]:
            continue
        candidates.append((editor.graph.nodes.index(before), index, before))
    if not candidates:
        return False
    _, index, before = max(candidates, key=lambda candidate: candidate[0])
    other = node.inputs[1 - index]
    before.attrs["activation"] = node.attrs["activation"]
    editor.take_over(before, node)
    before.inputs.append(other)
    editor.uses[other] += 1
    return True


def _residual_before_permute(editor: Editor, node: Node) -> bool:
    """permute(op(x)) + residual = permute(op(x) + inverse_permute(residual))."""
    graph = editor.graph
    for index in range(2):
        permute = editor.source(node.inputs[index], "permute")
        before = None if permute is None else editor.source(permute.inputs[0], *_OPERATORS)
        other = node.inputs[1 - index]
        if (
            permute is None
            or before is None
            or not _open(before)
            or graph.values[other] != graph.values[permute.output]
        ):
            continue
        dims = permute.attrs["dims"]
        inverse = sorted(range(len(dims)), key=dims.__getitem__)
        moved = graph.fresh(f"{other}.permuted")
        value = graph.values[other]
        graph.values[moved] = Value(tuple(value.shape[dim] for dim in inverse), value.dtype)
        extra = Node(moved, "permute", [other], [moved], {}, {"dims": inverse})
        before.attrs["activation"] = node.attrs["activation"]
        editor.take_over(permute, node)
        # The operator moves to just before the permute, where the residual is known to exist.
        nodes = graph.nodes
        nodes[:] = [item for item in nodes if item is not before]
        place = next(position for position, item in enumerate(nodes) if item is permute)
        nodes[place:place] = [extra, before]
        before.inputs.append(moved)
        editor.producer[moved] = extra
        editor.uses[moved] += 1
        editor.uses[other] += 1
        return True
    return False


def _open(node: Node) -> bool:
    return node.attrs["activation"] is None and len(node.inputs) == 1
