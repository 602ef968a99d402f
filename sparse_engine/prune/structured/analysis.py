"""The dependency analysis: every operator of a captured model as relations between axes.

One rule per family of operators says which dimensions pass through, which are joined, mapped or multiplied out, and
which must stay. An operator
without a rule freezes all it touches, which is always right and never silent: `Analysis.kept_whole` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from .axes import Axes, EqualCounts, Grid, Mapping
from .capture import REDUCTIONS, Program, arguments, operator_name, scope, shapes_of
from .constants import CONVOLUTIONS

_SAME = frozenset(
    [
        "detach",
        "alias",
        "contiguous",
        "clone",
        "dropout",
        "alpha_dropout",
        "feature_dropout",
        "to",
        "_to_copy",
        "lift_fresh_copy",
        "type_as",
        "float",
        "double",
        "cumsum",
        "cumprod",
        "sort",
        "log_softmax",
        "softmax",
        "_softmax",
        "_log_softmax",
        "softmin",
        "roll",
        "flip",
        "tril",
        "triu",
        "argsort",
        "logcumsumexp",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
    ]
)
# what export adds to check types: it computes nothing and reads no size
_CHECKS = frozenset(["_assert_tensor_metadata", "_assert_async", "_assert_scalar"])
_REDUCTIONS = REDUCTIONS | {"var_mean", "std_mean", "aminmax", "median"}
_RESHAPES = frozenset(["view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"])
_POOLS = (
    "max_pool",
    "avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "_adaptive_avg_pool",
    "lp_pool",
    "upsample_",
    "_upsample_",
    "replication_pad",
    "reflection_pad",
)


@dataclass
class Contraction:
    """A place where a weight sums over an axis: a convolution or a linear layer.

    Args:
        node: the operator.
        weight, bias: names of the tensors, None where they are computed (weight) or absent (bias).
        computed_bias: the bias is there but is not a tensor of the model.
        source: the tensor summed over, and its dimension.
        inputs, outputs: the axes summed over and produced.
        groups: how many independent products; `group_axis`, `inputs_per_group`, `outputs_per_group` are its axes
            (None when groups is 1).
        transposed: a transposed convolution.
    """

    node: fx.Node
    weight: str | None
    bias: str | None
    computed_bias: bool
    source: fx.Node
    dim: int
    inputs: int
    outputs: int
    groups: int = 1
    group_axis: int | None = None
    inputs_per_group: int | None = None
    outputs_per_group: int | None = None
    transposed: bool = False


@dataclass
class Product:
    """A place where two computed tensors are multiplied and summed over a shared axis."""

    node: fx.Node
    first: fx.Node
    first_dim: int
    second: fx.Node
    second_dim: int
    axis: int


@dataclass
class Analysis:
    """What `analyse` found.

    Args:
        program: the captured model.
        axes: all axes with their constraints; resolved.
        tensors: name of a parameter or buffer -> the axis of each dimension.
        values: node -> the axes of each of its results.
        contractions, products: the places where an axis is summed over.
        norms: group norms as (name of the scale tensor, scope, axis of the groups).
        attention: axes that count independent products (heads).
        kept_whole: reasons why operators froze what they touch: "scope: operator".
        written_sizes: (place in the model, axes) wherever the model's own code may have written a size down:
            reshapes, splits, slices.
    """

    program: Program
    axes: Axes
    tensors: dict[str, list[int]] = field(default_factory=dict)
    values: dict[fx.Node, list[list[int]]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    norms: list[tuple[str, int]] = field(default_factory=list)
    attention: set[int] = field(default_factory=set)
    kept_whole: list[str] = field(default_factory=list)
    written_sizes: list[tuple[str, list[int]]] = field(default_factory=list)

    def tensor_axes(self, name: str) -> list[int]:
        """The distinct axis of each dimension of a tensor of the model."""
        return [self.axes.find(axis) for axis in self.tensors[name]]


def analyse(program: Program) -> Analysis:
    """Relate all axes of a captured model.

    Example::

        analysis = analyse(capture(model, x))

    Linear in the number of operators and free of recursion. Dimensions of inputs and outputs are frozen.
    """
    analysis = Analysis(program, Axes())
    builder = _Builder(analysis)
    for node in program.inputs:
        builder.fresh(node)
        builder.freeze_node(node, "input")
    for node, name in program.state.items():
        if name not in analysis.tensors:
            builder.fresh(node)
            analysis.tensors[name] = analysis.values[node][0] if analysis.values[node] else []
            if name not in program.aliases:  # a constant that export lifted out of the code: nobody can shrink it there
                builder.freeze_node(node, "constant")
        analysis.values[node] = [analysis.tensors[name]]
    for node in program.nodes:
        builder.visit(node)
    for node in program.outputs:
        builder.freeze_node(node, "output")
    analysis.axes.resolve()
    for contraction in analysis.contractions:
        for key in ("inputs", "outputs", "group_axis", "inputs_per_group", "outputs_per_group"):
            axis = getattr(contraction, key)
            setattr(contraction, key, axis if axis is None else analysis.axes.find(axis))
    for product in analysis.products:
        product.axis = analysis.axes.find(product.axis)
    analysis.norms = [(name, analysis.axes.find(axis)) for name, axis in analysis.norms]
    analysis.written_sizes = [
        (place, [analysis.axes.find(axis) for axis in axes]) for place, axes in analysis.written_sizes
    ]
    analysis.attention = {analysis.axes.find(axis) for axis in analysis.attention}
    return analysis


class _Builder:
    """Adds one operator after the other to an `Analysis`."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.axes = analysis.axes
        self.values = analysis.values

    # building blocks

    def fresh(self, node: fx.Node) -> list[list[int]]:
        self.values[node] = [
            [self.axes.new(size) for size in shape] if shape is not None else [] for shape in shapes_of(node)
        ]
        return self.values[node]

    def of(self, node: Any) -> list[int]:
        return self.values[node][0]

    def freeze_node(self, node: fx.Node, why: str) -> None:
        for result in self.values[node]:
            for axis in result:
                self.axes.freeze(axis, None, why)

    def freeze(self, axes: Sequence[int], why: str) -> None:
        for axis in axes:
            self.axes.freeze(axis, None, why)

    def join_aligned(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Join dimensions of two tensors that line up from the right, as broadcasting does."""
        for a, b in zip(reversed(first), reversed(second), strict=False):
            if self.axes.sizes[a] == self.axes.sizes[b]:
                self.axes.join(a, b)

    def join_all(self, first: Sequence[int], second: Sequence[int]) -> None:
        """Join dimensions position by position where the sizes agree; freeze where they don't."""
        for a, b in zip(first, second, strict=True):
            if self.axes.sizes[a] == self.axes.sizes[b]:
                self.axes.join(a, b)
            else:
                self.freeze((a, b), "size changes")

    def map(self, first: int, first_index: np.ndarray, second: int, second_index: np.ndarray) -> None:
        self.axes.constraints.append(Mapping(first, first_index, second, second_index))

    # dispatch

    def visit(self, node: fx.Node) -> None:
        name = operator_name(node)
        if name == "getitem":
            source = self.values[node.args[0]]  # type: ignore[index]
            position = node.args[1]
            self.values[node] = [source[position]] if isinstance(position, int) and position < len(source) else []  # type: ignore[operator]
            if not self.values[node]:
                self.fresh(node)
            return
        self.fresh(node)
        if name in _CHECKS and arguments(node).get("size") is None:
            return
        tensors = [argument for argument in node.all_input_nodes if argument in self.values]
        if not isinstance(node.target, torch._ops.OpOverload):
            self.unknown(node, tensors)
            return
        if not tensors:
            self.freeze([axis for result in self.values[node] for axis in result], "made by the model's code")
            return
        rule = _RULES.get(name)
        if rule is not None:
            rule(self, node)
        elif name in ("max", "min") and len(tensors) == 2:
            self.pointwise(node, tensors)
        elif name in _SAME:
            self.same(node, name)
        elif name in _REDUCTIONS:
            self.reduce(node)
        elif name in _RESHAPES:
            self.reshape(node, self.of(tensors[0]), self.of(node))
        elif name.startswith(_POOLS):
            self.pool(node)
        elif torch.Tag.pointwise in node.target.tags or name in (
            "hardswish",
            "relu6",
            "hardsigmoid",
            "hardtanh",
            "prelu",
        ):
            self.pointwise(node, tensors)
        else:
            self.unknown(node, tensors)

    def unknown(self, node: fx.Node, tensors: Sequence[fx.Node]) -> None:
        self.freeze_node(node, "operator without a rule")
        for tensor in tensors:
            self.freeze_node(tensor, "operator without a rule")
        self.analysis.kept_whole.append(f"{scope(node) or 'model'}: {operator_name(node)}")

    # families

    def same(self, node: fx.Node, name: str) -> None:
        source = node.all_input_nodes[0]
        for result in self.values[node]:
            self.join_all(self.of(source), result)
        given = arguments(node)
        if name in ("roll", "flip"):
            dims = given.get("dims") or list(range(len(self.of(source))))
            self.freeze([self.of(source)[d] for d in dims], name)
        elif name in ("tril", "triu"):
            self.freeze(self.of(source)[-2:], name)
        elif isinstance(given.get("dim"), int):
            self.freeze([self.of(source)[given["dim"]]], name)

    def pointwise(self, node: fx.Node, tensors: Sequence[fx.Node]) -> None:
        if operator_name(node) == "prelu":
            source, weight = tensors
            self.join_all(self.of(source), self.of(node))
            if self.axes.sizes[self.of(weight)[0]] > 1:
                self.axes.join(self.of(weight)[0], self.of(source)[1])
            return
        for tensor in tensors:
            self.join_aligned(self.of(tensor), self.of(node))

    def reduce(self, node: fx.Node) -> None:
        given = arguments(node)
        source = node.all_input_nodes[0]
        axes = self.of(source)
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims) if dims else list(range(len(axes)))
        gone = {d % max(len(axes), 1) for d in dims}
        self.freeze([axes[d] for d in gone], "reduced over")
        for result in self.values[node]:
            rest = result
            if len(rest) == len(axes):
                pairs = [(axes[d], rest[d]) for d in range(len(axes)) if d not in gone]
            else:
                pairs = list(zip([axes[d] for d in range(len(axes)) if d not in gone], rest, strict=False))
            for a, b in pairs:
                self.axes.join(a, b)

    def pool(self, node: fx.Node) -> None:
        source, rank = node.all_input_nodes[0], 0
        name = operator_name(node)
        rank = next((n for n in (1, 2, 3) if f"{n}d" in name), 2)
        axes = self.of(source)
        for result in self.values[node]:
            if not result:
                continue
            for a, b in zip(axes[:-rank], result[:-rank], strict=True):
                self.axes.join(a, b)
            self.freeze(result[-rank:], "spatial")
        self.freeze(axes[-rank:], "spatial")

    def reshape(self, node: fx.Node, before: Sequence[int], after: Sequence[int]) -> None:
        """Cut both shapes into the smallest runs of equal product.

        Within a run both are the row-major digits of one flat index.
        """
        sizes = self.axes.sizes
        self.written(node, [*before, *after])
        left = [axis for axis in before if sizes[axis] != 1]
        right = [axis for axis in after if sizes[axis] != 1]
        if any(sizes[axis] == 0 for axis in (*left, *right)):
            self.freeze((*left, *right), "empty tensor")
            return
        i = j = 0
        while i < len(left) and j < len(right):
            first, second = [left[i]], [right[j]]
            a, b = sizes[left[i]], sizes[right[j]]
            i, j = i + 1, j + 1
            while a != b:
                if a < b:
                    first.append(left[i])
                    a *= sizes[left[i]]
                    i += 1
                else:
                    second.append(right[j])
                    b *= sizes[right[j]]
                    j += 1
            if len(first) == len(second) == 1:
                self.axes.join(first[0], second[0])
                continue
            flat = first[0] if len(first) == 1 else second[0] if len(second) == 1 else self.axes.new(a)
            for run in (first, second):
                if len(run) > 1:
                    self.axes.constraints.append(Grid(flat, tuple(run), tuple(sizes[axis] for axis in run)))

    def grid(self, flat: int, factors: Sequence[int]) -> None:
        self.axes.constraints.append(Grid(flat, tuple(factors), tuple(self.axes.sizes[axis] for axis in factors)))

    def written(self, node: fx.Node, axes: Sequence[int]) -> None:
        """Sizes of these axes may stand in the model's code: try, and keep whole where that fails."""
        self.analysis.written_sizes.append((scope(node), [axis for axis in axes if self.axes.sizes[axis] > 1]))

    def parts(self, node: fx.Node, source: int, sizes: Sequence[int], results: Sequence[int], equal: bool) -> None:
        """Cut one axis into consecutive parts."""
        start = 0
        pieces = []
        for size, result in zip(sizes, results, strict=True):
            index = np.arange(start, start + size)
            self.map(source, index, result, np.arange(size))
            pieces.append(index)
            start += size
        if equal and len(set(sizes)) == 1:
            self.axes.constraints.append(EqualCounts(source, tuple(pieces)))
        elif equal:
            self.freeze([source], "parts of unequal size")


def _norm(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["input"]), builder.values[node][0]
    builder.join_all(axes, out)
    depth = len(given["normalized_shape"])
    builder.freeze(axes[-depth:], "normalised over")
    for key in ("weight", "bias"):
        if isinstance(given.get(key), fx.Node):
            builder.join_aligned(builder.of(given[key]), axes)


def _batch_norm(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes = builder.of(given["input"])
    builder.join_all(axes, builder.values[node][0])
    for key in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(given.get(key), fx.Node):
            builder.axes.join(builder.of(given[key])[0], axes[1])
    if operator_name(node) == "instance_norm":
        builder.freeze(axes[2:], "spatial")


def _group_norm(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes = builder.of(given["input"])
    builder.join_all(axes, builder.values[node][0])
    builder.freeze(axes[2:], "normalised over")
    groups = given["num_groups"]
    channels = builder.axes.sizes[axes[1]]
    group_axis = builder.axes.new(groups)
    inner = builder.axes.new(channels // groups)
    builder.axes.freeze(inner, None, "normalised over")
    builder.grid(axes[1], (group_axis, inner))
    for key in ("weight", "bias"):
        if isinstance(given.get(key), fx.Node):
            builder.axes.join(builder.of(given[key])[0], axes[1])
            name = builder.analysis.program.state.get(given[key])
            if key == "weight" and name is not None:
                builder.analysis.norms.append((name, group_axis))


def _state_name(builder: _Builder, argument: Any) -> str | None:
    name = builder.analysis.program.state.get(argument) if isinstance(argument, fx.Node) else None
    return name if name in builder.analysis.program.aliases else None


def _linear(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    source, weight, bias = given["input"], given["weight"], given.get("bias")
    x, w, out = builder.of(source), builder.of(weight), builder.of(node)
    if len(w) != 2:
        builder.unknown(node, node.all_input_nodes)
        return
    builder.axes.join(x[-1], w[1])
    builder.axes.join(out[-1], w[0])
    builder.join_all(x[:-1], out[:-1])
    if bias is not None:
        builder.axes.join(builder.of(bias)[0], w[0])
    bias_name = _state_name(builder, bias)
    builder.analysis.contractions.append(
        Contraction(
            node,
            _state_name(builder, weight),
            bias_name,
            bias is not None and bias_name is None,
            source,
            len(x) - 1,
            x[-1],
            out[-1],
        )
    )


def _convolution(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    source, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given["groups"]
    x, w, out = builder.of(source), builder.of(weight), builder.of(node)
    if len(x) != len(w):  # without a batch dimension
        builder.unknown(node, node.all_input_nodes)
        return
    transposed = "transpose" in operator_name(node) or bool(given.get("transposed", False))
    builder.axes.join(x[0], out[0])
    builder.freeze((*x[2:], *out[2:], *w[2:]), "spatial")
    bias_name = _state_name(builder, bias)
    contraction = Contraction(
        node,
        _state_name(builder, weight),
        bias_name,
        bias is not None and bias_name is None,
        source,
        1,
        x[1],
        out[1],
        groups,
        transposed=transposed,
    )
    stored_in, stored_out = (w[0], w[1]) if transposed else (w[1], w[0])
    if groups == 1:
        builder.axes.join(x[1], stored_in)
        builder.axes.join(out[1], stored_out)
    else:
        sizes = builder.axes.sizes
        if sizes[x[1]] == groups == sizes[out[1]]:  # depthwise: a channel is a group
            builder.axes.join(x[1], out[1])
            builder.axes.join(x[1], w[0])
            contraction.group_axis = x[1]
            contraction.inputs_per_group = stored_in if not transposed else builder.axes.new(1)
        else:
            group_axis = builder.axes.new(groups)
            per_in, per_out = builder.axes.new(sizes[x[1]] // groups), builder.axes.new(sizes[out[1]] // groups)
            builder.grid(x[1], (group_axis, per_in))
            builder.grid(out[1], (group_axis, per_out))
            if transposed:  # stored (K, M/groups)
                builder.axes.join(w[0], x[1])
                builder.axes.join(w[1], per_out)
            else:
                builder.axes.join(w[0], out[1])
                builder.axes.join(w[1], per_in)
            contraction.group_axis, contraction.inputs_per_group, contraction.outputs_per_group = (
                group_axis,
                per_in,
                per_out,
            )
    if bias is not None:
        builder.axes.join(builder.of(bias)[0], out[1])
    builder.analysis.contractions.append(contraction)


def _matmul(builder: _Builder, node: fx.Node) -> None:
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)][-2:]
    first, second = tensors
    a, b, out = builder.of(first), builder.of(second), builder.of(node)
    if len(a) < 2 or len(b) < 2:
        builder.unknown(node, node.all_input_nodes)
        return
    builder.axes.join(a[-1], b[-2])
    builder.axes.join(out[-2], a[-2])
    builder.axes.join(out[-1], b[-1])
    builder.join_aligned(a[:-2], out[:-2])
    builder.join_aligned(b[:-2], out[:-2])
    builder.analysis.attention.update(out[:-2])
    builder.analysis.products.append(Product(node, first, len(a) - 1, second, len(b) - 2, a[-1]))
    if operator_name(node) in ("addmm", "baddbmm"):
        builder.join_aligned(builder.of(node.args[0]), out)


def _attention(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    q, k, v, out = (builder.of(given["query"]), builder.of(given["key"]), builder.of(given["value"]), builder.of(node))
    builder.freeze((q[-1], k[-1]), "query-key product")
    builder.axes.join(q[-1], k[-1])
    builder.axes.join(v[-1], out[-1])
    builder.axes.join(q[-2], out[-2])
    builder.axes.join(k[-2], v[-2])
    builder.freeze((k[-2],), "softmax")
    builder.join_aligned(q[:-2], out[:-2])
    builder.analysis.attention.update(out[:-2])
    for other in (k, v):
        for mine, theirs in zip(reversed(other[:-2]), reversed(out[:-2]), strict=False):
            few, many = builder.axes.sizes[mine], builder.axes.sizes[theirs]
            if few == many:
                builder.axes.join(mine, theirs)
            elif few > 1 and many % few == 0:  # grouped queries: head h reads key head h // repeat
                repeat = builder.axes.new(many // few)
                builder.axes.freeze(repeat, None, "queries per key head")
                builder.grid(theirs, (mine, repeat))
    mask = given.get("attn_mask")
    if isinstance(mask, fx.Node):
        m = builder.of(mask)
        builder.freeze(m[-2:], "mask")
        builder.join_aligned(m[:-2], out[:-2])


def _embedding(builder: _Builder, node: fx.Node) -> None:
    weight, index = node.args[0], node.args[1]
    w, out = builder.of(weight), builder.of(node)
    builder.axes.join(w[1], out[-1])
    builder.freeze([w[0]], "looked up")
    builder.join_all(builder.of(index), out[:-1])


def _cat(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    tensors, dim = list(given["tensors"]), given.get("dim", 0)
    out = builder.of(node)
    dim %= len(out)
    start = 0
    for tensor in tensors:
        axes = builder.of(tensor)
        if len(axes) != len(out):  # torch accepts legacy empty tensors here
            continue
        for position, axis in enumerate(axes):
            if position != dim:
                builder.axes.join(axis, out[position])
        size = builder.axes.sizes[axes[dim]]
        builder.map(out[dim], np.arange(start, start + size), axes[dim], np.arange(size))
        start += size


def _stack(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    out = builder.of(node)
    dim = given.get("dim", 0) % len(out)
    builder.freeze([out[dim]], "stacked")
    rest = [axis for position, axis in enumerate(out) if position != dim]
    for tensor in given["tensors"]:
        builder.join_all(builder.of(tensor), rest)


def _split(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    source = given.get("self", given.get("input"))
    axes = builder.of(source)
    dim = given.get("dim", 0) % len(axes)
    results = builder.values[node]
    for result in results:
        for position, axis in enumerate(result):
            if position != dim:
                builder.axes.join(axis, axes[position])
    sizes = [builder.axes.sizes[result[dim]] for result in results]
    builder.parts(
        node,
        axes[dim],
        sizes,
        [result[dim] for result in results],
        operator_name(node) in ("chunk", "split", "tensor_split"),
    )
    builder.written(node, [axes[dim]])


def _unbind(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes = builder.of(given["self"])
    dim = (given.get("dim", 0) or 0) % len(axes)
    builder.freeze([axes[dim]], "unbound")
    rest = [axis for position, axis in enumerate(axes) if position != dim]
    for result in builder.values[node]:
        builder.join_all(result, rest)


def _select(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes = builder.of(given["self"])
    dim = given["dim"] % len(axes)
    builder.freeze([axes[dim]], "selected from")
    builder.join_all([axis for position, axis in enumerate(axes) if position != dim], builder.of(node))


def _slice(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["self"]), builder.of(node)
    dim = given.get("dim", 0) % len(axes)
    size = builder.axes.sizes[axes[dim]]
    for position in range(len(axes)):
        if position != dim:
            builder.axes.join(axes[position], out[position])
    if operator_name(node) == "narrow":
        chosen = np.arange(size)[given["start"] : given["start"] + given["length"]]
    else:
        chosen = np.arange(size)[given.get("start") : given.get("end") : given.get("step", 1)]
    if len(chosen) == size:
        builder.axes.join(axes[dim], out[dim])
        return
    builder.map(axes[dim], chosen, out[dim], np.arange(len(chosen)))
    builder.written(node, [axes[dim]])


def _permute(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(node.args[0]), builder.of(node)
    rank = len(axes)
    name = operator_name(node)
    order = list(range(rank))
    if name == "permute":
        order = [d % rank for d in given["dims"]]
    elif name in ("transpose", "swapaxes"):
        a, b = (given.get("dim0", given.get("axis0")) % rank, given.get("dim1", given.get("axis1")) % rank)
        order[a], order[b] = order[b], order[a]
    elif name in ("mT", "adjoint"):
        order[-1], order[-2] = order[-2], order[-1]
    elif name == "movedim":
        source, target = given["source"], given["destination"]
        source = [d % rank for d in (source if isinstance(source, list | tuple) else [source])]
        target = [d % rank for d in (target if isinstance(target, list | tuple) else [target])]
        rest = [d for d in range(rank) if d not in source]
        slots = dict(zip(target, source, strict=True))
        order = [slots[d] if d in slots else rest.pop(0) for d in range(rank)]
    else:  # t, numpy_T
        order.reverse()
    builder.join_all([axes[d] for d in order], out)


def _expand(builder: _Builder, node: fx.Node) -> None:
    axes, out = builder.of(node.args[0]), builder.of(node)
    lead = len(out) - len(axes)
    builder.freeze(out[:lead], "expanded")
    for axis, result in zip(axes, out[lead:], strict=True):
        if builder.axes.sizes[axis] == builder.axes.sizes[result]:
            builder.axes.join(axis, result)
        else:
            builder.axes.freeze(result, None, "expanded")


def _pad(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["self"]), builder.of(node)
    pad = list(given["pad"])
    zero_padding = given.get("mode", "constant") == "constant"
    for position, (axis, result) in enumerate(zip(axes, out, strict=True)):
        slot = len(axes) - 1 - position
        before, after = (pad[2 * slot], pad[2 * slot + 1]) if 2 * slot + 1 < len(pad) else (0, 0)
        if before == after == 0:
            builder.axes.join(axis, result)
            continue
        if not zero_padding:
            builder.freeze((axis, result), "padded")
            continue
        size, total = builder.axes.sizes[axis], builder.axes.sizes[result]
        taken = np.arange(max(0, -before), size - max(0, -after))
        placed = taken + before
        builder.map(axis, taken, result, placed)
        # how many are added or cut off stands in the model's code
        builder.axes.freeze(result, np.setdiff1d(np.arange(total), placed), "padding")
        builder.axes.freeze(axis, np.setdiff1d(np.arange(size), taken), "cut off")


def _repeat_interleave(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    source, repeats, dim = given.get("self"), given.get("repeats"), given.get("dim")
    if not isinstance(repeats, int) or dim is None or not isinstance(source, fx.Node):
        builder.unknown(node, node.all_input_nodes)
        return
    axes, out = builder.of(source), builder.of(node)
    dim %= len(axes)
    for position in range(len(axes)):
        if position != dim:
            builder.axes.join(axes[position], out[position])
    inner = builder.axes.new(repeats)
    builder.axes.freeze(inner, None, "repeats")
    builder.grid(out[dim], (axes[dim], inner))


def _repeat(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["self"]), builder.of(node)
    lead = len(out) - len(axes)
    builder.freeze(out[:lead], "repeated")
    for axis, result, times in zip(axes, out[lead:], given["repeats"][lead:], strict=True):
        if times == 1:
            builder.axes.join(axis, result)
        else:
            outer = builder.axes.new(times)
            builder.axes.freeze(outer, None, "repeats")
            builder.grid(result, (outer, axis))


def _pixel_shuffle(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    up = operator_name(node) == "pixel_shuffle"
    factor = given["upscale_factor" if up else "downscale_factor"]
    axes, out = builder.of(given["self"]), builder.of(node)
    for a, b in zip(axes[:-3], out[:-3], strict=True):
        builder.axes.join(a, b)
    builder.freeze((*axes[-2:], *out[-2:]), "spatial")
    taps = builder.axes.new(factor * factor)
    builder.axes.freeze(taps, None, "taps")
    few, many = (out[-3], axes[-3]) if up else (axes[-3], out[-3])
    builder.grid(many, (few, taps))


def _channel_shuffle(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["self"]), builder.of(node)
    for position in range(len(axes)):
        if position != 1:
            builder.axes.join(axes[position], out[position])
    groups = given["groups"]
    outer, inner = builder.axes.new(groups), builder.axes.new(builder.axes.sizes[axes[1]] // groups)
    builder.axes.freeze(outer, None, "groups of a shuffle")
    builder.grid(axes[1], (outer, inner))
    builder.grid(out[1], (inner, outer))


def _glu(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["self"]), builder.of(node)
    dim = given.get("dim", -1) % len(axes)
    for position in range(len(axes)):
        if position != dim:
            builder.axes.join(axes[position], out[position])
    half = builder.axes.sizes[out[dim]]
    for start in (0, half):
        builder.map(axes[dim], np.arange(start, start + half), out[dim], np.arange(half))


def _im2col(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["self"]), builder.of(node)
    if len(axes) != 4:
        builder.unknown(node, node.all_input_nodes)
        return
    builder.axes.join(axes[0], out[0])
    builder.freeze((*axes[2:], out[2]), "spatial")
    taps = builder.axes.new(math.prod(given["kernel_size"]))
    builder.axes.freeze(taps, None, "taps")
    builder.grid(out[1], (axes[1], taps))


def _index(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    source = given["self"]
    axes, out = builder.of(source), builder.of(node)
    if operator_name(node) == "index_select":
        dim = given["dim"] % len(axes)
        builder.freeze((axes[dim], out[dim]), "indexed")
        builder.join_all([a for d, a in enumerate(axes) if d != dim], [a for d, a in enumerate(out) if d != dim])
        return
    indices = list(given["indices"])
    used = [position for position, index in enumerate(indices) if index is not None]
    builder.freeze([axes[position] for position in used], "indexed")
    for position in used:
        builder.freeze_node(indices[position], "index")
    consecutive = used == list(range(used[0], used[-1] + 1))
    free = [axis for position, axis in enumerate(axes) if position not in used]
    added = len(out) - len(free)
    start = used[0] if consecutive else 0
    builder.freeze(out[start : start + added], "indexed")
    builder.join_all(free, [*out[:start], *out[start + added :]])


def _grid_sample(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    axes, out = builder.of(given["input"]), builder.of(node)
    builder.freeze_node(given["grid"], "sampling grid")
    builder.axes.join(axes[0], out[0])
    builder.axes.join(axes[1], out[1])
    builder.freeze((*axes[2:], *out[2:]), "spatial")


def _getattr_shape(builder: _Builder, node: fx.Node) -> None:
    """Operators that read nothing but sizes."""
    builder.freeze_node(node, "made by the model's code")


def _einsum(builder: _Builder, node: fx.Node) -> None:
    given = arguments(node)
    equation, tensors = given["equation"].replace(" ", ""), list(given["tensors"])
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or len(terms) != len(tensors):
        builder.unknown(node, node.all_input_nodes)
        return
    owners: dict[str, int] = dict(zip(right, builder.of(node), strict=True))
    for term, tensor in zip(terms, tensors, strict=True):
        for letter, axis in zip(term, builder.of(tensor), strict=True):
            if letter in owners and builder.axes.sizes[owners[letter]] == builder.axes.sizes[axis]:
                builder.axes.join(owners[letter], axis)
            owners.setdefault(letter, axis)
            if letter not in right:
                builder.axes.freeze(axis, None, "summed over")


_RULES: dict[str, Callable[[_Builder, fx.Node], None]] = {
    "linear": _linear,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _matmul,
    "baddbmm": _matmul,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "instance_norm": _batch_norm,
    "layer_norm": _norm,
    "native_layer_norm": _norm,
    "rms_norm": _norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
    "cat": _cat,
    "concat": _cat,
    "concatenate": _cat,
    "stack": _stack,
    "split": _split,
    "chunk": _split,
    "tensor_split": _split,
    "split_with_sizes": _split,
    "unbind": _unbind,
    "select": _select,
    "slice": _slice,
    "narrow": _slice,
    **dict.fromkeys(("permute", "transpose", "swapaxes", "t", "numpy_T", "mT", "adjoint", "movedim"), _permute),
    "expand": _expand,
    "expand_as": _expand,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_shuffle,
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "glu": _glu,
    "im2col": _im2col,
    "index": _index,
    "index_select": _index,
    "grid_sampler": _grid_sample,
    "grid_sampler_2d": _grid_sample,
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _getattr_shape),
}
