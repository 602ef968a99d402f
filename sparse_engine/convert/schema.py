"""The rules of every op: which inputs, parameters and attributes it takes, and the shape of what it returns.

``infer`` is used in two ways: to build nodes (capture and the passes ask it for the output's shape) and to check them
(a graph from a file must declare exactly the shapes that follow from its inputs). It is total: whatever the attributes
hold, the answer is a shape or a GraphError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparse_engine.convert.graph import (
    DTYPE_NAMES,
    FLOATING,
    MAX_RANK,
    MAX_SIZE,
    Dim,
    Graph,
    GraphError,
    Node,
    Shape,
    Size,
    Value,
    add_sizes,
    format_shape,
    is_int,
    numel,
    shape_from_json,
)

ACTIVATIONS: dict[str, frozenset[str]] = {
    "relu": frozenset(),
    "clamp": frozenset({"min", "max"}),
    "leaky_relu": frozenset({"slope"}),
    **dict.fromkeys(
        (
            "gelu",
            "gelu_tanh",
            "silu",
            "hardswish",
            "hardsigmoid",
            "sigmoid",
            "tanh",
            "elu",
            "softplus",
            "exp",
            "sqrt",
            "rsqrt",
            "neg",
            "abs",
            "reciprocal",
            "square",
            "log",
            "erf",
        ),
        frozenset(),
    ),
}
BINARY_KINDS = frozenset({"add", "sub", "mul", "div", "maximum", "minimum", "pow"})
REDUCE_KINDS = frozenset({"mean", "sum", "amax", "amin"})


@dataclass(frozen=True)
class Request:
    """What `infer` looks at: one node's inputs, parameters and attributes, already resolved."""

    op: str
    inputs: Sequence[Value]
    params: Mapping[str, Tensor]
    attrs: Mapping[str, Any]


def infer(op: str, inputs: Sequence[Value], params: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> Value:
    """The value that an op returns.

    >>> infer("linear", [Value((Dim(1), 8))], {"weight": torch.zeros(4, 8)}, {"activation": None})
    Value(shape=(Dim(batch=1, plus=0), 4), dtype='float32')

    Raises:
        GraphError: unknown op, missing or unknown attributes, shapes that do not fit; with the numbers.
    """
    rule = RULES.get(op)
    if rule is None:
        raise GraphError(f"unknown op '{op}'; known are {', '.join(sorted((*RULES, 'fallback')))}")
    if not rule.inputs[0] <= len(inputs) <= rule.inputs[1]:
        raise GraphError(f"{op} takes {rule.inputs[0]} to {rule.inputs[1]} inputs, got {len(inputs)}")
    missing = rule.required - params.keys()
    extra = params.keys() - rule.required - rule.optional
    if missing or extra:
        raise GraphError(f"{op}: missing parameters {sorted(missing)}, unknown parameters {sorted(extra)}")
    if attrs.keys() != rule.attrs:
        raise GraphError(
            f"{op}: missing attributes {sorted(rule.attrs - attrs.keys())}, unknown attributes "
            f"{sorted(attrs.keys() - rule.attrs)}"
        )
    if op != "constant":
        dtypes = {value.dtype for value in inputs} | {DTYPE_NAMES.get(tensor.dtype, "?") for tensor in params.values()}
        if len(dtypes) != 1 or not dtypes <= FLOATING:
            raise GraphError(
                f"{op}: inputs and parameters must share one floating dtype, got {', '.join(sorted(dtypes))}"
            )
    if "activation" in attrs and (attrs["activation"] is not None or op == "unary"):
        check_activation(attrs["activation"], op)
    shape = rule.shape(Request(op, inputs, params, attrs))
    dtype = DTYPE_NAMES[params["value"].dtype] if op == "constant" else inputs[0].dtype
    return Value(shape, dtype)


def check_node(graph: Graph, node: Node) -> None:
    """Check one node of a graph against the rules; raises GraphError with the node's name in it."""
    try:
        if node.op == "fallback":
            from sparse_engine.convert.fallback import check_fallback

            check_fallback(graph, node)
            return
        if len(node.outputs) != 1:
            raise GraphError(f"{node.op} has one output, not {len(node.outputs)}")
        inputs = [graph.values[name] for name in node.inputs]
        params = {role: graph.constants[name] for role, name in node.params.items()}
        found = infer(node.op, inputs, params, node.attrs)
    except GraphError as error:
        raise GraphError(f"node '{node.name}': {error}") from None
    declared = graph.values[node.output]
    if found != declared:
        raise GraphError(
            f"node '{node.name}' ({node.op}) returns {found}, but '{node.output}' is declared as {declared}"
        )


def check_activation(data: Any, where: str) -> None:
    """Refuse what is not an activation: ``{"kind": "relu"}``, ``{"kind": "clamp", "min": 0, "max": 6}``, …"""
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str) or data["kind"] not in ACTIVATIONS:
        raise GraphError(
            f"{where}: an activation is null or {{'kind': one of {', '.join(ACTIVATIONS)}}}, not {data!r:.80}"
        )
    expected = ACTIVATIONS[data["kind"]] | {"kind"}
    if data.keys() != expected:
        raise GraphError(
            f"{where}: the activation {data['kind']} takes exactly {sorted(expected)}, got {sorted(data)!r:.80}"
        )
    for key in expected - {"kind"}:
        if data[key] is None and data["kind"] == "clamp":
            continue
        number(data[key], f"{where}: {key} of {data['kind']}")


# ---- shapes, op by op


def _conv2d(request: Request) -> Shape:
    batch, channels, height, width = _rank(request.inputs[0], 4, "conv2d's input")
    weight = request.params["weight"]
    if weight.dim() != 4:
        raise GraphError(f"conv2d: the weight has {weight.dim()} dimensions instead of 4")
    attrs = request.attrs
    stride, dilation = _ints(attrs, "stride", 2, 1), _ints(attrs, "dilation", 2, 1)
    padding = _ints(attrs, "padding", 4, 0)
    groups = attrs["groups"]
    outputs, per_group, *kernel = weight.shape
    if not is_int(groups) or groups < 1 or outputs % groups or channels != per_group * groups:
        raise GraphError(
            f"conv2d: {channels} input channels, a weight of shape {tuple(weight.shape)} and groups = "
            f"{groups!r:.20} do not fit"
        )
    _one_dimensional(request.params.get("bias"), outputs, "conv2d: the bias")
    out_height = _window(height, kernel[0], stride[0], padding[0] + padding[2], dilation[0], False, padding[0])
    out_width = _window(width, kernel[1], stride[1], padding[1] + padding[3], dilation[1], False, padding[1])
    return _with_residual(request, (batch, outputs, out_height, out_width))


def _linear(request: Request) -> Shape:
    shape = request.inputs[0].shape
    weight = request.params["weight"]
    if weight.dim() != 2 or not shape or shape[-1] != weight.shape[1]:
        raise GraphError(
            f"linear: an input of shape {format_shape(shape)} and a weight of shape {tuple(weight.shape)} do not fit"
        )
    _one_dimensional(request.params.get("bias"), weight.shape[0], "linear: the bias")
    return _with_residual(request, (*shape[:-1], weight.shape[0]))


def _matmul(request: Request) -> Shape:
    a, b = (value.shape for value in request.inputs)
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise GraphError(f"matmul: shapes {format_shape(a)} and {format_shape(b)} do not fit")
    return (*broadcast(a[:-2], b[:-2]), a[-2], b[-1])


def _attention(request: Request) -> Shape:
    query, key, value = (item.shape for item in request.inputs[:3])
    number(request.attrs["scale"], "attention: scale")
    _bool(request.attrs, "causal")
    if min(len(query), len(key), len(value)) < 2 or query[-1] != key[-1] or key[-2] != value[-2]:
        raise GraphError(
            f"attention: q {format_shape(query)}, k {format_shape(key)} and v {format_shape(value)} do not fit"
        )
    leading = broadcast(broadcast(query[:-2], key[:-2]), value[:-2])
    if len(request.inputs) == 4:
        scores = (*leading, query[-2], key[-2])
        mask = request.inputs[3].shape
        if broadcast(mask, scores) != scores:
            raise GraphError(
                f"attention: the mask {format_shape(mask)} does not broadcast to the scores {format_shape(scores)}"
            )
    return (*leading, query[-2], value[-1])


def _affine(request: Request) -> Shape:
    shape = request.inputs[0].shape
    axis = _axis(request.attrs["axis"], shape, "affine: axis")
    for role in ("scale", "shift"):
        _one_dimensional(request.params[role], shape[axis], f"affine: the {role}")
    return shape


def _unary(request: Request) -> Shape:
    return request.inputs[0].shape


def _binary(request: Request) -> Shape:
    _one_of(request.attrs, "kind", BINARY_KINDS)
    return broadcast(request.inputs[0].shape, request.inputs[1].shape)


def _scalar(request: Request) -> Shape:
    _one_of(request.attrs, "kind", BINARY_KINDS)
    number(request.attrs["value"], "scalar: value")
    _bool(request.attrs, "reverse")
    return request.inputs[0].shape


def _pool(request: Request) -> Shape:
    op, attrs = request.op, request.attrs
    batch, channels, height, width = _rank(request.inputs[0], 4, f"{op}'s input")
    kernel, stride, dilation = (
        _ints(attrs, "kernel", 2, 1),
        _ints(attrs, "stride", 2, 1),
        _ints(attrs, "dilation", 2, 1),
    )
    padding = _ints(attrs, "padding", 4, 0)
    _bool(attrs, "ceil_mode")
    _bool(attrs, "count_include_pad")
    if attrs["divisor"] is not None and (not is_int(attrs["divisor"]) or attrs["divisor"] == 0):
        raise GraphError(f"{op}: divisor must be null or a non-zero int, not {attrs['divisor']!r:.40}")
    if op == "avg_pool2d" and dilation != [1, 1]:
        raise GraphError(f"avg_pool2d has no dilation, got {dilation}")
    for axis in range(2):
        if (
            padding[axis] > kernel[axis] // 2
            or padding[axis + 2] > kernel[axis] // 2
            or padding[axis] != padding[axis + 2]
        ):
            raise GraphError(f"{op}: padding {padding} must be symmetric and at most half of the kernel {kernel}")
    ceil_mode = attrs["ceil_mode"]
    out_height = _window(height, kernel[0], stride[0], padding[0] + padding[2], dilation[0], ceil_mode, padding[0])
    out_width = _window(width, kernel[1], stride[1], padding[1] + padding[3], dilation[1], ceil_mode, padding[1])
    return (batch, channels, out_height, out_width)


def _adaptive(request: Request) -> Shape:
    batch, channels, height, width = _rank(request.inputs[0], 4, "adaptive_avg_pool2d's input")
    _static(height, "adaptive_avg_pool2d: the height")
    _static(width, "adaptive_avg_pool2d: the width")
    output = _ints(request.attrs, "output_size", 2, 1)
    if height == 0 or width == 0:
        raise GraphError("adaptive_avg_pool2d: the input is empty")
    return (batch, channels, *output)


def _reduce(request: Request) -> Shape:
    shape, attrs = request.inputs[0].shape, request.attrs
    _one_of(attrs, "kind", REDUCE_KINDS)
    _bool(attrs, "keepdim")
    dims = _axes(attrs["dims"], shape, "reduce: dims")
    if attrs["kind"] in ("amax", "amin") and any(shape[dim] == 0 for dim in dims):
        raise GraphError(f"reduce: {attrs['kind']} over an empty dimension of {format_shape(shape)}")
    if attrs["keepdim"]:
        return tuple(1 if index in dims else size for index, size in enumerate(shape))
    return tuple(size for index, size in enumerate(shape) if index not in dims)


def _softmax(request: Request) -> Shape:
    shape = request.inputs[0].shape
    _axis(request.attrs["dim"], shape, "softmax: dim")
    return shape


def _layer_norm(request: Request) -> Shape:
    shape, count = request.inputs[0].shape, request.attrs["dims"]
    number(request.attrs["eps"], "layer_norm: eps")
    if not is_int(count) or not 1 <= count <= len(shape):
        raise GraphError(f"layer_norm: dims must be between 1 and {len(shape)}, not {count!r:.40}")
    for role in request.params:
        if tuple(request.params[role].shape) != shape[-count:]:
            raise GraphError(
                f"layer_norm: the {role} of shape {tuple(request.params[role].shape)} does not fit "
                f"{format_shape(shape)}"
            )
    return shape


def _group_norm(request: Request) -> Shape:
    shape, groups = request.inputs[0].shape, request.attrs["groups"]
    number(request.attrs["eps"], "group_norm: eps")
    if len(shape) < 2:
        raise GraphError(f"group_norm: the input needs at least 2 dimensions, has {format_shape(shape)}")
    channels = _static(shape[1], "group_norm: channels")
    if not is_int(groups) or groups < 1 or channels % groups:
        raise GraphError(f"group_norm: {channels} channels in {groups!r:.40} groups")
    for role in request.params:
        _one_dimensional(request.params[role], channels, f"group_norm: the {role}")
    return shape


def _concat(request: Request) -> Shape:
    first = request.inputs[0].shape
    dim = _axis(request.attrs["dim"], first, "concat: dim")
    total: Size = 0
    for value in request.inputs:
        shape = value.shape
        if len(shape) != len(first) or any(
            a != b for i, (a, b) in enumerate(zip(first, shape, strict=True)) if i != dim
        ):
            raise GraphError(
                f"concat: shapes {format_shape(first)} and {format_shape(shape)} do not fit along dimension {dim}"
            )
        total = add_sizes(total, shape[dim])
    return (*first[:dim], total, *first[dim + 1 :])


def _slice(request: Request) -> Shape:
    shape, attrs = request.inputs[0].shape, request.attrs
    dim = _axis(attrs["dim"], shape, "slice: dim")
    size = _static(shape[dim], "slice: the sliced dimension")
    start, stop, step = attrs["start"], attrs["stop"], attrs["step"]
    if not (is_int(start) and is_int(stop) and is_int(step) and 0 <= start <= stop <= size and step >= 1):
        raise GraphError(f"slice: {start!r:.40}:{stop!r:.40}:{step!r:.40} is not within a dimension of size {size}")
    return (*shape[:dim], -(-(stop - start) // step), *shape[dim + 1 :])


def _reshape(request: Request) -> Shape:
    shape = shape_from_json(request.attrs["shape"], "reshape: shape")
    if numel(shape) != numel(request.inputs[0].shape):
        raise GraphError(
            f"reshape: {format_shape(request.inputs[0].shape)} has not as many elements as {format_shape(shape)}"
        )
    return shape


def _permute(request: Request) -> Shape:
    shape, dims = request.inputs[0].shape, request.attrs["dims"]
    if not isinstance(dims, list) or not all(is_int(dim) for dim in dims) or sorted(dims) != list(range(len(shape))):
        raise GraphError(f"permute: dims {dims!r:.80} is not an order of the {len(shape)} dimensions")
    return tuple(shape[dim] for dim in dims)


def _expand(request: Request) -> Shape:
    shape = shape_from_json(request.attrs["shape"], "expand: shape")
    if broadcast(request.inputs[0].shape, shape) != shape:
        raise GraphError(f"expand: {format_shape(request.inputs[0].shape)} does not expand to {format_shape(shape)}")
    return shape


def _pad(request: Request) -> Shape:
    shape, pad = request.inputs[0].shape, request.attrs["pad"]
    number(request.attrs["value"], "pad: value")
    if (
        not isinstance(pad, list)
        or len(pad) % 2
        or len(pad) > 2 * len(shape)
        or not all(is_int(p) and 0 <= p <= MAX_SIZE for p in pad)
    ):
        raise GraphError(f"pad: {pad!r:.80} is not an even number (at most {2 * len(shape)}) of non-negative ints")
    result = list(shape)
    for pair in range(len(pad) // 2):
        index = len(shape) - 1 - pair
        result[index] = add_sizes(result[index], pad[2 * pair] + pad[2 * pair + 1])
    return tuple(result)


def _constant(request: Request) -> Shape:
    return tuple(request.params["value"].shape)


@dataclass(frozen=True)
class Rule:
    """What an op takes (inputs, parameters, attributes), and the function that checks them and gives the shape."""

    shape: Callable[[Request], Shape]
    inputs: tuple[int, int]
    attrs: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_POOL = frozenset({"kernel", "stride", "padding", "dilation", "ceil_mode", "count_include_pad", "divisor"})
_WEIGHT, _BIAS = frozenset({"weight"}), frozenset({"bias"})
RULES: dict[str, Rule] = {
    "conv2d": Rule(
        _conv2d, (1, 2), frozenset({"stride", "padding", "dilation", "groups", "activation"}), _WEIGHT, _BIAS
    ),
    "linear": Rule(_linear, (1, 2), frozenset({"activation"}), _WEIGHT, _BIAS),
    "matmul": Rule(_matmul, (2, 2)),
    "attention": Rule(_attention, (3, 4), frozenset({"scale", "causal"})),
    "affine": Rule(_affine, (1, 1), frozenset({"axis", "activation"}), frozenset({"scale", "shift"})),
    "unary": Rule(_unary, (1, 1), frozenset({"activation"})),
    "binary": Rule(_binary, (2, 2), frozenset({"kind", "activation"})),
    "scalar": Rule(_scalar, (1, 1), frozenset({"kind", "value", "reverse"})),
    "max_pool2d": Rule(_pool, (1, 1), _POOL),
    "avg_pool2d": Rule(_pool, (1, 1), _POOL),
    "adaptive_avg_pool2d": Rule(_adaptive, (1, 1), frozenset({"output_size"})),
    "reduce": Rule(_reduce, (1, 1), frozenset({"kind", "dims", "keepdim"})),
    "softmax": Rule(_softmax, (1, 1), frozenset({"dim"})),
    "layer_norm": Rule(_layer_norm, (1, 1), frozenset({"dims", "eps"}), frozenset(), _WEIGHT | _BIAS),
    "group_norm": Rule(_group_norm, (1, 1), frozenset({"groups", "eps"}), frozenset(), _WEIGHT | _BIAS),
    "concat": Rule(_concat, (1, 10_000), frozenset({"dim"})),
    "slice": Rule(_slice, (1, 1), frozenset({"dim", "start", "stop", "step"})),
    "reshape": Rule(_reshape, (1, 1), frozenset({"shape"})),
    "permute": Rule(_permute, (1, 1), frozenset({"dims"})),
    "expand": Rule(_expand, (1, 1), frozenset({"shape"})),
    "pad": Rule(_pad, (1, 1), frozenset({"pad", "value"})),
    "constant": Rule(_constant, (0, 0), frozenset(), frozenset({"value"})),
}


# ---- helpers


def broadcast(a: Shape, b: Shape) -> Shape:
    """PyTorch's broadcasting, for shapes that may depend on the batch size; raises GraphError where it doesn't fit."""
    result: list[Size] = []
    rank = max(len(a), len(b))
    for left, right in zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True):
        if left == right or right == 1:
            result.append(left)
        elif left == 1:
            result.append(right)
        else:
            raise GraphError(f"shapes {format_shape(a)} and {format_shape(b)} do not broadcast")
    return tuple(result)


def number(data: Any, where: str) -> float:
    """A finite number, not a bool."""
    if isinstance(data, bool) or not isinstance(data, (int, float)) or not math.isfinite(data) or abs(data) > 1e300:
        raise GraphError(f"{where} must be a finite number, not {data!r:.40}")
    return data


def _window(size: Size, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, before: int) -> int:
    size = _static(size, "a spatial dimension of a window op")
    extent = dilation * (kernel - 1) + 1
    count = (size + padding - extent + (stride - 1 if ceil_mode else 0)) // stride + 1
    # PyTorch drops a last window that would start in the padding behind the input.
    if ceil_mode and (count - 1) * stride >= size + before:
        count -= 1
    if kernel < 1 or count < 1:
        raise GraphError(f"a window of {extent} does not fit a dimension of {size} + {padding} padding")
    return count


def _with_residual(request: Request, shape: Shape) -> Shape:
    if len(request.inputs) == 2 and request.inputs[1].shape != shape:
        raise GraphError(
            f"{request.op}: the residual has shape {format_shape(request.inputs[1].shape)}, the result "
            f"{format_shape(shape)}"
        )
    return shape


def _rank(value: Value, rank: int, where: str) -> Shape:
    if len(value.shape) != rank:
        raise GraphError(f"{where} must have {rank} dimensions, has shape {format_shape(value.shape)}")
    return value.shape


def _static(size: Size, where: str) -> int:
    if isinstance(size, Dim):
        raise GraphError(f"{where} must not depend on the batch size, is {size}")
    return size


def _ints(attrs: Mapping[str, Any], key: str, count: int, least: int) -> list[int]:
    data = attrs[key]
    if (
        not isinstance(data, list)
        or len(data) != count
        or not all(is_int(item) and least <= item <= MAX_SIZE for item in data)
    ):
        raise GraphError(f"{key} must be {count} ints of at least {least}, not {data!r:.80}")
    return data


def _bool(attrs: Mapping[str, Any], key: str) -> None:
    if not isinstance(attrs[key], bool):
        raise GraphError(f"{key} must be true or false, not {attrs[key]!r:.40}")


def _one_of(attrs: Mapping[str, Any], key: str, choices: frozenset[str]) -> None:
    if not isinstance(attrs[key], str) or attrs[key] not in choices:
        raise GraphError(f"{key} must be one of {', '.join(sorted(choices))}, not {attrs[key]!r:.40}")


def _axis(data: Any, shape: Shape, where: str) -> int:
    if not is_int(data) or not 0 <= data < len(shape):
        raise GraphError(f"{where} must be between 0 and {len(shape) - 1}, not {data!r:.40}")
    return data


def _axes(data: Any, shape: Shape, where: str) -> list[int]:
    if not isinstance(data, list) or not data or len(data) > MAX_RANK:
        raise GraphError(f"{where} must be a list of dimensions, not {data!r:.40}")
    axes = [_axis(item, shape, where) for item in data]
    if len(set(axes)) != len(axes):
        raise GraphError(f"{where} names a dimension twice: {axes}")
    return axes


def _one_dimensional(tensor: Tensor | None, size: Size, where: str) -> None:
    if tensor is not None and tuple(tensor.shape) != (size,):
        raise GraphError(f"{where} has shape {tuple(tensor.shape)} instead of ({size},)")
