"""Fold batch norm, and every other per-channel scale and shift, into the linear operator beside it.

``affine(W x + b) = (scale · W) x + (scale · b + shift)`` always; ``W affine(x) + b = (W · scale) x + (b + W shift)``
where no zero padding comes between: in a padded border the operator reads 0, which is not what the affine would have
given. A zero weight stays zero, so the pattern does not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_engine.convert.graph import DTYPES, Graph, Node
from sparse_engine.convert.passes.editing import Editor, double


def fold_affine(graph: Graph) -> int:
    """Fold every affine node that can be; returns how many."""
    count = _to_affine(graph)
    editor = Editor(graph)
    for node in list(graph.nodes):
        if node.op == "affine":
            if _into_affine(editor, node) or _into_operator_before(editor, node) or _through_permute(editor, node):
                count += 1
        elif node.op in ("conv2d", "linear"):
            count += _into_operator_after(editor, node)
    if count:
        graph.prune()
    return count


def _to_affine(graph: Graph) -> int:
    """Write arithmetic with numbers or per-channel constants as an affine, behind operators that can take it."""
    editor, count = Editor(graph), 0
    for node in graph.nodes:
        if node.op not in ("scalar", "binary"):
            continue
        found = _scalar_affine(editor, node) if node.op == "scalar" else _binary_affine(editor, node)
        if found is None:
            continue
        x, axis, scale, shift, activation = found
        node.op, node.inputs = "affine", [x]
        node.attrs = {"axis": axis, "activation": activation}
        dtype = DTYPES[graph.values[node.output].dtype]
        node.params = {
            "scale": graph.add_constant(f"{node.name}.scale", scale.to(dtype)),
            "shift": graph.add_constant(f"{node.name}.shift", shift.to(dtype)),
        }
        count += 1
    return count


def _scalar_affine(editor: Editor, node: Node) -> tuple[str, int, Tensor, Tensor, None] | None:
    x = node.inputs[0]
    axis = _operator_axis(editor, x)
    kind, value, reverse = node.attrs["kind"], node.attrs["value"], node.attrs["reverse"]
    if axis is None or kind not in ("add", "sub", "mul", "div") or (kind == "div" and (reverse or value == 0)):
        return None
    channels = editor.graph.values[x].shape[axis]
    one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if kind in ("mul", "div"):
        return x, axis, one * value if kind == "mul" else one / value, zero, None
    if kind == "add":
        return x, axis, one, zero + value, None
    return (x, axis, -one, zero + value, None) if reverse else (x, axis, one, zero - value, None)


def _binary_affine(editor: Editor, node: Node) -> tuple[str, int, Tensor, Tensor, dict | None] | None:
    kind = node.attrs["kind"]
    for index in range(2):
        x, constant = node.inputs[index], editor.constant(node.inputs[1 - index])
        if constant is None or editor.constant(x) is not None or kind not in ("add", "sub", "mul", "div"):
            continue
        if kind == "div" and index == 1:
            continue
        if editor.graph.values[x].shape != editor.graph.values[node.output].shape:
            continue
        axis = _operator_axis(editor, x)
        rank = len(editor.graph.values[x].shape)
        if axis is None or constant.dim() > rank:
            continue
        sizes = (1,) * (rank - constant.dim()) + tuple(constant.shape)
        channels = editor.graph.values[x].shape[axis]
        if any(size != 1 for other, size in enumerate(sizes) if other != axis):
            continue
        vector = double(constant).reshape(-1).expand(channels)
        one, zero = torch.ones_like(vector), torch.zeros_like(vector)
        if kind == "div" and not vector.all():
            continue
        scale, shift = {
            "add": (one, vector),
            "mul": (vector, zero),
            "div": (1 / vector, zero),
            "sub": (one, -vector) if index == 0 else (-one, vector),
        }[kind]
        return x, axis, scale, shift, node.attrs["activation"]
    return None


def _operator_axis(editor: Editor, name: str) -> int | None:
    """The channel axis of a value whose linear operator (perhaps behind a permute) can still take an affine."""
    node = editor.source(name, "conv2d", "linear", "affine", "permute")
    if node is None:
        return None
    if node.op == "permute":
        inner = editor.source(node.inputs[0], "conv2d", "linear")
        if inner is None or not _open(inner):
            return None
        return node.attrs["dims"].index(editor.output_axis(inner))
    if node.op == "affine":
        return node.attrs["axis"] if node.attrs["activation"] is None else None
    return editor.output_axis(node) if _open(node) else None


def _open(node: Node) -> bool:
    return node.attrs["activation"] is None and len(node.inputs) == 1


def _vectors(editor: Editor, node: Node) -> tuple[Tensor, Tensor]:
    constants = editor.graph.constants
    return double(constants[node.params["scale"]]), double(constants[node.params["shift"]])


def _into_affine(editor: Editor, node: Node) -> bool:
    """affine(affine(x)) along the same axis."""
    before = editor.source(node.inputs[0], "affine")
    if before is None or before.attrs["activation"] is not None or before.attrs["axis"] != node.attrs["axis"]:
        return False
    scale, shift = _vectors(editor, node)
    inner_scale, inner_shift = _vectors(editor, before)
    before.attrs["activation"] = node.attrs["activation"]
    editor.take_over(before, node)
    editor.set_param(before, "scale", inner_scale * scale)
    editor.set_param(before, "shift", inner_shift * scale + shift)
    return True


def _into_operator_before(editor: Editor, node: Node) -> bool:
    """affine(W x + b)."""
    before = editor.source(node.inputs[0], "conv2d", "linear")
    if before is None or not _open(before) or node.attrs["axis"] != editor.output_axis(before):
        return False
    scale, shift = _vectors(editor, node)
    weight = double(editor.graph.constants[before.params["weight"]])
    bias = double(editor.graph.constants[before.params["bias"]]) if "bias" in before.params else 0.0
    before.attrs["activation"] = node.attrs["activation"]
    editor.take_over(before, node)
    editor.set_param(before, "weight", weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    editor.set_param(before, "bias", bias * scale + shift)
    return True


def _through_permute(editor: Editor, node: Node) -> bool:
    """affine(permute(W x + b)) = permute(affine(W x + b)); the next sweep folds it."""
    permute = editor.source(node.inputs[0], "permute")
    if permute is None or node.attrs["activation"] is not None:
        return False
    before = editor.source(permute.inputs[0], "conv2d", "linear")
    axis = permute.attrs["dims"][node.attrs["axis"]]
    if before is None or not _open(before) or axis != editor.output_axis(before):
        return False
    scale, shift = _vectors(editor, node)
    weight = double(editor.graph.constants[before.params["weight"]])
    bias = double(editor.graph.constants[before.params["bias"]]) if "bias" in before.params else 0.0
    editor.take_over(permute, node)
    editor.set_param(before, "weight", weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    editor.set_param(before, "bias", bias * scale + shift)
    return True


def _into_operator_after(editor: Editor, node: Node) -> bool:
    """W affine(x) + b, where the affine is read by nothing else and no padding comes between."""
    affine = editor.source(node.inputs[0], "affine")
    if affine is None or affine.attrs["activation"] is not None or affine.output in node.inputs[1:]:
        return False
    rank = len(editor.graph.values[affine.output].shape)
    if affine.attrs["axis"] != (1 if node.op == "conv2d" else rank - 1):
        return False
    scale, shift = _vectors(editor, affine)
    if node.op == "conv2d" and any(node.attrs["padding"]) and shift.any():
        return False
    weight = double(editor.graph.constants[node.params["weight"]])
    if node.op == "linear":
        folded, moved = weight * scale, weight @ shift
    else:
        groups, rows = node.attrs["groups"], weight.shape[0]
        per_group = weight.shape[1]
        index = torch.arange(rows) // (rows // groups)  # [M]: the group of each row
        columns = index[:, None] * per_group + torch.arange(per_group)  # [M, C/g]
        folded = weight * scale[columns][:, :, None, None]
        moved = (weight.sum((2, 3)) * shift[columns]).sum(1)
    bias = double(editor.graph.constants[node.params["bias"]]) if "bias" in node.params else 0.0
    editor.set_param(node, "weight", folded)
    if "bias" in node.params or moved.any():
        editor.set_param(node, "bias", bias + moved)
    editor.forward(affine)
    return True
