"""Recognise functions that a model spells out: activations as products, attention as matmul, softmax and matmul."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparse_engine.convert.graph import Graph, GraphError, Node, Value
from sparse_engine.convert.passes.editing import Editor
from sparse_engine.convert.schema import infer


def recognise(graph: Graph) -> int:
    """Rewrite spelled-out activations and attention into one node each; returns how many were found."""
    count = 0
    # From the outermost product inwards: x · relu6(x + 3) / 6 contains relu6(x + 3) / 6.
    for node in reversed(list(graph.nodes)):
        editor = Editor(graph)
        if editor.producer.get(node.outputs[0]) is not node:
            continue  # already part of another one
        if node.op in ("scalar", "binary"):
            count += _activation(editor, node)
        elif node.op == "unary":
            count += _clamped_hard_sigmoid(editor, node)
        elif node.op == "matmul":
            count += _attention(editor, node)
    if count:
        graph.prune()
    return count


# ---- activations


@dataclass
class _Product:
    """A value as ``factor · values[0] · values[1] · …``."""

    factor: float
    values: list[str]


def _activation(editor: Editor, node: Node) -> bool:
    product = _flatten(editor, node)
    if product is None:
        return False
    shape = editor.graph.values[node.output].shape
    if any(editor.graph.values[name].shape != shape for name in product.values):
        return False
    found = None
    if len(product.values) == 1 and _close(product.factor, 1 / 6):
        x = _relu6_of_plus_three(editor, product.values[0])
        found = None if x is None else (x, "hardsigmoid")
    elif len(product.values) == 2:
        for x, other in (product.values, product.values[::-1]):
            kind = _gate(editor, product.factor, x, other)
            if kind is not None:
                found = (x, kind)
                break
    if found is None:
        return False
    activation = {"kind": found[1]}
    if node.op == "binary" and node.attrs["activation"] is not None:
        return False
    node.op, node.inputs, node.attrs = "unary", [found[0]], {"activation": activation}
    editor.graph.prune()
    return True


def _gate(editor: Editor, factor: float, x: str, other: str) -> str | None:
    """The activation that ``factor · x · other`` is."""
    node = editor.producer.get(other)
    if node is None:
        return None
    if _close(factor, 1) and node.op == "unary" and node.inputs == [x]:
        return {"sigmoid": "silu", "hardsigmoid": "hardswish"}.get(node.attrs["activation"]["kind"])
    if _close(factor, 1 / 6) and _relu6_of_plus_three(editor, other) == x:
        return "hardswish"
    inner = _plus(editor, other, 1.0)
    function = None if inner is None else editor.producer.get(inner)
    if not _close(factor, 0.5) or function is None or function.op != "unary":
        return None
    kind, argument = function.attrs["activation"]["kind"], function.inputs[0]
    if kind == "erf" and _times_of(editor, argument, math.sqrt(0.5)) == x:
        return "gelu"
    if kind == "tanh" and _is_gelu_polynomial(editor, argument, x):
        return "gelu_tanh"
    return None


def _clamped_hard_sigmoid(editor: Editor, node: Node) -> bool:
    """clamp(x / 6 + 0.5, 0, 1)."""
    if node.attrs["activation"] != {"kind": "clamp", "min": 0.0, "max": 1.0}:
        return False
    inner = _plus(editor, node.inputs[0], 0.5)
    x = None if inner is None else _times_of(editor, inner, 1 / 6)
    if x is None:
        return False
    node.inputs, node.attrs = [x], {"activation": {"kind": "hardsigmoid"}}
    editor.graph.prune()
    return True


def _flatten(editor: Editor, node: Node) -> _Product | None:
    """A tree of products as one, through intermediate values that nobody else reads."""
    if node.op == "scalar":
        kind, value = node.attrs["kind"], node.attrs["value"]
        if kind not in ("mul", "div") or (node.attrs["reverse"] and kind == "div") or (kind == "div" and value == 0):
            return None
        inner = _flatten_value(editor, node.inputs[0])
        return _Product(inner.factor * (value if kind == "mul" else 1 / value), inner.values)
    if node.op == "binary" and node.attrs["kind"] == "mul" and node.attrs["activation"] is None:
        left, right = (_flatten_value(editor, name) for name in node.inputs)
        return _Product(left.factor * right.factor, left.values + right.values)
    return None


def _flatten_value(editor: Editor, name: str) -> _Product:
    node = editor.source(name, "scalar", "binary")
    product = None if node is None else _flatten(editor, node)
    return product if product is not None else _Product(1.0, [name])


def _relu6_of_plus_three(editor: Editor, name: str) -> str | None:
    """x where the value is relu6(x + 3), else None."""
    node = editor.producer.get(name)
    if node is None or node.op != "unary" or node.attrs["activation"] != {"kind": "clamp", "min": 0.0, "max": 6.0}:
        return None
    return _plus(editor, node.inputs[0], 3.0)


def _plus(editor: Editor, name: str, value: float) -> str | None:
    """x where the value is x + value, else None."""
    node = editor.producer.get(name)
    if node is None or node.op != "scalar" or (node.attrs["reverse"] and node.attrs["kind"] != "add"):
        return None
    if node.attrs["kind"] not in ("add", "sub"):
        return None
    added = node.attrs["value"] if node.attrs["kind"] == "add" else -node.attrs["value"]
    return node.inputs[0] if _close(added, value) else None


def _times_of(editor: Editor, name: str, factor: float) -> str | None:
    """x where the value is x · factor, else None."""
    node = editor.producer.get(name)
    if node is None or node.op != "scalar" or node.attrs["kind"] not in ("mul", "div") or node.attrs["value"] == 0:
        return None
    if node.attrs["reverse"] and node.attrs["kind"] == "div":
        return None
    found = node.attrs["value"] if node.attrs["kind"] == "mul" else 1 / node.attrs["value"]
    return node.inputs[0] if _close(found, factor) else None


def _is_gelu_polynomial(editor: Editor, name: str, x: str) -> bool:
    """sqrt(2 / pi) · (x + 0.044715 · x³), the argument of GELU's tanh form."""
    inner = _times_of(editor, name, math.sqrt(2 / math.pi))
    node = None if inner is None else editor.producer.get(inner)
    if (
        node is None
        or node.op != "binary"
        or node.attrs["kind"] != "add"
        or node.attrs["activation"] is not None
        or x not in node.inputs
    ):
        return False
    cubic = node.inputs[1] if node.inputs[0] == x else node.inputs[0]
    producer = editor.producer.get(cubic)
    product = None if producer is None else _flatten(editor, producer)
    if product is None or not _close(product.factor, 0.044715):
        return False
    powers = 0
    for value in product.values:
        powers += 1 if value == x else _power(editor, value, x)
    return powers == 3


def _power(editor: Editor, name: str, x: str) -> int:
    """The k with value = x^k for k = 2 or 3, else a number that fits nothing."""
    node = editor.producer.get(name)
    if node is not None and node.inputs == [x]:
        if node.op == "unary" and node.attrs["activation"]["kind"] == "square":
            return 2
        if (
            node.op == "scalar"
            and node.attrs["kind"] == "pow"
            and not node.attrs["reverse"]
            and node.attrs["value"] in (2, 3)
        ):
            return int(node.attrs["value"])
    return 100


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


# ---- attention


def _attention(editor: Editor, node: Node) -> bool:
    """softmax(scale · q kᵀ + mask) v."""
    graph = editor.graph
    softmax = editor.source(node.inputs[0], "softmax")
    if softmax is None or softmax.attrs["dim"] != len(graph.values[softmax.output].shape) - 1:
        return False
    name, mask, scale = softmax.inputs[0], None, 1.0
    masked = editor.source(name, "binary")
    if masked is not None:
        if masked.attrs["kind"] != "add" or masked.attrs["activation"] is not None:
            return False
        index = next((index for index in range(2) if _scores(editor, masked.inputs[index]) is not None), None)
        if index is None or graph.values[masked.inputs[index]] != graph.values[masked.output]:
            return False
        name, mask = masked.inputs[index], masked.inputs[1 - index]
    found = _scores(editor, name)
    if found is None:
        return False
    product, scale = found
    query, transposed = product.inputs
    scaled = editor.source(query, "scalar")
    if (
        scaled is not None
        and scaled.attrs["kind"] in ("mul", "div")
        and not scaled.attrs["reverse"]
        and scaled.attrs["value"]
    ):
        scale *= scaled.attrs["value"] if scaled.attrs["kind"] == "mul" else 1 / scaled.attrs["value"]
        query = scaled.inputs[0]
    inputs = [query, transposed, node.inputs[1], *([] if mask is None else [mask])]
    rank = len(graph.values[transposed].shape)
    swap = [*range(rank - 2), rank - 1, rank - 2]
    shape = graph.values[transposed].shape
    key = Value(tuple(shape[dim] for dim in swap), graph.values[transposed].dtype)
    attrs: dict[str, Any] = {"scale": float(scale), "causal": False}
    values = [graph.values[query], key, *(graph.values[name] for name in inputs[2:])]
    try:
        if infer("attention", values, {}, attrs) != graph.values[node.output]:
            return False
    except GraphError:
        return False
    key_name = graph.fresh(f"{transposed}.key")
    graph.values[key_name] = key
    place = graph.nodes.index(node)
    graph.nodes.insert(place, Node(key_name, "permute", [transposed], [key_name], {}, {"dims": swap}))
    inputs[1] = key_name
    node.op, node.inputs, node.attrs = "attention", inputs, attrs
    graph.prune()
    return True


def _scores(editor: Editor, name: str) -> tuple[Node, float] | None:
    """The matmul and the number with value = number · matmul, read by nothing else."""
    scale = 1.0
    while (node := editor.source(name, "scalar")) is not None:
        kind, value = node.attrs["kind"], node.attrs["value"]
        if kind not in ("mul", "div") or (kind == "div" and (node.attrs["reverse"] or value == 0)):
            return None
        scale *= value if kind == "mul" else 1 / value
        name = node.inputs[0]
    product = editor.source(name, "matmul")
    return None if product is None else (product, scale)
