"""The executable: what a converted model is to its user."""

from __future__ import annotations

import importlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_engine.convert.constants import PackedConstants
from sparse_engine.convert.graph import DTYPES, Graph, GraphError, build_structure, format_shape, shape_at
from sparse_engine.convert.report import Benchmark, Report, Timing
from sparse_engine.convert.trace import CallTrace, trace_call
from sparse_engine.errors import ConvertError, FileFormatError, ShapeError

_CACHED_PLANS = 16  # batch sizes whose plans are kept


class Plan(Protocol):
    """A graph made ready for one batch size; `run` may be called from several threads at once."""

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """One contiguous tensor per graph input in, one tensor per graph output out."""
        ...


class ReferencePlan:
    """Runs the graph's PyTorch meaning; what is used where the native runtime is not built."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.graph.run(inputs)


def native_lowering() -> tuple[Callable[..., Plan] | None, str]:
    """The function that compiles a graph into a native plan, or None and the reason why there is none."""
    try:
        return importlib.import_module("sparse_engine.convert.lower").compile, ""
    except ImportError as error:
        return None, f"the native runtime is not available ({error})"


class Executable:
    """A converted model: call it with tensors or numpy arrays, at any batch size, from any number of threads.

    Example::

        executable = se.convert(model, (x,))
        y = executable(x)
        print(executable.report)
        executable.save("model.spx")

    Args:
        graph: validated and optimised.
        choices: what ``choose`` found out about kernels, plain JSON or an object with ``to_json``; None lets the
            lowering decide.
        threads: for the kernels; None uses all cores.
        report: what became of each layer.
        spec: the tree of the model's own output types, where they are more than tuples, lists and dicts.
        model: the model it was made from, for `benchmark`; only weakly referenced.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        choices: dict[str, Any] | None = None,
        threads: int | None = None,
        report: Report | None = None,
        spec: pytree.TreeSpec | None = None,
        model: nn.Module | None = None,
    ) -> None:
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise ConvertError(f"threads must be an int from 1 to 1024 or None, not {threads!r:.80}")
        self.graph = graph
        self.choices = choices
        self.threads = threads
        self._report = report
        self._compile, self.native_reason = native_lowering()
        self._spec = None if spec is None or _is_plain(graph.structure, spec) else spec
        self._model = None if model is None else weakref.ref(model)
        self._plans: dict[tuple[torch.Size, ...], tuple[Plan, int]] = {}
        self._lock = threading.Lock()
        self._dtypes = [DTYPES[graph.values[name].dtype] for name in graph.inputs]
        self._single = graph.structure == 0

    @property
    def native(self) -> bool:
        """True when native kernels run the graph; `native_reason` says why not."""
        return self._compile is not None

    @property
    def report(self) -> Report:
        """Per layer: structure, sparsity, kernel, time, dense time and the reason; prints as a table."""
        if self._report is None:
            raise ConvertError(
                "this executable was built from a bare graph and has no report; use sparse_engine.convert"
            )
        return self._report

    @property
    def inputs(self) -> dict[str, str]:
        """Name of each input and what it must be, as text: ``{"x": "float32(N, 3, 224, 224)"}``."""
        return {name: str(self.graph.values[name]) for name in self.graph.inputs}

    def __call__(self, *inputs: Tensor | numpy.ndarray) -> Any:
        """Run the model.

        Args:
            inputs: the model's positional arguments, torch tensors on the CPU or numpy arrays, of the dtypes the model
                was converted with.

        Returns:
            What the model returns; numpy arrays where the inputs are numpy arrays.

        Raises:
            ShapeError: the inputs do not fit, with what was given and what is needed.
        """
        arrays = False
        tensors: list[Tensor] = []
        if len(inputs) != len(self._dtypes):
            raise ShapeError(
                f"the model takes {len(self._dtypes)} inputs ({', '.join(self.graph.inputs)}), got {len(inputs)}"
            )
        for index, item in enumerate(inputs):
            if not isinstance(item, Tensor):
                item, arrays = self._from_array(item, index), True
            if item.dtype is not self._dtypes[index] or item.device.type != "cpu" or item.layout is not torch.strided:
                raise self._wrong_tensor(item, index)
            if item.requires_grad:
                item = item.detach()
            tensors.append(item if item.is_contiguous() else item.contiguous())
        outputs = self._run(tensors)
        if arrays:
            results: Sequence[Any] = [output.numpy() for output in outputs]
            return results[0] if self._single else build_structure(self.graph.structure, results)
        if self._single:
            return outputs[0]
        return build_structure(self.graph.structure, outputs) if self._spec is None else self._own_structure(outputs)

    def benchmark(
        self,
        *inputs: Tensor | numpy.ndarray,
        seconds: float = 3.0,
        model: nn.Module | None = None,
    ) -> Benchmark:
        """Time the executable and the dense PyTorch model in turns.

        Example::

            print(executable.benchmark(x))

        Args:
            inputs: as for a call.
            seconds: how long to measure, about; each contender runs at least five times.
            model: the dense contender; by default the model that was converted while it is alive, else the optimised
                graph run by PyTorch.

        Returns:
            Latency quantiles, throughput and speed-up.

        Raises:
            ShapeError: the inputs do not fit.
        """
        from sparse_engine.convert.inputs import prepare

        self(*inputs)
        tensors = [torch.as_tensor(item).contiguous() for item in inputs]
        model = model if model is not None else (self._model() if self._model is not None else None)
        if model is not None:
            plain, name = prepare(model), "dense (PyTorch model)"
            dense: Callable[[], Any] = lambda: plain(*tensors)  # noqa: E731
        else:
            name = "dense (PyTorch, optimised graph)"
            graph = self.graph.copy()  # with dense weights
            dense = lambda: self._reference(graph, tensors)  # noqa: E731
        times: tuple[list[float], list[float]] = ([], [])
        with torch.no_grad():
            for _ in range(2):
                dense(), self(*tensors)
            start = time.perf_counter()
            while len(times[0]) < 5 or time.perf_counter() - start < seconds:
                for record, contender in zip(times, (lambda: self(*tensors), dense), strict=True):
                    begin = time.perf_counter()
                    contender()
                    record.append((time.perf_counter() - begin) * 1e3)
        batch = self._samples(tensors)
        return Benchmark(Timing.of(times[0]), Timing.of(times[1]), batch, name, self.threads, torch.get_num_threads())

    def trace(self, *inputs: Tensor | numpy.ndarray) -> CallTrace:
        """One call, recorded: what each thread did for each native node, and when.

        Example::

            executable(x)                                   # the first call makes the plan and brings in memory
            for span in executable.trace(x).spans:
                print(span.name, span.thread, span.dur_us)

        Args:
            inputs: as for a call.

        Returns:
            The wall time and the spans. `sparse-engine bench --trace` writes them for Perfetto.

        Raises:
            ConvertError: there is no native runtime, which is what can be traced.
            ShapeError: the inputs do not fit.
        """
        if not self.native:
            raise ConvertError(f"there is nothing to profile: {self.native_reason}")
        return trace_call(lambda: self(*inputs))

    def save(self, path: str | os.PathLike[str]) -> Any:
        """Write an ``.spx`` file, atomically; `load` reads it without the model's code.

        Args:
            path: the file.

        Returns:
            The sizes that were written.

        Raises:
            OSError: the file cannot be written.
        """
        from sparse_engine.io import write_spx

        attributes = {
            "choices": self.choices,
            "threads": self.threads,
            "report": None if self._report is None else self._report.to_json(),
        }
        constants = self.graph.constants
        stored = constants.stored if isinstance(constants, PackedConstants) else constants
        return write_spx(path, self.graph.to_json(), stored, attributes=attributes)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the constants as this executable keeps them, beside what its plans hold."""
        constants = self.graph.constants
        return constants.nbytes if isinstance(constants, PackedConstants) else self.graph.bytes()

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {text}" for name, text in self.inputs.items())
        return (
            f"Executable({inputs}; {len(self.graph.nodes)} nodes, {'native' if self.native else 'PyTorch reference'})"
        )

    # ---- running

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        key = tuple([tensor.shape for tensor in tensors])
        cached = self._plans.get(key)
        if cached is None:
            cached = self._prepare(key)
        plan, batch = cached
        if self.graph.fixed_batch is not None and batch != self.graph.fixed_batch:
            return self._in_pieces(plan, tensors, batch)
        if batch == 0:
            return [
                torch.empty(shape_at(self.graph.values[name].shape, 0), dtype=DTYPES[self.graph.values[name].dtype])
                for name in self.graph.outputs
            ]
        return plan.run(tensors)

    def _prepare(self, key: tuple[torch.Size, ...]) -> tuple[Plan, int]:
        """The plan for input shapes that were not seen yet, and the batch size they mean."""
        batch = self._batch_of(key)
        planned = self.graph.fixed_batch if self.graph.fixed_batch is not None else batch
        with self._lock:
            cached = self._plans.get(key)
            if cached is not None:
                return cached
            known = next(
                (plan for plan, size in self._plans.values() if self.graph.fixed_batch is not None or size == batch),
                None,
            )
            plan = known if known is not None else self.compile(planned)
            self._plans[key] = (plan, batch)
            while len(self._plans) > _CACHED_PLANS:
                del self._plans[next(iter(self._plans))]
            return plan, batch

    def compile(self, batch: int) -> Plan:
        """A new plan for a batch size; calls make and keep their own."""
        if self._compile is None or batch == 0:
            return ReferencePlan(self.graph)
        try:
            return self._compile(self.graph, batch=batch, threads=self.threads, choices=self.choices)
        except MemoryError:
            raise ConvertError(
                f"there is not enough memory for batch size {batch}; run the batch in smaller pieces"
            ) from None

    def _batch_of(self, shapes: Sequence[Sequence[int]]) -> int:
        fixed = self.graph.fixed_batch
        try:
            if fixed is None:
                return self.graph.batch_of(shapes)
            batches = {shape[0] if len(shape) else -1 for shape in shapes}
            if len(batches) == 1 and -1 not in batches:
                self.graph.batch_of([(fixed, *shape[1:]) for shape in shapes])
                return batches.pop()
            return self.graph.batch_of(shapes)
        except GraphError as error:
            raise ShapeError(str(error)) from None

    def _in_pieces(self, plan: Plan, tensors: list[Tensor], batch: int) -> list[Tensor]:
        """Run a graph of one batch size at another: in pieces, the last one filled up with its last sample."""
        size = self.graph.fixed_batch
        assert size is not None
        pieces: list[list[Tensor]] = []
        for start in range(0, max(batch, 1), size):
            rows = [tensor[start : start + size] for tensor in tensors]
            missing = size - (min(batch, start + size) - start)
            if missing and batch:
                rows = [torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) for part in rows]
            elif missing:
                rows = [tensor.new_zeros((size, *tensor.shape[1:])) for tensor in tensors]
            pieces.append([output[: size - missing] for output in plan.run([part.contiguous() for part in rows])])
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _reference(self, graph: Graph, tensors: list[Tensor]) -> list[Tensor]:
        batch = self._batch_of([tensor.shape for tensor in tensors])
        if graph.fixed_batch is not None and batch != graph.fixed_batch:
            return self._in_pieces(ReferencePlan(graph), tensors, batch)
        return graph.run(tensors)

    def _samples(self, tensors: list[Tensor]) -> int:
        if self.graph.dynamic or self.graph.fixed_batch is not None:
            return self._batch_of([tensor.shape for tensor in tensors])
        return 1

    # ---- inputs and outputs

    def _from_array(self, item: Any, index: int) -> Tensor:
        if not isinstance(item, numpy.ndarray):
            raise ShapeError(
                f"input '{self.graph.inputs[index]}' is {type(item).__name__}; the model takes "
                f"{self.inputs[self.graph.inputs[index]]} "
                "as a torch tensor or a numpy array"
            )
        try:
            return torch.from_numpy(numpy.ascontiguousarray(item))
        except TypeError as error:
            raise ShapeError(
                f"input '{self.graph.inputs[index]}' has dtype {item.dtype}, which PyTorch does not know: {error}"
            ) from None

    def _wrong_tensor(self, item: Tensor, index: int) -> ShapeError:
        name = self.graph.inputs[index]
        where = "" if item.device.type == "cpu" else f" on {item.device}"
        return ShapeError(
            f"input '{name}' is {item.dtype}{format_shape(item.shape)}{where}; the model takes "
            f"{self.inputs[name]} on the CPU: "
            f"convert it first, e.g. with x.to('cpu', {self._dtypes[index]})"
        )

    def _own_structure(self, outputs: list[Tensor]) -> Any:
        leaves: list[Any] = []
        _collect(self.graph.structure, outputs, leaves)
        return pytree.tree_unflatten(leaves, self._spec)


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Executable:
    """Read an executable from an ``.spx`` file; needs no model code and runs nothing from the file.

    Example::

        executable = se.load("model.spx")
        y = executable(x)

    Args:
        path: the file.
        threads: for the kernels; None takes what was stored.

    Returns:
        The executable.

    Raises:
        FileFormatError: the file is damaged, of a newer version, or no `.spx` file.
        OSError: the file cannot be read.
    """
    from sparse_engine.io import read_spx

    contents = read_spx(path)
    attributes: Mapping[str, Any] = contents.attributes
    try:
        graph = Graph.from_json(contents.graph, contents.outline())
        graph.constants = PackedConstants(contents.constants)
        report = attributes.get("report")
        stored = attributes.get("threads")
        choices = attributes.get("choices")
        if choices is not None and not (
            isinstance(choices, dict) and all(isinstance(entry, dict) for entry in choices.values())
        ):
            raise FileFormatError("the choice of kernels must map node names to objects")
        executable = Executable(
            graph,
            choices=choices,
            threads=threads if threads is not None else stored,
            report=None if report is None else Report.from_json(report),
        )
        if not executable.native:  # the reference reads weights as they are
            graph.constants = contents.dense()
        return executable
    except (ConvertError, FileFormatError) as error:
        raise FileFormatError(f"{Path(path)}: {error}") from None


# ---- helpers


def check_threads(threads: Any) -> None:
    """Refuse what is no number of threads."""
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise ConvertError(f"threads must be a positive int or None, not {threads!r}")


def _is_plain(structure: Any, spec: pytree.TreeSpec) -> bool:
    """True when tuples, lists and dicts say all about the output's types."""
    leaves: list[Any] = []
    _collect(structure, range(spec.num_leaves), leaves)
    own = pytree.tree_unflatten(leaves, spec)
    plain = build_structure(structure, range(spec.num_leaves))
    return _same_types(own, plain)


def _same_types(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same_types(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same_types(left, right) for left, right in zip(a, b, strict=True))
    return True


def _collect(structure: Any, outputs: Sequence[Any], leaves: list[Any]) -> None:
    """The leaves in the order of the model's own output tree."""
    if structure is None:
        leaves.append(None)
        return
    if isinstance(structure, int):
        leaves.append(outputs[structure])
        return
    ((kind, items),) = structure.items()
    for item in items.values() if kind == "dict" else items:
        _collect(item, outputs, leaves)
