"""The graph: what a captured model is between PyTorch and the native plan.

A graph is plain data: values (shape and dtype), nodes (an op, the values it reads and writes, the constants it uses,
its attributes) and constants (tensors). Everything but the constants is JSON, so the graph is also what an ``.spx``
file stores; ``Graph.from_json`` therefore trusts nothing. The rules of each op (which inputs, parameters and
attributes, which output shape) are in ``schema.py``, their meaning in ``reference.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_engine.errors import ConvertError

VERSION = 1
MAX_SIZE = 2**31 - 1  # of one dimension
MAX_ELEMENTS = 2**32  # of one value, at batch size 1
MAX_RANK = 12
MAX_COUNT = 100_000  # nodes, values or constants of one graph
MAX_NAME = 512
MAX_DEPTH = 16  # of nested output structures and templates

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATING = frozenset(
    {"float64", "float32"}
)  # what native ops compute in; other dtypes only pass through fallback nodes


class GraphError(ConvertError):
    """A graph (or the file it came from) breaks a rule; the message names the node and the numbers."""


@dataclass(frozen=True)
class Dim:
    """A dimension that depends on the batch size N: ``batch * N + plus``.

    >>> Dim(49).at(2)
    98
    """

    batch: int
    plus: int = 0

    def at(self, batch: int) -> int:
        """The size of this dimension for one batch size."""
        return self.batch * batch + self.plus

    def __str__(self) -> str:
        head = "N" if self.batch == 1 else f"{self.batch}N"
        return head if self.plus == 0 else f"{head}{self.plus:+d}"


Size = int | Dim
Shape = tuple[Size, ...]


def size_at(size: Size, batch: int) -> int:
    """The size of a dimension for one batch size."""
    return size.at(batch) if isinstance(size, Dim) else size


def shape_at(shape: Iterable[Size], batch: int) -> tuple[int, ...]:
    """A shape for one batch size: ``shape_at((Dim(1), 3), 8) == (8, 3)``."""
    return tuple(size_at(size, batch) for size in shape)


def affine(batch: int, plus: int) -> Size:
    """``batch * N + plus``, as an int where it does not depend on the batch."""
    return Dim(batch, plus) if batch else plus


def add_sizes(a: Size, b: Size) -> Size:
    """The sum of two dimensions."""
    a_batch, a_plus = _parts(a)
    b_batch, b_plus = _parts(b)
    return affine(a_batch + b_batch, a_plus + b_plus)


def numel(shape: Iterable[Size]) -> Size:
    """The number of elements; raises GraphError when it is not an affine function of the batch size."""
    batch, plus = 0, 1
    for size in shape:
        size_batch, size_plus = _parts(size)
        if batch and size_batch:
            raise GraphError(
                f"the shape {format_shape(shape)} has an element count that is not linear in the batch size N"
            )
        batch, plus = batch * size_plus + plus * size_batch, plus * size_plus
    return affine(batch, plus)


def format_shape(shape: Iterable[Size]) -> str:
    """``(N, 3, 224, 224)``."""
    return "(" + ", ".join(str(size) for size in shape) + ")"


def size_to_json(size: Size) -> Any:
    """An int, or ``{"batch": a, "plus": b}``."""
    return {"batch": size.batch, "plus": size.plus} if isinstance(size, Dim) else int(size)


def size_from_json(data: Any, where: str) -> Size:
    """The inverse of `size_to_json`; refuses anything else."""
    if is_int(data):
        if not 0 <= data <= MAX_SIZE:
            raise GraphError(f"{where}: the dimension {data} is not between 0 and {MAX_SIZE}")
        return data
    if isinstance(data, dict) and set(data) == {"batch", "plus"} and is_int(data["batch"]) and is_int(data["plus"]):
        batch, plus = data["batch"], data["plus"]
        if not (1 <= batch <= MAX_SIZE and 0 <= plus <= MAX_SIZE):
            raise GraphError(f"{where}: the dimension {batch} * N + {plus} is out of range")
        return Dim(batch, plus)
    raise GraphError(f'{where}: a dimension is an int or {{"batch": a, "plus": b}}, not {_short(data)}')


def shape_from_json(data: Any, where: str) -> Shape:
    """A list of dimensions."""
    if not isinstance(data, list) or len(data) > MAX_RANK:
        raise GraphError(f"{where}: a shape is a list of at most {MAX_RANK} dimensions, not {_short(data)}")
    return tuple(size_from_json(size, where) for size in data)


def is_int(value: Any) -> bool:
    """True for ints that are not bools (JSON's true is not 1)."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_json(data: Any, where: str, depth: int = 0) -> None:
    """Refuse what is not plain JSON, nested too deeply, or not finite."""
    if depth > MAX_DEPTH:
        raise GraphError(f"{where} are nested deeper than {MAX_DEPTH}")
    if isinstance(data, dict):
        for key, item in data.items():
            if not isinstance(key, str):
                raise GraphError(f"{where}: a key must be a string, not {_short(key)}")
            check_json(item, where, depth + 1)
    elif isinstance(data, list):
        for item in data:
            check_json(item, where, depth + 1)
    elif isinstance(data, float):
        if not math.isfinite(data):
            raise GraphError(f"{where}: numbers must be finite, not {data}")
    elif isinstance(data, int):
        if abs(data) > 2**63 - 1:
            raise GraphError(f"{where}: the number {_short(data)} does not fit 64 bits")
    elif data is not None and not isinstance(data, str):
        raise GraphError(f"{where}: {_short(data)} is not JSON")


@dataclass(frozen=True)
class Value:
    """What is known of a tensor before it exists: its shape and its dtype's name."""

    shape: Shape
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.dtype}{format_shape(self.shape)}"


@dataclass
class Node:
    """One operation.

    ``inputs`` and ``outputs`` are value names, ``params`` maps a role to a constant's name, ``attrs`` is plain JSON.
    """

    name: str
    op: str
    inputs: list[str]
    outputs: list[str]
    params: dict[str, str] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)

    @property
    def output(self) -> str:
        """The only output's name."""
        return self.outputs[0]


@dataclass
class Graph:
    """A model as plain data, in the order in which its nodes run.

    Example::

        graph = capture(model, (x,))
        (y,) = graph.run([x])
        data = json.dumps(graph.to_json())

    Args:
        inputs: value names, in the model's argument order.
        outputs: value names, flat.
        nodes: in topological order.
        values: shape and dtype by value name.
        constants: tensors by name (weights, biases, folded tables).
        structure: how the flat outputs make up what the model returned: an index, ``{"tuple": [...]}``, ``{"list":
            [...]}``, ``{"dict": {...}}`` or ``None``.
        fixed_batch: the batch size the model was captured with when it could not be captured for every batch size,
            else None.
    """

    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    values: dict[str, Value]
    constants: MutableMapping[str, Tensor] = field(default_factory=dict)
    structure: Any = 0
    fixed_batch: int | None = None

    # ---- reading

    @property
    def dynamic(self) -> bool:
        """True when some input's shape depends on the batch size."""
        return any(isinstance(size, Dim) for name in self.inputs for size in self.values[name].shape)

    def producers(self) -> dict[str, Node]:
        """The node that writes each value; graph inputs have none."""
        return {output: node for node in self.nodes for output in node.outputs}

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value, one entry per use, in order; every value has a (maybe empty) list."""
        found: dict[str, list[Node]] = {name: [] for name in self.values}
        for node in self.nodes:
            for name in node.inputs:
                found[name].append(node)
        return found

    def batch_of(self, shapes: Sequence[Sequence[int]]) -> int:
        """The batch size that input shapes imply; raises GraphError when they do not fit the graph's inputs.

        Args:
            shapes: one per graph input, in order.
        """
        if len(shapes) != len(self.inputs):
            raise GraphError(f"the model takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(shapes)}")
        batch: int | None = None
        for name, shape in zip(self.inputs, shapes, strict=True):
            expected = self.values[name].shape
            fits, before = len(shape) == len(expected), batch
            for want, got in zip(expected, shape, strict=False):
                if not isinstance(want, Dim):
                    fits = fits and want == got
                    continue
                implied, rest = divmod(got - want.plus, want.batch)
                fits = fits and rest == 0 and implied >= 0 and (batch is None or batch == implied)
                batch = implied if batch is None else batch
            if not fits:
                known = "" if before is None else f" with N = {before}, as in the inputs before it"
                raise GraphError(
                    f"input '{name}' has shape {format_shape(shape)}; the model takes {format_shape(expected)}{known}"
                )
        if batch is None:
            return self.fixed_batch if self.fixed_batch is not None else 1
        return batch

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate with the PyTorch reference; see ``reference.run``."""
        from sparse_engine.convert.reference import run

        return run(self, inputs)

    def bytes(self) -> int:
        """Bytes of all constants, stored densely."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.constants.values())

    # ---- rewriting (used by the passes)

    def copy(self) -> Graph:
        """A graph that can be rewritten without changing this one; the constants' storage is shared."""
        nodes = [
            Node(
                node.name, node.op, list(node.inputs), list(node.outputs), dict(node.params), copy.deepcopy(node.attrs)
            )
            for node in self.nodes
        ]
        return Graph(
            list(self.inputs),
            list(self.outputs),
            nodes,
            dict(self.values),
            dict(self.constants),
            copy.deepcopy(self.structure),
            self.fixed_batch,
        )

    def fresh(self, stem: str) -> str:
        """A name that no value, node or constant has yet, starting with `stem`."""
        taken = self.values.keys() | self.constants.keys() | {node.name for node in self.nodes}
        if stem not in taken:
            return stem
        number = 1
        while f"{stem}_{number}" in taken:
            number += 1
        return f"{stem}_{number}"

    def add_constant(self, stem: str, tensor: Tensor) -> str:
        """Store a tensor under a fresh name and return the name."""
        name = self.fresh(stem)
        self.constants[name] = tensor.detach().contiguous()
        return name

    def replace_uses(self, old: str, new: str) -> None:
        """Make every reader of `old` (graph outputs included) read `new`."""
        for node in self.nodes:
            node.inputs = [new if name == old else name for name in node.inputs]
        self.outputs = [new if name == old else name for name in self.outputs]

    def prune(self) -> None:
        """Drop nodes nobody reads, then values and constants nobody names."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                needed.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        used = set(self.inputs) | set(self.outputs)
        constants: set[str] = set()
        for node in self.nodes:
            used.update(node.inputs, node.outputs)
            constants.update(node.params.values())
        self.values = {name: value for name, value in self.values.items() if name in used}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in constants}

    def to(self, dtype: torch.dtype) -> Graph:
        """A copy that computes in another floating dtype (float32 or float64)."""
        name = DTYPE_NAMES.get(dtype)
        if name not in FLOATING:
            raise GraphError(f"graphs compute in float32 or float64, not {dtype}")
        result = self.copy()
        result.values = {
            key: Value(value.shape, name) if value.dtype in FLOATING else value for key, value in self.values.items()
        }
        result.constants = {
            key: tensor.to(dtype) if DTYPE_NAMES.get(tensor.dtype) in FLOATING else tensor
            for key, tensor in self.constants.items()
        }
        return result

    # ---- checking and JSON

    def validate(self) -> None:
        """Check every name, shape, dtype, index and attribute; raises GraphError naming what is wrong and where."""
        from sparse_engine.convert.schema import check_node

        self._check_names()
        known = set(self.inputs)
        for node in self.nodes:
            for name in node.inputs:
                if name not in known:
                    raise GraphError(
                        f"node '{node.name}' reads '{_short(name)}', which no earlier node or input provides"
                    )
            check_node(self, node)
            for name in node.outputs:
                if name in known:
                    raise GraphError(f"value '{name}' is written twice, the second time by node '{node.name}'")
                known.add(name)
        for name in self.outputs:
            if name not in known:
                raise GraphError(f"the output '{_short(name)}' is provided by no node or input")
        extra = sorted(self.values.keys() - known)
        if extra:
            raise GraphError(f"{len(extra)} values have no producer, the first is '{extra[0]}'")
        _check_structure(self.structure, len(self.outputs), 0)
        self._check_batch()

    def _check_names(self) -> None:
        for what, group in (("inputs", self.inputs), ("outputs", self.outputs), ("nodes", self.nodes)):
            if not isinstance(group, list) or len(group) > MAX_COUNT:
                raise GraphError(f"the graph's {what} must be a list of at most {MAX_COUNT} entries")
        if len(self.values) > MAX_COUNT or len(self.constants) > MAX_COUNT:
            raise GraphError(
                f"the graph has {len(self.values)} values and {len(self.constants)} constants; at most {MAX_COUNT}"
            )
        for node in self.nodes:
            _check_name(node.name, "node name")
            for name in (*node.inputs, *node.outputs):
                _check_name(name, f"value of node '{node.name}'")
                if name not in self.values:
                    raise GraphError(f"node '{node.name}' names the value '{name}', which is not declared")
            for role, name in node.params.items():
                _check_name(role, f"parameter role of node '{node.name}'")
                _check_name(name, f"constant of node '{node.name}'")
                if name not in self.constants:
                    raise GraphError(
                        f"node '{node.name}' names the constant '{name}' as its {role}, which is not there"
                    )
        if len({node.name for node in self.nodes}) != len(self.nodes):
            raise GraphError("two nodes have the same name")
        if len(set(self.inputs)) != len(self.inputs):
            raise GraphError("two inputs have the same name")
        for name in (*self.inputs, *self.outputs):
            _check_name(name, "input or output")
            if name not in self.values:
                raise GraphError(f"the input or output '{name}' is not declared as a value")
        for name, value in self.values.items():
            _check_name(name, "value")
            _check_value(name, value)
        used = {constant for node in self.nodes for constant in node.params.values()}
        for name, tensor in self.constants.items():
            _check_name(name, "constant")
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
                raise GraphError(
                    f"the constant '{name}' is not a dense tensor of a supported dtype ({', '.join(DTYPES)})"
                )
            if tensor.dim() > MAX_RANK:
                raise GraphError(f"the constant '{name}' has {tensor.dim()} dimensions, more than {MAX_RANK}")
            if name not in used:
                raise GraphError(f"the constant '{name}' is used by no node")

    def _check_batch(self) -> None:
        if self.fixed_batch is not None:
            if not is_int(self.fixed_batch) or not 1 <= self.fixed_batch <= MAX_SIZE:
                raise GraphError(f"fixed_batch must be a positive int or null, not {_short(self.fixed_batch)}")
            if any(isinstance(size, Dim) for value in self.values.values() for size in value.shape):
                raise GraphError("a graph with a fixed batch size has a value whose shape depends on the batch size")
            for name in (*self.inputs, *self.outputs):
                shape = self.values[name].shape
                if not shape or shape[0] != self.fixed_batch:
                    raise GraphError(
                        f"the fixed batch size is {self.fixed_batch} but '{name}' has shape {format_shape(shape)}"
                    )
        elif not self.dynamic:
            for name, value in self.values.items():
                if any(isinstance(size, Dim) for size in value.shape):
                    raise GraphError(f"'{name}' depends on the batch size but no input does")

    def to_json(self) -> dict[str, Any]:
        """Everything but the constants' contents, as plain JSON; the inverse is `from_json`."""
        return {
            "version": VERSION,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "structure": copy.deepcopy(self.structure),
            "fixed_batch": self.fixed_batch,
            "values": {
                name: {"shape": [size_to_json(size) for size in value.shape], "dtype": value.dtype}
                for name, value in self.values.items()
            },
            "nodes": [
                {
                    "name": node.name,
                    "op": node.op,
                    "inputs": list(node.inputs),
                    "outputs": list(node.outputs),
                    "params": dict(node.params),
                    "attrs": copy.deepcopy(node.attrs),
                }
                for node in self.nodes
            ],
        }

    @staticmethod
    def from_json(data: Any, constants: Mapping[str, Tensor]) -> Graph:
        """A validated graph from what `to_json` returned and the constants' tensors.

        Args:
            data: parsed JSON; nothing about it is trusted.
            constants: the tensors by name.

        Raises:
            GraphError: naming what is wrong.
        """
        data = _object(
            data, "the graph", {"version", "inputs", "outputs", "structure", "fixed_batch", "values", "nodes"}
        )
        version = data["version"]
        if not is_int(version) or version < 1:
            raise GraphError(f"the graph's version must be a positive int, not {_short(version)}")
        if version > VERSION:
            raise GraphError(
                f"the graph has version {version}; this sparse_engine reads up to version {VERSION}: install a newer "
                f"sparse_engine"
            )
        if not isinstance(data["values"], dict) or len(data["values"]) > MAX_COUNT:
            raise GraphError(f"the graph's values must be an object of at most {MAX_COUNT} entries")
        if not isinstance(data["nodes"], list) or len(data["nodes"]) > MAX_COUNT:
            raise GraphError(f"the graph's nodes must be a list of at most {MAX_COUNT} entries")
        values: dict[str, Value] = {}
        for name, entry in data["values"].items():
            entry = _object(entry, f"value '{_short(name)}'", {"shape", "dtype"})
            if not isinstance(entry["dtype"], str):
                raise GraphError(f"value '{_short(name)}': the dtype must be a string, not {_short(entry['dtype'])}")
            values[name] = Value(shape_from_json(entry["shape"], f"value '{_short(name)}'"), entry["dtype"])
        nodes: list[Node] = []
        for index, entry in enumerate(data["nodes"]):
            where = f"node {index}"
            entry = _object(entry, where, {"name", "op", "inputs", "outputs", "params", "attrs"})
            _check_name(entry["name"], f"{where}'s name")
            _check_name(entry["op"], f"{where}'s op")
            if not isinstance(entry["params"], dict) or not isinstance(entry["attrs"], dict):
                raise GraphError(f"{where}: params and attrs must be objects")
            check_json(entry["attrs"], f"{where}'s attrs")
            nodes.append(
                Node(
                    entry["name"],
                    entry["op"],
                    _names(entry["inputs"], where),
                    _names(entry["outputs"], where),
                    dict(entry["params"]),
                    copy.deepcopy(entry["attrs"]),
                )
            )
        check_json(data["structure"], "the output structure")
        graph = Graph(
            _names(data["inputs"], "the graph's inputs"),
            _names(data["outputs"], "the graph's outputs"),
            nodes,
            values,
            dict(constants),
            copy.deepcopy(data["structure"]),
            data["fixed_batch"],
        )
        graph.validate()
        return graph

    def __str__(self) -> str:
        lines = [f"inputs: {', '.join(f'{name} {self.values[name]}' for name in self.inputs)}"]
        for node in self.nodes:
            params = "".join(f", {role}={tuple(self.constants[name].shape)}" for role, name in node.params.items())
            attrs = f" {node.attrs}" if node.attrs else ""
            outputs = ", ".join(f"{name} {self.values[name]}" for name in node.outputs)
            lines.append(f"{outputs} = {node.op}({', '.join(node.inputs)}{params}){attrs}")
        lines.append(f"outputs: {', '.join(self.outputs)}")
        return "\n".join(lines)


def build_structure(structure: Any, outputs: Sequence[Any]) -> Any:
    """Put flat outputs into the structure the model returned (see `Graph`)."""
    if structure is None:
        return None
    if is_int(structure):
        return outputs[structure]
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {key: build_structure(item, outputs) for key, item in items.items()}
    built = [build_structure(item, outputs) for item in items]
    return tuple(built) if kind == "tuple" else built


# ---- helpers


def _parts(size: Size) -> tuple[int, int]:
    return (size.batch, size.plus) if isinstance(size, Dim) else (0, size)


def _short(data: Any) -> str:
    text = data if isinstance(data, str) else repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


def _object(data: Any, where: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise GraphError(f"{where} must be an object, not {_short(data)}")
    if set(data) != keys:
        missing, extra = sorted(keys - set(data)), sorted(str(key) for key in set(data) - keys)
        raise GraphError(f"{where}: missing keys {missing}, unknown keys {_short(extra)}")
    return data


def _names(data: Any, where: str) -> list[str]:
    if not isinstance(data, list) or len(data) > MAX_COUNT:
        raise GraphError(f"{where}: names must be a list of at most {MAX_COUNT} strings, not {_short(data)}")
    for name in data:
        _check_name(name, where)
    return list(data)


def _check_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise GraphError(
            f"{where}: a name is a printable string of 1 to {MAX_NAME} characters, not {_short(repr(name))}"
        )


def _check_value(name: str, value: Value) -> None:
    if value.dtype not in DTYPES:
        raise GraphError(f"value '{name}' has the dtype '{_short(value.dtype)}'; known are {', '.join(DTYPES)}")
    if len(value.shape) > MAX_RANK:
        raise GraphError(f"value '{name}' has {len(value.shape)} dimensions, more than {MAX_RANK}")
    for size in value.shape:
        batch, plus = _parts(size)
        if not (0 <= batch <= MAX_SIZE and 0 <= plus <= MAX_SIZE):
            raise GraphError(f"value '{name}' has the dimension {size}, which is out of range")
    # More than one dimension may depend on the batch (a batch-by-batch matrix); the bound is on a batch of one.
    if math.prod(size_at(size, 1) for size in value.shape) > MAX_ELEMENTS:
        raise GraphError(f"value '{name}' of shape {format_shape(value.shape)} has more than {MAX_ELEMENTS} elements")


def _check_structure(structure: Any, count: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise GraphError(f"the output structure is nested deeper than {MAX_DEPTH}")
    if structure is None:
        return
    if is_int(structure):
        if not 0 <= structure < count:
            raise GraphError(f"the output structure names output {structure} of {count}")
        return
    if isinstance(structure, dict) and len(structure) == 1:
        ((kind, items),) = structure.items()
        if kind in ("tuple", "list") and isinstance(items, list) and len(items) <= MAX_COUNT:
            for item in items:
                _check_structure(item, count, depth + 1)
            return
        if kind == "dict" and isinstance(items, dict) and len(items) <= MAX_COUNT:
            for key, item in items.items():
                _check_name(key, "a key of the output structure")
                _check_structure(item, count, depth + 1)
            return
    raise GraphError(
        f"the output structure is an index, a tuple, list or dict of such, or null, not {_short(structure)}"
    )
