"""Remove what computes nothing: neutral movement and arithmetic, repeated work, work on constants."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from sparse_engine.convert.graph import Dim, Graph, Node, Value, size_to_json
from sparse_engine.convert.passes.editing import Editor
from sparse_engine.convert.reference import evaluate

_FOLDABLE_ELEMENTS = 2**20  # constants are not blown up beyond this by folding


def simplify(graph: Graph) -> int:
    """Remove neutral nodes and merge chains of the same movement; returns how many rewrites were made."""
    editor, count = Editor(graph), 0
    for node in list(graph.nodes):
        merge = _MERGE.get(node.op)
        if merge is not None and node.inputs[0] in editor.producer:
            before = editor.producer[node.inputs[0]]
            if before.op == node.op and merge(editor, before, node):
                editor.uses[node.inputs[0]] -= 1
                node.inputs = list(before.inputs)
                editor.uses[node.inputs[0]] += 1
                count += 1
        if node.op == "reshape" and _lift_over_linear(editor, node):
            count += 1
            continue
        if _is_neutral(graph, node) and editor.forward(node):
            count += 1
    if count:
        graph.prune()
    return count


def _is_neutral(graph: Graph, node: Node) -> bool:
    if not node.inputs or graph.values[node.inputs[0]] != graph.values[node.outputs[0]]:
        return False
    attrs = node.attrs
    if node.op in ("reshape", "expand"):
        return True
    if node.op == "permute":
        return attrs["dims"] == list(range(len(attrs["dims"])))
    if node.op == "slice":
        return attrs["step"] == 1  # as long as its input
    if node.op == "concat":
        return len(node.inputs) == 1
    if node.op == "pad":
        return not any(attrs["pad"])
    if node.op == "scalar":
        neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}.get(attrs["kind"])
        return attrs["value"] == neutral and (not attrs["reverse"] or attrs["kind"] in ("add", "mul"))
    return node.op == "unary" and attrs["activation"] == {"kind": "clamp", "min": None, "max": None}


def _merge_any(editor: Editor, before: Node, node: Node) -> bool:
    return True  # the last shape is what counts


def _merge_permute(editor: Editor, before: Node, node: Node) -> bool:
    node.attrs["dims"] = [before.attrs["dims"][dim] for dim in node.attrs["dims"]]
    return True


def _merge_slice(editor: Editor, before: Node, node: Node) -> bool:
    inner, outer = before.attrs, node.attrs
    if inner["dim"] != outer["dim"]:
        return False
    size = editor.graph.values[before.inputs[0]].shape[inner["dim"]]
    if isinstance(size, Dim):
        return False
    step = inner["step"] * outer["step"]
    start = inner["start"] + outer["start"] * inner["step"]
    stop = min(inner["start"] + outer["stop"] * inner["step"], inner["stop"], size)
    node.attrs = {"dim": inner["dim"], "start": min(start, stop), "stop": stop, "step": step}
    return True


def _lift_over_linear(editor: Editor, node: Node) -> bool:
    """reshape(linear(reshape(x))) = linear(reshape(x)) where the second reshape only splits or merges rows."""
    graph = editor.graph
    linear = editor.source(node.inputs[0], "linear")
    first = None if linear is None else editor.source(linear.inputs[0], "reshape")
    if linear is None or first is None or len(linear.inputs) > 1:
        return False
    out, rows = graph.values[node.output], graph.values[linear.output]
    if len(out.shape) < 2 or out.shape[-1] != rows.shape[-1]:
        return False
    before = Value((*out.shape[:-1], graph.values[first.output].shape[-1]), out.dtype)
    graph.values[first.output] = before
    first.attrs["shape"] = [size_to_json(size) for size in before.shape]
    editor.take_over(linear, node)
    return True


_MERGE: dict[str, Callable[[Editor, Node, Node], bool]] = {
    "reshape": _merge_any,
    "permute": _merge_permute,
    "slice": _merge_slice,
}


def fold_constants(graph: Graph) -> int:
    """Replace native nodes whose inputs are all constants by their results."""
    editor, count = Editor(graph), 0
    for node in graph.nodes:
        if node.op in ("constant", "fallback") or not node.inputs:
            continue
        tensors = [editor.constant(name) for name in node.inputs]
        if any(tensor is None for tensor in tensors):
            continue
        shape = graph.values[node.output].shape
        if any(isinstance(size, Dim) for size in shape) or math.prod(map(int, shape)) > _FOLDABLE_ELEMENTS:
            continue
        params = {role: graph.constants[name] for role, name in node.params.items()}
        result = evaluate(node.op, [tensor for tensor in tensors if tensor is not None], params, node.attrs)
        node.op, node.inputs, node.attrs = "constant", [], {}
        node.params = {"value": graph.add_constant(f"{node.name}.value", result)}
        editor.producer[node.output] = node
        count += 1
    if count:
        graph.prune()
    return count


def share_repeated(graph: Graph) -> int:
    """Common subexpressions: nodes that do the same to the same values are computed once."""
    seen: dict[str, Node] = {}
    renamed: dict[str, str] = {}
    kept: list[Node] = []
    for node in graph.nodes:
        node.inputs = [renamed.get(name, name) for name in node.inputs]
        key = json.dumps([node.op, node.inputs, node.params, node.attrs], sort_keys=True)
        first = seen.setdefault(key, node)
        if first is node or len(first.outputs) != len(node.outputs):
            kept.append(node)
            continue
        renamed.update(zip(node.outputs, first.outputs, strict=True))
    count = len(graph.nodes) - len(kept)
    if count:
        graph.nodes = kept
        graph.outputs = [renamed.get(name, name) for name in graph.outputs]
        graph.prune()
    return count
