"""`sparsify_` replaces the layers of a model for which sparse kernels pay; `densify_` puts the dense ones back."""

import fnmatch
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from sparse_engine.errors import SparseEngineError
from sparse_engine.nn.layers import SparseConv2d, SparseLayer, SparseLinear, pruned_weight
from sparse_engine.ops.sparse_conv2d import explain_conv2d
from sparse_engine.ops.sparse_linear import explain_linear
from sparse_engine.structure import Block, Channel, Structure

__all__ = ["LayerReport", "SparsifyReport", "densify_", "sparsify_"]


@dataclass
class LayerReport:
    """What happened to one layer, and why.

    Attributes:
        name: the module's name in the model.
        kind: "Linear" or "Conv2d".
        shape: of the weight.
        sparsity: share of weights removed.
        structure: of what is kept, as text.
        sparse: whether the layer is sparse now.
        reason: why, or why not.
        dense_ms, sparse_ms: medians of the timing (forward, with backward for a model in training mode), or None.
        dense_bytes, sparse_bytes: size of weight and bias, dense and packed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    structure: str
    sparse: bool
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None
    dense_bytes: int = 0
    sparse_bytes: int = 0


@dataclass
class SparsifyReport:
    """One line per linear and convolutional layer; prints as a table."""

    layers: list[LayerReport] = field(default_factory=list)

    @property
    def converted(self) -> list[str]:
        """Names of the layers that are sparse now."""
        return [layer.name for layer in self.layers if layer.sparse]

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps({"layers": [asdict(layer) for layer in self.layers]})

    def __str__(self) -> str:
        sparse = self.converted
        header = f"{len(sparse)} of {len(self.layers)} layers are sparse now"
        if not self.layers:
            return "the model has no nn.Linear and no nn.Conv2d layers"
        width = max(len(layer.name) for layer in self.layers)
        lines = [header]
        for layer in self.layers:
            timing = "" if layer.dense_ms is None else f"  {layer.dense_ms:8.3f} -> {layer.sparse_ms:8.3f} ms"
            state = "sparse" if layer.sparse else "dense "
            lines.append(
                f"  {layer.name:<{width}}  {layer.kind:<6}  {100 * layer.sparsity:5.1f} %  {layer.structure:<14} "
                f"{state}{timing}  {layer.reason}"
            )
        return "\n".join(lines)


def sparsify_(
    model: nn.Module,
    *,
    min_sparsity: float | None = None,
    force: bool = False,
    ignore: Sequence[str | type[nn.Module]] = (),
    example_inputs: Any = None,
    tune: bool | None = None,
    structure: Structure | str | None = None,
) -> SparsifyReport:
    """Replace `nn.Linear` and `nn.Conv2d` layers whose zeros pay by sparse ones, in place.

    Example:
        >>> model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
        >>> torch.nn.utils.prune.l1_unstructured(model[0], "weight", amount=0.95)
        >>> print(sparsify_(model))

    Make the optimiser afterwards: weights become new Parameters (`values`); biases stay the same objects.

    Args:
        model: changed in place. A layer's pattern is the mask that `se.prune`, `torch.nn.utils.prune` or
            `torch.ao.pruning` left on it; without a mask it is what is not exactly zero.
        min_sparsity: layers with a smaller share of zeros stay dense; 0 together with `force` also converts layers
            without any zero.
        force: convert although the layer would be slower.
        ignore: names ("head", "layer*.conv1", "re:.*fc") or module classes that stay as they are.
        example_inputs: one tensor, or a tuple of arguments for the model; with them every candidate layer is timed on
            what it really gets.
        tune: whether to time; by default when `example_inputs` are given. Without timing the decision comes from an
            estimate.
        structure: what all the layers' masks are declared to be; detected layer by layer when not given.

    Returns:
        A report with one line per layer: sparsity, structure, times, and why it is sparse or dense now.

    Raises:
        SparseEngineError: when the model itself is such a layer, `min_sparsity` is not a share, or `tune` lacks
            `example_inputs`.
    """
    if isinstance(model, nn.Linear | nn.Conv2d):
        raise SparseEngineError(
            f"sparsify_ replaces layers inside a model and cannot replace the model itself, a {type(model).__name__}; "
            f"use Sparse{type(model).__name__}.from_dense(layer), or wrap it in nn.Sequential"
        )
    if min_sparsity is not None and not 0.0 <= min_sparsity <= 1.0:
        raise SparseEngineError(f"min_sparsity is {min_sparsity}; a share between 0 and 1 expected")
    if tune and example_inputs is None:
        raise SparseEngineError("tune=True times the layers on real inputs and needs example_inputs")
    tune = example_inputs is not None if tune is None else tune

    report = SparsifyReport()
    places = _places(model)
    shared = _shared_parameters(model)
    candidates: dict[nn.Module, tuple[LayerReport, SparseLayer]] = {}
    for module, names in places.items():
        line, layer = _examine(module, names[0], shared, min_sparsity, force, ignore, structure)
        report.layers.append(line)
        if layer is not None:
            candidates[module] = (line, layer)

    inputs = _record_inputs(model, list(candidates), example_inputs) if tune and candidates else {}
    for module, (line, layer) in candidates.items():
        if tune:
            _decide_by_timing(module, layer, inputs.get(module), line, force)
        else:
            _decide_by_estimate(layer, line, force)
        if line.sparse:
            _move_hooks(module, layer)
            for name in places[module]:
                _replace(model, name, layer)
    return report


def densify_(model: nn.Module) -> nn.Module:
    """Replace every `SparseLinear` and `SparseConv2d` in the model by the dense layer with the same weights, in place.

    Example:
        >>> sparsify_(model, force=True)
        >>> densify_(model)  # plain PyTorch again, zeros as exact zeros

    Returns:
        The model; a model that is itself such a layer is returned as a new dense layer.
    """
    if isinstance(model, SparseLayer):
        return model.to_dense()
    done: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SparseLayer):
            if module not in done:
                done[module] = module.to_dense()
                _move_hooks(module, done[module])
            _replace(model, name, done[module])
    return model


# -- what can be converted -------------------------------------------------------------------------------------------


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every linear and convolutional module with all names under which the model holds it."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | nn.Conv2d):
            places.setdefault(module, []).append(name)
    return places


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _examine(
    module: nn.Module,
    name: str,
    shared: set[int],
    min_sparsity: float | None,
    force: bool,
    ignore: Sequence[str | type[nn.Module]],
    structure: Structure | str | None,
) -> tuple[LayerReport, SparseLayer | None]:
    kind = "Linear" if isinstance(module, nn.Linear) else "Conv2d"
    weight, mask = pruned_weight(module)
    kept = weight.detach() != 0 if mask is None else mask
    sparsity = 1.0 - float(kept.sum()) / max(kept.numel(), 1)
    line = LayerReport(name, kind, tuple(weight.shape), sparsity, "", False, "")
    line.dense_bytes = sum(t.numel() * t.element_size() for t in (weight, module.bias) if t is not None)
    line.sparse_bytes = line.dense_bytes

    plain_type = nn.Linear if kind == "Linear" else nn.Conv2d
    parametrized = parametrize.is_parametrized(module)
    if _ignored(module, name, ignore):
        line.reason = "ignored, as asked"
    elif parametrized and (mask is None or list(module.parametrizations) != ["weight"]):
        line.reason = "it has a parametrization other than a pruning mask; remove it first"
    elif not parametrized and type(module) is not plain_type:
        line.reason = f"it is a {type(module).__name__}, whose own code would be lost"
    elif id(weight) in shared:
        line.reason = "its weight is shared with another module"
    elif not weight.dtype.is_floating_point or weight.dtype not in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    ):
        line.reason = f"its weight is {weight.dtype}"
    elif weight.is_meta:
        line.reason = "its weight is on the meta device"
    elif sparsity == 0.0 and not (force and min_sparsity == 0.0):
        line.reason = "no exact zeros"
    elif min_sparsity is not None and sparsity < min_sparsity:
        line.reason = f"{100 * sparsity:.1f} % zeros, less than min_sparsity={100 * min_sparsity:.1f} %"
    else:
        layer = (SparseLinear if kind == "Linear" else SparseConv2d).from_dense(module, structure=structure)
        line.structure = str(layer.structure)
        line.sparse_bytes = layer.packed().nbytes
        return line, layer
    return line, None


def _ignored(module: nn.Module, name: str, ignore: Sequence[str | type[nn.Module]]) -> bool:
    for rule in ignore:
        if isinstance(rule, type):
            if isinstance(module, rule):
                return True
        elif rule.startswith("re:"):
            if re.fullmatch(rule[3:], name):
                return True
        elif fnmatch.fnmatchcase(name, rule) or name.startswith(rule + "."):
            return True
    return False


# -- whether it pays -------------------------------------------------------------------------------------------------

# Speed per kept multiplication of the sparse kernels, as a share of the dense ones', in inference and in a training
# step: rounded-down results of timing linear and 3x3 convolutional layers of 256 to 1024 channels on one core.
_RELATIVE_SPEED = {"unstructured": (0.6, 0.4), "tall block": (0.75, 0.4), "channel": (0.6, 0.4)}
# Layers with fewer weights, or fewer inputs to each output (depthwise convolutions), spend their time around the
# kernel.
_SMALLEST_WEIGHT = 4096
_FEWEST_INPUTS = 16


def _decide_by_estimate(layer: SparseLayer, line: LayerReport, force: bool) -> None:
    structure, density = layer.structure, 1.0 - line.sparsity
    kind = "unstructured"
    if isinstance(structure, Block) and structure.shape[0] >= 4:
        kind = "tall block"
    elif isinstance(structure, Channel):
        kind = "channel"
    training = layer.training and layer.values.requires_grad
    gain = _RELATIVE_SPEED[kind][training] / max(density, 1e-6)
    weights, inputs = math.prod(line.shape), math.prod(line.shape[1:])
    no_kernel = _why_no_kernel(layer)
    pays = False
    if no_kernel:
        line.reason = f"no sparse kernel takes it: {no_kernel}"
    elif weights < _SMALLEST_WEIGHT:
        line.reason = f"only {weights} weights: a call costs more than its arithmetic"
    elif inputs < _FEWEST_INPUTS:
        line.reason = f"only {inputs} inputs to each output: a call costs more than its arithmetic"
    else:
        pays = gain > 1.0
        speed = "10 times as fast as dense or more" if gain >= 10 else f"{gain:.2f} times as fast as dense"
        line.reason = f"estimated {speed}"
    line.sparse = pays or force
    if force and not pays:
        line.reason += "; converted because force=True"


def _why_no_kernel(layer: SparseLayer) -> str:
    """Say why only the reference, which computes densely, could run a layer; empty where a sparse kernel can."""
    values, bias, pattern = layer.values, layer.bias, layer.pattern
    if isinstance(layer, SparseLinear):
        explanation = explain_linear(values.new_empty((1, layer.in_features)), values, pattern, bias)
    else:
        x = values.new_empty((1, layer.in_channels, *pattern.shape[2:]))
        explanation = explain_conv2d(x, values, pattern, bias, groups=layer.groups)
    if explanation.chosen != "torch":
        return ""
    nearest = "cpu" if values.device.type == "cpu" else "triton"
    return "; ".join(explanation.reasons.get(nearest, [])) or "none is implemented for this device"


def _decide_by_timing(
    module: nn.Module, layer: SparseLayer, inputs: list[torch.Tensor] | None, line: LayerReport, force: bool
) -> None:
    if not inputs:
        line.sparse, line.reason = force, "not reached by the example inputs"
        return
    backward = module.training and any(parameter.requires_grad for parameter in module.parameters())
    runs = {"dense": _runner(module, inputs, backward), "sparse": _runner(layer, inputs, backward)}
    times = _interleaved_medians(runs)
    line.dense_ms, line.sparse_ms = 1e3 * times["dense"], 1e3 * times["sparse"]
    faster = times["sparse"] < times["dense"]
    line.sparse = faster or force
    line.reason = f"measured {times['dense'] / times['sparse']:.2f} times as fast as dense"
    if force and not faster:
        line.reason += "; converted because force=True"


def _record_inputs(
    model: nn.Module, modules: Iterable[nn.Module], example_inputs: Any
) -> dict[nn.Module, list[torch.Tensor]]:
    """Run the model once and keep what each module is called with; buffers that the run changes are put back."""
    recorded: dict[nn.Module, list[torch.Tensor]] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], torch.Tensor):
            recorded.setdefault(module, []).append(arguments[0].detach())

    hooks = [module.register_forward_pre_hook(record) for module in modules]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model(*(example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return recorded


def _runner(module: nn.Module, inputs: list[torch.Tensor], backward: bool) -> Callable[[], None]:
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                for x in inputs:
                    module(x)

        return forward

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> None:
        for x in inputs:
            y = module(x.clone().requires_grad_(x.is_floating_point()))
            torch.autograd.grad(y, parameters, torch.ones_like(y))

    return step


def _interleaved_medians(runs: dict[str, Callable[[], None]], budget: float = 0.1, most: int = 30) -> dict[str, float]:
    """Time alternately, so that a disturbance hits both; three rounds, then more while the budget (seconds) lasts."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    started = time.perf_counter()
    for round_number in range(most):
        if round_number >= 3 and time.perf_counter() - started > budget:
            break
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


# -- replacing -------------------------------------------------------------------------------------------------------

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Carry the user's hooks over; those of a pruning reparametrisation have no meaning any more."""
    for attribute in _HOOKS:
        hooks = getattr(source, attribute)
        for key, hook in list(hooks.items()):
            if not isinstance(hook, BasePruningMethod):
                getattr(target, attribute)[key] = hook


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    parent._modules[child] = module


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """Yield (name, layer) of every sparse layer in a model, each once."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module
