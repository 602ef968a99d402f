"""Lowering: a graph, for one batch size, becomes a native plan with every buffer, stride and offset fixed.

Each value gets a place: a storage, an offset and strides. View ops only change strides. The linear operators want
their inputs as *channel planes* (the channel
dimension outermost, everything else contiguous and in order), so that is the order in which values are made; where a
kernel needs another one, a copy is put in.
Storages are then laid into one arena by their lifetimes, and the nodes are handed to C++.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from sparse_engine import _C
from sparse_engine.convert.constants import constant_csr, constant_rounded, constant_shape
from sparse_engine.convert.graph import Dim, Graph, Node, shape_at, shape_from_json
from sparse_engine.convert.independence import samples_are_independent
from sparse_engine.convert.strips import Chain, Rows, find_chains, padded, rows_in_chain
from sparse_engine.errors import ConvertError
from sparse_engine.ops.low_precision import looks_up_bytes
from sparse_engine.rounded import RoundedWeight

LANES = _C.cpu_info()["lanes"]
_ALIGN = 16  # floats: storages start on cache lines
_NO_ACTIVATION = ("none", 0.0, 0.0)
_CONSTANT_STORAGE = "constants"
# Of one vector by a rounded weight: all rows, entries looked up in tables of 31 columns, or of 255.
ROUNDED_KERNELS = ("rows", "lookup", "bytes")
_VECTOR_KERNELS = ("vector", *ROUNDED_KERNELS)
_PANEL_KERNELS = ("sparse", "dense", "pairs")  # cut into row blocks
PAIR_KERNELS = ("pairs", "depthwise_pairs")  # compute in bfloat16
_KERNELS = (*_PANEL_KERNELS, "depthwise_pairs", "row_tiles", "winograd", "depthwise", *_VECTOR_KERNELS)


def compile(graph: Graph, batch: int, threads: int | None = None, choices: Any = None) -> NativePlan:
    """Make a graph ready to run natively for one batch size.

    Example::

        plan = compile(graph, 1)
        (y,) = plan.run([x])

    Args:
        graph: validated, optimised, computing in float32.
        batch: the batch size N.
        threads: for the kernels; None uses all cores.
        choices: kernel choices by node name as `choose` returns them; None lets `default_choice` decide.

    Raises:
        ConvertError: the graph computes in another dtype than float32.
    """
    return _compile(graph, batch, threads, choices, False)


def _compile(graph: Graph, batch: int, threads: int | None, choices: Any, read_next: bool) -> NativePlan:
    """`compile`; read_next: whether another plan reads the outputs at once."""
    cores = threads or _C.get_num_threads()
    if batch == 1 and cores > 1:
        from sparse_engine.convert.parts import compile_parts

        parted = compile_parts(graph, cores, choices)
        if parted is not None:
            return parted
    share = _share(graph, batch, choices, cores)
    tail = _find_tail(graph) if share < batch else None
    if tail is not None:
        name = next(iter(_crossing(graph, tail)))
        pieces = (
            dataclasses.replace(graph, outputs=[name], nodes=graph.nodes[:tail]),
            dataclasses.replace(graph, inputs=[name], nodes=graph.nodes[tail:]),
        )
        for piece in pieces:
            piece.__dict__["_native_weights"] = graph.__dict__.setdefault("_native_weights", {})
        last = _Lowering(pieces[1], batch, choices, cores).finish(threads or 0)
        return TailedPlan(_compile(pieces[0], batch, threads, choices, True), last)
    count = batch // share if share else 1
    # Several passes run one per thread, a single one on all threads.
    lowering = _Lowering(graph, share, choices, 1 if count >= cores else cores, count)
    lowering.read_next = read_next
    plan = lowering.finish(threads or 0)
    if share == batch:
        return plan
    rest = _Lowering(graph, batch % share, choices, cores).finish(threads or 0) if batch % share else None
    return SplitPlan(
        plan, rest, batch // share, share, [shape_at(graph.values[name].shape, batch) for name in graph.outputs]
    )


_MOVED = 0.05  # of what the nodes write: so much may be copied to take several samples in one pass


def _share(graph: Graph, batch: int, choices: Any, threads: int) -> int:
    """How many samples one pass over the graph takes: few enough that activations stay in the cache."""
    if batch <= 1 or not _splits(graph):
        return batch
    one = _Lowering(graph, 1, choices, passes=batch)
    one.emit_steps()
    sample = max(1, 4 * one.arena)
    images = max(1, _C.cpu_info()["l3"] // 2 // max(1, threads) // sample)
    # As many as fill a vector with the smallest image, and beyond that as stay near (bench/NOTES.md).
    fewest = min((problem.pixels for problem in one.problems.values() if problem.pixels > 1), default=LANES)
    images = min(images, max(2 * _C.cpu_info()["l2"] // sample, -(-LANES // fewest)))
    wanted = 1
    while wanted * 2 <= images:
        wanted *= 2
    wanted = min(wanted, batch)
    # Samples side by side can need permuting between layers where one by itself does not (a transformer that puts the
    # tokens first): that costs more than fuller vectors bring. Not where a sample is a single vector all the way: one
    # by one each would read every weight again.
    several_pixels = any(problem.pixels > 1 for problem in one.problems.values())
    while wanted > 1 and several_pixels:
        several = _Lowering(graph, wanted, choices, passes=max(1, batch // wanted))
        several.emit_steps()
        moved = several.copied / wanted - one.copied
        if moved <= _MOVED * sum(math.prod(one.shape(node.output)) for node in graph.nodes):
            break
        wanted //= 2
    return wanted


_KEPT = 4  # an output of more than this part of the L3 is written past the caches


_TAIL = ("linear", "unary", "scalar", "affine", "softmax")


def _find_tail(graph: Graph) -> int | None:
    """The first node of a classifier: linear layers at the end that read one vector per sample.

    They have many weights and one use of each per sample, so a batch is best taken through them at once, even where the
    rest of the network runs image by image.
    """
    tail = len(graph.nodes)
    while tail > 0 and graph.nodes[tail - 1].op in _TAIL and len(graph.values[graph.nodes[tail - 1].output].shape) == 2:
        tail -= 1
    while tail < len(graph.nodes):
        crossing = _crossing(graph, tail)
        name = next(iter(crossing), "")
        if (
            tail > 0
            and len(crossing) == 1
            and len(graph.values[name].shape) == 2
            and graph.values[name].shape[0] == Dim(1)
            and graph.values[name].dtype == "float32"
            and any(node.op == "linear" for node in graph.nodes[tail:])
        ):
            return tail
        tail += 1
    return None


def _crossing(graph: Graph, index: int) -> set[str]:
    """The values (or inputs) that exist before a node and are needed from it on."""
    later = {name for node in graph.nodes[index:] for name in node.inputs} | set(graph.outputs)
    return later - {name for node in graph.nodes[index:] for name in node.outputs}


def _splits(graph: Graph) -> bool:
    """True when samples are independent and the batch is the leading dimension of every input and output."""
    for name in graph.inputs + graph.outputs:
        shape = graph.values[name].shape
        if (
            not shape
            or shape[0] != Dim(1, 0)
            or any(isinstance(size, Dim) for size in shape[1:])
            or graph.values[name].dtype != "float32"
        ):
            return False
    return samples_are_independent(graph)


@dataclass
class LinearChoice:
    """How one linear operator is computed.

    Args:
        kernel: "sparse" (panel kernel over kept entries), "row_tiles" (the same for convolutions, on tiles of image
        rows), "pairs" and "depthwise_pairs" (in bfloat16, two entries at a time), "dense" (panel kernel over all),
        "winograd" (over all, with half the multiplications), "depthwise", "vector" (one pixel; kept entries of each
        row, all where most are kept), "rows" (one pixel; all entries), or for one pixel and a rounded weight "lookup"
        or "bytes".
        panel: rows that share a load of the input.
        part: columns worked on at a time, at most 256.
        row_block: rows per work item, 0 for all.
        vectors: vectors of pixels per tile; rows of a row tile; lines of 32 pixels for "pairs".
    """

    kernel: str
    panel: int = 1
    part: int = 256
    row_block: int = 0
    vectors: int = 4

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_json(cls, data: Any) -> LinearChoice:
        """The inverse of `to_json`; raises ConvertError for what no kernel has, since choices also come from files."""
        ranges = {"panel": (1, 8), "part": (1, 256), "row_block": (-1, 1 << 24), "vectors": (1, 8)}
        if not isinstance(data, Mapping) or data.keys() != {"kernel", *ranges} or data["kernel"] not in _KERNELS:
            raise ConvertError(f"a kernel choice has a kernel, {', '.join(ranges)}; got {data!r:.120}")
        for key, (low, high) in ranges.items():
            if not isinstance(data[key], int) or isinstance(data[key], bool) or not low <= data[key] <= high:
                raise ConvertError(f"kernel choice: {key} must be an int from {low} to {high}, not {data[key]!r:.40}")
        if data["panel"] not in (1, 2, 4, 8):
            raise ConvertError(f"kernel choice: panel must be 1, 2, 4 or 8, not {data['panel']}")
        return cls(**data)


@dataclass
class LinearProblem:
    """What is to be computed by one conv2d or linear node: enough to choose a kernel for it."""

    name: str
    source: numpy.ndarray | Callable[[], numpy.ndarray]  # the weight, or what unpacks it
    rows: int
    groups: int
    geometry: dict[str, Any]  # as _C.Plan.conv takes it, with n, h, w
    pixels: int

    rows_of_weight: Callable[[], tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]] | None = None
    rounded: RoundedWeight | None = None  # the weight where it is kept in another precision
    times: float = 1  # how often it is computed for an image: once for each strip
    in_rows: tuple[bool, bool] = (False, False)  # a linear layer: whether input and output are [pixel][channel]
    _weight: numpy.ndarray | None = None
    _entries: dict[int, int] = field(default_factory=dict)

    def csr(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """row_ptr, columns and values of the weight, with columns counted over all groups."""
        if self.rows_of_weight is None or self._weight is not None:
            return csr_arrays(self.weight, self.groups)
        row_ptr, cols, values = self.rows_of_weight()
        return row_ptr, _over_groups(row_ptr, cols, self.groups, self.columns), values

    @property
    def nonzeros(self) -> int:
        """Entries of the weight that are not zero."""
        if self.rows_of_weight is None or self._weight is not None:
            return int(numpy.count_nonzero(self.weight))
        return int(self.rows_of_weight()[0][-1])

    @property
    def weight(self) -> numpy.ndarray:
        """The dense weight [rows, columns of its group]; see `forget`."""
        if self._weight is None:
            self._weight = self.source() if callable(self.source) else self.source
        return self._weight

    def panel_entries(self, panel: int) -> int:
        """`panel_entries` of the weight, counted once."""
        if panel not in self._entries:
            self._entries[panel] = panel_entries(self.weight, panel)
        return self._entries[panel]

    def forget(self) -> None:
        """Let go of a weight that was unpacked; it is unpacked again when somebody asks for it."""
        self._weight = None

    @property
    def columns(self) -> int:
        """Columns of a group."""
        return self.channels * self.taps // self.groups

    @property
    def channels(self) -> int:
        return self.geometry["c"]

    @property
    def taps(self) -> int:
        return self.geometry["r"] * self.geometry["s"]

    @property
    def out_width(self) -> int:
        g = self.geometry
        padded = g["w"] + g["padding"][1] + g["padding"][3]
        return (padded - g["dilation"][1] * (g["s"] - 1) - 1) // g["stride"][1] + 1

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels and _C.shifts_only(self.geometry)

    @property
    def pointwise(self) -> bool:
        g = self.geometry
        return self.taps == 1 and g["stride"] == (1, 1) and not any(g["padding"])

    @property
    def row_tiles(self) -> bool:
        """Whether it can run on tiles of image rows, one of whose parts has whole channels."""
        return self.groups == 1 and _C.row_tiles_apply(self.geometry)

    @property
    def pairs(self) -> bool:
        """Whether it can be computed in bfloat16."""
        return not self.vector and self.pixels > 0 and _C.shifts_only(self.geometry)

    @property
    def winograd(self) -> bool:
        """Whether Winograd's method along the rows applies: three or four taps per phase, weights of usual size."""
        if self.groups != 1 or not _C.winograd_applies(self.geometry):
            return False
        return bool(numpy.abs(self.weight).max(initial=0.0) < _WINOGRAD_LARGEST)  # False for NaN

    @property
    def vector(self) -> bool:
        return self.pixels == 1 and self.groups == 1 and self.pointwise


_WIDE_PANELS = LANES == 16  # the register file holds 8 rows × 3 vectors
_PANEL_COST = {1: 1.35, 2: 1.2, 4: 1.05, 8: 1.0} if _WIDE_PANELS else {1: 1.3, 2: 1.15, 4: 1.0}
_WINOGRAD_LARGEST = 1e18  # of a weight, as the native kernel has it
_WINOGRAD_WIDTH = 9  # of the output: narrower images waste too much of their tiles of four
DENSE_PANEL = 8 if _WIDE_PANELS else 4
# Vectors per tile that keep enough sums in flight (an FMA takes four cycles) and the tile small.
PANEL_VECTORS = {1: 4, 2: 4, 4: 6 if _WIDE_PANELS else 3, 8: 2 if _WIDE_PANELS else 1}


def panel_entries(weight: numpy.ndarray, panel: int) -> int:
    """Multiplications per pixel of a panel kernel: kept columns of each group of `panel` rows, times `panel`."""
    rows = weight.shape[0]
    kept = weight != 0
    if panel > 1:
        padded = numpy.zeros((-(-rows // panel) * panel, weight.shape[1]), dtype=bool)
        padded[:rows] = kept
        kept = padded.reshape(-1, panel, weight.shape[1]).any(axis=1)
    return int(numpy.count_nonzero(kept)) * panel


def default_choice(problem: LinearProblem, threads: int = 0) -> LinearChoice:
    """The kernel that the cost model expects to be fastest: stored entries times an entry's cost by panel width."""
    if problem.depthwise:
        return LinearChoice("depthwise")
    if problem.vector:
        return LinearChoice("vector" if problem.rounded is None else rounded_kernels(problem.rounded)[0])
    costs = {panel: problem.panel_entries(panel) * cost for panel, cost in _PANEL_COST.items()}
    best = min(costs, key=costs.__getitem__)
    dense = problem.groups == 1 and costs[best] >= 0.97 * problem.rows * problem.columns
    if dense and problem.out_width >= _WINOGRAD_WIDTH and problem.winograd:
        return LinearChoice("winograd")
    panel = DENSE_PANEL if dense else best
    vectors = PANEL_VECTORS[panel]
    choice = LinearChoice("dense" if dense else "sparse", panel, 128 if panel == 1 else 256, 0, vectors)
    choice.row_block = default_row_block(problem, choice, threads)
    return choice


def rounded_kernels(weight: RoundedWeight) -> list[str]:
    """What may compute the product of a rounded weight and one vector, the likely fastest first."""
    if weight.dense:
        return ["rows"]
    return ["bytes", "lookup"] if looks_up_bytes(weight.precision) else ["lookup"]


def tile_count(pixels: int, vectors: int, threads: int) -> int:
    """Tiles that the native operator cuts its pixels into, but for the limit that registers set on their size."""
    total = -(-pixels // LANES)
    count = max(1, (total + vectors // 2) // vectors)
    even = -(-count // threads) * threads
    return even if even <= total else count


def default_row_block(problem: LinearProblem, choice: LinearChoice, threads: int = 0) -> int:
    """Rows per item so that there is enough to hand out dynamically when the pixels alone make too few tiles.

    A layer that copies its input into tiles does so for every row block again: it gets fewer of them.
    """
    threads = threads or _C.get_num_threads()
    tiles = tile_count(problem.pixels, choice.vectors, threads)
    wanted = 4 * threads if problem.pointwise else threads
    if threads == 1 or tiles >= wanted:
        return 0
    blocks = -(-wanted // tiles)
    return max(32, -(-problem.rows // blocks // 8) * 8)


# ---- places


class _Storage:
    """A piece of the arena (or of an external buffer) with a lifetime in steps. It may live inside another one."""

    def __init__(self, floats: int, buffer: int = 0, offset: int = 0) -> None:
        self.floats = floats
        self.buffer = buffer
        self.offset = offset  # final for external buffers, set by the memory plan in the arena
        self.first = math.inf
        self.last = -1.0
        self.host: tuple[_Storage, int] | None = None

    def root(self) -> tuple[_Storage, int]:
        storage, offset = self, 0
        while storage.host is not None:
            offset += storage.host[1]
            storage = storage.host[0]
        return storage, offset


@dataclass
class _Place:
    storage: _Storage
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    half: bool = False  # bfloat16: sizes and strides are of halves, offsets of floats

    def at(self) -> tuple[int, int]:
        root, offset = self.storage.root()
        return root.buffer, root.offset + offset + self.offset

    def view(self) -> tuple[int, int, list[int], list[int]]:
        buffer, offset = self.at()
        return buffer, offset, list(self.sizes), list(self.strides)

    def with_view(self, sizes: Sequence[int], strides: Sequence[int], shift: int = 0) -> _Place:
        return _Place(self.storage, self.offset + shift, tuple(sizes), tuple(strides), self.half)

    def permuted(self, dims: Sequence[int]) -> _Place:
        return self.with_view([self.sizes[d] for d in dims], [self.strides[d] for d in dims])

    @property
    def order(self) -> list[int]:
        """Dimensions from the outermost to the innermost."""
        return sorted(range(len(self.sizes)), key=lambda d: (-self.strides[d], d))

    def is_planes(self, channel: int) -> bool:
        """Channels at any distance, everything else contiguous and in order."""
        expected = 1
        for d in reversed(range(len(self.sizes))):
            if d == channel or self.sizes[d] == 1:
                continue
            if self.strides[d] != expected:
                return False
            expected *= self.sizes[d]
        return True


def _contiguous_strides(sizes: Sequence[int]) -> list[int]:
    strides, step = [0] * len(sizes), 1
    for d in reversed(range(len(sizes))):
        strides[d] = step
        step *= max(1, sizes[d])
    return strides


def _view_strides(sizes: Sequence[int], strides: Sequence[int], shape: Sequence[int]) -> list[int] | None:
    """Strides that show the same memory in another shape, or None where that needs a copy."""
    if math.prod(sizes) == 0:
        return _contiguous_strides(shape)
    result = [1] * len(shape)
    old = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    d = len(shape) - 1
    while old:
        # The longest run of trailing dimensions that is one strided block.
        size, step = old.pop()
        block = size
        while old and old[-1][1] == step * block:
            block *= old.pop()[0]
        while d >= 0 and (block > 1 or shape[d] == 1):
            if block % shape[d]:
                return None
            result[d] = step
            step *= shape[d]
            block //= shape[d]
            d -= 1
            if block == 1:
                break
        if block != 1:
            return None
    while d >= 0:
        if shape[d] != 1:
            return None
        d -= 1
    return result


def _activation(activation: Mapping[str, Any] | None) -> tuple[str, float, float]:
    if activation is None:
        return _NO_ACTIVATION
    kind = activation["kind"]
    if kind == "relu":
        return ("clamp", 0.0, math.inf)
    if kind == "clamp":
        low, high = activation["min"], activation["max"]
        return ("clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high))
    if kind == "leaky_relu":
        return (kind, float(activation["slope"]), 0.0)
    if kind == "elu":
        return (kind, 1.0, 0.0)
    if kind == "softplus":
        return (kind, 1.0, 20.0)
    return (kind, 0.0, 0.0)


def _array(tensor: Tensor) -> numpy.ndarray:
    return numpy.ascontiguousarray(tensor.detach().to(torch.float32).numpy())


# ---- weights


def csr_arrays(weight: numpy.ndarray, groups: int) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """row_ptr, columns and values of a weight [rows, columns of a group], with columns counted over all groups."""
    rows, cols = numpy.nonzero(weight)
    row_ptr = numpy.zeros(weight.shape[0] + 1, dtype=numpy.int64)
    numpy.cumsum(numpy.bincount(rows, minlength=weight.shape[0]), out=row_ptr[1:])
    return row_ptr, _over_groups(row_ptr, cols.astype(numpy.int32), groups, weight.shape[1]), weight[rows, cols]


def _over_groups(row_ptr: numpy.ndarray, cols: numpy.ndarray, groups: int, columns: int) -> numpy.ndarray:
    """Columns of a group's part of the input, counted over the whole input."""
    if groups == 1:
        return cols
    rows = len(row_ptr) - 1
    row = numpy.repeat(numpy.arange(rows), numpy.diff(row_ptr))
    return (cols + row // (rows // groups) * columns).astype(numpy.int32)


def make_weight(problem: LinearProblem, choice: LinearChoice) -> Any:
    """The `_C.Weight` of a choice."""
    shape = (problem.rows, problem.columns)
    if choice.kernel == "depthwise":
        return _C.Weight.vector(None, None, problem.weight, *shape)
    if choice.kernel == "vector":
        if problem.nonzeros > 0.5 * problem.rows * problem.columns:
            return _C.Weight.vector(None, None, problem.weight, *shape)
        return _C.Weight.vector(*problem.csr(), *shape)
    if choice.kernel == "rows" and problem.rounded is None:
        return _C.Weight.vector(None, None, problem.weight, *shape)
    if choice.kernel in ROUNDED_KERNELS:
        weight = problem.rounded
        if weight is None:
            raise ConvertError(f"{problem.name}: the weight is not rounded")
        scales = None if weight.scales is None else weight.scales.numpy()
        if choice.kernel == "rows":
            return _C.Weight.product(None, None, weight.rows(), scales, *shape, False)
        return _C.Weight.product(*weight.csr(), scales, *shape, choice.kernel == "bytes")
    if choice.kernel == "winograd":
        return _C.Weight.winograd(problem.weight, problem.geometry)
    if choice.kernel == "depthwise_pairs":
        return _C.Weight.depthwise_pairs(problem.weight)
    if choice.kernel == "pairs":
        return _C.Weight.pairs(*problem.csr(), problem.columns * problem.groups, choice.part, choice.row_block)
    if choice.kernel == "row_tiles":
        part = max(problem.taps, choice.part // problem.taps * problem.taps)
        return _C.Weight.row_tiles(*problem.csr(), problem.geometry, part, choice.vectors)
    if choice.kernel == "dense":
        if problem.groups != 1:
            raise ConvertError(f"{problem.name}: the dense kernel has no groups")
        return _C.Weight.dense(problem.weight, choice.panel, choice.part, choice.row_block)
    columns = problem.columns * problem.groups
    return _C.Weight.sparse(*problem.csr(), columns, choice.panel, choice.part, choice.row_block)


def add_linear(
    plan: Any,
    problem: LinearProblem,
    choice: LinearChoice,
    weight: Any,
    bias: numpy.ndarray | None,
    x: tuple[int, int, list[int], list[int]],
    workspace: tuple[int, int],
    out: tuple[int, int],
    out_stride: int,
    residual: tuple[int, int] | None,
    residual_stride: int,
    activation: tuple[str, float, float],
    half: tuple[bool, bool, bool] = (False, False, False),
) -> None:
    """Append one linear operator to a `_C.Plan`. half: whether x, output and residual are in bfloat16, for "pairs"."""
    if choice.kernel in PAIR_KERNELS:
        plan.pairs(
            problem.name, problem.geometry, weight, bias, x, half[0], workspace, (out, out_stride, half[1]),
            (residual, residual_stride, half[2]) if residual is not None else None, activation, choice.vectors
        )  # fmt: skip
        return
    if choice.kernel in _VECTOR_KERNELS:
        plan.vector(problem.name, weight, bias, (x[0], x[1]), out, residual, activation)
        return
    depthwise = choice.kernel == "depthwise"
    multiplier = problem.rows // problem.channels if depthwise else 1
    plan.conv(
        problem.name, problem.geometry, weight, bias, x, workspace, out, out_stride, residual, residual_stride,
        activation, choice.vectors, depthwise, multiplier
    )  # fmt: skip


# ---- the lowering


@dataclass
class _Step:
    emit: Callable[[Any], None]
    reads: list[_Place] = field(default_factory=list)
    writes: list[_Place] = field(default_factory=list)


class _Lowering:
    def __init__(self, graph: Graph, batch: int, choices: Any, threads: int = 0, passes: int = 1) -> None:
        self.graph = graph
        self.passes = passes  # that make a call
        self.read_next = False  # whether another plan reads the outputs at once
        self.threads = threads or _C.get_num_threads()
        self.batch = batch
        self.choices = choices
        self.steps: list[_Step] = []
        self.places: dict[str, _Place] = {}
        self.foreign: set[str] = (
            set()
        )  # values of other dtypes: they live in Python and pass between fallback nodes only
        self.constants: list[numpy.ndarray] = []
        self.constant_floats = 0
        self.weights: dict[Any, Any] = graph.__dict__.setdefault("_native_weights", {})
        self.problems: dict[str, LinearProblem] = {}
        self.concats = _plan_concats(graph)
        self.concat_hosts: dict[str, _Place] = {}
        self.state = threading.local()
        self.constants_buffer = len(graph.inputs) + len(graph.outputs) + 1
        self.arena = 0
        self.copied = 0  # floats that copies between layouts move
        # What a strip has of a value goes by a name of its own.
        self.strip_sizes: dict[str, tuple[int, ...]] = {}
        self.target: _Place | None = None  # where the value that is made next is to lie
        self.spare = 0  # floats of room at the end of its planes
        self.index = 0  # of the node being lowered
        self.half: set[str] = set()  # values that are kept in bfloat16
        self.last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
        for dtype in (graph.values[name].dtype for name in graph.inputs + graph.outputs):
            if dtype == "float64":
                raise ConvertError("the native runtime computes in float32; this graph has float64 inputs or outputs")

    # -- helpers

    def shape(self, name: str) -> tuple[int, ...]:
        strip = self.strip_sizes.get(name)
        return shape_at(self.graph.values[name].shape, self.batch) if strip is None else strip

    def native(self, name: str) -> bool:
        return self.graph.values[name].dtype == "float32"

    def step(self, emit: Callable[[Any], None], reads: Sequence[_Place] = (), writes: Sequence[_Place] = ()) -> None:
        self.steps.append(_Step(emit, list(reads), list(writes)))

    def new(self, sizes: Sequence[int], outer: Sequence[int] | None = None) -> _Place:
        """A fresh place: `outer` dimensions first, a padded product of the others apart; None means plain row-major."""
        sizes = tuple(sizes)
        if outer is None:
            return _Place(_Storage(max(1, math.prod(sizes))), 0, sizes, tuple(_contiguous_strides(sizes)))
        inner = [d for d in range(len(sizes)) if d not in outer]
        strides, step = [0] * len(sizes), 1
        for d in reversed(inner):
            strides[d] = step
            step *= max(1, sizes[d])
        step = _C.padded_pixels(step + self.spare)
        for d in reversed(outer):
            strides[d] = step
            step *= max(1, sizes[d])
        return _Place(_Storage(max(1, step)), 0, sizes, tuple(strides))

    def new_output(self, sizes: Sequence[int], name: str = "") -> _Place:
        """A place for images that a node makes, in channel planes; of a named value perhaps the caller's memory."""
        target, self.target = self.target, None
        target = target or self._callers(name)
        return self.new_value(sizes) if target is None else target

    def new_value(self, sizes: Sequence[int]) -> _Place:
        """A fresh place for the images of the value that is being made; what is only in between has `new`."""
        return self.new(sizes, [1])

    def _callers(self, name: str) -> _Place | None:
        """The caller's memory for an output that nothing else reads, where kernels that write whole vectors of planes
        write no further."""
        graph = self.graph
        if name not in graph.outputs or name in self.last_use:
            return None
        place = self._own_rows(self.outside(len(graph.inputs) + graph.outputs.index(name), name), name)
        channels_only = place.sizes[0] == 1 and place.sizes[1] > 0
        return place if channels_only and _suits(place, place.sizes[2] * place.sizes[3]) else None

    def _own_rows(self, place: _Place, name: str) -> _Place:
        """What this plan makes of an output."""
        return place

    def like(self, reference: _Place, sizes: Sequence[int]) -> _Place:
        """A fresh place for `sizes` in the memory order of `reference` (of the same rank)."""
        order = [d for d in reference.order if sizes[d] != 1]
        if not order:
            return self.new(sizes)
        outer = order[:1]
        if order == sorted(order) and outer[0] == 0 and len(sizes) != 4:
            return self.new(sizes)
        inner = [d for d in range(len(sizes)) if d not in outer]
        strides, step = [0] * len(sizes), 1
        rest = sorted(inner, key=lambda d: order.index(d) if d in order else -1)
        for d in reversed(rest):
            strides[d] = step
            step *= max(1, sizes[d])
        strides[outer[0]] = _C.padded_pixels(step)
        return _Place(_Storage(max(1, strides[outer[0]] * sizes[outer[0]])), 0, tuple(sizes), tuple(strides))

    def copy(self, source: _Place, target: _Place, name: str, past_cache: bool = False) -> _Place:
        if source.half or target.half:
            raise ConvertError(f"{name}: there is no copy of values in bfloat16")
        self.copied += math.prod(target.sizes)
        self.step(lambda plan: plan.copy(name, source.view(), target.view(), past_cache), [source], [target])
        return target

    def planes(self, place: _Place, channel: int, name: str) -> _Place:
        """`place` as channel planes in the arena, copied if need be."""
        if place.is_planes(channel) and place.storage.root()[0].buffer == 0:
            return place
        return self.copy(place, self.new(place.sizes, [channel]), f"{name}.layout")

    def constant(self, array: numpy.ndarray) -> _Place:
        """A place for a tensor that never changes, in the buffer that is passed to every run."""
        array = numpy.ascontiguousarray(array, dtype=numpy.float32)
        offset = self.constant_floats
        self.constants.append(array.reshape(-1))
        padded = -(-max(1, array.size) // _ALIGN) * _ALIGN
        self.constants.append(numpy.zeros(padded - array.size, dtype=numpy.float32))
        self.constant_floats += padded
        storage = _Storage(padded, self.constants_buffer, offset)
        return _Place(storage, 0, array.shape, tuple(_contiguous_strides(array.shape)))

    def weight_shape(self, node: Node) -> tuple[int, ...]:
        return constant_shape(self.graph, node.params["weight"])

    def problem(self, node: Node, rows: int, groups: int, geometry: dict[str, Any], pixels: int) -> LinearProblem:
        """What a linear operator computes; its weight is read when somebody asks for it."""
        graph, name = self.graph, node.params["weight"]
        return LinearProblem(
            node.name, lambda: _array(graph.constants[name].flatten(1)), rows, groups, geometry, pixels,
            lambda: constant_csr(graph, name), constant_rounded(graph, name)
        )  # fmt: skip

    def params(self, node: Node) -> dict[str, Tensor]:
        return {role: self.graph.constants[name] for role, name in node.params.items()}

    def broadcast(self, place: _Place, sizes: Sequence[int]) -> _Place:
        missing = len(sizes) - len(place.sizes)
        old_sizes = (1,) * missing + place.sizes
        old_strides = (0,) * missing + place.strides
        strides = [
            0 if old == 1 and new != 1 else stride
            for old, new, stride in zip(old_sizes, sizes, old_strides, strict=True)
        ]
        return place.with_view(sizes, strides)

    # -- the whole

    def finish(self, threads: int) -> NativePlan:
        graph = self.graph
        self.emit_steps()
        outside = [self.outside(index, name) for index, name in enumerate(graph.inputs + graph.outputs)]
        floats = [place.storage.floats for place in outside] + [self.constant_floats]
        plan = _C.Plan(self.arena, [max(1, n) for n in floats])
        for step in self.steps:
            step.emit(plan)
        constants = numpy.concatenate(self.constants) if self.constants else numpy.zeros(1, dtype=numpy.float32)
        shapes = [self.shape(name) for name in graph.outputs]
        return NativePlan(
            plan, list(graph.inputs), list(graph.outputs), shapes, set(self.foreign), constants, threads, self.state
        )

    def emit_steps(self) -> None:
        """Give every value its place and lay out the arena."""
        graph = self.graph
        for index, name in enumerate(graph.inputs):
            if not self.native(name):
                self.foreign.add(name)
                continue
            self.places[name] = self.outside(index, name)
        chains = self.chains()
        self.half = self.half_values(chains)
        behind = 0  # nodes before this one belong to a chain
        for self.index, node in enumerate(graph.nodes):
            if self.index in chains:
                behind = chains[self.index].last
                self.emit_chain(chains[self.index])
            elif self.index >= behind:
                getattr(self, f"op_{node.op}")(node)
        for index, name in enumerate(graph.outputs):
            if name in self.foreign:
                continue
            if math.prod(self.shape(name)):
                target = self.outside(len(graph.inputs) + index, name)
                if not self._same_memory(self.places[name], target):
                    # What the caches will not keep till the call ends must not drive out what the next pass needs.
                    cache = _C.cpu_info()["l3"]
                    large = 4 * math.prod(target.sizes) * self.passes > cache // _KEPT and cache > 0
                    large = large and not self.read_next
                    self.copy(self.places[name], target, f"output.{name}", large)
        self.arena = self._memory_plan()

    # -- bfloat16

    def half_values(self, chains: Mapping[int, Chain]) -> set[str]:
        """What is kept in bfloat16: what layers that compute in it make, where all that reads it computes in it too."""
        graph = self.graph
        in_strips = {index for first, chain in chains.items() for index in range(first, chain.last)}
        pairs = {
            node.name
            for index, node in enumerate(graph.nodes)
            if node.op in ("conv2d", "linear") and index not in in_strips and self._in_pairs(node)
        }
        made = {node.output: node.op for node in graph.nodes if node.name in pairs}
        for node in graph.nodes:
            for name in node.inputs:
                # Planes of a convolution are not those of a linear layer, whose channels come last.
                if node.name not in pairs or made.get(name) != node.op:
                    made.pop(name, None)
        return {name for name in made if name not in graph.outputs and math.prod(self.shape(name))}

    def _in_pairs(self, node: Node) -> bool:
        """Whether a node computes in bfloat16 at this batch size."""
        known = (self.choices or {}).get(node.name, {}).get("choice")
        if not isinstance(known, Mapping) or known.get("kernel") not in PAIR_KERNELS:
            return False
        if math.prod(self.shape(node.output)) == 0:
            return False
        sizes = self.shape(node.inputs[0])
        problem = self._linear_problem(node, sizes) if node.op == "linear" else self._conv_problem(node, sizes)
        choice = _lookup(self.choices, problem, self.threads)
        return choice is not None and choice.kernel in PAIR_KERNELS

    def new_half(self, sizes: Sequence[int], channel: int) -> _Place:
        """A fresh place in channel planes of bfloat16."""
        inner = [d for d in range(len(sizes)) if d != channel]
        strides, step = [0] * len(sizes), 1
        for d in reversed(inner):
            strides[d] = step
            step *= max(1, sizes[d])
        strides[channel] = _C.padded_half_pixels(step)
        floats = max(1, strides[channel] * sizes[channel] // 2)
        return _Place(_Storage(floats), 0, tuple(sizes), tuple(strides), True)

    # -- strips

    def chains(self) -> dict[int, Chain]:
        """Nodes that run strip by strip, by the first one's index: where one thread has one image."""
        if self.batch != 1 or self.threads != 1:
            return {}
        return find_chains(self.graph, {name: self.shape(name) for name in self.graph.values})

    def rows(self, name: str, low: int, high: int) -> _Place:
        """The rows [low, high) of a value."""
        place = self.places[name]
        sizes = (*place.sizes[:2], high - low, place.sizes[3])
        return place.with_view(sizes, place.strides, low * place.strides[2])

    def emit_chain(self, chain: Chain) -> None:
        """Lower the nodes of a chain for some rows of its output after the other."""
        nodes = self.graph.nodes[chain.first : chain.last]
        name = nodes[-1].output
        self.spare = self._spare(chain, name)
        self.places[name] = self.new_value(self.shape(name))
        self.spare = 0
        self._emit_strips(nodes, chain.rows, *self.own(name))

    def own(self, name: str) -> tuple[int, int]:
        """The rows [first, last) of a value that this plan makes: all."""
        return 0, self.shape(name)[2]

    def _spare(self, chain: Chain, name: str) -> int:
        """Room at the end of a plane for a strip that begins inside a vector and ends with a whole one."""
        return 0 if chain.rows * self.shape(name)[3] % _ALIGN == 0 else _ALIGN

    def _emit_strips(self, nodes: Sequence[Node], step: int, begin: int, end: int) -> None:
        """The rows [begin, end) of a chain's output, whose place is there already, `step` at a time."""
        heights = {node.inputs[0]: self.height(node.inputs[0]) for node in nodes}
        largest: dict[str, LinearProblem] = {}
        pixels: dict[str, int] = {}
        for first in range(begin, end, step):
            strips = rows_in_chain(self.graph, nodes, heights, first, min(end, first + step))
            x = self.rows(nodes[0].inputs[0], *strips[0].read)
            for node, rows in zip(nodes, strips, strict=True):
                x = self._strip(node, rows, x, node is nodes[-1])
                if node.name in self.problems:
                    problem = self.problems[node.name]
                    largest[node.name] = max(largest.get(node.name, problem), problem, key=lambda p: p.pixels)
                    pixels[node.name] = pixels.get(node.name, 0) + problem.pixels
        for name, problem in largest.items():  # a usual strip stands for all
            problem.times = pixels[name] / problem.pixels
            self.problems[name] = problem

    def _strip(self, node: Node, rows: Rows, x: _Place, last: bool) -> _Place:
        """Lower a node for some rows of its output. Its input is at `x`; a chain's last node has its place already."""
        seen, added, made = f"{node.name} reads", f"{node.name} adds", f"{node.name} makes"
        _, channels, _, width = shape_at(self.graph.values[node.output].shape, 1)
        self.strip_sizes[made] = (1, channels, rows.out[1] - rows.out[0], width)
        self.places[seen] = x
        inputs = [seen]
        if len(node.inputs) == 2:
            self.places[added] = self.rows(node.inputs[1], *rows.out)
            inputs.append(added)
        changed = dataclasses.replace(padded(node, rows), inputs=inputs, outputs=[made])
        self.target = self.rows(node.output, *rows.out) if last else None
        if node.op == "conv2d":
            _Lowering.op_conv2d(self, changed)
        else:
            _Lowering._pool(self, changed, node.op == "max_pool2d")
        for name in inputs:
            del self.places[name]
        return self.places.pop(made)

    def height(self, name: str) -> int:
        """Rows of a whole value."""
        return shape_at(self.graph.values[name].shape, self.batch)[2]

    def outside(self, index: int, name: str) -> _Place:
        """Where the caller keeps a value: inputs and outputs, counted together, are contiguous tensors."""
        sizes = shape_at(self.graph.values[name].shape, self.batch)
        storage = _Storage(max(1, math.prod(sizes)), index + 1)
        return _Place(storage, 0, sizes, tuple(_contiguous_strides(sizes)))

    def _memory_plan(self) -> int:
        """Offsets for all storages: the largest first, each at the lowest place that is free during its lifetime."""
        for index, step in enumerate(self.steps):
            for place in (*step.reads, *step.writes):
                root = place.storage.root()[0]
                root.first, root.last = min(root.first, index), max(root.last, index)
        roots = {
            id(root): root
            for step in self.steps
            for place in (*step.reads, *step.writes)
            if (root := place.storage.root()[0]).buffer == 0
        }
        placed: list[_Storage] = []
        top = 0
        for storage in sorted(roots.values(), key=lambda s: (-s.floats, s.first)):
            floats = -(-storage.floats // _ALIGN) * _ALIGN + _ALIGN
            busy = sorted(
                (other.offset, other.offset + -(-other.floats // _ALIGN) * _ALIGN + _ALIGN)
                for other in placed
                if other.first <= storage.last and storage.first <= other.last
            )
            offset = 0
            for begin, end in busy:
                if offset + floats <= begin:
                    break
                offset = max(offset, end)
            storage.offset = offset
            placed.append(storage)
            top = max(top, offset + floats)
        return top

    # -- linear operators

    def _geometry(self, node: Node, sizes: Sequence[int]) -> dict[str, Any]:
        """What `_C.Plan.conv` wants to know of a convolution of images of these sizes."""
        n, c, h, w = sizes
        r, s = self.weight_shape(node)[2:]
        attrs = node.attrs
        return {
            "n": n, "c": c, "h": h, "w": w, "r": r, "s": s,
            "stride": tuple(attrs["stride"]), "padding": tuple(attrs["padding"]), "dilation": tuple(attrs["dilation"]),
        }  # fmt: skip

    def _conv_problem(self, node: Node, x_sizes: Sequence[int]) -> LinearProblem:
        n, _, height, width = self.shape(node.output)
        rows, geometry = self.weight_shape(node)[0], self._geometry(node, x_sizes)
        return self.problem(node, rows, node.attrs["groups"], geometry, n * height * width)

    def _linear_problem(self, node: Node, x_sizes: Sequence[int]) -> LinearProblem:
        rows, columns = self.weight_shape(node)
        geometry = {
            "n": 1, "c": columns, "h": 1, "w": math.prod(x_sizes[:-1]), "r": 1, "s": 1,
            "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1),
        }  # fmt: skip
        return self.problem(node, rows, 1, geometry, geometry["w"])

    def op_conv2d(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        sizes = self.shape(node.output)
        if math.prod(sizes) == 0:
            self.places[node.output] = self.new_output(sizes)
            return
        problem = self._conv_problem(node, x.sizes)
        pixels, phases = problem.pixels, _C.phase_floats(problem.geometry)
        if phases == 0:
            # A 1×1 convolution without padding reads whole vectors of planes. Anything shifted reads through masks, as
            # this does where planes follow each other without room for whole vectors: the user's own memory will do.
            direct = x.is_planes(1) and (
                not problem.pointwise
                or x.storage.root()[0].buffer == 0
                or _suits(x, pixels)
                or (pixels % LANES != 0 and x.strides[1] == pixels > _MASKED_FROM and self.passes == 1)
            )
            if not direct or (problem.pixels == 1 and x.strides[1] != 1 and not x.half):
                x = self.copy(x, self.new(x.sizes, [1]), f"{node.name}.layout")
        elif x.strides[3] > 2 or x.strides[3] < 1:
            x = self.copy(x, self.new(x.sizes, [1]), f"{node.name}.layout")
        spare = self.spare
        if pixels == 1 and self._choice(problem).kernel not in _VECTOR_KERNELS:
            self.spare = LANES - 1  # kernels for many pixels store whole vectors
        out = self.new_half(sizes, 1) if node.output in self.half else self.new_output(sizes, node.output)
        self.spare = spare
        self._linear_operator(node, problem, x, out, 1, phases)

    def op_linear(self, node: Node) -> None:
        columns = self.weight_shape(node)[1]
        x = self.places[node.inputs[0]]
        last = len(x.sizes) - 1
        sizes = self.shape(node.output)
        pixels = math.prod(x.sizes[:-1])
        if math.prod(sizes) == 0:
            self.places[node.output] = self.new(sizes, [last])
            return
        problem = self._linear_problem(node, x.sizes)
        if columns == 0:
            raise ConvertError(f"{node.name}: a linear layer without inputs")
        if self._in_rows(node, problem, x):
            return
        x = x if pixels == 1 and x.strides[last] == 1 else self.planes(x, last, node.name)
        if pixels == 1 and x.strides[last] != 1 and columns > 1:
            x = self.copy(x, self.new(x.sizes, [last]), f"{node.name}.layout")
        flat = x.with_view((1, columns, 1, pixels), (0, x.strides[last] if columns > 1 else 1, 0, 1))
        out = self.new_half(sizes, last) if node.output in self.half else self.new(sizes, [last])
        self._linear_operator(node, problem, flat, out, last, 0)

    def _in_rows(self, node: Node, problem: LinearProblem, x: _Place) -> bool:
        """Lower a linear layer that reads or writes rows [pixel][channel] as they are, the caller's for instance.

        The kernel transposes them tile by tile, which costs less than a pass to planes or back. False where neither
        end is in rows or the kernel knows planes only: then nothing happened.
        """
        pixels, columns, last = problem.pixels, problem.channels, len(x.sizes) - 1
        choice = self._choice(problem)
        if choice.kernel not in ("sparse", "dense") or pixels == 1 or x.half:
            return False
        strides = _view_strides(x.sizes, x.strides, (pixels, columns))
        reads = strides is not None and strides[1] == 1 and columns > 1
        written = self._callers_rows(node.output) if problem.rows > 1 else None
        if not reads and written is None:
            return False
        if not reads or strides is None:
            x = self.planes(x, last, node.name)
            strides = [1, x.strides[last]]
        out = self.new(self.shape(node.output), [last]) if written is None else written
        seen = x.with_view((pixels, columns), strides)
        out_strides = (1, out.strides[last]) if written is None else (problem.rows, 1)
        made = out.with_view((pixels, problem.rows), out_strides)
        bias, residual, weight = self._bias(node), self._residual(node, last), self._weight(node, problem, choice)
        activation = _activation(node.attrs["activation"])
        residual_stride = residual.strides[last] if residual is not None else 0
        problem.in_rows = reads, written is not None
        self.problems[node.name] = problem

        def emit(plan: Any) -> None:
            plan.linear(
                node.name, weight(), bias, seen.view(), made.view(), residual.at() if residual is not None else None,
                residual_stride, activation, choice.vectors
            )  # fmt: skip

        self.step(emit, [x] + ([residual] if residual is not None else []), [out])
        self.places[node.output] = out
        return True

    def _callers_rows(self, name: str) -> _Place | None:
        """The caller's memory for an output that nothing else reads."""
        graph = self.graph
        if name not in graph.outputs or name in self.last_use or graph.outputs.count(name) > 1:
            return None
        return self.outside(len(graph.inputs) + graph.outputs.index(name), name)

    def _bias(self, node: Node) -> numpy.ndarray | None:
        return _array(self.graph.constants[node.params["bias"]]) if "bias" in node.params else None

    def _residual(self, node: Node, channel: int) -> _Place | None:
        if len(node.inputs) < 2:
            return None
        return self.planes(self.places[node.inputs[1]], channel, f"{node.name}.residual")

    def _weight(self, node: Node, problem: LinearProblem, choice: LinearChoice) -> Callable[[], Any]:
        """The native weight of a node, packed when the first plan wants it and shared with those after it."""
        height = choice.vectors if choice.kernel == "row_tiles" else 0
        key = (node.params["weight"], node.name, choice.kernel, choice.panel, choice.part, choice.row_block, height)
        problem.forget()

        def packed() -> Any:
            if key not in self.weights:  # only for a plan that is made: others ask for the problems alone
                self.weights[key] = make_weight(problem, choice)
                problem.forget()
            return self.weights[key]

        return packed

    def _linear_operator(
        self, node: Node, problem: LinearProblem, x: _Place, out: _Place, channel: int, phases: int
    ) -> None:
        self.problems[node.name] = problem
        choice = self._choice(problem)
        if choice.kernel in ("winograd", "row_tiles"):
            phases = 0  # they read the rows as they are
            if x.strides[3] != 1 and x.sizes[3] > 1:
                x = self.copy(x, self.new(x.sizes, [1]), f"{node.name}.layout")
        if choice.kernel in _VECTOR_KERNELS and x.strides[1] != 1 and problem.channels > 1:
            x = self.copy(x, self.new(x.sizes, [1]), f"{node.name}.layout")
        weight, bias, residual = self._weight(node, problem, choice), self._bias(node), self._residual(node, channel)
        activation = _activation(node.attrs["activation"])
        if choice.kernel in PAIR_KERNELS:
            phases = _C.phase_floats(problem.geometry, half=True)
        workspace = _Place(_Storage(phases), 0, (phases,), (1,)) if phases else None
        residual_stride = (
            residual.strides[channel]
            if residual is not None and problem.rows > 1
            else (out.strides[channel] if residual is not None else 0)
        )

        if choice.kernel not in PAIR_KERNELS and (x.half or out.half or (residual is not None and residual.half)):
            raise ConvertError(f"{node.name}: {choice.kernel} knows no bfloat16")

        def emit(plan: Any) -> None:
            add_linear(
                plan, problem, choice, weight(), bias, x.view(),
                workspace.at() if workspace else (0, 0), out.at(),
                out.strides[channel],
                residual.at() if residual is not None else None, residual_stride, activation,
                (x.half, out.half, residual is not None and residual.half),
            )  # fmt: skip

        if (
            residual is not None
            and x.storage.root()[0] is not residual.storage.root()[0]  # one may lie inside the other
            and self._may_overwrite(node.inputs[1], residual, out)
        ):
            out = residual  # added to where it lies: a third less to move than with an output of its own
        reads = [x] + ([residual] if residual is not None else [])
        self.step(emit, reads, [out] + ([workspace] if workspace else []))
        self.places[node.output] = out

    def _may_overwrite(self, name: str, value: _Place, out: _Place) -> bool:
        """Whether the node being lowered is the last to need a value, and its output could lie in the same memory."""
        storage = value.storage
        if storage.root()[0] is not storage or storage.buffer != 0 or storage.floats != out.storage.floats:
            return False
        if out.storage.buffer != 0:
            return False
        if (value.offset, value.sizes, value.strides, value.half) != (out.offset, out.sizes, out.strides, out.half):
            return False
        if self.places[name] is not value:
            return False
        sharing = [other for other, place in self.places.items() if place.storage.root()[0] is storage]
        return all(self._is_done_with(other) for other in sharing)

    def _is_done_with(self, name: str) -> bool:
        """Whether no node after the one being lowered needs a value."""
        return name not in self.graph.outputs and self.last_use.get(name, -1) <= self.index

    def _choice(self, problem: LinearProblem) -> LinearChoice:
        choice = _lookup(self.choices, problem, self.threads)
        return default_choice(problem, self.threads) if choice is None else choice

    # -- elementwise

    def op_unary(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        out = self.like(x, x.sizes)
        activation = _activation(node.attrs["activation"])
        self.step(lambda plan: plan.unary(node.name, x.view(), out.view(), activation), [x], [out])
        self.places[node.output] = out

    def op_binary(self, node: Node) -> None:
        a, b = (self.places[name] for name in node.inputs)
        self._binary(node, a, b, node.attrs["kind"], _activation(node.attrs["activation"]))

    def op_scalar(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        value = self.constant(numpy.array([node.attrs["value"]], dtype=numpy.float32))
        a, b = (value, x) if node.attrs["reverse"] else (x, value)
        self._binary(node, a, b, node.attrs["kind"], _NO_ACTIVATION)

    def _binary(self, node: Node, a: _Place, b: _Place, kind: str, activation: tuple[str, float, float]) -> None:
        sizes = self.shape(node.output)
        full = next((place for place in (a, b) if place.sizes == sizes and place.storage.root()[0].buffer == 0), None)
        full = full or next((place for place in (a, b) if place.sizes == sizes), None)
        out = self.like(full, sizes) if full is not None else self.new(sizes)
        a, b = self.broadcast(a, sizes), self.broadcast(b, sizes)
        self.step(lambda plan: plan.binary(node.name, kind, a.view(), b.view(), out.view(), activation), [a, b], [out])
        self.places[node.output] = out

    def op_affine(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        out = self.like(x, x.sizes)
        params = self.params(node)
        scale, shift = _array(params["scale"]), _array(params["shift"])
        axis = node.attrs["axis"] % len(x.sizes)
        activation = _activation(node.attrs["activation"])
        self.step(lambda plan: plan.affine(node.name, x.view(), out.view(), axis, scale, shift, activation), [x], [out])
        self.places[node.output] = out

    # -- pooling, reductions, normalisation

    def op_max_pool2d(self, node: Node) -> None:
        self._pool(node, True)

    def op_avg_pool2d(self, node: Node) -> None:
        self._pool(node, False)

    def _pool(self, node: Node, maximum: bool) -> None:
        attrs = node.attrs
        x = self.places[node.inputs[0]]
        if x.strides[3] != 1 and x.sizes[3] > 1:
            x = self.copy(x, self.new(x.sizes, [1]), f"{node.name}.layout")
        out = self.new_output(self.shape(node.output))
        options = {
            "max": maximum, "kernel": tuple(attrs["kernel"]),
            "stride": tuple(attrs["stride"]), "padding": tuple(attrs["padding"]),
            "dilation": tuple(attrs.get("dilation", (1, 1))),
            "count_include_pad": bool(attrs.get("count_include_pad", True)), "divisor": int(attrs.get("divisor") or 0),
        }  # fmt: skip
        self.step(lambda plan: plan.pool(node.name, x.view(), out.view(), options), [x], [out])
        self.places[node.output] = out

    def op_adaptive_avg_pool2d(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        out = self.new(self.shape(node.output), [1])
        self.step(lambda plan: plan.adaptive_average_pool(node.name, x.view(), out.view()), [x], [out])
        self.places[node.output] = out

    def op_reduce(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        rank = len(x.sizes)
        dims = sorted({d % rank for d in node.attrs["dims"]})
        sizes = [1 if d in dims else size for d, size in enumerate(x.sizes)]
        out = self.like(x, sizes)
        kind = node.attrs["kind"]
        self.step(lambda plan: plan.reduce(node.name, x.view(), out.view(), dims, kind), [x], [out])
        kept = [d for d in range(rank) if d not in dims]
        self.places[node.output] = out if node.attrs["keepdim"] else out.permuted(kept)

    def op_softmax(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        out = self.like(x, x.sizes)
        dim = node.attrs["dim"] % len(x.sizes)
        self.step(lambda plan: plan.softmax(node.name, x.view(), out.view(), dim), [x], [out])
        self.places[node.output] = out

    def op_layer_norm(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        dims = node.attrs["dims"]
        if dims > 1 and _view_strides(x.sizes[-dims:], x.strides[-dims:], [math.prod(x.sizes[-dims:])]) is None:
            x = self.copy(x, self.new(x.sizes), f"{node.name}.layout")
        out = self.like(x, x.sizes) if dims == 1 else self.new(x.sizes)
        if dims > 1:
            x = x if x.strides == out.strides else self.copy(x, self.new(x.sizes), f"{node.name}.layout")
        params = self.params(node)
        weight, bias = (_array(params[role]).reshape(-1) if role in params else None for role in ("weight", "bias"))
        eps = float(node.attrs["eps"])
        self.step(lambda plan: plan.layer_norm(node.name, x.view(), out.view(), dims, weight, bias, eps), [x], [out])
        self.places[node.output] = out

    def op_group_norm(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        out = self.like(x, x.sizes)
        params = self.params(node)
        weight, bias = (_array(params[role]) if role in params else None for role in ("weight", "bias"))
        groups, eps = node.attrs["groups"], float(node.attrs["eps"])
        self.step(lambda plan: plan.group_norm(node.name, x.view(), out.view(), groups, weight, bias, eps), [x], [out])
        self.places[node.output] = out

    # -- products of activations

    def op_matmul(self, node: Node) -> None:
        a, b = (self.places[name] for name in node.inputs)
        sizes = self.shape(node.output)
        a = self.broadcast(a, (*sizes[:-2], *a.sizes[-2:]))
        b = self.broadcast(b, (*sizes[:-2], *b.sizes[-2:]))
        if b.strides[-1] != 1 and b.sizes[-1] > 1:
            b = self.copy(b, self.new(b.sizes), f"{node.name}.layout")
        out = self.new(sizes)
        if math.prod(sizes):
            self.step(lambda plan: plan.matmul(node.name, a.view(), b.view(), out.view()), [a, b], [out])
        self.places[node.output] = out

    def op_attention(self, node: Node) -> None:
        q, k, v = (self.places[name] for name in node.inputs[:3])
        sizes = self.shape(node.output)
        leading, rank = sizes[:-2], len(sizes)
        q, k, v = (self.broadcast(place, (*leading, *place.sizes[-2:])) for place in (q, k, v))
        # Queries run along the vector: heads and depth outside, batch and length inside, which is how the projections
        # around it lie.
        outer = [1, rank - 1] if rank == 4 else [rank - 1]
        if q.strides[-2] != 1 and q.sizes[-2] > 1:
            q = self.copy(q, self.new(q.sizes, outer), f"{node.name}.layout")
        out = self.new(sizes, outer)
        mask = None
        if len(node.inputs) == 4:
            mask = self.broadcast(self.places[node.inputs[3]], (*leading, q.sizes[-2], k.sizes[-2]))
        scale, causal = float(node.attrs["scale"]), bool(node.attrs["causal"])
        reads = [q, k, v] + ([mask] if mask is not None else [])
        if math.prod(sizes):
            self.step(
                lambda plan: plan.attention(node.name, q.view(), k.view(), v.view(), out.view(), scale, causal,
                mask.view() if mask is not None else None), reads, [out]
            )  # fmt: skip
        self.places[node.output] = out

    # -- shapes

    def op_permute(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        self.places[node.output] = x.permuted([d % len(x.sizes) for d in node.attrs["dims"]])

    def op_expand(self, node: Node) -> None:
        self.places[node.output] = self.broadcast(self.places[node.inputs[0]], self.shape(node.output))

    def op_slice(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        sizes = self.shape(node.output)
        dim = node.attrs["dim"] % len(x.sizes)
        start, _, step = slice(node.attrs["start"], node.attrs["stop"], node.attrs["step"]).indices(x.sizes[dim])
        strides = list(x.strides)
        shift = start * strides[dim]
        strides[dim] *= step
        self.places[node.output] = x.with_view(sizes, strides, shift if math.prod(sizes) else 0)

    def op_reshape(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        shape = list(shape_at(shape_from_json(node.attrs["shape"], node.name), self.batch))
        strides = _view_strides(x.sizes, x.strides, shape)
        if strides is None:
            x = self.copy(x, self._for_reshape(x, shape), f"{node.name}.layout")
            strides = _view_strides(x.sizes, x.strides, shape)
        if strides is None:
            x = self.copy(x, self.new(x.sizes), f"{node.name}.layout")
            strides = _view_strides(x.sizes, x.strides, shape)
        if strides is None:
            raise ConvertError(f"{node.name}: cannot reshape {x.sizes} to {tuple(shape)}")
        self.places[node.output] = x.with_view(shape, strides)

    def _for_reshape(self, x: _Place, shape: Sequence[int]) -> _Place:
        """An order of x's dimensions in which the new shape is a view, its last dimension outermost where possible."""
        last = shape[-1]
        tail, product = len(x.sizes), 1
        while tail > 0 and product < last:
            tail -= 1
            product *= x.sizes[tail]
        if product == last and 0 < tail < len(x.sizes) and math.prod(x.sizes[:tail]) > 1:
            return self.new(x.sizes, list(range(tail, len(x.sizes))))
        if len(x.sizes) == 4 and len(shape) == 4 and x.order[0] == 1 and shape[0] == x.sizes[0]:
            return self.new(x.sizes)
        return self.new(x.sizes)

    def op_concat(self, node: Node) -> None:
        sizes = self.shape(node.output)
        dim = node.attrs["dim"] % len(sizes)
        out = self._concat_place(node, sizes, dim)
        start = 0
        for name in node.inputs:
            part = self.places[name]
            extent = part.sizes[dim]
            target = out.with_view(part.sizes, out.strides, start * out.strides[dim])
            start += extent
            if math.prod(part.sizes) == 0 or self._same_memory(part, target):
                continue
            if self._adopt(part, target, out, dim):
                continue
            self.copy(part, target, f"{node.name}.{name}")
        self.places[node.output] = out

    def _concat_place(self, node: Node, sizes: tuple[int, ...], dim: int) -> _Place:
        hosted = self.concats.get(node.name)
        if hosted is not None:
            host, host_inputs = hosted
            if host not in self.concat_hosts:
                total = list(sizes)
                total[dim] = sum(self.shape(name)[dim] for name in host_inputs)
                self.concat_hosts[host] = self._concat_layout(node, tuple(total), dim)
            place = self.concat_hosts[host]
            return place.with_view(sizes, place.strides)
        if node.name in self.concat_hosts:
            return self.concat_hosts[node.name]
        return self._concat_layout(node, sizes, dim)

    def _concat_layout(self, node: Node, sizes: tuple[int, ...], dim: int) -> _Place:
        first = self.places[node.inputs[0]]
        if dim == first.order[0] or (len(sizes) == 4 and dim == 1):
            return self.new(sizes, [dim])
        return self.like(first, sizes)

    @staticmethod
    def _same_memory(a: _Place, b: _Place) -> bool:
        (root_a, offset_a), (root_b, offset_b) = a.storage.root(), b.storage.root()
        if root_a is root_b:
            same = offset_a + a.offset == offset_b + b.offset
        else:  # outside the arena offsets are final
            same = root_a.buffer != 0 and a.at() == b.at()
        return same and _equal_strides(a, b)

    @staticmethod
    def _adopt(part: _Place, target: _Place, out: _Place, dim: int) -> bool:
        """Let the concatenated input be written where it is wanted in the first place."""
        storage = part.storage
        if storage.host is not None or storage.buffer != 0 or part.offset != 0 or not _equal_strides(part, target):
            return False
        if (
            out.order[0] != dim
            or storage.floats > max(1, part.sizes[dim]) * out.strides[dim]
            or math.prod(part.sizes) == 0
        ):
            return False
        if out.storage.root()[0] is storage:
            return False
        storage.host = (out.storage, target.offset)
        return True

    def op_pad(self, node: Node) -> None:
        x = self.places[node.inputs[0]]
        pads = list(node.attrs["pad"])
        rank = len(x.sizes)
        before, after = [0] * rank, [0] * rank
        for i in range(len(pads) // 2):
            before[rank - 1 - i], after[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
        sizes = list(x.sizes)
        shift = 0
        for d in range(rank):  # negative padding crops
            crop_before, crop_after = max(0, -before[d]), max(0, -after[d])
            shift += crop_before * x.strides[d]
            sizes[d] -= crop_before + crop_after
        x = x.with_view(sizes, x.strides, shift)
        out = self.like(x, self.shape(node.output))
        value = float(node.attrs["value"])
        inner = out.with_view(sizes, out.strides, sum(max(0, before[d]) * out.strides[d] for d in range(rank)))
        self.step(lambda plan: plan.fill(f"{node.name}.border", out.view(), value), [], [out])
        if math.prod(sizes):
            self.step(lambda plan: plan.copy(node.name, x.view(), inner.view()), [x], [inner])
        self.places[node.output] = out

    def op_constant(self, node: Node) -> None:
        value = self.params(node)["value"]
        if not self.native(node.output):
            self.foreign.add(node.output)
            self.step(self._callback(node, lambda inputs: [value]), [], [])
            return
        self.places[node.output] = self.constant(value.detach().to(torch.float32).numpy())

    # -- everything else

    def op_fallback(self, node: Node) -> None:
        from sparse_engine.convert.fallback import run_fallback

        graph, batch = self.graph, self.batch
        reads = [self.places[name] for name in node.inputs if name not in self.foreign]
        writes = []
        for name in node.outputs:
            if self.native(name):
                self.places[name] = self.new(self.shape(name))
                writes.append(self.places[name])
            else:
                self.foreign.add(name)
        self.step(self._callback(node, lambda inputs: run_fallback(graph, node, inputs, batch)), reads, writes)

    def _callback(self, node: Node, call: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Any], None]:
        native_in = [name for name in node.inputs if name not in self.foreign]
        native_out = [name for name in node.outputs if self.native(name)]
        places = [self.places[name] for name in native_in + native_out]
        foreign = self.foreign
        state = self.state

        def run(addresses: list[int]) -> None:
            tensors = [_wrap(address, place) for address, place in zip(addresses, places, strict=True)]
            native = dict(zip(native_in, tensors, strict=False))
            inputs = [state.values[name] if name in foreign else native[name] for name in node.inputs]
            results = call(inputs)
            targets = dict(zip(native_out, tensors[len(native_in) :], strict=True))
            for name, result in zip(node.outputs, results, strict=True):
                if name in targets:
                    targets[name].copy_(result)
                else:
                    state.values[name] = result

        return lambda plan: plan.callback(node.name, run, [place.view() for place in places])


def _wrap(address: int, place: _Place) -> Tensor:
    """A tensor over memory of the runtime, valid during one callback."""
    if math.prod(place.sizes) == 0:
        return torch.empty(place.sizes)
    floats = 1 + sum((size - 1) * stride for size, stride in zip(place.sizes, place.strides, strict=True))
    memory = (ctypes.c_float * floats).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).as_strided(place.sizes, place.strides)


_MASKED_FROM = 128  # pixels: fewer are cut by rows of the weight, each of which would bring its own copy
_L1_SETS = 64  # of cache lines
_SPREAD = 4  # lines: what a tile has of a plane


def _suits(place: _Place, pixels: int) -> bool:
    """Whether kernels may read or write the planes of a place outside the arena: whole vectors end with the last pixel,
    lines are not crossed, and the planes' beginnings do not all fall into few sets of the L1."""
    distance = place.strides[1]
    return (
        pixels % LANES == 0
        and place.offset % _ALIGN == 0
        and distance % _ALIGN == 0
        and math.gcd(distance // _ALIGN, _L1_SETS) <= _SPREAD
    )


def _equal_strides(a: _Place, b: _Place) -> bool:
    return all(x == y for size, x, y in zip(a.sizes, a.strides, b.strides, strict=True) if size > 1)


def _plan_concats(graph: Graph) -> dict[str, tuple[str, list[str]]]:
    """For each concat whose inputs begin those of a later one: that one's name and inputs, to share its memory."""
    hosts: dict[str, tuple[str, list[str]]] = {}
    later: list[Node] = []
    for node in reversed(graph.nodes):
        if node.op != "concat":
            continue
        for other in later:
            if (
                other.attrs["dim"] == node.attrs["dim"]
                and len(other.inputs) > len(node.inputs)
                and other.inputs[: len(node.inputs)] == node.inputs
            ):
                hosts[node.name] = (other.name, other.inputs)
                break
        else:
            later.append(node)
    return hosts


def _lookup(choices: Any, problem: LinearProblem, threads: int) -> LinearChoice | None:
    """The recorded choice for a node, or None where there is none that applies."""
    entry = choices.get(problem.name) if choices else None
    if not entry or "choice" not in entry:
        return None
    choice = LinearChoice.from_json(entry["choice"])
    # A choice made at another batch size may not exist at this one.
    if (
        (choice.kernel in _VECTOR_KERNELS) != problem.vector
        or (choice.kernel in ("lookup", "bytes") and problem.rounded is None)
        or choice.kernel.startswith("depthwise") != problem.depthwise
        or (choice.kernel == "dense" and problem.groups != 1)
        or (choice.kernel == "winograd" and not problem.winograd)
        or (choice.kernel == "row_tiles" and not problem.row_tiles)
        or (choice.kernel in PAIR_KERNELS and not (problem.pairs and _C.pair_products()))
    ):
        return None
    if choice.kernel in _PANEL_KERNELS and (entry.get("pixels") != problem.pixels or threads == 1):
        choice.row_block = default_row_block(problem, choice, threads)
    return choice


class NativePlan:
    """A compiled graph for one batch size; `run` may be called from several threads at once."""

    def __init__(
        self,
        plan: Any,
        inputs: list[str],
        outputs: list[str],
        shapes: list[tuple[int, ...]],
        foreign: set[str],
        constants: numpy.ndarray,
        threads: int,
        state: threading.local,
    ) -> None:
        self._plan = plan
        self._inputs = inputs
        self._outputs = outputs
        self._shapes = shapes
        self._foreign = foreign
        self._constants = constants
        self._constants_address = constants.ctypes.data
        self._threads = threads
        self._state = state

    def run(self, inputs: list[Tensor], outputs: list[Tensor] | None = None) -> list[Tensor]:
        """One contiguous tensor per graph input in, one per graph output out: new ones, or those that are given."""
        outputs, addresses = self._prepare(inputs, outputs)
        self._plan.run(addresses, self._threads)
        return self._collect(outputs)

    def run_after(self, body: Any, addresses: list[int], inputs: list[Tensor]) -> list[Tensor]:
        """`body`, a `_C.PartedPlan` that makes some of the inputs, and then this plan, in one native call."""
        outputs, own = self._prepare(inputs)
        body.run_before(addresses, self._plan, own, self._threads)
        return self._collect(outputs)

    def new_outputs(self) -> list[Tensor]:
        """What `run` makes for the outputs where nothing is given."""
        return [torch.empty(shape) for shape in self._shapes]

    def run_many(self, addresses: list[int], strides: list[int], count: int) -> None:
        """Run `count` batches that follow each other; one address and one stride (floats) per input and output."""
        self._plan.run_many([*addresses, self._constants_address], [*strides, 0], count, self._threads)

    def run_at(self, addresses: list[int]) -> None:
        """Run on memory given by address, inputs then outputs."""
        self._plan.run([*addresses, self._constants_address], self._threads)

    @property
    def threads(self) -> int:
        """Threads that a call may use."""
        return self._threads or _C.get_num_threads()

    def profile(self, inputs: list[Tensor]) -> list[tuple[str, float]]:
        """Seconds per native node of one run, in order."""
        outputs, addresses = self._prepare(inputs)
        seconds = self._plan.profile(addresses, self._threads)
        self._collect(outputs)
        together: dict[str, float] = {}
        for name, time in zip(self._plan.names, seconds, strict=True):  # a node that runs strip by strip comes often
            together[name] = together.get(name, 0.0) + time
        return list(together.items())

    @property
    def arena_bytes(self) -> int:
        """Bytes of working memory of one call."""
        return self._plan.arena_bytes

    def _prepare(self, inputs: list[Tensor], outputs: list[Tensor] | None = None) -> tuple[list[Tensor], list[int]]:
        outputs = self.new_outputs() if outputs is None else outputs
        addresses = [tensor.data_ptr() for tensor in inputs]
        addresses += [tensor.data_ptr() for tensor in outputs]
        addresses.append(self._constants_address)
        if self._foreign:
            self._state.values = {
                name: tensor for name, tensor in zip(self._inputs, inputs, strict=True) if name in self._foreign
            }
        return outputs, addresses

    def _collect(self, outputs: list[Tensor]) -> list[Tensor]:
        if self._foreign:
            values = self._state.values
            self._state.values = {}
            return [
                values[name] if name in self._foreign else tensor
                for name, tensor in zip(self._outputs, outputs, strict=True)
            ]
        return outputs


class TailedPlan:
    """A plan for most of a network, and one for its classifier, which takes the whole batch at once."""

    def __init__(self, body: Any, tail: NativePlan) -> None:
        self._body, self._tail = body, tail
        self._idle: list[list[Tensor]] = []  # memory for what is passed to the tail, kept from call to call

    def run(self, inputs: list[Tensor], outputs: list[Tensor] | None = None) -> list[Tensor]:
        """One contiguous tensor per graph input in, one per graph output out: new ones, or those that are given."""
        try:
            passed = self._idle.pop()
        except IndexError:  # the first call, or one beside another
            passed = self._body.new_outputs()
        results = self._tail.run(self._body.run(inputs, passed), outputs)
        self._idle.append(passed)
        return results

    def new_outputs(self) -> list[Tensor]:
        """What `run` makes for the outputs where nothing is given."""
        return self._tail.new_outputs()

    def profile(self, inputs: list[Tensor]) -> list[tuple[str, float]]:
        """Seconds per native node of one run, in order."""
        return self._body.profile(inputs) + self._tail.profile(self._body.run(inputs))

    @property
    def arena_bytes(self) -> int:
        """Bytes of working memory of one call."""
        return self._body.arena_bytes + self._tail.arena_bytes


class SplitPlan:
    """Runs a batch as several smaller ones, whole ones per thread where there are enough."""

    def __init__(
        self, plan: NativePlan, rest: NativePlan | None, count: int, share: int, shapes: list[tuple[int, ...]]
    ) -> None:
        self._plan = plan
        self._rest = rest
        self._count = count
        self._share = share
        self._shapes = shapes

    def run(self, inputs: list[Tensor], outputs: list[Tensor] | None = None) -> list[Tensor]:
        """One contiguous tensor per graph input in, one per graph output out: new ones, or those that are given."""
        outputs = self.new_outputs() if outputs is None else outputs
        tensors = inputs + outputs
        strides = [self._share * tensor[0].numel() for tensor in tensors]
        self._plan.run_many([tensor.data_ptr() for tensor in tensors], strides, self._count)
        if self._rest is not None:
            done = self._count
            self._rest.run_at(
                [tensor.data_ptr() + 4 * done * stride for tensor, stride in zip(tensors, strides, strict=True)]
            )
        return outputs

    def new_outputs(self) -> list[Tensor]:
        """What `run` makes for the outputs where nothing is given."""
        return [torch.empty(shape) for shape in self._shapes]

    def profile(self, inputs: list[Tensor]) -> list[tuple[str, float]]:
        """Seconds per native node of one of the smaller batches, times their number."""
        part = [tensor[: self._share].contiguous() for tensor in inputs]
        return [(name, seconds * self._count) for name, seconds in self._plan.profile(part)]

    @property
    def arena_bytes(self) -> int:
        """Bytes of working memory of one call, all threads together."""
        return self._plan.arena_bytes * min(self._count, self._plan.threads)
