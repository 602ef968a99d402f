"""What every op means, in plain PyTorch: the oracle for the native runtime, and the way to run a graph without it.

Each function takes the node's input tensors, its parameters by role and its attributes, and returns one tensor. `run`
evaluates a whole graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_engine.convert.graph import DTYPE_NAMES, Graph, GraphError, Node, shape_at, shape_from_json

Attributes = Mapping[str, Any]
Parameters = Mapping[str, Tensor]


def run(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Evaluate a graph node by node.

    Args:
        graph: a validated graph.
        inputs: one tensor per graph input, with the declared dtype and a shape that fits for some batch size.

    Returns:
        One tensor per graph output.

    Raises:
        GraphError: the inputs do not fit, or a fallback node fails or returns something else than declared.
    """
    batch = graph.batch_of([tuple(tensor.shape) for tensor in inputs])
    values: dict[str, Tensor] = {}
    for name, tensor in zip(graph.inputs, inputs, strict=True):
        if DTYPE_NAMES.get(tensor.dtype) != graph.values[name].dtype:
            raise GraphError(f"input '{name}' has dtype {tensor.dtype}; the model takes {graph.values[name].dtype}")
        values[name] = tensor
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    outputs = set(graph.outputs)
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            results = run_node(graph, node, [values[name] for name in node.inputs], batch)
            values.update(zip(node.outputs, results, strict=True))
            for name in {*node.inputs, *node.outputs}:
                if last_use.get(name, index) <= index and name not in outputs:
                    values.pop(name, None)
    return [values[name] for name in graph.outputs]


def run_node(graph: Graph, node: Node, inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Evaluate one node for one batch size; returns one tensor per output."""
    if node.op == "fallback":
        from sparse_engine.convert.fallback import run_fallback

        return run_fallback(graph, node, inputs, batch)
    params = {role: graph.constants[name] for role, name in node.params.items()}
    return [evaluate(node.op, inputs, params, node.attrs, batch)]


def evaluate(op: str, inputs: Sequence[Tensor], params: Parameters, attrs: Attributes, batch: int = 1) -> Tensor:
    """Evaluate one op (any but ``fallback``); `batch` resolves shapes that depend on the batch size."""
    if op in ("reshape", "expand"):
        shape = shape_at(shape_from_json(attrs["shape"], op), batch)
        return inputs[0].reshape(shape) if op == "reshape" else inputs[0].expand(shape)
    return _EVALUATE[op](inputs, params, attrs)


def activate(x: Tensor, activation: Attributes | None) -> Tensor:
    """Apply an activation in its JSON form; None is the identity."""
    if activation is None:
        return x
    kind = activation["kind"]
    if kind == "clamp":
        return (
            x
            if activation["min"] is None and activation["max"] is None
            else x.clamp(activation["min"], activation["max"])
        )
    if kind == "leaky_relu":
        return functional.leaky_relu(x, activation["slope"])
    return _ACTIVATE[kind](x)


_ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": functional.elu,
    "softplus": functional.softplus,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "neg": torch.neg,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "log": torch.log,
    "erf": torch.erf,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": torch.pow,
}


def _conv2d(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    x = inputs[0]
    top, left, bottom, right = attrs["padding"]
    padding = (top, left)
    if (top, left) != (bottom, right):
        x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
    result = functional.conv2d(
        x, params["weight"], params.get("bias"), attrs["stride"], padding, attrs["dilation"], attrs["groups"]
    )
    return activate(_add_residual(result, inputs), attrs["activation"])


def _linear(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    result = functional.linear(inputs[0], params["weight"], params.get("bias"))
    return activate(_add_residual(result, inputs), attrs["activation"])


def _attention(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    query, key, value = inputs[:3]
    scores = (query @ key.transpose(-2, -1)) * attrs["scale"]  # [..., L, S]
    if attrs["causal"]:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if len(inputs) == 4:
        scores = scores + inputs[3]
    return scores.softmax(-1) @ value


def _affine(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    x = inputs[0]
    shape = [-1 if axis == attrs["axis"] else 1 for axis in range(x.dim())]
    return activate(x * params["scale"].view(shape) + params["shift"].view(shape), attrs["activation"])


def _binary(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    return activate(_BINARY[attrs["kind"]](*inputs), attrs["activation"])


def _scalar(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    x = inputs[0]
    value = torch.full((), attrs["value"], dtype=x.dtype, device=x.device)
    return _BINARY[attrs["kind"]](value, x) if attrs["reverse"] else _BINARY[attrs["kind"]](x, value)


def _max_pool2d(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    padding = attrs["padding"][:2]
    return functional.max_pool2d(
        inputs[0], attrs["kernel"], attrs["stride"], padding, attrs["dilation"], attrs["ceil_mode"]
    )


def _avg_pool2d(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    return functional.avg_pool2d(
        inputs[0],
        attrs["kernel"],
        attrs["stride"],
        attrs["padding"][:2],
        attrs["ceil_mode"],
        attrs["count_include_pad"],
        attrs["divisor"],
    )


def _reduce(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    reduce = {"mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin}[attrs["kind"]]
    return reduce(inputs[0], dim=attrs["dims"], keepdim=attrs["keepdim"])


def _layer_norm(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    x = inputs[0]
    return functional.layer_norm(x, x.shape[-attrs["dims"] :], params.get("weight"), params.get("bias"), attrs["eps"])


def _group_norm(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    return functional.group_norm(inputs[0], attrs["groups"], params.get("weight"), params.get("bias"), attrs["eps"])


def _slice(inputs: Sequence[Tensor], params: Parameters, attrs: Attributes) -> Tensor:
    index = [slice(None)] * attrs["dim"] + [slice(attrs["start"], attrs["stop"], attrs["step"])]
    return inputs[0][tuple(index)]


def _add_residual(result: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    return result + inputs[1] if len(inputs) == 2 else result


_EVALUATE: dict[str, Callable[[Sequence[Tensor], Parameters, Attributes], Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "matmul": lambda inputs, params, attrs: torch.matmul(inputs[0], inputs[1]),
    "attention": _attention,
    "affine": _affine,
    "unary": lambda inputs, params, attrs: activate(inputs[0], attrs["activation"]),
    "binary": _binary,
    "scalar": _scalar,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": lambda inputs, params, attrs: functional.adaptive_avg_pool2d(
        inputs[0], attrs["output_size"]
    ),
    "reduce": _reduce,
    "softmax": lambda inputs, params, attrs: inputs[0].softmax(attrs["dim"]),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "concat": lambda inputs, params, attrs: torch.cat(list(inputs), attrs["dim"]),
    "slice": _slice,
    "permute": lambda inputs, params, attrs: inputs[0].permute(attrs["dims"]),
    "pad": lambda inputs, params, attrs: functional.pad(inputs[0], attrs["pad"], value=attrs["value"]),
    "constant": lambda inputs, params, attrs: params["value"],
}
