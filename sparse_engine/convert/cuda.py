"""``convert(device="cuda")``: an executable that replays one CUDA graph per input shape.

The graph is the same as on the CPU. Every linear layer and convolution has candidates: the dense call (cuBLAS, cuDNN),
PyTorch's 2:4 path, the Triton kernels and the CUDA kernels; those that can run a layer are checked against the dense
call and timed on its own shape, and the fastest is kept. Everything else is PyTorch's. Without synchronisation inside,
a whole call is captured once per shape and replayed. A GPU, or a layer, that a candidate cannot run gives reasons.
"""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from sparse_engine import kernels
from sparse_engine.convert.capture import capture
from sparse_engine.convert.executable import _is_plain
from sparse_engine.convert.flops import moves_only, node_flops
from sparse_engine.convert.graph import DTYPE_NAMES, Graph, GraphError, Node, Value, build_structure, shape_at
from sparse_engine.convert.inputs import Weights, prepare, prepare_examples
from sparse_engine.convert.passes import optimise
from sparse_engine.convert.reference import activate, run_node
from sparse_engine.convert.report import LayerReport, Report
from sparse_engine.errors import ConvertError, ShapeError, VerificationError
from sparse_engine.ops import cuda_library

__all__ = ["CudaExecutable", "convert_cuda", "device_reasons"]

# (input, residual or None) → output of one layer
Call = Callable[[Tensor, Tensor | None], Tensor]
# what one call takes, in milliseconds
Timer = Callable[[Callable[[], Tensor]], float]

_CACHED_SHAPES = 16
_BOUNDS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of a candidate against the dense call
_BLOCK_SIDES = (128, 64, 32, 16)
_GROUPS = (2, 4, 8, 16)  # of N:M
_FUSED = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "hardswish")


def device_reasons(device: str | torch.device = "cuda") -> list[str]:
    """Why executables cannot run on a GPU; empty where they can.

    Example::

        print(device_reasons() or "this GPU will do")
    """
    device = torch.device(device)
    if device.type != "cuda":
        return [f"{device} is not an NVIDIA GPU"]
    if not torch.cuda.is_available():
        return ["PyTorch sees no NVIDIA GPU" + ("" if torch.version.cuda else " (it was built without CUDA)")]
    if device.index is not None and device.index >= torch.cuda.device_count():
        return [f"there are {torch.cuda.device_count()} GPUs, no {device}"]
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return [f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; 8.0 (Ampere) is needed"]
    return []


def convert_cuda(
    model: nn.Module,
    example_inputs: Any,
    *,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.float32,
    tune: bool = True,
    verify: bool = True,
    bound: float | None = None,
    weights: Weights | None = None,
) -> CudaExecutable:
    """Turn a model whose weights contain exact zeros into an executable on an NVIDIA GPU.

    Args:
        model, example_inputs, weights: as for `convert`.
        device: which GPU.
        dtype: float32, float16 or bfloat16; inputs are converted to it, outputs have it.
        tune: time the candidates of each layer; otherwise every layer stays dense.
        verify: compare with the model in float32 on the CPU.
        bound: the largest accepted difference, relative to the largest magnitude; default 1e-3, 2e-2 for 16-bit types
            (5e-2 for bfloat16).

    Raises:
        ConvertError: the GPU cannot run it, with reasons. VerificationError: the outputs differ by more than the bound.
    """
    reasons = device_reasons(device)
    if reasons:
        raise ConvertError(
            f"no executable for device={str(device)!r}: {'; '.join(reasons)}. Leave device out for the CPU"
        )
    if dtype not in _BOUNDS:
        raise ConvertError(f"executables on a GPU compute in float32, float16 or bfloat16, not {dtype}")
    plain = prepare(model, weights, torch.float32)
    examples = prepare_examples(example_inputs, torch.float32)
    captured = capture(plain, examples)
    graph = optimise(captured.graph)
    executable = CudaExecutable(graph, torch.device(device), dtype, spec=captured.spec)
    if tune:
        executable.tune(*examples)
    if verify:
        limit = _BOUNDS[dtype] if bound is None else bound
        with torch.no_grad():
            expected = [leaf for leaf in pytree.tree_leaves(plain(*examples)) if isinstance(leaf, Tensor)]
        found = [leaf for leaf in pytree.tree_leaves(executable(*examples)) if isinstance(leaf, Tensor)]
        executable.max_error = max((_error(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
        executable.bound = limit
        if not executable.max_error <= limit:
            raise VerificationError(
                f"the outputs differ from the model's by {executable.max_error:.2e} of their scale; "
                f"the bound is {limit:.0e}"
            )
    return executable


@dataclass
class Candidate:
    """One way to run one layer."""

    name: str
    call: Call
    milliseconds: float | None = None


@dataclass
class Layer:
    """A linear layer or convolution: its candidates, dense first, the reasons against others, and what was chosen."""

    node: Node
    candidates: list[Candidate]
    refused: dict[str, str] = field(default_factory=dict)
    chosen: int = 0

    def pick(self, x: Tensor, residual: Tensor | None, timer: Timer, bound: float) -> None:
        """Checks every candidate against the dense call, times those that agree, and keeps the fastest."""
        expected = self.candidates[0].call(x, residual)
        agreeing = []
        for candidate in self.candidates:
            try:
                error = _error(candidate.call(x, residual), expected)
            except (RuntimeError, ValueError) as problem:  # a kernel that this GPU or these sizes cannot take
                self.refused[candidate.name] = f"{type(problem).__name__}: {str(problem)[:200]}"
                continue
            if not error <= bound:
                self.refused[candidate.name] = f"differs from the dense call by {error:.1e}"
                continue
            candidate.milliseconds = timer(lambda candidate=candidate: candidate.call(x, residual))
            agreeing.append(candidate)
        if agreeing:
            fastest = min(agreeing, key=lambda candidate: candidate.milliseconds or 0.0)
            self.chosen = self.candidates.index(fastest)


class CudaExecutable:
    """A converted model on a GPU: call it with tensors; each new input shape is captured once and replayed from then
    on.

    Example::

        executable = se.convert(model, (x,), device="cuda", dtype=torch.bfloat16)
        y = executable(x)

    Args:
        graph: validated and optimised, in float32.
        device: where it runs; on the CPU nothing is captured (for tests).
        dtype: what it computes in.
        spec: the tree of the model's own output types.
    """

    def __init__(
        self,
        graph: Graph,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        spec: pytree.TreeSpec | None = None,
    ) -> None:
        self.source = graph
        self.device = device
        self.dtype = dtype
        self.max_error: float | None = None
        self.bound = _BOUNDS[dtype]
        self._spec = None if spec is None or _is_plain(graph.structure, spec) else spec
        self.graph = _moved(graph, device, dtype)
        self.layers = {
            node.name: layer_of(node, self.graph, device, dtype)
            for node in self.graph.nodes
            if node.op in ("linear", "conv2d")
        }
        self._shapes: OrderedDict[tuple[torch.Size, ...], _Replay] = OrderedDict()
        self._lock = threading.Lock()
        self._batch = 1

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the model; outputs are new tensors on the device.

        Raises:
            ShapeError: the inputs do not fit.
        """
        if len(inputs) != len(self.graph.inputs):
            raise ShapeError(f"the model takes {len(self.graph.inputs)} inputs, got {len(inputs)}")
        tensors = [self._ready(tensor, name) for tensor, name in zip(inputs, self.graph.inputs, strict=True)]
        key = tuple(tensor.shape for tensor in tensors)
        with self._lock, torch.no_grad():
            if self.device.type != "cuda":
                outputs = self.run(tensors)
            else:
                with torch.cuda.device(self.device):
                    replay = self._shapes.get(key)
                    if replay is None:
                        replay = self._shapes[key] = _Replay(self.run, tensors)
                        while len(self._shapes) > _CACHED_SHAPES:
                            self._shapes.popitem(last=False)
                    self._shapes.move_to_end(key)
                    outputs = replay(tensors)
        structure = build_structure(self.graph.structure, outputs)
        return structure if self._spec is None else pytree.tree_unflatten(outputs, self._spec)

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run node by node, without a CUDA graph."""
        return self._run(tensors, None)

    def tune(self, *examples: Tensor, timer: Timer | None = None) -> None:
        """Choose each layer's kernel on the shapes that these inputs bring about.

        Args:
            examples: as for a call.
            timer: milliseconds of a call; by default the median over events on the GPU.
        """
        tensors = [self._ready(tensor, name) for tensor, name in zip(examples, self.graph.inputs, strict=True)]
        chosen_timer = timer or _event_timer

        def visit(layer: Layer, x: Tensor, residual: Tensor | None) -> None:
            layer.pick(x, residual, chosen_timer, _BOUNDS[self.dtype])

        with self._lock, torch.no_grad():
            self._shapes.clear()
            self._batch = self.graph.batch_of([tuple(tensor.shape) for tensor in tensors])
            self._run(tensors, visit)

    @property
    def report(self) -> Report:
        """Per layer: structure, sparsity, kernel, time against dense, and why; prints as a table."""
        from sparse_engine.structure import detect

        rows, total, sparse_flops, zeros, weights = [], 0, 0, 0, 0
        for node in self.source.nodes:
            flops = node_flops(self.source, node, self._batch)
            total += flops
            layer = self.layers.get(node.name)
            structure = sparsity = None
            if layer is not None:
                weight = self.source.constants[node.params["weight"]]
                nonzero = int(torch.count_nonzero(weight))
                zeros, weights = zeros + weight.numel() - nonzero, weights + weight.numel()
                sparsity = 1 - nonzero / max(weight.numel(), 1)
                structure = str(detect(weight)) if sparsity > 0 else "dense"
                sparse_flops += flops if layer.chosen else 0
            if moves_only(node):
                continue
            chosen = layer.candidates[layer.chosen] if layer is not None else None
            rows.append(
                LayerReport(
                    name=node.name,
                    op=node.attrs["target"] if node.op == "fallback" else node.op,
                    shape=shape_at(self.source.values[node.output].shape, self._batch),
                    structure=structure,
                    sparsity=sparsity,
                    flops=flops,
                    kernel=chosen.name if chosen is not None else "pytorch",
                    ms=chosen.milliseconds if chosen is not None else None,
                    dense_ms=layer.candidates[0].milliseconds if layer is not None else None,
                    reason="; ".join(f"{name}: {why}" for name, why in layer.refused.items())
                    if layer is not None
                    else "",
                )
            )
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.graph.constants.values())
        return Report(
            layers=rows,
            native_share=sparse_flops / total if total else 0.0,
            fallbacks={node.name: node.attrs["target"] for node in self.graph.nodes if node.op == "fallback"},
            sparsity=zeros / weights if weights else 0.0,
            bytes_before=self.source.bytes(),
            bytes_after=size,
            max_error=self.max_error,
            bound=self.bound,
            batch=self._batch,
            batch_sizes="any",
            threads=None,
            native=True,
            notes=["the share of native work is that of layers for which a sparse kernel was fastest"],
        )

    def _ready(self, tensor: Tensor, name: str) -> Tensor:
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"input '{name}' is {type(tensor).__name__}; a torch tensor is needed")
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self.device, dtype, non_blocking=True)

    def _run(
        self, tensors: Sequence[Tensor], visit: Callable[[Layer, Tensor, Tensor | None], None] | None
    ) -> list[Tensor]:
        try:
            batch = self.graph.batch_of([tuple(tensor.shape) for tensor in tensors])
        except GraphError as error:
            raise ShapeError(str(error)) from None
        values: dict[str, Tensor] = dict(zip(self.graph.inputs, tensors, strict=True))
        last = {name: index for index, node in enumerate(self.graph.nodes) for name in node.inputs}
        for index, node in enumerate(self.graph.nodes):
            operands = [values[name] for name in node.inputs]
            layer = self.layers.get(node.name)
            if layer is None:
                results = run_node(self.graph, node, operands, batch)
            else:
                residual = operands[1] if len(operands) > 1 else None
                if visit is not None:
                    visit(layer, operands[0], residual)
                results = [layer.candidates[layer.chosen].call(operands[0], residual)]
            values.update(zip(node.outputs, results, strict=True))
            for name in node.inputs:
                if last[name] == index and name not in self.graph.outputs:
                    values.pop(name, None)
        return [values[name] for name in self.graph.outputs]


class _Replay:
    """One captured CUDA graph with its own input and output memory."""

    def __init__(self, run: Callable[[Sequence[Tensor]], list[Tensor]], tensors: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and libraries set themselves up outside the capture
            for _ in range(3):
                run(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = run(self._inputs)
        self._done = torch.cuda.Event()
        self._done.record()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)  # another stream may still be reading this graph's memory
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        outputs = [output.clone() for output in self._outputs]
        self._done.record(stream)
        return outputs


# -- candidates of a layer -------------------------------------------------------------------------------------------


def layer_of(node: Node, graph: Graph, device: torch.device, dtype: torch.dtype) -> Layer:
    """All candidates that this layer's weight and this machine allow, dense first, and reasons against the others."""
    weight = graph.constants[node.params["weight"]]
    bias = graph.constants[node.params["bias"]] if "bias" in node.params else None
    layer = Layer(node, [Candidate("dense", _dense(node, graph))])
    if not bool((weight == 0).any()):
        layer.refused["sparse"] = "no weight is zero"
        return layer
    add = _add_linear if node.op == "linear" else _add_conv
    add(layer, weight, bias, device, dtype)
    return layer


def _dense(node: Node, graph: Graph) -> Call:
    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        return run_node(graph, node, [x] if residual is None else [x, residual], 1)[0]

    return call


def _finish(y: Tensor, residual: Tensor | None, activation: Mapping[str, Any] | None) -> Tensor:
    return activate(y if residual is None else y + residual, activation)


def _add_linear(layer: Layer, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
    activation = layer.node.attrs["activation"]
    against = _why_not_triton(device)
    if against:
        layer.refused["triton"] = against
    else:
        _add_blocks(layer, weight, bias, activation)
        _add_groups(layer, weight, bias, activation)
    _add_cuda_blocks(layer, weight, bias, activation, device, dtype)
    _add_semi_structured(layer, weight, bias, activation, device, dtype)
    against = _why_not_cuda(device, dtype, weight.shape[1])
    if against:
        layer.refused["cuda bitmask"] = against
    else:
        packed = cuda_library.pack_bitmask(weight)

        def bitmask(x: Tensor, residual: Tensor | None) -> Tensor:
            return _finish(cuda_library.library().bitmask_linear(x, packed, bias), residual, activation)

        layer.candidates.append(Candidate("cuda bitmask", bitmask))


def _add_blocks(layer: Layer, weight: Tensor, bias: Tensor | None, activation: Mapping[str, Any] | None) -> None:
    """Triton's block-sparse kernel in the largest square blocks of which at least 30 % are empty."""
    side = _largest_blocks(weight, _BLOCK_SIDES)
    if side is None:
        layer.refused["triton blocks"] = "fewer than 30 % of its 16×16 blocks are empty"
        return
    pattern, values = _packed_blocks(weight, side)
    layer.candidates.append(Candidate(f"triton blocks {side}×{side}", _blocks(pattern, values, bias, activation)))


def _largest_blocks(weight: Tensor, sides: Sequence[int]) -> int | None:
    """The first of these sides with which at least 30 % of the blocks are empty."""
    return next((side for side in sides if float(_kept_blocks(weight, side).float().mean()) <= 0.7), None)


def _kept_blocks(weight: Tensor, side: int) -> Tensor:
    padded = functional.pad(weight, (0, -weight.shape[1] % side, 0, -weight.shape[0] % side))
    tiles = padded.reshape(padded.shape[0] // side, side, padded.shape[1] // side, side)
    return (tiles != 0).any(3).any(1)


def _packed_blocks(weight: Tensor, side: int) -> tuple[kernels.BlockPattern, Tensor]:
    pattern = kernels.block_pattern(_kept_blocks(weight, side), (side, side), (weight.shape[0], weight.shape[1]))
    return pattern, kernels.pack_blocks(weight, pattern)


def _add_cuda_blocks(
    layer: Layer,
    weight: Tensor,
    bias: Tensor | None,
    activation: Mapping[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """The block-sparse kernel in CUDA C++, whose blocks have sides of 64 and 128."""
    against = _why_not_cuda(device, dtype, weight.shape[1])
    side = None if against else _largest_blocks(weight, (128, 64))
    if against or side is None:
        layer.refused["cuda blocks"] = against or "fewer than 30 % of its 64×64 blocks are empty"
        return
    pattern, values = _packed_blocks(weight, side)
    kind = None if activation is None else activation["kind"]

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        fused = residual is None and kind in cuda_library.ACTIVATIONS
        y = cuda_library.library().block_linear(
            x, values, pattern.row_ptr, pattern.cols, pattern.row_order, pattern.shape, bias, kind if fused else None
        )
        return y if fused else _finish(y, residual, activation)

    layer.candidates.append(Candidate(f"cuda blocks {side}×{side}", call))


def _blocks(
    pattern: kernels.BlockPattern, values: Tensor, bias: Tensor | None, activation: Mapping[str, Any] | None
) -> Call:
    kind = None if activation is None else activation["kind"]

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        if kind is None or kind in _FUSED:
            return kernels.block_sparse_linear(x, values, pattern, bias, residual, kind)
        return _finish(kernels.block_sparse_linear(x, values, pattern, bias), residual, activation)

    return call


def _add_groups(layer: Layer, weight: Tensor, bias: Tensor | None, activation: Mapping[str, Any] | None) -> None:
    """Triton's N:M kernel, in the groups in which the weight takes the fewest bytes, where that is less than half."""
    choices = []
    for m in _GROUPS:
        if weight.shape[1] % m == 0:
            n = max(1, int((weight.reshape(weight.shape[0], -1, m) != 0).sum(-1).max()))
            choices.append(((n * weight.element_size() + (1 if m <= 8 else 2)) / m, n, m))
    if not choices or min(choices)[0] > 0.65 * weight.element_size():
        layer.refused["triton n:m"] = "in no groups of 2 to 16 inputs are half of the weights zero everywhere"
        return
    # of nearly equal ones the smallest groups: the report then names the pattern that the weight was pruned to
    _, n, m = next(choice for choice in choices if choice[0] <= 1.25 * min(choices)[0])
    values, bits = kernels.pack_nm(weight, n, m)

    def groups(x: Tensor, residual: Tensor | None) -> Tensor:
        return _finish(kernels.nm_linear(x, values, bits, n, m, bias), residual, activation)

    layer.candidates.append(Candidate(f"triton {n}:{m}", groups))


def _add_semi_structured(
    layer: Layer,
    weight: Tensor,
    bias: Tensor | None,
    activation: Mapping[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """PyTorch's own 2:4 path, which skips the arithmetic too."""
    if not _is_two_of_four(weight):
        layer.refused["torch 2:4"] = "some group of four inputs has more than two non-zeros"
        return
    if device.type != "cuda" or dtype == torch.float32:
        layer.refused["torch 2:4"] = "needs a GPU and a 16-bit type"
        return
    try:
        compressed = torch.sparse.to_sparse_semi_structured(weight)
    except RuntimeError as problem:  # sizes that it does not take
        layer.refused["torch 2:4"] = str(problem)[:200]
        return

    def semi_structured(x: Tensor, residual: Tensor | None) -> Tensor:
        return _finish(functional.linear(x, compressed, bias), residual, activation)

    layer.candidates.append(Candidate("torch 2:4", semi_structured))


def _add_conv(layer: Layer, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> None:
    attrs = layer.node.attrs
    top, left, bottom, right = attrs["padding"]
    if attrs["groups"] != 1 or (top, left) != (bottom, right):
        layer.refused["sparse"] = "grouped, or padded unevenly"
        return
    pointwise = tuple(weight.shape[2:]) == (1, 1) and tuple(attrs["stride"]) == (1, 1) and top == left == 0
    activation = attrs["activation"]
    keep_in = (weight != 0).any(3).any(2).any(0)
    keep_out = (weight != 0).any(3).any(2).any(1)
    lost = None if bias is None else bias[~keep_out]
    if bool(keep_in.all()) and bool(keep_out.all()):
        layer.refused["channels"] = "no channel is empty"
    elif lost is not None and bool((lost != 0).any()):
        layer.refused["channels"] = f"{int((lost != 0).sum())} empty channels have a bias"
    else:
        inputs, outputs = kernels.channel_list(keep_in, device), kernels.channel_list(keep_out, device)
        geometry = kernels.ConvGeometry(
            (weight.shape[2], weight.shape[3]), tuple(attrs["stride"]), (top, left), tuple(attrs["dilation"])
        )
        against = _why_not_triton(device)
        if against:
            layer.refused["triton channels"] = against
        else:
            # the weight lies as the kernel reads it: converting it at every call would be a copy
            last = weight.contiguous(memory_format=torch.channels_last)

            def channels(x: Tensor, residual: Tensor | None) -> Tensor:
                y = kernels.channel_conv(x, last, inputs, outputs, geometry, bias)
                return _finish(y, residual, activation)

            layer.candidates.append(Candidate("triton channels", channels))
        against = _why_not_cuda(device, dtype, 8)
        if against:
            layer.refused["cuda channels"] = against
        else:
            gathered = cuda_library.gather_weight(weight, inputs.index, outputs.index)
            kept_bias = None if bias is None else bias[outputs.index.long()]

            def gather(x: Tensor, residual: Tensor | None) -> Tensor:
                y = cuda_library.library().gather_conv(
                    x, gathered, inputs.index, outputs.index, inputs.run, outputs.channels, geometry.kernel,
                    geometry.stride, geometry.padding, geometry.dilation, kept_bias,
                )  # fmt: skip
                return _finish(y, residual, activation)

            layer.candidates.append(Candidate("cuda channels", gather))
    if pointwise:
        _add_pointwise(layer, weight, bias, activation, device, dtype)


def _add_pointwise(
    layer: Layer,
    weight: Tensor,
    bias: Tensor | None,
    activation: Mapping[str, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """A 1×1 convolution of an unstructured weight is a linear layer over the pixels."""
    against = _why_not_cuda(device, dtype, weight.shape[1])
    if against:
        layer.refused["cuda bitmask"] = against
        return
    packed = cuda_library.pack_bitmask(weight.flatten(1))

    def pixels(x: Tensor, residual: Tensor | None) -> Tensor:
        y = cuda_library.library().bitmask_linear(x.permute(0, 2, 3, 1), packed, bias)
        return _finish(y.permute(0, 3, 1, 2), residual, activation)

    layer.candidates.append(Candidate("cuda bitmask", pixels))


def _why_not_triton(device: torch.device) -> str:
    reasons = kernels.why_not()
    if device.type != "cuda" and torch.cuda.is_available():
        reasons = [*reasons, f"the executable is on {device}"]
    return "; ".join(reasons)


def _why_not_cuda(device: torch.device, dtype: torch.dtype, inputs: int) -> str:
    emulated = device.type == "cpu" and cuda_library.emulated()
    reasons = cuda_library.why_not() if device.type == "cuda" or emulated else [f"the executable is on {device}"]
    if dtype == torch.float32:
        reasons = [*reasons, "computes in 16-bit types only"]
    if inputs % 8:
        reasons = [*reasons, f"{inputs} inputs are no multiple of 8"]
    return "; ".join(reasons)


def _is_two_of_four(weight: Tensor) -> bool:
    if weight.shape[1] % 4:
        return False
    return int((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1).max()) <= 2


# -- helpers ---------------------------------------------------------------------------------------------------------


def _moved(graph: Graph, device: torch.device, dtype: torch.dtype) -> Graph:
    """The graph with floating-point constants and values in another type, on the device."""
    moved = graph.copy()
    moved.constants = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in graph.constants.items()
    }
    if dtype != torch.float32:
        moved.values = {
            name: Value(value.shape, DTYPE_NAMES[dtype] if value.dtype == "float32" else value.dtype)
            for name, value in graph.values.items()
        }
    return moved


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest magnitude."""
    if not expected.numel():
        return 0.0
    want, got = expected.detach().cpu().double(), found.detach().cpu().double()
    if want.shape != got.shape:
        return float("inf")
    scale = float(want.abs().max())
    worst = float((got - want).abs().max())
    return worst / scale if scale else worst


def _event_timer(call: Callable[[], Tensor]) -> float:
    """Median milliseconds of a call on the GPU, between events, after warming up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
