"""What the passes share: who writes and reads each value, kept up to date while nodes are replaced."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from sparse_engine.convert.graph import DTYPES, Graph, Node


class Editor:
    """A graph being rewritten: producers and use counts stay right through `take_over` and `remove`.

    Args:
        graph: changed in place.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producer = graph.producers()
        self.uses = Counter(name for node in graph.nodes for name in node.inputs)
        self.uses.update(graph.outputs)
        self.removed: set[int] = set()

    def only_use(self, name: str) -> bool:
        """True when exactly one node (and no graph output) reads a value, once."""
        return self.uses[name] == 1 and name not in self.graph.outputs

    def source(self, name: str, *ops: str) -> Node | None:
        """The node that writes a value nobody else reads, when its op is one of `ops`; else None."""
        node = self.producer.get(name)
        return node if node is not None and node.op in ops and self.only_use(name) else None

    def constant(self, name: str) -> Tensor | None:
        """The tensor behind a value that is written by a constant node, else None."""
        node = self.producer.get(name)
        return self.graph.constants[node.params["value"]] if node is not None and node.op == "constant" else None

    def set_param(self, node: Node, role: str, tensor: Tensor) -> None:
        """Give a node a new constant; the old one stays for other nodes that may share it."""
        old = node.params.get(role, f"{node.name}.{role}")
        dtype = DTYPES[self.graph.values[node.output].dtype]
        if old in self.graph.constants and not any(
            other is not node and old in other.params.values() for other in self.graph.nodes
        ):
            self.graph.constants[old] = tensor.to(dtype).contiguous()
            node.params[role] = old
        else:
            node.params[role] = self.graph.add_constant(old, tensor.to(dtype))

    def take_over(self, node: Node, follower: Node) -> None:
        """Let `node` take the place and the output of `follower`, its only reader, which is dropped."""
        del self.producer[node.output]
        for name in follower.inputs:
            self.uses[name] -= 1
        node.outputs = list(follower.outputs)
        self.producer[node.output] = node
        nodes = self.graph.nodes
        nodes[:] = [item for item in nodes if item is not node]
        nodes[next(index for index, item in enumerate(nodes) if item is follower)] = node

    def forward(self, node: Node) -> bool:
        """Drop a node that returns its first input unchanged; False, with nothing done, where it has to stay."""
        old, new = node.output, node.inputs[0]
        if old in self.graph.outputs and new in self.graph.inputs:
            return False  # outputs keep their names; an input can't take one
        for name in node.inputs:
            self.uses[name] -= 1
        self.uses[new] += self.uses.pop(old, 0)
        del self.producer[old]
        self.graph.nodes[:] = [item for item in self.graph.nodes if item is not node]
        self.graph.replace_uses(old, new)
        return True

    def output_axis(self, node: Node) -> int | None:
        """The axis of the output along which a linear operator's rows lie."""
        if node.op == "conv2d":
            return 1
        return len(self.graph.values[node.output].shape) - 1 if node.op == "linear" else None


def double(tensor: Tensor) -> Tensor:
    """For arithmetic on weights: rounded once, at the end."""
    return tensor.to(torch.float64)
