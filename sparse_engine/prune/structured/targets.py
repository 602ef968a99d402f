"""What a pruned network costs: parameters, operations, or measured time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sparse_engine.errors import PruneError

from .analysis import Analysis, Contraction
from .axes import Removed
from .capture import arguments, operator_name, scope, shape_of


class Cost(Protocol):
    """A number to bring down, as a function of what is removed."""

    unit: str

    def __call__(self, analysis: Analysis, removed: Removed, skipped: Sequence[str] = ()) -> float:
        """The cost of the network that is left, without the modules whose paths are `skipped`."""


@dataclass
class Parameters:
    """The number of parameters."""

    unit: str = "parameters"

    def __call__(self, analysis: Analysis, removed: Removed, skipped: Sequence[str] = ()) -> float:
        trainable = {name for name, tensor in analysis.program.tensors.items() if isinstance(tensor, nn.Parameter)}
        return float(
            sum(
                math.prod(_left(removed, axis) for axis in analysis.tensor_axes(name))
                for name in analysis.tensors
                if name in trainable and not _inside(name, skipped)
            )
        )


@dataclass
class Flops:
    """Floating-point operations of one call on the example inputs.

    Two for each multiply-add in convolutions, linear layers, matrix products and attention, as
    ``torch.utils.flop_counter`` counts them.
    """

    unit: str = "FLOPs"

    def __call__(self, analysis: Analysis, removed: Removed, skipped: Sequence[str] = ()) -> float:
        total = 0.0
        for contraction in analysis.contractions:
            if not _inside(scope(contraction.node), skipped):
                total += contraction_flops(contraction, removed)
        for node in analysis.program.nodes:
            name = operator_name(node)
            if skipped and _inside(scope(node), skipped):
                continue
            if name in ("matmul", "mm", "bmm", "addmm", "baddbmm"):
                first = [argument for argument in node.args if isinstance(argument, torch.fx.Node)][-2]
                total += (
                    2.0
                    * _left(removed, analysis.axes.find(analysis.values[first][0][-1]))
                    * _numel(analysis, removed, node)
                )
            elif name == "scaled_dot_product_attention":
                given = arguments(node)
                out = analysis.values[node][0]
                features, keys = analysis.values[given["query"]][0][-1], analysis.values[given["key"]][0][-2]
                rows = math.prod(_left(removed, analysis.axes.find(axis)) for axis in out[:-1])
                depth = _left(removed, analysis.axes.find(features)) + _left(removed, analysis.axes.find(out[-1]))
                total += 2.0 * rows * _left(removed, analysis.axes.find(keys)) * depth
        return total


def contraction_flops(contraction: Contraction, removed: Removed) -> float:
    """Operations of one convolution or linear layer after removal."""
    inputs, outputs, per_output = contraction_sizes(contraction, removed)
    shape = shape_of(contraction.source if contraction.transposed else contraction.node) or ()
    positions = math.prod(shape) / shape[1 if operator_name(contraction.node) != "linear" else -1]
    weight = shape_of(arguments(contraction.node)["weight"]) or ()
    taps = math.prod(weight[2:])
    if contraction.transposed:
        groups = contraction.groups if contraction.group_axis is None else _left(removed, contraction.group_axis)
        return 2.0 * positions * inputs * (outputs // groups) * taps
    return 2.0 * positions * outputs * per_output * taps


def contraction_sizes(contraction: Contraction, removed: Removed) -> tuple[int, int, int]:
    """(inputs, outputs, inputs per group) that are left."""
    inputs, outputs = _left(removed, contraction.inputs), _left(removed, contraction.outputs)
    if contraction.groups == 1:
        return inputs, outputs, inputs
    groups = _left(removed, contraction.group_axis)  # type: ignore[arg-type]
    return inputs, outputs, max(1, inputs // groups)


@dataclass
class Latency:
    """Milliseconds of one call, as the sum over layers of a table that is measured as it is asked.

    Example::

        cost = Latency()                                             # PyTorch's own layers
        cost = Latency(measure=executable_time)                      # sparse_engine.train.stp: as CPU executables

    Args:
        measure: (layer, input) -> milliseconds. The default times PyTorch's layer, the median of interleaved runs.
        rounding: sizes are measured at multiples of this and interpolated in between, so that a search over widths
            measures few layers.
        table: what is known so far, by shape; save it with the results.
        whole: (network, example inputs) -> milliseconds. With it `prune_channels` times the compacted network and
            chooses again until that meets the target, not only the sum of its layers.
        scale, offset: what brings the sum together with whole networks, which also spend time on activations, norms
            and start-up; `whole` sets the scale.

    Only layers count that a width changes: convolutions and linear layers.
    """

    measure: Callable[[nn.Module, Tensor], float] | None = None
    rounding: int = 16
    table: dict[str, float] = field(default_factory=dict)
    scale: float = 1.0
    offset: float = 0.0
    unit: str = "ms"
    whole: Callable[[nn.Module, Any], float] | None = None

    def __call__(self, analysis: Analysis, removed: Removed, skipped: Sequence[str] = ()) -> float:
        total = sum(
            self.layer(contraction, removed)
            for contraction in analysis.contractions
            if not _inside(scope(contraction.node), skipped)
        )
        return self.offset + self.scale * total

    def layer(self, contraction: Contraction, removed: Removed) -> float:
        """Milliseconds of one layer at the sizes that are left, interpolated between measured sizes."""
        inputs, outputs, _ = contraction_sizes(contraction, removed)
        groups = 1 if contraction.group_axis is None else _left(removed, contraction.group_axis)
        if groups > 1:  # sizes move together with the groups
            return self._measured(contraction, inputs, outputs, groups)
        low_in, high_in, part_in = self._around(inputs)
        low_out, high_out, part_out = self._around(outputs)
        value = 0.0
        for size_in, share_in in ((low_in, 1 - part_in), (high_in, part_in)):
            for size_out, share_out in ((low_out, 1 - part_out), (high_out, part_out)):
                if share_in * share_out > 0:
                    value += share_in * share_out * self._measured(contraction, size_in, size_out, 1)
        return value

    def _around(self, size: int) -> tuple[int, int, float]:
        low = size // self.rounding * self.rounding
        if low == size or low == 0:
            return size, size, 0.0
        return low, low + self.rounding, (size - low) / self.rounding

    def _measured(self, contraction: Contraction, inputs: int, outputs: int, groups: int) -> float:
        source = list(shape_of(contraction.source) or ())
        given = arguments(contraction.node)
        weight = shape_of(given["weight"]) or ()
        name = operator_name(contraction.node)
        source[contraction.dim] = inputs
        kernel, stride = tuple(weight[2:]), given.get("stride")
        key = f"{name} {tuple(source)} -> {outputs} kernel {kernel} stride {stride} groups {groups}"
        if key not in self.table:
            x = torch.randn(source)
            if name == "linear":
                layer: nn.Module = nn.Linear(inputs, outputs)
            else:
                kind = {
                    3: (nn.Conv1d, nn.ConvTranspose1d),
                    4: (nn.Conv2d, nn.ConvTranspose2d),
                    5: (nn.Conv3d, nn.ConvTranspose3d),
                }[len(source)]
                options = {
                    key: tuple(given[key]) if isinstance(given[key], list) else given[key]
                    for key in ("stride", "padding", "dilation")
                }
                layer = kind[int(contraction.transposed)](inputs, outputs, tuple(weight[2:]), groups=groups, **options)
            self.table[key] = (self.measure or time_layer)(layer.eval(), x)
        return self.table[key]


def preferred_multiple(
    analysis: Analysis, clock: Latency, *, most: int = 32, layers: int = 3, tolerance: float = 0.02
) -> int:
    """The largest multiple to which widths can be rounded up at no cost in time: what the kernels like.

    Example::

        preferred_multiple(analysis, Latency(measure=executable_time))      # 8

    The layers with the most operations are timed at widths around a half of their channels, inputs and outputs in
    turn; a multiple is free when widths rounded up to it take no longer in sum.

    Args:
        analysis: of the dense model.
        clock: measures layers; its table keeps what was measured.
        most: the largest multiple that is tried, a power of two.
        layers: how many layers are timed.
        tolerance: share of the time that counts as nothing.

    Returns:
        A power of two, 1 where every channel has its price.
    """
    dense = nothing_removed(analysis)
    plain = [c for c in analysis.contractions if c.groups == 1 and c.weight is not None]
    plain.sort(key=lambda contraction: -contraction_flops(contraction, dense))
    sizes = {id(c): contraction_sizes(c, dense)[:2] for c in plain}
    chosen = [c for c in plain if min(sizes[id(c)]) >= 2][:layers]
    best = 1
    for multiple in (2**power for power in range(1, most.bit_length())):
        plain_time = rounded_time = 0.0
        for contraction in chosen:
            inputs, outputs = sizes[id(contraction)]
            for position, size in enumerate((inputs, outputs)):
                base = max(1, size // 2 // most) * most
                for width in (base - most + step for step in (most // 2 - 3, most // 2 + 1, most - 5)):
                    width = min(max(1, width), size)
                    up = min(size, -(-width // multiple) * multiple)
                    shapes = [(w, outputs) if position == 0 else (inputs, w) for w in (width, up)]
                    times = [clock._measured(contraction, *shape, 1) for shape in shapes]
                    plain_time, rounded_time = plain_time + times[0], rounded_time + times[1]
        if chosen and rounded_time <= (1 + tolerance) * plain_time:
            best = multiple
    return best


def time_layer(layer: Callable[[Tensor], Any], x: Tensor, runs: int = 15) -> float:
    """The median time in milliseconds of a layer, or of anything called with a tensor, after two warm-up calls."""
    times = []
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        for _ in range(runs):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


COSTS: Mapping[str, Callable[[], Cost]] = {"parameters": Parameters, "flops": Flops, "latency": Latency}


def cost_named(cost: str | Cost) -> Cost:
    """A cost from its name.

    Raises:
        PruneError: no such cost.
    """
    if not isinstance(cost, str):
        return cost
    if cost not in COSTS:
        raise PruneError(
            f"the cost is {cost!r}; it has to be one of {', '.join(COSTS)}, or an object that is "
            "called with (analysis, removed)"
        )
    return COSTS[cost]()


def nothing_removed(analysis: Analysis) -> Removed:
    """The removal that leaves the dense network."""
    return {axis: np.zeros(analysis.axes.sizes[axis], dtype=bool) for axis in analysis.axes.roots()}


def _left(removed: Removed, axis: int) -> int:
    vector = removed[axis]
    return len(vector) - int(np.count_nonzero(vector))


def _inside(path: str, skipped: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in skipped)


def _numel(analysis: Analysis, removed: Removed, node: torch.fx.Node) -> int:
    return math.prod(_left(removed, analysis.axes.find(axis)) for axis in analysis.values[node][0])
