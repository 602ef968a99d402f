"""What is constant whatever the input: for each value, which channels always hold one number, and which.

A fact about a value is two arrays that broadcast to its shape, in which a dimension is either whole or of size one
("the same everywhere along it"); the batch dimension is always of size one. Facts start at all-zero weight rows and
constants and are pushed through every op that keeps them. Multiplication takes 0 · x as 0, which holds for every finite
x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_engine.convert.graph import Dim, Graph, Node, Shape, shape_from_json
from sparse_engine.convert.passes.editing import double
from sparse_engine.convert.reference import activate, evaluate

_LARGEST = 2**22  # elements of a fact; larger ones are forgotten


@dataclass(frozen=True)
class Fact:
    """``value[...] == number[...]`` wherever ``known[...]``; both broadcast to the value's shape."""

    known: Tensor
    number: Tensor

    def channels(self, axis: int) -> Fact | None:
        """The part that depends on one axis only, as vectors along it."""
        known, number = self.known, self.number
        for dim in range(known.dim() - 1, -1, -1):
            if dim == axis:
                continue
            same = known.all(dim, keepdim=True) & (number.amax(dim, keepdim=True) == number.amin(dim, keepdim=True))
            known, number = same, number.narrow(dim, 0, 1)
        return make_fact(known.reshape(-1), number.reshape(-1))


def make_fact(known: Tensor, number: Tensor) -> Fact | None:
    """A fact, or None where nothing is known."""
    known = known & number.isfinite()
    if not bool(known.any()) or known.numel() > _LARGEST:
        return None
    return Fact(known, torch.where(known, number, torch.zeros((), dtype=torch.float64)))


def find_facts(graph: Graph) -> dict[str, Fact]:
    """The facts of every value about which something is known."""
    facts: dict[str, Fact] = {}
    for node in graph.nodes:
        rule = _RULES.get(node.op)
        if rule is None:
            continue
        inputs = [facts.get(name) for name in node.inputs]
        fact = rule(graph, node, inputs)
        if fact is not None:
            facts[node.output] = fact
    return facts


def column_index(weight: Tensor, groups: int) -> Tensor:
    """[M, C/g]: the input channel that each column of a (grouped) weight reads."""
    rows, per_group = weight.shape[0], weight.shape[1]
    group = torch.arange(rows) // (rows // groups)
    return group[:, None] * per_group + torch.arange(per_group)


# ---- rules

Facts = Sequence[Fact | None]


def _operator(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    """Rows without weights hold their bias (plus a known residual), through the activation."""
    weight = graph.constants[node.params["weight"]]
    rank = len(graph.values[node.output].shape)
    axis = 1 if node.op == "conv2d" else rank - 1
    shape = [-1 if dim == axis else 1 for dim in range(rank)]
    known = ~weight.reshape(weight.shape[0], -1).any(1)
    if not bool(known.any()):
        return None
    bias = graph.constants.get(node.params.get("bias", ""))
    number = double(bias) if bias is not None else torch.zeros(weight.shape[0], dtype=torch.float64)
    known, number = known.view(shape), number.view(shape)
    if len(node.inputs) == 2:
        residual = inputs[1]
        if residual is None:
            return None
        known, number = known & residual.known, number + residual.number
    return make_fact(known, activate(number, node.attrs["activation"]))


def _affine(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    rank, axis = len(graph.values[node.output].shape), node.attrs["axis"]
    shape = [-1 if dim == axis else 1 for dim in range(rank)]
    scale = double(graph.constants[node.params["scale"]]).view(shape)
    shift = double(graph.constants[node.params["shift"]]).view(shape)
    known, number = _parts(inputs[0], rank)
    known, number = known | (scale == 0), number * scale + shift
    return make_fact(known, activate(number, node.attrs["activation"]))


def _unary(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    if inputs[0] is None:
        return None
    return make_fact(inputs[0].known, activate(inputs[0].number, node.attrs["activation"]))


def _scalar(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    if inputs[0] is None:
        return None
    return make_fact(inputs[0].known, evaluate("scalar", [inputs[0].number], {}, node.attrs))


def _binary(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    rank = len(graph.values[node.output].shape)
    (left_known, left), (right_known, right) = (
        _parts(fact, rank, len(graph.values[name].shape)) for fact, name in zip(inputs, node.inputs, strict=True)
    )
    known = left_known & right_known
    number = evaluate("binary", [left, right], {}, {"kind": node.attrs["kind"], "activation": None})
    if node.attrs["kind"] == "mul":
        zero = (left_known & (left == 0)) | (right_known & (right == 0))
        known, number = known | zero, torch.where(zero, 0.0, number)
    return make_fact(known.expand(number.shape), activate(number, node.attrs["activation"]))


def _max_pool(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    return None if inputs[0] is None or not _flat(inputs[0], (2, 3)) else inputs[0]


def _avg_pool(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    fact, attrs = inputs[0], node.attrs
    if fact is None or not _flat(fact, (2, 3)):
        return None
    if attrs["divisor"] is None and (not any(attrs["padding"]) or not attrs["count_include_pad"]):
        return fact
    return make_fact(fact.known & (fact.number == 0), fact.number)


def _adaptive_pool(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    return inputs[0] if inputs[0] is not None and _flat(inputs[0], (2, 3)) else None


def _reduce(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    fact, dims = inputs[0], node.attrs["dims"]
    if fact is None or not _flat(fact, dims):
        return None
    number = fact.number
    if node.attrs["kind"] == "sum":
        sizes = [graph.values[node.inputs[0]].shape[dim] for dim in dims]
        if any(isinstance(size, Dim) for size in sizes):
            return make_fact(fact.known & (number == 0), _squeeze(node, number))
        number = number * math.prod(size for size in sizes if not isinstance(size, Dim))
    return make_fact(_squeeze(node, fact.known), _squeeze(node, number))


def _squeeze(node: Node, tensor: Tensor) -> Tensor:
    return tensor if node.attrs["keepdim"] else tensor.squeeze(tuple(node.attrs["dims"]))


def _concat(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    dim, rank = node.attrs["dim"], len(graph.values[node.output].shape)
    if all(fact is None for fact in inputs):
        return None
    known, number = [], []
    sizes = [1] * rank
    for fact in inputs:
        if fact is not None:
            sizes = [max(size, own) for size, own in zip(sizes, fact.known.shape, strict=True)]
    for fact, name in zip(inputs, node.inputs, strict=True):
        length = graph.values[name].shape[dim]
        if isinstance(length, Dim):
            return None
        shape = [length if index == dim else size for index, size in enumerate(sizes)]
        if math.prod(shape) > _LARGEST:
            return None
        own_known, own_number = _parts(fact, rank)
        known.append(own_known.expand(shape))
        number.append(own_number.expand(shape))
    return make_fact(torch.cat(known, dim), torch.cat(number, dim))


def _slice(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    fact, dim = inputs[0], node.attrs["dim"]
    if fact is None or graph.values[node.output].shape[dim] == 0:
        return None
    if fact.known.shape[dim] == 1:
        return fact
    return make_fact(*(evaluate("slice", [tensor], {}, node.attrs) for tensor in (fact.known, fact.number)))


def _permute(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    if inputs[0] is None:
        return None
    dims = node.attrs["dims"]
    return Fact(inputs[0].known.permute(dims), inputs[0].number.permute(dims))


def _expand(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    if inputs[0] is None:
        return None
    known, number = _parts(inputs[0], len(graph.values[node.output].shape), inputs[0].known.dim())
    return make_fact(known, number)


def _pad(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    fact, pad = inputs[0], node.attrs["pad"]
    if fact is None:
        return None
    rank = fact.known.dim()
    dims = [rank - 1 - pair for pair in range(len(pad) // 2) if pad[2 * pair] or pad[2 * pair + 1]]
    if not _flat(fact, dims):
        return None
    return make_fact(fact.known & (fact.number == node.attrs["value"]), fact.number)


def _attention(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    """Every result is a weighted mean of values, so columns of v that are 0 stay 0."""
    fact = inputs[2]
    if fact is None:
        return None
    rank = len(graph.values[node.output].shape)
    known, number = _parts(fact, rank, fact.known.dim())
    zero = known & (number == 0)
    return make_fact(zero.all(rank - 2, keepdim=True), torch.zeros_like(number.narrow(rank - 2, 0, 1)))


def _constant(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    value = graph.constants[node.params["value"]]
    if not value.is_floating_point() or value.numel() == 0 or value.numel() > _LARGEST:
        return None
    return make_fact(torch.ones(value.shape, dtype=torch.bool), double(value))


def _reshape(graph: Graph, node: Node, inputs: Facts) -> Fact | None:
    fact = inputs[0]
    if fact is None:
        return None
    groups = dimension_groups(graph.values[node.inputs[0]].shape, shape_from_json(node.attrs["shape"], "reshape"))
    if groups is None:
        return None
    return_shape: list[int] = []
    expanded: list[int] = []
    old, new = graph.values[node.inputs[0]].shape, graph.values[node.output].shape
    for before, after in groups:
        if all(fact.known.shape[dim] == 1 for dim in before):
            expanded += [1] * len(before)
            return_shape += [1] * len(after)
            continue
        sizes = [old[dim] for dim in before] + [new[dim] for dim in after]
        if any(isinstance(size, Dim) for size in sizes):
            return None
        expanded += [int(old[dim]) for dim in before]  # type: ignore[arg-type]
        return_shape += [int(new[dim]) for dim in after]  # type: ignore[arg-type]
    if math.prod(expanded) > _LARGEST:
        return None
    return make_fact(
        fact.known.expand(expanded).reshape(return_shape), fact.number.expand(expanded).reshape(return_shape)
    )


_RULES: dict[str, Callable[[Graph, Node, Facts], Fact | None]] = {
    "conv2d": _operator,
    "linear": _operator,
    "affine": _affine,
    "unary": _unary,
    "scalar": _scalar,
    "binary": _binary,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "reduce": _reduce,
    "concat": _concat,
    "slice": _slice,
    "permute": _permute,
    "expand": _expand,
    "pad": _pad,
    "attention": _attention,
    "constant": _constant,
    "reshape": _reshape,
}


# ---- helpers


def dimension_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Split a reshape into independent ones: groups of old and new dimensions with equal products, in order.

    >>> dimension_groups((Dim(1), 8, 7, 7), (Dim(1), 392))
    [([0], [0]), ([1, 2, 3], [1])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [], []
        left, right = (0, 1), (0, 1)  # the products so far, (per batch, constant)
        while not (before and after and left == right):
            if i < len(old) and (_order(left) <= _order(right) or j == len(new)):
                left = _times(left, old[i])
                before.append(i)
                i += 1
            elif j < len(new):
                right = _times(right, new[j])
                after.append(j)
                j += 1
            else:
                break
        if left != right:
            return None
        groups.append((before, after))
    return groups


def _order(product: tuple[int, int]) -> int:
    return product[0] * 2**20 + product[1]


def _times(product: tuple[int, int], size: int | Dim) -> tuple[int, int]:
    if isinstance(size, Dim):
        return (product[0] * size.plus + product[1] * size.batch, product[1] * size.plus)
    return (product[0] * size, product[1] * size)


def _parts(fact: Fact | None, rank: int, own_rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Both arrays with leading dimensions added up to `rank`; nothing known where there is no fact."""
    if fact is None:
        return torch.zeros([1] * rank, dtype=torch.bool), torch.zeros([1] * rank, dtype=torch.float64)
    extra = [1] * (rank - fact.known.dim())
    return fact.known.reshape(*extra, *fact.known.shape), fact.number.reshape(*extra, *fact.number.shape)


def _flat(fact: Fact, dims: Sequence[int]) -> bool:
    """True when the fact is the same everywhere along some dimensions."""
    return all(fact.known.shape[dim] == 1 for dim in dims)
