"""``convert``: from a pruned model to an executable in one call."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_engine.convert.capture import Captured, capture
from sparse_engine.convert.constants import PackedConstants, pack
from sparse_engine.convert.executable import Executable, check_threads
from sparse_engine.convert.flops import moves_only, node_flops
from sparse_engine.convert.graph import Graph, Node, shape_at
from sparse_engine.convert.inputs import Weights, prepare, prepare_examples
from sparse_engine.convert.passes import optimise
from sparse_engine.convert.report import LayerReport, Report
from sparse_engine.errors import ConvertError, VerificationError
from sparse_engine.packed import PackedWeight
from sparse_engine.rounded import RoundedWeight

Progress = Callable[[str], None]

# By precision of the weights, of the outputs' scale. A rounded weight is off by at most 2^-9 (bf16) or by half a level
# of 127 (int8: about 1 % of a usual weight); over the terms of a sum and the layers of a model such errors average out.
_BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "int8": 5e-2}
_WORTH_COLLECTING = 32 << 20  # bytes of weights from which on memory is given back at once


def convert(
    model: nn.Module,
    example_inputs: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: str = "fp32",
    threads: int | None = None,
    tune: bool = True,
    verify: bool = True,
    bound: float | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> Executable:
    """Turn a model whose weights contain exact zeros into an executable that gives the same outputs, faster.

    Example::

        executable = se.convert(model, (torch.randn(1, 3, 224, 224),))
        y = executable(torch.randn(16, 3, 224, 224))
        print(executable.report)

    The model is copied, its masks are made permanent, it is put in eval mode and captured with ``torch.export``; batch
    norm, biases, residuals and activations are folded into the operators, dead channels removed, and a kernel is chosen
    for each layer with a dense one always among the candidates.

    Args:
        model: any module, with exact zeros in its weights, masks of ``sparse_engine.prune`` or
            ``torch.nn.utils.prune``, or ``torch.ao.pruning`` parametrisations. It is not changed. A dense model is
            converted too; the report says that there is nothing to gain from sparsity.
        example_inputs: a tensor, or a tuple of the model's positional arguments; kernels are timed, and the result is
            verified, on them. The first dimension is the batch size; the executable runs any other as well.
        device: "cpu", or "cuda" for a `sparse_engine.convert.cuda.CudaExecutable` (compiled and interpreted in the
            tests, not yet run on a GPU).
        dtype: torch.float32; a model in another floating dtype is converted to it. On a GPU also float16 and bfloat16.
        precision: "fp32"; or "bf16" or "int8" for the weights of linear layers that read one vector (batch 1): where
            that is faster they are rounded, and stored so; x, sums and outputs stay in float32. With "bf16" every other
            layer may also compute in bfloat16 (weights and what it reads; sums stay in float32) where the processor
            has instructions for it (AVX512-BF16) and that is faster, and what such layers hand to each other is kept
            in bfloat16. The report says which.
        threads: of the executable's kernels; None uses all cores.
        tune: time the candidate kernels of each layer; otherwise a cost model chooses.
        verify: run model and executable on the example inputs and compare.
        bound: the largest accepted difference, relative to the largest magnitude of each output; None: 1e-4, with
            bf16 2e-2, with int8 5e-2. Where only weights are rounded the executable is also held to 1e-4 of its own
            graph, run by PyTorch with the same rounded weights.
        weights: a checkpoint (file name or state dict) to load into the copy first.
        progress: called with the name of each step as it begins.

    Returns:
        The executable.

    Raises:
        ConvertError: an argument is not supported, or the model cannot be captured (`CaptureError`).
        VerificationError: the outputs differ by more than the bound; nothing is returned.
        CheckpointError: the weights do not fit the model.
    """
    if _device_type(device) == "cuda":
        from sparse_engine.convert.cuda import convert_cuda

        if precision != "fp32":
            raise ConvertError(f"precision={precision!r} is for the CPU; on a GPU pass dtype=torch.bfloat16")
        return convert_cuda(  # type: ignore[return-value]
            model, example_inputs, device=device, dtype=dtype, tune=tune, verify=verify, bound=bound, weights=weights
        )
    if precision not in _BOUNDS:
        raise ConvertError(f"precision must be one of {', '.join(_BOUNDS)}, not {precision!r:.40}")
    bound = _BOUNDS[precision] if bound is None else bound
    _check_arguments(device, dtype, threads, bound)
    step = progress if progress is not None else (lambda name: None)
    step("preparing the model")
    plain = prepare(model, weights, dtype)
    bytes_before = _bytes([*plain.parameters(), *plain.buffers()])
    examples = prepare_examples(example_inputs, dtype)
    step("capturing the graph")
    captured = capture(plain, examples)
    step("rewriting the graph")
    counts: Counter[str] = Counter()
    zeros = _count_zeros(captured.graph)
    graph = optimise(captured.graph, counts)
    captured.graph = graph  # what the passes replaced is let go
    _own_constants(graph, plain)
    release_memory(bytes_before)
    step("choosing kernels")
    choices = _choose(graph, examples, tune, threads, precision)
    rounded = _round_weights(graph, choices or {})
    release_memory(bytes_before)
    executable = Executable(
        graph, choices=choices, threads=threads, spec=captured.spec, model=model if weights is None else None
    )
    bytes_after = executable.packed_bytes
    if not executable.native:  # the reference reads weights as they are
        graph.constants = dict(graph.constants)
    error = None
    if verify:
        step("verifying the outputs")
        error = _verify(plain, executable, examples, bound)
        if rounded and not _in_pairs(choices):  # the bound above would hide a wrong kernel
            _compare(lambda *inputs: graph.run(list(inputs)), executable, examples, _BOUNDS["fp32"], "on its own graph")
    del plain
    release_memory(bytes_before)
    step("writing the report")
    executable._report = _report(captured, executable, examples, counts, bytes_before, bytes_after, zeros, error, bound)
    if precision != "fp32":
        executable._report.precision = precision
        executable._report.notes += _about_precision(graph, precision, choices or {})
    return executable


def _device_type(device: str | torch.device) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ConvertError(f"device={device!r} is no device: {str(error).splitlines()[0]}") from None


def _check_arguments(device: str | torch.device, dtype: torch.dtype, threads: int | None, bound: float) -> None:
    if _device_type(device) != "cpu":
        raise ConvertError(
            f"executables run on the CPU; device={str(device)!r} is not supported. On a GPU use sparse_engine.sparsify_"
        )
    if dtype is not torch.float32:
        raise ConvertError(
            f"executables compute in torch.float32, not {dtype}; leave dtype out and the model is converted to it"
        )
    check_threads(threads)
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0 or not math.isfinite(bound):
        raise ConvertError(f"bound must be a positive number, not {bound!r}")


def _own_constants(graph: Graph, model: nn.Module) -> None:
    """Pack the constants, and copy those that still are the user's tensors: training may go on, the executable stays
    as it is.

    Packed one by one, and each dense one let go, they never take the memory of two dense models.
    """
    theirs = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    packed = PackedConstants({})
    for name in list(graph.constants):
        item = pack(graph.constants.pop(name))
        mine = isinstance(item, PackedWeight) or item.untyped_storage().data_ptr() not in theirs
        packed.stored[name] = item if mine else item.clone()
    graph.constants = packed


def release_memory(model_bytes: int) -> None:
    """Give memory that is free back to the system, where the C library would keep it for later.

    Capturing and folding a large model leave hundreds of megabytes of small pieces behind, between which nothing large
    fits. What a small one leaves waits for Python's next collection: one now looks at every object that PyTorch's
    modules consist of, 0.2 s, three times what the conversion itself takes.
    """
    if model_bytes < _WORTH_COLLECTING:
        return
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no C library under this name: nothing to give back
        return None


def _round_weights(graph: Graph, choices: Mapping[str, Mapping[str, Any]]) -> int:
    """Round the weights of the layers for which that was chosen; how many."""
    chosen = [node for node in graph.nodes if "precision" in choices.get(node.name, {})]
    for node in chosen:
        name = node.params["weight"]
        assert isinstance(graph.constants, PackedConstants)
        rounded = RoundedWeight.from_dense(graph.constants[name], choices[node.name]["precision"])
        graph.constants.stored[name] = rounded
    return len(chosen)


def _in_pairs(choices: Mapping[str, Mapping[str, Any]] | None) -> int:
    """How many layers compute in bfloat16."""
    return sum(_is_pairs(known) for known in (choices or {}).values())


def _about_precision(graph: Graph, precision: str, choices: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    pairs = _in_pairs(choices)
    if pairs:
        layers = sum(node.op in ("conv2d", "linear") for node in graph.nodes)
        notes.append(
            f"{pairs} of {layers} layers compute in bfloat16, with sums in float32"
            + ("" if pairs == layers else "; the others in float32, where they are as fast")
        )
    exact = [node for node in graph.nodes if not _is_pairs(choices.get(node.name))]
    linear = [node.name for node in exact if node.op == "linear"]
    rounded = sum("precision" in choices.get(name, {}) for name in linear)
    single = sum(node.op == "conv2d" and "precision" in choices.get(node.name, {}) for node in exact)
    if single:
        notes.append(f"the weights of {single} convolutions that read one vector are kept in {precision}")
    if not linear or (notes and not rounded):
        return notes or ["all layers stay in float32, where they are as fast"]
    if rounded == len(linear):
        return [*notes, f"the weights of all {rounded} linear layers are kept in {precision}"]
    text = f"the weights of {rounded} of {len(linear)} linear layers are kept in {precision}"
    return [*notes, f"{text}; the others stay in float32, where they are as fast"]


def _is_pairs(known: Mapping[str, Any] | None) -> bool:
    return known is not None and known["choice"]["kernel"] in ("pairs", "depthwise_pairs")


def _choose(
    graph: Graph, examples: tuple[Tensor, ...], tune: bool, threads: int | None, precision: str
) -> dict[str, Any] | None:
    try:
        choose = importlib.import_module("sparse_engine.convert.choose").choose
    except ImportError:
        return None  # without the native runtime there is nothing to choose from; the report says so
    return choose(graph, examples, tune=tune, threads=threads, precision=precision)


# ---- verification


def _verify(model: nn.Module, executable: Executable, examples: tuple[Tensor, ...], bound: float) -> float:
    """The largest error on the examples, and at another batch size, which may only seem to be free."""
    error = _compare(model, executable, examples, bound, "on the example inputs")
    graph = executable.graph
    if graph.dynamic or graph.fixed_batch is not None:
        batch = executable._batch_of([tensor.shape for tensor in examples])
        other = batch + 1 if batch < 4 else batch - 1
        dynamic = [
            graph.fixed_batch is not None
            or (bool(graph.values[name].shape) and not isinstance(graph.values[name].shape[0], int))
            for name in graph.inputs
        ]
        changed = tuple(
            torch.cat([tensor, tensor[:1]])[:other] if moves else tensor
            for tensor, moves in zip(examples, dynamic, strict=True)
        )
        try:
            error = max(error, _compare(model, executable, changed, bound, f"at batch size {other}"))
        except VerificationError as problem:
            if graph.fixed_batch is None:
                raise
            raise VerificationError(
                f"{problem}. This model was captured for batch size {graph.fixed_batch} only and mixes the samples of "
                f"a batch, "
                "so it cannot run other batch sizes piece by piece; make it independent of the batch size"
            ) from None
    return error


def _compare(
    model: Callable[..., Any], executable: Executable, inputs: tuple[Tensor, ...], bound: float, where: str
) -> float:
    with torch.no_grad():
        expected = _tensors(model(*[tensor.clone() for tensor in inputs]))
        found = _tensors(executable(*inputs))
    if len(expected) != len(found):
        raise VerificationError(f"the model returns {len(expected)} tensors {where}, the executable {len(found)}")
    worst = 0.0
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        name = executable.graph.outputs[index] if len(executable.graph.outputs) == len(found) else str(index)
        if want.shape != got.shape or want.dtype != got.dtype:
            raise VerificationError(
                f"output '{name}' {where} is {got.dtype}{tuple(got.shape)} instead of {want.dtype}{tuple(want.shape)}"
            )
        error = relative_error(got, want)
        if not error <= bound:
            raise VerificationError(
                f"output '{name}' {where} differs from the model's by {error:.2e} of its scale; the bound is "
                f"{bound:.0e}. "
                "If that is rounding in an ill-conditioned model, pass a larger bound"
            )
        worst = max(worst, error)
    return worst


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest finite magnitude of what was expected.

    inf and nan must be in the same places; for outputs that are not floating-point numbers it is the share of elements
    that differ.
    """
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point():
        return (found != expected).double().mean().item()
    want, got = expected.double(), found.double()
    finite = want.isfinite()
    if not torch.equal(
        torch.where(finite, 0.0, want.nan_to_num(nan=7.0)), torch.where(finite, got * 0.0, got.nan_to_num(nan=7.0))
    ):
        return math.inf
    difference = (got - want)[finite].abs()
    scale = want[finite].abs().max().item() if bool(finite.any()) else 0.0
    worst = difference.max().item() if difference.numel() else 0.0
    return worst / scale if scale else worst


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


# ---- report


def _report(
    captured: Captured,
    executable: Executable,
    examples: tuple[Tensor, ...],
    counts: Mapping[str, int],
    bytes_before: int,
    bytes_after: int,
    zeros_and_weights: tuple[int, int],
    error: float | None,
    bound: float,
) -> Report:
    graph = executable.graph
    batch = executable._samples(list(examples))
    planned = graph.fixed_batch if graph.fixed_batch is not None else batch
    chosen: dict[str, Any] = executable.choices or {}
    layers: list[LayerReport] = []
    total = native = 0
    for node in graph.nodes:
        flops = node_flops(graph, node, planned)
        total += flops
        native += flops if executable.native and node.op != "fallback" else 0
        if not moves_only(node):
            layers.append(_layer(graph, node, planned, flops, chosen.get(node.name, {}), captured.reasons, executable))
    zeros, weights = zeros_and_weights
    sparsity = zeros / weights if weights else 0.0
    notes: list[str] = []
    if not executable.native:
        notes.append(f"running with PyTorch: {executable.native_reason}")
    if zeros == 0:
        notes.append(
            "no weight is zero: this model is dense and gains nothing from sparsity; prune it first, e.g. with "
            "sparse_engine.prune"
        )
    elif sparsity < 0.5:
        notes.append(f"only {sparsity:.1%} of the weights are zero; unstructured sparsity pays from about 70 %")
    return Report(
        layers=layers,
        native_share=native / total if total else 1.0,
        fallbacks={
            node.name: captured.reasons.get(node.name, node.attrs["target"])
            for node in graph.nodes
            if node.op == "fallback"
        },
        sparsity=sparsity,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        max_error=error,
        bound=float(bound),
        batch=batch,
        batch_sizes="any"
        if captured.batch_reason is None
        else f"captured for {graph.fixed_batch or 'one'} only ({captured.batch_reason})",
        threads=executable.threads,
        native=executable.native,
        removed_channels=counts.get("dead channels", 0),
        notes=notes,
    )


def _layer(
    graph: Graph,
    node: Node,
    batch: int,
    flops: int,
    choice: Mapping[str, Any],
    reasons: Mapping[str, str],
    executable: Executable,
) -> LayerReport:
    structure, sparsity = None, None
    if node.op in ("conv2d", "linear"):
        weight = graph.constants[node.params["weight"]]
        sparsity = 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        structure = _structure(weight) if sparsity > 0 else "dense"
    op = node.attrs["target"] if node.op == "fallback" else node.op
    if node.op == "fallback":
        kernel, reason = "pytorch", reasons.get(node.name, "")
    else:
        kernel = "native" if executable.native else "pytorch"
        reason = ""
    return LayerReport(
        name=node.name,
        op=op,
        shape=shape_at(graph.values[node.output].shape, batch),
        structure=structure,
        sparsity=sparsity,
        flops=flops,
        kernel=str(choice.get("kernel", kernel)),
        ms=choice.get("ms"),
        dense_ms=choice.get("dense_ms"),
        reason=str(choice.get("reason", reason)),
    )


def _count_zeros(graph: Graph) -> tuple[int, int]:
    """Zeros and entries of the weights of all linear operators, as they came."""
    names = {node.params["weight"] for node in graph.nodes if node.op in ("conv2d", "linear")}
    entries = sum(graph.constants[name].numel() for name in names)
    return entries - sum(int(torch.count_nonzero(graph.constants[name])) for name in names), entries


def _structure(weight: Tensor) -> str:
    from sparse_engine.structure import detect

    return str(detect(weight))


def _bytes(tensors: Sequence[Tensor]) -> int:
    seen = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(seen.values())
