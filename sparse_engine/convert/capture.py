"""From a PyTorch module to a graph, through ``torch.export``.

The exported program is interpreted once, node by node: what depends only on weights is computed on the spot (so tables,
masks and re-parametrised weights become constants), and every other aten call is translated by a handler into native
ops, or kept as a fallback node that calls PyTorch. The handlers are in ``aten.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from sparse_engine.convert import fallback
from sparse_engine.convert.graph import (
    DTYPE_NAMES,
    Dim,
    Graph,
    GraphError,
    Node,
    Shape,
    Size,
    Value,
    affine,
    is_int,
    shape_from_json,
    size_to_json,
)
from sparse_engine.convert.schema import infer
from sparse_engine.errors import CaptureError


class NotDynamic(Exception):
    """This model does not have one graph for every batch size."""


class NotNative(Exception):
    """No native op does this; the message is the reason the report gives."""


@dataclass(frozen=True)
class Ref:
    """Stands for a tensor that exists only when the graph runs."""

    name: str
    value: Value

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def dtype(self) -> str:
        return self.value.dtype

    @property
    def rank(self) -> int:
        return len(self.value.shape)


@dataclass
class Captured:
    """A graph and what is known about how it came to be.

    Args:
        graph: validated.
        reasons: why each fallback node is one, by node name.
        batch_reason: why the batch size is fixed, or None when any batch size runs.
        spec: the tree of the model's own output types; not stored in files.
    """

    graph: Graph
    reasons: dict[str, str]
    batch_reason: str | None
    spec: pytree.TreeSpec | None


def capture(model: nn.Module, example_inputs: Sequence[Tensor]) -> Captured:
    """Capture a model as a graph, for every batch size where the model allows it.

    Example::

        captured = capture(model.eval(), (torch.randn(1, 3, 224, 224),))
        captured.graph.run([torch.randn(5, 3, 224, 224)])

    Args:
        model: in eval mode; its parameters and buffers become the graph's constants (storage shared where possible).
        example_inputs: positional tensors; those whose first dimension equals the first input's are taken to share the
            batch dimension.

    Returns:
        The graph with its fallback reasons; ``graph.fixed_batch`` is set when only one batch size could be captured.

    Raises:
        CaptureError: ``torch.export`` cannot capture the model, or the model changes its own state.
    """
    example_inputs = tuple(example_inputs)
    batch = example_inputs[0].shape[0] if example_inputs and example_inputs[0].dim() else None
    reason = "the inputs have no batch dimension"
    if batch is not None:
        try:
            return _capture_dynamic(model, example_inputs, batch)
        except NotDynamic as error:
            reason = str(error)
    return _capture_static(model, example_inputs, batch, reason)


def _capture_dynamic(model: nn.Module, inputs: tuple[Tensor, ...], batch: int) -> Captured:
    # torch.export treats sizes 0 and 1 as constants, so the example gets at least two rows.
    rows = max(batch, 2)
    batched = [tensor.dim() > 0 and tensor.shape[0] == batch for tensor in inputs]
    repeated = tuple(_repeat(tensor, rows) if has else tensor for tensor, has in zip(inputs, batched, strict=True))
    dim = torch.export.Dim("batch", min=1)
    specs = tuple({0: dim} if has else {} for has in batched)
    try:
        program = _export(model, repeated, specs)
    except CaptureError:
        raise
    except Exception as error:
        raise NotDynamic(f"torch.export needs a fixed batch size: {_first_line(error)}") from error
    try:
        return _Interpreter(program, model).run(None)
    except GraphError as error:
        raise NotDynamic(str(error)) from error


def _capture_static(model: nn.Module, inputs: tuple[Tensor, ...], batch: int | None, reason: str) -> Captured:
    try:
        program = _export(model, inputs, None)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture this model: {_first_line(error)}{_place(error)}. Make its forward traceable "
            "(no data-dependent branches; tensors in, tensors out), or convert the part of it that is"
        ) from error
    try:
        captured = _Interpreter(program, model).run(batch)
    except (NotDynamic, GraphError) as error:
        raise CaptureError(f"this model cannot be captured: {error}") from error
    captured.batch_reason = reason
    return captured


def _export(model: nn.Module, inputs: tuple[Tensor, ...], specs: Any) -> torch.export.ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad(), _plain_attention(), _quiet():
        warnings.simplefilter("ignore")
        # One entry per argument of the forward; a variadic one takes them all.
        shapes = None if specs is None else _spec_tree(model, specs)
        program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
        if _needs_functional(program.graph):
            program = program.run_decompositions({})
        changed = {**program.graph_signature.buffers_to_mutate, **program.graph_signature.parameters_to_mutate}
        if changed:
            raise CaptureError(
                f"the model changes its own state in forward ({', '.join(changed.values())}); "
                "an executable has none: call model.eval(), or take the change out of forward"
            )
        return program


def _spec_tree(model: nn.Module, specs: tuple[Any, ...]) -> Any:
    import inspect

    parameters = list(inspect.signature(model.forward).parameters.values())
    for index, parameter in enumerate(parameters):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*specs[:index], specs[index:])
    return specs


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """PyTorch's fused transformer kernels hide the linear layers from capture."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """An export that fails is an answer here, not something for PyTorch to log, or to print half a program for."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    names = vars(importlib.import_module("torch.export._trace"))
    names["print"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        logger.disabled = before
        names.pop("print", None)


# fmt: off
_VIEWS = frozenset(
    {
        "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t",
        "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "expand", "contiguous", "detach",
        "alias", "narrow", "diagonal", "unfold", "view_as", "expand_as", "movedim", "swapaxes", "swapdims",
        "mT", "to", "dropout", "clone",
    }
)
# fmt: on


def _needs_functional(graph: torch.fx.Graph) -> bool:
    """True when an in-place call can be seen through another name.

    Otherwise it means the same as its functional twin, and rewriting the program, which is slow, is not needed.
    """
    for node in graph.nodes:
        if node.op == "get_attr":
            return True  # a sub-graph
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable:
            continue
        changed = node.args[0]
        simple = (
            node.target.__name__.split(".")[0].endswith("_")
            and isinstance(changed, torch.fx.Node)
            and changed.op == "call_function"
            and isinstance(changed.target, torch._ops.OpOverload)
            and changed.target.__name__.split(".")[0].rstrip("_") not in _VIEWS
            and list(changed.users) == [node]
        )
        if not simple:
            return True
    return False


class _Interpreter:
    """Runs an exported program with stand-ins for what depends on the inputs."""

    def __init__(self, program: torch.export.ExportedProgram, model: nn.Module) -> None:
        self.program = program
        self.builder = Builder()
        self.symbols: set[Any] = set()
        self.environment: dict[torch.fx.Node, Any] = {}
        self.state: dict[str, Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }

    def run(self, fixed_batch: int | None) -> Captured:
        from sparse_engine.convert.aten import IGNORED

        signature = self.program.graph_signature
        parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        outputs: list[Any] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.environment[node] = self.placeholder(node, parameters, constants)
            elif node.op == "call_function":
                if node.target in IGNORED or getattr(node.target, "__name__", "") in (
                    "_assert_tensor_metadata.default",
                ):
                    continue
                self.environment[node] = self.call(node)
            elif node.op == "output":
                # Beside what the model returns, a functional program returns what became of inputs that forward
                # changes.
                kinds = [spec.kind for spec in signature.output_specs]
                outputs = [
                    item for item, kind in zip(node.args[0], kinds, strict=True) if kind is OutputKind.USER_OUTPUT
                ]
            else:
                raise CaptureError(f"the model contains a sub-graph ({node.name}), which cannot be captured")
        return self.finish(outputs, fixed_batch)

    def finish(self, outputs: list[Any], fixed_batch: int | None) -> Captured:
        builder, spec = self.builder, self.program.call_spec.out_spec
        names: list[str] = []
        leaves: list[Any] = []
        for item in outputs:
            result = self.environment[item] if isinstance(item, torch.fx.Node) else item
            if result is None:
                leaves.append(None)
                continue
            if not isinstance(result, (Ref, Tensor)):
                raise CaptureError(
                    f"the model returns {type(result).__name__} values beside tensors; return tensors only"
                )
            leaves.append(len(names))
            names.append(builder.ref(result, "output").name)
        graph = builder.graph
        graph.outputs = names
        graph.structure = _structure(pytree.tree_unflatten(leaves, spec))
        if fixed_batch is not None and all(
            graph.values[name].shape[:1] == (fixed_batch,) for name in (*graph.inputs, *names)
        ):
            graph.fixed_batch = fixed_batch
        graph.prune()
        graph.validate()
        kept = {node.name for node in graph.nodes}
        reasons = {name: reason for name, reason in builder.reasons.items() if name in kept}
        return Captured(graph, reasons, None, spec)

    def placeholder(self, node: torch.fx.Node, parameters: dict[str, str], constants: dict[str, str]) -> Any:
        name = parameters.get(node.name)
        if name is not None:
            # The model's own tensor, not export's copy of it.
            tensor = self.state.get(name, self.program.state_dict.get(name))
            if tensor is None:
                tensor = self.program.constants[name]
            self.builder.names[id(tensor)] = name
            return tensor.detach() if tensor.requires_grad else tensor
        if node.name in constants:
            return self.program.constants[constants[node.name]]
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            raise CaptureError(f"the model's argument '{node.name}' is not a tensor; pass tensors only")
        graph = self.builder.graph
        result = self.builder.declare(node.name, self.value(value))
        graph.inputs.append(result.name)
        return result

    def value(self, fake: Tensor) -> Value:
        if fake.dtype not in DTYPE_NAMES:
            raise CaptureError(
                f"the model uses the dtype {fake.dtype}, which is not supported ({', '.join(DTYPE_NAMES.values())})"
            )
        return Value(tuple(self.size(size) for size in fake.shape), DTYPE_NAMES[fake.dtype])

    def size(self, size: Any) -> Size:
        """A dimension of the exported program as an affine function of the batch size."""
        if is_int(size):
            return size
        expression = size.node.expr
        self.symbols |= expression.free_symbols
        if len(self.symbols) > 1:
            raise NotDynamic("its shapes depend on more than the batch size")
        if expression.is_number:
            return int(expression)
        (symbol,) = self.symbols
        slope = expression.diff(symbol)
        rest = expression.subs(symbol, 0)
        if (
            not slope.is_Integer
            or not rest.is_Integer
            or int(slope) < 1
            or int(rest) < 0
            or (expression - slope * symbol - rest).expand() != 0
        ):
            raise NotDynamic(f"a dimension is {expression}, which is not linear in the batch size")
        return affine(int(slope), int(rest))

    def call(self, node: torch.fx.Node) -> Any:
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self.size(meta)
        if isinstance(meta, (torch.SymFloat, torch.SymBool)):
            raise NotDynamic("it computes with the batch size")
        args = pytree.tree_map_only(torch.fx.Node, self.environment.__getitem__, node.args)
        kwargs = pytree.tree_map_only(torch.fx.Node, self.environment.__getitem__, node.kwargs)
        if node.target is operator.getitem:
            return args[0][args[1]]
        leaves = pytree.tree_leaves((args, kwargs))
        dynamic = any(isinstance(leaf, Dim) for leaf in leaves)
        if not isinstance(node.target, torch._ops.OpOverload):
            if dynamic or any(isinstance(leaf, Ref) for leaf in leaves):
                raise CaptureError(f"the model calls {node.target}, which cannot be captured")
            return node.target(*args, **kwargs)
        if not dynamic and not any(isinstance(leaf, Ref) for leaf in leaves):
            with torch.no_grad():
                return node.target(*args, **kwargs)
        declared = pytree.tree_map_only(Tensor, self.value, meta)
        return self.builder.translate(node, args, kwargs, declared)


class Builder:
    """Adds nodes to a graph under names that come from the model's modules."""

    def __init__(self) -> None:
        self.graph = Graph([], [], [], {})
        self.names: dict[int, str] = {}
        self.reasons: dict[str, str] = {}
        self.taken: set[str] = set()
        self.stored: dict[int, tuple[Tensor, str]] = {}
        self.constants: dict[int, Ref] = {}
        self.stem = ""

    def translate(self, node: torch.fx.Node, args: Any, kwargs: Any, declared: Any) -> Any:
        from sparse_engine.convert.aten import HANDLERS

        target = _functional(node.target)
        self.stem = _module_name(node) or node.name
        handler = HANDLERS.get(target)
        before = len(self.graph.nodes)
        reason = f"{target} has no native op"
        if handler is not None:
            try:
                arguments = _bind(node.target, args, kwargs)
                result = handler(self, Call(target, arguments, declared))
                found = result.value if isinstance(result, Ref) else None
                if isinstance(declared, Value) and isinstance(result, Ref) and found != declared:
                    raise NotNative(f"it returns {declared} where the native op returns {found}")
                return result
            except (NotNative, GraphError) as error:
                reason = f"{target}: {error}"
                for dropped in self.graph.nodes[before:]:
                    for name in dropped.outputs:
                        del self.graph.values[name]
                        self.constants = {key: ref for key, ref in self.constants.items() if ref.name != name}
                del self.graph.nodes[before:]
        return self.fallback(target, args, kwargs, declared, reason)

    def fallback(self, target: str, args: Any, kwargs: Any, declared: Any, reason: str) -> Any:
        if target not in fallback.TARGETS:
            raise CaptureError(
                f"the model calls {target}, which has no native op and is not one of the functions that an executable "
                f"may call "
                f"({reason}); express it with other PyTorch functions"
            )
        dropped = {"device", "layout", "pin_memory", "memory_format", "non_blocking", "copy"}
        inputs: list[str] = []

        def name_of(item: Any) -> str | None:
            return self.ref(item).name if isinstance(item, (Ref, Tensor)) else None

        try:
            templates = [fallback.encode(item, inputs, name_of) for item in args]
            named = {key: fallback.encode(item, inputs, name_of) for key, item in kwargs.items() if key not in dropped}
        except GraphError as error:
            raise CaptureError(f"the model calls {target}: {error}") from error
        name = self.fresh(self.stem)
        outputs = [declared] if isinstance(declared, Value) else list(declared)
        if not all(isinstance(item, Value) for item in outputs):
            raise CaptureError(f"the model calls {target}, which returns other things than tensors")
        references = [self.declare(f"{self.stem}", value) for value in outputs]
        attrs = {"target": target, "args": templates, "kwargs": named}
        self.graph.nodes.append(Node(name, "fallback", inputs, [ref.name for ref in references], {}, attrs))
        self.reasons[name] = reason
        return references[0] if isinstance(declared, Value) else references

    def emit(self, op: str, inputs: Sequence[Ref], params: dict[str, Tensor | None] | None = None, **attrs: Any) -> Ref:
        """Add a node; its output's shape comes from the schema."""
        tensors = {role: tensor for role, tensor in (params or {}).items() if tensor is not None}
        value = infer(op, [item.value for item in inputs], tensors, attrs)
        roles = {role: self.store(tensor, role) for role, tensor in tensors.items()}
        result = self.declare(self.stem, value)
        self.graph.nodes.append(Node(result.name, op, [item.name for item in inputs], [result.name], roles, attrs))
        return result

    def ref(self, item: Ref | Tensor, stem: str = "") -> Ref:
        """A stand-in for a tensor: itself, or a constant node's output."""
        if isinstance(item, Ref):
            return item
        known = self.constants.get(id(item))
        if known is None:
            name = self.store(item, "value")
            known = self.declare(stem or name, Value(tuple(item.shape), DTYPE_NAMES[item.dtype]))
            self.graph.nodes.append(Node(known.name, "constant", [], [known.name], {"value": name}))
            self.constants[id(item)] = known
        return known

    def store(self, tensor: Tensor, role: str) -> str:
        """Keep a tensor among the constants (once) and return its name."""
        if id(tensor) in self.stored:
            return self.stored[id(tensor)][1]
        name = self.fresh(self.names.get(id(tensor)) or f"{self.stem}.{role}")
        self.graph.constants[name] = tensor.detach().contiguous()
        self.stored[id(tensor)] = (tensor, name)  # the tensor is kept so that its id stays its own
        return name

    def declare(self, stem: str, value: Value) -> Ref:
        """A new value under a free name."""
        name = self.fresh(stem)
        self.graph.values[name] = value
        return Ref(name, value)

    def fresh(self, stem: str) -> str:
        name, number = stem, 1
        while name in self.taken:
            name, number = f"{stem}_{number}", number + 1
        self.taken.add(name)
        return name

    def reshape(self, x: Ref, shape: Sequence[Size]) -> Ref:
        """`x` in another shape; nothing is added where it already has it."""
        if tuple(shape) == x.shape:
            return x
        return self.emit("reshape", [x], shape=[size_to_json(size) for size in shape])

    def permute(self, x: Ref, dims: Sequence[int]) -> Ref:
        """`x` with its dimensions in another order."""
        return x if list(dims) == list(range(x.rank)) else self.emit("permute", [x], dims=list(dims))

    def expand(self, x: Ref, shape: Sequence[Size]) -> Ref:
        """`x` broadcast to a shape."""
        if tuple(shape) == x.shape:
            return x
        return self.emit("expand", [x], shape=[size_to_json(size) for size in shape])

    def slice(self, x: Ref, dim: int, start: int, stop: int, step: int = 1) -> Ref:
        """``x[..., start:stop:step, ...]`` along one dimension."""
        size = x.shape[dim]
        if (start, stop, step) == (0, size, 1):
            return x
        return self.emit("slice", [x], dim=dim, start=start, stop=stop, step=step)


@dataclass(frozen=True)
class Call:
    """One aten call: its functional name, its arguments by schema name (with defaults), and the declared result."""

    target: str
    arguments: dict[str, Any]
    declared: Any

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def shape(self) -> Shape:
        """The declared shape of the (only) result."""
        return self.declared.shape


# ---- helpers


def _functional(target: torch._ops.OpOverload) -> str:
    namespace, name = target._schema.name.split("::")
    overload = target._overloadname
    if name.endswith("_") and not name.startswith("__"):
        packet = getattr(torch.ops.aten, name[:-1], None)
        if packet is not None and overload in packet.overloads():
            name = name[:-1]
    return f"{namespace}.{name}.{overload}"


def _bind(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[index]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def _module_name(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    return path.split("@")[0].replace("L['self'].", "").strip(".")


def _repeat(tensor: Tensor, rows: int) -> Tensor:
    if tensor.shape[0] >= rows:
        return tensor
    return (
        torch.cat([tensor] * (rows // max(tensor.shape[0], 1) + 1))[:rows]
        if tensor.shape[0]
        else tensor.new_zeros((rows, *tensor.shape[1:]))
    )


def _structure(tree: Any) -> Any:
    if tree is None or is_int(tree):
        return tree
    if isinstance(tree, tuple):
        return {"tuple": [_structure(item) for item in tree]}
    if isinstance(tree, list):
        return {"list": [_structure(item) for item in tree]}
    if isinstance(tree, dict):
        return {"dict": {str(key): _structure(item) for key, item in tree.items()}}
    # Other containers (output classes of model libraries) become dictionaries of their fields.
    fields = {key: item for key, item in vars(tree).items() if not key.startswith("_")}
    return {"dict": {key: _structure(item) for key, item in fields.items()}}


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip().rstrip(".")[:300] if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """The line of the model in which tracing ended: the last that is neither PyTorch's nor of this file."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((torch_folder, "<")) and frame.filename != __file__:
            return f", at {frame.filename}:{frame.lineno} in {frame.name}"
    return ""


__all__ = ["Builder", "Call", "Captured", "NotDynamic", "NotNative", "Ref", "capture", "shape_from_json"]
