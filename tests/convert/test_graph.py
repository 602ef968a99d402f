"""The graph as data: JSON there and back, and one clear error for everything that is wrong in it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_engine.convert.capture import capture
from sparse_engine.convert.graph import (
    Dim,
    Graph,
    GraphError,
    Node,
    Value,
    add_sizes,
    build_structure,
    numel,
    shape_at,
)
from sparse_engine.errors import SparseEngineError


class Everything(torch.nn.Module):
    """A model whose graph has nodes of many kinds, a fallback among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.conv(x)).relu()
        x = torch.nn.functional.max_pool2d(x, 2)
        tokens = x.flatten(2).transpose(1, 2)
        weights = (tokens @ tokens.transpose(1, 2)).softmax(-1)
        tokens = torch.cat([weights @ tokens, tokens[:, :1]], 1)
        return {"logits": self.head(tokens.mean(1)), "rest": (tokens.cumsum(1), [x * 2 + 1])}


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Everything().eval(), (torch.randn(2, 3, 8, 8),)).graph


def test_json_round_trip(graph: Graph) -> None:
    again = Graph.from_json(json.loads(json.dumps(graph.to_json())), graph.constants)
    assert again == graph
    x = torch.randn(3, 3, 8, 8)
    for found, expected in zip(again.run([x]), graph.run([x]), strict=True):
        assert torch.equal(found, expected)


def test_output_structure(graph: Graph) -> None:
    x = torch.randn(3, 3, 8, 8)
    outputs = build_structure(graph.structure, graph.run([x]))
    assert list(outputs) == ["logits", "rest"]
    assert outputs["logits"].shape == (3, 5)
    assert isinstance(outputs["rest"], tuple)
    assert isinstance(outputs["rest"][1], list)


def test_sizes() -> None:
    assert Dim(49, 1).at(2) == 99
    assert str(Dim(1)) == "N"
    assert str(Dim(4, 1)) == "4N+1"
    assert add_sizes(Dim(1, 2), Dim(2, 3)) == Dim(3, 5)
    assert numel((Dim(2, 1), 3, 4)) == Dim(24, 12)
    assert numel((0, Dim(1))) == 0
    assert shape_at((Dim(1), 3), 7) == (7, 3)
    with pytest.raises(GraphError, match="not linear in the batch size"):
        numel((Dim(1), Dim(1)))


def test_batch_size_is_read_from_the_inputs(graph: Graph) -> None:
    assert graph.batch_of([(5, 3, 8, 8)]) == 5
    with pytest.raises(GraphError, match=r"\(5, 3, 8, 9\); the model takes \(N, 3, 8, 8\)"):
        graph.batch_of([(5, 3, 8, 9)])
    with pytest.raises(GraphError, match="takes 1 inputs"):
        graph.batch_of([])


def _node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in data["nodes"] if node["op"] == op)


def _set(op: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: _node(data, op)["attrs"].__setitem__(key, value)


def _deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]
    return nested


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer version": (lambda data: data.update(version=2), "reads up to version 1"),
    "version": (lambda data: data.update(version=True), "positive int"),
    "missing key": (lambda data: data.pop("nodes"), "missing keys"),
    "unknown key": (lambda data: data.update(code="import os"), "unknown keys"),
    "unknown op": (lambda data: _node(data, "conv2d").update(op="eval"), "unknown op"),
    "no such value": (lambda data: _node(data, "conv2d").update(inputs=["nothing"]), "not declared"),
    "wrong order": (lambda data: data["nodes"].reverse(), "which no earlier node or input provides"),
    "written twice": (lambda data: data["nodes"].append(dict(data["nodes"][0], name="again")), "written twice"),
    "two names": (lambda data: data["nodes"].append(data["nodes"][0]), "same name"),
    "no such constant": (lambda data: _node(data, "conv2d")["params"].update(weight="other"), "which is not there"),
    "unused constant": (lambda data: _node(data, "conv2d")["params"].pop("bias"), "used by no node"),
    "stride": (_set("conv2d", "stride", [0, 1]), "stride must be 2 ints of at least 1"),
    "stride type": (_set("conv2d", "stride", [1.0, 1]), "stride must be 2 ints"),
    "stride count": (_set("conv2d", "stride", [1]), "stride must be 2 ints"),
    "negative padding": (_set("conv2d", "padding", [0, 0, 0, -1]), "padding must be 4 ints"),
    "huge padding": (_set("conv2d", "padding", [10**12] * 4), "padding must be 4 ints"),
    "groups": (_set("conv2d", "groups", 3), "do not fit"),
    "no groups": (_set("conv2d", "groups", 0), "do not fit"),
    "dilation": (_set("conv2d", "dilation", [9, 9]), "does not fit"),
    "activation": (_set("conv2d", "activation", {"kind": "swoosh"}), "an activation is"),
    "activation extra": (_set("conv2d", "activation", {"kind": "relu", "slope": 1}), "takes exactly"),
    "activation type": (_set("conv2d", "activation", "relu"), "an activation is"),
    "clamp": (_set("conv2d", "activation", {"kind": "clamp", "min": "0", "max": 1}), "finite number"),
    "missing attribute": (lambda data: _node(data, "conv2d")["attrs"].pop("groups"), "missing attributes"),
    "extra attribute": (_set("conv2d", "hook", "x"), "unknown attributes"),
    "shape": (lambda data: data["values"]["x"].update(shape=[2, 3, 8]), "must have 4 dimensions"),
    "negative shape": (lambda data: data["values"]["x"].update(shape=[2, 3, 8, -8]), "not between 0"),
    "shape type": (lambda data: data["values"]["x"].update(shape=[2, 3, 8, "8"]), "a dimension is an int or"),
    "dtype": (lambda data: data["values"]["x"].update(dtype="float128"), "known are"),
    "other dtype": (lambda data: data["values"]["x"].update(dtype="int64"), "share one floating dtype"),
    "batch slope": (lambda data: data["values"]["x"].update(shape=[{"batch": 0, "plus": 1}, 3, 8, 8]), "out of range"),
    "window": (_set("max_pool2d", "kernel", [9, 9]), "does not fit"),
    "pool padding": (_set("max_pool2d", "padding", [2, 2, 2, 2]), "at most half of the kernel"),
    "flag": (_set("max_pool2d", "ceil_mode", 1), "true or false"),
    "reshape": (_set("reshape", "shape", [{"batch": 1, "plus": 0}, 7]), "as many elements"),
    "permute": (_set("permute", "dims", [0, 0, 1]), "not an order"),
    "slice": (_set("slice", "stop", 99), "not within"),
    "negative slice": (_set("slice", "start", -1), "not within"),
    "axis": (_set("softmax", "dim", 7), "must be between"),
    "concat": (_set("concat", "dim", 2), "do not fit"),
    "reduce": (_set("reduce", "dims", [1, 1]), "twice"),
    "reduce kind": (_set("reduce", "kind", "median"), "kind must be one of"),
    "not finite": (_set("scalar", "value", float("inf")), "finite"),
    "target": (_set("fallback", "target", "aten.set_.source_Tensor"), "not one of the"),
    "target path": (_set("fallback", "target", "os.system.default"), "not one of the"),
    "template": (_set("fallback", "args", [{"tensor": 5}, 1]), "not an argument template"),
    "template type": (_set("fallback", "args", [{"object": "x"}]), "not an argument template"),
    "fallback arguments": (_set("fallback", "args", [{"tensor": 0}, 9]), "does not accept"),
    "deep": (_set("fallback", "args", _deep()), "nested deeper"),
    "structure": (lambda data: data.update(structure={"tuple": [9]}), "names output 9"),
    "structure kind": (lambda data: data.update(structure={"set": [0]}), "output structure"),
    "structure depth": (lambda data: data.update(structure={"tuple": _deep()}), "nested deeper"),
    "fixed batch": (lambda data: data.update(fixed_batch=2), "depends on the batch size"),
    "name": (lambda data: _node(data, "conv2d").update(name="a\nb"), "printable"),
    "names": (lambda data: _node(data, "conv2d").update(inputs="x"), "list of at most"),
    "outputs": (lambda data: data.update(outputs=["nothing"]), "not declared"),
    "two outputs": (lambda data: _node(data, "scalar")["outputs"].append("more"), "more"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs_are_refused(graph: Graph, name: str) -> None:
    change, message = BROKEN[name]
    data = copy.deepcopy(graph.to_json())
    change(data)
    with pytest.raises(GraphError, match=message):
        Graph.from_json(data, graph.constants)


def test_wrong_constants_are_refused(graph: Graph) -> None:
    data = graph.to_json()
    for name, tensor in graph.constants.items():
        with pytest.raises(GraphError):
            Graph.from_json(data, {**graph.constants, name: torch.zeros(*tensor.shape, 1)})
        with pytest.raises(GraphError):
            Graph.from_json(data, {**graph.constants, name: tensor.to(torch.int64)})
        with pytest.raises(GraphError):
            Graph.from_json(data, {**graph.constants, name: tensor.to_sparse()})
    with pytest.raises(GraphError, match="used by no node"):
        Graph.from_json(data, {**graph.constants, "more": torch.zeros(1)})


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(data, dict):
        for key, item in data.items():
            found += _places(item, (*path, key))
    elif isinstance(data, list):
        for index, item in enumerate(data):
            found += _places(item, (*path, index))
    return found


@given(seed=st.integers(0, 2**32 - 1), changes=st.integers(1, 3))
def test_random_damage_gives_one_kind_of_error_or_a_graph_that_runs(graph: Graph, seed: int, changes: int) -> None:
    pieces = [
        None,
        True,
        -1,
        0,
        1,
        2,
        7,
        2**31,
        2**70,
        0.5,
        float("nan"),
        "",
        "x",
        "relu",
        [],
        [0],
        {},
        {"kind": "relu"},
    ]
    generator = random.Random(seed)
    for _ in range(20):
        data = copy.deepcopy(graph.to_json())
        for _ in range(changes):
            path = generator.choice(_places(data)[1:])
            parent = data
            for key in path[:-1]:
                parent = parent[key]
            action = generator.random()
            if action < 0.6:
                parent[path[-1]] = generator.choice(pieces)
            elif isinstance(parent, dict):
                del parent[path[-1]]
                parent[generator.choice(["x", "name", "dims"])] = generator.choice(pieces)
            else:
                parent.append(generator.choice(pieces))
        try:
            damaged = Graph.from_json(data, graph.constants)
            damaged.run([torch.randn(1, 3, 8, 8)])
        except SparseEngineError:
            continue


def test_copies_are_independent(graph: Graph) -> None:
    before = json.dumps(graph.to_json())
    other = graph.copy()
    other.nodes[0].attrs["stride"] = [2, 2]
    other.nodes.pop()
    other.add_constant("more", torch.zeros(1))
    assert json.dumps(graph.to_json()) == before


def test_unread_nodes_are_pruned(graph: Graph) -> None:
    other = graph.copy()
    name = other.fresh("extra")
    other.values[name] = other.values["x"]
    other.nodes.append(Node(name, "unary", ["x"], [name], {}, {"activation": {"kind": "relu"}}))
    other.prune()
    assert other == graph


def test_a_value_knows_itself() -> None:
    assert str(Value((Dim(1), 3), "float32")) == "float32(N, 3)"
