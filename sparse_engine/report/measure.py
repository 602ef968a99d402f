"""Where an executable's time goes, beside the same layers run densely by PyTorch, and what the machine allows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparse_engine.errors import SparseEngineError

_LARGE = 64 * 2**20
"""Bytes of the array whose reading measures memory bandwidth: larger than the last cache of most processors."""
_SMALL = 4 * 2**20
"""Bytes of the array whose reading measures the bandwidth of the last cache: what a layer of up to that size needs."""
_IN_PAIRS = ("pairs", "depthwise_pairs")  # kernels that multiply in bfloat16


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in the same run, for the roofline.

    Attributes:
        gflops: GFLOP/s of the fastest dense product tried: a matrix product or a 3×3 convolution by PyTorch.
        gbytes: GB/s of reading an array of 64 MiB.
        threads: how many threads all used.
        peak_gflops: GFLOP/s of fused multiply-adds on registers; None where no native kernels were built.
        cache_gbytes: GB/s of reading an array of 4 MiB again and again; None where it was not measured.
    """

    gflops: float
    gbytes: float
    threads: int
    peak_gflops: float | None = None
    cache_gbytes: float | None = None

    @property
    def peak(self) -> float:
        """GFLOP/s that arithmetic cannot exceed: the peak, or the fastest dense product where that is not known."""
        return max(self.gflops, self.peak_gflops or 0.0)

    def reading(self, size: float) -> tuple[str, float]:
        """What a working set of so many bytes is read from (cache or memory), and its GB/s."""
        if self.cache_gbytes is not None and size <= _SMALL:
            return "cache", self.cache_gbytes
        return "memory", self.gbytes


@dataclass(frozen=True)
class LayerTime:
    """One node of an executable in one run.

    Attributes:
        name, op: as in the graph.
        shape: of its output.
        ms: median wall time in the executable.
        dense_ms: median wall time of the same node run densely by PyTorch.
        structure: of its weight, None without one.
        sparsity: fraction of zero weights, None without a weight.
        flops: that remain when zero weights are skipped.
        dense_flops: of the dense operation.
        bytes: least traffic: packed weight, inputs and outputs, each once.
        working_set: what one pass over the network touches of these, where a batch runs in several; 0 means all bytes.
        products: of one lane in an instruction: two in bfloat16, which raises the peak.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    ms: float
    dense_ms: float
    structure: str | None
    sparsity: float | None
    flops: float
    dense_flops: float
    bytes: float
    working_set: float = 0.0
    products: int = 1

    @property
    def gflops(self) -> float:
        """GFLOP/s over the FLOPs that remain."""
        return self.flops / self.ms / 1e6 if self.ms else 0.0

    @property
    def intensity(self) -> float:
        """FLOPs that remain per byte of least traffic."""
        return self.flops / self.bytes if self.bytes else 0.0

    def bound(self, ceilings: Ceilings) -> tuple[str, float]:
        """What limits the layer on this machine (compute, cache or memory), and the share of that limit it reaches."""
        name, gbytes = ceilings.reading(self.working_set or self.bytes)
        limit, peak = gbytes * self.intensity, ceilings.peak * self.products
        if limit >= peak:
            limit, name = peak, "compute"
        return name, self.gflops / limit if limit else 0.0

    def share_of_peak(self, ceilings: Ceilings) -> float:
        """FLOPs that remain per second, over the machine's peak in the layer's precision."""
        return self.gflops / (ceilings.peak * self.products) if ceilings.peak else 0.0


def measure_ceilings(seconds: float = 0.4, threads: int | None = None) -> Ceilings:
    """Measure what the machine allows to so many threads.

    Example:
        >>> ceilings = measure_ceilings(seconds=0.05)
        >>> ceilings.gflops > 0 and ceilings.gbytes > 0
        True

    Args:
        seconds: how long to measure, about.
        threads: as many as the layers had that are held against it; None is PyTorch's number, which is put back.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        return _measure_ceilings(seconds)
    finally:
        torch.set_num_threads(before)


def _measure_ceilings(seconds: float) -> Ceilings:
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    x, w = torch.randn(4, 128, 28, 28), torch.randn(128, 128, 3, 3)
    out = torch.empty(1024, 1024)
    array = torch.ones(_LARGE // 4)
    cached = array[: _SMALL // 4]
    threads = torch.get_num_threads()
    with torch.no_grad():
        product = 2 * 1024**3 / _best(lambda: torch.mm(a, b, out=out), seconds / 5)
        flops = 2 * 4 * 28 * 28 * 128 * 128 * 9
        convolution = flops / _best(lambda: torch.nn.functional.conv2d(x, w, padding=1), seconds / 5)
        reading = _LARGE / _best(lambda: array.sum(), seconds / 5)
        from_cache = _SMALL / _best(lambda: cached.sum(), seconds / 5)
    # Here, so that the command line can still say what is wrong with a compiled module that is refused.
    from sparse_engine.ops.native import peak_gflops

    peak = peak_gflops(threads, seconds / 5)
    return Ceilings(max(product, convolution) / 1e9, reading / 1e9, threads, peak, from_cache / 1e9)


def measure_layers(
    executable: Any,
    inputs: Sequence[torch.Tensor],
    *,
    repeats: int = 9,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerTime]:
    """Time each node in the executable and densely in PyTorch, in turns.

    Example:
        >>> layers = measure_layers(executable, [torch.randn(1, 3, 224, 224)])         # doctest: +SKIP
        >>> max(layers, key=lambda layer: layer.ms).name                                # doctest: +SKIP
        'layer4.0.conv2'

    Args:
        executable: a `sparse_engine.convert.Executable`.
        inputs: tensors it takes.
        repeats: runs of each; the medians are returned.
        progress: called with (runs done, runs in all).

    Returns:
        The nodes that took time, in running order.
    """
    graph = executable.graph
    executable(*inputs)
    native: dict[str, list[float]] = {}
    dense: dict[str, list[float]] = {}
    passes = 1
    for done in range(repeats):
        times, passes = _native_times(executable, inputs)
        for name, ms in times.items():
            native.setdefault(name, []).append(ms)
        for name, ms in _dense_times(graph, inputs).items():
            dense.setdefault(name, []).append(ms)
        if progress:
            progress(done + 1, repeats)
    batch = graph.batch_of([tensor.shape for tensor in inputs])
    layers = []
    for node in graph.nodes:
        if node.name in native:
            ms, dense_ms = _median(native[node.name]), _median(dense.get(node.name, [0.0]))
            layers.append(_layer(graph, node, batch, ms, dense_ms, passes))
            choice = (executable.choices or {}).get(node.name, {}).get("choice")
            if isinstance(choice, Mapping) and choice.get("kernel") in _IN_PAIRS:
                layers[-1] = replace(layers[-1], products=2)
    return layers


@dataclass(frozen=True)
class Profile:
    """One call of an executable.

    Attributes:
        wall_us: from the call to its return, in microseconds.
        spans: dictionaries in the order of their beginnings: name, kind (the graph's op; `halo` for rows copied from
            another band, `gather` for bands put together, `copy` for other copies), thread (0 made the call), band and
            pass (None where there are none), start_us, dur_us, busy_us and items as in `sparse_engine.convert.trace`,
            and where known this span's part of the node's flops and bytes.
    """

    wall_us: float
    spans: list[dict[str, Any]]


def profile_call(executable: Any, inputs: Sequence[torch.Tensor]) -> Profile:
    """One call of an executable as spans, one per node and thread (and pass, where a batch runs in several).

    Example:
        >>> profile = profile_call(executable, [torch.randn(1, 3, 224, 224)])           # doctest: +SKIP
        >>> [(span["thread"], span["band"]) for span in profile.spans if span["name"] == "layer1.0.conv1"]
        [(0, 0), (1, 1)]                                                                 # doctest: +SKIP

    Args:
        executable: a `sparse_engine.convert.Executable`.
        inputs: tensors it takes.

    Raises:
        SparseEngineError: the executable runs without the native runtime, which is what can be profiled.
    """
    _check_native(executable)
    executable(*inputs)  # the first call makes the plan and brings in memory, threads and weights
    graph = executable.graph
    trace = executable.trace(*inputs)
    batch = graph.batch_of([tensor.shape for tensor in inputs])
    nodes = {node.name: node for node in graph.nodes}
    spans: list[dict[str, Any]] = []
    by_node: dict[str, list[dict[str, Any]]] = {}
    for span in trace.spans:
        spans.append(
            {
                "name": span.name,
                "kind": _kind(span.name, nodes),
                "thread": span.thread,
                "band": span.band,
                "pass": span.pass_index,
                "start_us": span.start_us,
                "dur_us": span.dur_us,
                "busy_us": span.busy_us,
                "items": span.items,
            }
        )
        # Copies that a node needs are spans of their own; the arithmetic is the node's.
        if span.name in nodes:
            by_node.setdefault(span.name, []).append(spans[-1])
    for name, own in by_node.items():
        work = _work(graph, nodes[name], batch)
        parts = _parts_of_work(own, _shape(graph, nodes[name], batch), batch)
        for span, part in zip(own, parts, strict=True):
            span.update(flops=work.flops * part, bytes=work.bytes * part)
    return Profile(trace.wall_us, spans)


def _parts_of_work(spans: Sequence[Mapping[str, Any]], shape: Sequence[int], batch: int) -> list[float]:
    """Each span's part of what its node does: by rows of the image, or by images of its pass and items of work."""
    from sparse_engine.convert.parts import rows_of

    if spans[0]["band"] is not None and len(shape) == 4:
        bands = 1 + max(span["band"] for span in spans)
        rows = [rows_of(shape[2], span["band"], bands) for span in spans]
        return [
            (last - first)
            / shape[2]
            * _part_of_items(span, [other for other in spans if other["band"] == span["band"]])
            for span, (first, last) in zip(spans, rows, strict=True)
        ]
    # A pass takes a power of two of images; what is left of the batch runs after them, in none.
    count = len({span["pass"] for span in spans} - {None})
    each = 1 << ((batch // count).bit_length() - 1) if count else 0
    parts = []
    for span in spans:
        images = batch - count * each if span["pass"] is None else each
        parts.append(images / batch * _part_of_items(span, [other for other in spans if other["pass"] == span["pass"]]))
    return parts


def _part_of_items(span: Mapping[str, Any], spans: Sequence[Mapping[str, Any]]) -> float:
    """A span's part of the items of work of `spans`, among which it is: several threads share them, or strips."""
    together = sum(other["items"] for other in spans)
    return span["items"] / together if together else 1 / len(spans)


def _kind(name: str, nodes: Mapping[str, Any]) -> str:
    if name in nodes:
        return str(nodes[name].op)
    if name.endswith(".halo"):
        return "halo"
    return "gather" if name.startswith("out.") else "copy"


def _check_native(executable: Any) -> None:
    if not executable.native:
        raise SparseEngineError(f"there is nothing to profile: {executable.native_reason}")


def _native_times(executable: Any, inputs: Sequence[torch.Tensor]) -> tuple[dict[str, float], int]:
    """Milliseconds by node in one call, copies of its input and output counted as that node's; and how many passes.

    A node takes as long as the thread that is longest busy with it, over all passes of that thread.
    """
    _check_native(executable)
    graph = executable.graph
    names = {node.name for node in graph.nodes}
    makers = {name: node.name for node in graph.nodes for name in node.outputs}
    by_thread: dict[str, dict[int, float]] = {}
    passes = 1
    for span in executable.trace(*inputs).spans:
        own = by_thread.setdefault(_owner(span.name, names, makers), {})
        own[span.thread] = own.get(span.thread, 0.0) + span.dur_us / 1e3
        passes = max(passes, 1 + (span.pass_index or 0))
    return {name: max(own.values()) for name, own in by_thread.items()}, passes


def _owner(name: str, names: set[str], makers: Mapping[str, str]) -> str:
    """The graph's node that a native one belongs to: by its own name, or by that of the value that it copies."""
    for prefix in ("out.", "output."):
        if name not in names and name.removeprefix(prefix) in makers:
            return makers[name.removeprefix(prefix)]
    value = name.removesuffix(".halo")
    if name not in names and value in makers:
        return makers[value]
    while name not in names and "." in name:
        name = name.rpartition(".")[0]
    return name


def _dense_times(graph: Any, inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Milliseconds by node when PyTorch runs the graph, zeros and all."""
    from sparse_engine.convert.reference import run_node

    batch = graph.batch_of([tensor.shape for tensor in inputs])
    values = dict(zip(graph.inputs, inputs, strict=True))
    times: dict[str, float] = {}
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            arguments = [values[name] for name in node.inputs]
            begin = time.perf_counter()
            results = run_node(graph, node, arguments, batch)
            times[node.name] = (time.perf_counter() - begin) * 1e3
            values.update(zip(node.outputs, results, strict=True))
            for name in node.inputs:
                if last_use[name] == index and name not in graph.outputs:
                    values.pop(name, None)
    return times


def _shape(graph: Any, node: Any, batch: int) -> tuple[int, ...]:
    """Of the node's first output."""
    return tuple(size if isinstance(size, int) else size.at(batch) for size in graph.values[node.outputs[0]].shape)


def _layer(graph: Any, node: Any, batch: int, ms: float, dense_ms: float, passes: int) -> LayerTime:
    work = _work(graph, node, batch)
    return LayerTime(
        name=node.name,
        op=node.attrs["target"] if node.op == "fallback" else node.op,
        shape=_shape(graph, node, batch),
        ms=ms,
        dense_ms=dense_ms,
        structure=work.structure,
        sparsity=work.sparsity,
        flops=work.flops,
        dense_flops=work.dense_flops,
        bytes=work.bytes,
        working_set=work.weight_bytes + (work.bytes - work.weight_bytes) / passes,
    )


@dataclass(frozen=True)
class _Work:
    flops: float
    dense_flops: float
    bytes: float
    weight_bytes: float
    structure: str | None
    sparsity: float | None


def _work(graph: Any, node: Any, batch: int) -> _Work:
    """What one node has to do: see `LayerTime` for the fields."""
    from sparse_engine.convert.flops import node_flops
    from sparse_engine.packed import PackedWeight

    def count(name: str) -> int:
        return math.prod(size if isinstance(size, int) else size.at(batch) for size in graph.values[name].shape)

    flops = float(node_flops(graph, node, batch))
    activations = 4.0 * sum(count(name) for name in (*node.inputs, *node.outputs))
    density, structure, sparsity, parameters = 1.0, None, None, 0.0
    for role, name in node.params.items():
        constant = graph.constants[name]
        size = constant.numel() * constant.dtype.itemsize
        if role == "weight" and node.op in ("conv2d", "linear"):
            kept = int(torch.count_nonzero(constant))
            density = kept / max(constant.numel(), 1)
            sparsity, structure = 1 - density, "dense"
            if density < 1:
                packed = PackedWeight.from_dense(constant)
                structure, size = str(packed.structure), min(size, packed.nbytes)
        parameters += size
    return _Work(flops * density, flops, activations + parameters, parameters, structure, sparsity)


def _best(function: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest call."""
    function()
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds or best == math.inf:
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


def _median(times: Sequence[float]) -> float:
    ordered = sorted(times)
    return ordered[len(ordered) // 2]
