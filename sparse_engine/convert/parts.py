"""One image on several threads: each works on its own rows from layer to layer, in memory of its own.

The threads of an ordinary plan share every value. Where they sit on cores that do not share a cache, half of what a
layer reads was written by another core, and two threads are hardly faster than one. Here the image is cut into bands of
rows, one per thread, and each band is lowered by itself: a plan with an arena of its own. A convolution needs a few
rows of the neighbouring bands (its *halo*): these lay them out for it, all wait for each other, and it copies them.

    part 0   conv1 ─ pool ─ 1×1 ─┐ halo ┌─ 3×3 ─ 1×1 ─ …         ┐
                                 │      │                        ├─ tail: pooling to one value, classifier
    part 1   conv1 ─ pool ─ 1×1 ─┘ halo └─ 3×3 ─ 1×1 ─ …         ┘

From the first node on that needs whole images at once, an ordinary plan (the *tail*) takes over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from sparse_engine import _C
from sparse_engine.convert.constants import constant_nonzeros
from sparse_engine.convert.graph import Graph, Node, shape_at
from sparse_engine.convert.lower import (
    _ALIGN,
    LinearProblem,
    NativePlan,
    _contiguous_strides,
    _Lowering,
    _Place,
    _Storage,
)
from sparse_engine.convert.strips import Chain, find_chains, padded, reads_something, rows_in_chain, window, with_kernel

_ROWS = 3  # a part keeps at least so many rows of every value, or the halos outweigh the work
_WORTH = 0.75  # of the graph's multiplications must be in layers that can be cut
_WINDOWS = ("conv2d", "max_pool2d", "avg_pool2d")
_POINTWISE = ("unary", "binary", "affine")


@dataclass
class Cut:
    """Where a graph is cut.

    Args:
        nodes: how many of the graph's nodes, from the first, run in parts.
        needs: by value and part, the rows [first, last) that the part's consumers read.
        passed: the values that the rest of the graph reads.
        chains: what every part runs strip by strip, by its first node's index.
    """

    nodes: int
    needs: dict[str, list[tuple[int, int]]]
    passed: list[str]
    chains: dict[int, Chain]


def rows_of(height: int, part: int, parts: int) -> tuple[int, int]:
    """The rows [first, last) of a value of `height` rows that one part of `parts` makes."""
    return round(height * part / parts), round(height * (part + 1) / parts)


def find_cut(graph: Graph, parts: int) -> Cut | None:
    """Where to cut the graph for one image on `parts` threads, or None where that does not pay.

    Example::

        find_cut(capture(resnet50, (x,)).graph, 2).nodes      # all but the last pooling and the classifier

    Args:
        graph: optimised, computing in float32.
        parts: the number of bands.
    """
    shapes = {name: shape_at(value.shape, 1) for name, value in graph.values.items()}
    body: set[str] = {
        name
        for name in graph.inputs
        if len(shapes[name]) == 4 and shapes[name][0] == 1 and graph.values[name].dtype == "float32"
    }
    needs: dict[str, list[tuple[int, int]]] = {}
    found = find_chains(graph, shapes)
    chains: dict[int, Chain] = {}
    work, count, cut_work = 0, 0, 0

    def add(nodes: list[Node]) -> None:
        for part in range(parts):
            for name, (low, high) in _rows_read(graph, nodes, shapes, part, parts).items():
                ranges = needs.setdefault(name, [(1 << 60, 0)] * parts)
                ranges[part] = (min(ranges[part][0], low), max(ranges[part][1], high))

    for index, node in enumerate(graph.nodes):
        if node.op in ("conv2d", "linear"):
            work += _multiplications(graph, node, shapes)
        if index < count:  # in the chain that began before
            cut_work = work
        if index != count:
            continue
        chain = found.get(index)
        if chain is not None and _chain_can_be_cut(
            graph, graph.nodes[index : chain.last], chain.rows, body, shapes, parts
        ):
            nodes, chains[index] = graph.nodes[index : chain.last], chain
        elif _can_be_cut(graph, node, body, shapes, parts):
            nodes = [node]
        else:
            continue
        body.update(member.output for member in nodes)
        count, cut_work = index + len(nodes), work
        add(nodes)
    if not count or cut_work < _WORTH * work:
        return None
    if sum(node.op == "conv2d" for node in graph.nodes[:count]) < 2:
        return None  # bands pay between layers: one alone reads and writes the caller's memory without them
    produced = {node.output for node in graph.nodes[:count]}
    rest = {name for node in graph.nodes[count:] for name in node.inputs} | set(graph.outputs)
    passed = [node.output for node in graph.nodes[:count] if node.output in rest & produced]
    return Cut(count, needs, passed, chains)


def _multiplications(graph: Graph, node: Node, shapes: dict[str, tuple[int, ...]]) -> int:
    kept = constant_nonzeros(graph, node.params["weight"])
    sizes = shapes[node.output]
    return kept * (sizes[2] * sizes[3] if node.op == "conv2d" else math.prod(sizes[:-1]))


def _rows_read(
    graph: Graph, nodes: list[Node], shapes: dict[str, tuple[int, ...]], part: int, parts: int
) -> dict[str, tuple[int, int]]:
    """By value, the rows that a node, or a chain of nodes, reads for a part's rows of the last one's output."""
    last = nodes[-1]
    own = rows_of(shapes[last.output][2], part, parts)
    if last.op not in _WINDOWS:
        return dict.fromkeys(last.inputs, own)
    rows = dict.fromkeys(last.inputs[1:], own)
    heights = {node.inputs[0]: shapes[node.inputs[0]][2] for node in nodes}
    name, (low, high) = nodes[0].inputs[0], rows_in_chain(graph, nodes, heights, *own)[0].read
    rows[name] = (min(low, rows[name][0]), max(high, rows[name][1])) if name in rows else (low, high)
    return rows


def _chain_can_be_cut(
    graph: Graph, nodes: list[Node], rows: int, body: set[str], shapes: dict[str, tuple[int, ...]], parts: int
) -> bool:
    """Whether a chain in strips of so many rows can run in each part."""
    known = set(body)
    for node in nodes:
        if not _can_be_cut(graph, node, known, shapes, parts):
            return False
        known.add(node.output)
    heights = {name: shapes[name][2] for node in nodes for name in (node.inputs[0], node.output)}
    own = (rows_of(heights[nodes[-1].output], part, parts) for part in range(parts))
    return all(reads_something(graph, nodes, heights, rows, *part) for part in own)


def _can_be_cut(graph: Graph, node: Node, body: set[str], shapes: dict[str, tuple[int, ...]], parts: int) -> bool:
    if node.op not in _WINDOWS + _POINTWISE or len(node.outputs) != 1 or not set(node.inputs) <= body:
        return False
    sizes = shapes[node.output]
    if len(sizes) != 4 or sizes[0] != 1 or sizes[2] < _ROWS * parts or math.prod(sizes) == 0:
        return False
    if graph.values[node.output].dtype != "float32":
        return False
    if node.op == "affine" and node.attrs["axis"] % 4 != 1:
        return False
    residuals = node.inputs[1:] if node.op in _WINDOWS else node.inputs
    if any(shapes[name] != sizes or name in graph.inputs for name in residuals):
        return False
    if node.op in _WINDOWS:
        for part in range(parts):
            low, high = window(with_kernel(graph, node), *rows_of(sizes[2], part, parts), shapes[node.inputs[0]][2])[:2]
            if high <= low:
                return False
    return True


class _PartLowering(_Lowering):
    """Lowers one band of rows of the nodes before the cut."""

    def __init__(self, graph: Graph, choices: Any, cut: Cut, part: int, parts: int) -> None:
        super().__init__(graph, 1, choices, 1)
        self.cut, self.part, self.parts = cut, part, parts
        self.made: set[str] = set()
        self.making = ""
        self.halos: dict[str, tuple[int, int]] = {}  # by value: rows of room above and below its own
        self.exchanged: set[str] = set()
        self.outboxes: dict[tuple[str, int], _Place] = {}  # rows for another part, by value and part
        self.held: list[_Place] = []  # what the others read in this stage
        self.marks: list[int] = []  # the step that each stage after the first begins with
        self.others: list[_PartLowering] = []  # all parts, this one included

    # -- places

    def own(self, name: str, part: int | None = None) -> tuple[int, int]:
        return rows_of(self.height(name), self.part if part is None else part, self.parts)

    def shape(self, name: str) -> tuple[int, ...]:
        sizes = super().shape(name)
        if name in self.strip_sizes:
            return sizes
        first, last = self.own(name)
        return (sizes[0], sizes[1], last - first, sizes[3])

    def new_value(self, sizes: Sequence[int]) -> _Place:
        """A value's own rows start on a cache line; the rows of its neighbours lie around them."""
        name = self.making
        if name in self.made or tuple(sizes) != self.shape(name):
            return super().new_value(sizes)
        self.made.add(name)
        _, channels, rows, width = sizes
        first, last = self.own(name)
        low, high = self.cut.needs.get(name, [(first, last)] * self.parts)[self.part]
        above, below = max(0, first - low), max(0, high - last)
        self.halos[name] = (above, below)
        lead = -(-above * width // _ALIGN) * _ALIGN
        pitch = _C.padded_pixels(lead + (rows + below) * width + self.spare)
        strides = (channels * pitch, pitch, width, 1)
        return _Place(_Storage(channels * pitch), lead, (1, channels, rows, width), strides)

    def like(self, reference: _Place, sizes: Sequence[int]) -> _Place:
        return self.new_value(sizes)

    def rows(self, name: str, low: int, high: int) -> _Place:
        """The rows [low, high) of a value, which are its own or its halo."""
        place = self.places[name]
        first = 0 if name in self.graph.inputs else self.own(name)[0]
        sizes = (place.sizes[0], place.sizes[1], high - low, place.sizes[3])
        return place.with_view(sizes, place.strides, (low - first) * place.strides[2])

    def _callers(self, name: str) -> _Place | None:
        # Either every part writes to the caller's memory or none.
        found = [_Lowering._callers(other, name) for other in self.others]
        return found[self.part] if found and None not in found else None

    def _own_rows(self, place: _Place, name: str) -> _Place:
        first, last = self.own(name)
        sizes = (*place.sizes[:2], last - first, place.sizes[3])
        return place.with_view(sizes, place.strides, first * place.strides[2])

    def half_values(self, chains: Mapping[int, Chain]) -> set[str]:
        return set()  # other parts copy rows of floats

    # -- nodes

    def op_conv2d(self, node: Node) -> None:
        self._on_window(node, super().op_conv2d)

    def _pool(self, node: Node, maximum: bool) -> None:
        self._on_window(node, lambda changed: super(_PartLowering, self)._pool(changed, maximum))

    def _on_window(self, node: Node, lower: Any) -> None:
        name = node.inputs[0]
        (rows,) = rows_in_chain(self.graph, [node], {name: self.height(name)}, *self.own(node.output))
        # Under a name of its own: the same value may come in once more, as the residual.
        seen = f"{name} through the window of {node.name}"
        self.places[seen] = self.rows(name, *rows.read)
        lower(replace(padded(node, rows), inputs=[seen, *node.inputs[1:]]))
        del self.places[seen]

    # -- stages

    def emit_steps(self) -> None:
        graph = self.graph
        for index, name in enumerate(graph.inputs):
            self.places[name] = self.outside(index, name)
        behind = 0  # nodes before this one belong to a chain
        for self.index, node in enumerate(graph.nodes):
            if self.index < behind:
                continue
            chain = self.cut.chains.get(self.index)
            last = node if chain is None else graph.nodes[chain.last - 1]
            read = node.inputs if chain is None else [node.inputs[0], *last.inputs[1:]]
            wanted = [name for name in dict.fromkeys(read) if self._is_exchanged(name)]
            if wanted:
                self._begin_stage(wanted)
            self.making = last.output
            if chain is None:
                getattr(self, f"op_{node.op}")(node)
            else:
                behind = chain.last
                self.emit_chain(chain)
        # The last stage: every part copies the channels that its thread will read in the tail, of all rows.
        self._hold()
        kept = [(index, name) for index, name in enumerate(graph.outputs) if self.places[name].storage.buffer == 0]
        if kept:
            self.marks.append(len(self.steps))
        for index, name in kept:
            self.step(lambda plan, index=index, name=name: self._emit_output(plan, index, name), [self.places[name]])
        self.held = [self.places[name] for _, name in kept]
        self._hold()
        self.arena = self._memory_plan()

    def _is_exchanged(self, name: str) -> bool:
        """Whether some part reads rows of a value that are not its own, and has not got them yet."""
        if name in self.graph.inputs or name in self.exchanged:
            return False
        for part, (low, high) in enumerate(self.cut.needs[name]):
            first, last = self.own(name, part)
            if low < first or high > last:
                return True
        return False

    def _begin_stage(self, names: list[str]) -> None:
        """End the stage, with what the neighbours want of it laid out for them, and begin the next with what they give.

        They could read the value itself. But its lines would then lie in their caches too, and the next one to be
        written to the same memory would wait for each of them.
        """
        outboxes = [box for name in names for box in self._fill_outboxes(name)]
        self._hold()
        self.marks.append(len(self.steps))
        for name in names:
            self.exchanged.add(name)
            self.step(lambda plan, name=name: self._emit_exchange(plan, name), [self.places[name]])
        self.held = outboxes

    def _fill_outboxes(self, name: str) -> list[_Place]:
        first, last = self.own(name)
        boxes = []
        for part, (low, high) in enumerate(self.cut.needs[name]):
            begin, end = max(low, first), min(high, last)
            if part == self.part or end <= begin:
                continue
            rows = self.rows(name, begin, end)
            sizes = (1, rows.sizes[1], end - begin, rows.sizes[3])
            box = _Place(_Storage(math.prod(sizes)), 0, sizes, tuple(_contiguous_strides(sizes)))
            self.outboxes[name, part] = box
            self.step(
                lambda plan, rows=rows, box=box: plan.copy(f"{name}.halo", rows.view(), box.view()), [rows], [box]
            )
            boxes.append(box)
        return boxes

    def _hold(self) -> None:
        """Neighbours read a value until the stage ends: its memory must last so long."""
        if self.held:
            self.step(lambda plan: None, self.held)
        self.held = []

    def outbox_row(self, name: str, part: int) -> int:
        """The first row in the box for another part."""
        return max(self.cut.needs[name][part][0], self.own(name)[0])

    def _emit_exchange(self, plan: Any, name: str) -> None:
        first, last = self.own(name)
        low, high = self.cut.needs[name][self.part]
        arenas = self.constants_buffer + 1
        for other in self.others:
            theirs = self.own(name, other.part)
            for low_row, high_row in ((low, min(first, high)), (max(last, low), high)):
                begin, end = max(low_row, theirs[0]), min(high_row, theirs[1])
                if other is self or end <= begin:
                    continue
                box = other.outboxes[name, self.part]
                top = other.outbox_row(name, self.part)
                sizes = (1, box.sizes[1], end - begin, box.sizes[3])
                rows = box.with_view(sizes, box.strides, (begin - top) * box.strides[2])
                _, offset = rows.at()
                view = (arenas + other.part, offset, list(rows.sizes), list(rows.strides))
                plan.copy(f"{name}.halo", view, self.rows(name, begin, end).view())

    def _emit_output(self, plan: Any, index: int, name: str) -> None:
        _, channels, height, width = sizes = super().shape(name)
        begin, end = channels * self.part // self.parts, channels * (self.part + 1) // self.parts
        if begin == end:
            return
        strides = _contiguous_strides(sizes)
        for other in self.others:
            place = other.places[name]
            buffer = 0 if other is self else self.constants_buffer + 1 + other.part
            first, last = other.own(name)
            view = (1, end - begin, last - first, width)
            source = (buffer, place.at()[1] + begin * place.strides[1], list(view), list(place.strides))
            target = len(self.graph.inputs) + index + 1
            plan.copy(f"out.{name}", source, (target, begin * height * width + first * width, list(view), strides))

    def build(self) -> tuple[Any, list[int]]:
        """The native plan of this part, and where its stages end."""
        graph = self.graph
        outside = graph.inputs + graph.outputs
        floats = [math.prod(super(_PartLowering, self).shape(name)) for name in outside] + [self.constant_floats]
        plan = _C.Plan(self.arena, [max(1, n) for n in floats] + [lowering.arena for lowering in self.others])
        ends = []
        for index, step in enumerate(self.steps):
            if index in self.marks:
                ends.append(len(plan))
            step.emit(plan)
        return plan, [*ends, len(plan)]


def compile_parts(graph: Graph, threads: int, choices: Any = None) -> PartedPlan | None:
    """A plan for one image on `threads` threads, or None where the graph has too little that can be cut.

    Example::

        plan = compile_parts(graph, 2)
        (y,) = plan.run([x])

    Args:
        graph: optimised, computing in float32.
        threads: how many bands, one per thread.
        choices: kernel choices by node name, as `choose` returns them.
    """
    if threads < 2 or any(graph.values[name].dtype != "float32" for name in graph.inputs + graph.outputs):
        return None
    cut = find_cut(graph, threads)
    if cut is None:
        return None
    body = replace(graph, outputs=cut.passed, nodes=graph.nodes[: cut.nodes])
    rest = graph.nodes[cut.nodes :]
    also = [name for name in graph.inputs if any(name in node.inputs for node in rest) or name in graph.outputs]
    tail = replace(graph, inputs=cut.passed + also, nodes=rest)
    for piece in (body, tail):  # packed weights are shared with the plans for other batch sizes
        piece.__dict__["_native_weights"] = graph.__dict__.setdefault("_native_weights", {})
    lowerings = [_PartLowering(body, choices, cut, part, threads) for part in range(threads)]
    for lowering in lowerings:
        lowering.others = lowerings
        lowering.emit_steps()
    built = [lowering.build() for lowering in lowerings]
    native = _C.PartedPlan([plan for plan, _ in built], [ends for _, ends in built])
    shapes = [shape_at(graph.values[name].shape, 1) for name in cut.passed]
    last = None  # the parts write the graph's outputs themselves
    if rest or cut.passed != graph.outputs:
        last = _Lowering(tail, 1, choices, threads).finish(threads)
    return PartedPlan(native, graph.inputs, also, shapes, last)


def part_problems(graph: Graph, parts: int) -> dict[str, LinearProblem]:
    """By node name, what the first of `parts` threads computes for one image; empty where the graph is not cut."""
    cut = find_cut(graph, parts)
    if cut is None:
        return {}
    lowering = _PartLowering(replace(graph, outputs=cut.passed, nodes=graph.nodes[: cut.nodes]), None, cut, 0, parts)
    lowering.emit_steps()
    return lowering.problems


@dataclass
class _Passed:
    """Memory of one call for what leaves the parts, and its addresses with that of the constants."""

    tensors: list[Tensor]
    addresses: list[int]


class PartedPlan:
    """One image in bands of rows, one per thread; `run` may be called from several threads at once."""

    def __init__(
        self, parts: Any, inputs: list[str], also: list[str], shapes: list[tuple[int, ...]], tail: NativePlan | None
    ) -> None:
        self._parts = parts
        self._also = [inputs.index(name) for name in also]
        self._shapes = shapes
        self._tail = tail
        self._constants = numpy.zeros(1, dtype=numpy.float32)  # no node before the cut has any
        self._idle: list[_Passed] = []  # kept from call to call

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """One contiguous tensor per graph input in, one new tensor per graph output out."""
        _C.expect_job()  # what follows here takes as long as it takes to wake the other threads
        if self._tail is None:
            outputs = self._new()
            self._parts.run([tensor.data_ptr() for tensor in inputs] + outputs.addresses)
            return outputs.tensors
        passed = self._take()
        addresses = [tensor.data_ptr() for tensor in inputs] + passed.addresses
        behind = passed.tensors + [inputs[index] for index in self._also]
        results = self._tail.run_after(self._parts, addresses, behind)
        self._idle.append(passed)
        return results

    def profile(self, inputs: list[Tensor]) -> list[tuple[str, float]]:
        """Seconds per native node of one run, in order; of a node that several parts run, the longest."""
        passed = self._take()
        seconds = self._parts.profile([tensor.data_ptr() for tensor in inputs] + passed.addresses)
        longest: dict[str, float] = {}
        for names, times in zip(self._parts.names, seconds, strict=True):
            of_part: dict[str, float] = {}
            for name, time in zip(names, times, strict=True):
                of_part[name] = of_part.get(name, 0.0) + time
            for name, time in of_part.items():
                longest[name] = max(longest.get(name, 0.0), time)
        if self._tail is None:
            return list(longest.items())
        return list(longest.items()) + self._tail.profile(passed.tensors + [inputs[index] for index in self._also])

    @property
    def arena_bytes(self) -> int:
        """Bytes of working memory of one call, all threads together."""
        return self._parts.arena_bytes + (self._tail.arena_bytes if self._tail is not None else 0)

    def _take(self) -> _Passed:
        try:
            return self._idle.pop()
        except IndexError:  # the first call, or one beside another
            return self._new()

    def _new(self) -> _Passed:
        tensors = [torch.empty(shape) for shape in self._shapes]
        return _Passed(tensors, [tensor.data_ptr() for tensor in tensors] + [self._constants.ctypes.data])
