"""A model as a flat, functional list of aten operators, with the place in the model that each came from."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparse_engine.errors import CaptureError

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]

# operators whose result may share memory with their first argument
VIEWS = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "t",
        "T",
        "movedim",
        "swapaxes",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "tensor_split",
        "detach",
        "alias",
        "contiguous",
        "to",
        "_to_copy",
        "view_as",
        "diagonal",
        "unfold",
        "getitem",
        "numpy_T",
        "mT",
        "adjoint",
        "as_strided",
        "lift_fresh_copy",
    ]
)
# operators that put one number, of whichever kind, in the place of many
REDUCTIONS = frozenset(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "max",
        "min",
        "prod",
        "var",
        "std",
        "logsumexp",
        "norm",
        "linalg_vector_norm",
        "any",
        "all",
        "argmax",
        "argmin",
    ]
)


@dataclass
class Program:
    """A captured model.

    Args:
        nodes: every operator call, in execution order.
        outputs: the nodes that the model returns.
        inputs: the placeholders of user inputs.
        state: placeholder of a parameter, buffer or constant -> its canonical name (tied tensors share one name).
        tensors: canonical name -> tensor of the captured model.
        aliases: every name under which the model knows a tensor -> the canonical name.
    """

    nodes: list[fx.Node]
    outputs: list[fx.Node]
    inputs: list[fx.Node]
    state: dict[fx.Node, str]
    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Program:
    """The operators that `model` runs on `example_inputs`, in evaluation mode.

    Example::

        program = capture(model, (torch.randn(1, 3, 32, 32),))

    Args:
        model: in evaluation mode; not changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model; the message carries its reason.
    """
    args, kwargs = split_inputs(example_inputs)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder operators hide the weights' roles
    try:
        with torch.enable_grad():
            exported = torch.export.export(model, args, kwargs, strict=False)
        if not _make_functional(exported.graph):
            exported = exported.run_decompositions({})
    except Exception as error:
        first = str(error).strip().splitlines()
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__} on the given example inputs: "
            f"{first[0] if first else type(error).__name__}; "
            "see https://docs.pytorch.org/docs/stable/export.html for what it needs, e.g. no "
            "data-dependent control flow"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return _program(model, exported)


def split_inputs(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what users pass as example inputs."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str | bytes):
        return tuple(example_inputs), {}
    raise CaptureError(
        f"example_inputs is {type(example_inputs).__name__}; pass a tensor, a tuple of arguments or a "
        "dict of keyword arguments"
    )


def operator_name(node: fx.Node) -> str:
    """The bare name of a node's operator: ``conv2d``, ``add``, ``getitem``; in-place forms lose their underscore."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return str(node.target)
    namespace, name = schema.name.split("::")
    if namespace != "aten":
        return schema.name
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def scope(node: fx.Node) -> str:
    """The path of the innermost module that ran this operator ('' is the model itself)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    return path.split("@")[0]


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor; None where it returns something else."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def shapes_of(node: fx.Node) -> list[tuple[int, ...] | None]:
    """The shapes of a node's results, one or several."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return [tuple(int(size) for size in v.shape) if isinstance(v, Tensor) else None for v in values]


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names in its operator's schema, defaults included."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    out: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args) and not argument.kwarg_only:
            out[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            out[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            out[argument.name] = argument.default_value
    return out


def _make_functional(graph: fx.Graph) -> bool:
    """Point every later reader of a tensor that is changed in place at the changing node.

    False where memory is shared through views, which this cannot resolve.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is None or not schema.is_mutable:
            continue
        mutated = [
            argument
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        target = node.args[0] if node.args else None
        if (
            len(mutated) != 1
            or not isinstance(target, fx.Node)
            or target.op != "call_function"
            or operator_name(target) in VIEWS
        ):
            return False
        if any(
            user.op == "call_function" and operator_name(user) in VIEWS and order[user] < order[node]
            for user in target.users
        ):
            return False
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    return True


def _program(model: nn.Module, exported: Any) -> Program:
    owners: dict[int, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        canonical = owners.setdefault(id(tensor), name)
        aliases[name] = canonical
        tensors.setdefault(canonical, tensor)
    state: dict[fx.Node, str] = {}
    inputs: list[fx.Node] = []
    placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        node = placeholders.get(getattr(spec.arg, "name", ""))
        if node is None:
            continue
        if spec.target is None or spec.kind.name == "USER_INPUT":
            inputs.append(node)
        elif spec.target in aliases:
            state[node] = aliases[spec.target]
        else:
            constant = exported.constants.get(spec.target)
            if isinstance(constant, Tensor):
                state[node] = spec.target
                tensors[spec.target] = constant
            else:
                inputs.append(node)
    calls = [node for node in exported.graph.nodes if node.op in ("call_function", "get_attr")]
    results = next(node for node in exported.graph.nodes if node.op == "output")
    outputs: list[fx.Node] = []
    fx.map_arg(results.args, outputs.append)
    return Program(calls, outputs, inputs, state, tensors, aliases)
